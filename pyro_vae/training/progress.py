"""What changes from step to step: enough to go on, or to go back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pyro_vae.objectives.loss import ObjectiveModule

__all__ = ["Progress"]

UNSAID = {"accumulate": 1, "precision": "full", "ema": None}  # by states of before these were


class Progress:
    """Where a training stands.

    Attributes:
        parameters: all that are trained.
        stored: those of them made by ``pyro.param``, unconstrained, by their names.
        step: optimizer steps taken.
        total, rows: sum of the loss over the rows of this epoch so far, and their number.
        average: of each parameter over the steps, if there is a decay ``ema``.
        best: copies of the parameters that were best on the validation rows.
        made_by: what must not change for a training to go on as if it had not stopped.
    """

    def __init__(
        self,
        loss: ObjectiveModule,
        parameters: list[nn.Parameter],
        stored: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,
        ema: float | None = None,
        made_by: Mapping[str, Any] | None = None,
    ) -> None:
        self.loss, self.parameters, self.stored = loss, parameters, stored
        self.optimizer, self.scheduler, self.ema = optimizer, scheduler, ema
        self.step, self.rows = 0, 0
        self.total = torch.zeros((), device=loss.step.device)
        self.average = [] if ema is None else [p.detach().clone() for p in parameters]
        self.best: dict[str, Any] = {}
        kinds = {"optimizer": type(optimizer).__name__, "scheduler": type(scheduler).__name__}
        self.made_by = {**(made_by or {}), **kinds}

    def advance(self) -> None:
        """After an optimizer step."""
        self.step += 1
        if self.ema is not None:  # the start is soon forgotten: the window grows with the steps
            decay = min(self.ema, (1 + self.step) / (10 + self.step))
            get_ema_multi_avg_fn(decay)(self.average, self.parameters, self.step)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The pair with its averaged parameters, if there are any."""
        trained = [p.detach().clone() for p in self.parameters] if self.average else []
        _put(self.average, self.parameters)
        try:
            yield
        finally:
            _put(trained, self.parameters)

    def settle(self) -> None:
        """Leave in the pair what a training is for: the best parameters, else the average."""
        if self.best:
            self.set_parameters(self.best)
        else:
            _put(self.average, self.parameters)

    def healthy(self, loss: Tensor) -> bool:
        """Whether the loss and all parameters are finite; waits for the device once."""
        tensors = [loss, *self.parameters]
        return bool(torch.stack([torch.isfinite(t.detach()).all() for t in tensors]).all())

    def parameters_now(self) -> dict[str, Any]:
        """Copies of all parameters and buffers, those of ``pyro.param`` included."""
        modules = {name: t.detach().clone() for name, t in self.loss.state_dict().items()}
        return {"modules": modules, "stored": [p.detach().clone() for p in self.stored.values()]}

    def set_parameters(self, values: dict[str, Any]) -> None:
        self.loss.load_state_dict(values["modules"])
        with torch.no_grad():
            for parameter, value in zip(self.stored.values(), values["stored"], strict=True):
                parameter.copy_(value)

    def snapshot(self) -> dict[str, Any]:
        """A copy of everything that a step may change."""
        state = {
            "step": self.step,
            "parameters": self.parameters_now(),
            "average": [tensor.clone() for tensor in self.average],
            "optimizer": deepcopy(self.optimizer.state_dict()),
            "scheduler": deepcopy(self.scheduler.state_dict()) if self.scheduler else None,
            "random": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["random_cuda"] = torch.cuda.get_rng_state_all()
        return state

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.set_parameters(state["parameters"])
        _put(state.get("average", []), self.average)
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))
        if self.scheduler:
            self.scheduler.load_state_dict(deepcopy(state["scheduler"]))
        torch.set_rng_state(state["random"].cpu())
        if "random_cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["random_cuda"]])

    def dump(self) -> dict[str, Any]:
        """What a later process needs to go on."""
        return self.snapshot() | {
            "made_by": self.made_by,
            "total": self.total,
            "rows": self.rows,
            "best_parameters": self.best,
        }

    def load(self, state: dict[str, Any], where: str) -> None:
        """Go on from ``dump``.

        Raises:
            ValueError: the state of another kind of training; begins with ``where`` it is.
        """
        made_by = {**UNSAID, **state["made_by"]}
        for name, came in self.made_by.items():
            if (wanted := made_by[name]) != came:
                raise ValueError(f"{where}: came {name} {came}, the run has {wanted}")
        try:
            self.restore(state)
        except (RuntimeError, ValueError, KeyError, AttributeError) as error:
            lines = " ".join(line.strip() for line in str(error).splitlines()[:3])
            raise ValueError(f"{where}: the state is not of this pair: {lines}") from None
        self.total = state["total"].to(self.total.device)
        self.rows, self.best = state["rows"], state["best_parameters"]


@torch.no_grad()
def _put(values: list[Tensor], tensors: list[Any]) -> None:
    """Into the tensors, if there are values."""
    for tensor, value in zip(tensors, values, strict=bool(values)):
        tensor.copy_(value)
