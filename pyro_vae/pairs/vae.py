"""One latent variable, one site of data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pyro_vae.batch import Batch
from pyro_vae.conditionals.gaussian import DiagonalGaussian, OptimalSigma
from pyro_vae.guides.amortized import AmortizedGuide
from pyro_vae.models.latent import LatentVariableModel
from pyro_vae.nn.leading import Reshape
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
    sizes,
)

__all__ = ["update_sigma", "vae"]

Run = Any  # of training.fit, which pairs do not import


@ready
def vae(
    batch: Batch,
    latent: int | Sequence[int] = 8,
    hidden: int | Sequence[int] = (200, 200),
    likelihood: Part | None = None,
    prior: Part | None = None,
    posterior: Part | None = None,
    net: Architecture = dense,
    activation: Callable[[], nn.Module] = nn.ReLU,
    site: str = "x",
) -> tuple[LatentVariableModel, AmortizedGuide]:
    """A variational autoencoder (Kingma and Welling 2014, arXiv:1312.6114) for one site.

    Args:
        batch: training rows, on the device where the pair is to live.
        latent: dimensions of z, or its event shape: ``(20, 10)`` and ``posterior=OneHotCategorical``
            are 20 variables of 10 classes.
        hidden: widths of the encoder's layers, or channels of its stages; the decoder has them in
            reverse.
        likelihood: p(x | z): a conditional's class (``Binomial``), which is built for the data; a
            function ``(network, event_shape, data) -> conditional``, such as
            ``partial(Binomial.build, total_count=20)``; a ready conditional with parent z; or None,
            for what ``likelihood_for`` finds.
        prior: p(z): a ready conditional without parents, or a function of the latent dimensions that
            makes one. Default: ``StandardNormal``, and for a discrete posterior the uniform
            distribution; ``LearnedBernoulli`` and ``LearnedOneHot`` are trained.
        posterior: q(z | x): as for the likelihood, with ``data=None``. A ready conditional gets x
            as it is in the batch. Default: ``DiagonalGaussian``. ``Bernoulli`` and
            ``OneHotCategorical`` make z discrete, for estimators ``gumbel``, ``straight_through``,
            ``vimco`` and ``score``.
        net: makes a network between two shapes: ``dense``, ``dense_resnet``, and for images
            ``convolutional``, ``conv_resnet``.
        activation: makes the nonlinearity.
        site: name of x.

    Raises:
        ValueError: the site is missing or has no observed entry, the likelihood does not take its
            values, sizes that are not whole numbers above 0, parts that build nothing.
    """
    batch = batch.look() if isinstance(batch, Batch) else batch
    data = observed(batch, site)
    event_shape = data.shape[1:]
    shape, widths = sizes("vae", latent, hidden)
    parts = {"likelihood": likelihood, "prior": prior, "posterior": posterior}
    check_parts("vae", {**parts, "net": net, "activation": activation}, optional=parts)

    def decoder(outputs: Sequence[int]) -> nn.Module:
        flat = (math.prod(shape),)
        made = net(flat, outputs, widths[::-1], activation)
        return made if flat == shape else nn.Sequential(Reshape(shape, flat), made)

    chosen = likelihood_for(batch, site) if likelihood is None else likelihood
    p = built(chosen, decoder, event_shape, data)
    inputs, input_shape = inputs_for(batch, site, p)

    def encoder(outputs: Sequence[int]) -> nn.Module:
        return nn.Sequential(inputs, net(input_shape, outputs, widths, activation))

    q = built(DiagonalGaussian if posterior is None else posterior, encoder, shape, None)
    model = LatentVariableModel(built_prior(prior, q, shape), p, site=site).to(batch.device)
    guide = AmortizedGuide(q, site=site).to(batch.device)
    check_support(batch, site, p, torch.zeros(1, *shape, device=batch.device), data)
    return model, guide


def update_sigma(
    data: Batch, site: str = "x", momentum: float = 1.0
) -> Callable[[Run, dict[str, float]], None]:
    """A callback of ``fit`` for a pair of ``vae`` or ``missing`` whose likelihood is ``OptimalSigma``:
    after every epoch its scale moves to the residuals of the training rows; evaluation finds it frozen.

    Args:
        data: training rows (or as many of them as the scale needs).
        site: name of x.
        momentum: weight of the new residuals.

    Raises:
        ValueError: at the first epoch, a likelihood without ``update``.
    """

    @torch.no_grad()
    def callback(run: Run, record: dict[str, float]) -> None:
        likelihood, batch = run.model.likelihood, data.look().to(run.config["device"])
        if not isinstance(likelihood, OptimalSigma):
            raise ValueError(
                f"update_sigma: came a {type(likelihood).__name__} likelihood, wanted OptimalSigma"
            )
        z = run.guide.posterior_of(batch).sample()
        likelihood.update(batch[site], likelihood(z).mean, batch.mask(site), momentum)

    return callback
