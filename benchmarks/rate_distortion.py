"""What does beta trade, does the rate fall as it grows, and what holds a rate up?

Rate and distortion over beta (Alemi et al. 2018) on binary digits, with the rate of free bits (Kingma et
al. 2016) over their floor, for a decoder that takes pixels to be independent given z, and for one that
reads the pixels before; that one also on rows that need no z, a Markov chain, where the ELBO leaves z
unused (Bowman et al. 2016).

    python -m benchmarks.rate_distortion --out runs/rate_distortion

Stopped and started again it goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks.cells import gain, mean_and_error, quantity, summaries
from benchmarks.report import RESULTS, write
from pyro_vae.conditionals import StandardNormal
from pyro_vae.objectives.rates import FreeBits
from pyro_vae.reporting import plots
from pyro_vae.reporting.style import COLOURS, GREY, Picture, new, save, styled

BETAS = (0.125, 0.25, 0.5, 0.7, 1.0, 1.4, 2.0)
FLOORS = (2.0, 5.0, 10.0, 20.0)  # nats of all latents together
QUANTITIES = ("rate", "distortion", "elbo", "log_p")
OPTIONS: dict[str, Any] = {"latent": 8, "hidden": (64, 64)}


class Autoregressive(nn.Module):
    """z ~ N(0, I), pixel i ~ Bernoulli(f_i(x_<i, z)) by a masked network (Germain et al. 2015).

    It reads the pixels before from the batch: it scores rows and draws none.
    """

    def __init__(self, pixels: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.prior = StandardNormal(latent)
        order = torch.arange(pixels)
        self.net = ConditionalAutoRegressiveNN(pixels, latent, [hidden], [1], order)  # type: ignore[arg-type]

    def logits(self, x: Tensor, z: Tensor) -> Tensor:
        """``[..., B, pixels]``."""
        out: Tensor = self.net(x.expand(*z.shape[:-1], -1), z)
        return out

    def forward(self, batch: pv.Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", self.prior())
            logits = self.logits(batch["x"], z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1))


def autoregressive(batch: pv.Batch, latent: int, hidden: Sequence[int]) -> tuple[Any, Any]:
    """The guide of the other pair, and a decoder that could do without it."""
    _, guide = pv.pairs.vae(batch, latent=latent, hidden=hidden)
    pixels = batch.shape("x")[1]
    return Autoregressive(pixels, latent, 2 * pixels), guide


def chain(rows: int, seed: int, pixels: int = 32) -> pv.Batch:
    """Binary rows in which a pixel is the one before with probability .9."""
    generator = torch.Generator().manual_seed(seed)
    turns = torch.rand(rows, pixels, generator=generator) > 0.9
    turns[:, 0] = torch.rand(rows, generator=generator) < 0.5
    return pv.Batch({"x": (turns.cumsum(1) % 2).to(torch.get_default_dtype())})


def sweep(betas: Sequence[float]) -> dict[str, Any]:
    """Name -> recipe."""
    return {f"{beta:g}": f"beta_vae:beta={beta}" for beta in betas}


def floors(nats: Sequence[float]) -> dict[str, Any]:
    """Name -> what makes an objective; the ELBO has the floor 0."""
    made = {f"{n:g}": partial(pv.Objective, rate=FreeBits(n, per="site")) for n in nats}
    return {"0": "mean_field", **made}


# ---------------------------------------------------------------------------------------------
# What is measured


def record(comparison: pv.Comparison, name: str) -> dict[str, Any]:
    """Every quantity of one objective with its standard error, and the seeds' active units."""
    out: dict[str, Any] = {}
    for which in QUANTITIES:
        out[which], out[f"{which}_se"] = mean_and_error(quantity(comparison, name, which))
    active = [sum(s["active_units"].values()) for s in summaries(comparison, name)]
    return out | {"active_units": active}


def steps(comparison: pv.Comparison, which: str) -> list[tuple[float, float]]:
    """From each objective to the next, paired by seed and row: the change and its standard error."""
    return [gain(comparison, b, a, which) for a, b in pairwise(comparison.objectives)]


def monotone(changes: Sequence[tuple[float, float]], sign: int) -> str:
    """Whether all changes have a sign, and by how many standard errors at least."""
    least = min(sign * change / error for change, error in changes)
    verb = "falls" if sign < 0 else "rises"
    wrong = sum(sign * change <= 0 for change, _ in changes)
    told = "at every step" if wrong == 0 else f"at {len(changes) - wrong} of {len(changes)} steps"
    return f"{verb} {told}, the least by {least:.1f} standard errors"


