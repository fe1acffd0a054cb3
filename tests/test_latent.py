"""Rates and active units against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as flows
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor, nn

from pyro_vae.evaluation.latent import LatentTable, active_units
from pyro_vae.objectives.plan import make_plan
from tests.exact_pairs import SIGMAS, exact_pair, linear_elbo
from tests.small_pairs import Guide, LinearModel, Program, data


def table(
    model: Program, guide: Program, x: Any, particles: int = 64, chunk: int = 64
) -> LatentTable:
    latents = LatentTable()
    plan = make_plan(model, guide, (x,), {})
    with torch.no_grad():
        for rows in torch.arange(len(x)).split(7):
            latents.add(model, guide, (x[rows],), plan, particles, chunk)
    return latents


def active(model: Program, guide: Program, x: Tensor, particles: int = 64) -> dict[str, list[bool]]:
    latents = table(model, guide, x, particles)
    units = {site: active_units(torch.cat(parts, 1)) for site, parts in latents.shift.items()}
    return {site: found.tolist() for site, found in units.items()}


def test_active_units_are_those_whose_mean_varies():
    mean = torch.tensor([[0.0, 0.09, 5.0], [0.0, -0.09, 5.0], [0.0, 0.3, 5.0], [0.0, -0.3, 5.0]])
    assert mean.var(0, unbiased=False).tolist() == pytest.approx([0.0, 0.04905, 0.0])
    assert active_units(mean.expand(2, 4, 3)).tolist() == [False, True, False]
    assert active_units(0.3 * mean.expand(2, 4, 3)).tolist() == [False, False, False]


def test_noise_of_the_estimated_means_is_not_activity():
    noise = 0.5 * torch.randn(2, 20_000, 3)
    signal = torch.tensor([0.0, 0.05, 0.2]) * torch.randn(20_000, 3)
    assert active_units(noise + signal).tolist() == [False, False, True]


@pytest.mark.parametrize("particles", [1, 2, 64])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_rate_per_dimension_is_the_kl(particles: int, chunk: int):
    """Where the KL is known nothing is left to chance, however many particles there are."""
    model, guide, x = LinearModel(), Guide(), data(20)
    _, kl = linear_elbo(model, guide, x)
    latents = table(model, guide, x, particles, chunk)
    torch.testing.assert_close(torch.cat(latents.rate["z"]), kl.detach())


def assert_mean(rows: Tensor, exact: Tensor) -> None:
    """The mean over copies of the rows."""
    rows = rows.reshape(-1, len(exact))
    error = rows.std(0) / math.sqrt(len(rows))
    assert bool(((rows.mean(0) - exact.detach()).abs() <= SIGMAS * error + 1e-9).all())


@pytest.mark.parametrize("chunk", [3, 1000])
def test_elbo(chunk: int):
    model, guide, x = LinearModel(), Guide(), data(5)
    rows = torch.cat(table(model, guide, x.repeat(400, 1), 10, chunk).elbo)
    assert_mean(rows, linear_elbo(model, guide, x)[0])


@pytest.mark.parametrize("kind", ["one layer", "two layers"])
def test_elbo_of_an_exact_posterior_is_the_evidence(kind: str):
    """Nothing is left of the draws, though rates in closed form would leave the likelihood's."""
    model, guide = exact_pair(kind)
    x = data(5)
    elbo = torch.cat(table(model, guide, x, particles=2).elbo)
    torch.testing.assert_close(elbo, model.evidence(x).detach())


def test_means_are_averaged_over_what_precedes_a_latent():
    """E[z2 | x] of an exact ladder, with the error of the draws of z1 alone."""
    model, guide = exact_pair("two layers")
    x, w, a = data(3), model.net.weight, model.down.weight
    cov = w @ (torch.eye(2) + a @ a.T) @ w.T + model.noise**2 * torch.eye(3)
    exact = (x - model.net.bias) @ torch.linalg.solve(cov, w @ a)
    found = torch.cat(table(model, guide, x.repeat(500, 1), 20).shift["z2"], 1).mean(0)
    assert_mean(found, exact[:, 0])


class PartlyCollapsed(nn.Module):
    """Two of three latents follow the data, by the first two entries of x."""

    def __init__(self, flow: bool = False) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> None:
        shift = torch.tensor([0.5, 0.5, 0.0]) * x
        scale = torch.tensor([0.1, 1.0, 1.0])
        fn: Any = dist.Normal(shift, scale).to_event(1)
        if self.flow:
            fn = dist.TransformedDistribution(fn, [flows.Permute(torch.tensor([2, 0, 1]))])
        with pyro.plate("data", len(x)):
            pyro.sample("z", fn)


