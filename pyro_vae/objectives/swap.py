"""Run a program with other tensors, buffers or stored parameters than its own; put them back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

__all__ = [
    "Held",
    "Rewound",
    "evaluating",
    "own_parameters",
    "owner",
    "parameters",
    "preserved",
    "shaken",
    "swapped",
]


def owner(program: Callable[..., Any]) -> nn.Module | None:
    """The module whose parameters a program uses: itself, or the one it is a method of."""
    if isinstance(program, nn.Module):
        return program
    bound_to = getattr(program, "__self__", None)
    return bound_to if isinstance(bound_to, nn.Module) else None


def parameters(module: nn.Module) -> list[Tensor]:
    """What a module may read: its own parameters, and what Pyro's store holds by ``pyro.param``."""
    return [*module.parameters(), *pyro.get_param_store()._params.values()]


@contextmanager
def swapped(module: nn.Module, new: Mapping[int, Tensor]) -> Iterator[None]:
    """Let ``new[id(tensor)]`` stand wherever ``module`` holds ``tensor``; restore on exit.

    Visits each module object once (``torch.func.functional_call`` leaves a module that has two
    names with plain tensors in place of parameters), and Pyro's parameter store as well, since a
    ``PyroModule`` would otherwise put the stored value back.
    """
    undo: list[tuple[dict[str, Any], str, Any]] = []
    store = pyro.get_param_store()._params
    homes: list[Any] = [
        home for part in module.modules() for home in (part._parameters, part._buffers)
    ]
    for home in [*homes, store]:
        for name, tensor in home.items():
            if id(tensor) in new:
                undo.append((home, name, tensor))
    try:
        for home, name, tensor in undo:
            home[name] = new[id(tensor)]
        with warnings.catch_warnings():  # of what pyro.module finds frozen
            warnings.filterwarnings("ignore", ".*was not registered in the param store")
            yield
    finally:
        for home, name, tensor in undo:
            home[name] = tensor


@contextmanager
def shaken(program: Callable[..., Any]) -> Iterator[None]:
    """Let a program have parameters a little beside its own, of the same signs; 0 becomes small."""
    module = owner(program)
    tensors = pyro.get_param_store()._params.values() if module is None else parameters(module)
    kept = {id(t): (t, t.data) for t in tensors if t.is_floating_point()}
    generator = torch.Generator().manual_seed(0)
    try:
        for tensor, data in kept.values():
            noise = 0.1 * torch.randn(data.shape, generator=generator).to(data)
            tensor.data = torch.where(data == 0, noise, data * (1 + noise))
        yield
    finally:
        for tensor, data in kept.values():
            tensor.data = data


@contextmanager
def _meeting(
    programs: tuple[Callable[..., Any], ...], visit: Callable[[nn.Module], None]
) -> Iterator[None]:
    """Visit the modules that programs use: now those that own one, and each other one before its
    first call, since a function does not say which it will use."""
    met: set[nn.Module] = set()

    def meet(module: nn.Module, args: Any = None) -> None:
        if module not in met:
            met.update(module.modules())
            visit(module)

    for program in programs:
        if (module := owner(program)) is not None:
            meet(module)
    hook = register_module_forward_pre_hook(meet)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def evaluating(*programs: Callable[..., Any]) -> Iterator[None]:
    """Evaluation mode of the modules that the programs own or call; modes restored on exit."""
    modes: list[tuple[nn.Module, bool]] = []

    def visit(module: nn.Module) -> None:
        modes.extend((part, part.training) for part in module.modules())
        module.eval()

    try:
        with _meeting(programs, visit):
            yield
    finally:
        for part, training in reversed(modes):  # a part may be met before its whole
            part.training = training


@contextmanager
def preserved(*programs: Callable[..., Any]) -> Iterator[None]:
    """Undo what the body does to the random state and to the buffers of the modules that the
    programs own or call."""
    kept: list[tuple[Tensor, Tensor]] = []

    def visit(module: nn.Module) -> None:
        made = (buffer for buffer in module.buffers() if not is_lazy(buffer))
        kept.extend((buffer, buffer.detach().clone()) for buffer in made)

    others = {key: state for key, state in pyro.util.get_rng_state().items() if key != "torch"}
    try:
        with _meeting(programs, visit), torch.random.fork_rng():
            yield
    finally:
        pyro.util.set_rng_state({"torch": torch.get_rng_state(), **others})
        # graphs that hold a buffer stay right, since it is again what they saw
        same = _unsafe_preserve_version_counter(tuple(b for b, _ in kept))
        with torch.no_grad(), same:
            for buffer, value in reversed(kept):  # a part may be met before its whole
                buffer.copy_(value)


class Held:
    """A guide for which the parameters that the model has too are constants: they are the model's.

    A ladder shares conditionals with its model. Where the guide has a goal of its own, they would follow
    that as well.
    """

    def __init__(self, guide: Callable[..., Any], module: nn.Module, model: nn.Module) -> None:
        self.guide, self.model = guide, model
        self.__self__ = module  # its owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        constant = {id(p): p.detach() for p in self.model.parameters()}
        with swapped(self.__self__, constant):
            return self.guide(*args, **kwargs)

    @staticmethod
    def around(guide: Callable[..., Any], model: Callable[..., Any]) -> Callable[..., Any]:
        """The guide itself, if it has nothing of the model's, or nothing else: two methods of one
        module do not say whose a parameter is."""
        mine, other = owner(guide), owner(model)
        if mine is None or other is None:
            return guide
        own = {id(p) for p in other.parameters()}
        shared = [id(p) in own for p in mine.parameters()]
        return Held(guide, mine, other) if any(shared) and not all(shared) else guide


class Rewound:
    """A context in which programs run with the buffers that they had when it was made, and which
    leaves no trace: the second run of a checkpoint, whose first run may have moved them.

    Copies stand in for the buffers, since a graph may hold those.
    """

    def __init__(self, *programs: Callable[..., Any]) -> None:
        self.programs = programs
        modules = {id(m): m for program in programs if (m := owner(program)) is not None}
        self.kept = [
            (module, {id(b): b.detach().clone() for b in _moving(module)})
            for module in modules.values()
        ]

    def __enter__(self) -> None:
        self.stack = ExitStack()
        self.stack.enter_context(preserved(*self.programs))
        for module, buffers in self.kept:
            copies = {key: buffer.clone() for key, buffer in buffers.items()}
            self.stack.enter_context(swapped(module, copies))

    def __exit__(self, *error: object) -> None:
        self.stack.close()


def _moving(module: nn.Module) -> Iterator[Tensor]:
    """Buffers that a run may change."""
    for part in module.modules():
        if part.training:
            yield from part.buffers(recurse=False)


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
