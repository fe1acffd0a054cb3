"""Proposals: whatever is drawn from, the mean importance weight is p(x)."""

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
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.evaluation.proposals import SCALES, SHARES, Proposal, candidates, widened
from pyro_vae.objectives.particles import run
from pyro_vae.objectives.plan import make_plan
from tests.exact_pairs import (
    SIGMAS,
    DiscreteGuide,
    DiscreteModel,
    ExactGuide,
    LinearLadder,
    broad,
)
from tests.small_pairs import BottomUp, FlowGuide, Guide, LinearModel, Program, TopDown, data

COPIES = 10_000


def log_weights(
    proposal: Proposal, model: Program, guide: Program, x: Any, size: int = 1
) -> Tensor:
    """``[size, B]``"""
    plan = make_plan(model, guide, (x,), {})
    with torch.no_grad(), pyro.validation_enabled(False):
        return proposal.log_weights(model, guide, (x,), plan, size)


def proposals(model: Program, guide: Program, x: Any) -> tuple[Proposal, ...]:
    """What an evaluation would choose from."""
    plan = make_plan(model, guide, (x,), {})
    table = run(model, guide, (x,), {}, plan, 1)
    return candidates(table.guide, table.model)


def assert_evidence(log_w: Tensor, exact: Tensor) -> None:
    """The weights of many copies of each row have the mean p(x), and the mean log weight is less."""
    log_ratio = log_w.reshape(-1, len(exact)) - exact.detach()
    ratio = log_ratio.exp()
    error = ratio.std(0) / math.sqrt(len(ratio))
    assert bool((error < 0.15).all()), f"too noisy to tell: {error}"
    assert bool(((ratio.mean(0) - 1).abs() <= SIGMAS * error + 1e-9).all()), ratio.mean(0)
    error = log_ratio.std(0) / math.sqrt(len(log_ratio))
    assert bool((log_ratio.mean(0) <= SIGMAS * error + 1e-9).all())


# ---------------------------------------------------------------------------------------------
# One distribution


LOC = torch.tensor([0.5, -1.0], dtype=torch.float64)
TRIL = torch.tensor([[1.0, 0.0], [0.4, 0.7]], dtype=torch.float64)
MASK = torch.tensor([True, False])
GAUSSIANS = {
    "Normal": dist.Normal(LOC, 0.3),
    "event": dist.Normal(LOC, 0.3).to_event(1),
    "masked": dist.Normal(LOC, 0.3).mask(MASK),
    "masked event": dist.Normal(LOC.expand(2, 2), 0.3).to_event(1).mask(MASK),
    "full covariance": dist.MultivariateNormal(LOC, scale_tril=TRIL),
    "expanded full covariance": dist.MultivariateNormal(LOC, scale_tril=TRIL).expand([4]),
}


@pytest.mark.parametrize("kind", GAUSSIANS)
def test_widening_multiplies_the_scale_about_the_mean(kind: str):
    fn, wide = GAUSSIANS[kind], widened(GAUSSIANS[kind], 3.0)
    assert (wide.batch_shape, wide.event_shape) == (fn.batch_shape, fn.event_shape)
    torch.testing.assert_close(wide.mean, fn.mean)
    torch.testing.assert_close(wide.variance, 9 * fn.variance)
    step = torch.randn(fn.shape())
    shift = fn.event_shape.numel() * math.log(3.0)
    if "masked" in kind:
        shift = MASK * shift
    exact = fn.log_prob(fn.mean + step) - shift
    torch.testing.assert_close(wide.log_prob(fn.mean + 3 * step), exact)


def test_widening_a_flow_widens_its_base():
    spline = flows.spline(2, count_bins=4)
    fn = dist.TransformedDistribution(dist.Normal(LOC, 0.3).to_event(1), [spline])
    wide = widened(fn, 2.0)
    z = LOC + 0.1 * torch.randn(2)
    base = dist.Normal(LOC, 0.6).to_event(1)
    exact = base.log_prob(z) - spline.log_abs_det_jacobian(z, spline(z)).sum(-1)
    torch.testing.assert_close(wide.log_prob(spline(z)), exact)


@pytest.mark.parametrize(
    "fn",
    [
        dist.Categorical(torch.ones(3)),
        dist.Laplace(0.0, 1.0),
        dist.Uniform(torch.zeros(2), 1.0).to_event(1),
        dist.Delta(torch.zeros(2)),
        dist.FoldedDistribution(dist.Normal(0.0, 1.0)),  # a density of its own over a Gaussian
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_nothing_else_has_a_scale_to_widen(fn: Any):
    assert widened(fn, 2.0) is None


# ---------------------------------------------------------------------------------------------
# What a pair can be judged by


class UniformGuide(nn.Module):
    """No Gaussian, a narrow support, perhaps pushed through a flow that has no inverse."""

    def __init__(self, flow: Any = None) -> None:
        super().__init__()
        self.flows = nn.ModuleList([flow] if flow else [])

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            fn = dist.Laplace(torch.zeros(len(x), 2), 1.5).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(fn, list(self.flows)))


class PointGuide(nn.Module):
    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x[:, :2]).to_event(1))


