"""Pairs: parts chosen for the data, all trained, any part replaced."""

from __future__ import annotations

from functools import partial
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import PyroOptim
from torch import nn

from pyro_vae.batch import Batch, Observed
from pyro_vae.conditionals import (
    Bernoulli,
    Binomial,
    Categorical,
    ContinuousBernoulli,
    DiagonalGaussian,
    Gaussian,
    LearnedBernoulli,
    LearnedOneHot,
    LogisticMixture,
    NegativeBinomial,
    OneHotCategorical,
    OptimalSigma,
    StandardNormal,
    StudentT,
    UniformBernoulli,
    UniformOneHot,
)
from pyro_vae.evaluation.likelihood import evaluate
from pyro_vae.evaluation.predict import reconstruct, sample
from pyro_vae.nn import conv_resnet, convolutional, dense_resnet, mlp
from pyro_vae.objectives.baselines import MovingAverage
from pyro_vae.objectives.enumeration import enumerated_log_p
from pyro_vae.objectives.estimators import Score
from pyro_vae.objectives.recipes import elbo, mean_field, vimco
from pyro_vae.objectives.relaxed import Gumbel, StraightThrough
from pyro_vae.pairs import inputs_for, likelihood_for, rebuilt, update_sigma, vae
from pyro_vae.training.fit import fit


def binary(n=40):
    return torch.randint(2, (n, 8, 8)).to(torch.float64)


def levels(n=40):
    return torch.randint(17, (n, 8, 8)).to(torch.float64)


def real(n=40):
    return 1e3 * torch.randn(n, 6) * torch.tensor([1e-3, 1.0, 1.0, 1.0, 1.0, 1e3])


DATA = {
    "binary images": (binary, Bernoulli),
    "binary bools": (lambda: binary().bool(), Bernoulli),
    "binary bytes": (lambda: binary().to(torch.uint8), Bernoulli),
    "binary int64": (lambda: binary()[:, 0].long(), Bernoulli),
    "digits": (levels, Binomial),
    "byte images": (lambda: torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8), Binomial),
    "int64 images": (lambda: levels().long(), Binomial),
    "unit interval": (lambda: levels() / 16, ContinuousBernoulli),
    "real vectors": (real, Gaussian),
    "real numbers": (lambda: torch.randn(40), Gaussian),
    "real images": (lambda: torch.randn(40, 3, 5, 4), Gaussian),
    "whole numbers beyond bytes": (lambda: 300 * levels(), NegativeBinomial),
    "counts": (lambda: torch.poisson(1e4 * torch.rand(40, 6) ** 4), NegativeBinomial),
    "int64 counts": (lambda: torch.randint(1000, (40, 6)), NegativeBinomial),
    "negative whole numbers": (lambda: torch.randint(-1000, 1000, (40, 6)).double(), Gaussian),
    "labels": (lambda: torch.randint(5, (40, 6)), Categorical),
    "one label": (lambda: torch.randint(5, (40,)), Categorical),
}


