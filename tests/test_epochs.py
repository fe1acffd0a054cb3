"""Which rows a step takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_vae.batch import Batch, take
from pyro_vae.data import load
from pyro_vae.data.on_demand import Column
from pyro_vae.training import epochs as module
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


# --- blocks -------------------------------------------------------------------------------------

N = 23
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 3, 4), dtype=np.uint8)
TABLE = np.random.default_rng(1).normal(size=(N, 3))
GAPS = np.where(np.random.default_rng(2).random(TABLE.shape) < 0.3, np.nan, TABLE)


def plain() -> Batch:
    weights, record = torch.rand(N), {"steps": [], "levels": {"x": 256}}
    values = {"x": torch.from_numpy(GAPS), "y": torch.arange(N)}
    return Batch(values, weights=weights, total=40, index=torch.arange(N) + 7, record=record)


def from_files(path: Path, mmap: bool, **options: Any) -> Batch:
    path.mkdir(exist_ok=True)
    for name, array in {"x": PIXELS, "t": GAPS, "y": np.arange(N)}.items():
        np.save(path / f"{name}.npy", array)
    batch = load(path, mmap=mmap, **options)
    batch.weights = torch.rand(N)
    return batch


MAPPED: dict[str, dict[str, Any]] = {
    "mapped": {"mmap": True},
    "mapped dynamic": {"mmap": True, "binarize": "dynamic"},
    "mapped epoch": {"mmap": True, "binarize": "epoch"},
    "mapped dequantized": {"mmap": True, "dequantize": True},
}
KINDS: dict[str, dict[str, Any]] = {
    "tensor": {},
    "plain": {},
    "dynamic": {"mmap": False, "binarize": "dynamic"},
    "epoch": {"mmap": False, "binarize": "epoch"},
    **MAPPED,
}


def data_of(kind: str, path: Path) -> Any:
    """Rows of a kind; those from files may miss pixels, too."""
    if kind == "tensor":
        return torch.from_numpy(TABLE)
    data = from_files(path, **KINDS[kind]) if KINDS[kind] else plain()
    return data.hide("x", PIXELS % 3 == 0) if kind == "dynamic" else data


def one_by_one(data: Any, batch_size: int, accumulate: int, start: int) -> Iterator[Any]:
    """The steps of the rest of an epoch, each batch taken from the data by itself."""
    size = batch_size * accumulate
    epoch, offset = divmod(start, -(-len(data) // size))
    data = data.epoch(3, epoch) if isinstance(data, Batch) else data
    for rows in order(len(data), 3, epoch).split(size)[offset:]:
        yield rows, [take(data, part) for part in rows.split(batch_size)]


def parts(data: Any) -> list[Tensor]:
    if isinstance(data, Tensor):
        return [data]
    masks = [data.mask(site) for site in data]
    return [*(data[site] for site in data), *masks, data.index, data.weights]


@pytest.mark.parametrize("together", [1, 700, 1 << 22], ids=["step", "some", "epoch"])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_the_rows_taken_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, together: int
):
    """To the bit, and with the random state as it is then at every step."""
    monkeypatch.setattr(module, "TOGETHER", together)
    monkeypatch.setattr(module, "worthwhile", lambda device: True)
    data = data_of(kind, tmp_path / "data")
    for batch_size, accumulate, start in ((4, 1, 0), (4, 1, 8), (3, 2, 5), (23, 1, 1), (30, 2, 0)):
        found: list[Any] = []
        for steps in (
            Epochs(data, batch_size, accumulate, seed=3).steps(start),
            one_by_one(data, batch_size, accumulate, start),
        ):
            torch.manual_seed(0)
            found.append([(*step, torch.get_rng_state(), torch.rand(2)) for step in steps])
        assert len(found[0]) == len(found[1]) > 0
        for one, two in zip(*found, strict=True):
            assert all(torch.equal(one[i], two[i]) for i in (0, 2, 3))
            for a, b in zip(one[1], two[1], strict=True):
                assert type(a) is type(b)
                assert all(map(torch.equal, parts(a), parts(b)))
                if isinstance(a, Batch):
                    assert (a.sites, a.incomplete, a.fill) == (b.sites, b.incomplete, b.fill)
                    assert (a.size, a.total, a.record) == (b.size, b.total, b.record)


def test_a_block_is_several_steps_in_a_budget(monkeypatch: pytest.MonkeyPatch):
    """A row takes 24 bytes, and 8 for its number: 10 steps of 4 rows are within 1300."""
    data, sizes = Batch({"x": torch.zeros(100, 3)}), []
    take_ahead = Batch.ahead

    def noted(batch: Batch, index: Tensor, device: torch.device) -> Batch:
        sizes.append(len(index))
        return take_ahead(batch, index, device)

    monkeypatch.setattr(Batch, "ahead", noted)
    monkeypatch.setattr(module, "TOGETHER", 1300)
    batches = [batch for _, (batch,) in Epochs(data, 4).steps(0)]
    assert sizes == [1, 40, 40, 20]  # one to see what a row takes
    places = [batch["x"].untyped_storage().data_ptr() for batch in batches]
    assert [places.count(place) for place in dict.fromkeys(places)] == [10, 10, 5]


# --- ahead of time ------------------------------------------------------------------------------


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one step, and a core for the thread."""
    monkeypatch.setattr(module, "TOGETHER", 1)
    monkeypatch.setattr(module, "worthwhile", lambda device: True)


