"""Numbers with standard errors, the same for every objective."""

from pyro_vae.evaluation.diagnostics import khat_threshold, pareto_khat
from pyro_vae.evaluation.likelihood import Difference, Evaluation, evaluate
from pyro_vae.evaluation.paths import interpolate, traverse
from pyro_vae.evaluation.predict import encode, reconstruct, sample

__all__ = [
    "Difference",
    "Evaluation",
    "encode",
    "evaluate",
    "interpolate",
    "khat_threshold",
    "pareto_khat",
    "reconstruct",
    "sample",
    "traverse",
]
