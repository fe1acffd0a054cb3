"""What an encoder sees of rows with missing entries: none of these depends on what stands there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_vae.nn.mlp import mlp

__all__ = ["EntrySet", "WithMask", "ZeroFilled"]


class _Masked(nn.Module):
    """
    Attributes:
        shape: event shape of the inputs that the features stand for, which come flat.
    """

    shape: tuple[int, ...]

    def __init__(self, inputs: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.inputs, self.event_shape = inputs, tuple(shape)

    def seen(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs ``[..., D]``, 0 where missing, and where they are observed, ``[..., D]``."""
        made = self.inputs(x)
        lead = made.shape[: made.dim() - len(self.event_shape)]
        if made.dim() > x.dim():  # classes as indicators, channels first
            mask = mask.unsqueeze(len(lead))
        mask = mask.expand(made.shape).reshape(*lead, math.prod(self.event_shape))
        filled = made.reshape(mask.shape)
        return torch.where(mask, filled, torch.zeros_like(filled)), mask


class ZeroFilled(_Masked):
    """Missing entries read as 0 (Nazábal et al. 2020, arXiv:1807.03653; MIWAE: Mattei and Frellsen
    2019, arXiv:1812.02633): after inputs that standardise, as the column's mean.

    Args:
        inputs: fixed module from x to inputs ``[..., *shape]``.
        shape: their event shape.
    """

    def __init__(self, inputs: nn.Module, shape: Sequence[int]) -> None:
        super().__init__(inputs, shape)
        self.shape = self.event_shape

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x, mask [..., *event] -> [..., D]``, D entries of ``shape``."""
        return self.seen(x, mask)[0]


class WithMask(_Masked):
    """Values, 0 where missing, and beside them the mask: a missing entry is told from a mean one.

    Args:
        inputs: fixed module from x to inputs ``[..., *shape]``.
        shape: their event shape. That of the features has one more axis in front, of 2 channels.
    """

    def __init__(self, inputs: nn.Module, shape: Sequence[int]) -> None:
        super().__init__(inputs, shape)
        self.shape = (2, *self.event_shape)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x, mask [..., *event] -> [..., 2 D]``."""
        filled, mask = self.seen(x, mask)
        return torch.cat([filled, mask.to(filled.dtype)], -1)


class EntrySet(_Masked):
    """The observed entries as a set (Partial VAE: Ma et al. 2019, arXiv:1809.11142): each is its value
    beside a learned embedding of its place, goes through one network, and their codes are summed.

        c(x) = 1/D Σ_{d observed} h(x_d, e_d)

    Args:
        inputs: fixed module from x to inputs ``[..., *shape]`` of D entries.
        shape: their event shape. That of the features is ``[code]``.
        embedding: dimensions of e_d.
        code: dimensions of c.
        hidden: widths of h before its last layer.
        activation: makes the nonlinearity after every layer of h.
    """

    def __init__(
        self,
        inputs: nn.Module,
        shape: Sequence[int],
        embedding: int = 20,
        code: int = 100,
        hidden: Sequence[int] = (),
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__(inputs, shape)
        self.shape = (code,)
        self.places = nn.Parameter(torch.randn(math.prod(self.event_shape), embedding))
        self.net = nn.Sequential(mlp((1 + embedding, *hidden, code), activation), activation())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x, mask [..., *event] -> [..., code]``."""
        filled, mask = self.seen(x, mask)
        places = self.places.expand(*filled.shape, self.places.shape[-1])
        codes = self.net(torch.cat([filled[..., None], places], -1))
        total: Tensor = torch.where(mask[..., None], codes, torch.zeros_like(codes)).sum(-2)
        return total / len(self.places)
