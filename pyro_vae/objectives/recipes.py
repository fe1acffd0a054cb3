"""One short function per paper: a choice of parts."""

from __future__ import annotations

import inspect
import re
from ast import literal_eval
from collections.abc import Callable, Mapping
from typing import Any

from pyro_vae.objectives.bounds import Elbo, Renyi
from pyro_vae.objectives.estimators import Estimator
from pyro_vae.objectives.objective import Objective
from pyro_vae.objectives.rates import Analytic, Beta, MonteCarlo
from pyro_vae.objectives.schedules import Schedule, linear

__all__ = ["arguments", "beta_vae", "elbo", "iwae", "mean_field", "parse", "recipes", "renyi"]


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


def recipes() -> dict[str, Callable[..., Objective]]:
    """Every recipe by its name."""
    return {recipe.__name__: recipe for recipe in (elbo, mean_field, iwae, renyi, beta_vae)}


def arguments(recipe: Callable[..., Objective]) -> dict[str, Any]:
    """What a spec may say of a recipe: argument -> default (``Parameter.empty``: there is none)."""
    parameters = inspect.signature(recipe).parameters.values()
    named = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
    return {**named, "chunk": None}


def parse(spec: str) -> Objective:
    """An objective from ``"iwae:num_particles=50,estimator=dreg"``: a recipe's name and arguments.

    Values are numbers, ``linear(1000)`` and, for beta, ``{'z': 2}``.

    Raises:
        ValueError: unknown recipe, unknown or missing argument, a value that the recipe refuses.
    """
    name, _, rest = spec.partition(":")
    if name not in recipes():
        raise ValueError(f"objective: came {name!r}, wanted one of {list(recipes())}")
    recipe = recipes()[name]
    known = arguments(recipe)
    given: dict[str, Any] = {}
    try:
        for item in filter(None, re.split(r",(?=\s*\w+\s*=|$)", rest)):  # no commas inside a value
            key, _, value = (part.strip() for part in item.partition("="))
            if not value:
                raise ValueError(f"objective {spec!r}: came {item!r}, wanted argument=value")
            if key not in known:
                raise ValueError(f"objective {name!r}: came {key!r}, wanted one of {list(known)}")
            given[key] = _schedule(value) or literal(value)
            if isinstance(given[key], str) and key != "estimator":
                raise ValueError(f"objective {name!r}: came {key}={value!r}, wanted a number")
        empty = inspect.Parameter.empty
        if missing := [key for key in known if known[key] is empty and key not in given]:
            wanted = ",".join(f"{key}=..." for key in missing)
            raise ValueError(
                f"objective {name!r}: came without {missing[0]}, wanted {name}:{wanted}"
            )
        return recipe(**given)
    except TypeError as error:  # a tuple or a schedule where a number is wanted
        raise ValueError(f"objective {spec!r}: a value of the wrong kind ({error})") from None


def _schedule(text: str) -> Schedule | None:
    """``linear(1000)``, or None for what is no schedule."""
    match = re.fullmatch(r"linear\((.+)\)", text)
    return linear(*map(literal, match[1].split(","))) if match else None


def literal(text: str) -> Any:
    """A number, tuple, bool or None from the command line; a word stays a word."""
    if text.lstrip("+-").lower() in ("inf", "nan"):
        return float(text)
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text
