"""Matrix products by oneDNN on processors where MKL is slower: it keeps AVX-512 to its maker's own."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from pyro_vae.operators import operator

__all__ = ["LARGE", "by_onednn", "onednn_is_faster", "product"]

LARGE = 5e6  # floating-point operations; below, a call of oneDNN takes longer than the product
PRODUCTS: dict[Any, slice] = {  # and where its matrices are among its arguments
    torch.ops.aten.mm.default: slice(0, 2),
    torch.ops.aten.addmm.default: slice(1, 3),
}


@functools.cache
def product() -> Any:
    """The operator ``(a, b, bias) -> a b + bias``."""
    return operator(
        "product(Tensor a, Tensor b, Tensor? bias) -> Tensor",
        _product,
        None,
        lambda a, b, bias: a.new_empty(a.shape[0], b.shape[1]),
    )


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a [M, L] times b [L, N], any strides, plus bias [N]."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")  # type: ignore[no-any-return]


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is a processor with AVX-512 that MKL does not use it on."""
    info = Path("/proc/cpuinfo")
    if not info.is_file() or not torch.backends.mkldnn.is_available():
        return False
    text = info.read_text()
    return "AuthenticAMD" in text and "avx512f" in text


def by_onednn(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with its large products in float32 on the CPU made by oneDNN."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in list(graph.nodes):
        if node.target in PRODUCTS and not node.kwargs and _is_large(node):
            matrices = node.args[PRODUCTS[node.target]]
            bias = node.args[0] if len(node.args) == 3 else None
            with graph.inserting_before(node):
                new = graph.call_function(product(), (*matrices, bias))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    return fx.GraphModule(module, graph)


def _is_large(node: fx.Node) -> bool:
    made, *given = (one.meta.get("val") for one in (node, *node.all_input_nodes))
    if not isinstance(made, Tensor) or not all(isinstance(tensor, Tensor) for tensor in given):
        return False
    if made.dtype != torch.float32 or made.device.type != "cpu":
        return False
    if len(node.args) == 3 and node.args[0].meta["val"].dim() != 1:  # type: ignore[union-attr]
        return False
    first: Any = node.args[PRODUCTS[node.target]][0]
    return bool(2 * made.numel() * first.meta["val"].shape[1] >= LARGE)
