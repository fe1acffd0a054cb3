"""How does the signal-to-noise ratio of the gradient depend on the number of particles?

Near an optimum the guide's gradient of the importance weighted bound falls like 1 / K and its standard
deviation, by the pathwise estimator, like K^(-1/2): the ratio falls like K^(-1/2) (Rainforth et al.
2018). By DReG it rises like K^(1/2) (Tucker et al. 2019), as the model's does whatever the estimator.
The score function without a baseline has a deviation of K^(1/2), a ratio of K^(-3/2); VIMCO's baseline
leaves K^(-1/2); the update of reweighted wake-sleep, which is no gradient of the bound, rises like
K^(1/2) (Le et al. 2019). That is asymptotic, and asks for importance weights of finite variance. So
there are two linear-Gaussian models, where they have it, the first that of Rainforth et al., moved off
its known optimum; discrete latents, where they are bounded; and digits, where Pareto k-hat says that
they have not, unless the latents are few.

    python -m benchmarks.gradients
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.ticker import NullFormatter
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks.report import RESULTS, write
from pyro_vae.conditionals import Bernoulli
from pyro_vae.objectives.baselines import LeaveOneOut
from pyro_vae.objectives.estimators import Score
from pyro_vae.reporting.style import COLOURS, Picture, save, styled

KS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FIT_FROM = 4  # least K of the slopes
OFF = 0.01  # standard deviation of how far the exactly known case is from its optimum, as in the paper


@dataclass(frozen=True)
class Method:
    """A bound with an estimator.

    Attributes:
        objective: K -> objective.
        slope: of log SNR of the guide against log K, as K grows.
        least: least K.
    """

    objective: Callable[[int], pv.Objective]
    slope: float
    least: int = 1


MODEL_SLOPE = 0.5
METHODS = {
    "pathwise": Method(lambda k: pv.iwae(k), -0.5),
    "dreg": Method(lambda k: pv.iwae(k, "dreg"), 0.5),
    "elbo, stl": Method(lambda k: pv.elbo(k, "stl"), 0.5),
    "score": Method(lambda k: pv.iwae(k, Score(all_sites=True)), -1.5),
    "vimco": Method(lambda k: pv.iwae(k, Score(all_sites=True, baseline=LeaveOneOut())), -0.5, 2),
    "rws": Method(lambda k: pv.iwae(k, "rws"), 0.5, 2),
}


@dataclass(frozen=True)
class Point:
    """Where gradients are taken: parameters, and held-out rows to judge them on."""

    model: nn.Module
    guide: nn.Module
    test: pv.Batch


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        point: (epochs, seed) -> where gradients are taken.
        methods: names of ``METHODS``.
        share: of the repeats.
    """

    point: Callable[[int, int], Point]
    methods: Sequence[str]
    share: float = 1.0


# ---------------------------------------------------------------------------------------------
# Where gradients are taken


class Shift(nn.Module):
    """z ~ N(mean, I), x ~ N(z, I)."""

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.mean = nn.Parameter(mean)

    def forward(self, batch: pv.Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(self.mean, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1))


class Linear(nn.Module):
    """z ~ N(A x + b, 2/3 I): the posterior has A = I / 2, b = mean / 2 and variance 1/2."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, batch: pv.Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            loc = batch["x"] @ self.weight.T + self.bias
            pyro.sample("z", dist.Normal(loc, (2 / 3) ** 0.5).to_event(1))


def known(epochs: int, seed: int, dims: int = 20, rows: int = 1024) -> Point:
    """Rainforth et al. (2018), section 4: the optimum, moved by a little; nothing is trained."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(dims) + 2**0.5 * normal(rows, dims)
    mean = x.mean(0)
    model = Shift(mean + OFF * normal(dims))
    guide = Linear(torch.eye(dims) / 2 + OFF * normal(dims, dims), mean / 2 + OFF * normal(dims))
    return Point(model, guide, pv.Batch({"x": x}))


def factors(epochs: int, seed: int) -> Point:
    """Data of a factor model: a diagonal guide comes near its posterior and never meets it."""
    generator = torch.Generator().manual_seed(seed)
    loading = torch.randn(5, 20, generator=generator) / 2
    z = torch.randn(2000, 5, generator=generator)
    x = z @ loading + torch.randn(2000, 20, generator=generator)
    train, test = pv.Batch({"x": x[:1500]}), pv.Batch({"x": x[1500:]})
    return trained(train, test, pv.iwae(10), epochs, seed, latent=5, hidden=())