def elbo_gradients(model, guide, batch):
    Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1).differentiable_loss(
        Observed(model), guide, batch
    ).backward()
    parameters = [*model.named_parameters(), *guide.named_parameters()]
    return {name: parameter.grad for name, parameter in parameters}


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", list(DATA))
def test_likelihood_fits_the_data_and_every_parameter_is_trained(name, missing):
    make, wanted = DATA[name]
    x = make()
    observed = {"x": torch.rand(x.shape) < 0.7} if missing else None
    batch = Batch({"x": x}, observed=observed)
    assert likelihood_for(batch) is wanted
    model, guide = vae(batch, latent=3, hidden=(16, 12), activation=nn.Tanh)
    assert type(model.likelihood) is wanted
    for parameter, grad in elbo_gradients(model, guide, batch).items():
        assert grad is not None, parameter
        assert grad.isfinite().all(), parameter
        assert grad.abs().sum() > 0, parameter
    assert model(Batch(size=4)).shape == (4, *x.shape[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_of_data_and_of_weights_may_differ(dtype):
    torch.set_default_dtype(torch.float32)
    batch = Batch({"x": levels().to(dtype)})
    model, guide = vae(batch, latent=3, hidden=(16,))
    assert {p.dtype for p in [*model.parameters(), *guide.parameters()]} == {torch.float32}
    assert all(grad.isfinite().all() for grad in elbo_gradients(model, guide, batch).values())


@pytest.mark.parametrize("net", [convolutional, conv_resnet, dense_resnet])
@pytest.mark.parametrize("name", ["binary images", "byte images", "unit interval", "real images"])
def test_networks_are_an_argument(net, name):
    batch = Batch({"x": DATA[name][0]()})
    model, guide = vae(batch, latent=3, hidden=(5, 4), net=net)
    gradients = elbo_gradients(model, guide, batch)
    assert all(grad is not None and grad.isfinite().all() for grad in gradients.values())


def test_images_of_classes_go_through_convolutions():
    batch = Batch({"x": torch.randint(4, (40, 8, 7))})
    model, guide = vae(batch, latent=3, hidden=(5,), net=convolutional, likelihood=Categorical)
    assert elbo_gradients(model, guide, batch)
    assert model(Batch(size=2)).shape == (2, 8, 7)


def test_decoder_has_the_widths_in_reverse():
    model, guide = vae(Batch({"x": binary()}), latent=3, hidden=(16, 12))
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() == 2]
    assert shapes == [(12, 3), (16, 12), (64, 16)]
    shapes = [tuple(p.shape) for p in guide.parameters() if p.dim() == 2]
    assert shapes == [(16, 64), (12, 16), (6, 12)]


def test_parts_can_be_a_class_a_function_or_ready():
    batch = Batch({"x": levels()[:, 0]})
    for likelihood, kind in (
        (Gaussian, Gaussian),
        (partial(Gaussian.build, shared=True), Gaussian),
        (OptimalSigma, OptimalSigma),
        (partial(Binomial.build, total_count=20), Binomial),
        (Binomial(mlp((3, 8)), (8,), 16), Binomial),
    ):
        model, guide = vae(batch, latent=3, hidden=(5,), likelihood=likelihood)
        assert type(model.likelihood) is kind
        assert elbo_gradients(model, guide, batch)
    posterior = DiagonalGaussian(mlp((8, 6)), (3,))
    prior = StandardNormal(3)
    model, guide = vae(batch, latent=3, posterior=posterior, prior=prior)
    assert guide.posterior is posterior
    assert model.prior is prior
    assert vae(batch, latent=3, prior=StandardNormal)[0].prior().event_shape == (3,)


@pytest.mark.parametrize(
    ("make", "likelihood"),
    [
        (levels, LogisticMixture),
        (levels, NegativeBinomial),
        (levels, StudentT),
        (real, StudentT),
        (lambda: torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8), LogisticMixture),
        (lambda: torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8), NegativeBinomial),
    ],
)
@pytest.mark.parametrize("missing", [False, True])
def test_likelihoods_that_are_chosen_by_hand_train_every_parameter(make, likelihood, missing):
    x = make()
    batch = Batch({"x": x}, observed={"x": torch.rand(x.shape) < 0.7} if missing else None)
    model, guide = vae(batch, latent=3, hidden=(16,), likelihood=likelihood, activation=nn.Tanh)
    for parameter, grad in elbo_gradients(model, guide, batch).items():
        assert grad.isfinite().all(), parameter
        assert grad.abs().sum() > 0, parameter
    assert model(Batch(size=4)).shape == (4, *x.shape[1:])


def test_inputs_of_counts_and_of_heavy_tails_are_of_order_one():
    x = torch.poisson(torch.exp(3 * torch.randn(500, 4)))
    inputs, shape = inputs_for(Batch({"x": x}), "x", NegativeBinomial.build(mlp_of, (4,), x))
    came = inputs(x)
    assert shape == (4,)
    torch.testing.assert_close(came.mean(0), torch.zeros(4), rtol=0, atol=1e-9)
    torch.testing.assert_close(came.std(0, correction=0), torch.ones(4))
    x = torch.randn(500, 4)
    x[:5] = 1e6
    inputs, _ = inputs_for(Batch({"x": x}), "x", StudentT.build(mlp_of, (4,), x))
    assert 0.5 < inputs(x)[5:].std() < 1.5
    assert inputs(x).abs().max() < 20


def mlp_of(outputs):
    return mlp((3, *outputs))


def test_site_is_an_argument():
    batch = Batch({"image": binary(), "y": torch.arange(40)})
    model, guide = vae(batch, latent=3, hidden=(5,), site="image")
    assert elbo_gradients(model, guide, batch.without("y"))


@pytest.mark.parametrize(
    ("x", "likelihood", "match"),
    [
        (levels() / 16, Bernoulli, "Bernoulli .* ContinuousBernoulli and Gaussian would"),
        (
            levels(),
            Bernoulli,
            "Bernoulli .* Binomial, Categorical, LogisticMixture, NegativeBinomial and Gaussian would",
        ),
        (
            levels(),
            ContinuousBernoulli,
            "Binomial, Categorical, LogisticMixture, NegativeBinomial and Gaussian would",
        ),
        (torch.randn(40, 4), Bernoulli, "Bernoulli .* Gaussian would"),
        (torch.randn(40, 4), Categorical, "whole numbers"),
        (levels(), partial(Binomial.build, total_count=10), "Binomial does not take"),
        (levels()[:, 0], lambda *_: Bernoulli(mlp((3, 8)), (8,)), "Bernoulli does not take"),
        (
            levels()[:, 0],
            lambda *_: Binomial(mlp((3, 1)), (1,), 16),
            r"event shape \[8\].* has \[1\]",
        ),
    ],
)
def test_likelihood_that_does_not_take_the_data_is_refused(x, likelihood, match):
    batch = Batch({"x": x})
    for validation in (True, False):
        with pyro.validation_enabled(validation), pytest.raises(ValueError, match=match):
            vae(batch, latent=3, likelihood=likelihood)


