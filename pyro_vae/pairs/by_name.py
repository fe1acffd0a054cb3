"""Ready builders by their names, and how a model says which of them built it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from torch import nn

from pyro_vae import conditionals, guides
from pyro_vae import nn as networks
from pyro_vae.batch import Batch

__all__ = ["BUILDERS", "part", "ready", "rebuilt"]

BUILDERS: dict[str, Callable[..., tuple[Any, Any]]] = {}  # in the order in which they are defined

Build = TypeVar("Build", bound=Callable[..., Any])


def ready(build: Build) -> Build:
    """Register a builder; its models say in ``built_by`` how they were built, if no code is needed."""

    @functools.wraps(build)
    def built(*args: Any, **options: Any) -> tuple[Any, Any]:
        model, guide = build(*args, **options)
        given = inspect.signature(build).bind(*args, **options).arguments
        try:
            said = {name: _spelled(value) for name, value in list(given.items())[1:]}
        except ValueError:
            vars(model).pop("built_by", None)  # of a builder inside this one
            return model, guide
        model.built_by = {"pair": build.__name__, "options": said}
        return model, guide

    BUILDERS[build.__name__] = built
    return cast(Build, built)


def rebuilt(built_by: dict[str, Any], batch: Batch) -> tuple[Any, Any]:
    """The pair that a ready builder built, by what its model says in ``built_by``, untrained.

    Raises:
        ValueError: what no ready builder said.
    """
    name, options = built_by.get("pair"), built_by.get("options")
    if name not in BUILDERS or not isinstance(options, dict):
        raise ValueError(f"came pair {name!r} of {options!r}, wanted one of {list(BUILDERS)}")
    meant = {option: _meant(value) for option, value in options.items()}
    return BUILDERS[name](batch, **meant)


def part(word: str) -> Any:
    """What a word names: a conditional, a network, a part of guides, a class of torch.nn; None if
    nothing."""
    for place in (conditionals, networks, guides):
        if word in place.__all__:
            return getattr(place, word)
    found = getattr(nn, word, None)
    return found if isinstance(found, type) else None


def _spelled(value: Any) -> Any:
    """A builder's argument in JSON's types, a part by its name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_spelled(item) for item in value]
    if isinstance(value, Mapping):
        return {"of": {str(key): _spelled(item) for key, item in value.items()}}
    if isinstance(value, functools.partial) and not value.args:
        return _spelled(value.func) | {"with": _spelled(value.keywords)}
    name = getattr(value, "__name__", "")
    if not name or part(name) is not value:
        raise ValueError(f"{value!r} has no name")
    return {"part": name}


def _meant(value: Any) -> Any:
    if isinstance(value, list):
        return [_meant(item) for item in value]
    if isinstance(value, dict) and isinstance(value.get("of"), dict):
        return {key: _meant(item) for key, item in value["of"].items()}
    if isinstance(value, dict):
        found = part(str(value.get("part")))
        if found is None:
            raise ValueError(f"came part {value.get('part')!r}, which nothing here is called")
        return functools.partial(found, **_meant(value["with"])) if "with" in value else found
    return value
