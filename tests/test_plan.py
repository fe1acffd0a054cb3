"""The first look at a pair: structure read off, misfits named."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.objectives import elbo, iwae
from pyro_vae.objectives.plan import make_plan
from tests.small_pairs import (
    Guide,
    LinearModel,
    Program,
    batch_norm,
    data,
    plan_of,
    standard,
    table,
)


@pytest.mark.parametrize("number", [1, 3])
def test_plates_over_rows_fold_into_one_and_back(number: int):
    """Two nested plates around everything are one batch of rows, in one order."""

    def program(observed: bool) -> None:
        with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 5, dim=-1):
            z = pyro.sample("z", standard(3))
            if observed:
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(4, 5, 3))

    plan = plan_of(lambda: program(True), lambda: program(False))
    assert plan.rows == (-2, -1)
    sample = torch.randn(*([number] if number > 1 else []), 4, 5, 3)
    folded = plan.canonical(sample, 1, number, True)
    assert folded.shape == (number, 20, 3)
    factor = torch.arange(number * 20.0).reshape(number, 20)
    torch.testing.assert_close(
        plan.canonical(plan.spread(factor, sample.shape, 1) * sample, 1, number, True),
        factor[..., None] * folded,
    )


# ---------------------------------------------------------------------------------------------
# The plan


def inner_plate(observed: bool, subsample: int | None = None) -> None:
    """Rows at dim -2, features at dim -1."""
    with pyro.plate("data", 4, dim=-2):
        z = pyro.sample("z", standard())
        with pyro.plate("features", 6, subsample_size=subsample, dim=-1):
            if observed:
                shape = (4, subsample or 6)
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(shape))


@pytest.mark.parametrize("subsample", [None, 2])
def test_rows_at_an_outer_dim(subsample: int | None):
    model, guide = lambda: inner_plate(True, subsample), lambda: inner_plate(False, subsample)
    plan = plan_of(model, guide)
    assert (plan.rows, plan.nesting, plan.outside) == ((-2,), 2, frozenset())
    assert plan.subsampled == (("features",) if subsample else ())
    particles = table(model, guide)
    assert particles.likelihood["x"].shape == (3, 4, subsample or 6)
    total = particles.summed(particles.likelihood)
    assert total is not None
    assert total.shape == (3, 4)
    if subsample:  # the inner plate's 6 / 2 belongs to the row
        log_x = dist.Normal(particles.samples["z"], 1.0).log_prob(torch.ones(()))
        torch.testing.assert_close(total, 3 * 2 * log_x)
        with pytest.raises(ValueError, match=r"'features'.*elbo"):
            iwae(3).loss(model, guide)


@pytest.mark.parametrize("names", [("data", "data"), ("rows", "data")])
def test_rows_are_one_plate_and_not_two_of_a_size(names: tuple[str, str]):
    def model() -> None:
        plates = {name: pyro.plate(name, 4) for name in set(names)}
        with plates[names[0]]:
            z = pyro.sample("z", standard())
        with plates[names[1]]:
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(4))

    def guide() -> None:
        with pyro.plate(names[0], 4):
            pyro.sample("z", standard())

    assert plan_of(model, guide).outside == ({"z"} if names[0] != names[1] else frozenset())


def test_the_plan_leaves_random_state_and_buffers():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = LinearModel()

        def forward(self, x: Tensor) -> None:
            random.random()
            np.random.rand()
            self.inner(x)

    model, guide, x = Model(), Guide(batch_norm()), data()
    buffers = [buffer.clone() for buffer in guide.buffers()]

    def state() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    pyro.set_rng_seed(4)
    wanted = state()
    pyro.set_rng_seed(4)
    plan_of(model, guide, x)
    assert state() == wanted
    for buffer, before in zip(guide.buffers(), buffers, strict=True):
        torch.testing.assert_close(buffer, before)


def test_the_plan_lists_what_has_no_rsample():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.5 * torch.ones(())))
            z = pyro.sample("z", standard())
            pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(torch.sigmoid(x)))
            pyro.sample("z", standard())

    assert plan_of(model, guide, torch.ones(4)).unreparameterized == ("y",)


# ---------------------------------------------------------------------------------------------
# Pairs that do not fit


def pair_of(
    model_site: Callable[[Tensor], Any],
    guide_site: Callable[[Tensor], Any],
    name: str = "z",
    observe: bool = True,
) -> tuple[Program, Program]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", model_site(x))
            loc = z.reshape(*z.shape[: z.dim() - len(model_site(x).event_shape)], -1).sum(-1)
            pyro.sample(
                "x", dist.Normal(0 * loc if z.dim() > 1 else z, 1.0), obs=x if observe else None
            )

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample(name, guide_site(x))

    return model, guide


def broadcasting(x: Tensor) -> Any:
    return dist.Normal(x[:, None], 1.0)


MISFITS: dict[str, tuple[tuple[Program, Program], str]] = {
    "unknown site": (
        pair_of(lambda x: standard(), lambda x: standard(), name="latent"),
        r"site 'latent': the guide draws it.*\['z', 'x'\].*is_auxiliary",
    ),
    "event shape": (
        pair_of(lambda x: standard(2), lambda x: standard(3)),
        r"site 'z': event shape \[3\] in the guide, \[2\] in the model",
    ),
    "support": (
        pair_of(lambda x: dist.Exponential(torch.ones(())), lambda x: dist.Normal(-9.0, 0.1)),
        "site 'z': the guide's Normal.*outside the support of the model's Exponential",
    ),
    "observes nothing": (
        pair_of(lambda x: standard(), lambda x: standard(), observe=False),
        r"observes nothing.*\['z', 'x'\].*no obs=",
    ),
    "(B, B) in the guide": (
        pair_of(lambda x: standard(), broadcasting),
        r"site 'z': batch shape \[4, 4\] in the guide.*dim -2.*to_event",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_one_clear_error(case: str):
    (model, guide), message = MISFITS[case]
    for objective in (elbo(), iwae(3)):
        with pytest.raises(ValueError, match=message):
            objective.loss(model, guide, torch.ones(4))


def test_a_broadcast_in_the_likelihood():
    """Data [B] against a location [B, 1]: numbers that look right and mean nothing."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard(1))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", standard(1))

    with pytest.raises(ValueError, match=r"site 'x': batch shape \[4, 4\] in the model"):
        elbo().loss(model, guide, torch.ones(4))


