"""Rates: what weighs log q - log p(z), and what is known of it in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.batch import Batch
from pyro_vae.compiled import make_step
from pyro_vae.objectives import (
    Analytic,
    Beta,
    Elbo,
    MonteCarlo,
    Objective,
    Rate,
    Renyi,
    beta_vae,
    elbo,
    linear,
    mean_field,
)
from pyro_vae.objectives.particles import Particles, run
from pyro_vae.objectives.plan import make_plan
from pyro_vae.objectives.rates import Balance, Capacity, FreeBits
from pyro_vae.objectives.schedules import piecewise
from pyro_vae.objectives.tracing import elementwise_kl
from tests.exact_pairs import BatchGuide, LinearBatchModel
from tests.small_pairs import (
    PAIRS,
    Annealed,
    BottomUp,
    Guide,
    LadderModel,
    LinearModel,
    Program,
    TopDown,
    assert_same,
    data,
    parameters,
    sigmas,
    value_and_gradient,
)

STEP = torch.tensor(3)


def particles_of(model: Program, guide: Program, *args: Any, number: int = 4) -> Particles:
    args = args or (data(),)
    return run(model, guide, args, {}, make_plan(model, guide, args, {}), number)


def test_monte_carlo_is_log_q_minus_log_p_entry_by_entry():
    particles = particles_of(LinearModel(), Guide())
    rate = MonteCarlo()(particles, STEP)["z"]
    q, z = particles.guide["z"]["fn"].base_dist, particles.samples["z"]
    torch.testing.assert_close(rate, q.log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z))
    assert rate.shape == (4, 6, 2)
    assert MonteCarlo().betas(particles, STEP) == {"z": 1.0}


def test_analytic_is_the_kl_entry_by_entry():
    particles = particles_of(LinearModel(), Guide())
    kl = kl_divergence(particles.guide["z"]["fn"].base_dist, dist.Normal(0.0, 1.0))
    torch.testing.assert_close(Analytic()(particles, STEP)["z"], kl)
    assert kl.shape == (4, 6, 2)
    assert Analytic().betas(particles, STEP) == {"z": 0.0}


@pytest.mark.parametrize("guide", [TopDown, BottomUp])
def test_analytic_agrees_with_monte_carlo_in_both_orders(guide: Callable[[], Program]):
    """Bottom-up, the KL of z1 given z2 is not the expectation that the ELBO asks for."""
    pair, x = (LadderModel(), guide()), data(200)
    objectives = mean_field(num_particles=4), elbo(num_particles=4)
    values, gradients = zip(
        *[
            [a - b for a, b in zip(*each, strict=True)]
            for each in (
                [value_and_gradient(o, *pair, x, seed=seed) for o in objectives]
                for seed in range(40)
            )
        ],
        strict=True,
    )
    assert sigmas(torch.stack(values)).abs() < 5
    assert sigmas(torch.stack(gradients)).abs().max() < 5


def test_the_order_decides_which_kl_is_analytic():
    x = data()
    top_down = make_plan(LadderModel(), TopDown(), (x,), {})
    assert top_down.analytic == {"z1", "z2"}
    assert top_down.notes == ()
    bottom_up = make_plan(LadderModel(), BottomUp(), (x,), {})
    assert bottom_up.analytic == {"z2"}
    (note,) = bottom_up.notes
    assert "'z1'" in note
    assert "z2 before it" in note


def test_where_no_kl_is_known_the_plan_says_so():
    plan = make_plan(*PAIRS["prior that shares the guide's network"](), (data(),), {})
    assert plan.analytic == frozenset()
    assert "no KL is known" in plan.notes[0]
    assert "MixtureSameFamily" in plan.notes[0]


def scaled(on_model: float, on_guide: float) -> tuple[Annealed, Annealed]:
    return Annealed(LinearModel(), {"z": on_model}), Annealed(Guide(), {"z": on_guide})


@pytest.mark.parametrize(("on_model", "on_guide"), [(4.0, 1.0), (1.0, 4.0), (4.0, 4.0)])
def test_a_scale_on_one_side_is_monte_carlo(on_model: float, on_guide: float):
    model, guide = scaled(on_model, on_guide)
    losses = []
    for objective in (mean_field(3), elbo(3)):
        pyro.set_rng_seed(1)
        losses.append(objective.loss(model, guide, data()))
    plan = make_plan(model, guide, (data(),), {})
    if on_model == on_guide:
        assert plan.analytic == {"z"}
        assert losses[0] != pytest.approx(losses[1])
    else:
        assert "scale or mask differs" in plan.notes[0]
        assert losses[0] == pytest.approx(losses[1])


def test_a_scale_that_leaves_one_side_later_is_seen():
    """The plan was made where both scales were 1."""
    model, guide = scaled(1.0, 1.0)
    objective, x = mean_field(3), data()
    objective.loss(model, guide, x)
    model.scales = {"z": 4.0}
    losses = []
    for each in (objective, elbo(3)):
        pyro.set_rng_seed(1)
        losses.append(each.loss(model, guide, x))
    assert losses[0] == pytest.approx(losses[1])


MASKS = torch.tensor([[True, False, True], [True, True, False]])
POINT = torch.tensor([[0.5, -1.0], [0.2, 0.3], [1.0, 2.0]])
ONE_SIDED: dict[str, tuple[Any, Any]] = {
    "other rows": (MASKS[0], MASKS[1]),
    "one row more": (MASKS[0], torch.tensor(True)),
    "guide alone": (True, MASKS[0]),
    "none of the guide": (True, False),
    "the same rows": (MASKS[0], MASKS[0]),
    "none": (False, False),
}


@pytest.mark.parametrize("case", ONE_SIDED)
def test_masks_that_distributions_carry(case: str):
    """Pyro's KL counts where both masks are True, log q and log p where its own is."""
    on_model, on_guide = ONE_SIDED[case]

    def model(x: Tensor) -> None:
        with pyro.plate("data", 3):
            prior = dist.Normal(torch.zeros(2), 1.0).to_event(1).expand([3])
            z = pyro.sample("z", prior.mask(on_model))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(POINT, 0.5).to_event(1).mask(on_guide))

    x = torch.ones(3, 2)
    same = case in ("the same rows", "none")
    assert make_plan(model, guide, (x,), {}).analytic == ({"z"} if same else set())
    rows = [objective.rows(model, guide, x) for objective in (mean_field(20_000), elbo(20_000))]
    torch.testing.assert_close(*rows, atol=0.1, rtol=0)


