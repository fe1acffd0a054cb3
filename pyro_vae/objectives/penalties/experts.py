"""How far a posterior of several sites is from the experts of single ones."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.objectives import schedules
from pyro_vae.objectives.particles import Particles
from pyro_vae.objectives.penalties.latent import Latent
from pyro_vae.objectives.schedules import Schedule
from pyro_vae.objectives.tracing import core, elementwise_kl

__all__ = ["ConditionalBottleneck", "ExpertKL"]


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
        latent = Latent(particles, site, type(self).__name__)
        zero = torch.zeros((), device=step.device)
        terms = [
            (torch.where(counts, self._kl(latent, expert), zero), counts)
            for expert, counts in latent.here["infer"]["experts"].values()
        ]
        total = torch.stack([kl for kl, _ in terms]).sum(0)
        number = torch.stack([torch.as_tensor(counts) for _, counts in terms]).sum(0)
        return schedules.value(self.weight, step) * self._weighed(latent, total, number)

    def _weighed(self, latent: Latent, total: Tensor, number: Tensor) -> Tensor:
        """Of Σ_m KL(q ‖ q_m) and how many experts count, ``[B]``."""
        return total

    def _kl(self, latent: Latent, other: object) -> Tensor:
        """KL(q ‖ other), ``[B]``."""
        try:
            kl, event_dim = elementwise_kl(latent.posterior, other)
        except NotImplementedError:
            raise ValueError(
                f"{latent.who}: site {latent.name!r}: the KL of a {latent.kind()} to a "
                f"{type(core(other)).__name__} is not known; use a product of Gaussian experts"
            ) from None
        particles = latent.particles
        kl = particles.plan.canonical(kl, event_dim, particles.num_particles, True)
        return kl.flatten(2).sum(2).mean(0) if kl.dim() > 2 else kl.mean(0)

    def __repr__(self) -> str:
        weight = getattr(self.weight, "__qualname__", self.weight)
        site = "" if self.site is None else f", site={self.site!r}"
        return f"{type(self).__name__}({weight}{site})"


class ConditionalBottleneck(ExpertKL):
    """What a conditional information bottleneck asks for beyond the rate (MVTCAE, Hwang et al. 2021).

    alpha / (n - alpha) (Σ_m KL(q ‖ q_m) - (n - 1) KL(q ‖ p)) of a row in which n experts count. Added to
    an ELBO this weighs KL(q ‖ p) by n (1 - alpha) / (n - alpha). One site alone has nothing to share:
    there it is 0.

    Args:
        alpha: from 0, where it is 0, to 1.
        weight, site: as for ``ExpertKL``.

    Raises:
        ValueError: alpha outside [0, 1].
    """

    def __init__(
        self, alpha: float, weight: float | Schedule = 1.0, site: str | None = None
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"ConditionalBottleneck: came alpha={alpha!r}, wanted 0 to 1")
        super().__init__(weight, site)
        self.alpha = alpha

    def _weighed(self, latent: Latent, total: Tensor, number: Tensor) -> Tensor:
        several = number > 1
        share = self.alpha / (number.clamp(min=2) - self.alpha)
        gain = total - (number - 1) * self._kl(latent, latent.prior["fn"])
        return torch.where(several, share * gain, torch.zeros_like(gain))

    def __repr__(self) -> str:
        return super().__repr__().replace("(", f"({self.alpha:g}, ", 1)
