"""Rates: what weighs log q - log p(z), and what is known of it in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.batch import Batch
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
from pyro_vae.objectives.tracing import elementwise_kl
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


def test_names():
    assert repr(Beta(2.0)) == "beta(2.0, montecarlo)"
    by_site = Beta({"z1": 2.0, "z2": linear(4)}, Analytic())
    assert repr(by_site) == "beta({z1: 2.0, z2: linear(4, 0, 1)}, analytic)"
