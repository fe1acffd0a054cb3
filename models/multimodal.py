"""One latent variable shared by several named sites of data."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.batch import Batch

__all__ = ["MultimodalModel"]


class MultimodalModel(PyroModule):
    """p(z) Π_m p(w_m) p(x_m | z, w_m), with private latents w_m for some of the modalities or none
    (Wu and Goodman 2018, arXiv:1802.05335; private ones: Lee and Pavlovic 2021, arXiv:2012.13024).

    A column of a table is a modality as well. What a row lacks counts like what is missing in it.

    Shapes: z ``[..., B, *latent]``, w_m ``[..., B, *private]``, x_m ``[..., B, *event]``.

    Args:
        prior: conditional without parents.
        likelihoods: site -> conditional with parent z, or parents z and w_m.
        private: site -> prior of its private latent, whose name is ``w_site``.
        latent: name of z.
        trunk: network z -> h that all likelihoods share, whose parent h then is in place of z.

    Raises:
        ValueError: no likelihood, private latents of sites that have none.
    """

    def __init__(
        self,
        prior: nn.Module,
        likelihoods: Mapping[str, nn.Module],
        private: Mapping[str, nn.Module] | None = None,
        latent: str = "z",
        trunk: nn.Module | None = None,
    ) -> None:
        super().__init__()
        unknown = set(private or {}) - set(likelihoods)
        if unknown or not likelihoods:
            raise ValueError(
                f"MultimodalModel: came private latents of {sorted(unknown)} and likelihoods of "
                f"{list(likelihoods)}, wanted at least one likelihood and one for each private latent"
            )
        self.prior, self.latent = prior, latent
        self.likelihoods = nn.ModuleDict(likelihoods)
        self.private = nn.ModuleDict(private or {})
        self.trunk = nn.Identity() if trunk is None else trunk

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Run the program for ``batch.size`` rows; returns site -> x_m ``[..., B, *event]``."""
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample(self.latent, self.prior())
            own = {site: pyro.sample(f"w_{site}", prior()) for site, prior in self.private.items()}
            h = self.trunk(z)
            return {
                site: pyro.sample(site, likelihood(h, *([own[site]] if site in own else [])))
                for site, likelihood in self.likelihoods.items()
            }
