"""The same quantities for every model, whatever it was trained on: numbers with standard errors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.batch import Batch, still, take
from pyro_vae.compiled import Fast
from pyro_vae.evaluation.diagnostics import has_tail, khat_threshold, pareto_khat, tail_length
from pyro_vae.evaluation.latent import LatentTable, active_units
from pyro_vae.evaluation.proposals import Proposal, candidates
from pyro_vae.evaluation.units import bits_per_dim, entries, is_discretized, log_jacobian
from pyro_vae.objectives.particles import Particles, run
from pyro_vae.objectives.plan import Plan, make_plan
from pyro_vae.objectives.support import check_data
from pyro_vae.objectives.swap import evaluating, own_parameters, owner, preserved
from pyro_vae.objectives.tracing import core

__all__ = [
    "CELLS",
    "Difference",
    "Evaluation",
    "admitted",
    "check_rows",
    "device_of",
    "entries_per_row",
    "evaluate",
    "judging",
    "mean_and_error",
    "of_rows",
    "whole_numbers",
]

Program = Callable[..., Any]
CELLS = 2_000_000  # entries of the data times particles held at a time; on an accelerator
MORE_CELLS = 32  # times as many
_ROWS = ("log_p", "log_p_tenth", "elbo", "ess", "khat")
_OPTIONAL = ("log_jacobian", "entries", "rate_rows")  # what results saved before they were lack
PILOT_ROWS, PILOT_PARTICLES, ELBO_PARTICLES = 64, 200, 64


def mean_and_error(rows: Tensor) -> tuple[float, float]:
    """Mean over rows and its standard error."""
    rows = rows.double()
    error = rows.std() / math.sqrt(len(rows)) if len(rows) > 1 else torch.tensor(math.nan)
    return float(rows.mean()), float(error)


@dataclass(frozen=True)
class Difference:
    """Mean of row-wise differences (nats) and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.error:.3f}"


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Held-out quantities of a pair, row by row (nats), each with its standard error over rows.

    Attributes:
        log_p: ``[N]`` importance-sampled lower bound on log p(x) with K particles.
        log_p_tenth: ``[N]`` the same with the first K / 10: what is left of the bound's slack shows
            in the difference.
        elbo: ``[N]`` ELBO at beta = 1.
        ess: ``[N]`` effective sample size of the K weights.
        khat: ``[N]`` Pareto k-hat of the weights.
        rate: site -> ``[*dims]`` mean rate.
        active: site -> bool ``[*event]``, Var_x(E_q[(z - m) / s]) > 0.01, m and s of p(z | parents).
        num_particles: K.
        proposals: what the importance sampling drew from, chosen on other rows.
        seed: of the evaluation.
        log_jacobian: ``[N]`` to be added to log p and ELBO for the units that the data came in.
        entries: ``[N]`` number of observed entries.
        discretized: whether the data are 8-bit images, whose unit is bits/dim.
        rate_rows: ``[N]`` rate of all sites and dimensions.
    """

    log_p: Tensor
    log_p_tenth: Tensor
    elbo: Tensor
    ess: Tensor
    khat: Tensor
    rate: dict[str, Tensor]
    active: dict[str, Tensor]
    num_particles: int
    proposals: tuple[str, ...]
    seed: int
    notes: tuple[str, ...] = field(default=())
    log_jacobian: Tensor | None = None
    entries: Tensor | None = None
    discretized: bool = False
    rate_rows: Tensor | None = None

    def bits_per_dim(self, quantity: str = "log_p") -> tuple[float, float]:
        """Mean over rows of a bound in bits per observed entry of the data as they came, and its
        standard error. An upper bound, as the quantity is a lower one; the less, the better.

        Raises:
            ValueError: a result that was saved without the number of entries.
        """
        if self.entries is None or self.log_jacobian is None:
            raise ValueError("bits_per_dim: the result does not say how many entries a row has")
        rows = getattr(self, quantity) + self.log_jacobian
        return mean_and_error(bits_per_dim(rows, self.entries))

    def versus(self, other: Evaluation, quantity: str = "log_p") -> Difference:
        """This minus the other, paired by row.

        Raises:
            ValueError: the two were evaluated on different numbers of rows.
        """
        mine, theirs = getattr(self, quantity), getattr(other, quantity)
        if len(mine) != len(theirs):
            raise ValueError(
                f"versus: came {len(theirs)} rows, wanted the same {len(mine)} rows for both"
            )
        return Difference(*mean_and_error(mine - theirs))

    def summary(self) -> dict[str, Any]:
        """Plain numbers: means, standard errors, and how far they can be trusted.

        ``rate`` is by site, ``rate_se`` the error of their sum; ``distortion`` is -(ELBO + rate);
        what tells of k-hat is None where K is too small for one.
        """
        out: dict[str, Any] = {"rows": len(self.log_p), "num_particles": self.num_particles}
        for name in ("log_p", "log_p_tenth", "elbo"):
            out[name], out[f"{name}_se"] = mean_and_error(getattr(self, name))
        out["ess_median"] = float(self.ess.median())
        out |= dict.fromkeys(("khat_median", "khat_threshold", "khat_bad_share"))
        if has_tail(self.num_particles):
            out["khat_median"] = float(self.khat.median())
            out["khat_threshold"] = khat_threshold(self.num_particles)
            out["khat_bad_share"] = float((self.khat > out["khat_threshold"]).double().mean())
        out["rate"] = {site: float(rate.sum()) for site, rate in self.rate.items()}
        if self.rate_rows is not None:
            _, out["rate_se"] = mean_and_error(self.rate_rows)
            distortion = -(self.elbo + self.rate_rows)
            out["distortion"], out["distortion_se"] = mean_and_error(distortion)
        out["rate_per_dim"] = {site: rate.tolist() for site, rate in self.rate.items()}
        out["active_units"] = {site: int(units.sum()) for site, units in self.active.items()}
        out["latent_dims"] = {site: units.numel() for site, units in self.active.items()}
        if self.log_jacobian is not None and bool((self.log_jacobian != 0).any()):
            for name in ("log_p", "elbo"):
                rows = getattr(self, name) + self.log_jacobian
                out[f"{name}_raw"], out[f"{name}_raw_se"] = mean_and_error(rows)
        if self.discretized:
            out["bits_per_dim"], out["bits_per_dim_se"] = self.bits_per_dim()
        return out | {"proposals": list(self.proposals), "seed": self.seed}

    def arrays(self) -> dict[str, Any]:
        """Everything as named arrays, for an ``.npz``."""
        out: dict[str, Any] = {name: getattr(self, name).numpy() for name in _ROWS}
        out |= {f"rate/{site}": rate.numpy() for site, rate in self.rate.items()}
        out |= {f"active/{site}": units.numpy() for site, units in self.active.items()}
        for name in _OPTIONAL:
            if getattr(self, name) is not None:
                out[name] = getattr(self, name).numpy()
        settings = {
            "num_particles": self.num_particles,
            "seed": self.seed,
            "proposals": self.proposals,
            "notes": self.notes,
            "discretized": self.discretized,
        }
        return out | {"settings": np.array(json.dumps(settings))}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Evaluation:
        """The inverse of ``arrays``."""
        sites: dict[str, Any] = {"rate": {}, "active": {}}
        for name in arrays:
            kind, _, site = name.partition("/")
            if site:
                sites[kind][site] = torch.from_numpy(np.array(arrays[name]))
        settings = json.loads(str(arrays["settings"]))
        settings |= {name: tuple(settings[name]) for name in ("proposals", "notes")}
        names = [*_ROWS, *(name for name in _OPTIONAL if name in arrays)]
        rows: dict[str, Any] = {name: torch.from_numpy(np.array(arrays[name])) for name in names}
        return cls(**rows, **sites, **settings)

    def __str__(self) -> str:
        s = self.summary()
        khat = "k-hat: K too small"
        if s["khat_median"] is not None:
            above = f"above {s['khat_threshold']:.2f} in {s['khat_bad_share']:.0%} of rows"
            khat = f"k-hat median {s['khat_median']:.2f}, {above}"
        lines = [
            f"log p(x) >= {s['log_p']:.3f} ± {s['log_p_se']:.3f} nats  (K = {s['num_particles']}, "
            f"{s['rows']} rows, {', '.join(self.proposals)}, seed {self.seed})",
            f"         >= {s['log_p_tenth']:.3f} ± {s['log_p_tenth_se']:.3f}  (K / 10)",
            f"ELBO        {s['elbo']:.3f} ± {s['elbo_se']:.3f}",
            f"ESS median {s['ess_median']:.1f}, {khat}",
        ]
        if "log_p_raw" in s:
            raw = f"log p(x) >= {s['log_p_raw']:.3f} ± {s['log_p_raw_se']:.3f} nats"
            lines.insert(2, f"{raw} in the units that the data came in")
        if "bits_per_dim" in s:
            lines.insert(2, f"bits/dim <= {s['bits_per_dim']:.4f} ± {s['bits_per_dim_se']:.4f}")
        for site, rate in s["rate"].items():
            units = (
                f", active units {s['active_units'][site]} of {s['latent_dims'][site]}"
                if site in s["active_units"]
                else ""
            )
            lines.append(f"rate of {site}: {rate:.3f} nats{units}")
        return "\n".join([*lines, *self.notes])

    __repr__ = __str__


def evaluate(
    model: Program,
    guide: Program,
    data: Batch | Tensor,
    num_particles: int = 500,
    *,
    widen: bool = True,
    batch_size: int = 250,
    chunk: int | None = None,
    compile: str = "auto",
    seed: int = 0,
) -> Evaluation:
    """Judge a pair on held-out rows; memory does not grow with ``num_particles``.

    Importance sampling gives a lower bound whose slack depends on the guide, so its proposal is
    widened: each half of the rows takes the widening that gives the other half's pilot rows the
    highest bound.

    Args:
        data: held-out rows, as the programs take them.
        num_particles: K.
        widen: False draws from the guide as it is.
        batch_size: rows at a time.
        chunk: particles at a time (default: by the size of a row).
        compile: level at which importance weights are computed, as in ``fit``; the numbers are the
            same but for rounding.
        seed: of all draws; the global random state is left as it was.

    Raises:
        ValueError: no rows, a latent outside the plate over rows, a posterior that is a point mass
            (its importance weights mean nothing; report its own bound).
    """
    whole_numbers("evaluate", num_particles=num_particles, batch_size=batch_size, chunk=chunk)
    check_rows("evaluate: data", data)
    with judging(model, guide, seed):
        data = still(data).to(device_of(model, guide, data))
        args = (take(data, slice(0, 2)),)
        plan = make_plan(model, guide, args, {})
        check_data(plan.supports, data.look() if isinstance(data, Batch) else data)
        table = admitted("evaluate", plan, model, guide, args)
        masses = [s for s, support in plan.supports.items() if support.constraint.is_discrete]
        options = candidates(table.guide, table.model) if widen else (Proposal(),)
        cells = CELLS * (1 if data.device.type == "cpu" else MORE_CELLS)
        fitting = max(
            1, cells // (entries_per_row(data) * min(max(batch_size, PILOT_ROWS), len(data)))
        )
        chunk = chunk or fitting
        latents = LatentTable()
        halves = [torch.arange(start, len(data), 2) for start in range(min(2, len(data)))]
        chosen = [
            _choose(options, model, guide, data, plan, other, num_particles, chunk)
            for other in reversed(halves)
        ]
        columns: list[tuple[Tensor, ...]] = []
        calls = len(data) / batch_size * num_particles / chunk
        for half, proposal in zip(halves, chosen, strict=True):
            weights = _Weights(proposal, model, guide, plan, compile, calls)
            for rows in half.split(batch_size):
                batch = take(data, rows)
                latents.add(model, guide, (batch,), plan, min(num_particles, ELBO_PARTICLES), chunk)
                columns.append(_stream(weights, batch, num_particles, chunk))
        back = torch.cat(halves).argsort()

        def in_order(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts)[back.to(parts[0].device)].cpu()

        log_p, tenth, ess, khat = (in_order(list(column)) for column in zip(*columns, strict=True))
        return Evaluation(
            log_p=log_p,
            log_p_tenth=tenth,
            elbo=in_order(latents.elbo),
            ess=ess,
            khat=khat,
            rate={site: torch.cat(parts).mean(0).cpu() for site, parts in latents.rate.items()},
            active={
                site: active_units(torch.cat(parts, 1)).cpu()
                for site, parts in latents.shift.items()
            },
            num_particles=num_particles,
            proposals=tuple(dict.fromkeys(map(str, chosen))),
            seed=seed,
            notes=plan.notes,
            log_jacobian=log_jacobian(data, table.likelihood),
            entries=entries(data, table.likelihood),
            discretized=is_discretized(data, table.likelihood, masses),
            rate_rows=in_order(latents.rate_of_rows()),
        )


def whole_numbers(what: str, at_least: int = 1, **numbers: int | None) -> None:
    """Refuse arguments that are no counts; None stands for a default.

    Raises:
        ValueError: naming the argument.
    """
    for name, number in numbers.items():
        if number is not None and (not isinstance(number, int) or number < at_least):
            raise ValueError(f"{what}: came {name}={number!r}, wanted a whole number >= {at_least}")


def check_rows(what: str, data: Any) -> None:
    """Refuse what is no data set of at least one row.

    Raises:
        ValueError: naming ``what`` it is.
    """
    if not isinstance(data, Batch | Tensor):
        raise ValueError(f"{what} came as {type(data).__name__}, wanted a Batch or a tensor")
    if isinstance(data, Tensor) and data.dim() == 0:
        raise ValueError(f"{what} came as a single number, wanted rows [N, *event]")
    if len(data) == 0:
        raise ValueError(f"{what} came without rows")
    if isinstance(data, Tensor) and data.is_floating_point() and bool(data.isnan().any()):
        raise ValueError(
            f"{what} came as a bare tensor with {int(data.isnan().sum())} NaN, which mean missing in a "
            "Batch alone: Batch({'x': x})"
        )


@contextmanager
def judging(model: Program, guide: Program, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradient, a seed of its own; everything restored on exit."""
    with (
        evaluating(model, guide),
        own_parameters(model, guide),
        preserved(model, guide),
        torch.no_grad(),
        pyro.validation_enabled(False),
    ):
        torch.manual_seed(seed)
        yield


