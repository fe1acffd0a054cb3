"""The training loop: what it optimises, what it keeps, how it goes on and how it stops."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.distributions import constraints
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.batch import Batch
from pyro_vae.evaluation import evaluate
from pyro_vae.nn import leading, mlp
from pyro_vae.objectives import Objective, beta_vae, elbo, iwae
from pyro_vae.objectives.schedules import linear
from pyro_vae.training import fit as fit_module
from pyro_vae.training import runs
from pyro_vae.training.epochs import order
from pyro_vae.training.fit import Run
from pyro_vae.training.runs import Folder
from tests.exact_pairs import BatchGuide, ExactGuide, LinearBatchModel, OptimalGuide
from tests.small_pairs import (
    X_DIM,
    Z_DIM,
    Guide,
    LinearModel,
    MethodPair,
    PyroParamGuide,
    as_functions,
    batch_norm,
    data,
)
from tests.trainings import ADAM, SGD, STAND_STILL, fit, parameters, plain, same

# ---------------------------------------------------------------------------------------------
# What is optimised


def test_the_optimum_of_a_linear_pair():
    """Probabilistic principal components: the ELBO's optimum is the greatest likelihood."""
    x = data(60) @ torch.tensor([[2.0, 0.5, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 0.5]])
    cov = torch.cov(x.T, correction=0)
    noise, *others = torch.linalg.eigvalsh(cov).tolist()
    log_det = math.log(noise) + sum(map(math.log, others))
    best = -0.5 * (X_DIM * math.log(2 * math.pi) + log_det + X_DIM)

    model, guide = LinearModel(), OptimalGuide()
    schedule = partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.997**step)
    fit(*(model, guide, x, elbo(8, "stl")), steps=1500, optimizer=ADAM, scheduler=schedule)
    assert float(model.evidence(x).mean().detach()) == pytest.approx(best, abs=3e-3)
    e = evaluate(model, guide, x, 50, widen=False)
    assert float(e.elbo.mean()) == pytest.approx(best, abs=3e-3)
    assert float((e.log_p - e.elbo).abs().max()) < 0.05


def test_loss_is_in_nats_per_row():
    """Also where the last batch is odd; nothing is random about an exact posterior."""
    model, x = LinearModel(), data(7)
    run = fit(model, ExactGuide(model), x, epochs=2, batch_size=3, optimizer=STAND_STILL)
    wanted = -float(model.evidence(x).mean().detach())
    assert [record["loss"] for record in run.history] == [pytest.approx(wanted)] * 2
    assert [(r["step"], r["epoch"]) for r in run.history] == [(3, 1), (6, 2)]


class Subsampled(LinearBatchModel):
    """A plate of the whole data set, which scales the rows of a batch by N / B."""

    def forward(self, batch: Any) -> None:
        with pyro.plate("data", batch.total, subsample=batch.index, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.z_dim]).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), self.log_scale.exp()).to_event(1))


class SubsampledGuide(BatchGuide):
    def forward(self, batch: Any) -> None:
        with pyro.plate("data", batch.total, subsample=batch.index, dim=-1):
            pyro.sample("z", self.posterior(batch["x"]))


def test_a_subsampled_plate_changes_neither_loss_nor_learning_rate():
    runs = []
    for kinds in ((LinearBatchModel, BatchGuide), (Subsampled, SubsampledGuide)):
        torch.manual_seed(0)
        model, guide = (kind() for kind in kinds)
        run = fit(model, guide, Batch({"x": data(7)}), epochs=2, batch_size=3, optimizer=SGD)
        runs.append((plain(run.history), parameters(model, guide)))
    (first, trained), (second, trained_too) = runs
    for record, other in zip(first, second, strict=True):
        assert record == pytest.approx(other)
    for a, b in zip(trained, trained_too, strict=True):
        torch.testing.assert_close(a, b)


def test_row_weights():
    model, x, weights = LinearBatchModel(), data(5), torch.tensor([0.0, 1.0, 2.0, 1.5, 0.5])
    batch = Batch({"x": x}, weights=weights)
    run = fit(model, ExactGuide(model), batch, epochs=1, batch_size=2, optimizer=STAND_STILL)
    wanted = -float((weights * model.evidence(x)).mean().detach())
    assert run.history[0]["loss"] == pytest.approx(wanted)


