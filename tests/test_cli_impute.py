"""``pyro-vae impute``: what it writes, and what it refuses, each in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pyro_vae.cli import main
from pyro_vae.conditionals import Categorical, Ordinal
from pyro_vae.saved import load

FAST = ["--epochs", "2", "-K", "16", "--latent", "2", "--objective", "elbo", "--device", "cpu"]


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A file of 40 rows with a name, two numbers, a whole number and a word; the last row is empty."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    group = rng.integers(2, size=40)
    frame = pd.DataFrame(
        {
            "name": [f"n{i}" for i in range(40)],
            "size": group + 0.1 * rng.normal(size=40),
            "age": pd.array(20 + group, dtype="Int64"),
            "visits": pd.array(rng.poisson(1.0 + group), dtype="Int64"),
            "town": np.where(group, "Rome", "Oslo"),
        }
    ).astype({"town": object})
    for place, name in enumerate(["size", "age", "visits", "town"]):
        frame.loc[place : 30 + place : 7, name] = pd.NA
    frame.loc[39, ["size", "age", "visits", "town"]] = pd.NA
    frame.to_csv("table.csv", index=False)
    return frame


def test_fills_a_table(table, capsys):
    command = ["impute", "table.csv", "-o", "out.csv", "--drop", "name", "--kind", "visits=count"]
    assert main([*command, *FAST]) == 0
    printed = capsys.readouterr()
    cells = int(table.isna().sum().sum())
    assert printed.out.startswith(f"out.csv: {cells} cells of 40 rows filled; loss ")
    assert "note: 1 rows hold nothing (rows [39], from 0)" in printed.err
    filled = pd.read_csv("out.csv")
    assert list(filled.columns) == list(table.columns)
    assert not filled.isna().any().any()
    for name in table:
        seen = table[name].notna()
        assert (
            list(filled[name][seen]) == pytest.approx(list(table[name][seen]))
            if name == "size"
            else (list(filled[name][seen]) == list(table[name][seen]))
        )
    assert filled["age"].dtype.kind == filled["visits"].dtype.kind == "i"
    assert set(filled["town"]) == {"Oslo", "Rome"}
    again = [*command[:2], "-o", "again.csv", *command[4:], *FAST]
    assert main(again) == 0
    pd.testing.assert_frame_equal(pd.read_csv("again.csv"), filled)


def test_draws_are_tables_below_each_other(table):
    arguments = ["impute", "table.csv", "-o", "out.csv", "--drop", "name", "--draws", "3"]
    assert main([*arguments, *FAST]) == 0
    drawn = pd.read_csv("out.csv")
    assert list(drawn.columns) == ["draw", *table.columns]
    assert drawn["draw"].value_counts().to_dict() == {1: 40, 2: 40, 3: 40}
    each = [part.reset_index(drop=True) for _, part in drawn.groupby("draw")]
    assert not each[0]["size"].equals(each[1]["size"])
    seen = table["size"].notna()
    for part in each:
        np.testing.assert_allclose(part["size"][seen], table["size"][seen].astype(float))


def test_intervals_stand_beside(table):
    arguments = ["impute", "table.csv", "-o", "out.csv", "--drop", "name", "--interval"]
    assert main([*arguments, "--run", "kept", *FAST]) == 0
    filled = pd.read_csv("out.csv")
    gone = table["size"].isna()
    assert bool((filled["size_sd"][gone] > 0).all())
    assert bool((filled["size_sd"][~gone] == 0).all())
    assert bool((filled["size_low"] <= filled["size"])[gone].all())
    assert bool((filled["size"] <= filled["size_high"])[gone].all())
    assert "age_sd" in filled
    assert "town_sd" not in filled
    kept = load("kept")
    assert kept.config["data"]["columns"]["real"] == ["size", "age", "visits"]
    model: Any = kept.model
    assert type(model.likelihoods["class_town"]) is Categorical


def test_classes_in_order(table):
    """Of the command line, and one that no row has."""
    command = ["impute", "table.csv", "-o", "out.csv", "--drop", "name", "--run", "kept", *FAST]
    assert main([*command, "--kind", "town=Rome < Oslo<Bonn"]) == 0
    kept = load("kept")
    assert kept.config["data"]["classes"]["class_town"] == ["Rome", "Oslo", "Bonn"]
    model: Any = kept.model
    assert type(model.likelihoods["class_town"]) is Ordinal
    assert set(pd.read_csv("out.csv")["town"]) <= {"Rome", "Oslo", "Bonn"}


def test_text_among_numbers(table, capsys):
    ages = table["age"].astype(object).where(table.index != 5, "old")
    table.assign(size=range(40), age=ages).to_csv("odd.csv", index=False)
    assert main(["impute", "odd.csv", "-o", "out.csv", "--drop", "name", *FAST]) == 2
    assert "column 'age': holds 'old' in row 5 among numbers (1 of " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kind", "size"], "--kind: came 'size', wanted COLUMN=KIND, or COLUMN=LOWEST<"),
        (["--kind", "town=Oslo<"], "--kind: came 'town=Oslo<', wanted COLUMN=KIND"),
        (["--kind", "town=Oslo<Bonn"], "column 'town': came 'Rome' in row "),
        (["--kind", "town=ordinal"], "of kind 'ordinal', wanted their order: --kind 'town=LOWEST<"),
        (["--drop", "town"], "column 'name': came 40 classes in 40 rows"),
        (["-o", "table.csv"], "--out: came table.csv, which is the table to fill"),
        (["-o", "../{here}/table.csv"], "which is the table to fill; wanted another file"),
        (["--kind", "size=big"], "column 'size': came kind 'big'"),
        (["--kind", "sizes=real"], "did you mean 'size'?"),
        (["--kind", "size=count"], "wanted whole numbers from 0 on of kind 'count'"),
        (["--drop", "names"], "--drop: came ['names']"),
        (["--draws", "2", "--interval"], "came --draws and --interval"),
        (["-o", "out.npz"], "came suffix '.npz', wanted one of ['.csv', '.tsv', '.parquet']"),
        (["-o", "nowhere/out.csv"], "no such folder: nowhere"),
        (["--objective", "elbow"], "elbow"),
    ],
    ids=[
        "kind",
        "half an order",
        "not in the order",
        "no order",
        "names of rows",
        "itself",
        "itself by another path",
        "no kind",
        "column",
        "not of the kind",
        "drop",
        "both",
        "suffix",
        "folder",
        "objective",
    ],
)
def test_refusals_are_one_line(table, capsys, arguments, words):
    before = Path("table.csv").read_bytes()
    arguments = [text.format(here=Path.cwd().name) for text in arguments]
    command = ["impute", "table.csv", "-o", "out.csv", "--drop", "name", *FAST]
    assert main([*command, *arguments]) == 2
    assert Path("table.csv").read_bytes() == before
    error = capsys.readouterr().err
    assert words in error
    assert error.strip().splitlines()[-1].startswith("error: ")


def test_columns_that_hold_nothing_and_files_that_are_not_there(table, capsys):
    table.assign(size=np.nan).to_csv("empty.csv", index=False)
    for file, words in (
        ("empty.csv", "columns ['size'] hold no value in any of 40 rows"),
        ("gone.csv", "gone.csv: no such file"),
    ):
        assert main(["impute", file, "-o", "out.csv", *FAST]) == 2
        assert words in capsys.readouterr().err
