"""Operators: one node of a recorded graph, written out where machine code is made of it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from pyro_vae.compiled.graph import record
from pyro_vae.objectives.penalties.log_sums import _OfGaussians
from pyro_vae.operators import fused, operator


@functools.cache
def twice() -> Any:
    return operator("twice(Tensor a) -> Tensor", lambda a: a + a, lambda a: 2 * a, torch.empty_like)


def targets(graph: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def test_a_graph_has_one_node_until_it_is_written_out():
    a = torch.randn(3)
    graph = record(lambda: [twice()(a).exp()], [a])
    assert targets(graph.module) == ["pyro_vae.twice.default", "aten.exp.default"]
    out = fused(graph.module, [a])
    assert targets(out) == ["aten.mul.Tensor", "aten.exp.default"]
    assert targets(graph.module)[0] == "pyro_vae.twice.default"  # which stays as it was
    torch.testing.assert_close(out(a), graph(a))


def test_a_graph_without_operators_is_left_alone():
    a = torch.randn(3)
    graph = record(lambda: [a.exp()], [a])
    assert fused(graph.module, [a]) is graph.module


@pytest.mark.parametrize("marginals", [True, False])
def test_sums_over_pairs_are_the_same_written_out(marginals: bool):
    z, loc = torch.randn(2, 3, 7, dtype=torch.float64)
    rate = torch.rand(3, 7, dtype=torch.float64) + 0.5
    of_joint, of_each = (torch.randn(*shape, dtype=torch.float64) for shape in ((7,), (3, 7)))

    def function() -> list[Tensor]:
        given = [each.detach().requires_grad_() for each in (z, loc, rate)]
        joint, each = _OfGaussians.apply(*given, marginals)
        goal = (joint * of_joint).sum() + (each * of_each[: len(each)]).sum()
        return [joint, each, *torch.autograd.grad(goal, given)]

    graph = record(function, [z, loc, rate])
    assert {"pyro_vae.log_sums.default", "pyro_vae.log_sums_backward.default"} < {
        *targets(graph.module)
    }
    out = fused(graph.module, [z, loc, rate, *graph.held])
    assert not [name for name in targets(out) if "pyro_vae" in name]
    log_q = torch.distributions.Normal(loc[:, None], 1 / rate[:, None]).log_prob(z[..., None])
    wanted = [log_q.sum(0).logsumexp(1), log_q.logsumexp(2) if marginals else z[:0]]
    for found in (graph, lambda *given: out(*given, *graph.held)):
        came = found(z, loc, rate)
        for x, y in zip(came, [*wanted, *function()[2:]], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
