"""The quick part of the gate: every combination on one pair, discrete latents, penalties, and every
planted error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from pyro_vae.objectives import baselines, bounds, penalties
from pyro_vae.objectives.relaxed import Gumbel
from tests.gate.answers import check
from tests.gate.cells import Cell, cell, discrete_cells, further_cells, quick_cells, uncovered
from tests.gate.closed_forms import closed_forms
from tests.gate.exact import trapezoid
from tests.gate.pairs import BIASED, BIT
from tests.gate.penalties import PenaltyCell, penalty_cells
from tests.gate.planted import Planted, Stale, edited, planted

CELLS: list[Cell | PenaltyCell] = [
    *quick_cells(),
    *further_cells(),
    *discrete_cells(),
    *penalty_cells(),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_exported_part_is_run_by_a_cell():
    assert uncovered(CELLS) == []


@pytest.mark.parametrize(
    ("module", "base"),
    [(bounds, bounds.Bound), (baselines, baselines.Baseline), (penalties, penalties.Penalty)],
    ids=["bound", "baseline", "penalty"],
)
def test_an_exported_part_without_instances_is_found(
    monkeypatch: pytest.MonkeyPatch, module: Any, base: type
):
    monkeypatch.setattr(module, "Forgotten", type("Forgotten", (base,), {}), raising=False)
    monkeypatch.setattr(module, "__all__", [*module.__all__, "Forgotten"])
    (problem,) = uncovered(CELLS)
    assert "Forgotten" in problem


def test_bounds_agree_with_closed_forms():
    assert closed_forms() == []


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell: Cell | PenaltyCell):
    assert check(cell).problems == []


@pytest.mark.parametrize("error", planted(), ids=str)
def test_planted_error_is_caught(error: Planted):
    assert error.missed() == []


def test_planted_text_that_the_library_no_longer_holds_is_an_error():
    with (
        pytest.raises(Stale, match="plant it anew"),
        edited(bounds.Elbo.reward, {"no such text": ""}),
    ):
        pass


def test_bias_by_design_is_measured_and_does_not_fail():
    (stl,) = (error for error in planted() if error.name == "STL with a multi-sample bound")
    refused = stl.cells[0]
    assert isinstance(refused, Cell)
    with stl():
        result = check(replace(refused, status=BIASED))
    assert result.problems == []
    assert result.bias > 10 * result.error


@pytest.mark.parametrize(("density", "left"), [("relaxed", 0.3), ("discrete", 0.1)])
def test_the_bias_of_a_relaxation_falls_with_its_temperature(density: str, left: float):
    """Not to 0 with relaxed densities: their KL is that of two logistics at any temperature."""
    biases = []
    for temperature in (1.0, 0.5, 0.25, 0.1, 0.05):
        cold = cell(BIT, "elbo", Gumbel(temperature, density=density), particles=1)
        cold = replace(cold, reference=replace(cold.reference, grid=trapezoid))
        declared = cold.declared()
        assert declared is not None
        biases.append(float((declared.gradient - cold.exact().gradient).norm()))
    assert biases == sorted(biases, reverse=True)
    assert 0.5 * left < biases[-1] / biases[0] < left
