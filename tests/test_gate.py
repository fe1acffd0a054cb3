"""The quick part of the gate: every combination on one pair, and every planted error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from pyro_vae.objectives import bounds
from tests import gate


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_exported_part_is_run_by_a_cell():
    assert gate.uncovered(gate.quick_cells()) == []


def test_an_exported_part_without_instances_is_found(monkeypatch):
    class Forgotten(bounds.Bound):
        pass

    monkeypatch.setattr(bounds, "Forgotten", Forgotten, raising=False)
    monkeypatch.setattr(bounds, "__all__", [*bounds.__all__, "Forgotten"])
    (problem,) = gate.uncovered(gate.quick_cells())
    assert "Forgotten" in problem


def test_bounds_agree_with_closed_forms():
    assert gate.closed_forms() == []


@pytest.mark.parametrize("cell", [*gate.quick_cells(), *gate.further_cells()], ids=str)
def test_cell(cell: gate.Cell):
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
    with stl():
        result = gate.check(replace(stl.cells[0], status=gate.BIASED))
    assert result.problems == []
    assert result.bias > 10 * result.error
