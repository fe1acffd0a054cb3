"""The digits of scikit-learn: values, splits, the pinned draw."""

from __future__ import annotations

import json

import pytest
import torch

from pyro_vae.batch import Batch
from pyro_vae.data import describe, load


def test_digits() -> None:
    batch = load("digits")
    assert batch.sites == ("x", "y")
    assert batch["x"].shape == (1797, 64)
    assert batch["x"].dtype == torch.float64
    assert batch["y"].dtype == torch.int64
    assert batch["x"].unique().tolist() == list(range(17))
    assert batch["y"].unique().tolist() == list(range(10))
    assert batch.incomplete == ()


def test_digits_take_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float32)
    assert load("digits")["x"].dtype == torch.float32


@pytest.mark.parametrize("name", ["digits", "digits_binary"])
def test_digits_splits_are_fixed_and_disjoint(name: str) -> None:
    train, test, whole = (load(name, split=part) for part in ("train", "test", "all"))
    assert (train.size, train.total, test.size, test.total) == (1437, 1437, 360, 360)
    assert test.index.tolist() == list(range(360))

    def rows(*batches: Batch) -> list[tuple[float, ...]]:
        return sorted(tuple(row) for batch in batches for row in batch["x"].tolist())

    assert rows(train, test) == rows(whole)
    # Pinned: recorded numbers are of this split.
    assert train["y"][:10].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5]


def test_digits_binary_is_one_fixed_draw() -> None:
    counts, binary = load("digits")["x"], load("digits_binary")["x"]
    assert binary.unique().tolist() == [0, 1]
    assert torch.equal(binary, load("digits_binary")["x"])
    assert (binary[counts == 0] == 0).all()
    assert (binary[counts == 16] == 1).all()
    for count in range(1, 16):  # each within 5 standard errors of its probability
        share = binary[counts == count]
        p = count / 16
        assert abs(share.mean() - p) < 5 * (p * (1 - p) / len(share)) ** 0.5
    assert int(binary.sum()) == 35033  # pinned: the draw is part of the data set


def test_record_names_the_seeds() -> None:
    record = describe("digits_binary", split="train")
    assert record["steps"] == [
        {
            "site": "x",
            "step": "binarize",
            "kind": "static",
            "seed": 0,
            "text": "x: one Bernoulli draw per pixel with probability count / 16",
        }
    ]
    assert record["splits_by"] == {"seed": 0, "fractions": [0.8, 0.2]}
    assert (record["name"], record["split"], record["rows"]) == ("digits_binary", "train", 1437)
    assert record["splits"] == ["train", "test", "all"]
    assert json.loads(json.dumps(record)) == record
    assert describe("digits")["sha256"] == record["sha256"]


def test_sites_and_splits_that_are_not_there() -> None:
    assert load("digits", sites=["y"]).sites == ("y",)
    with pytest.raises(ValueError, match=r"digits: split= came 'valid', wanted one of .'train'"):
        load("digits", split="valid")
    with pytest.raises(ValueError, match=r"digits: sites= names \['q'\], the data set holds"):
        load("digits", sites=["q"])
    with pytest.raises(ValueError, match="digits: binarize= is for 8-bit images"):
        load("digits", binarize="static")
