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
        mean: site -> ``[2, B, *event]``, two estimates of E_q[z] from particles of their own.
    """

    elbo: list[Tensor] = field(default_factory=list)
    rate: dict[str, list[Tensor]] = field(default_factory=dict)
    mean: dict[str, list[Tensor]] = field(default_factory=dict)

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
                self.mean.setdefault(site, []).append(both)

    def rate_of_rows(self) -> list[Tensor]:
        """The rate of all sites and dimensions, ``[B]`` a batch."""
        total = [torch.zeros_like(elbo) for elbo in self.elbo]
        for parts in self.rate.values():
            sums = [part.reshape(len(part), -1).sum(1) for part in parts]
            total = [t + here for t, here in zip(total, sums, strict=True)]
        return total


def active_units(mean: Tensor) -> Tensor:
    """Which latent dimensions vary with the data: Var_x(E_q[z]) > 0.01 (Burda et al. 2016).

    Args:
        mean: ``[2, N, *event]``, two estimates of the posterior means. Where their noise is
            independent it does not count as variance, which it would with one estimate.

    Returns:
        bool ``[*event]``.
    """
    first, second = (mean - mean.mean(1, keepdim=True)).unbind()
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
    return terms | {("mean", site): _mean(particles, site).to(likelihood) for site in latents}


def _mean(particles: Particles, site: str) -> Tensor:
    """The mean of a latent given what precedes it if it is known, else its draw: ``[K, B, *event]``."""
    here, draw = particles.guide[site], particles.samples[site]
    if here["infer"].get("observed") is not None:
        return draw
    try:
        mean = here["fn"].mean
    except NotImplementedError:
        return draw
    mean = particles.plan.canonical(
        mean, here["fn"].event_dim, particles.num_particles, particles.local(site)
    ).expand(draw.shape)
    return draw if bool(mean.isnan().any()) else mean
