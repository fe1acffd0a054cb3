"""Operators of the library's own: a recorded graph has each as one node, whatever is done inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["fused", "operator"]

FUSED: dict[Any, Callable[..., Any]] = {}  # operator -> the same for a compiler
_alive: list[torch.library.Library] = []  # an operator goes with its library


def operator(
    schema: str,
    run: Callable[..., Any],
    at_once: Callable[..., Any] | None,
    like: Callable[..., Any],
) -> Any:
    """Register an operator; by whoever needs it first, since an import would take longer.

    Args:
        schema: ``name(Tensor a, ...) -> Tensor``, as torch writes it.
        run: what it does, without gradients.
        at_once: the same by operations that a compiler makes one loop of; None: there is no better way.
        like: takes what ``run`` takes; empty tensors of the shapes that it returns.
    """
    library = torch.library.Library("pyro_vae", "FRAGMENT")
    name = library.define(schema)
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyro_vae::{name}", like)
    _alive.append(library)
    made = getattr(torch.ops.pyro_vae, name).default
    if at_once:
        FUSED[made] = at_once
    return made


def fused(module: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """A recorded graph with each operator written out for a compiler, where there is a way to."""
    if not any(node.target in FUSED for node in module.graph.nodes):
        return module
    out = make_fx(module, FUSED, tracing_mode="fake")(*inputs)
    out.graph.set_codegen(fx.graph.CodeGen())  # the call takes tensors one by one
    out.recompile()
    return out
