"""Evaluation against known evidences: bounds, their errors, and what they leave untouched."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as flows
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.batch import Batch, Observed
from pyro_vae.evaluation import Evaluation, evaluate, likelihood
from pyro_vae.evaluation.diagnostics import pareto_khat, tail_length
from pyro_vae.evaluation.likelihood import mean_and_error
from tests.exact_pairs import (
    SIGMAS,
    BatchGuide,
    DiscreteGuide,
    DiscreteModel,
    ExactGuide,
    LinearBatchModel,
    broad,
    exact_pair,
    linear_elbo,
)
from tests.small_pairs import (
    X_DIM,
    Z_DIM,
    FlowGuide,
    Guide,
    LinearModel,
    PyroParamGuide,
    as_functions,
    batch_norm,
    data,
)

NAN = math.nan


def exact_pair_and_data(kind: str) -> tuple[Any, Any, Any, Tensor]:
    """Model, exact guide, data as the programs take them, log p(x)."""
    x = data(7)
    if kind == "Batch":
        model = LinearBatchModel()
        return model, ExactGuide(model), Batch({"x": x}), model.evidence(x).detach()
    model, guide = exact_pair(kind)
    return model, guide, x, model.evidence(x).detach()


# ---------------------------------------------------------------------------------------------
# Exact posteriors


@pytest.mark.parametrize("batch_size", [1, 2, 100])
@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize("kind", ["one layer", "two layers", "Batch"])
def test_an_exact_posterior_has_no_slack(kind: str, chunk: int | None, batch_size: int):
    """All rows in their order, whatever the batches; nothing is left of the draws."""
    model, guide, x, exact = exact_pair_and_data(kind)
    e = evaluate(model, guide, x, 40, widen=False, chunk=chunk, batch_size=batch_size)
    torch.testing.assert_close(e.log_p, exact)
    torch.testing.assert_close(e.log_p_tenth, exact)
    torch.testing.assert_close(e.ess, torch.full_like(exact, 40))
    assert bool((e.khat == -math.inf).all())
    assert e.proposals == ("not widened",)


def test_a_model_without_latents_is_exact():
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(0.5, 2.0).expand([X_DIM]).to_event(1), obs=x)

    x = data(4)
    e = evaluate(Plain(), lambda x: None, x, 10)
    exact = dist.Normal(0.5, 2.0).log_prob(x).sum(-1)
    torch.testing.assert_close(e.log_p, exact)
    torch.testing.assert_close(e.elbo, exact)
    assert (e.rate, e.active) == ({}, {})
    assert "log p(x) >=" in str(e)


# ---------------------------------------------------------------------------------------------
# Bounds


def assert_bounds(e: Evaluation, exact: Tensor) -> None:
    """E[exp log_p] is p(x), log p_tenth <= log p <= log p(x) in expectation; rows are copies."""
    exact = exact.detach()
    for bound in (e.log_p, e.log_p_tenth):
        ratio = (bound.reshape(-1, len(exact)) - exact).exp()
        errors = ratio.std(0) / math.sqrt(len(ratio))
        assert bool((errors < 0.15).all()), f"too noisy to tell: {errors}"
        assert bool(((ratio.mean(0) - 1).abs() <= SIGMAS * errors + 1e-9).all()), ratio.mean(0)
    for low, high in ((e.elbo, e.log_p_tenth), (e.log_p_tenth, e.log_p)):
        mean, error = mean_and_error(low - high)
        assert mean <= SIGMAS * error
    many = exact.repeat(len(e.log_p) // len(exact))
    mean, error = mean_and_error(e.log_p - many)
    assert mean <= SIGMAS * error


PAIRS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "diagonal": lambda: (LinearModel(), Guide()),
    "flow": lambda: (LinearModel(), FlowGuide(lambda: flows.affine_coupling(2, [4]))),
    "full covariance, too narrow": lambda: narrow(0.6),
    "discrete": lambda: (DiscreteModel(), DiscreteGuide(sharpness=8.0)),
}


def narrow(scale: float) -> tuple[Any, Any]:
    model = LinearModel()
    return model, ExactGuide(model, scale)


@pytest.mark.parametrize("pair", PAIRS)
def test_bounds(pair: str):
    model, guide = PAIRS[pair]()
    x = 0.5 * data(3)
    e = evaluate(model, guide, x.repeat(500, 1), 60, batch_size=400)
    assert e.proposals != ("not widened",)
    assert_bounds(e, model.evidence(x))


def test_elbo_and_rates():
    model, guide, x = LinearModel(), Guide(), data(5)
    elbo, kl = linear_elbo(model, guide, x)
    e = evaluate(model, guide, x.repeat(200, 1), 50)
    rows = e.elbo.reshape(200, 5)
    error = rows.std(0) / math.sqrt(200)
    assert bool(((rows.mean(0) - elbo.detach()).abs() < SIGMAS * error).all())
    torch.testing.assert_close(e.rate["z"], kl.mean(0).detach())
    variance = guide.posterior(x).mean.var(0, unbiased=False)
    assert e.active["z"].tolist() == (variance > 0.01).tolist()


def test_widening_helps_a_guide_that_is_too_narrow():
    model, guide = narrow(0.5)
    x = data(300)
    plain = evaluate(model, guide, x, 300, widen=False)
    wide = evaluate(model, guide, x, 300)
    assert wide.proposals == ("widened x2",)
    torch.testing.assert_close(wide.log_p, model.evidence(x).detach())  # 0.5 x 2 is exact
    assert float(plain.khat.median()) > 0.5
    assert wide.versus(plain).mean > 0


class HalfNarrow(ExactGuide):
    """Exact for the rows whose first entry is positive, half as wide for the others."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            q = self.posterior(x)
            scale = torch.where(x[:, 0] > 0, 1.0, 0.5)[:, None, None]
            pyro.sample("z", dist.MultivariateNormal(q.mean, scale_tril=scale * q.scale_tril))


