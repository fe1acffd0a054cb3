"""The builder of pairs with several sites: parts for each, every guide trained, judged and used."""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import Any

import pyro
import pytest
import torch

from pyro_vae.batch import Batch
from pyro_vae.conditionals import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Gaussian,
    StudentT,
)
from pyro_vae.evaluation.likelihood import evaluate
from pyro_vae.evaluation.predict import encode, reconstruct, sample
from pyro_vae.guides import ExpertsGuide, SurrogatesGuide
from pyro_vae.linter import check
from pyro_vae.nn import convolutional
from pyro_vae.objectives import elbo, iwae, jmvae, mvae, mvtcae
from pyro_vae.pairs import multimodal, rebuilt
from pyro_vae.training.fit import fit
from tests.small_pairs import assert_same, flat_gradient, parameters, table

KINDS = {"x": Gaussian, "image": Bernoulli, "label": Categorical}
GUIDES = ("product", "mixture", "mixture_of_products", "joint")


def data(rows: int = 24) -> Batch:
    """A vector, an image and a label of each row, some of them missing, some in part."""
    label = torch.randint(3, (rows,))
    image = (torch.rand(rows, 4, 4) < 0.2 + 0.3 * label[:, None, None]).double()
    x = torch.randn(rows, 5) + label[:, None]
    x[torch.rand(rows, 5) < 0.1] = torch.nan
    x[2::4] = torch.nan
    image[3::4] = torch.nan
    image[6] = torch.nan
    return Batch(
        {"x": x, "image": image, "label": label}, observed={"label": torch.arange(rows) % 3 > 0}
    )


def small(batch: Batch, **options: Any) -> tuple[Any, Any]:
    options = dict[str, Any](latent=2, hidden=(6,)) | options
    return multimodal(batch, **options)


def test_parts_fit_the_sites():
    model, guide = small(data())
    assert {site: type(p) for site, p in model.likelihoods.items()} == KINDS
    assert {type(q) for q in guide.experts.values()} == {DiagonalGaussian}
    made = model(Batch(size=3))
    assert {s: tuple(v.shape) for s, v in made.items()} == {
        "x": (3, 5),
        "image": (3, 4, 4),
        "label": (3,),
    }
    model, guide = small(data(), sites=["label", "x"])
    assert list(model.likelihoods) == list(guide.experts) == ["label", "x"]
    model, _ = small(data(), likelihood={"x": StudentT}, activation=torch.nn.Tanh)
    assert type(model.likelihoods["x"]) is StudentT
    assert type(model.likelihoods["image"]) is Bernoulli


@pytest.mark.parametrize(
    ("guide", "subsets"),
    [
        ("product", [[True] * 3]),
        ("mixture", [[True, False, False], [False, True, False], [False, False, True]]),
        ("joint", [[True] * 3]),
    ],
)
def test_guides_are_subsets(guide: str, subsets: list[list[bool]]):
    q = small(data(), guide=guide)[1]
    assert q.members.tolist() == subsets
    assert type(q) is (SurrogatesGuide if guide == "joint" else ExpertsGuide)
    assert q.prior_expert is (guide == "product")
    assert small(data(), guide=guide, prior_expert=True)[1].prior_expert


def test_a_mixture_of_products_has_every_subset():
    members = small(data(), guide="mixture_of_products")[1].members
    assert len(members) == len(set(map(tuple, members.tolist()))) == 7
    assert members.any(1).all()


@pytest.mark.parametrize(
    "options",
    [{}, {"private": {"image": 3}}, {"private": {"image": 3}, "partitioned": True}],
    ids=["shared", "private", "partitioned"],
)
@pytest.mark.parametrize("guide", GUIDES)
def test_every_parameter_is_trained(guide: str, options: dict[str, Any]):
    batch = data()
    model, q = small(batch, guide=guide, **options)
    assert check(model, q, batch).ok
    objectives = [jmvae()] if guide == "joint" else [elbo(4), iwae(7, "dreg")]
    for objective in objectives:
        loss = objective.differentiable_loss(model, q, batch)
        for parameter in parameters(model, q):
            assert flat_gradient_of(loss, parameter).abs().sum() > 0


def flat_gradient_of(loss: torch.Tensor, parameter: Any) -> torch.Tensor:
    gradient: torch.Tensor = torch.autograd.grad(loss, parameter, retain_graph=True)[0]
    return gradient


