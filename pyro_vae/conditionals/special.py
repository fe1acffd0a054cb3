"""What remains of log gamma where its leading terms cancel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["HALF_LOG_2PI", "remainder"]

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
LARGE = 16.0  # from here on the series is exact to 2e-12, and lgamma loses digits


def remainder(z: Tensor) -> Tensor:
    """What Stirling's formula leaves of log gamma, for z > 0.

        δ(z) = log Γ(z) - (z - 1/2) log z + z - log sqrt(2 π)

    Differences of log gamma cancel in float32 (at z = 1e6 it is 1.3e7, to within 1); written with
    the leading terms cancelled by hand, only these remainders are left.
    """
    small, large = z.clamp(max=LARGE), z.clamp(min=LARGE)
    direct = small.lgamma() - (small - 0.5) * small.log() + small - HALF_LOG_2PI
    inverse = 1 / large
    square = inverse.square()
    series = inverse * (1 / 12 - square * (1 / 360 - square / 1260))
    return torch.where(z < LARGE, direct, series)
