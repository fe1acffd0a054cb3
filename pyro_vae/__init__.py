"""Variational autoencoders as Pyro programs: any pair, any objective, numbers that can be trusted."""

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from pyro_vae import objectives
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
from pyro_vae.objectives import Objective, beta_vae, elbo, iwae, mean_field, renyi
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
    "annealed",
    "beta_vae",
    "bidirectional",
    "conditionals",
    "check",
    "compare",
    "data",
    "elbo",
    "encode",
    "evaluate",
    "fit",
    "impute",
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

# What a program may do without is imported when it is first asked for.
_ON_DEMAND = {
    "Comparison": "pyro_vae.training.compare:Comparison",
    "annealed": "pyro_vae.evaluation.annealing:annealed",
    "bidirectional": "pyro_vae.evaluation.annealing:bidirectional",
    "check": "pyro_vae.linter:check",
    "compare": "pyro_vae.training.compare:compare",
    "conditionals": "pyro_vae.conditionals:",
    "data": "pyro_vae.data:",
    "impute": "pyro_vae.evaluation.imputation:impute",
    "load": "pyro_vae.saved:load",
    "nn": "pyro_vae.nn:",
    "pairs": "pyro_vae.pairs:",
    "plots": "pyro_vae.reporting.plots:",
    "to_arviz": "pyro_vae.reporting.arviz:to_arviz",
}

if TYPE_CHECKING:  # the same for those who read and do not run: type checkers, editors, docs
    from pyro_vae import conditionals, data, nn, pairs
    from pyro_vae.evaluation.annealing import annealed, bidirectional
    from pyro_vae.evaluation.imputation import impute
    from pyro_vae.linter import check
    from pyro_vae.reporting import plots
    from pyro_vae.reporting.arviz import to_arviz
    from pyro_vae.saved import load
    from pyro_vae.training.compare import Comparison, compare
else:

    def __getattr__(name: str) -> Any:
        if name in _ON_DEMAND:
            return resolve_name(_ON_DEMAND[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
