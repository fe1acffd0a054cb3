"""A function of a batch by a graph: the same numbers at the same seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.batch import Batch
from pyro_vae.compiled import Fast
from tests.exact_pairs import BatchGuide, LinearBatchModel
from tests.small_pairs import data


def at(seed: int, function: Any, batch: Any) -> Tensor:
    torch.manual_seed(seed)
    return function(batch)  # type: ignore[no-any-return]


@pytest.mark.parametrize("level", ["traced", "compiled"])
def test_the_functions_numbers(level: str):
    layer = nn.Linear(3, 2)

    def function(batch: Batch) -> Tensor:
        return torch.add(layer(batch["x"]).sum(1), torch.randn(len(batch)))

    fast = Fast(function, level)
    for seed, rows in ((1, 6), (2, 6), (3, 4), (4, 6)):
        batch = Batch({"x": data(rows, seed=seed)})
        with torch.no_grad():
            wanted = at(seed, function, batch)
            torch.testing.assert_close(at(seed, fast, batch), wanted)
            assert torch.equal(torch.get_rng_state(), rng_after(seed, rows))
            layer.weight.mul_(1.5)
        if seed == 1:
            assert (fast.level, fast.reason) == (level, "")


def rng_after(seed: int, rows: int) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.randn(rows)
        return torch.get_rng_state()


def test_what_a_graph_would_freeze():
    fast = Fast(lambda x: x - float(x.numpy().mean()), "traced")
    x = data(6)
    torch.testing.assert_close(fast(x), x - x.mean())
    assert fast.level == "eager"
    assert "wants the value of a tensor" in fast.reason


def test_few_calls_stay_eager():
    fast = Fast(lambda x: x.sum(1), calls=20)
    fast(data(6))
    assert (fast.level, fast.reason) == (
        "eager",
        "20 calls save about 0.0 s, a graph takes about 1 s",
    )


def test_evaluation_by_graphs():
    torch.manual_seed(0)
    model, guide = LinearBatchModel(), BatchGuide(nn.Linear(3, 4))
    x = data(30)
    x[3, 1] = float("nan")
    results = [
        pv.evaluate(model, guide, Batch({"x": x}), 200, batch_size=10, chunk=10, compile=level)
        for level in ("eager", "traced", "compiled")
    ]
    for other in results[1:]:
        torch.testing.assert_close(other.log_p, results[0].log_p)
        torch.testing.assert_close(other.khat, results[0].khat)


def test_unknown_level():
    with pytest.raises(ValueError, match="compile: came 'quick'"):
        Fast(lambda x: x, "quick")
