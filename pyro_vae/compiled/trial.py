"""Does a graph take the steps that the program takes? Asked before it is used."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pyro
import torch
from torch import Tensor

from pyro_vae.compiled import optimizers
from pyro_vae.compiled.graph import put_back
from pyro_vae.compiled.ways import Given, Refused, Way

if TYPE_CHECKING:
    from pyro_vae.compiled.step import Step

__all__ = ["SHAKE", "Trial"]

SHAKE = 0.05  # of parameters, relative


class Trial:
    """Two steps in a row that leave no trace: on other rows, draws, parameters, learning rates and
    steps of the schedules than those that a graph was recorded with, which it may have as constants.
    """

    def __init__(self, step: Step, way: Way, batches: list[Given], shake: float = SHAKE) -> None:
        self.bf16, self.shake = step.precision != "full", shake
        groups = step.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        state = step.state()
        with put_back(state, step.loss), optimizers.stepping(step.optimizer):
            try:
                pyro.set_rng_seed(1)
                with torch.no_grad():
                    step.loss.step += 17
                    for parameter in step.parameters:
                        parameter.mul_(1 + shake * torch.randn_like(parameter))
                for group in groups:
                    group["lr"] = group["lr"] * 0.5
                buffers = [b for b in step.loss.buffers() if b.is_floating_point()]
                moving: list[list[Tensor]] = [
                    [*step.parameters],
                    state[len(step.parameters) :],
                    buffers,
                ]
                before = [[tensor.detach().clone() for tensor in tensors] for tensors in moving]
                with pyro.validation_enabled(False):
                    self.losses = [way(batches)]
                    self.gradients = {
                        i: parameter.grad.clone()
                        for i, parameter in enumerate(step.parameters)
                        if parameter.grad is not None
                    }
                    self.losses.append(way(batches))
                self.changes = [
                    [new.detach() - old for new, old in zip(*pair, strict=True)]
                    for pair in zip(moving, before, strict=True)
                ]
            finally:
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate
                step.optimizer.zero_grad(set_to_none=True)

    def agrees(self, graph: Trial, strictly: bool) -> None:
        """Compare with the trial of a graph of the same step.

        Args:
            strictly: it runs the very same operations, up to the optimizer's; machine code has
                others.

        Raises:
            Refused: saying what differs.
        """
        exact = 100 * torch.finfo(self.losses[0].dtype).eps
        later = 1e-4 if strictly else 1e-2 if self.bf16 else 1e-3  # after a step of the optimizer
        tolerances = (exact if strictly else later, later)
        for ours, theirs, rounding in zip(self.losses, graph.losses, tolerances, strict=True):
            if not torch.isclose(ours, theirs, rtol=rounding, atol=rounding, equal_nan=True):
                raise Refused(
                    f"the graph's loss is {float(theirs):.6g} where the program's is "
                    f"{float(ours):.6g}: a number that changes was taken for a constant"
                )
        total = _norm(list(self.gradients.values()))
        if strictly:
            if self.gradients.keys() != graph.gradients.keys():
                raise Refused("the graph has the gradients of other parameters than the program")
            for i, gradient in self.gradients.items():
                error = _norm([gradient - graph.gradients[i]])
                if not error <= exact * (_norm([gradient]) + 0.1 * total):
                    raise Refused(f"the graph's gradient is off by {error / total:.1g} of its norm")
        names = ("parameters", "optimizer's state", "buffers")
        for name, mine, other in zip(names, self.changes, graph.changes, strict=True):
            apart, whole = [a - b for a, b in zip(mine, other, strict=True)], _norm(mine)
            if name == "parameters":
                # where a gradient is 0 but for rounding, Adam's step has either sign
                for i, gradient in self.gradients.items():
                    apart[i] = torch.where(gradient.abs() > exact * total, apart[i], 0.0)
            error = _norm(apart)
            if not error <= (0.2 if self.bf16 else 0.05) * whole:
                raise Refused(
                    f"the graph's step changes the {name} otherwise: by {error:.1g} beside the "
                    f"program's, whose change is {whole:.1g}"
                )


def _norm(tensors: list[Tensor]) -> float:
    norms = [float(tensor.double().square().sum()) for tensor in tensors]
    return math.sqrt(math.fsum(norms))
