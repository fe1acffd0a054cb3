"""MMD, sliced Wasserstein and Sinkhorn, against closed forms of Gaussians and sums by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyro_vae.objectives.penalties import MMD, Penalty, Sinkhorn, SlicedWasserstein
from pyro_vae.objectives.penalties.latent import Latent
from tests.row_pairs import RowPair, gradient
from tests.small_pairs import assert_same, sigmas

STEP = torch.zeros(())
LOC, SCALE, DIMS = 0.8, 0.6, 3  # of an aggregate posterior that is a Gaussian


def gaussian(rows: int, loc: float = LOC, scale: float = SCALE, dims: int = DIMS) -> RowPair:
    """Every row has the same posterior."""
    return RowPair(torch.full((rows, dims), loc), torch.full((rows, dims), scale))


def repeated(penalty: Penalty, pair: RowPair, repeats: int = 200) -> Tensor:
    pyro.set_rng_seed(0)
    with torch.no_grad():
        return torch.stack([penalty(pair.particles(), STEP) for _ in range(repeats)])


def draws(penalty: Penalty, pair: RowPair, number: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """The penalty's value and the draws of both sides that it was made from."""
    particles = pair.particles(number=number)
    state = torch.get_rng_state()
    value = penalty(particles, STEP)
    torch.set_rng_state(state)
    latent = Latent(particles, None, "test")
    return value, latent.draws, latent.from_prior()


# ---------------------------------------------------------------------------------------------
# MMD


def rbf(variance: float, shift: float, unit: float) -> float:
    """E exp(-|u|² / unit) for u ~ N(shift, variance I)."""
    wide = unit + 2 * variance
    return float((unit / wide) ** (DIMS / 2) * math.exp(-DIMS * shift**2 / wide))


def exact_mmd(
    kernel: str, scale: float, loc: float, spread: float, rows: float = math.inf
) -> float:
    """Between N(loc, spread² I) and N(0, I); 1 / (1 + r) is the integral of e^(-t) e^(-t r). With
    ``rows``, the mean of the biased estimate, which has so many k(z, z) = 1."""
    unit = 2 * DIMS * scale

    def mean(variance: float, shift: float) -> float:
        if kernel == "rbf":
            return rbf(variance, shift, unit)
        nodes, weights = np.polynomial.laguerre.laggauss(80)
        return float(np.dot(weights, [rbf(variance, shift, unit / t) for t in nodes]))

    within = mean(2 * spread**2, 0) + mean(2, 0)
    return (1 - 1 / rows) * within + 2 / rows - 2 * mean(1 + spread**2, loc)


@pytest.mark.parametrize("estimate", ["unbiased", "linear"])
@pytest.mark.parametrize("kernel", ["rbf", "imq"])
@pytest.mark.parametrize(("loc", "spread"), [(LOC, SCALE), (0.0, 1.0)])
def test_mmd_is_unbiased(kernel: str, estimate: str, loc: float, spread: float):
    """Of 11 rows: an odd one has no partner in the linear estimate. 0 where q(z) is the prior."""
    scales = (0.5, 1.0)
    values = repeated(MMD(1.0, kernel, scales, estimate), gaussian(11, loc, spread))
    wanted = sum(exact_mmd(kernel, scale, loc, spread) for scale in scales) / 2
    assert loc == 0 or wanted > 0.02
    assert sigmas(values - wanted).abs() < 4
    assert values.min() < 0


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_biased_mmd_counts_each_draw_with_itself(kernel: str):
    values = repeated(MMD(1.0, kernel, 1.0, "biased"), gaussian(11))
    assert sigmas(values - exact_mmd(kernel, 1.0, LOC, SCALE, rows=11)).abs() < 4
    assert values.min() >= 0


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "rbf": lambda r: torch.exp(-r),
    "imq": lambda r: 1 / (1 + r),
}


