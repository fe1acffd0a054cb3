"""Objectives: bound x estimator x rate x penalties, each a value."""

from pyro_vae.objectives.bounds import Bound, Elbo, Renyi
from pyro_vae.objectives.estimators import STL, DReG, Estimator, Pathwise, Score
from pyro_vae.objectives.objective import Objective, ObjectiveModule
from pyro_vae.objectives.particles import Particles
from pyro_vae.objectives.rates import Analytic, Beta, MonteCarlo, Rate
from pyro_vae.objectives.recipes import beta_vae, elbo, iwae, mean_field, renyi
from pyro_vae.objectives.schedules import linear

__all__ = [
    "STL",
    "Analytic",
    "Beta",
    "Bound",
    "DReG",
    "Elbo",
    "Estimator",
    "MonteCarlo",
    "Objective",
    "ObjectiveModule",
    "Particles",
    "Pathwise",
    "Rate",
    "Renyi",
    "Score",
    "beta_vae",
    "elbo",
    "iwae",
    "linear",
    "mean_field",
    "renyi",
]
