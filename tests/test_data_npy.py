"""Arrays in .npy files, one by one and in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyro_vae.data import describe, load


def folder(path: Path, **arrays: Any) -> Path:
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
    return path


def test_one_file_is_site_x(tmp_path: Path) -> None:
    x = np.asfortranarray(np.arange(6.0).reshape(3, 2))
    x[1, 0] = np.nan
    np.save(tmp_path / "other.npy", x)
    batch = load(tmp_path / "other.npy")
    assert batch.sites == batch.incomplete == ("x",)
    assert batch["x"][[0, 2]].tolist() == [[0, 1], [4, 5]]
    assert batch.record["splits"] == ["all"]


def test_a_folder_is_like_an_npz_file(tmp_path: Path) -> None:
    arrays = {
        "x_train": np.zeros((5, 2, 2), dtype=np.uint8),
        "y_train": np.arange(5),
        "observed_y_train": np.arange(5) > 1,
        "x_test": np.full((3, 2, 2), 255, dtype=np.uint8),
        "y_test": np.arange(3),
    }
    (tmp_path / "parts").mkdir()
    path = folder(tmp_path / "parts", **arrays)
    np.savez(tmp_path / "parts.npz", **arrays)  # type: ignore[arg-type]
    for split in (None, "train", "test"):
        one, two = load(path, split), load(tmp_path / "parts.npz", split)
        assert one.sites == two.sites
        for site in one:
            assert torch.equal(one[site], two[site])
            assert torch.equal(one.mask(site), two.mask(site))
        assert one.record["levels"] == two.record["levels"] == {"x": 256}
    assert load(path, "test", sites=["y"]).sites == ("y",)
    before = describe(path)["sha256"]
    np.save(path / "y_test.npy", np.arange(3)[::-1])
    assert describe(path)["sha256"] != before
    folder(path, loose=np.zeros(3))
    with pytest.raises(ValueError, match=r"arrays \['loose'\] belong to no split"):
        load(path)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([1, None]), "a.npy: holds Python objects, wanted numbers"),
        (np.array(["a"]), "a.npy: array 'x' holds <U1, wanted numbers"),
        (np.float64(3), "arrays .'x'. have no rows"),
    ],
    ids=["objects", "text", "number"],
)
def test_refused_arrays(tmp_path: Path, array: Any, message: str, mmap: bool) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.npy", mmap=mmap)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("cut", [0, 5, 60, -8])
def test_broken_file(tmp_path: Path, cut: int, mmap: bool) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(100.0))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"a\.npy: .*cut short") as raised:
        load(path, mmap=mmap)
    assert "\n" not in str(raised.value)
    path.write_bytes(b"\x80\x04N.")  # a pickle of None, by its content
    with pytest.raises(ValueError, match=r"a\.npy: not an \.npy file"):
        load(path, mmap=mmap)