@pytest.mark.parametrize("dims", ["own", "independent", "against another family"])
def test_the_kl_of_a_point_has_its_log_density(dims: str):
    """As autoguides write a transformed draw; Pyro's KL leaves it out."""
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    if dims == "against another family":
        prior = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    point = dist.Delta(POINT, torch.full((3,), 0.7), event_dim=1)
    if dims != "own":
        point = dist.Delta(POINT, torch.full((3, 2), 0.35)).to_event(1)
    kl, event_dim = elementwise_kl(point, prior)
    kl = kl.sum(-1) if event_dim else kl
    torch.testing.assert_close(kl, 0.7 - prior.log_prob(POINT))


def test_a_latent_that_is_data_in_part_is_monte_carlo():
    def model(batch: Batch) -> None:
        with pyro.plate("data", batch.size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    def guide(batch: Batch) -> None:
        with pyro.plate("data", batch.size):
            pyro.sample("z", dist.Normal(0.5 * batch["x"], 0.8))

    batch = Batch({"x": torch.ones(3), "z": torch.tensor([1.0, torch.nan, torch.nan])})
    assert "observed in part" in make_plan(model, guide, (batch,), {}).notes[0]


@pytest.mark.parametrize("pair", ["one latent", "dropout", "top-down ladder"])
@pytest.mark.parametrize("estimator", ["pathwise", "stl"])
def test_an_analytic_kl_keeps_its_gradient_under_stl(pair: str, estimator: str):
    """On a detached guide it would vanish."""
    model, guide = PAIRS[pair]()
    pyros = TraceMeanField_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    ours = value_and_gradient(mean_field(3, estimator), model, guide, data())
    assert_same(ours, value_and_gradient(pyros, model, guide, data()))


# ---------------------------------------------------------------------------------------------
# Beta


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.5, {"z1": 0.5, "z2": 0.5}),
        ({"z2": 3.0}, {"z1": 1.0, "z2": 3.0}),
        (linear(6), {"z1": 0.5, "z2": 0.5}),
        ({"z1": linear(6), "z2": 2.0}, {"z1": 0.5, "z2": 2.0}),
    ],
    ids=["number", "mapping", "schedule", "mixed"],
)
@pytest.mark.parametrize("rate", [MonteCarlo(), Analytic()], ids=repr)
def test_beta_weighs_each_site(beta: Any, expected: dict[str, float], rate: Rate):
    particles = particles_of(LadderModel(), TopDown())
    plain, weighed = rate(particles, STEP), Beta(beta, rate)(particles, STEP)
    betas = Beta(beta, rate).betas(particles, STEP)
    for site, factor in expected.items():
        torch.testing.assert_close(weighed[site], factor * plain[site])
        assert float(betas[site]) == pytest.approx(0.0 if rate.analytic else factor)


