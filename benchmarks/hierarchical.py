"""What do layers of latents buy on dynamically binarized MNIST, and which guide uses them?

Protocol of ``benchmarks.burda``. One layer is 784-200-200-(50), two are 784-200-200-(100)-100-100-(50),
both tanh and mirrored (Burda et al. 2016); five are 64-32-16-8-4 with two layers each of 512, 256, 128,
64 and 32 units, leaky ReLU and batch norm (Sønderby et al. 2016). Guides: from the bottom up, a ladder
(precision-weighted), residual (NVAE's); for one layer they are the same. All rows have the same epochs
and batch; what they cost is in the table.

    PYRO_VAE_DATA=... python -m benchmarks.hierarchical --epochs 300
    ... --net "2 bottom-up" --objective iwae:num_particles=5,estimator=dreg --seed 0 --seed 1
    ... --objective "beta_vae:beta=linear(60000)"     warm-up, under which ladders were published
    ... --device cuda --objective iwae:num_particles=50 --epochs 3000 --batch 1000

Rows are trained one after the other, each from where it stopped; ``--minutes`` is for the call. Those
that nobody has run say so. On one CPU core 300 epochs of two layers under IWAE with 5 particles take 0.7
hours as machine code, and judging with K = 1000 two minutes; five layers, by the time of eager steps,
2.3 to 2.9 hours (ELBO) and 4.9 to 7.4 (IWAE).
"""

from __future__ import annotations

import argparse
import functools
import time
from typing import Any

from torch import nn

import pyro_vae as pv
from benchmarks import burda
from benchmarks.report import folder_of, keep, kept, write
from pyro_vae.guides import precision_weighted, residual

MERGES: dict[str, Any] = {"bottom-up": None, "ladder": precision_weighted, "residual": residual}
SIZES: dict[int, dict[str, Any]] = {
    1: {"latent": 50, "hidden": ((200, 200),), "activation": nn.Tanh},
    2: {"latent": (100, 50), "hidden": ((200, 200), (100, 100)), "activation": nn.Tanh},
    5: {
        "latent": (64, 32, 16, 8, 4),
        "hidden": tuple((n, n) for n in (512, 256, 128, 64, 32)),
        "activation": nn.LeakyReLU,
        "norm": nn.BatchNorm1d,
    },
}
LR = {1: 3e-3, 2: 1e-3, 5: 1e-3}  # at 3e-3 two layers stall
NETS = ["1", *(f"{layers} {merge}" for layers in (2, 5) for merge in MERGES)]
OBJECTIVES = ("elbo", "iwae:num_particles=5")
PUBLISHED = (
    "published, K = 5000, batch 20, 3280 epochs: 1 layer VAE K = 5 86.47 (19 active), IWAE K = 5 85.54 "
    "(22); 2 layers VAE K = 5 85.01 (17 + 5), IWAE K = 50 82.90 (26 + 7); batch 256, 2000 epochs with "
    "warm-up: 5 layers VAE 82.74, ladder 82.12"
)


def layers_of(net: str) -> int:
    return int(net.partition(" ")[0])


def build(net: str) -> Any:
    """What makes the pair of a row."""
    merge = MERGES[net.partition(" ")[2] or "bottom-up"]
    return functools.partial(pv.pairs.hierarchical, merge=merge, **SIZES[layers_of(net)])


def simpler(net: str, cells: burda.Cells) -> list[str]:
    """Of the nets that there are, those with fewer layers and the same guide, and the bottom-up one."""
    layers, _, guide = net.partition(" ")
    fewer = [n for n in cells if layers_of(n) < int(layers) and n.partition(" ")[2] in ("", guide)]
    plain = f"{layers} bottom-up"
    return [*fewer, *([plain] if plain in cells and plain != net else [])]


def over_elbo(objective: str, cells: burda.Cells) -> list[str]:
    return [o for o in cells if o.partition(":")[0] == "elbo" and o != objective]


