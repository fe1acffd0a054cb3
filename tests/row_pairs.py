"""A pair whose posterior is what it is told for each row: the aggregate posterior is a known mixture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.objectives.particles import Particles, run
from pyro_vae.objectives.plan import Plan
from pyro_vae.objectives.tracing import Replay
from tests.small_pairs import plan_of

__all__ = ["RowPair", "gradient"]


class RowPair(nn.Module):
    """z ~ prior [D]; q(z | row) = kind(loc[row], scale[row]), independent dimensions.

    Both programs take the numbers of rows ``[B]``.
    """

    def __init__(self, loc: Tensor, scale: Tensor, kind: Any = dist.Normal) -> None:
        super().__init__()
        self.loc, self.scale, self.kind = nn.Parameter(loc), nn.Parameter(scale), kind
        self.plans: dict[int, Plan] = {}
        self.prior_loc = nn.Parameter(torch.zeros(loc.shape[1]))

    @classmethod
    def random(cls, rows: int = 7, dims: int = 4, kind: Any = dist.Normal) -> RowPair:
        generator = torch.Generator().manual_seed(3)
        loc = torch.randn(rows, dims, generator=generator)
        return cls(loc, 0.3 + torch.rand(rows, dims, generator=generator), kind)

    def prior(self) -> Any:
        return dist.Normal(self.prior_loc, 1.0).to_event(1)

    def posterior(self, rows: Tensor) -> Any:
        return self.kind(self.loc[rows], self.scale[rows]).to_event(1)

    def model(self, rows: Tensor) -> None:
        with pyro.plate("data", len(rows)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=rows.to(z))

    def guide(self, rows: Tensor) -> None:
        with pyro.plate("data", len(rows)):
            pyro.sample("z", self.posterior(rows))

    def particles(
        self, rows: Tensor | None = None, number: int = 1, z: Tensor | None = None
    ) -> Particles:
        """Of all rows or of some, at draws of its own or at ``z``."""
        rows = torch.arange(len(self.loc)) if rows is None else rows
        handlers = [] if z is None else [Replay({"z": z})]
        if len(rows) not in self.plans:
            self.plans[len(rows)] = plan_of(self.model, self.guide, rows)
        plan = self.plans[len(rows)]
        return run(self.model, self.guide, (rows,), {}, plan, number, handlers=handlers)


def gradient(loss: Tensor, wanted: Iterable[Tensor]) -> Tensor:
    """d loss / d parameters as one vector; another loss of the same draws may follow."""
    grads = torch.autograd.grad(
        loss, list(wanted), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([g.flatten() for g in grads])
