"""How does the signal-to-noise ratio of the gradient depend on the number of particles?

On a trained digits model, at fixed rows: pathwise IWAE's guide gradient should fall like K^(-1/2)
(Rainforth et al. 2018), DReG's rise like K^(1/2) (Tucker et al. 2019), the model's rise like K^(1/2).

    python -m benchmarks.gradients
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

import pyro_vae as pv
from benchmarks.report import write

KS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def signal_to_noise(draws: Tensor) -> tuple[float, float]:
    """sqrt(sum mean^2 / sum variance) over the parameters, the means' own noise taken out, and its
    jackknife standard error over ten blocks of repeats.

    Args:
        draws: gradients ``[R, P]``.
    """

    def ratio(part: Tensor) -> float:
        variance = part.var(0)
        signal = (part.mean(0) ** 2 - variance / len(part)).sum().clamp(min=0)
        return float((signal / variance.sum()).sqrt())

    blocks = draws.chunk(10)
    left_out = [
        ratio(torch.cat([b for j, b in enumerate(blocks) if j != i])) for i in range(len(blocks))
    ]
    spread = np.sqrt((len(blocks) - 1) * np.var(left_out))
    return ratio(draws), float(spread)


def gradients(
    objective: pv.Objective,
    model: torch.nn.Module,
    guide: torch.nn.Module,
    batch: pv.Batch,
    repeats: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of guide and model ``[R, P]``."""
    loss = objective(model, guide)
    groups = [list(guide.parameters()), list(model.parameters())]
    rows: list[list[Tensor]] = [[], []]
    for _ in range(repeats):
        total = loss(batch) / len(batch)
        flat = torch.autograd.grad(total, [p for group in groups for p in group])
        split = len(groups[0])
        for into, part in zip(rows, (flat[:split], flat[split:]), strict=True):
            into.append(torch.cat([g.flatten() for g in part]))
    return torch.stack(rows[0]), torch.stack(rows[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8)
    settings = vars(parser.parse_args()) | {
        "objective": "iwae",
        "trained_with": "iwae K=10",
        "seed": 0,
    }
    torch.manual_seed(0)
    train = pv.data.load("digits", "train", ["x"])
    model, guide = pv.pairs.vae(train, latent=8, hidden=(64, 64))
    pv.fit(model, guide, train, pv.iwae(10), epochs=settings["epochs"], batch_size=64)
    batch = pv.data.load("digits", "test", ["x"]).rows(slice(0, settings["rows"]))
    records = []
    for estimator in ("pathwise", "dreg"):
        for k in KS:
            both = gradients(pv.iwae(k, estimator), model, guide, batch, settings["repeats"])
            (guide_snr, guide_se), (model_snr, model_se) = map(signal_to_noise, both)
            records.append(
                {"estimator": estimator, "K": k, "guide": guide_snr, "guide_se": guide_se}
                | {"model": model_snr, "model_se": model_se}
            )
    lines = ["estimator      K   guide SNR        model SNR", "-" * 48]
    for r in records:
        guide_cell = f"{r['guide']:.4f} ± {r['guide_se']:.4f}"
        model_cell = f"{r['model']:.3f} ± {r['model_se']:.3f}"
        lines.append(f"{r['estimator']:9s}  {r['K']:5d}   {guide_cell}  {model_cell}")
    slopes = {}
    for estimator in ("pathwise", "dreg"):
        for which in ("guide", "model"):
            mine = [r for r in records if r["estimator"] == estimator and r["K"] >= 4]
            x = np.log([r["K"] for r in mine])
            y = np.log([max(r[which], 1e-12) for r in mine])
            error = np.array([r[f"{which}_se"] / max(r[which], 1e-12) for r in mine])
            fit, covariance = np.polyfit(x, y, 1, w=1 / error, cov="unscaled")
            slopes[f"{estimator} {which}"] = [float(fit[0]), float(np.sqrt(covariance[0, 0]))]
    expected = {"pathwise guide": -0.5, "dreg guide": 0.5, "pathwise model": 0.5, "dreg model": 0.5}
    lines += ["", "slope of log SNR against log K, K >= 4 (in theory as K grows)"]
    lines += [f"{n:15s} {s:+.3f} ± {e:.3f}  ({expected[n]:+.1f})" for n, (s, e) in slopes.items()]
    write("gradients", settings, {"snr": records, "slopes": slopes}, "\n".join(lines))


if __name__ == "__main__":
    main()
