"""Relaxed discrete draws: their distributions, their densities, and how far their gradients are off."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.batch import Batch
from pyro_vae.objectives.bounds import Miwae, Split
from pyro_vae.objectives.enumeration import Enumerate
from pyro_vae.objectives.objective import Objective
from pyro_vae.objectives.particles import Particles, run
from pyro_vae.objectives.plan import make_plan
from pyro_vae.objectives.rates import Analytic, FreeBits
from pyro_vae.objectives.recipes import elbo, iwae, mean_field
from pyro_vae.objectives.relaxed import Gumbel, StraightThrough
from pyro_vae.objectives.schedules import exponential
from pyro_vae.objectives.tracing import core
from tests.small_pairs import assert_same, data, parameters, sigmas, value_and_gradient

X, STEP = 3, torch.zeros((), dtype=torch.long)


def beside(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a.expand(*b.shape[:-1], a.shape[-1]), b], -1)


class Model(nn.Module):
    """Two coins a and, given them, a one-hot b of 3 classes; x depends on both, not linearly."""

    def __init__(self) -> None:
        super().__init__()
        self.prior, self.up = nn.Parameter(torch.randn(2)), nn.Linear(2, 3)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, X))

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            a = pyro.sample("a", dist.Bernoulli(logits=self.prior).to_event(1))
            b = pyro.sample("b", dist.OneHotCategorical(logits=self.up(a)))
            pyro.sample("x", dist.Normal(self.net(beside(a, b)), 0.7).to_event(1))


class Guide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(X, 2), nn.Linear(2 + X, 3)

    def forward(self, batch: Batch) -> None:
        x = batch["x"]
        with pyro.plate("data", batch.size, dim=-1):
            a = pyro.sample("a", dist.Bernoulli(logits=self.first(x)).to_event(1))
            pyro.sample("b", dist.OneHotCategorical(logits=self.second(beside(x, a))))


def table(estimator: Any, number: int, rows: int = 3, pair: Any = None) -> Particles:
    model, guide = pair or (Model(), Guide())
    batch = Batch({"x": data(rows)})
    plan = make_plan(model, guide, (batch,), {})
    treatment = estimator.treatment(plan, STEP, 0, number)
    return run(model, guide, (batch,), {}, plan, number, treatment=treatment)


RELAXED = {
    "gumbel": Gumbel(0.5),
    "warm": Gumbel(2.0),
    "hard": Gumbel(0.5, hard=True),
    "discrete": Gumbel(0.5, density="discrete"),
    "straight": StraightThrough(),
}


@pytest.mark.parametrize("name", list(RELAXED))
def test_which_value_is_largest_has_the_discrete_probability(name: str) -> None:
    """Whatever the temperature: P(argmax) is the class probability, P(value > 1/2) the coin's."""
    number = 20_000
    particles = table(RELAXED[name], number)
    probabilities = particles.guide["a"]["fn"].base_dist.probs
    off = (particles.samples["a"] > 0.5).double() - probabilities
    assert sigmas(off.detach()).abs().max() < 4.5
    classes = particles.guide["b"]["fn"].probs
    largest = torch.zeros_like(classes).scatter(-1, particles.samples["b"].argmax(-1, True), 1.0)
    assert sigmas((largest - classes).detach()).abs().max() < 4.5


@pytest.mark.parametrize("name", ["hard", "straight"])
def test_forward_value_is_exactly_discrete(name: str) -> None:
    particles = table(RELAXED[name], 1000)
    for site in ("a", "b"):
        assert set(particles.samples[site].unique().tolist()) == {0.0, 1.0}
        assert particles.samples[site].requires_grad
    assert bool((particles.samples["b"].sum(-1) == 1).all())


def test_mean_of_relaxed_draws_is_a_quadrature() -> None:
    """E[sigmoid((logit + L) / T)], L logistic, over its quantiles."""
    particles = table(Gumbel(0.7), 20_000)
    middle = (torch.arange(200_000) + 0.5) / 200_000
    logits = particles.guide["a"]["fn"].base_dist.logits[0]  # the same in all particles
    exact = ((logits[..., None] + middle.logit()) / 0.7).sigmoid().mean(-1)
    assert sigmas((particles.samples["a"] - exact).detach()).abs().max() < 4.5
    assert (exact - logits.sigmoid()).abs().max() > 0.01  # not that of discrete draws


