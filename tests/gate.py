"""The gate: bounds, estimators, rates and penalties have the right value and the right gradient.

The exact answers are quadratures over the reparameterization noise and sums over discrete states, by
densities and bounds written down here and in ``gate_pairs`` once more. The library's answers are Monte
Carlo means over rows that hold their own copy of every parameter, so that one backward pass gives a
gradient per row and hence standard errors; where all latents are discrete the rows are all K-tuples of
states, weighed by their probability, and there is no error. Every combination is *unbiased*, *biased by
design* (held against what it declares to estimate, where that is known; its bias is measured) or
*refused*. A gate that can't fail proves nothing: ``planted`` lists errors that it must catch.

    python -m tests.gate        every combination on one pair
    python -m tests.gate all    on every pair, at half the standard error: several minutes

A new part needs its instances in ``BOUNDS`` (with a reference), ``ESTIMATORS``, ``RELAXATIONS``,
``RATES`` or ``penalty_cells``, and a line in ``refusals`` or ``bias`` if some of its combinations are
refused or biased by design.
"""

from __future__ import annotations
import __future__ as future

import functools
import inspect
import math
import random
import re
import sys
import textwrap
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.nn.functional import one_hot

from pyro_vae import objectives
from pyro_vae.objectives import (
    baselines,
    bounds,
    enumeration,
    estimators,
    loss,
    objective,
    particles,
    penalties,
    plan,
    rates,
    relaxed,
    swap,
    tracing,
)
from pyro_vae.objectives.baselines import Baseline, LeaveOneOut, MovingAverage, NeuralBaseline
from pyro_vae.objectives.bounds import (
    Bound,
    Cubo,
    Elbo,
    Jackknife,
    Miwae,
    Mix,
    Renyi,
    Split,
    Thermodynamic,
)
from pyro_vae.objectives.enumeration import Enumerate, _Joint
from pyro_vae.objectives.estimators import (
    STL,
    DReG,
    Estimator,
    OneParticle,
    Pathwise,
    Score,
    WakeSleep,
)
from pyro_vae.objectives.objective import Objective
from pyro_vae.objectives.penalties import (
    DIP,
    MMD,
    Adversarial,
    MutualInformation,
    Penalty,
    Sinkhorn,
    SlicedWasserstein,
    adversarial,
    aggregate,
)
from pyro_vae.objectives.penalties.latent import Latent
from pyro_vae.objectives.rates import (
    Analytic,
    Balance,
    Beta,
    Capacity,
    FreeBits,
    MonteCarlo,
    Rate,
)
from pyro_vae.objectives.relaxed import Gumbel, StraightThrough
from pyro_vae.objectives.schedules import linear
from tests.gate_pairs import (
    ANNEALED,
    BIASED,
    BIT,
    BITS,
    BOTTOM_UP,
    CLASSES,
    LAZY,
    MIXED,
    ONE_LAYER,
    PAIRS,
    PATHLESS_CHILD,
    PATHLESS_PARENT,
    REFUSED,
    ROWS_SCALED,
    SCALED,
    SIGMAS,
    STORED,
    SUBSAMPLED,
    TEMPERED,
    TOP_DOWN,
    UNBIASED,
    WEIGHTED,
    Densities,
    Pair,
    Values,
    X,
    concrete_bit,
    concrete_classes,
    straight_bit,
    straight_classes,
)
from tests.gate_penalties import PenaltyCell, penalty_cells

__all__ = ["BIASED", "BIT", "ONE_LAYER", "X"]  # of gate_pairs

PRECISION = 0.02  # largest standard error of a gradient, relative to its norm
ROWS = 16_384  # per block
BATCHES = 16  # that a block is made of where rows depend on each other
BLOCKS = 1_000

# ---------------------------------------------------------------------------------------------
# Exact answers

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


def _gauss_hermite(latents: int, particles: int, fine: bool) -> Grid:
    count = {1: (96, 128), 2: (96, 128), 3: (36, 48), 4: (36, 44)}[latents * particles][fine]
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return _product(nodes, weights / weights.sum(), latents)


def _trapezoid(latents: int, particles: int, fine: bool) -> Grid:
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

    return Reference(expectation, _gauss_hermite)


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


def _largest(log_w: Tensor, weights: Tensor, particles: int) -> Tensor:
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
    noise, weights = _grid(target, fine)
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


def _grid(target: Target, fine: bool) -> Grid:
    continuous = target.noises or len(target.betas) - len(target.states)
    noise: list[Tensor] = []
    weights = torch.ones(1).double()
    if continuous:
        noise, weights = target.reference.grid(continuous, target.particles, fine)
    axes = [torch.arange(count) for count in (*target.states, len(weights))]
    *states, at = (axis.reshape(-1) for axis in torch.meshgrid(*axes, indexing="ij"))
    return [*(state.double() for state in states), *(axis[at] for axis in noise)], weights[at]


# ---------------------------------------------------------------------------------------------
# The parts and the cells


Formula = Callable[[Tensor], Tensor]


def _elbo(log_w: Tensor) -> Tensor:
    return log_w.mean(0)


def _renyi(alpha: float) -> Formula:
    return lambda log_w: ((1 - alpha) * log_w).exp().mean(0).log() / (1 - alpha)


def _tempered(power: float) -> Formula:
    return lambda log_w: (log_w * (power * log_w).exp()).sum(0) / (power * log_w).exp().sum(0)


def _mix(a: float, first: Formula, b: float, second: Formula) -> Formula:
    return lambda log_w: a * first(log_w) + b * second(log_w)


def _jackknife(log_w: Tensor) -> Tensor:
    count, iwae = len(log_w), _renyi(0.0)
    others = [iwae(torch.stack([*log_w[:k], *log_w[k + 1 :]])) for k in range(count)]
    return count * iwae(log_w) - (count - 1) * torch.stack(others).mean(0)


_ELBO, _IWAE, _CUBO = (smooth(formula) for formula in (_elbo, _renyi(0.0), _renyi(-1.0)))

BOUNDS: dict[type[Bound], list[tuple[Bound, Reference]]] = {
    Elbo: [(Elbo(), _ELBO)],
    Renyi: [
        (Renyi(0.0), _IWAE),
        (Renyi(0.5), smooth(_renyi(0.5))),
        (Renyi(-1.0), _CUBO),
        (Renyi(2.0), smooth(_renyi(2.0))),
        (Renyi(-math.inf), Reference(_largest, _trapezoid)),
    ],
    Cubo: [(Cubo(), _CUBO)],
    Miwae: [(Miwae(2), _IWAE)],  # a cell's particles are those of a group, and groups are alike
    Mix: [
        (Mix((0.3, Elbo()), (0.7, Renyi(0.0))), smooth(_mix(0.3, _elbo, 0.7, _renyi(0.0)))),
        (Mix((0.5, Elbo()), (1.0, Renyi(-1.0))), smooth(_mix(0.5, _elbo, 1.0, _renyi(-1.0)))),
    ],
    Split: [
        (Split(Renyi(0.0), Elbo()), replace(_IWAE, guide=_ELBO)),
        (Split(Elbo(), Cubo()), replace(_ELBO, guide=_CUBO)),
    ],
    Thermodynamic: [
        (Thermodynamic((0, 0.3, 1)), smooth(_mix(0.3, _elbo, 0.7, _tempered(0.3)))),
        (
            Thermodynamic((0, 0.3, 1), right=True),
            smooth(_mix(0.3, _tempered(0.3), 0.7, _tempered(1.0))),
        ),
    ],
    Jackknife: [(Jackknife(), smooth(_jackknife))],
}
EVERY_RATE = (Elbo, Renyi)  # the others meet one rate of each type: a rate does not know its bound
EVERY_PAIR = (Pathwise, DReG)  # of bound and rate; the others meet rates under the elbo

ESTIMATORS: dict[type[Estimator], list[Estimator]] = {
    Pathwise: [Pathwise()],
    STL: [STL()],
    DReG: [DReG()],
    OneParticle: [OneParticle()],
    Score: [
        Score(),
        Score(all_sites=True),
        Score(True, LeaveOneOut()),
        Score(True, MovingAverage()),
        Score(True, NeuralBaseline()),
    ],
    WakeSleep: [WakeSleep()],
    Enumerate: [Enumerate()],
}


RELAXATIONS: list[Estimator] = [
    Gumbel(1.0),
    Gumbel(0.5),
    Gumbel(0.25),
    Gumbel(0.5, prior_temperature=1.0),
    Gumbel(0.5, density="discrete"),
    Gumbel(0.5, hard=True),
    Gumbel(0.5, hard=True, density="discrete"),
    StraightThrough(),
]


# pair -> densities of its relaxed and of its straight-through draws, noises of a relaxed one
RELAXED: dict[str, tuple[Callable[..., Densities], Densities, int]] = {
    "bit": (concrete_bit, straight_bit, 1),
    "classes": (concrete_classes, straight_classes, 3),
}