def test_betas_wrap_betas():
    particles = particles_of(LadderModel(), TopDown())
    nested = Beta({"z1": 2.0}, Beta(3.0))
    assert nested.betas(particles, STEP) == {"z1": 6.0, "z2": 3.0}
    torch.testing.assert_close(
        nested(particles, STEP)["z1"], 6 * MonteCarlo()(particles, STEP)["z1"]
    )


def test_beta_zero_leaves_the_likelihood():
    model, guide, x = LinearModel(), Guide(), data()
    particles = particles_of(model, guide, x)
    pyro.set_rng_seed(1)
    loss = beta_vae(0.0, num_particles=4).loss(model, guide, x)
    pyro.set_rng_seed(1)
    particles = particles_of(model, guide, x)
    assert loss == pytest.approx(-particles.likelihood["x"].sum().item() / 4)


@pytest.mark.parametrize(
    ("bound", "beta"),
    [
        (Renyi(0.0), 2.0),
        (Renyi(0.5), 2.0),
        (Elbo(), 2.0),
        (Renyi(0.0), {"z1": 0.5, "z2": 2.0}),
        (Renyi(0.0), {"z1": 3.0}),
        (Renyi(0.0), {"z2": linear(4, 0.5, 2.0)}),
        (Elbo(), {"z1": 0.5, "z2": 2.0}),
    ],
    ids=[
        *("iwae common", "renyi common", "elbo common", "iwae by site", "iwae z1", "iwae schedule"),
        "elbo by site",
    ],
)
@pytest.mark.parametrize("guide", [TopDown, BottomUp])
def test_dreg_knows_the_weight_of_each_log_q(bound: Any, beta: Any, guide: Callable[[], Program]):
    """A factor 1 - beta_l h / w per site would be biased: its sites share one, plus a score."""
    pair, x = (LadderModel(), guide()), data(200)
    objectives = [Objective(bound, e, Beta(beta), num_particles=4) for e in ("dreg", "pathwise")]
    drawn = [
        [value_and_gradient(objective, *pair, x, seed=seed) for objective in objectives]
        for seed in range(40)
    ]
    for ours, theirs in drawn:
        torch.testing.assert_close(ours[0], theirs[0])
    assert sigmas(torch.stack([a[1] - b[1] for a, b in drawn])).abs().max() < 5


@pytest.mark.parametrize("beta", [-1.0, float("nan"), {"z": -0.1}])
def test_beta_refuses_negative_numbers(beta: Any):
    with pytest.raises(ValueError, match="Beta"):
        Beta(beta)


def test_beta_refuses_an_unknown_site_by_name():
    with pytest.raises(ValueError, match=r"\['w'\].*\['z'\]"):
        beta_vae({"w": 2.0}).loss(LinearModel(), Guide(), data())


def test_beta_of_a_site_that_is_data_weighs_nothing():
    losses = []
    for objective in (beta_vae({"x": 5.0}), elbo()):
        torch.manual_seed(0)
        losses.append(objective.loss(LinearModel(), Guide(), data()))
    assert losses[0] == losses[1]


