"""One site of data with missing entries, at random or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.conditionals.discrete import Bernoulli
from pyro_vae.conditionals.gaussian import DiagonalGaussian
from pyro_vae.guides.joint import JointGuide
from pyro_vae.models.latent import LatentVariableModel
from pyro_vae.models.missing import SelectionModel
from pyro_vae.nn.entrywise import Entrywise
from pyro_vae.nn.leading import Reshape
from pyro_vae.nn.masked import EntrySet, WithMask, ZeroFilled
from pyro_vae.nn.mlp import dense
from pyro_vae.pairs.by_name import ready
from pyro_vae.pairs.parts import (
    Architecture,
    Part,
    built,
    check_seen,
    inputs_for,
    observed,
    sizes,
)
from pyro_vae.pairs.vae import vae

__all__ = ["ENCODERS", "MECHANISMS", "missing"]

ENCODERS: dict[str, Callable[[nn.Module, Sequence[int]], Any]] = {
    "zero": ZeroFilled,
    "masked": WithMask,
    "set": EntrySet,
}


def _entrywise(
    inputs: Sequence[int],
    outputs: Sequence[int],
    hidden: Sequence[int],
    activation: Callable[[], nn.Module],
    sign: int = 0,
) -> nn.Module:
    if tuple(inputs) != tuple(outputs):
        raise ValueError(
            f"missing: came a mechanism that looks at each entry by itself, and inputs {list(inputs)} "
            f"for entries {list(outputs)}; use 'linear' or 'nonlinear'"
        )
    return Entrywise(outputs, sign)


def _linear(
    inputs: Sequence[int],
    outputs: Sequence[int],
    hidden: Sequence[int],
    activation: Callable[[], nn.Module],
) -> nn.Module:
    return dense(inputs, outputs, (), activation)


MECHANISMS: dict[str, Architecture] = {
    "self_masking": _entrywise,
    "hides_large": partial(_entrywise, sign=-1),
    "hides_small": partial(_entrywise, sign=1),
    "linear": _linear,
    "nonlinear": dense,
}


@ready
def missing(
    batch: Batch,
    encoder: str | Callable[[nn.Module, Sequence[int]], Any] = "masked",
    mechanism: str | Architecture | None = None,
    latent: int | Sequence[int] = 8,
    hidden: int | Sequence[int] = (200, 200),
    likelihood: Part | None = None,
    prior: Part | None = None,
    posterior: Part | None = None,
    net: Architecture = dense,
    activation: Callable[[], nn.Module] = nn.ReLU,
    site: str = "x",
    mask: str = "s",
) -> tuple[LatentVariableModel | SelectionModel, JointGuide]:
    """The model of ``vae`` for a site with missing entries, a guide that tells those from observed
    ones, and a model of what is missing, if that is not at random.

    Args:
        batch: training rows, on the device where the pair is to live.
        encoder: what the guide sees, see ``pyro_vae.nn.masked``. ``"zero"``: inputs with 0 where an
            entry is missing, which is the column's mean where they are standardised; ``"masked"``:
            the mask beside them; ``"set"``: the observed entries as a set. Or a function ``(inputs,
            shape) -> module`` whose ``shape`` is that of its features: ``partial(EntrySet, code=50)``.
        mechanism: p(s | x), given standardised x, for rows that have the site s of
            ``batch.with_mask()``. ``"self_masking"``: whether an entry is seen depends on itself,
            ``"hides_large"`` and ``"hides_small"`` if it is known which are seldom seen;
            ``"linear"``: on all entries, also the missing ones, as in a logistic regression;
            ``"nonlinear"``: by a network of the widths ``hidden``. Or a function that makes a
            network, as for ``net``. None: missing at random, given what is observed.
        latent, hidden, likelihood, prior, posterior, net, activation, site: as in ``vae``. A ready
            ``posterior`` gets the features, and a mechanism needs a likelihood that is
            reparameterized: ``Gaussian``, ``DiagonalGaussian``, ``StudentT``.
        mask: name of s, 1 where an entry is observed.

    Raises:
        ValueError: as ``vae`` does; an encoder or mechanism of no such name, an entry that no row
            has, a mechanism and no s in the batch, or one of another shape than x.
    """
    made = _named("encoder", encoder, ENCODERS)
    mechanism = None if mechanism is None else _named("mechanism", mechanism, MECHANISMS)
    data = observed(batch, site)
    check_seen(batch, site)
    shape, widths = sizes("missing", latent, hidden)
    common = {"likelihood": likelihood, "prior": prior, "posterior": posterior}
    model, _ = vae(batch, latent, hidden, net=net, activation=activation, site=site, **common)
    inputs, input_shape = inputs_for(batch, site, model.likelihood)
    features = made(inputs, input_shape)

    def network(outputs: Sequence[int]) -> nn.Module:
        flat = Reshape((math.prod(features.shape),), features.shape)
        return nn.Sequential(flat, net(features.shape, outputs, widths, activation))

    q = built(DiagonalGaussian if posterior is None else posterior, network, shape, None)
    guide = JointGuide({site: features}, q, {site: tuple(data.shape[1:])}).to(batch.device)
    if mechanism is None:
        return model, guide

    def selecting(outputs: Sequence[int]) -> nn.Module:
        return nn.Sequential(inputs, mechanism(input_shape, outputs, widths, activation))

    s = Bernoulli.build(selecting, data.shape[1:], _mask_of(batch, site, mask, data))
    selection = SelectionModel(model.prior, model.likelihood, s, site=site, mask=mask)
    return selection.to(batch.device), guide


def _named(argument: str, given: Any, known: Mapping[str, Any]) -> Any:
    found = known.get(given) if isinstance(given, str) else given
    if not callable(found):
        raise ValueError(
            f"missing: came {argument}={given!r}, wanted one of {list(known)} or a function"
        )
    return found


def _mask_of(batch: Batch, site: str, mask: str, data: Tensor) -> Tensor:
    if mask not in batch:
        raise ValueError(
            f"missing: came a mechanism, and the batch has no site {mask!r} but {list(batch.sites)}; "
            "give it batch.with_mask()"
        )
    seen = batch.look()[mask]
    if seen.shape != data.shape:
        raise ValueError(
            f"site {mask!r}: the mask came {list(seen.shape)}, wanted {list(data.shape)}"
        )
    if mask in batch.incomplete:
        raise ValueError(f"site {mask!r}: has missing entries itself, wanted 0 or 1 in all")
    against = int((seen != batch.look().mask(site).to(seen.dtype)).sum())
    if 2 * against > seen.numel():  # fewer may be hidden later on, to see how they are filled
        raise ValueError(
            f"site {mask!r}: contradicts what is missing of {site!r} in {against} of {seen.numel()} "
            f"entries, wanted 1 where {site!r} is observed, else 0; batch.with_mask() makes it"
        )
    return seen.to(torch.get_default_dtype())
