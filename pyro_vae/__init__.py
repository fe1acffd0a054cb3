"""Variational autoencoders as Pyro programs: any pair, any objective, numbers that can be trusted."""

from pyro_vae import conditionals, data, nn, objectives, pairs
from pyro_vae.batch import Batch, Observed
from pyro_vae.evaluation import Evaluation, evaluate
from pyro_vae.linter import check
from pyro_vae.objectives import Objective, beta_vae, elbo, iwae, mean_field, renyi
from pyro_vae.reporting.arviz import to_arviz
from pyro_vae.training.compare import Comparison, compare
from pyro_vae.training.fit import NonFiniteError, Run, fit

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Comparison",
    "Evaluation",
    "NonFiniteError",
    "Objective",
    "Observed",
    "Run",
    "beta_vae",
    "conditionals",
    "check",
    "compare",
    "data",
    "elbo",
    "evaluate",
    "fit",
    "iwae",
    "mean_field",
    "nn",
    "objectives",
    "pairs",
    "renyi",
    "to_arviz",
]