def test_private_latents_have_their_dimensions():
    batch = data()
    model, guide = small(batch, private={"image": 3, "x": 0})
    samples = table(model, guide, batch, number=2).samples
    assert {name: tuple(z.shape) for name, z in samples.items()} == {
        "z": (2, 24, 2),
        "w_image": (2, 24, 3),
    }
    assert list(small(batch, private=1)[1].private) == list(KINDS)


def test_partitioned_latents_are_dimensions_of_their_site_alone():
    """What a site's likelihood reads and what its expert is of; the rest of a component is the prior."""
    batch = data()
    model, guide = small(batch, guide="mixture", private={"image": 3, "label": 1}, partitioned=True)
    z = torch.randn(24, 6).requires_grad_()
    reads = {"x": [0, 1], "image": [0, 1, 2, 3, 4], "label": [0, 1, 5]}
    for site, likelihood in model.likelihoods.items():
        log_p = likelihood(z).log_prob(batch[site]).sum()
        found = torch.autograd.grad(log_p, z)[0].abs().sum(0)
        assert found.nonzero().squeeze(1).tolist() == reads[site]
    fn, _ = guide.posterior(batch)
    of = fn.components.base_dist
    for m, (site, expert) in enumerate(guide.experts.items()):
        here, own = batch.seen(site), expert(batch[site]).base_dist
        dims = reads[site]
        assert_same(of.loc[here, m][:, dims], own.loc[here])
        assert_same(of.scale[here, m][:, dims], own.scale[here])
        rest = [d for d in range(6) if d not in dims]
        assert (of.loc[:, m][:, rest] == 0).all()
        assert (of.scale[:, m][:, rest] == 1).all()
    samples = table(model, guide, batch, number=3).samples
    assert {name: tuple(value.shape) for name, value in samples.items()} == {"z": (3, 24, 6)}


def test_partitioned_products_are_those_of_private_latents():
    """Dimensions of one expert alone, beside the shared ones: the same posterior under two names."""
    batch = data()
    options: dict[str, Any] = {"guide": "product", "private": {"image": 3}}
    _, guide = small(batch, **options, partitioned=True)
    fn, _ = guide.posterior(batch)
    own = guide.experts["image"](batch["image"]).base_dist
    here = batch.seen("image")
    precision = own.scale[here][:, 2:] ** -2
    assert_same(fn.base_dist.scale[here][:, 2:], (1 + precision).rsqrt())
    assert_same(fn.base_dist.loc[here][:, 2:], own.loc[here][:, 2:] * precision / (1 + precision))
    assert (fn.base_dist.loc[~here][:, 2:] == 0).all()
    assert (fn.base_dist.scale[~here][:, 2:] == 1).all()


LEGAL = {
    "product": mvae(("x", "label")),
    "mixture": iwae(6, "dreg"),
    "mixture_of_products": iwae(7),
    "joint": jmvae(0.1),
}


@pytest.mark.parametrize("partitioned", [False, True])
@pytest.mark.parametrize("guide", GUIDES)
def test_traced_is_eager(guide: str, partitioned: bool):
    batch = data()
    pair = small(batch, guide=guide, private={"x": 1}, partitioned=partitioned)
    histories = []
    for level in ("eager", "traced"):
        run = fit(
            *copy.deepcopy(pair),
            *(batch, LEGAL[guide]),
            steps=2,
            batch_size=12,
            optimizer=partial(torch.optim.Adam, lr=0.01),
            compile=level,
            progress=False,
        )
        assert run.level.startswith(level)
        histories.append(torch.tensor([record["loss"] for record in run.history]))
    assert_same(*histories)


@pytest.mark.parametrize("guide", GUIDES)
def test_is_judged_and_used(guide: str):
    batch = data()
    model, q = small(batch, guide=guide)
    found = evaluate(model, q, batch, 40, compile="eager")
    assert found.log_p.isfinite().all()
    assert (found.log_p.mean() > found.elbo.mean() - 0.1).all()
    alone = batch.without("image")
    assert encode(model, q, alone)["z"].shape == (24, 2)
    made = sample(model, given=alone, guide=q, sites=["image", "x"], mean=True)
    assert made["image"].shape == (24, 4, 4)
    assert ((made["image"] > 0) & (made["image"] < 1)).all()
    seen = batch.mask("x")
    assert_same(made["x"][seen], batch["x"][seen])
    assert set(reconstruct(model, q, batch, num_draws=2)) == set(KINDS)


