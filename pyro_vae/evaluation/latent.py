"""What a guide uses its latents for: rate per site and dimension, active units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vae.objectives.particles import Plan, run
from pyro_vae.objectives.rates import Analytic

__all__ = ["ACTIVE", "LatentTable", "active_units"]

Program = Callable[..., Any]
ACTIVE = 0.01


@dataclass
class LatentTable:
    """Row by row, batch after batch: ELBO at beta = 1, rates and posterior means.

    Attributes:
        elbo: ``[B]`` nats, one tensor a batch.
        rate: site -> ``[B, *dims]`` nats, analytic where a KL is known, else Monte Carlo.
        mean: site -> ``[B, *event]`` E_q[z].
    """

    elbo: list[Tensor] = field(default_factory=list)
    rate: dict[str, list[Tensor]] = field(default_factory=dict)
    mean: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(
        self, model: Program, guide: Program, args: tuple[Any, ...], plan: Plan, particles: int
    ) -> None:
        """One batch of rows."""
        table = run(model, guide, args, {}, plan, particles)
        likelihood = table.total(table.likelihood)
        rates = Analytic()(table, torch.zeros(()))
        rate = table.total(rates)
        assert likelihood is not None
        self.elbo.append((likelihood if rate is None else likelihood - rate).mean(0))
        for site, term in rates.items():
            self.rate.setdefault(site, []).append(term.mean(0))
        for site in table.posterior:
            self.mean.setdefault(site, []).append(table.samples[site].to(likelihood).mean(0))


def active_units(mean: Tensor) -> Tensor:
    """Which latent dimensions vary with the data: Var_x(E_q[z]) > 0.01 (Burda et al. 2016).

    Args:
        mean: ``[N, *event]`` posterior means.

    Returns:
        bool ``[*event]``.
    """
    return mean.var(0, unbiased=False) > ACTIVE
