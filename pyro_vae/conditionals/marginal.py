"""Statistics of a site's observed training values, from which conditionals start.

``data`` is ``[N, *event]``, floating, NaN where missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["frequencies", "holds", "logit", "mean", "spread"]


def holds(condition: Tensor, data: Tensor) -> bool:
    """Whether ``condition`` is True of every observed entry."""
    return bool((condition | data.isnan()).all())


def mean(data: Tensor) -> Tensor:
    """Mean of each entry, ``[*event]``; the overall mean where nothing was ever observed."""
    average = data.nanmean(0)
    return torch.where(average.isnan(), data.nanmean(), average)


def spread(data: Tensor) -> Tensor:
    """Standard deviation of each entry, ``[*event]``, always positive.

    Entries that are constant, or never observed, take the average of those that vary (or 1).
    """
    center = mean(data)
    deviation = (data - center).square().nanmean(0).sqrt().nan_to_num(0.0)
    varies = deviation > 1e-6 * center.abs()  # beyond what rounding leaves of a constant
    typical = deviation[varies].mean() if bool(varies.any()) else torch.ones_like(data.nanmean())
    return torch.where(varies, deviation, typical)


def logit(data: Tensor, bound: float = 1.0) -> Tensor:
    """Logit of the mean of data in [0, bound], kept within [.001, .999], ``[*event]``."""
    return torch.logit(mean(data) / bound, eps=1e-3)


def frequencies(data: Tensor, classes: int) -> Tensor:
    """Frequency of each class in each entry, ``[*event, C]``."""
    missing = data.isnan()
    hits = ((data == c).to(data.dtype).masked_fill(missing, torch.nan) for c in range(classes))
    return torch.stack([mean(hit) for hit in hits], -1)
