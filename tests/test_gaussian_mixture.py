"""A mixture as the prior: its density, draws and groups, and pairs that have it."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from pyro_vae.batch import Batch
from pyro_vae.conditionals import GaussianMixture
from pyro_vae.evaluation.likelihood import evaluate
from pyro_vae.linter import check
from pyro_vae.objectives import iwae, mean_field
from pyro_vae.pairs import table, vae
from pyro_vae.training.fit import fit
from tests.small_pairs import assert_same, flat_gradient, parameters


def moved(*shape: int, components: int = 3) -> GaussianMixture:
    prior = GaussianMixture(*shape, components=components)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return prior


@pytest.mark.parametrize("shape", [(2,), (2, 3), ()], ids=str)
def test_density_is_the_weighted_sum(shape: tuple[int, ...]):
    prior = moved(*shape)
    z = torch.randn(5, *shape)
    weights = prior.logits.softmax(0)
    scale = math.sqrt(1 - 0.7**2) * (1e-2 + torch.nn.functional.softplus(prior.raw_scale))
    log_p = torch.distributions.Normal(prior.loc, scale).log_prob(z.unsqueeze(1))
    each = weights.log() + log_p.reshape(5, 3, -1).sum(2)
    assert_same(prior().log_prob(z), each.logsumexp(1))
    assert_same(prior.responsibilities(z), each.softmax(1))


def test_at_the_start_a_draw_has_the_variance_of_a_standard_normal():
    prior = GaussianMixture(1, components=2000)
    draws = prior().sample((20000,))
    error = draws.var() * math.sqrt(2 / len(draws) + 2 / 2000)  # of the draws and of the means
    assert abs(draws.var() - 1) < 4 * error


def test_draws_are_those_of_the_density():
    prior = moved(1)
    draws = prior().sample((4000,)).squeeze(-1)
    for edge in (-0.5, 0.0, 0.7):
        grid = torch.linspace(-12, edge, 20001)
        share = torch.trapezoid(prior().log_prob(grid[:, None]).exp(), grid)
        error = (share * (1 - share) / len(draws)).sqrt()
        assert abs((draws < edge).double().mean() - share) < 4 * error


def test_pairs_take_it_and_train_it():
    batch = Batch({"x": (torch.rand(40, 6) < 0.4).double()})
    model, guide = vae(batch, latent=2, hidden=6, prior=partial(GaussianMixture, components=4))
    assert check(model, guide, batch).ok
    for objective in (mean_field(), iwae(5, "dreg")):  # the rate is taken at the draws
        loss = objective.differentiable_loss(model, guide, batch)
        gradient = flat_gradient(loss, parameters(model.prior))
        assert (gradient != 0).sum() == 4 + 2 * 8
    for level in ("eager", "traced"):
        run = fit(model, guide, batch, iwae(5), steps=2, compile=level, progress=False)
        assert run.level.startswith(level)


def test_it_finds_groups_of_rows():
    """Two groups of rows are two components, which a standard normal prior does not say."""
    torch.manual_seed(0)
    group = torch.arange(200) % 2
    x = 3.0 * (2 * group[:, None] - 1) + torch.randn(200, 4)
    batch = Batch({"real": x})
    prior = GaussianMixture(1, components=2)
    model, guide = table(batch, latent=1, hidden=16, prior=prior)
    fit(
        model,
        guide,
        batch,
        iwae(10, "dreg"),
        steps=300,
        batch_size=100,
        optimizer=partial(torch.optim.Adam, lr=0.02),
        progress=False,
    )
    z = guide(batch)
    z = next(iter(z.values())) if isinstance(z, dict) else z
    found = prior.responsibilities(z).argmax(-1)
    agreed = (found == group).double().mean()
    assert max(agreed, 1 - agreed) > 0.95
    assert evaluate(model, guide, batch, 50, compile="eager").log_p.isfinite().all()


@pytest.mark.parametrize("options", [{"components": 0}, {"spread": 1.0}, {"spread": 0}])
def test_refuses(options: dict[str, float]):
    with pytest.raises(ValueError, match="GaussianMixture: came components="):
        GaussianMixture(2, **options)  # type: ignore[arg-type]


def test_says_what_it_is():
    assert "[2], components=10" in repr(GaussianMixture(2))