def test_each_half_of_the_rows_is_widened_as_suits_the_other():
    """Rows that choose their own proposal would profit from their luck."""
    model = LinearModel(z_dim=8)
    x = data(100)
    x[:, 0] = x[:, 0].abs() * torch.tensor([1.0, -1.0]).repeat(50)  # even rows need no widening
    e = evaluate(model, HalfNarrow(model), x, 50)
    for_even, for_odd = e.proposals
    assert for_even in ("widened x2", "widened x3")
    assert for_odd in ("not widened", "widened x1.25", "widened x1.5")


class SureGuide(nn.Module):
    """Certain of one class, whatever the data."""

    def forward(self, x: Tensor) -> None:
        logits = torch.tensor([12.0, 0.0, 0.0]).expand(len(x), 3)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits))


def test_a_defensive_mixture_finds_what_a_discrete_guide_denies():
    model = DiscreteModel()
    x = model.loc.detach()[torch.arange(60) % 3]
    exact = model.evidence(x).detach()
    plain = evaluate(model, SureGuide(), x, 500, widen=False)
    mixed = evaluate(model, SureGuide(), x, 500)
    assert all("prior" in proposal for proposal in mixed.proposals)
    mean, error = mean_and_error(exact - mixed.log_p)
    assert abs(mean) < SIGMAS * error < 0.2
    assert mean_and_error(exact - plain.log_p)[0] > 1


