"""How does the signal-to-noise ratio of the gradient depend on the number of particles?

At fixed held-out rows of a trained model: pathwise IWAE's guide gradient should fall like K^(-1/2)
(Rainforth et al. 2018), DReG's rise like K^(1/2) (Tucker et al. 2019), the model's rise like K^(1/2).
That is asymptotic, and asks for importance weights of finite variance. So there are two cases: a
linear-Gaussian model, where they have it, and digits, where Pareto k-hat says that they have not.

    python -m benchmarks.gradients
"""

from __future__ import annotations

import argparse
from typing import Any

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


def linear(seed: int) -> tuple[pv.Batch, pv.Batch, dict[str, Any]]:
    """Data of a factor model: a diagonal guide comes near its posterior and never meets it."""
    generator = torch.Generator().manual_seed(seed)
    loading = torch.randn(5, 20, generator=generator) / 2
    z = torch.randn(2000, 5, generator=generator)
    x = z @ loading + torch.randn(2000, 20, generator=generator)
    return pv.Batch({"x": x[:1500]}), pv.Batch({"x": x[1500:]}), {"latent": 5, "hidden": ()}


def digits(seed: int) -> tuple[pv.Batch, pv.Batch, dict[str, Any]]:
    train, test = (pv.data.load("digits", part, ["x"]) for part in ("train", "test"))
    return train, test, {"latent": 8, "hidden": (64, 64)}


def measure(case: Any, repeats: int, rows: int, epochs: int, seed: int) -> dict[str, Any]:
    """Signal-to-noise ratios of one trained pair, and their slopes."""
    train, test, options = case(seed)
    torch.manual_seed(seed)
    model, guide = pv.pairs.vae(train, **options)
    pv.fit(model, guide, train, pv.iwae(10), epochs=epochs, batch_size=64, seed=seed)
    judged = pv.evaluate(model, guide, test, 1000, widen=False).summary()
    batch = test.rows(slice(0, rows))
    records = []
    for estimator in ("pathwise", "dreg"):
        for k in KS:
            both = gradients(pv.iwae(k, estimator), model, guide, batch, repeats)
            (guide_snr, guide_se), (model_snr, model_se) = map(signal_to_noise, both)
            records.append(
                {"estimator": estimator, "K": k, "guide": guide_snr, "guide_se": guide_se}
                | {"model": model_snr, "model_se": model_se}
            )
    slopes = {
        f"{estimator} {which}": slope([r for r in records if r["estimator"] == estimator], which)
        for estimator in ("pathwise", "dreg")
        for which in ("guide", "model")
    }
    about = {"repeats": repeats, "khat_median": judged["khat_median"], "log_p": judged["log_p"]}
    return {"snr": records, "slopes": slopes, **about}


def slope(records: list[dict[str, Any]], which: str) -> tuple[float, float]:
    """Of log SNR against log K for K >= 4, and its standard error; what is lost in the noise (below
    two standard errors) is left out."""
    mine = [r for r in records if r["K"] >= 4 and r[which] > 2 * r[f"{which}_se"]]
    error = np.array([r[f"{which}_se"] / r[which] for r in mine])
    logs = np.log([[r["K"], r[which]] for r in mine])
    fit, covariance = np.polyfit(logs[:, 0], logs[:, 1], 1, w=1 / error, cov="unscaled")
    return float(fit[0]), float(np.sqrt(covariance[0, 0]))


def table(name: str, result: dict[str, Any]) -> list[str]:
    khat = f"median k-hat {result['khat_median']:.2f}"
    lines = [f"{name}: {khat}, {result['repeats']} repeats", "estimator      K   guide SNR        "]
    lines[-1] += "   model SNR"
    for r in result["snr"]:
        guide_cell = f"{r['guide']:8.4f} ± {r['guide_se']:.4f}"
        model_cell = f"{r['model']:8.3f} ± {r['model_se']:.3f}"
        lines.append(f"{r['estimator']:9s}  {r['K']:5d}   {guide_cell}   {model_cell}")
    lines += ["", "slope of log SNR against log K, K >= 4 (in theory, as K grows)"]
    theory = {"pathwise guide": -0.5}
    for which, (value, error) in result["slopes"].items():
        lines.append(f"{which:15s} {value:+.3f} ± {error:.3f}  ({theory.get(which, 0.5):+.1f})")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    settings = vars(parser.parse_args())
    results = {
        "linear-Gaussian": measure(linear, **settings),
        "digits": measure(digits, **settings | {"repeats": settings["repeats"] // 4}),
    }
    lines = [line for name, result in results.items() for line in table(name, result)]
    settings |= {"objective": "iwae", "trained with": "iwae, K = 10"}
    write("gradients", settings, results, "\n".join(lines).rstrip())


if __name__ == "__main__":
    main()
