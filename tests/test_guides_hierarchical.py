"""Hierarchical guides: merges are those of the papers, exact posteriors make exact bounds, gradients
agree in expectation."""

from __future__ import annotations

import math
from itertools import compress

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import PyroOptim
from torch import nn
from torch.distributions import kl_divergence

from pyro_vae.batch import Batch, Observed
from pyro_vae.conditionals import Bernoulli, DiagonalGaussian, StandardNormal
from pyro_vae.evaluation.likelihood import evaluate
from pyro_vae.guides import BottomUpGuide, TopDownGuide, precision_weighted, residual
from pyro_vae.nn import mlp
from pyro_vae.objectives import Objective, chi, elbo, iwae, mean_field, piwae, renyi, rws
from pyro_vae.objectives.bounds import Elbo, Renyi, Split
from pyro_vae.objectives.rates import Analytic, Balance, Beta, FreeBits, MonteCarlo
from pyro_vae.objectives.schedules import linear
from tests.exact_pairs import SIGMAS
from tests.hierarchies import EXACT, X, Z, pair, rows, wrong
from tests.small_pairs import (
    assert_same,
    flat_gradient,
    parameters,
    plan_of,
    sigmas,
    table,
    value_and_gradient,
)

TOP_DOWN = ["ladder", "residual"]


# ---------------------------------------------------------------------------------------------
# Merges


def gaussians(*lead):
    loc, scale = torch.randn(2, *lead, 3), 0.2 + torch.rand(2, *lead, 3)
    return [dist.Normal(*moments).to_event(1) for moments in zip(loc, scale, strict=True)]


def test_precision_weighted_is_the_normalized_product():
    seen, expected = gaussians(4)
    product, z = precision_weighted(seen, expected), torch.randn(50, 4, 3)
    rest = product.log_prob(z) - seen.log_prob(z) - expected.log_prob(z)
    torch.testing.assert_close(rest, rest[:1].expand_as(rest))  # a constant
    # which is the density of one mean under the other's Gaussian with both variances
    q, p = seen.base_dist, expected.base_dist
    between = dist.Normal(q.loc, (q.scale**2 + p.scale**2).sqrt()).log_prob(p.loc).sum(-1)
    torch.testing.assert_close(-rest[0], between)
    variance = 1 / (1 / q.scale**2 + 1 / p.scale**2)
    mean = variance * (q.loc / q.scale**2 + p.loc / p.scale**2)
    torch.testing.assert_close(product.base_dist.loc, mean)
    torch.testing.assert_close(product.base_dist.scale, variance.sqrt())


def test_a_product_with_a_sure_factor_is_that_factor():
    """Scales as far apart as a floor allows, in single precision."""
    loc, scale = torch.tensor([[3.0], [-2.0]]).float(), torch.tensor([[1e-4], [1e3]]).float()
    sure, vague = (dist.Normal(*m).to_event(1) for m in zip(loc, scale, strict=True))
    for merged in (precision_weighted(sure, vague), precision_weighted(vague, sure)):
        torch.testing.assert_close(merged.base_dist.loc, loc[0])
        torch.testing.assert_close(merged.base_dist.scale, scale[0])


def test_residual_moves_and_scales_the_models():
    change, expected = gaussians(4)
    merged = residual(change, expected).base_dist
    q, p = change.base_dist, expected.base_dist
    torch.testing.assert_close(merged.loc, p.loc + q.loc)
    torch.testing.assert_close(merged.scale, p.scale * q.scale)
    # NVAE's eq. 2: what its KL becomes
    moved, factor = q.loc, q.scale
    wanted = 0.5 * (moved**2 / p.scale**2 + factor**2 - 2 * factor.log() - 1)
    kl = kl_divergence(merged, p)
    torch.testing.assert_close(kl, wanted)


@pytest.mark.parametrize("merge", [precision_weighted, residual])
def test_merges_broadcast_and_keep_the_event(merge):
    (seen, _), (_, expected) = gaussians(4), gaussians(5, 4)
    merged = merge(seen, expected)
    assert (merged.batch_shape, merged.event_shape) == ((5, 4), (3,))


@pytest.mark.parametrize("merge", [precision_weighted, residual])
def test_merges_are_of_gaussians(merge):
    bits = dist.Bernoulli(torch.rand(4, 3)).to_event(1)
    with pytest.raises(
        ValueError, match=f"{merge.__name__}: came a Bernoulli, wanted the diagonal"
    ):
        merge(gaussians(4)[0], bits)


# ---------------------------------------------------------------------------------------------
# What guides draw, and in which order


