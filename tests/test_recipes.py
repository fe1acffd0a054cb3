"""Recipes: each paper is a choice of parts, by function or by text."""

from __future__ import annotations

import math

import pyro
import pytest
import torch

from pyro_vae.objectives import (
    MMD,
    Beta,
    MutualInformation,
    Objective,
    Penalty,
    Score,
    TotalCorrelation,
    beta_vae,
    elbo,
    iwae,
    linear,
    mean_field,
    renyi,
)
from pyro_vae.objectives.specs import parse
from tests.small_pairs import BottomUp, Guide, LadderModel, LinearModel, data, value_and_gradient

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


@pytest.mark.parametrize(
    ("spec", "rate", "penalties"),
    [
        ("wae_mmd:site=z1", 0.0, (MMD(1000.0, "imq", site="z1"),)),
        ("info_vae:alpha=0.25,site=z1", 0.75, (MMD(1000.0, site="z1"),)),
        (
            "beta_tcvae:beta=6.0,alpha=2.0,site=z1",
            1.0,
            (
                TotalCorrelation(5.0, "weighted", site="z1"),
                MutualInformation(1.0, "weighted", site="z1"),
            ),
        ),
    ],
)
def test_one_latent_of_several_is_named(spec: str, rate: float, penalties: tuple[Penalty, ...]):
    """Its rate is weighed, those of the others stay."""
    meant = Objective(rate=Beta({"z1": rate}), penalties=penalties)
    model, guide = LadderModel(), BottomUp()
    pair = [value_and_gradient(each, model, guide, data()) for each in (parse(spec), meant)]
    torch.testing.assert_close(*pair)
    with pytest.raises(ValueError, match=r"came no site, wanted one of .*'z1'"):
        parse(spec.replace("site=z1", "num_particles=1"))(model, guide)(data())


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