@pytest.mark.parametrize("flow", [False, True], ids=["mean known", "mean estimated"])
def test_a_collapsed_latent_is_not_active(flow: bool):
    """64 particles from N(0, 1) have a mean whose variance is above the threshold."""
    found = active(LinearModel(3), PartlyCollapsed(flow), data(400))["z"]
    assert found == ([False, True, True] if flow else [True, True, False])


class Ladder(nn.Module):
    """p(z1 | z2) is N(z2, 1), entry by entry."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1, 1.0).to_event(1), obs=x[:, :2])


class LadderGuide(nn.Module):
    """Says of the first entry of z1 what the model says anyway, of the second more."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x[:, :2], 0.5).to_event(1))
            more = torch.stack([torch.zeros(len(x)), 0.3 * x[:, 1]], -1)
            pyro.sample("z1", dist.Normal(z2 + more, 1.0).to_event(1))


def test_a_layer_that_repeats_its_parents_is_not_active():
    """Its mean varies with x as theirs does, and its KL is 0."""
    x = data(400)
    assert active(Ladder(), LadderGuide(), x) == {"z2": [True, True], "z1": [False, True]}
    rate = torch.cat(table(Ladder(), LadderGuide(), x).rate["z1"])
    torch.testing.assert_close(rate, torch.stack([torch.zeros(400), 0.045 * x[:, 1] ** 2], -1))


@pytest.mark.parametrize("unit", [1.0, 0.01])
def test_activity_has_no_unit(unit: float):
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), unit).to_event(1))
            pyro.sample("x", dist.Normal(z / unit, 1.0).to_event(1), obs=x[:, :2])

    def guide(x: Tensor) -> None:
        loc = torch.stack([0.3 * x[:, 0], torch.zeros(len(x))], -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(unit * loc, 0.5 * unit).to_event(1))

    assert active(model, guide, data(400))["z"] == [True, False]


class CoinModel(nn.Module):
    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            loc = y.sum(-1, True) * torch.ones(x.shape[-1])
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


class CoinGuide(nn.Module):
    def forward(self, x: Tensor) -> None:
        logits = torch.stack([3 * x[:, 0], torch.zeros(len(x))], -1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1))


def test_discrete_latents():
    model, guide, x = CoinModel(), CoinGuide(), data(300)
    assert active(model, guide, x)["y"] == [True, False]
    q = torch.sigmoid(3 * x[:, 0])
    kl = math.log(2) + q * q.log() + (1 - q) * (1 - q).log()
    rate = torch.cat(table(model, guide, x).rate["y"])
    torch.testing.assert_close(rate, torch.stack([kl, torch.zeros_like(kl)], -1))


class ScaleModel(nn.Module):
    """A latent on the positive half line."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(s, 1.0), obs=x)


def test_auxiliary_sites_of_an_autoguide_are_no_latents():
    model, x = ScaleModel(), data(6)[:, 0]
    guide = AutoNormal(model)
    guide(x)
    latents = LatentTable()
    latents.add(model, guide, (x,), make_plan(model, guide, (x,), {}), 1000, 1000)
    assert list(latents.shift) == ["s"]


def autoguide_terms(particles: int = 100_000) -> tuple[LatentTable, Tensor, Tensor]:
    """What the table says, ELBO and KL."""
    model, x = ScaleModel(), data(6)[:, 0]
    guide = AutoNormal(model, init_scale=0.3, init_loc_fn=init_to_value(values={"s": 0.2 + x**2}))
    guide(x)
    latents = LatentTable()
    with torch.no_grad():
        plan = make_plan(model, guide, (x,), {})
        latents.add(model, guide, (x,), plan, particles, particles)
    loc, scale = guide.locs.s.detach(), guide.scales.s.detach()
    kl = 0.5 * (scale**2 + loc**2 - 1) - scale.log()
    mean, square = (loc + scale**2 / 2).exp(), (2 * loc + 2 * scale**2).exp()
    fit = -0.5 * (x**2 - 2 * x * mean + square) - 0.5 * math.log(2 * math.pi)
    return latents, fit - kl, kl


def test_elbo_of_an_autoguide():
    """A transformed draw counts with its Jacobian."""
    latents, elbo, _ = autoguide_terms()
    torch.testing.assert_close(latents.elbo[0], elbo, atol=0.03, rtol=0)


def test_rates_of_an_autoguide():
    latents, _, kl = autoguide_terms()
    rate = latents.rate["s"][0] + latents.rate["s_unconstrained"][0]
    torch.testing.assert_close(rate, kl, atol=0.03, rtol=0)
