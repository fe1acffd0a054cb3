"""One latent variable, inferred from several sites of data by one expert each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.conditionals.mixture import StratifiedMixture
from pyro_vae.guides.joint import JointGuide

__all__ = ["ExpertsGuide", "SurrogatesGuide"]

Counted = dict[str, tuple[Any, Tensor]]
"""site -> its expert, and the rows ``[B]`` in which it counts."""


class ExpertsGuide(PyroModule):
    """q(z | x_A) = 1/n Σ_S Π_{m in S} q(z | x_m): a mixture over subsets S of sites of products of
    Gaussian experts, for any part A of the sites.

    * one subset of all sites: a product of experts (MVAE, Wu and Goodman 2018, arXiv:1802.05335);
    * every site by itself: a mixture of experts (MMVAE, Shi et al. 2019, arXiv:1911.03393);
    * all subsets: a mixture of products (MoPoE, Sutter et al. 2021, arXiv:2105.02470);
    * every site by itself, and each of some dimensions only: MMVAE+ (Palumbo et al. 2023), with the
      model's prior for the dimensions of other sites, so that its bound is one.

    Row by row, a subset stands for those of its sites that the row has, and one of which it has none
    does not count. A site counts where any entry of it is observed; missing ones read as the batch's
    fill. Where nothing is observed, q is the prior.

    The site of z carries the experts and the rows in which they count in ``infer["experts"]``, where
    ``penalties.ExpertKL`` finds them.

    Args:
        experts: site -> conditional with parent x ``[B, *event]`` that returns a Gaussian with
            independent dimensions.
        prior: conditional without parents that returns one.
        subsets: of site names (default: one of all sites).
        prior_expert: whether the prior is a factor of every product, as in MVAE.
        weighted: products of powers of experts, whose exponents are learned for each expert and
            dimension and add up to 1 over what counts (Cao and Fleet 2014, arXiv:1410.7827).
        private: site -> expert and prior of its private latent ``w_site`` (DMVAE, Lee and Pavlovic
            2021, arXiv:2012.13024), the prior being the model's own: without the site it is drawn.
        dims: site -> dimensions of z ``[D]`` that its expert is of, and returns (default: all). A
            dimension that no expert of a subset is of follows the prior there.
        latent: name of z.

    Raises:
        ValueError: subsets, private latents or dimensions of sites that have no expert, an empty
            subset; at a call, an expert that is no such Gaussian or of another number of dimensions.
    """

    members: Tensor

    def __init__(
        self,
        experts: Mapping[str, nn.Module],
        prior: nn.Module,
        subsets: Sequence[Sequence[str]] | None = None,
        *,
        prior_expert: bool = False,
        weighted: bool = False,
        private: Mapping[str, tuple[nn.Module, nn.Module]] | None = None,
        dims: Mapping[str, Sequence[int]] | None = None,
        latent: str = "z",
    ) -> None:
        super().__init__()
        subsets, private = [list(experts)] if subsets is None else subsets, private or {}
        dims = dims or {}
        unknown = {site for subset in [*subsets, private, dims] for site in subset} - set(experts)
        if unknown or not experts or not subsets or not all(subsets):
            raise ValueError(
                f"{type(self).__name__}: came subsets {[list(s) for s in subsets]} and private latents "
                f"of {list(private)}, dimensions of {list(dims)}, wanted sites among the experts "
                f"{list(experts)}"
            )
        self.experts, self.prior = nn.ModuleDict(experts), prior
        self.private = nn.ModuleDict({site: nn.ModuleList(pair) for site, pair in private.items()})
        self.prior_expert, self.latent = prior_expert, latent
        rows = [[site in subset for site in experts] for subset in subsets]
        self.register_buffer("members", torch.tensor(rows), persistent=False)
        for site, of in dims.items():
            self.register_buffer(f"dims_{site}", torch.tensor(of), persistent=False)
        self.powers: nn.Parameter | None = None
        if weighted:
            event = prior().event_shape
            self.powers = nn.Parameter(torch.zeros(len(experts) + 1, *event))  # the prior's last

    def forward(self, batch: Batch) -> Tensor:
        """Draw z ``[..., B, *latent]`` for the rows of the batch."""
        fn, experts = self.posterior(batch)
        with pyro.plate("data", batch.size, dim=-1):
            carried: Any = {"experts": experts}
            z: Tensor = pyro.sample(self.latent, fn, infer=carried)
            for site in self.private:
                if site in batch:
                    pair: Any = self.private[site]
                    expert, prior = pair
                    known = [(site, expert(batch[site]), batch.seen(site))]
                    pyro.sample(f"w_{site}", _products(known, prior()))
        return z

    def posterior(self, batch: Batch) -> tuple[Any, Counted]:
        """q(z | x_A) for the rows of the batch, and the experts that it is made of."""
        held = [site for site in self.experts if site in batch]
        places = [i for i, site in enumerate(self.experts) if site in batch]
        prior = self.prior()
        dims = [getattr(self, f"dims_{site}", None) for site in held]
        known = [
            (site, _placed(site, self.experts[site](batch[site]), prior, of), batch.seen(site))
            for site, of in zip(held, dims, strict=True)
        ]
        powers = None if self.powers is None else self.powers[[*places, -1]]
        fn = _products(
            known, prior, self.members[:, places], self.prior_expert, powers, batch.size, dims
        )
        return fn, {site: (expert, counts) for site, expert, counts in known}


class SurrogatesGuide(ExpertsGuide):
    """q(z | x_1, x_2, ...) of a joint network where a row has all sites, and the product of surrogate
    experts q(z | x_m) of those that it has elsewhere (JMVAE, Suzuki et al. 2017, arXiv:1611.01891).

    The bound trains surrogates on incomplete rows alone; ``penalties.ExpertKL`` draws them to the
    joint posterior on complete ones.

    Args:
        joint: of the same sites and the same latent.
        experts: the surrogates.
        options: as of ``ExpertsGuide``.

    Raises:
        ValueError: as ``ExpertsGuide``; a joint guide of other sites; several subsets.
    """

    def __init__(
        self, joint: JointGuide, experts: Mapping[str, nn.Module], prior: nn.Module, **options: Any
    ) -> None:
        super().__init__(experts, prior, **options)
        if set(joint.features) != set(experts) or len(self.members) > 1:
            raise ValueError(
                f"SurrogatesGuide: came a joint guide of {list(joint.features)}, experts of "
                f"{list(experts)} and {len(self.members)} subsets, wanted the same sites and one subset"
            )
        self.joint = joint

    def posterior(self, batch: Batch) -> tuple[Any, Counted]:
        surrogate, experts = super().posterior(batch)
        if len(experts) < len(self.experts):
            return surrogate, {}
        whole = torch.stack([counts for _, counts in experts.values()]).all(0)
        joint = _normal("joint", self.joint.posterior_of(batch))
        alone = _normal("surrogates", surrogate)
        event_dim = joint[0].dim() - 1
        here = whole[(...,) + (None,) * event_dim]
        loc, scale = (torch.where(here, *pair) for pair in zip(joint, alone, strict=True))
        fn = dist.Normal(loc, scale).to_event(event_dim)
        return fn, {site: (expert, whole) for site, (expert, _) in experts.items()}


def _products(
    known: Sequence[tuple[str, Any, Tensor]],
    prior: Any,
    members: Tensor | None = None,
    prior_expert: bool = False,
    powers: Tensor | None = None,
    size: int | None = None,
    dims: Sequence[Tensor | None] = (),
) -> Any:
    """The mixture over subsets ``members [S, M]`` of products of M experts, each of its ``dims``."""
    loc, scale = _normal("prior", prior)
    size = len(known[0][2]) if size is None else size
    parts = [_normal(site, fn) for site, fn, _ in known]
    parts.append((loc.expand(size, *loc.shape), scale.expand(size, *loc.shape)))
    locs, scales = (torch.stack(list(of), 1) for of in zip(*parts, strict=True))  # [B, M + 1, *D]
    counts = [counts for _, _, counts in known]
    has = torch.stack(counts, -1) if counts else locs.new_zeros((size, 0), dtype=torch.bool)
    has = has.unsqueeze(1) if members is None else has.unsqueeze(1) & members  # [B, S, M]
    empty = ~has.any(-1)
    factors = has[(...,) + (None,) * loc.dim()]  # [B, S, M, *D]
    if dims:
        factors = factors & torch.stack([_is_of(each, loc) for each in dims])
    alone = ~factors.any(2, keepdim=True) | prior_expert
    exponents = torch.cat([factors, alone], 2).to(locs.dtype)
    if powers is not None:
        exponents = exponents * powers.exp()
        exponents = exponents / exponents.sum(2, keepdim=True)
    precision = exponents * scales.pow(-2).unsqueeze(1)  # [B, S, M + 1, *D]
    total = precision.sum(2)
    mean, spread = (precision * locs.unsqueeze(1)).sum(2) / total, total.rsqrt()
    if mean.shape[1] == 1:
        return dist.Normal(mean[:, 0], spread[:, 0]).to_event(loc.dim())
    allowed = ~empty | empty.all(-1, keepdim=True)
    return StratifiedMixture(dist.Normal(mean, spread).to_event(loc.dim()), allowed)


def _is_of(dims: Tensor | None, loc: Tensor) -> Tensor:
    """Bool, of the shape of a draw."""
    out = torch.ones_like(loc, dtype=torch.bool)
    return out if dims is None else (~out).index_fill(0, dims, True)


def _placed(site: str, fn: Any, prior: Any, dims: Tensor | None) -> Any:
    """An expert of some dimensions as one of all, the prior in the others."""
    if dims is None:
        return fn
    came, wanted = _normal(site, fn), _normal("prior", prior)
    if (size := came[0].shape[-1]) != len(dims) or wanted[0].dim() != 1:
        raise ValueError(
            f"expert of {site!r}: came {size} dimensions, wanted its {len(dims)} of z "
            f"{list(wanted[0].shape)}"
        )
    loc, scale = (
        whole.expand(*part.shape[:-1], -1).index_copy(-1, dims, part)
        for whole, part in zip(wanted, came, strict=True)
    )
    return dist.Normal(loc, scale).to_event(1)


def _normal(name: str, fn: Any) -> tuple[Tensor, Tensor]:
    """Mean and scale of a Gaussian whose dimensions are independent."""
    base = fn.base_dist if isinstance(fn, dist.Independent) else fn
    if not isinstance(base, dist.Normal):
        raise ValueError(
            f"expert of {name!r}: came a {type(base).__name__.lstrip('_')}, wanted a Normal with "
            "independent dimensions (DiagonalGaussian): products of others are not known"
        )
    return base.loc, base.scale
