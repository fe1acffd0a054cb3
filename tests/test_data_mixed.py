"""Columns of several kinds: what is inferred, rows of a Batch, and the table back."""

from __future__ import annotations

import re

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


def test_objects_for_the_sake_of_holes_become_what_they_hold():
    """True and False with holes as bools, whole numbers as integers, numbers that were a category as
    numbers."""
    frame = pd.DataFrame(
        {
            "alive": np.array([True, None, False, np.nan], dtype=object),
            "legs": np.array([4, None, 2, 4], dtype=object),
            "size": pd.Categorical([1.0, 2.0, None, 5.0]),
        }
    )
    columns = Columns.of(frame, {"size": "real"})
    values = {"real": torch.tensor([[2.6, 2.5]] * 4), "binary": torch.tensor([[1.0], [0.0]] * 2)}
    filled = columns.filled(frame, values)
    assert list(map(str, filled.dtypes)) == ["bool", "int64", "float64"]
    assert filled["alive"].tolist() == [True, False, False, False]
    assert filled["legs"].tolist() == [4, 3, 2, 4]
    assert filled["size"].tolist() == [1.0, 2.0, 2.5, 5.0]


@pytest.mark.parametrize("nothing", [np.nan, None], ids=["nan", "none"])
def test_columns_that_hold_nothing_take_the_type_that_was_learned(nothing):
    frame = pd.DataFrame(
        {
            "town": np.array(["Ulm, Donau", "Rome", "Rome"], dtype=object),
            "grade": pd.Categorical(["low", "top", "low"], ["low", "top"], ordered=True),
            "legs": [2, 4, 6],
            "alive": np.array([True, None, False], dtype=object),
            "size": [0.5, np.nan, 1.5],
        }
    )
    columns = Columns.of(frame)
    empty = pd.DataFrame([dict.fromkeys(frame, nothing)], index=["r"])
    batch = columns.batch(empty)
    assert not any(bool(batch.mask(site).any()) for site in batch)
    values = {
        "class_town": torch.tensor([1]),
        "class_grade": torch.tensor([1]),
        "binary": torch.tensor([[1.0]]),
        "real": torch.tensor([[3.7, 0.25]]),
    }
    filled = columns.filled(empty, values)
    assert list(filled.loc["r"]) == ["Ulm, Donau", "top", 4, True, 0.25]
    assert filled["alive"].dtype == bool
    others = ["town", "grade", "legs", "size"]
    assert list(filled[others].dtypes) == list(frame[others].dtypes)
    part = frame.assign(grade=pd.Categorical([None, "low", None]))  # which has no "top"
    three = {site: made.expand(3, *made.shape[1:]) for site, made in values.items()}
    filled = columns.filled(part, {**three, "class_grade": torch.tensor([1, 9, 0])})
    assert filled["grade"].tolist() == ["top", "low", "low"]
    assert list(filled["grade"].cat.categories) == ["low", "top"]


