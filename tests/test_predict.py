"""Samples, completions, codes and reconstructions against closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.batch import Batch, Observed
from pyro_vae.evaluation import predict
from pyro_vae.evaluation.predict import encode, reconstruct, sample
from pyro_vae.objectives.tracing import trace
from tests.exact_pairs import (
    BatchGuide,
    DiscreteGuide,
    DiscreteModel,
    ExactGuide,
    ExactLadderGuide,
    LinearBatchModel,
    LinearLadder,
)
from tests.small_pairs import (
    PAIRS,
    X_DIM,
    Z_DIM,
    Guide,
    LinearModel,
    as_functions,
    batch_norm,
    data,
)

ROWS = 6
SIGMAS = 4.0


class ExactMissingGuide(ExactGuide):
    """The posterior of a ``LinearModel`` given what is observed of each row."""

    def forward(self, batch: Any) -> None:
        seen = batch.mask("x").to(torch.get_default_dtype())
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", self.given(batch["x"], seen))

    def given(self, x: Tensor, seen: Tensor) -> Any:
        w, noise = self.model.net.weight * seen[..., None], (2 * self.model.log_scale).exp()
        cov = torch.linalg.inv(torch.eye(Z_DIM) + w.mT @ w / noise)
        loc = cov @ w.mT @ (seen * (x - self.model.net.bias))[..., None] / noise
        return dist.MultivariateNormal(loc[..., 0], cov)


def pair() -> tuple[LinearBatchModel, BatchGuide]:
    return LinearBatchModel(), BatchGuide()


def exact() -> tuple[LinearBatchModel, ExactGuide]:
    model = LinearBatchModel()
    return model, ExactGuide(model)


def holed(rows: int = ROWS) -> tuple[Tensor, Batch]:
    """Rows with missing entries (one lacks all), NaN there."""
    x = data(rows)
    x[0, 1], x[2, :2], x[3] = torch.nan, torch.nan, torch.nan
    return x, Batch({"x": x})


def noise(model: LinearModel) -> Tensor:
    return (2 * model.log_scale.detach()).exp()


def assert_mean(draws: Tensor, wanted: Tensor) -> None:
    """The mean of ``[K, ...]`` is within 4 standard errors."""
    error = draws.std(0) / len(draws) ** 0.5
    assert bool(((draws.mean(0) - wanted).abs() <= SIGMAS * error + 1e-12).all())


# ---------------------------------------------------------------------------------------------
# Samples


def test_samples_have_the_moments_of_the_marginal():
    model, rows = LinearBatchModel(), 20_000
    drawn = sample(model, rows, batch_size=3_000)
    assert {site: value.shape for site, value in drawn.items()} == {
        "z": (rows, Z_DIM),
        "x": (rows, X_DIM),
    }
    w, b = model.net.weight.detach(), model.net.bias.detach()
    cov = w @ w.T + noise(model) * torch.eye(X_DIM)
    for value, loc, wanted in (
        (drawn["x"], b, cov),
        (drawn["z"], torch.zeros(Z_DIM), torch.eye(Z_DIM)),
    ):
        assert_mean(value, loc)
        variances = wanted.diagonal()
        error = ((wanted**2 + variances[:, None] * variances) / rows).sqrt()
        assert bool(((value.T.cov() - wanted).abs() < SIGMAS * error).all())


def test_the_mean_of_a_leaf_stands_for_its_draw():
    model = LinearBatchModel()
    drawn, expected = (sample(model, 50, mean=mean, seed=3) for mean in (False, True))
    assert torch.equal(drawn["z"], expected["z"])
    torch.testing.assert_close(expected["x"], model.net(drawn["z"]).detach())
    assert not torch.equal(drawn["x"], expected["x"])


def test_the_global_state_is_left_as_it_was():
    model, guide = pair()
    model.train()
    batch, before = Batch({"x": data(ROWS)}), torch.get_rng_state()
    first, again, other = (sample(model, 5, seed=seed)["x"] for seed in (0, 0, 1))
    means = [reconstruct(model, guide, batch)["x"] for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(*means)


def test_dropout_is_off():
    class Dropped(LinearBatchModel):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(Z_DIM), 1.0).to_event(1))
                loc = nn.functional.dropout(self.net(z), 0.5, self.training)
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1))

    model = Dropped()
    drawn = sample(model, 20, mean=True)
    torch.testing.assert_close(drawn["x"], model.net(drawn["z"]).detach())


class Labelled(nn.Module):
    """y ~ Categorical, z ~ N(0, 1), x ~ N(loc_y + c + z, 1/2²), m ~ Bernoulli(sigmoid(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = torch.tensor([-4.0, 0.0, 4.0])

    def forward(self, batch: Any) -> None:
        shift = torch.zeros(batch.size)
        if "c" in batch:
            shift = batch["c"]
        with pyro.plate("data", batch.size, dim=-1):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            x = pyro.sample("x", dist.Normal(self.loc[y] + shift + z, 0.5))
            pyro.sample("m", dist.Bernoulli(logits=x))


class LabelledGuide(nn.Module):
    """q(y | x), q(z | y)."""

    def forward(self, batch: Any) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.1, 0.1, 0.8])))
            pyro.sample("z", dist.Normal(y.to(torch.get_default_dtype()), 0.3))