def test_a_mixed_proposal_of_a_hierarchy_of_discrete_latents():
    """By enumeration, with particles one by one as well."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", dist.Bernoulli(0.3))
                b = pyro.sample("b", dist.Bernoulli(0.2 + 0.6 * a))
                pyro.sample("x", dist.Normal(a + 2 * b, 1.0), obs=x)

    class Backward(nn.Module):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                b = pyro.sample("b", dist.Bernoulli(torch.full((len(x),), 0.02)))
                pyro.sample("a", dist.Bernoulli(0.1 + 0.5 * b))

    x = torch.tensor([0.2, 1.5, 2.7])
    joint = [
        math.log((0.3 if a else 0.7) * (p if b else 1 - p))
        + dist.Normal(a + 2.0 * b, 1).log_prob(x)
        for a in (0, 1)
        for b in (0, 1)
        for p in (0.2 + 0.6 * a,)
    ]
    exact = torch.logsumexp(torch.stack(joint), 0)
    for chunk in (None, 1):
        e = evaluate(Model(), Backward(), x.repeat(400, 1).T.reshape(-1), 30, chunk=chunk)
        assert "prior" in e.proposals[0]
        ratio = (e.log_p.reshape(3, 400) - exact[:, None]).exp()
        error = ratio.std(1) / math.sqrt(400)
        assert bool(((ratio.mean(1) - 1).abs() < SIGMAS * error).all())


# ---------------------------------------------------------------------------------------------
# Missing data


@pytest.mark.parametrize("absent", [False, True], ids=["missing", "absent"])
def test_missing_entries_do_not_count(absent: bool):
    x = data(4)
    mask = torch.ones(4, X_DIM, dtype=torch.bool)
    if absent:
        mask[:] = False
    else:
        mask[1, 0] = mask[2, 1:] = mask[3] = False
    model, guide = LinearBatchModel(), broad(BatchGuide())
    rows = Batch({"x": torch.where(mask, x, NAN)})
    many = rows.rows(torch.arange(4).repeat(400))
    e = evaluate(model, guide, many, 60)
    assert_bounds(e, model.marginal(x, mask))


class TwoSites(nn.Module):
    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))
            pyro.sample("y", dist.Normal(2 * z, 1.0))


class FirstSite(nn.Module):
    """The exact posterior given x alone."""

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", dist.Normal(batch["x"] / 2, math.sqrt(0.5)))


@pytest.mark.parametrize("how", ["absent", "all missing"])
def test_an_absent_modality_is_one_that_is_missing_everywhere(how: str):
    x, y = data(6, 2).unbind(1)
    batch = Batch({"x": x, "y": y})
    batch = batch.without("y") if how == "absent" else batch.hide("y", True)
    e = evaluate(TwoSites(), FirstSite(), batch, 30, widen=False)
    torch.testing.assert_close(e.log_p, dist.Normal(0.0, math.sqrt(2)).log_prob(x))
    assert bool((e.khat == -math.inf).all())


# ---------------------------------------------------------------------------------------------
# Streaming


class Table:
    """Log weights that are known."""

    def __init__(self, log_w: Tensor) -> None:
        self.log_w, self.done = log_w, 0

    def __call__(self, batch: Any, size: int) -> Tensor:
        self.done += size
        return self.log_w[self.done - size : self.done]


def stream(log_w: Tensor, chunk: int) -> tuple[Tensor, ...]:
    return likelihood._stream(Table(log_w), None, len(log_w), chunk)


@pytest.mark.parametrize("num_particles", [1, 9, 10, 137, 1000])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_streaming_in_chunks_changes_nothing(num_particles: int, scale: float):
    log_w = scale * torch.randn(num_particles, 5) - 1000
    tenth = log_w[: max(1, num_particles // 10)]
    wanted = (
        torch.logsumexp(log_w, 0) - math.log(num_particles),
        torch.logsumexp(tenth, 0) - math.log(len(tenth)),
        1 / torch.softmax(log_w, 0).square().sum(0),
        pareto_khat(log_w.topk(min(num_particles, tail_length(num_particles) + 1), 0)[0]),
    )
    for chunk in (1, 7, 100, 5000):
        for came, exact in zip(stream(log_w, chunk), wanted, strict=True):
            torch.testing.assert_close(came, exact, atol=1e-10, rtol=1e-10)


def test_impossible_rows():
    """log p of a row that no particle explains is -inf, and says that it cannot be trusted."""
    log_w = torch.randn(200, 2)
    log_w[:, 0] = -math.inf
    log_p, tenth, _, khat = stream(log_w, 30)
    assert (float(log_p[0]), float(tenth[0]), float(khat[0])) == (-math.inf, -math.inf, math.inf)
    assert math.isfinite(float(log_p[1]))


class RowsOnly(nn.Linear):
    """A layer that takes ``[B, *]`` and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 2
        return super().forward(x)


def test_particles_one_by_one_for_networks_that_take_no_more():
    model, guide = LinearModel(), Guide()
    model.net = RowsOnly(Z_DIM, X_DIM)
    e = evaluate(model, guide, data(5), 30, chunk=1)
    assert e.log_p.shape == (5,)
    with pytest.raises(AssertionError):
        evaluate(model, guide, data(5), 30)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, Iterable) and not isinstance(out, Tensor) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_memory_does_not_grow_with_the_number_of_particles():
    model, guide, x = LinearModel(), Guide(), data(20)
    sizes = []
    for num_particles in (400, 4000):
        with Largest() as largest:
            evaluate(model, guide, x, num_particles, chunk=100, widen=False)
        sizes.append(largest.numel)
    assert sizes[0] == sizes[1]


# ---------------------------------------------------------------------------------------------
# What is left untouched