def compared(records: list[dict[str, Any]], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Every net with simpler ones, and every objective with the ELBO."""
    alike = ("epochs", "batch", "asked_lr")
    of_nets = burda.gains(
        records, given.out, ("objective", *alike), lambda r: str(r["net"]), simpler
    )
    of_objectives = burda.gains(
        records, given.out, ("net", *alike), lambda r: str(r["objective"]), over_elbo
    )
    return of_nets + of_objectives


def table(records: list[dict[str, Any]], found: list[dict[str, Any]]) -> str:
    head = (
        f"{'layers, guide':<12}   {'objective':<22}   seed   epochs       batch   lr      train s   "
        "test NLL <=      -ELBO            active (nats) of z1, z2, ..."
    )
    lines = [head, "-" * len(head)]
    for r in sorted(records, key=lambda r: (NETS.index(r["net"]), r["objective"], r["seed"])):
        start = (
            f"{r['net']:<12}    {r['objective']:<22}   {r['seed']:>3}   {r['epoch']:>4} of "
            f"{r['epochs']:<4} {r['batch']:>4}   {r['lr']:<6g}  {r['seconds']:7.0f}   "
        )
        if "log_p" not in r:
            lines.append(start + "not judged yet: training goes on")
            continue
        rates = dict(sorted(r["rate"].items()))
        active = "  ".join(f"{r['active_units'][site]} ({rates[site]:.1f})" for site in rates)
        lines.append(
            start + f"{-r['log_p']:.2f} ± {r['log_p_se']:.2f}   "
            f"{-r['elbo']:6.2f} ± {r['elbo_se']:.2f}   {active}"
        )
    run = {(r["net"], r["objective"]) for r in records}
    for net in NETS:
        for objective in OBJECTIVES:
            if (net, objective) not in run:
                lines.append(f"{net:<12}    {objective:<22}   not run")
    if found:
        lines += ["", "gain in log p, paired by test row"]
    for r in found:
        what = f"{r.get('net', '')} {r['row']} over {r['over']}".strip()
        under = f", {r['objective']}" if "objective" in r else ""
        lines.append(f"{what}{under}, {r['epochs']} epochs, batch {r['batch']}: {burda.told(r)}")
    return "\n".join([*lines, "", f"nats, mean ± standard error over test rows; {PUBLISHED}"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", action="append", choices=NETS, help="several times (default: all)")
    parser.add_argument("--objective", action="append", help=f"likewise (default: {OBJECTIVES})")
    parser.add_argument("--seed", type=int, action="append", help="likewise (default: 0)")
    parser.add_argument("--lr", type=float, help=f"of Adam, at the start (by layers: {LR})")
    burda.add_options(parser, "hierarchical")
    given = parser.parse_args()

    ends = time.monotonic() + 60 * (given.minutes or float("inf"))
    cells = [
        (seed, objective, net)
        for seed in given.seed or (0,)
        for objective in given.objective or OBJECTIVES
        for net in given.net or NETS
    ]
    for seed, objective, net in cells:
        lr = given.lr or LR[layers_of(net)]
        key = (net, objective, given.epochs, given.batch, seed)
        folder = folder_of(given.out, *key, *([] if lr == LR[layers_of(net)] else [lr]))
        done = next((r for r in kept(given.out) if r["folder"] == folder.name), {})
        settled = (given.k, min(given.test, 10_000))
        if (done.get("k"), done.get("test_rows")) == settled:
            continue
        left = (ends - time.monotonic()) / 60
        if left <= 0:
            break
        folder.mkdir(parents=True, exist_ok=True)
        limit = left if given.minutes else None
        new = {"net": net, "asked_lr": given.lr}
        new |= burda.row(given, folder, objective, seed, build(net), lr, limit)
        keep(given.out, [r for r in kept(given.out) if r["folder"] != folder.name] + [new])
        report(given)
    report(given)


def report(given: argparse.Namespace) -> None:
    records = kept(given.out)
    found = compared(records, given)
    settings = {"optimizer": "Adam, lr by a cosine to 0", "K": given.k, "test rows": given.test}
    write(given.name, settings, records + found, table(records, found))


if __name__ == "__main__":
    main()