def test_text_among_numbers_is_refused():
    """Where at least half of the different values are numbers, unless the kind is given."""
    ages = [str(20 + i) for i in range(30)]
    slip = pd.DataFrame({"my age": [*ages[:7], "old", *ages[8:]]})
    message = (
        "column 'my age': holds 'old' in row 7 among numbers (1 of 30 values are none); correct it, "
        "make it missing, or say the column's kind: --kind 'my age=category', "
        "kinds={'my age': 'category'}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Columns.of(slip)
    assert Columns.of(slip, {"my age": "category"}).kinds == {"my age": "category"}
    with pytest.raises(ValueError, match="holds 'old' in row 7, wanted numbers"):
        Columns.of(slip, {"my age": "real"})
    marked = pd.DataFrame({"age": [i if i % 10 else "?" for i in range(30)]}, index=range(5, 35))
    with pytest.raises(ValueError, match=r"'\?' in row 5 among numbers \(3 of 30 values"):
        Columns.of(marked)
    with pytest.raises(ValueError, match="'a' in row 1 among numbers"):
        Columns.of(pd.DataFrame({"x": ["1", "a", "1"]}))
    assert Columns.of(pd.DataFrame({"x": ["1", "a", "b"]})).kinds == {"x": "category"}


def test_classes_that_hardly_repeat_are_refused():
    """More than 20 of them, in fewer than twice as many rows, unless the kind is given."""
    names = [f"n{i}" for i in range(300)]
    message = (
        "column 'id': came 300 classes in 300 rows that have a value, wanted classes that repeat; drop "
        "it (--drop id, or from the DataFrame), make numbers of it, or say its kind: --kind "
        "id=category, kinds={'id': 'category'}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Columns.of(pd.DataFrame({"id": names}))
    assert len(Columns.of(pd.DataFrame({"id": names}), "category").classes["id"]) == 300
    assert len(Columns.of(pd.DataFrame({"id": names[:20]})).classes["id"]) == 20
    assert len(Columns.of(pd.DataFrame({"id": [*names[:21]] * 2})).classes["id"]) == 21
    holes = [*names[:21], *names[:20], *[None] * 50]
    with pytest.raises(ValueError, match="came 21 classes in 41 rows that have a value"):
        Columns.of(pd.DataFrame({"id": holes}))
    days = pd.date_range("2020-01-01", periods=30)
    with pytest.raises(ValueError, match="'day': came 30 classes in 30 rows"):
        Columns.of(pd.DataFrame({"day": days}))
    with pytest.raises(ValueError, match=r"holds Timestamp\(.*\) in row 0, wanted numbers"):
        Columns.of(pd.DataFrame({"day": days}), "real")


def test_text_in_order_needs_its_order():
    frame = pd.DataFrame({"grade": ["mid", "low", None, "high"]})
    columns = Columns.of(frame, {"grade": ["low", "mid", "high", "top"]})
    assert columns.kinds == {"grade": "ordinal"}
    assert columns.ordinal == ["class_grade"]
    assert columns.classes == {"grade": ["low", "mid", "high", "top"]}
    batch = columns.batch(frame)
    assert batch["class_grade"][[0, 1, 3]].tolist() == [1, 0, 2]
    assert batch.mask("class_grade").tolist() == [True, True, False, True]
    numbers = pd.DataFrame({"grade": pd.array([10, None, 9], dtype="Int64")})
    ordered = Columns.of(numbers, {"grade": ["11", "10", "9"]})
    assert ordered.batch(numbers)["class_grade"][[0, 2]].tolist() == [1, 2]
    assert Columns.of(numbers, {"grade": "ordinal"}).classes == {"grade": [9, 10]}
    text = pd.DataFrame({"grade": ["10", "9"]})
    assert Columns.of(text, {"grade": "ordinal"}).classes == {"grade": ["9", "10"]}
    own = pd.DataFrame({"grade": pd.Categorical(["low", "top"], ["top", "low"], ordered=True)})
    assert Columns.of(own, {"grade": "ordinal"}).classes == {"grade": ["top", "low"]}
    unordered = pd.DataFrame({"grade": frame["grade"].astype("category")})
    for table, kind, words in (
        (
            *(frame, "ordinal"),
            "column 'grade': came ['mid', 'low', 'high'] of kind 'ordinal', wanted their order: "
            "--kind 'grade=LOWEST<...<HIGHEST', kinds={'grade': [LOWEST, ..., HIGHEST]}",
        ),
        (unordered, "ordinal", "of kind 'ordinal', wanted their order"),
        (
            *(frame, ["low", "mid"]),
            "column 'grade': came 'high' in row 3, wanted one of the order that was given, "
            "['low', 'mid']; add it there, or make it missing",
        ),
        (numbers, ["low", "mid"], "came 10 in row 0, wanted one of the order"),
        (frame, ["low"], "came the order ['low'], wanted at least 2 different values"),
        (frame, ["low", "low"], "came the order ['low', 'low'], wanted at least 2"),
        (frame, {"low", "mid"}, "or the list of its values in order"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            Columns.of(table, {"grade": kind})


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
    coded = pd.DataFrame({"code": pd.array([3, 4], dtype="Int64")})
    with pytest.raises(ValueError, match=r"came 5 in row 0, .* learned, \[3, 4\]; make"):
        Columns.of(coded, "category").batch(coded + 2)
    with pytest.raises(ValueError, match="'size': holds 'big' in row 0, wanted numbers"):
        columns.batch(frame.assign(size=["big", 1]))
    for kind, wanted in (
        ("count", "whole numbers"),
        ("binary", "0 and 1"),
        ("positive", "above 0"),
    ):
        with pytest.raises(ValueError, match=wanted):
            Columns.of(frame.assign(size=[-1.5, 2.0]), {"size": kind})
