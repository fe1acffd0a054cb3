"""Objectives as text, for command lines, run folders and tables: ``"iwae:num_particles=50"``."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any

from pyro_vae.objectives import recipes as every
from pyro_vae.objectives import schedules
from pyro_vae.objectives.loss import Loss

__all__ = ["arguments", "literal", "parse", "recipes"]

Recipe = Callable[..., Loss]


def recipes() -> dict[str, Recipe]:
    """Every recipe by its name."""
    return {name: getattr(every, name) for name in every.__all__}


def arguments(recipe: Recipe) -> dict[str, Any]:
    """What a spec may say of a recipe: argument -> default (``Parameter.empty``: there is none)."""
    parameters = inspect.signature(recipe).parameters.values()
    named = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
    return {**named, "chunk": None, "likelihood_weights": None}


def parse(spec: str) -> Loss:
    """An objective from ``"iwae:num_particles=50,estimator=dreg"``: a recipe's name and arguments.

    Values are numbers, schedules such as ``linear(1000)``, mappings of them such as ``{'z1': 2, 'z2':
    linear(1000)}``, and words where a recipe takes one.

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
        for item in _items(rest):
            key, _, value = (part.strip() for part in item.partition("="))
            if not value:
                raise ValueError(f"objective {spec!r}: came {item!r}, wanted argument=value")
            if key not in known:
                raise ValueError(f"objective {name!r}: came {key!r}, wanted one of {list(known)}")
            given[key] = _value(value)
            if isinstance(given[key], str) and not _takes_a_word(recipe, key):
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


def _takes_a_word(recipe: Recipe, argument: str) -> bool:
    parameter = inspect.signature(recipe).parameters.get(argument)
    kinds = [] if parameter is None else str(parameter.annotation).split(" | ")
    return "str" in kinds or "Sequence[str]" in kinds  # which says itself what it wants


def _items(text: str) -> list[str]:
    """The parts between the commas that stand in no bracket."""
    depth, parts = 0, [""]
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part for part in parts if part.strip()]


def _value(text: str) -> Any:
    """A schedule, a mapping of which some values are, else a literal."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        return literal(text)
    if not isinstance(node, ast.Dict) or None in node.keys:
        return schedules.parse(text) or literal(text)
    names = [ast.unparse(key) for key in node.keys if key]
    values = [_value(ast.unparse(value)) for value in node.values]
    return dict(zip(map(literal, names), values, strict=True))


def literal(text: str) -> Any:
    """A number, tuple, bool or None from the command line; a word stays a word."""
    if text.lstrip("+-").lower() in ("inf", "nan"):
        return float(text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