def digits(epochs: int, seed: int, latent: int = 8) -> Point:
    train, test = (pv.data.load("digits", part, ["x"]) for part in ("train", "test"))
    return trained(train, test, pv.iwae(10), epochs, seed, latent=latent, hidden=(64, 64))


def few_latents(epochs: int, seed: int) -> Point:
    return digits(epochs, seed, latent=2)


def discrete(epochs: int, seed: int) -> Point:
    train, test = (pv.data.load("digits_binary", part, ["x"]) for part in ("train", "test"))
    parts: dict[str, Any] = {"prior": Coins, "posterior": Bernoulli}
    return trained(train, test, pv.iwae(10, "vimco"), epochs, seed, latent=8, hidden=64, **parts)


class Coins(nn.Module):
    """Independent fair coins ``[latent]``."""

    probs: Tensor

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.register_buffer("probs", torch.full((latent,), 0.5))

    def forward(self) -> Any:
        return dist.Bernoulli(self.probs).to_event(1)


def trained(
    train: pv.Batch,
    test: pv.Batch,
    objective: pv.Objective,
    epochs: int,
    seed: int,
    **options: Any,
) -> Point:
    torch.manual_seed(seed)
    model, guide = pv.pairs.vae(train, **options)
    pv.fit(model, guide, train, objective, epochs=epochs, batch_size=64, seed=seed, progress=False)
    return Point(model, guide, test)


CASES = {
    "linear-Gaussian, known": Case(known, [*METHODS]),
    "linear-Gaussian, trained": Case(factors, ["pathwise", "dreg"]),
    "discrete latents": Case(discrete, ["score", "vimco", "rws"], 0.5),
    "digits, 2 latents": Case(few_latents, ["pathwise", "dreg", "elbo, stl"], 0.25),
    "digits, 8 latents": Case(digits, ["pathwise", "dreg", "elbo, stl"], 0.25),
}


# ---------------------------------------------------------------------------------------------
# What is measured there


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
    objective: pv.Objective, model: nn.Module, guide: nn.Module, batch: pv.Batch, repeats: int
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


def measure(
    case: Case, repeats: int, rows: int, epochs: int, seed: int, ks: Sequence[int] = KS
) -> dict[str, Any]:
    """Signal-to-noise ratios at one point, and their slopes."""
    point = case.point(epochs, seed)
    judged = pv.evaluate(point.model, point.guide, point.test, 1000, widen=False).summary()
    batch, repeats = point.test.rows(slice(0, rows)), max(20, round(repeats * case.share))
    torch.manual_seed(seed)
    records = []
    for name in case.methods:
        for k in ks:
            if k < METHODS[name].least:
                continue
            both = gradients(METHODS[name].objective(k), point.model, point.guide, batch, repeats)
            (guide_snr, guide_se), (model_snr, model_se) = map(signal_to_noise, both)
            records.append(
                {"estimator": name, "K": k, "guide": guide_snr, "guide_se": guide_se}
                | {"model": model_snr, "model_se": model_se}
            )
    slopes = {
        f"{name} {which}": slope([r for r in records if r["estimator"] == name], which)
        for name in case.methods
        for which in ("guide", "model")
    }
    about = {"repeats": repeats, "khat_median": judged["khat_median"], "log_p": judged["log_p"]}
    return {"snr": records, "slopes": slopes, **about}


def visible(records: Sequence[dict[str, Any]], which: str) -> list[dict[str, Any]]:
    """Those that are not lost in the noise: above two standard errors."""
    return [r for r in records if r[which] > 2 * r[f"{which}_se"]]


def slope(records: Sequence[dict[str, Any]], which: str) -> tuple[float, float] | None:
    """Of log SNR against log K for K >= 4 up to the first that is lost in the noise, and its standard
    error; None of fewer than three."""
    mine = [r for r in records if r["K"] >= FIT_FROM]
    seen = visible(mine, which)
    mine = mine[: next((i for i, r in enumerate(mine) if r not in seen), len(mine))]
    if len(mine) < 3:
        return None
    error = np.array([r[f"{which}_se"] / r[which] for r in mine])
    logs = np.log([[r["K"], r[which]] for r in mine])
    fit, covariance = np.polyfit(logs[:, 0], logs[:, 1], 1, w=1 / error, cov="unscaled")
    return float(fit[0]), float(np.sqrt(covariance[0, 0]))


