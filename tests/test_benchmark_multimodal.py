"""The benchmark of several sites: what it hides, what it prints."""

from __future__ import annotations

import math

import pytest
import torch

import pyro_vae as pv
from benchmarks.multimodal import SITES, Judge, guides, squashed, table, thinned


def rows(number: int = 2000) -> pv.Batch:
    return pv.Batch(
        {
            "x": torch.rand(number, 4, 4),
            "m": torch.rand(number, 3, 4, 4),
            "y": torch.randint(10, (number,)),
        }
    )


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_sites_are_lost_as_a_whole_and_one_is_kept(share: float):
    batch = thinned(rows(), share, seed=1)
    seen = torch.stack([batch.mask(s).reshape(2000, -1).double().mean(1) for s in SITES], 1)
    assert ((seen == 0) | (seen == 1)).all()
    assert (seen.sum(1) > 0).all()
    lost = 1 - float(seen.mean())
    assert abs(lost - share * 2 / 3) < 0.02  # the one that is spared
    assert torch.equal(thinned(rows(), share, seed=1).mask("y"), batch.mask("y"))
    assert thinned(rows(9), 0.0, seed=1).incomplete == ()


def test_labels_as_in_the_script_that_is_reproduced():
    torch.manual_seed(0)
    q = squashed(lambda outputs: torch.nn.Linear(2, outputs[0]), (), None)
    highest = float(q(100 * torch.randn(500, 2)).logits.detach().max())
    assert highest == pytest.approx(1 - math.log(math.e + 9), abs=1e-6)  # -1.461


def test_what_was_not_run_says_so():
    log_p = {"x": {"log_p": -3.0, "log_p_se": 0.5}}
    record = {
        "part": "looks",
        "model": "moe",
        "net": "dense",
        "missing": 0.2,
        "private": 0,
        "seed": 0,
        "epochs": 2,
        "trained_on": 100,
        "seconds": 4.0,
        "log_p": log_p,
        "coherence": {"x from y": [0.25, 0.1]},
    }
    text = table([record])
    assert text.count("not run") == 2 + len(guides(SITES)) * 3 - 1
    assert "moe         20% missing  log p: x -3.00 ± 0.50" in text
    assert "moe         20% missing  coherence: x from y 25.0%" in text


def test_a_judge_takes_both_looks():
    assert Judge(1)(torch.rand(2, 28, 28)).shape == (2, 10)
    assert Judge(3)(torch.rand(2, 3, 32, 32)).shape == (2, 10)