def test_one_bad_pixel_is_found():
    x = binary()
    x[17, 3, 3] = 0.5
    with pytest.raises(ValueError, match=r"row 17 is outside its support"):
        vae(Batch({"x": x}), likelihood=Bernoulli)


def test_missing_site_and_empty_batches_are_named():
    with pytest.raises(ValueError, match=r"site 'x' is not in the batch, which has \['y'\]"):
        vae(Batch({"y": binary()}))
    with pytest.raises(ValueError, match="no observed entry"):
        vae(Batch({"x": torch.empty(0, 5)}))
    with pytest.raises(ValueError, match="no observed entry"):
        vae(Batch({"x": torch.full((4, 5), torch.nan)}))


@pytest.mark.parametrize("name", list(DATA))
def test_state_of_a_pair_rebuilds_it(name):
    batch = Batch({"x": DATA[name][0]()})
    pairs = [vae(batch, latent=3, hidden=(6,)) for _ in range(2)]
    for old, new in zip(*pairs, strict=True):
        state = old.state_dict()
        assert all(isinstance(value, torch.Tensor) for value in state.values())
        storages = [value.untyped_storage().data_ptr() for value in state.values()]
        assert len(set(storages)) == len(storages)  # safetensors refuses shared memory
        new.load_state_dict(state)
    outputs = [
        pair[0].likelihood(torch.ones(2, 3)).base_dist if batch["x"].dim() > 1 else None
        for pair in pairs
    ]
    if outputs[0] is not None:
        first, second = (fn.__dict__ for fn in outputs)
        for key in {"loc", "logits"} & set(first):
            assert torch.equal(first[key], second[key])


def test_building_keeps_nothing_and_leaves_the_batch_alone():
    x = levels()
    batch = Batch({"x": x.clone()})
    model, guide = vae(batch, latent=3, hidden=(6,))
    assert len(list(pyro.get_param_store().keys())) == 0
    assert torch.equal(batch["x"], x)
    assert model.training
    assert guide.training


def test_svi_trains_a_pair():
    means = torch.tensor([0.1, 0.9])[torch.randint(2, (2, 8, 8))]
    x = torch.bernoulli(means[torch.randint(2, (200,))])
    batch = Batch({"x": x})
    model, guide = vae(batch, latent=2, hidden=(32,))
    svi = SVI(Observed(model), guide, PyroOptim(torch.optim.Adam, {"lr": 0.01}), Trace_ELBO())
    losses = torch.tensor([svi.step(batch) for _ in range(150)]) / 200
    assert losses[-20:].mean() < losses[:3].mean() - 5


def test_optimal_sigma_finds_the_noise_of_a_linear_model():
    """Trained by ``update`` alone next to the network's gradients, as its docstring shows."""
    weight, noise = torch.randn(2, 10), 0.3
    x = torch.randn(1000, 2) @ weight + noise * torch.randn(1000, 10)
    batch = Batch({"x": x})
    model, guide = vae(
        batch, latent=2, hidden=(), likelihood=partial(OptimalSigma.build, shared=True)
    )
    likelihood, loss = model.likelihood, Trace_ELBO()
    assert isinstance(likelihood, OptimalSigma)
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        loss.differentiable_loss(Observed(model), guide, batch).backward()
        optimizer.step()
        with torch.no_grad():
            z = guide.posterior(batch["x"]).sample()
            likelihood.update(batch["x"], likelihood(z).mean, batch.mask("x"), momentum=0.1)
    # E (x - m(z))² at the optimum of a linear Gaussian model is s² itself
    assert abs(float(likelihood.scale) - noise) < 0.01


def test_update_sigma_tracks_the_residuals_of_the_training_rows():
    batch = Batch({"x": torch.randn(60, 3) * torch.tensor([1.0, 2.0, 0.5])})
    model, guide = vae(batch, latent=2, hidden=8, likelihood=OptimalSigma)
    run = fit(model, guide, batch, epochs=3, batch_size=20, callbacks=[update_sigma(batch)])
    torch.manual_seed(5)
    update_sigma(batch)(run, {})
    torch.manual_seed(5)
    z = guide.posterior(batch["x"]).sample()
    residuals = (batch["x"] - model.likelihood(z).mean).square().mean(0).sqrt()
    torch.testing.assert_close(model.likelihood.scale, residuals)


