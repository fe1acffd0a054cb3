"""How well are entries filled in that are missing because of their value?

The protocol of Ipsen, Mattei & Frellsen (2021), Table 1, by the appendix and the authors' code: the
whole table, target dropped, standardised; in the first D // 2 columns every value above the column's
mean is missing; 128-128 tanh encoder of zero-filled rows, D - 1 latents, K = 20, batch 16, 100,000
steps of Adam at 1e-3; RMSE on the missing cells, by self-normalised importance sampling with 10,000
particles. The decoder is 128-128 tanh with mean and scale, of PPCA rows linear with one learned scale.
"agnostic" is a logistic regression of the mask on all columns. The filled-in value is the weighted mean
of the decoder's means, as in that code; beside it that of the drawn entries, E[x_mis | x_obs, s].

    PYRO_VAE_DATA=... python -m benchmarks.not_miwae --data breast --row "not-MIWAE, sign known"

All seeds are one program: they share the order of the rows, and nothing else. Every row takes up
where it was stopped; one that is complete is not run again.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro.nn import PyroModule
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks.report import folder_of, keep, kept, write
from pyro_vae.conditionals import Bernoulli, DiagonalGaussian, Gaussian, StandardNormal
from pyro_vae.evaluation.likelihood import judging
from pyro_vae.evaluation.proposals import log_weights_of
from pyro_vae.guides import JointGuide
from pyro_vae.models import LatentVariableModel, SelectionModel
from pyro_vae.nn import Stacked, ZeroFilled, mlp
from pyro_vae.objectives.particles import run
from pyro_vae.pairs.missing import MECHANISMS

BATCH, K, HIDDEN = 16, 20, (128, 128)
DATA = {"breast": "", "wine_red": "wine_red", "wine_white": "wine_white", "banknote": "banknote"}


class Row(NamedTuple):
    """A row of the table: is the decoder linear, which mask model, and what is published."""

    linear: bool
    mechanism: str | None
    published: dict[str, str]


def published(banknote: str, red: str, white: str, breast: str) -> dict[str, str]:
    return {"banknote": banknote, "wine_red": red, "wine_white": white, "breast": breast}


MEAN = "mean"
ROWS = {
    "PPCA": Row(True, None, published("1.39", "1.61", "1.57", "0.90")),
    "not-MIWAE PPCA, agnostic": Row(
        True, "linear", published("1.25±.15", "1.32", "1.27±.01", "0.78")
    ),
    "not-MIWAE PPCA, self-masking": Row(
        True, "self_masking", published("0.57", "1.13", "0.99", "0.72")
    ),
    "not-MIWAE PPCA, sign known": Row(
        True, "hides_large", published("0.57", "1.13", "0.99", "0.72")
    ),
    "MIWAE": Row(False, None, published("1.19±.01", "1.62±.01", "1.55±.01", "1.20±.01")),
    "not-MIWAE, agnostic": Row(
        False, "linear", published("0.80±.08", "1.30±.01", "1.37", "1.10±.01")
    ),
    "not-MIWAE, self-masking": Row(
        False, "self_masking", published("1.88±.85", "1.08±.02", "1.04±.01", "0.74±.01")
    ),
    "not-MIWAE, sign known": Row(
        False, "hides_large", published("0.74±.05", "1.07", "1.04", "0.76±.01")
    ),
    MEAN: Row(False, None, published("1.73", "1.83", "1.74", "1.82")),
}


def table_of(name: str) -> Tensor:
    """``[N, D]``, standardised, without the target."""
    if name == "breast":
        x = torch.as_tensor(load_breast_cancer().data)
    else:
        x = pv.data.load("uci_tabular", sites=[name])[name].double()[:, :-1]
    return ((x - x.mean(0)) / x.std(0, correction=0)).to(torch.get_default_dtype())


def hidden_above_mean(x: Tensor) -> pv.Batch:
    """Sites x and s: in the first half of the columns what is above the mean is missing."""
    missing = torch.zeros_like(x, dtype=torch.bool)
    half = x.shape[1] // 2
    missing[:, :half] = x[:, :half] > x[:, :half].mean(0)
    return pv.Batch({"x": x.masked_fill(missing, torch.nan)}).with_mask()


class Seeds(PyroModule):
    """A program, S times: its rows are the (seed, row)."""

    def __init__(self, program: nn.Module, size: int) -> None:
        super().__init__()
        self.program, self.size = program, size

    def forward(self, batch: pv.Batch) -> Any:
        with pyro.plate("seeds", self.size, dim=-2):
            return self.program(batch)


def nets(row: Row, batch: pv.Batch, seed: int) -> dict[str, nn.Module]:
    """The networks of one training, at their start."""
    pyro.set_rng_seed(seed)
    columns = batch["x"].shape[1]
    latent = columns - 1
    made: dict[str, nn.Module] = {
        "encoder": mlp((columns, *HIDDEN, 2 * latent), nn.Tanh),
        "decoder": mlp((latent, columns))
        if row.linear
        else mlp((latent, *HIDDEN, 2 * columns), nn.Tanh),
    }
    if row.mechanism is not None:

        def selecting(outputs: Sequence[int]) -> nn.Module:
            return MECHANISMS[row.mechanism or ""]((columns,), outputs, HIDDEN, nn.Tanh)

        made["mechanism"] = Bernoulli.build(selecting, (columns,), batch["s"]).net
    return made


def pair(row: Row, batch: pv.Batch, seeds: Sequence[int]) -> tuple[nn.Module, nn.Module]:
    """Model and guide of all seeds."""
    columns = batch["x"].shape[1]
    each = [nets(row, batch, seed) for seed in seeds]
    net = {name: Stacked([one[name] for one in each]) for name in each[0]}
    likelihood: nn.Module = (
        Gaussian(net["decoder"], (columns,), scale=torch.ones(len(seeds), 1, 1))
        if row.linear
        else DiagonalGaussian(net["decoder"], (columns,))
    )
    prior = StandardNormal(columns - 1)
    model: nn.Module = LatentVariableModel(prior, likelihood)
    if row.mechanism is not None:
        model = SelectionModel(prior, likelihood, Bernoulli(net["mechanism"], (columns,)))
    features = {"x": ZeroFilled(nn.Identity(), (columns,))}
    posterior = DiagonalGaussian(net["encoder"], (columns - 1,))
    guide = JointGuide(features, posterior, {"x": (columns,)})
    return Seeds(model, len(seeds)), Seeds(guide, len(seeds))


class Weighted:
    """Self-normalised sums over particles at constant memory."""

    def __init__(self) -> None:
        self.log_total = torch.tensor(-torch.inf)
        self.square = torch.zeros(())
        self.means = [torch.zeros(()), torch.zeros(())]

    def add(self, log_w: Tensor, values: Sequence[Tensor]) -> None:
        """log w ``[k, S, B]``, each of the values ``[k, S, B, D]``."""
        total = torch.logaddexp(self.log_total, log_w.logsumexp(0))
        old, new = (self.log_total - total).exp(), (log_w - total).exp()
        self.square = old.square() * self.square + new.square().sum(0)
        self.means = [
            old[..., None] * mean + torch.einsum("ksb,ksbd->sbd", new, value)
            for mean, value in zip(self.means, values, strict=True)
        ]
        self.log_total = total


@torch.no_grad()
def filled(
    model: nn.Module, guide: nn.Module, data: pv.Batch, particles: int, chunk: int = 50
) -> dict[str, Tensor]:
    """``means`` and ``draws`` ``[S, N, D]``: weighted means of the decoder's means and of the entries
    drawn; ``ess`` and ``log_p`` ``[S, N]``."""
    found: dict[str, list[Tensor]] = {"means": [], "draws": [], "ess": [], "log_p": []}
    with judging(model, guide, 0):
        for rows in torch.arange(len(data)).split(500):
            batch, sums = data.rows(rows), Weighted()
            plan = pv.iwae(1).plan(model, guide, (batch,), {})
            for _ in range(particles // chunk):
                table = run(model, guide, (batch,), {}, plan, chunk)
                x = table.model["x"]
                log_w = log_weights_of(table).reshape(chunk, -1, len(rows))
                sums.add(log_w, [x["infer"]["source"].mean, x["value"]])
            found["means"].append(sums.means[0])
            found["draws"].append(sums.means[1])
            found["ess"].append(1 / sums.square)
            found["log_p"].append(sums.log_total - torch.tensor(float(particles)).log())
    return {name: torch.cat(parts, 1) for name, parts in found.items()}


def rmse(came: Tensor, x: Tensor, missing: Tensor) -> Tensor:
    """Over the missing cells, ``[S, N, D] -> [S]``."""
    return ((came - x).square() * missing).sum((1, 2)).div(missing.sum()).sqrt()


def measured(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One row on one table, all seeds."""
    x = table_of(given.data)
    batch = hidden_above_mean(x)
    missing, row = ~batch.mask("x"), ROWS[given.row]
    record = {name: getattr(given, name) for name in KEY}
    if given.row == MEAN:
        seen = x.masked_fill(missing, torch.nan).nanmean(0)
        return record | {"rmse": rmse(seen.expand(1, *x.shape), x, missing).tolist()}
    seeds = list(range(given.seeds))
    model, guide = pair(row, batch, seeds)
    data = batch if row.mechanism else batch.without("s")
    trained = pv.fit(
        model,
        guide,
        data,
        pv.iwae(K),
        steps=given.steps,
        batch_size=BATCH,
        # a loss per (seed, row) divides by S: so does eps, and every seed takes the steps of its own
        optimizer=functools.partial(torch.optim.Adam, lr=1e-3, eps=1e-8 / len(seeds), fused=True),
        compile=given.compile,
        seed=given.seed,
        out=folder,
        resume=(folder / "state.safetensors").exists(),
        progress=True,
    )
    started = time.monotonic()
    found = filled(model, guide, data, given.particles)
    return record | {
        "rmse": rmse(found["means"], x, missing).tolist(),
        "rmse_draws": rmse(found["draws"], x, missing).tolist(),
        "ess": float(found["ess"].median()),
        "log_p": found["log_p"].mean(1).tolist(),
        "seconds": trained.history[-1]["seconds"],
        "loss": trained.history[-1]["loss"],
        "level": trained.level,
        "evaluation_seconds": time.monotonic() - started,
    }


