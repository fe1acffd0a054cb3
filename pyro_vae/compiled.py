"""(loss, optimizer) -> a training step: the one place where a program is made fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_map_only

from pyro_vae.objectives.objective import ObjectiveModule

__all__ = ["LEVELS", "PRECISIONS", "Step", "in_precision", "make_step"]

Step = Callable[..., Tensor]
LEVELS = ("auto", "eager")
PRECISIONS = ("full", "bf16")
MULTIPLYING = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)


def make_step(
    loss: ObjectiveModule,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    clip: float | None = None,
    level: str = "auto",
    precision: str = "full",
) -> Step:
    """A function of a batch that takes an optimizer step and returns the loss in nats per row.

    Given several batches, it takes one step with the gradient of the mean over all their rows, one
    batch's activations in memory at a time. The loss stays a tensor on its device: reading it is what
    synchronises, so the caller decides when.

    Args:
        clip: largest norm of the gradient.
        level: ``"eager"``; ``"auto"`` takes the fastest level there is.
        precision: of the networks in the loss, see ``in_precision``.

    Raises:
        ValueError: unknown level or precision; parameters, or at a step layers, that the precision
            can't help.
    """
    if level not in LEVELS:
        raise ValueError(f"compile: came {level!r}, wanted one of {list(LEVELS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: came {precision!r}, wanted one of {list(PRECISIONS)}")
    dtypes = {parameter.dtype for parameter in parameters}
    if precision != "full" and torch.float32 not in dtypes:
        raise ValueError(
            f"precision: came {precision!r} for parameters in {', '.join(map(str, dtypes))}, wanted "
            "float32, which is what it makes faster"
        )

    def step(*batches: Any) -> Tensor:
        rows = sum(map(len, batches))
        now = loss.step.clone()
        losses: list[Tensor] = []

        def closure() -> Any:  # LBFGS calls it several times
            optimizer.zero_grad(set_to_none=True)
            value = torch.zeros((), device=now.device)
            for batch in batches:
                loss.step.copy_(now)  # schedules count optimizer steps
                total, counted = loss.loss_and_rows(batch)
                if precision != "full" and not reached:
                    raise ValueError(
                        f"precision: came {precision!r} for a pair without a layer that it makes "
                        "faster, wanted nn.Linear, convolutions, recurrent layers or attention"
                    )
                per_row = total / (counted / (len(batch) / rows))
                per_row.backward()
                value = value + per_row.detach()
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            losses.append(value)
            return value

        with in_precision(precision, now.device) as reached:
            optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()
        return losses[0]

    return step


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
