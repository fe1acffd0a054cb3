"""What every objective is to its users: a loss for a pair, under ``pyro.infer.SVI`` or by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer.elbo import ELBO, ELBOModule
from torch import Tensor, nn

from pyro_vae.objectives.plan import Plan
from pyro_vae.objectives.swap import owner

__all__ = ["Loss", "ObjectiveModule", "Program", "identity"]

Program = Callable[..., Any]


class Loss(ELBO, ABC):
    """A loss for any Pyro model and guide.

    ``loss(model, guide)`` is an ``nn.Module`` whose call returns the loss; the loss itself goes into
    ``pyro.infer.SVI``.

    Attributes:
        modules: parts with parameters or buffers of their own, which are trained with the pair.
        chunk: particles processed at a time, None for all.
    """

    modules: nn.ModuleList
    chunk: int | None = None

    def __init__(self, num_particles: int = 1) -> None:
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self._steps: dict[Any, tuple[Program, Program, Tensor]] = {}  # of each pair under SVI

    def __call__(self, model: Program, guide: Program) -> ObjectiveModule:
        """The loss of a pair as a module that holds the parameters of model, guide and objective."""
        return ObjectiveModule(model, guide, self)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kw: Any) -> Tensor:
        """The loss as a scalar tensor, at the step that ``SVI`` has reached with this pair."""
        return self.loss_and_rows(model, guide, args, kw, self._step(model, guide))[0]

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, without gradient."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, its gradient added to the parameters; advances the schedules by one step."""
        if len(self.modules):
            name = f"objective_{id(self.modules)}"  # the store has one name each
            pyro.module(name, self.modules)
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        step = self._step(model, guide) + 1
        self._steps[identity(model), identity(guide)] = model, guide, step
        return loss.detach()

    def _step(self, model: Program, guide: Program) -> Tensor:
        pair = identity(model), identity(guide)
        return self._steps[pair][2] if pair in self._steps else torch.zeros((), dtype=torch.long)

    def rows(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The bound of each row ``[B]`` in nats, without gradient, N / B or row weights.

        Raises:
            ValueError: no plate over rows.
        """
        return self.rows_at(model, guide, args, kwargs, self._step(model, guide))

    @property
    @abstractmethod
    def recomputes(self) -> bool:
        """Whether backward runs the programs again, chunk by chunk."""

    @abstractmethod
    def loss_and_rows(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        step: Tensor,
    ) -> tuple[Tensor, float]:
        """The loss, and the number of rows it stands for (B times N / B of the row plate)."""

    @abstractmethod
    def rows_at(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        step: Tensor,
    ) -> Tensor:
        """``rows`` at a step of the schedules."""

    @abstractmethod
    def plan(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Plan:
        """What a first run shows of a pair: its notes say where a KL is Monte Carlo."""

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("an objective fills Particles, not a pair of traces")


class ObjectiveModule(ELBOModule):
    """The loss of one pair under one objective: ``module(batch)`` is a scalar to differentiate.

    Its parameters are those of model, guide and objective. Its ``step`` is what schedules read; it
    advances by one with every call in training mode with gradients on.
    """

    elbo: Loss
    step: Tensor

    def __init__(self, model: Program, guide: Program, objective: Loss) -> None:
        super().__init__(model, guide, objective)  # type: ignore[arg-type]
        for name, program in (("_model_owner", model), ("_guide_owner", guide)):
            if not isinstance(program, nn.Module) and (module := owner(program)) is not None:
                setattr(self, name, module)
        self.parts = objective.modules
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.loss_and_rows(*args, **kwargs)[0]

    def rows(self, *args: Any, **kwargs: Any) -> Tensor:
        """The bound of each row ``[B]`` in nats at the module's step; see ``Objective.rows``."""
        return self.elbo.rows_at(self.model, self.guide, args, kwargs, self.step)

    def loss_and_rows(self, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
        """The loss and the number of rows it stands for."""
        out = self.elbo.loss_and_rows(self.model, self.guide, args, kwargs, self.step.clone())
        if self.training and torch.is_grad_enabled():
            self.step += 1
        return out


def identity(program: Program) -> tuple[int, int]:
    """Of what is called: a bound method is a new object each time, its owner and function are not."""
    return id(getattr(program, "__self__", program)), id(getattr(program, "__func__", program))
