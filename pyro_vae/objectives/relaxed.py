"""Estimators that give discrete draws a path, which biases the gradient by design.

At the guide's Bernoulli and OneHotCategorical sites the draw is relaxed, and at the model's sites of
the same name the density is. Whatever runs the pair without such an estimator, evaluation above all,
finds it discrete.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyro_vae.objectives import estimators, schedules
from pyro_vae.objectives.bounds import Bound
from pyro_vae.objectives.estimators import Estimator
from pyro_vae.objectives.particles import Treatment
from pyro_vae.objectives.plan import Plan
from pyro_vae.objectives.schedules import Schedule
from pyro_vae.objectives.tracing import core

__all__ = ["Gumbel", "StraightThrough"]

DENSITIES = ("relaxed", "discrete")


class _Relaxing(Estimator):
    """Every discrete site is relaxed in one way."""

    def untrained(self, site: str, plan: Plan) -> str | None:
        kind = plan.discrete[site].kind
        if _relaxation(kind) is not None:
            return None
        known = ", ".join(known.__name__ for known in _RELAXED)
        return (
            f"is a {kind.__name__.lstrip('_')}, and a relaxation is known of {known} alone; use "
            "OneHotCategorical for classes, or estimator='score'"
        )


class Gumbel(_Relaxing):
    """Relaxed discrete draws (Jang, Gu & Poole 2017; Concrete: Maddison, Mnih & Teh 2017).

    A draw is the softmax (of a Bernoulli the sigmoid) of (logits + noise) / temperature, which tends
    to the discrete draw as the temperature falls, while its gradient becomes noisier. Biased by
    design; the value is that of the relaxed objective too, which is no bound of the discrete model.

    Args:
        temperature: a number above 0 or a schedule, ``exponential(1e-4, 0.5)`` say.
        hard: the model sees the discrete draw, its gradient is that of the relaxed one
            (straight-through Gumbel).
        density: ``"relaxed"`` takes log q and log p of the relaxed draw under relaxed distributions,
            so that with ``MonteCarlo()`` a lower bound bounds log p(x) of the relaxed model. Its bias
            does not vanish with the temperature: the two relaxed densities stay apart.
            ``"discrete"`` puts the draw into the discrete log masses, as sum of value * log
            probability. A KL in closed form (rate ``Analytic()``) is that of the discrete
            distributions either way, which makes it the objective of Jang et al.
        prior_temperature: of the model's densities, default ``temperature``.

    Raises:
        ValueError: an unknown density, a temperature that is not above 0; at the first call, a site
            without relaxation, one observed in part under relaxed densities.
    """

    def __init__(
        self,
        temperature: float | Schedule = 0.5,
        hard: bool = False,
        density: str = "relaxed",
        prior_temperature: float | Schedule | None = None,
    ) -> None:
        if density not in DENSITIES:
            raise ValueError(f"Gumbel: came density={density!r}, wanted one of {list(DENSITIES)}")
        prior_temperature = temperature if prior_temperature is None else prior_temperature
        given = {"temperature": temperature, "prior_temperature": prior_temperature}
        for name, number in given.items():
            if not callable(number) and not number > 0:
                raise ValueError(f"Gumbel: came {name}={number}, wanted a number > 0 or a schedule")
        self.temperature, self.prior_temperature = temperature, prior_temperature
        self.hard, self.density = hard, density

    def refusal(self, bound: Bound, num_particles: int) -> str | None:
        if self.density == "discrete" or bound.guide is bound:
            return None
        return "relaxed densities don't tell the model's gradient apart; use density='discrete'"

    def treatment(self, plan: Plan, step: Tensor, first: int, size: int) -> Treatment:
        draw = _hard if self.hard else _soft
        here, prior = (
            _Way(draw, schedules.value(temperature, step), self.density == "relaxed")
            for temperature in (self.temperature, self.prior_temperature)
        )
        return _Relax(plan, here, prior)

    def __repr__(self) -> str:
        parts = [f"{getattr(self.temperature, '__qualname__', self.temperature)}"]
        parts += ["hard"] * self.hard + ["discrete"] * (self.density == "discrete")
        if self.prior_temperature is not self.temperature:
            there = getattr(self.prior_temperature, "__qualname__", self.prior_temperature)
            parts.append(f"prior_temperature={there}")
        return f"gumbel({', '.join(parts)})"


class StraightThrough(_Relaxing):
    """Discrete draws whose gradient is that of their probabilities (Bengio, Léonard & Courville 2013).

    The value is that of the discrete model. Biased by design. Log masses count as sum of value * log
    probability.
    """

    def treatment(self, plan: Plan, step: Tensor, first: int, size: int) -> Treatment:
        way = _Way(_straight, 1.0, False)
        return _Relax(plan, way, way)

    def __repr__(self) -> str:
        return "straight_through"


@dataclass(frozen=True)
class _Way:
    """How a distribution is relaxed.

    Attributes:
        draw: the distribution and the unsquashed draw u -> the value, on which a path leads to u.
        relaxed: the density is that of u under relaxed parameters, not of the value.
    """

    draw: Callable[[Any, Tensor], Tensor]
    temperature: float | Tensor
    relaxed: bool


def _soft(fn: Any, u: Tensor) -> Tensor:
    return fn.soft(u)  # type: ignore[no-any-return]


def _hard(fn: Any, u: Tensor) -> Tensor:
    return _through(fn.hard(u), fn.soft(u))


def _straight(fn: Any, u: Tensor) -> Tensor:
    return _through(fn.hard(u), fn.probs)


def _through(value: Tensor, path: Tensor) -> Tensor:
    return value + (path - path.detach())  # the difference is 0 to the last digit


class _Relax(Treatment):
    """Relaxed draws in the guide, and densities of the same kind at them in the model."""

    def __init__(self, plan: Plan, guide: _Way, model: _Way) -> None:
        super().__init__()
        self.plan, self.guide, self.model = plan, guide, model
        self.draws: dict[str, Tensor] = {}  # unsquashed

    def _pyro_sample(self, msg: Any) -> None:
        name, observed = msg["name"], msg["infer"].get("observed")
        if name not in self.plan.discrete:
            return
        if name in self.draws:
            msg["fn"] = _rewrapped(name, msg["fn"], self.model)
            core(msg["fn"]).u = self.draws[name]
            return
        msg["fn"] = _rewrapped(name, msg["fn"], self.guide)
        value = msg["fn"].rsample()
        self.draws[name] = core(msg["fn"]).u
        if observed is not None:
            if self.guide.relaxed:
                raise ValueError(
                    f"site {name!r}: it is observed in part, and data have no relaxed density; use "
                    "Gumbel(density='discrete')"
                )
            value = torch.where(observed, msg["value"].to(value), value)
        msg["value"] = value


class _Relaxed:
    """A discrete distribution that draws relaxed values.

    Its density is that of the unsquashed draw u it made last or was given, since squashed values run
    into 0 and 1 within float32, and since the two densities' ratio is the same. As an instance of the
    discrete distribution it has its closed forms.
    """

    has_rsample = True
    way: _Way
    u: Tensor
    logits: Any

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))  # type: ignore[attr-defined]
        uniform = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
        noise = self.noise(uniform.clamp(min=torch.finfo(uniform.dtype).tiny))
        self.u = (self.logits + noise) / self.temperature
        return self.way.draw(self, self.u)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.density() if self.relaxed else self.mass(value)

    @property
    def relaxed(self) -> bool:
        """Whether the density is that of the draw u, whatever the value."""
        return self.way.relaxed

    @property
    def temperature(self) -> Tensor:
        return torch.as_tensor(self.way.temperature).to(self.logits)

    def noise(self, uniform: Tensor) -> Tensor:
        raise NotImplementedError

    def soft(self, u: Tensor) -> Tensor:
        """The relaxed value, inside the support's hull."""
        raise NotImplementedError

    def hard(self, u: Tensor) -> Tensor:
        """The discrete value."""
        raise NotImplementedError

    def mass(self, value: Tensor) -> Tensor:
        """Log mass, linear in the value."""
        raise NotImplementedError

    def density(self) -> Tensor:
        """Log density of u."""
        raise NotImplementedError


