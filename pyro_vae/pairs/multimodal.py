"""One latent variable, several sites of data, each with networks of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.conditionals.gaussian import DiagonalGaussian, StandardNormal
from pyro_vae.guides.experts import ExpertsGuide, SurrogatesGuide
from pyro_vae.guides.joint import JointGuide
from pyro_vae.models.multimodal import MultimodalModel
from pyro_vae.nn.concatenated import Concatenated, Selected
from pyro_vae.nn.mlp import dense
from pyro_vae.pairs.by_name import ready
from pyro_vae.pairs.parts import (
    Architecture,
    Part,
    built,
    built_prior,
    check_parts,
    check_support,
    inputs_for,
    likelihood_for,
    observed,
    tupled,
)

__all__ = ["multimodal"]

Subsets = list[tuple[str, ...]]

GUIDES: dict[str, Callable[[Sequence[str]], Subsets]] = {  # sites -> subsets with a product each
    "product": lambda sites: [tuple(sites)],
    "mixture": lambda sites: list(combinations(sites, 1)),
    "mixture_of_products": lambda sites: [
        subset for size in range(len(sites)) for subset in combinations(sites, size + 1)
    ],
    "joint": lambda sites: [tuple(sites)],
}


@ready
def multimodal(
    batch: Batch,
    sites: Sequence[str] | None = None,
    latent: int = 8,
    hidden: int | Sequence[int] = (200, 200),
    guide: str = "product",
    private: int | Mapping[str, int] = 0,
    partitioned: bool = False,
    likelihood: Part | Mapping[str, Part] | None = None,
    prior: Part | None = None,
    prior_expert: bool | None = None,
    weighted: bool = False,
    net: Architecture = dense,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> tuple[MultimodalModel, ExpertsGuide]:
    """Several named sites with one latent z between them; rows may lack any of them.

    Args:
        batch: training rows, on the device where the pair is to live.
        sites: names of the sites (default: all that the batch holds).
        latent: dimensions of z.
        hidden: widths of each encoder's layers, or channels of its stages; decoders have them in
            reverse.
        guide: how the sites' Gaussian experts q(z | x_m) make a posterior: ``product`` (MVAE; MVTCAE
            without ``prior_expert``), ``mixture`` (MMVAE), ``mixture_of_products`` (MoPoE), ``joint``
            (JMVAE: a network of all sites, the experts where a row lacks one).
        private: dimensions of the latent ``w_site`` that a site has for itself (DMVAE), a number for
            all sites or site -> number; 0: none.
        partitioned: private latents are dimensions of z, behind the shared ones, which the expert of
            their site alone is of: where a component of a mixture lacks it they are drawn from the
            prior (MMVAE+), so that they are no way around what sites share.
        likelihood: p(x_m | z), as for ``vae``, one for all sites or site -> one; None, and for sites
            that are not named, what ``likelihood_for`` finds.
        prior: p(z), a Gaussian with independent dimensions, as for ``vae``.
        prior_expert: whether p(z) is a factor of every product (default: of ``guide="product"``).
        weighted: learned exponents of the experts, see ``ExpertsGuide``.
        net: makes the networks of sites whose events are images, as for ``vae``; others are ``dense``.
        activation: makes the nonlinearity.

    Raises:
        ValueError: a site that is missing or has no observed entry, one that ``private`` or
            ``likelihood`` name and that is none of the pair's, a likelihood that does not take its
            values, an unknown guide, sizes that are not whole numbers, ``partitioned`` without private
            latents.
    """
    if not isinstance(batch, Batch):
        raise ValueError(
            f"multimodal: came a {type(batch).__name__}, wanted a Batch of named sites"
        )
    batch = batch.look()
    names = tuple(batch if sites is None else sites)
    widths = tupled(hidden)
    own = dict(private) if isinstance(private, Mapping) else dict.fromkeys(names, private)
    of_site = dict(likelihood) if isinstance(likelihood, Mapping) else {}
    common = None if isinstance(likelihood, Mapping) else likelihood
    _check(names, latent, widths, guide, own, of_site)
    check_parts(
        "multimodal",
        {**of_site, "likelihood": common, "prior": prior, "net": net, "activation": activation},
        optional=("likelihood", "prior"),
    )
    own = {site: size for site, size in own.items() if size}
    if partitioned and not own:
        raise ValueError(
            "multimodal: came partitioned=True without private latents, wanted private="
        )

    def network(inputs: Sequence[int], outputs: Sequence[int], up: bool) -> nn.Module:
        image = len(inputs if up else outputs) > 1
        return (net if image else dense)(
            inputs, outputs, widths if up else widths[::-1], activation
        )

    dims, whole = _dims(names, latent, own) if partitioned else ({}, latent)
    p_z = built_prior(prior, nn.Identity(), (whole,))
    likelihoods: dict[str, nn.Module] = {}
    encoders: dict[str, Callable[[Sequence[int]], nn.Module]] = {}
    for site in names:
        data = observed(batch, site)
        size = latent + own.get(site, 0)
        chosen = of_site.get(site, common) or likelihood_for(batch, site)
        p = built(chosen, partial(network, (size,), up=False), data.shape[1:], data)
        likelihoods[site] = _reading(p, dims.get(site), site in own)
        inputs, shape = inputs_for(batch, site, p)
        encoders[site] = partial(_up, inputs, partial(network, shape, up=True))
        check_support(batch, site, p, torch.zeros(1, size, device=batch.device), data)

    privates = {
        site: (DiagonalGaussian.build(encoders[site], (size,)), StandardNormal(size))
        for site, size in own.items()
        if not partitioned
    }
    experts = {
        site: DiagonalGaussian.build(up, (len(dims[site]) if site in dims else latent,))
        for site, up in encoders.items()
    }
    options: dict[str, Any] = {
        "subsets": GUIDES[guide](names),
        "prior_expert": guide == "product" if prior_expert is None else prior_expert,
        "weighted": weighted,
        "private": privates,
        "dims": dims,
    }
    if guide == "joint":
        joint = _joint(encoders, whole, widths[-1], activation)
        q: ExpertsGuide = SurrogatesGuide(joint, experts, p_z, **options)
    else:
        q = ExpertsGuide(experts, p_z, **options)
    model = MultimodalModel(p_z, likelihoods, {site: pair[1] for site, pair in privates.items()})
    return model.to(batch.device), q.to(batch.device)


def _check(
    names: Sequence[str],
    latent: int,
    widths: Sequence[int],
    guide: str,
    private: Mapping[str, int],
    likelihoods: Mapping[str, Any],
) -> None:
    if guide not in GUIDES:
        raise ValueError(f"multimodal: came guide={guide!r}, wanted one of {list(GUIDES)}")
    if unknown := sorted({*private, *likelihoods} - set(names)):
        raise ValueError(
            f"multimodal: private= or likelihood= came with sites {unknown}, the pair's are "
            f"{list(names)}"
        )
    sizes = [latent, *widths, *(size or 1 for size in private.values())]
    if not names or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(
            f"multimodal: came sites {list(names)}, latent={latent!r}, hidden={tuple(widths)!r}, "
            f"private={dict(private)!r}, wanted a site at least, and whole numbers above 0"
        )


def _dims(
    names: Sequence[str], shared: int, private: Mapping[str, int]
) -> tuple[dict[str, list[int]], int]:
    """Dimensions of z that a site has to do with, and how many there are."""
    out, end = dict[str, list[int]](), shared
    for site in names:
        size = private.get(site, 0)
        out[site] = [*range(shared), *range(end, end + size)]
        end += size
    return out, end


def _reading(likelihood: nn.Module, dims: Sequence[int] | None, private: bool) -> nn.Module:
    """Of the parents that the model gives it."""
    if dims is not None:
        return Selected(likelihood, dims)
    return Concatenated(likelihood) if private else likelihood


def _up(
    inputs: nn.Module, network: Callable[[Sequence[int]], nn.Module], outputs: Sequence[int]
) -> nn.Module:
    return nn.Sequential(inputs, network(outputs))


def _joint(
    encoders: Mapping[str, Callable[[Sequence[int]], nn.Module]],
    latent: int,
    width: int,
    activation: Callable[[], nn.Module],
) -> JointGuide:
    """Features of each site, and behind them one more layer for all."""
    features = {
        s: _Feature(nn.Sequential(up((width,)), activation())) for s, up in encoders.items()
    }

    def trunk(outputs: Sequence[int]) -> nn.Module:
        return dense((len(encoders) * width,), outputs, (width,), activation)

    return JointGuide(features, DiagonalGaussian.build(trunk, (latent,)), {})


class _Feature(nn.Module):
    """What a joint posterior reads of a site: values alone, since it serves rows that have them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out
