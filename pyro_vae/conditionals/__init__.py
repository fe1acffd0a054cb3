"""Conditionals: modules whose ``forward(*parents)`` returns a Pyro distribution.

Each of them factorizes over its event, so that any entry may be missing, and each has
``build(network, event_shape, data=None)``, which makes the network as well:

* ``network(shape)`` makes a network that returns ``[..., *shape]``;
* ``data`` are training values ``[N, *event]`` of the site, floating, NaN where missing, from which
  the conditional starts; None where there are none, as for a latent.
"""

from pyro_vae.conditionals.discrete import (
    Bernoulli,
    Binomial,
    Categorical,
    ContinuousBernoulli,
    LearnedBernoulli,
    LearnedOneHot,
    NegativeBinomial,
    OneHotCategorical,
    UniformBernoulli,
    UniformOneHot,
)
from pyro_vae.conditionals.gaussian import (
    DiagonalGaussian,
    Gaussian,
    OptimalSigma,
    StandardNormal,
)
from pyro_vae.conditionals.gaussian_mixture import GaussianMixture
from pyro_vae.conditionals.logistic import DiscretizedLogisticMixture, LogisticMixture
from pyro_vae.conditionals.mixture import StratifiedMixture
from pyro_vae.conditionals.network import Network
from pyro_vae.conditionals.ordinal import Ordinal
from pyro_vae.conditionals.poisson import Poisson
from pyro_vae.conditionals.positive import LogNormal
from pyro_vae.conditionals.student import StudentT

__all__ = [
    "Bernoulli",
    "Binomial",
    "Categorical",
    "ContinuousBernoulli",
    "DiagonalGaussian",
    "DiscretizedLogisticMixture",
    "Gaussian",
    "GaussianMixture",
    "LearnedBernoulli",
    "LearnedOneHot",
    "LogNormal",
    "LogisticMixture",
    "NegativeBinomial",
    "Network",
    "OneHotCategorical",
    "OptimalSigma",
    "Ordinal",
    "Poisson",
    "StandardNormal",
    "StratifiedMixture",
    "StudentT",
    "UniformBernoulli",
    "UniformOneHot",
]
