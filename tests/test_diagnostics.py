"""k-hat against ArviZ, and what it says where nothing can be fitted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_vae.evaluation.diagnostics import has_tail, khat_threshold, pareto_khat, tail_length

WEIGHTS: dict[str, Callable[[int], Tensor]] = {
    "Gaussian log weights, narrow": lambda k: 0.1 * torch.randn(k, 4),
    "Gaussian log weights": lambda k: torch.randn(k, 4),
    "Gaussian log weights, wide": lambda k: 30 * torch.randn(k, 4),
    "wider than the numbers that exp can take": lambda k: 300 * torch.randn(k, 4),
    "far from 0": lambda k: torch.randn(k, 4) - 1e4,
    "Pareto weights": lambda k: dist.Exponential(1 / 0.9).sample([k, 4]),
    "bounded weights": lambda k: torch.rand(k, 4).log(),
    "tied weights": lambda k: torch.randint(0, 30, (k, 4)).double() / 10,
    "some weights of 0": lambda k: torch.where(
        torch.rand(k, 4) < 0.7, -torch.inf, torch.randn(k, 4)
    ),
}


def largest(log_w: Tensor) -> Tensor:
    """What an evaluation keeps of all weights."""
    return log_w.topk(min(len(log_w), tail_length(len(log_w)) + 1), 0).values


def arviz_khat(log_w: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        import arviz

        return torch.as_tensor(np.asarray(arviz.psislw(log_w.T.numpy().copy())[1]))


@pytest.mark.parametrize("num_particles", [30, 100, 225, 226, 1000])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_khat_is_that_of_arviz(kind: str, num_particles: int):
    log_w = WEIGHTS[kind](num_particles)
    wanted = arviz_khat(log_w)
    torch.testing.assert_close(pareto_khat(largest(log_w)), wanted, atol=1e-8, rtol=1e-8)


def test_khat_does_not_depend_on_order_or_constant():
    log_w = torch.randn(200, 3)
    khat = pareto_khat(largest(log_w))
    torch.testing.assert_close(pareto_khat(largest(log_w).flip(0) + 77.0), khat)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_khat_finds_the_shape_of_pareto_weights(shape: float):
    """log w of a Pareto weight with tail 1 / shape is exponential with mean ``shape``."""
    log_w = shape * dist.Exponential(1.0).sample([20_000, 20])
    khat = pareto_khat(largest(log_w))
    error = khat.std() / math.sqrt(len(khat))
    assert abs(khat.mean() - shape) < 5 * error + 0.02  # the prior of k-hat draws it towards 0.5


@pytest.mark.parametrize("num_particles", [2, 10, 500])
@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_equal_weights_have_no_tail(num_particles: int, noise: float):
    """An exact posterior is not a bad one, though float32 leaves some rounding."""
    log_w = (-500 + noise * torch.randn(num_particles, 3)).float()
    assert bool((pareto_khat(largest(log_w)) == -math.inf).all())


@pytest.mark.parametrize("num_particles", [1, 5, 19, 20])
def test_fewer_than_five_weights_tell_nothing(num_particles: int):
    khat = pareto_khat(largest(torch.randn(num_particles, 3)))
    assert khat.tolist() == [math.inf] * 3
    assert not has_tail(num_particles)


@pytest.mark.parametrize("num_particles", [21, 100])
def test_five_weights_are_enough(num_particles: int):
    assert bool(pareto_khat(largest(torch.randn(num_particles, 3))).isfinite().all())
    assert has_tail(num_particles)
    assert khat_threshold(num_particles) > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_bad(bad: float):
    log_w = torch.randn(100, 2)
    good = pareto_khat(largest(log_w))
    log_w[:, 0] = bad
    khat = pareto_khat(largest(log_w))
    assert khat[0] == math.inf
    assert khat[1] == good[1]


def test_columns_do_not_meet():
    columns = [make(100)[:, :1] for make in WEIGHTS.values()]
    together = pareto_khat(largest(torch.cat(columns, 1)))
    torch.testing.assert_close(together, torch.cat([pareto_khat(largest(c)) for c in columns]))


@pytest.mark.parametrize(("num_particles", "threshold"), [(1, 0.0), (100, 0.5), (10**6, 0.7)])
def test_threshold(num_particles: int, threshold: float):
    assert khat_threshold(num_particles) == pytest.approx(threshold)