@pytest.mark.parametrize(
    ("guide", "order"),
    [("bottom-up", ["z1", "z2"]), ("ladder", ["z2", "z1"]), ("residual", ["z2", "z1"])],
)
def test_order_and_shapes(guide, order):
    _, q = pair(guide)
    batch = Batch({"x": rows(7)})
    trace = poutine.trace(q).get_trace(batch)
    assert [name for name in trace.stochastic_nodes if name != "data"] == order
    assert [list(z.shape) for z in q(batch)] == [[7, Z], [7, Z]]
    with pyro.plate("particles", 3, dim=-2):
        z1, z2 = q(batch)
    assert (z1.shape, z2.shape) == ((3, 7, Z), (3, 7, Z))
    assert not torch.equal(z1[0], z1[1])


def test_names_are_arguments():
    posteriors = [DiagonalGaussian(mlp((n, 4)), (2,)) for n in (3, 2)]
    guide = BottomUpGuide(posteriors, "code", "image")
    trace = poutine.trace(guide).get_trace(Batch({"image": rows(4)}))
    assert {"code1", "code2"} <= set(trace.nodes)


def test_what_a_top_down_guide_may_see():
    """With skip and informed posteriors: z1's mean depends on x, z2 and z3, by merge and by itself."""

    class Seen(nn.Module):
        def forward(self, *parents):
            seen.append([parent.shape[-1] for parent in parents])
            return dist.Normal(sum(p.mean(-1, keepdim=True) for p in parents), 1.0).to_event(1)

    for informed, skip, wanted in [
        (False, False, [[7], [6], [1], [5], [1]]),
        (True, False, [[7], [6, 1], [1], [5, 1], [1]]),
        (True, True, [[7], [6, 1], [1], [5, 1, 1], [1, 1]]),
    ]:
        seen: list[list[int]] = []
        stages = [mlp((X, 5)), mlp((5, 6)), mlp((6, 7))]
        guide = TopDownGuide(
            *(stages, [Seen() for _ in range(3)], [Seen() for _ in range(3)], residual),
            *(informed, skip),
        )
        guide(Batch({"x": rows(4)}))
        assert seen == wanted  # posterior of z3; of z2 and the model's; of z1 and the model's


def test_as_many_of_each():
    parts = [nn.Identity(), nn.Identity()]
    with pytest.raises(ValueError, match="came 2 stages, 2 posteriors and 1 layers, wanted one of"):
        TopDownGuide(parts, parts, parts[:1], residual)


def test_discrete_layers_are_not_merged():
    layers = [Bernoulli(mlp((2, 2)), (2,)), StandardNormal(2)]
    posteriors = [DiagonalGaussian(mlp((3, 4)), (2,)) for _ in range(2)]
    guide = TopDownGuide([nn.Identity(), nn.Identity()], posteriors, layers, precision_weighted)
    with pytest.raises(ValueError, match="came a Bernoulli"):
        guide(Batch({"x": rows(4)}))


# ---------------------------------------------------------------------------------------------
# Exact posteriors


