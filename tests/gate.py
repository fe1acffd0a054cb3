"""The gate: every admissible bound x estimator x rate has the right value and the right gradient.

The exact answers are quadratures over the reparameterization noise, by densities and bounds written
down here once more. The library's answers are Monte Carlo means over rows that hold their own copy of
every parameter, so that one backward pass gives a gradient per row and hence standard errors. A gate
that can't fail proves nothing: ``PLANTED`` lists errors that it must catch.

    python -m tests.gate        everything, at the required precision

A new part needs its instances in ``BOUNDS`` (with a reference), ``ESTIMATORS`` or ``RATES``, and a
line in ``declared`` if some of its combinations are refused or biased by design.
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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_vae.batch import Batch
from pyro_vae.objectives import (
    bounds,
    estimators,
    objective,
    particles,
    plan,
    rates,
    swap,
    tracing,
)
from pyro_vae.objectives.bounds import Bound, Elbo, Renyi
from pyro_vae.objectives.estimators import STL, DReG, Estimator, Pathwise, Score
from pyro_vae.objectives.objective import Objective
from pyro_vae.objectives.rates import Analytic, Beta, MonteCarlo, Rate
from pyro_vae.objectives.schedules import linear

X = (0.8, -0.3)  # the data: one row, repeated
SIGMAS = 5.0  # tolerance in standard errors
PRECISION = 0.01  # largest standard error of a gradient, relative to its norm
ROWS = 16_384  # per block
BLOCKS = 1_000

Values = Mapping[str, Any]  # parameter -> number or tensor

# ---------------------------------------------------------------------------------------------
# Pairs: linear-Gaussian programs, and their densities by hand


class Program(nn.Module):
    """Holds each of its parameters once per row."""

    def __init__(self, values: Values, rows: int) -> None:
        super().__init__()
        for name, number in values.items():
            self.register_parameter(name, nn.Parameter(torch.full((rows,), number).double()))

    def plate(self, batch: Batch) -> Any:
        return pyro.plate("data", batch.size, dim=-1)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def _normal(loc: Tensor, log_scale: Tensor) -> Any:
    return dist.Normal(loc, log_scale.exp())


class OneLayerModel(Program):
    def forward(self, batch: Batch) -> None:
        with self.plate(batch):
            self.observe(pyro.sample("z", _normal(self.m, self.t)))

    def observe(self, z: Tensor) -> None:
        loc = torch.stack([self.w0 * z + self.b0, self.w1 * z + self.b1], -1)
        pyro.sample("x", _normal(loc, torch.stack([self.s0, self.s1], -1)).to_event(1))


class TwoLayerModel(OneLayerModel):
    def forward(self, batch: Batch) -> None:
        with self.plate(batch):
            z2 = pyro.sample("z2", _normal(self.m, self.t))
            self.observe(pyro.sample("z1", _normal(self.u * z2 + self.k, self.l)))


class OneLayerGuide(Program):
    def encode(self, x: Tensor) -> Any:
        return _normal(self.a0 * x[:, 0] + self.a1 * x[:, 1] + self.c, self.r)

    def forward(self, batch: Batch) -> None:
        with self.plate(batch):
            pyro.sample("z", self.encode(batch["x"]))


class BottomUpGuide(OneLayerGuide):
    def forward(self, batch: Batch) -> None:
        with self.plate(batch):
            z1 = pyro.sample("z1", self.encode(batch["x"]))
            pyro.sample("z2", _normal(self.d * z1 + self.f, self.v))


class TopDownGuide(OneLayerGuide):
    def forward(self, batch: Batch) -> None:
        x = batch["x"]
        with self.plate(batch):
            z2 = pyro.sample("z2", self.encode(x))
            pyro.sample("z1", self.decode(self.d * z2 + self.h0 * x[:, 0] + self.h1 * x[:, 1]))

    def decode(self, loc: Tensor) -> Any:
        return _normal(loc + self.f, self.v)


def _log_normal(value: Tensor | float, loc: Tensor, log_scale: Tensor) -> Tensor:
    return -0.5 * ((value - loc) / log_scale.exp()) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)


class Terms(NamedTuple):
    """log p(x | z) and site -> log q - log p, each ``[points]``."""

    likelihood: Tensor
    rate: dict[str, Tensor]


def _likelihood(v: Values, z: Tensor) -> Tensor:
    first = _log_normal(X[0], v["w0"] * z + v["b0"], v["s0"])
    return first + _log_normal(X[1], v["w1"] * z + v["b1"], v["s1"])


def _one_layer(v: Values, noise: Sequence[Tensor]) -> Terms:
    loc = v["a0"] * X[0] + v["a1"] * X[1] + v["c"]
    z = loc + v["r"].exp() * noise[0]
    rate = _log_normal(z, loc, v["r"]) - _log_normal(z, v["m"], v["t"])
    return Terms(_likelihood(v, z), {"z": rate})


def _bottom_up(v: Values, noise: Sequence[Tensor]) -> Terms:
    loc1 = v["a0"] * X[0] + v["a1"] * X[1] + v["c"]
    z1 = loc1 + v["r"].exp() * noise[0]
    loc2 = v["d"] * z1 + v["f"]
    z2 = loc2 + v["v"].exp() * noise[1]
    return _two_layers(v, z1, _log_normal(z1, loc1, v["r"]), z2, _log_normal(z2, loc2, v["v"]))


def _top_down(v: Values, noise: Sequence[Tensor]) -> Terms:
    loc2 = v["a0"] * X[0] + v["a1"] * X[1] + v["c"]
    z2 = loc2 + v["r"].exp() * noise[0]
    loc1 = v["d"] * z2 + v["h0"] * X[0] + v["h1"] * X[1] + v["f"]
    z1 = loc1 + v["v"].exp() * noise[1]
    return _two_layers(v, z1, _log_normal(z1, loc1, v["v"]), z2, _log_normal(z2, loc2, v["r"]))


def _two_layers(v: Values, z1: Tensor, log_q1: Tensor, z2: Tensor, log_q2: Tensor) -> Terms:
    rate2 = log_q2 - _log_normal(z2, v["m"], v["t"])
    rate1 = log_q1 - _log_normal(z1, v["u"] * z2 + v["k"], v["l"])
    return Terms(_likelihood(v, z1), {"z1": rate1, "z2": rate2})


@dataclass(frozen=True)
class Pair:
    """A model and a guide, their densities by hand, and their parameters.

    Attributes:
        sites: the latents in the guide's order.
        terms: what log w is made of, at standard normal noise (one array per latent).
        multiplier: what the bound is multiplied by (N / B, weights of rows).
        tempering: what the likelihood is multiplied by inside the bound.
        row_weight: the batch's weight of each row.
    """

    name: str
    model: type[nn.Module]
    guide: type[nn.Module]
    model_values: dict[str, float]
    guide_values: dict[str, float]
    sites: tuple[str, ...]
    terms: Callable[[Values, Sequence[Tensor]], Terms]
    multiplier: float = 1.0
    tempering: float = 1.0
    row_weight: float | None = None

    def batch(self, rows: int) -> Batch:
        weights = None if self.row_weight is None else torch.full((rows,), self.row_weight).double()
        return Batch({"x": torch.tensor(X).double().expand(rows, 2)}, weights=weights)


_LIKELIHOOD = {"w0": 0.9, "b0": 0.1, "w1": -0.6, "b1": 0.2, "s0": -0.8, "s1": -0.9}
_ONE = {"m": 0.2, "t": -0.1, **_LIKELIHOOD}
_TWO = {"m": 0.2, "t": -0.2, "u": 0.8, "k": -0.1, "l": -0.4, **_LIKELIHOOD}
_SKIP = {"h0": 0.4, "h1": -0.4}
# Every guide is off in location and scale, or its score would be too small to see.
ONE_LAYER = Pair(
    "one layer",
    OneLayerModel,
    OneLayerGuide,
    _ONE,
    {"a0": 0.5, "a1": -0.5, "c": 0.4, "r": -0.7},
    ("z",),
    _one_layer,
)
BOTTOM_UP = Pair(
    "bottom-up",
    TwoLayerModel,
    BottomUpGuide,
    _TWO,
    {"a0": 0.5, "a1": -0.5, "c": 0.3, "r": -0.7, "d": 1.1, "f": 0.3, "v": -0.3},
    ("z1", "z2"),
    _bottom_up,
)
TOP_DOWN = Pair(
    "top-down",
    TwoLayerModel,
    TopDownGuide,
    _TWO,
    {"a0": 0.3, "a1": -0.2, "c": 0.3, "r": -0.3, "f": 0.2, "v": -0.8, "d": 0.5} | _SKIP,
    ("z2", "z1"),
    _top_down,
)
PAIRS = (ONE_LAYER, BOTTOM_UP, TOP_DOWN)

# Further programs with the same exact answers, or multiples of them.


class _Subsampled:
    def plate(self, batch: Batch) -> Any:
        return pyro.plate("data", 3 * batch.size, subsample_size=batch.size, dim=-1)


class SubsampledModel(_Subsampled, OneLayerModel):
    pass


class SubsampledGuide(_Subsampled, OneLayerGuide):
    pass


class _Scaled(Program):
    def forward(self, batch: Batch) -> None:
        with poutine.scale(scale=0.6):
            super().forward(batch)


class ScaledModel(_Scaled, OneLayerModel):
    pass


class ScaledGuide(_Scaled, OneLayerGuide):
    pass


class _RowsScaled(Program):
    def forward(self, batch: Batch) -> None:
        with poutine.scale(scale=torch.full((batch.size,), 0.6).double()):
            super().forward(batch)


class RowsScaledModel(_RowsScaled, OneLayerModel):
    pass


class RowsScaledGuide(_RowsScaled, OneLayerGuide):
    pass


class _ScaleZ1(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "z1":
            msg["scale"] = msg["scale"] * 0.6


class _Annealed(Program):
    def forward(self, batch: Batch) -> None:
        with _ScaleZ1():
            super().forward(batch)


class AnnealedModel(_Annealed, TwoLayerModel):
    pass


class AnnealedGuide(_Annealed, BottomUpGuide):
    pass


class TemperedModel(OneLayerModel):
    def observe(self, z: Tensor) -> None:
        with poutine.scale(scale=0.6):
            super().observe(z)


class _Shift(dist.transforms.Transform):
    """y = x exp(log_scale) + shift, its parameters read when called, as flows do."""

    domain = codomain = constraints.real
    bijective = True

    def __init__(self, guide: Program) -> None:
        super().__init__()
        self.guide = guide

    def read(self, name: str) -> Tensor:
        tensor: Tensor = getattr(self.guide, name)
        return tensor

    def _call(self, x: Tensor) -> Tensor:
        return x * self.read("v").exp() + self.read("f")

    def _inverse(self, y: Tensor) -> Tensor:
        return (y - self.read("f")) / self.read("v").exp()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.read("v").expand(x.shape)


class LazyGuide(TopDownGuide):
    def decode(self, loc: Tensor) -> Any:
        base = dist.Normal(loc / self.v.exp(), 1.0)
        return dist.TransformedDistribution(base, [_Shift(self)])


class _PathlessNormal(dist.Normal):
    has_rsample = False


class PathlessParentGuide(BottomUpGuide):
    """z1 has no rsample, z2 has."""

    def encode(self, x: Tensor) -> Any:
        normal = super().encode(x)
        return _PathlessNormal(normal.loc, normal.scale)


class PathlessChildGuide(TopDownGuide):
    """z2 has rsample, z1 has none."""

    def decode(self, loc: Tensor) -> Any:
        normal = super().decode(loc)
        return _PathlessNormal(normal.loc, normal.scale)


class StoredGuide(PyroModule):
    """The bottom-up guide with its scales in Pyro's parameter store."""

    def __init__(self, values: Values, rows: int) -> None:
        super().__init__()
        for name, number in values.items():
            tensor = torch.full((rows,), number).double()
            if name in ("r", "v"):
                setattr(self, name, PyroParam(tensor.exp(), constraints.positive))
            else:
                setattr(self, name, nn.Parameter(tensor))

    def forward(self, batch: Batch) -> None:
        x = batch["x"]
        with pyro.plate("data", batch.size, dim=-1):
            loc = self.a0 * x[:, 0] + self.a1 * x[:, 1] + self.c
            z1 = pyro.sample("z1", dist.Normal(loc, self.r))
            pyro.sample("z2", dist.Normal(self.d * z1 + self.f, self.v))


