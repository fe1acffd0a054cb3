"""How the time of a step grows with particles, rows and width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.speed.cases import CASES, Case
from benchmarks.speed.options import Options, Record, Results
from benchmarks.speed.steps import cell, measure
from benchmarks.speed.targets import ratio

__all__ = ["points", "scaling", "table"]

NAMES = ("compiled", "eager", "svi")
PARTICLES = (2, 5, 20, 50, 200)
BATCHES = (10, 30, 100, 300, 1000)
WIDTHS = (50, 100, 200, 400, 800, 1600)


def points() -> Iterator[tuple[str, int, Case]]:
    """What grows, how far, and the case."""
    for k in PARTICLES:
        yield "K", k, replace(CASES["iwae"], particles=k)
    for size in BATCHES:
        yield "batch", size, replace(CASES["mnist"], batch=size)
    for width in WIDTHS:
        yield "width", width, replace(CASES["mnist"], hidden=(width,))


def scaling(options: Options) -> None:
    results = Results("speed_scaling", options, table)
    names = [name for name in NAMES if options.competitors is None or name in options.competitors]
    for axis, value, case in points():
        if options.cases is not None and case.name not in options.cases:
            continue
        for threads in options.threads:
            if not results.has(axis=axis, value=value, threads=threads):
                found = measure(case, names, threads, options)
                results.add([r | {"axis": axis, "value": value} for r in found])
        if options.quick:
            break


def table(records: list[Record]) -> str:
    """A line for each point."""
    lines = [f"{'':16s} threads  " + "".join(f"{name:>24s}" for name in NAMES) + "   ms per step"]
    groups: dict[tuple[str, int, int], list[Record]] = {}
    for r in records:
        groups.setdefault((r["axis"], r["value"], r["threads"]), []).append(r)
    for (axis, value, threads), group in groups.items():
        ran = {r["competitor"]: r for r in group if not r["failed"]}
        line = f"{axis:>6s} {value:6d}    {threads:7d}  "
        line += "".join(f"{cell(ran[n]) if n in ran else 'not run':>24s}" for n in NAMES)
        if {"compiled", "svi"} <= ran.keys():
            line += f"   Pyro SVI / compiled {ratio(ran['svi'], ran['compiled'])[0]:.2f}"
        if {"eager", "svi"} <= ran.keys():
            line += f"   Pyro SVI / eager {ratio(ran['svi'], ran['eager'])[0]:.2f}"
        lines.append(line)
    return "\n".join(lines)
