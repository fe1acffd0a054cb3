"""A prior that has groups: a mixture of Gaussians."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.conditionals.network import at_one, independent

__all__ = ["GaussianMixture"]

FLOOR = 1e-2  # of a component's scale, as a fraction of that at the start


class GaussianMixture(nn.Module):
    """The prior Σ_m w_m N(loc_m, diag scale_m²) with weights, means and scales to learn.

    With the group summed out it is the prior of HI-VAE (Nazábal et al. 2020, arXiv:1807.03653) and of
    VaDE (Jiang et al. 2017, arXiv:1611.05148); ``responsibilities`` says which group a z is of. It has
    no closed-form KL, so the rate is taken at the draws.

    At the start the means are draws of N(0, spread²) and the scales such that the variance of the whole
    is 1.

    Args:
        event_shape: ``*event`` of z.
        components: how many.
        spread: of the means at the start, in (0, 1).

    Raises:
        ValueError: fewer than one component, a spread outside (0, 1).
    """

    def __init__(self, *event_shape: int, components: int = 10, spread: float = 0.7) -> None:
        super().__init__()
        if components < 1 or not 0 < spread < 1:
            raise ValueError(
                f"GaussianMixture: came components={components}, spread={spread}, wanted a component "
                "at least and a spread in (0, 1)"
            )
        shape = (components, *event_shape)
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(spread * torch.randn(shape))
        self.raw_scale = at_one(torch.empty(shape), FLOOR)
        self.unit = math.sqrt(1 - spread**2)

    def forward(self) -> TorchDistribution:
        """Mixture with event ``[*event]``."""
        which, group = self._parts()
        mixture: TorchDistribution = dist.MixtureSameFamily(which, group)
        return mixture

    def responsibilities(self, z: Tensor) -> Tensor:
        """p(group | z) ``[..., M]`` for ``[..., *event]``."""
        which, group = self._parts()
        z = z.unsqueeze(z.dim() - len(group.event_shape))
        shares: Tensor = (which.logits + group.log_prob(z)).softmax(-1)
        return shares

    def _parts(self) -> tuple[TorchDistribution, TorchDistribution]:
        scale = self.unit * (FLOOR + nn.functional.softplus(self.raw_scale))
        group = independent(dist.Normal(self.loc, scale), self.loc.dim() - 1)
        return dist.Categorical(logits=self.logits), group

    def extra_repr(self) -> str:
        return f"{list(self.loc.shape[1:])}, components={len(self.loc)}"
