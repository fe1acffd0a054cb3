"""Recording: what a function did is done again, with what it holds by reference."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.compiled.graph import put_back, record, told


def test_a_graph_does_what_the_function_did():
    x, weight = torch.randn(3), nn.Parameter(torch.randn(3))
    count = torch.zeros(())

    def function() -> list[Tensor]:
        count.add_(1)
        value = (weight * x).sin().sum()
        return [value.detach(), *torch.autograd.grad(value, [weight])]

    graph = record(function, [x, weight])
    other = torch.randn(3)
    value, gradient = graph(other, weight)
    torch.testing.assert_close(value, (weight * other).sin().sum().detach())
    torch.testing.assert_close(gradient, (other * (weight * other).cos()).detach())
    assert count == 2  # once to record it, once by the graph
    assert [tensor is count for tensor in graph.held] == [True]


def test_held_tensors_are_read_when_the_graph_runs():
    held, x = torch.ones(2), torch.ones(2)
    graph = record(lambda: [x * held + 2.0], [x])
    held.fill_(5.0)
    assert graph(x)[0].tolist() == [7.0, 7.0]


def test_a_parameter_that_is_no_input_is_held():
    layer, x = nn.Linear(2, 1), torch.ones(1, 2)
    graph = record(lambda: [layer(x).detach()], [x])
    with torch.no_grad():
        layer.weight.fill_(3.0)
        layer.bias.zero_()
    assert float(graph(x)[0]) == 6.0
    assert {id(t) for t in graph.held} == {id(layer.weight), id(layer.bias)}


def test_the_first_outputs():
    x = torch.ones(2)
    graph = record(lambda: [x + 1, x + 2, x + 3], [x]).first(2)
    assert [out.tolist() for out in graph(x)] == [[2.0, 2.0], [3.0, 3.0]]


def test_size():
    x = torch.ones(5)
    graph = record(lambda: [(x + 1).exp().sum()], [x])
    assert (len(graph), graph.entries()) == (3, 5 + 5 + 5 + 1)


@pytest.mark.parametrize(
    "function", [lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: torch.masked_select(x, x > 0)]
)
def test_shapes_that_depend_on_values(function: Callable[[Tensor], Tensor]):
    x = torch.randn(5)
    with pytest.raises(ValueError, match="whose shape depends on values"):
        record(lambda: [function(x)], [x])


def test_rows_by_their_numbers_are_no_such_shapes():
    x, rows = torch.randn(5), torch.tensor([1, 3])
    graph = record(lambda: [x[rows]], [x, rows])
    assert torch.equal(graph(x, torch.tensor([0, 4]))[0], x[[0, 4]])


def test_an_error_says_where():
    x = torch.ones(2)
    with pytest.raises((RuntimeError, ValueError)) as caught:
        record(lambda: [x * float(x.sum())], [x])
    line = told(caught.value)
    assert line.startswith("the program wants the value of a tensor (")
    assert "test_compiled_graph.py:" in line
    assert told(ValueError("first\nsecond")) == "first"


def test_what_the_compiler_says_to_its_authors_is_not_printed(monkeypatch: pytest.MonkeyPatch):
    said: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("torch._inductor.ir"), "handle", said.append)
    x, new = torch.ones(4), random.SystemRandom().random()  # a graph that no cache on disk holds
    graph = record(lambda: [torch._standard_gamma(x + new)], [x])
    (drawn,) = graph.lowered([x])(x)
    assert bool((drawn > 0).all())
    assert said == []


def test_lowered():
    x, weight = torch.randn(4, 3), nn.Parameter(torch.randn(2, 3))
    total = torch.zeros(2)

    def function() -> list[Tensor]:
        noise = torch.randn(4, 2)
        total.add_(1.0)
        return [(x @ weight.T).detach() + noise]

    graph = record(function, [x, weight])
    run = graph.lowered([x, weight])
    total.zero_()
    with torch.no_grad():
        torch.manual_seed(1)
        came = run(x, weight)[0]
        torch.manual_seed(1)
        wanted = graph(x, weight)[0]
    torch.testing.assert_close(came, wanted)
    assert total.tolist() == [2.0, 2.0]


def test_what_is_put_back():
    class Part(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(2))
            self.count = 0

    part, tensor = Part(), torch.ones(3)
    seen = part.seen
    torch.manual_seed(2)
    before = torch.get_rng_state()
    numbers, drawn = np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    with put_back([tensor], part):
        tensor.add_(1)
        part.seen = part.seen + 1
        part.count += 1
        seen.add_(3)
        torch.rand(3)
        np.random.rand()
        random.random()
    assert tensor.tolist() == [1.0, 1.0, 1.0]
    assert part.seen is seen
    assert part.seen.tolist() == [0.0, 0.0]
    assert part.count == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numbers  # type: ignore[index]
    assert random.getstate() == drawn
