"""Estimators for scikit-learn: its own checks, pipelines, DataFrames with columns of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import check_estimator

from pyro_vae.sklearn import VAEImputer, VAETransformer

TINY: dict[str, Any] = {
    "latent": 2,
    "hidden": (8,),
    "epochs": 1,
    "batch_size": 200,
    "objective": "elbo",
    "random_state": 0,
}


def imputer(**options: Any) -> VAEImputer:
    return VAEImputer(**{**TINY, "num_particles": 16, **options})


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator", [imputer(num_particles=4), VAETransformer(**TINY)], ids=["imputer", "transformer"]
)
def test_checks_of_scikit_learn(estimator):
    results = check_estimator(estimator, on_fail=None, on_skip=None)
    names = [r["check_name"] for r in results if r["status"] not in ("passed", "skipped")]
    assert names == []
    assert sum(r["status"] == "passed" for r in results) >= 40
    tags = get_tags(estimator)
    assert not tags.non_deterministic
    assert tags.input_tags.allow_nan


def correlated(rows: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one factor in units far apart, and the same with a third of the cells missing."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(rows, 1))
    whole = factor * [1.0, -100.0, 0.01] + 0.2 * rng.normal(size=(rows, 3)) * [1.0, 100.0, 0.01]
    whole += [5.0, 1000.0, 0.0]
    return whole, np.where(rng.random(whole.shape) < 1 / 3, np.nan, whole)


def test_missing_cells_are_predicted_from_the_others():
    """Better than the mean of the column by as much as the factor explains, observed cells as they
    came; the same again, and for a part of the rows what the whole gives."""
    whole, holes = correlated(200)
    fitted = imputer(epochs=80, batch_size=50, hidden=(16,), lr=1e-2, num_particles=64).fit(holes)
    filled = fitted.transform(holes)
    missing = np.isnan(holes)
    assert np.array_equal(filled[~missing], holes[~missing])
    error = (filled - whole) / whole.std(0)
    informed = missing & ~missing.all(1)[:, None]
    assert np.sqrt((error[informed] ** 2).mean()) < 0.45  # the column's mean: 1
    assert np.array_equal(fitted.transform(holes), filled)
    some = np.array([7, 100, 3, 150])
    np.testing.assert_allclose(fitted.transform(holes[some]), filled[some], rtol=1e-9)
    draws = np.stack(fitted.draw(holes, 40))
    assert np.array_equal(
        draws[:, ~missing], np.broadcast_to(holes[~missing], (40, (~missing).sum()))
    )
    spread = draws.std(0)[informed]
    assert float(spread.min()) > 0
    z = (whole - draws.mean(0))[informed] / spread
    assert 0.7 < np.sqrt((z**2).mean()) < 1.5  # the draws say how far off they are
    assert fitted.transform(holes.astype(np.float32)).dtype == np.float32


def frame(rows: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    group = rng.integers(3, size=rows)
    table = pd.DataFrame(
        {
            "size": group + 0.1 * rng.normal(size=rows),
            "legs": pd.array(2 * group, dtype="Int64"),
            "colour": np.array(["red", "green", "blue"], dtype=object)[group],
            "grade": pd.Categorical(
                np.array(["low", "mid", "top"])[group], ["low", "mid", "top"], ordered=True
            ),
            "alive": pd.array(group > 0, dtype="boolean"),
            "eggs": np.exp(group + 0.1 * rng.normal(size=rows)),
        },
        index=[f"r{i}" for i in range(rows)],
    )
    for place, name in enumerate(table):
        table.loc[table.index[place :: len(table.columns)], name] = pd.NA
    return table


def test_frames_keep_names_types_and_index():
    table = frame()
    fitted = imputer(kinds={"eggs": "positive", "legs": "count"}).fit(table)
    filled = fitted.transform(table)
    assert list(filled.columns) == list(table.columns)
    assert filled.index.equals(table.index)
    assert list(filled.dtypes) == list(table.dtypes)
    assert not filled.isna().any().any()
    seen = table.notna()
    assert bool(
        (filled.where(seen).astype(object).fillna(0) == table.astype(object).fillna(0)).all().all()
    )
    assert set(filled["colour"]) <= {"red", "green", "blue"}
    assert bool((filled["eggs"] > 0).all())
    assert bool((filled["legs"] >= 0).all())
    assert list(fitted.get_feature_names_out()) == list(table.columns)
    assert fitted.columns_.kinds == {
        "size": "real",
        "legs": "count",
        "colour": "category",
        "grade": "ordinal",
        "alive": "binary",
        "eggs": "positive",
    }
    part = table.iloc[[11, 2, 30]]
    pd.testing.assert_frame_equal(fitted.transform(part), filled.iloc[[11, 2, 30]])
    first, second = fitted.draw(table, 2)
    assert list(first.dtypes) == list(table.dtypes)
    assert not first.equals(second)


def test_rows_that_hold_nothing_and_bools_with_holes():
    """They are filled as rows of which nothing is known, in the types that were learned."""
    group = np.arange(40) % 2
    table = pd.DataFrame(
        {
            "town": np.array(["Ulm, Donau", "Rome"], dtype=object)[group],
            "alive": np.array([True, False], dtype=object)[group],
            "legs": group * 2,
            "size": group + 0.5,
        }
    )
    table.loc[3, "alive"] = np.nan
    fitted = imputer().fit(table)
    filled = fitted.transform(table)
    assert filled["alive"].dtype == bool
    assert filled["alive"].drop(3).tolist() == table["alive"].drop(3).tolist()
    empty = pd.DataFrame(np.nan, index=["a", "b"], columns=table.columns)
    filled = fitted.transform(empty)
    assert list(map(str, filled.dtypes[1:])) == ["bool", "int64", "float64"]
    assert filled["town"].dtype == table["town"].dtype
    assert set(filled["town"]) <= {"Ulm, Donau", "Rome"}
    assert filled.loc["a"].tolist() == filled.loc["b"].tolist()
    assert fitted.draw(empty, 1)[0].notna().all(axis=None)


def test_pipelines_and_output_containers():
    whole, holes = correlated(60)
    y = whole[:, 0]
    predicted = make_pipeline(imputer(), LinearRegression()).fit(holes, y).predict(holes)
    assert predicted.shape == y.shape
    chosen = make_pipeline(imputer(), VAETransformer(**TINY)).fit(holes)
    assert list(chosen.get_feature_names_out()) == ["vaetransformer0", "vaetransformer1"]
    named = imputer().set_output(transform="pandas").fit_transform(holes)
    assert list(named.columns) == ["x0", "x1", "x2"]
    assert not named.isna().any().any()


def test_embeddings_do_not_depend_on_the_rows_beside_them():
    table = frame()
    fitted = VAETransformer(**TINY).set_output(transform="pandas").fit(table)
    codes = fitted.transform(table)
    assert codes.shape == (60, 2)
    assert codes.index.equals(table.index)
    assert float(codes.std().min()) > 0
    pd.testing.assert_frame_equal(fitted.transform(table.iloc[[5, 1]]), codes.iloc[[5, 1]])


def test_refusals_are_one_line():
    table = frame()
    fitted = imputer().fit(table)
    other = table.copy()
    other.loc["r4", "colour"] = "pink"
    for call, words in (
        (lambda: fitted.transform(other), "column 'colour': came 'pink' in row r4, .*were learned"),
        (lambda: imputer().fit(table.assign(size=np.nan)), r"columns \['size'\] hold no value"),
        (lambda: imputer(kinds={"sise": "real"}).fit(table), "did you mean 'size'"),
        (lambda: imputer(kinds={"size": "odd"}).fit(table), "came kind 'odd', wanted one of"),
        (lambda: imputer(kinds={"colour": "ordinal"}).fit(table), "wanted their order"),
        (lambda: imputer(kinds={"colour": ["red", "green"]}).fit(table), "came 'blue' in row r"),
        (lambda: imputer().fit(table.assign(id=table.index)), "'id': came 60 classes in 60 rows"),
        (
            lambda: imputer().fit(table.assign(eggs=[*map(str, range(59)), "many"])),
            "column 'eggs': holds 'many' in row r59 among numbers",
        ),
        (lambda: imputer(loss="l3").fit(table).transform(table), "came loss 'l3', wanted one of"),
        (lambda: imputer(kinds={"size": "count"}).fit(table), "wanted whole numbers from 0 on"),
        (
            lambda: imputer(kinds={"colour": "real"}).fit(table),
            "'colour': holds 'green'|'red'|'blue'",
        ),
        (lambda: fitted.transform(table.drop(columns="legs")), "feature names"),
        (lambda: fitted.transform(table.iloc[:0]), "came 0 rows"),
        (lambda: imputer(objective="elbow").fit(table), "elbow"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
