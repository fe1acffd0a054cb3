"""Does the memory of a training step grow with the number of particles?

Peak resident memory and time of steps of the importance weighted bound in a fresh process each: all K
particles at once, and in chunks that backward runs again. 784-400-20 with a Bernoulli likelihood. Blocks
above 64 KiB are mapped one by one, or glibc keeps some of what was freed, about 1 MiB a chunk.

    python -m benchmarks.chunks
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch

from benchmarks.memory import resident
from benchmarks.report import write
from benchmarks.speed.cases import CASES, LR, our_pair, rows
from pyro_vae.batch import Batch
from pyro_vae.compiled import make_step
from pyro_vae.objectives import iwae

KS = {None: (10, 100, 1000), 10: (10, 100, 1000)}  # by chunk
STEPS = 3
MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}


def child(k: int, chunk: int | None, size: int) -> None:
    """Resident memory before the steps and at the most, and seconds of a step."""
    case = replace(CASES["mnist"], batch=size)
    loss = iwae(k, chunk=chunk)(*our_pair(case))
    parameters = list(loss.parameters())
    step = make_step(
        loss, parameters, torch.optim.Adam(parameters, lr=LR, fused=True), level="eager"
    )
    small, batch = (Batch({"x": rows(case, number)}) for number in (1, size))
    step(small)  # the optimizer makes its state
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    before, since = resident("VmRSS"), time.perf_counter()
    for _ in range(STEPS):
        step(batch)
    print(before, resident("VmHWM"), (time.perf_counter() - since) / STEPS)


def measured(k: int, chunk: int | None, size: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.chunks", "--rows", str(size), "--child", str(k)]
    command += ["--chunk", str(chunk)] if chunk else []
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | MAPPED
    )
    before, peak, seconds = map(float, done.stdout.split())
    about = {"K": k, "chunk": chunk, "before_mib": before, "peak_mib": peak}
    return {**about, "seconds_per_step": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--child", type=int, metavar="K")
    parser.add_argument("--chunk", type=int)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    with pyro.validation_enabled(False):
        if settings.child:
            return child(settings.child, settings.chunk, settings.rows)
    records = [measured(k, chunk, settings.rows) for chunk, ks in KS.items() for k in ks]
    lines = ["     K   chunk   before   peak MiB   seconds per step", "-" * 51]
    lines += [
        f"{r['K']:6d}   {r['chunk'] or '':5}   {r['before_mib']:6.0f}   {r['peak_mib']:8.0f}   "
        f"{r['seconds_per_step']:8.3f}"
        for r in records
    ]
    write("chunks", {"rows": settings.rows, "net": "784-400-20"}, records, "\n".join(lines))


if __name__ == "__main__":
    main()
