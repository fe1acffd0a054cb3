"""What there is to say about one site of a run: is it data, and what is to be expected of it?"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_vae.batch import Batch
from pyro_vae.objectives.tracing import Site, core

__all__ = [
    "beside",
    "event_dim_of",
    "expected",
    "indicators",
    "is_discrete",
    "is_drawn",
    "is_label",
    "moments",
    "where_data",
    "whole",
]


def where_data(site: Site) -> Tensor | bool:
    """Where a site of the model is data."""
    for key in ("observed", "drawn"):
        if key in site["infer"]:
            where: Tensor | bool = site["infer"][key]
            return where
    return bool(site["is_observed"])


def whole(site: Site, batch: Batch | None, value: Tensor) -> Tensor:
    """Draws of whole numbers as such, if the data are."""
    data = batch[site["name"]] if batch is not None and site["name"] in batch else site["value"]
    if data.is_floating_point() or not value.is_floating_point():
        return value
    if is_discrete(site["fn"]):
        return value.to(torch.int64 if data.dtype == torch.int64 else torch.int32)
    return value


def is_drawn(site: Site) -> bool:
    """Whether the guide draws a site, in some entries at least."""
    return not site["is_observed"] and site["infer"].get("observed") is not True


def is_discrete(fn: Any) -> bool:
    """Whether there is nothing between two values."""
    with suppress(NotImplementedError):  # distributions that have no support
        return bool(fn.support.is_discrete)
    return False


def is_label(fn: Any) -> bool:
    """Whether values are numbers of classes, which have no mean but that of their indicators."""
    return isinstance(core(fn), dist.Categorical)


def expected(fn: Any) -> Tensor | None:
    """Mean ``[..., *event]``, of labels the probabilities ``[..., *event, C]``; None if not known."""
    if is_label(fn):
        probabilities: Tensor = core(fn).probs
        return probabilities
    with suppress(NotImplementedError):
        mean: Tensor = fn.mean
        return mean
    return None


def indicators(fn: Any, value: Tensor) -> Tensor:
    """Values as what they have a mean of."""
    return one_hot(value.long(), core(fn).probs.shape[-1]) if is_label(fn) else value


def beside(fn: Any, mask: Tensor) -> Tensor:
    """A mask of values as one of their means."""
    return mask[..., None] if is_label(fn) else mask


def event_dim_of(fn: Any) -> int:
    """Event dims of the mean."""
    return int(fn.event_dim) + is_label(fn)


def moments(site: Site) -> tuple[Tensor, Tensor] | None:
    """Mean and variance, if both are known (NaN where there is none)."""
    mean = expected(site["fn"])
    if mean is None or is_label(site["fn"]):
        return None if mean is None else (mean, mean * (1 - mean))
    with suppress(NotImplementedError):
        variance: Tensor = site["fn"].variance
        return mean, variance
    return None
