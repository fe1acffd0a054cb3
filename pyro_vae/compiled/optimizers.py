"""A torch optimizer as a function of tensors: its state, its numbers, a step that a graph can hold."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_vae.compiled.attributes import Attributes

__all__ = [
    "evaluates",
    "identity",
    "numbers",
    "rates",
    "refusal",
    "state_tensors",
    "stepping",
    "take",
]

# What says how torch's optimizers compute, not what; and what a graph takes as tensors.
NO_CONSTANTS = ("capturable", "foreach", "fused", "params", "lr", "initial_lr")

_EVALUATES: dict[type[Optimizer], bool] = {}


def refusal(optimizer: Optimizer) -> str:
    """Why a graph can't hold an optimizer's step; empty if nothing is known against it."""
    name = type(optimizer).__name__
    if evaluates(optimizer):
        return f"{name} evaluates the loss several times a step"
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return f"{name} has hooks on its step" if any(hooks) else ""


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """All tensors of an optimizer's state."""
    states = optimizer.state.values()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def numbers(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What a graph of the step has as constants, of each group of parameters."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value  # a state that was read has lists

    return [
        {name: plain(value) for name, value in group.items() if name not in NO_CONSTANTS}
        for group in optimizer.param_groups
    ]


def evaluates(optimizer: Optimizer) -> bool:
    """Whether an optimizer's step evaluates the loss itself, as LBFGS does."""
    kind = type(optimizer)
    if kind not in _EVALUATES:  # asked in every step, and slow to find out
        closure = inspect.signature(kind.step).parameters.get("closure")
        _EVALUATES[kind] = closure is not None and closure.default is inspect.Parameter.empty
    return _EVALUATES[kind]


def identity(optimizer: Optimizer) -> list[int]:
    """What is another list when the state was made anew: of the first parameter, all is too much."""
    first: dict[str, Any] = next(iter(optimizer.state.values()), {})
    return [id(optimizer.state), *map(id, first.values())]


@contextmanager
def stepping(optimizer: Optimizer) -> Iterator[Attributes]:
    """Undo what steps do to an optimizer; yields what it was."""
    held = Attributes(optimizer)
    try:
        yield held
    finally:
        held.put_back()


def rates(optimizer: Optimizer) -> list[Tensor]:
    """Tensors for the learning rates, one for each group of parameters."""
    # SGD reads the number out of a tensor, unless the tensor wants a gradient
    return [
        torch.tensor(
            float(group["lr"]),
            dtype=group["params"][0].dtype,
            device=group["params"][0].device,
            requires_grad=True,
        )
        for group in optimizer.param_groups
    ]


def take(optimizer: Optimizer, rates: list[Tensor]) -> None:
    """A step of the optimizer at these learning rates, by operations on tensors alone.

    Raises:
        ValueError: its step wants a number out of a tensor, or makes state.
    """
    before, compiling = len(state_tensors(optimizer)), torch.compiler._is_compiling_flag
    manner = {"capturable": True, "fused": False, "foreach": rates[0].is_cuda}
    kept = [
        {name: group[name] for name in ("lr", *manner) if name in group}
        for group in optimizer.param_groups
    ]
    try:
        torch.compiler._is_compiling_flag = True  # torch then leaves the values of tensors alone
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group.update({name: value for name, value in manner.items() if name in group})
            group["lr"] = rate
        type(optimizer).step(optimizer)  # a scheduler puts a counter around the object's own
    except RuntimeError:
        raise ValueError(
            f"{type(optimizer).__name__} wants numbers out of tensors, so it stays outside the graph"
        ) from None
    finally:
        torch.compiler._is_compiling_flag = compiling
        for group, old in zip(optimizer.param_groups, kept, strict=True):
            group.update(old)
    if len(state_tensors(optimizer)) != before:
        raise ValueError(f"{type(optimizer).__name__} has yet to make its state")