class Weighting(NamedTuple):
    """A rate at a step, and its meaning: site -> weight of log q - log p(z) inside the bound, and
    nats that are taken off the bound whatever the draws."""

    rate: Rate
    betas: tuple[tuple[str, float], ...]
    step: int = 0
    constant: float = 0.0


Sites = tuple[str, ...]


def _all(sites: Sites, beta: float = 1.0) -> tuple[tuple[str, float], ...]:
    return tuple((site, beta) for site in sites)


def _betas(sites: Sites) -> list[Weighting]:
    more, less = (tuple(zip(sites, betas, strict=False)) for betas in ((2.0, 0.5), (0.5, 2.0)))
    last = (*_all(sites[:-1]), (sites[-1], 0.6))
    return [
        Weighting(Beta(2.0), _all(sites, 2.0)),
        Weighting(Beta(0.5), _all(sites, 0.5)),
        Weighting(Beta(dict(more)), more),
        Weighting(Beta(dict(less)), less),
        Weighting(Beta(linear(10)), _all(sites, 0.4), step=4),
        Weighting(Beta({sites[-1]: linear(10)}), last, step=6),
        Weighting(Beta(2.0, Analytic()), _all(sites, 2.0)),
        Weighting(Beta(dict(less), Analytic()), less),
        Weighting(Beta(linear(10), Beta(dict(more))), tuple((s, 0.4 * b) for s, b in more), step=4),
    ]


def _mean_rates(sites: Sites) -> dict[str, float]:
    """E[log q - log p(z)] of each site, by quadrature."""
    pair = next(pair for pair in PAIRS if pair.sites == sites)
    noise, weights = _gauss_hermite(len(sites), 1, fine=True)
    numbers = {**pair.model_values, **pair.guide_values}
    terms = pair.terms({name: torch.tensor(n).double() for name, n in numbers.items()}, noise)
    return {site: float(terms.rate[site] @ weights) for site in sites}


def _free_bits(sites: Sites) -> list[Weighting]:
    """Floors that all rates, none, or those of some sites are above."""
    mean = _mean_rates(sites)
    low, between = 0.5 * min(mean.values()), sum(mean.values()) / len(sites) + 0.1
    partly = tuple((site, float(mean[site] > between)) for site in sites)
    under = sum(weight == 0 for _, weight in partly)
    group = FreeBits(low, {"all": sites})
    high = FreeBits(linear(10, 0, 100), "site", "row")
    return [
        Weighting(FreeBits(low), _all(sites)),
        Weighting(FreeBits(low, rate=MonteCarlo()), _all(sites)),
        Weighting(Beta(2.0, group), _all(sites, 2.0)),
        Weighting(high, _all(sites, 0.0), step=5, constant=50 * len(sites)),
        Weighting(FreeBits(between), partly, constant=under * between),
    ]


def _capacities(sites: Sites) -> list[Weighting]:
    """Below the rate and above it."""
    low, high = (factor * sum(_mean_rates(sites).values()) for factor in (0.5, 2.0))
    return [
        Weighting(Capacity(low, 3.0), _all(sites, 3.0), constant=-3 * low),
        Weighting(Capacity(linear(10, 0, 2 * high), 0.5), _all(sites, -0.5), 5, 0.5 * high),
        Weighting(Capacity(low, 3.0, MonteCarlo()), _all(sites, 3.0), constant=-3 * low),
    ]


def _balances(sites: Sites) -> list[Weighting]:
    use = {site: mean + 0.01 for site, mean in _mean_rates(sites).items()}
    whole = {site: use[site] * len(sites) / sum(use.values()) for site in sites}
    half = tuple((site, 0.5 + 0.5 * whole[site]) for site in sites)
    return [
        Weighting(Balance(rate=MonteCarlo()), tuple(whole.items())),
        Weighting(Balance(linear(10, 1, 0)), half, step=5),
    ]


RATES: dict[type[Rate], Callable[[Sites], list[Weighting]]] = {
    MonteCarlo: lambda sites: [Weighting(MonteCarlo(), _all(sites))],
    Analytic: lambda sites: [Weighting(Analytic(), _all(sites))],
    Beta: _betas,
    FreeBits: _free_bits,
    Capacity: _capacities,
    Balance: _balances,
}


def refusals(bound: Bound, estimator: Estimator, rate: Rate, pair: Pair) -> list[tuple[Any, Any]]:
    """Parts that don't go together: the library must refuse them by name."""
    found: list[tuple[Any, Any]] = []
    inner, coupled = rate, False
    while isinstance(inner, Beta | FreeBits | Capacity | Balance):
        coupled = coupled or not isinstance(inner, Beta)
        inner = inner.rate
    if not isinstance(bound, Elbo) and (coupled or isinstance(inner, Analytic)):
        found.append((rate, bound))
    if coupled:
        sampled = isinstance(inner, MonteCarlo) or pair.sites == BOTTOM_UP.sites
        if estimator.scores("z", True) or (estimator.boundary and sampled):
            found.append((rate, estimator))
    scored = isinstance(estimator, Score | WakeSleep | Enumerate)
    if pair.states and not (scored or isinstance(estimator, Gumbel | StraightThrough)):
        found.append((estimator, pair.sites[0]))
    if pair.states and coupled and scored:
        found.append((rate, pair.sites[0]))
    if isinstance(estimator, Enumerate) and not isinstance(bound, Elbo):
        found.append((estimator, bound))
    if (
        isinstance(estimator, Gumbel)
        and estimator.density == "relaxed"
        and isinstance(bound, Split)
    ):
        found.append((estimator, bound))
    if isinstance(estimator, STL) and not isinstance(bound.guide, Elbo):
        found.append((estimator, bound))
    if isinstance(bound, Renyi) and bound.alpha == -math.inf and isinstance(estimator, DReG):
        found.append((estimator, bound))
    if isinstance(estimator, OneParticle) and isinstance(bound, Split | Thermodynamic | Jackknife):
        found.append((estimator, bound))
    if isinstance(estimator, WakeSleep) and isinstance(bound, Elbo | Split):
        found.append((estimator, bound))
    return found


def bias(bound: Bound, estimator: Estimator, rate: Rate) -> str | None:
    """Why the gradient is biased by design: then its bias is measured and printed, not bounded."""
    if isinstance(estimator, WakeSleep):
        return "the guide follows another divergence"
    if isinstance(estimator, Gumbel | StraightThrough):
        return "the path of a discrete draw is that of another"
    if isinstance(rate, Balance) or (rate.coupled and not rate.analytic):
        return "a function of a mean over draws is not that of the expectation"
    return None


@dataclass(frozen=True)
class Cell:
    """One combination on one pair, its meaning, and what is declared of its gradient.

    Attributes:
        particles: those of a group, where the bound has groups.
        sampled: discrete latents are drawn, not listed.
        alone: each row is a batch of its own.
    """

    pair: Pair
    bound: Bound
    reference: Reference
    estimator: Estimator
    weighting: Weighting
    particles: int = 2
    chunk: int | None = None
    status: str = ""
    sampled: bool = False
    alone: bool = False

    def __post_init__(self) -> None:
        if not self.status:
            parts = (self.bound, self.estimator, self.weighting.rate)
            refused = refusals(*parts, self.pair)
            status = REFUSED if refused else BIASED if bias(*parts) else UNBIASED
            object.__setattr__(self, "status", status)

    def __str__(self) -> str:
        more = f" K={self.particles}" if self.particles != 2 else ""
        more += f" chunk={self.chunk}" if self.chunk else ""
        more += " sampled" * self.sampled + " alone" * self.alone
        step = f" at {self.weighting.step}" if self.weighting.step else ""
        rate = re.sub(r"<function (.*?) at \w+>", r"\1", repr(self.weighting.rate)) + step
        return f"{self.pair.name}: {self.bound!r} x {self.estimator!r} x {rate}{more}"

    def objective(self) -> Objective:
        estimator = deepcopy(self.estimator)  # baselines remember
        if isinstance(estimator, nn.Module):
            estimator.double()
        parts = (self.bound, estimator, self.weighting.rate)
        return Objective(*parts, num_particles=self.num_particles, chunk=self.chunk)

    @property
    def num_particles(self) -> int:
        return self.particles * getattr(self.bound, "groups", 1)

    @property
    def listed(self) -> bool:
        """Whether all K-tuples of states stand for draws."""
        drawn = isinstance(self.estimator, Gumbel | StraightThrough) or self.sampled
        return len(self.pair.states) == len(self.pair.sites) and not drawn

    def exact(self) -> Exact:
        """Of the bound."""
        guide = self.reference.guide
        of_guide = None if guide is None else self._target(reference=guide)
        return self._known(self._target(), of_guide)

    def declared(self) -> Exact | None:
        """Of an estimator that is biased by design, where its expectation is known."""
        if isinstance(self.estimator, WakeSleep):
            continuous = len(self.pair.sites) - len(self.pair.states)
            if continuous * self.num_particles > 4:
                return None
            more = {"reference": _IWAE, "particles": self.num_particles, "wake": True}
            return self._known(self._target(), self._target(**more))
        if self.pair.name not in RELAXED or self.weighting.rate.analytic:
            return None
        _, straight, noises = RELAXED[self.pair.name]
        if isinstance(self.estimator, StraightThrough):
            return self._known(self._target(terms=straight))
        if isinstance(self.estimator, Gumbel) and not self.estimator.hard:
            if noises * self.num_particles > 4:
                return None
            terms = _concrete(self.pair.name, self.estimator)
            return self._known(self._target(terms=terms, states=(), noises=noises))
        return None

    def _target(self, **changes: Any) -> Target:
        pair = self.pair
        target = Target(
            pair.terms,
            tuple({**pair.model_values, **pair.guide_values}.items()),
            self.weighting.betas,
            pair.tempering,
            self.reference,
            self.particles,
            pair.states,
        )
        return target._replace(**changes)

    def _known(self, of_model: Target, of_guide: Target | None = None) -> Exact:
        found = exact(of_model)
        if of_guide is not None:
            other, split = exact(of_guide), len(self.pair.model_values)
            gradient, error = (
                torch.cat([a[:split], b[split:]])
                for a, b in zip(found[1::2], other[1::2], strict=True)
            )
            found = found._replace(gradient=gradient, gradient_error=error)
        found = found._replace(value=found.value - self.weighting.constant)
        return Exact(*(self.pair.multiplier * part for part in found))


