"""Gaussian conditionals with diagonal covariance."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.conditionals import marginal
from pyro_vae.conditionals.network import (
    LearnedScale,
    Network,
    independent,
    outputs,
    positive,
    several,
)
from pyro_vae.nn.affine import Affine
from pyro_vae.nn.leading import Reshape

__all__ = ["DiagonalGaussian", "Gaussian", "OptimalSigma", "StandardNormal"]


class StandardNormal(nn.Module):
    """The prior N(0, I) over an event of the given shape: ``StandardNormal(8)``."""

    loc: Tensor
    scale: Tensor

    def __init__(self, *event_shape: int) -> None:
        super().__init__()
        # buffers, so that .to(device) moves them; nothing to save
        self.register_buffer("loc", torch.zeros(event_shape), persistent=False)
        self.register_buffer("scale", torch.ones(event_shape), persistent=False)

    def forward(self) -> TorchDistribution:
        return independent(dist.Normal(self.loc, self.scale), self.loc.dim())

    def extra_repr(self) -> str:
        return f"{list(self.loc.shape)}"


class DiagonalGaussian(nn.Module):
    """N(m(y), diag s(y)²): both the mean and the scale depend on the parents y.

        s(y) = unit · (floor + softplus(r(y)))

    Softplus grows linearly, so that a network far from its training rows returns a large scale
    where exp would overflow; the floor keeps log densities finite where a scale runs to 0.

    Args:
        net: ``parents -> [..., 2 * D]`` for an event ``[D]``: D means m, then D raw scales r. In
            general the first axis of the event comes twice: ``[..., 2 * C, H, W]``; ``[..., 2]``
            for an event ``[]``.
        event_shape: ``[*event]``.
        unit: number or ``[*event]``, in which the scale counts.
        floor: smallest scale, in that unit.
    """

    unit: Tensor

    def __init__(
        self,
        net: nn.Module,
        event_shape: Sequence[int],
        unit: Tensor | float = 1.0,
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        self.net, self.event_shape, self.floor = net, tuple(event_shape), floor
        self.register_buffer("unit", positive("unit", unit))

    @classmethod
    def build(
        cls, network: Network, event_shape: Sequence[int], data: Tensor | None = None
    ) -> DiagonalGaussian:
        """Make the network too; with ``data`` it starts from their mean and spread."""
        double, unit = several(network, 2, event_shape), torch.ones(())
        if data is not None:
            loc, unit = marginal.mean(data), marginal.spread(data)
            shift = torch.stack([loc, torch.zeros_like(loc)])
            scale = torch.stack([unit, torch.ones_like(unit)])
            double = nn.Sequential(double, Affine(shift, scale))
        flat = Reshape((2, *event_shape), _twice(event_shape))
        return cls(nn.Sequential(double, flat), event_shape, unit)

    def forward(self, *parents: Tensor) -> TorchDistribution:
        """Normal with event ``[*event]``."""
        shape = _twice(self.event_shape)
        out = outputs(self, self.net, parents, *shape)
        lead = out.shape[: out.dim() - len(shape)]
        loc, raw = out.reshape((*lead, 2, *self.event_shape)).unbind(len(lead))
        scale = self.unit * (self.floor + softplus(raw))
        return independent(dist.Normal(loc, scale), len(self.event_shape))


class Gaussian(LearnedScale):
    """N(m(y), s²) with a learned scale s that does not depend on the parents y.

        s = scale · (floor + softplus(r)),  s = scale at the start

    r is a plain parameter, so that s is learned on a relative footing whatever the data's unit. A
    scale that is learned, and not set to 1, is what makes the ELBO a calibrated number (Rybkin et
    al. 2021, arXiv:2006.13202).

    Args:
        net: ``parents -> [..., *event]``.
        event_shape: ``[*event]``.
        scale: initial scale; its shape, which broadcasts to ``[*event]``, says which entries share
            one: a number for all, ``[*event]`` for one each, ``[C, 1, 1]`` for one per channel.
        floor: smallest scale as a fraction of the initial one. A constant entry ends there.
    """

    @classmethod
    def build(
        cls,
        network: Network,
        event_shape: Sequence[int],
        data: Tensor | None = None,
        shared: bool = False,
    ) -> Gaussian:
        """Make the network too; with ``data`` it starts from their mean and spread.

        One scale per entry, or with ``shared`` one for all.
        """
        return cls(*_start(network, event_shape, data, shared))

    def forward(self, *parents: Tensor) -> TorchDistribution:
        """Normal with event ``[*event]``."""
        loc = outputs(self, self.net, parents, *self.event_shape)
        return independent(dist.Normal(loc, self.scale), len(self.event_shape))


class OptimalSigma(nn.Module):
    """N(m(y), s²) whose scale s is computed from residuals, not learned.

    The sigma-VAE of Rybkin et al. (2021, arXiv:2006.13202):

        s² = 1/n Σ (x - m(y))²

    over the training rows and over the entries that share a scale: the maximum of the expected log
    density for given means. There its derivative by s vanishes, so the gradient for all other
    parameters is the same whether or not it flows through s, and s can be a stored constant. The
    conditional never sees x: training code calls ``update``, evaluation finds s frozen:

        z = guide.posterior(batch["x"]).sample()
        likelihood.update(batch["x"], likelihood(z).mean, batch.mask("x"), momentum=0.1)

    Args:
        net: ``parents -> [..., *event]``.
        event_shape: ``[*event]``.
        scale: initial scale; its shape, which broadcasts to ``[*event]``, says which entries share
            one. A number is the paper's single sigma.
        floor: smallest scale as a fraction of the initial one. A constant entry ends there.
    """

    scale: Tensor
    smallest: Tensor

    def __init__(
        self,
        net: nn.Module,
        event_shape: Sequence[int],
        scale: Tensor | float = 1.0,
        floor: float = 1e-3,
    ) -> None:
        super().__init__()
        self.net, self.event_shape = net, tuple(event_shape)
        self.register_buffer("scale", positive("scale", scale))
        self.register_buffer("smallest", floor * self.scale)

    @classmethod
    def build(
        cls,
        network: Network,
        event_shape: Sequence[int],
        data: Tensor | None = None,
        shared: bool = False,
    ) -> OptimalSigma:
        """Make the network too; with ``data`` it starts from their mean and spread.

        One scale per entry, or with ``shared`` one for all.
        """
        return cls(*_start(network, event_shape, data, shared))

    def forward(self, *parents: Tensor) -> TorchDistribution:
        """Normal with event ``[*event]``."""
        loc = outputs(self, self.net, parents, *self.event_shape)
        return independent(dist.Normal(loc, self.scale), len(self.event_shape))

    @torch.no_grad()
    def update(
        self, x: Tensor, loc: Tensor, mask: Tensor | None = None, momentum: float = 1.0
    ) -> None:
        """Move the scale to the residuals of these training rows.

        Args:
            x: data ``[B, *event]``.
            loc: means ``[..., B, *event]``, such as ``self(z).mean``.
            mask: bool ``[B, *event]``, True where x counts (default: everywhere). A scale none of
                whose entries counts stays as it is.
            momentum: weight of these rows in s². 1 is the variance of these rows alone; less makes
                a running average over minibatches.

        Raises:
            RuntimeError: in evaluation mode, where the scale is frozen.
        """
        if not self.training:
            raise RuntimeError("OptimalSigma: the scale is frozen in evaluation; call .train()")
        square = (x - loc).square()
        counts = torch.ones_like(square)
        if mask is not None:
            counts = counts * mask
        shape = self.scale.shape
        total = (square * counts).sum_to_size(shape)
        counted = counts.sum_to_size(shape)
        variance = self.scale.square()
        new = torch.where(counted > 0, total / counted.clamp(min=1), variance)
        new = (1 - momentum) * variance + momentum * new
        self.scale.copy_(torch.maximum(new.sqrt(), self.smallest))


def _twice(event_shape: Sequence[int]) -> tuple[int, ...]:
    return (2 * event_shape[0], *event_shape[1:]) if event_shape else (2,)


def _start(
    network: Network, event_shape: Sequence[int], data: Tensor | None, shared: bool
) -> tuple[nn.Module, Sequence[int], Tensor]:
    """Network, event shape and scale of a Gaussian that starts from the data's mean and spread."""
    net = network(event_shape)
    scale = torch.ones(()) if shared else torch.ones(tuple(event_shape))
    if data is not None:
        scale = marginal.spread(data)
        scale = scale.square().mean().sqrt() if shared else scale
        net = nn.Sequential(net, Affine(marginal.mean(data), scale))
    return net, event_shape, scale
