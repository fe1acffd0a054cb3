"""One latent variable, inferred from several sites of data by one network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.batch import Batch

__all__ = ["JointGuide"]


class JointGuide(PyroModule):
    """q(z | x_1, x_2, ...): features of all sites, one beside the other, go into one posterior.

    A site that a batch lacks counts as missing in every entry, so that one network serves any part
    of the data.

    Args:
        features: site -> module ``(x [B, *event], mask [B, *event]) -> [B, F]``; missing entries of x
            read as the batch's fill, and mask is True where x is observed.
        posterior: conditional with parent ``[B, F_1 + F_2 + ...]``.
        blank: site -> event shape, of what stands in for a site that a batch lacks.
        latent: name of z.
    """

    def __init__(
        self,
        features: Mapping[str, nn.Module],
        posterior: nn.Module,
        blank: Mapping[str, tuple[int, ...]],
        latent: str = "z",
    ) -> None:
        super().__init__()
        self.features, self.posterior = nn.ModuleDict(features), posterior
        self.blank, self.latent = dict(blank), latent

    def forward(self, batch: Batch) -> Tensor:
        """Draw z ``[..., B, *latent]`` for the rows of the batch."""
        fn = self.posterior_of(batch)
        with pyro.plate("data", batch.size, dim=-1):
            z: Tensor = pyro.sample(self.latent, fn)
        return z

    def posterior_of(self, batch: Batch) -> Any:
        """The distribution that the rows' latents are drawn from."""
        parts = [module(*self._seen(batch, site)) for site, module in self.features.items()]
        return self.posterior(torch.cat(parts, -1))

    def _seen(self, batch: Batch, site: str) -> tuple[Tensor, Tensor]:
        if site in batch:
            return batch[site], batch.mask(site)
        blank = torch.zeros(batch.size, *self.blank[site], device=batch.device)
        return blank, torch.zeros_like(blank, dtype=torch.bool)
