"""Ready pairs of model and guide, built for given data.

A pair builder is any ``build(batch, **options) -> (model, guide)``. It looks at the batch (training
rows) for shapes, for the kind of values, and for where the outputs should start, and keeps
nothing: whatever it read off the data is in the modules' ``state_dict``.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from pyro_vae import conditionals
from pyro_vae import nn as networks
from pyro_vae.batch import Batch
from pyro_vae.conditionals.discrete import (
    Bernoulli,
    Binomial,
    Categorical,
    ContinuousBernoulli,
    NegativeBinomial,
    OneHotCategorical,
    UniformBernoulli,
    UniformOneHot,
)
from pyro_vae.conditionals.gaussian import DiagonalGaussian, Gaussian, OptimalSigma, StandardNormal
from pyro_vae.conditionals.logistic import LogisticMixture
from pyro_vae.conditionals.marginal import deviation, mean, median, spread
from pyro_vae.conditionals.student import StudentT
from pyro_vae.guides.amortized import AmortizedGuide
from pyro_vae.models.latent import LatentVariableModel
from pyro_vae.nn.affine import Affine, OneHot
from pyro_vae.nn.leading import Reshape
from pyro_vae.nn.mlp import dense

__all__ = ["inputs_for", "likelihood_for", "part", "rebuilt", "update_sigma", "vae"]

BUILDERS = ("vae",)  # what builds a pair, of all that is here

FEW_CLASSES = 16

PRIORS: dict[type, Callable[..., nn.Module]] = {  # of a posterior, where it is not StandardNormal
    Bernoulli: UniformBernoulli,
    OneHotCategorical: UniformOneHot,
}

Run = Any  # of training.fit, which pairs do not import

Part = nn.Module | Callable[..., nn.Module]
"""A ready conditional; or a class of them, or a function, that makes one."""


class Architecture(Protocol):
    """Makes a network ``[..., *inputs] -> [..., *outputs]``: ``dense``, ``convolutional``, ..."""

    def __call__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        hidden: Sequence[int],
        activation: Callable[[], nn.Module],
        /,
    ) -> nn.Module: ...


Build = TypeVar("Build", bound=Callable[..., Any])


def _ready(build: Build) -> Build:
    """Let the model say in ``built_by`` how it was built, if that can be said without code."""

    @functools.wraps(build)
    def built(*args: Any, **options: Any) -> tuple[Any, Any]:
        model, guide = build(*args, **options)
        given = inspect.signature(build).bind(*args, **options).arguments
        try:
            said = {name: _spelled(value) for name, value in list(given.items())[1:]}
        except ValueError:
            return model, guide
        model.built_by = {"pair": build.__name__, "options": said}
        return model, guide

    return cast(Build, built)


def rebuilt(built_by: dict[str, Any], batch: Batch) -> tuple[Any, Any]:
    """The pair that a ready builder built, by what its model says in ``built_by``, untrained.

    Raises:
        ValueError: what no ready builder said.
    """
    name, options = built_by.get("pair"), built_by.get("options")
    if name not in BUILDERS or not isinstance(options, dict):
        raise ValueError(f"came pair {name!r} of {options!r}, wanted one of {list(BUILDERS)}")
    meant = {option: _meant(value) for option, value in options.items()}
    return globals()[name](batch, **meant)  # type: ignore[no-any-return]


def part(word: str) -> Any:
    """What a word names: a conditional, a network, a class of torch.nn; None if nothing."""
    for place in (conditionals, networks):
        if word in place.__all__:
            return getattr(place, word)
    found = getattr(nn, word, None)
    return found if isinstance(found, type) else None


def _spelled(value: Any) -> Any:
    """A builder's argument in JSON's types, a part by its name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_spelled(item) for item in value]
    name = getattr(value, "__name__", "")
    if not name or part(name) is not value:
        raise ValueError(f"{value!r} has no name")
    return {"part": name}


def _meant(value: Any) -> Any:
    if isinstance(value, list):
        return [_meant(item) for item in value]
    if isinstance(value, dict):
        found = part(str(value.get("part")))
        if found is None:
            raise ValueError(f"came part {value.get('part')!r}, which nothing here is called")
        return found
    return value


@_ready
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
    data = _observed(batch, site)
    event_shape = data.shape[1:]
    hidden = tuple(hidden) if isinstance(hidden, Sequence) else (hidden,)
    shape = tuple(latent) if isinstance(latent, Sequence) else (latent,)
    if not shape or not all(isinstance(size, int) and size > 0 for size in (*shape, *hidden)):
        raise ValueError(
            f"vae: came latent={latent!r}, hidden={hidden!r}, wanted whole numbers above 0"
        )
    parts = {"likelihood": likelihood, "prior": prior, "posterior": posterior}
    for name, part in {**parts, "net": net, "activation": activation}.items():
        if not (callable(part) or (part is None and name in parts)):
            raise ValueError(
                f"vae: came {name}={part!r}, wanted a class or a function that builds it (those of "
                "pyro_vae.conditionals and pyro_vae.nn)"
            )

    def decoder(outputs: Sequence[int]) -> nn.Module:
        flat = (math.prod(shape),)
        made = net(flat, outputs, hidden[::-1], activation)
        return made if flat == shape else nn.Sequential(Reshape(shape, flat), made)

    chosen = likelihood_for(batch, site) if likelihood is None else likelihood
    p = _built(chosen, decoder, event_shape, data)
    inputs, input_shape = inputs_for(batch, site, p)

    def encoder(outputs: Sequence[int]) -> nn.Module:
        return nn.Sequential(inputs, net(input_shape, outputs, hidden, activation))

    q = _built(DiagonalGaussian if posterior is None else posterior, encoder, shape, None)
    if not isinstance(prior, nn.Module):
        prior = (prior or PRIORS.get(type(q), StandardNormal))(*shape)
    model = LatentVariableModel(prior, p, site=site).to(batch.device)
    guide = AmortizedGuide(q, site=site).to(batch.device)
    _check_support(batch, site, p, torch.zeros(1, *shape, device=batch.device), data)
    return model, guide


