"""Peak memory of a step: resident memory of the process, or what PyTorch has on the GPU."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import resident
from benchmarks.speed.cases import CASES
from benchmarks.speed.competitors import COMPETITORS, PEAKS, chosen, missing
from benchmarks.speed.options import Options, Record, Results
from benchmarks.speed.process import Failed, Job, Worker, cores, prepared, settle

__all__ = ["memory"]

STEPS = 50


def memory(options: Options) -> None:
    results = Results("speed_memory", options, _table)
    names = [n for n in chosen(options.competitors, False) if n not in PEAKS and not missing(n)]
    if options.device == "cuda":  # JAX has an allocator of its own
        names = [name for name in names if COMPETITORS[name].needs == "torch"]
    threads = options.threads[-1]
    for case in options.chosen(CASES):
        if not results.has(case=case.name):
            jobs = [Job(case, name, options.device, threads) for name in names]
            results.add([job.key() | _measured(job) for job in jobs])


def _measured(job: Job) -> Record:
    with cores(job.threads):
        worker = Worker(_serve, job)
    try:
        record: Record = worker.answer()
        return record
    except Failed as error:
        return {"failed": str(error)}
    finally:
        worker.close()


def _serve(connection: Connection, job: Job) -> None:
    found: dict[str, Any] = {"failed": "", "imported_mib": resident("VmRSS")}
    with prepared(job) as runner:
        settle(runner)
        found["started_mib"] = resident("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
        if job.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        runner.repeat(STEPS)
        runner.wait()
    found["steps_mib"] = resident("VmHWM")
    if job.device == "cuda":
        found["gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
    connection.send(found)


def _table(records: list[Record]) -> str:
    gpu = any("gpu_mib" in r for r in records)
    lines = [f"{'MiB':46s}  imported  first steps, peak  later steps, peak" + gpu * "   GPU, peak"]
    for r in records:
        start = f"{r['case']:14s}  {r['label']:30s}  "
        if r["failed"]:
            lines.append(f"{start}not run: {r['failed']}")
            continue
        line = f"{r['imported_mib']:8.0f}  {r['started_mib']:17.0f}  {r['steps_mib']:17.0f}"
        lines.append(start + line + (f"  {r['gpu_mib']:10.1f}" if gpu else ""))
    return "\n".join(lines)
