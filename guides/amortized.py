"""One latent variable, inferred from one site of data by a network."""

from __future__ import annotations

from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.batch import Batch

__all__ = ["AmortizedGuide"]


class AmortizedGuide(PyroModule):
    """q(z | x) (Kingma and Welling 2014, arXiv:1312.6114).

    Missing entries of x read as the batch's fill.

    Args:
        posterior: conditional with parent x ``[B, *event]``.
        latent: name of z.
        site: name of x.
    """

    def __init__(self, posterior: nn.Module, latent: str = "z", site: str = "x") -> None:
        super().__init__()
        self.posterior = posterior
        self.latent, self.site = latent, site

    def forward(self, batch: Batch) -> Tensor:
        """Draw z ``[..., B, *latent]`` for the rows of the batch."""
        with pyro.plate("data", batch.size, dim=-1):
            z: Tensor = pyro.sample(self.latent, self.posterior_of(batch))
        return z

    def posterior_of(self, batch: Batch) -> Any:
        """The distribution that the rows' latents are drawn from."""
        return self.posterior(batch[self.site])
