"""Schedules: functions of a step tensor that stay tensors.

A Python float would be frozen into a traced graph. Wherever an objective takes a number, it takes a
schedule too. A schedule's name is the call that made it, which ``parse`` reads back.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Mapping
from functools import wraps
from itertools import pairwise
from typing import Any, ParamSpec

import torch
from torch import Tensor

__all__ = [
    "SCHEDULES",
    "Schedule",
    "cosine",
    "cyclical",
    "exponential",
    "linear",
    "not_negative",
    "parse",
    "piecewise",
    "shown",
    "value",
]

Schedule = Callable[[Tensor], Tensor]
SCHEDULES: dict[str, Callable[..., Schedule]] = {}  # by name
Arguments = ParamSpec("Arguments")


def _named(make: Callable[Arguments, Schedule]) -> Callable[Arguments, Schedule]:
    """Call what ``make`` returns by the call that made it, and list it."""
    signature = inspect.signature(make)

    @wraps(make)
    def named(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Schedule:
        schedule = make(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        schedule.__qualname__ = f"{make.__name__}({', '.join(map(_short, bound.args))})"
        return schedule

    SCHEDULES[make.__name__] = named
    return named


@_named
def linear(steps: int, start: float = 0.0, end: float = 1.0) -> Schedule:
    """From ``start`` to ``end`` over ``steps`` steps, then constant; ``linear(n)`` is KL warm-up
    (Bowman et al. 2016)."""
    _positive("linear", steps=steps)

    def schedule(step: Tensor) -> Tensor:
        return start + (end - start) * torch.clamp(step / steps, max=1.0)

    return schedule


@_named
def cosine(steps: int, start: float = 0.0, end: float = 1.0) -> Schedule:
    """From ``start`` to ``end`` along half a cosine over ``steps`` steps, then constant
    (Loshchilov & Hutter 2017, without restarts)."""
    _positive("cosine", steps=steps)

    def schedule(step: Tensor) -> Tensor:
        left = (1 + torch.cos(math.pi * torch.clamp(step / steps, max=1.0))) / 2
        return end + (start - end) * left

    return schedule


@_named
def cyclical(
    steps: int, cycles: int = 4, ratio: float = 0.5, start: float = 0.0, end: float = 1.0
) -> Schedule:
    """``cycles`` times from ``start`` to ``end`` within ``steps`` steps, then constant
    (Fu et al. 2019).

    Args:
        ratio: part of a cycle in which the value rises, in (0, 1]; it stays at ``end`` for the rest.
    """
    _positive("cyclical", steps=steps, cycles=cycles)
    if not 0 < ratio <= 1:
        raise ValueError(f"cyclical: came ratio={ratio}, wanted a number in (0, 1]")

    def schedule(step: Tensor) -> Tensor:
        within = torch.remainder(step * cycles, steps) / steps  # whole numbers: nothing is rounded
        part = torch.where(step < steps, within, 1.0)
        return start + (end - start) * torch.clamp(part / ratio, max=1.0)

    return schedule


@_named
def exponential(rate: float, end: float, start: float = 1.0, every: int = 1) -> Schedule:
    """max(end, start exp(-rate t)), t the step rounded down to a multiple of ``every``: how the
    temperature of relaxed discrete draws falls (Jang et al. 2017)."""
    _positive("exponential", rate=rate, every=every)

    def schedule(step: Tensor) -> Tensor:
        t = every * torch.div(step, every, rounding_mode="floor")
        return torch.clamp(start * torch.exp(-rate * t), min=end)

    return schedule


@_named
def piecewise(*points: tuple[float, float]) -> Schedule:
    """Straight lines between points ``(step, value)``, constant before the first and after the last:
    ``piecewise((1000, 0), (2000, 1))`` is a warm-up that starts late."""
    lines = [(a, b, high - low) for (a, low), (b, high) in pairwise(points)]
    if not points or any(a >= b for a, b, _ in lines):
        raise ValueError(f"piecewise: came {points}, wanted (step, value) by rising steps")
    first = points[0][1]

    def schedule(step: Tensor) -> Tensor:
        rises = [rise * torch.clamp((step - a) / (b - a), 0.0, 1.0) for a, b, rise in lines]
        return torch.stack([first + 0.0 * step, *rises]).sum(0)

    return schedule


def value(number: float | Schedule, step: Tensor) -> float | Tensor:
    """The number itself, or the schedule's value at ``step``."""
    return number(step) if callable(number) else number


def not_negative(part: str, **given: float | Schedule | Mapping[str, float | Schedule]) -> None:
    """Refuse numbers below 0, naming the argument; what a schedule will give is not asked."""
    for name, came in given.items():
        for number in came.values() if isinstance(came, Mapping) else [came]:
            if not callable(number) and not number >= 0:
                raise ValueError(
                    f"{part}: came {name}={number}, wanted a number >= 0 or a schedule"
                )


def shown(number: Any) -> str:
    """A number, or the call that made a schedule or a view; by site where there are several."""
    if isinstance(number, Mapping):
        return f"{{{', '.join(f'{site}: {shown(of)}' for site, of in number.items())}}}"
    return str(getattr(number, "__qualname__", number))


def parse(text: str) -> Schedule | None:
    """The schedule that ``"cosine(1000, 0, 1)"`` names; None for what is no call.

    Raises:
        ValueError: an unknown name, or arguments that the schedule refuses.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        return None
    if not isinstance(call, ast.Call):
        return None
    name = ast.unparse(call.func)
    if name not in SCHEDULES:
        raise ValueError(f"schedule: came {text!r}, wanted one of {list(SCHEDULES)}")
    try:
        named = {keyword.arg or "": _literal(keyword.value) for keyword in call.keywords}
        return SCHEDULES[name](*map(_literal, call.args), **named)
    except TypeError:
        wanted = ", ".join(inspect.signature(SCHEDULES[name]).parameters)
        raise ValueError(f"schedule: came {text!r}, wanted {name}({wanted})") from None


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise TypeError from None


def _positive(schedule: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{schedule}: came {name}={number}, wanted a positive number")


def _short(number: Any) -> str:
    """A number as it is typed: 1.0 is 1."""
    if isinstance(number, tuple):
        return f"({', '.join(map(_short, number))})"
    return repr(number).removesuffix(".0")
