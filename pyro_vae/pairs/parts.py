"""What builders read off the data, and how they make parts for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.conditionals.discrete import (
    Bernoulli,
    Binomial,
    Categorical,
    ContinuousBernoulli,
    NegativeBinomial,
    OneHotCategorical,
    UniformBernoulli,
    UniformOneHot,
)
from pyro_vae.conditionals.gaussian import Gaussian, StandardNormal
from pyro_vae.conditionals.logistic import LogisticMixture
from pyro_vae.conditionals.marginal import deviation, mean, median, spread
from pyro_vae.conditionals.poisson import Poisson
from pyro_vae.conditionals.positive import LogNormal
from pyro_vae.conditionals.student import StudentT
from pyro_vae.nn.affine import Affine, OneHot

__all__ = [
    "Architecture",
    "Part",
    "built",
    "built_prior",
    "check_parts",
    "check_seen",
    "check_support",
    "inputs_for",
    "likelihood_for",
    "observed",
    "sizes",
    "standard",
    "tupled",
]

FEW_CLASSES = 16
HOMES = {  # of what an argument takes, where it is no conditional
    "net": "pyro_vae.nn",
    "norm": "torch.nn",
    "activation": "torch.nn",
    "merge": "pyro_vae.guides, precision_weighted or residual",
}
PRIORS: dict[type, Callable[..., nn.Module]] = {  # of a posterior, where it is not StandardNormal
    Bernoulli: UniformBernoulli,
    OneHotCategorical: UniformOneHot,
}

Part = nn.Module | Callable[..., nn.Module]
"""A ready conditional; or a class of them, or a function, that makes one."""


class Architecture(Protocol):
    """Makes a network ``[..., *inputs] -> [..., *outputs]``: ``dense``, ``convolutional``, ..."""

    def __call__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        hidden: Sequence[int],
        activation: Callable[[], nn.Module],
        /,
    ) -> nn.Module: ...


def likelihood_for(batch: Batch, site: str = "x") -> type[nn.Module]:
    """The likelihood class for the observed values of a site.

    | values                                                   | class               |
    | -------------------------------------------------------- | ------------------- |
    | 0 or 1                                                   | Bernoulli           |
    | whole numbers below 16, in ``int64`` numbers or vectors  | Categorical         |
    | whole numbers from 0 to 255, of any other type or shape  | Binomial            |
    | whole numbers from 0 on, some of them above 255          | NegativeBinomial    |
    | within [0, 1]                                            | ContinuousBernoulli |
    | any other                                                | Gaussian            |
    """
    data = observed(batch, site)
    batch = batch.look()
    labels = batch[site].dtype == torch.int64 and data.dim() <= 2
    labels = labels and Categorical.takes(data) and bool(data.nan_to_num().max() < FEW_CLASSES)
    if labels and not Bernoulli.takes(data):
        return Categorical
    kinds = (Bernoulli, Binomial, NegativeBinomial, ContinuousBernoulli)
    return next((kind for kind in kinds if kind.takes(data)), Gaussian)


def inputs_for(batch: Batch, site: str, likelihood: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    """A fixed module from a site's values to network inputs of order 1, and their shape.

    Classes become indicators ``[C, *event]``; counts without end (NegativeBinomial, Poisson) become
    log(1 + x), as in scVI (Lopez et al. 2018), positive values (LogNormal) log x; bounded counts and
    values in [0, 1] are divided by their maximum; other values are standardised entry by entry, which
    outliers (StudentT) must neither set the unit of nor come through at full size: median, median
    deviation, then asinh.
    """
    data = observed(batch, site)
    event_shape = tuple(data.shape[1:])
    if isinstance(likelihood, Categorical):
        return OneHot(likelihood.classes, len(event_shape)), (likelihood.classes, *event_shape)
    if isinstance(likelihood, NegativeBinomial | Poisson):
        return nn.Sequential(_Log1p(), standard(data.log1p())), event_shape
    if isinstance(likelihood, LogNormal):
        return nn.Sequential(_Log(), standard(data.log())), event_shape
    if isinstance(likelihood, StudentT):
        center, scale = median(data), deviation(data)
        return nn.Sequential(Affine(-center / scale, 1 / scale), _Asinh()), event_shape
    if Binomial.takes(data) or ContinuousBernoulli.takes(data):
        top = float(data.nan_to_num().max())
        return Affine(scale=1 / top if top > 0 else 1.0), event_shape
    return standard(data), event_shape


def standard(data: Tensor) -> Affine:
    """Each entry less its mean over the observed rows, in units of its deviation."""
    scale = spread(data)
    return Affine(-mean(data) / scale, 1 / scale)


class _Log1p(nn.Module):
    """Whatever the dtype of the counts, in torch's default dtype (float64 stays what it is)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.log1p()