class Watched(LinearModel):
    """Keeps the rows that it was shown while training."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[float]] = []

    def forward(self, x: Tensor) -> None:
        super().forward(x)
        if torch.is_grad_enabled() and self.training:
            self.seen.append(x[:, 0].tolist())


def rows_seen(seed: int) -> list[list[float]]:
    model, x = Watched(), torch.arange(7.0)[:, None].expand(7, X_DIM) / 10
    fit(model, Guide(), x, epochs=3, batch_size=3, seed=seed)
    steps = model.seen[1:]  # the first run, before the training, looks for what will get gradients
    return [[round(10 * number) for number in rows] for rows in steps]


def test_every_row_once_an_epoch_in_an_order_of_its_own():
    seen = rows_seen(seed=1)
    assert [len(rows) for rows in seen] == [3, 3, 1] * 3
    epochs = [[*seen[i], *seen[i + 1], *seen[i + 2]] for i in (0, 3, 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert rows_seen(seed=1) == seen
    assert rows_seen(seed=2) != seen
    assert rows_seen(seed=2**62) != seen


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.02, momentum=0.5),
    "AdamW": partial(torch.optim.AdamW, lr=0.02),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "LBFGS": partial(torch.optim.LBFGS, lr=0.02, max_iter=4),
    "groups": lambda ps: torch.optim.Adam([{"params": [p], "lr": 0.02} for p in ps]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_torch_optimizer(name: str):
    model, guide, x = LinearModel(), OptimalGuide(), data(20)
    run = fit(
        *(model, guide, x, elbo(4, "stl")), epochs=15, batch_size=10, optimizer=OPTIMIZERS[name]
    )
    assert run.history[-1]["loss"] < run.history[0]["loss"] - 0.1


def test_the_scheduler_steps_with_the_optimizer():
    run = fit(
        *(LinearModel(), Guide(), data(6)),
        epochs=3,
        batch_size=3,
        optimizer=SGD,
        scheduler=partial(lr_scheduler.StepLR, step_size=4, gamma=0.1),
    )
    assert [record["lr"] for record in run.history] == pytest.approx([0.05, 0.005, 0.005])


def test_clip_bounds_the_step():
    model, guide = LinearModel(), Guide()
    before = parameters(model, guide)
    fit(model, guide, 100 * data(6), steps=1, optimizer=partial(torch.optim.SGD, lr=1.0), clip=0.01)
    change = [a - b for a, b in zip(before, parameters(model, guide), strict=True)]
    assert float(torch.cat([c.flatten() for c in change]).norm()) == pytest.approx(0.01, rel=1e-3)


def test_an_objective_warms_up_over_the_steps():
    """The schedule reads the step of the training, in every epoch of it."""
    model, guide, x = LinearModel(), Guide(), data(6)
    schedule = Objective(rate=beta_vae(linear(10)).rate)
    losses = []
    for objective in (schedule, elbo(), beta_vae(0.0)):
        run = fit(model, guide, x, objective, epochs=12, batch_size=6, optimizer=STAND_STILL)
        losses.append([record["loss"] for record in run.history])
    warm, full, none = losses
    assert warm[0] == pytest.approx(none[0])
    assert warm[10:] == pytest.approx(full[10:])
    assert warm[5] == pytest.approx((none[5] + full[5]) / 2)


class Marginal(LinearModel):
    """x from its marginal: a loss and a gradient that no draw enters."""

    def forward(self, x: Tensor) -> None:
        w, noise = self.net.weight, torch.eye(X_DIM) * (2 * self.log_scale).exp()
        with pyro.plate("data", len(x)):
            fn = dist.MultivariateNormal(self.net.bias, w @ w.T + noise)
            pyro.sample("x", fn, obs=x)


def no_guide(x: Tensor) -> None:
    pass


@pytest.mark.parametrize("rows", [12, 11, 7], ids=["even", "odd batch", "odd step"])
def test_accumulated_batches_are_one_large_batch(rows: int):
    """Also the last ones of an epoch, which are fewer or shorter; steps, schedule and losses too."""
    found = []
    for sizes in ({"batch_size": 2, "accumulate": 3}, {"batch_size": 6}):
        torch.manual_seed(0)
        model = Marginal()
        run = fit(
            *(model, no_guide, data(rows)),
            epochs=3,
            optimizer=SGD,
            scheduler=partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
            clip=0.5,
            **sizes,
        )
        found.append((plain(run.history), parameters(model)))
    (history, trained), (wanted, large) = found
    for record, other in zip(history, wanted, strict=True):
        assert record == pytest.approx(other, rel=1e-10)
    assert [record["step"] for record in history] == [2, 4, 6]
    for a, b in zip(trained, large, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_what_looks_across_rows_sees_a_batch():
    """BatchNorm's running statistics move once a batch."""
    x, momentum = data(8), 0.1
    guide = Guide(nn.Sequential(leading(nn.BatchNorm1d(X_DIM), 1), nn.Linear(X_DIM, 2 * Z_DIM)))
    options: dict[str, Any] = {"steps": 1, "batch_size": 4, "accumulate": 2, "seed": 3}
    fit(LinearModel(), guide, x, optimizer=STAND_STILL, **options)
    wanted = torch.zeros(X_DIM)
    for part in order(8, 3, 0).split(4):
        wanted = (1 - momentum) * wanted + momentum * x[part].mean(0)
    torch.testing.assert_close(dict(guide.named_buffers())["net.0.net.running_mean"], wanted)