# ---------------------------------------------------------------------------------------------
# How it is shown


def table(head: str, records: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"{head:>6}  {'rate':>15}  {'distortion':>15}  {'ELBO':>15}  {'log p >=':>15}  active"]
    lines.append("-" * len(lines[0]))
    for name, r in records.items():
        cells = [f"{r[which]:.2f} ± {r[f'{which}_se']:.2f}" for which in QUANTITIES]
        active = " ".join(map(str, r["active_units"]))
        lines.append("  ".join([f"{name:>6}", *(f"{cell:>15}" for cell in cells), active]))
    return [*lines, ""]


@styled()
def curve(records: dict[str, dict[str, Any]]) -> Picture:
    """The plane of rate and distortion, betas in a line."""
    picture: Picture = plots.rate_distortion(
        {f"\N{GREEK SMALL LETTER BETA} = {beta}": r for beta, r in records.items()}
    )
    places = [(r["rate"], r["distortion"]) for r in records.values()]
    picture.axes[0].plot(*zip(*places, strict=True), color=GREY, linewidth=1, zorder=1)
    return picture


@styled()
def held(results: dict[str, dict[str, dict[str, Any]]]) -> Picture:
    """The rate over its floor, for each decoder."""
    picture, (axes,) = new(6.4, 4.6)
    top = max(float(floor) for records in results.values() for floor in records)
    axes.plot([0, top], [0, top], "--", color=GREY, linewidth=1, label="rate = floor", zorder=0)
    for (name, records), colour in zip(results.items(), COLOURS, strict=False):
        at = [float(floor) for floor in records]
        rate, error = ([r[q] for r in records.values()] for q in ("rate", "rate_se"))
        axes.errorbar(at, rate, error, fmt="o-", color=colour, label=name, linewidth=1.6)
    axes.set_xlabel("floor of the rate in training (nats); 0: the ELBO")
    axes.set_ylabel("rate of held-out rows (nats)")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.legend(loc="upper left")
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-particles", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/rate_distortion"))
    given = parser.parse_args()
    train, test = (pv.data.load("digits_binary", part, ["x"]) for part in ("train", "test"))

    def compared(
        build: Any, objectives: dict[str, Any], folder: str, data: Any = (train, test), **more: Any
    ) -> pv.Comparison:
        return pv.compare(
            *(build, *data, objectives, range(given.seeds)),
            options=OPTIONS,
            num_particles=given.num_particles,
            jobs=given.jobs,
            out=given.out / folder,
            **{"epochs": given.epochs, **more},
        )

    betas = compared(pv.pairs.vae, sweep(BETAS), "beta")
    points = {name: record(betas, name) for name in betas.objectives}
    lines = ["binary digits, pixels independent given z", *table("beta", points)]
    for which, sign in (("rate", -1), ("distortion", 1)):
        lines.append(f"{which} {monotone(steps(betas, which), sign)}")
    fast = partial(torch.optim.Adam, lr=3e-3, fused=True)
    rows = {"data": (chain(8000, 0), chain(1000, 1)), "optimizer": fast}
    cases: dict[str, tuple[Any, Sequence[float], dict[str, Any]]] = {
        "pixels independent given z": (pv.pairs.vae, FLOORS, {}),
        "autoregressive": (autoregressive, FLOORS, {}),
        "autoregressive, of a Markov chain": (autoregressive, FLOORS[:2], rows),
    }
    free: dict[str, dict[str, dict[str, Any]]] = {}
    for name, (build, nats, options) in cases.items():
        found = compared(
            build, floors(nats), f"floor-{name.replace(', ', '-').split()[0]}", **options
        )
        free[name] = {floor: record(found, floor) for floor in found.objectives}
        lines += ["", f"free bits, {name} (floor 0: the ELBO)", *table("floor", free[name])[:-1]]
    lines += [
        "",
        f"nats; held-out rows; mean ± standard error over rows and {given.seeds} seeds; active: units "
        f"of {OPTIONS['latent']}, by seed",
    ]
    settings = {"data": "digits_binary", **OPTIONS, "epochs": given.epochs, "seeds": given.seeds}
    settings |= {"num_particles": given.num_particles}
    write("rate_distortion", settings, {"beta": points, "free bits": free}, "\n".join(lines))
    save(curve(points), RESULTS / "rate_distortion.png")
    save(held(free), RESULTS / "free_bits.png")


if __name__ == "__main__":
    main()
