"""A training step, by the fastest way that takes the same step as the program says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.compiled import optimizers
from pyro_vae.compiled.graph import Graph, put_back, told
from pyro_vae.compiled.precision import PRECISIONS
from pyro_vae.compiled.trial import Trial
from pyro_vae.compiled.ways import Eager, Given, Gradients, Refused, Way, Whole, given, turned
from pyro_vae.compiled.worth import check_level, not_worth
from pyro_vae.objectives.loss import ObjectiveModule

__all__ = ["Step", "make_step"]

AGAIN = 64


class Step:
    """A function of batches that takes an optimizer step; see ``make_step``.

    Graphs are compared with the programs once more after 64, 128, 256, ... steps, since what a program
    reads elsewhere (a clock) may change too slowly to be seen at once.

    Attributes:
        level: at which most steps are taken: ``"eager"`` until a graph is accepted.
        reason: why not at the level that was asked for, or all of it; empty if there is none.
    """

    def __init__(
        self,
        loss: ObjectiveModule,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        clip: float | None,
        asked: str,
        precision: str,
        steps: Mapping[int, int] | None,
        other: Callable[[int], Any] | None,
    ) -> None:
        self.loss, self.parameters, self.optimizer = loss, parameters, optimizer
        self.scheduler, self.clip, self.asked, self.precision = scheduler, clip, asked, precision
        self.steps, self.other, self.numbers = steps, other, optimizers.numbers(optimizer)
        self.level, self.reason = "eager", ""
        self._eager = Eager(self)
        self._parts = list(loss.modules())
        self._taken = 0
        self._ways: dict[Any, Way] = {}
        self._coming: dict[Any, float] = {}
        self._seen: dict[Any, list[Given]] = {}
        self._doubted: set[Any] = set()
        if asked != "eager" and loss.step.is_cuda:
            for group in optimizer.param_groups:  # a CUDA graph can't wait for the host
                if "capturable" in group:
                    group["capturable"] = True

    def __call__(self, *batches: Any) -> Tensor:
        self._taken += 1
        if self._taken >= AGAIN and self._taken.bit_count() == 1:
            self.doubt()
        every = [given(batch) for batch in batches]
        trained = [parameter.requires_grad for parameter in self.parameters]
        modes = [part.training for part in self._parts]
        key = (*[one.key for one in every], *trained, *modes)
        way = self._ways.get(key) or self._prepared(key, every)
        if key in self._doubted:
            way = self._checked(key, way, every)
        try:
            value = way(every)
        except Refused as refused:
            value = self._without_optimizer(key, every, str(refused))(every)
        if self.scheduler is not None:
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
            self.scheduler.step()
        return value

    def doubt(self) -> None:
        """Compare graphs with the programs once more before they are used: someone may have changed
        a number in them."""
        self._doubted = {key for key, way in self._ways.items() if way is not self._eager}

    def state(self) -> list[Tensor]:
        """Every tensor that a step may change, buffers apart."""
        return [*self.parameters, *optimizers.state_tensors(self.optimizer)]

    def _prepared(self, key: Any, batches: list[Given]) -> Way:
        """The way for batches like these; eager for now where it can't be known yet."""
        if self.asked == "eager":
            return self._settled(key, self._eager, "")
        lengths = [len(one.batch) for one in batches]
        coming = None if self.steps is None else self.steps.get(sum(lengths), 1)
        self._coming[key] = coming or 0
        if why := self._not_worth(coming):
            return self._settled(key, self._eager, why)
        if int(self.loss.step) == 0:  # an optimizer makes its state in the first step
            return self._eager
        if self.other is None:
            others = self._seen.setdefault(key, batches)
            if others is batches:
                return self._eager
            if all(
                torch.equal(*pair)
                for a, b in zip(others, batches, strict=True)
                for pair in zip(a.leaves, b.leaves, strict=True)
            ):
                others = [turned(one) for one in batches]
        else:
            with put_back([], self.loss):
                others = [given(self.other(length)) for length in lengths]
        return self._found(key, batches, others, coming)

    def _not_worth(self, coming: float | None, graphs: Sequence[Graph] = ()) -> str:
        """Why so many steps don't repay a graph. One that was asked for need not, but for the odd
        last batch of an epoch, which may come first when a training goes on."""
        most = not self._ways if self.steps is None else coming == max(self.steps.values())
        if self.asked != "auto" and most:
            return ""
        return not_worth(coming, "steps", graphs)

    def _found(
        self, key: Any, batches: list[Given], others: list[Given], coming: float | None
    ) -> Way:
        """The first way that works out and takes the steps that eager takes."""
        why = ""
        try:
            expected = self._expected(others)
        except Exception as error:
            return self._settled(key, self._eager, told(error))
        shake = expected.shake
        kinds: tuple[type[Whole | Gradients], ...] = (Whole, Gradients)
        for kind in kinds if self.asked != "traced" else (Gradients,):
            try:
                way = kind(self, batches)
                expected.agrees(Trial(self, way, others, shake), strictly=True)
            except Exception as error:  # whatever a program does that a graph can't hold
                why = told(error)
                continue
            if self.asked == "traced":
                return self._settled(key, way, why)
            if brief := self._not_worth(coming, way.recorded()):
                return self._settled(key, self._eager, brief)
            try:
                with put_back(self.state(), self.loss):
                    way.lower(batches)
                expected.agrees(Trial(self, way, others, shake), strictly=False)
            except Exception as error:  # of the compiler, or that there is none
                why = told(error)
                break
            return self._settled(key, way, "; ".join(filter(None, (why, way.note))))
        try:  # what is left when a graph does not compile
            way = Gradients(self, batches)
            expected.agrees(Trial(self, way, others, shake), strictly=True)
        except Exception as error:
            return self._settled(key, self._eager, why or told(error))
        return self._settled(key, way, why)

    def _expected(self, batches: list[Given]) -> Trial:
        try:
            return Trial(self, self._eager, batches)
        except Exception:  # parameters beside its own may be none to a program
            return Trial(self, self._eager, batches, shake=0.0)

    def _without_optimizer(self, key: Any, batches: list[Given], why: str) -> Way:
        """A graph of the gradients in place of one that holds the optimizer's step as well."""
        try:
            way = Gradients(self, batches)
            with put_back(self.state(), self.loss):
                way.lower(batches)
            expected = self._expected(batches)
            expected.agrees(Trial(self, way, batches, expected.shake), strictly=False)
        except Exception as error:
            return self._settled(key, self._eager, f"{why}; {told(error)}")
        return self._settled(key, way, why)

    def _settled(self, key: Any, way: Any, reason: str) -> Way:
        self._ways[key] = way
        if key == max(self._ways, key=lambda key: self._coming.get(key, 0)):
            self.level, self.reason = getattr(way, "level", "eager"), reason
        return way  # type: ignore[no-any-return]

    def _checked(self, key: Any, way: Way, batches: list[Given]) -> Way:
        self._doubted.discard(key)
        try:
            assert isinstance(way, Whole | Gradients)
            held = [tensor for graph in way.recorded() for tensor in graph.held]
            if why := way.attributes.unsteady(held):
                raise Refused(why)
            expected, graph = self._expected(batches), way.as_recorded()
            expected.agrees(Trial(self, graph, batches, expected.shake), strictly=True)
        except Exception as error:
            why = f"the pair is not what its graph was: {told(error)}"
            return self._settled(key, self._eager, why)
        return way


