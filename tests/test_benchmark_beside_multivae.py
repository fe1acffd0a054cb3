"""The benchmark beside MultiVae: the programs around the nets are the objective that theirs is."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import pyro_vae as pv
from benchmarks.beside_multivae import LATENT, SITES, nets, pair, table
from pyro_vae.objectives import mvae

DRAWS = 300


def by_hand(up, down, batch: pv.Batch) -> torch.Tensor:
    """MVAE's loss per row as MultiVae writes it: the prior in every product, KL in closed form."""
    indicators = torch.nn.functional.one_hot(batch["y"], 10).to(batch["x"])
    stats = {
        site: up[site](value).chunk(2, -1)
        for site, value in zip(SITES, (batch["x"], indicators), strict=True)
    }
    total = torch.zeros(DRAWS)
    for sites in (SITES, ("x",), ("y",)):
        precision = 1 + sum((-stats[s][1]).exp() for s in sites)
        mean = sum((-stats[s][1]).exp() * stats[s][0] for s in sites) / precision
        z = mean + precision.rsqrt() * torch.randn(DRAWS, batch.size, LATENT)
        kl = 0.5 * (mean**2 + 1 / precision - 1 + precision.log()).sum()
        logits = {s: down[s](z) for s in sites}
        losses = {
            "x": lambda logit: binary_cross_entropy_with_logits(
                logit, batch["x"].expand_as(logit), reduction="none"
            ).sum((-2, -1)),
            "y": lambda logit: cross_entropy(
                logit.mT, batch["y"].expand(DRAWS, -1), reduction="none"
            ).sum(-1),
        }
        total = total + kl + torch.stack([losses[s](logit) for s, logit in logits.items()]).sum(0)
    return total / batch.size


@torch.no_grad()
def test_the_loss_is_the_one_written_out():
    up, down = nets(0)
    for part in (*up.values(), *down.values()):
        part.double()
    batch = pv.Batch({"x": (torch.rand(2, 784) < 0.3).double(), "y": torch.arange(2)})
    wanted = by_hand(up, down, batch)
    pyro.set_rng_seed(1)
    came = torch.tensor([float(mvae(SITES).loss(*pair(up, down), batch)) / 2 for _ in range(60)])
    error = (wanted.var() / DRAWS + came.var() / len(came)).sqrt()
    assert abs(came.mean() - wanted.mean()) < 4 * error


def test_machine_code_draws_in_the_order_of_the_program():
    """Three views that do not depend on each other, whose draws a compiler might take in any order."""
    x = (torch.rand(256, 784) < 0.3).float()
    batch = pv.Batch({"x": x, "y": torch.arange(256) % 10})
    losses = []
    for level in ("eager", "compiled"):
        built = pair(*nets(0))
        for program in built:
            program.float()
        options: Any = {"steps": 4, "batch_size": 128, "compile": level, "progress": False}
        run = pv.fit(*built, batch, mvae(SITES), **options)
        assert run.level == level
        losses.append(torch.tensor([record["loss"] for record in run.history]))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0.0)


def test_the_table_has_both_and_their_ratio():
    records = [
        {"library": library, "seed": seed, "epochs": 10, "rows": None, "level": "eager"}
        | {"seconds": seconds, "log_p": {"x,y": {"log_p": log_p, "log_p_se": 0.5}}}
        for library, seed, seconds, log_p in [
            ("pyro_vae", 0, 20.0, -90.0),
            ("multivae", 0, 50.0, -92.0),
            ("pyro_vae", 1, 20.0, -92.0),
            ("multivae", 1, 40.0, -91.0),
        ]
    ]
    text = table(records)
    assert "x,y -90.00 ± 0.50" in text
    assert "seconds, MultiVae over pyro_vae: 2.25 ± 0.25 (by seed 2.50, 2.00)" in text
    assert "log p(x,y), pyro_vae minus MultiVae: 0.50 ± 1.50 (by seed 2.00, -1.00)" in text
    assert "over pyro_vae" not in table(records[:1])