class _Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log()


class _Asinh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.asinh()


def built(
    part: Part,
    network: Callable[[Sequence[int]], nn.Module],
    event_shape: Sequence[int],
    data: Tensor | None,
) -> nn.Module:
    """A ready conditional as it is, else what its builder makes."""
    if isinstance(part, nn.Module):
        return part
    conditional: nn.Module = getattr(part, "build", part)(network, event_shape, data)
    return conditional


def built_prior(
    prior: nn.Module | Callable[..., nn.Module] | None, posterior: nn.Module, shape: Sequence[int]
) -> nn.Module:
    """A ready prior as it is, else what a function of the latent dimensions makes; None: the
    uninformed one for the kind of posterior."""
    if isinstance(prior, nn.Module):
        return prior
    return (prior or PRIORS.get(type(posterior), StandardNormal))(*shape)


def check_parts(pair: str, parts: Mapping[str, Any], optional: Collection[str]) -> None:
    """Refuse what is no part of a pair and builds none."""
    for name, part in parts.items():
        if not (callable(part) or (part is None and name in optional)):
            raise ValueError(
                f"{pair}: came {name}={part!r}, wanted a class or a function: of "
                f"{HOMES.get(name, 'pyro_vae.conditionals')}"
            )


def tupled(numbers: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(numbers) if isinstance(numbers, Sequence) else (numbers,)


def sizes(
    pair: str, latent: int | Sequence[int], hidden: int | Sequence[int], layers: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The event shape of the latent, and the widths of so many hidden layers at least.

    Raises:
        ValueError: other than whole numbers above 0, or too few of them.
    """
    shape, widths = tupled(latent), tupled(hidden)
    whole = all(isinstance(size, int) and size > 0 for size in (*shape, *widths))
    if not shape or len(widths) < layers or not whole:
        raise ValueError(
            f"{pair}: came latent={latent!r}, hidden={hidden!r}, wanted whole numbers above 0"
        )
    return shape, widths


def check_seen(batch: Batch, site: str) -> None:
    """Refuse entries that no row has: columns by their names, where the batch knows them."""
    never = (~batch.look().mask(site)).all(0).nonzero().tolist()
    if not never:
        return
    names = batch.record.get("columns", {}).get(site)
    told = [names[i] for (i,) in never] if isinstance(names, list) else never
    raise ValueError(
        f"site {site!r}: none of {len(batch)} rows has {str(told[:8])[1:-1]}"
        f"{', ...' if told[8:] else ''}, wanted each entry in some; drop what is never observed"
    )


def observed(batch: Batch, site: str) -> Tensor:
    """Values ``[N, *event]`` of a site in torch's default dtype, NaN where missing."""
    if not isinstance(batch, Batch):
        raise ValueError(f"came a {type(batch).__name__}, wanted a Batch: Batch({{{site!r}: x}})")
    if site not in batch:
        raise ValueError(
            f"site {site!r} is not in the batch, which has {list(batch.sites)}; say which by site="
        )
    batch = batch.look()
    data = batch[site].to(torch.get_default_dtype())
    if site in batch.incomplete:
        data = data.masked_fill(~batch.mask(site), torch.nan)
    if bool(data.isnan().all()):
        raise ValueError(f"site {site!r}: the batch has no observed entry ({batch.size} rows)")
    return data


@torch.no_grad()
def check_support(
    batch: Batch, site: str, likelihood: nn.Module, z: Tensor | Sequence[Tensor], data: Tensor
) -> None:
    """Score nothing that the likelihood gives no density, such as grey pixels under a Bernoulli.

    Args:
        z: its parent, or all of them, ``[1, *latent]``.
    """
    training = likelihood.training
    fn = likelihood.eval()(*([z] if isinstance(z, Tensor) else z))
    likelihood.train(training)
    name = type(likelihood).__name__
    if fn.event_shape != data.shape[1:]:
        raise ValueError(
            f"site {site!r}: data have event shape {list(data.shape[1:])}, "
            f"{name} has {list(fn.event_shape)}"
        )
    inside = fn.support.check(batch[site])
    if not bool(inside.all()):
        kinds = (
            Bernoulli,
            Binomial,
            Categorical,
            LogisticMixture,
            NegativeBinomial,
            ContinuousBernoulli,
        )
        others = ", ".join(kind.__name__ for kind in kinds if kind.takes(data))
        raise ValueError(
            f"site {site!r}: {name} does not take these data (row {int((~inside).nonzero()[0, 0])} "
            f"is outside its support); {others + ' and ' if others else ''}Gaussian would"
        )
