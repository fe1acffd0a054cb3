"""Does the memory of an evaluation grow with the number of particles?

Peak resident memory of a fresh process that evaluates MNIST rows with K particles.

    PYRO_VAE_DATA=... python -m benchmarks.memory
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

import pyro_vae as pv
from benchmarks.report import write

KS = (50, 500, 5000, 20000)


def child(k: int, rows: int) -> None:
    torch.manual_seed(0)
    x = pv.data.load("mnist", "test", ["x"])["x"][:rows] / 255
    batch = pv.Batch({"x": torch.bernoulli(x).flatten(1)})
    model, guide = pv.pairs.vae(batch, latent=20, hidden=(400,))
    pv.evaluate(model, guide, batch, num_particles=1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    before = resident("VmRSS")
    since = time.perf_counter()
    pv.evaluate(model, guide, batch, num_particles=k)
    print(before, resident("VmHWM"), time.perf_counter() - since)


def resident(field: str) -> float:
    """Resident memory of this process (Linux), MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--child", type=int)
    settings = parser.parse_args()
    if settings.child:
        return child(settings.child, settings.rows)
    records = []
    for k in KS:
        command = [sys.executable, "-m", "benchmarks.memory", "--rows", str(settings.rows)]
        done = subprocess.run(
            [*command, "--child", str(k)], capture_output=True, text=True, check=True
        )
        before, peak, seconds = map(float, done.stdout.split())
        records.append({"K": k, "before_mib": before, "peak_mib": peak, "seconds": seconds})
    lines = ["     K   before   peak MiB   seconds", "-" * 36]
    lines += [
        f"{r['K']:6d}   {r['before_mib']:6.0f}   {r['peak_mib']:8.0f}   {r['seconds']:7.1f}"
        for r in records
    ]
    write("memory", {"rows": settings.rows, "net": "784-400-20"}, records, "\n".join(lines))


if __name__ == "__main__":
    main()
