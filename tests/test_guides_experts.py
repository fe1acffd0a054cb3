"""Experts: products and mixtures of them row by row, against closed forms."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae.batch import Batch
from pyro_vae.conditionals import DiagonalGaussian, StandardNormal, StudentT
from pyro_vae.guides import ExpertsGuide, JointGuide, SurrogatesGuide
from pyro_vae.models import MultimodalModel
from pyro_vae.objectives import elbo, iwae
from tests.modality_pairs import SIZES, Message, data, evidence, guide_of, linear_model
from tests.small_pairs import assert_same, table, value_and_gradient

SUBSETS: dict[str, list[tuple[str, ...]]] = {
    "product": [("x", "y")],
    "mixture": [("x",), ("y",)],
    "mixture of products": [("x",), ("y",), ("x", "y")],
    "mixture that counts x twice": [("x",), ("x",), ("y",)],
}


# --- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [elbo(), elbo(3), iwae(4)], ids=repr)
def test_messages_multiply_to_the_exact_posterior(objective):
    """Every weight is log p, whatever a row lacks: both sites, either, or nothing at all."""
    model, batch = linear_model(), data()
    exact = evidence(model, batch)
    assert_same(objective.rows(model, guide_of(model), batch), exact)
    assert exact[[3, 7]].tolist() == [0, 0]


def test_without_the_prior_expert_one_expert_is_the_posterior_itself():
    """As for surrogates: q(z | x) alone is what the expert says."""
    model, batch = linear_model(), data()
    guide = guide_of(model, prior_expert=False, posterior=True)
    rows = iwae(4).rows(model, guide, batch)
    assert_same(rows[1::4], evidence(model, batch)[1::4])
    assert_same(rows[2::4], evidence(model, batch)[2::4])
    assert ((rows - evidence(model, batch))[::4].abs() > 0.01).all()  # the prior counts twice


def test_learned_exponents_add_up_to_one():
    model, batch = linear_model(), data(4)
    experts = {site: Message(p) for site, p in model.likelihoods.items()}
    guide = ExpertsGuide(experts, model.prior, prior_expert=True, weighted=True)
    assert guide.powers is not None
    guide.powers.data = torch.tensor([[0.3, -1.0], [0.9, 0.2], [-0.4, 0.5]])  # x, y, prior
    fn, _ = guide.posterior(batch)
    parts = [experts[site](batch[site]).base_dist for site in SIZES]
    parts.append(dist.Normal(torch.zeros(4, 2), torch.ones(4, 2)))
    for row, has in enumerate([(0, 1, 2), (0, 2), (1, 2), (2,)]):
        exponents = guide.powers[list(has)].softmax(0)
        precision = torch.stack([parts[m].scale.expand(4, 2)[row] ** -2 for m in has])
        loc = torch.stack([parts[m].loc[row] for m in has])
        total = (exponents * precision).sum(0)
        assert_same(fn.base_dist.scale[row], total.rsqrt())
        assert_same(fn.base_dist.loc[row], (exponents * precision * loc).sum(0) / total)
    _, gradient = value_and_gradient(elbo(), model, guide, batch)
    assert gradient.isfinite().all()
    assert bool(torch.autograd.grad(fn.base_dist.scale.sum(), guide.powers)[0].any())


# --- mixtures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prior_expert", [True, False])
@pytest.mark.parametrize("name", SUBSETS)
def test_the_density_is_the_mean_of_the_products_that_a_row_has(name: str, prior_expert: bool):
    model, batch = linear_model(), data(4)
    guide = guide_of(model, SUBSETS[name], prior_expert)
    fn, _ = guide.posterior(batch)
    prior = dist.Normal(torch.zeros(2), torch.ones(2))
    z = torch.randn(5, 4, 2)

    def product(row: int, sites: frozenset[str]) -> dist.Normal:
        factors = [model_expert(row, site) for site in sites]
        factors += [prior] if prior_expert or not sites else []
        precision = sum(f.scale**-2 for f in factors)
        return dist.Normal(sum(f.loc * f.scale**-2 for f in factors) / precision, precision**-0.5)

    def model_expert(row: int, site: str) -> dist.Normal:
        expert = guide.experts[site](batch[site]).base_dist
        return dist.Normal(expert.loc[row], expert.scale.expand(4, 2)[row])

    for row, has in enumerate([{"x", "y"}, {"x"}, {"y"}, set()]):
        left = [frozenset(has & set(subset)) for subset in SUBSETS[name]]
        left = [sites for sites in left if sites] or [frozenset()]
        terms = [product(row, sites).log_prob(z[:, row]).sum(-1) for sites in left]
        wanted = torch.stack(terms).exp().mean(0).log()
        assert_same(fn.log_prob(z)[:, row], wanted)


@pytest.mark.parametrize("objective", [elbo(3), iwae(6), iwae(6, "dreg")], ids=repr)
@pytest.mark.parametrize("name", SUBSETS)
def test_a_missing_site_is_an_absent_one(name: str, objective):
    """Row by row: in a batch where others have y, and in one without the site."""
    model, batch = linear_model(), data()
    guide = guide_of(model, SUBSETS[name])

    def rows(batch: Batch) -> torch.Tensor:
        pyro.set_rng_seed(3)
        found: torch.Tensor = objective.rows(model, guide, batch)
        return found

    lack = ~batch.mask("y")[:, 0]
    alone = batch.without("y")
    assert_same(rows(batch)[lack], rows(alone)[lack])
    hidden = batch.hide("y", torch.tensor(True))
    assert_same(rows(hidden), rows(alone))
    value, gradient = value_and_gradient(objective, model, guide, hidden)
    assert_same((value, gradient), value_and_gradient(objective, model, guide, alone))


def test_a_mixture_of_one_particle_per_expert_takes_each_in_turn():
    model, batch = linear_model(), data(4)
    guide = guide_of(model, SUBSETS["mixture"], prior_expert=False)
    for expert, at in zip(guide.experts.values(), (40.0, -40.0), strict=True):
        net: Any = expert.net
        net.bias.data.fill_(at)
    z = table(model, guide, batch, number=6).samples["z"]
    assert [int((side * z[:, 0] > 0).all(-1).sum()) for side in (1, -1)] == [3, 3]
    assert (z[:, 1] > 0).all()
    assert (z[:, 2] < 0).all()
    assert (z[:, 3].abs() < 6).all()


def test_bounds_of_a_mixture_come_to_the_evidence():
    model, batch = linear_model(), data()
    guide = guide_of(model, SUBSETS["mixture of products"])
    rows = [iwae(k).rows(model, guide, batch) for k in (3, 3000)]
    exact = evidence(model, batch)
    assert rows[0].mean() < rows[1].mean() < exact.mean() + 0.01
    torch.testing.assert_close(rows[1], exact, atol=0.03, rtol=0)


def test_a_site_counts_where_any_entry_of_it_is_observed():
    model, batch = linear_model(), data(4)
    batch = batch.hide(
        "x", torch.tensor([[True] * 3 + [False], [True] * 4, [False] * 4, [False] * 4])
    )
    guide = guide_of(model)
    fn, experts = guide.posterior(batch)
    assert experts["x"][1].tolist() == [True, False, False, False]
    parts = [guide.experts[site](batch[site]).base_dist for site in SIZES]  # of the fill, too
    precisions = [part.scale[0] ** -2 for part in parts]
    means = [part.loc[0] for part in parts]
    loc = sum(p * m for p, m in zip(precisions, means, strict=True)) / (1 + sum(precisions))
    assert_same(fn.base_dist.loc[0], loc)


@pytest.mark.parametrize("name", SUBSETS)
def test_without_any_site_it_is_the_prior(name: str):
    fn, experts = guide_of(linear_model(), SUBSETS[name]).posterior(Batch(size=3))
    z = torch.randn(3, 2)
    assert_same(fn.log_prob(z), dist.Normal(0.0, 1.0).log_prob(z).sum(-1))
    assert experts == {}


# --- private latents ----------------------------------------------------------------------------


def private_pair() -> tuple[MultimodalModel, ExpertsGuide]:
    class Sum(nn.Module):
        def forward(self, z, w):
            return dist.Normal(z + w, 0.5).to_event(1)

    likelihoods = {"x": Sum(), "y": Sum()}
    priors = {"x": StandardNormal(2), "y": StandardNormal(2)}
    model = MultimodalModel(StandardNormal(2), likelihoods, priors)
    experts = {site: DiagonalGaussian(nn.Linear(2, 4), (2,)) for site in likelihoods}
    private = {s: (DiagonalGaussian(nn.Linear(2, 4), (2,)), priors[s]) for s in likelihoods}
    return model, ExpertsGuide(experts, model.prior, prior_expert=True, private=private)


def test_private_latents_of_what_a_row_lacks_count_nothing():
    model, guide = private_pair()
    batch = Batch({"x": torch.randn(6, 2), "y": torch.randn(6, 2)})
    batch = batch.hide("y", torch.arange(6).unsqueeze(1) < 3)
    found = table(model, guide, batch, number=4)
    rate = found.posterior["w_y"] - found.prior["w_y"]
    assert_same(rate[:, :3], torch.zeros_like(rate[:, :3]))
    assert (rate[:, 3:] != 0).all()
    pair: Any = guide.private["y"]
    expert = pair[0](batch["y"])
    wanted = expert.log_prob(found.samples["w_y"])[:, 3:]
    assert_same(found.posterior["w_y"].sum(-1)[:, 3:], wanted)
    assert list(table(model, guide, batch.without("y")).samples) == ["z", "w_x"]


# --- a joint posterior and its surrogates -------------------------------------------------------


class Values(nn.Module):
    """Features that are the values."""

    def forward(self, x, mask):
        return x


def surrogates() -> tuple[MultimodalModel, SurrogatesGuide]:
    model = linear_model()
    joint = JointGuide(
        {site: Values() for site in SIZES}, DiagonalGaussian(nn.Linear(7, 4), (2,)), {}
    )
    experts = {site: Message(p, posterior=True) for site, p in model.likelihoods.items()}
    return model, SurrogatesGuide(joint, experts, model.prior)


def test_surrogates_stand_where_a_row_is_not_whole():
    model, guide = surrogates()
    batch = data()
    fn, experts = guide.posterior(batch)
    joint = guide.joint.posterior_of(batch)
    assert_same(fn.base_dist.loc[::4], joint.base_dist.loc[::4])
    assert_same(fn.base_dist.scale[::4], joint.base_dist.scale[::4])
    rows = iwae(4).rows(model, guide, batch)
    for place in (1, 2, 3):
        assert_same(rows[place::4], evidence(model, batch)[place::4])
    for _, counts in experts.values():
        assert counts.tolist() == [True, False, False, False] * 2
    assert guide.posterior(batch.without("x"))[1] == {}


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subsets": [("x", "sound")]}, "sound.*experts.*'x', 'y'"),
        ({"subsets": []}, "came subsets"),
        ({"subsets": [()]}, "came subsets"),
        ({"private": {"sound": (nn.Identity(), nn.Identity())}}, "private latents of .'sound'"),
    ],
    ids=["unknown subset", "no subsets", "an empty subset", "unknown private"],
)
def test_refuses(options, message):
    model = linear_model()
    experts = {site: Message(p) for site, p in model.likelihoods.items()}
    with pytest.raises(ValueError, match=message):
        ExpertsGuide(experts, model.prior, **options)


def test_refuses_experts_without_a_product_and_joints_of_other_sites():
    model = linear_model()
    experts = {"x": StudentT(nn.Linear(4, 2), (2,)), "y": Message(model.likelihoods["y"])}
    with pytest.raises(ValueError, match="expert of 'x': came a StudentT"):
        ExpertsGuide(experts, model.prior)(data())
    joint = JointGuide({"x": Values()}, nn.Identity(), {})
    with pytest.raises(ValueError, match=r"joint guide of .'x'.*wanted the same sites"):
        SurrogatesGuide(joint, {"x": experts["y"], "y": experts["y"]}, model.prior)
