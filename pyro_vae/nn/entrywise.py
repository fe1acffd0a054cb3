"""A map of each entry by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

__all__ = ["Entrywise"]


class Entrywise(nn.Module):
    """a · (x - b), entry by entry, ``[..., *shape] -> [..., *shape]``.

    As the network of a mask model it is self-masking (Ipsen et al. 2021, arXiv:2006.12871): whether
    an entry is seen depends on its own value alone, and b is where that turns.

    Args:
        shape: ``[*shape]``.
        sign: of every slope a: 1 or -1 if it is known, and |a| = softplus(r) starts at 1; 0 if it is
            learned too, from a = 0.

    Raises:
        ValueError: another sign.
    """

    def __init__(self, shape: Sequence[int], sign: int = 0) -> None:
        super().__init__()
        if sign not in (-1, 0, 1):
            raise ValueError(
                f"Entrywise: sign= came {sign!r}, wanted 1, -1, or 0 for a learned one"
            )
        self.sign = sign
        start = math.log(math.expm1(1.0)) if sign else 0.0
        self.raw = nn.Parameter(torch.full(tuple(shape), start))
        self.threshold = nn.Parameter(torch.zeros(tuple(shape)))

    @property
    def slope(self) -> Tensor:
        """a ``[*shape]``."""
        return self.sign * softplus(self.raw) if self.sign else self.raw

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * (x - self.threshold)

    def extra_repr(self) -> str:
        return f"{list(self.raw.shape)}, sign={self.sign}"
