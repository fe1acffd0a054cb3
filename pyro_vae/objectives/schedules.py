"""Schedules: functions of a step tensor that stay tensors.

A Python float would be frozen into a traced graph. Wherever an objective takes a number, it takes a
schedule too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Schedule", "linear", "value"]

Schedule = Callable[[Tensor], Tensor]


def linear(steps: int, start: float = 0.0, end: float = 1.0) -> Schedule:
    """From ``start`` to ``end`` over ``steps`` steps, then constant; ``linear(n)`` is KL warm-up."""
    if steps <= 0:
        raise ValueError(f"linear: came steps={steps}, wanted a positive number")

    def schedule(step: Tensor) -> Tensor:
        return start + (end - start) * torch.clamp(step / steps, max=1.0)

    schedule.__qualname__ = f"linear({steps}, {start:g}, {end:g})"
    return schedule


def value(number: float | Schedule, step: Tensor) -> float | Tensor:
    """The number itself, or the schedule's value at ``step``."""
    return number(step) if callable(number) else number
