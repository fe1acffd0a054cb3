"""Running a program and looking at its sites."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae.batch import Batch, Observed
from pyro_vae.objectives.tracing import Replay, core, elementwise, trace, unwrap


def program(batch):
    with pyro.plate("data", batch.size, dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, torch.ones(3)).to_event(1))
        pyro.deterministic("twice", 2 * z, event_dim=1)
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0))


@pytest.mark.parametrize("particles", [1, 4])
def test_trace_draws_for_each_particle(particles: int):
    sites, subsamples = trace(program, (Batch(size=5),), {}, [], particles, nesting=1)
    lead = [4] if particles > 1 else []
    assert list(sites) == ["z", "x"]  # neither plates nor deterministic values
    assert list(sites["z"]["value"].shape) == [*lead, 5, 3]
    assert list(subsamples) == ["data"]
    assert len(sites["x"]["value"].unique()) == 5 * particles


def test_replay_gives_the_values_of_another_run():
    args = (Batch(size=5),)
    first, _ = trace(program, args, {}, [])
    z = first["z"]["value"]
    again, _ = trace(program, args, {}, [Replay({"z": z})])
    assert again["z"]["value"] is z
    assert not torch.equal(again["x"]["value"], first["x"]["value"])


@pytest.mark.parametrize(
    ("fn", "dims"),
    [
        (dist.Normal(torch.zeros(2, 3), 1.0), 0),
        (dist.Normal(torch.zeros(2, 3), 1.0).to_event(1), 1),
        (dist.Normal(torch.zeros(2, 3, 4), 1.0).to_event(1).to_event(1), 2),
        (dist.Normal(torch.zeros(2, 3), 1.0).mask(torch.tensor([[True], [False]])).to_event(1), 1),
        (dist.Normal(torch.zeros(2, 3), 1.0).to_event(1).mask(torch.tensor([True, False])), 1),
        (dist.MultivariateNormal(torch.zeros(2, 3), torch.eye(3)), 0),
        (dist.MultivariateNormal(torch.zeros(2, 4, 3), torch.eye(3)).to_event(1), 1),
    ],
)
def test_elementwise_sums_to_the_log_density(fn, dims: int):
    value = fn.sample()
    log_prob, event_dim = elementwise(fn, value)
    assert event_dim == dims
    total = log_prob.sum(tuple(range(-dims, 0))) if dims else log_prob
    torch.testing.assert_close(total, fn.log_prob(value))


def test_elementwise_without_masks():
    base = dist.Normal(torch.zeros(2, 3), 1.0)
    value = base.sample()
    masked = base.mask(torch.tensor([[True], [False]])).to_event(1)
    torch.testing.assert_close(elementwise(masked, value, masked=False)[0], base.log_prob(value))


def test_core_is_the_innermost_distribution():
    fn = dist.Gamma(torch.ones(2, 3), 1.0).mask(False).to_event(1).expand_by([4])
    assert isinstance(core(fn), dist.Gamma)


def test_unwrap_takes_observed_off_where_a_batch_comes():
    model, batch = Observed(program), Batch(size=3)
    assert unwrap(model, (batch,)) == (program, batch)
    assert unwrap(model, (torch.zeros(3),)) == (model, None)
    assert unwrap(program, ()) == (program, None)


@pytest.mark.parametrize(
    ("scale", "words"),
    [(torch.nan, "it has NaN"), (-1.0, r"wanted GreaterThan\(lower_bound=0.0\): softplus")],
    ids=["nan", "negative"],
)
def test_parameter_that_a_distribution_does_not_take_is_one_line(scale, words):
    def program() -> None:
        pyro.sample(
            "z", dist.Normal(torch.zeros(100, 20), torch.full((100, 20), scale)).to_event(2)
        )

    with pytest.raises(
        ValueError, match=rf"^a Normal of the program came with scale .*{words}"
    ) as e:
        trace(program, (), {}, [])
    assert "\n" not in str(e.value)
