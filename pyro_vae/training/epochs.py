"""Which rows a step takes: a function of seed and step, so that a resumed run needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.batch import Batch, take

__all__ = ["Epochs", "order"]


@dataclass(frozen=True)
class Epochs:
    """Training rows, shuffled anew in every epoch and cut into steps; the odd rest is a step too.

    Attributes:
        data: training rows.
        batch_size: rows of a batch.
        accumulate: batches of a step.
        seed: of the order.
    """

    data: Batch | Tensor
    batch_size: int
    accumulate: int = 1
    seed: int = 0

    def __len__(self) -> int:
        """Steps in an epoch."""
        return math.ceil(len(self.data) / (self.batch_size * self.accumulate))

    def steps(self, start: int) -> Iterator[tuple[Tensor, list[Any]]]:
        """From step ``start`` to the end of its epoch: the numbers of the rows, and the batches."""
        epoch, offset = divmod(start, len(self))
        data = self.data.epoch(self.seed, epoch) if isinstance(self.data, Batch) else self.data
        shuffled = order(len(data), self.seed, epoch).to(data.device)
        for rows in shuffled.split(self.batch_size * self.accumulate)[offset:]:
            yield rows, [take(data, part) for part in rows.split(self.batch_size)]


def order(rows: int, seed: int, epoch: int) -> Tensor:
    """The rows in the order of an epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(rows, generator=generator)