def make_step(
    loss: ObjectiveModule,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    clip: float | None = None,
    level: str = "auto",
    precision: str = "full",
    steps: Mapping[int, int] | None = None,
    other: Callable[[int], Any] | None = None,
) -> Step:
    """A function of a batch that takes an optimizer step and returns the loss in nats per row.

    Given several batches, it takes one step with the gradient of the mean over all their rows, one
    batch's activations in memory at a time. The loss stays a tensor on its device: reading it is what
    synchronises, so the caller decides when.

    A graph is made for the shape of a batch when the second step begins, and accepted if it takes
    the same steps as the programs on other rows, draws, parameters, learning rates and steps of the
    schedules than it was recorded with: what a program computes outside tensors would be a constant
    in it. Where a graph can't be had, steps are taken at the next lower level, and ``Step.reason``
    says why.

    Args:
        clip: largest norm of the gradient.
        level: ``"eager"``: the programs as they are; ``"traced"``: loss and gradients as one flat
            graph of torch's operations; ``"compiled"``: the whole step, the optimizer's included, as
            machine code by TorchInductor, on CUDA as a CUDA graph; ``"auto"``: compiled if the steps
            to come repay it.
        precision: of the networks in the loss, see ``in_precision``.
        steps: rows of a step -> number of such steps to come, for ``"auto"``.
        other: number of rows -> a batch to compare graphs on; default: the batch before.

    Raises:
        ValueError: unknown level or precision; parameters, or at a step layers, that the precision
            can't help.
    """
    check_level(level)
    if precision not in PRECISIONS:
        raise ValueError(f"precision: came {precision!r}, wanted one of {list(PRECISIONS)}")
    dtypes = {parameter.dtype for parameter in parameters}
    if precision != "full" and torch.float32 not in dtypes:
        raise ValueError(
            f"precision: came {precision!r} for parameters in {', '.join(map(str, dtypes))}, wanted "
            "float32, which is what it makes faster"
        )
    return Step(
        *(loss, parameters, optimizer, scheduler, clip, level, precision), steps=steps, other=other
    )
