"""A chain of latent variables above one site of data."""

from __future__ import annotations

from collections.abc import Iterable

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.batch import Batch

__all__ = ["HierarchicalModel"]


class HierarchicalModel(PyroModule):
    """p(z_L) p(z_{L-1} | z_L) ... p(z_1 | z_2) p(x | z_1) (Rezende et al. 2014, arXiv:1401.4082), drawn
    from the top.

    With ``skip`` each conditional sees all latents above it, p(z_l | z_{l+1}, ..., z_L) and
    p(x | z_1, ..., z_L), so that no layer can forget one (Dieng et al. 2019, arXiv:1807.04863).

    Shapes: z_l ``[..., B, *latent_l]``, x ``[..., B, *event]``.

    Args:
        layers: conditionals of z_1, ..., z_L, from the data up: the last has no parents, every other
            the latent above it, or with ``skip`` all of them, the nearest first.
        likelihood: conditional with parent z_1, or with ``skip`` parents z_1, ..., z_L.
        skip: see above.
        latent: the latents are called ``z1``, ..., ``zL``.
        site: name of x.

    Raises:
        ValueError: no layer.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        likelihood: nn.Module,
        skip: bool = False,
        latent: str = "z",
        site: str = "x",
    ) -> None:
        super().__init__()
        self.layers, self.likelihood = nn.ModuleList(layers), likelihood
        if not len(self.layers):
            raise ValueError("HierarchicalModel: came no layers, wanted at least the prior")
        self.skip, self.latent, self.site = skip, latent, site

    def forward(self, batch: Batch) -> Tensor:
        """Run the program for ``batch.size`` rows; returns x ``[..., B, *event]``."""
        above: list[Tensor] = []
        with pyro.plate("data", batch.size, dim=-1):
            for level in range(len(self.layers), 0, -1):
                z = pyro.sample(f"{self.latent}{level}", self.layers[level - 1](*above))
                above = [z, *above] if self.skip else [z]
            x: Tensor = pyro.sample(self.site, self.likelihood(*above))
        return x