def test_densities_are_those_of_torch_where_it_is_exact() -> None:
    """Up to the Jacobian of squashing, which the ratio does not have."""
    temperature = torch.tensor(0.8)
    number = 50
    particles = table(Gumbel(0.8), number)
    a, b = (particles.samples[site] for site in ("a", "b"))
    kinds: Any = dist.RelaxedBernoulliStraightThrough, dist.RelaxedOneHotCategoricalStraightThrough
    ratios = {}
    for site, value, kind in (("a", a, kinds[0]), ("b", b, kinds[1])):
        fns: list[Any] = [core(sites[site]["fn"]) for sites in (particles.guide, particles.model)]
        q, p = (kind(temperature, logits=fn.logits).log_prob(value) for fn in fns)
        ratios[site] = q - p
        ours = particles.posterior[site] - particles.prior[site]
        torch.testing.assert_close(ours, ratios[site], atol=1e-6, rtol=1e-6)
    jacobian = a.log() + (1 - a).log()
    first = dist.RelaxedBernoulliStraightThrough(
        temperature, logits=particles.guide["a"]["fn"].base_dist.logits
    )
    torch.testing.assert_close(
        particles.posterior["a"], first.log_prob(a) + jacobian, atol=1e-6, rtol=1e-6
    )


def test_prior_may_have_a_temperature_of_its_own() -> None:
    """E_q[p(u) / q(u)] is 1 for the model's density of u at any temperature."""
    estimator = Gumbel(0.9, prior_temperature=0.6)
    particles = table(estimator, 40_000)
    log_ratio = particles.prior["a"].sum(-1) - particles.posterior["a"].sum(-1)
    assert sigmas((log_ratio.exp() - 1).detach()).abs().max() < 4.5
    log_ratio = log_ratio + particles.prior["b"] - particles.posterior["b"]
    assert sigmas((log_ratio.exp() - 1).detach()).abs().max() < 4.5
    assert repr(estimator) == "gumbel(0.9, prior_temperature=0.6)"


def test_relaxed_to_relaxed_bounds_the_relaxed_model() -> None:
    """log p(x) of the relaxed model by draws from its prior, which no bound may exceed."""
    torch.manual_seed(3)
    pair = model, _ = Model(), Guide()
    batch, estimator = Batch({"x": data(3)}), Gumbel(0.6)
    temperature = torch.tensor(0.6)
    number = 200_000
    with torch.no_grad():
        noise = torch.rand(number, 2).logit()
        a = ((model.prior + noise) / temperature).sigmoid()
        gumbel = -(-torch.rand(number, 3).log()).log()
        b = ((model.up(a).log_softmax(-1) + gumbel) / temperature).softmax(-1)
        log_p_x = dist.Normal(model.net(torch.cat([a, b], -1))[:, None], 0.7).log_prob(batch["x"])
        p = log_p_x.sum(-1).exp()
    log_p, error = p.mean(0).log(), p.std(0) / p.mean(0) / math.sqrt(number)
    several = torch.stack([elbo(4000, estimator).rows(*pair, batch) for _ in range(5)])
    bound = several.mean(0)
    assert bool((bound < log_p - 5 * error).all())
    tight = torch.stack([iwae(10_000, estimator).rows(*pair, batch) for _ in range(10)])
    spread = (tight.var(0) / 10 + error**2).sqrt()
    assert bool(((tight.mean(0) - log_p).abs() < 4.5 * spread + 1e-3).all())
    assert bool((bound < tight.mean(0)).all())


def bias(estimator: Any, rate: Any = None, repeats: int = 40) -> tuple[float, float]:
    """Norm of the guide's mean gradient minus the exact one, and its standard error."""
    torch.manual_seed(1)
    model, guide = Model(), Guide()
    batch = Batch({"x": data(2)})
    size = sum(p.numel() for p in parameters(guide))
    exact = value_and_gradient(elbo(estimator=Enumerate()), model, guide, batch)[1][-size:]
    objective = Objective(estimator=estimator, rate=rate, num_particles=400)
    runs = torch.stack(
        [
            value_and_gradient(objective, model, guide, batch, seed=seed)[1][-size:]
            for seed in range(repeats)
        ]
    )
    off = runs.mean(0) - exact
    noise = (runs.var(0) / repeats).sum().sqrt()
    return float(off.norm()), float(noise)