SUBSAMPLED = replace(
    ONE_LAYER, name="subsampled", model=SubsampledModel, guide=SubsampledGuide, multiplier=3.0
)
SCALED = replace(ONE_LAYER, name="scaled", model=ScaledModel, guide=ScaledGuide, multiplier=0.6)
ROWS_SCALED = replace(SCALED, name="rows scaled", model=RowsScaledModel, guide=RowsScaledGuide)
ANNEALED = replace(BOTTOM_UP, name="annealed", model=AnnealedModel, guide=AnnealedGuide)
TEMPERED = replace(ONE_LAYER, name="tempered", model=TemperedModel, tempering=0.6)
WEIGHTED = replace(ONE_LAYER, name="weighted", multiplier=0.7, row_weight=0.7)
LAZY = replace(TOP_DOWN, name="lazy", guide=LazyGuide)
PATHLESS_PARENT = replace(BOTTOM_UP, name="pathless parent", guide=PathlessParentGuide)
PATHLESS_CHILD = replace(TOP_DOWN, name="pathless child", guide=PathlessChildGuide)
STORED = replace(BOTTOM_UP, name="stored", guide=StoredGuide)

# ---------------------------------------------------------------------------------------------
# Exact answers

Grid = tuple[list[Tensor], Tensor]  # noise of each latent [points], weights [points]


