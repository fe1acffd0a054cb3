"""Products by oneDNN: the same numbers, in place of the large ones alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_vae.compiled.graph import record
from pyro_vae.compiled.products import LARGE, by_onednn, product

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


def large(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("turned", ["", "a", "b", "ab"])
def test_products(turned: str, bias: bool):
    a = large(150, 130).t() if "a" in turned else large(130, 150)
    b = large(140, 150).t() if "b" in turned else large(150, 140)
    c = large(140) if bias else None
    came = product()(a, b, c)
    wanted = a.double() @ b.double() + (0 if c is None else c.double())
    torch.testing.assert_close(came.double(), wanted, rtol=1e-4, atol=1e-4)
    assert came.is_contiguous()


def targets(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def test_large_products_alone():
    a, b, small, c = large(200, 200), large(200, 200), large(200, 4), large(200)
    assert 2 * 200**3 > LARGE > 2 * 200 * 200 * 4

    def function() -> list[Tensor]:
        return [a @ b, a @ small, torch.addmm(c, a, b), a.double() @ b.double()]

    graph = record(function, [a, b, small, c])
    module = by_onednn(graph.module)
    ours = "pyro_vae.product.default"
    found = [name for name in targets(module) if "mm" in name or name == ours]
    assert found == [ours, "aten.mm.default", ours, "aten.mm.default"]
    for x, y in zip(module(a, b, small, c), graph(a, b, small, c), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert ours not in targets(graph.module)  # which stays as it was