def test_update_sigma_wants_a_sigma():
    batch = Batch({"x": torch.randn(20, 3)})
    model, guide = vae(batch, latent=2, hidden=8)
    with pytest.raises(ValueError, match="came a Gaussian likelihood, wanted OptimalSigma"):
        fit(model, guide, batch, steps=1, callbacks=[update_sigma(batch)])


# --- discrete latents -----------------------------------------------------------------------------


def striped(n: int = 60) -> Batch:
    """Four patterns of 8 pixels, with noise."""
    means = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).repeat_interleave(4, 1)
    means = torch.cat([means, means.flip(1).roll(2, 1)])
    return Batch({"x": torch.bernoulli(means[torch.randint(4, (n,))])})


COINS: dict[str, Any] = {"latent": 4, "posterior": Bernoulli}
CLASSES: dict[str, Any] = {"latent": (2, 3), "posterior": OneHotCategorical}
TRAINED = {
    "gumbel": lambda: mean_field(1, Gumbel()),
    "concrete": lambda: elbo(1, Gumbel()),
    "straight-through": lambda: mean_field(1, StraightThrough()),
    "vimco": lambda: vimco(4),
    "score": lambda: elbo(2, Score(baseline=MovingAverage())),
    "enumerate": lambda: elbo(estimator="enumerate"),
}


@pytest.mark.parametrize("options", [COINS, CLASSES], ids=["coins", "classes"])
@pytest.mark.parametrize("name", list(TRAINED))
def test_discrete_latents_train_by_every_estimator(name, options):
    """The bound of the discrete model rises, whatever was optimised."""
    batch = striped()
    model, guide = vae(batch, hidden=(), **options)
    before = float(elbo(estimator="enumerate").rows(model, guide, batch).mean())
    adam = partial(torch.optim.Adam, lr=0.05)
    run = fit(model, guide, batch, TRAINED[name](), steps=150, optimizer=adam, compile="traced")
    assert run.level == "traced"
    after = float(elbo(estimator="enumerate").rows(model, guide, batch).mean())
    assert after > before + 0.4


@pytest.mark.parametrize("options", [COINS, CLASSES], ids=["coins", "classes"])
def test_discrete_latents_are_judged_by_importance_sampling(options):
    torch.manual_seed(2)
    batch = striped()
    model, guide = vae(batch, hidden=(), **options)
    fit(model, guide, batch, elbo(estimator="enumerate"), steps=150, compile="eager")
    exact = enumerated_log_p(model, guide, batch)
    result = evaluate(model, guide, batch, 4000)
    torch.testing.assert_close(result.log_p, exact, rtol=0, atol=0.02)
    bound = elbo(estimator="enumerate").rows(model, guide, batch)
    assert abs(float((result.elbo - bound).mean())) < 0.1
    shape = model.prior().event_shape
    assert result.active["z"].shape == shape
    deviation = model.prior().variance.sqrt()
    varies = (guide.posterior(batch["x"]).mean / deviation).var(0) > 0.01
    assert (result.active["z"] == varies).double().mean() > 0.8
    assert sample(model, 5)["x"].shape == (5, 8)
    decoded = reconstruct(model, guide, batch, num_draws=64)["x"]
    assert (decoded - batch["x"]).abs().mean() < 0.5


def test_discrete_posteriors_have_a_uniform_prior():
    batch = striped()
    for options, uniform, learned in (
        (COINS, UniformBernoulli, LearnedBernoulli),
        (CLASSES, UniformOneHot, LearnedOneHot),
    ):
        model, guide = vae(batch, hidden=5, **options)
        assert type(model.prior) is uniform
        assert not list(model.prior.parameters())
        fair = 0.5 if options is COINS else 1 / 3
        torch.testing.assert_close(model.prior().mean, torch.full(model.prior().event_shape, fair))
        trained, guide = vae(batch, hidden=5, prior=learned, **options)
        loss = elbo(2, "gumbel").differentiable_loss(trained, guide, batch)
        (gradient,) = torch.autograd.grad(loss, list(trained.prior.parameters()))
        assert gradient.abs().sum() > 0
        again = rebuilt(trained.built_by, batch)
        again[0].load_state_dict(trained.state_dict())


def test_shape_of_the_latent_is_checked():
    shapes: Any = ((), (3, 0), 0, (2.5,))
    for latent in shapes:
        with pytest.raises(ValueError, match="vae: came latent="):
            vae(striped(), latent=latent)
