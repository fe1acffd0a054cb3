"""Ways to take the same step: as it is written, by a graph of its gradients, by one graph of it all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from pyro_vae.batch import Batch, flatten
from pyro_vae.compiled import optimizers
from pyro_vae.compiled.attributes import Attributes
from pyro_vae.compiled.cuda import Replay
from pyro_vae.compiled.graph import Graph, put_back, record, told
from pyro_vae.compiled.precision import in_precision

if TYPE_CHECKING:
    from pyro_vae.compiled.step import Step

__all__ = ["Eager", "Given", "Gradients", "Refused", "Way", "Whole", "copied", "given", "turned"]


Way = Callable[[Sequence["Given"]], Tensor]


class Refused(Exception):
    """A way that a step can't be taken, and why."""


class Given(NamedTuple):
    """A batch, its tensors, and what must be equal for a graph of one batch to hold for another."""

    batch: Any
    leaves: list[Tensor]
    key: Any


def given(batch: Any) -> Given:
    leaves, spec = _flattened(batch)
    if not all(
        leaf.is_contiguous() for leaf in leaves
    ):  # machine code takes one layout for granted
        batch = tree_map_only(Tensor, Tensor.contiguous, batch)
        leaves, spec = _flattened(batch)
    return Given(batch, leaves, (spec, *[(leaf.shape, leaf.dtype) for leaf in leaves]))


def _flattened(batch: Any) -> tuple[list[Tensor], Any]:
    # as often as there are steps: faster than by pytree
    return flatten(batch) if isinstance(batch, Batch) else tree_flatten(batch)


def copied(one: Given) -> Given:
    """Tensors of its own for each site: where two sites have one, a graph can't tell them apart."""
    return given(tree_map_only(Tensor, Tensor.clone, one.batch))


