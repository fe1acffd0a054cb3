"""Penalties: terms on the aggregate posterior q(z) = E_x q(z | x), or on a row's own posterior, added
to the loss per row."""

from pyro_vae.objectives.penalties.adversarial import Adversarial
from pyro_vae.objectives.penalties.aggregate import (
    MutualInformation,
    TotalCorrelation,
    decomposition,
)
from pyro_vae.objectives.penalties.distances import MMD, Sinkhorn, SlicedWasserstein
from pyro_vae.objectives.penalties.experts import ConditionalBottleneck, ExpertKL
from pyro_vae.objectives.penalties.latent import Latent, Penalty
from pyro_vae.objectives.penalties.moments import DIP

__all__ = [
    "DIP",
    "MMD",
    "Adversarial",
    "ConditionalBottleneck",
    "ExpertKL",
    "Latent",
    "MutualInformation",
    "Penalty",
    "Sinkhorn",
    "SlicedWasserstein",
    "TotalCorrelation",
    "decomposition",
]
