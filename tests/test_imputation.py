"""Imputations against closed forms: conditional means, variances, quantiles and densities."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.conditionals import NegativeBinomial, StudentT
from pyro_vae.evaluation.imputation import held_out_log_p, impute
from tests.exact_pairs import LinearBatchModel
from tests.small_pairs import X_DIM, Z_DIM, Guide, data, normal

SIGMAS = 5.0
SEEN = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 0], [0, 0, 0]]).bool()


class ExactMissingGuide(nn.Module):
    """The posterior of a ``LinearModel`` given what is observed of each row, its scale multiplied."""

    def __init__(self, model: LinearBatchModel, scale: float = 1.0) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, batch: Any) -> None:
        seen = batch.mask("x").to(torch.get_default_dtype())
        w, noise = self.model.net.weight * seen[..., None], (2 * self.model.log_scale).exp()
        cov = torch.linalg.inv(torch.eye(Z_DIM) + w.mT @ w / noise)
        loc = (cov @ w.mT @ (seen * (batch["x"] - self.model.net.bias))[..., None] / noise)[..., 0]
        tril = self.scale * torch.linalg.cholesky(cov)
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))


class RowGuide(Guide):
    """A rough guide that sees which entries are there."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(2 * X_DIM, 2 * Z_DIM))

    def forward(self, batch: Any) -> None:
        both = torch.cat([batch["x"], batch.mask("x").to(torch.get_default_dtype())], -1)
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", normal(self.net(both)))


def holed() -> tuple[Tensor, Batch]:
    """Whole rows, and the same with gaps (the third has none, the last nothing else)."""
    x = data(len(SEEN))
    return x, Batch({"x": x.masked_fill(~SEEN, torch.nan)})


