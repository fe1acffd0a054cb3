"""Do data lie in the support of their likelihood? Asked of values, and once of a whole data set."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.batch import Batch
from pyro_vae.objectives.tracing import Site, core, unmasked_fn

__all__ = ["Support", "check_data", "inside", "kind", "outside", "supports"]

CURES = {
    "Bernoulli": "binarize the data, or use ContinuousBernoulli for values in [0, 1], Binomial for "
    "counts, Gaussian for real values",
    "ContinuousBernoulli": "scale the data to [0, 1], or use Binomial for counts, Gaussian for real "
    "values",
    "DiscretizedLogisticMixture": "use whole numbers from 0 to levels - 1, or Gaussian for real "
    "values",
    "NegativeBinomial": "use whole numbers from 0, or Gaussian for real values",
    "Binomial": "use whole numbers from 0 to total_count, raise total_count, or use "
    "NegativeBinomial for counts without end, ContinuousBernoulli for values in [0, 1], Gaussian for "
    "real values",
    "Categorical": "use whole numbers from 0 to the number of classes - 1",
}


class Support(NamedTuple):
    """The support of a likelihood that is the same for all rows."""

    kind: str
    constraint: Any
    event_dim: int  # dims that one value of the distribution takes (0 where it factorizes)


def kind(fn: Any) -> str:
    """Name of the innermost distribution."""
    return type(core(fn)).__name__.lstrip("_")


def inside(constraint: Any, value: Tensor) -> Tensor | None:
    """Where values satisfy a constraint; None where that is not known."""
    value = value.to(torch.uint8) if value.dtype == torch.bool else value
    try:
        checked: Tensor = constraint.check(value)
    except (NotImplementedError, ValueError, AttributeError):
        return None
    return checked


def outside(
    kind: str, constraint: Any, event_dim: int, value: Tensor, mask: Tensor | None
) -> tuple[str, str] | None:
    """What observed values lie outside a support, and the cure; None if none does.

    Args:
        event_dim: dims that one value takes.
        value: ``[..., *event]``.
        mask: bool, broadcastable to ``value``; True where observed.
    """
    allowed = inside(constraint, value)
    if allowed is None:
        return None
    if mask is not None:
        allowed = allowed | ~(mask.flatten(-event_dim).all(-1) if event_dim else mask)
    if bool(allowed.all()):
        return None
    where = (~allowed).nonzero()
    event = value.shape[value.dim() - event_dim :]
    example = value.expand(allowed.shape + event)[tuple(where[0])].tolist()
    shown = f"{example:g}" if isinstance(example, int | float) else example
    return (
        f"data outside the support of the {kind}: {len(where)} of {allowed.numel()} entries, such as "
        f"{shown}",
        CURES.get(kind, "transform the data, or use a likelihood that takes such values"),
    )


def supports(model: Mapping[str, Site], batch: Batch | None) -> dict[str, Support]:
    """Supports of the sites that a batch observes, where all its rows have the same one."""
    out = {}
    for name in batch if batch is not None else ():
        if name in model and (support := _same_for_all_rows(core(unmasked_fn(model[name])))):
            out[name] = support
    return out


def _same_for_all_rows(fn: Any) -> Support | None:
    try:
        constraint = copy.copy(fn.support)
    except (NotImplementedError, AttributeError):
        return None
    for name, bound in list(vars(constraint).items()):
        if isinstance(bound, Tensor) and bound.dim():
            rows = bound.expand(fn.batch_shape)
            if not bool((rows == rows[:1]).all()):
                return None
            setattr(constraint, name, rows[:1])
    return Support(kind(fn), constraint, fn.event_dim)


def check_data(supports: Mapping[str, Support], data: Any) -> None:
    """Refuse a data set with values that a likelihood does not take, whatever the validation says.

    Raises:
        ValueError: naming the site, how many entries, and what to use instead.
    """
    if not isinstance(data, Batch):
        return
    for site, support in supports.items():
        mask = data.mask(site) if site in data.incomplete else None
        if problem := outside(*support, data[site], mask):
            raise ValueError(f"site {site!r}: {'; '.join(problem)}")
