"""Loading by name and from files: values, masks, splits, records, and errors a user can cause."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyro_vae.data import describe, load
from pyro_vae.data.on_demand import OnDemand


@pytest.fixture(autouse=True)
def _no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PYRO_VAE_DATA", raising=False)
    monkeypatch.setenv("PYRO_VAE_CACHE", str(tmp_path / "cache"))


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


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


def test_folder_of_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "mine.npz", x=np.zeros((3, 2)))
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path))
    assert load("mine").size == 3
    assert describe("mine")["source"] == str(tmp_path / "mine.npz")
    with pytest.raises(ValueError, match=r"'mime' is unknown: .*'digits'.*did you mean 'mine'\?"):
        load("mime")
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
    step = {"site": "x", "step": "cast", "text": "x: uint8 to floating, unscaled"}
    assert record["steps"] == [step]
    assert (record["name"], record["split"], record["splits"]) == (str(path), "all", ["all"])
    assert load(path).record == record
    assert json.loads(json.dumps(record)) == record
    before = record["sha256"]
    save(path, x=np.ones((3, 2), dtype=np.uint8))
    assert describe(path)["sha256"] != before


def test_levels_are_those_of_8_bit_images(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.npz",
        x=np.full((3, 2, 2), 7, dtype=np.uint8),
        binary=np.ones((3, 2, 2), dtype=np.uint8),
        count=np.full((3, 2, 2), 7),
        y=np.full(3, 7, dtype=np.uint8),
    )
    assert load(path).record["levels"] == {"x": 256}
    assert "levels" not in load(path, sites=["y", "binary"]).record


# --- what is done to images ---------------------------------------------------------------------


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 5), dtype=np.uint8)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    parts = {"x_train": PIXELS, "x_test": PIXELS, "y_train": np.arange(6), "y_test": np.arange(6)}
    return save(tmp_path / "images.npz", **parts)


@pytest.mark.parametrize("kind", ["static", "threshold"])
def test_one_binarization(images: Path, kind: str) -> None:
    batch = load(images, binarize=kind)
    assert not isinstance(batch, OnDemand)
    assert torch.equal(batch["x"], load(images, binarize=kind)["x"])
    assert batch["x"].unique().tolist() == [0, 1]
    assert batch.sites == ("x", "y")
    (step,) = batch.record["steps"]
    assert (step["site"], step["step"], step["kind"], step["seed"]) == ("x", "binarize", kind, 0)
    assert "levels" not in batch.record
    if kind == "threshold":
        assert torch.equal(batch["x"] > 0, torch.from_numpy(PIXELS) > 127)
    else:
        assert not torch.equal(batch["x"], load(images, binarize=kind, seed=1)["x"])
        assert not torch.equal(batch["x"], load(images, "test", binarize=kind)["x"])


@pytest.mark.parametrize("options", [{"binarize": "dynamic"}, {"dequantize": True}])
def test_drawn_anew_in_training_only(images: Path, options: dict[str, Any]) -> None:
    train, test = load(images, **options), load(images, "test", **options)
    assert isinstance(train, OnDemand)
    assert not isinstance(test, OnDemand)
    one, two = (train.rows(slice(None)) for _ in range(2))
    assert not torch.equal(one["x"], two["x"])
    assert torch.equal(one["y"], two["y"])
    assert torch.equal(test["x"], load(images, "test", **options)["x"])
    assert torch.equal(train.still()["x"], load(images, **options)["x"])
    assert train.sites == test.sites
    assert (
        "anew" in train.record["steps"][0]["text"] or "whenever" in train.record["steps"][0]["text"]
    )
    assert "one fixed draw, by seed 0" in test.record["steps"][0]["text"]
    assert json.loads(json.dumps(train.record)) == train.record


def test_dequantized_record(images: Path) -> None:
    record = describe(images, dequantize=True)
    assert record["levels"] == {"x": 256}
    (step,) = record["steps"]
    assert step["step"] == "dequantize"
    assert step["log_jacobian"] == pytest.approx(-math.log(256))


def test_binarized_images_with_missing_pixels(tmp_path: Path) -> None:
    observed = np.random.default_rng(1).random(PIXELS.shape) < 0.7
    path = save(tmp_path / "a.npz", x=PIXELS, observed_x=observed)
    for kind in ("dynamic", "static"):
        rows = load(path, binarize=kind).rows([0, 3])
        assert torch.equal(rows.mask("x"), torch.from_numpy(observed[[0, 3]]))
        assert (rows["x"][~rows.mask("x")] == 0).all()
    rows = load(path, dequantize=True).rows([0, 3])
    assert (rows["x"][~rows.mask("x")] == 0.5).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"binarize": "always"}, "binarize= came 'always', wanted one of"),
        ({"binarize": "static", "dequantize": True}, "came binarize= and dequantize="),
        ({"binarize": "static", "seed": 0.5}, "seed= came 0.5, wanted a whole number"),
        ({"binarize": "static", "sites": ["y"]}, r"for 8-bit images, .* of the sites \['y'\]"),
        ({"columns": ["a"]}, r"images.npz: came columns, which is for tables"),
        ({"drop": "a"}, r"images.npz: came drop, which is for tables"),
        ({"sites": {"x": ["a"]}}, r"images.npz: came sites= as a mapping, which is for tables"),
        ({"size": (2, 2)}, r"images.npz: came size, which is for folders of images"),
        ({"mmap": True}, r"images.npz: came mmap, which is for .npy files"),
        ({"sites": []}, "sites= came empty"),
        ({"sites": [3]}, "sites= came with 3, wanted names"),
    ],
)
def test_options_that_do_not_fit(images: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(images, **options)


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
        ({"x": np.zeros(2)}, {"split": "train"}, "not stored in parts; divide them by"),
        ({"x_train": np.zeros(2)}, {"split": "test"}, r"came 'test', wanted one of \['train'\]"),
        ({"x_train": np.zeros(2)}, {"split": "all"}, r"came 'all', wanted one of \['train'\]"),
        ({"x_test": np.zeros(2)}, {}, r"no training rows, only \['test'\]; name them"),
        ({"x_train": np.zeros(2), "z": np.zeros(2)}, {}, r"arrays \['z'\] belong to no split"),
        ({"x": np.zeros(2)}, {"sites": ["q"]}, r"sites= names \['q'\], the data set holds \['x'\]"),
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


def test_not_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1 2")
    with pytest.raises(
        ValueError, match=r"a\.txt: came a file \.txt, wanted one of \.npz, \.npy, "
    ):
        load(tmp_path / "a.txt")
    (tmp_path / "a.npz").write_text("x,y\n1,2\n")
    with pytest.raises(ValueError, match=r"not an \.npz file"):
        load(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="came a list, wanted a name, a path or a DataFrame"):
        load([1, 2])  # type: ignore[arg-type]


def test_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'digit' is unknown: .*; did you mean 'digits'\?"):
        load("digit")
    with pytest.raises(ValueError, match=r"'zzz' is unknown: .*'mnist'.*set PYRO_VAE_DATA"):
        load("zzz")
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"photos: .*image"):  # a folder that is here
        load("photos")
    for path in (tmp_path / "none.npz", "none.npz", Path("digits")):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load(path)


def test_too_large_for_the_default_dtype(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    path = save(tmp_path / "a.npz", x=np.array([1.0, 1e300]))
    with pytest.raises(ValueError, match="infinite entries"):
        load(path)