@pytest.mark.parametrize(
    "options",
    [
        {"guide": "joint"},
        {"guide": "mixture", "private": {"x": 2}, "sites": ["x", "image"]},
        {"guide": "mixture", "private": 2, "partitioned": True},
        {"likelihood": {"x": StudentT}, "weighted": True, "net": convolutional},
    ],
    ids=["joint", "private", "partitioned", "parts"],
)
def test_is_built_again_by_what_it_says(options: dict[str, Any]):
    batch = data()
    model, guide = small(batch, **options)
    said = json.loads(json.dumps(model.built_by))
    again = rebuilt(said, batch)
    for one, other in zip((model, guide), again, strict=True):
        other.load_state_dict(one.state_dict())
    losses = []
    for pair in ((model, guide), again):
        pyro.set_rng_seed(1)
        losses.append(elbo(3).loss(*pair, batch))
    assert losses[0] == losses[1]


def test_images_have_convolutions_and_labels_have_not():
    model, guide = small(data(), net=convolutional, hidden=(4, 5))
    for site, expert in guide.experts.items():
        found = any(isinstance(m, torch.nn.Conv2d) for m in expert.modules())
        assert found is (site == "image")
    losses = mvtcae(0.5).differentiable_loss(model, guide, data())
    assert flat_gradient(losses, parameters(model, guide)).isfinite().all()


def test_it_learns_what_sites_share():
    """The label is predicted of the vector: log p(label | x) rises above that of chance."""
    torch.manual_seed(1)
    label = torch.randint(2, (200,))
    x = 4.0 * label[:, None] - 2 + 0.3 * torch.randn(200, 2)
    batch = Batch({"x": x, "label": label.bool()})
    model, guide = multimodal(batch, latent=1, hidden=(8,))
    optimizer = partial(torch.optim.Adam, lr=0.02)
    fit(
        model,
        guide,
        batch,
        mvae(("x", "label")),
        steps=150,
        batch_size=100,
        optimizer=optimizer,
        progress=False,
    )
    made = sample(model, given=batch.without("label"), guide=guide, sites=["label"], mean=True)
    assert ((made["label"] > 0.5) == (label == 1)).double().mean() > 0.9


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guide": "sum"}, r"guide='sum'.*'product'"),
        ({"sites": ["x", "sound"]}, r"'sound' is not in the batch"),
        ({"sites": []}, r"sites \[\].*wanted a site"),
        ({"latent": 0}, r"latent=0.*whole numbers above 0"),
        ({"hidden": (8, -1)}, r"hidden=\(8, -1\)"),
        ({"private": {"sound": 2}}, r"sites \['sound'\], the pair's are"),
        ({"partitioned": True}, r"partitioned=True without private latents"),
        ({"private": -1}, r"private=.*whole numbers"),
        ({"likelihood": {"sound": Gaussian}}, r"sites \['sound'\], the pair's are"),
        ({"likelihood": {"x": "normal"}}, r"came x='normal'"),
        ({"likelihood": {"x": Bernoulli}}, r"site 'x': Bernoulli does not take these data"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_refuses(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        small(data(), **options)


def test_given_rows_of_another_width_are_named():
    model, q = small(data())
    with pytest.raises(ValueError, match=r"sample: given came with events \{'x': \[4\]\}: "):
        sample(model, given=Batch({"x": torch.zeros(3, 4)}), guide=q)


def test_refuses_what_is_never_observed_and_rows_that_do_not_match():
    with pytest.raises(ValueError, match=r"site 'x': the batch has no observed entry \(24 rows\)"):
        small(data().hide("x", torch.tensor(True)))
    bare: Any = torch.zeros(5, 2)
    with pytest.raises(ValueError, match="came a Tensor, wanted a Batch of named sites"):
        multimodal(bare)
    with pytest.raises(ValueError, match=r"differ in their number of rows: \{'x': 5, 'y': 4\}"):
        Batch({"x": torch.zeros(5, 2), "y": torch.zeros(4)})