@dataclass(frozen=True)
class Reference:
    """The expectation of a bound, given the log weights of one particle on a grid.

    Attributes:
        expectation: (log_w [points], weights [points], K) -> scalar.
        grid: (latents, K, fine) -> grid; the coarse one tells the error of the fine one.
    """

    expectation: Callable[[Tensor, Tensor, int], Tensor]
    grid: Callable[[int, int, bool], Grid]


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
        axes = [
            log_w.reshape([-1 if k == axis else 1 for k in range(particles)])
            for axis in range(particles)
        ]
        total = formula(torch.stack(torch.broadcast_tensors(*axes)))
        for _ in range(particles):
            total = total @ weights
        return total

    return Reference(expectation, _gauss_hermite)


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
    """What an exact answer depends on: no estimator, and no way to write a rate or a program."""

    terms: Callable[[Values, Sequence[Tensor]], Terms]
    values: tuple[tuple[str, float], ...]
    betas: tuple[tuple[str, float], ...]
    tempering: float
    reference: Reference
    particles: int


@functools.cache
def exact(target: Target) -> Exact:
    """A bound's expectation and its gradient in all parameters, with the error of both."""
    coarse, fine = (_quadrature(target, fine) for fine in (False, True))
    error = (fine - coarse).abs()
    return Exact(fine[0], fine[1:], error[0], error[1:])


