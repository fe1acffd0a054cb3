"""Objectives as text."""

from __future__ import annotations

import math

import pytest

from pyro_vae.objectives import (
    Objective,
    beta_vae,
    cyclical,
    elbo,
    free_bits,
    iwae,
    mean_field,
    piecewise,
    renyi,
)
from pyro_vae.objectives.specs import arguments, parse, recipes


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("elbo", elbo()),
        ("iwae:num_particles=50,estimator=dreg", iwae(50, "dreg")),
        ("renyi:alpha=-inf,num_particles=3", renyi(-math.inf, 3)),
        ("beta_vae:beta=4,analytic=True", beta_vae(4, analytic=True)),
        ("beta_vae: beta={'z': 2.0}, num_particles=2", beta_vae({"z": 2.0}, 2)),
        ("mean_field:num_particles=6,chunk=2", mean_field(6, chunk=2)),
        ("elbo:likelihood_weights={'y': 50}", elbo(likelihood_weights={"y": 50})),
        (
            "free_bits:nats=piecewise((0, 0), (9, 1)),per=site",
            free_bits(piecewise((0, 0), (9, 1)), "site"),
        ),
        ("beta_vae:beta=cyclical(100, ratio=0.25)", beta_vae(cyclical(100, ratio=0.25))),
    ],
)
def test_parse(spec: str, wanted: Objective):
    assert repr(parse(spec)) == repr(wanted)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("elbow", "'elbow'.*'elbo'"),
        ("iwae", "without num_particles"),
        ("iwae:particles=5", "'particles'.*num_particles"),
        ("iwae:num_particles", "'num_particles'.*argument=value"),
        ("iwae:num_particles=many", "num_particles='many'.*number"),
        ("iwae:num_particles=5,estimator=stl", "stl.*iwae"),
        ("renyi:alpha=1,num_particles=5", "alpha=1 is the ELBO"),
        ("beta_vae:beta=wave(3)", "wave.*linear"),
    ],
)
def test_parse_refuses(spec: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse(spec)


def test_every_recipe_can_be_named():
    for name, recipe in recipes().items():
        assert recipe.__name__ == name
        assert "chunk" in arguments(recipe)
