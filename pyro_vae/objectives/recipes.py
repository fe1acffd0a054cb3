"""One short function per paper: a choice of parts."""

from __future__ import annotations

import inspect
from ast import literal_eval
from collections.abc import Mapping
from typing import Any

from pyro_vae.objectives.bounds import Elbo, Renyi
from pyro_vae.objectives.estimators import Estimator
from pyro_vae.objectives.objective import Objective
from pyro_vae.objectives.rates import Analytic, Beta, MonteCarlo
from pyro_vae.objectives.schedules import Schedule

__all__ = ["beta_vae", "elbo", "iwae", "mean_field", "parse", "renyi"]


def elbo(
    num_particles: int = 1, estimator: str | Estimator = "pathwise", **parts: Any
) -> Objective:
    """Evidence lower bound, E_q[log p(x, z) - log q(z | x)] (Kingma & Welling 2014).

    ``estimator="stl"`` drops the score of q (Roeder et al. 2017), ``"score"`` trains discrete
    sites.
    """
    return Objective(Elbo(), estimator, num_particles=num_particles, **parts)


def mean_field(
    num_particles: int = 1, estimator: str | Estimator = "pathwise", **parts: Any
) -> Objective:
    """Evidence lower bound, its KL in closed form wherever one is known (Kingma & Welling 2014)."""
    return Objective(Elbo(), estimator, Analytic(), num_particles=num_particles, **parts)


def iwae(num_particles: int, estimator: str | Estimator = "pathwise", **parts: Any) -> Objective:
    """Importance weighted bound, E[log 1/K sum_k w_k] (Burda et al. 2016).

    ``estimator="dreg"`` is IWAE-DReG (Tucker et al. 2019).
    """
    return Objective(Renyi(0.0), estimator, num_particles=num_particles, **parts)


def renyi(
    alpha: float, num_particles: int, estimator: str | Estimator = "pathwise", **parts: Any
) -> Objective:
    """Variational Rényi bound (Li & Turner 2016); ``alpha=float("-inf")`` is VR-max.

    No bound at finite K for ``alpha < 0``.
    """
    return Objective(Renyi(alpha), estimator, num_particles=num_particles, **parts)


def beta_vae(
    beta: float | Schedule | Mapping[str, float | Schedule],
    num_particles: int = 1,
    estimator: str | Estimator = "pathwise",
    analytic: bool = False,
    **parts: Any,
) -> Objective:
    """ELBO with its rate times beta (Higgins et al. 2017); with ``schedules.linear(n)``, KL warm-up
    over n steps (Bowman et al. 2016)."""
    rate = Beta(beta, Analytic() if analytic else MonteCarlo())
    return Objective(Elbo(), estimator, rate, num_particles=num_particles, **parts)


def parse(spec: str) -> Objective:
    """An objective from ``"iwae:num_particles=50,estimator=dreg"``: a recipe's name and arguments.

    Raises:
        ValueError: unknown recipe, unknown or missing argument, a value that the recipe refuses.
    """
    name, _, rest = spec.partition(":")
    recipes = {n: globals()[n] for n in __all__ if n != "parse"}
    if name not in recipes:
        raise ValueError(f"objective: came {name!r}, wanted one of {sorted(recipes)}")
    arguments: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"objective {spec!r}: came {item!r}, wanted argument=value")
        arguments[key.strip()] = literal(value.strip())
    known = list(inspect.signature(recipes[name]).parameters)[:-1]
    allowed = [*known, "chunk"]
    if unknown := [key for key in arguments if key not in allowed]:
        raise ValueError(f"objective {name!r}: came {unknown[0]!r}, wanted one of {allowed}")
    try:
        return recipes[name](**arguments)  # type: ignore[no-any-return]
    except TypeError as error:  # a missing argument, or a word where a number is wanted
        raise ValueError(f"objective {spec!r}: {error}") from None


def literal(text: str) -> Any:
    """A number, tuple, bool or None from the command line; a word stays a word."""
    if text.lstrip("+-").lower() in ("inf", "nan"):
        return float(text)
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text
