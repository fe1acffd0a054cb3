"""What modules hold: seen when it changes, and put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyro_vae.compiled.attributes import Attributes


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.count, self.rates, self.plain = 0, [1.0, 2.0], torch.ones(2)
        self.generator = torch.Generator().manual_seed(1)


def names(attributes: Attributes) -> list[str]:
    return [name for name, _ in attributes.changed()]


def test_nothing_changed():
    part = nn.Sequential(Part(), nn.Linear(2, 2))
    attributes = Attributes(part)
    part[0].mean.add_(1)  # type: ignore[operator]
    part[0].count = 0  # type: ignore[assignment]
    part.eval().train()
    assert names(attributes) == []
    assert attributes.unsteady([]) == ""


def test_changes_are_named_and_undone():
    part: Any = Part()
    attributes, draw = Attributes(part), torch.rand(1, generator=torch.Generator().manual_seed(1))
    part.count += 1
    part.rates.pop()
    part.plain = part.plain * 2
    part.mean = part.mean + 1
    part.new = 3
    torch.rand(4, generator=part.generator)
    assert {"Part.count", "Part.rates", "Part.plain", "Part.mean"} <= set(names(attributes))
    assert attributes.unsteady([]) == "Part.count was changed, and a graph has it as a constant"
    attributes.put_back()
    assert names(attributes) == []
    assert (part.count, part.rates, part.plain.tolist()) == (0, [1.0, 2.0], [1.0, 1.0])
    assert not hasattr(part, "new")
    assert torch.equal(torch.rand(1, generator=part.generator), draw)


def test_a_tensor_that_no_graph_reads_may_change():
    part: Any = Part()
    attributes, old = Attributes(part), part.plain
    part.plain = part.plain * 2
    assert attributes.unsteady([]) == ""
    assert attributes.unsteady([old]).startswith("Part.plain was changed")
