"""The benchmark of objectives: which combinations it runs, what it makes of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import pyro_vae as pv
from benchmarks import objectives as bench
from benchmarks.objectives import PAIRS, VALUES, figure, label, matrix, measure, table
from pyro_vae.objectives.specs import arguments, parse, recipes


def test_every_recipe_is_run_or_said_why_not():
    asked = matrix(recipes(), ["pathwise"])
    assert {name for name, _ in asked.specs} | {*asked.lacking} == {*recipes()}
    for (name, estimator), spec in asked.specs.items():
        assert spec.partition(":")[0] == name
        assert (estimator == "-") == ("estimator" not in arguments(recipes()[name]))


def test_specs():
    asked = matrix(["elbo", "iwae"], ["pathwise", "dreg"])
    k = VALUES["num_particles"]
    assert asked.specs == {
        ("elbo", "pathwise"): "elbo:estimator=pathwise",
        ("elbo", "dreg"): "elbo:estimator=dreg",
        ("iwae", "pathwise"): f"iwae:num_particles={k},estimator=pathwise",
        ("iwae", "dreg"): f"iwae:num_particles={k},estimator=dreg",
    }
    assert asked.lacking == {}


def test_what_has_no_value(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(VALUES, "alpha")
    asked = matrix(["renyi", "elbo"], ["pathwise"])
    assert asked.lacking == {"renyi": "this benchmark has no value for alpha"}
    assert list(asked.specs) == [("elbo", "pathwise")]


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str):
    """They are sound, and the reference trains them."""
    pair = PAIRS[name]
    batch = pv.data.load(pair.data, "train", ["x"]).rows(slice(0, 50))
    model, guide = pair.build(batch, **pair.options)
    report = pv.check(model, guide, batch)
    assert report.ok, str(report)
    loss = parse(f"elbo:estimator={pair.estimators[0]}")(model, guide)(batch)
    loss.backward()
    for program in (model, guide):
        assert all(p.grad is not None and bool(p.grad.any()) for p in program.parameters())


def test_a_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = pv.data.load("digits_binary", "train", ["x"]).rows(slice(0, 60))
    monkeypatch.setattr(pv.data, "load", lambda *args: small)
    result = measure(PAIRS["bernoulli"], ["elbo", "iwae"], tmp_path, 2, 1, 200, progress=False)
    names = {r["objective"] for r in result["cells"]}
    assert names == {"elbo, pathwise", "elbo, stl", "elbo, dreg", "iwae, pathwise", "iwae, dreg"}
    assert result["reference"] == "elbo, pathwise"
    (refused,) = result["refused"]
    assert (refused["objective"], refused["seeds"]) == ("iwae, stl", [0, 1])
    log_p = [r["log_p"] for r in result["cells"]]
    assert log_p == sorted(log_p, reverse=True)
    by_name = {r["objective"]: r for r in result["cells"]}
    assert by_name["elbo, pathwise"]["log_p_gain"] == 0
    for r in result["cells"]:
        difference = r["log_p"] - by_name["elbo, pathwise"]["log_p"]
        assert r["log_p_gain"] == pytest.approx(difference)
        assert r["seeds"] == [0, 1]

    told, head, _, *rows, why, _ = table("bernoulli", result)
    assert "over elbo, pathwise" in told
    assert head.startswith("objective")
    assert [row.split("  ")[0] for row in rows] == [r["objective"] for r in result["cells"]]
    assert why == f"refused: iwae, stl: {refused['reason']}"
    axes = figure({"bernoulli": result}).axes[0]
    shown = [tick.get_text() for tick in axes.get_yticklabels()]
    assert sorted(shown) == ["elbo", "iwae"]


def test_refusals_of_one_reason_share_a_line():
    refused = [{"objective": n, "seeds": [0], "reason": "no"} for n in ("a", "b")]
    lines = table("p", {"cells": [], "refused": refused, "reference": None})
    assert lines[-2] == "refused: a; b: no"


def test_labels():
    assert label("elbo", "-") == "elbo"
    assert label("elbo", "stl") == "elbo, stl"


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.set_default_dtype(torch.float32)
    given = ["--quick", "--pairs", "discrete", "--recipes", "elbo", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["objectives", *given, "--results", str(tmp_path)])
    bench.main()
    found = json.loads((tmp_path / "objectives.json").read_text())["records"]["discrete"]
    assert [r["objective"] for r in found["cells"]] == ["elbo, score"]
    assert {r["objective"] for r in found["refused"]} == {
        *("elbo, vimco", "elbo, rws", "elbo, pathwise")
    }
    assert (tmp_path / "objectives.png").stat().st_size > 10_000
