"""A grid of objectives and seeds, every cell judged by the same evaluation."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import multiprocessing
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae.batch import Batch
from pyro_vae.evaluation.likelihood import (
    Difference,
    Evaluation,
    check_rows,
    evaluate,
    mean_and_error,
)
from pyro_vae.files import replacing
from pyro_vae.objectives.loss import Loss
from pyro_vae.objectives.specs import parse
from pyro_vae.training.fit import NonFiniteError, fit
from pyro_vae.training.runs import versions

__all__ = ["Comparison", "compare"]

Build = Callable[..., tuple[Any, Any]]
Spec = str | Loss | Callable[[], Loss]
Judge = Callable[[Any, Any, Batch, int], Tensor]
_BLOCK = 10_000  # rows that are looked at together
_PROCESS = uuid4().hex
_data: list[Batch] = []  # training and test rows of a worker process


@dataclass(frozen=True)
class _Cell:
    """One training and its evaluation."""

    build: Build
    name: str
    spec: Spec
    seed: int
    options: dict[str, Any]
    fit: dict[str, Any]
    num_particles: int
    judge: Judge | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.seed


@dataclass(frozen=True)
class _Done:
    """What came of a cell."""

    evaluation: Evaluation
    seconds: float
    judged: Tensor | None = None


@dataclass(repr=False)
class Comparison:
    """Evaluations of all cells, averaged over seeds and compared paired by row.

    Attributes:
        cells: (objective, seed) -> evaluation on the same rows.
        seconds: (objective, seed) -> training time.
        judged: (objective, seed) -> what the second judge said of these rows, if there is one.
        refused: (objective, seed) -> why there is no such cell.
    """

    cells: dict[tuple[str, int], Evaluation]
    seconds: dict[tuple[str, int], float] = field(default_factory=dict)
    judged: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    refused: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def objectives(self) -> list[str]:
        """Those that have a result."""
        return list(dict.fromkeys(objective for objective, _ in self.cells))

    def rows(self, objective: str, quantity: str = "log_p") -> Tensor:
        """``[N]`` nats, averaged over the seeds: of an evaluation, or ``"judged"``.

        Raises:
            ValueError: unknown objective, no second judge.
        """
        mine = [key for key in self.cells if key[0] == objective]
        if not mine:
            raise ValueError(f"came {objective!r}, wanted one of {self.objectives}")
        if quantity == "judged" and not self.judged:
            raise ValueError("came quantity='judged', but compare had no judge=")
        judged = quantity == "judged"
        found = [self.judged[k] if judged else getattr(self.cells[k], quantity) for k in mine]
        return torch.stack(found).double().mean(0)

    def versus(self, objective: str, other: str, quantity: str = "log_p") -> Difference:
        """First minus second, paired by row, averaged over seeds."""
        return Difference(
            *mean_and_error(self.rows(objective, quantity) - self.rows(other, quantity))
        )

    def refusals(self) -> list[dict[str, Any]]:
        """A record an objective and reason: ``objective``, ``seeds``, ``reason``."""
        seeds: dict[tuple[str, str], list[int]] = {}
        for (name, seed), reason in self.refused.items():
            seeds.setdefault((name, reason), []).append(seed)
        return [
            {"objective": name, "seeds": sorted(found), "reason": reason}
            for (name, reason), found in seeds.items()
        ]

    def summary(self) -> list[dict[str, Any]]:
        """A record an objective: means and standard errors over rows, spread over seeds, and the
        paired difference to the first objective."""
        records = []
        quantities = ["log_p", "log_p_tenth", "elbo", *(["judged"] if self.judged else [])]
        for objective in self.objectives:
            mine = {seed: e for (name, seed), e in self.cells.items() if name == objective}
            record: dict[str, Any] = {"objective": objective, "seeds": sorted(mine)}
            for quantity in quantities:
                record[quantity], record[f"{quantity}_se"] = mean_and_error(
                    self.rows(objective, quantity)
                )
                difference = self.versus(objective, self.objectives[0], quantity)
                record[f"{quantity}_gain"] = difference.mean
                record[f"{quantity}_gain_se"] = difference.error
            per_seed = torch.stack([e.log_p.double().mean() for e in mine.values()])
            record["log_p_per_seed"] = per_seed.tolist()
            summaries = [e.summary() for e in mine.values()]
            for name in ("num_particles", "rows", "khat_threshold"):
                record[name] = summaries[0][name]
            for name in ("ess_median", "khat_median", "khat_bad_share"):
                known = [s[name] for s in summaries if s[name] is not None]
                record[name] = float(np.mean(known)) if known else None
            record["active_units"] = [sum(s["active_units"].values()) for s in summaries]
            record["proposals"] = sorted({p for s in summaries for p in s["proposals"]})
            seconds = [t for (name, _), t in self.seconds.items() if name == objective]
            record["seconds"] = float(np.mean(seconds)) if seconds else None
            records.append(record)
        return records

    def __str__(self) -> str:
        refused = [f"refused: {r['objective']}: {r['reason']}" for r in self.refusals()]
        if not self.cells:
            return "\n".join(refused)
        records = self.summary()
        first = records[0]
        many, few = first["num_particles"], max(1, first["num_particles"] // 10)
        head = ["objective", "ELBO", f"log p >= (K={few})", f"log p >= (K={many})"]
        head += ["gain, paired", *(["judge"] if self.judged else [])]
        head += ["seeds", "k-hat", "bad", "active", "s"]
        table = [head]
        for r in records:
            table.append(
                [
                    r["objective"],
                    f"{r['elbo']:.2f} ± {r['elbo_se']:.2f}",
                    f"{r['log_p_tenth']:.2f} ± {r['log_p_tenth_se']:.2f}",
                    f"{r['log_p']:.2f} ± {r['log_p_se']:.2f}",
                    "-" if r is first else f"{r['log_p_gain']:+.2f} ± {r['log_p_gain_se']:.2f}",
                    *([f"{r['judged']:.2f} ± {r['judged_se']:.2f}"] if self.judged else []),
                    " ".join(f"{value:.2f}" for value in r["log_p_per_seed"]),
                    "-" if r["khat_median"] is None else f"{r['khat_median']:.2f}",
                    "-" if r["khat_bad_share"] is None else f"{r['khat_bad_share']:.0%}",
                    " ".join(map(str, r["active_units"])),
                    "-" if r["seconds"] is None else f"{r['seconds']:.0f}",
                ]
            )
        bad = "no share, as K is too small for a k-hat"
        if first["khat_threshold"] is not None:
            bad = f"share of rows with k-hat above {first['khat_threshold']:.2f}"
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in table]
        return "\n".join(
            [
                lines[0].rstrip(),
                "-" * len(lines[0].rstrip()),
                *(line.rstrip() for line in lines[1:]),
                "",
                f"nats; mean ± standard error over {first['rows']} held-out rows, averaged over seeds "
                f"{first['seeds']}; gain: log p minus that of {first['objective']}, paired by row;",
                f"proposals {', '.join(sorted({p for r in records for p in r['proposals']}))}; "
                f"bad: {bad}; s: seconds of training",
                *refused,
            ]
        )

    __repr__ = __str__


def compare(
    build: Build,
    train: Batch,
    test: Batch,
    objectives: Sequence[str | Loss] | Mapping[str, Spec],
    seeds: Iterable[int] = (0,),
    *,
    options: Mapping[str, Any] | None = None,
    num_particles: int = 5000,
    judge: Judge | None = None,
    refused: str = "raise",
    jobs: int = 1,
    out: str | Path | None = None,
    progress: bool | None = None,
    **fit_options: Any,
) -> Comparison:
    """Train a pair under every objective and seed and judge all of them on the same held-out rows.

    Args:
        build: ``build(batch, **options) -> (model, guide)``; picklable if ``jobs > 1``.
        objectives: recipes with arguments, ``"iwae:num_particles=10,estimator=dreg"``; the first is
            what the others are compared with. Or objectives, of which every cell trains a copy. Or
            name -> recipe, objective or function that makes an objective anew.
        num_particles: K of the evaluation.
        judge: a second opinion, ``judge(model, guide, test, seed) -> [M]`` nats of the test rows or
            of the same part of them in every cell; picklable if ``jobs > 1``.
        refused: ``"record"`` goes on where an objective is refused, by itself or with this pair, or
            its training meets NaN; the result says why. ``"raise"`` stops.
        jobs: processes at a time.
        out: folder that keeps every finished cell: a comparison that was cut off, or that gets a
            further objective, goes on from there. Cells of other settings are not reused.
        fit_options: arguments of ``fit``.

    Raises:
        ValueError: an objective that can't be built, sites that differ between train and test.
    """
    if isinstance(objectives, str) or not objectives:
        raise ValueError(f"compare: came objectives={objectives!r}, wanted a list of at least one")
    if refused not in ("raise", "record"):
        raise ValueError(f"compare: came refused={refused!r}, wanted 'raise' or 'record'")
    if not isinstance(objectives, Mapping):
        objectives = {spec if isinstance(spec, str) else repr(spec): spec for spec in objectives}
    if refused == "raise":
        for spec in objectives.values():
            _made(spec)
    seeds = tuple(dict.fromkeys(seeds))
    if not seeds:
        raise ValueError("compare: came no seeds, wanted at least one")
    if "seed" in fit_options:
        raise ValueError("compare: came seed=, wanted seeds=")
    check_rows("compare: train", train)
    check_rows("compare: test", test)
    if train.sites != test.sites:
        raise ValueError(f"compare: train has sites {train.sites}, test has {test.sites}")
    cells = [
        _Cell(build, name, spec, seed, dict(options or {}), dict(fit_options), num_particles, judge)
        for name, spec in objectives.items()
        for seed in seeds
    ]
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    data = _described([train, test])
    paths = {} if folder is None else {id(cell): _path(folder, cell, data) for cell in cells}
    results: dict[tuple[str, int], _Done | str] = {}
    waiting = []
    for cell in cells:
        done = _load(paths[id(cell)]) if folder is not None else None
        if done is None:
            waiting.append(cell)
        else:
            results[cell.key] = done
    silent = None if progress is None else not progress
    with tqdm(total=len(cells), initial=len(results), unit="cell", disable=silent) as bar:
        for cell, came in _run_all(waiting, train, test, jobs, refused == "record"):
            results[cell.key] = came
            if folder is not None and isinstance(came, _Done):
                _store(paths[id(cell)], cell, came)
            bar.update()
    in_order = {cell.key: results[cell.key] for cell in cells}
    finished = {key: done for key, done in in_order.items() if isinstance(done, _Done)}
    comparison = Comparison(
        {key: done.evaluation for key, done in finished.items()},
        {key: done.seconds for key, done in finished.items()},
        {key: done.judged for key, done in finished.items() if done.judged is not None},
        {key: why for key, why in in_order.items() if isinstance(why, str)},
    )
    if folder is not None:
        with replacing(folder / "comparison.json") as temporary:
            report: dict[str, Any] = {"versions": versions(), "objectives": comparison.summary()}
            report["refused"] = comparison.refusals()
            temporary.write_text(json.dumps(report, indent=2) + "\n")
        with replacing(folder / "comparison.txt") as temporary:
            temporary.write_text(f"{comparison}\n")
    return comparison


def _run_all(
    cells: list[_Cell], train: Batch, test: Batch, jobs: int, record: bool
) -> Iterator[tuple[_Cell, _Done | str]]:
    """Cells as they are finished; ``record``: or why they are refused."""
    if jobs <= 1 or len(cells) <= 1:
        for cell in cells:
            yield cell, _attempt(cell, train, test, record)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    start = (threads, torch.get_default_dtype(), train, test)
    with ProcessPoolExecutor(jobs, context, initializer=_start, initargs=start) as pool:
        futures = {pool.submit(_run_here, cell, record): cell for cell in cells}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start(threads: int, dtype: torch.dtype, train: Batch, test: Batch) -> None:
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    _data[:] = train, test


def _run_here(cell: _Cell, record: bool) -> _Done | str:
    train, test = _data
    return _attempt(cell, train, test, record)


def _attempt(cell: _Cell, train: Batch, test: Batch, record: bool) -> _Done | str:
    try:
        return _run(cell, train, test)
    except (ValueError, NonFiniteError) as error:
        if record:
            return str(error)
        raise


def _run(cell: _Cell, train: Batch, test: Batch) -> _Done:
    objective = _made(cell.spec)
    with torch.random.fork_rng():
        torch.manual_seed(cell.seed)
        model, guide = cell.build(train, **deepcopy(cell.options))  # modules are trained in place
    since = time.perf_counter()
    try:
        fit(model, guide, train, objective, seed=cell.seed, progress=False, **cell.fit)
    except NonFiniteError as error:  # without its run, which may not be picklable
        raise NonFiniteError(f"{cell.name}, seed {cell.seed}: {error}") from None
    seconds = time.perf_counter() - since
    evaluation = evaluate(model, guide, test, cell.num_particles, seed=cell.seed)
    judged = cell.judge(model, guide, test, cell.seed) if cell.judge else None
    return _Done(evaluation, seconds, judged)


def _made(spec: Spec) -> Loss:
    if isinstance(spec, str):
        return parse(spec)
    return copy.deepcopy(spec) if isinstance(spec, Loss) else spec()


def _path(folder: Path, cell: _Cell, data: Any) -> Path:
    """A name that tells the cell and changes with everything its result depends on."""
    settings = [cell.spec, cell.build, cell.options, cell.fit, cell.num_particles, cell.judge]
    text = json.dumps([_described([*settings, torch.get_default_dtype(), versions()]), data])
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    told = cell.spec if isinstance(cell.spec, str) else cell.name
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", told)
    return folder / f"{slug}-seed{cell.seed}-{digest}.npz"


def _described(value: Any) -> Any:
    """A value in words, the same in every process; a function is told by its source. What is told by
    its place in memory alone is never the same again."""
    if isinstance(value, Batch):
        rest = [value.index, value.weights, value.record]
        return [repr(value), _digest(value), *_described(rest)]
    if isinstance(value, nn.Module):
        return _described([repr(value), value.state_dict()])
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(content.tobytes()).hexdigest()
        return [str(value.dtype), list(value.shape), digest]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, partial):
        return ["partial", *map(_described, (value.func, value.args, value.keywords))]
    if isinstance(value, Mapping):
        return [[str(key), _described(item)] for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    if isinstance(value, FunctionType):
        with suppress(OSError, TypeError, ValueError):  # typed in by hand
            closure = [cell.cell_contents for cell in value.__closure__ or ()]
            return [repr(value.__qualname__), inspect.getsource(value), _described(closure)]
    return f"{value!r} {_PROCESS}" if " at 0x" in repr(value) else repr(value)


def _digest(batch: Batch) -> str:
    """Of values and of where they are observed, block by block: a mapped file need not fit in memory."""
    fixed, digest = batch.still(), hashlib.sha256()
    for start in range(0, len(batch), _BLOCK):
        rows = fixed.rows(slice(start, start + _BLOCK))
        parts = [[site, rows[site], rows.mask(site)] for site in rows]
        digest.update(json.dumps(_described(parts)).encode())
    return digest.hexdigest()


def _store(path: Path, cell: _Cell, done: _Done) -> None:
    meta = {"objective": cell.name, "seed": cell.seed, "seconds": done.seconds}
    arrays = done.evaluation.arrays()
    if done.judged is not None:
        arrays["judged"] = done.judged.numpy()
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, meta=np.array(json.dumps(meta)), **arrays)


def _load(path: Path) -> _Done | None:
    """A finished cell, or None (missing or unreadable: it is run again)."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            seconds = json.loads(str(arrays["meta"]))["seconds"]
            judged = torch.from_numpy(arrays["judged"]) if "judged" in arrays else None
            return _Done(Evaluation.from_arrays(arrays), seconds, judged)
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
        return None
