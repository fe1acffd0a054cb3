"""Variational autoencoders as Pyro programs: any pair, any objective, numbers that can be trusted."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyro_vae import conditionals, data, nn, objectives, pairs
from pyro_vae.batch import Batch, Observed
from pyro_vae.evaluation import (
    Evaluation,
    encode,
    evaluate,
    interpolate,
    reconstruct,
    sample,
    traverse,
)
from pyro_vae.linter import check
from pyro_vae.objectives import Objective, beta_vae, elbo, iwae, mean_field, renyi
from pyro_vae.reporting.arviz import to_arviz
from pyro_vae.saved import load
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
    "encode",
    "evaluate",
    "fit",
    "interpolate",
    "iwae",
    "load",
    "mean_field",
    "nn",
    "objectives",
    "pairs",
    "plots",
    "reconstruct",
    "renyi",
    "sample",
    "to_arviz",
    "traverse",
]

if TYPE_CHECKING:
    from pyro_vae.reporting import plots
else:

    def __getattr__(name: str) -> Any:
        if name == "plots":  # on demand, since it imports matplotlib
            return import_module("pyro_vae.reporting.plots")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
