"""(loss, optimizer) -> a training step: the one place where a program is made fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.objectives.objective import ObjectiveModule

__all__ = ["LEVELS", "Step", "make_step"]

Step = Callable[[Any], Tensor]
LEVELS = ("auto", "eager")


def make_step(
    loss: ObjectiveModule,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    clip: float | None = None,
    level: str = "auto",
) -> Step:
    """A function of one batch that takes an optimizer step and returns the loss in nats per row.

    The loss stays a tensor on its device: reading it is what synchronises, so the caller decides when.

    Args:
        clip: largest norm of the gradient.
        level: ``"eager"``; ``"auto"`` takes the fastest level there is.

    Raises:
        ValueError: unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"compile: came {level!r}, wanted one of {list(LEVELS)}")

    def step(batch: Any) -> Tensor:
        losses: list[Tensor] = []

        def closure() -> Any:  # LBFGS calls it several times
            optimizer.zero_grad(set_to_none=True)
            total, rows = loss.loss_and_rows(batch)
            per_row = total / rows
            per_row.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            losses.append(per_row.detach())
            return losses[-1]

        optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()
        return losses[0]

    return step
