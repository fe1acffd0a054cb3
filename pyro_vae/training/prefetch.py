"""Where training rows are: on the device if they fit, else made ready by a thread ahead of time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pyro_vae.batch import Batch, tensors

__all__ = ["placed", "prefetched", "worthwhile"]

AHEAD = 2  # blocks that are ready or being made while another one is used
SHARE = 0.5  # of a device's free memory that data may take


def placed(data: Batch | Tensor, device: torch.device) -> Any:
    """The data on the device if they fit there, that is in half of the memory that is free; else as
    they are. What is mapped from files stays there either way."""
    if device.type == "cuda" and data.device.type == "cpu":
        free, _ = torch.cuda.mem_get_info(device)
        if sum(tensor.nbytes for tensor in tensors(data)) > SHARE * free:
            return data
    return data.to(device)


def worthwhile(device: torch.device) -> bool:
    """Whether a thread helps: where the training is on an accelerator, or torch leaves a core of the
    CPU to others. Where it does not, its loops would wait for the thread."""
    usable = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = len(usable(0)) if usable else os.cpu_count() or 1
    return device.type != "cpu" or torch.get_num_threads() < cores


@contextmanager
def prefetched(
    make: Callable[[Any], tuple[Any, ...]], items: Iterable[Any], device: torch.device
) -> Iterator[Iterator[Any]]:
    """``make(item)`` of each item, tensors and batches on ``device``, in their order: one thread makes
    them while those before are used, two of them ahead.

    An error in ``make`` is raised where its result is due, and the thread ends with the context. It
    must not draw from torch's global generator, which belongs to the training. On CUDA the thread has
    a stream of its own.
    """
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    thread = ThreadPoolExecutor(1, "prefetch")
    try:
        yield _in_turn(thread, make, items) if side is None else _beside(side, thread, make, items)
    finally:
        thread.shutdown(cancel_futures=True)


def _in_turn(
    thread: ThreadPoolExecutor, make: Callable[[Any], Any], items: Iterable[Any]
) -> Iterator[Any]:
    items = iter(items)
    waiting = deque(thread.submit(make, item) for item in islice(items, AHEAD))
    while waiting:
        made = waiting.popleft().result()
        waiting.extend(thread.submit(make, item) for item in islice(items, 1))
        yield made


def _beside(
    side: torch.cuda.Stream,
    thread: ThreadPoolExecutor,
    make: Callable[[Any], Any],
    items: Iterable[Any],
) -> Iterator[Any]:
    """Likewise, on a stream: the caller's waits for what it is given, and until it has done with
    that, the memory is not used for anything else."""

    def made_beside(item: Any) -> tuple[Any, torch.cuda.Event]:
        with torch.cuda.stream(side):
            return make(item), side.record_event()

    side.wait_stream(torch.cuda.current_stream(side.device))  # for the data
    for made, event in _in_turn(thread, made_beside, items):
        stream = torch.cuda.current_stream(side.device)
        stream.wait_event(event)
        for part in made:
            for tensor in tensors(part):
                tensor.record_stream(stream)
        yield made
