"""Loading by name and from files: values, masks, splits, records, and errors a user can cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyro_vae.batch import Batch
from pyro_vae.data import describe, load, split


@pytest.fixture(autouse=True)
def _no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYRO_VAE_DATA", raising=False)


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


# --- digits -------------------------------------------------------------------------------------


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


# --- files --------------------------------------------------------------------------------------


def test_file_without_suffixes_is_one_split(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", x=np.arange(6.0).reshape(3, 2), y=np.arange(3, dtype=np.int16))
    for source in (path, str(path)):
        for part in (None, "all"):
            batch = load(source, split=part)
            assert batch["x"].tolist() == [[0, 1], [2, 3], [4, 5]]
            assert batch["y"].tolist() == [0, 1, 2]
            assert batch["y"].dtype == torch.int64


def test_file_in_parts(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.npz",
        x_train=np.zeros((5, 2, 2), dtype=np.uint8),
        y_train=np.arange(5, dtype=np.uint8),
        x_test=np.full((3, 2, 2), 255, dtype=np.uint8),
        y_test=np.arange(3, dtype=np.uint8),
    )
    train, test = load(path), load(path, split="test")
    assert train.size == train.total == 5
    assert test.size == test.total == 3
    assert test["x"].dtype == torch.float64
    assert (test["x"] == 255).all()
    assert test["y"].dtype == torch.int64
    assert describe(path)["splits"] == ["train", "test"]
    assert describe(path)["split"] == "train"


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.ones((2, 3), dtype=np.float16), torch.float64),
        (np.ones((2, 3), dtype=">f4"), torch.float64),
        (np.ones((2, 3), dtype=np.longdouble), torch.float64),
        (np.ones((2, 3), dtype=np.uint8), torch.float64),
        (np.ones((2, 3), dtype=bool), torch.float64),
        (np.ones(2, dtype=bool), torch.int64),
        (np.ones(2, dtype=np.uint8), torch.int64),
        (np.ones((2, 3), dtype=np.int8), torch.int64),
        (np.ones((2, 3), dtype=">i4"), torch.int64),
        (np.ones(2, dtype=np.uint32), torch.int64),
    ],
    ids=lambda value: f"{value.dtype}-{value.ndim}d" if isinstance(value, np.ndarray) else "",
)
def test_dtypes(tmp_path: Path, array: np.ndarray[Any, Any], dtype: torch.dtype) -> None:
    x = load(save(tmp_path / "a.npz", x=array))["x"]
    assert x.dtype == dtype
    assert x.tolist() == array.astype(float).tolist()


def test_nan_is_missing(tmp_path: Path) -> None:
    x = np.array([[1.0, np.nan], [3.0, 4.0]], dtype=np.float32)
    batch = load(save(tmp_path / "a.npz", x=x))
    assert batch.mask("x").tolist() == [[True, False], [True, True]]
    assert describe(tmp_path / "a.npz")["sites"]["x"]["missing"] == 1


def test_mask_of_integers(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", y=np.array([3, 9, 4]), observed_y=np.array([1, 0, 1]))
    batch = load(path)
    assert batch.sites == ("y",)
    assert batch.mask("y").tolist() == [True, False, True]
    assert batch["y"][1] == 3  # the observed median


def test_parts_agree_on_what_is_missing_and_how_it_reads(tmp_path: Path) -> None:
    nan = np.nan
    path = save(
        tmp_path / "a.npz",
        x_train=np.array([2.0, 3.0, nan]),
        x_valid=np.array([7.0, 8.0]),
        x_test=np.array([nan, 50.0]),
        y_train=np.array([1, 1, 1]),
        y_valid=np.array([5, 6]),
        observed_y_valid=np.array([False, True]),
        y_test=np.array([7, 8]),
    )
    for part in ("train", "valid", "test"):
        batch = load(path, split=part)
        assert batch.incomplete == ("x", "y")
        assert batch.fill == {"x": 2.0, "y": 1.0}
    assert load(path, split="test")["x"].tolist() == [2.0, 50.0]
    assert load(path, split="valid").mask("x").all()
    assert load(path, split="valid")["y"].tolist() == [1, 6]


def test_sites_selects_arrays(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.npz",
        x=np.zeros((3, 2)),
        y=np.arange(3),
        observed_y=np.array([True, True, False]),
        names=np.array(["a", "b"]),
    )
    batch = load(path, sites=["y"])
    assert batch.sites == batch.incomplete == ("y",)
    assert load("digits", sites=["x"]).sites == ("x",)


def test_static_binary_mnist_is_unpacked(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2, (4, 784), dtype=np.uint8)
    arrays = {"x_valid": np.packbits(bits, axis=1), "y_valid": np.arange(4, dtype=np.uint8)}
    path = save(tmp_path / "mnist_static_binary.npz", **arrays)
    batch = load(path, split="valid")
    assert batch["x"].shape == (4, 28, 28)
    assert batch["x"].dtype == torch.float64
    assert batch["x"].flatten(1).tolist() == bits.tolist()
    assert "unpacked" in describe(path, split="valid")["steps"][0]
    with pytest.raises(ValueError, match=r"wanted bit-packed uint8 \[N, 98\]"):
        load(save(path, x=np.zeros((4, 28, 28), dtype=np.uint8)))


def test_folder_of_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "mine.npz", x=np.zeros((3, 2)))
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path))
    assert load("mine").size == 3
    assert describe("mine")["source"] == str(tmp_path / "mine.npz")
    with pytest.raises(ValueError, match=r"'other' is unknown: .*'digits'.* has \['mine'\]"):
        load("other")
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere, which is not a folder"):
        load("mine")


# --- the record ---------------------------------------------------------------------------------


def test_record_of_a_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", x=np.zeros((3, 2), dtype=np.uint8))
    record = describe(path)
    assert record["source"] == str(path)
    assert record["rows"] == 3
    assert record["sites"] == {"x": {"shape": [3, 2], "dtype": "float64", "missing": 0}}
    assert record["steps"] == ["x: uint8 to floating, unscaled"]
    assert json.loads(json.dumps(record)) == record
    before = record["sha256"]
    save(path, x=np.ones((3, 2), dtype=np.uint8))
    assert describe(path)["sha256"] != before


def test_record_of_digits_names_the_seeds() -> None:
    record = describe("digits_binary", split="train")
    assert record["binarization"] == {"kind": "static", "draw": "count / 16", "seed": 0}
    assert (record["split"], record["split_seed"], record["rows"]) == ("train", 0, 1437)
    assert json.loads(json.dumps(record)) == record
    assert describe("digits")["sha256"] == record["sha256"]
    assert "split_seed" not in describe("digits")


# --- split --------------------------------------------------------------------------------------


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


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "arguments", "message"),
    [
        ({}, {}, "holds no arrays"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(2)}, {}, r"rows: \{'x': 3, 'y': 2\}; name them"),
        ({"x": np.zeros((0, 2))}, {}, "have no rows"),
        ({"x": np.float64(3)}, {}, "have no rows"),
        ({"x": np.array([1.0, np.inf])}, {}, "site 'x': infinite entries .first in row 1"),
        ({"x": np.array(["a", "b"])}, {}, "array 'x' holds <U1, wanted numbers; .* sites="),
        ({"x": np.zeros(2, complex)}, {}, "array 'x' holds complex128, wanted numbers"),
        ({"x": np.array([1, None])}, {}, "array 'x' holds Python objects, wanted numbers"),
        ({"x": np.zeros(2)}, {"split": "train"}, "not stored in parts; divide it by"),
        ({"x_train": np.zeros(2)}, {"split": "test"}, r"came 'test', wanted one of \['train'\]"),
        ({"x_train": np.zeros(2)}, {"split": "all"}, r"came 'all', wanted one of \['train'\]"),
        ({"x_test": np.zeros(2)}, {}, r"no training rows, only \['test'\]; name them"),
        ({"x_train": np.zeros(2), "z": np.zeros(2)}, {}, r"arrays \['z'\] belong to no split"),
        ({"x": np.zeros(2)}, {"sites": ["q"]}, r"sites= names \['q'\], the file holds \['x'\]"),
        ({"x": np.zeros(2)}, {"sites": "x"}, "sites= came the text 'x'"),
        ({"x": np.zeros(2), "observed_y": np.ones(2)}, {}, "is the mask of 'y', which is not"),
        ({"x": np.zeros(2), "observed_x": np.array([1, 7])}, {}, "'observed_x' is a mask, wanted"),
        (
            {"x": np.zeros((2, 3)), "observed_x": np.array([True, False])},
            {},
            r"site 'x': observed= came \[2\], wanted \[2, 3\]",
        ),
    ],
)
def test_file_errors(
    tmp_path: Path, arrays: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    path = save(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message) as raised:
        load(path, **arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("cut", [0, 10, 200, -30])
def test_broken_file(tmp_path: Path, cut: int) -> None:
    path = save(tmp_path / "a.npz", x=np.arange(100.0))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"a\.npz: (the file is empty|not an \.npz file)"):
        load(path)


def test_damaged_array(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", x=np.arange(100.0))
    content = bytearray(path.read_bytes())
    content[400] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match="array 'x' cannot be read"):
        load(path)


def test_not_an_npz_file(tmp_path: Path) -> None:
    text = tmp_path / "a.csv"
    text.write_text("x,y\n1,2\n")
    with pytest.raises(ValueError, match=r"not an \.npz file"):
        load(text)
    with pytest.raises(ValueError, match="came a folder"):
        load(tmp_path)
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"not an \.npz file"):
        load(tmp_path / "a.npy")


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'mnist' is unknown: .*set PYRO_VAE_DATA to a folder"):
        load("mnist")
    for path in (tmp_path / "none.npz", "none.npz", Path("digits")):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load(path)
    with pytest.raises(ValueError, match="came 'valid', wanted one of"):
        load("digits", split="valid")
    with pytest.raises(ValueError, match=r"digits: sites= names \['q'\]"):
        load("digits", sites=["q"])


def test_too_large_for_the_default_dtype(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    path = save(tmp_path / "a.npz", x=np.array([1.0, 1e300]))
    with pytest.raises(ValueError, match="infinite entries"):
        load(path)