def device_of(model: Program, guide: Program, data: Batch | Tensor) -> torch.device:
    """Where the pair's parameters live; functions are taken to be where the data are."""
    modules = [m for program in (model, guide) if (m := owner(program)) is not None]
    places = [parameter.device for module in modules for parameter in module.parameters()]
    return places[0] if places else data.device


def admitted(
    what: str, plan: Plan, model: Program, guide: Program, args: tuple[Any, ...]
) -> Particles:
    """One pass over a pair whose importance weights are defined row by row.

    Raises:
        ValueError: a latent outside the plate over rows, a subsampled plate inside a row, a posterior
            that is a point mass; begins with ``what`` was asked for.
    """
    of_rows(what, plan)
    table, other = (run(model, guide, args, {}, plan, 1) for _ in range(2))
    auxiliary = any(site["infer"].get("is_auxiliary") for site in table.guide.values())
    for name, site in table.guide.items():
        # autoguides draw an auxiliary site and transform it: such a point is another one each time
        moves = auxiliary and not torch.equal(table.samples[name], other.samples[name])
        if isinstance(core(site["fn"]), dist.Delta) and not moves:
            raise ValueError(
                f"{what}: site {name!r} has a point mass as posterior, whose importance weights "
                "mean nothing; report its own bound"
            )
    return table


