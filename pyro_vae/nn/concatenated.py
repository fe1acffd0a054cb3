"""Several inputs for what takes one, and a part of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Concatenated", "Selected"]


class Concatenated(nn.Module):
    """A network, or a conditional, of several vectors, one beside the other.

    Args:
        net: what takes ``[..., D_1 + D_2 + ...]``.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *parents: Tensor) -> Any:
        """Of ``[..., D_1]``, ``[..., D_2]``, ..., whose leading dims broadcast."""
        lead = torch.broadcast_shapes(*(parent.shape[:-1] for parent in parents))
        spread = [parent.expand(*lead, parent.shape[-1]) for parent in parents]
        return self.net(torch.cat(spread, -1))


class Selected(nn.Module):
    """A network, or a conditional, of some entries of a vector.

    Args:
        net: what takes ``[..., len(dims)]``.
        dims: of a vector ``[..., D]``.
    """

    index: Tensor

    def __init__(self, net: nn.Module, dims: Sequence[int]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("index", torch.tensor(dims), persistent=False)

    def forward(self, parent: Tensor) -> Any:
        return self.net(parent.index_select(-1, self.index))