def test_bias_falls_with_the_temperature() -> None:
    """Jang's objective: the discrete KL, the likelihood at relaxed draws."""
    measured = [bias(Gumbel(t), Analytic()) for t in (2.0, 0.7, 0.2)]
    (warm, e1), (middle, e2), (cold, e3) = measured
    assert warm - middle > 5 * math.hypot(e1, e2), measured
    assert middle - cold > 5 * math.hypot(e2, e3), measured
    assert warm > 20 * e1, measured  # biased by design


def test_relaxed_estimators_are_biased_and_enumeration_is_not() -> None:
    for estimator in (StraightThrough(), Gumbel(0.5, hard=True)):
        off, error = bias(estimator, Analytic())
        assert off > 5 * error, estimator
    off, error = bias("score", Analytic())
    assert off < 4 * error


class Linear(Model):
    """x depends on the coins by a straight line of one variance: straight-through is exact."""

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            a = pyro.sample("a", dist.Bernoulli(logits=self.prior).to_event(1))
            pyro.sample("x", dist.Exponential(1.0).expand([1]).to_event(1))
            pyro.factor("term", (a * self.prior).sum(-1))


class LinearGuide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1, 2)

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("a", dist.Bernoulli(logits=self.first(batch["x"])).to_event(1))


def test_straight_through_is_exact_where_all_is_linear() -> None:
    """The gradient of E[f(z)] is that of f(p) for a linear f, at every draw."""
    model, guide = Linear(), LinearGuide()
    batch = Batch({"x": torch.rand(4, 1)})
    exact = value_and_gradient(elbo(estimator=Enumerate()), model, guide, batch)[1]
    through = mean_field(estimator=StraightThrough())
    guides = sum(p.numel() for p in parameters(guide))
    ours = value_and_gradient(through, model, guide, batch)[1]
    assert_same(ours[-guides:], exact[-guides:])


def test_value_of_straight_through_is_that_of_the_discrete_model() -> None:
    model, guide = Model(), Guide()
    batch = Batch({"x": data(3)})
    exact = elbo(estimator=Enumerate()).rows(model, guide, batch)
    rows = torch.stack([elbo(500, "straight_through").rows(model, guide, batch) for _ in range(40)])
    assert sigmas(rows - exact).abs().max() < 4.5


def test_discrete_density_is_linear_in_the_draw() -> None:
    particles = table(Gumbel(0.5, density="discrete"), 5)
    a, b = particles.samples["a"], particles.samples["b"]
    p = particles.guide["a"]["fn"].base_dist.probs
    assert_same(particles.posterior["a"], a * p.log() + (1 - a) * (1 - p).log())
    assert_same(particles.prior["b"], (b * particles.model["b"]["fn"].logits).sum(-1))


@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_finite_in_float32_at_low_temperatures(temperature: float) -> None:
    torch.set_default_dtype(torch.float32)
    model, guide = Model().float(), Guide().float()
    with torch.no_grad():
        guide.first.weight.mul_(30)
        guide.second.weight.mul_(30)
    batch = Batch({"x": data(50).float()})
    objective = elbo(100, Gumbel(temperature))
    value, gradient = value_and_gradient(objective, model, guide, batch)
    assert bool(value.isfinite())
    assert bool(gradient.isfinite().all())


def test_schedule_moves_the_temperature() -> None:
    schedule = exponential(0.1, 0.5, every=10)
    estimator = Gumbel(schedule)
    model, guide = Model(), Guide()
    batch = Batch({"x": data(3)})
    for step, temperature in ((0, 1.0), (12, math.exp(-1)), (500, 0.5)):
        wanted = elbo(estimator=Gumbel(max(0.5, temperature)))
        pair: tuple[Any, Any, Any, Any] = (model, guide, (batch,), {})
        values = []
        for objective, at in ((elbo(estimator=estimator), step), (wanted, 0)):
            pyro.set_rng_seed(0)
            values.append(objective.loss_and_rows(*pair, torch.tensor(at))[0].detach())
        assert_same(*values)
    assert repr(estimator) == "gumbel(exponential(0.1, 0.5, 1, 10))"


