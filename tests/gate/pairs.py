"""Programs whose every row holds its own copy of every parameter, and their densities by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus
from torch.special import log_ndtr

from pyro_vae.batch import Batch

X = (0.8, -0.3)  # the data: one row, repeated
SIGMAS = 5.0  # tolerance in standard errors
REFUSED, BIASED, UNBIASED = "refused", "biased by design", "unbiased"

Values = Mapping[str, Any]  # parameter -> number or tensor

# ---------------------------------------------------------------------------------------------
# Linear-Gaussian programs, and their densities by hand


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
    """What log w is made of, each ``[points]``.

    Attributes:
        likelihood: log p(x | z).
        rate: site -> log q - log p.
        log_q: of all sites together at draws that are constants.
        discrete: log q of the discrete sites, whose points it weighs.
    """

    likelihood: Tensor
    rate: dict[str, Tensor]
    log_q: Tensor | None = None
    discrete: Tensor | None = None


Densities = Callable[[Values, Sequence[Tensor]], Terms]


def _likelihood(v: Values, z: Tensor) -> Tensor:
    first = _log_normal(X[0], v["w0"] * z + v["b0"], v["s0"])
    return first + _log_normal(X[1], v["w1"] * z + v["b1"], v["s1"])


def _one_layer(v: Values, noise: Sequence[Tensor]) -> Terms:
    loc = v["a0"] * X[0] + v["a1"] * X[1] + v["c"]
    z = loc + v["r"].exp() * noise[0]
    rate = _log_normal(z, loc, v["r"]) - _log_normal(z, v["m"], v["t"])
    return Terms(_likelihood(v, z), {"z": rate}, _log_normal(z.detach(), loc, v["r"]))


def _bottom_up(v: Values, noise: Sequence[Tensor]) -> Terms:
    loc1 = v["a0"] * X[0] + v["a1"] * X[1] + v["c"]
    z1 = loc1 + v["r"].exp() * noise[0]
    loc2 = v["d"] * z1 + v["f"]
    z2 = loc2 + v["v"].exp() * noise[1]
    rest1, rest2 = z1.detach(), z2.detach()
    log_q = _log_normal(rest1, loc1, v["r"])
    log_q = log_q + _log_normal(rest2, v["d"] * rest1 + v["f"], v["v"])
    both = _log_normal(z1, loc1, v["r"]), z2, _log_normal(z2, loc2, v["v"])
    return _two_layers(v, z1, *both, log_q)


def _top_down(v: Values, noise: Sequence[Tensor]) -> Terms:
    loc2 = v["a0"] * X[0] + v["a1"] * X[1] + v["c"]
    z2 = loc2 + v["r"].exp() * noise[0]
    shift = v["h0"] * X[0] + v["h1"] * X[1] + v["f"]
    loc1 = v["d"] * z2 + shift
    z1 = loc1 + v["v"].exp() * noise[1]
    rest1, rest2 = z1.detach(), z2.detach()
    log_q = _log_normal(rest2, loc2, v["r"])
    log_q = log_q + _log_normal(rest1, v["d"] * rest2 + shift, v["v"])
    both = _log_normal(z1, loc1, v["v"]), z2, _log_normal(z2, loc2, v["r"])
    return _two_layers(v, z1, *both, log_q)


def _two_layers(
    v: Values, z1: Tensor, log_q1: Tensor, z2: Tensor, log_q2: Tensor, log_q: Tensor
) -> Terms:
    rate2 = log_q2 - _log_normal(z2, v["m"], v["t"])
    rate1 = log_q1 - _log_normal(z1, v["u"] * z2 + v["k"], v["l"])
    return Terms(_likelihood(v, z1), {"z1": rate1, "z2": rate2}, log_q)


@dataclass(frozen=True)
class Pair:
    """A model and a guide, their densities by hand, and their parameters.

    Attributes:
        sites: the latents in the guide's order.
        terms: what log w is made of, at states of the discrete latents, which come first, and standard
            normal noise of the others (one array per latent).
        multiplier: what the bound is multiplied by (N / B, weights of rows).
        tempering: what the likelihood is multiplied by inside the bound.
        row_weight: the batch's weight of each row.
        states: numbers of values of the discrete latents.
    """

    name: str
    model: type[nn.Module]
    guide: type[nn.Module]
    model_values: dict[str, float]
    guide_values: dict[str, float]
    sites: tuple[str, ...]
    terms: Densities
    multiplier: float = 1.0
    tempering: float = 1.0
    row_weight: float | None = None
    states: tuple[int, ...] = ()

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
# Discrete latents: every state is a point of the grid, and its probability a weight


def _log_mass(value: Tensor, logits: Tensor) -> Tensor:
    """Of a Bernoulli draw; linear in the value, as relaxations take it."""
    return value * logits - softplus(logits)


class BitModel(Program):
    """One bit, and a likelihood that takes relaxed values as well."""

    def forward(self, batch: Batch) -> None:
        with self.plate(batch):
            self.observe(pyro.sample("a", dist.Bernoulli(logits=self.m)))

    def observe(self, a: Tensor, more: tuple[Tensor, Tensor] | None = None) -> None:
        first, second = more or (torch.zeros(()), torch.zeros(()))
        loc = torch.stack([self.w0 * a + self.b0 + first, self.w1 * a + self.b1 + second], -1)
        pyro.sample("x", _normal(loc, torch.stack([self.s0, self.s1], -1)).to_event(1))


class BitGuide(Program):
    def logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.a0 * x[:, 0] + self.a1 * x[:, 1] + self.c
        return logits

    def forward(self, batch: Batch) -> None:
        with self.plate(batch):
            pyro.sample("a", dist.Bernoulli(logits=self.logits(batch["x"])))


class BitsModel(BitModel):
    """b, then a given b."""

    def forward(self, batch: Batch) -> None:
        with self.plate(batch):
            b = pyro.sample("b", dist.Bernoulli(logits=self.m))
            a = pyro.sample("a", dist.Bernoulli(logits=self.u * b + self.k))
            self.observe(a, (self.g0 * b, self.g1 * b))


class BitsGuide(BitGuide):
    """a, then b given a: not the model's order."""

    def forward(self, batch: Batch) -> None:
        with self.plate(batch):
            a = pyro.sample("a", dist.Bernoulli(logits=self.logits(batch["x"])))
            pyro.sample("b", dist.Bernoulli(logits=self.d * a + self.f))


