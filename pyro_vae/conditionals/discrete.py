"""Conditionals for binary, counted, bounded and categorical values.

Values may be of any dtype that holds them, so that images stay ``uint8`` in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from pyro_vae.conditionals import marginal
from pyro_vae.conditionals.continuous_bernoulli import ExactContinuousBernoulli
from pyro_vae.conditionals.network import (
    Constant,
    Network,
    at_one,
    independent,
    outputs,
    positive,
    several,
)
from pyro_vae.conditionals.special import HALF_LOG_2PI, remainder
from pyro_vae.nn.affine import Affine
from pyro_vae.nn.leading import Reshape

__all__ = [
    "Bernoulli",
    "Binomial",
    "Categorical",
    "ContinuousBernoulli",
    "LearnedBernoulli",
    "LearnedOneHot",
    "NegativeBinomial",
    "OneHotCategorical",
    "UniformBernoulli",
    "UniformOneHot",
]


class Bernoulli(nn.Module):
    """Binary values, 0 or 1. Values in between are an error; see ContinuousBernoulli and Binomial.

    Args:
        net: ``parents -> logits [..., *event]``.
        event_shape: ``[*event]``.
    """

    def __init__(self, net: nn.Module, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.net, self.event_shape = net, tuple(event_shape)

    @staticmethod
    def takes(data: Tensor) -> bool:
        """Whether all observed entries are 0 or 1."""
        return marginal.holds((data == 0) | (data == 1), data)

    @classmethod
    def build(
        cls, network: Network, event_shape: Sequence[int], data: Tensor | None = None
    ) -> Bernoulli:
        """Make the network too; with ``data`` it starts from their mean (Burda et al. 2016)."""
        return cls(_from_mean(network(event_shape), data), event_shape)

    def forward(self, *parents: Tensor) -> TorchDistribution:
        """Bernoulli with event ``[*event]``."""
        logits = outputs(self, self.net, parents, *self.event_shape)
        return independent(_Bernoulli(logits=logits), len(self.event_shape))


class ContinuousBernoulli(nn.Module):
    """Values in [0, 1] (Loaiza-Ganem and Cunningham 2019, arXiv:1907.06845).

    The density is not bounded at 0 and 1: pixels that are always black or white raise it without
    limit, as the logarithm of the logit.

    Args:
        net: ``parents -> logits [..., *event]``.
        event_shape: ``[*event]``.
    """

    def __init__(self, net: nn.Module, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.net, self.event_shape = net, tuple(event_shape)

    @staticmethod
    def takes(data: Tensor) -> bool:
        """Whether all observed entries are within [0, 1]."""
        return marginal.holds((data >= 0) & (data <= 1), data)

    @classmethod
    def build(
        cls, network: Network, event_shape: Sequence[int], data: Tensor | None = None
    ) -> ContinuousBernoulli:
        """Make the network too; with ``data`` it starts near their mean."""
        return cls(_from_mean(network(event_shape), data), event_shape)

    def forward(self, *parents: Tensor) -> TorchDistribution:
        """ContinuousBernoulli with event ``[*event]``."""
        logits = outputs(self, self.net, parents, *self.event_shape)
        return independent(ExactContinuousBernoulli(logits=logits), len(self.event_shape))


class Binomial(nn.Module):
    """Counts 0, 1, ..., n, such as grey levels.

    Args:
        net: ``parents -> logits [..., *event]``.
        event_shape: ``[*event]``.
        total_count: n. Saved with the parameters.
    """

    total_count: Tensor

    def __init__(self, net: nn.Module, event_shape: Sequence[int], total_count: int) -> None:
        super().__init__()
        self.net, self.event_shape = net, tuple(event_shape)
        if total_count < 1:
            raise ValueError(f"Binomial: total_count= came {total_count}, wanted at least 1")
        self.register_buffer("total_count", torch.tensor(float(total_count)))

    @staticmethod
    def takes(data: Tensor) -> bool:
        """Whether all observed entries are whole numbers from 0 to 255."""
        return marginal.holds((data >= 0) & (data <= 255) & (data == data.round()), data)

    @classmethod
    def build(
        cls,
        network: Network,
        event_shape: Sequence[int],
        data: Tensor | None = None,
        total_count: int | None = None,
    ) -> Binomial:
        """Make the network too; with ``data`` it starts from their mean.

        n is ``total_count`` or else the largest count seen; 255 if that is above 127, since bytes
        need not reach their end in every sample.
        """
        if total_count is None:
            if data is None:
                raise ValueError("Binomial: came neither data nor total_count=, wanted one")
            total_count = marginal.top(data)
        net = _from_mean(network(event_shape), data, total_count)
        return cls(net, event_shape, total_count)

    def forward(self, *parents: Tensor) -> TorchDistribution:
        """Binomial with event ``[*event]``."""
        logits = outputs(self, self.net, parents, *self.event_shape)
        return independent(_Binomial(self.total_count, logits=logits), len(self.event_shape))


class Categorical(nn.Module):
    """One of C classes, 0, 1, ..., C - 1, for each entry.

    Args:
        net: ``parents -> logits [..., *event, C]``.
        event_shape: ``[*event]``.
        classes: C.
    """

    def __init__(self, net: nn.Module, event_shape: Sequence[int], classes: int) -> None:
        super().__init__()
        self.net, self.event_shape, self.classes = net, tuple(event_shape), classes

    @staticmethod
    def takes(data: Tensor) -> bool:
        """Whether all observed entries are whole numbers from 0 to 255."""
        return Binomial.takes(data)

    @classmethod
    def build(
        cls,
        network: Network,
        event_shape: Sequence[int],
        data: Tensor | None = None,
        classes: int | None = None,
    ) -> Categorical:
        """Make the network too; with ``data`` it starts from the class frequencies.

        C is ``classes`` or else one more than the largest class seen.
        """
        classes = number_of_classes("Categorical", data) if classes is None else classes
        net = nn.Sequential(several(network, classes, event_shape), _ClassesLast(len(event_shape)))
        if data is not None:
            net.append(Affine(marginal.frequencies(data, classes).clamp(min=1e-3).log()))
        return cls(net, event_shape, classes)

    def forward(self, *parents: Tensor) -> TorchDistribution:
        """Categorical with event ``[*event]``."""
        logits = outputs(self, self.net, parents, *self.event_shape, self.classes)
        return independent(dist.Categorical(logits=logits), len(self.event_shape))


def number_of_classes(name: str, data: Tensor | None) -> int:
    """One more than the largest class seen."""
    if data is None or not Categorical.takes(data):
        raise ValueError(f"{name}: wanted classes=, or data that are whole numbers from 0 to 255")
    return int(data.nan_to_num(0.0).max()) + 1


class OneHotCategorical(nn.Module):
    """One of C classes as an indicator vector, for each entry: the last axis of the event has the C
    classes. As a latent it has a relaxation, which numbers of classes have not.

    Args:
        net: ``parents -> logits [..., *event]``.
        event_shape: ``[*entries, C]``.
    """

    def __init__(self, net: nn.Module, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.net, self.event_shape = net, tuple(event_shape)
        if len(self.event_shape) < 1:
            raise ValueError("OneHotCategorical: event_shape came [], wanted [*entries, classes]")

    @staticmethod
    def takes(data: Tensor) -> bool:
        """Whether all observed rows along the last axis hold one 1 and 0 besides."""
        return Bernoulli.takes(data) and bool((data.nan_to_num().sum(-1) <= 1).all())

    @classmethod
    def build(
        cls, network: Network, event_shape: Sequence[int], data: Tensor | None = None
    ) -> OneHotCategorical:
        """Make the network too; with ``data`` it starts from the class frequencies."""
        flat = (math.prod(event_shape),)
        net = nn.Sequential(network(flat), Reshape(flat, event_shape))
        if data is not None:
            net.append(Affine(marginal.mean(data).clamp(min=1e-3).log()))
        return cls(net, event_shape)

    def forward(self, *parents: Tensor) -> TorchDistribution:
        """OneHotCategorical with event ``[*entries, C]``."""
        logits = outputs(self, self.net, parents, *self.event_shape)
        return independent(_OneHotCategorical(logits=logits), len(self.event_shape) - 1)


class UniformBernoulli(Bernoulli):
    """The prior of independent fair coins: ``UniformBernoulli(200)``."""

    def __init__(self, *event_shape: int) -> None:
        super().__init__(Constant(event_shape), event_shape)


class LearnedBernoulli(Bernoulli):
    """The prior of independent coins, fair at the start."""

    def __init__(self, *event_shape: int) -> None:
        super().__init__(Constant(event_shape, learned=True), event_shape)


class UniformOneHot(OneHotCategorical):
    """The prior of independent classes, all alike: ``UniformOneHot(20, 10)`` has 20 of 10 each."""

    def __init__(self, *event_shape: int) -> None:
        super().__init__(Constant(event_shape), event_shape)


class LearnedOneHot(OneHotCategorical):
    """The prior of independent classes, all alike at the start."""

    def __init__(self, *event_shape: int) -> None:
        super().__init__(Constant(event_shape, learned=True), event_shape)


class NegativeBinomial(nn.Module):
    """Counts 0, 1, ... without end, more variable than Poisson's.

    The negative binomial by its mean m(y) and its dispersion d, a Poisson whose rate is drawn from
    a gamma: the usual likelihood of sequencing counts (Lopez et al. 2018, scVI, where 1 / d is
    called theta).

        Var(x | y) = m(y) + d m(y)²
        m(y) = unit · (floor + softplus(h(y)))
        d = dispersion · (floor + softplus(r))

    Softplus is linear to the right, where exp would overflow, and exponential to the left. r is a
    plain parameter that does not depend on the parents y. Poisson is the limit of small d.

    Args:
        net: ``parents -> h [..., *event]``.
        event_shape: ``[*event]``.
        unit: number or ``[*event]``, in which the mean counts.
        dispersion: initial d; its shape, which broadcasts to ``[*event]``, says which entries
            share one: a number for all, ``[*event]`` for one each.
        floor: smallest mean in that unit, and smallest d as a fraction of the initial one.
    """

    unit: Tensor
    start: Tensor

    def __init__(
        self,
        net: nn.Module,
        event_shape: Sequence[int],
        unit: Tensor | float = 1.0,
        dispersion: Tensor | float = 1.0,
        floor: float = 1e-6,
    ) -> None:
        super().__init__()
        self.net, self.event_shape, self.floor = net, tuple(event_shape), floor
        self.register_buffer("unit", positive("unit", unit))
        self.register_buffer("start", positive("dispersion", dispersion))
        self.raw = at_one(self.start, floor)

    @staticmethod
    def takes(data: Tensor) -> bool:
        """Whether all observed entries are whole numbers from 0 on."""
        return marginal.holds((data >= 0) & (data == data.round()) & data.isfinite(), data)

    @classmethod
    def build(
        cls,
        network: Network,
        event_shape: Sequence[int],
        data: Tensor | None = None,
        shared: bool = False,
    ) -> NegativeBinomial:
        """Make the network too; with ``data`` it starts from their mean and variance.

        d starts at (variance - mean) / mean², kept within [.01, 100]. One per entry, or with
        ``shared`` one for all.
        """
        net = network(event_shape)
        dispersion = torch.ones(() if shared else tuple(event_shape))
        if data is None:
            return cls(net, event_shape, dispersion=dispersion)
        # an entry that was always 0 starts at half a count in all rows together
        unit = marginal.mean(data).clamp(min=0.5 / len(data))
        dispersion = (marginal.spread(data).square() - unit) / unit.square()
        dispersion = dispersion.clamp(0.01, 100.0)
        dispersion = dispersion.log().mean().exp() if shared else dispersion
        net = nn.Sequential(net, Affine(math.log(math.expm1(1.0))))  # softplus gives 1
        return cls(net, event_shape, unit, dispersion)

    @property
    def dispersion(self) -> Tensor:
        """The current d, shaped as it was given."""
        return self.start * (self.floor + softplus(self.raw))

    def forward(self, *parents: Tensor) -> TorchDistribution:
        """Negative binomial (Pyro's GammaPoisson) with event ``[*event]``."""
        out = outputs(self, self.net, parents, *self.event_shape)
        mean, concentration = self.unit * (self.floor + softplus(out)), 1 / self.dispersion
        fn = _NegativeBinomial(concentration, mean)
        return independent(fn, len(self.event_shape))


def _from_mean(net: nn.Module, data: Tensor | None, bound: float = 1.0) -> nn.Module:
    """``net`` with the logit of the data's mean added to what it returns."""
    return net if data is None else nn.Sequential(net, Affine(marginal.logit(data, bound)))


class _ClassesLast(nn.Module):
    """``[..., C, *event] -> [..., *event, C]``."""

    def __init__(self, event_dim: int) -> None:
        super().__init__()
        self.event_dim = event_dim

    def forward(self, logits: Tensor) -> Tensor:
        return logits.movedim(-1 - self.event_dim, -1)


class _Bernoulli(dist.Bernoulli):  # type: ignore[misc]
    """Pyro's Bernoulli, which refuses to score integer and bool values."""

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob: Tensor = super().log_prob(value.to(self.logits.dtype))
        return log_prob


class _OneHotCategorical(dist.OneHotCategorical):
    """Pyro's OneHotCategorical, whose draws ask the host for the number of classes."""

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            classes = self._categorical.sample(torch.Size(sample_shape))[..., None]
            zeros = torch.zeros(shape, dtype=self.logits.dtype, device=self.logits.device)
            return zeros.scatter(-1, classes, 1.0)


class _Binomial(dist.Binomial):
    """Pyro's Binomial for one n, with two differences.

    * ``uint8`` values: lgamma(x + 1) of x = 255 overflows to lgamma(0);
    * log C(n, x) does not depend on the parents: it is computed in the shape of the values, once
      and not K times for K particles.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.to(self.logits.dtype)
        if self._validate_args:
            self._validate_sample(value)
        n = self.total_count
        one = n[(0,) * max(n.dim() - value.dim(), 0)]  # n is the same in every particle
        coefficient = (one + 1).lgamma() - (value + 1).lgamma() - (one - value + 1).lgamma()
        return value * self.logits + n * logsigmoid(-self.logits) + coefficient


class _NegativeBinomial(dist.GammaPoisson):
    """Pyro's GammaPoisson, accurate in float32 however large counts and concentration are.

    With c the concentration, m the mean, l and h the lower and the higher of m and x,

        log p(x) = sign(x - m) [c log(1 + (h - l) / (c + l)) - x log(1 + c (h - l) / (l (c + h)))]
                   - 1/2 log(1 + x/c) + δ(c + x) - δ(c) - log(x! exp(x) / x^x)

    where δ is what Stirling's formula leaves of log gamma; the second term is 0 at x = 0. In
    this form, after Loader (2000), nothing large cancels. What does not depend on the mean is
    computed in the shape of c and the values, once and not in every particle.
    """

    def __init__(
        self, concentration: Tensor, mean: Tensor, validate_args: bool | None = None
    ) -> None:
        self._came = concentration, mean
        super().__init__(concentration, concentration / mean, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _NegativeBinomial:
        new = self._get_checked_instance(_NegativeBinomial, _instance)
        new._came = self._came
        expanded: _NegativeBinomial = super().expand(batch_shape, new)
        return expanded

    def log_prob(self, value: Tensor) -> Tensor:
        c, mean = self._came
        value = value.to(mean.dtype)
        if self._validate_args:
            self._validate_sample(value)
        some = value.clamp(min=1)  # stands for x where it divides
        factorial = (0.5 * some.log() + HALF_LOG_2PI + remainder(some)).masked_fill(value == 0, 0.0)
        rest = remainder(c + value) - remainder(c) - 0.5 * (value / c).log1p() - factorial
        above, low, high = value - mean, value.minimum(mean), value.maximum(mean)
        away = above.abs()
        first = c * (away / (c + low)).log1p()
        second = value * (c * away / (some.minimum(mean) * (c + high))).log1p()
        log_prob = above.sign() * (first - second) + rest
        return log_prob.expand(torch.broadcast_shapes(self.batch_shape, value.shape))
