"""Networks that take any leading dimensions: ``[B, ...]``, ``[K, B, ...]``, or none."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["Reshape", "leading"]


def leading(net: nn.Module, event_dim: int) -> nn.Module:
    """Wrap a network that knows one batch dimension, so that it takes any number of them.

    Convolutions refuse ``[K, B, C, H, W]``; BatchNorm takes ``[K, B, C]`` for ``[B, C, L]`` and,
    where B equals C, silently normalises the wrong axis. Wrapped, the K * B rows are one batch.

    Args:
        net: module ``[rows, *event] -> [rows, *out]``.
        event_dim: how many trailing dimensions of the input belong to one row.
    """
    return _Leading(net, event_dim)


class _Leading(nn.Module):
    def __init__(self, net: nn.Module, event_dim: int) -> None:
        super().__init__()
        self.net, self.event_dim = net, event_dim

    def forward(self, x: Tensor) -> Tensor:
        """``[..., *event] -> [..., *out]``."""
        cut = x.dim() - self.event_dim
        lead, event = x.shape[:cut], x.shape[cut:]
        out: Tensor = self.net(x.reshape((math.prod(lead), *event)))
        return out.reshape((*lead, *out.shape[1:]))

    def extra_repr(self) -> str:
        return f"event_dim={self.event_dim}"


class Reshape(nn.Module):
    """Reshape the trailing dimensions, ``[..., *old] -> [..., *new]``; either may be empty."""

    def __init__(self, old: Sequence[int], new: Sequence[int]) -> None:
        super().__init__()
        if math.prod(old) != math.prod(new):
            raise ValueError(f"Reshape: {list(old)} and {list(new)} differ in their size")
        self.old, self.new = tuple(old), tuple(new)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape((*x.shape[: x.dim() - len(self.old)], *self.new))

    def extra_repr(self) -> str:
        return f"{list(self.old)} -> {list(self.new)}"
