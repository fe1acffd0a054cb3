"""A critic's density ratio: what it learns, and whose gradient is whose."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.nn import mlp
from pyro_vae.objectives.penalties import Adversarial
from pyro_vae.objectives.penalties.latent import Latent
from tests.row_pairs import RowPair, gradient
from tests.small_pairs import assert_same

STEP = torch.zeros(())


class Quadratic(nn.Module):
    """T(z) = a + z' b + z' C z, which has the log ratio of any two Gaussians."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(dims))
        self.c = nn.Parameter(torch.zeros(dims, dims))

    def forward(self, z: Tensor) -> Tensor:
        return self.a + z @ self.b + ((z @ self.c) * z).sum(-1)


def trained(penalty: Adversarial, pair: RowPair) -> tuple[float, float]:
    """The estimate on fresh draws after the critic has seen many, and its standard error."""
    pyro.set_rng_seed(0)
    parameters = list(penalty.critic.parameters())
    seen = pair.particles()
    state = torch.get_rng_state()
    optimizer = torch.optim.LBFGS(parameters, max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        torch.set_rng_state(state)
        value = penalty(seen, STEP)
        for parameter in parameters:
            parameter.grad = gradient(value, [parameter]).reshape(parameter.shape)
        return penalty.cross_entropy(Latent(seen, None, "test")).detach()

    optimizer.step(loss)
    with torch.no_grad():
        found = torch.stack([penalty(pair.particles(), STEP) for _ in range(8)])
    return float(found.mean()), float(found.std() / 8**0.5)


def test_against_the_prior_it_finds_the_kl_of_gaussians():
    loc, scale = 0.7, 0.6
    pair = RowPair(torch.full((4000, 1), loc), torch.full((4000, 1), scale))
    value, error = trained(Adversarial(Quadratic(1)), pair)
    wanted = (scale**2 + loc**2 - 1) / 2 - math.log(scale)
    assert abs(value - wanted) < 4 * error + 0.03
    assert wanted > 0.3


class Line(RowPair):
    """Means on a line, so that q(z) is a Gaussian with a correlation."""

    @classmethod
    def correlated(cls, rows: int, slope: float) -> Line:
        quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(rows) + 0.5) / rows)
        loc = slope * quantiles[:, None].expand(rows, 2)
        return cls(loc.clone(), torch.full((rows, 2), 0.5))


def test_against_permuted_dimensions_it_finds_the_total_correlation():
    pair = Line.correlated(4000, 0.8)
    value, error = trained(Adversarial(Quadratic(2), against="permuted"), pair)
    variance = 0.8**2 + 0.5**2
    wanted = -0.5 * math.log(1 - (0.8**2 / variance) ** 2)
    assert abs(value - wanted) < 4 * error + 0.03
    assert wanted > 0.3


@pytest.mark.parametrize("against", ["prior", "permuted"])
def test_encoder_and_critic_have_their_own_gradients(against: str):
    pair, speed, weight = RowPair.random(6, 3), 0.3, 2.5
    penalty = Adversarial(mlp((3, 8, 1), nn.Tanh), weight, against, speed)
    pyro.set_rng_seed(2)
    particles = pair.particles(number=2)
    state = torch.get_rng_state()
    value = penalty(particles, STEP)
    torch.set_rng_state(state)
    latent = Latent(particles, None, "test")
    z = latent.draws
    if against == "prior":
        other = latent.from_prior()
    else:
        order = torch.rand_like(z).argsort(1)
        other = torch.stack(
            [torch.stack([z[k, order[k, :, d], d] for d in range(3)], 1) for k in range(2)]
        )
        assert_same(other.sort(1).values, z.sort(1).values)
        assert (other - z).abs().max() > 0.1
    critic = penalty.critic
    ratio = critic(z).mean()
    of_q, of_other = critic(z.detach()), critic(other.detach())
    cross_entropy = -of_q.sigmoid().log().mean() - (1 - of_other.sigmoid()).log().mean()
    assert_same(value, weight * ratio)
    encoder, own = [pair.loc, pair.scale], list(critic.parameters())
    assert_same(gradient(value, encoder), gradient(weight * ratio, encoder))
    assert_same(gradient(value, own), gradient(speed * cross_entropy, own))
    assert gradient(value, [pair.prior_loc]).abs().max() == 0
    assert gradient(value, own).abs().max() > 1e-3


def test_cross_entropy_of_a_blind_critic_is_log_4():
    pair = RowPair.random(6, 3)
    found = Adversarial(Quadratic(3)).cross_entropy(Latent(pair.particles(), None, "test"))
    assert_same(found, torch.tensor(math.log(4)))
    assert_same(found, 2 * softplus(torch.zeros(())))


def test_running_statistics_move_once():
    pair = RowPair.random(6, 3)
    norm = nn.BatchNorm1d(3, momentum=0.5)
    penalty = Adversarial(nn.Sequential(norm, nn.Linear(3, 1)), against="permuted")
    particles = pair.particles()
    penalty(particles, STEP)
    z = particles.samples["z"][0]
    assert_same(norm.running_mean, 0.5 * z.mean(0))
    assert int(norm.num_batches_tracked or 0) == 1


def test_unknown_opponent():
    with pytest.raises(ValueError, match=r"Adversarial: came against='q', wanted one of 'prior'"):
        Adversarial(Quadratic(1), against="q")
