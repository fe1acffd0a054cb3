"""Conditionals for binary, counted, bounded and categorical values.

Values may be of any dtype that holds them, so that images stay ``uint8`` in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyro_vae.conditionals import marginal
from pyro_vae.conditionals.network import Network, independent, outputs, several
from pyro_vae.nn.affine import Affine

__all__ = ["Bernoulli", "Binomial", "Categorical", "ContinuousBernoulli"]


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
    limit, as the logarithm of the logit. In float32, torch caps its normaliser at logits of 16.

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
        return independent(dist.ContinuousBernoulli(logits=logits), len(self.event_shape))


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
            seen = int(data.nan_to_num(0.0).max())
            total_count = max(seen, 1) if not 127 < seen < 255 else 255
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
        if classes is None:
            if data is None or not cls.takes(data):
                raise ValueError(
                    "Categorical: wanted classes=, or data that are whole numbers from 0 to 255"
                )
            classes = int(data.nan_to_num(0.0).max()) + 1
        net = nn.Sequential(several(network, classes, event_shape), _ClassesLast(len(event_shape)))
        if data is not None:
            net.append(Affine(marginal.frequencies(data, classes).clamp(min=1e-3).log()))
        return cls(net, event_shape, classes)

    def forward(self, *parents: Tensor) -> TorchDistribution:
        """Categorical with event ``[*event]``."""
        logits = outputs(self, self.net, parents, *self.event_shape, self.classes)
        return independent(dist.Categorical(logits=logits), len(self.event_shape))


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