class ClassesModel(Program):
    """One of three."""

    def forward(self, batch: Batch) -> None:
        with self.plate(batch):
            logits = torch.stack([self.m0, self.m1, torch.zeros_like(self.m0)], -1)
            z = pyro.sample("z", dist.OneHotCategorical(logits=logits))
            first, second = (
                (z * torch.stack(places, -1)).sum(-1)
                for places in ([self.u0, self.u1, self.u2], [self.v0, self.v1, self.v2])
            )
            loc, scale = torch.stack([first, second], -1), torch.stack([self.s0, self.s1], -1)
            pyro.sample("x", _normal(loc, scale).to_event(1))


class ClassesGuide(Program):
    def forward(self, batch: Batch) -> None:
        x = batch["x"]
        with self.plate(batch):
            first = self.a0 * x[:, 0] + self.c0
            logits = torch.stack([first, self.a1 * x[:, 1] + self.c1, torch.zeros_like(first)], -1)
            pyro.sample("z", dist.OneHotCategorical(logits=logits))


class MixedModel(OneLayerModel):
    """A bit, and a continuous z given it."""

    def forward(self, batch: Batch) -> None:
        with self.plate(batch):
            a = pyro.sample("a", dist.Bernoulli(logits=self.m))
            self.observe(pyro.sample("z", _normal(self.u * a + self.k, self.l)))


class MixedGuide(BitGuide):
    def forward(self, batch: Batch) -> None:
        with self.plate(batch):
            a = pyro.sample("a", dist.Bernoulli(logits=self.logits(batch["x"])))
            pyro.sample("z", _normal(self.d * a + self.f, self.r))


def _fit(v: Values, first: Tensor, second: Tensor) -> Tensor:
    return _log_normal(X[0], first, v["s0"]) + _log_normal(X[1], second, v["s1"])


def _bit_logits(v: Values) -> Tensor:
    logits: Tensor = v["a0"] * X[0] + v["a1"] * X[1] + v["c"]
    return logits


def _bit(v: Values, noise: Sequence[Tensor]) -> Terms:
    (a,) = noise
    log_q = _log_mass(a, _bit_logits(v))
    rate = {"a": log_q - _log_mass(a, v["m"])}
    return Terms(_likelihood(v, a), rate, log_q, log_q)


def _bits(v: Values, noise: Sequence[Tensor]) -> Terms:
    a, b = noise
    log_q = {"a": _log_mass(a, _bit_logits(v)), "b": _log_mass(b, v["d"] * a + v["f"])}
    log_p = {"a": _log_mass(a, v["u"] * b + v["k"]), "b": _log_mass(b, v["m"])}
    fit = _fit(v, v["w0"] * a + v["b0"] + v["g0"] * b, v["w1"] * a + v["b1"] + v["g1"] * b)
    total = log_q["a"] + log_q["b"]
    return Terms(fit, {site: log_q[site] - log_p[site] for site in log_q}, total, total)


def _class_logits(v: Values) -> tuple[Tensor, Tensor]:
    """Of the guide and of the model, ``[3]``."""
    zero = torch.zeros_like(v["m0"])
    here = torch.stack([v["a0"] * X[0] + v["c0"], v["a1"] * X[1] + v["c1"], zero])
    return here.log_softmax(0), torch.stack([v["m0"], v["m1"], zero]).log_softmax(0)


def _fit_classes(v: Values, z: Tensor) -> Tensor:
    """log p(x | z) at ``[points, 3]``."""
    first, second = (
        torch.stack([v["u0"], v["u1"], v["u2"]]),
        torch.stack([v["v0"], v["v1"], v["v2"]]),
    )
    return _fit(v, z @ first, z @ second)


