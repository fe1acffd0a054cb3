"""Penalties on moments of the aggregate posterior."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.objectives import schedules
from pyro_vae.objectives.particles import Particles
from pyro_vae.objectives.penalties.latent import Latent, Penalty, chosen
from pyro_vae.objectives.schedules import Schedule
from pyro_vae.objectives.tracing import core

__all__ = ["DIP"]


class DIP(Penalty):
    """Disentangled inferred prior: a covariance C ``[D, D]`` drawn towards I (Kumar et al. 2018):

        offdiagonal · sum_{i != j} C_ij² + diagonal · sum_i (C_ii - 1)².

    Kind I takes C = Cov_x(E_q[z]), that of the posterior's means; kind II adds E_x Cov_q(z), which
    makes C that of q(z). Over the rows of a batch, with 1 / B as in the paper's code.

    Args:
        offdiagonal: a number or schedule.
        diagonal: a number or schedule. Default: the paper's choice, 10 times ``offdiagonal`` for kind
            I, ``offdiagonal`` for kind II.

    Raises:
        ValueError: unknown kind; at a call, a posterior whose moments are not known.
    """

    def __init__(
        self,
        offdiagonal: float | Schedule,
        diagonal: float | Schedule | None = None,
        kind: str = "II",
        site: str | None = None,
    ) -> None:
        super().__init__(offdiagonal, site)
        chosen("DIP", "kind", kind, ("I", "II"))
        self.diagonal, self.kind = diagonal, kind

    def __call__(self, particles: Particles, step: Tensor) -> Tensor:
        """``[]``; see ``Penalty``."""
        covariance = self.covariance(self.latent(particles))
        spread = covariance.diagonal(dim1=-2, dim2=-1)
        among = (covariance - spread.diag_embed()).square().sum((-2, -1)).mean()
        away = (spread - 1).square().sum(-1).mean()
        offdiagonal = schedules.value(self.weight, step)
        if self.diagonal is None:
            return offdiagonal * (among + (10 if self.kind == "I" else 1) * away)
        return offdiagonal * among + schedules.value(self.diagonal, step) * away

    def covariance(self, latent: Latent) -> Tensor:
        """C of each particle ``[K, D, D]``."""
        fn = latent.posterior
        try:
            mean, variance = latent.parameter(fn.mean), fn.variance
        except NotImplementedError:
            raise ValueError(
                f"DIP: site {latent.name!r}: mean and variance of a {latent.kind()} are not known; "
                "use TotalCorrelation or MMD"
            ) from None
        mean = mean - mean.mean(1, keepdim=True)
        covariance = mean.mT @ mean / mean.shape[1]
        if self.kind == "I":
            return covariance
        if (full := getattr(core(fn), "covariance_matrix", None)) is not None:
            particles = latent.particles
            full = particles.plan.canonical(full, 2, particles.num_particles, True)
            return covariance + full.mean(1)
        if core(fn).event_dim:
            raise ValueError(
                f"DIP: site {latent.name!r}: how the dimensions of a {latent.kind()} vary together is "
                "not known; use kind='I', TotalCorrelation or MMD"
            )
        return covariance + torch.diag_embed(latent.parameter(variance).mean(1))
