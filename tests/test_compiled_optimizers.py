"""Optimizers inside a graph: the same steps as outside, whatever their kind and their state."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_vae.compiled import optimizers
from pyro_vae.compiled.step import Step
from pyro_vae.compiled.ways import Eager, Refused, Whole, given
from pyro_vae.objectives import elbo
from tests.exact_pairs import OptimalGuide
from tests.small_pairs import LinearModel, data

OPTIMIZERS: dict[str, Any] = {
    "SGD": partial(torch.optim.SGD, lr=0.02),
    "momentum": partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": partial(torch.optim.Adam, lr=0.02),
    "fused Adam": partial(torch.optim.Adam, lr=0.02, fused=True),
    "amsgrad": partial(torch.optim.Adam, lr=0.02, amsgrad=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.02, betas=(0.8, 0.95)),
    "NAdam": partial(torch.optim.NAdam, lr=0.02),
    "groups": lambda ps: torch.optim.Adam(
        [{"params": ps[:2], "lr": 0.05}, {"params": ps[2:], "weight_decay": 0.1}], lr=0.01
    ),
}
SCHEDULERS: dict[str, Any] = {
    "none": None,
    "halved": partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5),
    "lambda": partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
}


def training(name: str, scheduler: str = "none", clip: float | None = 0.5) -> Step:
    """A step whose optimizer has its state."""
    torch.manual_seed(0)
    loss = elbo(2)(LinearModel(), OptimalGuide())
    loss.train()
    parameters = list(loss.parameters())
    optimizer = OPTIMIZERS[name](parameters)
    make = SCHEDULERS[scheduler]
    schedule = None if make is None else make(optimizer)
    step = Step(loss, parameters, optimizer, schedule, clip, "eager", "full", None, None)
    step(data(6))
    return step


def swap(step: Step, optimizer: torch.optim.Optimizer) -> None:
    step.optimizer, step.numbers = optimizer, optimizers.numbers(optimizer)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_graph_takes_the_steps_of_the_optimizer(name: str, scheduler: str):
    found = []
    for kind in (Eager, Whole):
        step = training(name, scheduler)
        way: Any = Eager(step) if kind is Eager else Whole(step, [given(data(6))])
        torch.manual_seed(1)
        values = []
        for i in range(6):
            values.append(way([given(data(6, seed=i))]))
            if step.scheduler is not None:
                step.scheduler.step()
            if i == 3:  # a checkpoint
                state = copy.deepcopy(step.optimizer.state_dict())
                for tensor in step.state():
                    tensor.detach().add_(0.1) if tensor.dim() else None
                step.optimizer.load_state_dict(state)
        found.append([torch.stack(values).detach(), *step.state()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)  # 1 - beta^t is in float32
    assert not torch.equal(found[0][0][:1], found[0][0][1:2])


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        (torch.optim.RMSprop, "RMSprop wants numbers out of tensors"),
        (partial(torch.optim.LBFGS, max_iter=2), "LBFGS evaluates the loss"),
    ],
    ids=["RMSprop", "LBFGS"],
)
def test_optimizers_that_stay_outside(optimizer: Any, why: str):
    step = training("SGD")
    swap(step, optimizer(step.parameters))
    step(data(6))
    before = [tensor.detach().clone() for tensor in step.state()]
    with pytest.raises((Refused, ValueError), match=why):
        Whole(step, [given(data(6))])
    assert all(map(torch.equal, before, step.state()))


def test_an_optimizer_without_its_state_stays_outside_for_now():
    step = training("SGD")
    swap(step, torch.optim.Adam(step.parameters))
    with pytest.raises(ValueError, match="Adam has yet to make its state"):
        Whole(step, [given(data(6))])
    assert not step.optimizer.state


def test_numbers_that_change_are_seen():
    step = training("Adam")
    way, one = Whole(step, [given(data(6))]), given(data(6))
    step.optimizer.param_groups[0]["lr"] = 0.5
    way([one])
    step.optimizer.param_groups[0]["betas"] = (0.5, 0.9)
    with pytest.raises(Refused, match="a number of Adam besides its learning rate changes"):
        way([one])


class Counting(torch.optim.Optimizer):
    """Counts in a number, a list and a group."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "count": 0})
        self.taken = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.taken += 1
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                self.state[p].setdefault("steps", []).append(self.taken)
                p.sub_(p.grad, alpha=group["lr"] / self.taken)


def test_steps_that_are_undone():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = Counting([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    with optimizers.stepping(optimizer):
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 7.0
    group = optimizer.param_groups[0]
    assert (optimizer.taken, group["count"], group["lr"]) == (1, 1, 0.1)
    assert optimizer.state[parameter]["steps"] == [1]


def test_state_tensors():
    step = training("Adam")
    found: list[Tensor] = optimizers.state_tensors(step.optimizer)
    assert len(found) == 3 * len(step.parameters)
    assert optimizers.state_tensors(torch.optim.SGD(step.parameters)) == []


def test_which_optimizers_evaluate_the_loss():
    step = training("SGD")
    assert not optimizers.evaluates(step.optimizer)
    assert optimizers.evaluates(torch.optim.LBFGS(step.parameters))