def _quadrature(target: Target, fine: bool) -> Tensor:
    """Value and gradient ``[1 + parameters]``."""
    noise, weights = target.reference.grid(len(target.betas), target.particles, fine)
    values = {
        name: torch.tensor(number, dtype=torch.double, requires_grad=True)
        for name, number in target.values
    }
    terms = target.terms(values, noise)
    log_w = target.tempering * terms.likelihood
    for site, beta in target.betas:
        log_w = log_w - beta * terms.rate[site]
    value = target.reference.expectation(log_w, weights, target.particles)
    return torch.stack([value.detach(), *torch.autograd.grad(value, list(values.values()))])


# ---------------------------------------------------------------------------------------------
# The parts and the cells


def _renyi(alpha: float) -> Reference:
    return smooth(lambda log_w: ((1 - alpha) * log_w).exp().mean(0).log() / (1 - alpha))


BOUNDS: dict[type[Bound], list[tuple[Bound, Reference]]] = {
    Elbo: [(Elbo(), smooth(lambda log_w: log_w.mean(0)))],
    Renyi: [
        *((Renyi(alpha), _renyi(alpha)) for alpha in (0.0, 0.5, -1.0, 2.0)),
        (Renyi(-math.inf), Reference(_largest, _trapezoid)),
    ],
}

