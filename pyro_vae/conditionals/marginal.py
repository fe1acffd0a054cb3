"""Statistics of a site's observed training values, from which conditionals start.

``data`` is ``[N, *event]``, floating, NaN where missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["deviation", "frequencies", "holds", "logit", "mean", "median", "spread", "top"]


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


def median(data: Tensor) -> Tensor:
    """Median of each entry, ``[*event]``; the overall median where nothing was ever observed."""
    middle = data.nanmedian(0).values
    return torch.where(middle.isnan(), data.nanmedian(), middle)


def deviation(data: Tensor) -> Tensor:
    """Median absolute deviation of each entry, ``[*event]``, always positive.

    Times 1.4826, so that it is the standard deviation of a Gaussian. Where more than half of an
    entry's values are the same, or none was ever observed: ``spread``.
    """
    center = median(data)
    middle = 1.4826 * (data - center).abs().nanmedian(0).values.nan_to_num(0.0)
    return torch.where(middle > 1e-6 * center.abs(), middle, spread(data))


def top(data: Tensor) -> int:
    """The largest count that there may be: the largest seen, at least 1.

    255 if that is above 127, since bytes need not reach their end in every sample.
    """
    seen = int(data.nan_to_num(0.0).max())
    return max(seen, 1) if not 127 < seen < 255 else 255


def logit(data: Tensor, bound: float = 1.0) -> Tensor:
    """Logit of the mean of data in [0, bound], kept within [.001, .999], ``[*event]``."""
    return torch.logit(mean(data) / bound, eps=1e-3)


def frequencies(data: Tensor, classes: int) -> Tensor:
    """Frequency of each class in each entry, ``[*event, C]``."""
    missing = data.isnan()
    hits = ((data == c).to(data.dtype).masked_fill(missing, torch.nan) for c in range(classes))
    return torch.stack([mean(hit) for hit in hits], -1)
