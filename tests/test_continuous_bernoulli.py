"""The continuous Bernoulli against its closed forms in 100 digits, at any logit."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_vae.conditionals.continuous_bernoulli import ExactContinuousBernoulli

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
TOLERANCE = {torch.float32: 2e-6, torch.float64: 2e-12}
SIZES = (0.0, 1e-9, 1e-4, 8e-4, 0.004, 0.04, 0.05, 0.3, 0.99, 1.01, 3.0, 15.9, 20.0, 100.0, 300.0)
LOGITS = torch.tensor([sign * size for size in SIZES for sign in (-1.0, 1.0)], dtype=torch.float64)
SIGMAS = 4.0


def fn(logits: Tensor) -> ExactContinuousBernoulli:
    return ExactContinuousBernoulli(logits=logits)


def exact(logits: Tensor) -> tuple[Tensor, ...]:
    """Mean, variance, third central moment (the derivative of the variance) and entropy."""
    found = []
    with localcontext() as context:
        context.prec = 100
        for logit in logits.double().tolist():
            at = Decimal(logit) if abs(logit) > 1e-12 else Decimal("1e-12")
            up, half = at.exp(), (at / 2).exp()
            sinh, cosh = (half - 1 / half) / 2, (half + 1 / half) / 2
            mean = 1 / (1 - 1 / up) - 1 / at
            variance = 1 / at**2 - 1 / (4 * sinh**2)
            third = -2 / at**3 + cosh / (4 * sinh**3)
            entropy = ((up - 1) / at).ln() - at * mean
            found.append([float(each) for each in (mean, variance, third, entropy)])
    return tuple(torch.tensor(found, dtype=torch.float64).unbind(1))


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(value.sum(), logits)
    return slope.double()


@DTYPES
def test_moments_and_their_gradients(dtype: torch.dtype) -> None:
    """d mean / dl is the variance, and its derivative the third central moment."""
    logits = LOGITS.to(dtype).clone().requires_grad_()
    mean, variance, third, entropy = exact(logits.detach())
    close: dict[str, Any] = {"rtol": 0.0, "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(fn(logits).mean.double(), mean, **close)
    torch.testing.assert_close(gradient(fn(logits).mean, logits), variance, **close)
    torch.testing.assert_close(gradient(fn(logits).variance, logits), third, **close)
    at = fn(logits).variance.double()
    torch.testing.assert_close(at, variance, rtol=20 * TOLERANCE[dtype], atol=0)
    assert bool((at > 0).all())
    many = 20 * TOLERANCE[dtype]  # l - l mean of the largest logits
    torch.testing.assert_close(fn(logits).entropy().double(), entropy, rtol=0, atol=many)
    assert bool(gradient(fn(logits).entropy(), logits).isfinite().all())


def test_what_float32_lost() -> None:
    at = fn(torch.tensor([20.0, 100.0, -0.004], dtype=torch.float32))
    assert at.mean.tolist() == pytest.approx([0.95, 0.99, 0.5 - 0.004 / 12], abs=1e-6)
    assert at.variance.tolist() == pytest.approx([1 / 400, 1e-4, 1 / 12], rel=1e-5)


def distribution(x: Tensor, logits: Tensor) -> Tensor:
    """(e^(l x) - 1) / (e^l - 1) in 100 digits."""
    with localcontext() as context:
        context.prec = 100
        found = []
        for u, logit in zip(x.double().tolist(), logits.double().tolist(), strict=True):
            at = Decimal(logit) if abs(logit) > 1e-12 else Decimal("1e-12")
            found.append(float(((at * Decimal(u)).exp() - 1) / (at.exp() - 1)))
    return torch.tensor(found, dtype=torch.float64)


@DTYPES
def test_cdf(dtype: torch.dtype) -> None:
    x = torch.linspace(0, 1, 21, dtype=dtype)[:, None].expand(21, len(LOGITS)).flatten()
    logits = LOGITS.to(dtype).repeat(21).requires_grad_()
    came, wanted = fn(logits).cdf(x), distribution(x, logits.detach())
    kept = wanted > (1e-30 if dtype == torch.float32 else 0)  # float32 ends there
    relative = (came.detach().double() / wanted - 1).abs()[kept]
    # the exponent l (x - 1) is rounded
    assert float(relative.max()) < (1e-4 if dtype == torch.float32 else 1e-12)
    # d F / dl = F (E[x | below] - E[x]), which at l = 0 is x (x - 1) / 2
    slope = gradient(came, logits)
    assert bool(slope.isfinite().all())
    flat = LOGITS.repeat(21) == 0
    middle = (x * (x - 1) / 2).double()
    torch.testing.assert_close(slope[flat], middle[flat], rtol=1e-6, atol=1e-7)
    outside = ExactContinuousBernoulli(logits=LOGITS.to(dtype), validate_args=False)
    assert bool((outside.cdf(torch.tensor(-0.5, dtype=dtype)) == 0).all())
    assert bool((outside.cdf(torch.tensor(1.5, dtype=dtype)) == 1).all())


@DTYPES
def test_icdf_of_cdf_is_the_identity(dtype: torch.dtype) -> None:
    """Where the distribution function leaves digits: u is not rounded to 1."""
    x = torch.linspace(0, 1, 21, dtype=dtype)[:, None].expand(21, len(LOGITS))
    logits = LOGITS.to(dtype).expand_as(x)
    u = fn(logits).cdf(x)
    density = fn(logits).log_prob(x).exp()
    eps = torch.finfo(dtype).eps
    tiny = u < torch.finfo(dtype).tiny
    kept = (~tiny | (x == 0)) & ((density > 1e-3) | (logits > 0))
    off = (fn(logits).icdf(u) - x).abs()
    # u is known to half a digit, which moves x by that much over the density
    bound = 2 * eps * (1 + u / density.clamp(min=torch.finfo(dtype).tiny))
    assert bool((off <= bound)[kept].all())
    assert float(kept.double().mean()) > 0.75
    assert bool((fn(LOGITS.to(dtype)).icdf(torch.tensor(0.0, dtype=dtype)) == 0).all())
    assert bool((fn(LOGITS.to(dtype)).icdf(torch.tensor(1.0, dtype=dtype)) >= 1 - 4 * eps).all())


@DTYPES
def test_gradient_of_draws(dtype: torch.dtype) -> None:
    """Implicitly: dx / dl = -(dF / dl) / p(x), with dF / dl = F(x) (E[x' | x' < x] - E[x'])."""
    u = torch.tensor([0.0, 1e-6, 0.1, 0.5, 0.9, 0.9999], dtype=dtype)
    logits = LOGITS.to(dtype).expand(6, -1).clone().requires_grad_()
    u = u[:, None].expand_as(logits)
    x = fn(logits).icdf(u)
    slope = gradient(x, logits)
    at, exponent = x.detach().double(), logits.detach().double()
    # below x the variable is x times a continuous Bernoulli with logit l x
    below = at * exact((exponent * at).flatten())[0].view_as(at)
    mean = exact(exponent.flatten())[0].view_as(at)
    density = fn(exponent).log_prob(at.clamp(0, 1)).exp()
    wanted = u.double() * (mean - below) / density
    torch.testing.assert_close(slope, wanted, rtol=0, atol=10 * TOLERANCE[dtype])
    at_zero = u[:, 0] * (1 - u[:, 0]) / 2
    torch.testing.assert_close(slope[:, 0], at_zero.double(), rtol=0, atol=1e-7)


@DTYPES
def test_draws_have_the_moments(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype).clone().requires_grad_()
    n = 40_000
    parts = [fn(logits).rsample((n // 50,)) for _ in range(50)]
    draws = torch.cat(parts).detach()
    assert draws.dtype == dtype
    assert bool(((draws >= 0) & (draws <= 1)).all())
    mean, variance, _, _ = exact(logits.detach())
    drawn = draws.double()
    assert bool(((drawn.mean(0) - mean).abs() < SIGMAS * (variance / n).sqrt()).all())
    squares = (drawn - mean).square()
    error = squares.std(0) / math.sqrt(n)
    assert bool(((squares.mean(0) - variance).abs() < SIGMAS * error).all())
    # the mean of dx / dl is d mean / dl, the variance
    slopes = torch.stack([gradient(part, logits) / len(part) for part in parts])
    off = slopes.mean(0) - variance
    assert bool((off.abs() < SIGMAS * slopes.std(0) / math.sqrt(50)).all())


def test_expanded_and_in_an_event() -> None:
    logits = torch.tensor([-40.0, 0.0, 40.0])
    both = fn(logits).expand([2, 3])
    torch.testing.assert_close(both.mean, fn(logits).mean.expand(2, 3))
    assert both.to_event(1).rsample().shape == (2, 3)
    assert float(both.rsample()[:, 2].min()) > 0.5