def test_means_are_taken_where_nothing_depends_on_them():
    drawn = sample(Labelled(), 400, mean=True)
    assert drawn["y"].dtype == torch.int64
    torch.testing.assert_close(drawn["m"], drawn["x"].sigmoid())
    residual = drawn["x"] - (Labelled().loc[drawn["y"]] + drawn["z"])
    assert_mean(residual**2, torch.tensor(0.25))  # drawn: m depends on it
    assert_mean(torch.eye(3)[drawn["y"]], torch.tensor([0.2, 0.3, 0.5]))


def test_a_label_that_is_a_leaf_has_probabilities():
    class Classifier(nn.Module):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                pyro.sample("y", dist.Categorical(logits=z))

    drawn = sample(Classifier(), 7, mean=True)
    torch.testing.assert_close(drawn["y"], drawn["z"].softmax(-1))
    y = Batch({"y": np.array([2, 0, 1])}, observed={"y": np.array([True, False, True])})
    half = sample(Classifier(), given=y, mean=True)
    assert half["y"][[0, 2]].tolist() == [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    torch.testing.assert_close(half["y"][1], half["z"][1].softmax(-1))


def test_labels_and_covariates_are_given():
    y = torch.tensor([0, 2]).repeat(300)
    c = torch.tensor([10.0, 0.0]).repeat(300)
    drawn = sample(Labelled(), given=Batch({"y": y, "c": c}))
    assert torch.equal(drawn["y"], y)
    assert set(drawn) == {"y", "z", "x", "m"}
    x = drawn["x"].reshape(300, 2)
    assert_mean(x, torch.tensor([-4.0 + 10.0, 4.0]))
    only = sample(Labelled(), given=Batch({"c": c}), sites=["x"])
    assert set(only) == {"x"}


@pytest.mark.parametrize("mean", [False, True])
def test_completed_rows_have_the_conditional_mean(mean: bool):
    model = LinearBatchModel()
    guide, (x, batch), draws = ExactMissingGuide(model), holed(), 4000
    many = batch.rows(torch.arange(ROWS).repeat(draws))
    drawn = sample(model, given=many, guide=guide, mean=mean, batch_size=5000)["x"]
    drawn = drawn.reshape(draws, ROWS, X_DIM)
    seen = batch.mask("x")
    assert bool((drawn == x)[:, seen].all())

    w, b = model.net.weight.detach(), model.net.bias.detach()
    cov = w @ w.T + noise(model) * torch.eye(X_DIM)
    for row, here in enumerate(seen):
        if bool(here.all()):
            continue
        away = (x[row] - b)[here]
        wanted = b[~here] + cov[~here][:, here] @ torch.linalg.solve(cov[here][:, here], away)
        assert_mean(drawn[:, row, ~here], wanted)
        if not mean:  # and the conditional variance
            left = cov[~here][:, here] @ torch.linalg.solve(cov[here][:, here], cov[here][:, ~here])
            assert_mean((drawn[:, row, ~here] - wanted) ** 2, (cov[~here][:, ~here] - left).diag())


def test_what_the_guide_draws_is_never_a_mean():
    class Spare(nn.Module):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                pyro.sample("e", dist.Normal(0.0, 1.0))

    class SpareGuide(nn.Module):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                pyro.sample("e", dist.Normal(7.0, 0.1))

    model, given = Spare(), Batch(size=500)
    assert bool((sample(model, given=given, mean=True)["e"] == 0).all())  # the model's own leaf
    drawn = sample(model, given=given, guide=SpareGuide(), mean=True)["e"]
    assert_mean(drawn, torch.tensor(7.0))
    assert float(drawn.std()) > 0.05


def test_model_and_guide_share_the_subsamples_of_plates():
    class Part(nn.Module):
        def forward(self, batch: Any) -> None:
            rows = pyro.plate("data", batch.size, dim=-1)
            with pyro.plate("steps", 50, subsample_size=2, dim=-2) as index, rows:
                pyro.sample("z", dist.Normal(0.0, 100.0))
                pyro.sample("step", dist.Delta(torch.as_tensor(index)[:, None].double()))

    class PartGuide(nn.Module):
        def forward(self, batch: Any) -> None:
            rows = pyro.plate("data", batch.size, dim=-1)
            with pyro.plate("steps", 50, subsample_size=2, dim=-2) as index, rows:
                pyro.sample("z", dist.Delta(torch.as_tensor(index)[:, None].double()))

    drawn = sample(Part(), given=Batch(size=3), guide=PartGuide())
    assert drawn["z"].shape == (3, 2)
    assert torch.equal(drawn["z"], drawn["step"])


def test_without_a_guide_missing_entries_come_from_the_model():
    model, (x, batch) = LinearBatchModel(), holed()
    many = batch.rows(torch.arange(ROWS).repeat(3000))
    drawn = sample(model, given=many, batch_size=6000)["x"].reshape(3000, ROWS, X_DIM)
    assert bool((drawn == x)[:, batch.mask("x")].all())
    assert_mean(drawn[:, 3], model.net.bias.detach())  # nothing of this row is known
    assert_mean(drawn[:, 2, :2], model.net.bias.detach()[:2])  # its third entry is of no use


def test_one_modality_from_another():
    """What the batch lacks altogether is predicted."""
    x = torch.tensor([3.9, -4.2])
    many = Batch({"x": x}).rows(torch.arange(2).repeat(2000))
    drawn = sample(Labelled(), given=many, guide=LabelledGuide())
    assert torch.equal(drawn["x"], many["x"])
    assert_mean(torch.eye(3)[drawn["y"]], torch.tensor([0.1, 0.1, 0.8]))  # the guide's
    assert_mean(drawn["z"] - drawn["y"], torch.tensor(0.0))
    assert_mean(drawn["m"].reshape(-1, 2), x.sigmoid())  # the model's


def test_labels_known_in_part_are_completed_by_the_guide():
    y = np.array([0, 1, 2, 0] * 500)
    batch = Batch({"y": y, "x": np.zeros(2000)}, observed={"y": np.arange(2000) % 4 < 2})
    drawn = sample(Labelled(), given=batch, guide=LabelledGuide(), mean=True)
    assert drawn["y"].reshape(-1, 4)[:, :2].unique(dim=0).tolist() == [[0, 1]]
    rest = drawn["y"].reshape(-1, 4)[:, 2:].flatten()
    assert_mean(torch.eye(3)[rest], torch.tensor([0.1, 0.1, 0.8]))
    assert_mean(drawn["z"] - drawn["y"], torch.tensor(0.0))  # later sites see the merged value


@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_completed_counts_stay_whole_numbers(kind: Any):
    class Counts(nn.Module):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                pyro.sample("n", dist.Binomial(16, torch.tensor(0.5)).expand([3]).to_event(1))

    n = np.arange(9, dtype=kind).reshape(3, 3)
    batch = Batch({"n": n}, observed={"n": n % 2 == 0})
    drawn = sample(Counts(), given=batch)["n"]
    assert not drawn.is_floating_point()
    assert np.array_equal(drawn.numpy()[n % 2 == 0], n[n % 2 == 0])
    mean = sample(Counts(), given=batch, mean=True)["n"].numpy()
    np.testing.assert_array_equal(mean, np.where(n % 2 == 0, n, 8.0))


def test_sites_in_further_plates_have_their_rows_first():
    class Steps(nn.Module):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                with pyro.plate("time", 4, dim=-2):
                    pyro.sample("x", dist.Normal(z, 0.01).expand([4, batch.size]))

    class Outer(nn.Module):
        def forward(self, batch: Any) -> None:
            rows = pyro.plate("data", batch.size, dim=-2)
            with rows:
                z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
            with rows, pyro.plate("time", 4, dim=-1):
                pyro.sample("x", dist.Normal(z[..., 0], 0.01))

    for model in (Steps(), Outer()):
        drawn = sample(model, 10, batch_size=4)  # as many rows as steps
        z = drawn["z"] if drawn["z"].dim() == 1 else drawn["z"][:, 0]
        assert drawn["x"].shape == (10, 4)
        assert bool(((drawn["x"] - z[:, None]).abs() < 0.1).all())


# ---------------------------------------------------------------------------------------------
# Codes


@pytest.mark.parametrize("build", [pair, exact])
def test_codes_are_the_moments_of_the_guide(build: Any):
    (model, guide), x = build(), data(ROWS)
    codes = encode(model, guide, Batch({"x": x}), batch_size=4)
    q = guide.posterior(x)
    assert list(codes) == ["z", "z_sd"]
    torch.testing.assert_close(codes["z"], q.mean.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(codes["z_sd"], q.stddev.detach(), rtol=1e-14, atol=0)


def test_codes_of_known_moments_need_no_draws(monkeypatch: pytest.MonkeyPatch):
    sizes = []

    def spy(program: Any, args: Any, kwargs: Any, handlers: Any, size: int, nesting: int) -> Any:
        sizes.append(size)
        return trace(program, args, kwargs, handlers, size, nesting)

    monkeypatch.setattr(predict, "trace", spy)
    encode(*pair(), Batch({"x": data(ROWS)}), num_draws=50)
    assert set(sizes) == {1}


@pytest.mark.parametrize("chunk", [None, 300])
def test_codes_of_a_ladder_are_those_of_its_posterior(chunk: int | None):
    model, x, draws = LinearLadder(), data(ROWS), 2000
    guide = ExactLadderGuide(model)
    codes = encode(model, guide, x, num_draws=draws, chunk=chunk)
    w, a = model.net.weight.detach(), model.down.weight.detach()
    cov = torch.linalg.inv(torch.linalg.inv(model.prior_cov()) + w.T @ w / model.noise**2).detach()
    loc = (x - model.net.bias.detach()) @ w @ cov / model.noise**2
    torch.testing.assert_close(codes["z1"], loc)
    torch.testing.assert_close(codes["z1_sd"], cov.diagonal().sqrt().expand(ROWS, Z_DIM))
    # z2 | z1 ~ N(v a'z1, v): what the draws of z1 leave to chance is the part between them
    v = (1 / (1 + a.T @ a)).squeeze()
    between = v**2 * (a.T @ cov @ a).squeeze()
    error = (between / draws).sqrt()
    assert bool(((codes["z2"] - v * (loc @ a)).abs() < SIGMAS * error).all())
    off = (codes["z2_sd"] ** 2 - v - between).abs()
    assert bool((off < SIGMAS * between * (2 / draws) ** 0.5).all())


def test_the_variance_from_few_draws_is_not_biased():
    model, rows = LinearLadder(), 4000
    codes = encode(model, ExactLadderGuide(model), data(1).expand(rows, -1), num_draws=2)
    w, a = model.net.weight.detach(), model.down.weight.detach()
    cov = torch.linalg.inv(torch.linalg.inv(model.prior_cov()) + w.T @ w / model.noise**2).detach()
    v = (1 / (1 + a.T @ a)).squeeze()
    assert_mean(codes["z2_sd"] ** 2, (v + v**2 * (a.T @ cov @ a).squeeze()).expand(1))


def test_codes_of_a_flow_come_from_draws():
    model: Any
    guide: Any
    (model, guide), x, draws = PAIRS["spline flow"](), data(ROWS), 4000
    codes = encode(model, guide, x, num_draws=draws)
    with torch.no_grad():
        z = guide.posterior(x).sample((20_000,))
    error = z.std(0) * (1 / draws + 1 / len(z)) ** 0.5
    assert bool(((codes["z"] - z.mean(0)).abs() < SIGMAS * error).all())
    torch.testing.assert_close(codes["z_sd"], z.std(0), rtol=0.1, atol=0)


def test_codes_of_labels_are_probabilities():
    model, guide, x = DiscreteModel(), DiscreteGuide(), data(ROWS)
    codes = encode(model, guide, x)
    p = guide.net(x).softmax(-1).detach()
    torch.testing.assert_close(codes["y"], p)
    torch.testing.assert_close(codes["y_sd"], (p * (1 - p)).sqrt())


def test_labels_that_are_known_are_their_own_codes():
    y, known = np.array([0, 1, 2, 0]), np.array([True, True, False, False])
    batch = Batch({"y": y, "x": np.zeros(4)}, observed={"y": known})
    codes = encode(Labelled(), LabelledGuide(), batch, num_draws=4000)
    assert codes["y"][:2].tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert codes["y_sd"][:2].tolist() == [[0.0] * 3] * 2
    torch.testing.assert_close(codes["y"][2], torch.tensor([0.1, 0.1, 0.8]))
    assert codes["z"][:2].tolist() == [0.0, 1.0]  # E[z | y], and y is no draw
    spread = 0.1 + 0.8 * 4 - 1.7**2  # of y
    assert bool(((codes["z"][2:] - 1.7).abs() < SIGMAS * (spread / 4000) ** 0.5).all())
    torch.testing.assert_close(
        codes["z_sd"],
        torch.tensor([0.09, 0.09, 0.09 + spread, 0.09 + spread]).sqrt(),
        rtol=0.05,
        atol=0,
    )
    complete = encode(Labelled(), LabelledGuide(), Batch({"y": y, "x": np.zeros(4)}))
    assert list(complete) == ["z", "z_sd"]


def test_points_and_auxiliary_sites():
    class Transformed(BatchGuide):
        """u ~ q, z = 2 u."""

        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                u = pyro.sample("u", self.posterior(batch["x"]), infer={"is_auxiliary": True})
                pyro.sample("z", dist.Delta(2 * u, torch.zeros(u.shape[:-1]), event_dim=1))

    class Point(nn.Module):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                pyro.sample("z", dist.Delta(3 * batch["x"][:, :Z_DIM], event_dim=1))

    model, guide, x = LinearBatchModel(), Transformed(), data(ROWS)
    codes = encode(model, guide, Batch({"x": x}), num_draws=4000)
    assert list(codes) == ["z", "z_sd"]
    q, error = guide.posterior(x), 2 / 4000**0.5
    off = (codes["z"] - 2 * q.mean) / q.stddev
    assert bool((off.abs() < SIGMAS * error).all())
    torch.testing.assert_close(codes["z_sd"], 2 * q.stddev.detach(), rtol=0.06, atol=0)

    codes = encode(model, Point(), Batch({"x": x}))
    assert torch.equal(codes["z"], 3 * x[:, :Z_DIM])
    assert bool((codes["z_sd"] == 0).all())
    means = reconstruct(model, Point(), Batch({"x": x}))["x"]
    torch.testing.assert_close(means, model.net(3 * x[:, :Z_DIM]).detach())


@pytest.mark.parametrize("name", PAIRS)
def test_every_kind_of_program_encodes_and_reconstructs(name: str):
    model, guide = PAIRS[name]()
    x = data(ROWS)
    codes = encode(model, guide, x, num_draws=4)
    assert all(value.shape[0] == ROWS and value.isfinite().all() for value in codes.values())
    assert all(bool((codes[site] > 0).all()) for site in codes if site.endswith("_sd"))
    means = reconstruct(model, guide, x, num_draws=4)
    assert list(means) == ["x"]
    assert means["x"].shape == x.shape


def test_functions():
    x = data(ROWS)

    def model(batch: Any) -> None:
        w = pyro.param("w", torch.ones(X_DIM))
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None] * w, 1.0).to_event(1))

    def guide(batch: Any) -> None:
        shift = pyro.param("shift", torch.tensor(0.5))
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Normal(batch["x"].sum(-1) + shift, 0.2))

    codes = encode(model, guide, Batch({"x": x}))
    torch.testing.assert_close(codes["z"], x.sum(-1) + 0.5)
    means = reconstruct(model, guide, Batch({"x": x}), num_draws=4000)["x"]
    error = 0.2 / 4000**0.5
    assert bool(((means - codes["z"][:, None]).abs() < SIGMAS * error).all())
    assert sample(model, 5)["x"].shape == (5, X_DIM)


