"""Burda et al.'s protocol on dynamically binarized MNIST: one row of a table, and rows against rows.

59,600 training rows, a Bernoulli draw per pixel whenever rows are taken; importance sampling with
K = 5000 on 10,000 test rows that are drawn once. Published trainings have batch 20, 3280 epochs and Adam
at 1e-3 and less with betas .99, .999 and eps 1e-4; here batch and length are options, and the learning
rate falls by a cosine.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.evaluation.likelihood import mean_and_error
from pyro_vae.objectives.specs import parse

__all__ = ["Cells", "add_options", "gains", "row", "told"]

ROWS = "evaluation.npz"
VALID, K = 400, 5000  # Burda's split leaves 59,600 rows for training

Cells = Mapping[str, Mapping[int, Tensor]]
"""What tells rows of a table apart -> seed -> log p of each test row."""


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """What every row of such a table is asked."""
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--k", type=int, default=K, help="particles of the evaluation")
    parser.add_argument("--test", type=int, default=10_000, help="test rows")
    parser.add_argument("--minutes", type=float, help="after which this call stops")
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    parser.add_argument("--name", default=name, help="of the files in results/")


class _Limit:
    """Ends a training when its time is up."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def __call__(self, run: pv.Run, record: dict[str, float]) -> None:
        if time.monotonic() > self.end:
            raise StopIteration


def row(
    given: argparse.Namespace,
    folder: Path,
    objective: str,
    seed: int,
    build: Callable[[pv.Batch], tuple[Any, Any]],
    lr: float,
    minutes: float | None,
) -> dict[str, Any]:
    """One training, or what is left of it, and its evaluation when it is complete."""
    train = pv.data.load("mnist", "train", ["x"], binarize="dynamic")
    train, _ = pv.data.split(train, (1 - VALID / len(train), VALID / len(train)))
    test = pv.data.load("mnist", "test", ["x"], binarize="dynamic")
    steps = given.epochs * -(-len(train) // given.batch)
    pyro.set_rng_seed(seed)
    model, guide = build(train)
    run = pv.fit(
        model,
        guide,
        train,
        parse(objective),
        epochs=given.epochs,
        batch_size=given.batch,
        optimizer=functools.partial(torch.optim.Adam, lr=lr, fused=True),
        scheduler=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
        callbacks=[_Limit(minutes)] if minutes else [],
        compile=given.compile,
        device=given.device,
        seed=seed,
        out=folder,
        resume=(folder / "state.safetensors").exists(),
    )
    last = run.history[-1]
    record = {
        "objective": objective,
        "seed": seed,
        "epoch": last["epoch"],
        "epochs": given.epochs,
        "batch": given.batch,
        "lr": lr,
        "seconds": last["seconds"],
        "train_loss": last["loss"],
        "level": run.level,
        "folder": folder.name,
    }
    if last["epoch"] < given.epochs:
        return record
    started = time.monotonic()
    evaluation = pv.evaluate(model, guide, test.rows(slice(0, given.test)), given.k)
    np.savez(folder / ROWS, **evaluation.arrays())
    result = evaluation.summary()
    names = ("log_p", "log_p_se", "log_p_tenth", "elbo", "elbo_se", "khat_median", "active_units")
    return record | {
        **{name: result[name] for name in (*names, "rate")},
        "k": given.k,
        "test_rows": min(given.test, len(test)),
        "evaluation_seconds": time.monotonic() - started,
    }


def gains(
    records: list[dict[str, Any]],
    out: Path,
    same: Sequence[str],
    name: Callable[[dict[str, Any]], str],
    over: Callable[[str, Cells], Iterable[str]],
) -> list[dict[str, Any]]:
    """log p minus that of other rows of the table, paired by test row, mean over the seeds that both
    have.

    Args:
        same: what they have in common, besides the particles and the rows of the evaluation.
        name: what tells them apart.
        over: a name, and all that there are -> those to compare it with.
    """
    groups: dict[tuple[Any, ...], dict[str, dict[int, Tensor]]] = {}
    for r in records:
        if "log_p" in r:
            with np.load(out / r["folder"] / ROWS) as arrays:
                log_p = torch.from_numpy(arrays["log_p"])
            key = tuple(r[each] for each in (*same, "k", "test_rows"))
            groups.setdefault(key, {}).setdefault(name(r), {})[r["seed"]] = log_p
    found = []
    for key, cells in groups.items():
        for mine, rows in cells.items():
            for other in over(mine, cells):
                seeds = sorted(rows.keys() & cells[other].keys())
                if not seeds:
                    continue
                differences = torch.stack([rows[s] - cells[other][s] for s in seeds])
                gain, error = mean_and_error(differences.mean(0))
                found.append(
                    {"row": mine, "over": other, **dict(zip(same, key, strict=False))}
                    | {"seeds": seeds, "gain": gain, "gain_se": error}
                    | {"per_seed": differences.mean(1).tolist()}
                )
    return found


def told(gain: dict[str, Any]) -> str:
    """The gain of ``gains`` as the end of a line."""
    each = ", ".join(f"{value:+.2f}" for value in gain["per_seed"])
    return f"{gain['gain']:+.3f} ± {gain['gain_se']:.3f}   seeds {gain['seeds']}: {each}"
