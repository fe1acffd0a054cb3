"""One latent variable, one site of data, and what of it is seen."""

from __future__ import annotations

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.batch import Batch

__all__ = ["SelectionModel"]


class SelectionModel(PyroModule):
    """p(z) p(x | z) p(s | x): which entries of x are seen may depend on all of them, the unseen ones
    included (not-MIWAE: Ipsen, Mattei and Frellsen 2021, arXiv:2006.12871).

    Missing entries of x are drawn from the model, and the mask's density weighs the draws. In a batch
    without s they count nothing: missing at random.

    Shapes: z ``[..., B, *latent]``, x and s ``[..., B, *event]``; s is 1 where x is seen, and is
    complete itself: ``batch.with_mask()``.

    Args:
        prior: conditional without parents.
        likelihood: conditional with parent z.
        mechanism: conditional with parent x.
        latent: name of z.
        site: name of x.
        mask: name of s.
    """

    def __init__(
        self,
        prior: nn.Module,
        likelihood: nn.Module,
        mechanism: nn.Module,
        latent: str = "z",
        site: str = "x",
        mask: str = "s",
    ) -> None:
        super().__init__()
        self.prior, self.likelihood, self.mechanism = prior, likelihood, mechanism
        self.latent, self.site, self.mask = latent, site, mask

    def forward(self, batch: Batch) -> Tensor:
        """Run the program for ``batch.size`` rows; returns x ``[..., B, *event]``, of which s says
        what is seen."""
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample(self.latent, self.prior())
            x: Tensor = pyro.sample(self.site, self.likelihood(z))
            pyro.sample(self.mask, self.mechanism(x))
        return x
