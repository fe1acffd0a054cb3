"""KL to the experts of single sites, and the objectives that have it, against closed forms."""

from __future__ import annotations

from functools import partial

import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pyro_vae.batch import Batch
from pyro_vae.objectives import (
    ConditionalBottleneck,
    Elbo,
    ExpertKL,
    Objective,
    Sum,
    beta_vae,
    iwae,
    jmvae,
    linear,
    mean_field,
    mvae,
    mvtcae,
    only,
)
from pyro_vae.objectives.specs import parse
from pyro_vae.training.fit import fit
from tests.modality_pairs import SIZES, data, guide_of, linear_model
from tests.small_pairs import Guide, LinearModel, assert_same, flat_gradient, parameters, table
from tests.small_pairs import data as rows_of_x
from tests.test_guides_experts import surrogates

STEP = torch.tensor(5)


def by_hand(guide, batch: Batch) -> Tensor:
    """Σ_m KL(q || q_m) of each row, out of means and scales."""
    q, experts = guide.posterior(batch)
    q, total = q.base_dist, torch.zeros(len(batch))
    for expert, counts in experts.values():
        m, s = expert.base_dist.loc, expert.base_dist.scale
        kl = (s / q.scale).log() + (q.scale**2 + (q.loc - m) ** 2) / (2 * s**2) - 0.5
        total = total + torch.where(counts, kl.sum(-1), 0.0)
    return total


def prior_kl(guide, batch: Batch) -> Tensor:
    q = guide.posterior(batch)[0].base_dist
    return kl_divergence(Normal(q.loc, q.scale), Normal(0.0, 1.0)).sum(-1)


PAIRS = {"product": lambda: (model := linear_model(), guide_of(model)), "joint": surrogates}


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("pair", PAIRS)
def test_it_is_the_closed_form(pair: str, number: int):
    model, guide = PAIRS[pair]()
    batch = data()
    found = ExpertKL(0.5)(table(model, guide, batch, number=number), STEP)
    assert_same(found, 0.5 * by_hand(guide, batch))
    assert found[[3, 7]].tolist() == [0, 0]  # rows that lack all
    assert (found[::4] > 0.01).all()
    wanted = parameters(guide)
    gradients = [flat_gradient(it.sum(), wanted) for it in (found, 0.5 * by_hand(guide, batch))]
    assert_same(*gradients)
    assert gradients[0].abs().max() > 0.01


def test_a_weight_may_be_a_schedule():
    model, guide = PAIRS["product"]()
    particles = table(model, guide, data())
    assert_same(ExpertKL(linear(10))(particles, STEP), ExpertKL(0.5)(particles, STEP))
    assert repr(ExpertKL(0.5, "z")) == "ExpertKL(0.5, site='z')"


def losses(objectives, model, guide, batch) -> list[Tensor]:
    found = []
    for objective in objectives:
        pyro.set_rng_seed(2)
        found.append(objective.differentiable_loss(model, guide, batch))
    return found


def test_jmvae_by_hand():
    model, guide = surrogates()
    batch = data()
    found, plain = losses([jmvae(0.3), mean_field()], model, guide, batch)
    wanted = plain + 0.3 * by_hand(guide, batch).sum()
    assert_same(found, wanted)
    every = parameters(model, guide)
    assert_same(flat_gradient(found, every), flat_gradient(wanted, every))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_mvtcae_by_hand(alpha: float):
    """Row by row (n - alpha) / n of our loss is the paper's, n the modalities that the row has."""
    model = linear_model()
    guide, batch, beta = guide_of(model, prior_expert=False), data(), 2.5
    for k in range(len(batch)):
        row = batch.rows(slice(k, k + 1))
        n = sum(int(row.seen(site).sum()) for site in SIZES)
        found, distortion = losses(
            [mvtcae(alpha, beta), beta_vae(0.0, analytic=True)], model, guide, row
        )
        kl, to_experts = prior_kl(guide, row).sum(), by_hand(guide, row).sum()
        if n < 2:
            assert_same(found, distortion + beta * kl)
            continue
        paper = (n - alpha) / n * distortion
        paper = paper + beta * ((1 - alpha) * kl + alpha / n * to_experts)
        assert_same((n - alpha) / n * found, paper)


