"""Bounds: their values, and weights, curvature and reward against autodiff."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_vae.objectives.bounds import Bound, Elbo, Renyi
from tests.small_pairs import sigmas

SMOOTH = [Elbo(), Renyi(0.0), Renyi(0.5), Renyi(-1.0), Renyi(2.0), Renyi(0.999)]
VR_MAX = Renyi(-math.inf)


def log_weights(particles: int = 5, rows: int = 4, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(particles, rows) - 3


@pytest.mark.parametrize("bound", SMOOTH, ids=repr)
@pytest.mark.parametrize("particles", [1, 5])
def test_closed_forms_equal_autodiff(bound: Bound, particles: int):
    log_w = log_weights(particles)
    torch.testing.assert_close(bound.weights(log_w), Bound.weights(bound, log_w))
    torch.testing.assert_close(bound.curvature(log_w), Bound.curvature(bound, log_w))


@pytest.mark.parametrize("bound", SMOOTH, ids=repr)
def test_weights_sum_to_one(bound: Bound):
    torch.testing.assert_close(bound.weights(log_weights()).sum(0), torch.ones(4))


def test_closed_forms_survive_weights_that_underflow():
    log_w = torch.tensor([[0.0], [-5000.0]])
    assert Renyi(0.0).curvature(log_w).flatten().tolist() == [0, 1]
    assert Renyi(0.0)(log_w - 1e5) == pytest.approx(-1e5 - math.log(2))


def test_autodiff_survives_weights_that_underflow():
    """h / w is 0 / 0 there, and whatever it is meets no gradient."""

    class Plain(Bound):
        def __call__(self, log_w: Tensor) -> Tensor:
            return torch.logsumexp(log_w, 0) - math.log(len(log_w))

    curvature = Plain().curvature(torch.tensor([[0.0, 0.0], [-5000.0, -1.0]]))
    assert curvature[:, 0].tolist() == [0, 0]
    exact = Renyi(0.0).curvature(torch.tensor([[0.0], [-1.0]]))
    torch.testing.assert_close(curvature[:, 1:], exact)


def test_vr_max_takes_the_largest_weight():
    log_w = torch.tensor([[1.0, 2.0], [3.0, -1.0], [3.0, 0.0]])
    assert VR_MAX(log_w).tolist() == [3.0, 2.0]
    assert VR_MAX.weights(log_w).tolist() == [[0, 1], [1, 0], [0, 0]]  # one of equals
    assert not VR_MAX.smooth


@pytest.mark.parametrize("bound", [*SMOOTH, VR_MAX], ids=repr)
def test_one_particle_is_the_elbo(bound: Bound):
    log_w = log_weights(1)
    torch.testing.assert_close(bound(log_w), log_w[0])
    torch.testing.assert_close(bound.weights(log_w), torch.ones(1, 4))


def test_renyi_falls_with_alpha_from_max_to_min_and_passes_the_elbo():
    log_w = log_weights()
    alphas = [-math.inf, -2.0, 0.0, 0.5, 0.999999, 1.000001, 3.0, 2000.0]
    values = torch.stack([Renyi(alpha)(log_w) for alpha in alphas])
    assert (values.diff(dim=0) < 0).all()
    torch.testing.assert_close(values[4], Elbo()(log_w), atol=1e-4, rtol=0)
    torch.testing.assert_close(values[-1], log_w.min(0).values, atol=1e-2, rtol=0)


def test_renyi_by_hand():
    log_w = torch.tensor([[math.log(1.0)], [math.log(4.0)]])
    assert Renyi(0.0)(log_w).item() == pytest.approx(math.log(2.5))
    assert Renyi(0.5)(log_w).item() == pytest.approx(2 * math.log(1.5))
    assert Renyi(-1.0)(log_w).item() == pytest.approx(0.5 * math.log(8.5))


@pytest.mark.parametrize("bound", [*SMOOTH, VR_MAX], ids=repr)
def test_the_guarantee_holds_at_few_particles(bound: Bound):
    """Log-normal weights with E[w] = 1: a lower bound must not exceed log 1 = 0 on average."""
    log_w = torch.randn(4, 20_000) - 0.5
    excess = sigmas(bound(log_w))
    if bound.guarantee == "lower bound":
        assert excess < 0
    else:
        assert bound.guarantee == "no bound"
        assert excess > 5


@pytest.mark.parametrize("bound", [*SMOOTH, VR_MAX], ids=repr)
def test_the_reward_makes_the_score_term_unbiased(bound: Bound):
    """E[bound] under w = f(y), y ~ Bernoulli(p): its derivative by p is known by enumeration."""
    p, particles = torch.tensor(0.3, requires_grad=True), 3
    log_f = torch.tensor([-1.0, 1.5])
    outcomes = torch.cartesian_prod(*[torch.arange(2)] * particles).T  # [K, 2^K]
    log_prob = torch.where(outcomes == 1, p.log(), (1 - p).log())
    log_w = log_f[outcomes]
    (exact,) = torch.autograd.grad((log_prob.sum(0).exp() * bound(log_w)).sum(), p)

    log_prob = torch.where(outcomes == 1, p.log(), (1 - p).log())
    weight = log_prob.sum(0).exp().detach()
    score_term = (weight * (bound.reward(log_w) * log_prob).sum(0)).sum()
    torch.testing.assert_close(torch.autograd.grad(score_term, p)[0], exact)


@pytest.mark.parametrize("alpha", [1.0, math.nan, math.inf])
def test_renyi_refuses(alpha: float):
    with pytest.raises(ValueError, match="Renyi"):
        Renyi(alpha)


def test_names():
    assert [repr(bound) for bound in (Elbo(), Renyi(), Renyi(0.5), VR_MAX)] == [
        *("elbo", "iwae", "renyi(0.5)", "vr_max")
    ]