@pytest.mark.parametrize("ema", [0.3, 0.9])
@pytest.mark.parametrize("half_stored", [False, True], ids=["modules", "half in the store"])
def test_an_average_by_hand_over_five_steps(half_stored: bool, ema: float):
    def pair() -> tuple[Any, Any]:
        pyro.clear_param_store()
        torch.manual_seed(0)
        return (HalfStored() if half_stored else LinearModel()), Guide()

    def trained(steps: int, **options: Any) -> list[Tensor]:
        model, guide = pair()
        if steps:
            fit(model, guide, data(8), steps=steps, batch_size=4, optimizer=SGD, **options)
        stored = [t.detach().clone() for t in pyro.get_param_store().values()]
        stored = stored or [torch.zeros(X_DIM)] * half_stored  # before the first step
        return [*parameters(model, guide), *stored]

    wanted = trained(0)
    for step in range(1, 6):
        decay, here = min(ema, (1 + step) / (10 + step)), trained(step)
        wanted = [decay * a + (1 - decay) * p for a, p in zip(wanted, here, strict=True)]
    for came, by_hand in zip(trained(5, ema=ema), wanted, strict=True):
        torch.testing.assert_close(came, by_hand, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", ["kept at the end", "best"])
def test_the_average_is_what_is_judged_and_kept(case: str):
    """By the monitor, by callbacks, and afterwards; training goes on from what it was."""
    x, valid = data(8), data(5, seed=1)
    model, guide, seen = LinearModel(), Guide(batch_norm()), []
    options: dict[str, Any] = {"batch_size": 4, "optimizer": ADAM, "ema": 0.9, "epochs": 6}
    start = copy.deepcopy([model.state_dict(), guide.state_dict()])
    if case == "best":
        options["valid"] = valid
    run = fit(
        *(model, guide, x),
        callbacks=[lambda run, record: seen.append(parameters(model, guide))],
        **options,
    )
    assert same(parameters(model, guide), seen[int(run.best["epoch"]) - 1])
    losses = [record["loss"] for record in run.history]
    model.load_state_dict(start[0])
    guide.load_state_dict(start[1])
    plainly = fit(model, guide, x, **{**options, "ema": None, "valid": None})
    assert [record["loss"] for record in plainly.history] == losses
    assert not same(parameters(model, guide), seen[-1])
    if case == "best":
        torch.manual_seed(1)
        judged = elbo(8, estimator="score")
        model, guide = LinearModel(), Guide(batch_norm())
        best = seen[int(run.best["epoch"]) - 1]
        states = [model.state_dict(), guide.state_dict()]
        names = [(state, name) for state in states for name in state]
        for (state, name), value in zip(names, best, strict=True):
            state[name].copy_(value)
        guide.eval()
        torch.manual_seed(0)
        assert float(judged.rows(model, guide, valid).mean()) == pytest.approx(run.best["valid"])


def test_bf16_trains_to_the_same_optimum():
    torch.set_default_dtype(torch.float32)
    x, ends = data(200), {}
    for precision in ("full", "bf16"):
        torch.manual_seed(0)
        model, guide = LinearModel(), Guide(mlp((X_DIM, 16, 2 * Z_DIM), nn.Tanh))
        options: dict[str, Any] = {"epochs": 20, "batch_size": 20, "valid": x}
        run = fit(model, guide, x, optimizer=ADAM, precision=precision, **options)
        ends[precision] = run.best["valid"]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert ends["bf16"] == pytest.approx(ends["full"], abs=0.03)
    assert ends["bf16"] != ends["full"]


def test_what_is_judged_is_not_in_bf16():
    torch.set_default_dtype(torch.float32)
    found = []
    for precision in ("full", "bf16"):
        torch.manual_seed(0)
        pair, options = (LinearModel(), Guide()), {"valid": data(9), "optimizer": STAND_STILL}
        run = fit(*pair, data(8), epochs=1, precision=precision, **options)
        found.append(run.history[-1])
    assert found[0]["valid"] == found[1]["valid"]
    assert found[0]["loss"] != found[1]["loss"]


# ---------------------------------------------------------------------------------------------
# What is kept


def script(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Let the held-out rows say this, epoch after epoch; the first look is before the training."""
    left = iter([0.0, *values])
    monkeypatch.setattr(fit_module, "_held_out", lambda *_: next(left))


NAN = math.nan
PATIENCE = {
    "rises, then falls": ([1.0, 3.0, 2.0, 2.5, 2.9, 9.0], 3, 5, 2),
    "rises to the end": ([1.0, 2.0, 3.0], 1, 3, 3),
    "at once": ([5.0, 1.0, 6.0], 1, 2, 1),
    "no number at first": ([NAN, -5.0, -6.0, -7.0, 0.0], 2, 4, 2),
    "no number later": ([1.0, NAN, NAN, 2.0], 2, 3, 1),
}


@pytest.mark.parametrize("case", PATIENCE)
def test_patience_and_the_best_parameters(case: str, monkeypatch: pytest.MonkeyPatch):
    values, patience, last, best = PATIENCE[case]
    script(monkeypatch, values)
    model, guide, kept = LinearModel(), Guide(batch_norm()), []
    run = fit(
        *(model, guide, data(8)),
        epochs=len(values),
        batch_size=4,
        optimizer=SGD,
        valid=data(3),
        patience=patience,
        callbacks=[lambda run, record: kept.append(parameters(model, guide))],
    )
    assert len(run.history) == last
    assert run.stopped == ("patience" if last < len(values) or case == "at once" else "epochs")
    assert run.best["epoch"] == best
    assert same(parameters(model, guide), kept[best - 1])


def test_the_last_parameters_are_kept_without_held_out_rows():
    model, guide, kept = LinearModel(), Guide(), []
    run = fit(
        *(model, guide, data(8)),
        epochs=3,
        callbacks=[lambda run, record: kept.append(parameters(model, guide))],
    )
    assert same(parameters(model, guide), kept[-1])
    assert run.best == run.history[-1]


def test_the_monitor_is_not_what_is_optimised():
    """The same for every objective, the bound of all rows in evaluation mode, without any noise of
    its own from epoch to epoch."""
    found = []
    for objective in (elbo(), iwae(5), beta_vae(0.1)):
        torch.manual_seed(0)
        model, guide = LinearModel(), Guide(mlp((X_DIM, 8, 2 * Z_DIM), nn.Tanh, dropout=0.5))
        options = {"epochs": 2, "optimizer": STAND_STILL, "valid": data(9, seed=2)}
        run = fit(model, guide, data(6), objective, **options)
        found.append([record["valid"] for record in run.history])
    assert found[0] == found[1] == found[2]
    assert found[0][0] == found[0][1]
    exact = LinearModel()
    run = fit(exact, ExactGuide(exact), data(6), valid=data(9), epochs=1, optimizer=STAND_STILL)
    assert run.best["valid"] == pytest.approx(float(exact.evidence(data(9)).mean().detach()))


def test_another_monitor():
    model, guide, x = LinearModel(), Guide(), data(200)
    options = {"epochs": 1, "optimizer": STAND_STILL, "valid": x}
    tight = fit(model, guide, x, monitor=iwae(64), **options).best["valid"]
    assert tight > fit(model, guide, x, **options).best["valid"]


def test_held_out_rows_change_nothing_but_what_is_kept():
    histories = []
    for valid in (None, data(5, seed=1)):
        torch.manual_seed(0)
        model, guide = LinearModel(), Guide(batch_norm())
        run = fit(model, guide, data(8), epochs=3, batch_size=4, valid=valid)
        histories.append([record["loss"] for record in run.history])
    assert histories[0] == histories[1]


def test_held_out_rows_move_no_statistics_of_functions():
    """They are judged in evaluation mode, and training goes on as it would have without them."""
    options: dict[str, Any] = {"epochs": 3, "batch_size": 4, "optimizer": SGD}

    def pair() -> tuple[LinearModel, Guide]:
        torch.manual_seed(0)
        model = LinearModel()
        model.net = nn.Sequential(model.net, nn.Dropout(0.5))  # type: ignore[assignment]
        return model, Guide(batch_norm())

    def trained(valid: Tensor | None) -> tuple[Run, list[Tensor]]:
        pyro.clear_param_store()
        model, guide = pair()
        run = fit(*as_functions(model, guide), data(8), valid=valid, **options)
        assert all(part.training for part in [*model.modules(), *guide.modules()])
        return run, [buffer.clone() for buffer in guide.buffers()]

    (_, alone), (run, found) = trained(None), trained(data(5, seed=1) + 3)
    assert all(map(torch.equal, found, alone))
    pyro.clear_param_store()
    wanted = fit(*pair(), data(8), valid=data(5, seed=1) + 3, **options)
    assert plain(run.history) == plain(wanted.history)


def test_callbacks():
    """All of them after every epoch, also if they came as a generator; one may end the training."""
    calls: list[Any] = []

    def make() -> Iterator[Callable[[Run, dict[str, float]], None]]:
        yield lambda run, record: calls.append((run.history[-1] is record, record["epoch"]))
        yield stop

    def stop(run: Run, record: dict[str, float]) -> None:
        if record["epoch"] == 3:
            raise StopIteration

    run = fit(LinearModel(), Guide(), data(6), epochs=10, callbacks=make())
    assert calls == [(True, 1), (True, 2), (True, 3)]
    assert run.stopped == "callback"


def test_a_look_at_the_pair_does_not_disturb_the_training():
    def look(run: Run, record: dict[str, float]) -> None:
        run.evaluate(data(4), 10)

    found = []
    for callbacks in ([], [look]):
        torch.manual_seed(0)
        model, guide = LinearModel(), Guide(batch_norm())
        fit(model, guide, data(8), epochs=3, batch_size=4, callbacks=callbacks)
        found.append(parameters(model, guide))
    assert same(*found)


@pytest.mark.parametrize(
    ("length", "stopped"), [({"epochs": 2}, "epochs"), ({"steps": 3}, "steps")]
)
def test_what_a_run_says(length: dict[str, int], stopped: str):
    objective = iwae(3)
    run = fit(LinearModel(), Guide(), data(4), objective, batch_size=2, seed=5, **length)
    assert run.stopped == stopped
    assert run.history[-1]["step"] == length.get("steps", 4)
    assert run.config["seed"] == 5
    assert run.config["rows"] == 4
    assert run.config["objective"] == repr(objective)
    assert set(run.history[0]) == {"step", "epoch", "seconds", "loss", "lr"}


# ---------------------------------------------------------------------------------------------
# Programs of all kinds


def function_pair() -> tuple[Any, Any]:
    decoder = nn.Linear(Z_DIM, X_DIM)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([Z_DIM]).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        loc = x @ pyro.param("weight", torch.zeros(X_DIM, Z_DIM))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    model.decoder = decoder  # type: ignore[attr-defined]
    return model, guide


def test_functions_are_trained_in_the_global_store():
    model, guide = function_pair()
    before = model.decoder.weight.detach().clone()
    run = fit(model, guide, data(8), epochs=20, optimizer=ADAM)
    store = pyro.get_param_store()
    assert set(store.keys()) == {"decoder$$$weight", "decoder$$$bias", "scale", "weight"}
    assert float(store["scale"].detach()) < 2.0
    assert bool((store["weight"] != 0).any())
    assert not torch.equal(model.decoder.weight, before)
    again = fit(model, guide, data(8), epochs=1, optimizer=STAND_STILL)
    assert again.history[0]["loss"] < run.history[0]["loss"]


def test_methods_of_one_module():
    pair = MethodPair()
    before = parameters(pair)
    fit(pair.model, pair.guide, data(8), epochs=2, optimizer=SGD)
    assert not any(torch.equal(a, b) for a, b in zip(before, parameters(pair), strict=True))


class HalfStored(LinearModel):
    """A module that makes one of its parameters by ``pyro.param``."""

    def forward(self, x: Tensor) -> None:
        shift = pyro.param("shift", torch.zeros(X_DIM))
        super().forward(x - shift)


def test_a_module_that_uses_the_store_as_well():
    """What was trained is found again: by the next training, by an evaluation, by the user."""
    pyro.param("somebody else's", torch.tensor(7.0))
    model, guide, x = HalfStored(), Guide(), data(8) + 3
    fit(model, guide, x, epochs=100, optimizer=ADAM)
    store = pyro.get_param_store()
    assert set(store.keys()) == {"somebody else's", "shift"}
    shift = store["shift"].detach().clone()
    assert bool((shift > 0.5).all())
    fit(model, guide, x, epochs=1, optimizer=STAND_STILL)
    assert torch.equal(store["shift"], shift)
    e = evaluate(model, guide, x, 10)
    pyro.clear_param_store()
    assert e.versus(evaluate(model, guide, x, 10)).mean > 0.5


def test_pairs_do_not_share_their_parameters():
    x = data(8)

    def train(model: Any, guide: Any) -> list[Tensor]:
        fit(model, guide, x, epochs=3, optimizer=SGD)
        return parameters(model, guide)

    first, second = [(LinearModel(), PyroParamGuide()) for _ in range(2)]
    alone = train(*copy.deepcopy(second))
    trained = train(*first)
    assert same(train(*second), alone)
    assert same(parameters(*first), trained)
    assert list(pyro.get_param_store().keys()) == []


def test_the_store_of_others_is_left_alone():
    """A parameter of the same name that somebody trained by other means."""
    other = PyroParamGuide()
    other(data(3))
    names = set(pyro.get_param_store().keys())
    before, model, guide = parameters(other), LinearModel(), PyroParamGuide()
    start = parameters(guide)
    fit(model, guide, data(8), epochs=1, optimizer=STAND_STILL)
    assert same(parameters(guide), start)
    assert same(parameters(other), before)
    assert set(pyro.get_param_store().keys()) == names
    assert dict(pyro.get_param_store().named_parameters())["scale"] is other.scale_unconstrained


def test_parameters_that_do_not_exist_yet():
    """An autoguide makes its parameters, and a lazy layer its shape, in the first run."""
    model, x = LinearModel(), data(6)
    auto = AutoNormal(model)
    run = fit(model, auto, x, epochs=60, optimizer=ADAM)
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    assert len(list(auto.parameters())) == 2
    layer = nn.LazyLinear(2 * Z_DIM)
    lazy = Guide(layer)
    before = parameters(model)
    fit(model, lazy, x, epochs=1, optimizer=SGD)
    assert not same(parameters(model), before)
    assert layer.weight.shape == (2 * Z_DIM, X_DIM)


def test_a_pair_is_trained_in_training_mode():
    """Also one that comes from an evaluation: running statistics move."""
    model, guide = LinearModel(), Guide(batch_norm())
    guide.eval()
    before = [buffer.clone() for buffer in guide.buffers()]
    fit(model, guide, data(6), epochs=1)
    assert not any(map(torch.equal, before, guide.buffers()))


def test_frozen_parameters_stay():
    model, guide = LinearModel(), Guide()
    model.net.weight.requires_grad_(False)
    before = model.net.weight.clone()
    fit(model, guide, data(6), epochs=2, optimizer=partial(torch.optim.Adam, weight_decay=0.1))
    assert torch.equal(model.net.weight, before)


def test_the_random_state_is_left_as_it_was():
    model, guide = LinearModel(), Guide(mlp((X_DIM, 8, 2 * Z_DIM), nn.Tanh, dropout=0.5))
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    fit(model, guide, data(6), epochs=2, valid=data(3))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


def test_a_seed_makes_a_run():
    found: list[list[Tensor]] = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model, guide = LinearModel(), Guide()
        torch.manual_seed(len(found))
        fit(model, guide, data(8), epochs=2, batch_size=4, seed=seed)
        found.append(parameters(model, guide))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


# ---------------------------------------------------------------------------------------------
# Going on


def dropout_pair() -> tuple[Any, Any]:
    return LinearModel(), Guide(mlp((X_DIM, 8, 2 * Z_DIM), nn.Tanh, dropout=0.5))


VALID = torch.randn(4, X_DIM, dtype=torch.float64)
RESUMED: dict[str, tuple[Callable[[], tuple[Any, Any]], dict[str, Any]]] = {
    "plain": (lambda: (LinearModel(), Guide()), {"optimizer": ADAM}),
    "held-out rows": (lambda: (LinearModel(), Guide()), {"valid": VALID, "optimizer": ADAM}),
    "dropout": (dropout_pair, {"optimizer": SGD}),
    "BatchNorm": (lambda: (LinearModel(), Guide(batch_norm())), {"valid": VALID}),
    "KL warm-up": (lambda: (LinearModel(), Guide()), {"objective": beta_vae(linear(20))}),
    "scheduler": (
        lambda: (LinearModel(), Guide()),
        {
            "optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
            "scheduler": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=40),
        },
    ),
    "several schedulers": (
        lambda: (LinearModel(), Guide()),
        {
            "scheduler": lambda optimizer: lr_scheduler.SequentialLR(
                optimizer,
                [
                    lr_scheduler.LinearLR(optimizer, total_iters=3),
                    lr_scheduler.MultiStepLR(optimizer, [2, 9]),
                ],
                [3],
            ),
        },
    ),
    "PyroParam": (lambda: (LinearModel(), PyroParamGuide()), {"optimizer": ADAM}),
    "LBFGS": (
        lambda: (LinearModel(), Guide()),
        {"optimizer": partial(torch.optim.LBFGS, lr=0.1, max_iter=2)},
    ),
    "DReG in chunks": (
        lambda: (LinearModel(), Guide()),
        {"objective": iwae(4, estimator="dreg", chunk=2)},
    ),
    "half in the store": (lambda: (HalfStored(), Guide()), {"optimizer": ADAM}),
    "average": (lambda: (LinearModel(), Guide(batch_norm())), {"optimizer": ADAM, "ema": 0.9}),
    "average, held-out rows": (
        lambda: (HalfStored(), Guide()),
        {"optimizer": ADAM, "ema": 0.5, "valid": VALID},
    ),
    "accumulated": (dropout_pair, {"optimizer": ADAM, "batch_size": 1, "accumulate": 3}),
    "everything": (
        dropout_pair,
        {
            "optimizer": partial(torch.optim.AdamW, lr=0.05),
            "scheduler": partial(lr_scheduler.StepLR, step_size=4),
            "objective": beta_vae(linear(9)),
            "batch_size": 1,
            "accumulate": 3,
            "ema": 0.7,
            "clip": 1.0,
            "valid": VALID,
        },
    ),
}


def fresh(kind: str, seed: int = 0) -> tuple[Any, Any]:
    pyro.clear_param_store()
    torch.manual_seed(seed)
    return RESUMED[kind][0]()


def result(run: Run) -> tuple[list[Tensor], Any, Any]:
    stored = [t.detach().clone() for _, t in sorted(pyro.get_param_store().items())]
    everything = [*parameters(run.model, run.guide), *stored]
    return everything, plain(run.history), plain([run.best])


def assert_equal_runs(a: tuple[Any, Any, Any], b: tuple[Any, Any, Any]) -> None:
    assert same(a[0], b[0])
    assert a[1:] == b[1:]


@pytest.mark.parametrize("stop", [6, 8], ids=["after an epoch", "within an epoch"])
@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_is_one_that_never_stopped(kind: str, stop: int, tmp_path: Path):
    """Bit by bit, from a pair that starts elsewhere: three steps an epoch, of which the last is odd."""
    options: dict[str, Any] = {"data": data(8), "batch_size": 3, "seed": 3, **RESUMED[kind][1]}
    whole = result(fit(*fresh(kind), steps=14, **options))
    fit(*fresh(kind), steps=stop, out=tmp_path, **options)
    torch.manual_seed(99)
    second = fit(*fresh(kind, seed=1), steps=14, out=tmp_path, resume=True, **options)
    assert_equal_runs(result(second), whole)
    again = fit(*fresh(kind, seed=2), steps=14, out=tmp_path, resume=True, **options)
    assert_equal_runs(result(again), whole)  # there was nothing left to do


@pytest.mark.parametrize("stop", [6, 8], ids=["after an epoch", "within an epoch"])
def test_a_resumed_run_in_bf16(stop: int, tmp_path: Path):
    torch.set_default_dtype(torch.float32)
    options: dict[str, Any] = {"data": data(8), "batch_size": 3, "precision": "bf16", "ema": 0.9}
    whole = result(fit(*fresh("dropout"), steps=14, **options))
    fit(*fresh("dropout"), steps=stop, out=tmp_path, **options)
    second = fit(*fresh("dropout", seed=1), steps=14, out=tmp_path, resume=True, **options)
    assert_equal_runs(result(second), whole)


@pytest.mark.parametrize("stop", [1, 3, 4, 7, 8, 10])
def test_early_stopping_of_an_average_goes_on(stop: int, tmp_path: Path):
    """By real numbers: the same epoch is the best, and the same one the last."""
    options: dict[str, Any] = {"data": data(8), "valid": VALID, "batch_size": 3, "ema": 0.6}
    options |= {"patience": 2, "optimizer": ADAM}
    whole = fit(*fresh("plain"), epochs=200, **options)
    assert whole.stopped == "patience"
    assert whole.history[-1]["step"] > 10
    wanted = result(whole)
    fit(*fresh("plain"), steps=stop, out=tmp_path, **options)
    second = fit(*fresh("plain", seed=1), epochs=200, out=tmp_path, resume=True, **options)
    assert_equal_runs(result(second), wanted)
    assert second.stopped == "patience"


@pytest.mark.parametrize("stop", [10, 12], ids=["after an epoch", "within an epoch"])
def test_a_length_that_is_behind_already(stop: int, tmp_path: Path):
    """Nothing is left to do: the run stays what it is."""
    options: dict[str, Any] = {"data": data(20), "batch_size": 2, "out": tmp_path}
    first = result(fit(*fresh("plain"), steps=stop, **options))
    again = fit(*fresh("plain", seed=1), steps=5, resume=True, **options)
    assert_equal_runs(result(again), first)


def test_a_long_epoch_is_saved_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fit_module, "CHECK_EVERY", 4)
    monkeypatch.setattr(runs, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(runs, "SAVE_SHARE", math.inf)
    options: dict[str, Any] = {"data": data(30), "batch_size": 3, "epochs": 3, "optimizer": ADAM}
    whole = result(fit(*fresh("plain"), **options))

    class Cut(LinearModel):
        def forward(self, x: Tensor) -> None:
            super().forward(x)
            if saved_step(tmp_path) == 16 and torch.is_grad_enabled():
                raise KeyboardInterrupt

    pyro.clear_param_store()
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        fit(Cut(), Guide(), out=tmp_path, **options)
    resumed = fit(*fresh("plain", seed=1), out=tmp_path, resume=True, **options)
    assert_equal_runs(result(resumed), whole)


def saved_step(out: Path) -> int:
    there = (out / "state.safetensors").exists()
    return Folder(out).state()["step"] if there else 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("save_every", [0.0, 1e9], ids=["every epoch", "first epoch"])
def test_a_run_that_was_cut_off(
    save_every: float, error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Wherever its state was saved last."""
    monkeypatch.setattr(runs, "SAVE_EVERY", save_every)
    monkeypatch.setattr(runs, "SAVE_SHARE", math.inf)
    options: dict[str, Any] = {"data": data(8), "batch_size": 3, "epochs": 5, "optimizer": ADAM}
    whole = result(fit(*fresh("plain"), **options))

    def cut(run: Run, record: dict[str, float]) -> None:
        if record["epoch"] == 3:
            raise error("power is gone")

    with pytest.raises(error):
        fit(*fresh("plain"), out=tmp_path, callbacks=[cut], **options)
    saved = Folder(tmp_path).state()["step"]
    assert saved == (6 if save_every == 0 else 3)
    resumed = fit(*fresh("plain", seed=1), out=tmp_path, resume=True, **options)
    assert_equal_runs(result(resumed), whole)


def test_patience_goes_on_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options: dict[str, Any] = {"data": data(8), "valid": data(3), "out": tmp_path, "patience": 3}
    script(monkeypatch, [1.0, 5.0, 4.0])
    fit(*fresh("plain"), epochs=3, **options)
    script(monkeypatch, [4.0, 4.0, 9.0])
    run = fit(*fresh("plain"), epochs=9, resume=True, **options)
    assert (len(run.history), run.best["epoch"], run.stopped) == (5, 2, "patience")
    script(monkeypatch, [9.0])
    run = fit(*fresh("plain"), epochs=9, resume=True, **options)
    assert (len(run.history), run.best["epoch"], run.stopped) == (5, 2, "patience")


OTHERS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "seed": (None, {"seed": 4}, "seed 4, the run has 0"),
    "batch size": (None, {"batch_size": 5}, "batch_size 5, the run has 3"),
    "rows": (None, {"data": VALID}, "rows 4, the run has 8"),
    "optimizer": (None, {"optimizer": SGD}, "optimizer SGD, the run has Adam"),
    "scheduler": (
        None,
        {"scheduler": partial(lr_scheduler.StepLR, step_size=2)},
        "scheduler StepLR, the run has NoneType",
    ),
    "accumulate": (None, {"accumulate": 2}, "accumulate 2, the run has 1"),
    "average": (None, {"ema": 0.9}, r"ema 0\.9, the run has None"),
    "shape": (lambda: (LinearModel(3), Guide(nn.Linear(X_DIM, 6))), {}, "not of this pair"),
    "modules": (lambda: (LinearModel(), PyroParamGuide()), {}, "not of this pair"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_run_of_another_kind_is_not_resumed(case: str, tmp_path: Path):
    make, changes, message = OTHERS[case]
    options: dict[str, Any] = {"data": data(8), "batch_size": 3, "out": tmp_path, "epochs": 2}
    fit(*fresh("plain"), **options)
    pair = make() if make else fresh("plain")
    with pytest.raises(ValueError, match=message):
        fit(*pair, **{**options, **changes, "resume": True})


# ---------------------------------------------------------------------------------------------
# Speed


class Waits(TorchDispatchMode):
    """How often the host reads a number from the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


PROGRAMS: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "tensor": lambda: (LinearModel(), Guide(), data(90)),
    "batch": lambda: (LinearBatchModel(), BatchGuide(), Batch({"x": data(90)})),
    "missing": lambda: (
        *(LinearBatchModel(), BatchGuide()),
        Batch({"x": torch.where(data(90) > 1, NAN, data(90))}),
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("objective", [elbo(2), iwae(3, estimator="dreg"), beta_vae(linear(9))])
def test_a_healthy_step_waits_for_nothing(program: str, objective: Objective):
    counts = []
    for batch_size in (9, 3):  # 10 and 30 steps an epoch
        with Waits() as waits:
            options = {"epochs": 1, "optimizer": SGD, "clip": 1.0}
            fit(*PROGRAMS[program](), objective, batch_size=batch_size, **options)
        counts.append(waits.count)
    assert counts[0] == counts[1]


# ---------------------------------------------------------------------------------------------
# Arguments


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no length": ({}, "epochs=None and steps=None"),
    "two lengths": ({"epochs": 1, "steps": 1}, "wanted one of them"),
    "epochs": ({"epochs": 0}, "epochs=0"),
    "half an epoch": ({"epochs": 0.5}, "epochs=0.5"),
    "steps": ({"steps": -3}, "steps=-3"),
    "batch size": ({"epochs": 1, "batch_size": 0}, "batch_size=0"),
    "no rows": ({"epochs": 1, "data": data(6)[:0]}, "data came without rows"),
    "array": ({"epochs": 1, "data": np.zeros((3, 3))}, "data came as ndarray"),
    "list": ({"epochs": 1, "data": [data(6)]}, "data came as list"),
    "valid without rows": ({"epochs": 1, "valid": data(6)[:0]}, "valid came without rows"),
    "valid array": ({"epochs": 1, "valid": np.zeros((3, 3))}, "valid came as ndarray"),
    "clip": ({"epochs": 1, "clip": 0.0}, "clip=0.0"),
    "clip not a number": ({"epochs": 1, "clip": NAN}, "clip=nan"),
    "accumulate": ({"epochs": 1, "accumulate": 0}, "accumulate=0, wanted a whole number >= 1"),
    "accumulate half": ({"epochs": 1, "accumulate": 0.5}, "accumulate=0.5"),
    "accumulate nothing": ({"epochs": 1, "accumulate": None}, "accumulate=None"),
    "ema of nothing": ({"epochs": 1, "ema": 0.0}, "ema=0.0, wanted a number > 0 and < 1"),
    "ema of the start": ({"epochs": 1, "ema": 1.0}, "ema=1.0"),
    "ema not a number": ({"epochs": 1, "ema": NAN}, "ema=nan"),
    "ema in words": ({"epochs": 1, "ema": "0.9"}, "ema='0.9'"),
    "precision": ({"epochs": 1, "precision": "fp16"}, "precision: came 'fp16'"),
    "bf16 of float64": (
        {"epochs": 1, "precision": "bf16"},
        "bf16' for parameters in torch.float64",
    ),
    "patience half": ({"epochs": 1, "patience": 1.5, "valid": data(3)}, "patience=1.5"),
    "patience alone": ({"epochs": 1, "patience": 1}, "patience without valid"),
    "no patience": ({"epochs": 1, "patience": 0, "valid": data(3)}, "patience=0"),
    "resume": ({"epochs": 1, "resume": True}, "resume=True without out"),
    "device": ({"epochs": 1, "device": "abacus"}, "device: came 'abacus'"),
    "level": ({"epochs": 1, "compile": "turbo"}, "compile: came 'turbo'"),
    "objective by name": ({"epochs": 1, "objective": "elbo"}, "objective came as str"),
    "recipe not called": ({"epochs": 1, "objective": iwae}, "objective came as function"),
    "Pyro's loss": ({"epochs": 1, "objective": Trace_ELBO()}, "objective came as Trace_ELBO"),
    "monitor": ({"epochs": 1, "valid": data(3), "monitor": "elbo"}, "monitor came as str"),
    "Pyro's optimizer": (
        {"epochs": 1, "optimizer": PyroOptim(torch.optim.Adam, {"lr": 0.1})},
        "optimizer: came .*, wanted a function",
    ),
    "ready optimizer": (
        {"epochs": 1, "optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))])},
        "optimizer: came SGD, wanted a function",
    ),
    "ready scheduler": (
        {
            "epochs": 1,
            "scheduler": lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.ones(1))]), 3),
        },
        "scheduler: came StepLR, wanted a function",
    ),
    "scheduler by metric": (
        {"epochs": 1, "scheduler": lr_scheduler.ReduceLROnPlateau},
        "ReduceLROnPlateau waits for a metric",
    ),
    "callback": ({"epochs": 1, "callbacks": ["print"]}, "callbacks: wanted a list"),
    "single callback": ({"epochs": 1, "callbacks": print}, "callbacks: wanted a list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str):
    options, message = BAD[case]
    model, guide = LinearModel(), Guide()
    before = parameters(model, guide)
    with pytest.raises(ValueError, match=message):
        fit(model, guide, **{"data": data(6), **options})
    assert same(parameters(model, guide), before)


def test_a_pair_without_parameters():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([X_DIM]).to_event(1), obs=x)

    with pytest.raises(ValueError, match="no parameters"):
        fit(model, lambda x: None, data(6), epochs=1)


def test_a_pair_that_the_monitor_refuses_is_refused_at_once():
    class NoPlate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(X_DIM))

        def forward(self, x: Tensor) -> None:
            pyro.sample("x", dist.Normal(self.loc, 1.0).expand(x.shape).to_event(2), obs=x)

    calls: list[Any] = []
    options: dict[str, Any] = {"epochs": 1, "callbacks": [lambda *args: calls.append(args)]}
    fit(NoPlate(), lambda x: None, data(6), **options)
    with pytest.raises(ValueError, match="plate over rows"):
        fit(NoPlate(), lambda x: None, data(6), valid=data(3), **options)
    assert len(calls) == 1


def test_a_network_that_is_not_registered_is_refused():
    """It would get a gradient and never a step."""

    class Hidden(LinearModel):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(X_DIM, X_DIM)]

        def forward(self, x: Tensor) -> None:
            super().forward(self.layers[0](x))

    with pytest.raises(ValueError, match=r"a tensor \[3, 3\] wants a gradient .* nn\.ModuleList"):
        fit(Hidden(), Guide(), data(10), steps=1)


def test_a_name_that_another_module_has_is_refused():
    fit(*function_pair(), data(8), steps=1)
    with pytest.raises(ValueError, match=r"pyro\.module\('decoder', .*clear_param_store"):
        fit(*function_pair(), data(8), steps=1)
    pyro.clear_param_store()
    fit(*function_pair(), data(8), steps=1)


def test_row_weights_count_alike_in_loss_and_valid():
    model, x, weights = LinearBatchModel(), data(5), torch.tensor([0.0, 1.0, 2.0, 1.5, 0.5])
    batch = Batch({"x": x}, weights=weights)
    run = fit(model, ExactGuide(model), batch, epochs=1, optimizer=STAND_STILL, valid=batch)
    assert run.history[0]["valid"] == pytest.approx(-run.history[0]["loss"])
