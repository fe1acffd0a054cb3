"""A competitor that is ready to step, and how its time and its loss are taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.cases import Case, rows

__all__ = ["Runner", "by_epochs", "losses", "picked", "timed", "torch_runner", "trained"]


@dataclass
class Runner:
    """What a process drives.

    Attributes:
        repeat: takes n steps and returns the last loss, in nats per row or None; the loss need not
            be there yet.
        reset: puts the first parameters back, the optimizer's moments stay.
        wait: until all that was asked for is done.
        unit: steps of one count of ``repeat``.
        about: what to say of it, after the first step.
    """

    repeat: Callable[[int], Any]
    reset: Callable[[], None]
    wait: Callable[[], None]
    unit: int = 1
    about: Callable[[], dict[str, str]] = field(default=dict)


def torch_runner(
    step: Callable[[Any], Any],
    batch: Any,
    parameters: Iterable[Tensor],
    device: str,
    about: Callable[[], dict[str, str]] = dict,
) -> Runner:
    """Of a function of the batch."""
    parameters = list(parameters)
    first = [p.detach().clone() for p in parameters]

    def repeat(n: int) -> Any:
        for _ in range(n):
            loss = step(batch)
        return loss

    @torch.no_grad()
    def reset() -> None:
        for p, value in zip(parameters, first, strict=True):
            p.copy_(value)

    return Runner(repeat, reset, waiting(device), about=about)


def by_epochs(
    runner: Runner, case: Case, device: str, step: Callable[[Tensor], Any], loader: Any = None
) -> Runner:
    """The same competitor, which picks its rows from a data set: whole epochs, shuffled anew."""
    data = rows(case).to(device)

    def repeat(n: int) -> Any:
        for _ in range(n):
            for batch in picked(data, case.batch) if loader is None else loader(data):
                loss = step(batch)
        return loss

    return Runner(repeat, runner.reset, runner.wait, case.rows // case.batch, runner.about)


def picked(data: Tensor, batch: int) -> Iterable[Tensor]:
    """Shuffled batches, by a permutation on the data's device."""
    for index in torch.randperm(len(data), device=data.device).split(batch):
        yield data[index]


def waiting(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def timed(runner: Runner, n: int) -> tuple[float, float]:
    """Seconds of ``n`` counts of ``repeat``, after some that warm the caches, and seconds of CPU in
    them, which say how many cores it had."""
    runner.repeat(1 + n // 10)
    runner.wait()
    since, worked = time.perf_counter(), time.process_time()
    runner.repeat(n)
    runner.wait()
    return time.perf_counter() - since, time.process_time() - worked


def losses(runner: Runner, draws: int) -> list[float]:
    """The loss at the first parameters, draw by draw, in nats per row."""
    runner.reset()
    found = []
    for _ in range(draws):
        found.append(float(runner.repeat(1)))
        runner.reset()
    return found


def trained(runner: Runner, steps: int) -> float:
    """The mean loss of the last tenth of so many steps from the first parameters."""
    runner.reset()
    last = steps // 10
    runner.repeat(steps - last)
    return sum(float(runner.repeat(1)) for _ in range(last)) / last