def test_warm_up_layer_by_layer():
    """Sønderby et al. (2016): a layer begins when the one below it is done."""
    particles = particles_of(LadderModel(), TopDown())
    rate = Beta({"z1": linear(10), "z2": piecewise((10, 0), (20, 1))}, Analytic())
    plain = Analytic()(particles, STEP)
    for step, z1, z2 in ((0, 0.0, 0.0), (5, 0.5, 0.0), (10, 1.0, 0.0), (15, 1.0, 0.5), (99, 1, 1)):
        came = rate(particles, torch.tensor(step))
        torch.testing.assert_close(came, {"z1": z1 * plain["z1"], "z2": z2 * plain["z2"]})


def test_names():
    assert repr(Beta(2.0)) == "beta(2.0, montecarlo)"
    by_site = Beta({"z1": 2.0, "z2": linear(4)}, Analytic())
    assert repr(by_site) == "beta({z1: 2.0, z2: linear(4, 0, 1)}, analytic)"


# ---------------------------------------------------------------------------------------------
# Rates of a mean: free bits, capacity, balance


def gaussian_kl(q: Any) -> Tensor:
    """KL(N(m, s²) || N(0, 1)), entry by entry."""
    kl: Tensor = 0.5 * (q.loc**2 + q.scale**2 - 1) - q.scale.log()
    return kl


def one_latent(number: int = 4) -> tuple[Program, Particles, Tensor]:
    """A guide, one pass and its KL by hand ``[K, B, 2]``."""
    torch.manual_seed(1)
    guide = Guide()
    particles = particles_of(LinearModel(), guide, number=number)
    return guide, particles, gaussian_kl(particles.guide["z"]["fn"].base_dist)


def per_row(terms: Mapping[str, Tensor]) -> Tensor:
    """Sum over sites and entries ``[K, B]``."""
    return torch.stack([t.flatten(2).sum(2) if t.dim() > 2 else t for t in terms.values()]).sum(0)


def assert_sum(terms: Mapping[str, Tensor], wanted: Tensor, *programs: Program) -> None:
    """Over rows, in the mean over particles: the value and the gradient of ``wanted``."""
    came = per_row(terms).mean(0).sum()
    torch.testing.assert_close(came, wanted)
    torch.testing.assert_close(gradient(came, *programs), gradient(wanted, *programs))


