"""One latent variable, columns of several kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from pyro_vae.batch import Batch
from pyro_vae.conditionals.discrete import Bernoulli, Categorical, NegativeBinomial
from pyro_vae.conditionals.gaussian import DiagonalGaussian, Gaussian
from pyro_vae.conditionals.ordinal import Ordinal
from pyro_vae.conditionals.positive import LogNormal
from pyro_vae.guides.joint import JointGuide
from pyro_vae.models.multimodal import MultimodalModel
from pyro_vae.nn.masked import WithMask
from pyro_vae.nn.mlp import dense
from pyro_vae.pairs.by_name import ready
from pyro_vae.pairs.parts import (
    Architecture,
    Part,
    built,
    built_prior,
    check_parts,
    check_seen,
    check_support,
    inputs_for,
    likelihood_for,
    observed,
    sizes,
    standard,
)

__all__ = ["table"]


@ready
def table(
    batch: Batch,
    latent: int = 8,
    hidden: int | Sequence[int] = (128, 128),
    real: Part = Gaussian,
    positive: Part = LogNormal,
    count: Part = NegativeBinomial,
    ordinal: Sequence[str] = (),
    prior: Part | None = None,
    net: Architecture = dense,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> tuple[MultimodalModel, JointGuide]:
    """A table of columns of several kinds, any cell of which may be missing (HI-VAE: Nazábal et al.
    2020, arXiv:1807.03653).

    Sites called ``real``, ``positive``, ``count`` and ``binary`` are ``[B, D]``, the columns of that
    kind. A column of whole numbers that is a site of its own is ``[B]``, classes with or without an
    order. What else there is has the likelihood that ``likelihood_for`` finds.

    The guide sees each column standardised (log(1 + x) of counts, logarithms of positive values,
    indicators of classes), 0 where it is missing, and which are missing. The likelihoods start from
    the columns' marginals, in the units that the data have.

    Args:
        batch: training rows, on the device where the pair is to live.
        latent: dimensions of z.
        hidden: widths of the encoder's layers; the trunk of the decoder, behind which each site has one
            layer, has them in reverse.
        real, positive, count: likelihoods of these sites: ``StudentT`` for real columns with
            outliers, ``Poisson`` for counts.
        ordinal: sites whose classes are in order.
        prior: p(z), as for ``vae``.
        net: makes the networks, as for ``vae``.
        activation: makes the nonlinearity.

    Raises:
        ValueError: a column that is missing in all rows, one whose values its likelihood does not
            take, ``ordinal`` sites that the batch lacks, sizes that are not whole numbers above 0.
    """
    batch = batch.look() if isinstance(batch, Batch) else batch
    shape, widths = sizes("table", latent, hidden, layers=1)
    kinds = {"real": real, "positive": positive, "count": count, "binary": Bernoulli}
    check_parts("table", {**kinds, "prior": prior, "net": net, "activation": activation}, ["prior"])
    if unknown := [site for site in ordinal if site not in batch]:
        raise ValueError(f"table: ordinal= names {unknown}, the batch has {list(batch)}")

    def head(outputs: Sequence[int]) -> nn.Module:
        return net((widths[0],), outputs, (), activation)

    likelihoods, features = {}, {}
    for site in batch:
        data = observed(batch, site)
        check_seen(batch, site)
        if site in ordinal:
            kind: Part = partial(Ordinal.build, classes=_classes(batch, site))
        elif site in kinds:
            kind = kinds[site]
        elif batch[site].dtype == torch.int64 and data.dim() == 1 and Categorical.takes(data):
            kind = partial(Categorical.build, classes=_classes(batch, site))
        else:
            kind = likelihood_for(batch, site)
        likelihoods[site] = p = built(kind, head, data.shape[1:], data)
        inputs, input_shape = inputs_for(batch, site, p)
        if isinstance(p, Gaussian):  # whatever numbers it has
            inputs = standard(data)
        features[site] = WithMask(inputs, input_shape)
        check_support(batch, site, p, torch.zeros(1, widths[0], device=batch.device), data)

    seen = sum(2 * _entries(module) for module in features.values())

    def encoder(outputs: Sequence[int]) -> nn.Module:
        return net((seen,), outputs, widths, activation)

    trunk = nn.Sequential(net(shape, widths[:1], widths[:0:-1], activation), activation())
    q = DiagonalGaussian.build(encoder, shape)
    blank = {site: tuple(batch.shape(site)[1:]) for site in batch}
    model = MultimodalModel(built_prior(prior, q, shape), likelihoods, trunk=trunk)
    return model.to(batch.device), JointGuide(features, q, blank).to(batch.device)


def _classes(batch: Batch, site: str) -> int:
    """As many as the whole table has, of which training rows may lack some."""
    named = batch.record.get("classes", {}).get(site, ())
    seen = batch.look()[site]
    return max(2, len(named), int(seen[batch.look().mask(site)].max()) + 1)


def _entries(module: WithMask) -> int:
    return torch.Size(module.event_shape).numel()
