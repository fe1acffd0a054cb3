"""NaN and inf: named by site and rows, the pair left in its last good state."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.objectives import beta_vae, elbo
from pyro_vae.objectives.schedules import linear
from pyro_vae.training.epochs import order
from pyro_vae.training.fit import NonFiniteError
from tests.exact_pairs import BatchGuide, DiscreteModel, LinearBatchModel
from tests.small_pairs import X_DIM, Z_DIM, Guide, LinearModel, batch_norm, data
from tests.trainings import SGD, fit, parameters, same

NAN = math.nan


def assert_stops(
    pair: tuple[Any, Any], rows: Any, message: str, step: int, **options: Any
) -> NonFiniteError:
    """Training stops, and the pair is where the steps before had brought it."""
    torch.manual_seed(0)
    start = copy.deepcopy([part.state_dict() for part in pair])
    with pytest.raises(NonFiniteError, match=message) as caught:
        fit(*pair, rows, **options)
    assert f"step {step}:" in str(caught.value)
    left = parameters(*pair)
    assert all(bool(torch.isfinite(t).all()) for t in left)
    assert caught.value.run.stopped == "non-finite"
    assert caught.value.run.model is pair[0]
    for part, state in zip(pair, start, strict=True):
        part.load_state_dict(state)
    if step > 1:
        length = {k: v for k, v in options.items() if k not in ("epochs", "valid")}
        fit(*pair, rows, **{**length, "steps": step - 1})
    assert same(parameters(*pair), left)
    return caught.value


def place_of(row: int, rows: int, batch_size: int = 1, seed: int = 0) -> int:
    """The step of the first epoch that meets a row."""
    met = order(rows, seed, 0).tolist()
    return met.index(row) // batch_size + 1


def test_a_bare_tensor_holds_no_missing_entries():
    x = data(40)
    x[17, 1] = NAN
    with pytest.raises(ValueError, match="fit: data came as a bare tensor with 1 NaN"):
        fit(LinearModel(), Guide(), x, steps=1)


def test_a_row_that_is_not_a_number():
    x = data(40)
    x[17, 1] = math.inf
    message = r"site 'z': its posterior density is not finite in rows \[17\]"
    step = place_of(17, 40, 4)
    assert_stops((LinearModel(), Guide()), x, message, step, epochs=2, batch_size=4, optimizer=SGD)


def test_rows_go_by_their_numbers_in_the_data_set():
    x = data(40)
    x[[13, 19]] = 1e200
    batch = Batch({"x": x}).rows(slice(10, 30))
    pair = LinearBatchModel(), broad_guide()
    message = r"site 'x': its likelihood density is not finite in rows \[13, 19\]"
    assert_stops(pair, batch, message, 1, epochs=2, optimizer=SGD)


def broad_guide() -> BatchGuide:
    """A guide that does not look at its data."""
    layer = nn.Linear(X_DIM, 2 * Z_DIM)
    nn.init.zeros_(layer.weight)
    return BatchGuide(layer)


def test_many_rows_are_not_all_listed():
    message = r"in rows \[0, 1, 2, 3, 4\] and more"
    x = torch.full((9, X_DIM), 1e200)
    with pytest.raises(NonFiniteError, match=message):
        fit(LinearBatchModel(), broad_guide(), Batch({"x": x}), epochs=1)


def test_a_learning_rate_that_explodes():
    pair = LinearModel(), Guide()
    torch.manual_seed(0)
    with pytest.raises(NonFiniteError, match=r"site|learning rate|gradient") as caught:
        fit(*pair, data(8), steps=400, optimizer=partial(torch.optim.SGD, lr=1e4))
    assert all(bool(torch.isfinite(t).all()) for t in parameters(*pair))
    assert caught.value.run.stopped == "non-finite"


class InfiniteGradient(LinearModel):
    """sqrt(0) is 0, and its gradient is not finite: in the rows whose first entry is above 5."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> None:
        wrong = (x[:, 0] > 5).sum() * self.extra
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.z_dim]).to_event(1))
            loc = self.net(z) + (wrong.abs().sqrt() if bool((x[:, 0] > 5).any()) else 0.0)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


# Steps are looked at every 100: deep within, the first, the last before and after a look, the last.
@pytest.mark.parametrize("step", [1, 37, 99, 100, 101, 150, 200, 230])
def test_an_infinite_gradient_under_a_finite_loss(step: int):
    rows = 230
    x = data(rows)
    x[:, 0] = 0.1 * x[:, 0]
    x[order(rows, 0, 0)[step - 1], 0] = 6.0
    message = "gradient of model.extra is not finite; the state before it is kept"
    assert_stops(
        *((InfiniteGradient(), Guide()), x, message, step),
        epochs=1,
        batch_size=1,
        optimizer=partial(torch.optim.Adam, lr=1e-3),
    )


def test_in_a_later_epoch(monkeypatch: pytest.MonkeyPatch):
    """With dropout, a schedule and running statistics on the way."""
    torch.manual_seed(0)
    model, x = LinearModel(), data(9)
    guide = Guide(nn.Sequential(batch_norm(), nn.Dropout(0.2)))
    poisoned = Poison(11)
    options: dict[str, Any] = {"optimizer": poisoned, "batch_size": 3}
    with pytest.raises(NonFiniteError, match="step 11: the optimizer's step left parameters"):
        fit(model, guide, x, beta_vae(linear(5)), epochs=9, **options)
    left = parameters(model, guide)
    torch.manual_seed(0)
    model, guide = LinearModel(), Guide(nn.Sequential(batch_norm(), nn.Dropout(0.2)))
    fit(model, guide, x, beta_vae(linear(5)), steps=10, **{**options, "optimizer": Poison(99)})
    assert same(parameters(model, guide), left)


