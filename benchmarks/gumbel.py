"""How good are discrete latents on statically binarized MNIST, by which estimator?

Nets and judgement of Jang, Gu & Poole (2017), Table 1: 784-200-784 with 200 Bernoulli latents, or
784-(20x10)-200-784 with 20 of 10 classes; minus the ELBO of the discrete model at discrete draws, its
KL to the uniform prior in closed form, mean over draws. Beside it an importance-sampled bound with K =
1000. Relaxed estimators follow that KL and anneal tau = max(coldest, exp(-rate * step)); what they
train, the ELBO at relaxed draws, is no bound of the discrete model and stands beside it. Test rows only
judge: the parameters are those that were best on the validation rows.

    PYRO_VAE_DATA=... python -m benchmarks.gumbel --latent bernoulli --estimator gumbel

Every row takes up where it was stopped; one that is complete is not run again.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import nn

import pyro_vae as pv
from benchmarks.report import folder_of, keep, kept, write
from pyro_vae import conditionals, objectives
from pyro_vae.evaluation.likelihood import judging, mean_and_error
from pyro_vae.nn import dense
from pyro_vae.objectives import (
    Gumbel,
    LeaveOneOut,
    MovingAverage,
    NeuralBaseline,
    Score,
    StraightThrough,
)

BATCH, DRAWS, K = 100, 100, 1000
PUBLISHED = (
    "published (Jang et al., m = 1000): Bernoulli SF 112.2, DARN 110.9, MuProp 109.7, ST 116.0, "
    "annealed ST 111.5, Gumbel 105.0, ST Gumbel 111.5; categorical 110.6, 128.8, 107.0, 110.9, 107.8, "
    "101.5, 107.8"
)


def annealed(given: argparse.Namespace) -> objectives.schedules.Schedule:
    return objectives.exponential(given.rate, given.coldest, every=1000)


OBJECTIVES: dict[str, Callable[[argparse.Namespace], Any]] = {
    "gumbel": lambda given: pv.mean_field(1, Gumbel(annealed(given))),
    "concrete": lambda given: pv.elbo(1, Gumbel(annealed(given))),
    "st_gumbel": lambda given: pv.mean_field(1, Gumbel(annealed(given), hard=True)),
    "straight_through": lambda given: pv.mean_field(1, StraightThrough()),
    "score": lambda given: pv.mean_field(1, Score(baseline=MovingAverage())),
    "neural": lambda given: pv.mean_field(1, Score(baseline=NeuralBaseline())),
    "leave_one_out": lambda given: pv.mean_field(5, Score(baseline=LeaveOneOut())),
    "vimco": lambda given: objectives.vimco(5),
}


def _with_layer(network: Any, event_shape: Any, data: Any) -> nn.Module:
    """The decoder (20x10)-200-784, whose hidden layer the encoder has not."""

    def decoder(outputs: Any) -> nn.Module:
        return dense((20, 10), outputs, (200,), nn.ReLU)

    return conditionals.Bernoulli.build(decoder, event_shape, data)


PAIRS: dict[str, dict[str, Any]] = {
    "bernoulli": {"latent": 200, "posterior": conditionals.Bernoulli},
    "categorical": {
        "latent": (20, 10),
        "posterior": conditionals.OneHotCategorical,
        "likelihood": _with_layer,
    },
}


def judged(
    model: Any, guide: Any, test: pv.Batch, seed: int, relaxed: Gumbel | None
) -> dict[str, Any]:
    """ELBO and importance-sampled bound of the discrete model, and the ELBO at relaxed draws; nats."""
    estimators = {"elbo": "score"} | ({"relaxed": relaxed} if relaxed else {})
    found: dict[str, Any] = {}
    for name, estimator in estimators.items():
        objective = pv.mean_field(DRAWS, estimator, chunk=10)
        with judging(model, guide, seed):
            rows = torch.cat([objective.rows(model, guide, test.rows(i)) for i in parts(test)])
        found[name], found[f"{name}_se"] = mean_and_error(rows)
    result = pv.evaluate(model, guide, test, K, widen=False, seed=seed).summary()
    names = ("log_p", "log_p_se", "khat_median", "active_units")
    return found | {name: result[name] for name in names}


def parts(data: pv.Batch, size: int = 500) -> list[slice]:
    return [slice(start, start + size) for start in range(0, len(data), size)]


def row(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One training, or what is left of it, and its evaluation."""
    train, valid, test = (
        pv.data.load("mnist_static_binary", split, ["x"]) for split in ("train", "valid", "test")
    )
    train, valid, test = (pv.Batch({"x": part["x"].flatten(1)}) for part in (train, valid, test))
    steps = given.epochs * -(-len(train) // BATCH)
    pyro.set_rng_seed(given.seed)
    model, guide = pv.pairs.vae(train, hidden=(), **PAIRS[given.latent])
    run = pv.fit(
        model,
        guide,
        train,
        OBJECTIVES[given.estimator](given),
        epochs=given.epochs,
        batch_size=BATCH,
        optimizer=functools.partial(torch.optim.Adam, lr=given.lr, fused=True),
        scheduler=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
        valid=valid,
        monitor=pv.mean_field(1, "score"),
        compile=given.compile,
        seed=given.seed,
        out=folder,
        resume=(folder / "state.safetensors").exists(),
    )
    last = run.history[-1]
    started = time.monotonic()
    record = {name: getattr(given, name) for name in KEY} | {
        "seconds": last["seconds"],
        "best_epoch": int(run.best["epoch"]),
        "train_loss": last["loss"],
        "level": run.level,
    }
    relaxed = given.estimator in ("gumbel", "concrete")
    record |= judged(model, guide, test, given.seed, Gumbel(given.coldest) if relaxed else None)
    return record | {"evaluation_seconds": time.monotonic() - started}


KEY = ("latent", "estimator", "epochs", "seed", "lr", "rate", "coldest")


def table(records: list[dict[str, Any]]) -> str:
    head = (
        f"{'latent':<12} {'estimator':<17} epochs     lr  coldest   best  s/epoch   test -ELBO"
        "         NLL <=            relaxed"
    )
    lines = [head, "-" * len(head)]
    for r in sorted(records, key=lambda r: (r["latent"], -r["elbo"])):
        about = f"{r['epochs']:>6} {r['lr']:>6g} {r['coldest']:>8g} {r['best_epoch']:>6}"
        lines.append(
            f"{r['latent']:<12} {r['estimator']:<17} {about}"
            f" {r['seconds'] / r['epochs']:>8.1f}   {-r['elbo']:6.2f} ± {r['elbo_se']:.2f}"
            f"      {-r['log_p']:6.2f} ± {r['log_p_se']:.2f}"
            + (f"   {-r['relaxed']:6.2f} ± {r['relaxed_se']:.2f}" if "relaxed" in r else "")
        )
    return "\n".join(
        [*lines, "", f"nats, mean ± standard error over test rows; NLL by K = {K}; {PUBLISHED}"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latent", choices=PAIRS, default="bernoulli")
    parser.add_argument("--estimator", choices=OBJECTIVES, default="gumbel")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rate", type=float, default=1e-4, help="of the annealed temperature")
    parser.add_argument("--coldest", type=float, default=0.5, help="temperature")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/gumbel"))
    parser.add_argument("--name", default="gumbel", help="of the files in results/")
    given = parser.parse_args()

    if any(all(r[name] == getattr(given, name) for name in KEY) for r in kept(given.out)):
        print("complete already")
        return
    folder = folder_of(given.out, *(getattr(given, name) for name in KEY))
    folder.mkdir(parents=True, exist_ok=True)
    new = row(given, folder)
    records = [*kept(given.out), new]
    keep(given.out, records)
    settings = {
        "nets": "784-200-784 and 784-(20x10)-200-784 ReLU",
        "optimizer": "Adam, lr by a cosine to 0",
        "batch": BATCH,
        "draws": DRAWS,
    }
    write(given.name, settings, records, table(records))


if __name__ == "__main__":
    main()