@functools.cache
def _concrete(pair: str, estimator: Gumbel) -> Densities:
    temperatures = (estimator.temperature, estimator.prior_temperature)
    return RELAXED[pair][0](*temperatures, relaxed=estimator.density == "relaxed")


MODULES = (objectives, baselines, bounds, enumeration, estimators, penalties, rates, relaxed)


def exported(module: Any, base: type) -> list[type]:
    """The public subclasses of ``base``."""
    parts = [getattr(module, name) for name in module.__all__]
    return [p for p in parts if isinstance(p, type) and issubclass(p, base) and p is not base]


def cells(pairs: Iterable[Pair] = PAIRS) -> list[Cell]:
    """Every exported bound x estimator, every rate x estimator under the elbo, and every bound x rate
    with two estimators, on every pair."""
    instances = [item for part in exported(bounds, Bound) for item in BOUNDS.get(part, [])]
    return [
        Cell(pair, bound, reference, estimator, weighting)
        for pair in pairs
        for rate_type in exported(rates, Rate)
        for place, (bound, reference) in enumerate(instances)
        for weighting in _weightings(rate_type, pair.sites, bound, place)
        for estimators in ESTIMATORS.values()
        for estimator in estimators
        if isinstance(bound, Elbo) or rate_type is MonteCarlo or type(estimator) in EVERY_PAIR
    ]


def _weightings(rate_type: type[Rate], sites: Sites, bound: Bound, place: int) -> list[Weighting]:
    """What a bound meets of a type of rates: all, or one in turn."""
    found = RATES[rate_type](sites) if rate_type in RATES else []
    if type(bound) in EVERY_RATE or not found:
        return found
    return [found[place % len(found)]]


def uncovered(found: Iterable[Cell | PenaltyCell]) -> list[str]:
    """Exported parts that no cell runs."""
    found = list(found)
    run = [cell for cell in found if isinstance(cell, Cell) and cell.status != REFUSED]
    parts = [part for c in run for part in (c.bound, c.estimator, c.weighting.rate)]
    covered: set[type] = {type(part) for part in parts}
    covered |= {type(part.baseline) for part in parts if isinstance(part, Score)}
    covered |= {type(cell.make()) for cell in found if isinstance(cell, PenaltyCell)}
    tables = {
        Bound: "BOUNDS",
        Estimator: "ESTIMATORS or RELAXATIONS",
        Baseline: "ESTIMATORS",
        Rate: "RATES",
        Penalty: "penalty_cells",
    }
    return [
        f"{part.__name__} is exported but no cell runs it: add an instance to {table}"
        for base, table in tables.items()
        for part in dict.fromkeys(part for module in MODULES for part in exported(module, base))
        if part not in covered
    ]


def cell(
    pair: Pair,
    bound: str | Bound,
    estimator: Estimator,
    rate: Rate | Weighting | None = None,
    **more: Any,
) -> Cell:
    """A single cell; the bound by its name in the tables, a rate that weighs everything by 1."""
    by_name = {repr(b): (b, reference) for known in BOUNDS.values() for b, reference in known}
    weighting = (
        rate if isinstance(rate, Weighting) else Weighting(rate or MonteCarlo(), _all(pair.sites))
    )
    return Cell(pair, *by_name[str(bound)], estimator, weighting, **more)


def further_cells() -> list[Cell]:
    """Other numbers of particles, chunks, plates, scales and programs."""
    score = Score(all_sites=True)
    names = [repr(bound) for known in BOUNDS.values() for bound, _ in known]
    found = [
        cell(ONE_LAYER, name, estimator, particles=count)
        for name in names
        for count in (1, 3)
        for estimator in (Pathwise(), DReG(), score)
    ]
    found += [cell(ONE_LAYER, "elbo", STL(), particles=count) for count in (1, 3)]
    descends = smooth(lambda log_w: -_renyi(-1.0)(log_w))
    found += [
        replace(
            cell(ONE_LAYER, "elbo", estimator),
            bound=Split(Elbo(), Mix((-1, Cubo()))),
            reference=replace(_ELBO, guide=descends),
        )
        for estimator in (Pathwise(), DReG(), score)
    ]
    found += [cell(ONE_LAYER, "iwae", DReG(), particles=3, chunk=1)]
    plates_and_scales = (SUBSAMPLED, SCALED, ROWS_SCALED, TEMPERED, WEIGHTED)
    annealed = Weighting(MonteCarlo(), (("z1", 0.6), ("z2", 1.0)))
    for name in ("elbo", "iwae"):
        for estimator in (Pathwise(), DReG(), score):
            found += [
                cell(ONE_LAYER, name, estimator, particles=3, chunk=2),
                cell(BOTTOM_UP, name, estimator, chunk=1),
                cell(ANNEALED, name, estimator, annealed),
                *(cell(pair, name, estimator) for pair in (*plates_and_scales, LAZY, STORED)),
            ]
        found += [cell(pair, name, Score()) for pair in (PATHLESS_PARENT, PATHLESS_CHILD)]
    return [
        *(c for c in found if c.status != REFUSED and c.num_particles >= c.bound.min_particles),
        cell(SUBSAMPLED, "elbo", Pathwise(), Analytic()),
        cell(SCALED, "elbo", DReG(), Analytic()),
        cell(ANNEALED, "elbo", STL(), annealed._replace(rate=Analytic())),
        cell(LAZY, "elbo", STL(), Analytic()),
        cell(LAZY, "iwae", DReG(), _beta_per_site(LAZY)),
        cell(STORED, "iwae", DReG(), _beta_per_site(STORED)),
        cell(BOTTOM_UP, "iwae", DReG(), _beta_per_site(BOTTOM_UP), chunk=1),
        cell(PATHLESS_PARENT, "elbo", Score(), Analytic()),
        cell(PATHLESS_CHILD, "elbo", Score(), Analytic()),
        cell(PATHLESS_PARENT, "iwae", Score(), _beta_per_site(PATHLESS_PARENT)),
    ]


def discrete_cells() -> list[Cell]:
    """Latents whose states are all listed, and relaxations of them."""
    known = [item for found in BOUNDS.values() for item in found]
    by_score = [s for s in ESTIMATORS[Score] if isinstance(s, Score) and s.all_sites]
    every = [*by_score, WakeSleep(), Enumerate()]
    once = {pair.name: Weighting(MonteCarlo(), _all(pair.sites)) for pair in (BITS, CLASSES)}
    found = [
        Cell(pair, *item, estimator, once[pair.name], count)
        for pair, count in ((BITS, 2), (CLASSES, 3))
        for item in known
        for estimator in every
    ]
    found += [Cell(BITS, *i, s, once["bits"], 3) for i in known for s in by_score[:2]]
    found += [cell(BITS, "elbo", refused) for refused in (Pathwise(), STL(), DReG(), OneParticle())]
    found += [cell(BITS, "elbo", Score(), rate) for rate in (FreeBits(0.1), Balance())]
    found += [
        cell(BITS, name, estimator, rate)
        for rate in (*_betas(BITS.sites), Weighting(Analytic(), _all(BITS.sites)))
        for name, estimator in (("elbo", Score()), ("iwae", by_score[1]), ("elbo", Enumerate()))
    ]
    found += [
        cell(BIT, name, Score(baseline=baseline), particles=count, alone=True)
        for name in ("elbo", "iwae")
        for count in (1, 2)
        for baseline in (MovingAverage(), NeuralBaseline())
    ]
    found += [
        cell(pair, name, estimator, sampled=pair is not MIXED)
        for pair in (BITS, CLASSES, MIXED)
        for name, estimator in (("elbo", Score()), ("iwae", Score()), ("iwae", by_score[1]))
    ]
    found += [
        cell(MIXED, "elbo", estimator, rate)
        for estimator in (Score(), Enumerate())
        for rate in (MonteCarlo(), Analytic(), _beta_per_site(MIXED))
    ]
    found += [
        cell(BIT, name, relaxation)
        for name in ("elbo", "iwae", "renyi(-1)", "miwae(2)", "split(iwae, elbo)", "jackknife(1)")
        for relaxation in RELAXATIONS
    ]
    found += [cell(CLASSES, "elbo", relaxation, particles=1) for relaxation in RELAXATIONS]
    found += [
        cell(pair, "elbo", relaxation, Weighting(Beta(2.0, inner), _all(pair.sites, 2.0)))
        for pair in (BIT, BITS, CLASSES)
        for relaxation in RELAXATIONS
        for inner in (MonteCarlo(), Analytic())
    ]
    return found