def update_sigma(
    data: Batch, site: str = "x", momentum: float = 1.0
) -> Callable[[Run, dict[str, float]], None]:
    """A callback of ``fit`` for a pair of ``vae`` whose likelihood is ``OptimalSigma``: after every
    epoch its scale moves to the residuals of the training rows; evaluation finds it frozen.

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
        z = run.guide.posterior(batch[site]).sample()
        likelihood.update(batch[site], likelihood(z).mean, batch.mask(site), momentum)

    return callback


def likelihood_for(batch: Batch, site: str = "x") -> type[nn.Module]:
    """The likelihood class for the observed values of a site.

    | values                                                   | class               |
    | -------------------------------------------------------- | ------------------- |
    | 0 or 1                                                   | Bernoulli           |
    | whole numbers below 16, in ``int64`` numbers or vectors  | Categorical         |
    | whole numbers from 0 to 255, of any other type or shape  | Binomial            |
    | whole numbers from 0 on, some of them above 255          | NegativeBinomial    |
    | within [0, 1]                                            | ContinuousBernoulli |
    | any other                                                | Gaussian            |
    """
    data = _observed(batch, site)
    batch = batch.look()
    labels = batch[site].dtype == torch.int64 and data.dim() <= 2
    labels = labels and Categorical.takes(data) and bool(data.nan_to_num().max() < FEW_CLASSES)
    if labels and not Bernoulli.takes(data):
        return Categorical
    kinds = (Bernoulli, Binomial, NegativeBinomial, ContinuousBernoulli)
    return next((kind for kind in kinds if kind.takes(data)), Gaussian)


def inputs_for(batch: Batch, site: str, likelihood: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    """A fixed module from a site's values to network inputs of order 1, and their shape.

    Classes become indicators ``[C, *event]``; counts without end (NegativeBinomial) become log(1 +
    x), as in scVI (Lopez et al. 2018); bounded counts and values in [0, 1] are divided by their
    maximum; other values are standardised entry by entry, which outliers (StudentT) must neither
    set the unit of nor come through at full size: median, median deviation, then asinh.
    """
    data = _observed(batch, site)
    event_shape = tuple(data.shape[1:])
    if isinstance(likelihood, Categorical):
        return OneHot(likelihood.classes, len(event_shape)), (likelihood.classes, *event_shape)
    if isinstance(likelihood, NegativeBinomial):
        return nn.Sequential(_Log1p(), _standard(data.log1p())), event_shape
    if isinstance(likelihood, StudentT):
        center, scale = median(data), deviation(data)
        return nn.Sequential(Affine(-center / scale, 1 / scale), _Asinh()), event_shape
    if Binomial.takes(data) or ContinuousBernoulli.takes(data):
        top = float(data.nan_to_num().max())
        return Affine(scale=1 / top if top > 0 else 1.0), event_shape
    return _standard(data), event_shape


def _standard(data: Tensor) -> Affine:
    scale = spread(data)
    return Affine(-mean(data) / scale, 1 / scale)


class _Log1p(nn.Module):
    """Whatever the dtype of the counts, in torch's default dtype (float64 stays what it is)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.log1p()


class _Asinh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.asinh()


def _built(
    part: Part,
    network: Callable[[Sequence[int]], nn.Module],
    event_shape: Sequence[int],
    data: Tensor | None,
) -> nn.Module:
    """A ready conditional as it is, else what its builder makes."""
    if isinstance(part, nn.Module):
        return part
    conditional: nn.Module = getattr(part, "build", part)(network, event_shape, data)
    return conditional


def _observed(batch: Batch, site: str) -> Tensor:
    """Values ``[N, *event]`` of a site in torch's default dtype, NaN where missing."""
    if not isinstance(batch, Batch):
        raise ValueError(f"came a {type(batch).__name__}, wanted a Batch: Batch({{{site!r}: x}})")
    if site not in batch:
        raise ValueError(
            f"site {site!r} is not in the batch, which has {list(batch.sites)}; say which by site="
        )
    batch = batch.look()
    data = batch[site].to(torch.get_default_dtype())
    if site in batch.incomplete:
        data = data.masked_fill(~batch.mask(site), torch.nan)
    if bool(data.isnan().all()):
        raise ValueError(f"site {site!r}: the batch has no observed entry ({batch.size} rows)")
    return data


@torch.no_grad()
def _check_support(batch: Batch, site: str, likelihood: nn.Module, z: Tensor, data: Tensor) -> None:
    """Score nothing that the likelihood gives no density, such as grey pixels under a Bernoulli."""
    training = likelihood.training
    fn = likelihood.eval()(z)
    likelihood.train(training)
    name = type(likelihood).__name__
    if fn.event_shape != data.shape[1:]:
        raise ValueError(
            f"site {site!r}: data have event shape {list(data.shape[1:])}, "
            f"{name} has {list(fn.event_shape)}"
        )
    inside = fn.support.check(batch[site])
    if not bool(inside.all()):
        kinds = (
            Bernoulli,
            Binomial,
            Categorical,
            LogisticMixture,
            NegativeBinomial,
            ContinuousBernoulli,
        )
        others = ", ".join(kind.__name__ for kind in kinds if kind.takes(data))
        raise ValueError(
            f"site {site!r}: {name} does not take these data (row {int((~inside).nonzero()[0, 0])} "
            f"is outside its support); {others + ' and ' if others else ''}Gaussian would"
        )
