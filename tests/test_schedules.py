"""Schedules: functions of a step tensor that stay tensors."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.objectives import beta_vae, elbo, linear, schedules
from tests.small_pairs import Guide, LinearModel, data


def test_linear():
    schedule = linear(4, 0.5, 2.5)
    assert [float(schedule(torch.tensor(step))) for step in (0, 1, 4, 9)] == [0.5, 1.0, 2.5, 2.5]
    assert float(linear(10)(torch.tensor(5))) == 0.5


def test_a_schedule_says_what_it_is():
    assert "linear(4, 0.5, 2.5)" in repr(beta_vae(linear(4, 0.5, 2.5)))


@pytest.mark.parametrize("steps", [0, -3])
def test_linear_refuses(steps: int):
    with pytest.raises(ValueError, match=f"steps={steps}"):
        linear(steps)


def test_value_takes_numbers_and_schedules():
    step = torch.tensor(3)
    assert schedules.value(0.7, step) == 0.7
    assert isinstance(schedules.value(linear(6), step), torch.Tensor)


@pytest.mark.parametrize("beta", [linear(10), {"z": linear(10)}], ids=["all sites", "by site"])
def test_a_schedule_is_not_frozen_into_a_traced_graph(beta):
    model, guide, x = LinearModel(), Guide(), data()
    objective = beta_vae(beta)

    def loss(step: torch.Tensor) -> torch.Tensor:
        return objective.loss_and_rows(model, guide, (x,), {}, step)[0]

    with pyro.validation_enabled(False):
        loss(torch.tensor(0))  # the plan is made outside the graph
        traced = make_fx(loss)(torch.tensor(0))
        values = []
        for call in (traced, loss):
            pyro.set_rng_seed(3)
            values.append(call(torch.tensor(7)).detach())
    torch.testing.assert_close(*values)


def test_warm_up_starts_from_the_reconstruction_and_ends_at_the_elbo():
    model, guide, x = LinearModel(), Guide(), data()
    module = beta_vae(linear(2))(model, guide)
    losses = []
    for _ in range(4):
        pyro.set_rng_seed(1)
        losses.append(float(module(x).detach()))
    pyro.set_rng_seed(1)
    whole = elbo().loss(model, guide, x)
    pyro.set_rng_seed(1)
    reconstruction = beta_vae(0.0).loss(model, guide, x)
    expected = [reconstruction, (reconstruction + whole) / 2, whole, whole]
    assert losses == pytest.approx(expected)


def test_the_step_advances_once_per_training_call():
    model, guide, x = LinearModel(), Guide(), data()
    module = elbo(num_particles=4, chunk=2)(model, guide)
    module(x).backward()  # chunks and recomputation count as one call
    assert module.step == 1
    with torch.no_grad():
        module(x)
    module.eval()
    module(x)
    assert module.step == 1
    assert "step" in module.state_dict()


def test_svi_advances_the_step_and_evaluation_does_not():
    model, guide, x = LinearModel(), Guide(), data()
    objective = beta_vae(linear(2))

    def registered_model(x):
        pyro.module("model", model)(x)

    def registered_guide(x):
        pyro.module("guide", guide)(x)

    svi = pyro.infer.SVI(registered_model, registered_guide, Adam({"lr": 0.0}), objective)

    def seeded(call):
        pyro.set_rng_seed(1)
        return call(x)

    before = [seeded(svi.evaluate_loss), seeded(svi.evaluate_loss)]
    first, second, third, fourth = (seeded(svi.step) for _ in range(4))
    assert before == pytest.approx([first, first])
    assert second != pytest.approx(first)
    assert second != pytest.approx(third)
    assert third == pytest.approx(fourth)
