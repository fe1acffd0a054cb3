"""How much of IWAE's advantage over the ELBO is the model's, and how much the guide's?

Importance sampling judges a pair: its bound on log p(x) is low where the guide is poor. Annealed
importance sampling starts from the prior and judges the model alone (Wu et al. 2017). Pairs trained on
the digits by the same number of steps and particles; differences are paired by row. How tight it is
itself is told by bidirectional Monte Carlo on rows of each model's own (Grosse et al. 2015).

    python -m benchmarks.annealed
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import pyro_vae as pv
from benchmarks.report import write
from pyro_vae.evaluation.annealing import annealed, bidirectional
from pyro_vae.evaluation.likelihood import Difference, mean_and_error

OBJECTIVES = ("elbo", "iwae", "iwae, dreg")
QUANTITIES = ("elbo", "log_p_tenth", "log_p", "annealed")


def objective(name: str, particles: int) -> pv.Objective:
    recipe, _, estimator = name.partition(", ")
    return {"elbo": pv.elbo, "iwae": pv.iwae}[recipe](particles, estimator or "pathwise")


def measure(name: str, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """A record, and nats row by row of each quantity."""
    train, test = (pv.data.load("digits", part, ["x"]) for part in ("train", "test"))
    torch.manual_seed(options.seed)
    model, guide = pv.pairs.vae(train, latent=8, hidden=(64, 64))
    since = time.perf_counter()
    loss = objective(name, options.train_particles)
    pv.fit(model, guide, train, loss, steps=options.steps, batch_size=64, seed=options.seed)
    trained = time.perf_counter()
    judged = pv.evaluate(model, guide, test, options.particles, seed=options.seed)
    sampled = time.perf_counter()
    path: dict[str, Any] = {"chains": options.chains, "temperatures": options.temperatures}
    path |= {"leapfrog": options.leapfrog, "seed": options.seed, "batch_size": len(test)}
    chains = annealed(model, test, pilot=train.rows(slice(0, 32)), **path)
    walked = time.perf_counter()
    both = bidirectional(model, test.rows(slice(0, options.rows)), **path)
    rows = {quantity: getattr(judged, quantity) for quantity in QUANTITIES[:3]}
    rows["annealed"] = chains.log_p
    record: dict[str, Any] = {"objective": name}
    for quantity, values in rows.items():
        record[quantity], record[f"{quantity}_se"] = mean_and_error(values)
    record |= {"khat_median": judged.summary()["khat_median"], "proposals": judged.proposals}
    record |= {"annealing": chains.summary(), "bidirectional": both.summary()}
    record["seconds"] = {
        "training": trained - since,
        "importance sampling": sampled - trained,
        "annealing": walked - sampled,
        "bidirectional": time.perf_counter() - walked,
    }
    return record, rows


def differences(first: dict[str, Any], other: dict[str, Any]) -> dict[str, Difference]:
    """What the second pair gains over the first, paired by row: in all quantities, in the model's
    share, and in what is left of importance sampling's slack, the guide's."""
    gains = {q: (other[q] - first[q]).double() for q in QUANTITIES}
    gains["guide"] = gains["log_p"] - gains["annealed"]
    return {name: Difference(*mean_and_error(gain)) for name, gain in gains.items()}


def table(records: list[dict[str, Any]], options: argparse.Namespace) -> str:
    k, annealing = options.particles, records[0]["annealing"]
    head = f"{'objective':11s} {'ELBO':>16s} {f'IS, K = {k // 10}':>16s} {f'IS, K = {k}':>16s}"
    lines = [f"{head} {'AIS':>16s}   k-hat   AIS s"]
    for r in records:
        cells = [f"{r[q]:9.3f} ± {r[f'{q}_se']:.3f}" for q in QUANTITIES]
        lines.append(
            f"{r['objective']:11s} {'  '.join(cells)}  {r['khat_median']:6.2f}  "
            f"{r['seconds']['annealing']:6.1f}"
        )
    lines += ["", f"gain over {records[0]['objective']}, paired by row (nats)"]
    for r in records[1:]:
        gain = {name: Difference(*values) for name, values in r["gain"].items()}
        lines.append(
            f"{r['objective']:11s} ELBO {gain['elbo']}, IS at K = {k} {gain['log_p']}: the model's "
            f"(AIS) {gain['annealed']}, the guide's (IS - AIS) {gain['guide']}"
        )
    lines += ["", f"bidirectional, {options.rows} rows of each model's own"]
    for r in records:
        b = r["bidirectional"]
        lines.append(
            f"{r['objective']:11s} {b['lower']:.3f} ± {b['lower_se']:.3f} to {b['upper']:.3f} ± "
            f"{b['upper_se']:.3f}, gap {b['gap']:.4f} ± {b['gap_se']:.4f}"
        )
    lines += [
        "",
        f"AIS: {annealing['chains']} chains from the prior, {annealing['temperatures']} temperatures of "
        f"{annealing['leapfrog']} leapfrog steps. Errors are over {annealing['rows']} rows, one "
        "training each.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--train-particles", type=int, default=50)
    parser.add_argument("--particles", type=int, default=5000)
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--temperatures", type=int, default=150)
    parser.add_argument("--leapfrog", type=int, default=10)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    records, every = zip(*(measure(name, options) for name in OBJECTIVES), strict=True)
    for record, rows in zip(records[1:], every[1:], strict=True):
        gains = differences(every[0], rows)
        record["gain"] = {name: (gain.mean, gain.error) for name, gain in gains.items()}
    write("annealed", vars(options), list(records), table(list(records), options))


if __name__ == "__main__":
    main()
