"""A model of what is missing, against quadrature over the missing entries."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.conditionals import Bernoulli, DiagonalGaussian, Gaussian, StandardNormal
from pyro_vae.evaluation.imputation import impute
from pyro_vae.guides import JointGuide
from pyro_vae.models import LatentVariableModel, SelectionModel
from pyro_vae.nn import Entrywise, WithMask
from pyro_vae.objectives import iwae

NAN = math.nan
ROWS = [[0.3, NAN], [NAN, NAN], [0.5, -1.0], [NAN, 1.4]]
MECHANISMS = {
    "self-masking": lambda: Entrywise((2,)),
    "sign known": lambda: Entrywise((2,), -1),
    "all entries": lambda: nn.Linear(2, 2),
}


def linear_gaussian(mechanism: nn.Module) -> tuple[Any, JointGuide, Batch]:
    """x = b + W z + s e under a mask model; every parameter is away from special values."""
    decoder, encoder = nn.Linear(1, 2), nn.Linear(4, 2)
    likelihood = Gaussian(decoder, (2,), scale=torch.tensor([0.6, 0.9]))
    model = SelectionModel(StandardNormal(1), likelihood, Bernoulli(mechanism, (2,)))
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor([[1.1], [-0.8]]))
        for parameter in mechanism.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        encoder.bias[1] = 1.0  # wide: weights with light tails
    posterior = DiagonalGaussian(encoder, (1,))
    guide = JointGuide({"x": WithMask(nn.Identity(), (2,))}, posterior, {"x": (2,)})
    return model, guide, Batch({"x": torch.tensor(ROWS)}).with_mask()


def grid(dimensions: int, count: int = 40) -> tuple[Tensor, Tensor]:
    """Nodes ``[n, d]`` and log weights ``[n]`` under N(0, I)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    points = list(itertools.product(nodes, repeat=dimensions))
    mass = [math.prod(w) for w in itertools.product(weights, repeat=dimensions)]
    log_mass = torch.tensor(mass).log() - dimensions * 0.5 * math.log(2 * math.pi)
    return torch.tensor(points).reshape(len(points), dimensions), log_mass


def log_evidence(model: Any, row: list[float]) -> tuple[Tensor, Tensor]:
    """log p(x_obs, s), z integrated out by hand and x_mis by quadrature, and E[x | x_obs, s]."""
    x, net = torch.tensor(row), model.likelihood.net
    seen = ~x.isnan()
    loc, factor = net.bias, torch.diag(model.likelihood.scale**2) + net.weight @ net.weight.T
    log_p = torch.zeros(())
    known = factor[seen][:, seen]
    off = (x - loc)[seen]
    if bool(seen.any()):
        normal = torch.distributions.MultivariateNormal(loc[seen], known)
        log_p = normal.log_prob(x[seen])
    gain = factor[~seen][:, seen] @ torch.linalg.inv(known)
    nodes, log_mass = grid(int((~seen).sum()))
    whole = x.expand(len(nodes), 2).clone()
    if not bool(seen.all()):
        spread = torch.linalg.cholesky(factor[~seen][:, ~seen] - gain @ factor[seen][:, ~seen])
        whole[:, ~seen] = loc[~seen] + gain @ off + nodes @ spread.T
    log_s = model.mechanism(whole).log_prob(seen.double().expand(whole.shape))
    terms = log_mass + log_s
    return log_p + terms.logsumexp(0), terms.softmax(0) @ whole


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_evidence_of_what_is_seen_and_of_its_mask_is_exact(mechanism):
    """exp of the importance weighted bound is unbiased for p(x_obs, s)."""
    model, guide, batch = linear_gaussian(MECHANISMS[mechanism]())
    exact = torch.stack([log_evidence(model, row)[0] for row in ROWS]).detach()
    many = batch.rows(torch.arange(4).repeat(1000))
    with torch.no_grad():
        ratio = (iwae(50).rows(model, guide, many).reshape(1000, 4) - exact).exp()
    error = ratio.std(0) / math.sqrt(1000)
    assert (error < 0.02).all()
    assert ((ratio.mean(0) - 1).abs() < 5 * error).all()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_gradient_agrees_with_quadrature(mechanism):
    """That of the bound with many particles, whose bias is far below the errors."""
    model, guide, batch = linear_gaussian(MECHANISMS[mechanism]())
    parameters = dict(model.named_parameters())
    exact = -torch.stack([log_evidence(model, row)[0] for row in ROWS]).sum()
    wanted = torch.autograd.grad(exact, list(parameters.values()))
    came = []
    for _ in range(20):
        loss = iwae(5000)(model, guide)(batch)
        came.append(torch.autograd.grad(loss, list(parameters.values())))
    for name, truth, found in zip(parameters, wanted, zip(*came, strict=True), strict=True):
        sample = torch.stack(found)
        error = sample.std(0) / math.sqrt(20)
        assert (error < 0.03).all(), name
        assert ((sample.mean(0) - truth).abs() < 5 * error + 2e-3).all(), name
    assert any(gradient.abs().max() > 0.1 for gradient in wanted)


def test_filled_in_values_are_those_of_quadrature():
    """E[x_mis | x_obs, s]: what is hidden because it is large is filled in larger than given x_obs."""
    model, guide, batch = linear_gaussian(Entrywise((2,), -1))
    wanted = torch.stack([log_evidence(model, row)[1] for row in ROWS]).detach()
    came = impute(model, guide, batch, 4000)
    error = came.sd["x"] / came.ess.sqrt()[:, None]
    assert ((came.values["x"] - wanted).abs() <= 5 * error + 1e-6).all()
    at_random = impute(model, guide, batch.without("s"), 4000)
    hidden = ~batch.mask("x")
    assert (came.values["x"] > at_random.values["x"])[hidden].all()


def test_without_a_mask_it_is_missing_at_random():
    model, guide, batch = linear_gaussian(Entrywise((2,)))
    plain = LatentVariableModel(model.prior, model.likelihood)
    bounds = []
    for each in (model, plain):
        pyro.set_rng_seed(1)
        bounds.append(iwae(5).rows(each, guide, batch.without("s")))
    torch.testing.assert_close(*bounds)


def test_it_generates_the_mask_with_the_data():
    model, _, _ = linear_gaussian(Entrywise((2,), -1))
    with torch.no_grad():
        model.mechanism.net.raw.fill_(20.0)  # a threshold
        model.mechanism.net.threshold.fill_(0.5)
    nodes: Any = pyro.poutine.trace(model).get_trace(Batch(size=500)).nodes
    x, s = nodes["x"]["value"], nodes["s"]["value"]
    clear = (x - 0.5).abs() > 1.0
    assert torch.equal(s.bool()[clear], (x < 0.5)[clear])
    assert nodes["_RETURN"]["value"] is x


def test_names_are_arguments():
    model, _, _ = linear_gaussian(Entrywise((2,)))
    parts = (model.prior, model.likelihood, model.mechanism)
    named = SelectionModel(*parts, latent="code", site="table", mask="seen")
    trace = pyro.poutine.trace(named).get_trace(Batch(size=3))
    assert {"code", "table", "seen"} <= set(trace.nodes)
