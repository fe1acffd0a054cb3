"""What there is to say about one site of a run: is it data, and what is to be expected of it?"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_vae.batch import Batch
from pyro_vae.objectives.plan import Plan
from pyro_vae.objectives.tracing import Site, core

__all__ = [
    "OverDraws",
    "beside",
    "event_dim_of",
    "expected",
    "indicators",
    "is_discrete",
    "is_drawn",
    "is_factor",
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


def is_factor(site: Site) -> bool:
    """Whether a site is ``pyro.factor``: a number in the density, and no value."""
    return isinstance(core(site["fn"]), dist.Unit)


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


class OverDraws:
    """Mean and standard deviation of a latent, from its moments given what it depends on."""

    def __init__(self) -> None:
        self.count = 0
        self.start = self.first = self.second = self.within = torch.zeros(())

    def add(self, site: Site, plan: Plan, size: int) -> None:
        """``size`` more draws."""
        fn, value, data = site["fn"], site["value"], site["infer"].get("observed")
        mean, variance = moments(site) or (value, torch.zeros_like(value))
        if data is not None:
            data = beside(fn, data)
            mean = torch.where(data, indicators(fn, value).to(mean), mean)
            variance = torch.where(data, torch.zeros_like(variance), variance)
        mean, variance = (
            plan.canonical(moment, event_dim_of(fn), size, True) for moment in (mean, variance)
        )
        if not self.count:
            self.start = mean[0]  # the mean of equal numbers is that number, to the last digit
        off = mean.double() - self.start.double()
        self.count += len(mean)
        self.first = self.first + off.sum(0)
        self.second = self.second + off.square().sum(0)
        self.within = self.within + variance.double().sum(0)

    def mean(self) -> Tensor:
        return self._as_came(self.start.double() + self.first / self.count)

    def deviation(self) -> Tensor:
        between = (self.second - self.first.square() / self.count) / max(1, self.count - 1)
        return self._as_came((self.within / self.count + between.clamp(min=0)).sqrt())

    def _as_came(self, value: Tensor) -> Tensor:
        floating = self.start.is_floating_point()
        return value.to(self.start.dtype if floating else torch.get_default_dtype())
