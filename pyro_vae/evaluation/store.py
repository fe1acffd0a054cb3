"""Pyro's global parameter store, kept out of the dealings of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from torch import nn

from pyro_vae.objectives.swap import owner

__all__ = ["own_parameters"]


@contextmanager
def own_parameters(*programs: Callable[..., Any]) -> Iterator[None]:
    """Let modules have their parameters to themselves: the store would hand those of another pair
    to a ``PyroModule`` that has a parameter of the same name.

    What programs make by ``pyro.param`` is found in the store before and after. A pair of functions
    has nothing but the store, which it shares with every other.
    """
    modules = [module for program in programs if (module := owner(program)) is not None]
    if not modules:
        yield
        return
    store = pyro.get_param_store()

    def shared(state: Any, modules_too: bool) -> dict[str, Any]:
        """What is not the pair's own, and of other modules only on demand."""
        own = {id(parameter) for module in modules for parameter in module.parameters()}
        names = {
            name
            for name, value in state["params"].items()
            if id(value) not in own and (modules_too or not isinstance(value, nn.Parameter))
        }
        return {kind: {name: entries[name] for name in names} for kind, entries in state.items()}

    before = store.get_state()
    _replace(store, shared(before, modules_too=False))
    try:
        yield
    finally:
        made = shared(store.get_state(), modules_too=True)
        _replace(store, before, made)


def _replace(store: Any, *states: Any) -> None:
    store.clear()
    for state in states:
        store.set_state(state)
