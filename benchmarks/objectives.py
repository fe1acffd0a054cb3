"""Which objective trains a pair best, judged by log p(x) of the same held-out rows?

Every recipe with every estimator that it takes, on small pairs of continuous, two-layered and discrete
latents. Whatever was optimized, cells are judged by the same evaluation, paired by row; what is refused
says why. Trainings are short: at this length the ranking is of speed as much as of where they end.

    python -m benchmarks.objectives --out runs/objectives --judge annealed

Stopped and started again it goes on.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks.cells import gain, mean_and_error, quantity, seeds_of, summaries
from benchmarks.gradients import Coins
from benchmarks.report import RESULTS, write
from pyro_vae.conditionals import Bernoulli, DiagonalGaussian, StandardNormal
from pyro_vae.objectives.specs import arguments, recipes
from pyro_vae.reporting.style import COLOURS, GREY, Picture, save, styled

WITH_PATH, BY_SCORE = ("pathwise", "stl", "dreg"), ("score", "vimco", "rws", "pathwise")
VALUES: dict[str, Any] = {  # of the arguments that a recipe can't do without
    "num_particles": 8,
    "groups": 2,
    "alpha": 0.5,
    "beta": 2.0,
    "ciwae.beta": 0.5,
    "nats": 0.5,
    "capacity": 15.0,
    "gamma": 10.0,
    "offdiagonal": 10.0,
}
WIDE = 5.0  # nats; losses beyond are arrows at the edge of the figure
SHORT = {"epochs": 2, "seeds": 1, "num_particles": 50}


@dataclass(frozen=True)
class Pair:
    """
    Attributes:
        build: as ``compare`` takes it.
        options: its arguments.
        data: name of the data set.
        estimators: those that may apply; the first trains the reference.
        continuous: whether chains can be run in its latents.
    """

    build: Callable[..., tuple[Any, Any]]
    options: dict[str, Any]
    data: str = "digits_binary"
    estimators: Sequence[str] = WITH_PATH
    continuous: bool = True


class TwoLayers(nn.Module):
    """z2 ~ N(0, I), z1 ~ p(z1 | z2), x ~ p(x | z1)."""

    def __init__(self, upper: nn.Module, lower: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        self.upper, self.lower, self.likelihood = upper, lower, likelihood

    def forward(self, batch: pv.Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z2 = pyro.sample("z2", self.upper())
            z1 = pyro.sample("z1", self.lower(z2))
            pyro.sample("x", self.likelihood(z1))


class BottomUp(nn.Module):
    """z1 ~ q(z1 | x), z2 ~ q(z2 | z1)."""

    def __init__(self, lower: nn.Module, upper: nn.Module) -> None:
        super().__init__()
        self.lower, self.upper = lower, upper

    def forward(self, batch: pv.Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z1 = pyro.sample("z1", self.lower(batch["x"]))
            pyro.sample("z2", self.upper(z1))


def two_layers(batch: pv.Batch, latents: tuple[int, int], hidden: int) -> tuple[Any, Any]:
    """64-64-8-64-4 and back."""
    low, high = latents

    def net(inputs: int) -> Callable[[Sequence[int]], nn.Module]:
        return lambda outputs: pv.nn.dense((inputs,), outputs, (hidden,), nn.ReLU)

    x = batch["x"]
    pixels = batch.shape("x")[1]
    model = TwoLayers(
        StandardNormal(high),
        DiagonalGaussian.build(net(high), (low,)),
        Bernoulli.build(net(low), (pixels,), x),
    )
    guide = BottomUp(
        DiagonalGaussian.build(net(pixels), (low,)), DiagonalGaussian.build(net(low), (high,))
    )
    return model, guide


PAIRS = {
    "bernoulli": Pair(pv.pairs.vae, {"latent": 8, "hidden": 64}),
    "binomial": Pair(pv.pairs.vae, {"latent": 8, "hidden": 64}, "digits"),
    "two layers": Pair(two_layers, {"latents": (8, 4), "hidden": 64}),
    "discrete": Pair(
        pv.pairs.vae,
        {"latent": 16, "hidden": 64, "prior": Coins, "posterior": Bernoulli},
        estimators=BY_SCORE,
        continuous=False,
    ),
}
BY_DEFAULT = ("bernoulli", "two layers", "discrete")


# ---------------------------------------------------------------------------------------------
# What is run


@dataclass(frozen=True)
class Matrix:
    """
    Attributes:
        specs: (recipe, estimator or "-") -> spec.
        lacking: recipe -> why it is not run.
    """

    specs: dict[tuple[str, str], str] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)


def matrix(names: Iterable[str], estimators: Sequence[str]) -> Matrix:
    """Recipes by estimators, as specs."""
    out = Matrix()
    for name in names:
        known = arguments(recipes()[name])
        needed = [key for key, default in known.items() if default is inspect.Parameter.empty]
        values = {key: VALUES.get(f"{name}.{key}", VALUES.get(key)) for key in needed}
        if unknown := [key for key, value in values.items() if value is None]:
            out.lacking[name] = f"this benchmark has no value for {', '.join(unknown)}"
            continue
        given = [f"{key}={value}" for key, value in values.items()]
        for estimator in estimators if "estimator" in known else ["-"]:
            chosen = given if estimator == "-" else [*given, f"estimator={estimator}"]
            out.specs[name, estimator] = f"{name}:{','.join(chosen)}"
    return out


def by_annealing(model: Any, guide: Any, test: pv.Batch, seed: int, rows: int = 100) -> Tensor:
    """A judge that does not depend on the guide: short chains from the prior, on the first rows."""
    from pyro_vae.evaluation.annealing import annealed

    part = test.rows(slice(0, rows))
    chains: dict[str, Any] = {"chains": 4, "temperatures": 100, "leapfrog": 5}
    return annealed(model, part, **chains, seed=seed).log_p


JUDGES: dict[str, Any] = {"none": None, "annealed": by_annealing}


def measure(
    pair: Pair,
    names: Sequence[str],
    out: Path,
    seeds: int,
    epochs: int,
    num_particles: int,
    judge: str = "none",
    jobs: int = 1,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Records of what was trained, best first, and of what was refused."""
    train, test = (pv.data.load(pair.data, part, ["x"]) for part in ("train", "test"))
    asked = matrix(names, pair.estimators)
    comparison = pv.compare(
        pair.build,
        train,
        test,
        {label(*key): spec for key, spec in asked.specs.items()},
        range(seeds),
        options=pair.options,
        num_particles=num_particles,
        judge=JUDGES[judge] if pair.continuous else None,
        refused="record",
        jobs=jobs,
        out=out,
        epochs=epochs,
        progress=progress,
    )
    refused = [{"objective": n, "seeds": [], "reason": why} for n, why in asked.lacking.items()]
    return {
        "cells": records(comparison, asked),
        "refused": [*comparison.refusals(), *refused],
        "reference": comparison.objectives[0] if comparison.objectives else None,
    }


