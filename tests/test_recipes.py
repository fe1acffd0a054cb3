"""Recipes: each paper is a choice of parts, by function or by text."""

from __future__ import annotations

import math

import pyro
import pytest
import torch

from pyro_vae.objectives import (
    Objective,
    Score,
    beta_vae,
    elbo,
    iwae,
    linear,
    mean_field,
    renyi,
)
from tests.small_pairs import Guide, LinearModel, data, value_and_gradient

PARTS = {
    "elbo": (elbo(), "bound=elbo, estimator=pathwise, rate=montecarlo, num_particles=1"),
    "elbo stl": (elbo(8, "stl"), "bound=elbo, estimator=stl, rate=montecarlo, num_particles=8"),
    "mean_field": (mean_field(2), "bound=elbo, estimator=pathwise, rate=analytic, num_particles=2"),
    "iwae": (iwae(5), "bound=iwae, estimator=pathwise, rate=montecarlo, num_particles=5"),
    "iwae dreg": (
        iwae(num_particles=5, estimator="dreg", chunk=2),
        "bound=iwae, estimator=dreg, rate=montecarlo, chunk=2, num_particles=5",
    ),
    "renyi": (
        renyi(0.5, 5, Score()),
        "bound=renyi(0.5), estimator=score, rate=montecarlo, num_particles=5",
    ),
    "vr_max": (
        renyi(-math.inf, num_particles=3),
        "bound=vr_max, estimator=pathwise, rate=montecarlo, num_particles=3",
    ),
    "beta_vae": (
        beta_vae(4.0),
        "bound=elbo, estimator=pathwise, rate=beta(4.0, montecarlo), num_particles=1",
    ),
    "warm-up": (
        beta_vae(linear(100), analytic=True),
        "bound=elbo, estimator=pathwise, rate=beta(linear(100, 0, 1), analytic), num_particles=1",
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_recipe_is_its_parts(name: str):
    objective, parts = PARTS[name]
    assert repr(objective) == f"Objective({parts})"


def test_bounds_are_in_their_order():
    """At one set of draws: mean of logs <= Renyi .5 <= IWAE <= Renyi -1 <= max."""
    model, guide, x = LinearModel(), Guide(), data()
    values = []
    for objective in (elbo(8), *(renyi(a, 8) for a in (0.5, 0.0, -1.0, -math.inf))):
        pyro.set_rng_seed(1)
        values.append(-objective.loss(model, guide, x))
    assert values == sorted(values)
    assert len(set(values)) == 5


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (iwae(4), renyi(0.0, 4)),
        (beta_vae(1.0, 4), elbo(4)),
        (beta_vae(1.0, 4, analytic=True), mean_field(4)),
        (iwae(1), elbo(1)),
        (elbo(4, "dreg"), elbo(4, "stl")),
    ],
    ids=repr,
)
def test_recipes_that_are_the_same(one: Objective, other: Objective):
    model, guide = LinearModel(), Guide()
    results = [value_and_gradient(objective, model, guide, data()) for objective in (one, other)]
    torch.testing.assert_close(*results)


def test_iwae_comes_to_the_evidence():
    model, guide, x = LinearModel(), Guide(), data()
    exact = -float(model.evidence(x).sum().detach())
    losses = [
        sum(iwae(k).loss(model, guide, x) for _ in range(20)) / 20 for k in (1, 10, 100, 5000)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(exact, abs=0.2)


def test_an_unknown_part_is_refused():
    with pytest.raises(TypeError, match="colour"):
        elbo(colour="red")
