"""Conditionals: densities against scipy, any leading dimensions, elementwise masks, starts."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import nn

from pyro_vae.batch import Batch, Observed
from pyro_vae.conditionals import (
    Bernoulli,
    Binomial,
    Categorical,
    ContinuousBernoulli,
    DiagonalGaussian,
    Gaussian,
    OptimalSigma,
    StandardNormal,
)
from pyro_vae.nn import convolutional, dense


def continuous_bernoulli_logpdf(x, logits):
    """log(l / (e^l - 1)) + l x, the density of a truncated exponential."""
    return np.log(logits / np.expm1(logits)) + logits * x


def normal(rng_shape):
    return torch.randn(rng_shape)


def binary(shape):
    return torch.randint(2, shape).to(torch.float64)


def counts(shape):
    return torch.randint(17, shape).to(torch.float64)


def classes(shape):
    return torch.randint(4, shape).to(torch.float64)


# name -> (class as a builder, data, scipy's log density given the distribution's parameters)
LIKELIHOODS = {
    "Bernoulli": (
        Bernoulli.build,
        binary,
        lambda fn, x: scipy.stats.bernoulli.logpmf(x, fn.probs),
    ),
    "Binomial": (
        partial(Binomial.build, total_count=16),
        counts,
        lambda fn, x: scipy.stats.binom.logpmf(x, 16, fn.probs),
    ),
    "ContinuousBernoulli": (
        ContinuousBernoulli.build,
        torch.rand,
        lambda fn, x: continuous_bernoulli_logpdf(x.numpy(), fn.logits.numpy()),
    ),
    "Categorical": (
        partial(Categorical.build, classes=4),
        classes,
        lambda fn, x: np.log(
            np.take_along_axis(fn.probs.numpy(), x.numpy().astype(int)[..., None], -1)[..., 0]
        ),
    ),
    "DiagonalGaussian": (
        DiagonalGaussian.build,
        normal,
        lambda fn, x: scipy.stats.norm.logpdf(x, fn.loc, fn.scale),
    ),
    "Gaussian": (
        Gaussian.build,
        normal,
        lambda fn, x: scipy.stats.norm.logpdf(x, fn.loc, fn.scale),
    ),
    "Gaussian, shared": (
        partial(Gaussian.build, shared=True),
        normal,
        lambda fn, x: scipy.stats.norm.logpdf(x, fn.loc, fn.scale),
    ),
    "OptimalSigma": (
        OptimalSigma.build,
        normal,
        lambda fn, x: scipy.stats.norm.logpdf(x, fn.loc, fn.scale),
    ),
}
EVENTS = [(), (5,), (4, 3), (2, 4, 3)]


def decoder(outputs):
    return dense((3,), outputs, (6,), nn.Tanh)


@pytest.fixture(params=list(LIKELIHOODS))
def likelihood(request: pytest.FixtureRequest):
    return LIKELIHOODS[request.param]


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("lead", [(), (6,), (2, 6)])
def test_density_is_scipys_and_factorizes(likelihood, event, lead):
    build, draw, logpdf = likelihood
    conditional = build(decoder, event, draw((50, *event)))
    with torch.no_grad():
        fn = conditional(torch.randn((*lead, 3)))
        assert fn.batch_shape == lead
        assert fn.event_shape == event
        base = fn.base_dist if event else fn
        assert base.batch_shape == (*lead, *event)
        x = draw((*lead, *event))
        elementwise = torch.as_tensor(logpdf(base, x))
        assert elementwise.shape == (*lead, *event)
        total = elementwise.reshape((*lead, -1)).sum(-1)
        torch.testing.assert_close(fn.log_prob(x), total, rtol=1e-9, atol=1e-9)
        assert fn.support.check(fn.sample()).all()


def test_particles_equal_a_loop(likelihood):
    build, draw, _ = likelihood
    conditional = build(decoder, (4, 3), draw((50, 4, 3)))
    z, x = torch.randn(5, 6, 3), draw((6, 4, 3))
    looped = torch.stack([conditional(row).log_prob(x) for row in z])
    torch.testing.assert_close(conditional(z).log_prob(x), looped, rtol=1e-12, atol=1e-12)


def test_network_of_another_shape_is_refused(likelihood):
    build, draw, _ = likelihood
    conditional = build(lambda shape: decoder((*shape, 1)), (5,), draw((50, 5)))
    with pytest.raises((ValueError, RuntimeError)):
        conditional(torch.randn(6, 3))
    with pytest.raises(
        ValueError, match=r"Bernoulli: the network returned \[6, 1\], wanted \[..., \*\[5"
    ):
        Bernoulli(nn.Linear(3, 1), (5,))(torch.randn(6, 3))


def test_missing_entries_contribute_nothing(likelihood):
    build, draw, _ = likelihood
    conditional = build(decoder, (4, 3), draw((50, 4, 3)))

    def model(batch):
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("x", conditional(z))

    z, x = torch.randn(6, 3), draw((6, 4, 3))
    mask = torch.rand(6, 4, 3) < 0.6
    batch = Batch({"x": x}, observed={"x": mask})
    trace = pyro.poutine.trace(Observed(model)).get_trace(batch)
    score = torch.as_tensor(trace.log_prob_sum())
    elementwise = conditional(z).base_dist.log_prob(x)
    torch.testing.assert_close(score, elementwise[mask].sum(), rtol=1e-10, atol=1e-10)

    score.backward()
    came = {name: parameter.grad for name, parameter in conditional.named_parameters()}
    conditional.zero_grad()
    conditional(z).base_dist.log_prob(x)[mask].sum().backward()
    for name, parameter in conditional.named_parameters():
        torch.testing.assert_close(came[name], parameter.grad, rtol=1e-9, atol=1e-9)


def test_every_parameter_receives_a_gradient(likelihood):
    build, draw, _ = likelihood
    conditional = build(decoder, (4, 3), draw((50, 4, 3)))
    conditional(torch.randn(6, 3)).log_prob(draw((6, 4, 3))).sum().backward()
    for name, parameter in conditional.named_parameters():
        assert type(parameter) is nn.Parameter
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_state_dict_restores_what_was_read_off_the_data(likelihood):
    build, draw, _ = likelihood
    conditional = build(decoder, (5,), draw((50, 5)))
    other = build(decoder, (5,), draw((40, 5)))
    state = conditional.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    storages = [value.untyped_storage().data_ptr() for value in state.values()]
    assert len(set(storages)) == len(storages)  # safetensors refuses shared memory
    other.load_state_dict(state)
    z, x = torch.randn(6, 3), draw((6, 5))
    torch.testing.assert_close(other(z).log_prob(x), conditional(z).log_prob(x), rtol=0, atol=0)


@pytest.mark.parametrize("event", EVENTS[1:])
def test_works_without_data_as_for_a_latent(likelihood, event):
    build, _, _ = likelihood
    fn = build(decoder, event)(torch.randn(2, 6, 3))
    assert fn.batch_shape == (2, 6)
    assert fn.event_shape == event


# ---- where the output starts


def silent(outputs):
    """A decoder that returns 0, so that what is left is the start read off the data."""
    net = nn.Linear(3, math.prod(outputs))
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    return nn.Sequential(net, nn.Unflatten(-1, tuple(outputs)))


def test_output_starts_at_the_training_mean():
    z = torch.zeros(1, 3)
    x = binary((200, 5))
    torch.testing.assert_close(Bernoulli.build(silent, (5,), x)(z).mean[0], x.mean(0))
    x = counts((200, 5))
    torch.testing.assert_close(Binomial.build(silent, (5,), x)(z).mean[0], x.mean(0))
    x = 7 + 3 * torch.randn(200, 5)
    for kind in (Gaussian, OptimalSigma):
        fn = kind.build(silent, (5,), x)(z)
        torch.testing.assert_close(fn.mean[0], x.mean(0))
        torch.testing.assert_close(fn.variance[0], x.var(0, correction=0))
    x = classes((200, 5))
    probs = Categorical.build(silent, (5,), x)(z).base_dist.probs[0]
    for c in range(4):
        torch.testing.assert_close(probs[:, c], (x == c).to(torch.float64).mean(0))


def test_missing_entries_do_not_count_in_the_start():
    x = 7 + 3 * torch.randn(200, 5)
    x[:100, 0] = torch.nan
    x[:, 1] = torch.nan
    fn = Gaussian.build(silent, (5,), x)(torch.zeros(1, 3))
    torch.testing.assert_close(fn.mean[0, 0], x[100:, 0].mean())
    torch.testing.assert_close(fn.mean[0, 1], x.nanmean())  # never observed
    assert fn.variance.isfinite().all()


def test_constant_entries_start_at_a_positive_scale():
    x = torch.randn(200, 5)
    x[:, 2] = 4.0
    fn = Gaussian.build(silent, (5,), x)(torch.zeros(1, 3))
    torch.testing.assert_close(
        fn.variance[0, 2].sqrt(), x.std(0, correction=0)[x.std(0) > 0].mean()
    )
    fn = Gaussian.build(silent, (5,), torch.full((200, 5), 4.0))(torch.zeros(1, 3))
    torch.testing.assert_close(fn.variance[0], torch.ones(5))


def test_total_count_is_read_off_the_data():
    x = counts((200, 5))
    assert Binomial.build(silent, (5,), x).total_count == 16
    assert Binomial.build(silent, (5,), x * 10).total_count == 255  # bytes that stop at 160
    assert Binomial.build(silent, (5,), x * 0).total_count == 1
    assert Binomial.build(silent, (5,), x, total_count=20).total_count == 20
    with pytest.raises(ValueError, match="total_count="):
        Binomial.build(silent, (5,))


# ---- Gaussians


def test_standard_normal_is_a_prior_without_parameters():
    prior = StandardNormal(4, 3)
    z = torch.randn(6, 4, 3)
    torch.testing.assert_close(
        prior().log_prob(z), torch.as_tensor(scipy.stats.norm.logpdf(z)).sum((-2, -1))
    )
    assert prior().batch_shape == ()
    assert not list(prior.parameters())
    assert prior.to(torch.float32)().sample().dtype == torch.float32
    assert StandardNormal()().event_shape == ()


def test_diagonal_gaussian_reads_locations_then_raw_scales():
    out = torch.tensor([[1.0, 2.0, -50.0, 60.0]])
    fn = DiagonalGaussian(nn.Identity(), (2,), floor=0.01)(out)
    assert fn.mean.tolist() == [[1.0, 2.0]]
    torch.testing.assert_close(fn.base_dist.scale, torch.tensor([[0.01, 60.01]]))
    fn = DiagonalGaussian(nn.Identity(), (2,), unit=torch.tensor([10.0, 1.0]), floor=0.01)(out)
    torch.testing.assert_close(fn.base_dist.scale, torch.tensor([[0.1, 60.01]]))
    image = torch.randn(5, 6, 4, 4)
    fn = DiagonalGaussian(nn.Identity(), (3, 4, 4))(image)
    assert torch.equal(fn.mean, image[:, :3])


@pytest.mark.parametrize("shape", [(), (3, 1, 1), (3, 4, 2)])
def test_shape_of_the_scale_says_what_shares_one(shape):
    net = dense((2,), (3, 4, 2), ())
    for kind in (Gaussian, OptimalSigma):
        conditional = kind(net, (3, 4, 2), scale=torch.full(shape, 2.0))
        assert conditional.scale.shape == shape
        torch.testing.assert_close(conditional.scale, torch.full(shape, 2.0))
        assert conditional(torch.randn(7, 2)).event_shape == (3, 4, 2)


def test_learned_scale_stops_at_its_floor_and_rejects_zero():
    conditional = Gaussian(nn.Identity(), (2,), scale=5.0, floor=0.01)
    with torch.no_grad():
        conditional.raw.fill_(-1000.0)
    torch.testing.assert_close(conditional.scale, torch.tensor(0.05))
    with pytest.raises(ValueError, match="scale= came 0"):
        Gaussian(nn.Identity(), (2,), scale=0.0)


def test_learned_scale_reaches_the_maximum_of_the_likelihood():
    x = 1e4 + 300 * torch.randn(500, 2) * torch.tensor([1.0, 0.01])
    conditional = Gaussian.build(silent, (2,), x * torch.tensor([1.0, 1.0]))
    with torch.no_grad():
        conditional.raw.add_(2.0)  # start far off
    optimizer = torch.optim.Adam(conditional.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        (-conditional(torch.zeros(500, 3)).log_prob(x).mean()).backward()
        optimizer.step()
    torch.testing.assert_close(conditional.scale, x.std(0, correction=0), rtol=1e-3, atol=0)


# ---- optimal sigma


@pytest.mark.parametrize("shape", [(), (3, 1, 1), (3, 4, 2)])
def test_optimal_sigma_is_the_rms_residual_and_maximises_the_density(shape):
    conditional = OptimalSigma(dense((2,), (3, 4, 2), ()), (3, 4, 2), scale=torch.ones(shape))
    x, z = 5 * torch.randn(50, 3, 4, 2), torch.randn(50, 2)
    loc = conditional(z).mean
    conditional.update(x, loc)
    axes = {(): (0, 1, 2, 3), (3, 1, 1): (0, 2, 3), (3, 4, 2): (0,)}[shape]
    wanted = (x - loc).square().mean(axes).sqrt().reshape(shape)
    torch.testing.assert_close(conditional.scale, wanted)
    best = conditional(z).log_prob(x).sum()
    for factor in (0.99, 1.01):
        other = OptimalSigma(conditional.net, (3, 4, 2), scale=factor * wanted)
        assert other(z).log_prob(x).sum() < best


def test_optimal_sigma_gives_the_gradient_of_the_maximised_density():
    """By the envelope theorem: the same as differentiating through sigma."""
    net = nn.Linear(2, 5)
    conditional = OptimalSigma(net, (5,))
    x, z = torch.randn(50, 5), torch.randn(50, 2)
    conditional.update(x, conditional(z).mean)
    (stored,) = torch.autograd.grad(conditional(z).log_prob(x).sum(), net.weight)
    sigma = (x - net(z)).square().mean().sqrt()
    through = dist.Normal(net(z), sigma).log_prob(x).sum()
    (wanted,) = torch.autograd.grad(through, net.weight)
    torch.testing.assert_close(stored, wanted, rtol=1e-10, atol=1e-10)


def test_optimal_sigma_is_frozen_in_evaluation_and_saved():
    conditional = OptimalSigma(nn.Identity(), (5,))
    conditional.update(torch.zeros(8, 5), torch.full((8, 5), 3.0))
    torch.testing.assert_close(conditional.scale, torch.tensor(3.0))
    conditional.eval()
    with pytest.raises(RuntimeError, match="frozen in evaluation"):
        conditional.update(torch.zeros(8, 5), torch.full((8, 5), 4.0))
    conditional(torch.zeros(8, 5)).log_prob(torch.randn(8, 5))
    torch.testing.assert_close(conditional.scale, torch.tensor(3.0))
    other = OptimalSigma(nn.Identity(), (5,))
    other.load_state_dict(conditional.state_dict())
    torch.testing.assert_close(other.scale, torch.tensor(3.0))
    assert not list(conditional.parameters())


def test_optimal_sigma_leaves_out_missing_entries_and_floors_constant_ones():
    conditional = OptimalSigma(nn.Identity(), (4,), scale=2 * torch.ones(4), floor=0.01)
    x, loc = torch.zeros(10, 4), torch.ones(3, 10, 4)  # K = 3 particles
    mask = torch.ones(10, 4, dtype=torch.bool)
    loc[:, 5:, 0] = 100.0
    mask[5:, 0] = False  # not counted
    mask[:, 1] = False  # never observed: stays
    loc[..., 2] = 0.0  # constant and reconstructed exactly
    conditional.update(x, loc, mask)
    torch.testing.assert_close(conditional.scale, torch.tensor([1.0, 2.0, 0.02, 1.0]))


def test_optimal_sigma_averages_minibatches():
    conditional = OptimalSigma(nn.Identity(), (1,), scale=1.0)
    conditional.update(torch.zeros(4, 1), torch.full((4, 1), 3.0), momentum=0.25)
    torch.testing.assert_close(conditional.scale, torch.tensor(0.75 + 0.25 * 9).sqrt())
    for _ in range(200):
        conditional.update(torch.zeros(4, 1), torch.full((4, 1), 3.0), momentum=0.25)
    torch.testing.assert_close(conditional.scale, torch.tensor(3.0))


# ---- discrete values


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_values_of_any_dtype_score_the_same(dtype):
    z = torch.randn(2, 6, 3)
    for build, x in (
        (Bernoulli.build, binary((6, 5))),
        (partial(Categorical.build, classes=4), classes((6, 5))),
        (partial(Binomial.build, total_count=255), torch.randint(250, 256, (6, 5))),
    ):
        conditional = build(decoder, (5,))
        came = conditional(z).log_prob(x.to(dtype))
        torch.testing.assert_close(came, conditional(z).log_prob(x.to(torch.float64)))
        assert came.isfinite().all()
    x = binary((6, 5))
    conditional = Bernoulli.build(decoder, (5,))
    assert torch.equal(conditional(z).log_prob(x.bool()), conditional(z).log_prob(x))


def test_binomial_equals_pyros_when_expanded_and_at_extreme_logits():
    logits = torch.tensor([-800.0, -30.0, 0.0, 3.0, 30.0, 800.0]).requires_grad_()
    x = torch.tensor([0.0, 1.0, 16.0, 5.0, 15.0, 16.0])
    ours = Binomial(nn.Identity(), (6,), 16)(logits)
    theirs = dist.Binomial(16, logits=logits).to_event(1)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    torch.testing.assert_close(ours.expand([3, 2]).log_prob(x), theirs.expand([3, 2]).log_prob(x))
    (ours_grad,) = torch.autograd.grad(ours.log_prob(x), logits)
    (theirs_grad,) = torch.autograd.grad(theirs.log_prob(x), logits)
    torch.testing.assert_close(ours_grad, theirs_grad)
    with pytest.raises(ValueError, match="support"):
        ours.log_prob(x + 1)


def test_continuous_bernoulli_integrates_to_one():
    grid = torch.linspace(0, 1, 20_001).unsqueeze(-1)
    for logit in (-20.0, -1.0, 1e-3, 0.0, 5.0):
        fn = ContinuousBernoulli(nn.Identity(), (1,))(torch.tensor([logit]))
        total = torch.trapezoid(fn.log_prob(grid).exp(), grid.squeeze(-1))
        torch.testing.assert_close(total, torch.tensor(1.0), rtol=1e-5, atol=0)


def test_what_data_each_class_takes():
    half = torch.tensor([0.0, 0.5, 1.0, torch.nan])
    assert ContinuousBernoulli.takes(half)
    assert not Bernoulli.takes(half)
    assert not Binomial.takes(half)
    assert Bernoulli.takes(torch.tensor([0.0, 1.0, torch.nan]))
    assert Binomial.takes(torch.tensor([0.0, 255.0, torch.nan]))
    assert not Binomial.takes(torch.tensor([256.0]))
    assert not Categorical.takes(torch.tensor([-1.0]))
    with pytest.raises(ValueError, match="whole numbers"):
        Categorical.build(silent, (4,), half.reshape(1, 4))


def test_convolutional_decoders_keep_image_axes_apart_from_classes():
    def images(outputs):
        return convolutional((3,), outputs, (4,))

    z = torch.randn(2, 5, 3)
    assert Categorical.build(images, (2, 7, 8), classes=4)(z).event_shape == (2, 7, 8)
    assert DiagonalGaussian.build(images, (2, 7, 8))(z).event_shape == (2, 7, 8)
    assert Categorical.build(images, (7, 8), classes=4)(z).base_dist.logits.shape == (2, 5, 7, 8, 4)
