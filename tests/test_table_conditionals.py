"""Conditionals for columns of tables: densities against scipy, starts, what they refuse."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from pyro import poutine
from torch import nn

from pyro_vae.batch import Batch, Observed
from pyro_vae.conditionals import LogNormal, Ordinal, Poisson
from pyro_vae.conditionals.gaussian import StandardNormal
from pyro_vae.models.latent import LatentVariableModel
from pyro_vae.nn import dense
from pyro_vae.objectives.tracing import core

EVENT = (3,)


def network(shape):
    return dense((2,), shape, (8,), nn.Tanh)


def ordinal_logpmf(module: Any, fn: Any, x: np.ndarray, z: torch.Tensor) -> Any:
    """Differences of scipy's logistic cdf."""
    h = module.net(z).detach().numpy()[..., None]
    cuts = module.thresholds.detach().numpy()
    cdf = scipy.stats.logistic.cdf(cuts - h)
    one, zero = np.ones_like(cdf[..., :1]), np.zeros_like(cdf[..., :1])
    cdf = np.concatenate([zero, cdf, one], -1)
    x = np.broadcast_to(x.astype(int), h.shape[:-1])[..., None]
    return np.log(np.take_along_axis(np.diff(cdf, axis=-1), x, -1)[..., 0])


# name -> (builder, data, scipy's log density given the distribution)
KINDS: dict[str, tuple[Any, Any, Any]] = {
    "LogNormal": (
        LogNormal.build,
        lambda n: (1 + torch.randn(n, *EVENT)).exp(),
        lambda m, fn, x, z: scipy.stats.lognorm.logpdf(
            x, fn.scale.numpy(), scale=np.exp(fn.loc.numpy())
        ),
    ),
    "Poisson": (
        Poisson.build,
        lambda n: torch.poisson(torch.tensor([0.2, 3.0, 400.0]).expand(n, 3)),
        lambda m, fn, x, z: scipy.stats.poisson.logpmf(x, fn.rate),
    ),
    "Ordinal": (
        partial(Ordinal.build, classes=4),
        lambda n: (
            torch.multinomial(torch.tensor([0.5, 0.2, 0.2, 0.1]), n * 3, True)
            .reshape(n, 3)
            .to(torch.float64)
        ),
        ordinal_logpmf,
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_densities_are_scipys_with_any_leading_dimensions(name):
    build, draw, reference = KINDS[name]
    x = draw(50)
    module = build(network, EVENT, x)
    z = torch.randn(5, 50, 2)
    fn = module(z)
    assert fn.event_shape == EVENT
    assert fn.batch_shape == (5, 50)
    with torch.no_grad():
        wanted = reference(module, core(fn), x.numpy(), z)
        torch.testing.assert_close(
            fn.base_dist.log_prob(x), torch.as_tensor(wanted), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("name", KINDS)
def test_missing_entries_are_left_out_one_by_one(name):
    build, draw, _ = KINDS[name]
    x = draw(20)
    model = LatentVariableModel(StandardNormal(2), build(network, EVENT, x))
    seen = torch.rand(20, 3) < 0.6
    z = torch.zeros(20, 2)
    batch = Batch({"x": x.masked_fill(~seen, torch.nan)})
    traced = poutine.trace(poutine.condition(Observed(model), {"z": z})).get_trace(batch)
    traced.compute_log_prob()
    with torch.no_grad():
        each = model.likelihood(z).base_dist.log_prob(x)
        torch.testing.assert_close(traced.nodes["x"]["log_prob"], (each * seen).sum(-1))


@pytest.mark.parametrize("name", KINDS)
def test_they_start_at_the_marginal_of_the_data(name):
    build, draw, _ = KINDS[name]
    x = draw(4000)
    x[::3, 1] = torch.nan
    module = build(lambda shape: _Zero(shape), EVENT, x)
    fn = core(module(torch.zeros(1, 2)))
    if name == "Ordinal":
        for column in range(3):
            seen = x[~x[:, column].isnan(), column]
            share = torch.bincount(seen.long(), minlength=4) / len(seen)
            torch.testing.assert_close(fn.probs[0, column].detach(), share, atol=1e-6, rtol=1e-6)
    else:
        value = x.log() if name == "LogNormal" else x
        mean = fn.loc if name == "LogNormal" else fn.rate
        torch.testing.assert_close(mean[0].detach(), value.nanmean(0), rtol=1e-5, atol=1e-5)
    if name == "LogNormal":
        sd = (value - value.nanmean(0)).square().nanmean(0).sqrt()
        torch.testing.assert_close(module.scale.detach(), sd)


class _Zero(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, z):
        return torch.zeros(*z.shape[:-1], *self.shape)


def test_ordinal_stays_finite_far_out_and_in_order():
    module = Ordinal(nn.Identity(), (1,), 5)
    far = torch.tensor([[-80.0], [80.0]], requires_grad=True)
    log_p = core(module(far)).logits
    assert bool(log_p.isfinite().all())
    assert log_p.argmax(-1).flatten().tolist() == [0, 4]
    (gradient,) = torch.autograd.grad(log_p[:, 0, 2].sum(), far)
    torch.testing.assert_close(gradient, torch.tensor([[1.0], [-1.0]]))
    assert bool((module.thresholds.diff(dim=-1) > 0).all())


def test_refusals():
    with pytest.raises(ValueError, match="classes= came 1"):
        Ordinal(nn.Identity(), (), 1)
    with pytest.raises(ValueError, match="wanted classes="):
        Ordinal.build(network, EVENT)
    with pytest.raises(ValueError, match="scale= came 0"):
        LogNormal(nn.Identity(), (), 0.0)
    assert LogNormal.takes(torch.tensor([1.0, torch.nan]))
    assert not LogNormal.takes(torch.tensor([0.0]))
    assert not Poisson.takes(torch.tensor([0.5]))