ESTIMATORS: dict[type[Estimator], list[Estimator]] = {
    Pathwise: [Pathwise()],
    STL: [STL()],
    DReG: [DReG()],
    Score: [Score(), Score(all_sites=True)],
}


class Weighting(NamedTuple):
    """A rate at a step, and its meaning: site -> weight of log q - log p(z) inside the bound."""

    rate: Rate
    betas: tuple[tuple[str, float], ...]
    step: int = 0


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


RATES: dict[type[Rate], Callable[[Sites], list[Weighting]]] = {
    MonteCarlo: lambda sites: [Weighting(MonteCarlo(), _all(sites))],
    Analytic: lambda sites: [Weighting(Analytic(), _all(sites))],
    Beta: _betas,
}


def refusals(bound: Bound, estimator: Estimator, rate: Rate) -> list[tuple[Any, Any]]:
    """Parts that don't go together: the library must refuse them by name."""
    found: list[tuple[Any, Any]] = []
    if not isinstance(bound, Elbo):
        inner = rate
        while isinstance(inner, Beta):
            inner = inner.rate
        if isinstance(inner, Analytic):
            found.append((rate, bound))
        if isinstance(estimator, STL):
            found.append((estimator, bound))
    if isinstance(bound, Renyi) and bound.alpha == -math.inf and isinstance(estimator, DReG):
        found.append((estimator, bound))
    return found


def bias(bound: Bound, estimator: Estimator, rate: Rate) -> str | None:
    """Why the gradient is biased by design: then its bias is measured and printed, not bounded."""
    return None


REFUSED, BIASED, UNBIASED = "refused", "biased by design", "unbiased"


@dataclass(frozen=True)
class Cell:
    """One combination on one pair, its meaning, and what is declared of its gradient."""

    pair: Pair
    bound: Bound
    reference: Reference
    estimator: Estimator
    weighting: Weighting
    particles: int = 2
    chunk: int | None = None
    status: str = ""

    def __post_init__(self) -> None:
        if not self.status:
            parts = (self.bound, self.estimator, self.weighting.rate)
            status = REFUSED if refusals(*parts) else BIASED if bias(*parts) else UNBIASED
            object.__setattr__(self, "status", status)

    def __str__(self) -> str:
        estimator = "score(all)" if getattr(self.estimator, "all_sites", 0) else self.estimator
        more = f" K={self.particles}" if self.particles != 2 else ""
        more += f" chunk={self.chunk}" if self.chunk else ""
        step = f" at {self.weighting.step}" if self.weighting.step else ""
        rate = re.sub(r"<function (.*?) at \w+>", r"\1", repr(self.weighting.rate)) + step
        return f"{self.pair.name}: {self.bound!r} x {estimator} x {rate}{more}"

    def objective(self) -> Objective:
        parts = (self.bound, self.estimator, self.weighting.rate)
        return Objective(*parts, num_particles=self.particles, chunk=self.chunk)

    def exact(self) -> Exact:
        pair = self.pair
        found = exact(
            Target(
                pair.terms,
                tuple({**pair.model_values, **pair.guide_values}.items()),
                self.weighting.betas,
                pair.tempering,
                self.reference,
                self.particles,
            )
        )
        return Exact(*(pair.multiplier * part for part in found))


def exported(module: Any, base: type) -> list[type]:
    """The public subclasses of ``base``."""
    parts = [getattr(module, name) for name in module.__all__]
    return [p for p in parts if isinstance(p, type) and issubclass(p, base) and p is not base]


