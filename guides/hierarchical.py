"""A chain of latent variables, inferred from the data up, or from the top down beside the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pyro
import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.conditionals.network import independent

__all__ = ["BottomUpGuide", "Merge", "TopDownGuide", "precision_weighted", "residual"]

Merge = Callable[[TorchDistribution, TorchDistribution], TorchDistribution]
"""Makes q(z_l | x, z_{l+1}) of what the data say of z_l, and of the model's p(z_l | z_{l+1})."""


class BottomUpGuide(PyroModule):
    """q(z_1 | x) q(z_2 | z_1) ... q(z_L | z_{L-1}) (Rezende et al. 2014, arXiv:1401.4082; Burda et al.
    2016, arXiv:1509.00519).

    Args:
        posteriors: conditionals of z_1, ..., z_L, the first with parent x ``[B, *event]``, every
            other with the latent below it.
        latent: the latents are called ``z1``, ..., ``zL``.
        site: name of x.
    """

    def __init__(self, posteriors: Iterable[nn.Module], latent: str = "z", site: str = "x") -> None:
        super().__init__()
        self.posteriors = nn.ModuleList(posteriors)
        self.latent, self.site = latent, site

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        """Draw z_1, ..., z_L ``[..., B, *latent_l]`` for the rows of the batch."""
        drawn = [batch[self.site]]
        with pyro.plate("data", batch.size, dim=-1):
            for level, posterior in enumerate(self.posteriors, 1):
                drawn.append(pyro.sample(f"{self.latent}{level}", posterior(drawn[-1])))
        return tuple(drawn[1:])


class TopDownGuide(PyroModule):
    """q(z_L | x) q(z_{L-1} | x, z_L) ... q(z_1 | x, z_2), in the order of the model.

    A chain of networks looks at the data from the bottom up. From the top down, what it has seen of a
    layer is merged with what the model expects there given the latents above, by the model's own
    conditional. At the top there is nothing to merge with.

    The ladder VAE (Sønderby et al. 2016, arXiv:1602.02282) merges by ``precision_weighted``, NVAE
    (Vahdat and Kautz 2020, arXiv:2007.03898) by ``residual``, with posteriors that see the latents
    above as well.

    Args:
        stages: networks from x ``[B, *event]`` to features h_1, and from h_{l-1} to h_l.
        posteriors: conditionals of z_1, ..., z_L with parent h_l.
        layers: the model's conditionals, as in ``HierarchicalModel``. They are shared, not copied.
        merge: of two distributions, the posterior's and the model's.
        informed: the posteriors have the latents that the model's conditionals see as further
            parents, after h_l.
        skip: that of the model.
        latent: the latents are called ``z1``, ..., ``zL``.
        site: name of x.

    Raises:
        ValueError: not one stage, one posterior and one layer for each latent.
    """

    def __init__(
        self,
        stages: Iterable[nn.Module],
        posteriors: Iterable[nn.Module],
        layers: Iterable[nn.Module],
        merge: Merge,
        informed: bool = False,
        skip: bool = False,
        latent: str = "z",
        site: str = "x",
    ) -> None:
        super().__init__()
        self.stages, self.posteriors = nn.ModuleList(stages), nn.ModuleList(posteriors)
        every = [*layers]
        if not len(self.stages) == len(self.posteriors) == len(every) > 0:
            raise ValueError(
                f"TopDownGuide: came {len(self.stages)} stages, {len(self.posteriors)} posteriors and "
                f"{len(every)} layers, wanted one of each for each latent"
            )
        self.layers = nn.ModuleList(every[:-1])
        self.merge, self.informed, self.skip = merge, informed, skip
        self.latent, self.site = latent, site

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        """Draw z_1, ..., z_L ``[..., B, *latent_l]`` for the rows of the batch."""
        features = [batch[self.site]]
        for stage in self.stages:
            features.append(stage(features[-1]))
        drawn: list[Tensor] = []
        with pyro.plate("data", batch.size, dim=-1):
            for level in range(len(self.stages), 0, -1):
                above = drawn if self.skip else drawn[:1]
                parents = [features[level], *(above if self.informed else ())]
                fn = self.posteriors[level - 1](*parents)
                if above:
                    fn = self.merge(fn, self.layers[level - 1](*above))
                drawn = [pyro.sample(f"{self.latent}{level}", fn), *drawn]
        return tuple(drawn)


def precision_weighted(seen: TorchDistribution, expected: TorchDistribution) -> TorchDistribution:
    """The normalized product of two Gaussians: precisions add up, and weigh the means.

        1/s² = 1/s_q² + 1/s_p²,   m = s² (m_q / s_q² + m_p / s_p²)

    Sønderby et al. (2016, arXiv:1602.02282), eq. 17 to 19.

    Raises:
        ValueError: a distribution that is no diagonal Gaussian.
    """
    q, p = (_normal("precision_weighted", fn) for fn in (seen, expected))
    share = q.scale**2 / (q.scale**2 + p.scale**2)  # what the model's mean counts
    loc = q.loc + share * (p.loc - q.loc)
    return independent(dist.Normal(loc, p.scale * share.sqrt()), seen.event_dim)


def residual(change: TorchDistribution, expected: TorchDistribution) -> TorchDistribution:
    """The model's Gaussian moved by Δm and scaled by Δs, the mean and the scale of ``change``.

        m = m_p + Δm,   s = s_p Δs

    Vahdat and Kautz (2020, arXiv:2007.03898), section 3.2.

    Raises:
        ValueError: a distribution that is no diagonal Gaussian.
    """
    q, p = (_normal("residual", fn) for fn in (change, expected))
    return independent(dist.Normal(p.loc + q.loc, p.scale * q.scale), change.event_dim)


def _normal(merge: str, fn: TorchDistribution) -> dist.Normal:
    normal = fn.base_dist if isinstance(fn, dist.Independent) else fn
    if not isinstance(normal, dist.Normal):
        raise ValueError(
            f"{merge}: came a {type(normal).__name__.lstrip('_')}, wanted the diagonal Gaussians of a "
            "DiagonalGaussian or a Gaussian"
        )
    return normal