class Poison:
    """An optimizer whose step number ``at`` is not finite."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, parameters: Any) -> torch.optim.Optimizer:
        parameters, at = list(parameters), self.at

        class Poisoned(torch.optim.Adam):
            @torch.no_grad()
            def step(self, closure: Any = None) -> Any:
                loss = super().step(closure)
                steps = {float(state["step"]) for state in self.state.values()}
                if at in steps:
                    parameters[0].fill_(math.inf)
                return loss

        return Poisoned(parameters, lr=0.01)


def test_a_parameter_in_the_store_is_named():
    def model(x: Tensor) -> None:
        shift = pyro.param("shift", torch.zeros(()))
        with pyro.plate("data", len(x)):
            loc = shift.abs().sqrt().expand(X_DIM)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    with pytest.raises(NonFiniteError, match="step 1: the gradient of shift is not finite"):
        fit(model, lambda x: None, data(6), epochs=1)
    assert float(pyro.param("shift").detach()) == 0.0


class CategoricalGuide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(X_DIM, 3)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=self.net(x)))


def test_draws_that_fail_once_a_parameter_is_not_finite():
    """The step after the bad one raises an error of its own, within the hundred steps."""
    torch.manual_seed(0)
    pair = DiscreteModel(), CategoricalGuide()
    options: dict[str, Any] = {"objective": elbo(estimator="score"), "batch_size": 2}
    with pytest.raises(NonFiniteError, match=r"step 7: .* lower the learning rate"):
        fit(*pair, data(40), epochs=2, optimizer=PoisonGuide(7), **options)
    assert all(bool(torch.isfinite(t).all()) for t in parameters(*pair))


class PoisonGuide(Poison):
    def __call__(self, parameters: Any) -> torch.optim.Optimizer:
        return super().__call__(list(parameters)[::-1])


def test_an_error_of_the_program_is_not_taken_for_one_of_the_numbers():
    class Fails(LinearModel):
        def forward(self, x: Tensor) -> None:
            super().forward(x)
            if torch.is_grad_enabled() and self.training and len(x) == 1:
                raise RuntimeError("no single rows")

    with pytest.raises(RuntimeError, match="no single rows"):
        fit(Fails(), Guide(), data(7), epochs=1, batch_size=3)


def test_the_best_parameters_are_finite(tmp_path: Path):
    """A last step that leaves no finite parameters is noticed; the saved state is the one before."""
    options: dict[str, Any] = {"valid": data(3), "batch_size": 4, "out": tmp_path}
    with pytest.raises(NonFiniteError, match="step 6:"):
        fit(LinearModel(), Guide(), data(8), epochs=3, optimizer=Poison(6), **options)
    pair = LinearModel(), Guide()
    run = fit(*pair, data(8), epochs=2, optimizer=Poison(9), resume=True, **options)
    assert [record["step"] for record in run.history] == [2, 4]


def test_a_row_in_a_later_batch_of_a_step():
    """The second of three batches, whose draws come after those of the first."""
    x = data(40)
    met = order(40, 0, 0).tolist()
    row = met[12 + 5]  # the second step takes 12..23, in batches of 4
    x[row, 1] = math.inf
    message = rf"site 'z': its posterior density is not finite in rows \[{row}\]"
    options: dict[str, Any] = {"epochs": 2, "batch_size": 4, "accumulate": 3, "optimizer": SGD}
    assert_stops((LinearModel(), Guide()), x, message, 2, **options)


def test_an_average_stops_with_its_parameters():
    """The pair is left with the last good parameters, not with their average."""
    x = data(40)
    x[17, 1] = math.inf
    step = place_of(17, 40, 4)
    message = r"rows \[17\]"
    with pytest.raises(NonFiniteError, match=message):
        fit(*(pair := (LinearModel(), Guide())), x, epochs=1, batch_size=4, ema=0.9)
    assert step > 1
    assert all(bool(torch.isfinite(t).all()) for t in parameters(*pair))
    torch.manual_seed(0)
    start = (LinearModel(), Guide())
    assert_stops(start, x, message, step, epochs=1, batch_size=4, optimizer=SGD)
    plainly = parameters(*start)
    torch.manual_seed(0)
    start = (LinearModel(), Guide())
    with pytest.raises(NonFiniteError, match=message):
        fit(*start, x, epochs=1, batch_size=4, optimizer=SGD, ema=0.9)
    assert same(parameters(*start), plainly)


def test_in_bf16():
    torch.set_default_dtype(torch.float32)
    x = data(40)
    x[17, 1] = math.inf
    message = r"site 'z': its posterior density is not finite in rows \[17\]"
    options: dict[str, Any] = {"batch_size": 4, "optimizer": SGD, "precision": "bf16"}
    assert_stops((LinearModel(), Guide()), x, message, place_of(17, 40, 4), epochs=1, **options)
