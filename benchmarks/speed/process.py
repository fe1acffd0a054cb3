"""A process for each competitor, which steps when it is asked: they take turns, in rounds.

In one process the thread pools of PyTorch and JAX would disturb each other. Those that are not asked
sleep. Cores are given by the affinity of this process, which children inherit: JAX sizes its threads
by it, PyTorch is told.
"""

from __future__ import annotations

import math
import multiprocessing as mp
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pyro
import torch

from benchmarks.speed.cases import Case
from benchmarks.speed.competitors import COMPETITORS
from benchmarks.speed.runner import Runner, losses, timed, trained

__all__ = [
    "Failed",
    "Job",
    "Worker",
    "available",
    "cores",
    "interleaved",
    "one_line",
    "prepared",
    "quartiles",
    "serve",
    "settle",
    "started",
]


class Failed(Exception):
    """What went wrong in another process, in one line."""


@dataclass(frozen=True)
class Job:
    """What a process does: one competitor at one case, on a fixed batch or with rows to pick."""

    case: Case
    name: str
    device: str
    threads: int
    pick: bool = False

    def key(self) -> dict[str, Any]:
        """What a record of it begins with."""
        about = {"net": self.case.net, "batch": self.case.batch, "K": self.case.particles}
        who = {"competitor": self.name, "label": COMPETITORS[self.name].label}
        where = {"device": self.device, "threads": self.threads}
        return {"case": self.case.name, **about, **who, **where, "failed": ""}


class Worker:
    """Another process that serves ``target(connection, *args)``."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        context = mp.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_guarded, args=(target, theirs, *args))
        self.process.start()
        theirs.close()

    def answer(self, within: float | None = None) -> Any:
        """What it says next.

        Raises:
            Failed: an error there, its end, or nothing within so many seconds.
        """
        try:
            if not self.connection.poll(within):
                self.process.kill()
                raise Failed(f"no answer within {within:g} s")
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(10)
            raise Failed(f"the process ended (exit code {self.process.exitcode})") from None
        if isinstance(answer, Failed):
            raise answer
        return answer

    def ask(self, *question: Any, within: float | None = None) -> Any:
        with suppress(BrokenPipeError, ConnectionResetError):  # answer() finds out why
            self.connection.send(question)
        return self.answer(within)

    def close(self) -> None:
        self.connection.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _guarded(target: Callable[..., None], connection: Connection, *args: Any) -> None:
    try:
        target(connection, *args)
    except EOFError:  # the other end is closed: enough
        pass
    except Exception as error:
        connection.send(Failed(one_line(error)))


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def serve(connection: Connection, job: Job) -> None:
    """Make the competitor, take its first steps, say how long that took, then answer."""
    since = time.perf_counter()
    with prepared(job) as runner:
        first = time.perf_counter() - since
        settle(runner)
        ready = {"first_s": first, "settled_s": time.perf_counter() - since, "unit": runner.unit}
        connection.send({**ready, **runner.about()})
        ways: dict[str, Callable[..., Any]] = {"time": timed, "losses": losses, "trained": trained}
        while True:
            what, *args = connection.recv()
            connection.send(ways[what](runner, *args))


@contextmanager
def prepared(job: Job) -> Iterator[Runner]:
    """The competitor after its first step, in this process."""
    if job.threads:
        torch.set_num_threads(job.threads)
    torch.set_float32_matmul_precision("highest")
    with pyro.validation_enabled(False):
        runner = COMPETITORS[job.name].make(job.case, job.device, job.pick)
        settle(runner, 1)
        yield runner


def settle(runner: Runner, steps: int = 5) -> None:
    """Steps after which a competitor has compiled what it will: ours waits for a second batch."""
    runner.repeat(max(1, steps // runner.unit))
    runner.wait()


def available() -> int:
    """Cores that this process may use."""
    counted = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if counted else os.cpu_count() or 1


@contextmanager
def cores(threads: int) -> Iterator[None]:
    """For processes that are started here; 0 leaves them as they are."""
    wanted = ENVIRONMENT | {name: str(threads) for name in THREADS if threads}
    before = {name: os.environ.get(name) for name in wanted}
    able = hasattr(os, "sched_setaffinity") and threads > 0
    mask = os.sched_getaffinity(0) if able else set()
    os.environ.update(wanted)
    try:
        if able:
            os.sched_setaffinity(0, sorted(mask)[:threads])
        yield
    finally:
        if able:
            os.sched_setaffinity(0, mask)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# No pool of compilers that outlives a compilation; JAX takes no more of the GPU than it needs.
ENVIRONMENT = {
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


@contextmanager
def started(jobs: Mapping[str, Job]) -> Iterator[tuple[dict[str, Worker], dict[str, Any]]]:
    """Processes that are ready, by name, and of every name what it said: a dict, or ``Failed``."""
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        said: dict[str, Any] = {}
        for name, job in jobs.items():
            with cores(job.threads):
                workers[name] = Worker(serve, job)
            stack.callback(workers[name].close)
        for name, worker in list(workers.items()):
            try:
                said[name] = worker.answer()
            except Failed as error:
                said[name] = error
                del workers[name]
        yield workers, said


def interleaved(
    workers: dict[str, Worker], rounds: int, seconds: float
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, str]]:
    """Seconds of one count, in all and of CPU, one pair a round, by name; and why those that failed
    did.

    Each is asked once a round, in an order that turns, for as many counts as take ``seconds``.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    failed: dict[str, str] = {}

    def ask(name: str, n: int) -> tuple[float, float]:
        try:
            each, worked = (value / n for value in workers[name].ask("time", n))
        except Failed as error:
            failed[name] = str(error)
            return math.nan, math.nan
        return each, worked

    counts = {name: _count(partial(ask, name), seconds) for name in workers}
    names = list(workers)
    for k in range(rounds):
        turn = k % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            if name not in failed:
                found[name].append(ask(name, counts[name]))
    return {name: times for name, times in found.items() if name not in failed}, failed


def _count(ask: Callable[[int], tuple[float, float]], seconds: float) -> int:
    """How many counts take about that long."""
    n = 1
    while (each := ask(n)[0]) * n < seconds / 5:
        n = max(2 * n, int(seconds / 5 / each))
    return max(1, round(seconds / each)) if each > 0 else 1


def quartiles(values: Any) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, middle, high = np.quantile(np.asarray(values), [0.25, 0.5, 0.75])
    return float(middle), float(low), float(high)
