"""One latent variable, one site of data."""

from __future__ import annotations

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.batch import Batch

__all__ = ["LatentVariableModel"]


class LatentVariableModel(PyroModule):
    """p(z) p(x | z) (Kingma and Welling 2014, arXiv:1312.6114).

    Shapes: z ``[..., B, *latent]``, x ``[..., B, *event]``.

    Args:
        prior: conditional without parents.
        likelihood: conditional with parent z.
        latent: name of z.
        site: name of x.
    """

    def __init__(
        self, prior: nn.Module, likelihood: nn.Module, latent: str = "z", site: str = "x"
    ) -> None:
        super().__init__()
        self.prior, self.likelihood = prior, likelihood
        self.latent, self.site = latent, site

    def forward(self, batch: Batch) -> Tensor:
        """Run the program for ``batch.size`` rows; returns x ``[..., B, *event]``."""
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample(self.latent, self.prior())
            x: Tensor = pyro.sample(self.site, self.likelihood(z))
        return x
