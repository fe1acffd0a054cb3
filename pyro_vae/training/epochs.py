"""Which rows a step takes: a function of seed and step, so that a resumed run needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from pyro_vae.batch import Batch, ahead, sent, take, tensors
from pyro_vae.training.prefetch import prefetched, worthwhile

__all__ = ["Epochs", "order"]

TOGETHER = 1 << 22  # bytes of the rows that are gathered at a time; more leave a CPU's cache


@dataclass(frozen=True)
class Epochs:
    """Training rows, shuffled anew in every epoch and cut into steps; the odd rest is a step too.

    Rows are gathered in blocks of several steps, of which batches are views. Those that are read from
    files, or are not on the device, are gathered by a thread ahead of their turn, where that helps.
    Neither changes what a batch holds: draws that are made anew are made step by step.

    Attributes:
        data: training rows.
        batch_size: rows of a batch.
        accumulate: batches of a step.
        seed: of the order.
        device: where batches go (default: where the data are).
    """

    data: Batch | Tensor
    batch_size: int
    accumulate: int = 1
    seed: int = 0
    device: torch.device | None = None

    def __len__(self) -> int:
        """Steps in an epoch."""
        return math.ceil(len(self.data) / self._step)

    def steps(self, start: int) -> Iterator[tuple[Tensor, list[Any]]]:
        """From step ``start`` to the end of its epoch: the numbers of the rows, and the batches."""
        epoch, offset = divmod(start, len(self))
        data = self.data.epoch(self.seed, epoch) if isinstance(self.data, Batch) else self.data
        device = self.device or data.device
        away = data.device.type != device.type or (isinstance(data, Batch) and data.mapped)
        shuffled = order(len(data), self.seed, epoch)
        numbers = (shuffled if away else shuffled.to(device))[offset * self._step :]
        blocks = numbers.split(self._together)
        gather = partial(_gather, data, device)
        in_turn = nullcontext(map(gather, blocks))
        soon = away and worthwhile(device)
        with prefetched(gather, blocks, device) if soon else in_turn as made:
            for block in made:
                yield from self._cut(*block)

    def _cut(self, numbers: Tensor, rows: Any) -> Iterator[tuple[Tensor, list[Any]]]:
        """The steps of a block."""
        for start in range(0, len(numbers), self._step):
            end = min(start + self._step, len(numbers))
            cuts = range(start, end, self.batch_size)
            batches = [take(rows, slice(cut, min(cut + self.batch_size, end))) for cut in cuts]
            yield numbers[start:end], batches

    @property
    def _step(self) -> int:
        """Rows of a step."""
        return self.batch_size * self.accumulate

    @cached_property
    def _together(self) -> int:
        """Rows of a block: of whole steps, and one at least."""
        row = ahead(self.data, torch.zeros(1, dtype=torch.int64), torch.device("cpu"))
        size = sum(tensor.nbytes for tensor in tensors(row))
        return self._step * max(1, TOGETHER // max(1, self._step * size))


def _gather(data: Batch | Tensor, device: torch.device, numbers: Tensor) -> tuple[Tensor, Any]:
    return sent(numbers, device), ahead(data, numbers, device)


def order(rows: int, seed: int, epoch: int) -> Tensor:
    """The rows in the order of an epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(rows, generator=generator)