class _RelaxedBernoulli(_Relaxed, dist.Bernoulli):  # type: ignore[misc]
    """u is logistic: the logit of BinConcrete (Maddison et al. 2017, appendix B)."""

    support = constraints.unit_interval

    def noise(self, uniform: Tensor) -> Tensor:
        return uniform.log() - (-uniform).log1p()

    def soft(self, u: Tensor) -> Tensor:
        return u.sigmoid()

    def hard(self, u: Tensor) -> Tensor:
        return (u > 0).to(u)

    def mass(self, value: Tensor) -> Tensor:
        log_mass: Tensor = value * self.logits - softplus(self.logits)
        return log_mass

    def density(self) -> Tensor:
        off = self.logits - self.temperature * self.u
        log_density: Tensor = self.temperature.log() + off - 2 * softplus(off)
        return log_density


class _RelaxedOneHot(_Relaxed, dist.OneHotCategorical):
    """u is Gumbel, up to a constant the logarithm of Concrete (ExpConcrete, Maddison et al. 2017,
    appendix C)."""

    support: Any = constraints.simplex

    def noise(self, uniform: Tensor) -> Tensor:
        return -(-uniform.log()).log()

    def soft(self, u: Tensor) -> Tensor:
        return u.softmax(-1)

    def hard(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u).scatter(-1, u.argmax(-1, keepdim=True), 1.0)

    def mass(self, value: Tensor) -> Tensor:
        possible = self.logits.clamp(
            min=torch.finfo(self.logits.dtype).min
        )  # 0 * -inf is no number
        log_mass: Tensor = (value * possible).sum(-1)
        return log_mass

    def density(self) -> Tensor:
        classes = self.event_shape[-1]
        off = self.logits - self.temperature * self.u
        constant = math.lgamma(classes) + (classes - 1) * self.temperature.log()
        log_density: Tensor = constant + off.sum(-1) - classes * off.logsumexp(-1)
        return log_density


_RELAXED: dict[type, type[Any]] = {
    torch.distributions.Bernoulli: _RelaxedBernoulli,
    torch.distributions.OneHotCategorical: _RelaxedOneHot,
}


def _relaxation(kind: type) -> type[Any] | None:
    return next((_RELAXED[base] for base in kind.__mro__ if base in _RELAXED), None)


def _rewrapped(site: str, fn: Any, way: _Way) -> Any:
    """The relaxation of a distribution under the same event dims and masks."""
    if isinstance(fn, dist.Independent):
        return _rewrapped(site, fn.base_dist, way).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution):
        return _rewrapped(site, fn.base_dist, way).mask(fn._mask)
    relaxation = _relaxation(type(fn))
    if relaxation is None:
        raise ValueError(
            f"site {site!r}: the {type(fn).__name__.lstrip('_')} of one program has no relaxation; "
            "give both the same distribution, or use estimator='score'"
        )
    relaxed = relaxation(logits=fn.logits, validate_args=False)
    relaxed.way = way
    return relaxed


estimators.BY_NAME |= {"gumbel": Gumbel, "straight_through": StraightThrough}
