"""What a penalty looks at: one latent site of the guide, as draws ``[K, B, D]`` and as densities."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.objectives import schedules
from pyro_vae.objectives.particles import Particles
from pyro_vae.objectives.schedules import Schedule
from pyro_vae.objectives.tracing import core, elementwise, unmasked_fn

__all__ = ["Latent", "Penalty", "chosen"]


class Penalty:
    """A weight times an estimate of something about q(z) = E_x q(z | x), from the rows of a batch.

    Rows are draws of x that count alike, whatever the masks and scales of the site: row weights
    weigh the whole loss of a row, this term included. With K particles it is the mean over particles
    of the estimates from B draws each, so that chunks of particles change nothing. A latent z2 of a
    ladder, drawn given z1, has q(z2) = E q(z2 | z1, x).

    Args:
        weight: a number of any sign, or a schedule.
        site: the latent; default: the only one. For several, give several penalties.
    """

    def __init__(self, weight: float | Schedule = 1.0, site: str | None = None) -> None:
        self.weight, self.site = weight, site

    def __call__(self, particles: Particles, step: Tensor) -> Tensor:
        """``[]`` or ``[B]``, added to the loss of each row.

        Raises:
            ValueError: no such latent, several and none named, draws that have no path.
        """
        return schedules.value(self.weight, step) * self.estimate(self.latent(particles))

    def estimate(self, latent: Latent) -> Tensor:
        """What is weighed, ``[]`` or ``[B]``."""
        raise NotImplementedError

    def latent(self, particles: Particles) -> Latent:
        return Latent(particles, self.site, type(self).__name__)

    def __repr__(self) -> str:
        weight = getattr(self.weight, "__qualname__", self.weight)
        site = "" if self.site is None else f", site={self.site!r}"
        return f"{type(self).__name__}({weight}{site})"


class Latent:
    """A latent site of a pass. D is what an event (and plates inside a row) has in entries.

    Args:
        who: asks, for the errors.

    Raises:
        ValueError: as ``Penalty``.
    """

    def __init__(self, particles: Particles, site: str | None, who: str) -> None:
        self.particles, self.who = particles, who
        latents = [s for s in particles.posterior if s in particles.model and particles.local(s)]
        if site is None and len(latents) == 1:
            site = latents[0]
        if site not in latents:
            asked = "no site" if site is None else f"site={site!r}"
            raise ValueError(f"{who}: came {asked}, wanted one of the rows' latents {latents}")
        self.name = site
        self.here, self.prior = particles.guide[site], particles.model[site]
        self.posterior = unmasked_fn(self.here)
        if not self.posterior.has_rsample or site in particles.score:
            raise ValueError(
                f"{who}: site {site!r} is trained by its score and a penalty's gradient takes the "
                "path; use a distribution with rsample and estimator='pathwise'"
            )

    @cached_property
    def draws(self) -> Tensor:
        """``[K, B, D]``, with their path."""
        draws = self.particles.samples[self.name]
        return draws.reshape(*draws.shape[:2], -1)

    def from_prior(self) -> Tensor:
        """As many draws of the model's prior ``[K, B, D]``, without a path: a penalty moves the
        posterior. A prior that depends on other latents is the one given their draws."""
        fn = unmasked_fn(self.prior)
        with torch.no_grad():
            return self._entries(fn(), fn.event_dim)

    def log_q(self) -> Tensor:
        """log q(z | x) of the draws, ``[K, B, D]`` or of as many terms as it factorizes into."""
        return self._density(self.posterior)

    def log_p(self) -> Tensor:
        """log p(z) of the draws, alike."""
        return self._density(unmasked_fn(self.prior))

    def normal(self) -> tuple[Tensor, Tensor] | None:
        """Mean and scale ``[K, B, D]`` of a posterior whose dimensions are independent Gaussians."""
        fn = core(self.posterior)
        if not isinstance(fn, dist.Normal):
            return None
        return self.parameter(fn.loc), self.parameter(fn.scale)

    def parameter(self, value: Tensor) -> Tensor:
        """What the posterior has for each entry, ``[K, B, D]``."""
        return self._entries(value, self.posterior.event_dim)

    def needs_all(self) -> None:
        """Refuse rows whose latent is data: they have no q(z | x)."""
        if self.here["infer"].get("observed") is not None:
            raise ValueError(
                f"{self.who}: site {self.name!r} is data in a part of the rows, which have no "
                "density q(z | x); leave it out of the batch"
            )

    def factorizes(self, log_density: Tensor) -> bool:
        return log_density.shape[2] == self.draws.shape[2]

    def kind(self) -> str:
        return type(core(self.posterior)).__name__

    def _density(self, fn: Any) -> Tensor:
        log_density, event_dim = elementwise(fn, self.here["value"], masked=False)
        size = self.particles.num_particles
        out = self.particles.plan.canonical(log_density, event_dim, size, True)
        lead = self.draws.shape[:2]
        return out.expand(*lead, *out.shape[2:]).reshape(*lead, -1)

    def _entries(self, value: Tensor, event_dim: int) -> Tensor:
        value = self.particles.plan.canonical(value, event_dim, self.particles.num_particles, True)
        value = value.expand(self.particles.samples[self.name].shape)
        return value.reshape(self.draws.shape)


def chosen(who: str, argument: str, given: str, known: Iterable[str]) -> None:
    """Refuse what is not among the known.

    Raises:
        ValueError: naming both.
    """
    if given not in list(known):
        wanted = ", ".join(map(repr, known))
        raise ValueError(f"{who}: came {argument}={given!r}, wanted one of {wanted}")
