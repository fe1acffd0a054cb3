"""What a section is told, and the file that it fills."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, write
from benchmarks.speed.cases import Case

__all__ = ["Options", "Results"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """
    Attributes:
        device: ``cpu`` or ``cuda``, where threads are left as they are.
        threads: cores of each process, one table for each number.
        rounds: in which the competitors take turns; ``seconds``: of each turn.
        draws: of each loss that is compared; ``repeats``: of what starts a process.
        jobs: processes at a time, where nothing is timed.
        combinations: how many coverage tries, or None for all.
        cases, competitors: those to leave in, or None.
        results: folder of the files; ``resume``: keep what they have from the same settings.
        quick: little of everything, for tests.
    """

    device: str = "cpu"
    threads: tuple[int, ...] = (1, 2)
    rounds: int = 15
    seconds: float = 0.5
    draws: int = 200
    repeats: int = 9
    jobs: int = 2
    combinations: int | None = None
    cases: tuple[str, ...] | None = None
    competitors: tuple[str, ...] | None = None
    results: Path = RESULTS
    resume: bool = False
    quick: bool = False

    def chosen(self, cases: Mapping[str, Case]) -> list[Case]:
        return [c for name, c in cases.items() if self.cases is None or name in self.cases]

    def settings(self) -> Record:
        """What is written beside the numbers."""
        quiet = ("cases", "competitors", "results", "resume", "jobs", "combinations")
        mine = {name: value for name, value in asdict(self).items() if name not in quiet}
        about = {
            "validation": "off for all",
            "optimizer": "Adam 1e-3",
            "dtype": "float32, no TF32",
            **{name: _version(name) for name in ("numpyro", "jax")},
        }
        return {**mine, "threads": list(self.threads), **about}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@dataclass
class Results:
    """``NAME.json`` and ``NAME.txt``, written anew with every record, so that nothing is lost."""

    name: str
    options: Options
    table: Callable[[list[Record]], str]
    records: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.options.device != "cpu":
            self.name += f"_{self.options.device}"
        file = self.options.results / f"{self.name}.json"
        if self.options.resume and file.exists():
            kept = json.loads(file.read_text())
            if kept["settings"] == json.loads(json.dumps(self.options.settings())):
                self.records = kept["records"]

    def has(self, **key: Any) -> bool:
        """Whether a record of that key is there already."""
        return any(all(r.get(k) == v for k, v in key.items()) for r in self.records)

    def add(self, records: list[Record]) -> None:
        """Write them, and print a table of what is new."""
        self.records += records
        settings, table = self.options.settings(), self.table(self.records)
        write(self.name, settings, self.records, table, self.options.results, show=False)
        print(f"\n{self.name}\n{self.table(records)}", flush=True)