def _beta_per_site(pair: Pair) -> Weighting:
    betas = tuple(zip(pair.sites, (0.5, 2.0), strict=True))
    return Weighting(Beta(dict(betas)), betas)


# ---------------------------------------------------------------------------------------------
# The library's answers


@dataclass
class Result:
    """What a cell showed. ``worst`` and ``sigmas``, the bias, are in standard errors, the other numbers
    relative to the norm of the exact gradient."""

    cell: Cell | PenaltyCell
    problems: list[str] = field(default_factory=list)
    worst: float = 0.0
    error: float = 0.0
    bias: float = 0.0
    sigmas: float = 0.0
    rows: int = 0
    seconds: float = 0.0


def check(cell: Cell | PenaltyCell, precision: float | None = None, rows: int = ROWS) -> Result:
    """Whether a cell is what it is declared to be; one block of rows, or as many as the precision
    of the gradient needs."""
    start = time.process_time()
    result = Result(cell)
    if isinstance(cell, PenaltyCell):
        found = cell.measure()
        result = Result(
            cell, found.problems, found.worst, found.error, found.bias, found.sigmas, cell.calls
        )
    elif cell.status == REFUSED:
        _check_refusal(result, cell)
    else:
        _check_numbers(result, cell, precision, rows)
    result.seconds = time.process_time() - start
    return result


def _check_refusal(result: Result, cell: Cell) -> None:
    try:
        _Draw(cell, 4).block()  # what a pair shows is refused at the first call
    except ValueError as refused:
        pairs = refusals(cell.bound, cell.estimator, cell.weighting.rate, cell.pair)
        if not any(repr(a) in str(refused) and repr(b) in str(refused) for a, b in pairs):
            result.problems.append(f"refused without naming both parts: {refused}")
    else:
        result.problems.append("should be refused")