def test_functions_that_call_networks():
    """Their running statistics are used and stay, their dropout is off."""
    model, guide, x = LinearModel(), Guide(batch_norm()), data(ROWS)
    model.net = nn.Sequential(model.net, nn.Dropout(0.5))  # type: ignore[assignment]
    functions = as_functions(model, guide)
    before = [buffer.clone() for buffer in guide.buffers()]
    for look in (encode, reconstruct):
        wanted, found = look(model, guide, x), look(*functions, x)
        assert all(torch.equal(found[site], wanted[site]) for site in wanted)
    assert all(map(torch.equal, guide.buffers(), before))
    assert all(part.training for part in [*model.modules(), *guide.modules()])


# ---------------------------------------------------------------------------------------------
# Reconstructions


@pytest.mark.parametrize("wrap", [lambda model: model, Observed])
def test_reconstructions_are_the_decoded_posterior_mean(wrap: Any):
    (model, guide), x, draws = exact(), data(ROWS), 2000
    means = reconstruct(wrap(model), guide, Batch({"x": x}), num_draws=draws, batch_size=4)
    q, w = guide.posterior(x), model.net.weight.detach()
    wanted = model.net(q.mean).detach()
    error = ((w @ q.covariance_matrix.detach() @ w.T).diagonal(dim1=-2, dim2=-1) / draws).sqrt()
    assert list(means) == ["x"]
    assert bool(((means["x"] - wanted).abs() < SIGMAS * error).all())


