"""Conditionals: densities against scipy, any leading dimensions, elementwise masks, starts."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
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
    DiscretizedLogisticMixture,
    Gaussian,
    LogisticMixture,
    NegativeBinomial,
    OptimalSigma,
    StandardNormal,
    StudentT,
)
from pyro_vae.conditionals.discrete import _NegativeBinomial
from pyro_vae.conditionals.special import remainder
from pyro_vae.conditionals.student import _StudentT
from pyro_vae.nn import convolutional, dense


def continuous_bernoulli_logpdf(x, logits):
    """log(l / (e^l - 1)) + l x, the density of a truncated exponential."""
    return np.log(logits / np.expm1(logits)) + logits * x


def logistic_mixture_logpmf(fn, x):
    """Differences of scipy's logistic cdf, summed over the components."""
    loc, scale = fn.loc.numpy(), fn.scale.numpy()
    weights = scipy.special.softmax(fn.logits.numpy(), -1)
    x = x.numpy()[..., None]
    upper = np.where(x == 16, np.inf, x + 0.5)
    lower = np.where(x == 0, -np.inf, x - 0.5)
    logistic = scipy.stats.logistic(loc, scale)
    return np.log((weights * (logistic.cdf(upper) - logistic.cdf(lower))).sum(-1))


def normal(rng_shape):
    return torch.randn(rng_shape)


def binary(shape):
    return torch.randint(2, shape).to(torch.float64)


def counts(shape):
    return torch.randint(17, shape).to(torch.float64)


