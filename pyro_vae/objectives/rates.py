"""Rates: what weighs log q - log p(z) inside a bound, site by site.

A rate maps particles to ``site -> [K, B, *rest]`` (nats, elementwise where it factorizes) and says
with which weight each site's log q enters log w, which DReG must know.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_vae.objectives import schedules
from pyro_vae.objectives.particles import Particles
from pyro_vae.objectives.schedules import Schedule

__all__ = ["Analytic", "Beta", "MonteCarlo", "Rate"]


class Rate:
    """The weighed sum of log q - log p(z). Wrap a rate to change it.

    Attributes:
        analytic: log q is integrated out at some site (no bound inside a nonlinear bound).
    """

    analytic: bool = False

    def __call__(self, particles: Particles, step: Tensor) -> dict[str, Tensor]:
        """site -> nats ``[K, B, *rest]`` (``[K, *rest]`` outside the rows)."""
        raise NotImplementedError

    def betas(self, particles: Particles, step: Tensor) -> dict[str, float | Tensor]:
        """site -> weight of log q in log w (0 where the KL is analytic)."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return type(self).__name__.lower()


class MonteCarlo(Rate):
    """log q - log p at the draws."""

    def __call__(self, particles: Particles, step: Tensor) -> dict[str, Tensor]:
        rate = dict(particles.posterior)
        for site, prior in particles.prior.items():
            rate[site] = _subtract(rate[site], prior) if site in rate else -prior
        return rate

    def betas(self, particles: Particles, step: Tensor) -> dict[str, float | Tensor]:
        return dict.fromkeys(particles.posterior, 1.0)


class Analytic(Rate):
    """KL(q || p) in closed form where one is known and the order of the sites allows it.

    For a site s the model's latents before s must precede s in the guide as well; everywhere else
    the rate is Monte Carlo, and the plan's notes say why.
    """

    analytic = True

    def __call__(self, particles: Particles, step: Tensor) -> dict[str, Tensor]:
        rate = MonteCarlo()(particles, step)
        return rate | {site: particles.kl(site) for site in particles.analytic}

    def betas(self, particles: Particles, step: Tensor) -> dict[str, float | Tensor]:
        return MonteCarlo().betas(particles, step) | dict.fromkeys(particles.analytic, 0.0)


class Beta(Rate):
    """A rate times beta (Higgins et al. 2017); a schedule of beta is KL warm-up.

    Args:
        beta: a number or schedule for all sites, or ``site -> number or schedule`` (1 elsewhere).
        rate: what is weighed.

    Raises:
        ValueError: a negative number; at the first call, a site that neither program has. One that
            is data in a batch has no rate there.
    """

    def __init__(
        self, beta: float | Schedule | Mapping[str, float | Schedule], rate: Rate | None = None
    ) -> None:
        for number in beta.values() if isinstance(beta, Mapping) else [beta]:
            if not callable(number) and not number >= 0:
                raise ValueError(f"Beta: came beta={number}, wanted a number >= 0 or a schedule")
        self.beta = dict(beta) if isinstance(beta, Mapping) else beta
        self.rate = rate or MonteCarlo()
        self.analytic = self.rate.analytic

    def __call__(self, particles: Particles, step: Tensor) -> dict[str, Tensor]:
        rate = self.rate(particles, step)
        return {site: self._at(site, particles, step) * term for site, term in rate.items()}

    def betas(self, particles: Particles, step: Tensor) -> dict[str, float | Tensor]:
        betas = self.rate.betas(particles, step)
        if not isinstance(self.beta, dict):
            beta = schedules.value(
                self.beta, step
            )  # one object, which says that all sites share it
            return {site: beta if b == 1.0 else beta * b for site, b in betas.items()}
        return {site: self._at(site, particles, step) * b for site, b in betas.items()}

    def _at(self, site: str, particles: Particles, step: Tensor) -> float | Tensor:
        if not isinstance(self.beta, dict):
            return schedules.value(self.beta, step)
        # a label may be data in this batch and a latent in the next
        if unknown := set(self.beta) - {*particles.posterior, *particles.model}:
            raise ValueError(
                f"Beta: came sites {sorted(unknown)}, the guide's latents are "
                f"{sorted(particles.posterior)}"
            )
        return schedules.value(self.beta.get(site, 1.0), step)

    def __repr__(self) -> str:
        if isinstance(self.beta, dict):
            sites = ", ".join(f"{site}: {_name(beta)}" for site, beta in self.beta.items())
            return f"beta({{{sites}}}, {self.rate!r})"
        return f"beta({_name(self.beta)}, {self.rate!r})"


def _name(beta: float | Schedule) -> str:
    return str(getattr(beta, "__qualname__", beta))


def _subtract(log_q: Tensor, log_p: Tensor) -> Tensor:
    """log q - log p, elementwise if both factorize alike, else summed to ``[K, B]``."""
    if log_q.shape != log_p.shape:
        keep = min(2, log_q.dim(), log_p.dim())
        log_q, log_p = (t.flatten(keep).sum(keep) if t.dim() > keep else t for t in (log_q, log_p))
    return torch.sub(log_q, log_p)
