"""Numbers with standard errors, the same for every objective."""

from pyro_vae.evaluation.diagnostics import khat_threshold, pareto_khat
from pyro_vae.evaluation.likelihood import Difference, Evaluation, evaluate

__all__ = ["Difference", "Evaluation", "evaluate", "khat_threshold", "pareto_khat"]