def test_no_thread_without_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "worthwhile", lambda device: False)
    steps = Epochs(data_of("mapped", tmp_path / "data"), 4).steps(0)
    next(steps)
    assert threads() == []


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", KINDS)
def test_a_thread_where_rows_are_elsewhere(tmp_path: Path, kind: str):
    data = data_of(kind, tmp_path / "data")
    steps = Epochs(data, 4).steps(0)
    next(steps)
    assert len(threads()) == (kind in MAPPED)
    del steps
    assert threads() == []
    list(Epochs(data, 4).steps(0))
    assert threads() == []


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_thread_ends_with_an_error_of_a_step(tmp_path: Path, error: type[BaseException]):
    def train() -> None:
        for _ in Epochs(data_of("mapped", tmp_path / "data"), 4).steps(0):
            assert len(threads()) == 1
            raise error

    with pytest.raises(error):
        train()
    assert threads() == []


@pytest.mark.usefixtures("small_blocks")
def test_an_error_in_the_file_comes_in_its_turn(tmp_path: Path):
    x = TABLE.copy()
    bad = int(order(N, 0, 0)[17])
    x[bad, 1] = np.inf
    np.save(tmp_path / "x.npy", x)
    steps = Epochs(load(tmp_path / "x.npy", mmap=True), 4).steps(0)
    assert [rows.tolist() for rows, _ in (next(steps) for _ in range(4))] == [
        rows.tolist() for rows in order(N, 0, 0)[:16].split(4)
    ]
    with pytest.raises(ValueError, match=f"^{tmp_path}/x.npy: site 'x': infinite .* row {bad};"):
        next(steps)
    assert threads() == []


@pytest.mark.usefixtures("small_blocks")
def test_only_what_is_read_soon_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The block in use and two more; of the first step, one row besides, to see what it takes."""
    read: list[list[int]] = []
    take_read = Column.read

    def noted(column: Column, source: Any) -> Tensor:
        read.append(column.ids.tolist())
        return take_read(column, source)

    np.save(tmp_path / "x.npy", TABLE)
    data = load(tmp_path / "x.npy", mmap=True)
    monkeypatch.setattr(Column, "read", noted)
    steps = Epochs(data, 4).steps(0)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert 2 <= len(read) <= 4
    wanted = [[0], *(rows.tolist() for rows in order(N, 0, 0).split(4))]
    assert read == wanted[: len(read)]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_go_to_the_device(tmp_path: Path, kind: str):
    """Rows in memory as well, with a thread."""
    data, device = data_of(kind, tmp_path / "data"), torch.device("meta")
    steps = Epochs(data, 4, 2, device=device).steps(1)
    numbers, batches = next(steps)
    assert len(threads()) == 1
    for held in [numbers, *(part for batch in batches for part in parts(batch))]:
        assert held.device == device
    assert (len(numbers), [len(batch) for batch in batches]) == (8, [4, 4])


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["there", "here"])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_on_an_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, where: str
):
    """Data that are on it, and data that are not: the same, as on the host but for what is drawn
    anew."""
    monkeypatch.setattr(module, "TOGETHER", 700)
    data, device = data_of(kind, tmp_path / "data"), torch.device("cuda")
    moved = data.to(device) if where == "there" else data
    found = []
    for steps in (Epochs(moved, 4, seed=3, device=device).steps(6), one_by_one(data, 4, 1, 6)):
        torch.manual_seed(0)
        found.append([(rows, parts(batch)) for rows, (batch,) in steps])
    anew = kind in ("dynamic", "mapped dynamic", "mapped dequantized")
    for (rows, one), (wanted, two) in zip(*found, strict=True):
        assert {tensor.device.type for tensor in [rows, *one]} == {"cuda"}
        assert torch.equal(rows.cpu(), wanted)
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert torch.equal(a.cpu(), b) or (anew and i < 3 and a.shape == b.shape)