@pytest.mark.parametrize("guide", EXACT)
def test_exact_posteriors_have_constant_weights(guide):
    """Every bound is log p(x), at every draw."""
    model, q = pair(guide)
    batch = Batch({"x": rows()})
    wanted = model.evidence(batch["x"])
    for objective in (elbo(1), elbo(3), iwae(4), renyi(0.5, 3)):
        torch.testing.assert_close(objective.rows(model, q, batch), wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("guide", EXACT)
def test_bounds_of_other_guides(guide):
    """exp(log w) has the mean p(x), and the bounds are in order, to standard errors."""
    model, q = wrong(guide)
    x = rows()
    batch = Batch({"x": x})
    exact = model.evidence(x)
    with torch.no_grad():
        particles = table(model, q, batch, number=50_000)
        rate = MonteCarlo()(particles, torch.zeros(()))
        log_p, kl = particles.summed(particles.likelihood), particles.summed(rate)
        assert log_p is not None
        assert kl is not None
        log_w = log_p - kl
    assert sigmas((log_w - exact).exp() - 1).abs().max() < SIGMAS
    fives = log_w.reshape(-1, 5, len(x))
    iwae_5 = torch.logsumexp(fives, 1) - math.log(5)
    assert sigmas(iwae_5 - fives.mean(1)).min() > SIGMAS
    assert sigmas(exact - iwae_5).min() > SIGMAS


def test_evaluation_finds_the_evidence_and_the_rates():
    model, q = wrong("ladder")
    x = rows(40)
    evaluation = evaluate(model, q, Batch({"x": x}), 2000, widen=False)
    torch.testing.assert_close(evaluation.log_p, model.evidence(x), atol=0.05, rtol=0)
    assert {site: list(rate.shape) for site, rate in evaluation.rate.items()} == {
        "z2": [Z],
        "z1": [Z],
    }
    assert set(evaluation.active) == {"z1", "z2"}


# ---------------------------------------------------------------------------------------------
# Gradients


def differences(pair, objectives, rows_of=100, repeats=30):
    x = Batch({"x": rows(rows_of)})
    return torch.stack(
        [
            torch.sub(*(value_and_gradient(o, *pair, x, seed=seed)[1] for o in objectives))
            for seed in range(repeats)
        ]
    )


@pytest.mark.parametrize("guide", EXACT)
def test_dreg_agrees_with_pathwise(guide):
    found = differences(wrong(guide), [iwae(4, e) for e in ("dreg", "pathwise")])
    assert found.abs().max() > 1e-6
    assert sigmas(found).abs().max() < SIGMAS


@pytest.mark.parametrize("guide", EXACT)
def test_dreg_at_the_exact_posterior_has_no_variance(guide):
    """Weights are constant, so that all that is left for q is 0, for the shared conditionals as well
    as far as they are q's: the gradient is that of log p(x) at every draw."""
    model, q = pair(guide)
    batch = Batch({"x": rows()})
    gradients = [value_and_gradient(iwae(4, "dreg"), model, q, batch, seed=s)[1] for s in (1, 2)]
    numbers = sum(p.numel() for p in model.parameters())
    of_guide = [gradient[numbers:] for gradient in gradients]
    for gradient in of_guide:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-10, rtol=0)


@pytest.mark.parametrize("guide", EXACT)
def test_dreg_knows_a_beta_of_each_layer(guide):
    rate = Beta({"z1": 0.4, "z2": 1.5})
    objectives = [Objective(Renyi(0.0), e, rate, num_particles=4) for e in ("dreg", "pathwise")]
    assert sigmas(differences(wrong(guide), objectives)).abs().max() < SIGMAS


# ---------------------------------------------------------------------------------------------
# Rates of each layer


def test_the_kl_that_is_known_in_closed_form():
    """From the top down that of every layer, from the bottom up that of the topmost alone."""
    x = Batch({"x": rows()})
    for guide in TOP_DOWN:
        plan = plan_of(*wrong(guide), x)
        assert plan.analytic == {"z1", "z2"}
        assert plan.notes == ()
    plan = plan_of(*wrong("bottom-up"), x)
    assert plan.analytic == {"z2"}
    assert plan.notes == (
        "site 'z1': Monte Carlo KL, since the model draws z2 before it, the guide does not",
    )


@pytest.mark.parametrize("guide", EXACT)
def test_closed_forms_are_what_is_drawn_in_the_mean(guide):
    objectives = [mean_field(20), elbo(20)]
    x, both = Batch({"x": rows(50)}), wrong(guide)
    values = [
        torch.sub(*(value_and_gradient(o, *both, x, seed=seed)[0] for o in objectives))
        for seed in range(30)
    ]
    found = torch.stack(values)
    assert found.abs().min() > 1e-6
    assert sigmas(found).abs() < SIGMAS
    assert sigmas(differences(both, [mean_field(4), elbo(4)])).abs().max() < SIGMAS


def kl_by_hand(particles, site):
    """[K, B, D]."""
    q, p = (sites[site]["fn"].base_dist for sites in (particles.guide, particles.model))
    ratio = q.scale / p.scale
    return 0.5 * (ratio**2 + ((q.loc - p.loc) / p.scale) ** 2 - 1) - ratio.log()


@pytest.mark.parametrize("guide", TOP_DOWN)
def test_rates_of_each_layer(guide):
    model, q = wrong(guide)
    with torch.no_grad():
        particles = table(model, q, Batch({"x": rows()}), number=5)
    kl = {site: kl_by_hand(particles, site) for site in ("z1", "z2")}
    now = torch.tensor(2.0)

    def total(rate):
        return {site: float(term.sum()) for site, term in rate(particles, now).items()}

    assert total(Analytic()) == pytest.approx({s: float(k.sum()) for s, k in kl.items()})
    warm = Beta({"z1": linear(8), "z2": 0.5}, Analytic())
    assert total(warm) == pytest.approx(
        {"z1": 0.25 * float(kl["z1"].sum()), "z2": 0.5 * float(kl["z2"].sum())}
    )
    means = {site: float(term.sum(-1).mean()) for site, term in kl.items()}
    assert means["z1"] != pytest.approx(means["z2"])
    floor = sum(means.values()) / 2  # between the two
    bits = FreeBits(floor, per="site")
    assert total(bits) == pytest.approx(
        {site: max(floor, mean) * 5 * 6 for site, mean in means.items()}
    )
    low = min(means, key=lambda site: means[site])
    other = FreeBits(floor, per={"low": [low]})
    assert total(other) == pytest.approx(
        {site: (floor if site == low else mean) * 5 * 6 for site, mean in means.items()}
    )
    per_dimension = FreeBits(linear(4, 0.0, 2 * floor), per="dimension")
    wanted = {s: float(k.mean((0, 1)).clamp(min=floor).sum()) * 5 * 6 for s, k in kl.items()}
    assert total(per_dimension) == pytest.approx(wanted)


