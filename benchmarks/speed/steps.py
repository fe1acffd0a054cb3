"""Milliseconds of a step, of all competitors; and the check that all take the same step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from benchmarks.speed.cases import CASES, Case, constant, rows
from benchmarks.speed.competitors import COMPETITORS, PEAK_FLOP, PEAKS, chosen, flop, missing
from benchmarks.speed.options import Options, Record, Results
from benchmarks.speed.process import Failed, Job, Worker, interleaved, quartiles, started
from benchmarks.speed.targets import OURS, ratio, verdicts

__all__ = ["cell", "fixed", "measure", "picked", "table"]

TRAINED = 100  # steps after which losses are compared once more
SIGMAS = 4.0  # standard errors that losses may differ by


def fixed(options: Options) -> None:
    """The main table: the same rows in every step."""
    results = Results("speed", options, lambda records: table(records) + verdicts(records))
    _every_case(options, results, pick=False)


def picked(options: Options) -> None:
    """Steps of a training, which pick their rows from a data set on the device."""
    _every_case(options, Results("speed_rows", options, table), pick=True)


def _every_case(options: Options, results: Results, pick: bool) -> None:
    for case in options.chosen(CASES):
        for threads in options.threads:
            if not results.has(case=case.name, threads=threads):
                names = chosen(options.competitors, pick)
                results.add(measure(case, names, threads, options, pick))


def measure(
    case: Case, names: list[str], threads: int, options: Options, pick: bool = False
) -> list[Record]:
    """One record of each competitor."""
    lacking = {name: why for name in names if (why := missing(name))}
    here = [name for name in names if name not in lacking]
    jobs = {name: Job(case, name, options.device, threads, pick) for name in here}
    with started(jobs) as (workers, said):
        checked, odd = ({}, {}) if pick else _losses(case, workers, options)
        able = {name: worker for name, worker in workers.items() if name not in odd}
        times, failed = interleaved(able, options.rounds, options.seconds)
    unmade = {name: str(why) for name, why in said.items() if isinstance(why, Failed)}
    failed = lacking | unmade | odd | failed
    needed, records = flop(case), []
    for name in names:
        record = Job(case, name, options.device, threads, pick).key()
        if name in failed:
            records.append(record | {"failed": failed[name]})
            continue
        ready: Record = said[name]
        unit = ready.pop("unit")
        seconds = [each / unit for each, _ in times[name]]
        cores = quartiles([worked / each for each, worked in times[name]])[0]
        work = PEAK_FLOP[options.device] if name in PEAKS else needed
        middle, low, high = (1000 * t for t in quartiles(seconds))
        record |= {"ms": middle, "ms_low": low, "ms_high": high, "seconds": seconds}
        record |= {"gflops": work / middle / 1e6, "cores": cores} | checked.get(name, {}) | ready
        records.append(record)
    return records


def _losses(
    case: Case, workers: dict[str, Worker], options: Options
) -> tuple[dict[str, Record], dict[str, str]]:
    """Mean loss of each at the same parameters, how far it is off that of the first, in standard
    errors of the difference, and the loss after some steps; and why those that failed did."""
    found: dict[str, Record] = {}
    failed: dict[str, str] = {}
    for name, worker in workers.items():
        if name in PEAKS:
            continue
        try:
            draws = np.array(worker.ask("losses", options.draws))
            after = worker.ask("trained", TRAINED)
        except Failed as why:
            failed[name] = str(why)
            continue
        offset = constant(case, rows(case, case.batch)) if name.startswith("hand") else 0.0
        mean, error = float(draws.mean()) - offset, float(draws.std()) / math.sqrt(len(draws))
        found[name] = {"loss": mean, "loss_se": error, "trained": after - offset}
    first = next(iter(found.values()), None)
    for record in found.values():
        assert first is not None
        spread = math.hypot(record["loss_se"], first["loss_se"])
        record["z"] = (record["loss"] - first["loss"]) / spread if record is not first else 0.0
    return found, failed


# ---------------------------------------------------------------------------------------------
# The table


def table(records: list[Record]) -> str:
    """A paragraph for each case and number of threads."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record["case"], record["threads"]), []).append(record)
    return "\n\n".join("\n".join(_paragraph(group)) for group in groups.values())


def _paragraph(records: list[Record]) -> list[str]:
    ran = {r["competitor"]: r for r in records if not r["failed"]}
    reference = next((name for name in OURS if name in ran), next(iter(ran), ""))
    head = records[0]
    of = f"x {COMPETITORS[reference].label}" if reference else ""
    bound = f"IWAE, K = {head['K']}" if head["K"] > 1 else "ELBO"
    lost = f"   {'loss':18s} {'z':>5s}   after {TRAINED}"
    lost = lost if any("loss" in r for r in records) else ""
    threads = f", threads {head['threads']}" if head["threads"] else ""
    lines = [
        f"{head['case']}: {head['net']}, batch {head['batch']}, {bound}, {head['device']}{threads}",
        f"{'':30s} {'ms per step':25s} {of:26s} {'GFLOP/s':>8s} {'cores':>6s}" + lost,
    ]
    for record in records:
        label = record["label"]
        if record["failed"]:
            lines.append(f"{label:30s} not run: {record['failed']}")
            continue
        line = f"{label:30s} {cell(record):25s} "
        line += (
            f"{_times(ran[reference], record):26s} {record['gflops']:8.1f} {record['cores']:6.2f}"
        )
        if "loss" in record:
            loss = f"{record['loss']:.2f} ± {record['loss_se']:.2f}"
            line += f"   {loss:18s} {record['z']:+5.1f}   {record['trained']:.2f}"
            line += "" if abs(record["z"]) < SIGMAS else "   NOT THE SAME LOSS"
        lines.append(line + _level(record))
    return lines


def _times(reference: Record, record: Record) -> str:
    if record["competitor"] in (*PEAKS, reference["competitor"]):
        return ""
    middle, low, high = ratio(record, reference)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def cell(record: Record) -> str:
    """A time with its quartiles."""
    ms = [record[name] for name in ("ms", "ms_low", "ms_high")]
    digits = max(0, 2 - math.floor(math.log10(ms[0])))
    middle, low, high = (f"{value:.{digits}f}" for value in ms)
    return f"{middle} [{low}, {high}]"


def _level(record: dict[str, Any]) -> str:
    """Where ours is not at the level that was asked for."""
    level = record.get("level", "")
    if level in ("", record["competitor"]):
        return ""
    return f"   at level {level}: {record['reason']}"