def cells(pairs: Iterable[Pair] = PAIRS) -> list[Cell]:
    """Every exported bound x estimator x rate that has instances, on every pair."""
    return [
        Cell(pair, bound, reference, estimator, weighting)
        for pair in pairs
        for rate_type in exported(rates, Rate)
        for weighting in (RATES[rate_type](pair.sites) if rate_type in RATES else [])
        for bound_type in exported(bounds, Bound)
        for bound, reference in BOUNDS.get(bound_type, [])
        for estimator_type in exported(estimators, Estimator)
        for estimator in ESTIMATORS.get(estimator_type, [])
    ]


def uncovered(found: Iterable[Cell]) -> list[str]:
    """Exported parts that no cell runs."""
    run = [cell for cell in found if cell.status != REFUSED]
    covered = {type(part) for c in run for part in (c.bound, c.estimator, c.weighting.rate)}
    tables = (
        (bounds, Bound, "BOUNDS"),
        (estimators, Estimator, "ESTIMATORS"),
        (rates, Rate, "RATES"),
    )
    return [
        f"{part.__name__} is exported but no cell runs it: add an instance to {table}"
        for module, base, table in tables
        for part in exported(module, base)
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
        *(c for c in found if c.status != REFUSED),
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


def _beta_per_site(pair: Pair) -> Weighting:
    betas = tuple(zip(pair.sites, (0.5, 2.0), strict=True))
    return Weighting(Beta(dict(betas)), betas)


# ---------------------------------------------------------------------------------------------
# The library's answers


@dataclass
class Result:
    """What a cell showed. ``worst`` is in standard errors; the rest of an unbiased cell's numbers
    are relative to the norm of the exact gradient."""

    cell: Cell
    problems: list[str] = field(default_factory=list)
    worst: float = 0.0
    error: float = 0.0
    bias: float = 0.0
    rows: int = 0
    seconds: float = 0.0


def check(cell: Cell, precision: float | None = None, rows: int = ROWS) -> Result:
    """Whether a cell is what it is declared to be; one block of rows, or as many as the precision
    of the gradient needs."""
    start = time.perf_counter()
    result = Result(cell)
    if cell.status == REFUSED:
        _check_refusal(result)
    else:
        _check_numbers(result, precision, rows)
    result.seconds = time.perf_counter() - start
    return result


def _check_refusal(result: Result) -> None:
    cell = result.cell
    try:
        cell.objective()
    except ValueError as refused:
        pairs = refusals(cell.bound, cell.estimator, cell.weighting.rate)
        if not any(repr(a) in str(refused) and repr(b) in str(refused) for a, b in pairs):
            result.problems.append(f"refused without naming both parts: {refused}")
    else:
        result.problems.append("should be refused")


def _check_numbers(result: Result, precision: float | None, rows: int) -> None:
    cell, wanted = result.cell, result.cell.exact()
    norm = wanted.gradient.norm()
    draw = _Draw(cell, rows)
    value_spread = draw.spread(result.problems)
    value, gradient = _Mean(), _Mean()
    while True:
        loss, gradients = draw.block()
        value.add(-loss[None] / rows)
        gradient.add(gradients)
        error = gradient.error()
        result.rows += rows
        result.error = float(error.norm() / norm)
        if precision is None or result.error <= precision or result.rows >= BLOCKS * rows:
            break
    off = {
        "value": (value.mean() - wanted.value, value_spread / math.sqrt(result.rows)),
        "gradient": (gradient.mean() - wanted.gradient, error),
    }
    reference = {"value": wanted.value_error, "gradient": wanted.gradient_error}
    for what, (difference, error) in off.items():
        if what == "gradient" and cell.status == BIASED:
            continue
        rounding = 1e-10 * (1 + norm)
        z = difference.abs() / (error**2 + reference[what] ** 2 + rounding**2).sqrt()
        worst = float(z.max())
        result.worst = max(result.worst, worst)
        if not worst <= SIGMAS:  # NaN fails
            result.problems.append(f"{what} off by {worst:.1f} standard errors")
    result.bias = float(off["gradient"][0].norm() / norm)
    if precision is not None and not result.error <= precision:
        result.problems.append(f"standard error {result.error:.1%} after {result.rows} rows")


class _Draw:
    """A cell's loss and the gradient of every row in all parameters, block by block."""

    def __init__(self, cell: Cell, rows: int) -> None:
        pyro.clear_param_store()
        torch.manual_seed(zlib.crc32(str(cell).encode()))
        pair = cell.pair
        self.cell, self.rows, self.batch = cell, rows, pair.batch(rows)
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
        loss = self.loss(self.batch)
        gradients = torch.autograd.grad(loss, self.leaves, materialize_grads=True)
        return loss.detach(), -torch.stack(gradients)

    def spread(self, problems: list[str]) -> Tensor:
        """The standard deviation of a row's value; at one seed the rows' values add up to the loss."""
        state = torch.get_rng_state()
        self.loss.step.fill_(self.cell.weighting.step)
        values = self.cell.pair.multiplier * self.loss.rows(self.batch)
        torch.set_rng_state(state)
        loss = self.block()[0]
        torch.set_rng_state(state)
        if not torch.isclose(-values.sum(), loss, rtol=1e-9):
            problems.append(f"rows() adds up to {values.sum():.6g}, the loss is {loss:.6g}")
        return values.std()


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
        return (variance / (self.count - 1)).sqrt()


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
    """With one particle every bound is the ELBO, log p(x) - KL(q || posterior), in value and
    gradient; at the posterior every bound is log p(x) for every draw, and what drops the score of q
    has no noise."""
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
            found = cell(pair, name, Pathwise(), particles=1).exact()
            tolerance = 1e-9 + 10 * (found.value_error + found.gradient_error.max())
            off = max(abs(found.value - elbo), (found.gradient - gradient).abs().max())
            if not (off <= tolerance and tolerance < 1e-3):
                problems.append(f"{pair.name}: quadrature of {name} at K=1 is off by {off:.1e}")
            problems += _at_the_posterior(perfect(pair), bound, float(marginal.detach()))
    return problems


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

    def __init__(self, name: str, found_by: Cell | Sequence[Cell], *edits: Edit) -> None:
        self.name, self.edits = name, edits
        self.cells = [found_by] if isinstance(found_by, Cell) else found_by
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
            admitted = Cell(cell.pair, cell.bound, cell.reference, cell.estimator, cell.weighting)
            if cell.status == admitted.status and (problems := check(cell).problems):
                found.append(f"{cell} fails by itself: {problems}")
            try:
                with self():
                    if not check(cell).problems:
                        found.append(f"{cell} does not notice")
            except Stale as stale:
                found.append(str(stale))
        return found


def planted() -> list[Planted]:
    """What has gone wrong in prototypes, and what a change could break without a message."""
    score, pathwise, dreg = Score(all_sites=True), Pathwise(), DReG()
    doubled, per_site = _betas(BOTTOM_UP.sites)[0], _beta_per_site(BOTTOM_UP)
    scheduled = next(w for w in _betas(ONE_LAYER.sites) if w.step)
    plate = "PLATE, particles, dim=-1 - nesting))"

    def admitted(*parts: Any) -> list[Cell]:
        """A refused cell, which must be refused, and if it is not, must be seen to be biased."""
        refused = cell(*parts)
        return [refused, replace(refused, status=UNBIASED)]

    iwae, two_layers = cell(ONE_LAYER, "iwae", pathwise), cell(BOTTOM_UP, "iwae", dreg)
    by_score = cell(ONE_LAYER, "iwae", score)
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
                "particles.total(particles.likelihood, out)",
                "particles.total({s: 2 * t for s, t in particles.likelihood.items()}, out)",
            ),
        ),
        Planted(
            "schedule read at step 0",
            cell(ONE_LAYER, "iwae", pathwise, scheduled),
            (objective.ObjectiveModule.loss_and_rows, "self.step.clone()", "0 * self.step"),
        ),
        Planted(
            "schedule read one step late",
            cell(ONE_LAYER, "iwae", pathwise, scheduled),
            (objective.ObjectiveModule.loss_and_rows, "self.step.clone()", "self.step + 1"),
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
            (objective.refusal, "rate.analytic and not bound.linear", "False"),
        ),
        # The bound.
        Planted("log K missing", iwae, (Renyi.__call__, " - math.log(len(log_w))", "")),
        Planted("squared weights", iwae, (Renyi.weights, "log_w, 0)", "log_w, 0) ** 2")),
        Planted("softmax over rows", iwae, (Renyi.weights, "log_w, 0)", "log_w, 1)")),
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
        # Boundary copies.
        Planted(
            "DReG: factor 1 - beta h",
            two_layers,
            (DReG.factor, "curvature(log_w)", "curvature(log_w) * bound.weights(log_w)"),
        ),
        Planted(
            "DReG: factor without beta",
            cell(BOTTOM_UP, "iwae", dreg, doubled),
            (DReG.factor, "1 - beta * ", "1 - "),
        ),
        Planted(
            "DReG: factor without 1 - alpha",
            cell(BOTTOM_UP, "renyi(-1)", dreg),
            (Renyi.curvature, "(1 - self.alpha) * ", ""),
        ),
        Planted(
            "DReG: factor on the sample, twice along z1 -> z2",
            two_layers,
            (particles.Boundary.copy, "copy.register_hook", "value.register_hook"),
        ),
        Planted(
            "DReG: factor never applied",
            two_layers,
            (particles.Boundary.copy, "self.factor is None", "True"),
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
            (particles._constant_rerun, "        return {", "    return {"),
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
            (Objective._split_betas, "particles.total(extra)", "None"),
        ),
        Planted(
            "DReG: remainder of per-site beta moves along z1 -> z2",
            cell(BOTTOM_UP, "iwae", dreg, per_site),
            (particles.log_q_at_rest, "if len(sites) > 1", "if False"),
        ),
        Planted(
            "DReG: the user's scale of a site missing in its beta",
            cell(ANNEALED, "iwae", dreg, Weighting(MonteCarlo(), (("z1", 0.6), ("z2", 1.0)))),
            (Objective._split_betas, "betas[site] = beta * weight", "pass"),
        ),
        Planted(
            "DReG with VR-max",
            admitted(BOTTOM_UP, "vr_max", dreg),
            (DReG.refusal, "if bound.smooth", "if True"),
        ),
        Planted(
            "STL with a multi-sample bound",
            admitted(BOTTOM_UP, "iwae", STL()),
            (STL.refusal, "if bound.linear", "if True"),
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
    start, plants = time.perf_counter(), planted()
    failed = [*uncovered(cells()), *closed_forms()]
    print(f"closed forms and coverage: {len(failed)} problems", *failed, sep="\n  ", flush=True)
    groups = [(pair.name, cells([pair])) for pair in PAIRS]
    results = []
    print(
        f"{'':12}{'cells':>6}{'passed':>8}{'worst |z|':>11}{'largest s.e.':>14}{'rows':>9}{'s':>6}"
    )
    for name, group in [*groups, ("further", further_cells())]:
        found = [check(cell, PRECISION) for cell in group]
        print(
            f"{name:12}{len(found):6}{sum(not r.problems for r in found):8}"
            f"{max(r.worst for r in found):11.2f}{max(r.error for r in found):14.2%}"
            f"{max(r.rows for r in found):9}{sum(r.seconds for r in found):6.0f}",
            flush=True,
        )
        for result in found:
            if result.problems:
                print(f"  FAILED {result.cell}: {'; '.join(result.problems)}")
            if result.cell.status == BIASED:
                print(f"  bias {result.bias:.2%} +- {result.error:.2%}: {result.cell}")
        results += found
    missed = [(plant, why) for plant in plants if (why := plant.missed())]
    for plant, why in missed:
        print(f"  MISSED {plant}: {'; '.join(why)}")
    for status in (UNBIASED, BIASED, REFUSED):
        of_status = [r for r in results if r.cell.status == status]
        print(f"{status}: {sum(not r.problems for r in of_status)} of {len(of_status)} cells pass")
    print(f"planted errors: {len(plants) - len(missed)} of {len(plants)} caught")
    print(f"worst |z| {max(r.worst for r in results):.2f}, {time.perf_counter() - start:.0f} s")
    return int(bool(failed or missed or any(r.problems for r in results)))


if __name__ == "__main__":
    sys.exit(main())
