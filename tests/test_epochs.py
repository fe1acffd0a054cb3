"""Which rows a step takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_vae.batch import Batch
from pyro_vae.training.epochs import Epochs, order

X = torch.arange(7.0)[:, None]


def seen(epochs: Epochs, start: int) -> list[list[list[float]]]:
    """The rows of each batch of each step."""
    return [[batch[:, 0].tolist() for batch in batches] for _, batches in epochs.steps(start)]


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "sizes"),
    [
        (3, 1, [[3], [3], [1]]),
        (2, 2, [[2, 2], [2, 1]]),
        (2, 3, [[2, 2, 2], [1]]),
        (3, 2, [[3, 3], [1]]),
        (7, 1, [[7]]),
        (9, 4, [[7]]),
    ],
)
def test_every_row_once(batch_size: int, accumulate: int, sizes: list[list[int]]):
    epochs = Epochs(X, batch_size, accumulate, seed=4)
    assert len(epochs) == len(sizes)
    for epoch in range(3):
        steps = seen(epochs, epoch * len(epochs))
        assert [[len(batch) for batch in step] for step in steps] == sizes
        flat = [row for step in steps for batch in step for row in batch]
        assert flat == order(7, 4, epoch).double().tolist()
        assert sorted(flat) == list(range(7))


def test_accumulated_batches_are_the_rows_of_a_large_one():
    few, many = seen(Epochs(X, 2, 2), 0), seen(Epochs(X, 4), 0)
    assert [[[*first, *second]] for first, second in few] == many


def test_any_step_is_found_without_the_ones_before():
    epochs = Epochs(X, 2, seed=1)
    whole = [step for epoch in range(3) for step in seen(epochs, 4 * epoch)]
    for start in range(12):
        until_the_end = 4 - start % 4
        assert seen(epochs, start) == whole[start : start + until_the_end]


def test_an_order_is_its_own():
    assert order(50, 0, 0).tolist() == order(50, 0, 0).tolist()
    orders = [order(50, *key).tolist() for key in ((0, 0), (0, 1), (1, 0), (2**62, 3))]
    assert len(set(map(tuple, orders))) == 4


class Drawn(Batch):
    """Rows that are drawn anew in every epoch."""

    def epoch(self, seed: int, number: int) -> Batch:
        return Batch({"x": self["x"] + 100 * seed + 10 * number})


def test_rows_that_are_drawn_anew():
    epochs = Epochs(Drawn({"x": X}), 7, seed=2)
    for number in range(3):
        ((rows, (batch,)),) = epochs.steps(number)
        wanted: Any = X[rows] + 200 + 10 * number
        assert torch.equal(batch["x"], wanted)


def test_numbers_of_the_rows():
    for rows, batches in Epochs(Batch({"x": X}), 2, 2).steps(0):
        values: Tensor = torch.cat([batch["x"] for batch in batches])
        assert torch.equal(values, X[rows])
