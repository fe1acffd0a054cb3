"""Tables: which columns become which sites, and errors that name the place."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_vae.data import describe, load

FRAME = pd.DataFrame(
    {
        "age": [30, 41, 52],
        "income": [1.5, np.nan, 3.5],
        "member": [True, False, True],
        "label": [2, 0, 1],
    }
)
NUMBERS = [[30.0, 1.5, 1.0, 2.0], [41.0, np.nan, 0.0, 0.0], [52.0, 3.5, 1.0, 1.0]]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def saved(path: Path) -> Path:
    """FRAME as a file of the kind that its name says."""
    if path.suffix == ".parquet":
        FRAME.to_parquet(path)
    else:
        FRAME.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet", "frame"])
def test_numeric_columns_are_one_site(tmp_path: Path, name: str) -> None:
    source: Any = FRAME if name == "frame" else saved(tmp_path / name)
    batch = load(source)
    assert batch.sites == batch.incomplete == ("x",)
    assert batch["x"].dtype == torch.float64
    mask = np.isnan(NUMBERS)
    assert (batch.mask("x").numpy() == ~mask).all()
    assert (batch["x"].numpy()[~mask] == np.array(NUMBERS)[~mask]).all()
    assert batch.record["columns"] == {"x": ["age", "income", "member", "label"]}
    assert batch.record["sites"]["x"] == {"shape": [3, 4], "dtype": "float64", "missing": 1}
    assert len(batch.record["sha256"]) == 64
    assert json.loads(json.dumps(batch.record)) == batch.record


def test_columns_and_drop() -> None:
    wanted = [[1.5, 2.0], [0.0, 0.0], [3.5, 1.0]]
    cases: list[dict[str, Any]] = [{"columns": ["income", "label"]}, {"drop": ["age", "member"]}]
    for options in cases:
        batch = load(FRAME, **options)
        assert batch.record["columns"] == {"x": ["income", "label"]}
        rows = batch["x"].where(batch.mask("x"), 0.0)
        assert rows.tolist() == wanted
    assert load(FRAME, columns="age")["x"].tolist() == [[30], [41], [52]]
    assert load(FRAME, columns=["label", "age"])["x"].tolist() == [[2, 30], [0, 41], [1, 52]]


def test_sites_as_a_mapping() -> None:
    batch = load(FRAME, sites={"x": ["age", "income"], "y": "label", "m": "member", "z": ["label"]})
    assert batch.sites == ("x", "y", "m", "z")
    assert batch["x"].shape == (3, 2)
    assert (batch["y"].dtype, batch["y"].tolist()) == (torch.int64, [2, 0, 1])
    assert (batch["m"].dtype, batch["m"].tolist()) == (torch.int64, [1, 0, 1])
    assert (batch["z"].dtype, batch["z"].tolist()) == (torch.float64, [[2], [0], [1]])
    assert batch.record["columns"]["y"] == ["label"]
    rest = load(FRAME, sites={"y": "label", "x": None})
    assert rest.record["columns"] == {"y": ["label"], "x": ["age", "income", "member"]}
    assert load(FRAME, sites={"t": "income"})["t"].shape == (3,)


def test_the_other_columns_less_those_dropped_or_as_listed() -> None:
    frame = FRAME.assign(name=["u", "v", "w"])
    sites = {"x": None, "y": "label"}
    for options in ({"drop": ["name", "member"]}, {"columns": ["age", "income"]}):
        batch = load(frame, sites=sites, **options)  # type: ignore[arg-type]
        assert batch.record["columns"] == {"x": ["age", "income"], "y": ["label"]}
        assert batch["x"][:, 0].tolist() == [30, 41, 52]
        assert batch["y"].tolist() == [2, 0, 1]
    assert load(frame, sites=sites, columns="age", drop="name")["x"].shape == (3, 1)


def test_the_cure_can_be_copied() -> None:
    frame = FRAME.assign(name=["u", "v", "w"], none=np.nan, day=pd.Timestamp("2020-01-01"))
    options: dict[str, Any] = {}
    for dropped in (["name", "day"], ["name", "day", "none"]):
        with pytest.raises(ValueError, match="leave out by") as raised:
            load(frame, **options)
        assert f"drop={dropped} (" in str(raised.value)
        options = {"drop": dropped}
    assert load(frame, **options)["x"].shape == (3, 4)


def test_text_that_is_a_site_is_a_label(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a,kind\n1,fox\n2,cat\n3,\n4,fox\n5,dog\n")
    frames: list[Any] = [path, pd.read_csv(path), pd.read_csv(path).astype({"kind": "category"})]
    for source in frames:
        batch = load(source, sites={"x": None, "y": "kind"})
        assert batch["y"].dtype == torch.int64
        assert batch.mask("y").tolist() == [True, True, False, True, True]
        assert batch["y"][batch.mask("y")].tolist() == [2, 0, 2, 1]
        assert batch.record["classes"] == {"y": ["cat", "dog", "fox"]}
        assert batch.record["columns"] == {"x": ["a"], "y": ["kind"]}
        assert json.loads(json.dumps(batch.record)) == batch.record
    whole = load(frames[1].dropna(), sites={"y": "kind"})
    other = load(frames[1].dropna().replace("fox", "hen"), sites={"y": "kind"})
    assert whole.incomplete == ()
    assert whole["y"].tolist() == other["y"].tolist()
    assert whole.record["sha256"] != other.record["sha256"]
    assert "classes" not in load(FRAME, sites={"y": "label"}).record


@pytest.mark.parametrize("count", [1000, 1001])
def test_labels_of_text_are_few(count: int) -> None:
    frame = pd.DataFrame({"a": 1.0, "id": [f"n{i:04}" for i in range(count)]})
    if count == 1000:
        batch = load(frame, sites={"y": "id"})
        assert batch["y"].tolist() == list(range(1000))
        return
    with pytest.raises(ValueError, match="'id' holds 1001 different texts, wanted 1000 at most"):
        load(frame, sites={"y": "id"})
    with pytest.raises(ValueError, match=r"drop=id\)$"):  # not advised as a label
        load(frame)


def test_columns_without_any_value_are_taken_where_they_are_named() -> None:
    frame = FRAME.assign(none=np.nan)
    batch = load(frame, sites={"x": ["age", "none"], "y": "none"})
    assert batch.mask("x").tolist() == [[True, False]] * 3
    assert not batch.mask("y").any()
    assert load(frame.iloc[1:2], columns=["age", "income"])["x"].shape == (1, 2)


def test_sites_as_a_list_of_names() -> None:
    assert load(FRAME, sites=["x"]).sites == ("x",)
    with pytest.raises(ValueError, match=r"sites= names \['y'\], the data set holds \['x'\]"):
        load(FRAME, sites=["y"])


def test_whole_numbers_with_missing_ones_stay_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "x,y\n1.5,3\n2.5,\n3.5,4\n")
    y = load(path, sites={"x": ["x"], "y": "y"})
    assert y["y"].dtype == torch.int64
    assert y.mask("y").tolist() == [True, False, True]
    assert y["y"][[0, 2]].tolist() == [3, 4]


def test_what_counts_as_missing_in_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "\ufeffa,b\n1,2\n\nNA,NaN\n ,3\n")
    assert load(path).mask("x").tolist() == [[True, True], [False, False], [False, True]]
    assert load(path).record["columns"] == {"x": ["a", "b"]}


def test_frames_of_all_kinds() -> None:
    frame = pd.DataFrame(
        {
            7: pd.array([1, None, 3], dtype="Int64"),
            "b": pd.array([True, None, False], dtype="boolean"),
            "c": np.array([1, 2.5, None], dtype=object),
            "d": pd.Categorical([1, 2, 1]),
            "e": np.array([1, 2, 3], dtype=np.float32),
        },
        index=["p", "q", "r"],
    )
    batch = load(frame)
    nan = np.nan
    wanted = np.array([[1, 1, 1, 1, 1], [nan, nan, 2.5, 2, 2], [3, 0, nan, 1, 3]])
    assert (batch.mask("x").numpy() == ~np.isnan(wanted)).all()
    assert (batch["x"].numpy() == wanted)[~np.isnan(wanted)].all()
    assert batch.record["columns"]["x"] == ["7", "b", "c", "d", "e"]
    assert describe(frame)["sha256"] == batch.record["sha256"]
    assert describe(frame.iloc[::-1])["sha256"] != batch.record["sha256"]


ERRORS = {
    "text": (
        "a,b\n1,2\n\n3,x1\n",
        {},
        r"a.csv: column 'b' holds 'x1' in line 4, wanted numbers; .* drop=\['b'\] \(.* -d drop=b\)$",
    ),
    "text after a field of two lines": (
        'a,b\n"1\n",2\n3,?\n',
        {"drop": "a"},
        "'b' holds .* line 4",
    ),
    "only text": ("a,b\nu,1\nv,2\n", {}, "column 'a' holds 'u' in line 2"),
    "dates": ("a\n2020-01-01\n", {}, "column 'a' holds '2020-01-01' in line 2"),
    "short row": ("a,b\n1,2\n3\n", {}, "line 3 has 1 fields, the header has 2"),
    "long row": ("a,b\n1,2,3\n", {}, "line 2 has 3 fields, the header has 2"),
    "semicolons": ("a;b\n1,5;2,5\n", {}, "line 2 has 3 fields, .* 1; is it separated by ';'"),
    "empty": ("", {}, "the file is empty"),
    "blank": ("\n\n", {}, "the file is empty"),
    "header": ("a,b\n", {}, "the table has a header and no rows"),
    "twice": ("a,b,a\n1,2,3\n", {}, r"columns \['a'\] are there more than once"),
    "index": (
        ",a\n0,5\n1,6\n",
        {},
        r"column 'Unnamed: 0' looks like an index .* drop=\['Unnamed: 0'\]",
    ),
    "unknown": ("age,b\n1,2\n", {"columns": ["aeg"]}, "no column 'aeg'.*did you mean 'age'"),
    "unknown drop": ("a,b\n1,2\n", {"drop": ["c"]}, r"no column 'c', only \['a', 'b'\]"),
    "nothing left": ("a,b\n1,2\n", {"drop": ["a", "b"]}, "no columns are left for site 'x'"),
    "dropped and of a site": (
        "a,b\n1,2\n",
        {"sites": {"x": None, "y": "a"}, "drop": "a"},
        r"columns \['a'\] are named by drop= and by sites= or columns=",
    ),
    "dropped and of columns": (
        "a,b\n1,2\n",
        {"columns": ["a", "b"], "drop": "a"},
        r"columns \['a'\] are named by drop= and by sites= or columns=",
    ),
    "columns of no site": (
        "a,b\n1,2\n",
        {"sites": {"x": ["a"]}, "columns": "b"},
        "wanted columns= only beside a site that is None",
    ),
    "several of text": (
        "a,b,c,d\nu,1,2,k\nv,2,2020-01-01,\n",
        {"drop": "d"},
        r"column 'a' holds 'u' in line 2, wanted numbers; columns \['c'\] are not numbers either; "
        r".* drop=\['d', 'a', 'c'\] \(on the command line -d drop=d,a,c\); text can be a label, "
        r".* sites=\{'x': None, 'y': 'a'\}$",
    ),
    "text in sites": (
        "a,b,c\nu,1,v\n",
        {"sites": {"x": None, "y": ["b", "c"]}},
        r"'a' holds 'u' .* \['c'\] are .* leave \['c'\] out of sites= .* and leave .* drop=\['a'\]",
    ),
    "text among the numbers of a site": (
        "a,b\n1,2\n2,x1\n",
        {"sites": {"x": None, "y": "b"}},
        r"'b' holds 'x1' in line 3, wanted numbers; .* leave \['b'\] out of sites= or columns=$",
    ),
    "no value": (
        "a,b,c\n1,,\n2,,NA\n",
        {},
        r"columns \['b', 'c'\] hold no value in any row; .* drop=\['b', 'c'\]",
    ),
    "infinite": ("a\n1\ninf\n", {}, "a.csv: site 'x': infinite entries .first in row 1"),
    "quote": ('a,b\n"1,2\n', {}, "a.csv"),
    "not a name": ("a\n1\n", {"columns": [3]}, "columns= came with 3, wanted names"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_in_text(tmp_path: Path, case: str) -> None:
    text, options, message = ERRORS[case]
    path = write(tmp_path / "a.csv", text)
    with pytest.raises(ValueError, match=message) as raised:
        load(path, **options)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_index_that_is_named_is_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ",a\n0,5\n1,6\n")
    assert load(path, columns=["Unnamed: 0", "a"])["x"].tolist() == [[0, 5], [1, 6]]
    assert load(path, drop="Unnamed: 0")["x"].tolist() == [[5], [6]]


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"a\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"a\.csv: not text in UTF-8"):
        load(path)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame({"a": [1, 2], "b": [1, "u"]}, index=[5, 9]), "'b' holds 'u' in row 9"),
        (pd.DataFrame({"a": pd.to_datetime(["2020-01-01"])}), "column 'a' holds Timestamp"),
        (pd.DataFrame({"a": [1j]}), "column 'a' holds 1j in row 0"),
        (pd.DataFrame({"a": [[1, 2]]}), r"column 'a' holds \[1, 2\] in row 0"),
        (pd.DataFrame({"a": []}), "a header and no rows"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), r"columns \['a'\] are there more than once"),
    ],
    ids=["text", "dates", "complex", "lists", "empty", "twice"],
)
def test_errors_in_frames(frame: pd.DataFrame, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(frame)


@pytest.mark.parametrize("cut", [0, 4, 300, -10])
def test_broken_parquet(tmp_path: Path, cut: int) -> None:
    path = saved(tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(
        ValueError, match=r"a\.parquet: not a \.parquet file, or cut short"
    ) as raised:
        load(path)
    assert "\n" not in str(raised.value)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.parquet")
    found = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError("no pyarrow")
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install pyro-vae\[parquet\]"):
        load(path)
