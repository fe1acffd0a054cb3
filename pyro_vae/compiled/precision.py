"""Networks in a lower precision, all else in full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_map_only

__all__ = ["PRECISIONS", "in_precision"]

PRECISIONS = ("full", "bf16")
MULTIPLYING = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)


@contextmanager
def in_precision(precision: str, device: torch.device) -> Iterator[list[nn.Module]]:
    """Let networks compute in a precision; yields the modules that did, call by call.

    ``"bf16"``: the layers that multiply matrices (``MULTIPLYING``, subclasses such as
    ``PyroModule[nn.Linear]`` or Pyro's masked layers included) run under ``torch.autocast``, and what
    they return is cast back to float32. All else sees float32: nonlinearities (in bfloat16, a
    sigmoid of 7 is 1), normalisation, distributions, sums (a log density of 100 nats would be
    known to within half a nat), parameters, and products that a program writes out by hand.
    """
    running: list[tuple[nn.Module, Any]] = []
    reached: list[nn.Module] = []

    def enter(module: nn.Module, args: Any) -> None:
        if isinstance(module, MULTIPLYING):
            reached.append(module)
            running.append((module, torch.autocast(device.type, torch.bfloat16)))
            running[-1][1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        if not running or running[-1][0] is not module:
            return None
        running.pop()[1].__exit__(None, None, None)
        return tree_map_only(Tensor, _widened, output)

    if precision == "full":
        yield reached
        return
    # Hooks for all modules: a pair of functions does not say which ones it uses.
    hooks = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield reached
    finally:
        for hook in hooks:
            hook.remove()


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