def label(recipe: str, estimator: str) -> str:
    return recipe if estimator == "-" else f"{recipe}, {estimator}"


def records(comparison: pv.Comparison, asked: Matrix) -> list[dict[str, Any]]:
    """A record an objective, by its held-out log p."""
    out = []
    for (recipe, estimator), spec in asked.specs.items():
        name = label(recipe, estimator)
        if name not in comparison.objectives:
            continue
        found = summaries(comparison, name)
        record: dict[str, Any] = {"objective": name, "recipe": recipe, "estimator": estimator}
        record |= {"spec": spec, "seeds": seeds_of(comparison, name)}
        for which in ("log_p", "elbo", "rate", *(["judged"] if comparison.judged else [])):
            record[which], record[f"{which}_se"] = mean_and_error(quantity(comparison, name, which))
            record[f"{which}_gain"], record[f"{which}_gain_se"] = gain(
                comparison, name, comparison.objectives[0], which
            )
        record["active_units"] = [sum(s["active_units"].values()) for s in found]
        khat = [s["khat_median"] for s in found if s["khat_median"] is not None]
        record["khat_median"] = sum(khat) / len(khat) if khat else None
        seconds = [comparison.seconds[name, seed] for seed in record["seeds"]]
        out.append(record | {"seconds": sum(seconds) / len(seconds)})
    return sorted(out, key=lambda record: -record["log_p"])


# ---------------------------------------------------------------------------------------------
# How it is shown


