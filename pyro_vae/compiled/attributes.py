"""What programs remember in Python: numbers, tensors, generators, by the names of what holds them."""

from __future__ import annotations

import pickle
import random
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

__all__ = ["Attributes"]

LIBRARIES = ("torch", "pyro", "pyro_vae", "numpy", "functools", "builtins")
DEPTH = 5  # of what holds what
NUMBERS = (bool, int, float, complex, str, bytes, np.generic, type(None))
_NOTHING = object()


class _Globals(NamedTuple):
    """The variables of a file that a function names."""

    variables: dict[str, Any]
    names: tuple[str, ...]


class _Place(NamedTuple):
    """What holds things, and what it held; attributes have an owner."""

    name: str
    holder: Any
    held: dict[Any, Any]
    owner: Any


# A holder's things by their keys, and how they are put back.
HOLDERS: dict[
    type, tuple[Callable[[Any], dict[Any, Any]], Callable[[Any, dict[Any, Any]], Any]]
] = {
    dict: (dict, lambda holder, held: (holder.clear(), holder.update(held))),
    list: (
        lambda holder: dict(enumerate(holder)),
        lambda holder, held: holder.__setitem__(slice(None), held.values()),
    ),
    deque: (
        lambda holder: dict(enumerate(holder)),
        lambda holder, held: (holder.clear(), holder.extend(held.values())),
    ),
    set: (dict.fromkeys, lambda holder, held: (holder.clear(), holder.update(held))),
    CellType: (
        lambda cell: {0: cell.cell_contents},
        lambda cell, held: setattr(cell, "cell_contents", held[0]),
    ),
    _Globals: (
        lambda file: {n: file.variables[n] for n in file.names if n in file.variables},
        lambda file, held: file.variables.update(held),
    ),
}
# The state of what changes when it is used, and how it is put back.
STATES: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
    np.random.Generator: (
        lambda generator: generator.bit_generator.state,
        lambda generator, state: setattr(generator.bit_generator, "state", state),
    ),
    np.ndarray: (np.ndarray.copy, np.copyto),
}


