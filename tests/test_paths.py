"""Traversals and interpolations against closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.evaluation.paths import interpolate, traverse
from tests.exact_pairs import (
    BatchGuide,
    ExactGuide,
    ExactLadderGuide,
    LinearBatchModel,
    LinearLadder,
)
from tests.small_pairs import PAIRS, X_DIM, Z_DIM, data

ROWS = 5
VALUES = [-2.0, 0.0, 1.5]


def pair() -> tuple[LinearBatchModel, ExactGuide, Batch]:
    model = LinearBatchModel()
    return model, ExactGuide(model), Batch({"x": data(ROWS)})


@pytest.mark.parametrize(("batch_size", "dims"), [(250, None), (2, [1, 0]), (1, 1)])
def test_one_dimension_moves_and_the_others_stay(batch_size: int, dims: Any):
    model, guide, batch = pair()
    path = traverse(model, guide, batch, dims, VALUES, batch_size=batch_size)
    z = guide.posterior(batch["x"]).mean.detach()
    chosen = [0, 1] if dims is None else np.atleast_1d(dims).tolist()
    assert list(path) == ["x"]
    assert path["x"].shape == (ROWS, len(chosen), len(VALUES), X_DIM)
    for i, dim in enumerate(chosen):
        for j, value in enumerate(VALUES):
            moved = z.clone()
            moved[:, dim] = value
            torch.testing.assert_close(path["x"][:, i, j], model.net(moved).detach())
    assert traverse(model, guide, batch)["x"].shape == (ROWS, Z_DIM, 7, X_DIM)


def test_what_depends_on_the_traversed_latent_moves_along():
    model, x = LinearLadder(), data(ROWS)
    guide = ExactLadderGuide(model)
    path = traverse(model, guide, x, values=VALUES, latent="z2", num_draws=200)["x"][:, 0]
    w, a = model.net.weight.detach(), model.down.weight.detach()
    steps = torch.tensor(VALUES).diff()
    # z1 keeps its distance from A z2
    torch.testing.assert_close(
        path.diff(dim=1), (steps[:, None] * (w @ a)[:, 0]).expand(ROWS, -1, -1)
    )
    cov = torch.linalg.inv(torch.linalg.inv(model.prior_cov()) + w.T @ w / model.noise**2).detach()
    z1 = (x - model.net.bias.detach()) @ w @ cov / model.noise**2
    z2 = z1 @ a / (1 + a.T @ a)
    start = model.net(z1 + (0.0 - z2) @ a.T).detach()
    spread = (1 / (1 + a.T @ a)) * (a.T @ cov @ a).sqrt() / 200**0.5  # of E[z2] from draws
    error = spread * (w @ a)[:, 0].abs()
    assert bool(((path[:, 1] - start).abs() < 4 * error).all())

    lower = traverse(model, guide, x, dims=0, values=VALUES, latent="z1", num_draws=4)["x"][:, 0]
    moved = torch.stack([z1, z1, z1], 1)
    moved[:, :, 0] = torch.tensor(VALUES)
    torch.testing.assert_close(lower, model.net(moved).detach())


class Mixed(nn.Module):
    """y a label, z a vector, n a count; x ~ N(loc_y + c + z . (1, 2) + n, 1)."""

    def forward(self, batch: Any) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            y = pyro.sample("y", dist.Categorical(torch.ones(3)))
            n = pyro.sample("n", dist.Poisson(2.0))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = torch.tensor([0.0, 100.0, 200.0])[y] + batch["c"] + z @ torch.tensor([1.0, 2.0])
            pyro.sample("x", dist.Normal(loc + 1000 * n, 1.0))


class MixedGuide(nn.Module):
    def forward(self, batch: Any) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            high = (batch["x"] > 0).long()
            pyro.sample(
                "y", dist.Categorical(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])[high])
            )
            pyro.sample("n", dist.Poisson(1.1 + 2 * high))
            z = torch.stack([batch["x"], 1 - batch["x"]], -1)
            pyro.sample("z", dist.Normal(z, 0.1).to_event(1))


def test_whole_numbers_stay_at_the_most_probable_and_change_in_the_middle():
    batch = Batch({"x": torch.tensor([-1.0, 1.0]), "c": torch.tensor([0.25, 0.5])})
    first, second = batch.rows([0]), batch.rows([1])
    path = interpolate(Mixed(), MixedGuide(), first, second, steps=5)["x"][0]
    low, high = 1000 + 0.25, 3000 + 200 + 0.5
    z = torch.linspace(0, 1, 5)[:, None] * torch.tensor([2.0, -2.0]) + torch.tensor([-1.0, 2.0])
    wanted = torch.tensor([low, low, high, high, high]) + z @ torch.tensor([1.0, 2.0])
    torch.testing.assert_close(path, wanted)
    over_y = traverse(Mixed(), MixedGuide(), first, values=[0, 1, 2], latent="y")["x"]
    assert over_y.shape == (1, 1, 3)
    torch.testing.assert_close(over_y[0, 0], low + 3.0 + torch.tensor([0.0, 100.0, 200.0]))


def test_one_hot_latents_stay_one_hot():
    seen: list[Tensor] = []

    class Clusters(nn.Module):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3)))
                seen.append(y)
                pyro.sample("x", dist.Normal(y @ torch.tensor([1.0, 2.0, 3.0]), 1.0))

    class ClustersGuide(nn.Module):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                logits = torch.stack([-batch["x"], 0 * batch["x"], batch["x"]], -1)
                pyro.sample("y", dist.OneHotCategorical(logits=logits))

    batch = Batch({"x": torch.tensor([-2.0, 2.0])})
    path = interpolate(Clusters(), ClustersGuide(), batch.rows([0]), batch.rows([1]), steps=4)
    assert path["x"].tolist() == [[1.0, 1.0, 3.0, 3.0]]
    assert all(value in (0.0, 1.0) for value in torch.cat(seen).flatten().tolist())


@pytest.mark.parametrize("path", ["linear", "spherical"])
def test_paths_lead_from_one_row_to_the_other(path: str):
    model, guide, batch = pair()
    other = batch.rows([1, 2, 3, 4, 0])
    out = interpolate(model, guide, batch, other, steps=4, path=path, batch_size=2)["x"]
    assert out.shape == (ROWS, 4, X_DIM)
    z, end = (guide.posterior(rows["x"]).mean.detach() for rows in (batch, other))
    torch.testing.assert_close(out[:, 0], model.net(z).detach())
    torch.testing.assert_close(out[:, -1], model.net(end).detach())
    third = (2 * z + end) / 3
    if path == "spherical":
        angle = nn.functional.cosine_similarity(z, end).acos()[:, None]
        third = ((2 * angle / 3).sin() * z + (angle / 3).sin() * end) / angle.sin()
    torch.testing.assert_close(out[:, 1], model.net(third).detach())


def test_a_spherical_path_keeps_the_length():
    class Same(LinearBatchModel):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(X_DIM), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1))

    class SameGuide(nn.Module):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                pyro.sample("z", dist.Normal(batch["x"], 0.1).to_event(1))

    ends = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 3.0], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    batch = Batch({"x": ends})
    out = interpolate(
        Same(), SameGuide(), batch.rows([0, 2]), batch.rows([1, 3]), steps=7, path="spherical"
    )["x"]
    torch.testing.assert_close(out[0].norm(dim=-1), torch.full((7,), 3.0))
    torch.testing.assert_close(out[1], torch.linspace(1, 2, 7)[:, None].expand(7, 3))  # no angle


def test_what_only_the_model_draws_is_the_same_along_a_path():
    class Noisy(LinearBatchModel):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(Z_DIM), 1.0).to_event(1))
                e = pyro.sample("e", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(self.net(z) + e[..., None], 1.0).to_event(1))

    model, guide, batch = Noisy(), BatchGuide(), Batch({"x": data(ROWS)})
    out = interpolate(model, guide, batch, batch, steps=3)["x"]
    assert torch.equal(out[:, 0], out[:, 1])
    w = model.net.weight.detach()
    out = traverse(model, guide, batch, dims=0, values=[0.0, 1.0])["x"]
    torch.testing.assert_close(out.diff(dim=2)[:, 0, 0], w[:, 0].expand(ROWS, -1))


def test_what_depends_on_the_models_own_draws_stays_where_it_was():
    class Shifted(LinearBatchModel):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                e = pyro.sample("e", dist.Normal(torch.zeros(1), 9.0).to_event(1))
                u = pyro.sample("u", dist.Normal(0 * e, 1.0).to_event(1))
                z = pyro.sample("z", dist.Normal(e.expand(*e.shape[:-1], Z_DIM), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z) + u, 1.0).to_event(1))

    class Both(BatchGuide):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                pyro.sample("z", self.posterior(batch["x"]))
                pyro.sample("u", dist.Normal(torch.ones(1), 1.0).to_event(1))

    model, guide, batch = Shifted(), Both(), Batch({"x": data(ROWS)})
    out = traverse(model, guide, batch, values=[2.0], latent="u")["x"][:, 0, 0]
    wanted = model.net(guide.posterior(batch["x"]).mean) + 2.0
    torch.testing.assert_close(out, wanted.detach())


def test_a_prior_without_a_mean_moves_nothing_along():
    class Heavy(LinearBatchModel):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                u = pyro.sample("u", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                z = pyro.sample("z", dist.Cauchy(torch.zeros(Z_DIM), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z) + u, 1.0).to_event(1))

    class Both(BatchGuide):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                pyro.sample("z", self.posterior(batch["x"]))
                pyro.sample("u", dist.Normal(torch.ones(1), 1.0).to_event(1))

    model, guide, batch = Heavy(), Both(), Batch({"x": data(ROWS)})
    out = traverse(model, guide, batch, values=[2.0], latent="u")["x"][:, 0, 0]
    torch.testing.assert_close(out, (model.net(guide.posterior(batch["x"]).mean) + 2.0).detach())


def test_stock_programs_and_flows():
    for name in ("spline flow", "top-down ladder", "methods with pyro.module"):
        model, guide = PAIRS[name]()
        before = torch.get_rng_state()
        out = interpolate(model, guide, data(2), data(2, seed=6), steps=3)["x"]
        assert out.shape == (2, 3, X_DIM)
        assert torch.equal(before, torch.get_rng_state())


def test_refusals():
    model, guide, batch = pair()
    none = batch.rows(slice(0, 0))

    class Steps(nn.Module):
        def forward(self, batch: Any) -> None:
            rows = pyro.plate("data", batch.size, dim=-1)
            with rows, pyro.plate("time", 2, dim=-2):
                pyro.sample("z", dist.Normal(torch.zeros(Z_DIM), 1.0).to_event(1))
            with rows:
                pyro.sample("x", dist.Normal(torch.zeros(X_DIM), 1.0).to_event(1))

    class StepsGuide(nn.Module):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1), pyro.plate("time", 2, dim=-2):
                pyro.sample("z", dist.Normal(torch.zeros(Z_DIM), 1.0).to_event(1))

    mixed = Batch({"x": torch.zeros(2), "c": torch.zeros(2)})
    for call, message in (
        (lambda: traverse(model, guide, batch, 2), "dims=2, latent 'z' has dimensions 0 to 1"),
        (lambda: traverse(model, guide, batch, [0, -1]), r"dims=\[0, -1\]"),
        (lambda: traverse(model, guide, batch, []), r"dims=\[\]"),
        (lambda: traverse(model, guide, batch, values=[]), r"values=\[\]"),
        (lambda: traverse(Mixed(), MixedGuide(), mixed, latent="y"), "values=None, wanted those"),
        (lambda: traverse(model, guide, batch, latent="w"), r"latent='w', wanted one of \['z'\]"),
        (lambda: traverse(Mixed(), MixedGuide(), mixed), "latent=None, wanted one of"),
        (lambda: traverse(model, guide, none), "without rows"),
        (lambda: traverse(model, lambda batch: None, batch), "traverse: the guide has no latents"),
        (lambda: traverse(Steps(), StepsGuide(), batch), "traverse: wanted one plate"),
        (lambda: interpolate(model, guide, batch, batch, path="curved"), "path='curved'"),
        (lambda: interpolate(model, guide, batch, batch, steps=1), "steps=1"),
        (lambda: interpolate(model, guide, batch, batch.rows([0])), "came 5 and 1 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_no_latent_is_left_where_the_data_hold_them_all():
    class Known(nn.Module):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                pyro.sample("y", dist.Normal(0.0, 1.0))

    class Model(nn.Module):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                y = pyro.sample("y", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(y, 1.0))

    batch = Batch({"x": torch.zeros(3), "y": torch.zeros(3)})
    with pytest.raises(ValueError, match="no latent is left"):
        traverse(Model(), Known(), batch)
