"""Standardized values: closed forms, units, and the way back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.batch import Batch
from pyro_vae.data import load, split, standardize, standardize_as, undo
from pyro_vae.evaluation.units import log_jacobian

X = np.random.default_rng(0).normal([3.0, -200.0, 0.0], [0.01, 50.0, 1.0], (40, 3))
NAN = np.where(np.random.default_rng(1).random(X.shape) < 0.3, np.nan, X)


def test_mean_and_scale_are_those_of_the_training_rows() -> None:
    train, test = Batch({"x": X[:30], "y": np.arange(30)}), Batch({"x": X[30:], "y": np.arange(10)})
    one, two = standardize(train, test)
    mean, scale = X[:30].mean(0), X[:30].std(0)
    assert np.allclose(one["x"], (X[:30] - mean) / scale, rtol=1e-10)
    assert np.allclose(two["x"], (X[30:] - mean) / scale, rtol=1e-10)
    assert torch.equal(one["y"], train["y"])
    assert torch.allclose(one["x"].mean(0), torch.zeros(3), atol=1e-12)
    (step,) = one.record["steps"]
    assert step["mean"] == pytest.approx(mean.tolist())
    assert step["scale"] == pytest.approx(scale.tolist())
    assert step["log_jacobian"] == pytest.approx((-np.log(scale)).tolist())
    assert step["text"] == "x: (x - mean) / scale per entry, from 30 training rows"
    assert two.record["steps"] == [step]
    assert train.record == {}
    assert json.loads(json.dumps(one.record)) == one.record
    assert len(standardize(train)) == 1


def test_missing_entries_do_not_count() -> None:
    weights = torch.rand(40)
    batch = Batch({"x": NAN}, weights=weights)
    (scaled,) = standardize(batch)
    assert scaled.incomplete == ("x",)
    assert torch.equal(scaled.mask("x"), batch.mask("x"))
    assert (scaled["x"][~scaled.mask("x")] == 0).all()
    assert scaled.fill == {"x": 0.0}
    wanted = (NAN - np.nanmean(NAN, 0)) / np.nanstd(NAN, 0)
    assert np.allclose(scaled["x"].where(scaled.mask("x"), torch.nan), wanted, equal_nan=True)
    assert scaled.weights is weights


def test_constant_and_unseen_entries_have_scale_1() -> None:
    x = np.array([[0.1, np.nan, 1.0], [0.1, np.nan, 2.0], [0.1, np.nan, 3.0]])
    (scaled,) = standardize(Batch({"x": x}))
    (step,) = scaled.record["steps"]
    assert step["scale"][:2] == [1.0, 1.0]
    assert step["log_jacobian"][:2] == [0.0, 0.0]
    assert step["mean"] == pytest.approx([0.1, 0.0, 2.0])
    assert scaled["x"][:, 0].abs().max() < 1e-15


def test_sums_over_many_rows_are_exact_enough(tmp_path: Path) -> None:
    """More rows than are looked at at a time, a mean that is large beside the scale."""
    x = 1e6 + np.random.default_rng(2).normal(size=(25_001, 2))
    np.save(tmp_path / "x.npy", x)
    (held,) = standardize(load(tmp_path / "x.npy"))
    (mapped,) = standardize(load(tmp_path / "x.npy", mmap=True))
    (step,) = held.record["steps"]
    assert step["scale"] == pytest.approx(x.std(0).tolist(), rel=1e-9)
    assert mapped.record["steps"] == [step]
    assert torch.equal(mapped.rows(slice(None))["x"], held["x"])


def gaussian(loc: Any, scale: Any) -> Any:
    """A model without latents but one that x ignores: log p(x) is closed."""

    def model(batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.tensor(loc), torch.tensor(scale)).to_event(1))

    return model


def guide(batch: Batch) -> None:
    with pyro.plate("data", batch.size, dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("data", [X, NAN], ids=["complete", "missing"])
def test_log_p_in_raw_units(data: Any) -> None:
    """log p of standardized rows + log-Jacobian is log p of the rows as they came."""
    (batch,) = standardize(Batch({"x": data}))
    (step,) = batch.record["steps"]
    mean, scale = torch.tensor(step["mean"]), torch.tensor(step["scale"])
    loc, width = torch.tensor([0.3, -0.2, 0.1]), torch.tensor([0.9, 1.2, 1.0])
    result = pv.evaluate(gaussian(loc.tolist(), width.tolist()), guide, batch, 4, widen=False)
    seen = torch.tensor(data).nan_to_num(0.0)
    raw = dist.Normal(mean + scale * loc, scale * width).log_prob(seen)
    wanted = raw.where(torch.tensor(~np.isnan(data)), 0.0).sum(1)
    assert torch.allclose(result.log_p + log_jacobian(batch, ["x"]), wanted)
    assert result.summary()["log_p_raw"] == pytest.approx(float(wanted.mean()))


def test_undo() -> None:
    (batch,) = standardize(Batch({"x": X, "t": X[:, 0]}))
    assert torch.allclose(undo(batch, "x", batch["x"]), torch.tensor(X))
    assert torch.allclose(undo(batch.record, "t", batch["t"]), torch.tensor(X[:, 0]))
    draws = torch.randn(5, 7, 3)
    step = batch.record["steps"][0]
    wanted = draws * torch.tensor(step["scale"]) + torch.tensor(step["mean"])
    assert torch.allclose(undo(batch, "x", draws), wanted)
    single = undo(batch, "x", draws.float())
    assert single.dtype == torch.float32
    assert torch.equal(undo(Batch({"x": X}), "x", draws), draws)


def test_as_another_was() -> None:
    train = Batch({"x": X, "t": X[:, 0]})
    (scaled,) = standardize(train, sites=["t"])
    again = standardize_as(scaled.record, train)
    assert torch.equal(again["t"], scaled["t"])
    assert torch.equal(again["x"], train["x"])
    assert again.record == scaled.record
    assert standardize_as({}, train) is train


@pytest.mark.parametrize("case", ["static", "dynamic", "mapped"])
def test_dequantized_images(tmp_path: Path, case: str) -> None:
    """Both steps count: -log 256 - log scale per entry; undone, they are the images again."""
    pixels = np.random.default_rng(3).integers(0, 256, (40, 2, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    batch = load(tmp_path / "x.npy", dequantize=True, mmap=case == "mapped")
    batch = batch.still() if case == "static" else batch
    train, test = standardize(*split(batch))
    (first, second) = test.record["steps"]
    assert (first["step"], second["step"]) == ("dequantize", "standardize")
    rows = test.rows(slice(None))
    before = split(load(tmp_path / "x.npy"))[1]["x"]
    assert torch.equal(undo(test, "x", rows["x"]), before)
    wanted = -6 * math.log(256) - float(np.log(second["scale"]).sum())
    assert torch.allclose(log_jacobian(test, ["x"]), torch.full((8,), wanted))
    assert test.record["levels"] == {"x": 256}
    one, two = train.rows([0, 1])["x"], train.rows([0, 1])["x"]
    assert torch.equal(one, two) == (case == "static")
    still = train.still().rows(slice(None))["x"]
    assert torch.allclose(still.mean(0), torch.zeros(2, 3), atol=1e-10)
    assert torch.allclose(still.std(0, unbiased=False), torch.ones(2, 3))


def test_beside_images_that_are_drawn_anew(tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (40, 2, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=pixels, t=NAN)
    batch = load(tmp_path / "a.npz", binarize="dynamic")
    (scaled,) = standardize(batch, sites=["t"])
    (wanted,) = standardize(Batch({"t": NAN}))
    rows: Tensor = scaled.rows(slice(3, 9))["t"]
    assert torch.allclose(rows, wanted["t"][3:9])
    assert not torch.equal(scaled.rows([0, 1])["x"], scaled.rows([0, 1])["x"])


def test_twice_is_as_good_as_once(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    for mmap in (True, False):
        (once,) = standardize(load(tmp_path / "x.npy", mmap=mmap))
        (twice,) = standardize(once)
        assert torch.allclose(twice.rows(slice(None))["x"], once.rows(slice(None))["x"])
        values = twice.rows(slice(None))["x"]
        assert torch.allclose(undo(twice, "x", values), torch.tensor(X))


def test_sequences_that_are_split_into_steps() -> None:
    """Units and the way back are those of the whole sequence, slice by slice."""
    x = np.random.default_rng(4).normal(3.0, [[1.0, 20.0]] * 5, (30, 5, 2))
    x[np.random.default_rng(5).random(x.shape) < 0.3] = np.nan
    (whole,) = standardize(Batch({"x": x}))
    steps = whole.steps("x")
    names = [f"x_{t}" for t in range(5)]
    wanted = log_jacobian(whole, ["x"])
    assert float(wanted.abs().min()) > 0
    assert torch.allclose(log_jacobian(steps, names), wanted)
    for t, name in enumerate(names):
        back = undo(steps, name, steps[name]).where(steps.mask(name), torch.nan)
        assert np.allclose(back, x[:, t], equal_nan=True)
    assert json.loads(json.dumps(steps.record)) == steps.record
    again = standardize_as(steps.record, Batch({"x": x}).steps("x"))
    assert all(torch.equal(again[name], steps[name]) for name in names)


@pytest.mark.parametrize("case", ["held", "beside", "mapped", "twice"])
def test_a_large_mean_in_float32(tmp_path: Path, case: str) -> None:
    """It is not rounded itself, and neither is the way back."""
    torch.set_default_dtype(torch.float32)
    x = np.random.default_rng(6).normal(1e6 + 0.031, 1.0, (4000, 1)).astype(np.float32)
    folder = tmp_path / "data"
    folder.mkdir()
    np.save(folder / "t.npy", x)
    np.save(folder / "x.npy", np.full((4000, 2, 2), 255, dtype=np.uint8))
    options = {"held": {}, "beside": {"binarize": "dynamic"}}.get(case, {"mmap": True})
    (scaled,) = standardize(load(folder, **options), sites=["t"])
    if case == "twice":
        (scaled,) = standardize(scaled, sites=["t"])
    values = scaled.rows(slice(None))["t"]
    assert values.dtype == torch.float32
    exact = (x.astype(np.float64) - x.mean(dtype=np.float64)) / x.std(dtype=np.float64)
    assert np.abs(values.double().numpy() - exact).max() < 1e-6
    assert abs(float(values.double().mean())) < 1e-6
    assert np.array_equal(undo(scaled, "t", values), x)


@pytest.mark.parametrize(
    ("others", "sites", "message"),
    [
        ((), ["y"], "standardize: site 'y' came as whole numbers, wanted a floating site"),
        ((), ["q"], r"standardize: site 'q' came as no such site, only \['x', 'y'\]"),
        ((Batch({"t": X}),), None, "standardize: the batch has no site 'x'"),
        ((Batch({"x": X[:, :2]}),), None, r"'x' came with event shape \[2\], wanted \[3\]"),
    ],
)
def test_errors(others: tuple[Batch, ...], sites: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        standardize(Batch({"x": X, "y": np.arange(40)}), *others, sites=sites)
