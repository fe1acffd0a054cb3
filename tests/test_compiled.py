"""The step: one for every level, with any optimizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_vae.compiled import LEVELS, make_step
from pyro_vae.objectives import elbo, iwae
from tests.exact_pairs import OptimalGuide
from tests.small_pairs import LinearModel, data


def loss_and_parameters(objective: Any = None) -> tuple[Any, list[nn.Parameter]]:
    torch.manual_seed(0)
    loss = (objective or elbo(2))(LinearModel(), OptimalGuide())
    return loss, list(loss.parameters())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_steps_are_those_of_a_loop_by_hand(level: str, clip: float | None):
    x = data(8)
    loss, parameters = loss_and_parameters(iwae(3))
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    step = make_step(loss, parameters, optimizer, scheduler, clip, level)
    torch.manual_seed(1)
    came = [step(x) for _ in range(5)]

    loss, wanted = loss_and_parameters(iwae(3))
    torch.manual_seed(1)
    by_hand = torch.optim.Adam(wanted, lr=0.1)
    for i in range(5):
        by_hand.param_groups[0]["lr"] = 0.1 * 0.5 ** (i // 2)
        by_hand.zero_grad()
        per_row = loss(x) / len(x)
        per_row.backward()
        if clip is not None:
            norm = torch.stack([p.grad.norm() for p in wanted]).norm()  # type: ignore[union-attr]
            for p in wanted:
                p.grad.mul_(min(1.0, clip / (float(norm) + 1e-6)))  # type: ignore[union-attr]
        by_hand.step()
        torch.testing.assert_close(came[i], per_row.detach())
        assert not came[i].requires_grad
    for p, q in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("level", LEVELS)
def test_lbfgs(level: str):
    """An optimizer that evaluates the loss several times a step; the first value is reported."""
    x = data(8)
    loss, parameters = loss_and_parameters()
    before = copy.deepcopy(loss)
    step = make_step(loss, parameters, torch.optim.LBFGS(parameters, max_iter=5), level=level)
    torch.manual_seed(1)
    value = step(x)
    torch.manual_seed(1)
    torch.testing.assert_close(value, before(x).detach() / 8)
    assert any(not torch.equal(p, q) for p, q in zip(parameters, before.parameters(), strict=True))


@pytest.mark.parametrize("level", LEVELS)
def test_a_module_that_is_not_used_is_left_alone(level: str):
    loss, parameters = loss_and_parameters()
    unused = nn.Parameter(torch.ones(2))
    every = [*parameters, unused]
    step = make_step(loss, every, torch.optim.SGD(every, 0.1, weight_decay=1.0), None, 1.0, level)
    step(data(4))
    assert unused.tolist() == [1.0, 1.0]


def test_unknown_level():
    loss, parameters = loss_and_parameters()
    with pytest.raises(ValueError, match=r"'turbo'.*'auto'"):
        make_step(loss, parameters, torch.optim.SGD(parameters), level="turbo")


def test_the_gradient_of_the_last_step_is_not_in_the_next():
    loss, parameters = loss_and_parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    step = make_step(loss, parameters, optimizer)

    def gradient() -> list[Tensor]:
        torch.manual_seed(3)
        step(data(4))
        return [p.grad.clone() for p in parameters]  # type: ignore[union-attr]

    for a, b in zip(gradient(), gradient(), strict=True):
        assert torch.equal(a, b)