def conditional(model: LinearBatchModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of missing entries given the observed ones, ``[B, D]``; data and 0
    elsewhere."""
    w, b = model.net.weight.detach(), model.net.bias.detach()
    cov = w @ w.T + (2 * model.log_scale.detach()).exp() * torch.eye(X_DIM)
    mean, sd = x.clone(), torch.zeros_like(x)
    for row, seen in enumerate(SEEN):
        gain = cov[~seen][:, seen] @ torch.linalg.inv(cov[seen][:, seen])
        mean[row, ~seen] = b[~seen] + gain @ (x[row, seen] - b[seen])
        left = cov[~seen][:, ~seen] - gain @ cov[seen][:, ~seen]
        sd[row, ~seen] = left.diag().sqrt()
    return mean, sd


def test_means_and_deviations_are_those_of_the_conditional_gaussian():
    model = LinearBatchModel()
    x, batch = holed()
    mean, sd = conditional(model, x)
    for guide in (ExactMissingGuide(model), ExactMissingGuide(model, 1.5), RowGuide()):
        found = impute(model, guide, batch, 8_000)
        error = sd / found.ess[:, None].sqrt()
        assert torch.equal(found.values["x"][SEEN], x[SEEN])
        assert torch.equal(found.sd["x"][SEEN], torch.zeros(int(SEEN.sum())))
        assert bool(((found.values["x"] - mean).abs() <= SIGMAS * error + 1e-12).all())
        assert bool(((found.sd["x"] - sd).abs() <= SIGMAS * error + 1e-12).all())


def test_the_mean_given_the_latent_takes_the_place_of_draws():
    """With the exact posterior the error is that of E[x | z], which is less than that of x."""
    model = LinearBatchModel()
    with torch.no_grad():
        model.log_scale.fill_(2.0)  # x is nearly all noise
    x, batch = holed()
    mean, sd = conditional(model, x)
    found = impute(model, ExactMissingGuide(model), batch, 100)
    assert float(((found.values["x"] - mean) / sd)[~SEEN].abs().max()) < 0.1 / 2  # 1 / sqrt(100)


def test_chunks_and_memory_do_not_change_the_sums():
    model = LinearBatchModel()
    _, batch = holed()
    guide = RowGuide()
    whole = impute(model, guide, batch, 64, chunk=64)
    parts = impute(model, guide, batch, 64, chunk=16)
    error = whole.sd["x"] * (2 / parts.ess[:, None].minimum(whole.ess[:, None])).sqrt()
    assert bool(((whole.values["x"] - parts.values["x"]).abs() <= SIGMAS * error + 1e-12).all())
    assert float((whole.log_p - parts.log_p).abs().max()) < 1.0


def test_effective_sample_size_and_log_p_are_exact_under_the_exact_posterior():
    model = LinearBatchModel()
    x, batch = holed()
    found = impute(model, ExactMissingGuide(model), batch, 300)
    torch.testing.assert_close(found.ess, torch.full((len(x),), 300.0))
    torch.testing.assert_close(found.log_p, model.marginal(x, SEEN).detach())


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_medians_and_intervals_are_quantiles_of_the_conditional_gaussian(scale):
    model = LinearBatchModel()
    x, batch = holed()
    mean, sd = conditional(model, x)
    guide = ExactMissingGuide(model, scale)
    found = impute(model, guide, batch, 8_000, loss="l1", interval=0.9)
    error = 2.2 * sd / found.ess[:, None].sqrt()  # of a 5 % quantile; a median's is 1.25
    for values, z in ((found.values, 0.0), (found.lower, -1.6449), (found.upper, 1.6449)):
        assert bool(((values["x"] - mean - z * sd).abs() <= SIGMAS * error + 1e-12).all())
        assert torch.equal(values["x"][SEEN], x[SEEN])


def test_draws_have_the_conditional_covariance():
    """Of a row whose first two entries are missing, across draws that went through weights."""
    model = LinearBatchModel()
    x, batch = holed()
    rows = batch.rows([1])
    found = impute(model, ExactMissingGuide(model, 1.5), rows, 8_000, draws=4_000)
    drawn = found.draws["x"][:, 0]
    assert torch.equal(drawn[:, 2], x[1, 2].expand(4_000))
    w, s = model.net.weight.detach(), (2 * model.log_scale.detach()).exp()
    cov = w @ w.T + s * torch.eye(X_DIM)
    left = cov[:2, :2] - cov[:2, 2:] @ cov[2:, :2] / cov[2, 2]
    error = (left.diag()[:, None] * left.diag() + left.square()).sqrt() / 2_000**0.5
    assert bool(((torch.cov(drawn[:, :2].T) - left).abs() <= SIGMAS * error).all())


def test_a_row_does_not_depend_on_the_rows_beside_it():
    model, guide = LinearBatchModel(), RowGuide()
    _, batch = holed()
    options: dict[str, Any] = {"draws": 7, "interval": 0.5, "loss": "l1", "seed": 3}
    whole = impute(model, guide, batch, 50, **options)
    for index in ([1], [4, 0], [3, 1, 0]):
        part = impute(model, guide, batch.rows(index), 50, batch_size=2, **options)
        for name in ("values", "sd", "lower", "upper"):
            torch.testing.assert_close(getattr(part, name)["x"], getattr(whole, name)["x"][index])
        torch.testing.assert_close(part.draws["x"], whole.draws["x"][:, index])
    other = impute(model, guide, batch, 50, **{**options, "seed": 4})
    assert not torch.allclose(other.draws["x"], whole.draws["x"])
    assert not torch.allclose(whole.draws["x"][0, 4], whole.draws["x"][1, 4])


# ---------------------------------------------------------------------------------------------
# Sites on which others depend


class Masked(LinearBatchModel):
    """x with a mask model: s_j = 1 with probability sigmoid(slope (x_j - level))."""

    slope, level = 2.0, 0.5

    def forward(self, batch: Any) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.z_dim]).to_event(1))
            x = pyro.sample("x", dist.Normal(self.net(z), self.log_scale.exp()).to_event(1))
            pyro.sample("s", dist.Bernoulli(logits=self.slope * (x - self.level)).to_event(1))


def test_missing_entries_are_weighed_by_the_mask_that_depends_on_them():
    """The density of the missing entry is p(x1 | x2, x3) (1 - sigmoid), by quadrature."""
    model = Masked()
    x, seen = data(1), torch.tensor([[False, True, True]])
    batch = Batch({"x": x.masked_fill(~seen, torch.nan), "s": seen.to(torch.float64)})
    w, b = model.net.weight.detach(), model.net.bias.detach()
    cov = w @ w.T + (2 * model.log_scale.detach()).exp() * torch.eye(X_DIM)
    gain = cov[:1, 1:] @ torch.linalg.inv(cov[1:, 1:])
    loc = b[0] + (gain @ (x[0, 1:] - b[1:]))[0]
    scale = (cov[0, 0] - (gain @ cov[1:, :1])[0, 0]).sqrt()
    grid = torch.linspace(-12, 12, 20_001)
    density = dist.Normal(loc, scale).log_prob(grid).exp()
    density = density * torch.sigmoid(-model.slope * (grid - model.level))
    density = density / density.sum()
    mean = (density * grid).sum()
    sd = ((density * (grid - mean).square()).sum()).sqrt()
    median = grid[int((density.cumsum(0) < 0.5).sum())]
    guide = ExactMissingGuide(model)
    found = impute(model, guide, batch, 8_000, loss="l1", draws=5)
    plain = impute(model, guide, batch, 8_000)
    error = float(sd / found.ess[0].sqrt())
    assert abs(float(loc - mean)) > 10 * error  # the mask says something
    assert abs(float(plain.values["x"][0, 0] - mean)) < SIGMAS * error
    assert abs(float(plain.sd["x"][0, 0] - sd)) < SIGMAS * error
    assert abs(float(found.values["x"][0, 0] - median)) < SIGMAS * 1.3 * error * 2**0.5
    alone = impute(model, guide, batch.rows([0]), 200)
    both = impute(model, guide, batch.rows([0, 0]), 200)
    torch.testing.assert_close(both.values["x"][1], alone.values["x"][0])


# ---------------------------------------------------------------------------------------------
# Other kinds of sites


class Mixed(nn.Module):
    """One binary latent; a label, a count and a coin given it."""

    def forward(self, batch: Any) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            up = (z > 0).to(torch.float64)
            logits = torch.stack([2 * up, torch.zeros_like(up), -up], -1)
            pyro.sample("label", dist.Categorical(logits=logits))
            pyro.sample("count", dist.Poisson(1.0 + 4.5 * up))
            pyro.sample("coin", dist.Bernoulli(0.1 + 0.8 * up))


class Prior(nn.Module):
    def forward(self, batch: Any) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(batch.size), 1.0))


def mixed() -> Batch:
    """Two rows; the coin of the first is heads, all else is missing."""
    return Batch(
        {
            "label": torch.tensor([0, 2]),
            "count": torch.tensor([3, 3]),
            "coin": torch.tensor([1.0, torch.nan]),
        },
        {"label": torch.tensor([False, True]), "count": torch.tensor([False, False])},
    )


def test_labels_counts_and_coins():
    up = 0.9  # p(z > 0 | coin)
    found = impute(Mixed(), Prior(), mixed(), 8_000, loss={"count": "l1", "coin": "l1"})
    high = torch.softmax(torch.tensor([2.0, 0.0, -1.0]), -1)
    low = torch.softmax(torch.zeros(3), -1)
    torch.testing.assert_close(
        found.probabilities["label"][0], up * high + (1 - up) * low, atol=0.02, rtol=0
    )
    assert found.probabilities["label"][1].tolist() == [0, 0, 1]
    assert found.values["label"].tolist() == [0, 2]
    assert found.values["count"].dtype == torch.int64
    pmf = up * dist.Poisson(5.5).log_prob(torch.arange(40.0)).exp()
    pmf = pmf + (1 - up) * dist.Poisson(1.0).log_prob(torch.arange(40.0)).exp()
    assert int(found.values["count"][0]) == int((pmf.cumsum(0) < 0.5).sum())
    assert found.values["coin"][0] == 1
    assert "label" not in found.sd
    mean = up * 5.5 + (1 - up)
    variance = up * (5.5 + 5.5**2) + (1 - up) * 2 - mean**2
    assert abs(float(found.sd["count"][0]) - variance**0.5) < 0.1
    assert int(impute(Mixed(), Prior(), mixed(), 8_000).values["count"][0]) == round(mean)


def test_a_site_that_the_data_lack_is_missing_everywhere():
    batch = mixed().without("label")
    losses = {"label": "l1", "count": "l1"}  # of sites that are not filled, too
    assert set(impute(Mixed(), Prior(), batch, 50, sites=["coin"], loss=losses).values) == {"coin"}
    assert set(impute(Mixed(), Prior(), batch, 50).values) == {"count", "coin"}
    found = impute(Mixed(), Prior(), batch, 8_000, sites=["label"], draws=3)
    assert found.draws["label"].shape == (3, 2)
    torch.testing.assert_close(
        found.probabilities["label"][0],
        0.9 * torch.softmax(torch.tensor([2.0, 0.0, -1.0]), -1) + 0.1 / 3,
        atol=0.02,
        rtol=0,
    )


class Leaf(nn.Module):
    """x given nothing but a latent that says nothing."""

    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, batch: Any) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0))
            pyro.sample("x", self.fn().to_event(1))


LEAVES = {
    "normal": lambda: dist.Normal(torch.tensor([1.0, 2.0]), 0.5),
    "log-normal": lambda: dist.LogNormal(torch.tensor([1.0, 2.0]), 0.5),
    "student": lambda: StudentT(nn.Identity(), (2,), 0.5)(torch.tensor([1.0, 2.0])).base_dist,
    "bernoulli": lambda: dist.Bernoulli(torch.tensor([0.2, 0.7])),
    "categorical": lambda: dist.Categorical(torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])),
    "binomial": lambda: dist.Binomial(7, torch.tensor([0.2, 0.7])),
    "poisson": lambda: dist.Poisson(torch.tensor([0.4, 30.0])),
    "negative binomial": lambda: (
        NegativeBinomial(nn.Identity(), (2,), dispersion=0.5)(torch.tensor([1.0, 20.0])).base_dist
    ),
    "laplace": lambda: dist.Laplace(torch.tensor([1.0, 2.0]), 0.5),  # row by row
}


@pytest.mark.parametrize("name", LEAVES)
def test_draws_of_every_family_are_its_own_and_a_rows_own(name):
    """Mean and variance of draws, and of parts of the rows what the whole gives."""
    model, fn = Leaf(LEAVES[name]), LEAVES[name]()
    empty = {"x": torch.zeros(3, 2, dtype=torch.bool)}
    dtype = torch.int64 if name == "categorical" else torch.float64
    batch = Batch({"x": torch.ones(3, 2, dtype=dtype), "y": torch.zeros(3)}, empty)
    number = 4000
    whole = impute(model, Prior(), batch, 20, draws=number).draws["x"]
    part = impute(model, Prior(), batch.rows([2, 0]), 20, draws=number).draws["x"]
    assert torch.equal(part, whole[:, [2, 0]])
    assert not torch.equal(whole[:, 0], whole[:, 1])
    drawn = whole[:, 1].double()
    if name == "categorical":
        classes = torch.arange(3.0)
        mean = (fn.probs * classes).sum(-1)
        variance = (fn.probs * classes.square()).sum(-1) - mean.square()
    else:
        mean, variance = fn.mean.detach(), fn.variance.detach()
    assert bool(((drawn.mean(0) - mean).abs() < SIGMAS * (variance / number).sqrt()).all())
    square = (drawn - mean).square()
    assert bool(((square.mean(0) - variance).abs() < SIGMAS * square.std(0) / number**0.5).all())


# ---------------------------------------------------------------------------------------------
# Held-out cells


def test_held_out_log_p_is_the_conditional_density():
    model = LinearBatchModel()
    x, batch = holed()
    truth = Batch({"x": x})
    found = held_out_log_p(model, ExactMissingGuide(model), batch, truth, 200, widen=False)
    whole, part = model.marginal(x, torch.ones_like(SEEN)), model.marginal(x, SEEN)
    torch.testing.assert_close(found, (whole - part).detach())
    assert found[2] == 0  # nothing was hidden
    few = truth.hide("x", torch.tensor([[False, False, True]]).expand(len(x), 3) & ~SEEN)
    found = held_out_log_p(model, ExactMissingGuide(model), batch, few, 200, widen=False)
    torch.testing.assert_close(found, (model.marginal(x, few.mask("x")) - part).detach())


# ---------------------------------------------------------------------------------------------
# What is refused


def test_refusals():
    model, (x, batch) = LinearBatchModel(), holed()
    guide = RowGuide()
    for arguments, options, words in (
        ((x,), {}, "wanted a Batch"),
        ((batch, 0), {}, "num_particles=0"),
        ((batch,), {"draws": -1}, "draws=-1"),
        (
            (batch,),
            {"loss": "l3"},
            r"^impute: came loss 'l3', wanted one of \['l2', 'l1'\], or site",
        ),
        ((batch,), {"loss": {"x": "l3"}}, "came loss 'l3', wanted one of"),
        (
            (batch,),
            {"loss": {"reel": "l1"}},
            r"loss= names sites \['reel'\], wanted some of \['x'\]",
        ),
        ((batch,), {"loss": {"z": "l1"}}, r"loss= names sites \['z'\]"),
        ((batch,), {"interval": 1.0}, "interval=1.0"),
        ((batch,), {"sites": ["y"]}, r"came sites \['y'\], wanted some of \['x'\]"),
        ((batch,), {"sites": ["z"]}, r"came sites \['z'\]"),
    ):
        with pytest.raises(ValueError, match=words):
            impute(model, guide, *arguments, **options)
    with pytest.raises(ValueError, match="truth has 2 rows, data 5"):
        held_out_log_p(model, guide, batch, Batch({"x": x[:2]}))
    with pytest.raises(ValueError, match="lacks or changes"):
        held_out_log_p(model, guide, batch, Batch({"x": x + 1}))