def gradient(total: Tensor, *programs: Program) -> Tensor:
    """Flat, 0 where nothing depends on a parameter; the graph is kept."""
    theta = parameters(*programs)
    total = total + 0.0 * theta[0].sum()
    found = torch.autograd.grad(total, theta, retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def floored(x: Tensor, nats: float) -> Tensor:
    return torch.clamp(x, min=nats)


FORMULAS: dict[tuple[str, str], Callable[[Tensor, float], Tensor]] = {
    ("dimension", "batch"): lambda kl, nats: floored(kl.mean((0, 1)), nats).sum() * kl.shape[1],
    ("site", "batch"): lambda kl, nats: floored(kl.sum(-1).mean(), nats) * kl.shape[1],
    ("dimension", "row"): lambda kl, nats: floored(kl.mean(0), nats).sum(),
    ("site", "row"): lambda kl, nats: floored(kl.sum(-1).mean(0), nats).sum(),
}


@pytest.mark.parametrize(("per", "over"), FORMULAS)
@pytest.mark.parametrize("where", [-1.0, 0.3, 0.7, 2.0])
def test_free_bits_are_the_larger_of_floor_and_mean(per: str, over: str, where: float):
    """Floors below, between and above the KLs of the dimensions, or of the rows."""
    guide, particles, kl = one_latent()
    each = {
        ("dimension", "batch"): kl.mean((0, 1)),
        ("site", "batch"): torch.stack([kl.sum(-1).mean() * f for f in (0.5, 1.5)]),
        ("dimension", "row"): kl.mean(0).flatten(),
        ("site", "row"): kl.sum(-1).mean(0),
    }[per, over].detach()
    nats = max(0.0, float(each.min() + where * (each.max() - each.min())))
    terms = FreeBits(nats, per, over)(particles, STEP)
    assert_sum(terms, FORMULAS[per, over](kl, nats), guide)
    if where == 2.0:
        assert float(per_row(terms).detach().std()) < 1e-6 * nats  # in every row the floor


def test_below_the_floor_there_is_no_gradient_and_above_it_that_of_the_kl():
    guide, particles, kl = one_latent()
    low, high = kl.mean((0, 1)).detach().sort().values
    terms = FreeBits(float(low + high) / 2)(particles, STEP)["z"]
    below, above = kl.mean((0, 1)).argsort()
    assert gradient(terms[..., below].sum(), guide).abs().max() == 0.0
    gradients = [gradient(t[..., above].sum(), guide) for t in (terms, kl)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0.1


@pytest.mark.parametrize("above", [True, False])
def test_a_group_shares_one_floor(above: bool):
    pair = LadderModel(), TopDown()
    particles = particles_of(*pair)
    mean = per_row(Analytic()(particles, STEP)).mean()
    nats = float(mean.detach()) * (0.9 if above else 1.1)
    terms = FreeBits(nats, {"all": ["z1", "z2"]})(particles, STEP)
    assert_sum(terms, 6 * floored(mean, nats), *pair)
    alone = FreeBits(nats, {"top": ["z2"]})(particles, STEP)
    torch.testing.assert_close(alone["z1"], Analytic()(particles, STEP)["z1"])
    torch.testing.assert_close(alone["z2"], FreeBits(nats, "site")(particles, STEP)["z2"])


def test_floors_by_site():
    """Sites that are not named keep their rate."""
    particles = particles_of(LadderModel(), TopDown())
    plain = Analytic()(particles, STEP)
    terms = FreeBits({"z2": piecewise((0, 100))}, "site")(particles, STEP)
    torch.testing.assert_close(terms["z1"], plain["z1"])
    torch.testing.assert_close(terms["z2"], FreeBits(100.0, "site")(particles, STEP)["z2"])
    both = FreeBits({"z1": 0.3, "z2": 100.0}, "site")(particles, STEP)
    torch.testing.assert_close(both["z1"], FreeBits(0.3, "site")(particles, STEP)["z1"])
    assert repr(FreeBits({"z1": 0.3})) == "freebits({z1: 0.3}, dimension, batch, analytic)"
    with pytest.raises(ValueError, match="came floors by site and groups"):
        FreeBits({"z1": 0.3}, {"all": ["z1"]})
    with pytest.raises(ValueError, match=r"FreeBits: came .*'w'"):
        FreeBits({"w": 0.3}, "site")(particles, STEP)


def test_floors_can_move():
    _, particles, kl = one_latent()
    rate = FreeBits(piecewise((0, 100), (6, 0)))
    assert float(rate(particles, torch.tensor(0))["z"].mean().detach()) == 100
    assert float(rate(particles, STEP)["z"].mean().detach()) == 50
    torch.testing.assert_close(rate(particles, torch.tensor(6))["z"], kl)


ROWS = torch.tensor([True, False, True])
CELLS = torch.tensor([[True, True], [False, False], [True, False]])
handler: Any = poutine.mask
MASKED: dict[str, tuple[Callable[[Any], Any], Tensor]] = {
    "handler": (lambda fn: (handler(mask=ROWS), fn.to_event(1)), ROWS[:, None].expand(3, 2)),
    "rows": (
        lambda fn: (handler(mask=True), fn.to_event(1).mask(ROWS)),
        CELLS | ROWS[:, None],
    ),
    "cells": (lambda fn: (handler(mask=True), fn.mask(CELLS).to_event(1)), CELLS),
    "all": (lambda fn: (handler(mask=False), fn.to_event(1)), CELLS & False),
}


@pytest.mark.parametrize("case", MASKED)
@pytest.mark.parametrize("number", [1, 4])
def test_the_mean_is_over_what_is_a_latent(case: str, number: int):
    make, latent = MASKED[case]

    def sample(fn: Any) -> Tensor:
        mask, masked = make(fn)
        with mask:
            return pyro.sample("z", masked)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 3):
            z = sample(dist.Normal(torch.zeros(3, 2), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 3):
            sample(dist.Normal(POINT, 0.5))

    particles = particles_of(model, guide, torch.ones(3, 2), number=number)
    kl = gaussian_kl(dist.Normal(POINT, torch.tensor(0.5))) * latent
    rows = latent.any(-1)
    for nats in (0.0, 0.3, 0.5, 5.0):
        means = kl.sum(0) / latent.sum(0).clamp(min=1)
        wanted = (floored(means, nats) * latent.sum(0)).sum()
        assert_close_sum(FreeBits(nats)(particles, STEP), wanted)
        mean = kl.sum() / rows.sum().clamp(min=1)
        assert_close_sum(FreeBits(nats, "site")(particles, STEP), floored(mean, nats) * rows.sum())
        by_row = (floored(kl.sum(-1), nats) * rows).sum()
        assert_close_sum(FreeBits(nats, "site", "row")(particles, STEP), by_row)
        distance = (mean - nats).abs() * rows.sum()
        assert_close_sum(Capacity(nats, 3.0)(particles, STEP), 3 * distance)


def assert_close_sum(terms: Mapping[str, Tensor], wanted: Tensor) -> None:
    torch.testing.assert_close(per_row(terms).mean(0).sum(), wanted)


def test_rows_whose_latent_is_data_are_not_in_the_mean():
    def model(batch: Batch) -> None:
        with pyro.plate("data", batch.size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    def guide(batch: Batch) -> None:
        with pyro.plate("data", batch.size):
            pyro.sample("z", dist.Normal(0.5 * batch["x"], 0.8))

    batch = Batch({"x": torch.ones(3), "z": torch.tensor([1.0, torch.nan, torch.nan])})
    particles = particles_of(model, guide, batch)
    rate = MonteCarlo()(particles, STEP)["z"]
    assert float(rate[:, 0].abs().max()) == 0
    mean = rate[:, 1:].mean()
    for nats in (0.0, 7.0):
        assert_close_sum(FreeBits(nats)(particles, STEP), 2 * floored(mean, nats))
        assert_close_sum(Capacity(nats, 2.0)(particles, STEP), 4 * (mean - nats).abs())


def global_latent() -> tuple[Program, Program]:
    """w before the rows, z in them."""

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(w + z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(torch.tensor([0.1, 3.0]), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5).to_event(1))

    return model, guide


@pytest.mark.parametrize("number", [1, 4])
def test_sites_outside_the_rows(number: int):
    x = torch.ones(3, 2)
    particles = particles_of(*global_latent(), x, number=number)
    of_w, plain = torch.tensor([0.005, 4.5]), Analytic()(particles, STEP)
    came = FreeBits(1.0)(particles, STEP)
    torch.testing.assert_close(came["w"].flatten(1), floored(of_w, 1.0).expand(number, 2))
    torch.testing.assert_close(came["z"].sum(-1), torch.full((number, 3), 2 * 1.0))
    site = FreeBits(1.0, "site")(particles, STEP)
    torch.testing.assert_close(site["w"], of_w.sum().expand(number))
    for rate in (Capacity(2.0, 5.0), Balance()):
        torch.testing.assert_close(rate(particles, STEP)["w"], plain["w"])
    with pytest.raises(ValueError, match=r"\['w', 'z'\].*two groups"):
        FreeBits(1.0, {"both": ["w", "z"]})(particles, STEP)


def test_free_bits_by_dimension_need_a_kl_that_factorizes():
    def program(loc: Tensor, *obs: Tensor) -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.MultivariateNormal(loc, torch.eye(2)))
            for x in obs:
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.ones(3, 2)
    loc = POINT.to(x)
    pair = lambda x: program(torch.zeros(2), x), lambda x: program(loc)
    particles = particles_of(*pair, x)
    with pytest.raises(ValueError, match=r"site 'z'.*'dimension'.*\[2\]; use per='site'"):
        FreeBits(0.1)(particles, STEP)
    assert_close_sum(FreeBits(0.1, "site")(particles, STEP), 0.5 * (loc**2).sum())


def test_a_one_hot_draw_is_one_dimension():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.1, 0.0, 0.0]]).expand(3, 2, 3)

    def program(logits: Tensor, *obs: Tensor) -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.OneHotCategorical(logits=logits).to_event(1))
            for x in obs:
                pyro.sample("x", dist.Normal(z[..., 0], 1.0).to_event(1), obs=x)

    pair = lambda x: program(torch.zeros(2, 3), x), lambda x: program(logits)
    particles = particles_of(*pair, torch.ones(3, 2))
    q = logits[0].softmax(-1)
    kl = (q * (3 * q).log()).sum(-1)
    assert_close_sum(FreeBits(0.1)(particles, STEP), 3 * floored(kl, 0.1).sum())
    assert float(kl[1]) < 0.1 < float(kl[0])