@pytest.mark.parametrize("name", list(RELAXED))
def test_traces_like_eager(name: str) -> None:
    model, guide = Model(), Guide()
    module = elbo(4, RELAXED[name])(model, guide)
    wanted = parameters(guide)

    def step(batch: Batch) -> tuple[Tensor, ...]:
        loss = module.loss_and_rows(batch)[0]
        return (loss.detach(), *torch.autograd.grad(loss, wanted))

    step(Batch({"x": data()}))  # the plan
    with pyro.validation_enabled(False):
        graph = make_fx(step)(Batch({"x": data(seed=1)}))
    outs = []
    for run_step in (step, graph):
        pyro.set_rng_seed(2)
        outs.append(run_step(Batch({"x": data()})))
    assert_same(*outs)


def test_chunks_are_averaged() -> None:
    """Each particle is a draw of its own; recomputing one draws it again alike."""
    model, guide = Model(), Guide()
    batch = Batch({"x": data(3)})
    runs = [
        torch.stack(
            [
                value_and_gradient(elbo(6, Gumbel(), chunk=c), model, guide, batch, seed=seed)[1]
                for seed in range(20)
            ]
        )
        for c in (None, 3)
    ]
    assert sigmas(runs[0] - runs[1].flip(0)).abs().max() < 4.5


def test_known_entries_keep_their_discrete_density() -> None:
    model, guide = Model(), Guide()
    x, known = data(4), torch.tensor([1.0, 0.0]).expand(4, 2)
    observed = torch.tensor([True, False, True, False])[:, None].expand(4, 2)
    batch = Batch({"x": x, "a": known}, observed={"a": observed})
    with pytest.raises(ValueError, match=r"site 'a': it is observed in part.*density='discrete'"):
        elbo(estimator="gumbel").rows(model, guide, batch)
    for estimator in (StraightThrough(), Gumbel(1e-3, density="discrete")):
        rows = torch.stack([elbo(500, estimator).rows(model, guide, batch) for _ in range(40)])
        exact = elbo(estimator=Enumerate()).rows(model, guide, batch)
        assert (rows.mean(0) - exact).abs().max() < 0.05
        assert sigmas(rows - exact)[0].abs() < 4.5


# --- what is refused ------------------------------------------------------------------------------


def labels(batch: Batch) -> None:
    with pyro.plate("data", batch.size, dim=-1):
        z = pyro.sample("z", dist.Categorical(torch.ones(3)))
        pyro.sample("x", dist.Normal(z.to(torch.get_default_dtype()), 1.0))


def label_guide(batch: Batch) -> None:
    with pyro.plate("data", batch.size, dim=-1):
        pyro.sample("z", dist.Categorical(logits=pyro.param("logits", torch.zeros(3))))


def test_sites_without_relaxation_are_refused() -> None:
    batch = Batch({"x": torch.ones(4)})
    for estimator in ("gumbel", "straight_through"):
        message = rf"{estimator}.*site 'z' of the guide is a Categorical.*use OneHotCategorical"
        with pytest.raises(ValueError, match=message):
            elbo(estimator=estimator).differentiable_loss(labels, label_guide, batch)


def test_parts_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="Gumbel: came density='soft'"):
        Gumbel(density="soft")
    with pytest.raises(ValueError, match=r"Gumbel: came temperature=0.0"):
        Gumbel(0.0)
    split = Split(iwae(4).bound, Miwae(2))
    with pytest.raises(ValueError, match="use density='discrete'"):
        Objective(split, Gumbel(), num_particles=4)
    Objective(split, Gumbel(density="discrete"), num_particles=4)


def test_rates_that_couple_rows_take_relaxed_draws() -> None:
    batch = Batch({"x": data(3)})
    objective = Objective(rate=FreeBits(0.5), estimator=Gumbel())
    value, gradient = value_and_gradient(objective, Model(), Guide(), batch)
    assert bool(value.isfinite())
    assert gradient.abs().sum() > 0
    with pytest.raises(ValueError, match="site 'a' is trained by enumeration"):
        Objective(rate=FreeBits(0.5), estimator="enumerate").rows(Model(), Guide(), batch)
