"""How far a posterior of several sites is from the experts of single ones."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.objectives import schedules
from pyro_vae.objectives.particles import Particles
from pyro_vae.objectives.penalties.latent import Latent
from pyro_vae.objectives.schedules import Schedule
from pyro_vae.objectives.tracing import core, elementwise_kl

__all__ = ["ExpertKL"]


class ExpertKL:
    """Σ_m KL(q(z | x) ‖ q(z | x_m)) in closed form, over the experts that count in a row.

    The guide says which those are: its site carries ``infer["experts"]``, name -> (distribution, rows
    ``[B]``), as ``guides.ExpertsGuide`` does. Row by row: no term about the aggregate posterior.

    Args:
        weight: a number of any sign, or a schedule.
        site: the latent; default: the only one that carries experts.
    """

    def __init__(self, weight: float | Schedule = 1.0, site: str | None = None) -> None:
        self.weight, self.site = weight, site

    def __call__(self, particles: Particles, step: Tensor) -> Tensor:
        """``[B]`` nats, the mean over particles.

        Raises:
            ValueError: no latent that carries experts, a pair of distributions whose KL is not known.
        """
        carry = [name for name, q in particles.guide.items() if "experts" in q["infer"]]
        site = carry[0] if self.site is None and len(carry) == 1 else self.site
        if site not in carry:
            raise ValueError(
                f"ExpertKL: came {'no site' if site is None else f'site={site!r}'}, the guide's sites "
                f"with experts are {carry}; use a guide of guides.experts"
            )
        latent = Latent(particles, site, "ExpertKL")
        total = torch.zeros(particles.samples[site].shape[1], device=step.device)
        for expert, counts in latent.here["infer"]["experts"].values():
            total = total + torch.where(counts, self._kl(latent, expert), total.new_zeros(()))
        return schedules.value(self.weight, step) * total

    def _kl(self, latent: Latent, expert: object) -> Tensor:
        try:
            kl, event_dim = elementwise_kl(latent.posterior, expert)
        except NotImplementedError:
            raise ValueError(
                f"ExpertKL: site {latent.name!r}: the KL of a {latent.kind()} to a "
                f"{type(core(expert)).__name__} is not known; use a product of Gaussian experts"
            ) from None
        particles = latent.particles
        kl = particles.plan.canonical(kl, event_dim, particles.num_particles, True)
        return kl.flatten(2).sum(2).mean(0) if kl.dim() > 2 else kl.mean(0)

    def __repr__(self) -> str:
        weight = getattr(self.weight, "__qualname__", self.weight)
        site = "" if self.site is None else f", site={self.site!r}"
        return f"ExpertKL({weight}{site})"
