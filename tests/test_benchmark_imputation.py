"""The benchmark of imputation: what it hides, and what its table says."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks import imputation


def test_half_of_the_cells_are_hidden_and_units_are_of_the_others(monkeypatch: Any):
    table = np.random.default_rng(0).normal(3.0, 5.0, (4000, 5))
    monkeypatch.setattr(imputation, "arrays", lambda name: {"banknote": table})
    whole, holes = imputation.holed("banknote", 1, None)
    seen = ~np.isnan(holes)
    assert abs(seen.mean() - 0.5) < 5 * 0.5 / seen.size**0.5
    np.testing.assert_allclose(whole[seen], holes[seen])
    np.testing.assert_allclose(np.nanmean(holes, 0), 0.0, atol=1e-12)
    np.testing.assert_allclose(np.nanstd(holes, 0), 1.0)
    assert whole.shape == (4000, 4)  # the last column is the class


def test_the_table_says_what_was_run_and_how_long():
    common = {"steps": 50, "batch_size": 8, "seconds": 1800.0}
    records = [
        {"data": "banknote", "method": method, "seed": seed, "rmse": rmse, **common}
        for method, seed, rmse in [("mean", 0, 1.0), ("vae", 0, 0.7), ("vae", 1, 0.8)]
    ]
    text = imputation.table(records)
    assert "banknote    mean              1  RMSE 1.0000, 0.50 h\n" in text
    assert "RMSE 0.7500 ± 0.0500, 1.00 h (50 steps of 8 rows)" in text
    rows = sum(len(methods) for _, methods in imputation.PARTS.values())
    assert text.count("not run") == rows - 2