def theory(name: str) -> float:
    """Of ``"dreg guide"``."""
    method, _, which = name.rpartition(" ")
    return METHODS[method].slope if which == "guide" else MODEL_SLOPE


# ---------------------------------------------------------------------------------------------
# How it is shown


def table(name: str, result: dict[str, Any]) -> list[str]:
    khat = f"median k-hat {result['khat_median']:.2f}"
    lines = [f"{name}: {khat}, {result['repeats']} repeats", "estimator      K   guide SNR        "]
    lines[-1] += "   model SNR"
    for r in result["snr"]:
        guide_cell = f"{r['guide']:8.4f} ± {r['guide_se']:.4f}"
        model_cell = f"{r['model']:8.3f} ± {r['model_se']:.3f}"
        lines.append(f"{r['estimator']:9s}  {r['K']:5d}   {guide_cell}   {model_cell}")
    lines += ["", f"slope of log SNR against log K, K >= {FIT_FROM} (in theory, as K grows)"]
    for which, fitted in result["slopes"].items():
        shown = "lost in the noise" if fitted is None else f"{fitted[0]:+.3f} ± {fitted[1]:.3f}"
        lines.append(f"{which:15s} {shown}  ({theory(which):+.1f})")
    return [*lines, ""]


@styled()
def figure(results: dict[str, dict[str, Any]]) -> Picture:
    """Guide above, model below; dashed: the slope in theory."""
    picture = Picture(figsize=(3.3 * len(results) + 0.4, 6.6), layout="constrained")
    panels = picture.subplots(2, len(results), squeeze=False, sharex=True)
    colours = dict(zip(METHODS, COLOURS, strict=False))
    for column, (name, result) in enumerate(results.items()):
        for axes, which in zip(panels[:, column], ("guide", "model"), strict=True):
            shown = [r["estimator"] for r in result["snr"]]
            for method in dict.fromkeys(shown):
                mine = [r for r in result["snr"] if r["estimator"] == method]
                _course(axes, visible(mine, which), which, method, colours[method])
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
        panels[0, column].set_title(
            f"{name}\nk\N{COMBINING CIRCUMFLEX ACCENT} {result['khat_median']:.2f}"
        )
        panels[1, column].set_xlabel("particles K")
    for axes, which in zip(panels[:, 0], ("guide", "model"), strict=True):
        axes.set_ylabel(f"signal to noise, {which}")
    named = {
        label: line for axes in panels.flat for line, label in zip(*_legend(axes), strict=True)
    }
    picture.legend(
        [named[method] for method in METHODS if method in named],
        [method for method in METHODS if method in named],
        loc="outside lower center",
        ncols=min(len(named), 2 * len(results)),
    )
    return picture


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return handles, labels


def _course(
    axes: Any, records: Sequence[dict[str, Any]], which: str, method: str, colour: str
) -> None:
    if not records:
        return
    k, snr, error = (np.array([r[n] for r in records]) for n in ("K", which, f"{which}_se"))
    axes.errorbar(k, snr, error, fmt="o-", ms=4, lw=1.4, color=colour, label=method)
    far = k >= FIT_FROM
    if far.any():  # through the middle of what is fitted
        height = np.log(snr[far]).mean() - theory(f"{method} {which}") * np.log(k[far]).mean()
        ends = np.array([k[far][0], k[-1]])
        line = np.exp(height + theory(f"{method} {which}") * np.log(ends))
        axes.plot(ends, line, "--", color=colour, alpha=0.6, lw=1.0, zorder=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the report")
    settings = vars(parser.parse_args())
    folder, results = settings.pop("results"), {}
    for name in settings.pop("cases"):
        results[name] = measure(CASES[name], **settings)
        print("\n".join(table(name, results[name])), flush=True)
    lines = [line for name, result in results.items() for line in table(name, result)]
    settings |= {"objective": "iwae", "trained with": "iwae, K = 10", "moved off the optimum": OFF}
    write("gradients", settings, results, "\n".join(lines).rstrip(), folder, show=False)
    save(figure(results), folder / "gradients.png")


if __name__ == "__main__":
    main()
