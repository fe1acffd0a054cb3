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
from tests import gate
from tests.gate_penalties import PenaltyCell, penalty_cells

CELLS: list[gate.Cell | PenaltyCell] = [
    *gate.quick_cells(),
    *gate.further_cells(),
    *gate.discrete_cells(),
    *penalty_cells(),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_exported_part_is_run_by_a_cell():
    assert gate.uncovered(CELLS) == []


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
    (problem,) = gate.uncovered(CELLS)
    assert "Forgotten" in problem


def test_bounds_agree_with_closed_forms():
    assert gate.closed_forms() == []


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell: gate.Cell | PenaltyCell):
    assert gate.check(cell).problems == []


@pytest.mark.parametrize("error", gate.planted(), ids=str)
def test_planted_error_is_caught(error: gate.Planted):
    assert error.missed() == []


def test_planted_text_that_the_library_no_longer_holds_is_an_error():
    with (
        pytest.raises(gate.Stale, match="plant it anew"),
        gate.edited(bounds.Elbo.reward, {"no such text": ""}),
    ):
        pass


def test_bias_by_design_is_measured_and_does_not_fail():
    (stl,) = (error for error in gate.planted() if error.name == "STL with a multi-sample bound")
    refused = stl.cells[0]
    assert isinstance(refused, gate.Cell)
    with stl():
        result = gate.check(replace(refused, status=gate.BIASED))
    assert result.problems == []
    assert result.bias > 10 * result.error


@pytest.mark.parametrize(("density", "left"), [("relaxed", 0.3), ("discrete", 0.1)])
def test_the_bias_of_a_relaxation_falls_with_its_temperature(density: str, left: float):
    """Not to 0 with relaxed densities: their KL is that of two logistics at any temperature."""
    biases = []
    for temperature in (1.0, 0.5, 0.25, 0.1, 0.05):
        cell = gate.cell(gate.BIT, "elbo", Gumbel(temperature, density=density), particles=1)
        cell = replace(cell, reference=replace(cell.reference, grid=gate._trapezoid))
        declared = cell.declared()
        assert declared is not None
        biases.append(float((declared.gradient - cell.exact().gradient).norm()))
    assert biases == sorted(biases, reverse=True)
    assert 0.5 * left < biases[-1] / biases[0] < left