def test_missing_entries_are_reconstructed_too():
    model = LinearBatchModel()
    guide, (_, batch), draws = ExactMissingGuide(model), holed(), 2000
    means = reconstruct(model, guide, batch, num_draws=draws)["x"]
    q = guide.given(batch["x"], batch.mask("x").double())
    w = model.net.weight.detach()
    error = ((w @ q.covariance_matrix.detach() @ w.T).diagonal(dim1=-2, dim2=-1) / draws).sqrt()
    assert bool(((means - model.net(q.mean).detach()).abs() < SIGMAS * error).all())


def test_data_that_come_before_stay_as_they_are():
    x, m = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 0.0, 1.0])
    means = reconstruct(Labelled(), LabelledGuide(), Batch({"x": x, "m": m}), num_draws=3)
    torch.testing.assert_close(means["m"], x.sigmoid())  # of the data's x
    y = torch.tensor([0, 1, 2])
    means = reconstruct(Labelled(), LabelledGuide(), Batch({"x": x, "y": y}), num_draws=2000)
    assert set(means) == {"x"}  # y is the guide's
    wanted = Labelled().loc + y
    assert bool(((means["x"] - wanted).abs() < SIGMAS * 0.3 / 2000**0.5).all())


def test_draws_stand_for_means_that_are_not_known():
    class Cubed(LinearBatchModel):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(Z_DIM), 1.0).to_event(1))
                base = dist.Normal(self.net(z), 0.5).to_event(1)
                pyro.sample(
                    "x",
                    dist.TransformedDistribution(base, [dist.transforms.AffineTransform(1.0, 2.0)]),
                )

    model, guide, x = Cubed(), BatchGuide(), data(ROWS)
    means = reconstruct(model, guide, Batch({"x": x}), num_draws=4000)["x"]
    q, w = guide.posterior(x).base_dist, model.net.weight.detach()
    wanted = 1 + 2 * model.net(q.loc).detach()
    error = 2 * ((q.scale.detach() ** 2 @ (w**2).T + 0.25) / 4000).sqrt()
    assert bool(((means - wanted).abs() < SIGMAS * error).all())
    with pytest.raises(ValueError, match=r"sample: site 'x': the mean of its .* is not known"):
        sample(model, 5, mean=True)


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 1), (4, 7), (250, None)])
def test_chunks_change_neither_shapes_nor_means(batch_size: int, chunk: int | None):
    (model, guide), x = exact(), data(ROWS)
    draws, sizes = 2000 if chunk is None else 23, {"batch_size": batch_size, "chunk": chunk}
    means = reconstruct(model, guide, Batch({"x": x}), num_draws=draws, **sizes)["x"]  # type: ignore[arg-type]
    q, w = guide.posterior(x), model.net.weight.detach()
    error = ((w @ q.covariance_matrix.detach() @ w.T).diagonal(dim1=-2, dim2=-1) / draws).sqrt()
    assert means.shape == x.shape
    assert bool(((means - model.net(q.mean).detach()).abs() < SIGMAS * error).all())
    codes = encode(model, guide, Batch({"x": x}), **sizes)  # type: ignore[arg-type]
    torch.testing.assert_close(codes["z"], q.mean.detach())
    assert sample(model, 11, batch_size=batch_size)["x"].unique(dim=0).shape == (11, X_DIM)