def _classes(v: Values, noise: Sequence[Tensor]) -> Terms:
    z = one_hot(noise[0].long(), 3).double()
    log_q, log_p = (z @ logits for logits in _class_logits(v))
    return Terms(_fit_classes(v, z), {"z": log_q - log_p}, log_q, log_q)


def _mixed(v: Values, noise: Sequence[Tensor]) -> Terms:
    a, unit = noise
    log_a = _log_mass(a, _bit_logits(v))
    loc = v["d"] * a + v["f"]
    z = loc + v["r"].exp() * unit
    rate_z = _log_normal(z, loc, v["r"]) - _log_normal(z, v["u"] * a + v["k"], v["l"])
    log_q = log_a + _log_normal(z.detach(), loc, v["r"])
    return Terms(_likelihood(v, z), {"a": log_a - _log_mass(a, v["m"]), "z": rate_z}, log_q, log_a)


def concrete_bit(temperature: float, prior: float, relaxed: bool) -> Densities:
    """The relaxed draw of a bit, under relaxed densities or in the discrete log masses."""

    def terms(v: Values, noise: Sequence[Tensor]) -> Terms:
        logistic = log_ndtr(noise[0]) - log_ndtr(-noise[0])
        u = (_bit_logits(v) + logistic) / temperature
        a = u.sigmoid()

        def density(logits: Tensor, at: float) -> Tensor:
            off = logits - at * u
            log_density: Tensor = math.log(at) + off - 2 * softplus(off)
            return log_density

        here, there = _bit_logits(v), v["m"]
        if relaxed:
            rate = density(here, temperature) - density(there, prior)
        else:
            rate = _log_mass(a, here) - _log_mass(a, there)
        return Terms(_likelihood(v, a), {"a": rate})

    return terms


def straight_bit(v: Values, noise: Sequence[Tensor]) -> Terms:
    """The discrete draw, on a path of its probability."""
    logits = _bit_logits(v)
    path = logits.sigmoid()
    a = noise[0] + path - path.detach()
    rate = _log_mass(a, logits) - _log_mass(a, v["m"])
    return Terms(_likelihood(v, a), {"a": rate}, None, _log_mass(noise[0], logits).detach())


def concrete_classes(temperature: float, prior: float, relaxed: bool) -> Densities:
    """The same of three classes, at three noises."""

    def terms(v: Values, noise: Sequence[Tensor]) -> Terms:
        gumbel = -torch.stack([(-log_ndtr(axis)).log() for axis in noise], -1)
        here, there = _class_logits(v)
        log_z = ((here + gumbel) / temperature).log_softmax(-1)

        def density(logits: Tensor, at: float) -> Tensor:
            """On the simplex (Maddison et al. 2017, equation 10)."""
            powers = logits - at * log_z
            top = (powers - log_z).sum(-1) + 2 * math.log(at)
            return top - 3 * powers.logsumexp(-1)

        if relaxed:
            rate = density(here, temperature) - density(there, prior)
        else:
            rate = log_z.exp() @ (here - there)
        return Terms(_fit_classes(v, log_z.exp()), {"z": rate})

    return terms


def straight_classes(v: Values, noise: Sequence[Tensor]) -> Terms:
    z = one_hot(noise[0].long(), 3).double()
    here, there = _class_logits(v)
    probability = (z @ here).detach()
    z = z + here.exp() - here.exp().detach()
    return Terms(_fit_classes(v, z), {"z": z @ (here - there)}, None, probability)


_BIT_FIT = {"w0": 1.2, "b0": -0.2, "w1": -0.9, "b1": 0.3, "s0": -0.2, "s1": -0.1}
_BIT_GUIDE = {"a0": 0.7, "a1": -0.4, "c": -0.3}
BIT = Pair(
    "bit", BitModel, BitGuide, {"m": -0.4, **_BIT_FIT}, _BIT_GUIDE, ("a",), _bit, states=(2,)
)
BITS = Pair(
    "bits",
    BitsModel,
    BitsGuide,
    {"m": 0.3, "u": 1.1, "k": -0.7, "g0": -0.5, "g1": 0.8, **_BIT_FIT},
    {**_BIT_GUIDE, "d": -0.8, "f": 0.6},
    ("a", "b"),
    _bits,
    states=(2, 2),
)
CLASSES = Pair(
    "classes",
    ClassesModel,
    ClassesGuide,
    {"m0": 0.4, "m1": -0.3, "u0": 1.0, "u1": -0.6, "u2": 0.2, "v0": -0.8, "v1": 0.5, "v2": 0.1}
    | {"s0": -0.1, "s1": 0.1},
    {"a0": 0.6, "c0": -0.2, "a1": 0.9, "c1": 0.5},
    ("z",),
    _classes,
    states=(3,),
)
MIXED = Pair(
    "mixed",
    MixedModel,
    MixedGuide,
    {"m": -0.4, "u": 1.3, "k": -0.3, "l": -0.2, **_LIKELIHOOD},
    {**_BIT_GUIDE, "d": 0.8, "f": 0.1, "r": -0.6},
    ("a", "z"),
    _mixed,
    states=(2,),
)