class Busy(nn.Module):
    """Dropout, running statistics, and a buffer that moves in evaluation too."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(batch_norm(), nn.Dropout(0.5))
        self.frozen = nn.Dropout().eval()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.frozen(self.net(x))


def everything(model: nn.Module, guide: nn.Module) -> list[Any]:
    modules = [*model.modules(), *guide.modules()]
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(np.random.get_state()),
        [part.training for part in modules],
        [(name, t.tolist()) for m in (model, guide) for name, t in m.state_dict().items()],
        [p.grad for p in model.parameters()],
        list(pyro.get_param_store().keys()),
        torch.is_grad_enabled(),
        torch.distributions.Distribution._validate_args,
    ]


def test_nothing_is_left_behind():
    model, guide = LinearModel(), Guide(Busy())
    before = everything(model, guide)
    evaluate(model, guide, data(6), 20)
    assert everything(model, guide) == before
    with pytest.raises(ValueError, match="rows"):
        evaluate(model, guide, data(6)[:0], 20)
    with pytest.raises(RuntimeError):
        evaluate(model, guide, data(6, X_DIM + 1), 20)
    assert everything(model, guide) == before


def test_dropout_is_off():
    net = nn.Sequential(nn.Linear(X_DIM, 2 * Z_DIM), nn.Dropout(0.5))
    model, guide, bare, x = LinearModel(), Guide(net), Guide(net[0]), data(6)
    torch.testing.assert_close(
        evaluate(model, guide, x, 20).log_p, evaluate(model, bare, x, 20).log_p
    )


def noisy_pair() -> tuple[Any, Any]:
    """Dropout in the decoder, running statistics in the encoder, which are not those of the data."""
    torch.manual_seed(0)
    model, guide = LinearModel(), Guide(batch_norm())
    model.net = nn.Sequential(model.net, nn.Dropout(0.5))  # type: ignore[assignment]
    guide.net(data(50, seed=7) + 0.3)
    return model, guide


def test_functions_are_judged_as_the_modules_that_they_call():
    x, pair = data(6), noisy_pair()
    wanted = evaluate(*pair, x, 20, seed=3)
    functions, before = as_functions(*pair), everything(*pair)
    names = ["guide$$$net.0.bias", "guide$$$net.0.weight", "guide$$$net.3.bias"]
    found = evaluate(*functions, x, 20, seed=3)
    assert torch.equal(found.log_p, wanted.log_p)
    assert torch.equal(found.elbo, wanted.elbo)
    assert set(names) < set(pyro.get_param_store().keys())
    pyro.clear_param_store()
    assert everything(*pair) == before


def test_numbers_depend_on_the_seed_alone():
    model, guide, x = LinearModel(), Guide(), data(6)
    first = evaluate(model, guide, x, 20, seed=3)
    torch.randn(5)
    again, other = evaluate(model, guide, x, 20, seed=3), evaluate(model, guide, x, 20, seed=4)
    assert torch.equal(first.log_p, again.log_p)
    assert not torch.equal(first.log_p, other.log_p)
    assert (first.seed, other.seed) == (3, 4)


def test_pairs_do_not_share_their_parameters():
    """Pyro's store would put the first guide's parameters into the second."""
    x, pairs = data(6), [(LinearModel(), PyroParamGuide()) for _ in range(2)]
    alone = evaluate(*pairs[1], x, 20).log_p
    weight = pairs[1][1].weight.detach().clone()
    pyro.clear_param_store()
    evaluate(*pairs[0], x, 20)
    assert torch.equal(evaluate(*pairs[1], x, 20).log_p, alone)
    assert torch.equal(pairs[1][1].weight, weight)
    assert list(pyro.get_param_store().keys()) == []


def test_functions_find_their_parameters_in_the_store():
    x = data(5)[:, 0]

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = (x + pyro.param("loc", torch.tensor(0.0))) / 2
            pyro.sample("z", dist.Normal(loc, pyro.param("scale", torch.tensor(1.0))))

    pyro.param("loc", torch.tensor(1.5))
    pyro.param("scale", torch.tensor(math.sqrt(0.5)))
    e = evaluate(model, guide, x, 20, widen=False)
    torch.testing.assert_close(e.log_p, dist.Normal(1.5, math.sqrt(2)).log_prob(x))


# ---------------------------------------------------------------------------------------------
# Refusals


class GlobalModel(nn.Module):
    def forward(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0).expand([X_DIM]).to_event(1), obs=x)


class GlobalGuide(nn.Module):
    def forward(self, x: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))


class PointGuide(nn.Module):
    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x[:, :Z_DIM]).to_event(1))


class PointBesideAuxiliary(nn.Module):
    """An auxiliary site does not make the point beside it a density."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(x[:, :Z_DIM]).to_event(1))


