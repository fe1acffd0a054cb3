"""Schedules: functions of a step tensor that stay tensors."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.compiled import make_step
from pyro_vae.objectives import beta_vae, elbo, linear, schedules
from pyro_vae.objectives.schedules import (
    SCHEDULES,
    cosine,
    cyclical,
    exponential,
    parse,
    piecewise,
)
from tests.small_pairs import Guide, LinearModel, data


def test_linear():
    schedule = linear(4, 0.5, 2.5)
    assert [float(schedule(torch.tensor(step))) for step in (0, 1, 4, 9)] == [0.5, 1.0, 2.5, 2.5]
    assert float(linear(10)(torch.tensor(5))) == 0.5


def test_a_schedule_says_what_it_is():
    assert "linear(4, 0.5, 2.5)" in repr(beta_vae(linear(4, 0.5, 2.5)))


EXPECTED = {
    "linear(4, 0.5, 2.5)": {0: 0.5, 1: 1.0, 4: 2.5, 5: 2.5, 10**9: 2.5},
    "cosine(6, 3, 1)": {0: 3.0, 2: 2.5, 3: 2.0, 4: 1.5, 6: 1.0, 10**9: 1.0},
    # the second cycle begins at step 4, and each rises for 2 steps
    "cyclical(8, 2, 0.5, 0, 1)": {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.0, 4: 0.0, 5: 0.5, 7: 1.0, 8: 1.0}
    | {9: 1.0, 10**9: 1.0},
    "cyclical(10, 4, 1, 2, 4)": {0: 2.0, 1: 2.8, 2: 3.6, 3: 2.4, 5: 2.0, 10: 4.0, 11: 4.0},
    "exponential(0.5, 0.2, 2, 3)": {0: 2.0, 2: 2.0, 3: 2 * math.exp(-1.5), 5: 2 * math.exp(-1.5)}
    | {6: 0.2, 10**9: 0.2},
    "piecewise((2, 1), (4, 3), (8, 0))": {0: 1.0, 2: 1.0, 3: 2.0, 4: 3.0, 6: 1.5, 8: 0.0, 9: 0.0},
    "piecewise((5, 0.7))": {0: 0.7, 5: 0.7, 9: 0.7},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", EXPECTED)
def test_values(name: str, dtype: torch.dtype):
    """At the start, inside, at the end and far beyond; ``parse`` reads what a schedule says of
    itself."""
    schedule = parse(name)
    assert schedule is not None
    assert schedule.__qualname__ == name
    kept = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        for step, wanted in EXPECTED[name].items():
            came = schedule(torch.tensor(step))
            assert came.dtype == dtype
            assert came.shape == ()
            assert float(came) == pytest.approx(wanted, rel=8 * torch.finfo(dtype).eps)
    finally:
        torch.set_default_dtype(kept)


def test_every_schedule_has_a_name_and_expected_values():
    assert {name.split("(")[0] for name in EXPECTED} == set(SCHEDULES)
    assert all(make.__name__ == name for name, make in SCHEDULES.items())


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        (linear(10), "linear(10, 0, 1)"),
        (linear(1234567, start=1e-9), "linear(1234567, 1e-09, 1)"),
        (cosine(steps=1000), "cosine(1000, 0, 1)"),
        (cyclical(1000), "cyclical(1000, 4, 0.5, 0, 1)"),
        (exponential(3e-5, 0.5), "exponential(3e-05, 0.5, 1, 1)"),
        (piecewise((10, 0), (20, 1.0)), "piecewise((10, 0), (20, 1))"),
    ],
    ids=lambda part: getattr(part, "__qualname__", ""),
)
def test_names(schedule: schedules.Schedule, name: str):
    assert schedule.__qualname__ == name
    same, step = parse(name), torch.tensor(7)
    assert same is not None
    assert torch.equal(same(step), schedule(step))


def test_parse_takes_names_of_arguments():
    schedule = parse(" cyclical(8, cycles=2)")
    assert schedule is not None
    assert schedule.__qualname__ == "cyclical(8, 2, 0.5, 0, 1)"


@pytest.mark.parametrize("text", ["0.5", "dreg", "(1, 2)", "{'z': 2}", "-inf", "a b", ""])
def test_parse_leaves_what_is_no_call(text: str):
    assert parse(text) is None


REFUSED = {
    "steep(3)": r"'steep\(3\)'.*'linear'",
    "os.getcwd()": "wanted one of",
    "linear()": r"'linear\(\)', wanted linear\(steps, start, end\)",
    "linear(a)": r"'linear\(a\)', wanted linear",
    "linear('a')": "wanted linear",
    "linear(1, 2, 3, 4)": "wanted linear",
    "linear(1, ende=3)": "wanted linear",
    "linear(*[1, 2])": "wanted linear",
    "piecewise(3)": r"wanted piecewise\(points\)",
    "linear(0)": "linear: came steps=0, wanted a positive number",
    "linear(-3)": "linear: came steps=-3",
    "cosine(0)": "cosine: came steps=0",
    "cyclical(0)": "cyclical: came steps=0",
    "cyclical(9, 0)": "cyclical: came cycles=0",
    "cyclical(9, 2, 0)": r"cyclical: came ratio=0, wanted a number in \(0, 1\]",
    "cyclical(9, 2, 1.5)": "cyclical: came ratio=1.5",
    "exponential(0, 1)": "exponential: came rate=0",
    "exponential(1, 1, 1, 0)": "exponential: came every=0",
    "piecewise()": r"piecewise: came \(\)",
    "piecewise((3, 1), (3, 2))": r"piecewise: came \(\(3, 1\), \(3, 2\)\), wanted .* rising steps",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused(text: str):
    with pytest.raises(ValueError, match=REFUSED[text]):
        parse(text)


def test_a_graph_reads_the_step():
    """All schedules in one graph, each with a weight of its own."""
    every = [parse(name) for name in EXPECTED]

    def beta(step: torch.Tensor) -> torch.Tensor:
        values = [schedule(step) for schedule in every if schedule is not None]
        return torch.stack([0.1 * (i + 1) * value for i, value in enumerate(values)]).sum()

    x = data()
    losses: dict[str, list[float]] = {"eager": [], "traced": [], "by hand": []}
    for level in ("eager", "traced"):
        torch.manual_seed(0)
        loss = beta_vae(beta)(LinearModel(), Guide())
        parameters = list(loss.parameters())
        step = make_step(loss, parameters, torch.optim.SGD(parameters, lr=0.0), level=level)
        for _ in range(11):
            torch.manual_seed(3)
            losses[level].append(float(step(x)))
    torch.manual_seed(0)
    pair = LinearModel(), Guide()
    for i in range(11):
        torch.manual_seed(3)
        weights = [0.1 * (place + 1) for place in range(len(every))]
        number = sum(w * at(name, i) for w, name in zip(weights, EXPECTED, strict=True))
        losses["by hand"].append(beta_vae(number).loss(*pair, x) / len(x))
    assert losses["eager"] == pytest.approx(losses["by hand"])
    assert losses["traced"] == pytest.approx(losses["by hand"])
    assert len(set(losses["eager"])) == 11


def at(name: str, step: int) -> float:
    schedule = parse(name)
    assert schedule is not None
    return float(schedule(torch.tensor(step)))


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
