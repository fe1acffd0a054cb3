"""What does a penalty on the aggregate posterior cost, beside a step without one?

Time of a training step over that of the plain ELBO, all in one process and in rounds that take turns;
peak resident memory of a fresh process each. The Bernoulli net 784-400-20 at 1024 rows.

    python -m benchmarks.penalties
    ... --levels eager --threads 1 --rounds 5
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import nn

from benchmarks.memory import resident
from benchmarks.report import write
from benchmarks.speed.cases import CASES, LR, our_pair, rows
from pyro_vae.batch import Batch
from pyro_vae.compiled import make_step
from pyro_vae.nn import mlp
from pyro_vae.objectives import Objective
from pyro_vae.objectives.penalties import (
    DIP,
    MMD,
    Adversarial,
    MutualInformation,
    Penalty,
    Sinkhorn,
    SlicedWasserstein,
    TotalCorrelation,
)

CASE = CASES["mnist"]
PLAIN = "elbo"
TOTAL = 60_000


def critic() -> nn.Module:
    return mlp((CASE.latent, 256, 256, 1), nn.ReLU)


PENALTIES: dict[str, Callable[[], tuple[Penalty, ...]]] = {
    PLAIN: lambda: (),
    "MMD rbf": lambda: (MMD(),),
    "MMD imq, 7 scales": lambda: (MMD(kernel="imq"),),
    "MMD imq, linear": lambda: (MMD(kernel="imq", estimate="linear"),),
    "mutual information": lambda: (MutualInformation(-0.5),),
    "total correlation": lambda: (TotalCorrelation(5.0),),
    "TC, stratified": lambda: (TotalCorrelation(5.0, "stratified"),),
    "TC by a critic": lambda: (Adversarial(critic(), against="permuted"),),
    "prior by a critic": lambda: (Adversarial(critic()),),
    "DIP II": lambda: (DIP(1.0),),
    "sliced Wasserstein": lambda: (SlicedWasserstein(),),
    "Sinkhorn": lambda: (Sinkhorn(),),
}
MOST = {"MMD rbf": 2.0, "MMD imq, 7 scales": 2.0, "MMD imq, linear": 2.0}
MOST |= {"total correlation": 3.0, "TC, stratified": 3.0}


def stepping(name: str, level: str, size: int) -> tuple[Callable[[], Any], Any]:
    """A function that takes a step, ready, and the step itself."""
    pyro.clear_param_store()
    case = replace(CASE, batch=size)
    torch.manual_seed(0)
    loss = Objective(penalties=PENALTIES[name]())(*our_pair(case))
    loss.train()
    parameters = list(loss.parameters())
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)
    step = make_step(loss, parameters, optimizer, level=level)
    batch = Batch({"x": rows(case, size)}, total=TOTAL)
    for _ in range(4):  # a graph is made after the first
        step(batch)
    return lambda: step(batch), step


def timed(step: Callable[[], Any], seconds: float) -> float:
    """Seconds of a step."""
    since, number = time.perf_counter(), 0
    while (spent := time.perf_counter() - since) < seconds or not number:
        step()
        number += 1
    return spent / number


def times(
    names: list[str], level: str, size: int, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """A record of each penalty."""
    steps, about = {}, {}
    for name in names:
        steps[name], step = stepping(name, level, size)
        about[name] = {"level": step.level, "reason": step.reason}
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            found[name].append(timed(steps[name], seconds))
    plain = np.array(found[PLAIN])
    records = []
    for name, each in found.items():
        low, middle, high = np.quantile(np.array(each) / plain, [0.25, 0.5, 0.75])
        ratio = {"ratio": middle, "ratio_low": low, "ratio_high": high}
        records.append(
            {"penalty": name, "ms": 1e3 * float(np.median(each)), **ratio, **about[name]}
        )
    return records


def child(name: str, size: int) -> None:
    """Resident memory before the first step and at the most."""
    step, _ = stepping(name, "eager", size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    before = resident("VmRSS")
    for _ in range(5):
        step()
    print(before, resident("VmHWM"))


def peak(name: str, size: int) -> float:
    command = [sys.executable, "-m", "benchmarks.penalties", "--rows", str(size), "--child", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[1])


def table(records: dict[str, list[dict[str, Any]]], peaks: dict[str, float]) -> str:
    lines = [f"{'':20s}" + "".join(f"{level + ', ms':>14s}  over elbo   " for level in records)]
    lines[0] += "peak MiB   wanted"
    for i, name in enumerate(peaks):
        line = f"{name:20s}"
        for level in records:
            r = records[level][i]
            note = "" if r["level"] == level else f" ({r['level']})"
            line += f"{r['ms']:14.1f}  {r['ratio']:4.2f}{note:9s}"
        line += f"{peaks[name]:8.0f}"
        if most := MOST.get(name):
            met = all(found[i]["ratio"] <= most for found in records.values())
            line += f"   at most {most:g}: {'met' if met else 'MISSED'}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PENALTIES, default=list(PENALTIES))
    parser.add_argument("--levels", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a turn")
    parser.add_argument("--child", choices=PENALTIES)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    with pyro.validation_enabled(False):
        if settings.child:
            return child(settings.child, settings.rows)
        names = list(dict.fromkeys([PLAIN, *settings.only]))
        peaks = {name: peak(name, settings.rows) for name in names}
        records = {
            level: times(names, level, settings.rows, settings.rounds, settings.seconds)
            for level in settings.levels
        }
    about = {"net": CASE.net, "rows": settings.rows, "rounds": settings.rounds}
    write("penalties", about, {"steps": records, "peak_mib": peaks}, table(records, peaks))


if __name__ == "__main__":
    main()
