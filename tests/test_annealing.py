"""Annealed importance sampling against known evidences: bounds on both sides, and what is frozen."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as flows
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.evaluation import evaluate
from pyro_vae.evaluation.annealing import annealed, bidirectional, sigmoidal
from pyro_vae.evaluation.hamiltonian import transition
from pyro_vae.evaluation.likelihood import mean_and_error
from pyro_vae.evaluation.targets import Pair, Rows
from tests.exact_pairs import (
    SIGMAS,
    BatchGuide,
    DiscreteGuide,
    DiscreteModel,
    ExactGuide,
    ExactLadderGuide,
    LinearBatchModel,
    LinearLadder,
    broad,
)
from tests.small_pairs import Annealed as ScaledLatent
from tests.small_pairs import FlowGuide, LinearModel, as_functions, data

NAN = math.nan
SHORT: dict[str, Any] = {"chains": 4, "leapfrog": 2, "compile": "eager", "pilot": 8}


def batch(rows: int = 6) -> Batch:
    return Batch({"x": data(rows)})


# ---------------------------------------------------------------------------------------------
# Programs with known evidences: model, guide, data, log p


def linear(guide: Callable[[], Any] | None = None) -> Any:
    model, start = LinearBatchModel(), guide and guide()
    return model, start, batch(3), model.evidence(data(3))


def functions() -> Any:
    """Programs that do not say which modules they use."""
    model, _ = as_functions(inner := LinearModel(), BatchGuide())
    return model, None, data(3), inner.evidence(data(3))


def ladder() -> Any:
    model = LinearLadder()
    return model, None, data(3), model.evidence(data(3))


def missing() -> Any:
    model, x = LinearBatchModel(), data(3)
    mask = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])
    return model, None, Batch({"x": x.where(mask, NAN)}), model.marginal(x, mask)


def missing_parents() -> Any:
    """z -> a -> b: where a is missing, it is a latent on which b depends."""

    def model(batch: Any) -> None:
        with pyro.plate("data", batch.size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            a = pyro.sample("a", dist.Normal(z, 1.0))
            pyro.sample("b", dist.Normal(a, 0.5))

    a, b = torch.tensor([0.3, NAN, -1.0]), torch.tensor([0.5, 1.2, NAN])
    joint = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 2.0], [2.0, 2.25]]))
    exact = [
        joint.log_prob(torch.tensor([0.3, 0.5])),
        dist.Normal(0.0, 1.5).log_prob(b[1]),
        dist.Normal(0.0, math.sqrt(2)).log_prob(a[2]),
    ]
    return model, None, Batch({"a": a, "b": b}), torch.stack(exact)


def positive() -> Any:
    """A rate, whose counts are negative binomial."""

    def model(batch: Any) -> None:
        with pyro.plate("data", batch.size):
            rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
            pyro.sample("x", dist.Poisson(rate))

    x = torch.tensor([0.0, 2.0, 7.0])
    return model, None, Batch({"x": x}), dist.NegativeBinomial(3.0, probs=1 / 3).log_prob(x)


def simplex() -> Any:
    """Probabilities have one coordinate less than there are."""
    concentration = torch.tensor([1.0, 2.0, 3.0])

    def model(batch: Any) -> None:
        with pyro.plate("data", batch.size):
            p = pyro.sample("p", dist.Dirichlet(concentration))
            pyro.sample("x", dist.Multinomial(4, p, validate_args=False))

    x = torch.tensor([[4.0, 0.0, 0.0], [1.0, 1.0, 2.0], [0.0, 0.0, 4.0]])
    exact = dist.DirichletMultinomial(concentration, torch.tensor(4.0)).log_prob(x)
    return model, None, Batch({"x": x}), exact


def interval() -> Any:
    """A support with bounds that are numbers."""

    def model(batch: Any) -> None:
        with pyro.plate("data", batch.size):
            p = pyro.sample("p", dist.Uniform(0.0, torch.ones(batch.size)))
            pyro.sample("x", dist.Binomial(5, p))

    return model, None, Batch({"x": torch.tensor([0.0, 2.0, 5.0])}), torch.full((3,), -math.log(6))


def plates() -> Any:
    """A plate inside a row, to the right of that of the rows."""

    def model(x: Tensor) -> None:
        parts = pyro.plate("parts", 2, dim=-1)
        with pyro.plate("data", len(x), dim=-2):
            top = pyro.sample("top", dist.Normal(torch.zeros(len(x), 1), 1.0))
            with parts:
                z = pyro.sample("z", dist.Normal(top, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = data(3, 2)
    exact = dist.MultivariateNormal(torch.zeros(2), torch.ones(2, 2) + 2 * torch.eye(2))
    return model, None, x, exact.log_prob(x)


def absent_modality() -> Any:
    """A discrete site that is not data, and on which nothing depends, is no latent."""
    inner = LinearBatchModel()

    def model(batch: Any) -> None:
        with pyro.plate("data", batch.size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([inner.z_dim]).to_event(1))
            pyro.sample("y", dist.Bernoulli(logits=z.sum(-1)))
            pyro.sample("x", dist.Normal(inner.net(z), inner.log_scale.exp()).to_event(1))

    return model, None, batch(3), inner.evidence(data(3))


CASES: dict[str, Callable[[], Any]] = {
    "from the prior": linear,
    "from a guide": partial(linear, lambda: broad(BatchGuide())),
    "functions": functions,
    "two layers": ladder,
    "missing entries": missing,
    "missing entries that others depend on": missing_parents,
    "positive": positive,
    "simplex": simplex,
    "interval": interval,
    "plate inside rows": plates,
    "absent modality": absent_modality,
}


@pytest.mark.parametrize("case", CASES)
def test_few_temperatures_are_unbiased(case: str):
    """E[exp(log_p)] is p(x), however short and badly adapted the chains are."""
    model, guide, rows, exact = CASES[case]()
    index = torch.arange(3).repeat(400)
    many = rows.rows(index) if isinstance(rows, Batch) else rows[index]
    found = annealed(
        model, many, guide, temperatures=4, pilot=3, batch_size=1200, **without("pilot")
    )
    gain = found.log_p.reshape(400, 3) - exact.detach()
    ratio, error = gain.exp().mean(0), gain.exp().std(0) / math.sqrt(400)
    assert bool((error < 0.1).all()), f"too noisy to tell: {error}"
    assert bool(((ratio - 1).abs() <= SIGMAS * error + 1e-9).all()), ratio
    assert bool((gain.mean(0) < 0.02).all())
    assert 0.4 < found.acceptance < 0.95


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in SHORT.items() if name not in names}


@pytest.mark.parametrize("chains", [1, 8])
def test_many_temperatures_leave_little_slack(chains: int):
    model, rows = LinearBatchModel(), batch(60)
    found = annealed(model, rows, chains=chains, temperatures=60, compile="eager", leapfrog=4)
    slack = model.evidence(rows["x"]).detach() - found.log_p
    mean, error = mean_and_error(slack)
    expected = found.path.length**2 / (2 * 60)  # of one chain
    assert -SIGMAS * error < mean < 1.5 * expected / chains + SIGMAS * error
    assert error < 0.05


@pytest.mark.parametrize("temperatures", [1, 3])
@pytest.mark.parametrize("kind", ["one layer", "two layers"])
def test_an_exact_guide_leaves_no_slack(kind: str, temperatures: int):
    model = LinearBatchModel() if kind == "one layer" else LinearLadder()
    guide = ExactGuide(model) if isinstance(model, LinearBatchModel) else ExactLadderGuide(model)
    x = data(5)
    rows = Batch({"x": x}) if kind == "one layer" else x
    found = annealed(model, rows, guide, temperatures=temperatures, **SHORT)
    torch.testing.assert_close(found.log_p, model.evidence(x).detach())
    torch.testing.assert_close(found.ess, torch.full((5,), 4.0))
    assert found.path.length == pytest.approx(0, abs=1e-5)


# ---------------------------------------------------------------------------------------------
# Both ways


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_bounds_on_rows_of_the_models_own_hold_on_both_sides(start: str):
    model = LinearBatchModel()
    guide = broad(BatchGuide()) if start == "guide" else None
    number = 3 if start == "prior" else 6
    found = bidirectional(model, batch(1500), guide, temperatures=number, batch_size=1500, **SHORT)
    exact = model.evidence(found.rows["x"]).detach()
    for ratio in ((found.lower - exact).exp(), (exact - found.upper).exp()):
        mean, error = mean_and_error(ratio)
        assert error < 0.1
        assert abs(mean - 1) < SIGMAS * error
    for below in (found.lower - exact, exact - found.upper):
        mean, error = mean_and_error(below)
        assert mean < -SIGMAS * error
    assert found.gap.mean == pytest.approx(float((found.upper - found.lower).mean()))
    longer = bidirectional(model, batch(100), guide, temperatures=25, **SHORT)
    assert 0 < longer.gap.mean + SIGMAS * longer.gap.error < found.gap.mean
    assert longer.start == start


def test_rows_are_made_like_those_given():
    """Missing entries stay where they are, and so does what the model only reads."""

    class Shifted(LinearBatchModel):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.z_dim]).to_event(1))
                loc = self.net(z) + batch["shift"]
                pyro.sample("x", dist.Normal(loc, self.log_scale.exp()).to_event(1))

    model, x = Shifted(), data(40)
    x[::2, 1] = NAN
    rows = Batch({"x": x, "shift": 5 + 10 * torch.arange(40.0)[:, None]})
    found = bidirectional(model, rows, temperatures=30, **SHORT)
    made = found.rows
    assert torch.equal(made.mask("x"), rows.mask("x"))
    assert torch.equal(made["shift"], rows["shift"])
    exact = model.marginal(made["x"] - made["shift"], made.mask("x")).detach()
    for low, high in ((found.lower, exact), (exact, found.upper)):
        mean, error = mean_and_error(high - low)
        assert -SIGMAS * error < mean < 0.2
    other = bidirectional(model, rows, temperatures=2, **SHORT, seed=1)
    assert not torch.equal(other.rows["x"], made["x"])


# ---------------------------------------------------------------------------------------------
# Transitions


@pytest.mark.parametrize("step", [0.1, 1.0])
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_transitions_leave_the_target_as_it_is(beta: float, step: float):
    """Whatever the step size: draws of prior times likelihood^beta stay such, in mean and covariance."""
    model, chains = LinearBatchModel(), 8000
    cooled = LinearBatchModel()  # its posterior is the target
    cooled.load_state_dict(model.state_dict())
    cooled.log_scale.data -= 0.5 * math.log(beta)
    posterior = ExactGuide(cooled).posterior(data(3))
    z = posterior.sample((chains,))
    rows = Rows(Pair("", model, None, batch(3), "eager"), batch(3), chains, 0)
    state, shares = rows(z), []
    for _ in range(4):
        state, share = transition(rows, state, torch.tensor(beta), torch.tensor(step), 3)
        shares.append(float(share.mean()))
    white = torch.linalg.solve_triangular(
        posterior.scale_tril, (state.at - posterior.mean)[..., None], upper=False
    )[..., 0].detach()
    products = white[..., :, None] * white[..., None, :] - torch.eye(2)
    for moment in (white, products):
        error = moment.std(0) / math.sqrt(chains)
        assert bool((moment.mean(0).abs() < SIGMAS * error).all())
    assert (state.at - z).abs().mean() > 0.1
    assert (min(shares) > 0.9) == (step == 0.1)


def test_chains_reach_the_posterior():
    model, chains = LinearBatchModel(), 1000
    rows = Rows(Pair("", model, None, batch(3), "eager"), batch(3), chains, 0)
    state = rows(rows.start())
    for _ in range(30):
        state, _ = transition(rows, state, torch.tensor(1.0), torch.tensor(0.4), 5)
    exact = ExactGuide(model).posterior(data(3))
    error = state.at.std(0) / math.sqrt(chains)
    assert bool(((state.at.mean(0) - exact.mean).abs() < SIGMAS * error).all())
    torch.testing.assert_close(state.at.var(0), exact.variance.detach(), rtol=0.25, atol=0)


# ---------------------------------------------------------------------------------------------
# Paths


class Scalar(nn.Module):
    """z ~ N(0, 1), x ~ N(z, s): every density on the path is Gaussian."""

    scale = 0.2

    def forward(self, batch: Any) -> None:
        with pyro.plate("data", batch.size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, self.scale))

    def deviation(self, beta: Tensor, x: Tensor) -> Tensor:
        """Of log p(x | z) at each inverse temperature, pooled over rows."""
        precision = 1 + beta / self.scale**2
        variance, mean = 1 / precision, (beta / self.scale**2 / precision) * x[:, None]
        away = x[:, None] - mean
        each = (2 * variance**2 + 4 * variance * away**2) / (4 * self.scale**4)
        return each.mean(0).sqrt()


def test_temperatures_are_equal_steps_of_the_paths_length():
    model, x = Scalar(), data(200, 1)[:, 0]
    found = annealed(
        model, Batch({"x": x}), temperatures=10, **SHORT | {"pilot": 200, "leapfrog": 5}
    )
    grid = torch.linspace(0, 1, 20_001) ** 3
    leg = (model.deviation(grid[1:], x) + model.deviation(grid[:-1], x)) / 2 * grid.diff()
    assert found.path.length == pytest.approx(float(leg.sum()), rel=0.15)
    along = torch.cat([torch.zeros(1), leg.cumsum(0)]) / leg.sum()
    at = torch.searchsorted(grid, found.path.betas).clamp(max=20_000)
    torch.testing.assert_close(along[at], torch.linspace(0, 1, 11), atol=0.05, rtol=0)
    assert bool((found.path.steps[1:] < found.path.steps[:-1] * 1.2).all())  # narrower and narrower
    assert found.path.steps[0] > 2 * found.path.steps[-1]


def test_temperatures_can_be_given():
    betas = sigmoidal(6)
    torch.testing.assert_close(
        torch.tensor(betas),
        (torch.linspace(-4, 4, 7).sigmoid() - 1 / (1 + math.exp(4)))
        / (1 / (1 + math.exp(-4)) - 1 / (1 + math.exp(4))),
    )
    found = annealed(LinearBatchModel(), batch(), temperatures=betas, **SHORT)
    assert found.path.betas.tolist() == pytest.approx(betas)
    assert found.summary()["temperatures"] == 6


@pytest.mark.parametrize("acceptance", [0.4, 0.65, 0.9])
def test_steps_are_adapted_to_acceptance(acceptance: float):
    found = annealed(LinearBatchModel(), batch(32), acceptance=acceptance, temperatures=40, **SHORT)
    assert found.acceptance == pytest.approx(acceptance, abs=0.07)


# ---------------------------------------------------------------------------------------------
# What is frozen, and what is left as it was


def test_rows_beside_change_nothing():
    """Settings come from pilot rows alone, and each batch of rows has a seed of its own."""
    model, rows = LinearBatchModel(), batch(30)
    options: Any = {**SHORT, "pilot": Batch({"x": data(8, seed=9)}), "temperatures": 5}
    some = annealed(model, rows.rows(slice(0, 20)), batch_size=10, **options)
    every = annealed(model, rows, batch_size=10, **options)
    assert torch.equal(some.log_p, every.log_p[:20])
    assert torch.equal(some.path.betas, every.path.betas)
    assert not torch.equal(every.log_p[:10], every.log_p[10:20])
    more = annealed(model, rows, batch_size=10, **options | {"chains": 7})
    assert torch.equal(more.path.steps, every.path.steps)
    few, many = (
        annealed(model, rows, batch_size=10, **options | {"pilot": number, "temperatures": 1})
        for number in (2, 8)
    )
    assert torch.equal(few.log_p, many.log_p)  # whose chains are their starts alone


def test_a_seed_makes_the_numbers_and_nothing_is_left_of_it():
    model = LinearBatchModel()
    model.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    seen: list[bool] = []
    model.train()
    before, weights = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    first, again, other = (
        annealed(model, batch(), temperatures=3, seed=seed, **SHORT) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, model.parameters(), weights))
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert seen
    assert not any(seen)
    assert torch.equal(first.log_p, again.log_p)
    assert not torch.equal(first.log_p, other.log_p)


@pytest.mark.parametrize("case", ["from a guide", "missing entries that others depend on"])
def test_graphs_have_the_same_numbers(case: str):
    model, guide, rows, _ = CASES[case]()
    options = {"temperatures": 2, "leapfrog": 2, "pilot": 3, "chains": 3}
    eager, traced = (
        annealed(model, rows, guide, compile=level, **options) for level in ("eager", "traced")
    )
    torch.testing.assert_close(eager.log_p, traced.log_p)


def test_results_are_compared_by_row_and_told():
    model = LinearBatchModel()
    found = annealed(model, batch(20), temperatures=3, **SHORT)
    sampled = evaluate(model, broad(BatchGuide()), batch(20), 200)
    difference = found.versus(sampled)
    mean, error = mean_and_error(found.log_p - sampled.log_p)
    assert (difference.mean, difference.error) == (mean, error)
    s = found.summary()
    assert (s["rows"], s["chains"], s["leapfrog"], s["start"]) == (20, 4, 2, "prior")
    assert f"log p(x) >= {s['log_p']:.3f}" in str(found)
    both = bidirectional(model, batch(20), temperatures=3, **SHORT)
    assert f"gap {both.gap}" in str(both)
    with pytest.raises(ValueError, match="came 20 rows, wanted the same 10 rows"):
        annealed(model, batch(10), temperatures=1, **SHORT).versus(found)


# ---------------------------------------------------------------------------------------------
# Refusals


def moving(batch: Any) -> None:
    with pyro.plate("data", batch.size):
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Uniform(0.0, top.exp()))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([*z.shape, 3]).to_event(1))


def outside(batch: Any) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", batch.size):
        pyro.sample("x", dist.Normal(z[..., None].expand(3), 1.0).to_event(1))


def without_latents(batch: Any) -> None:
    with pyro.plate("data", batch.size):
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def positive_parent(batch: Any) -> None:
    with pyro.plate("data", batch.size):
        x = pyro.sample("x", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(-1), 1.0))


def auto(kind: Any) -> Any:
    """An autoguide, which has auxiliary sites or points."""
    guide = kind(LinearModel())
    guide(data(2))
    return guide


ROW = torch.tensor([True, False, False])[None].expand(6, 3)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "discrete": (
        lambda: annealed(DiscreteModel(), data(6)),
        "annealed: site 'y' is a discrete latent .Categorical.",
    ),
    "discrete in the guide": (
        lambda: annealed(DiscreteModel(), data(6), DiscreteGuide()),
        "site 'y' is a discrete latent",
    ),
    "bounds that move": (
        lambda: annealed(moving, batch()),
        "site 'z' is a latent whose support .Uniform. is not all real and moves",
    ),
    "constrained and data in part": (
        lambda: annealed(
            positive_parent, Batch({"x": data(6).exp(), "y": data(6)[:, 0]}).hide("x", ROW)
        ),
        "site 'x' is a latent whose support .LogNormal. is not all real and is data in part",
    ),
    "outside": (lambda: annealed(outside, batch()), r"sites \['z'\] lie outside the plate"),
    "no latents": (lambda: annealed(without_latents, batch()), "no density of the data depends"),
    "guide with other latents": (
        lambda: annealed(LinearLadder(), data(6), ExactGuide(LinearModel(), 2.0)),
        "the guide",
    ),
    "guide that lacks latents": (
        lambda: annealed(LinearBatchModel(), batch(), lambda batch: None),
        r"the guide does not draw \['z'\]; start from the prior",
    ),
    "scaled": (
        lambda: annealed(ScaledLatent(LinearModel(), {"z": 0.5}), data(6)),
        "site 'z' is a latent whose density poutine.scale weighs",
    ),
    "auxiliary": (
        lambda: annealed(LinearModel(), data(2), auto(AutoMultivariateNormal)),
        "the guide has an auxiliary site '_AutoMultivariateNormal_latent'",
    ),
    "point mass": (
        lambda: annealed(LinearModel(), data(2), auto(AutoDelta)),
        "point mass",
    ),
    "no inverse": (
        lambda: annealed(LinearModel(), data(6), FlowGuide(lambda: flows.planar(2))),
        "the guide knows the density of its own draws alone",
    ),
    "rows": (lambda: annealed(LinearModel(), data(0)), "data came without rows"),
    "chains": (lambda: annealed(LinearModel(), data(6), chains=0), "came chains=0"),
    "acceptance": (lambda: annealed(LinearModel(), data(6), acceptance=1.0), "acceptance=1.0"),
    "temperatures": (lambda: annealed(LinearModel(), data(6), temperatures=0), "temperatures=0"),
    "falling temperatures": (
        lambda: annealed(LinearModel(), data(6), temperatures=[0.0, 0.7, 0.5, 1.0]),
        "rise from 0 to 1",
    ),
    "no temperature of 0": (
        lambda: annealed(LinearModel(), data(6), temperatures=[0.1, 1.0]),
        "rise from 0 to 1",
    ),
    "pilot": (lambda: annealed(LinearModel(), data(6), pilot=data(0)), "pilot came without rows"),
    "tensor to be like": (
        lambda: bidirectional(LinearModel(), data(6)),  # type: ignore[arg-type]
        "data came as Tensor, wanted a Batch",
    ),
    "obs": (
        lambda: bidirectional(lambda batch: LinearModel()(batch["x"]), batch()),
        "site 'x': the model gives obs= or a factor by itself",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str):
    call, words = REFUSED[case]
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