def of_rows(what: str, plan: Plan) -> None:
    """Refuse a pair whose rows have no log p of their own.

    Raises:
        ValueError: a latent outside the plate over rows, a subsampled plate inside a row; begins with
            ``what`` was asked for.
    """
    if not plan.rows or plan.outside:
        raise ValueError(
            f"{what}: sites {sorted(plan.outside)} lie outside the plate over rows, so log p of a "
            "row is not defined; put every site into that plate"
        )
    if plan.subsampled:
        raise ValueError(
            f"{what}: plates {list(plan.subsampled)} inside a row are subsampled, and the weight "
            "of a part of a row is no bound; use the whole plate"
        )


def entries_per_row(data: Batch | Tensor) -> int:
    """Numbers in a row of the data."""
    shapes = [data.shape(site) for site in data] if isinstance(data, Batch) else [data.shape]
    return max(1, sum(math.prod(shape[1:]) for shape in shapes))


def _choose(
    options: tuple[Proposal, ...],
    model: Program,
    guide: Program,
    data: Batch | Tensor,
    plan: Plan,
    rows: Tensor,
    num_particles: int,
    chunk: int,
) -> Proposal:
    """The proposal with the highest bound on pilot rows, if that beats the first, the guide as it is,
    by more than two standard errors, paired by row."""
    if len(options) == 1 or len(data) < 2:
        return options[0]
    rows = rows[:: max(1, len(rows) // PILOT_ROWS)][:PILOT_ROWS]
    batch = take(data, rows)
    pilots = min(num_particles, PILOT_PARTICLES)  # what suits many particles need not suit few

    def bound(proposal: Proposal) -> Tensor:
        repeats = range(PILOT_PARTICLES // pilots)
        weights = _Weights(proposal, model, guide, plan)
        runs = [_stream(weights, batch, pilots, chunk)[0] for _ in repeats]
        return torch.stack(runs).mean(0)

    first, *others = map(bound, options)
    best = max(range(len(others)), key=lambda i: float(others[i].mean()))
    gain, error = mean_and_error(others[best] - first)
    if not math.isfinite(error):  # a single row, or one where the guide never draws what it takes
        error = 0.0
    return options[1 + best] if gain > 2 * error else options[0]


class _Weights:
    """Log weights of a number of particles, at a level."""

    def __init__(
        self,
        proposal: Proposal,
        model: Program,
        guide: Program,
        plan: Plan,
        level: str = "eager",
        calls: float = 0,
    ) -> None:
        self.log_weights = partial(_log_weights, proposal, model, guide, plan)
        self.level, self.calls = level, calls
        self.fast: dict[int, Fast] = {}

    def __call__(self, batch: Any, size: int) -> Tensor:
        """``[size, B]``."""
        if size not in self.fast:
            self.fast[size] = Fast(partial(self.log_weights, size), self.level, self.calls)
        return self.fast[size](batch)


def _log_weights(
    proposal: Proposal, model: Program, guide: Program, plan: Plan, size: int, batch: Any
) -> Tensor:
    return proposal.log_weights(model, guide, (batch,), plan, size)


def _stream(
    weights: Callable[[Any, int], Tensor], batch: Any, num_particles: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p at K and at K / 10, effective sample size and k-hat, ``[B]`` each, at constant memory."""
    tenth = max(1, num_particles // 10)
    keep = tail_length(num_particles) + 1
    total = squares = at_tenth = largest = None
    done = 0
    while done < num_particles:
        stop = tenth if done < tenth else num_particles
        size = min(chunk, stop - done)
        log_w = weights(batch, size).double()
        done += size
        sums, twice = torch.logsumexp(log_w, 0), torch.logsumexp(2 * log_w, 0)
        total = sums if total is None else torch.logaddexp(total, sums)
        squares = twice if squares is None else torch.logaddexp(squares, twice)
        largest = log_w if largest is None else torch.cat([largest, log_w])
        largest = largest.topk(min(keep, len(largest)), 0).values
        if done == tenth:
            at_tenth = total - math.log(tenth)
    assert total is not None
    assert squares is not None
    assert at_tenth is not None
    assert largest is not None
    ess = torch.exp(2 * total - squares)
    return total - math.log(num_particles), at_tenth, ess, pareto_khat(largest)
