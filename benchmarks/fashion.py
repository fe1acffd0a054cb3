"""Which likelihood suits 8-bit images, a Gaussian or a mixture of discretized logistics?

The same convolutional pair on Fashion-MNIST, in bits per dimension of the 8-bit image (an upper bound:
log p(x) >= by importance sampling). The Gaussian, whose scale is learned pixel by pixel, has the
dequantized image, and its density bounds the image's probability (Theis et al. 2016); the mixture has
the image itself.

    PYRO_VAE_DATA=... python -m benchmarks.fashion --out runs/fashion

Stopped and started again it goes on. Samples are in results/fashion_*.png.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import torch

import pyro_vae as pv
from benchmarks.report import RESULTS, write
from pyro_vae.conditionals import Gaussian, LogisticMixture
from pyro_vae.evaluation import predict
from pyro_vae.reporting import plots

HIDDEN, LATENT, BATCH, LR, SEED = (32, 64), 32, 100, 1e-3, 0
VALID, TEST, K = 5000, 2000, 200
LIKELIHOODS: dict[str, Any] = {
    "gaussian": Gaussian,
    "logistic_mixture": functools.partial(LogisticMixture.build, components=5),
}


def row(name: str, epochs: int, out: Path) -> dict[str, Any]:
    dequantize = name == "gaussian"
    train, test = (
        pv.data.load("fashion_mnist", split, ["x"], dequantize=dequantize)
        for split in ("train", "test")
    )
    train, valid = pv.data.split(train, (1 - VALID / len(train), VALID / len(train)))
    test = test.rows(slice(0, TEST))
    steps = epochs * -(-len(train) // BATCH)
    pyro.set_rng_seed(SEED)
    model, guide = pv.pairs.vae(
        train,
        latent=LATENT,
        hidden=HIDDEN,
        net=pv.nn.convolutional,
        likelihood=LIKELIHOODS[name],
    )
    run = pv.fit(
        model,
        guide,
        train,
        pv.elbo(),
        epochs=epochs,
        batch_size=BATCH,
        optimizer=functools.partial(torch.optim.Adam, lr=LR, fused=True),
        scheduler=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
        valid=valid,
        monitor=pv.elbo(),
        seed=SEED,
        out=out / name,
        resume=(out / name / "state.safetensors").exists(),
    )
    result = pv.evaluate(model, guide, test, K)
    bits, error = result.bits_per_dim()
    elbo, elbo_error = result.bits_per_dim("elbo")
    for kind in (False, True):
        drawn = predict.sample(model, 64, sites=["x"], mean=kind, seed=SEED)["x"]
        pixels = pv.data.undo(train, "x", drawn)
        figure = plots.samples(pixels.numpy())
        plots.save(figure, RESULTS / f"fashion_{name}_{'means' if kind else 'draws'}.png")
    return {
        "likelihood": name,
        "bits_per_dim": bits,
        "bits_per_dim_se": error,
        "elbo_bits_per_dim": elbo,
        "elbo_bits_per_dim_se": elbo_error,
        "rate_nats": sum(float(rate.sum()) for rate in result.rate.values()),
        "active_units": sum(int(units.sum()) for units in result.active.values()),
        "epoch_kept": int(run.best["epoch"]),
        "train_seconds": run.history[-1]["seconds"],
        "parameters": sum(p.numel() for p in (*model.parameters(), *guide.parameters())),
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    lines = [
        "likelihood         bits/dim <=       -ELBO, bits/dim   rate, nats  active  train s",
        "-" * 82,
    ]
    for r in records:
        lines.append(
            f"{r['likelihood']:<18} {r['bits_per_dim']:.4f} ± {r['bits_per_dim_se']:.4f}   "
            f"{r['elbo_bits_per_dim']:.4f} ± {r['elbo_bits_per_dim_se']:.4f}   "
            f"{r['rate_nats']:9.1f}   {r['active_units']:>5}   {r['train_seconds']:>6.0f}"
        )
    done = {r["likelihood"] for r in records}
    return "\n".join(
        [*lines, *(f"{name:<18} not run yet" for name in LIKELIHOODS if name not in done)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/fashion"))
    parser.add_argument("--epochs", type=int, default=12)
    given = parser.parse_args()
    records = []
    for name in LIKELIHOODS:
        records.append(row(name, given.epochs, given.out))
        settings = {
            "net": f"convolutional {HIDDEN}",
            "latent": LATENT,
            "epochs": given.epochs,
            "batch": BATCH,
            "lr": f"{LR}, cosine",
            "K": K,
            "test_rows": TEST,
            "seed": SEED,
        }
        write("fashion", settings, records, table(records))


if __name__ == "__main__":
    main()
