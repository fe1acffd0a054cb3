"""What a guide uses its latents for: rate per site and dimension, active units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vae.objectives.particles import Particles, run
from pyro_vae.objectives.plan import Plan
from pyro_vae.objectives.rates import Analytic, MonteCarlo

__all__ = ["ACTIVE", "LatentTable", "active_units"]

Program = Callable[..., Any]
ACTIVE = 0.01


@dataclass
class LatentTable:
    """Row by row, batch after batch: ELBO at beta = 1, rates and posterior means.

    Attributes:
        elbo: ``[B]`` nats, one tensor a batch.
        rate: site -> ``[B, *dims]`` nats, analytic where a KL is known, else Monte Carlo.
        shift: site -> ``[2, B, *event]``, how far the posterior mean lies from the mean that the
            model gives z after what precedes it, in deviations there; two estimates from particles
            of their own.
    """

    elbo: list[Tensor] = field(default_factory=list)
    rate: dict[str, list[Tensor]] = field(default_factory=dict)
    shift: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        plan: Plan,
        particles: int,
        chunk: int,
    ) -> None:
        """One batch of rows."""
        halves: list[dict[tuple[str, str], Tensor]] = [{}, {}]
        count = max(1, particles // 2)
        for half in halves:
            for done in range(0, count, chunk):
                size = min(chunk, count - done)
                for key, term in _terms(run(model, guide, args, {}, plan, size)).items():
                    term = term.sum(0) / count
                    half[key] = half[key] + term if key in half else term
        for kind, site in halves[0]:
            both = torch.stack([half[kind, site] for half in halves])
            if kind == "elbo":
                self.elbo.append(both.mean(0))
            elif kind == "rate":
                self.rate.setdefault(site, []).append(both.mean(0))
            else:
                self.shift.setdefault(site, []).append(both)

    def rate_of_rows(self) -> list[Tensor]:
        """The rate of all sites and dimensions, ``[B]`` a batch."""
        total = [torch.zeros_like(elbo) for elbo in self.elbo]
        for parts in self.rate.values():
            sums = [part.reshape(len(part), -1).sum(1) for part in parts]
            total = [t + here for t, here in zip(total, sums, strict=True)]
        return total


def active_units(shift: Tensor) -> Tensor:
    """Which latent dimensions vary with the data, by more than their parents say.

    Var_x(E_q[(z - m) / s]) > 0.01 with mean m and deviation s of p(z | parents of z). Under N(0, I) this
    is Var_x(E_q[z]) (Burda et al. 2016), by which a layer that only repeats those above it would be
    active too, and the unit of a layer would matter.

    Args:
        shift: ``[2, N, *event]``, two estimates of E_q[(z - m) / s]. Where their noise is independent
            it does not count as variance, which it would with one estimate.

    Returns:
        bool ``[*event]``.
    """
    first, second = (shift - shift.mean(1, keepdim=True)).unbind()
    return torch.gt((first * second).mean(0), ACTIVE)


def _terms(particles: Particles) -> dict[tuple[str, str], Tensor]:
    """Kind and site -> ``[K, B, ...]``."""
    zero = torch.zeros(())
    rates, likelihood = Analytic()(particles, zero), particles.summed(particles.likelihood)
    # With every term at the same draws, little is left to chance where the guide is good.
    rate = particles.summed(MonteCarlo()(particles, zero))
    assert likelihood is not None
    terms = {("elbo", ""): likelihood if rate is None else likelihood - rate}
    terms |= {("rate", site): term for site, term in rates.items()}
    latents = [site for site in particles.posterior if site in particles.model]
    return terms | {("shift", site): _shift(particles, site).to(likelihood) for site in latents}


def _shift(particles: Particles, site: str) -> Tensor:
    """The posterior mean of a latent less its prior mean, given what precedes it in either program, in
    units of its prior deviation: ``[K, B, *event]``. For a posterior mean that is not known stands the
    draw, for moments of the prior those of N(0, 1)."""
    here, prior = particles.guide[site], particles.model[site]["fn"]
    fixed = here["infer"].get("observed") is not None
    mean = None if fixed else _moment(particles, site, here["fn"], "mean")
    center, variance = (_moment(particles, site, prior, name) for name in ("mean", "variance"))
    shift = particles.samples[site] if mean is None else mean
    if center is not None:
        shift = shift - center
    if variance is None or bool((variance == 0).any()):
        return shift
    return shift / variance.sqrt()


def _moment(particles: Particles, site: str, fn: Any, name: str) -> Tensor | None:
    """``[K, B, *event]``, or None where it is not known."""
    try:
        value = getattr(fn, name)
    except NotImplementedError:
        return None
    local, count = particles.local(site), particles.num_particles
    value = particles.plan.canonical(value, fn.event_dim, count, local)
    return value.expand(particles.samples[site].shape) if bool(value.isfinite().all()) else None
