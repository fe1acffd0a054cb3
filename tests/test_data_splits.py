"""Cutting by a seed: parts, records, and what goes on being made when it is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyro_vae.batch import Batch
from pyro_vae.data import load, split
from pyro_vae.data.on_demand import OnDemand


def test_split_divides_the_rows() -> None:
    batch = Batch({"x": np.arange(10.0), "y": np.arange(10)})
    parts = split(batch, (0.7, 0.2, 0.1), seed=3)
    assert [(part.size, part.total) for part in parts] == [(7, 7), (2, 2), (1, 1)]
    assert sorted(row for part in parts for row in part["x"].tolist()) == list(range(10))
    assert all(torch.equal(part["x"].long(), part["y"]) for part in parts)
    assert all(part.index.tolist() == list(range(part.size)) for part in parts)
    again, other = (split(batch, (0.7, 0.2, 0.1), seed=seed) for seed in (3, 4))
    assert torch.equal(parts[0]["x"], again[0]["x"])
    assert not torch.equal(parts[0]["x"], other[0]["x"])
    assert (batch.total, batch.size) == (10, 10)


def test_split_keeps_masks_fill_and_weights() -> None:
    x = np.array([2.0, 3.0, np.nan, 5.0])
    weights = torch.tensor([0.0, 1.0, 2.0, 3.0])
    for part in split(Batch({"x": x}, weights=weights), (0.5, 0.5)):
        assert part.incomplete == ("x",)
        assert part.fill == {"x": 3.0}
        assert part.weights is not None
        assert (part["x"][part.weights == 2] == 3).all()


@pytest.mark.parametrize("fractions", [(), (0.5, 0.4), (1.2, -0.2), (0.0, 1.0), (0.9, 0.2)])
def test_split_refuses_fractions(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="positive numbers that add up to 1"):
        split(Batch(size=10), fractions)


def test_split_refuses_an_empty_part() -> None:
    with pytest.raises(ValueError, match="leave a part of the 3 rows empty"):
        split(Batch(size=3), (0.1, 0.9))


def test_record_says_how_a_part_was_cut() -> None:
    batch = Batch({"x": np.array([1.0, np.nan, 3.0, 4.0])}, record={"name": "a", "rows": 4})
    first, _ = split(batch, (0.75, 0.25), seed=3)
    inner, _ = split(first, (0.5, 0.5), seed=4)
    assert inner.record["cuts"] == [
        {"fractions": [0.75, 0.25], "seed": 3, "part": 0},
        {"fractions": [0.5, 0.5], "seed": 4, "part": 0},
    ]
    assert (inner.record["name"], inner.record["rows"]) == ("a", 1)
    assert first.record["sites"]["x"]["shape"] == [3]
    assert first.record["sites"]["x"]["missing"] == int((~first.mask("x")).sum())
    assert batch.record == {"name": "a", "rows": 4}
    assert json.loads(json.dumps(inner.record)) == inner.record


@pytest.mark.parametrize("options", [{"binarize": "dynamic"}, {"binarize": "epoch"}])
def test_rows_keep_their_draws(tmp_path: Path, options: dict[str, Any]) -> None:
    """A row's fixed draw does not depend on the part it is cut into."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 4, 5), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=pixels, y=np.arange(30))
    batch = load(tmp_path / "a.npz", **options)
    wanted = batch.still()["x"]
    for part in split(batch, (0.5, 0.3, 0.2), seed=1):
        assert isinstance(part, OnDemand)
        assert (part.total, part.index.tolist()) == (part.size, list(range(part.size)))
        assert torch.equal(part.still()["x"], wanted[part["y"]])
        assert torch.equal(part.still()["x"], part["x"])


def test_mapped_rows_stay_mapped(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(20, 3))
    np.save(tmp_path / "a.npy", x)
    mapped, held = load(tmp_path / "a.npy", mmap=True), load(tmp_path / "a.npy")
    for part, wanted in zip(split(mapped), split(held), strict=True):
        assert isinstance(part, OnDemand)
        assert torch.equal(part.rows(slice(None))["x"], wanted["x"])
