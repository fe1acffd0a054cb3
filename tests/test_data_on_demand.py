"""Rows made when they are taken: drawn anew or read from mapped files, in fit and in evaluate."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor

import pyro_vae as pv
from pyro_vae.batch import Batch
from pyro_vae.data import load, split
from pyro_vae.data.on_demand import LOOK, Column, OnDemand, _ask_for, first_rows

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 3, 4), dtype=np.uint8)
TABLE = np.random.default_rng(1).normal(size=(30, 3))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """24 images and their numbers, of which 24 more are test rows."""
    path = tmp_path / "images.npz"
    y = np.arange(24)
    np.savez(path, x_train=PIXELS, y_train=y, x_test=PIXELS[::-1], y_test=y)
    return path


def folder(path: Path, **arrays: Any) -> Path:
    path.mkdir()
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
    return path


def vae(batch: Batch) -> tuple[Any, Any]:
    pyro.set_rng_seed(0)
    return pv.pairs.vae(batch, latent=2, hidden=(5,))


def trained(data: Batch, **options: Any) -> tuple[pv.Run, list[Tensor]]:
    pair = vae(data)
    settings: dict[str, Any] = {"epochs": 4, "batch_size": 10, "seed": 3, "progress": False}
    run = pv.fit(*pair, data, **(settings | options))
    return run, [p.detach() for program in pair for p in program.parameters()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def without_time(run: pv.Run) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in run.history]


# --- drawn anew ---------------------------------------------------------------------------------


def test_is_a_batch(images: Path) -> None:
    batch = load(images, binarize="dynamic")
    assert isinstance(batch, OnDemand)
    assert (batch.sites, batch.size, batch.total) == (("x", "y"), 24, 24)
    assert batch.shape("x") == (24, 3, 4)
    assert batch["y"].tolist() == list(range(24))
    assert batch.mask("x").all()
    assert batch.incomplete == ()
    assert torch.equal(batch["x"], batch.still()["x"])
    assert type(batch.still()) is Batch
    assert type(batch.look()) is Batch
    assert repr(batch) == ("OnDemand(24 of 24 rows: x [24, 3, 4], y [24]; made when taken: x)")
    rows = batch.rows(torch.tensor([5, 2]))
    assert type(rows) is Batch
    assert (rows.total, rows.index.tolist(), rows["y"].tolist()) == (24, [5, 2], [5, 2])
    assert rows["x"].shape == (2, 3, 4)
    assert batch.rows(torch.arange(24) > 20)["y"].tolist() == [21, 22, 23]
    with pytest.raises(KeyError, match="'z' is not in the batch"):
        batch["z"]


def test_memory_holds_bytes(images: Path) -> None:
    """One for a pixel, whatever is drawn for it, and of a part its own rows."""
    data = load(images, binarize="dynamic").without("y")
    for batch, rows in ((data, 24), (split(data, (0.25, 0.75))[0], 6)):
        pixels, ids, index = batch.tensors()
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (rows, 3, 4))
        assert pixels.untyped_storage().nbytes() == rows * 12
        assert len(ids) == len(index) == rows
        (moved, *_) = batch.to("meta").tensors()
        assert (moved.dtype, moved.device.type) == (torch.uint8, "meta")


def test_ahead_draws_what_is_fixed(images: Path, tmp_path: Path) -> None:
    """And leaves what is drawn anew to rows."""
    np.save(tmp_path / "x.npy", PIXELS)
    index, device = torch.tensor([5, 2, 9]), torch.device("cpu")
    for data in (load(images), load(tmp_path / "x.npy", mmap=True)):
        assert type(data.ahead(index, device)) is Batch
    for source, mapped in ((images, False), (tmp_path / "x.npy", True)):
        fixed = load(source, binarize="epoch", mmap=mapped).epoch(1, 2)
        assert type(fixed.ahead(index, device)) is Batch
        data, before = load(source, binarize="dynamic", mmap=mapped), torch.get_rng_state()
        ahead = data.ahead(index, device)
        assert torch.equal(torch.get_rng_state(), before)
        assert isinstance(ahead, OnDemand)
        assert not ahead.mapped
        assert torch.equal(ahead.still()["x"], data.still().rows(index)["x"])
        torch.manual_seed(0)
        one = ahead.rows(slice(1, 3))
        torch.manual_seed(0)
        two = data.rows(index[1:])
        assert torch.equal(one["x"], two["x"])
        assert one.index.tolist() == two.index.tolist() == [2, 9]


def test_changes_that_keep_it_fresh(images: Path) -> None:
    batch = load(images, binarize="dynamic")
    single = batch.to("cpu", torch.float32)
    assert single["x"].dtype == single.rows([0])["x"].dtype == torch.float32
    assert torch.equal(single["x"].double(), batch["x"])
    assert isinstance(batch.without("y"), OnDemand)
    assert batch.without("y").sites == ("x",)
    assert type(batch.without("x").rows([0])) is Batch
    hidden = torch.rand(24, 3, 4) < 0.4
    sparse = batch.hide("x", hidden)
    assert isinstance(sparse, OnDemand)
    assert sparse.incomplete == ("x",)
    assert torch.equal(sparse.mask("x"), ~hidden)
    one, two = (sparse.rows(slice(4, 20)) for _ in range(2))
    assert torch.equal(one.mask("x"), ~hidden[4:20])
    assert (one["x"][hidden[4:20]] == 0).all()
    assert not torch.equal(one["x"], two["x"])
    assert torch.equal(sparse.still()["x"][~hidden], batch["x"][~hidden])
    with pytest.raises(ValueError, match=r"site 'x': steps\(\) came rows that are made"):
        batch.steps("x")


def test_no_draw_is_taken_where_nothing_is_drawn(images: Path) -> None:
    batch = load(images, binarize="dynamic")
    before = torch.get_rng_state()
    batch.look(), batch["x"], batch.epoch(0, 1), batch.shape("x"), split(batch)
    assert torch.equal(torch.get_rng_state(), before)
    batch.rows([0])
    assert not torch.equal(torch.get_rng_state(), before)


class Recorder(torch.nn.Module):
    """A guide that keeps what it saw in training, by row and in the order of steps."""

    def __init__(self, guide: torch.nn.Module) -> None:
        super().__init__()
        self.guide = guide
        self.seen: list[Tensor] = []

    def forward(self, batch: Batch) -> None:
        if self.training and len(batch) == 12:
            self.seen.append(batch["x"][batch.index.argsort()].clone())
        self.guide(batch)


@pytest.mark.parametrize("kind", ["static", "dynamic", "epoch"])
def test_epochs(images: Path, kind: str) -> None:
    """One step an epoch: what the steps saw is what the epochs saw."""
    data = load(images, binarize=kind).without("y")
    data = split(data, (0.5, 0.5))[0]
    model, guide = vae(data)
    recorder = Recorder(guide)
    pv.fit(model, recorder, data, epochs=3, batch_size=12, compile="eager", progress=False)
    first, second, third = recorder.seen[-3:]
    if kind == "static":
        assert torch.equal(first, second)
        assert torch.equal(first, data["x"])
    else:
        assert not torch.equal(first, second)
        assert not torch.equal(second, third)
    if kind == "epoch":
        assert torch.equal(second, data.epoch(0, 1).rows(slice(None))["x"])


def test_the_draw_of_an_epoch_is_a_function_of_its_number(images: Path) -> None:
    one, two = (load(images, binarize="epoch").epoch(3, 7) for _ in range(2))
    order = torch.randperm(24)
    assert torch.equal(one.rows(order)["x"], two.rows(slice(None))["x"][order])
    assert torch.equal(one.rows([4])["x"], one.rows([4])["x"])


@pytest.mark.parametrize("options", [{"binarize": "dynamic"}, {"binarize": "epoch"}])
def test_resumes_exactly(images: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    data = load(images, **options).without("y")
    train, valid = split(data)
    run, parameters = trained(train, valid=valid, epochs=6)
    trained(train, valid=valid, epochs=2, out=tmp_path / "run")
    resumed, again = trained(train, valid=valid, epochs=6, out=tmp_path / "run", resume=True)
    assert without_time(run) == without_time(resumed)
    assert same(parameters, again)


def test_evaluation_is_of_one_draw(images: Path) -> None:
    data = load(images, binarize="dynamic").without("y")
    run, _ = trained(data)
    first, second = (run.evaluate(data, num_particles=20) for _ in range(2))
    assert torch.equal(first.log_p, second.log_p)
    assert first.versus(second).mean == 0
    assert torch.equal(first.log_p, run.evaluate(data.still(), num_particles=20).log_p)


def test_dequantized_evaluation_is_in_bits(images: Path) -> None:
    """log2 256 is what D log 256 comes to: bits/dim = 8 - log2 p(y) / D."""
    data = load(images, "test", dequantize=True).without("y")
    run, _ = trained(data, epochs=1)
    result = run.evaluate(data, num_particles=20)
    nats = result.log_p / 12
    assert result.bits_per_dim()[0] == pytest.approx(8 - float(nats.mean()) / np.log(2))


def test_programs_take_it_as_it_is(images: Path) -> None:
    data = load(images, binarize="dynamic").without("y")
    pair = vae(data)
    assert pv.check(*pair, data).ok
    svi = SVI(pv.Observed(pair[0]), pair[1], Adam({"lr": 1e-3}), loss=pv.elbo())
    assert np.isfinite(svi.step(data))
    assert pv.to_arviz(pair, data, 5)["observed_data"]["x"].shape == (24, 3, 4)


# --- mapped files -------------------------------------------------------------------------------


def test_mapped_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", TABLE)
    batch = load(tmp_path / "a.npy", mmap=True)
    assert isinstance(batch, OnDemand)
    assert (batch.sites, batch.size, batch.shape("x")) == (("x",), 30, (30, 3))
    assert torch.equal(batch.rows([7, 2])["x"], torch.from_numpy(TABLE[[7, 2]]))
    assert torch.equal(batch.look(4)["x"], torch.from_numpy(TABLE[:4]))
    assert isinstance(batch.still(), OnDemand)
    assert batch.to("cpu", torch.float32).rows([0])["x"].dtype == torch.float32
    record = batch.record
    assert (record["sha256"], record["bytes"]) == (None, (tmp_path / "a.npy").stat().st_size)
    assert record["sites"] == {"x": {"shape": [30, 3], "dtype": "float64", "missing": 0}}
    for whole in (lambda: batch["x"], lambda: batch.mask("x"), lambda: batch.hide("x", True)):
        with pytest.raises(
            ValueError, match=r"site 'x': the whole of a mapped .* take rows\(index"
        ):
            whole()


def test_only_the_rows_that_are_taken_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "a.npy", TABLE)
    batch = load(tmp_path / "a.npy", mmap=True)
    read: list[int] = []
    take = Column.read

    def noted(column: Column, source: Any) -> Tensor:
        read.extend(column.ids.tolist())
        return take(column, source)

    monkeypatch.setattr(Column, "read", noted)
    batch.rows([3, 9]), batch.rows(slice(28, None)), batch.shape("x"), len(batch), batch.to("cpu")
    assert read == [3, 9, 28, 29]


@pytest.mark.parametrize("size", [1, 500, 1024, 5000])
def test_pages_that_are_asked_for(tmp_path: Path, size: int) -> None:
    """All that the rows are in, each once, and little else; rows side by side in one piece."""
    np.save(tmp_path / "a.npy", np.zeros((3000, size), np.float32))
    source = np.load(tmp_path / "a.npy", mmap_mode="r")
    pages = np.zeros(source.nbytes // mmap.PAGESIZE + 4, int)
    calls: list[int] = []

    class Mapped:
        def madvise(self, advice: int, start: int, length: int) -> None:
            assert (advice, start % mmap.PAGESIZE) == (mmap.MADV_WILLNEED, 0)
            pages[start // mmap.PAGESIZE : (start + length) // mmap.PAGESIZE] += 1
            calls.append(length)

    source._mmap = Mapped()
    rows = np.array([2999, 7, 1000, 7])
    _ask_for(source, rows)
    for row in rows:
        first = source.offset + row * 4 * size
        touched = pages[first // mmap.PAGESIZE : (first + 4 * size - 1) // mmap.PAGESIZE + 1]
        assert (touched == 1).all()
    assert pages.sum() <= 3 * (4 * size // mmap.PAGESIZE + 2)
    calls.clear()
    _ask_for(source, np.arange(1000, 1500))
    assert len(calls) == 1
    _ask_for(source, np.arange(0))
    assert len(calls) == 1


def test_columns_first(tmp_path: Path) -> None:
    """A file in the other order of memory, whose rows are not in one piece."""
    np.save(tmp_path / "a.npy", np.asfortranarray(TABLE))
    batch = load(tmp_path / "a.npy", mmap=True)
    assert torch.equal(batch.rows([7, 2])["x"], torch.from_numpy(TABLE[[7, 2]]))


def test_folder_in_parts(tmp_path: Path) -> None:
    arrays = {"x_train": PIXELS, "y_train": np.arange(24, dtype=np.uint8), "x_test": PIXELS[:5]}
    path = folder(tmp_path / "big", **arrays, y_test=np.arange(5, dtype=np.uint8))
    train, test = load(path, mmap=True), load(path, "test", mmap=True)
    assert (train.size, test.size, train.sites) == (24, 5, ("x", "y"))
    rows = train.rows([3])
    assert torch.equal(rows["x"], torch.from_numpy(PIXELS[[3]]).double())
    assert (rows["x"].dtype, rows["y"].dtype) == (torch.float64, torch.int64)
    assert train.record["levels"] == {"x": 256}
    assert train.record["splits"] == ["train", "test"]


NAN = np.where(np.random.default_rng(2).random(TABLE.shape) < 0.3, np.nan, TABLE)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "table": ({"x": TABLE.astype(np.float32)}, {}),
    "missing": ({"x": NAN}, {}),
    "mask": ({"x": TABLE, "observed_x": ~np.isnan(NAN)}, {}),
    "images": ({"x": PIXELS}, {}),
    "dynamic": ({"x": PIXELS}, {"binarize": "dynamic"}),
    "epoch": ({"x": PIXELS}, {"binarize": "epoch"}),
    "static": ({"x": PIXELS}, {"binarize": "static"}),
    "threshold": ({"x": PIXELS}, {"binarize": "threshold"}),
    "dequantized": ({"x": PIXELS}, {"dequantize": True}),
    "masked images": (
        {"x": PIXELS, "observed_x": PIXELS % 3 > 0},
        {"binarize": "dynamic"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_equals_one_in_memory(tmp_path: Path, case: str) -> None:
    arrays, options = CASES[case]
    path = folder(tmp_path / "data", **arrays)
    found = []
    for mapped in (True, False):
        train, valid = split(load(path, mmap=mapped, **options), seed=1)
        assert isinstance(train, OnDemand) or not mapped
        run, parameters = trained(train, valid=valid, epochs=2)
        result = run.evaluate(valid, num_particles=20)
        found.append((parameters, without_time(run), result))
    (one, history, from_file), (two, wanted, held) = found
    assert same(one, two)
    assert history == wanted
    assert torch.equal(from_file.log_p, held.log_p)
    assert from_file.summary() == held.summary()


def test_integers_with_a_mask(tmp_path: Path) -> None:
    mask = np.arange(30) % 4 > 0
    path = folder(tmp_path / "data", x=TABLE, y=np.arange(30), observed_y=mask)
    batch, held = load(path, mmap=True), load(path)
    assert batch.incomplete == held.incomplete == ("y",)
    rows = batch.rows([0, 1, 4])
    assert rows.mask("y").tolist() == [False, True, False]
    assert torch.equal(rows["y"], held.rows([0, 1, 4])["y"])
    assert batch.record["sites"]["y"]["missing"] is None
    assert held.record["sites"]["y"]["missing"] == 8


def test_missing_entries_are_looked_for_in_the_first_rows(tmp_path: Path) -> None:
    x = np.zeros((LOOK + 5, 2))
    x[LOOK + 3, 1] = np.nan
    path = folder(tmp_path / "late", x=x)
    batch = load(path, mmap=True)
    assert batch.incomplete == ()
    batch.rows(slice(0, LOOK))
    with pytest.raises(ValueError, match=f"late: site 'x': NaN in row {LOOK + 3} .* observed_SITE"):
        batch.rows(slice(LOOK, None))
    np.save(path / "observed_x.npy", np.ones(x.shape, bool))
    rows = load(path, mmap=True).rows([0, LOOK + 3])
    assert rows.mask("x").tolist() == [[True, True], [True, False]]
    x[LOOK + 1] = np.inf
    np.save(path / "x.npy", x)
    with pytest.raises(ValueError, match=f"site 'x': infinite entries in row {LOOK + 1}"):
        load(path, mmap=True).rows([1, LOOK + 1])


def test_fewer_rows_are_looked_at_where_they_are_large() -> None:
    assert first_rows((10**6, 28, 28)) == slice(0, LOOK)
    assert first_rows((10**6, 3, 512, 512)) == slice(0, 85)  # 2 ** 26 entries
    assert first_rows((10**6, 10**9)) == slice(0, 1)
    assert first_rows((10**6,), 7) == slice(0, 7)


def test_pairs_look_at_the_first_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", TABLE.astype(np.float64))
    batch = load(tmp_path / "a.npy", mmap=True)
    model, guide = vae(batch)
    assert pv.check(model, guide, batch).ok
    other = vae(load(tmp_path / "a.npy"))
    assert same(list(model.parameters()), list(other[0].parameters()))


@pytest.mark.gpu
def test_rows_go_to_the_device(images: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", PIXELS)
    for batch in (
        load(images, binarize="epoch"),
        load(tmp_path / "a.npy", binarize="epoch", mmap=True),
    ):
        moved = batch.to("cuda")
        rows = moved.epoch(1, 2).rows(torch.tensor([3, 1], device="cuda"))
        assert rows["x"].device.type == rows.index.device.type == "cuda"
        assert torch.equal(rows["x"].cpu(), batch.epoch(1, 2).rows([3, 1])["x"])
        run, _ = trained(batch.without("y"), device="cuda")
        assert run.config["device"] == "cuda"