@pytest.mark.parametrize("estimate", ["unbiased", "biased", "linear"])
@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_mmd_by_hand(kernel: str, estimate: str):
    """Particle by particle, pair by pair; the gradient reaches the posterior and not the prior."""
    pair = RowPair.random(6, DIMS)
    penalty = MMD(0.7, kernel, (0.5, 2.0), estimate)
    value, z, y = draws(penalty, pair)

    def k(a: Tensor, b: Tensor) -> Tensor:
        r = (a - b).square().sum() / (2 * DIMS)
        return (KERNELS[kernel](r / 0.5) + KERNELS[kernel](r / 2)) / 2

    total = torch.zeros(())
    for a, b in zip(z, y, strict=True):
        if estimate == "linear":
            h = [
                k(a[i], a[i + 1]) + k(b[i], b[i + 1]) - k(a[i], b[i + 1]) - k(a[i + 1], b[i])
                for i in (0, 2, 4)
            ]
            total = total + sum(h) / 3
            continue
        alone = estimate == "unbiased"
        kept = [(i, j) for i in range(6) for j in range(6) if i != j or not alone]
        within = sum(k(a[i], a[j]) + k(b[i], b[j]) for i, j in kept) / len(kept)
        total = total + within - 2 * sum(k(p, q) for p in a for q in b) / 36
    wanted = 0.7 * total / 2
    assert_same(value, wanted)
    assert_same(*(gradient(v, [pair.loc, pair.scale]) for v in (value, wanted)))
    assert gradient(value, [pair.prior_loc]).abs().max() == 0


def test_a_kernel_may_be_a_function_and_imq_has_seven_scales():
    pair = RowPair.random(6, DIMS)

    def value(penalty: MMD) -> Tensor:
        pyro.set_rng_seed(3)
        return penalty(pair.particles(), STEP)

    assert_same(
        value(MMD(kernel=KERNELS["imq"], scales=0.5)), value(MMD(kernel="imq", scales=[0.5]))
    )
    assert_same(value(MMD()), value(MMD(kernel="rbf", scales=1)))
    seven = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    assert_same(
        value(MMD(kernel="imq")),
        torch.stack([value(MMD(kernel="imq", scales=s)) for s in seven]).mean(),
    )


# ---------------------------------------------------------------------------------------------
# Transport


def order_statistics(rows: int) -> Tensor:
    """Means of the sorted draws of N(0, 1), by quadrature."""
    x = torch.linspace(-9, 9, 4001)
    below, above = torch.special.log_ndtr(x), torch.special.log_ndtr(-x)
    log_normal = -x.square() / 2 - math.log(2 * math.pi) / 2
    i = torch.arange(1, rows + 1)[:, None]
    count = torch.lgamma(torch.tensor(rows + 1.0)) - torch.lgamma(i * 1.0)
    log_p = count - torch.lgamma(rows - i + 1.0) + (i - 1) * below + (rows - i) * above
    means: Tensor = ((log_p + log_normal).exp() * x).sum(1) * (x[1] - x[0])
    return means


def test_sliced_wasserstein_has_the_mean_of_sorted_gaussians():
    """E of B sorted draws of N(m, s²) and N(0, 1): m² + s² + 1 - 2 s mean_i (E x_(i))²."""
    rows = 16
    rho = order_statistics(rows).square().mean()
    for loc, scale in ((LOC, SCALE), (0.0, 1.0)):
        values = repeated(SlicedWasserstein(projections=4), gaussian(rows, loc, scale))
        assert sigmas(values - (loc**2 + scale**2 + 1 - 2 * scale * rho)).abs() < 4


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_sliced_wasserstein_is_an_assignment_along_each_direction(p: float):
    pair = RowPair.random(8, DIMS)
    pyro.set_rng_seed(0)
    particles = pair.particles()
    latent = Latent(particles, None, "test")
    state = torch.get_rng_state()
    value = SlicedWasserstein(projections=5, p=p)(particles, STEP)
    torch.set_rng_state(state)
    z, y = latent.draws[0], latent.from_prior()[0]
    directions = torch.randn(DIMS, 5)
    costs = []
    for direction in (directions / directions.norm(dim=0)).T:
        cost = ((z @ direction)[:, None] - y @ direction).abs() ** p
        costs.append(cost[linear_sum_assignment(cost.detach())].mean())
    assert_same(value, torch.stack(costs).mean())
    wanted = gradient(torch.stack(costs).mean(), [pair.loc, pair.scale])
    assert_same(gradient(value, [pair.loc, pair.scale]), wanted)


