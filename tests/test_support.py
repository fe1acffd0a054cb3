"""Data outside the support of their likelihood are refused, whichever row they are in."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule

from pyro_vae.batch import Batch
from pyro_vae.evaluation.likelihood import evaluate
from pyro_vae.objectives.plan import make_plan
from pyro_vae.objectives.support import check_data
from pyro_vae.training.fit import fit


class Model(PyroModule):
    def __init__(self, likelihood):
        super().__init__()
        self.net = torch.nn.Linear(2, 6)
        self.likelihood = likelihood

    def forward(self, batch):
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", self.likelihood(self.net(z), batch).to_event(1))


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(6, 2)

    def forward(self, batch):
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", dist.Normal(self.net(batch["x"]), 1.0).to_event(1))


def bernoulli(logits, batch):
    return dist.Bernoulli(logits=logits)


def unchecked(logits, batch):
    return dist.Bernoulli(logits=logits, validate_args=False)


def binomial(logits, batch):
    return dist.Binomial(3, logits=logits)


def of_the_row(logits, batch):
    return dist.Binomial(batch["n"][:, None], logits=logits)


def rows(bad):
    x = torch.randint(2, (60, 6)).to(torch.get_default_dtype())
    x[55] = bad
    return Batch({"x": x})


@pytest.mark.parametrize("likelihood", [bernoulli, unchecked])
@pytest.mark.parametrize("use", [fit, evaluate])
def test_late_rows_outside_the_support_are_refused(likelihood, use):
    options = {"steps": 1, "batch_size": 20} if use is fit else {"num_particles": 5}
    with pytest.raises(
        ValueError, match=r"site 'x': data outside .* Bernoulli: 6 of 360 .*0.5; bin"
    ):
        use(Model(likelihood), Guide(), rows(0.5), **options)


def test_held_out_rows_are_looked_at_too():
    with pytest.raises(ValueError, match="site 'x': data outside the support of the Binomial"):
        fit(Model(binomial), Guide(), rows(3.0), steps=1, valid=rows(4.0))


def test_missing_entries_are_not_data():
    batch = rows(0.5).hide("x", rows(0.5)["x"] == 0.5)
    fit(Model(bernoulli), Guide(), batch, steps=1)


def test_a_support_that_differs_between_rows_is_left_to_each_row():
    n = torch.arange(1, 61)
    batch = Batch({"x": torch.ones(60, 6), "n": n})
    plan = make_plan(Model(of_the_row), Guide(), (batch,), {})
    assert "x" not in plan.supports
    check_data(plan.supports, batch)


def test_one_total_count_is_known_for_all_rows():
    plan = make_plan(Model(binomial), Guide(), (rows(1.0).rows(slice(0, 5)),), {})
    check_data(plan.supports, rows(3.0))
    with pytest.raises(ValueError, match="such as 7; use whole numbers from 0 to total_count"):
        check_data(plan.supports, rows(7.0))
