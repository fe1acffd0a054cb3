"""A conditional for counts of rare events."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.conditionals import marginal
from pyro_vae.conditionals.discrete import NegativeBinomial
from pyro_vae.conditionals.network import Network, independent, outputs, positive
from pyro_vae.nn.affine import Affine

__all__ = ["Poisson"]


class Poisson(nn.Module):
    """Counts 0, 1, ... without end whose variance is their mean m(y) (Nazábal et al. 2020).

        m(y) = unit · (floor + softplus(h(y)))

    Softplus is linear to the right, where exp would overflow, and exponential to the left. Counts that
    vary more: ``NegativeBinomial``.

    Args:
        net: ``parents -> h [..., *event]``.
        event_shape: ``[*event]``.
        unit: number or ``[*event]``, in which the mean counts.
        floor: smallest mean in that unit.
    """

    unit: Tensor

    def __init__(
        self,
        net: nn.Module,
        event_shape: Sequence[int],
        unit: Tensor | float = 1.0,
        floor: float = 1e-6,
    ) -> None:
        super().__init__()
        self.net, self.event_shape, self.floor = net, tuple(event_shape), floor
        self.register_buffer("unit", positive("unit", unit))

    @staticmethod
    def takes(data: Tensor) -> bool:
        """Whether all observed entries are whole numbers from 0 on."""
        return NegativeBinomial.takes(data)

    @classmethod
    def build(
        cls, network: Network, event_shape: Sequence[int], data: Tensor | None = None
    ) -> Poisson:
        """Make the network too; with ``data`` it starts from their mean."""
        net = network(event_shape)
        if data is None:
            return cls(net, event_shape)
        # an entry that was always 0 starts at half a count in all rows together
        unit = marginal.mean(data).clamp(min=0.5 / len(data))
        return cls(nn.Sequential(net, Affine(math.log(math.expm1(1.0)))), event_shape, unit)

    def forward(self, *parents: Tensor) -> TorchDistribution:
        """Poisson with event ``[*event]``."""
        out = outputs(self, self.net, parents, *self.event_shape)
        rate = self.unit * (self.floor + softplus(out))
        return independent(_Poisson(rate), len(self.event_shape))


class _Poisson(dist.Poisson):
    """Pyro's Poisson, whose log x! is computed in the shape of the values, once and not in every
    particle, and which takes whole numbers of any type."""

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.to(self.rate.dtype)
        if self._validate_args:
            self._validate_sample(value)
        log_prob: Tensor = torch.xlogy(value, self.rate) - self.rate - (value + 1).lgamma()
        return log_prob
