"""``python -m benchmarks.speed``: all sections, or those named by ``--only``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import speed
from benchmarks.speed.cases import CASES
from benchmarks.speed.competitors import COMPETITORS
from benchmarks.speed.coverage import coverage
from benchmarks.speed.memory import memory
from benchmarks.speed.options import Options
from benchmarks.speed.process import available
from benchmarks.speed.scaling import scaling
from benchmarks.speed.starting import first_step, imports
from benchmarks.speed.steps import fixed, picked

SECTIONS = {
    "steps": fixed,
    "rows": picked,
    "scaling": scaling,
    "memory": memory,
    "imports": imports,
    "first": first_step,
    "coverage": coverage,
}
QUICK = {"rounds": 2, "seconds": 0.02, "draws": 10, "repeats": 1, "quick": True}


def main(arguments: list[str] | None = None) -> None:
    usual = Options()
    able = [threads for threads in usual.threads if threads <= available()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=speed.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--competitors", nargs="+", choices=COMPETITORS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=usual.device)
    parser.add_argument("--threads", nargs="+", type=int, default=able)
    parser.add_argument("--rounds", type=int, default=usual.rounds)
    parser.add_argument("--seconds", type=float, default=usual.seconds, help="of a turn")
    parser.add_argument("--draws", type=int, default=usual.draws, help="of the losses compared")
    parser.add_argument("--repeats", type=int, default=usual.repeats, help="of what starts afresh")
    parser.add_argument("--jobs", type=int, default=usual.jobs, help="for coverage alone")
    parser.add_argument("--combinations", type=int, help="for coverage; all without it")
    parser.add_argument("--results", type=Path, default=usual.results, help="folder of the files")
    parser.add_argument("--resume", action="store_true", help="keep what the same settings gave")
    parser.add_argument("--quick", action="store_true", help="little of everything, one thread")
    given = vars(parser.parse_args(arguments))
    only = given.pop("only")
    if given["device"] == "cuda" and not torch.cuda.is_available():
        parser.error("--device: came cuda, and torch finds none here")
    if max(given["threads"]) > available():
        parser.error(f"--threads: came {given['threads']}, and there are {available()} cores")
    for name in ("threads", "cases", "competitors"):
        given[name] = given[name] and tuple(given[name])
    options = Options(**given)
    if options.quick:  # nothing that it prints is a result
        folder = Path("runs/speed") if options.results == usual.results else options.results
        options = replace(options, **QUICK, threads=(1,), results=folder)  # type: ignore[arg-type]
    if options.device == "cuda":  # the host has to keep up; autograd has a thread of its own
        options = replace(options, threads=(0,))
    for name in only:
        SECTIONS[name](options)


if __name__ == "__main__":
    main()
