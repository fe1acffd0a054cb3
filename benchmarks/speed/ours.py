"""The step of pyro_vae: a pair of the public builders, by ``make_step`` or by ``fit`` itself."""

from __future__ import annotations

from queue import Queue
from threading import Thread
from typing import Any

import torch
from torch import Tensor

import pyro_vae as pv
from benchmarks.speed.cases import LR, Case, our_pair, rows
from benchmarks.speed.runner import Runner, torch_runner, waiting
from benchmarks.speed.stock import TwoLatents
from pyro_vae.compiled import make_step
from pyro_vae.training import epochs as training

__all__ = ["make", "objective", "programs"]


def objective(case: Case) -> pv.Objective:
    return pv.elbo() if case.particles == 1 else pv.iwae(case.particles)


def programs(case: Case) -> tuple[Any, Any]:
    """The ready pair; for two latents stock Pyro's, unchanged."""
    if case.upper is None:
        return our_pair(case)
    pair = TwoLatents(case)
    return pair.model, pair.guide


def data(case: Case, device: str, number: int | None = None) -> Any:
    x = rows(case, number).to(device)
    return x if case.upper is not None else pv.Batch({"x": x})


def make(case: Case, device: str, pick: bool, way: str) -> Runner:
    """``way`` is a level of ``make_step``."""
    if pick:
        return fitting(case, device, way)
    loss = objective(case)(*programs(case)).to(device)
    loss.train()
    parameters = list(loss.parameters())
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)  # as fit takes it if told nothing
    step: Any = make_step(loss, parameters, optimizer, level=way)

    def about() -> dict[str, str]:
        return {name: str(getattr(step, name, "")) for name in ("level", "reason")}

    return torch_runner(step, data(case, device, case.batch), parameters, device, about)


def fitting(case: Case, device: str, level: str) -> Runner:
    """``fit`` in a thread of its own, which waits before every epoch until it is asked for it.

    It waits where it asks for the order of the rows: a callback would cost time, since what one may
    have changed is looked for after it.
    """
    asked: Queue[None] = Queue()
    done: Queue[BaseException | None] = Queue()
    order = training.order

    def when_asked(rows: int, seed: int, epoch: int) -> Tensor:
        done.put(None)
        asked.get()
        return order(rows, seed, epoch)

    def train() -> None:
        try:
            pv.fit(
                *programs(case),
                data(case, device),
                objective(case),
                epochs=10**6,
                batch_size=case.batch,
                compile=level,
                device=device,
                progress=False,
            )
        except Exception as error:
            done.put(error)

    def over() -> None:
        if (error := done.get()) is not None:
            raise error

    def repeat(n: int) -> None:
        for _ in range(n):
            asked.put(None)
            over()

    training.order = when_asked
    Thread(target=train, daemon=True).start()
    over()  # all that comes before the first epoch
    return Runner(repeat, lambda: None, waiting(device), case.rows // case.batch)