def turned(one: Given) -> Given:
    """Other rows than these, made of them: every second one twice, in the opposite order."""

    def other(tensor: Tensor) -> Tensor:
        rows = torch.arange(len(tensor), device=tensor.device)
        return tensor[rows.flip(0) // 2 * 2]

    return given(tree_map_only(Tensor, other, one.batch))


class Eager:
    """The step as it is written: loss, backward, clipping, optimizer."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def __call__(self, batches: Sequence[Given]) -> Tensor:
        step, loss = self.step, self.step.loss
        rows = sum(len(one.batch) for one in batches)
        now = loss.step.clone()
        losses: list[Tensor] = []

        def closure() -> Any:  # LBFGS calls it several times
            for parameter in step.parameters:
                parameter.grad = None
            value = torch.zeros((), device=now.device)
            for one in batches:
                loss.step.copy_(now)  # schedules count optimizer steps
                value = value + self.gradients(one, len(one.batch) / rows)
            if step.clip is not None:
                nn.utils.clip_grad_norm_(step.parameters, step.clip)
            losses.append(value)
            return value

        if optimizers.evaluates(step.optimizer):
            step.optimizer.step(closure)
        else:
            with torch.enable_grad():
                closure()
            step.optimizer.step()
        return losses[0]

    def gradients(self, one: Given, share: float) -> Tensor:
        """The loss per row, times the batch's share of the rows, its gradient added to that of the
        parameters."""
        with in_precision(self.step.precision, self.step.loss.step.device) as reached:
            total, counted = self.step.loss.loss_and_rows(one.batch)
            if self.step.precision != "full" and not reached:
                raise ValueError(
                    f"precision: came {self.step.precision!r} for a pair without a layer that it "
                    "makes faster, wanted nn.Linear, convolutions, recurrent layers or attention"
                )
            per_row = total / (counted / share)
            per_row.backward()
        return per_row.detach()


class Gradients(Eager):
    """Loss and gradients by a graph; clipping and optimizer as they are written."""

    level, note = "traced", ""

    def __init__(self, step: Step, batches: Sequence[Given]) -> None:
        super().__init__(step)
        _check(step)
        self.graphs: dict[Any, Graph] = {}
        self.trained: dict[Any, list[nn.Parameter]] = {}
        for one in {one.key: one for one in batches}.values():
            self.graphs[one.key] = self._recorded(one)
        self.runs: dict[Any, Callable[..., Sequence[Tensor]]] = dict(self.graphs)
        self.attributes = Attributes(step.loss, tensors=False)

    def _recorded(self, one: Given) -> Graph:
        parameters, one = self.step.parameters, copied(one)

        def gradients() -> list[Tensor]:
            per_row, found = loss_and_gradients(self.step, one.batch)
            pairs = [(p, g) for p, g in zip(parameters, found, strict=True) if g is not None]
            self.trained[one.key] = [parameter for parameter, _ in pairs]
            return [per_row, *(gradient for _, gradient in pairs)]

        return _recorded(self.step, gradients, [*one.leaves, *parameters])

    def recorded(self) -> list[Graph]:
        return list(self.graphs.values())

    def as_recorded(self) -> Gradients:
        """The same without machine code: the very operations of the programs."""
        way = copy.copy(self)
        way.runs, way.level = dict(self.graphs), "traced"
        return way

    def lower(self, batches: Sequence[Given]) -> None:
        """Make machine code of the graphs."""
        for one in batches:
            self.runs[one.key] = self.graphs[one.key].lowered([*one.leaves, *self.step.parameters])
        self.level = "compiled"

    def gradients(self, one: Given, share: float) -> Tensor:
        with torch.no_grad():
            per_row, *found = self.runs[one.key](*one.leaves, *self.step.parameters)
            for parameter, gradient in zip(self.trained[one.key], found, strict=True):
                gradient, old = gradient if share == 1.0 else gradient * share, parameter.grad
                parameter.grad = gradient if old is None else old.add_(gradient)
            return per_row * share


class Whole:
    """The whole step, the optimizer's included, by one graph."""

    level, note = "traced", ""

    def __init__(self, step: Step, batches: Sequence[Given]) -> None:
        _check(step)
        if len(batches) > 1:
            raise Refused("several batches make a step, so the optimizer stays outside the graph")
        if why := optimizers.refusal(step.optimizer):
            raise Refused(f"{why}, so it stays outside the graph")
        self.step, self.numbers = step, step.numbers
        self._check_numbers()
        self.rates = optimizers.rates(step.optimizer)
        self.trained: list[nn.Parameter] = []
        self.layouts = _layouts(self._fixed())
        self.graph = self._recorded(batches[0])
        self.run: Callable[..., Sequence[Tensor]] = self.graph
        self.bound: Any = None
        self.attributes = Attributes(step.loss, tensors=False)

    def _recorded(self, one: Given) -> Graph:
        step, optimizer = self.step, self.step.optimizer
        one = copied(one)

        def whole() -> list[Tensor]:
            per_row, found = loss_and_gradients(step, one.batch)
            for parameter, gradient in zip(step.parameters, found, strict=True):
                parameter.grad = gradient
            if step.clip is not None:
                nn.utils.clip_grad_norm_(step.parameters, step.clip)
            self.trained = [p for p in step.parameters if p.grad is not None]
            gradients = [p.grad for p in self.trained if p.grad is not None]
            optimizers.take(optimizer, self.rates)
            optimizer.zero_grad(set_to_none=True)
            return [per_row, *gradients]

        with optimizers.stepping(optimizer) as before:
            graph = _recorded(step, whole, [*one.leaves, *self._fixed()])
            if changed := next(before.changed(), None):
                raise Refused(f"{changed[0]} is set anew in a step, so it stays outside the graph")
            return graph

    def _fixed(self) -> list[Tensor]:
        """What stays where it is from step to step."""
        step = self.step
        return [*self.rates, *step.parameters, *optimizers.state_tensors(step.optimizer)]

    def recorded(self) -> list[Graph]:
        return [self.graph]

    def as_recorded(self) -> Whole:
        """The same without machine code: the very operations of the programs."""
        way = copy.copy(self)
        way.run, way.level, way.bound = self.graph, "traced", None
        return way

    def lower(self, batches: Sequence[Given]) -> None:
        """Make machine code of the graph, on CUDA as a CUDA graph."""
        self.lowered = self.graph.first(1).lowered([*batches[0].leaves, *self._fixed()])
        self.run, self.bound, self.level = self.lowered, None, "compiled"

    def __call__(self, batches: Sequence[Given]) -> Tensor:
        optimizer, (one,) = self.step.optimizer, batches
        self._check_numbers()
        with torch.no_grad():
            for rate, group in zip(self.rates, optimizer.param_groups, strict=True):
                rate.fill_(group["lr"])
            if self.bound != (bound := optimizers.identity(optimizer)):
                self._bind(one, bound)
            per_row, *gradients = self.run(*one.leaves, *self.inputs)
        for parameter, gradient in zip(self.trained, gradients, strict=bool(gradients)):
            parameter.grad = gradient
        return per_row

    def _check_numbers(self) -> None:
        optimizer = self.step.optimizer
        if optimizers.numbers(optimizer) != self.numbers:
            raise Refused(
                f"a number of {type(optimizer).__name__} besides its learning rate changes from step "
                "to step, so it stays outside the graph"
            )

    def _bind(self, one: Given, bound: Any) -> None:
        """Take the optimizer's state as it is now: ``load_state_dict`` makes it anew."""
        self.inputs, self.bound = self._fixed(), bound
        if _layouts(self.inputs) != self.layouts:
            name = type(self.step.optimizer).__name__
            raise Refused(f"the state of {name} is of another form than it was")
        if self.level == "compiled" and self.step.loss.step.is_cuda:
            with put_back(self.step.state(), self.step.loss):
                inputs = [*one.leaves, *self.inputs]
                try:
                    self.run = Replay(self.lowered, inputs, len(one.leaves))
                except RuntimeError as error:  # something in it waits for the host
                    self.run, self.note = self.lowered, f"no CUDA graph: {told(error)}"


def _check(step: Step) -> None:
    if step.loss.elbo.recomputes:
        raise Refused("backward makes chunks of particles again, which a graph would not")
    if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in step.parameters):
        raise Refused("a parameter has hooks on its gradient that a graph would not run")


def _recorded(step: Step, function: Callable[[], list[Tensor]], inputs: list[Tensor]) -> Graph:
    """A graph of a part of the step, without a trace of it.

    Raises:
        Refused: the program sets attributes as it runs.
    """
    before = Attributes(step.loss, tensors=False)
    with put_back(step.state(), step.loss):
        graph = record(function, inputs)
        if why := before.unsteady(graph.held) or before.drawn():
            raise Refused(why)
    return graph


def loss_and_gradients(step: Step, batch: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The loss per row and its gradient."""
    with torch.enable_grad(), in_precision(step.precision, step.loss.step.device):
        total, counted = step.loss.loss_and_rows(batch)
        per_row = total / counted
        found = torch.autograd.grad(per_row, step.parameters, allow_unused=True)
    return per_row.detach(), _apart(found)


def _apart(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients in memory of their own, as ``backward`` leaves them: clipping writes into it."""
    apart: list[Tensor | None] = []
    seen: set[int] = set()
    for gradient in gradients:
        if gradient is not None:
            here = gradient.untyped_storage().data_ptr()
            if here in seen or 0 in gradient.stride():
                gradient = gradient.clone(memory_format=torch.contiguous_format)
            seen.add(here)
        apart.append(gradient)
    return apart


def _layouts(tensors: Sequence[Tensor]) -> list[Any]:
    return [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