@pytest.mark.parametrize("gamma", [1.0, 4.0])
@pytest.mark.parametrize("sites", [1, 2])
def test_capacity_is_a_distance(gamma: float, sites: int):
    """Below C the rate is paid for, above it is paid."""
    pair = (LinearModel(), Guide()) if sites == 1 else (LadderModel(), TopDown())
    particles = particles_of(*pair)
    mean = per_row(Analytic()(particles, STEP)).mean()
    slopes = []
    for c in (0.5 * float(mean.detach()), 2 * float(mean.detach())):
        terms = Capacity(c, gamma)(particles, STEP)
        assert_sum(terms, 6 * gamma * (mean - c).abs(), *pair)
        slopes.append(gradient(per_row(terms).mean(), *pair))
    torch.testing.assert_close(slopes[0], -slopes[1])
    assert slopes[0].abs().max() > 0.01


def test_capacity_grows():
    _, particles, kl = one_latent()
    mean, rate = float(kl.sum(-1).mean().detach()), Capacity(linear(6, 0, 4), linear(3, 0, 2))
    for step, c, gamma in ((0, 0, 0), (3, 2, 2), (60, 4, 2)):
        came = per_row(rate(particles, torch.tensor(step))).mean()
        assert float(came.detach()) == pytest.approx(gamma * abs(mean - c))