def test_a_row_of_one_modality_is_an_elbo_under_mvtcae():
    """Its exact expert is left alone, by alpha = 1 too."""
    model = linear_model()
    guide = guide_of(model, prior_expert=False, posterior=True)
    one, every = data().without(["y"]), parameters(guide)
    gradients = [
        flat_gradient(loss, every)
        for loss in losses([mvtcae(1.0), mvtcae(0.5), mean_field()], model, guide, one)
    ]
    assert_same(gradients[0], gradients[2])
    assert_same(gradients[1], gradients[2])


def test_mvae_by_hand():
    model = linear_model()
    guide, batch = guide_of(model), data()
    (found,) = losses([mvae(["x", "y"])], model, guide, batch)
    pyro.set_rng_seed(2)
    views = [batch, only("x")(batch), only("y")(batch)]
    wanted = sum(mean_field().differentiable_loss(model, guide, view) for view in views)
    assert_same(found, wanted)


def test_as_text():
    assert repr(parse("mvae:sites=('x', 'y'),beta=2")) == repr(mvae(("x", "y"), 2))
    assert isinstance(parse("mvae:sites=('x',)"), Sum)
    warm = "jmvae:alpha=linear(10, 0, 0.1),beta=linear(10)"
    assert repr(parse(warm)) == repr(jmvae(linear(10, 0, 0.1), linear(10)))
    assert repr(parse("mvtcae:alpha=0.5,beta=2")) == repr(mvtcae(0.5, 2))
    assert repr(ConditionalBottleneck(0.5, 2.0)) == "ConditionalBottleneck(0.5, 2.0)"


@pytest.mark.parametrize(
    "objective",
    [jmvae(0.2), mvtcae(0.5), mvae(tuple(SIZES)), Objective(Elbo(), penalties=[ExpertKL()])],
    ids=["jmvae", "mvtcae", "mvae", "elbo"],
)
def test_traced_is_eager(objective):
    histories = []
    for level in ("eager", "traced"):
        torch.manual_seed(0)
        model, guide = surrogates()
        optimizer = partial(torch.optim.Adam, lr=0.01)
        run = fit(
            *(model, guide, data(8), objective),
            steps=4,
            batch_size=4,
            optimizer=optimizer,
            compile=level,
            progress=False,
        )
        assert run.level.startswith(level)
        histories.append(torch.tensor([record["loss"] for record in run.history]))
    assert_same(*histories)


def test_iwae_takes_it():
    """It adds what it adds, whatever the bound."""
    model, guide = surrogates()
    batch = data()
    with_it = iwae(4, "dreg", penalties=[ExpertKL(0.3)])
    found, plain = losses([with_it, iwae(4, "dreg")], model, guide, batch)
    assert_same(found - plain, 0.3 * by_hand(guide, batch).sum())


# --- refusals -----------------------------------------------------------------------------------


def test_refuses_guides_without_experts_and_mixtures():
    with pytest.raises(ValueError, match=r"came no site, the guide's sites with experts are ..;"):
        jmvae().differentiable_loss(LinearModel(), Guide(), rows_of_x())
    model = linear_model()
    mixture = guide_of(model, [("x",), ("y",)])
    with pytest.raises(ValueError, match="KL of a StratifiedMixture to a Normal is not known"):
        jmvae().differentiable_loss(model, mixture, data())
    with pytest.raises(ValueError, match="came site='w'"):
        ExpertKL(site="w")(table(model, guide_of(model), data()), STEP)


@pytest.mark.parametrize("alpha", [1.5, -0.1])
def test_mvtcae_refuses(alpha: float):
    with pytest.raises(ValueError, match="wanted 0 to 1"):
        mvtcae(alpha)


def test_mvae_refuses_one_word():
    for build in (lambda: mvae("x"), lambda: parse("mvae:sites=x")):
        with pytest.raises(ValueError, match=r"mvae: came sites='x', wanted several: sites=\("):
            build()


def test_mvae_refuses_sites_that_the_data_lack():
    model = linear_model()
    with pytest.raises(ValueError, match=r"only: came .'sound'., the batch holds .'x', 'y'"):
        mvae(["x", "sound"]).differentiable_loss(model, guide_of(model), data())
