"""How good is Burda et al.'s one-layer net on dynamically binarized MNIST, under which objective?

784-200-200-(50)-200-200-784, tanh, a Bernoulli draw per pixel whenever rows are taken; importance
sampling with K = 5000 on 10,000 test rows that are drawn once. Published (IWAE, K = 50, batch 20, 3280
epochs, Adam at 1e-3 and less with betas .99, .999 and eps 1e-4): 84.78 nats; here batch and length are
options, and Adam starts at 3e-3 and falls by a cosine: for the ELBO the best of 1, 2, 3 and 5e-3 after
25 epochs. Objectives of several particles bear more (``--lr``).

    PYRO_VAE_DATA=... python -m benchmarks.dynamic_mnist --objective iwae:num_particles=50 --epochs 300

Objectives that were trained alike are compared with the ELBO, paired by test row.

Stopped and started again it goes on; ``--minutes`` stops it at the end of an epoch.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import nn

import pyro_vae as pv
from benchmarks.report import folder_of, keep, kept, write
from pyro_vae.evaluation.likelihood import mean_and_error
from pyro_vae.objectives.specs import parse

HIDDEN, LATENT, LR = (200, 200), 50, 3e-3  # of rows that do not say
ROWS = "evaluation.npz"
VALID, K = 400, 5000  # Burda's split leaves 59,600 rows for training
PUBLISHED = (
    "published, batch 20, 3280 epochs: VAE K = 50 86.35, IWAE K = 5 85.54, K = 50 84.78 (the last two "
    "as restated by others)"
)


class _Limit:
    """Ends a training when its time is up."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def __call__(self, run: pv.Run, record: dict[str, float]) -> None:
        if time.monotonic() > self.end:
            raise StopIteration


def row(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One training, or what is left of it, and its evaluation when it is complete."""
    train = pv.data.load("mnist", "train", ["x"], binarize="dynamic")
    train, _ = pv.data.split(train, (1 - VALID / len(train), VALID / len(train)))
    test = pv.data.load("mnist", "test", ["x"], binarize="dynamic")
    steps = given.epochs * -(-len(train) // given.batch)
    pyro.set_rng_seed(given.seed)
    model, guide = pv.pairs.vae(train, latent=LATENT, hidden=HIDDEN, activation=nn.Tanh)
    run = pv.fit(
        model,
        guide,
        train,
        parse(given.objective),
        epochs=given.epochs,
        batch_size=given.batch,
        optimizer=functools.partial(torch.optim.Adam, lr=given.lr, fused=True),
        scheduler=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
        callbacks=[_Limit(given.minutes)] if given.minutes else [],
        compile=given.compile,
        device=given.device,
        seed=given.seed,
        out=folder,
        resume=(folder / "state.safetensors").exists(),
    )
    last = run.history[-1]
    record = {
        "objective": given.objective,
        "seed": given.seed,
        "epoch": last["epoch"],
        "epochs": given.epochs,
        "batch": given.batch,
        "lr": given.lr,
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
        **{name: result[name] for name in names},
        "k": given.k,
        "test_rows": min(given.test, len(test)),
        "evaluation_seconds": time.monotonic() - started,
    }


def gains(records: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """log p minus that under the ELBO (at its best learning rate) after the same epochs, paired by test
    row, mean over the seeds that both have."""
    groups: dict[tuple[Any, ...], dict[str, dict[int, Any]]] = {}
    for r in records:
        if "log_p" in r:
            with np.load(out / r["folder"] / ROWS) as arrays:
                rows = torch.from_numpy(arrays["log_p"])
            group = groups.setdefault((r["epochs"], r["batch"], r["k"], r["test_rows"]), {})
            group.setdefault(f"{r['objective']} at {r.get('lr', LR):g}", {})[r["seed"]] = rows
    found = []
    for (epochs, batch, *_), objectives in groups.items():
        elbos = [name for name in objectives if name.startswith("elbo")]
        plain = max(
            elbos,
            key=lambda name: float(torch.stack([*objectives[name].values()]).mean()),
            default=None,
        )
        for name, mine in objectives.items():
            seeds = sorted(mine.keys() & objectives[plain].keys()) if plain else []
            if name == plain or not seeds or plain is None:
                continue
            differences = torch.stack([mine[s] - objectives[plain][s] for s in seeds])
            gain, error = mean_and_error(differences.mean(0))
            found.append(
                {"objective": name, "over": plain, "epochs": epochs, "batch": batch}
                | {"seeds": seeds, "gain": gain, "gain_se": error}
                | {"per_seed": differences.mean(1).tolist()}
            )
    return found


def table(records: list[dict[str, Any]], found: list[dict[str, Any]]) -> str:
    head = (
        f"{'objective':<40}   seed   epochs       batch   lr      train s   test NLL <=      -ELBO"
        "            active"
    )
    lines = [head, "-" * len(head)]
    for r in records:
        start = (
            f"{r['objective']:<40}   {r['seed']:>3}   {r['epoch']:>4} of {r['epochs']:<4} "
            f"{r['batch']:>4}   {r.get('lr', LR):<6g}  {r['seconds']:7.0f}   "
        )
        if "log_p" not in r:
            lines.append(start + "not judged yet: training goes on")
            continue
        lines.append(
            start
            + f"{-r['log_p']:.2f} ± {r['log_p_se']:.2f}   {-r['elbo']:6.2f} ± {r['elbo_se']:.2f}"
            f"   {sum(r['active_units'].values()):>6}"
        )
    if found:
        lines += ["", "log p minus that under the ELBO, paired by test row"]
    for r in found:
        each = ", ".join(f"{value:+.2f}" for value in r["per_seed"])
        lines.append(
            f"{r['objective']:<48}   {r['epochs']} epochs, batch {r['batch']}, over {r['over']}: "
            f"{r['gain']:+.3f} ± {r['gain_se']:.3f}   seeds {r['seeds']}: {each}"
        )
    return "\n".join([*lines, "", f"nats, mean ± standard error over test rows; {PUBLISHED}"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objective", default="iwae:num_particles=50")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=LR, help="of Adam, at the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--k", type=int, default=K, help="particles of the evaluation")
    parser.add_argument("--test", type=int, default=10_000, help="test rows")
    parser.add_argument("--minutes", type=float, help="after which this call stops")
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/dynamic_mnist"))
    parser.add_argument("--name", default="dynamic_mnist", help="of the files in results/")
    given = parser.parse_args()

    key: tuple[Any, ...] = (given.objective, given.epochs, given.batch, given.seed)
    folder = folder_of(given.out, *key, *([] if given.lr == LR else [given.lr]))
    folder.mkdir(parents=True, exist_ok=True)
    new = row(given, folder)
    records = [r for r in kept(given.out) if r.get("folder") != folder.name] + [new]
    keep(given.out, records)
    settings = {
        "net": "784-200-200-50 tanh",
        "optimizer": "Adam, lr by a cosine to 0",
        "K": given.k,
        "test rows": given.test,
    }
    found = gains(records, given.out)
    write(given.name, settings, records + found, table(records, found))


if __name__ == "__main__":
    main()