def _check_numbers(result: Result, cell: Cell, precision: float | None, rows: int) -> None:
    of_bound, wanted = cell.exact(), cell.declared() or cell.exact()
    norm = of_bound.gradient.norm()
    coupled = cell.weighting.rate.coupled and bias(cell.bound, cell.estimator, cell.weighting.rate)
    draw = _draw(cell, rows // BATCHES if coupled else rows)
    value_spread = draw.spread(result.problems)
    value, gradient = _Mean(), _Mean()
    while True:
        loss, gradients = draw.block()
        value.add(-loss[None] / draw.rows)
        gradient.add(gradients.mean(1, keepdim=True) if coupled else gradients)
        error = gradient.error() * (not draw.exact)
        result.rows += draw.rows
        result.error = float(error.norm() / norm)
        enough = precision is None or result.error <= precision
        enough = enough and (not coupled or gradient.count >= BATCHES)
        if draw.exact or enough or result.rows >= BLOCKS * rows:
            break
    off = {
        "value": (value.mean() - wanted.value, value_spread / math.sqrt(result.rows)),
        "gradient": (gradient.mean() - wanted.gradient, error),
    }
    reference = {"value": wanted.value_error, "gradient": wanted.gradient_error}
    rounding = 1e-10 * (1 + norm)
    for what, (difference, spread) in off.items():
        if cell.declared() is None and what in _unknown(cell):
            continue
        z = difference.abs() / (spread**2 + reference[what] ** 2 + rounding**2).sqrt()
        worst = float(z.max())
        result.worst = max(result.worst, worst)
        if not worst <= SIGMAS:  # NaN fails
            result.problems.append(f"{what} off by {worst:.1f} standard errors")
    away = gradient.mean() - of_bound.gradient
    result.bias = float(away.norm() / norm)
    result.sigmas = float((away.abs() / (error**2 + rounding**2).sqrt()).max())
    if precision is not None and not result.error <= precision:
        result.problems.append(f"standard error {result.error:.1%} after {result.rows} rows")


def _unknown(cell: Cell) -> tuple[str, ...]:
    """What of a cell is biased by design, and by how much is not known."""
    if cell.status != BIASED or cell.weighting.rate.coupled:  # that of a rate is O(1 / rows)
        return ()
    soft = isinstance(cell.estimator, Gumbel) and (
        not cell.estimator.hard or cell.estimator.density == "relaxed"
    )
    return ("value", "gradient") if soft else ("gradient",)


class _Draw:
    """A cell's loss and the gradient of every row in all parameters, block by block."""

    exact = False

    def __init__(self, cell: Cell, rows: int) -> None:
        pyro.clear_param_store()
        torch.manual_seed(zlib.crc32(str(cell).encode()))
        pair = cell.pair
        self.cell, self.rows, self.batch = cell, rows, pair.batch(rows)
        self.handler: AbstractContextManager[Any] = nullcontext()
        self.model = pair.model(pair.model_values, rows)
        self.guide = pair.guide(pair.guide_values, rows)
        self.objective = cell.objective()
        self.loss = self.objective(self.model, self.guide)
        # A PyroParam's leaf is called "name_unconstrained".
        of_model, of_guide = (
            {name.removesuffix("_unconstrained"): p for name, p in program.named_parameters()}
            for program in (self.model, self.guide)
        )
        self.leaves = [
            *(of_model[name] for name in pair.model_values),
            *(of_guide[name] for name in pair.guide_values),
        ]

    def block(self) -> tuple[Tensor, Tensor]:
        """The loss, and the bound's gradient ``[parameters, rows]``."""
        self.loss.step.fill_(self.cell.weighting.step)
        with self.handler:
            loss = self.loss(self.batch)
        gradients = torch.autograd.grad(loss, self.leaves, materialize_grads=True)
        return loss.detach(), -torch.stack(gradients)

    def values(self) -> Tensor:
        """Of the rows, times what the bound is multiplied by."""
        self.loss.step.fill_(self.cell.weighting.step)
        with self.handler:
            return self.cell.pair.multiplier * self.loss.rows(self.batch)

    def spread(self, problems: list[str]) -> Tensor:
        """The standard deviation of a row's value; at one seed the rows' values add up to the loss."""
        state = torch.get_rng_state()
        values = self.values()
        torch.set_rng_state(state)
        loss = _Draw.block(self)[0]
        torch.set_rng_state(state)
        if not torch.isclose(-values.sum(), loss, rtol=1e-9):
            problems.append(f"rows() adds up to {values.sum():.6g}, the loss is {loss:.6g}")
        return values.std() * (not self.exact)


class _Listing(Messenger):
    """Every row's draws ``[(K), rows, *event]`` of the sites, in place of what they draw."""

    def __init__(self, draws: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.draws = draws

    def _pyro_sample(self, msg: Any) -> None:
        value = self.draws.get(msg["name"])
        if value is not None and msg["fn"].shape() == value.shape:
            msg["value"] = value


class _Listed(_Draw):
    """All K-tuples of states are rows, which count their probabilities: the library's answer is an
    expectation without noise."""

    exact = True

    def __init__(self, cell: Cell) -> None:
        pair, many = cell.pair, math.prod(cell.pair.states)
        places = [torch.arange(many)] * cell.num_particles
        tuples = torch.cartesian_prod(*places).reshape(-1, len(places)).T  # [K, rows]
        super().__init__(cell, tuples.shape[1])
        states, _ = _grid(cell._target(), fine=True)
        numbers = {**pair.model_values, **pair.guide_values}
        log_q = pair.terms({n: torch.tensor(v).double() for n, v in numbers.items()}, states).log_q
        assert log_q is not None
        self.weights = log_q.exp()[tuples].prod(0)
        self.draws = {}
        for site, count, state in zip(pair.sites, pair.states, states, strict=True):
            chosen = state[tuples] if count == 2 else one_hot(state[tuples].long(), count).double()
            self.draws[site] = chosen if len(places) > 1 else chosen[0]
        self.handler = _Listing(self.draws)

    def block(self) -> tuple[Tensor, Tensor]:
        """As of draws that count alike."""
        gradients = super().block()[1]
        return -(self.weights @ self.values()) * self.rows, gradients * self.weights * self.rows


class _Alone(_Listed):
    """The same, each row in a batch of its own, after one other batch."""

    def block(self) -> tuple[Tensor, Tensor]:
        one = _Draw(self.cell, 1)
        found, kept = [], None
        at_row = self.cell.num_particles > 1
        for row in (0, *range(self.rows)):
            one.handler = _Listing(
                {
                    s: d[:, row : row + 1] if at_row else d[row : row + 1]
                    for s, d in self.draws.items()
                }
            )
            if kept is not None:
                one.objective.modules.load_state_dict(kept)
            found.append(one.block()[1][:, 0])
            kept = kept or deepcopy(one.objective.modules.state_dict())
        gradients = torch.stack(found[1:], 1)
        return -(self.weights @ self.values()) * self.rows, gradients * self.weights * self.rows


def _draw(cell: Cell, rows: int) -> _Draw:
    if cell.alone:
        return _Alone(cell)
    if not cell.listed:
        return _Draw(cell, rows)
    if not cell.estimator.enumerates:
        return _Listed(cell)
    alike = _Draw(cell, 2)
    alike.exact = True
    return alike


class _Mean:
    """Mean over rows ``[..., rows]`` and its standard error, block by block."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, block: Tensor) -> None:
        self.count += block.shape[-1]
        self.sum = self.sum + block.sum(-1)
        self.squares = self.squares + (block**2).sum(-1)

    def mean(self) -> Tensor:
        return self.sum / self.count

    def error(self) -> Tensor:
        variance = (self.squares / self.count - self.mean() ** 2).clamp(min=0)
        return (variance / max(self.count - 1, 1)).sqrt()


# ---------------------------------------------------------------------------------------------
# Closed forms


class Gaussian(NamedTuple):
    """Mean ``[n]`` and covariance ``[n, n]`` of named variables."""

    names: tuple[str, ...]
    mean: Tensor
    covariance: Tensor

    def of(self, names: Sequence[str]) -> Gaussian:
        at = [self.names.index(name) for name in names]
        return Gaussian(tuple(names), self.mean[at], self.covariance[at][:, at])

    def given(self, known: Mapping[str, float]) -> Gaussian:
        free = [name for name in self.names if name not in known]
        joint = self.of([*free, *known])
        a, b = slice(len(free)), slice(len(free), None)
        gain = torch.linalg.solve(joint.covariance[b, b], joint.covariance[b, a]).mT
        off = torch.tensor(list(known.values())).double() - joint.mean[b]
        covariance = joint.covariance[a, a] - gain @ joint.covariance[b, a]
        return Gaussian(tuple(free), joint.mean[a] + gain @ off, covariance)

    def regress(self, name: str, on: Sequence[str]) -> tuple[list[float], float, float]:
        """Coefficients, intercept and log scale of one variable given others."""
        at_zero = self.of([name, *on]).given(dict.fromkeys(on, 0.0))
        ones = [self.of([name, *on]).given(dict.fromkeys(on, 0.0) | {o: 1.0}) for o in on]
        intercept = float(at_zero.mean)
        slopes = [float(one.mean) - intercept for one in ones]
        return slopes, intercept, 0.5 * math.log(float(at_zero.covariance))

    def torch(self) -> Any:
        return torch.distributions.MultivariateNormal(self.mean, self.covariance)


Step = tuple[str, dict[str, Tensor], Tensor, Tensor]  # name, slopes, intercept, log scale


def _chain(steps: Sequence[Step]) -> Gaussian:
    """The joint of variables that are each linear in earlier ones."""
    names = [name for name, *_ in steps]
    means: list[Tensor] = []
    roots: list[Tensor] = []  # rows of a root of the covariance
    for place, (_, slopes, intercept, log_scale) in enumerate(steps):
        pairs = [(slope, names.index(name)) for name, slope in slopes.items()]
        means.append(sum((s * means[i] for s, i in pairs), start=intercept))
        own = log_scale.exp() * torch.eye(len(names), dtype=torch.double)[place]
        roots.append(sum((s * roots[i] for s, i in pairs), start=own))
    root = torch.stack(roots)
    return Gaussian(tuple(names), torch.stack(means), root @ root.mT)


def joint(pair: Pair, v: Values) -> Gaussian:
    """Latents and data under the model."""
    top = "z" if len(pair.sites) == 1 else "z2"
    steps: list[Step] = [(top, {}, v["m"], v["t"])]
    if top == "z2":
        steps.append(("z1", {"z2": v["u"]}, v["k"], v["l"]))
    bottom = steps[-1][0]
    steps += [(f"x{i}", {bottom: v[f"w{i}"]}, v[f"b{i}"], v[f"s{i}"]) for i in (0, 1)]
    return _chain(steps)


def proposal(pair: Pair, v: Values) -> Gaussian:
    """Latents under the guide."""
    steps: list[Step] = [(pair.sites[0], {}, v["a0"] * X[0] + v["a1"] * X[1] + v["c"], v["r"])]
    if len(pair.sites) > 1:
        skip = v["h0"] * X[0] + v["h1"] * X[1] if "h0" in v else 0.0
        steps.append((pair.sites[1], {pair.sites[0]: v["d"]}, v["f"] + skip, v["v"]))
    return _chain(steps)


def perfect(pair: Pair) -> Pair:
    """The pair with the model's posterior as its guide."""
    values = {name: torch.tensor(number).double() for name, number in pair.model_values.items()}
    everything = joint(pair, values)
    (a0, a1), c, r = everything.regress(pair.sites[0], ["x0", "x1"])
    guide = {"a0": a0, "a1": a1, "c": c, "r": r}
    if len(pair.sites) > 1:
        on = [pair.sites[0], *(["x0", "x1"] if "h0" in pair.guide_values else [])]
        (d, *skip), f, log_scale = everything.regress(pair.sites[1], on)
        guide |= {"d": d, **dict(zip(("h0", "h1"), skip, strict=False)), "f": f, "v": log_scale}
    return replace(pair, guide_values=guide)


def closed_forms() -> list[str]:
    """With one particle every bound that takes one is the ELBO, log p(x) - KL(q || posterior), in
    value and gradient; at the posterior every bound is log p(x) for every draw, and what drops the
    score of q has no noise."""
    problems = []
    known = [(repr(b), b, reference) for found in BOUNDS.values() for b, reference in found]
    for pair in PAIRS:
        numbers = {**pair.model_values, **pair.guide_values}
        values = {
            name: torch.tensor(number, dtype=torch.double, requires_grad=True)
            for name, number in numbers.items()
        }
        everything, q = joint(pair, values), proposal(pair, values)
        data = {"x0": X[0], "x1": X[1]}
        posterior = everything.given(data).of(pair.sites)
        marginal = everything.of(["x0", "x1"]).torch().log_prob(torch.tensor(X).double())
        elbo = marginal - kl_divergence(q.torch(), posterior.torch())
        gradient = torch.stack(torch.autograd.grad(elbo, list(values.values())))
        for name, bound, _ in known:
            alone = cell(pair, name, Pathwise(), particles=1)
            if alone.num_particles < bound.min_particles:
                continue
            found = alone.exact()
            tolerance = 1e-9 + 10 * (found.value_error + found.gradient_error.max())
            share = _share(bound)
            off = max(
                abs(found.value - share * elbo), (found.gradient - share * gradient).abs().max()
            )
            if not (off <= tolerance and tolerance < 1e-3):
                problems.append(f"{pair.name}: quadrature of {name} at K=1 is off by {off:.1e}")
            problems += _at_the_posterior(perfect(pair), bound, share * float(marginal.detach()))
    return problems


def _share(bound: Bound) -> float:
    """What a nat more in every log weight adds to a bound."""
    return sum(number for number, _ in bound.terms) if isinstance(bound, Mix) else 1.0


def _at_the_posterior(pair: Pair, bound: Bound, log_p: float) -> list[str]:
    problems = []
    for estimator in (Pathwise(), DReG()):
        here = cell(pair, repr(bound), estimator)
        if here.status == REFUSED:
            continue
        draw = _Draw(here, rows=64)
        values = draw.objective.rows(draw.model, draw.guide, draw.batch)
        off = float((values - log_p).abs().max())
        if not off < 1e-12 * 64:
            problems.append(f"{here} at the posterior: log p(x) off by {off:.1e}")
        if estimator.boundary:
            of_guide = draw.block()[1][len(pair.model_values) :]
            if not float(of_guide.abs().max()) < 1e-10:
                problems.append(f"{here} at the posterior: the guide's gradient is not 0")
    return problems


# ---------------------------------------------------------------------------------------------
# Planted errors

Edit = tuple[Callable[..., Any], str, str]  # function, what its source says, what it says instead


class Stale(LookupError):
    """The library no longer says what a planted error replaces."""


@functools.cache
def _source(function: FunctionType) -> str:
    return textwrap.dedent(inspect.getsource(function))


@contextmanager
def edited(function: Callable[..., Any], texts: Mapping[str, str]) -> Iterator[None]:
    """Let a function of the library run with other source text."""
    function = inspect.unwrap(function)
    assert isinstance(function, FunctionType)
    source = _source(function)
    for old, new in texts.items():
        if source.count(old) != 1:
            raise Stale(f"{function.__qualname__} does not hold {old!r} once: plant it anew")
        source = source.replace(old, new)
    code = compile(source, "<planted>", "exec", future.annotations.compiler_flag)
    space: dict[str, Any] = {}
    exec(code, function.__globals__, space)
    kept = function.__code__
    function.__code__ = inspect.unwrap(space[function.__name__]).__code__
    try:
        yield
    finally:
        function.__code__ = kept


class SharedDraw(Messenger):
    """Stands inside the particle plate, so that what it draws is the same for all particles."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "z1" and msg["value"] is None:
            msg["value"] = msg["fn"].rsample()


class Planted:
    """An error in the library, and cells that must all fail because of it."""

    def __init__(
        self, name: str, found_by: Cell | PenaltyCell | Sequence[Cell | PenaltyCell], *edits: Edit
    ) -> None:
        self.name, self.edits = name, edits
        if isinstance(found_by, Cell | PenaltyCell):
            found_by = [found_by]
        self.cells: Sequence[Cell | PenaltyCell] = found_by
        for function, *_ in edits:  # read now: the file may change before it is used
            _source(inspect.unwrap(function))

    def __str__(self) -> str:
        return self.name

    @contextmanager
    def __call__(self) -> Iterator[None]:
        texts: dict[Callable[..., Any], dict[str, str]] = {}
        for function, old, new in self.edits:
            texts.setdefault(function, {})[old] = new
        with ExitStack() as stack:
            for function, changes in texts.items():
                stack.enter_context(edited(function, changes))
            yield

    def missed(self) -> list[str]:
        """Cells that don't fail, or that fail without the error."""
        found = []
        for cell in self.cells:
            admitted = isinstance(cell, Cell) and replace(cell, status="").status == cell.status
            if admitted and (problems := _by_itself(cell)):
                found.append(f"{cell} fails by itself: {problems}")
            try:
                with self():
                    if not check(cell).problems:
                        found.append(f"{cell} does not notice")
            except Stale as stale:
                found.append(str(stale))
        return found


@functools.cache
def _seen() -> dict[str, list[str]]:
    return {}


def _by_itself(cell: Cell | PenaltyCell) -> list[str]:
    """Problems without an error; several errors are found by the same cell."""
    seen = _seen()
    if str(cell) not in seen:
        seen[str(cell)] = check(cell).problems
    return seen[str(cell)]


def planted() -> list[Planted]:
    """What has gone wrong in prototypes, and what a change could break without a message."""
    score, pathwise, dreg = Score(all_sites=True), Pathwise(), DReG()
    doubled, per_site = _betas(BOTTOM_UP.sites)[0], _beta_per_site(BOTTOM_UP)
    scheduled = next(w for w in _betas(ONE_LAYER.sites) if w.step)
    plate = "PLATE, particles, dim=-1 - nesting))"

    def admitted(*parts: Any) -> list[Cell | PenaltyCell]:
        """A refused cell, which must be refused, and if it is not, must be seen to be biased."""
        refused = cell(*parts)
        return [refused, replace(refused, status=UNBIASED)]

    iwae, two_layers = cell(ONE_LAYER, "iwae", pathwise), cell(BOTTOM_UP, "iwae", dreg)
    by_score = cell(ONE_LAYER, "iwae", score)
    vimco, averaged = Score(baseline=LeaveOneOut()), Score(baseline=MovingAverage())
    balanced = cell(BOTTOM_UP, "elbo", pathwise, _balances(BOTTOM_UP.sites)[0])
    penalty = {str(found): found for found in penalty_cells()}
    return [
        # The rate.
        Planted(
            "sign of the rate",
            iwae,
            (MonteCarlo.__call__, "_subtract(rate[site], prior)", "_subtract(prior, rate[site])"),
        ),
        Planted(
            "prior of one site dropped",
            two_layers,
            (MonteCarlo.__call__, "particles.prior.items()", "[*particles.prior.items()][1:]"),
        ),
        Planted(
            "beta on log q alone",
            cell(BOTTOM_UP, "iwae", pathwise, doubled),
            (
                Beta.__call__,
                "self._at(site, particles, step) * term for",
                "term + (self._at(site, particles, step) - 1) * particles.posterior[site] for",
            ),
        ),
        Planted(
            "beta on the likelihood too",
            cell(BOTTOM_UP, "elbo", pathwise, doubled),
            (
                Objective._chunk,
                "particles.summed(particles.likelihood, out)",
                "particles.summed({s: 2 * t for s, t in particles.likelihood.items()}, out)",
            ),
        ),
        Planted(
            "free bits: paid for above the floor",
            cell(TOP_DOWN, "elbo", pathwise, _free_bits(TOP_DOWN.sites)[-1]),
            (rates.FreeBits.__call__, "(mean > nats)", "(mean < nats)"),
        ),
        Planted(
            "free bits: a floor that is too low",
            cell(BOTTOM_UP, "elbo", pathwise, _free_bits(BOTTOM_UP.sites)[-1]),
            (rates.FreeBits.__call__, "* nats / len(sites)", "* nats / len(terms | rate)"),
        ),
        Planted(
            "capacity: the rate is not pushed up",
            cell(ONE_LAYER, "elbo", dreg, _capacities(ONE_LAYER.sites)[1]),
            (rates.Capacity.__call__, "torch.sign(mean - capacity)", "(mean > capacity)"),
        ),
        Planted(
            "free bits: the sum over rows against the floor",
            cell(TOP_DOWN, "elbo", pathwise, _free_bits(TOP_DOWN.sites)[-1]),
            (rates._pooled, " / counts.sum(dims, keepdim=True).clamp(min=1)", ""),
        ),
        Planted(
            "capacity: without its sign",
            cell(ONE_LAYER, "elbo", dreg, _capacities(ONE_LAYER.sites)[1]),
            (rates.Capacity.__call__, "gamma * torch.sign(mean - capacity)", "gamma"),
        ),
        Planted(
            "balance: coefficients with a gradient",
            balanced,
            (rates._pooled, "mean.detach()", "mean"),
        ),
        Planted(
            "balance: coefficients that sum to 1",
            balanced,
            (rates.Balance.__call__, "use / use.mean()", "use / use.sum()"),
        ),
        Planted(
            "schedule read at step 0",
            cell(ONE_LAYER, "iwae", pathwise, scheduled),
            (loss.ObjectiveModule.loss_and_rows, "self.step.clone()", "0 * self.step"),
        ),
        Planted(
            "schedule read one step late",
            cell(ONE_LAYER, "iwae", pathwise, scheduled),
            (loss.ObjectiveModule.loss_and_rows, "self.step.clone()", "self.step + 1"),
        ),
        Planted(
            "analytic KL of a constant guide",
            cell(ONE_LAYER, "elbo", pathwise, Analytic()),
            (
                particles.Particles.kl,
                'elementwise_kl(q["fn"],',
                'elementwise_kl(type(q["fn"])(q["fn"].mean.detach(), q["fn"].stddev.detach()),',
            ),
        ),
        Planted(
            "analytic KL against the order of the sites",
            cell(BOTTOM_UP, "elbo", pathwise, Analytic()),
            (plan._analytic, "if late:", "if False:"),
        ),
        Planted(
            "analytic KL inside a nonlinear bound",
            admitted(ONE_LAYER, "iwae", pathwise, Analytic()),
            (objective.refusal, "if rate.analytic:", "if False:"),
        ),
        # The bound.
        Planted("log K missing", iwae, (Renyi.__call__, " - math.log(len(log_w))", "")),
        Planted("squared weights", iwae, (Renyi.weights, "log_w), 0)", "log_w), 0) ** 2")),
        Planted("softmax over rows", iwae, (Renyi.weights, "log_w), 0)", "log_w), 1)")),
        Planted(
            "weights without 1 - alpha",
            cell(ONE_LAYER, "renyi(0.5)", pathwise),
            (Renyi.weights, "(1 - self.alpha) * log_w", "log_w"),
        ),
        Planted(
            "VR-max: all weight on the smallest",
            cell(ONE_LAYER, "vr_max", pathwise),
            (Renyi.weights, "argmax", "argmin"),
        ),
        Planted(
            "weights not detached",
            iwae,
            (Objective.loss_and_rows, "known, rows = log_w.detach()", "known, rows = log_w"),
        ),
        Planted(
            "MIWAE: weights in the order of the strata",
            cell(ONE_LAYER, "miwae(2)", pathwise),
            (
                Miwae._mean_of,
                ".reshape(log_w.shape)",
                ".unflatten(1, (self.groups, -1)).transpose(0, 1).reshape(log_w.shape)",
            ),
        ),
        Planted(
            "TVO: weights of a mean whose shares stay",
            cell(ONE_LAYER, "tvo(0, 0.3, 1)", pathwise),
            (bounds._Tempered.weights, "share * (1 + off)", "share"),
        ),
        Planted(
            "TVO: half of how the weights move",
            cell(BOTTOM_UP, "tvo(0, 0.3, 1)", dreg),
            (bounds._Tempered.diagonal, "2 * (1 - share)", "(1 - share)"),
        ),
        Planted(
            "jackknife: one coefficient for all subsets",
            cell(ONE_LAYER, "jackknife(1)", pathwise),
            (Jackknife._sum, "(total - j) ** order", "total ** order"),
        ),
        Planted(
            "split: the guide follows the model's bound",
            cell(ONE_LAYER, "split(iwae, elbo)", pathwise),
            (Estimator.path, "if bound.guide is bound", "if True"),
        ),
        Planted(
            "split: remainder of per-site beta counts in the model's bound",
            cell(BOTTOM_UP, "split(elbo, cubo(2))", dreg, per_site),
            (Objective.loss_and_rows, "self.bound.guide.weights(known)", "weights"),
        ),
        Planted(
            "MIWAE: the sign of the groups' mean",
            cell(ONE_LAYER, "miwae(2)", pathwise),
            (Miwae._mean_of, "/ self.groups", "/ -self.groups"),
        ),
        Planted(
            "mix: a term ignored",
            cell(ONE_LAYER, "mix(0.3 elbo + 0.7 iwae)", pathwise),
            (Mix._sum, "in self.terms)", "in self.terms[:1])"),
        ),
        Planted(
            "jackknife: coefficients of K and K - 1 swapped",
            cell(ONE_LAYER, "jackknife(1)", pathwise),
            (Jackknife._sum, "(total - j) ** order", "(total - order + j) ** order"),
        ),
        Planted(
            "split: DReG by the model's bound",
            cell(BOTTOM_UP, "split(elbo, cubo(2))", dreg),
            (DReG.path, "guide = bound.guide", "guide = bound"),
        ),
        # Boundary copies.
        Planted(
            "DReG: h missing",
            two_layers,
            (DReG.path, " - beta * guide.diagonal(log_w)", ""),
        ),
        Planted(
            "DReG: w (1 - beta h)",
            two_layers,
            (DReG.path, "guide.weights(log_w) -", "guide.weights(log_w) * (1 -"),
            (DReG.path, "guide.diagonal(log_w)", "guide.diagonal(log_w))"),
        ),
        Planted(
            "DReG: w - h without beta",
            cell(BOTTOM_UP, "iwae", dreg, doubled),
            (DReG.path, "- beta * ", "- "),
        ),
        Planted(
            "DReG: h without 1 - alpha",
            cell(BOTTOM_UP, "renyi(-1)", dreg),
            (Renyi.diagonal, "(1 - self.alpha) * ", ""),
        ),
        Planted(
            "DReG: factor on the sample, twice along z1 -> z2",
            two_layers,
            (particles.Boundary._copy, "copy.register_hook", "value.register_hook"),
        ),
        Planted(
            "DReG: factor never applied",
            two_layers,
            (particles.Boundary._copy, "self.factor is None", "True"),
        ),
        Planted(
            "DReG: all chunks take the first one's factor",
            cell(ONE_LAYER, "iwae", dreg, particles=3, chunk=1),
            (
                Objective.loss_and_rows,
                "factor.split([c.size for c in chunks])",
                "[factor[: c.size] for c in chunks]",
            ),
        ),
        Planted(
            "DReG: live parameters in the guide's second run",
            two_layers,
            (particles._constant_rerun, "p.detach()", "p"),
        ),
        Planted(
            "DReG: live parameters at a single site",
            cell(ONE_LAYER, "iwae", dreg),
            (particles._constant_in_place, "- score + score.detach()", ""),
        ),
        Planted(
            "DReG: densities taken outside the swapped context",
            cell(LAZY, "iwae", dreg),
            (particles._constant_rerun, "        densities = {", "    densities = {"),
        ),
        Planted(
            "DReG: stored parameters not swapped",
            cell(STORED, "iwae", dreg),
            (swap.swapped, "[*homes, store]", "homes"),
            (plan._rerun_blockers, "if log_q.requires_grad", "if False"),  # or it is refused
        ),
        Planted(
            "DReG: remainder of per-site beta missing",
            cell(BOTTOM_UP, "iwae", dreg, per_site),
            (Objective._split_betas, "particles.summed(extra)", "None"),
        ),
        Planted(
            "DReG: remainder of per-site beta moves along z1 -> z2",
            cell(BOTTOM_UP, "iwae", dreg, per_site),
            (particles._at_rest, "if len(sites) == 1", "if True"),
        ),
        Planted(
            "DReG: the user's scale of a site missing in its beta",
            cell(ANNEALED, "iwae", dreg, Weighting(MonteCarlo(), (("z1", 0.6), ("z2", 1.0)))),
            (Objective._split_betas, "betas[site] = beta * weight", "pass"),
        ),
        Planted(
            "DReG with VR-max",
            admitted(BOTTOM_UP, "vr_max", dreg),
            (DReG.refusal, "if bound.guide.smooth", "if True"),
        ),
        Planted(
            "STL with a multi-sample bound",
            admitted(BOTTOM_UP, "iwae", STL()),
            (STL.refusal, "if bound.guide.linear", "if True"),
        ),
        # One particle.
        Planted(
            "one particle: drawn by w, not by its weight",
            cell(ONE_LAYER, "renyi(0.5)", OneParticle()),
            (OneParticle.weights, "w.log() + gumbel", "log_w + gumbel"),
        ),
        Planted(
            "one particle: the heaviest",
            cell(ONE_LAYER, "iwae", OneParticle()),
            (OneParticle.weights, "w.log() + gumbel", "w.log()"),
        ),
        Planted(
            "one particle: without the sum of the weights",
            cell(ONE_LAYER, "mix(0.5 elbo + 1 renyi(-1))", OneParticle()),
            (OneParticle.weights, "w.sum(0, keepdim=True)", "torch.ones_like(w[:1])"),
        ),
        # The score function.
        Planted(
            "score: draws keep their path",
            by_score,
            (particles._Detach._pyro_sample, "torch.no_grad()", "torch.enable_grad()"),
        ),
        Planted(
            "score of one site missing",
            cell(BOTTOM_UP, "iwae", score),
            (particles.run, "if scores(name,", "if name != 'z1' and scores(name,"),
        ),
        Planted(
            "score: reward of the elbo without 1 / K",
            cell(ONE_LAYER, "elbo", score),
            (Elbo.reward, " / len(log_w)", ""),
        ),
        Planted(
            "score: reward of the particle alone",
            by_score,
            (Bound.reward, "self(log_w).expand_as(log_w)", "log_w / len(log_w)"),
        ),
        Planted(
            "score: reward divided by K",
            by_score,
            (Bound.reward, "expand_as(log_w)", "expand_as(log_w) / len(log_w)"),
        ),
        Planted(
            "score: -log q without a gradient of its own",
            by_score,
            (Estimator.keeps_score, "not bound.guide.linear", "False"),
        ),
        Planted(
            "leave one out: the particle in its own baseline",
            cell(ONE_LAYER, "iwae", Score(True, LeaveOneOut())),
            (
                LeaveOneOut.forward,
                "(finite.sum(0) - finite) / others",
                "finite.mean(0) + 0 * others",
            ),
        ),
        # Latents that are listed.
        Planted(
            "VIMCO: the particle's own weight in its baseline",
            cell(BITS, "iwae", vimco),
            (
                bounds._logsumexp_of_others,
                "return rest.scatter(0, first, without)",
                "return torch.logsumexp(terms, 0, keepdim=True).expand_as(terms)",
            ),
        ),
        Planted(
            "leave one out of the elbo: nobody is left out",
            cell(BITS, "elbo", vimco),
            (Elbo.replaced, "log_w.sum(0) - log_w + other", "log_w.sum(0) + other"),
        ),
        Planted(
            "moving average of the present draws",
            cell(BIT, "elbo", averaged, alone=True),
            (
                MovingAverage.forward,
                "self.average / self.weight.clamp(min=1 - self.decay)",
                "reward.mean()",
            ),
        ),
        Planted(
            "neural baseline: it sees the draws",
            cell(BITS, "iwae", Score(True, NeuralBaseline())),
            (NeuralBaseline.forward, "self.net(args[0])", "self.net(args[0]) + log_w.mean(0)"),
        ),
        Planted(
            "wake-sleep: log q keeps its own gradient",
            cell(BITS, "iwae", WakeSleep()),
            (WakeSleep.keeps_score, "return False", "return True"),
        ),
        Planted(
            "wake-sleep: the bound for a reward",
            cell(ONE_LAYER, "iwae", WakeSleep()),
            (WakeSleep.reward, "torch.softmax(log_w, 0)", "bound.reward(log_w)"),
        ),
        Planted(
            "enumeration: probabilities without a gradient",
            cell(BITS, "elbo", Enumerate()),
            (_Joint.share, "torch.exp(parts[0] + parts[1])", "torch.exp(sum(parts)).detach()"),
        ),
        Planted(
            "enumeration: values count alike",
            cell(MIXED, "elbo", Enumerate()),
            (_Joint.share, "torch.exp(parts[0] + parts[1])", "torch.ones_like(parts[0])"),
        ),
        # Relaxations.
        Planted(
            "relaxed density at a draw without path",
            cell(BIT, "elbo", Gumbel(0.5)),
            (
                relaxed._RelaxedBernoulli.density,
                "self.temperature * self.u",
                "self.temperature * self.u.detach()",
            ),
        ),
        Planted(
            "relaxed density without its temperature",
            cell(BIT, "elbo", Gumbel(0.5, prior_temperature=1.0)),
            (relaxed._RelaxedBernoulli.density, "self.temperature.log() + off", "off"),
        ),
        Planted(
            "relaxed prior at the guide's temperature",
            cell(BIT, "iwae", Gumbel(0.5, prior_temperature=1.0)),
            (
                Gumbel.treatment,
                "(self.temperature, self.prior_temperature)",
                "(self.temperature, self.temperature)",
            ),
        ),
        Planted(
            "relaxed density of classes: a class forgotten",
            cell(CLASSES, "elbo", Gumbel(1.0), particles=1),
            (relaxed._RelaxedOneHot.density, "- classes * off", "- (classes - 1) * off"),
        ),
        Planted(
            "straight-through: the path of a relaxed draw",
            cell(BIT, "elbo", StraightThrough()),
            (relaxed._straight, "fn.probs", "fn.soft(u)"),
        ),
        # Penalties.
        Planted(
            "MMD: biased for unbiased",
            penalty["penalty mmd, 24 of 5 rows"],
            (MMD.estimate, 'self.how == "unbiased"', "False"),
        ),
        Planted(
            "MMD: the cross term once",
            penalty["penalty mmd imq, 24 of 5 rows"],
            (MMD.estimate, "- 2 * self._mean", "- self._mean"),
        ),
        Planted(
            "total correlation: log N forgotten",
            penalty["penalty tc weighted, all rows"],
            (aggregate._weighed, "log_sum + math.log(other)", "log_sum"),
        ),
        Planted(
            "total correlation: the own row counts like others",
            penalty["penalty tc stratified, 3 of 5 rows"],
            (aggregate._weighed, "(mine - other)", "(other - other)"),
        ),
        Planted(
            "mutual information: q(z) without its gradient",
            penalty["penalty mi, all rows"],
            (MutualInformation.estimate, "(own - joint)", "(own - joint.detach())"),
        ),
        Planted(
            "DIP: B - 1 for B",
            penalty["penalty dip I, all rows"],
            (DIP.covariance, "/ mean.shape[1]", "/ (mean.shape[1] - 1)"),
        ),
        Planted(
            "DIP: the posterior's variances are constants",
            penalty["penalty dip II, all rows chunk=12"],
            (DIP.covariance, "latent.parameter(variance)", "latent.parameter(variance).detach()"),
        ),
        Planted(
            "sliced Wasserstein: directions of any length",
            penalty["penalty sliced W2, all rows"],
            (SlicedWasserstein.estimate, "directions / directions.norm(dim=0)", "directions"),
        ),
        Planted(
            "Sinkhorn: twice the debiasing",
            penalty["penalty sinkhorn, all rows"],
            (Sinkhorn.estimate, "within / 2", "within"),
        ),
        Planted(
            "critic: its loss reaches the guide",
            penalty["penalty adversarial, all rows"],
            (Adversarial.cross_entropy, "latent.draws.detach()", "latent.draws"),
        ),
        Planted(
            "critic: the penalty trains it too",
            penalty["penalty adversarial, all rows"],
            (Adversarial.estimate, "p.detach() for p", "p for p"),
        ),
        Planted(
            "critic: rows are permuted as a whole",
            penalty["penalty adversarial permuted, all rows"],
            (
                adversarial._permuted,
                "torch.rand_like(z)",
                "torch.rand_like(z[..., :1]).expand_as(z)",
            ),
        ),
        Planted(
            "penalty: draws of the prior train it",
            penalty["penalty sinkhorn, all rows"],
            (Latent.from_prior, "torch.no_grad()", "torch.enable_grad()"),
        ),
        Planted(
            "penalty: once for all rows",
            penalty["penalty dip I, all rows"],
            (
                Objective.loss_and_rows,
                "(nats if log_w is None else nats.expand(log_w.shape[1])).sum()",
                "nats.sum()",
            ),
        ),
        Planted(
            "penalty: chunks add up",
            penalty["penalty dip II, all rows chunk=12"],
            (Objective.loss_and_rows, "c.penalty * (c.size / self.num_particles)", "c.penalty"),
        ),
        # Plates and scales.
        Planted(
            "particles share what a handler draws",
            by_score,
            (tracing.trace, "for handler in handlers", "for handler in ()"),
            (
                tracing.trace,
                plate,
                f"{plate}\n        for handler in handlers:\n"
                "            stack.enter_context(handler)",
            ),
        ),
        Planted(
            "particles share the draw of one site",
            cell(BOTTOM_UP, "iwae", pathwise),
            (
                tracing.trace,
                plate,
                f"{plate}\n            from tests.gate import SharedDraw\n"
                "            stack.enter_context(SharedDraw())",
            ),
        ),
        Planted(
            "N / B inside the bound",
            cell(SUBSAMPLED, "iwae", pathwise),
            (particles.Particles._inner_scale, "return 1.0", 'return site["scale"]'),
            (Objective.loss_and_rows, "weight = first.scale", "weight = 1.0"),
        ),
        Planted(
            "N / B missing",
            cell(SUBSAMPLED, "elbo", pathwise),
            (Objective.loss_and_rows, "weight = first.scale", "weight = 1.0"),
        ),
        Planted(
            "scale of all sites inside the bound",
            cell(SCALED, "iwae", pathwise),
            (particles._row_scales, "if False in equal", "if True"),
        ),
        Planted(
            "scale of one site dropped",
            cell(TEMPERED, "iwae", pathwise),
            (particles.Particles._inner_scale, 'site["scale"] / self.scale', "1.0"),
        ),
        Planted(
            "score: scaled by what the draw counts",
            cell(ANNEALED, "iwae", score, Weighting(MonteCarlo(), (("z1", 0.6), ("z2", 1.0)))),
            (particles.run, "particles.log_draw(site)", "particles._density(site)"),
        ),
        Planted(
            "weights of rows ignored",
            cell(WEIGHTED, "iwae", pathwise),
            (Objective.loss_and_rows, "weight * batch.weights", "weight"),
        ),
    ]


# ---------------------------------------------------------------------------------------------
# All of it


def quick_cells() -> list[Cell]:
    """Every combination on one pair."""
    choose = random.Random(0).choice
    return [choose(same) for same in zip(*(cells([pair]) for pair in PAIRS), strict=True)]


def main() -> int:
    """Print what every cell showed; 1 if anything is not as declared."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    start, plants, every = time.process_time(), planted(), sys.argv[1:] == ["all"]
    precision = PRECISION / 2 if every else PRECISION
    groups: dict[str, Sequence[Cell | PenaltyCell]] = {
        **({pair.name: cells([pair]) for pair in PAIRS if every} or {"one each": quick_cells()}),
        "further": further_cells(),
        "discrete": discrete_cells(),
        "penalties": penalty_cells(),
    }
    failed = [*uncovered(c for group in groups.values() for c in group), *closed_forms()]
    print(f"closed forms and coverage: {len(failed)} problems", *failed, sep="\n  ", flush=True)
    print(
        f"{'':12}{'cells':>6}{'passed':>8}{'worst |z|':>11}{'largest s.e.':>14}{'rows':>9}{'s':>6}"
    )
    results = []
    for name, group in groups.items():
        found = [check(cell, precision) for cell in group]
        print(
            f"{name:12}{len(found):6}{sum(not r.problems for r in found):8}"
            f"{max(r.worst for r in found):11.2f}{max(r.error for r in found):14.2%}"
            f"{max(r.rows for r in found):9}{sum(r.seconds for r in found):6.0f}",
            *(f"  FAILED {r.cell}: {'; '.join(r.problems)}" for r in found if r.problems),
            sep="\n",
            flush=True,
        )
        results += found
    missed = [(plant, why) for plant in plants if (why := plant.missed())]
    for plant, why in missed:
        print(f"  MISSED {plant}: {'; '.join(why)}")
    for status in (UNBIASED, BIASED, REFUSED):
        of_status = [r for r in results if r.cell.status == status]
        print(f"{status}: {sum(not r.problems for r in of_status)} of {len(of_status)} cells pass")
    print(f"planted errors: {len(plants) - len(missed)} of {len(plants)} caught")
    print(f"worst |z| {max(r.worst for r in results):.2f}, {time.process_time() - start:.0f} s")
    print("\nbias by design, relative to the gradient, +- standard error (in standard errors)")
    for r in (r for r in results if r.cell.status == BIASED):
        sigmas = f"{r.sigmas:.1f}" if r.error > 1e-9 else "exact"
        print(f"  {r.bias:8.2%} +- {r.error:.2%} ({sigmas}): {r.cell}")
    return int(bool(failed or missed or any(r.problems for r in results)))


if __name__ == "__main__":
    sys.exit(main())