def test_sinkhorn_goes_to_the_best_assignment():
    """As epsilon goes to 0, value and gradient."""
    pair = RowPair.random(8, DIMS)
    value, z, y = draws(Sinkhorn(epsilon=1e-3, iterations=3000), pair, number=1)
    cost = (z[0][:, None] - y[0]).square().sum(-1)
    best = cost[linear_sum_assignment(cost.detach())].mean()
    torch.testing.assert_close(value, best, rtol=1e-3, atol=0)
    gradients = [gradient(v, [pair.loc, pair.scale]) for v in (value, best)]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-3)


def entropic(a: float, b: float, shift: float, epsilon: float) -> float:
    """T of N(shift, a) and N(0, b) in one dimension (Janati et al. 2020, theorem 1)."""
    s = epsilon / 2
    d = math.sqrt(4 * a * b + s**2)
    return shift**2 + a + b - d + s * (1 - math.log(2 * s)) + s * math.log(d + s)


def test_sinkhorn_has_the_closed_form_of_gaussians():
    """The samples' own bias is of order 1 / B: taken out by two sizes."""
    epsilon = 0.5
    by_dim = [entropic(SCALE**2, 1.0, LOC, 2 * epsilon)]
    by_dim += [-entropic(v, v, 0.0, 2 * epsilon) / 2 for v in (SCALE**2, 1.0)]
    penalty = Sinkhorn(epsilon=epsilon, iterations=15)
    small, large = (repeated(penalty, gaussian(rows, dims=1), 100) for rows in (60, 120))
    assert sigmas(2 * large - small - sum(by_dim)).abs() < 4
    assert (2 * large - small).std() / 100**0.5 < 0.1 * sum(by_dim)


def test_sinkhorn_takes_the_gradient_of_its_value():
    """Central differences in the means, the draws held."""
    pair = RowPair.random(6, 2)
    penalty = Sinkhorn(epsilon=0.2, iterations=400)

    def value(shift: Tensor) -> Tensor:
        pyro.set_rng_seed(1)
        moved = RowPair(pair.loc.detach() + shift, pair.scale.detach())
        return penalty(moved.particles(number=2), STEP)

    pyro.set_rng_seed(1)
    found = gradient(penalty(pair.particles(number=2), STEP), [pair.loc]).reshape(6, 2)
    step = 1e-5
    for row, dim in ((0, 0), (3, 1), (5, 0)):
        shift = torch.zeros(6, 2)
        shift[row, dim] = step
        slope = (value(shift) - value(-shift)) / (2 * step)
        torch.testing.assert_close(found[row, dim], slope.detach(), rtol=1e-5, atol=1e-7)


def test_transport_vanishes_between_the_same_draws(monkeypatch: pytest.MonkeyPatch):
    pair = RowPair.random(6, 2)
    monkeypatch.setattr(Latent, "from_prior", lambda latent: latent.draws.detach())
    penalties: list[Any] = [SlicedWasserstein(), MMD(estimate="biased"), Sinkhorn(iterations=200)]
    for penalty in penalties:
        assert abs(penalty(pair.particles(number=2), STEP)) < 1e-8


# ---------------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MMD(kernel="gauss"), r"MMD: came kernel='gauss', wanted one of 'rbf', 'imq'"),
        (lambda: MMD(estimate="u"), r"MMD: came estimate='u', wanted one of 'unbiased'"),
        (lambda: MMD(scales=()), r"MMD: came scales=\(\), wanted positive numbers"),
        (lambda: MMD(scales=(1.0, 0.0)), r"wanted positive numbers"),
        (lambda: SlicedWasserstein(projections=0), r"came projections=0, p=2.0, wanted 1 or more"),
        (lambda: Sinkhorn(epsilon=0.0), r"came epsilon=0.0, iterations=20, wanted positive"),
    ],
    ids=["kernel", "estimate", "no scales", "scale 0", "projections", "epsilon"],
)
def test_arguments_are_checked(build: Callable[[], Any], message: str):
    with pytest.raises(ValueError, match=message):
        build()


def test_mmd_wants_two_rows():
    with pytest.raises(ValueError, match=r"MMD: came 1 row, wanted two at least"):
        MMD()(gaussian(1).particles(), STEP)