def table(name: str, result: dict[str, Any]) -> list[str]:
    """Best first; then what is refused, by reason."""
    cells, reference = result["cells"], result["reference"]
    judged = any("judged" in r for r in cells)
    head = ["objective", "log p >=", "gain", "ELBO", "rate", *(["judge"] if judged else [])]
    rows = [[*head, "active", "k-hat", "s"]]
    for r in cells:
        gained = _with_error(r, "log_p_gain", "+")
        row = [
            r["objective"],
            _with_error(r, "log_p"),
            "-" if r["objective"] == reference else gained,
        ]
        row += [_with_error(r, "elbo"), _short(r["rate"])]
        row += [_with_error(r, "judged")] if judged else []
        row += [" ".join(map(str, r["active_units"]))]
        row += ["-" if r["khat_median"] is None else f"{r['khat_median']:.2f}"]
        rows.append([*row, f"{r['seconds']:.1f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    told = f"{name}: gain over {reference}, paired by seed and row"
    refused: dict[str, list[str]] = {}
    for r in result["refused"]:
        refused.setdefault(r["reason"], []).append(r["objective"])
    return [
        told,
        lines[0],
        "-" * len(lines[0]),
        *lines[1:],
        *(f"refused: {'; '.join(which)}: {why}" for why, which in refused.items()),
        "",
    ]


def _with_error(record: dict[str, Any], name: str, sign: str = "") -> str:
    return f"{_short(record[name], sign)} ± {_short(record[f'{name}_se'])}"


def _short(number: float, sign: str = "") -> str:
    """To a hundredth, unless that is no part of it any more."""
    return format(number, f"{sign}.2f" if abs(number) < 1e4 else f"{sign}.1e")


@styled()
def figure(results: dict[str, dict[str, Any]]) -> Picture:
    """Gains in held-out log p, a panel a pair, a line a recipe, a colour an estimator; arrows: worse
    than ``WIDE`` nats."""
    found = [r for result in results.values() for r in result["cells"]]
    best: dict[str, float] = {}
    for r in found:
        best[r["recipe"]] = max(best.get(r["recipe"], -float("inf")), r["log_p_gain"])
    order = sorted(best, key=lambda recipe: -best[recipe])
    colours = dict(zip(dict.fromkeys(r["estimator"] for r in found), COLOURS, strict=False))
    picture = Picture(
        figsize=(2.4 + 3.4 * len(results), 1.8 + 0.36 * len(order)), layout="constrained"
    )
    panels = picture.subplots(1, len(results), squeeze=False, sharey=True)[0]
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        for estimator, colour in colours.items():
            mine = [r for r in result["cells"] if r["estimator"] == estimator]
            beside = [e for e in colours if e != "-"]
            place = beside.index(estimator) - (len(beside) - 1) / 2 if estimator != "-" else 0.0
            heights = [order.index(r["recipe"]) + 0.16 * place for r in mine]
            near = [(r, at) for r, at in zip(mine, heights, strict=True) if r["log_p_gain"] > -WIDE]
            axes.errorbar(
                [r["log_p_gain"] for r, _ in near],
                [at for _, at in near],
                xerr=[r["log_p_gain_se"] for r, _ in near],
                fmt="o",
                ms=4,
                lw=1.2,
                color=colour,
                label={"-": "its own"}.get(estimator, estimator),
            )
            edge = [at for r, at in zip(mine, heights, strict=True) if r["log_p_gain"] <= -WIDE]
            if edge:
                axes.plot([-WIDE] * len(edge), edge, "<", color=colour, ms=5, clip_on=False)
        axes.axvline(0, color=GREY, linewidth=1, zorder=0)
        if min((r["log_p_gain"] for r in result["cells"]), default=0.0) < -WIDE:
            axes.set_xlim(left=-WIDE)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_title(name)
        axes.set_xlabel(f"gain over\n{result['reference']} (nats)")
        axes.grid(axis="y", color="#EEEEEE")
    panels[0].set_yticks(range(len(order)), order)
    panels[0].set_ylim(len(order) - 0.5, -0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", default=list(BY_DEFAULT), choices=list(PAIRS))
    parser.add_argument("--recipes", nargs="+", default=list(recipes()), choices=list(recipes()))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--num-particles", type=int, default=500)
    parser.add_argument("--judge", default="none", choices=list(JUDGES))
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--quick", action="store_true", help="a look: " + str(SHORT))
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the report")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        given |= SHORT
    out, results_folder = given.pop("out"), given.pop("results")
    chosen, names = given.pop("pairs"), given.pop("recipes")
    results = {
        name: measure(PAIRS[name], names, out / name.replace(" ", "_"), **given) for name in chosen
    }
    lines = [line for name, result in results.items() for line in table(name, result)]
    values = ", ".join(f"{key}={value}" for key, value in VALUES.items())
    lines += [
        f"nats; mean ± standard error over rows and seeds; arguments where a recipe asks: {values}",
        "s: seconds of training; active: units by seed",
    ]
    write("objectives", given, results, "\n".join(lines), results_folder)
    save(figure(results), results_folder / "objectives.png")


if __name__ == "__main__":
    main()
