"""A data set is cut into parts by a seed, which its record keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from pyro_vae.batch import Batch
from pyro_vae.data.on_demand import OnDemand
from pyro_vae.data.sites import summary

__all__ = ["split"]


def split(
    batch: Batch, fractions: Sequence[float] = (0.8, 0.2), seed: int = 0
) -> tuple[Batch, ...]:
    """Cut a batch into parts by a seeded permutation of its rows.

    Each part is a data set of its own: its ``total`` is its number of rows, counted from 0. Which
    sites are incomplete and what missing entries read as stay as they are in ``batch``; rows that are
    drawn anew or read from files go on being so. ``record["cuts"]`` says how a part was cut.

    Args:
        batch: the rows to divide.
        fractions: positive numbers that add up to 1.
        seed: of the permutation, which is the same on every platform and version.

    Raises:
        ValueError: fractions that are not positive or do not add up to 1, a part without rows.
    """
    if not fractions or min(fractions) <= 0 or not math.isclose(sum(fractions), 1.0):
        raise ValueError(
            f"fractions= came {list(fractions)}, wanted positive numbers that add up to 1"
        )
    ends = [math.floor(batch.size * part + 1e-6) for part in np.cumsum(fractions)]
    ends[-1] = batch.size
    starts = [0, *ends[:-1]]
    if any(start >= end for start, end in zip(starts, ends, strict=True)):
        raise ValueError(
            f"fractions= came {list(fractions)}, which leave a part of the {batch.size} rows empty"
        )
    order = torch.from_numpy(np.random.RandomState(seed).permutation(batch.size))  # frozen by numpy
    parts = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        rows = order[start:end]
        part = batch.part(rows) if isinstance(batch, OnDemand) else batch.rows(rows)
        part.total, part.index = part.size, torch.arange(part.size, device=part.device)
        cut = {"fractions": list(fractions), "seed": seed, "part": number}
        cuts = [*batch.record.get("cuts", ()), cut]
        part.record = {**batch.record, **summary(part), "cuts": cuts}
        parts.append(part)
    return tuple(parts)
