"""A thread that makes things ahead of their turn, and what data go to a device."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_vae.batch import Batch
from pyro_vae.training.prefetch import AHEAD, placed, prefetched, worthwhile

CPU = torch.device("cpu")


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


def pair(number: int) -> tuple[Tensor]:
    return (torch.tensor([number]),)


def test_in_their_order_by_one_thread():
    seen = set()

    def make(number: int) -> tuple[Tensor]:
        seen.add(threading.get_ident())
        time.sleep(0.002 * (number % 3))
        return pair(number)

    with prefetched(make, range(20), CPU) as made:
        assert [int(one) for (one,) in made] == list(range(20))
    assert len(seen) == 1
    assert threading.get_ident() not in seen
    assert threads() == []


def test_nothing_to_make():
    with prefetched(pair, [], CPU) as made:
        assert list(made) == []


def test_two_are_made_ahead_and_no_more():
    started: list[int] = []

    def make(number: int) -> tuple[Tensor]:
        started.append(number)
        return pair(number)

    def until(count: int) -> None:
        end = time.monotonic() + 10
        while len(started) < count and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.02)  # for one too many
        assert started == list(range(count))

    with prefetched(make, iter(range(10)), CPU) as made:
        for taken in range(1, 6):
            next(made)
            until(taken + AHEAD)
    assert started == list(range(5 + AHEAD))


def test_it_goes_on_while_one_is_used():
    """The second is made while the first is in use, and not when it is asked for."""
    ready = threading.Event()

    def make(number: int) -> tuple[Tensor]:
        if number == 1:
            ready.set()
        return pair(number)

    with prefetched(make, range(3), CPU) as made:
        next(made)
        assert ready.wait(10)


def test_a_core_that_torch_leaves(monkeypatch: pytest.MonkeyPatch):
    """On a CPU; elsewhere torch needs none of them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5, 6}, raising=False)
    for used, left in ((1, True), (3, True), (4, False), (8, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda used=used: used)
        assert worthwhile(CPU) == left
        assert worthwhile(torch.device("cuda"))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    assert worthwhile(CPU)


class OddError(Exception):
    pass


def test_an_error_comes_as_it_is_and_in_its_turn():
    error = OddError("row 3")

    def make(number: int) -> tuple[Tensor]:
        if number == 3:
            raise error
        return pair(number)

    with prefetched(make, range(9), CPU) as made:
        assert [int(next(made)[0]) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OddError) as raised:
            next(made)
    assert raised.value is error
    assert threads() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OddError, GeneratorExit])
def test_what_is_waiting_is_dropped(error: type[BaseException]):
    started = []

    def make(number: int) -> tuple[Tensor]:
        started.append(number)
        time.sleep(0.05)
        return pair(number)

    def use() -> None:
        with prefetched(make, range(9), CPU) as made:
            next(made)
            raise error

    with pytest.raises(error):
        use()
    assert threads() == []
    assert len(started) <= 2


PROGRAM = """
import signal, sys, time, torch
from pyro_vae.training.prefetch import prefetched

def make(number):
    time.sleep(0.02)
    return (torch.zeros(number),)

def rows():
    with prefetched(make, range(10**6), torch.device("cpu")) as made:
        yield from made

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells may switch it off
kept = rows()
next(kept)
if sys.argv[1] == "exit":
    sys.exit(3)
print("ready", flush=True)
for _ in kept:
    pass
"""


@pytest.mark.parametrize("how", ["exit", "ctrl-c"])
def test_a_process_ends(how: str):
    """With an iterator that is still there, and with Ctrl-C while it waits for the next."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        if how == "ctrl-c":
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    if how == "exit":
        assert (process.returncode, said) == (3, "")
    else:
        assert said.splitlines()[-1] == "KeyboardInterrupt"
        assert process.returncode == -signal.SIGINT


# --- where data are -----------------------------------------------------------------------------


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the memory that is free on a device."""

    def say(memory: int) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory, 10**12))

    return say


def test_what_takes_more_than_half_of_the_free_memory_stays(free: Callable[[int], None]):
    x, device = torch.zeros(100, 3, dtype=torch.float64), torch.device("cuda")
    batch = Batch({"x": x}, {"x": x == 0}, weights=torch.zeros(100, dtype=torch.float64))
    for data, size in ((x, 2400), (batch, 2400 + 300 + 800 + 800)):
        free(2 * size - 1)
        assert placed(data, device) is data


def test_placed_on_the_host():
    x = torch.zeros(3)
    assert placed(x, CPU) is x
    assert placed(Batch({"x": x}), CPU)["x"] is x
    assert placed(Batch({"x": x}), torch.device("meta"))["x"].is_meta


@pytest.mark.gpu
def test_placed_on_an_accelerator(free: Callable[[int], None]):
    x, device = torch.zeros(100, dtype=torch.float64), torch.device("cuda")
    for data in (x, Batch({"x": x[:50]})):  # 8 bytes of data, or of data and number
        free(1600)
        assert placed(data, device).device.type == "cuda"
        free(1599)
        assert placed(data, device).device.type == "cpu"


@pytest.mark.gpu
def test_a_stream_of_its_own():
    """The caller's stream waits for what is made, and its memory is not overwritten while in use."""
    device, host = torch.device("cuda"), torch.randn(64, 1 << 16)

    def make(number: int) -> tuple[Tensor]:
        made = host[number].pin_memory().to(device, non_blocking=True)
        for _ in range(20):  # long enough to be late if nobody waits
            made = (made * 1.0).clone()
        return (made + number,)

    busy, sums = torch.randn(2048, 2048, device=device), []
    with prefetched(make, range(64), device) as made:
        for (one,) in made:
            busy = (busy @ busy).clamp(-1, 1)  # the caller's stream lags behind
            sums.append(one.double().sum())
    wanted = host.cuda().add(torch.arange(64, device=device)[:, None]).double().sum(1)
    torch.testing.assert_close(torch.stack(sums), wanted)
