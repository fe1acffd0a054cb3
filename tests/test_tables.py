"""Files of named arrays come back as they went out."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest

from pyro_vae.reporting import tables

ARRAYS = {
    "row": np.array([4, 7]),
    "z": np.array([[0.5, np.nan], [1.5, -2.0]]),
    "image": np.arange(8.0).reshape(2, 2, 2),
}
NAMES = ["row", "z_0", "z_1", "image_0_0", "image_0_1", "image_1_0", "image_1_1"]


def test_npz_keeps_the_arrays(tmp_path):
    tables.write(tmp_path / "a.npz", ARRAYS)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert set(file) == set(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(file[name], array)


@pytest.mark.parametrize(
    ("suffix", "read"),
    [
        (".csv", pd.read_csv),
        (".tsv", lambda path: pd.read_csv(path, sep="\t")),
        (".parquet", pd.read_parquet),
    ],
    ids=["csv", "tsv", "parquet"],
)
def test_tables_have_a_column_for_every_entry(tmp_path, suffix, read):
    tables.write(tmp_path / f"a{suffix}", ARRAYS)
    frame = read(tmp_path / f"a{suffix}")
    assert list(frame.columns) == NAMES
    np.testing.assert_array_equal(frame["z_1"], ARRAYS["z"][:, 1])
    np.testing.assert_array_equal(frame["image_1_0"], ARRAYS["image"][:, 1, 0])
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


def test_columns_take_the_names_of_the_data():
    frame = tables.columns({"x": ARRAYS["z"]}, {"x": ["age", "height"]})
    assert list(frame.columns) == ["age", "height"]
    np.testing.assert_array_equal(frame["height"], ARRAYS["z"][:, 1])


def test_names_that_do_not_fit_are_not_taken():
    assert list(tables.columns({"x": ARRAYS["z"]}, {"x": ["age"]}).columns) == ["x_0", "x_1"]


def test_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"a.xls: came suffix '.xls', wanted one of \['.npz'"):
        tables.write(tmp_path / "a.xls", ARRAYS)


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        tables.write(tmp_path / "none" / "a.csv", ARRAYS)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "fastparquet", None)
    with pytest.raises(ValueError, match=r"pip install 'pyro-vae\[parquet\]'"):
        tables.write(tmp_path / "a.parquet", ARRAYS)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    (tmp_path / "a.csv").write_text("before")
    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(OSError, match="No space left"):
        tables.write(tmp_path / "a.csv", ARRAYS)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
