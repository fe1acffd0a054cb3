"""What conditionals do with the network inside them and with their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.nn.leading import Reshape

__all__ = [
    "Constant",
    "LearnedScale",
    "Network",
    "at_one",
    "independent",
    "outputs",
    "positive",
    "several",
]

Network = Callable[[Sequence[int]], nn.Module]
"""Makes a network by the shape it returns: ``network(shape)(parent)`` is ``[..., *shape]``."""


class Constant(nn.Module):
    """What a network without parents returns: zeros ``[*shape]``, from which ``learned`` ones start."""

    values: Tensor

    def __init__(self, shape: Sequence[int], learned: bool = False) -> None:
        super().__init__()
        if learned:
            self.values = nn.Parameter(torch.zeros(*shape))
        else:  # a buffer, so that .to(device) moves it; nothing to save
            self.register_buffer("values", torch.zeros(*shape), persistent=False)

    def forward(self) -> Tensor:
        return self.values


def outputs(owner: nn.Module, net: nn.Module, parents: Sequence[Tensor], *shape: int) -> Tensor:
    """Run ``net`` on the parents; its result must be ``[..., *shape]``.

    A ``[..., 1]`` against an event ``[6]`` would broadcast silently.
    """
    out: Tensor = net(*parents)
    if out.shape[max(out.dim() - len(shape), 0) :] != shape:
        raise ValueError(
            f"{type(owner).__name__}: the network returned {list(out.shape)}, "
            f"wanted [..., *{list(shape)}]"
        )
    return out


def several(network: Network, parts: int, event_shape: Sequence[int]) -> nn.Module:
    """A network that returns ``[..., parts, *event]``; for an image the parts are channels."""
    if len(event_shape) > 1:
        return network((parts, *event_shape))
    flat = (parts * math.prod(event_shape),)
    return nn.Sequential(network(flat), Reshape(flat, (parts, *event_shape)))


def independent(fn: TorchDistribution, event_dim: int) -> TorchDistribution:
    """Declare the last ``event_dim`` dimensions of ``fn`` an event that factorizes."""
    event: TorchDistribution = fn.to_event(event_dim)
    return event


def at_one(like: Tensor, floor: float) -> nn.Parameter:
    """A parameter r with floor + softplus(r) = 1 everywhere."""
    return nn.Parameter(torch.full_like(like, math.log(math.expm1(1.0 - floor))))


def positive(name: str, value: Tensor | float) -> Tensor:
    """A copy of ``value`` in torch's default dtype; it must be above 0."""
    tensor = torch.as_tensor(value, dtype=torch.get_default_dtype()).clone()
    if not bool((tensor > 0).all()):
        raise ValueError(f"{name}= came {float(tensor.min())}, wanted positive numbers")
    return tensor


class LearnedScale(nn.Module):
    """A conditional whose scale is a parameter and does not depend on the parents.

        s = scale · (floor + softplus(r)),  s = scale at the start

    Args:
        net: ``parents -> [..., *event]``.
        event_shape: ``[*event]``.
        scale: initial scale; its shape, which broadcasts to ``[*event]``, says which entries share one.
        floor: smallest scale as a fraction of the initial one.
    """

    unit: Tensor

    def __init__(
        self,
        net: nn.Module,
        event_shape: Sequence[int],
        scale: Tensor | float = 1.0,
        floor: float = 1e-3,
    ) -> None:
        super().__init__()
        self.net, self.event_shape, self.floor = net, tuple(event_shape), floor
        self.register_buffer("unit", positive("scale", scale))
        self.raw = at_one(self.unit, floor)

    @property
    def scale(self) -> Tensor:
        """The current scale, shaped as it was given."""
        return self.unit * (self.floor + softplus(self.raw))