class SubsampledEntries(nn.Module):
    """Sees one entry of a row at a time: p(x)'s estimate is right, that of log p(x) is not."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("entries", X_DIM, subsample_size=1, dim=-1) as i:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, i])


class EntriesGuide(nn.Module):
    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 1.0))


REFUSED: dict[str, tuple[Callable[[Any], Any], Any, str]] = {
    "subsampled entries": (
        *(lambda model: EntriesGuide(), SubsampledEntries),
        r"plates \['entries'\].*no bound",
    ),
    "point": (lambda model: PointGuide(), LinearModel, "'z' has a point mass"),
    "AutoDelta": (AutoDelta, LinearModel, "'z' has a point mass"),
    "point beside a draw": (
        *(lambda model: PointBesideAuxiliary(), LinearModel),
        "'z' has a point mass",
    ),
    "global latent": (lambda model: GlobalGuide(), GlobalModel, "'w'.*outside the plate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_pairs_without_importance_weights(case: str):
    guide, model, message = REFUSED[case]
    program = model()
    with pytest.raises(ValueError, match=message):
        evaluate(program, guide(program), data(4))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (data(4)[:0], "without rows"),
        (Batch({"x": data(4)[:0]}), "without rows"),
        (torch.tensor(1.0), "single number"),
        (np.zeros((4, 3)), "ndarray, wanted a Batch"),
    ],
    ids=["no rows", "empty batch", "number", "array"],
)
def test_data_that_cannot_be_judged(x: Any, message: str):
    with pytest.raises(ValueError, match=message):
        evaluate(LinearModel(), Guide(), x)


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_particles", 0), ("num_particles", 1e3), ("batch_size", -1), ("chunk", 0)],
)
def test_bad_numbers(option: str, value: Any):
    with pytest.raises(ValueError, match=f"{option}={value}"):
        evaluate(LinearModel(), Guide(), data(4), **{option: value})


class RowModel(nn.Module):
    """A program whose autoguide has parameters of its own for every row."""

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", batch.total, subsample=batch.index, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1))


def test_an_autoguide_is_no_point():
    model, batch = RowModel(), Batch({"x": data(8, 1)})

    def plates(batch: Batch) -> Any:
        return pyro.plate("data", batch.total, subsample=batch.index, dim=-1)

    guide = AutoNormal(Observed(model), init_scale=math.sqrt(0.5), create_plates=plates)
    guide(batch)
    with torch.no_grad():
        guide.locs.z_unconstrained.copy_(batch["x"] / 2)
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(batch["x"][:, 0])
    e = evaluate(model, guide, batch, 20, batch_size=3, widen=False)
    torch.testing.assert_close(e.log_p, exact)


# ---------------------------------------------------------------------------------------------
# Results


def test_mean_and_error():
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 4.0]))
    assert mean == pytest.approx(7 / 3)
    assert error == pytest.approx(math.sqrt(7 / 3 / 3))
    assert math.isnan(mean_and_error(torch.ones(1))[1])


def test_paired_differences_have_a_smaller_error():
    model, guide, x = LinearModel(), Guide(), 3 * data(100)
    good = evaluate(model, ExactGuide(model), x, 50)
    bad = evaluate(model, guide, x, 50)
    difference = good.versus(bad)
    rows = good.log_p - bad.log_p
    assert difference.mean == pytest.approx(float(rows.mean()))
    assert difference.error == pytest.approx(float(rows.std()) / 10)
    assert difference.error < 0.5 * mean_and_error(good.log_p)[1]
    assert good.versus(bad, "elbo").mean == pytest.approx(float((good.elbo - bad.elbo).mean()))
    assert str(difference).startswith("+")
    with pytest.raises(ValueError, match=r"50 rows.*same 100"):
        good.versus(evaluate(model, guide, x[:50], 50))


def test_arrays_keep_everything():
    model, guide = exact_pair("two layers")
    e = evaluate(model, guide, data(6), 20, seed=5)
    assert e.notes or e.rate  # there is something to keep
    file = io.BytesIO()
    np.savez(file, **e.arrays())
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        again = Evaluation.from_arrays(arrays)
    for name, value in vars(e).items():
        came = getattr(again, name)
        if isinstance(value, dict):
            assert list(came) == list(value)
            assert all(torch.equal(came[site], value[site]) for site in value)
            assert all(came[site].dtype == value[site].dtype for site in value)
        elif isinstance(value, Tensor):
            assert torch.equal(came, value)
        else:
            assert came == value


def test_summary():
    model, guide, x = LinearModel(), Guide(), data(30)
    e = evaluate(model, guide, x, 100)
    summary = e.summary()
    assert (summary["rows"], summary["num_particles"], summary["seed"]) == (30, 100, 0)
    assert summary["log_p"] == pytest.approx(float(e.log_p.mean()))
    assert summary["log_p_se"] == pytest.approx(float(e.log_p.std()) / math.sqrt(30))
    assert summary["rate"]["z"] == pytest.approx(sum(summary["rate_per_dim"]["z"]))
    assert summary["latent_dims"] == {"z": Z_DIM}
    assert summary["khat_bad_share"] == pytest.approx(float((e.khat > 0.5).double().mean()))
    text = str(e)
    for part in ("log p(x) >=", "±", "K = 100", "30 rows", "K / 10", "seed 0", "active units"):
        assert part in text


@pytest.mark.parametrize("num_particles", [1, 5, 20])
def test_khat_is_not_told_where_there_are_too_few_particles(num_particles: int):
    e = evaluate(LinearModel(), Guide(), data(6), num_particles)
    summary = e.summary()
    for name in ("khat_median", "khat_threshold", "khat_bad_share"):
        assert summary[name] is None
    assert "k-hat: K too small" in str(e)
    assert "inf" not in str(e)


@pytest.mark.parametrize("batch_size", [7, 100])
def test_rate_and_distortion_row_by_row(batch_size: int):
    """Against the KL and the ELBO of a linear pair."""
    model, guide, x = LinearModel(), Guide(), data(30)
    elbo, per_dim = (each.detach() for each in linear_elbo(model, guide, x))
    rate = per_dim.sum(1)
    e = evaluate(model, guide, x, 20, batch_size=batch_size)
    assert e.rate_rows is not None
    torch.testing.assert_close(e.rate_rows, rate)
    summary = e.summary()
    assert summary["rate"]["z"] == pytest.approx(float(rate.mean()))
    assert summary["rate_se"] == pytest.approx(float(rate.std()) / math.sqrt(30))
    distortion = -(e.elbo + rate)
    assert summary["distortion"] == pytest.approx(float(distortion.mean()))
    assert summary["distortion_se"] == pytest.approx(float(distortion.std()) / math.sqrt(30))
    off, error = mean_and_error(distortion + elbo + rate)
    assert abs(off) < SIGMAS * error


def test_the_rate_of_a_row_is_that_of_all_sites():
    model, guide = exact_pair("two layers")
    e = evaluate(model, guide, data(30), 20)
    assert len(e.rate) == 2
    assert e.rate_rows is not None
    total = sum(float(rate.sum()) for rate in e.rate.values())
    assert float(e.rate_rows.mean()) == pytest.approx(total)


def test_results_that_were_saved_without_a_rate_per_row():
    model, guide = LinearModel(), Guide()
    e = evaluate(model, guide, data(6), 20)
    old = {name: value for name, value in e.arrays().items() if name != "rate_rows"}
    again = Evaluation.from_arrays(old)
    assert again.rate_rows is None
    new = {"rate_se", "distortion", "distortion_se"}
    assert again.summary() == {k: v for k, v in e.summary().items() if k not in new}


def test_a_single_row():
    model, guide, x = LinearModel(), Guide(), data(1)
    e = evaluate(model, guide, x, 50)
    assert e.proposals == ("not widened",)  # there is no other row to choose by
    assert e.log_p.shape == (1,)
    assert "nan" in str(e)


@pytest.mark.parametrize("num_particles", [1, 10, 50])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_exact_is_not_widened(num_particles: int, seed: int):
    """The choice is made at K particles, and not from noise: a widening of no use does harm."""
    model = LinearModel()
    e = evaluate(model, ExactGuide(model), data(200), num_particles, seed=seed)
    assert e.proposals == ("not widened",)
    torch.testing.assert_close(e.log_p, model.evidence(data(200)))
