"""A conditional for positive values."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.conditionals import marginal
from pyro_vae.conditionals.network import LearnedScale, Network, independent, outputs
from pyro_vae.nn.affine import Affine

__all__ = ["LogNormal"]


class LogNormal(LearnedScale):
    """Positive values whose logarithm is N(m(y), s²), with a learned scale s (Nazábal et al. 2020).

        E[x | y] = exp(m(y) + s² / 2)
        s = scale · (floor + softplus(r)),  s = scale at the start

    r is a plain parameter that does not depend on the parents y.

    Args:
        net: ``parents -> m [..., *event]``.
        event_shape: ``[*event]``.
        scale: initial scale of log x; its shape, which broadcasts to ``[*event]``, says which entries
            share one.
        floor: smallest scale as a fraction of the initial one.
    """

    @staticmethod
    def takes(data: Tensor) -> bool:
        """Whether all observed entries are above 0."""
        return marginal.holds((data > 0) & data.isfinite(), data)

    @classmethod
    def build(
        cls, network: Network, event_shape: Sequence[int], data: Tensor | None = None
    ) -> LogNormal:
        """Make the network too; with ``data`` it starts from mean and spread of their logarithms."""
        net, scale = network(event_shape), torch.ones(tuple(event_shape))
        if data is not None:
            logs = data.clamp(min=torch.finfo(data.dtype).tiny).log()
            scale = marginal.spread(logs)
            net = nn.Sequential(net, Affine(marginal.mean(logs), scale))
        return cls(net, event_shape, scale)

    def forward(self, *parents: Tensor) -> TorchDistribution:
        """LogNormal with event ``[*event]``."""
        loc = outputs(self, self.net, parents, *self.event_shape)
        return independent(dist.LogNormal(loc, self.scale), len(self.event_shape))