def test_memory_does_not_grow_with_the_draws(monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []

    class Spied(LinearBatchModel):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(Z_DIM), 1.0).to_event(1))
                seen.append(z[..., 0].numel())
                pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1))

    monkeypatch.setattr(predict, "CELLS", 60 * X_DIM)
    reconstruct(Spied(), BatchGuide(), Batch({"x": data(40)}), num_draws=100, batch_size=20)
    assert max(seen) == 60
    assert sum(seen) >= 40 * 100


# ---------------------------------------------------------------------------------------------
# Refusals


def test_refusals():
    (model, guide), batch = pair(), Batch({"x": data(ROWS)})
    for call, message in (
        (lambda: sample(model), "either num_rows, or given="),
        (lambda: sample(model, 3, given=batch), "either num_rows, or given="),
        (lambda: sample(model, 0), "num_rows=0"),
        (lambda: sample(model, 3, batch_size=0), "batch_size=0"),
        (lambda: sample(model, 3, sites=["y"]), r"came sites \['y'\], the model has"),
        (lambda: sample(model, given=batch.rows(slice(0, 0))), "given came without rows"),
        (lambda: sample(LinearModel(), 3), "obs= by itself"),
        (lambda: encode(model, guide, batch.rows(slice(0, 0))), "data came without rows"),
        (lambda: encode(model, guide, batch, num_draws=1), "num_draws=1.*>= 2"),
        (lambda: encode(model, lambda batch: None, batch), "encode: the guide has no latents"),
        (lambda: reconstruct(model, lambda batch: None, batch), "the guide has no latents"),
        (lambda: reconstruct(model, guide, batch, chunk=0), "chunk=0"),
        (lambda: encode(model, guide, [1.0]), "came as list"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_sites_outside_the_plate_are_refused():
    class Global(LinearBatchModel):
        def forward(self, batch: Any) -> None:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", batch.size, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(Z_DIM), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(w * self.net(z), 1.0).to_event(1))

    class GlobalGuide(BatchGuide):
        def forward(self, batch: Any) -> None:
            pyro.sample("w", dist.Normal(0.0, 1.0))
            super().forward(batch)

    batch = Batch({"x": data(ROWS)})
    with pytest.raises(ValueError, match=r"encode: sites \['w'\] lie outside the plate over rows"):
        encode(Global(), GlobalGuide(), batch)
    with pytest.raises(
        ValueError, match=r"sample: sites \['w'\] lie outside a plate over the 4 rows"
    ):
        sample(Global(), 4)


def test_a_plate_over_other_rows_is_refused():
    class Every(LinearModel):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", 100, subsample_size=len(x) // 2):
                z = pyro.sample("z", dist.Normal(torch.zeros(Z_DIM), 1.0).to_event(1))
                obs = x[: len(x) // 2]
                pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=obs)

    class EveryGuide(Guide):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", 100, subsample_size=len(x) // 2):
                pyro.sample("z", self.posterior(x[: len(x) // 2]))

    with pytest.raises(ValueError, match=r"encode: the programs made \[3\] rows of 6"):
        encode(Every(), EveryGuide(), data(ROWS))


def test_data_outside_the_support_are_refused():
    class Binary(LinearBatchModel):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(Z_DIM), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1))

    with pytest.raises(ValueError, match="outside the support"):
        encode(Binary(), BatchGuide(), Batch({"x": data(ROWS)}))
    with pytest.raises(ValueError, match="site 'x': data outside the support of the Bernoulli"):
        sample(Binary(), given=Batch({"x": data(ROWS)}), guide=BatchGuide())


def test_a_misspelt_site_is_not_given():
    """Else fresh rows would come."""
    with pytest.raises(
        ValueError, match=r"given came with sites \['xx'\], the model has \['z', 'x'\]"
    ):
        sample(LinearBatchModel(), given=Batch({"xx": data(ROWS)}))


@pytest.mark.gpu
def test_a_pair_on_the_accelerator_takes_rows_from_anywhere():
    model, guide = (program.to("cuda") for program in pair())
    batch = Batch({"x": data(ROWS)})
    for out in (
        encode(model, guide, batch),
        reconstruct(model, guide, batch),
        sample(model, ROWS),
        sample(model, given=batch, guide=guide, mean=True),
    ):
        assert all(value.device.type == "cpu" and len(value) == ROWS for value in out.values())


@pytest.mark.parametrize("seed", range(6))
def test_what_has_children_is_no_leaf_whatever_was_drawn(seed):
    """Classes 0 and 2 give x the same density; whether y is a leaf must not hang on the seed."""
    weights = torch.tensor([0.0, 5.0, 0.0])

    def model(batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            y = pyro.sample("y", dist.Categorical(torch.ones(batch.size, 3)))
            pyro.sample("x", dist.Normal(weights[y], 0.1))

    drawn = sample(model, 40, mean=True, seed=seed)
    assert drawn["y"].shape == (40,)
    torch.testing.assert_close(drawn["x"], weights[drawn["y"]])


def test_factors_are_no_data():
    class Weighted(LinearBatchModel):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(Z_DIM), 1.0).to_event(1))
                pyro.factor("f", z.sum(-1))
                fn = dist.Normal(self.net(z), self.log_scale.exp())
                pyro.sample("x", fn.to_event(1))

    model, (plain, guide) = Weighted(), pair()
    model.load_state_dict(plain.state_dict())
    batch = Batch({"x": data(ROWS)})
    assert list(sample(model, 4)) == list(sample(model, 4, mean=True)) == ["z", "x"]
    with pytest.raises(ValueError, match=r"came sites \['f'\], the model has \['z', 'x'\]"):
        sample(model, 4, sites=["f"])
    ours, theirs = (reconstruct(each, guide, batch) for each in (model, plain))
    assert list(ours) == ["x"]
    assert torch.equal(ours["x"], theirs["x"])
