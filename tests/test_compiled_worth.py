"""When a graph repays its making."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_vae.compiled.graph import record
from pyro_vae.compiled.worth import LEVELS, check_level, not_worth


def test_calls_to_come():
    assert not_worth(None, "steps") == "the number of steps to come is not known"
    assert not_worth(100, "steps") == "100 steps save about 0.1 s, a graph takes about 1 s"
    assert not_worth(1e6, "calls") == ""


def test_large_graphs_save_and_cost_more():
    x = torch.ones(10)

    def function(operations: int, size: int) -> list[Tensor]:
        value = x.repeat(size)
        for _ in range(operations):
            value = value + 1
        return [value]

    few, many, wide = (
        record(lambda o=o, s=s: function(o, s), [x])  # type: ignore[misc]
        for o, s in ((10, 1), (1000, 1), (10, 1_000_000))
    )
    assert not_worth(3000, "steps", [few]) == ""
    assert not_worth(3000, "steps", [many])
    assert not_worth(1000, "steps", [few])
    assert not_worth(1000, "steps", [wide]) == ""


def test_levels():
    for level in LEVELS:
        check_level(level)
    with pytest.raises(ValueError, match=r"compile: came 'fast', wanted one of \['auto', 'eager'"):
        check_level("fast")
