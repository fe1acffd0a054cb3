"""What a pair knows of some sites given others: log p of every subset, and coherence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from pyro_vae.batch import Batch
from pyro_vae.evaluation.likelihood import Difference, Evaluation, evaluate, mean_and_error
from pyro_vae.evaluation.predict import sample

__all__ = ["Coherence", "Subsets", "coherence", "subsets"]

Program = Callable[..., Any]
Sites = tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Subsets:
    """log p(x_A) >= of subsets A of the sites, of the same rows.

    Attributes:
        of: sites in the order of the data -> the evaluation of what a row has of them.
        seen: site -> bool ``[N]``, the rows that have any of it.
    """

    of: dict[Sites, Evaluation]
    seen: dict[str, Tensor]

    def joint(self, *sites: str) -> Evaluation:
        """Of some sites, in any order.

        Raises:
            ValueError: sites that were not evaluated together.
        """
        for names, found in self.of.items():
            if set(names) == set(sites):
                return found
        raise ValueError(f"joint: came {list(sites)}, wanted one of {list(map(list, self.of))}")

    def conditional(self, of: str | Sequence[str], given: str | Sequence[str]) -> Difference:
        """log p(x_of | x_given) = log p(x_of, x_given) - log p(x_given), paired by row, nats, over the
        rows that have all these sites.

        A difference of two lower bounds, so an estimate and no bound; the second, subtracted, has the
        smaller slack as a rule. Raise K until it stays.

        Raises:
            ValueError: sites that were not evaluated together, or that no row has together.
        """
        of, given = (([s] if isinstance(s, str) else list(s)) for s in (of, given))
        if both := sorted({*of} & {*given}):
            raise ValueError(f"conditional: came {both} on both sides, wanted each site once")
        whole, part = self.joint(*of, *given), self.joint(*given)
        rows = _having(self.seen, (*of, *given))
        if not bool(rows.any()):
            raise ValueError(f"conditional: none of {len(rows)} rows has {[*of, *given]} together")
        return Difference(*mean_and_error((whole.log_p - part.log_p)[rows]))

    def summary(self) -> dict[str, Any]:
        """Plain numbers, mean and standard error: ``x,y`` joint, ``y|x`` conditional; over the rows that
        have all these sites, and how many those are."""
        out: dict[str, Any] = {}
        for names, found in self.of.items():
            rows = _having(self.seen, names)
            if bool(rows.any()):
                mean, error = mean_and_error(found.log_p[rows])
                out[",".join(names)] = {"log_p": mean, "log_p_se": error, "rows": int(rows.sum())}
        for of, given in self._splits():
            gain = self.conditional(of, given)
            name = f"{','.join(of)}|{','.join(given)}"
            number = int(_having(self.seen, (*of, *given)).sum())
            out[name] = {"log_p": gain.mean, "log_p_se": gain.error, "rows": number}
        return out

    def _splits(self) -> list[tuple[Sites, Sites]]:
        """What was evaluated, in two parts of which the second was."""
        return [
            (tuple(site for site in whole if site not in given), given)
            for whole in self.of
            for given in self.of
            if set(given) < set(whole) and bool(_having(self.seen, whole).any())
        ]

    def __str__(self) -> str:
        lines = []
        for name, numbers in self.summary().items():
            sign = "~" if "|" in name else ">="
            log_p = f"{numbers['log_p']:.3f} ± {numbers['log_p_se']:.3f}"
            lines.append(f"log p({name.replace('|', ' | ')}) {sign} {log_p} nats")
        return "\n".join(lines)

    __repr__ = __str__


def subsets(
    model: Program,
    guide: Program,
    data: Batch,
    num_particles: int = 500,
    *,
    sites: Sequence[str] | None = None,
    **options: Any,
) -> Subsets:
    """``evaluate`` for every subset of the sites, the guide seeing what is judged and nothing else.

    Args:
        data: held-out rows; what a row lacks of a subset contributes 0.
        num_particles: K.
        sites: those of whose subsets (default: all; n sites have 2^n - 1).
        options: of ``evaluate``.

    Raises:
        ValueError: data without such sites, and as ``evaluate``.
    """
    names = _sites("subsets", data, sites)
    found = {}
    for size in range(1, len(names) + 1):
        for chosen in combinations(names, size):
            rows = data.without([site for site in data if site not in chosen])
            found[chosen] = evaluate(model, guide, rows, num_particles, **options)
    return Subsets(found, _seen(data, names))


@dataclass(frozen=True)
class Coherence:
    """Share of rows, of those that have all that is given, whose generated site a classifier gives the
    class of the row.

    Attributes:
        given: sites that it was generated from; none: of fresh rows all sites together.
        site: that was generated; empty for all.
        share: of such rows.
        error: its standard error, binomial.
    """

    given: Sites
    site: str
    share: float
    error: float

    def __str__(self) -> str:
        given = ", ".join(self.given)
        what = f"{self.site} from {given}" if given else "fresh rows, all sites alike"
        return f"{what}: {self.share:.1%} ± {self.error:.1%}"


def coherence(
    model: Program,
    guide: Program,
    data: Batch,
    labels: Tensor,
    classifiers: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    seed: int = 0,
    batch_size: int = 250,
) -> list[Coherence]:
    """Whether what is made of some sites shows what they show (Shi et al. 2019, arXiv:1911.03393).

    For every subset of the sites: z is drawn given it, every other site is generated as its expected
    value given z, and the classifier of that site says what it shows. Of as many fresh rows, the share
    on which all classifiers agree comes first.

    Args:
        data: held-out rows, of which the sites that have a classifier are taken.
        labels: ``[N]`` their classes.
        classifiers: site -> ``[n, *event]`` (``[n, C]`` probabilities, for a site of labels) to
            classes ``[n]``.

    Raises:
        ValueError: a site without rows, labels that do not match the rows, a single site.
    """
    names = _sites("coherence", data, list(classifiers))
    if len(names) < 2 or labels.shape != (len(data),):
        raise ValueError(
            f"coherence: came classifiers of {list(names)} and labels {list(labels.shape)} for "
            f"{len(data)} rows, wanted two sites at least, and a label for each row"
        )
    options: dict[str, Any] = {"mean": True, "seed": seed, "batch_size": batch_size}

    def shown(values: Mapping[str, Tensor]) -> list[Tensor]:
        return [classifiers[site](x).to(labels.device) for site, x in values.items()]

    fresh = shown(sample(model, len(data), sites=names, **options))
    alike = torch.stack([classes == fresh[0] for classes in fresh]).all(0)
    found, seen = [Coherence((), "", *_share(alike))], _seen(data, names)
    for size in range(1, len(names)):
        for given in combinations(names, size):
            whole = _having(seen, given).nonzero().squeeze(1)
            if not len(whole):
                continue
            rows = data.rows(whole).without([site for site in data if site not in given])
            others = [site for site in names if site not in given]
            made = sample(model, given=rows, guide=guide, sites=others, **options)
            wanted = labels[whole.to(labels.device)]
            for site, classes in zip(made, shown(made), strict=True):
                found.append(Coherence(given, site, *_share(classes == wanted)))
    return found


def _sites(what: str, data: Batch, sites: Sequence[str] | None) -> Sites:
    if not isinstance(data, Batch):
        raise ValueError(f"{what}: came a {type(data).__name__}, wanted a Batch of named sites")
    asked = set(data if sites is None else sites)
    if unknown := sorted(asked - set(data)):
        raise ValueError(f"{what}: came sites {unknown}, the data have {list(data)}")
    return tuple(site for site in data if site in asked)


def _seen(data: Batch, sites: Sites) -> dict[str, Tensor]:
    return {site: data.seen(site).cpu() for site in sites}


def _having(seen: Mapping[str, Tensor], sites: Sequence[str]) -> Tensor:
    """Bool ``[N]``, the rows that have all of some sites."""
    return torch.stack([seen[site] for site in sites]).all(0)


def _share(hits: Tensor) -> tuple[float, float]:
    share = float(hits.double().mean())
    return share, math.sqrt(share * (1 - share) / len(hits))