@pytest.mark.parametrize("guide", EXACT)
@pytest.mark.parametrize(
    "rate",
    [
        FreeBits(0.3, per="site"),
        FreeBits(0.3),
        Balance(),
        Beta({"z1": linear(100), "z2": linear(200)}, Analytic()),
    ],
    ids=["site", "dimension", "balance", "warm-up"],
)
def test_rates_train(guide, rate):
    model, q = wrong(guide)
    objective = Objective(rate=rate, num_particles=2)
    value, gradient = value_and_gradient(objective, model, q, Batch({"x": rows()}))
    assert value.isfinite()
    assert gradient.isfinite().all()


# ---------------------------------------------------------------------------------------------
# Sharing


@pytest.mark.parametrize("guide", TOP_DOWN)
def test_the_models_conditionals_are_shared(guide):
    model, q = wrong(guide)
    assert q.layers[0] is model.layers[0]
    shared = list(model.layers[0].parameters())
    everything = parameters(model, q)
    assert len(everything) == len({id(p) for p in everything})
    loss = elbo()(model, q)
    assert len(list(loss.parameters())) == len(everything)
    # the gradient is that of both uses
    batch = Batch({"x": rows()})

    def gradient(objective):
        pyro.set_rng_seed(1)
        return torch.autograd.grad(objective.differentiable_loss(model, q, batch), shared)

    with_both = gradient(elbo(50))
    own = [(p, p.detach().clone().requires_grad_()) for p in shared]
    q.layers[0] = type(q.layers[0])(nn.Linear(Z, Z), (Z,), q.layers[0].unit)  # a guide of its own
    for (_, copy), here in zip(own, q.layers[0].parameters(), strict=True):
        here.data = copy.data
    in_model = gradient(elbo(50))
    pyro.set_rng_seed(1)
    apart = elbo(50).differentiable_loss(model, q, batch)
    in_guide = torch.autograd.grad(apart, list(q.layers[0].parameters()))
    for both, first, second in zip(with_both, in_model, in_guide, strict=True):
        torch.testing.assert_close(both, first + second)
        assert second.abs().max() > 1e-3


@pytest.mark.parametrize(
    "objective",
    [rws(7), chi(7), piwae(2, 6), Objective(Split(Renyi(0.0), Elbo()), "dreg", num_particles=7)],
    ids=repr,
)
@pytest.mark.parametrize("guide", EXACT)
def test_what_is_shared_follows_the_models_goal_alone(guide, objective):
    """As it does beside a guide that has copies of the model's conditionals."""
    model, q = wrong(guide)
    _, apart = wrong(guide)
    batch, own = Batch({"x": rows()}), list(model.parameters())
    shared = {id(p) for p in own}
    kept = [id(p) not in shared for p in q.parameters()]
    gradients = []
    for program in (q, apart):
        pyro.set_rng_seed(1)
        loss = objective.differentiable_loss(model, program, batch)
        gradients.append(flat_gradient(loss, [*own, *compress(program.parameters(), kept)]))
    assert_same(*gradients)
    assert gradients[0].abs().max() > 1e-3


@pytest.mark.parametrize("guide", TOP_DOWN)
def test_stock_pyro_moves_a_shared_parameter_once(guide):
    """Plain gradient descent by SVI is a step by hand."""
    model, q = wrong(guide)
    batch = Batch({"x": rows()})
    _, gradient = value_and_gradient(elbo(), model, q, batch)
    own = parameters(model, q)
    before = torch.cat([p.detach().flatten() for p in own])
    pyro.clear_param_store()
    svi = SVI(Observed(model), q, PyroOptim(torch.optim.SGD, {"lr": 0.01}), loss=elbo())
    pyro.set_rng_seed(1)
    svi.step(batch)
    after = torch.cat([p.detach().flatten() for p in own])
    torch.testing.assert_close(after, before - 0.01 * gradient)