def test_a_site_that_the_model_observes_and_the_guide_draws():
    model, _ = pair_of(lambda x: standard(), lambda x: standard())

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", standard())
            pyro.sample("x", standard())

    with pytest.raises(ValueError, match="site 'x': the model observes it and the guide draws it"):
        elbo().loss(model, guide, torch.ones(4))


def test_data_that_no_site_takes():
    def program(batch: Batch) -> None:
        with pyro.plate("data", batch.size):
            pyro.sample("z", standard())

    batch = Batch({"image": torch.ones(4)})
    with pytest.raises(ValueError, match=r"observes nothing.*\['z'\].*holds \['image'\]"):
        elbo().loss(program, program, batch)


def test_auxiliary_sites_of_the_guide_pass():
    model, _ = pair_of(lambda x: standard(), lambda x: standard())

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", standard(), infer={"is_auxiliary": True})
            pyro.sample(
                "z", dist.Delta(2 * u, log_density=-torch.tensor(2.0).log().expand(u.shape))
            )

    particles = table(model, guide, torch.ones(4))
    total = particles.summed(particles.posterior)
    wanted = dist.Normal(0.0, 2.0).log_prob(particles.samples["z"])
    torch.testing.assert_close(total, wanted)


def test_straight_through_draws_are_refused():
    def model(x: Tensor) -> None:
        with pyro.plate("data", 4, dim=-1):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(y[..., 0], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 4, dim=-1):
            pyro.sample("y", dist.OneHotCategoricalStraightThrough(torch.ones(4, 3)))

    with pytest.raises(ValueError, match="site 'y': the gradient of a straight-through draw"):
        plan_of(model, guide, torch.zeros(4))


def test_the_models_own_obs_with_missing_entries_is_refused():
    batch = Batch({"x": data(6)}).hide("x", torch.eye(6, 3) > 0)

    def model(batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", standard(2))
            pyro.sample(
                "x", dist.Normal(z.sum(-1, True), torch.ones(3)).to_event(1), obs=batch["x"]
            )

    def guide(batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", standard(2))

    with pytest.raises(
        ValueError, match="site 'x': it has missing entries and the model gives obs="
    ):
        plan_of(model, guide, batch)


def test_a_forgotten_to_event_is_named_with_its_cure():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(torch.zeros(len(x), 3), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"site 'x': its distribution has 3 .* by \.to_event\(\)"):
        plan_of(model, lambda x: None, data(6))


class _Embedded(nn.Module):
    """y ~ Cat, z ~ N(0, 1), x ~ N(w_y + z, 1), y missing and not in the guide."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(len(weights)))
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.weights[y] + z, 1.0))


def _standard(batch: Batch) -> None:
    with pyro.plate("data", batch.size, dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(batch.size), 1.0))


@pytest.mark.parametrize("weights", [[0.0, 5.0, 0.0], [0.0, 0.0, 0.0]], ids=["ends alike", "zero"])
@pytest.mark.parametrize("seed", range(6))
def test_dependence_is_found_whatever_was_drawn_and_whatever_the_weights(weights, seed):
    torch.manual_seed(seed)
    model = _Embedded(weights)
    before = [p.detach().clone() for p in model.parameters()]
    plan = make_plan(model, _standard, (Batch({"x": torch.zeros(3)}),), {})
    assert plan.drawn_parents == ("y",)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