def many(shape):
    return torch.poisson(1000 * torch.rand(shape) ** 4)


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
    "LogisticMixture": (
        partial(LogisticMixture.build, levels=17),
        counts,
        logistic_mixture_logpmf,
    ),
    "LogisticMixture, one component": (
        partial(LogisticMixture.build, levels=17, components=1),
        counts,
        logistic_mixture_logpmf,
    ),
    "NegativeBinomial": (
        NegativeBinomial.build,
        many,
        lambda fn, x: scipy.stats.nbinom.logpmf(
            x, fn.concentration, fn.concentration / (fn.concentration + fn.mean)
        ),
    ),
    "NegativeBinomial, shared": (
        partial(NegativeBinomial.build, shared=True),
        many,
        lambda fn, x: scipy.stats.nbinom.logpmf(
            x, fn.concentration, fn.concentration / (fn.concentration + fn.mean)
        ),
    ),
    "StudentT": (
        StudentT.build,
        normal,
        lambda fn, x: scipy.stats.t.logpdf(x, fn.df, fn.loc, fn.scale),
    ),
    "StudentT, shared": (
        partial(StudentT.build, shared=True),
        normal,
        lambda fn, x: scipy.stats.t.logpdf(x, fn.df, fn.loc, fn.scale),
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
        (LogisticMixture.build, torch.randint(250, 256, (6, 5))),
        (NegativeBinomial.build, torch.randint(250, 256, (6, 5))),
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


def test_negative_binomial_scores_in_its_batch_shape():
    """A site that does not depend on the latents still has a density in every particle."""
    x = torch.tensor([[0.0, 3.0], [7.0, 1.0]])
    fn = _NegativeBinomial(torch.tensor(2.0), torch.tensor([1.5, 4.0]))
    log_prob = fn.expand([3, 2, 2]).log_prob(x)
    assert log_prob.shape == (3, 2, 2)
    torch.testing.assert_close(log_prob, fn.log_prob(x).expand(3, 2, 2))


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
    assert LogisticMixture.takes(torch.tensor([0.0, 255.0, torch.nan]))
    assert not LogisticMixture.takes(torch.tensor([256.0]))
    assert NegativeBinomial.takes(torch.tensor([0.0, 1e6, torch.nan]))
    for value in (-1.0, 0.5, torch.inf):
        assert not NegativeBinomial.takes(torch.tensor([value]))
    with pytest.raises(ValueError, match="whole numbers"):
        Categorical.build(silent, (4,), half.reshape(1, 4))


def test_convolutional_decoders_keep_image_axes_apart_from_classes():
    def images(outputs):
        return convolutional((3,), outputs, (4,))

    z = torch.randn(2, 5, 3)
    assert Categorical.build(images, (2, 7, 8), classes=4)(z).event_shape == (2, 7, 8)
    assert DiagonalGaussian.build(images, (2, 7, 8))(z).event_shape == (2, 7, 8)
    assert LogisticMixture.build(images, (2, 7, 8))(z).event_shape == (2, 7, 8)
    assert LogisticMixture.build(images, (7, 8))(z).base_dist.loc.shape == (2, 5, 7, 8, 5)
    assert Categorical.build(images, (7, 8), classes=4)(z).base_dist.logits.shape == (2, 5, 7, 8, 4)


# ---- mixtures of discretized logistics


def mixture(rows, dtype=torch.float64, components=3):
    """Locations on and off the scale, scales from .1 to 300 levels."""
    loc = 400 * torch.rand(rows, components) - 72
    scale = torch.exp(8 * torch.rand(rows, components) - 2.3)
    parameters = (torch.randn(rows, components), loc, scale)
    return [parameter.to(dtype).requires_grad_() for parameter in parameters]


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
def test_logistic_mixture_sums_to_one(levels):
    logits, loc, scale = mixture(50)
    fn = DiscretizedLogisticMixture(logits, loc * levels / 256, scale, levels)
    every = fn.enumerate_support()
    assert every.shape == (levels, 50)
    assert fn.enumerate_support(expand=False).shape == (levels, 1)
    p = fn.log_prob(every).exp()
    torch.testing.assert_close(p.sum(0), torch.ones(50), rtol=1e-12, atol=0)
    mean = (p * every).sum(0)
    torch.testing.assert_close(fn.mean, mean)
    torch.testing.assert_close(fn.variance, (p * (every - mean).square()).sum(0))


def test_logistic_mixture_in_float32_is_that_in_float64():
    single = mixture(2000, torch.float32)
    double = [parameter.detach().double().requires_grad_() for parameter in single]
    scores = []
    for parameters in (single, double):
        fn = DiscretizedLogisticMixture(*parameters)
        scores.append(fn.log_prob(fn.enumerate_support()))
        scores[-1].sum().backward()
    torch.testing.assert_close(scores[0].double(), scores[1], rtol=1e-6, atol=1e-4)
    total = scores[0].detach().double().exp().sum(0)
    torch.testing.assert_close(total, torch.ones(2000), rtol=1e-6, atol=0)
    for came, wanted in zip(single, double, strict=True):
        assert came.grad is not None
        assert wanted.grad is not None
        torch.testing.assert_close(came.grad.double(), wanted.grad, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("far", [1e3, 1e6, 1e12, -1e3, -1e6, -1e12])
def test_logistic_mixture_pulls_back_means_that_are_far_off(far):
    """The log probability falls by 1 / s for each level, and its gradient does not vanish."""
    x = torch.tensor([0.0, 1.0, 100.0, 254.0, 255.0], dtype=torch.float32)
    loc = torch.full((5, 1), far, dtype=torch.float32, requires_grad=True)
    scale = torch.full((5, 1), 0.1, dtype=torch.float32, requires_grad=True)
    fn = DiscretizedLogisticMixture(torch.zeros(5, 1, dtype=torch.float32), loc, scale)
    log_prob = fn.log_prob(x)
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert loc.grad is not None
    assert scale.grad is not None
    assert scale.grad.isfinite().all()
    wanted = torch.full((5, 1), -math.copysign(10.0, far), dtype=torch.float32)
    wanted[-1 if far > 0 else 0] = 0.0  # the edge has the tail
    torch.testing.assert_close(loc.grad, wanted)


def test_logistic_mixture_draws_what_it_scores():
    logits, loc, scale = (p.detach() for p in mixture(4))
    fn = DiscretizedLogisticMixture(logits, loc / 16, scale / 4, 17)
    draws = fn.sample((40_000,))
    assert fn.support.check(draws).all()
    frequencies = torch.stack([(draws == level).double().mean(0) for level in range(17)])
    p = fn.log_prob(fn.enumerate_support()).exp()
    assert ((frequencies - p).abs() < 5 * (p * (1 - p) / 40_000).sqrt() + 1e-9).all()


def test_logistic_mixture_expands_and_masks():
    logits, loc, scale = mixture(4)
    fn = DiscretizedLogisticMixture(logits, loc, scale)
    wide = fn.expand([3, 2, 4])
    x = torch.randint(256, (3, 2, 4)).double()
    assert wide.batch_shape == (3, 2, 4)
    assert wide.sample((5,)).shape == (5, 3, 2, 4)
    assert torch.equal(wide.log_prob(x), fn.log_prob(x))
    mask = torch.rand(3, 2, 4) < 0.5
    masked = wide.mask(mask).to_event(1)
    assert torch.equal(masked.log_prob(x), (fn.log_prob(x) * mask).sum(-1))
    for wrong in (-1.0, 256.0, 0.5):
        with pytest.raises(ValueError, match="support"):
            fn.log_prob(torch.full((4,), wrong))


@pytest.mark.parametrize("components", [1, 2, 5])
def test_logistic_mixture_starts_at_mean_and_spread(components):
    x = (120 + 15 * torch.randn(500, 5)).round().clamp(0, 255)
    fn = LogisticMixture.build(silent, (5,), x, components=components)(torch.zeros(1, 3))
    torch.testing.assert_close(fn.mean[0], x.mean(0), rtol=1e-3, atol=0)
    spread = x.std(0, correction=0)
    torch.testing.assert_close(fn.variance[0].sqrt(), spread, rtol=0.02, atol=0)
    loc = fn.base_dist.loc[0, 0]
    assert len(loc.unique()) == components  # else they would all learn the same


def test_levels_are_read_off_the_data():
    x = counts((200, 5))
    assert LogisticMixture.build(silent, (5,), x).levels == 17
    assert LogisticMixture.build(silent, (5,), x * 10).levels == 256
    assert LogisticMixture.build(silent, (5,), x, levels=20).levels == 20
    assert LogisticMixture.build(silent, (5,)).levels == 256
    with pytest.raises(ValueError, match="levels= came 1"):
        LogisticMixture(nn.Identity(), (5,), levels=1)
    with pytest.raises(ValueError, match="components= came 0"):
        LogisticMixture(nn.Identity(), (5,), components=0)


def test_logistic_mixture_learns_two_modes():
    """Black and white with nothing between: where Binomial has to be grey."""
    x = torch.where(torch.rand(400, 2) < 0.3, 20.0, 230.0) + torch.randint(-2, 3, (400, 2))
    conditional = LogisticMixture.build(silent, (2,), x, components=2)
    optimizer = torch.optim.Adam(conditional.parameters(), lr=0.05)
    z = torch.zeros(400, 3)
    for _ in range(400):
        optimizer.zero_grad()
        (-conditional(z).log_prob(x).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        score = conditional(z).log_prob(x).mean() / 2
        binomial = Binomial.build(silent, (2,), x)(z).log_prob(x).mean() / 2
    entropy = -(0.3 * math.log(0.3) + 0.7 * math.log(0.7)) + math.log(5)
    assert -score < entropy + 0.25  # 0.2 from uniform to a logistic of that width
    assert -binomial > 50


# ---- counts without end


def test_remainder_of_stirlings_formula():
    z = torch.cat([torch.logspace(-6, 8, 200), torch.tensor([15.9999, 16.0, 16.0001])])
    log_gamma = torch.as_tensor(scipy.special.gammaln(z.numpy()))
    exact = log_gamma - (z - 0.5) * z.log() + z - 0.5 * math.log(2 * math.pi)
    small = z < 1e3  # beyond, the difference of doubles cancels too
    torch.testing.assert_close(remainder(z)[small], exact[small], rtol=1e-9, atol=5e-12)
    torch.testing.assert_close(remainder(z)[~small], 1 / (12 * z[~small]), rtol=1e-6, atol=0)
    single = z[small].float()
    torch.testing.assert_close(
        remainder(single).double(), remainder(single.double()), rtol=1e-6, atol=5e-6
    )


COUNTS = (0.0, 1.0, 2.0, 20.0, 300.0, 12_345.0, 1e6)
MEANS = (1e-4, 0.3, 4.0, 100.0, 1e4, 1e6)
CONCENTRATIONS = (1e-3, 0.5, 3.0, 200.0, 1e4, 1e6)


def test_negative_binomial_is_accurate_in_float32_where_pyros_is_not():
    grid = torch.cartesian_prod(*map(torch.tensor, (COUNTS, MEANS, CONCENTRATIONS)))
    x, mean, concentration = grid.float().unbind(-1)
    mean.requires_grad_()
    concentration.requires_grad_()
    log_prob = _NegativeBinomial(concentration, mean).log_prob(x)
    log_prob.sum().backward()
    x, m, c = (p.detach().double() for p in (x, mean, concentration))
    wanted = torch.as_tensor(scipy.stats.nbinom.logpmf(x, c, c / (c + m)))
    wide = _NegativeBinomial(c, m).log_prob(x)
    torch.testing.assert_close(log_prob.double(), wide, rtol=3e-6, atol=1e-5)
    sure = wanted > -500  # scipy itself loses digits far out
    torch.testing.assert_close(wide[sure], wanted[sure], rtol=1e-6, atol=1e-6)
    assert mean.grad is not None
    assert concentration.grad is not None
    assert concentration.grad.isfinite().all()
    slope = c * (x - m) / (m * (c + m))
    torch.testing.assert_close(mean.grad.double() * m, slope * m, rtol=2e-6, atol=1e-6)
    theirs = dist.GammaPoisson(c.float(), (c / m).float()).log_prob(x.float())
    near = wide > -30
    assert (theirs.double() - wide)[near].abs().max() > 0.1


@pytest.mark.parametrize(("mean", "concentration"), [(0.3, 0.5), (20.0, 3.0), (50.0, 1e5)])
def test_negative_binomial_sums_to_one_with_the_moments_it_states(mean, concentration):
    fn = _NegativeBinomial(torch.tensor(concentration), torch.tensor(mean))
    x = torch.arange(2000.0)
    p = fn.log_prob(x).exp()
    torch.testing.assert_close(p.sum(), torch.tensor(1.0))
    torch.testing.assert_close((p * x).sum(), fn.mean)
    torch.testing.assert_close((p * (x - mean).square()).sum(), fn.variance)
    torch.testing.assert_close(fn.variance, torch.tensor(mean + mean**2 / concentration))
    draws = fn.sample((20_000,))
    assert (draws.mean() - mean).abs() < 5 * (fn.variance / 20_000).sqrt()


def test_negative_binomial_equals_itself_when_expanded():
    c, mean = torch.rand(4) + 0.1, 10 * torch.rand(2, 4)
    fn, x = _NegativeBinomial(c, mean), many((3, 2, 4))
    wide = fn.expand([3, 2, 4])
    assert torch.equal(wide.log_prob(x), fn.log_prob(x))
    assert wide.sample().shape == (3, 2, 4)
    assert wide.mean.shape == (3, 2, 4)
    for wrong in (-1.0, 0.5):
        with pytest.raises(ValueError, match="support"):
            fn.log_prob(torch.full((2, 4), wrong))


def test_negative_binomial_starts_at_mean_and_dispersion():
    rate = torch.distributions.Gamma(2.0, 2.0 / torch.tensor([300.0, 5.0, 1000.0]))
    x = torch.poisson(rate.sample((4000,)))
    conditional = NegativeBinomial.build(silent, (3,), x)
    fn = conditional(torch.zeros(1, 3))
    torch.testing.assert_close(fn.mean[0], x.mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(fn.variance[0], x.var(0, correction=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(conditional.dispersion, torch.full((3,), 0.5), rtol=0.15, atol=0)
    shared = NegativeBinomial.build(silent, (3,), x, shared=True)
    assert shared.dispersion.shape == ()
    torch.testing.assert_close(shared.dispersion, torch.tensor(0.5), rtol=0.1, atol=0)
    empty = NegativeBinomial.build(silent, (3,), torch.zeros(40, 3))(torch.zeros(1, 3))
    assert empty.log_prob(torch.zeros(1, 3)).isfinite()
    assert (empty.mean > 0).all()


def test_learned_dispersion_reaches_the_maximum_of_the_likelihood():
    """That of gamma-Poisson counts and, where there is none, the limit of Poisson."""
    rate = torch.stack(
        [torch.distributions.Gamma(4.0, 4.0 / 50.0).sample((3000,)), torch.full((3000,), 50.0)], -1
    )
    x, z = torch.poisson(rate), torch.zeros(3000, 3)
    conditional = NegativeBinomial.build(silent, (2,), x)
    with torch.no_grad():
        conditional.raw.add_(1.0)  # start far off
    optimizer = torch.optim.Adam([conditional.raw], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (-conditional(z).log_prob(x).mean()).backward()
        optimizer.step()
    torch.testing.assert_close(conditional.dispersion[0], torch.tensor(0.25), rtol=0.1, atol=0)
    assert conditional.dispersion[1] < 0.003
    conditional.raw.data.fill_(-1000.0)
    limit = conditional(z[0]).base_dist
    wanted = scipy.stats.poisson.logpmf(x[:, 1], limit.mean[1].item())
    came = limit.log_prob(x)[:, 1].detach()
    torch.testing.assert_close(came, torch.as_tensor(wanted), rtol=0, atol=1e-4)


# ---- heavy tails


def test_student_t_is_accurate_in_float32_where_pyros_is_not():
    grid = torch.cartesian_prod(
        torch.tensor([0.5, 1.0, 2.1, 5.0, 31.0, 33.0, 1e3, 1e5, 1e7]),
        torch.tensor([0.0, 0.1, 1.0, 5.0, 1e3, 1e8]),
    )
    df, y = grid.float().unbind(-1)
    df.requires_grad_()
    came = _StudentT(df, torch.zeros_like(y), torch.ones_like(y)).log_prob(y)
    came.sum().backward()
    assert df.grad is not None
    assert df.grad.isfinite().all()
    wanted = torch.as_tensor(scipy.stats.t.logpdf(y, df.detach().double()))
    sure = df.detach() <= 1e5
    torch.testing.assert_close(came.double()[sure], wanted[sure], rtol=5e-6, atol=5e-6)
    gaussian = torch.as_tensor(scipy.stats.norm.logpdf(y))
    limit = ~sure & (y <= 5)
    torch.testing.assert_close(came.double()[limit], gaussian[limit], rtol=0, atol=1e-4)
    theirs = dist.StudentT(df.detach()).log_prob(y)
    assert (theirs.double() - gaussian)[limit].abs().max() > 0.1


def test_student_t_expands():
    fn, x = _StudentT(torch.rand(4) + 2, torch.randn(2, 4), torch.rand(4)), torch.randn(3, 2, 4)
    wide = fn.expand([3, 2, 4])
    assert torch.equal(wide.log_prob(x), fn.log_prob(x))
    assert wide.rsample().shape == (3, 2, 4)
    assert wide.has_rsample


def test_student_t_starts_where_outliers_do_not_reach():
    clean = 7 + 3 * torch.randn(2000, 2)
    x = clean.clone()
    x[:40] = 1e6
    x[500:900, 1] = torch.nan
    conditional = StudentT.build(silent, (2,), x)
    fn = conditional(torch.zeros(1, 3))
    torch.testing.assert_close(fn.mean[0], torch.full((2,), 7.0), rtol=0.05, atol=0)
    torch.testing.assert_close(conditional.scale, torch.full((2,), 3.0), rtol=0.1, atol=0)
    torch.testing.assert_close(conditional.df, torch.full((2,), 5.0))
    constant = StudentT.build(silent, (2,), torch.full((20, 2), 4.0))
    torch.testing.assert_close(constant.scale, torch.ones(2))
    sparse = torch.zeros(20, 2)
    sparse[:5] = torch.randn(5, 2)  # more than half are the same
    scale = StudentT.build(silent, (2,), sparse).scale
    torch.testing.assert_close(scale, sparse.std(0, correction=0))


def test_student_t_learns_scale_and_degrees_of_freedom():
    x, z = 2.0 * torch.distributions.StudentT(3.0).sample((4000, 1)), torch.zeros(4000, 3)
    conditional = StudentT.build(silent, (1,), x)
    optimizer = torch.optim.Adam([conditional.raw, conditional.raw_df], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (-conditional(z).log_prob(x).mean()).backward()
        optimizer.step()
    df, _, scale = scipy.stats.t.fit(x.numpy(), floc=float(x.median()))
    torch.testing.assert_close(conditional.df.item(), df, rtol=0.02, atol=0)
    torch.testing.assert_close(conditional.scale.item(), scale, rtol=0.01, atol=0)
    assert abs(conditional.scale.item() - 2.0) < 0.15


def test_student_t_keeps_above_its_smallest_degrees_of_freedom_and_scale():
    for smallest in (0.0, 1.0, 2.0):
        conditional = StudentT(nn.Identity(), (2,), scale=5.0, floor=0.01, smallest=smallest)
        torch.testing.assert_close(conditional.df, torch.tensor(5.0))
        with torch.no_grad():
            conditional.raw.fill_(-1000.0)
            conditional.raw_df.fill_(-5.0)
        assert smallest < conditional.df < smallest + 0.01
        torch.testing.assert_close(conditional.scale, torch.tensor(0.05))
    assert conditional(torch.randn(3, 2)).variance.isfinite().all()
    with pytest.raises(ValueError, match=r"df= came 2\.0, wanted above smallest=2\.0"):
        StudentT(nn.Identity(), (2,), df=2.0)


@pytest.mark.parametrize("shape", [(), (3, 1, 1), (3, 4, 2)])
def test_shape_of_what_is_learned_says_what_shares_one(shape):
    net = dense((2,), (3, 4, 2), ())
    student = StudentT(net, (3, 4, 2), scale=torch.ones(shape), df=torch.full(shape, 4.0))
    negative = NegativeBinomial(net, (3, 4, 2), dispersion=torch.full(shape, 2.0))
    assert student.scale.shape == student.df.shape == shape
    torch.testing.assert_close(negative.dispersion, torch.full(shape, 2.0))
    for conditional in (student, negative):
        fn = conditional(torch.randn(7, 2))
        assert fn.event_shape == (3, 4, 2)
        assert fn.log_prob(fn.sample()).shape == (7,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_continuous_bernoulli_integrates_to_one_at_any_logit(dtype):
    logits = torch.tensor([0.0, 1e-6, -1e-3, 0.05, -0.0999, 0.1001, 2.0, -14.0, 40.0, 300.0])
    fn = ContinuousBernoulli(nn.Identity(), (1,))(logits.to(dtype).unsqueeze(-1))
    at_zero = fn.log_prob(torch.zeros(len(logits), 1, dtype=dtype)).double()
    # p(x) = e^(l x) / Z with Z = (e^l - 1) / l, so that log p(0) = -log Z
    l64 = logits.double()
    log_integral = torch.where(
        l64.abs() < 1e-4, l64 / 2, (torch.expm1(-l64.abs()) / -l64.abs()).log() + l64.clamp(min=0)
    )
    error = (at_zero + log_integral).abs()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert float((error / (1 + log_integral.abs())).max()) < tolerance