def test_balance_is_by_mean_kl_per_dimension():
    pair = LadderModel(), TopDown()
    particles = particles_of(*pair)
    plain = Analytic()(particles, STEP)
    means = {site: float(kl.detach().flatten(2).sum(2).mean()) for site, kl in plain.items()}
    use = {"z1": (means["z1"] + 0.01) / 2, "z2": (means["z2"] + 0.01) / 1}
    for share in (1.0, 0.3, 0.0):
        c = {s: 1 - share + share * 2 * u / sum(use.values()) for s, u in use.items()}
        assert sum(c.values()) == pytest.approx(2)
        wanted = [c[site] * plain[site].flatten(2).sum(2).mean(0).sum() for site in plain]
        assert_sum(Balance(share)(particles, STEP), torch.stack(wanted).sum(), *pair)
    assert abs(use["z1"] - use["z2"]) > 0.1 * use["z1"]
    fading = Balance(linear(6, 1, 0))
    torch.testing.assert_close(fading(particles, STEP), Balance(0.5)(particles, STEP))
    torch.testing.assert_close(fading(particles, torch.tensor(6)), plain)


def test_as_a_graph():
    """The mean, and what it is compared with, move from step to step."""
    floors = FreeBits(piecewise((0, 0), (4, 3)), rate=MonteCarlo())
    rate = Balance(linear(4, 1, 0), Capacity(linear(4, 0, 20), 2.0, floors))
    losses = []
    for level in ("eager", "traced"):
        torch.manual_seed(0)
        loss = Objective(Elbo(), rate=rate)(LadderModel(), TopDown())
        theta = list(loss.parameters())
        step = make_step(loss, theta, torch.optim.SGD(theta, lr=0.001), level=level)
        losses.append([float(step(data(seed=i))) for i in range(6)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


def test_each_row_keeps_its_own_term():
    """So that a row of weight 0 trains nothing, and rows weigh what they should."""
    x, weights = data(4), torch.tensor([0.0, 1.0, 2.0, 0.5])
    model, guide = LinearBatchModel(), BatchGuide()
    plain = Analytic()
    for rate, slope, shift in (
        (Capacity(0.0, 3.0), 3.0, 0.0),
        (Capacity(100.0, 3.0), -3.0, 300.0),
        (FreeBits(0.0), 1.0, 0.0),
        (FreeBits(100.0, "site"), 0.0, 100.0),
    ):
        found = []
        for each in (rate, plain, Beta(0.0, plain)):
            torch.manual_seed(1)
            objective = Objective(Elbo(), rate=each)
            loss = objective(model, guide)(Batch({"x": x}, weights=weights))
            found.append(torch.cat([loss.reshape(1), gradient(loss, model, guide)]))
        came, kl, none = found
        wanted = none + slope * (kl - none)
        wanted[0] = wanted[0] + shift * weights.sum()
        torch.testing.assert_close(came, wanted)


def test_a_monte_carlo_rate_makes_free_bits_too_large_by_what_is_documented():
    """E max(nats, mean) - nats is .399 standard errors of a normal mean whose expectation is nats."""
    loc, scale, draws, repeats = 0.4, 0.7, 100, 4000
    kl = float(gaussian_kl(dist.Normal(torch.tensor(loc), torch.tensor(scale))))
    noise = torch.randn(repeats, draws)
    z = loc + scale * noise
    rate = -0.5 * noise**2 - math.log(scale) + 0.5 * z**2  # log q - log p

    def model(x: Tensor) -> None:
        with pyro.plate("data", draws):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", draws):
            pyro.sample("z", dist.Normal(loc, scale))

    particles = particles_of(model, guide, torch.zeros(draws), number=1)
    values = []
    for one in rate:
        particles.prior["z"], particles.posterior["z"] = torch.zeros(1, draws), one[None]
        values.append(FreeBits(kl, rate=MonteCarlo())(particles, STEP)["z"].mean())
    bias = torch.stack(values) - kl
    # variance of e² (s² - 1) / 2 + loc s e, e normal
    error = math.sqrt(((scale**2 - 1) ** 2 / 2 + (loc * scale) ** 2) / draws)
    assert sigmas(bias - error / math.sqrt(2 * math.pi)).abs() < 5
    assert sigmas(bias) > 20
    analytic = FreeBits(kl)(particles, STEP)["z"].mean()
    assert float(analytic) == pytest.approx(kl)


@pytest.mark.parametrize(
    "make",
    [
        lambda rate: FreeBits(0.1, rate=rate),
        lambda rate: Capacity(2.0, 3.0, rate),
        lambda rate: Balance(1.0, rate),
    ],
    ids=["free bits", "capacity", "balance"],
)
def test_what_a_rate_says_of_itself_passes_through(make: Callable[[Rate | None], Rate]):
    for inner, analytic in ((None, True), (Analytic(), True), (MonteCarlo(), False)):
        rate = make(inner)
        for outer in (rate, Beta(2.0, rate), Beta(2.0, Beta({"z": 1.0}, rate))):
            assert outer.coupled
            assert outer.analytic is analytic
    assert not Beta(2.0).coupled


REFUSED: dict[str, tuple[Callable[[], Rate], str]] = {
    "nats": (lambda: FreeBits(-1.0), "FreeBits: came nats=-1"),
    "nan": (lambda: FreeBits(math.nan), "FreeBits: came nats=nan"),
    "per": (lambda: FreeBits(1.0, "channel"), "per='channel', wanted 'dimension'"),
    "over": (lambda: FreeBits(1.0, over="rows"), "over='rows', wanted 'batch'"),
    "twice": (lambda: FreeBits(1.0, {"a": ["z"], "b": ["y", "z"]}), r"\['z'\] twice"),
    "capacity": (lambda: Capacity(-1.0, 1.0), "capacity=-1"),
    "gamma": (lambda: Capacity(1.0, -1.0), "gamma=-1"),
    "share": (lambda: Balance(1.5), r"share=1.5.*\[0, 1\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_group_names_sites_that_exist():
    particles = particles_of(LinearModel(), Guide())
    with pytest.raises(ValueError, match=r"FreeBits: came sites \['w'\].*\['z'\]"):
        FreeBits(1.0, {"top": ["w"]})(particles, STEP)
    of_data = FreeBits(1.0, {"data": ["x"]})(particles, STEP)
    torch.testing.assert_close(of_data, Analytic()(particles, STEP))


def test_names_of_rates_of_a_mean():
    assert repr(FreeBits(0.5)) == "freebits(0.5, dimension, batch, analytic)"
    by_group = FreeBits(linear(4), {"top": ["z1", "z2"]}, "row", MonteCarlo())
    assert repr(by_group) == "freebits(linear(4, 0, 1), {top: ['z1', 'z2']}, row, montecarlo)"
    assert repr(Capacity(linear(4, 0, 25), 1000)) == "capacity(linear(4, 0, 25), 1000, analytic)"
    assert repr(Balance(linear(4, 1, 0))) == "balance(linear(4, 1, 0), analytic)"
