"""The benchmark of rates: its autoregressive decoder, its monotone check, what holds a rate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import pyro_vae as pv
from benchmarks import cells
from benchmarks import rate_distortion as bench
from pyro_vae.evaluation import Evaluation
from pyro_vae.training.compare import Comparison


def bits(rows: int, pixels: int, seed: int = 0) -> pv.Batch:
    generator = torch.Generator().manual_seed(seed)
    return pv.Batch({"x": (torch.rand(rows, pixels, generator=generator) < 0.4).double()})


def test_pixels_follow_from_z_and_the_pixels_before():
    model = bench.Autoregressive(5, 2, 12)
    x, z = torch.rand(5, requires_grad=True), torch.randn(2)
    rows = torch.autograd.functional.jacobian(lambda x: model.logits(x, z), x)
    assert isinstance(rows, torch.Tensor)
    assert torch.equal(rows.triu(), torch.zeros(5, 5))
    assert (rows.tril(-1)[1:].abs().sum(1) > 0).all()
    through = torch.autograd.functional.jacobian(lambda z: model.logits(x.detach(), z), z)
    assert isinstance(through, torch.Tensor)
    assert (through.abs().sum(1) > 0).all()


def test_its_probabilities_add_up_to_one():
    model = bench.Autoregressive(4, 2, 8)
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    logits = model.logits(every, torch.randn(2).expand(16, 2))
    log_p = torch.distributions.Bernoulli(logits=logits).log_prob(every).sum(1)
    assert float(log_p.exp().sum().detach()) == pytest.approx(1.0)


def test_it_trains_and_is_judged():
    """And its particles have draws of their own."""
    batch = bits(40, 6)
    model, guide = bench.autoregressive(batch, 2, (8,))
    pv.fit(model, guide, batch, epochs=1, progress=False)
    result = pv.evaluate(model, guide, batch, 20)
    assert result.log_p.shape == (40,)
    assert float((result.log_p - result.log_p_tenth).abs().min()) > 0


def test_objectives_are_made_anew():
    made = {name: spec() for name, spec in bench.floors((2.0, 5.0)).items() if callable(spec)}
    assert list(made) == ["2", "5"]
    assert "freebits(5.0, site" in repr(made["5"])
    assert bench.sweep((0.5, 2.0)) == {"0.5": "beta_vae:beta=0.5", "2": "beta_vae:beta=2.0"}


# ---------------------------------------------------------------------------------------------
# Cells as [seeds, rows]


def evaluation(elbo: torch.Tensor, rate: torch.Tensor) -> Evaluation:
    zero = torch.zeros(len(elbo))
    return Evaluation(
        *(elbo + 1, elbo + 0.5, elbo, zero, zero),
        rate={"z": rate.mean()[None]},
        active={"z": torch.tensor([True])},
        num_particles=100,
        proposals=("not widened",),
        seed=0,
        rate_rows=rate,
    )


def by_hand() -> Comparison:
    """Rows and seeds that differ much from each other, and little between objectives."""
    base, seeds = 10 * torch.randn(400), 3 * torch.randn(4)
    found = {}
    for name, level in (("1", 8.0), ("2", 6.0), ("4", 5.0)):
        for seed, shift in enumerate(seeds):
            elbo = base + shift + 0.1 * torch.randn(400)
            found[name, seed] = evaluation(elbo, level + base + shift + 0.1 * torch.randn(400))
    return Comparison(found)


def test_quantities():
    comparison = by_hand()
    rate, elbo = (cells.quantity(comparison, "2", which) for which in ("rate", "elbo"))
    assert rate.shape == (4, 400)
    distortion = cells.quantity(comparison, "2", "distortion")
    torch.testing.assert_close(distortion, -(elbo + rate))
    torch.testing.assert_close(cells.quantity(comparison, "2", "log_p", [3])[0], elbo[3] + 1)


def test_the_error_counts_rows_and_seeds():
    """It is how far the means of repetitions lie apart."""
    found = []
    for _ in range(300):
        drawn = torch.randn(1, 50) + 0.5 * torch.randn(5, 1) + 0.1 * torch.randn(5, 50)
        found.append(cells.mean_and_error(drawn))
    means, errors = torch.tensor(found).T
    assert float(errors.square().mean().sqrt()) == pytest.approx(float(means.std()), rel=0.15)
    one, error = cells.mean_and_error(torch.tensor([[1.0, 3.0]]))
    assert one == 2.0
    assert error == pytest.approx(1.0)


def test_changes_are_paired():
    comparison = by_hand()
    (first, error), (second, _) = bench.steps(comparison, "rate")
    assert first == pytest.approx(-2.0, abs=0.05)
    assert second == pytest.approx(-1.0, abs=0.05)
    assert error < 0.02
    assert bench.record(comparison, "1")["rate_se"] > 0.5  # not paired


def test_gain_over_common_seeds():
    comparison = by_hand()
    del comparison.cells["2", 0], comparison.cells["4", 1]
    change, _ = cells.gain(comparison, "4", "2", "rate")
    assert change == pytest.approx(-1.0, abs=0.05)
    only = Comparison(
        {key: e for key, e in comparison.cells.items() if key in [("1", 0), ("2", 1)]}
    )
    assert math.isnan(cells.gain(only, "1", "2", "rate")[0])


MONOTONE: dict[str, tuple[Any, str]] = {
    "falls": ([(-2.0, 0.5), (-1.0, 0.1)], "falls at every step, the least by 4.0 standard errors"),
    "once up": ([(-2.0, 0.5), (1.0, 0.5)], "falls at 1 of 2 steps, the least by -2.0 standard"),
}


@pytest.mark.parametrize("case", MONOTONE)
def test_monotone(case: str):
    changes, told = MONOTONE[case]
    assert bench.monotone(changes, -1).startswith(told)


def test_table_and_figures():
    comparison = by_hand()
    points = {name: bench.record(comparison, name) for name in comparison.objectives}
    head, _, first, *_ = bench.table("beta", points)
    assert head.split()[0] == "beta"
    assert f"{points['1']['rate']:.2f} ± {points['1']['rate_se']:.2f}" in first
    assert first.endswith("1 1 1 1")
    line = bench.curve(points).axes[0].get_lines()[-1]
    assert np.asarray(line.get_xdata()).tolist() == [r["rate"] for r in points.values()]
    axes = bench.held({"plain": points}).axes[0]
    assert any(
        np.asarray(each.get_ydata()).tolist() == np.asarray(line.get_xdata()).tolist()
        for each in axes.get_lines()
    )