KEY = ("data", "row", "seeds", "steps", "particles", "seed")


def cell(values: Sequence[float]) -> str:
    """Mean and standard error over seeds."""
    found = torch.tensor(values)
    if len(found) < 2:
        return f"{found.mean():.3f}"
    return f"{found.mean():.3f} ± {found.std() / len(found) ** 0.5:.3f}"


def table(records: list[dict[str, Any]]) -> str:
    head = (
        f"{'data':<11} {'row':<29} {'published':<10} {'RMSE':<15} {'of the draws':<15}"
        f" {'log p >=':>9} {'ESS':>6} {'steps':>7} {'ms/step':>8}"
    )
    lines = [head, "-" * len(head)]
    for data in DATA:
        for name, row in ROWS.items():
            start = f"{data:<11} {name:<29} {row.published[data]:<10} "
            done = [r for r in records if (r["data"], r["row"]) == (data, name)]
            for r in sorted(done, key=lambda r: r["steps"]):
                line = start + f"{cell(r['rmse']):<15}"
                if name != MEAN:
                    line += (
                        f" {cell(r['rmse_draws']):<15} {torch.tensor(r['log_p']).mean():>9.2f}"
                        f" {r['ess']:>6.0f} {r['steps']:>7} {1e3 * r['seconds'] / r['steps']:>8.2f}"
                    )
                lines.append(line.rstrip())
            if not done:
                lines.append(start + "not run")
    note = (
        "RMSE on the missing cells in units of the standard deviation, mean ± standard error over "
        "seeds; log p(x_obs, s), without s where there is no mask model, in nats per row; ESS: median"
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=DATA, default="breast")
    parser.add_argument("--row", choices=ROWS, default="MIWAE")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--particles", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the order of rows and of draws")
    parser.add_argument("--compile", default="compiled")
    parser.add_argument("--out", type=Path, default=Path("runs/not_miwae"))
    parser.add_argument("--name", default="not_miwae", help="of the files in results/")
    given = parser.parse_args()

    records = kept(given.out)
    if not any(all(r[name] == getattr(given, name) for name in KEY) for r in records):
        folder = folder_of(given.out, *(getattr(given, name) for name in KEY))
        folder.mkdir(parents=True, exist_ok=True)
        new = measured(given, folder)
        records = [*kept(given.out), new]
        keep(given.out, records)
    settings = {
        "encoder": "128-128 tanh of zero-filled rows",
        "K": K,
        "batch": BATCH,
        "optimizer": "Adam 1e-3",
        "data": "wine and banknote from uci_tabular.npz, breast from scikit-learn",
    }
    write(given.name, settings, records, table(records))


if __name__ == "__main__":
    main()
