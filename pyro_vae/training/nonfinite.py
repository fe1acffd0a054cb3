"""NaN or inf in a training: back to the last good state, and to the site and the rows they came from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from pyro_vae.batch import Batch
from pyro_vae.compiled import Step
from pyro_vae.objectives.particles import run as run_particles
from pyro_vae.training.epochs import Epochs
from pyro_vae.training.progress import Progress

if TYPE_CHECKING:
    from pyro_vae.training.fit import Run

__all__ = ["NonFiniteError", "explain"]


class NonFiniteError(RuntimeError):
    """Training met NaN or inf. ``.run`` holds the last good state."""

    run: Run


def explain(
    state: Progress,
    good: dict[str, Any],
    step: Step,
    epochs: Epochs,
    precision: Callable[[], AbstractContextManager[Any]],
) -> NonFiniteError:
    """Walk forward from the last good state to the step that fails, look at it, and go back to the
    state before it.

    Args:
        good: a snapshot of that state.
        precision: makes the context that the step computes its loss in.
    """
    state.restore(good)
    before = good
    for rows, batches in epochs.steps(state.step):
        with pyro.validation_enabled(False):
            healthy = state.healthy(step(*batches))
        if not healthy:
            state.restore(before)
            with precision(), pyro.validation_enabled(False):
                culprit = _site(state, batches, rows)
                state.restore(before)
                culprit = culprit or _gradient(state, batches)
            state.restore(before)
            return NonFiniteError(f"step {state.step + 1}: {culprit}; the state before it is kept")
        state.advance()
        before = state.snapshot()
    return NonFiniteError(f"step {state.step}: the loss was not finite, and was when run again")


@torch.no_grad()
def _site(state: Progress, batches: list[Any], rows: Tensor) -> str:
    """Which site's log density is not finite, and in which rows; empty if all are finite."""
    model, guide, objective = state.loss.model, state.loss.guide, state.loss.elbo
    chunk = objective.chunk or objective.num_particles
    for batch, numbers in zip(batches, rows.split(len(batches[0])), strict=True):
        plan = objective.plan(model, guide, (batch,), {})
        for done in range(0, objective.num_particles, chunk):
            size = min(chunk, objective.num_particles - done)
            table = run_particles(model, guide, (batch,), {}, plan, size)
            for source in ("posterior", "prior", "likelihood"):
                for site, term in getattr(table, source).items():
                    bad = ~torch.isfinite(term)
                    if bool(bad.any()):
                        where = _rows_of(bad, batch, numbers) if table.local(site) else ""
                        return f"site {site!r}: its {source} density is not finite{where}"
    return ""


def _gradient(state: Progress, batches: list[Any]) -> str:
    """Which gradient is not finite, or what else it must have been."""
    total = sum(state.loss.loss_and_rows(batch)[0] for batch in batches)
    assert isinstance(total, Tensor)
    if not bool(torch.isfinite(total)):
        return "the loss is not finite though every site's density is (a rate or a penalty)"
    grads = torch.autograd.grad(total, state.parameters, allow_unused=True)
    names = {id(p): name for name, p in [*state.stored.items(), *state.loss.named_parameters()]}
    bad = [
        names[id(p)]
        for p, grad in zip(state.parameters, grads, strict=True)
        if grad is not None and not bool(torch.isfinite(grad).all())
    ]
    if bad:
        return f"the gradient of {', '.join(bad[:3])} is not finite"
    return "the optimizer's step left parameters that are not finite; lower the learning rate"


def _rows_of(bad: Tensor, batch: Any, rows: Tensor) -> str:
    """Numbers of the rows in which ``bad``, ``[K, B, *rest]``, is true."""
    per_row = bad.flatten(2).any(2).any(0) if bad.dim() > 2 else bad.any(0)
    index = batch.index if isinstance(batch, Batch) else rows
    if len(index) != len(per_row):  # the program draws rows of its own from the batch
        return ""
    numbers = index[per_row].sort().values.tolist()
    return f" in rows {numbers[:5]}{' and more' if len(numbers) > 5 else ''}"
