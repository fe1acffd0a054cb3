"""What a training carries: averages, and states to go back to or on from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_vae.objectives import elbo
from pyro_vae.training.progress import Progress
from tests.small_pairs import Guide, LinearModel, batch_norm, data


def progress(**options: Any) -> Progress:
    torch.manual_seed(0)
    loss = elbo()(LinearModel(), Guide(batch_norm()))
    stored = {"shift": nn.Parameter(torch.zeros(3))}
    parameters = [*loss.parameters(), *stored.values()]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    return Progress(loss, parameters, stored, optimizer, **options)


def move(state: Progress, steps: int = 1) -> None:
    """Steps of the optimizer under gradients of any kind."""
    for _ in range(steps):
        for parameter in state.parameters:
            parameter.grad = torch.randn_like(parameter)
        state.optimizer.step()
        state.loss.loss_and_rows(data(4))  # moves the running statistics
        state.advance()


def now(state: Progress) -> list[Tensor]:
    return [p.detach().clone() for p in state.parameters]


@pytest.mark.parametrize("ema", [0.3, 0.9])
def test_the_average_of_five_steps_by_hand(ema: float):
    state = progress(ema=ema)
    wanted = now(state)
    for step in range(1, 6):
        move(state)
        decay = min(ema, (1 + step) / (10 + step))
        wanted = [decay * a + (1 - decay) * p for a, p in zip(wanted, now(state), strict=True)]
    for average, by_hand in zip(state.average, wanted, strict=True):
        torch.testing.assert_close(average, by_hand, rtol=1e-14, atol=1e-15)


def test_the_pair_has_its_average_for_a_while():
    """Parameters alone: running statistics are those of the last step, and stay what they become."""
    state = progress(ema=0.5)
    move(state, 3)
    trained, statistics = now(state), [b.clone() for b in state.loss.buffers()]
    with state.averaged():
        assert all(map(torch.equal, now(state), state.average))
        assert not any(map(torch.equal, now(state), trained))
        assert all(map(torch.equal, state.loss.buffers(), statistics))
    assert all(map(torch.equal, now(state), trained))
    state.settle()
    assert all(map(torch.equal, now(state), state.average))


def test_an_error_does_not_leave_the_average_in_the_pair():
    state = progress(ema=0.5)
    move(state, 2)
    trained = now(state)

    def fail() -> None:
        with state.averaged():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert all(map(torch.equal, now(state), trained))


def test_without_an_average_nothing_moves():
    state = progress()
    move(state, 2)
    trained = now(state)
    with state.averaged():
        assert all(map(torch.equal, now(state), trained))
    state.settle()
    assert all(map(torch.equal, now(state), trained))


def test_the_best_parameters_come_before_the_average():
    state = progress(ema=0.5)
    move(state, 2)
    state.best, best = state.parameters_now(), now(state)
    move(state, 2)
    state.settle()
    assert all(map(torch.equal, now(state), best))


def test_back_to_a_snapshot():
    state = progress(ema=0.9)
    move(state, 2)
    good = state.snapshot()
    found = []
    for _ in range(2):
        state.restore(good)
        move(state, 3)
        found.append([*now(state), *state.average, *map(torch.clone, state.loss.buffers())])
        assert state.step == 5
    assert all(map(torch.equal, *found))


def test_another_process_goes_on():
    first = progress(ema=0.9, made_by={"seed": 3})
    move(first, 2)
    first.total, first.rows = torch.tensor(7.0), 4
    saved = first.dump()
    move(first, 2)
    second = progress(ema=0.9, made_by={"seed": 3})
    second.load(saved, "runs/a")
    assert (second.step, float(second.total), second.rows) == (2, 7.0, 4)
    move(second, 2)
    assert all(map(torch.equal, now(first), now(second)))
    assert all(map(torch.equal, first.average, second.average))


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"made_by": {"seed": 4, "ema": 0.9}, "ema": 0.9}, "came seed 4, the run has 3"),
    "decay": ({"made_by": {"seed": 3, "ema": 0.5}, "ema": 0.5}, "came ema 0.5, the run has 0.9"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_state_of_another_kind(case: str):
    options, message = OTHERS[case]
    saved = progress(ema=0.9, made_by={"seed": 3, "ema": 0.9}).dump()
    with pytest.raises(ValueError, match=f"runs/a: {message}"):
        progress(**options).load(saved, "runs/a")


def test_a_state_of_before_there_were_averages():
    saved = progress().dump()
    saved.pop("average")
    made_by: dict[str, Any] = {"accumulate": 1, "precision": "full", "ema": None}
    progress(made_by=made_by).load(saved, "runs/a")
    with pytest.raises(ValueError, match=r"came ema 0\.9, the run has None"):
        progress(made_by={**made_by, "ema": 0.9}, ema=0.9).load(saved, "runs/a")


def test_a_state_of_another_pair():
    saved = progress().dump()
    saved["parameters"]["modules"].pop("guide.net.0.weight")
    with pytest.raises(ValueError, match=r"runs/a: the state is not of this pair: .*guide\.net"):
        progress().load(saved, "runs/a")
