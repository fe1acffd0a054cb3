"""What the times have to be, and what they are to become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.speed.process import quartiles

__all__ = ["OURS", "TARGETS", "Target", "ratio", "verdicts"]

Record = dict[str, Any]
OURS = ("compiled", "traced", "eager")  # the first that ran is what the others are divided by
BY_HAND = ("hand-compiled", "hand-twice", "hand-graph")
SLACK = 1.1  # of eager over stock Pyro


@dataclass(frozen=True)
class Target:
    """Time of the fastest of ``others`` over that of pyro_vae compiled.

    Attributes:
        threads: at which it holds; 0 at any.
    """

    case: str
    device: str
    threads: int
    against: str
    others: tuple[str, ...]
    must: float
    aim: float


TARGETS = (
    Target("digits", "cpu", 0, "Pyro SVI", ("svi",), 8, 20),
    Target("digits", "cpu", 0, "by hand, eager", ("hand",), 3, 6),
    Target("digits", "cpu", 0, "NumPyro, update", ("numpyro",), 1.0, 1.4),
    Target("mnist", "cpu", 2, "Pyro SVI", ("svi",), 1.4, 2),
    Target("mnist", "cpu", 2, "by hand, compiled", BY_HAND, 0.95, 1.2),
    Target("mnist", "cpu", 2, "NumPyro, update", ("numpyro",), 0.85, 1.1),
    Target("iwae", "cpu", 0, "Pyro SVI", ("svi",), 1.4, 2),
    Target("iwae", "cpu", 0, "by hand, eager", ("hand",), 1.1, 1.5),
    Target("mnist", "cuda", 0, "Pyro SVI", ("svi",), 20, 50),
    Target("mnist", "cuda", 0, "by hand, compiled", BY_HAND, 0.9, 1.0),
)


def ratio(record: Record, reference: Record) -> tuple[float, float, float]:
    """Median and quartiles over the rounds; above 1 where the reference is faster."""
    return quartiles(np.array(record["seconds"]) / np.array(reference["seconds"]))


def verdicts(records: list[Record]) -> str:
    """Measured, must, aim; nothing for a case that was not run."""
    lines = []
    groups = dict.fromkeys((r["case"], r["device"], r["threads"]) for r in records)
    for case, device, threads in groups:
        ran = {
            r["competitor"]: r
            for r in records
            if (r["case"], r["device"], r["threads"]) == (case, device, threads) and not r["failed"]
        }
        where = f"{case}, {device}" + (f", threads {threads}" if threads else "")
        for target in TARGETS:
            if (target.case, target.device) == (case, device) and target.threads in (0, threads):
                lines.append(_line(where, target, ran))
        if {"svi", "eager"} <= ran.keys():
            middle, low, high = ratio(ran["svi"], ran["eager"])
            said = "met" if middle >= 1 / SLACK else "MISSED"
            measured = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
            lines.append(
                f"{where:26s} {'eager: Pyro SVI':20s} {measured:22s} {1 / SLACK:6.2f} {1:6g}   {said}"
            )
    if not lines:
        return ""
    head = f"{'':26s} {'over pyro_vae':20s} {'measured':22s} {'must':>6s} {'aim':>6s}"
    return "\n".join(["", "", head, *lines])


def _line(where: str, target: Target, ran: dict[str, Record]) -> str:
    others = [ran[name] for name in target.others if name in ran]
    start = f"{where:26s} {target.against:20s} "
    end = f"{target.must:6g} {target.aim:6g}"
    if "compiled" not in ran or not others:
        lacking = "compiled" if "compiled" not in ran else target.against
        return f"{start}{f'not run: {lacking}':22s} {end}"
    best = min(others, key=lambda record: record["ms"])
    middle, low, high = ratio(best, ran["compiled"])
    said = "aim met" if middle >= target.aim else "met" if middle >= target.must else "MISSED"
    if len(target.others) > 1:
        said += f" ({best['label']})"
    if (level := ran["compiled"].get("level", "compiled")) != "compiled":
        said += f" (pyro_vae at level {level})"
    return f"{start}{f'{middle:.2f} [{low:.2f}, {high:.2f}]':22s} {end}   {said}"
