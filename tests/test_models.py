"""Models: what they draw, and that their densities are those of the paper."""

from __future__ import annotations

import pyro
import pytest
import torch
from torch import nn

from pyro_vae.batch import Batch, Observed
from pyro_vae.conditionals import Gaussian, StandardNormal
from pyro_vae.models import LatentVariableModel


def linear_model(latent="z", site="x"):
    return LatentVariableModel(
        StandardNormal(2), Gaussian(nn.Linear(2, 5), (5,), scale=0.5), latent, site
    )


def test_generates_fresh_rows():
    model = linear_model()
    trace = pyro.poutine.trace(model).get_trace(Batch(size=7))
    assert trace.nodes["z"]["value"].shape == (7, 2)
    assert trace.nodes["x"]["value"].shape == (7, 5)
    assert not trace.nodes["x"]["is_observed"]
    assert model(Batch(size=7)).shape == (7, 5)


def test_site_names_are_arguments():
    trace = pyro.poutine.trace(linear_model("code", "image")).get_trace(Batch(size=7))
    assert {"code", "image"} <= set(trace.nodes)


def test_particles_stand_to_the_left_of_rows():
    model, batch = linear_model(), Batch({"x": torch.randn(7, 5)})
    with pyro.plate("particles", 3, dim=-2):
        trace = pyro.poutine.trace(Observed(model)).get_trace(batch)
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == (3, 7)
    assert trace.nodes["x"]["log_prob"].shape == (3, 7)


def test_marginal_of_a_linear_model_is_gaussian():
    """log p(x) by importance sampling from the prior against N(b, W W' + s² I)."""
    model = linear_model()
    net = model.likelihood.net
    wanted = torch.distributions.MultivariateNormal(
        net.bias, net.weight @ net.weight.T + 0.25 * torch.eye(5)
    )
    batch = Batch({"x": wanted.sample((4,))})
    with torch.no_grad(), pyro.plate("particles", 200_000, dim=-2):
        trace = pyro.poutine.trace(Observed(model)).get_trace(batch)
        trace.compute_log_prob(lambda name, _: name == "x")
    weights = trace.nodes["x"]["log_prob"].exp()
    estimate, error = weights.mean(0), weights.std(0) / len(weights) ** 0.5
    exact = wanted.log_prob(batch["x"]).exp()
    assert ((estimate - exact).abs() < 4 * error).all()


def test_model_is_data_free_and_saves_tensors():
    model = linear_model()
    assert all(isinstance(value, torch.Tensor) for value in model.state_dict().values())
    with pytest.raises(ValueError, match="event shape"):
        Observed(model)(Batch({"x": torch.randn(7, 4)}))