SCALED = tuple(Proposal(scale=s) for s in SCALES)
MIXED = tuple(Proposal(prior_share=s) for s in SHARES)
KINDS: dict[str, tuple[Callable[[], tuple[Any, Any]], tuple[Proposal, ...]]] = {
    "diagonal": (lambda: (LinearModel(), Guide()), SCALED),
    "flow": (lambda: (LinearModel(), FlowGuide(lambda: flows.spline(2, count_bins=4))), SCALED),
    "flow without inverse": (
        lambda: (LinearModel(), FlowGuide(lambda: flows.planar(2))),
        SCALED,
    ),
    "not Gaussian": (lambda: (LinearModel(), UniformGuide()), MIXED),
    "not Gaussian, flow without inverse": (
        lambda: (LinearModel(), UniformGuide(flows.planar(2))),
        (Proposal(),),
    ),
    "discrete": (lambda: (DiscreteModel(), DiscreteGuide()), MIXED),
    "point": (lambda: (LinearModel(), PointGuide()), (Proposal(),)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_candidates(kind: str):
    make, wanted = KINDS[kind]
    model, guide = make()
    assert proposals(model, guide, data(4)) == wanted


def test_names():
    assert str(Proposal()) == "not widened"
    assert str(Proposal(scale=1.25)) == "widened x1.25"
    assert str(Proposal(prior_share=0.05)) == "mixed with 5% prior"


# ---------------------------------------------------------------------------------------------
# The mean weight is p(x)


def full_covariance() -> tuple[Any, Program]:
    model = LinearModel()
    return model, ExactGuide(model, scale=0.9)


def flow(name: str) -> Any:
    make = {"spline": partial(flows.spline, 2, count_bins=4), "planar": partial(flows.planar, 2)}
    return broad(FlowGuide(make[name]))


EVIDENCE: dict[str, Any] = {
    "diagonal": lambda: (LinearModel(), broad(Guide())),
    "full covariance": full_covariance,
    "spline flow": lambda: (LinearModel(), flow("spline")),
    "planar flow": lambda: (LinearModel(), flow("planar")),
    "bottom-up": lambda: (LinearLadder(), broad(BottomUp())),
    "top-down": lambda: (LinearLadder(), broad(TopDown())),
    "discrete": lambda: (DiscreteModel(), DiscreteGuide(sharpness=3.0)),
    "not Gaussian": lambda: (LinearModel(), UniformGuide()),
}


@pytest.mark.parametrize("size", [1, 3], ids="particles {}".format)
@pytest.mark.parametrize("kind", EVIDENCE)
def test_every_proposal_is_unbiased(kind: str, size: int):
    model, guide = EVIDENCE[kind]()
    x = 0.7 * data(3)
    many = x.repeat(COPIES, 1)
    options = proposals(model, guide, x)
    assert len(options) > 1
    for proposal in options:
        assert_evidence(log_weights(proposal, model, guide, many, size), model.evidence(x))


class SureGuide(nn.Module):
    """All but certain of one class, which need not be right."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            logits = torch.tensor([30.0, 0.0, 0.0]).expand(len(x), 3)
            pyro.sample("y", dist.Categorical(logits=logits))


@pytest.mark.parametrize("size", [1, 300])
def test_a_mixture_is_one_in_chunks_of_any_size(size: int):
    """A share of 5% is one particle in twenty, also where particles come one by one."""
    model, x, proposal = DiscreteModel(), torch.zeros(2, 3), Proposal(prior_share=0.05)
    model.logits.data.zero_()
    chunks = [log_weights(proposal, model, SureGuide(), x, size) for _ in range(600 // size)]
    log_w = torch.cat(chunks)
    seen = {round(w, 6) for w in log_w[:, 0].tolist()}
    assert len(seen) == 3  # classes that the guide by itself would never propose
    joint = dist.Normal(model.loc, 1.0).to_event(1).log_prob(x[0]) + model.logits.log_softmax(-1)
    prior = model.logits.softmax(-1)
    mixture = 0.05 * prior + 0.95 * torch.tensor([1.0, 0.0, 0.0])
    exact = {round(w, 6) for w in (joint - mixture.log()).tolist()}
    assert seen == exact


class WithConfounder(nn.Module):
    """u, y | u, x | y, u, and a leaf that nobody observes; the guide has y alone."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([-1.0, 0.5]))

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            u = pyro.sample("u", dist.Bernoulli(0.4))
            y = pyro.sample("y", dist.Categorical(torch.stack([0.1 + 0.8 * u, 0.9 - 0.8 * u], -1)))
            pyro.sample("x", dist.Normal(self.loc[y] + u, 1.0))
            pyro.sample("leaf", dist.Normal(u, 1.0))

    def evidence(self, x: Tensor) -> Tensor:
        terms = []
        for u, p_u in ((0, 0.6), (1, 0.4)):
            for y, p_y in enumerate((0.1 + 0.8 * u, 0.9 - 0.8 * u)):
                density = dist.Normal(self.loc[y] + u, 1.0).log_prob(x)
                terms.append(math.log(p_u * p_y) + density)
        return torch.logsumexp(torch.stack(terms), 0)


class CoinGuide(nn.Module):
    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            if self.site == "u":
                pyro.sample("u", dist.Bernoulli(torch.full((batch.size,), 0.7)))
            else:
                pyro.sample("y", dist.Categorical(torch.ones(batch.size, 2)))


@pytest.mark.parametrize(("site", "mixed"), [("u", True), ("y", False)])
def test_draws_that_only_the_model_makes(site: str, mixed: bool):
    """Where the prior of a latent depends on such a draw, its density is not that of the proposal."""
    model, guide = WithConfounder(), CoinGuide(site)
    batch = Batch({"x": torch.tensor([0.3, -1.2])})
    many = batch.rows(torch.arange(2).repeat(COPIES))
    options = proposals(model, guide, batch)
    assert (len(options) > 1) is mixed
    for proposal in options:
        log_w = log_weights(proposal, model, guide, many, 2)
        assert_evidence(log_w, model.evidence(batch["x"]))
