"""Exact values and gradients: quadratures over reparameterization noise, sums over discrete states."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.gate.pairs import Densities

Grid = tuple[list[Tensor], Tensor]  # states or noise of each latent [points], weights [points]


@dataclass(frozen=True)
class Reference:
    """The expectation of a bound, given the log weights of one particle on a grid.

    Attributes:
        expectation: (log_w [points], weights [points], K) -> scalar.
        grid: (latents, K, fine) -> grid; the coarse one tells the error of the fine one.
        guide: what the guide's gradient is of, where that is another bound.
    """

    expectation: Callable[[Tensor, Tensor, int], Tensor]
    grid: Callable[[int, int, bool], Grid]
    guide: Reference | None = None


def _product(nodes: np.ndarray, weights: np.ndarray, latents: int) -> Grid:
    noise = [torch.as_tensor(axis).reshape(-1) for axis in np.meshgrid(*[nodes] * latents)]
    weight = functools.reduce(np.multiply.outer, [weights] * latents).reshape(-1)
    kept = torch.as_tensor(weight > 1e-17)  # the corners weigh nothing
    return [axis[kept] for axis in noise], torch.as_tensor(weight)[kept]


def gauss_hermite(latents: int, particles: int, fine: bool) -> Grid:
    count = {1: (96, 128), 2: (96, 128), 3: (36, 48), 4: (36, 44)}[latents * particles][fine]
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return _product(nodes, weights / weights.sum(), latents)


def trapezoid(latents: int, particles: int, fine: bool) -> Grid:
    nodes = np.linspace(-8, 8, {1: (100_001, 200_001), 2: (301, 601)}[latents][fine])
    weights = np.exp(-0.5 * nodes**2)
    return _product(nodes, weights / weights.sum(), latents)


def smooth(formula: Callable[[Tensor], Tensor]) -> Reference:
    """Tensor-product Gauss-Hermite over the noise of all particles; ``formula`` reduces dim 0."""

    def expectation(log_w: Tensor, weights: Tensor, particles: int) -> Tensor:
        total = formula(_tuples(log_w, particles))
        for _ in range(particles):
            total = total @ weights
        return total

    return Reference(expectation, gauss_hermite)


def _tuples(log_w: Tensor, particles: int) -> Tensor:
    """All K-tuples of points, ``[K, *points]``."""
    axes = [
        log_w.reshape([-1 if k == axis else 1 for k in range(particles)])
        for axis in range(particles)
    ]
    return torch.stack(torch.broadcast_tensors(*axes))


def _wake(log_w: Tensor, weights: Tensor, particles: int, log_q: Tensor) -> Tensor:
    """E sum_k w_k log q(z_k), whose gradient at constant w the wake update follows."""
    share = torch.softmax(_tuples(log_w.detach(), particles), 0)[0]
    for _ in range(particles - 1):
        share = share @ weights.detach()
    return particles * (weights.detach() * share) @ log_q


def largest(log_w: Tensor, weights: Tensor, particles: int) -> Tensor:
    """E of the largest of K: the chance to be the largest is F^K at this point minus F^K before."""
    order = log_w.argsort()
    below = torch.cat([weights.new_zeros(1), weights[order].cumsum(0)]) ** particles
    return (log_w[order] * below.diff()).sum()


class Exact(NamedTuple):
    value: Tensor  # []
    gradient: Tensor  # [parameters]
    value_error: Tensor
    gradient_error: Tensor


class Target(NamedTuple):
    """What an exact answer depends on: no estimator, and no way to write a rate or a program.

    Attributes:
        states: numbers of values of the discrete latents, which come first.
        wake: the gradient is that of the wake update instead.
        noises: of the continuous latents, where that is not one each.
    """

    terms: Densities
    values: tuple[tuple[str, float], ...]
    betas: tuple[tuple[str, float], ...]
    tempering: float
    reference: Reference
    particles: int
    states: tuple[int, ...] = ()
    wake: bool = False
    noises: int | None = None


@functools.cache
def exact(target: Target) -> Exact:
    """A bound's expectation and its gradient in all parameters, with the error of both."""
    coarse, fine = (_quadrature(target, fine) for fine in (False, True))
    error = (fine - coarse).abs()
    return Exact(fine[0], fine[1:], error[0], error[1:])


def _quadrature(target: Target, fine: bool) -> Tensor:
    """Value and gradient ``[1 + parameters]``."""
    noise, weights = grid_of(target, fine)
    values = {
        name: torch.tensor(number, dtype=torch.double, requires_grad=True)
        for name, number in target.values
    }
    terms = target.terms(values, noise)
    log_w = target.tempering * terms.likelihood
    for site, beta in target.betas:
        log_w = log_w - beta * terms.rate[site]
    if terms.discrete is not None:
        weights = weights * terms.discrete.exp()
    if target.wake:
        assert terms.log_q is not None
        value = _wake(log_w, weights, target.particles, terms.log_q)
    else:
        value = target.reference.expectation(log_w, weights, target.particles)
    gradient = torch.autograd.grad(value, list(values.values()), materialize_grads=True)
    return torch.stack([value.detach(), *gradient])


def grid_of(target: Target, fine: bool) -> Grid:
    continuous = target.noises or len(target.betas) - len(target.states)
    noise: list[Tensor] = []
    weights = torch.ones(1).double()
    if continuous:
        noise, weights = target.reference.grid(continuous, target.particles, fine)
    axes = [torch.arange(count) for count in (*target.states, len(weights))]
    *states, at = (axis.reshape(-1) for axis in torch.meshgrid(*axes, indexing="ij"))
    return [*(state.double() for state in states), *(axis[at] for axis in noise)], weights[at]
