"""Which objective finds the factors of variation, and what does it cost in nats?

VAE, beta-VAE, beta-TCVAE and FactorVAE on ``sprites``, one net: 1024-256-256-(10)-256-256-1024, ReLU,
Bernoulli, Adam. Scores are of the posterior means of the 10,000 test rows, and of images with one factor
fixed (``pyro_vae.evaluation.disentanglement``); ELBO at beta = 1 and rate are of the same rows. Seeds
differ widely in all that is published (Locatello et al. 2019): look at the standard errors.

    python -m benchmarks.sprites --steps 20000 --seeds 5 --jobs 2

Stopped and started again it goes on.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

import pyro_vae as pv
from benchmarks.report import folder_of, keep, kept, write
from pyro_vae.conditionals import Bernoulli
from pyro_vae.data.sprites import FACTORS, render
from pyro_vae.evaluation import disentanglement as scores
from pyro_vae.objectives.specs import parse

HIDDEN, LATENT, BATCH, LR, K = (256, 256), 10, 128, 5e-4, 10
OBJECTIVES = ("elbo", "beta_vae:beta=4.0", "beta_tcvae:beta=6.0", "factor_vae:gamma=10.0")
VOTES = {"num_train": 2000, "num_eval": 2000}
COSTS = ("elbo", "rate", "active_units", "train_seconds")
SCORES = (
    "factor_vae",
    "beta_vae",
    "mig",
    "sap",
    "modularity",
    "disentanglement",
    "completeness",
    "informativeness",
)


def row(objective: str, seed: int, steps: int, folder: Path, threads: int) -> dict[str, Any]:
    """One training, or what is left of it, and its evaluation."""
    torch.set_num_threads(threads)
    train = pv.data.load("sprites", "train", ["x"])
    pyro.set_rng_seed(seed)
    model, guide = pv.pairs.vae(train, latent=LATENT, hidden=HIDDEN, likelihood=Bernoulli)
    run = pv.fit(
        model,
        guide,
        train,
        parse(objective),
        steps=steps,
        batch_size=BATCH,
        optimizer=functools.partial(torch.optim.Adam, lr=LR, fused=True),
        seed=seed,
        out=folder,
        resume=(folder / "state.safetensors").exists(),
        progress=False,
    )
    started = time.monotonic()
    judged = judge(model, guide, seed)
    return {
        "objective": objective,
        "seed": seed,
        "steps": steps,
        "train_loss": run.history[-1]["loss"],
        "train_seconds": run.history[-1]["seconds"],
        "level": run.level,
        **judged,
        "evaluation_seconds": time.monotonic() - started,
    }


def judge(model: Any, guide: Any, seed: int) -> dict[str, float]:
    """ELBO, rate and every score, with standard errors."""
    test = pv.data.load("sprites", "test")
    factors = test["factors"]
    result = pv.evaluate(model, guide, test.without("factors"), K, widen=False).summary()

    def encode(images: Tensor) -> Tensor:
        rows = pv.Batch({"x": images.to(torch.get_default_dtype())})
        return pv.encode(model, guide, rows, batch_size=len(images))["z"]

    codes = encode(test["x"])
    levels = list(FACTORS.values())
    found = {
        "mig": scores.mig(codes, factors),
        "sap": scores.sap(codes, factors),
        "modularity": scores.modularity(codes, factors),
        **scores.dci(codes, factors),
        "factor_vae": scores.factor_vae_score(encode, render, levels, **VOTES, seed=seed),
        "beta_vae": scores.beta_vae_score(encode, render, levels, **VOTES, seed=seed),
    }
    return {
        "elbo": result["elbo"],
        "elbo_se": result["elbo_se"],
        "rate": result["rate"]["z"],
        "active_units": result["active_units"]["z"],
        **{name: score.value for name, score in found.items()},
        **{f"{name}_se": it.se for name, it in found.items() if not math.isnan(it.se)},
        **{
            f"mig_{name}": gap
            for name, gap in zip(FACTORS, found["mig"].each.tolist(), strict=True)
        },
    }


def spread(records: Sequence[dict[str, Any]], name: str) -> tuple[float, float]:
    """Mean over seeds and its standard error."""
    values = [record[name] for record in records]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def table(records: Sequence[dict[str, Any]]) -> str:
    objectives = list(dict.fromkeys(record["objective"] for record in records))
    by_objective = [[r for r in records if r["objective"] == name] for name in objectives]
    lines = [f"{'objective':<16}" + "".join(f"{name:>24}" for name in objectives)]
    lines += ["-" * len(lines[0])]
    lines += [f"{'seeds':<16}" + "".join(f"{len(rows):>24}" for rows in by_objective)]
    for digits, names in ((1, COSTS), (3, SCORES)):
        for name in names:
            cells = [spread(rows, name) for rows in by_objective]
            shown = [f"{mean:.{digits}f} ± {error:.{digits}f}" for mean, error in cells]
            lines.append(f"{name:<16}" + "".join(f"{cell:>24}" for cell in shown))
    return "\n".join([*lines, "", "mean ± standard error over seeds; nats; scores: 1 is the best"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=5, help="0, 1, ... so many")
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/sprites"))
    parser.add_argument("--name", default="sprites", help="of the files in results/")
    given = parser.parse_args()

    given.out.mkdir(parents=True, exist_ok=True)
    records = kept(given.out)
    done = {(r["objective"], r["seed"], r["steps"]) for r in records}
    wanted = [(o, seed, given.steps) for seed in range(given.seeds) for o in given.objectives]
    threads = max(1, torch.get_num_threads() // given.jobs)
    spawn = multiprocessing.get_context("spawn")  # a fork would share the threads of torch
    with ProcessPoolExecutor(given.jobs, spawn) as pool:
        waiting = [
            pool.submit(row, *cell, folder_of(given.out, *cell), threads)
            for cell in wanted
            if cell not in done
        ]
        for ready in as_completed(waiting):
            records.append(ready.result())
            keep(given.out, records)
            report(given.name, records, given, threads)
    if not waiting:
        report(given.name, records, given, threads)


def report(
    name: str, records: list[dict[str, Any]], given: argparse.Namespace, threads: int
) -> None:
    """Of the trainings that this call asks for, in its order."""
    asked = [
        r
        for objective in given.objectives
        for r in sorted(records, key=lambda r: r["seed"])
        if (r["objective"], r["steps"]) == (objective, given.steps) and r["seed"] < given.seeds
    ]
    settings = {
        "net": "1024-256-256-10 ReLU, Bernoulli",
        "optimizer": f"Adam {LR}",
        "batch": BATCH,
        "steps": given.steps,
        "train rows": 50_000,
        "test rows": 10_000,
        "votes": VOTES["num_train"],
        "threads of a training": threads,
    }
    write(name, settings, asked, table(asked))


if __name__ == "__main__":
    main()
