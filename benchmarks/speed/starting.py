"""What is paid before the first step: imports, and compilation with a cold and a warm cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from benchmarks.speed.cases import CASES
from benchmarks.speed.competitors import chosen, missing
from benchmarks.speed.options import Options, Record, Results
from benchmarks.speed.process import Failed, Job, Worker, cores, quartiles, serve

__all__ = ["first_step", "imports"]

NAMES = ("compiled", "traced", "eager", "svi", "hand", "hand-compiled", "hand-graph", "numpyro")
BEFORE = "import torch, pyro, pyro.distributions, pyro.infer, pyro.nn, pyro.optim"
IMPORTS = {
    "torch and pyro": ("pass", BEFORE),
    "pyro_vae": ("pass", "import pyro_vae"),
    "pyro_vae after torch and pyro": (BEFORE, "import pyro_vae"),
}
IMPORT = """
import time
{before}
since = time.perf_counter()
{timed}
print(time.perf_counter() - since)
"""


def imports(options: Options) -> None:
    """Seconds of an import in a fresh process, files in memory; in rounds."""
    results = Results("speed_imports", options, _imports_table)
    if results.records:
        return
    found: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for number in range(options.repeats + 1):
        for name, (before, timed) in IMPORTS.items():
            code = IMPORT.format(before=before, timed=timed)
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            )
            if number:  # the first round reads the files
                found[name].append(float(done.stdout))
    results.add([{"what": name, "seconds": seconds} for name, seconds in found.items()])


def _imports_table(records: list[Record]) -> str:
    lines = ["import                             seconds"]
    for record in records:
        middle, low, high = quartiles(record["seconds"])
        lines.append(f"{record['what']:30s}     {middle:.2f} [{low:.2f}, {high:.2f}]")
    return "\n".join(lines)


def first_step(options: Options) -> None:
    """Seconds from imported to the end of the first step, pair and data made in between, and until
    all is compiled."""
    results = Results("speed_first_step", options, _first_table)
    names = [n for n in chosen(options.competitors or NAMES, False) if not missing(n)]
    threads = options.threads[-1]
    repeats = max(1, options.repeats // 3)
    for case in options.chosen({name: CASES[name] for name in ("digits", "iwae")}):
        if not results.has(case=case.name):
            jobs = [Job(case, name, options.device, threads) for name in names]
            results.add([job.key() | _first(job, repeats) for job in jobs])


def _first(job: Job, repeats: int) -> Record:
    cold: list[dict[str, float]] = []
    warm: list[dict[str, float]] = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for into in (cold, warm):
                try:
                    into.append(_seconds(job, folder))
                except Failed as error:
                    return {"failed": str(error)}
    return {"cold": cold, "warm": warm, "failed": ""}


def _seconds(job: Job, folder: str) -> dict[str, float]:
    """Of the first step, and of the first five."""
    with cores(job.threads):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            worker = Worker(serve, job)
        finally:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    try:
        ready = worker.answer()
    finally:
        worker.close()
    return {name: ready[name] for name in ("first_s", "settled_s")}


def _first_table(records: list[Record]) -> str:
    lines = [f"{'':46s}  first step            five steps, cold      five steps, warm cache"]
    for r in records:
        start = f"{r['case']:14s}  {r['label']:30s}  "
        if r["failed"]:
            lines.append(f"{start}not run: {r['failed']}")
            continue
        ways = (("cold", "first_s"), ("cold", "settled_s"), ("warm", "settled_s"))
        cells = []
        for which, what in ways:
            starts = [one[what] for one in r[which]]
            middle, low, high = quartiles(starts)
            spread = f" [{low:.2f}, {high:.2f}]" if len(starts) > 1 else ""
            cells.append(f"{middle:.2f}{spread}".ljust(20))
        lines.append((start + "  ".join(cells)).rstrip())
    return "\n".join(
        [
            *lines,
            "seconds from the end of the imports, medians over starts, quartiles where there are "
            "several; the first step with a cold cache",
        ]
    )
