"""Hierarchical models: what they draw from what, and that their densities are those of the paper."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_vae.batch import Batch, Observed
from pyro_vae.conditionals import Bernoulli, DiagonalGaussian, Gaussian, StandardNormal
from pyro_vae.models import HierarchicalModel
from pyro_vae.nn import Concatenated, mlp
from tests.exact_pairs import SIGMAS
from tests.hierarchies import LinearHierarchy, rows


def three(skip=False, latent="z", site="x"):
    """z3 [1] -> z2 [2] -> z1 [4] -> x [5]."""
    sizes = [4, 2, 1]
    above = [sum(sizes[k:]) if skip else sizes[k] for k in range(3)]
    parts = [
        Bernoulli(mlp((above[0], 5)), (5,)),
        DiagonalGaussian(mlp((above[1], 8)), (4,)),
        Gaussian(mlp((above[2], 2)), (2,)),
    ]
    likelihood, *layers = [Concatenated(part) for part in parts]
    return HierarchicalModel([*layers, StandardNormal(1)], likelihood, skip, latent, site)


@pytest.mark.parametrize("skip", [False, True])
def test_draws_from_the_top(skip):
    model = three(skip, "code", "image")
    trace = poutine.trace(model).get_trace(Batch(size=7))
    sites = {name: list(trace.nodes[name]["value"].shape) for name in trace.stochastic_nodes}
    del sites["data"]
    assert list(sites) == ["code3", "code2", "code1", "image"]
    assert sites == {"code3": [7, 1], "code2": [7, 2], "code1": [7, 4], "image": [7, 5]}
    assert model(Batch(size=7)).shape == (7, 5)
    assert not trace.nodes["image"]["is_observed"]


@pytest.mark.parametrize("skip", [False, True])
def test_particles_stand_to_the_left_of_rows(skip):
    batch = Batch({"x": torch.randint(2, (7, 5)).double()})
    with pyro.plate("particles", 3, dim=-2):
        trace = poutine.trace(Observed(three(skip))).get_trace(batch)
    trace.compute_log_prob()
    for site in ("z1", "z2", "z3", "x"):
        assert trace.nodes[site]["log_prob"].shape == (3, 7)


@pytest.mark.parametrize("skip", [False, True])
def test_what_depends_on_what(skip):
    """A change of the topmost latent reaches the layer below it, with skip all layers and the data."""
    model, batch = three(skip), Batch(size=3)
    drawn = poutine.trace(model).get_trace(batch)
    values = {s: drawn.nodes[s]["value"] for s in ("z1", "z2", "z3", "x")}

    def densities(z3):
        given = poutine.condition(model, data={**values, "z3": z3})
        trace = poutine.trace(given).get_trace(batch)
        trace.compute_log_prob()
        return {site: trace.nodes[site]["log_prob"] for site in ("z1", "z2", "x")}

    before, after = densities(values["z3"]), densities(values["z3"] + 1)
    moved = {site for site in before if not torch.equal(before[site], after[site])}
    assert moved == ({"z1", "z2", "x"} if skip else {"z2"})


@pytest.mark.parametrize("skip", [False, True])
def test_marginal_of_a_linear_hierarchy_is_gaussian(skip):
    """log p(x) by importance sampling from the prior."""
    model, batch = LinearHierarchy(skip), Batch({"x": rows(4)})
    with torch.no_grad(), pyro.plate("particles", 200_000, dim=-2):
        trace = poutine.trace(Observed(model)).get_trace(batch)
        trace.compute_log_prob(lambda name, _: name == "x")
    weights = trace.nodes["x"]["log_prob"].exp()
    estimate, error = weights.mean(0), weights.std(0) / len(weights) ** 0.5
    assert ((estimate - model.evidence(batch["x"]).exp()).abs() < SIGMAS * error).all()
    assert (error < 0.01 * estimate).all()


def test_one_layer_is_a_model_of_one_latent():
    prior, likelihood = StandardNormal(2), Gaussian(nn.Linear(2, 3), (3,))
    model = HierarchicalModel([prior], likelihood)
    trace = poutine.trace(model).get_trace(Batch(size=4))
    fn: Any = trace.nodes["x"]["fn"]
    torch.testing.assert_close(fn.mean, likelihood.net(trace.nodes["z1"]["value"]))


def test_no_layer():
    with pytest.raises(ValueError, match="came no layers"):
        HierarchicalModel([], Gaussian(nn.Linear(2, 3), (3,)))
