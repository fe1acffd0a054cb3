"""Columns of several kinds: what is inferred, rows of a Batch, and the table back."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_vae.data.mixed import Columns, as_frame, read_table


def test_kinds_are_inferred():
    frame = pd.DataFrame(
        {
            "a": [1.5, None, 2.0],
            "b": pd.array([True, None, False], dtype="boolean"),
            "c": [0, 1, 1],
            "d": ["x", None, "y"],
            "e": pd.Categorical(["lo", "hi", None], categories=["lo", "hi"], ordered=True),
            "f": [3, 4, 5],
            "g": np.array([1, "2", None], dtype=object),
        }
    )
    columns = Columns.of(frame)
    assert columns.kinds == {
        "a": "real",
        "b": "binary",
        "c": "binary",
        "d": "category",
        "e": "ordinal",
        "f": "real",
        "g": "real",
    }
    batch = columns.batch(frame)
    assert batch["class_e"].tolist() == [0, 1, 0]
    assert batch.mask("class_e").tolist() == [True, True, False]
    assert batch.mask("binary").tolist() == [[True, True], [False, True], [True, True]]
    assert set(Columns.of(frame[["a", "f"]], "positive").kinds.values()) == {"positive"}


def test_a_filled_table_has_the_types_that_its_columns_had():
    frame = pd.DataFrame(
        {
            "a": pd.array([1, None, 3], dtype="Int64"),
            "b": np.array([0.5, np.nan, 2.0], dtype=np.float32),
            "c": pd.Categorical(["x", None, "y"]),
            "d": pd.array([True, None, False], dtype="boolean"),
            "e": np.array(["u", None, "v"], dtype=object),
            "f": [1.0, np.nan, 4.0],
        },
        index=[5, 5, 7],
    )
    columns = Columns.of(frame, {"f": "category"})
    values = {
        "real": torch.tensor([[9.0, 9.0], [1.7, 0.25], [9.0, 9.0]]),
        "binary": torch.tensor([[9.0], [0.6], [9.0]]),
        "class_c": torch.tensor([9, 1, 9]),
        "class_e": torch.tensor([9, 0, 9]),
        "class_f": torch.tensor([9, 1, 9]),
    }
    filled = columns.filled(frame, values)
    assert list(filled.dtypes) == list(frame.dtypes)
    assert filled.index.equals(frame.index)
    assert filled.iloc[1].tolist() == [2, 0.25, "y", True, "u", 4.0]
    pd.testing.assert_frame_equal(filled.iloc[[0, 2]], frame.iloc[[0, 2]])
    beside = columns.beside({"real": values["real"]}, "sd")
    assert {name: column.tolist() for name, column in beside.items()} == {
        "a_sd": [9.0, pytest.approx(1.7), 9.0],
        "b_sd": [9.0, 0.25, 9.0],
    }


def test_sites_of_columns_whose_names_are_no_words():
    frame = pd.DataFrame({"a b": ["x", "y"], "a.b": ["u", "v"], "type": ["s", "t"]})
    columns = Columns.of(frame)
    assert columns.sites == {"class_a_b": "a b", "class_a_b_1": "a.b", "class_type": "type"}
    assert columns.batch(frame)["class_a_b_1"].tolist() == [0, 1]


def test_tables_come_from_files_with_their_text(tmp_path):
    (tmp_path / "a.tsv").write_text("size\ttown\n1\tOslo\n\tRome\n")
    frame = read_table(tmp_path / "a.tsv")
    assert str(frame.dtypes["size"]) == "Int64"
    assert frame["size"].isna().tolist() == [False, True]
    assert frame["town"].tolist() == ["Oslo", "Rome"]
    assert list(as_frame(np.zeros((2, 3)))) == ["x0", "x1", "x2"]
    with pytest.raises(ValueError, match=r"wanted \.csv, \.tsv or \.parquet"):
        read_table(__file__)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_table(tmp_path / "b.csv")


def test_refusals():
    frame = pd.DataFrame({"size": [1.5, 2.5], "town": ["Oslo", "Rome"]})
    with pytest.raises(ValueError, match="'size': holds infinity"):
        Columns.of(frame.assign(size=[1.0, np.inf]))
    with pytest.raises(ValueError, match="came 0 rows and 2 columns"):
        Columns.of(frame.iloc[:0])
    with pytest.raises(ValueError, match=r"columns \['town'\] hold no value in any of 2 rows"):
        Columns.of(frame.assign(town=None))
    with pytest.raises(ValueError, match="1001 different texts"):
        Columns.of(pd.DataFrame({"name": [f"n{i}" for i in range(1001)]}))
    columns = Columns.of(frame)
    with pytest.raises(ValueError, match=r"lacks columns \['town'\]"):
        columns.batch(frame.drop(columns="town"))
    with pytest.raises(ValueError, match=r"'Bonn' in row 1, .* \['Oslo', 'Rome'\]"):
        columns.batch(frame.assign(town=["Oslo", "Bonn"]))
    with pytest.raises(ValueError, match="'size': holds 'big', wanted numbers"):
        columns.batch(frame.assign(size=["big", 1]))
    for kind, wanted in (
        ("count", "whole numbers"),
        ("binary", "0 and 1"),
        ("positive", "above 0"),
    ):
        with pytest.raises(ValueError, match=wanted):
            Columns.of(frame.assign(size=[-1.5, 2.0]), {"size": kind})