class Attributes:
    """What modules and functions hold now, to be compared with and put back: attributes, variables
    of a closure, global ones that a function names, and what is in lists, dicts and objects there.

    A program that sets one as it runs (a counter, a buffer that it makes anew) does what no graph
    would do again. Tensors that it changes in place are put back, and are none of these changes.

    Args:
        tensors: keep copies of tensors as well, to put them back.
    """

    def __init__(self, *roots: Any, tensors: bool = True) -> None:
        self._with_tensors = tensors
        self.places: list[_Place] = []
        self.tensors: list[tuple[Tensor, Tensor]] = []
        self.states: list[tuple[str, Any, Any]] = []
        self._seen: dict[int, Any] = {}  # keeps what it names alive
        self._hold("numpy.random", np.random.mtrand._rand, DEPTH)
        self._hold("random", random._inst, DEPTH)
        for root in roots:
            self._hold(getattr(root, "__name__", type(root).__name__), root, DEPTH)

    def put_back(self) -> None:
        for _, holder, held, _ in self.places:
            things, fill = HOLDERS[_kind(holder, HOLDERS)]
            now = things(holder)
            if now.keys() != held.keys() or any(now[key] is not held[key] for key in held):
                fill(holder, held)
        with torch.no_grad():
            for tensor, copy in self.tensors:
                if not torch.equal(tensor, copy):
                    tensor.copy_(copy)
        for _, value, state in self.states:
            STATES[_kind(value, STATES)][1](value, state)

    def changed(self) -> Iterator[tuple[str, Any]]:
        """Name and old value of what is another object now, or another number."""
        for name, holder, held, owner in self.places:
            now = HOLDERS[_kind(holder, HOLDERS)][0](holder)
            for key in {**held, **now}:
                old, new = held.get(key, _NOTHING), now.get(key, _NOTHING)
                if old is _NOTHING and owner is not None:  # in front of what the class has
                    old = getattr(type(owner), str(key), new)
                if not _same(old, new):
                    yield name.format(key), old
        for name, value, state in self.states:
            if isinstance(value, np.ndarray) and not _same(state, value):
                yield name, None

    def drawn(self) -> str:
        """Which generator was drawn from that a graph would not draw from."""
        for name, value, state in self.states:
            now = STATES[_kind(value, STATES)][0](value)
            if not isinstance(now, Tensor | np.ndarray) and pickle.dumps(now) != pickle.dumps(
                state
            ):
                return f"{name} was drawn from, and a graph has the numbers as constants"
        return ""

    def unsteady(self, held: list[Tensor]) -> str:
        """Why a graph that reads the tensors ``held`` would not do what the program does."""
        read = {id(tensor) for tensor in held}
        for name, old in self.changed():
            tensors = [leaf for leaf in tree_leaves(old) if isinstance(leaf, Tensor)]
            if not tensors or any(id(tensor) in read for tensor in tensors):
                return f"{name} was changed, and a graph has it as a constant"
        return ""

    def _hold(self, name: str, value: Any, depth: int) -> None:
        if depth == 0 or id(value) in self._seen or isinstance(value, (*NUMBERS, type, ModuleType)):
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            if self._with_tensors and value.layout == torch.strided and not is_lazy(value):
                self.tensors.append((value, value.detach().clone()))
        elif kind := _kind(value, STATES):
            self.states.append((name, value, STATES[kind][0](value)))
        elif isinstance(value, nn.Module):
            for part in value.modules():
                self._hold_part(part)
        elif _kind(value, HOLDERS):
            self._place(name, value, depth)
        elif isinstance(value, tuple):
            for item in value:
                self._hold(name, item, depth - 1)
        elif isinstance(value, MethodType):
            self._hold(name, value.__self__, depth)
            self._hold(name, value.__func__, depth)
        elif isinstance(value, partial):
            self._hold(name, (value.func, value.args, value.keywords), depth)
        elif isinstance(value, FunctionType):
            self._hold_function(name, value, depth)
        elif hasattr(value, "__dict__") and (depth == DEPTH or not _of_library(type(value))):
            self._place(f"{type(value).__name__}.{{}}", vars(value), depth, value)

    def _hold_part(self, part: nn.Module) -> None:
        """One module without its parts."""
        kind = type(part).__name__
        self._seen[id(part)] = part
        self.places.append(_Place(f"{kind}.{{}}", vars(part), dict(vars(part)), part))
        for key, value in vars(part).items():
            if key == "_modules":
                self.places.append(_Place(f"{kind}.{{}}", value, dict(value), None))
            elif key in ("_parameters", "_buffers"):
                self._place(f"{kind}.{{}}", value, DEPTH - 1)
            else:
                self._hold(f"{kind}.{key}", value, DEPTH - 1)
        self._hold(kind, getattr(type(part), "forward", None), DEPTH - 1)

    def _hold_function(self, name: str, function: FunctionType, depth: int) -> None:
        if _of_library(function):
            return
        code = function.__code__
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if cell != CellType():  # not empty
                self._place(variable, cell, depth)
        self._place("{}", _Globals(function.__globals__, code.co_names), depth)

    def _place(self, name: str, holder: Any, depth: int, owner: Any = None) -> None:
        held = HOLDERS[_kind(holder, HOLDERS)][0](holder)
        self._seen[id(holder)] = holder
        self.places.append(_Place(name, holder, held, owner))
        for key, value in held.items():
            self._hold(name.format(key), value, depth - 1)


def _kind(value: Any, kinds: dict[type, Any]) -> Any:
    return next((kind for kind in kinds if isinstance(value, kind)), None)


def _of_library(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).partition(".")[0] in LIBRARIES


def _same(old: Any, new: Any) -> bool:
    """Whether it is the same object, or another one that says the same."""
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, NUMBERS):
        return bool(old == new) or old != old
    if isinstance(old, np.ndarray):
        return np.array_equal(old, new)
    if isinstance(old, tuple):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, list | dict | set):
        return bool(tree_leaves(old) == tree_leaves(new)) if _is_plain(old) else False
    return False


def _is_plain(value: Any) -> bool:
    return all(isinstance(leaf, NUMBERS) for leaf in tree_leaves(value))
