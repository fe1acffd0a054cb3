"""Baselines: the expected gradient stays, its variance falls, and none looks at its particle's draw."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.compiled import make_step
from pyro_vae.objectives import Bound, Elbo, Objective, Renyi, Score, elbo, iwae
from pyro_vae.objectives.baselines import Baseline, LeaveOneOut, MovingAverage, NeuralBaseline
from pyro_vae.objectives.bounds import Jackknife, Miwae, Thermodynamic
from pyro_vae.training.fit import fit
from tests.small_pairs import assert_same, flat_gradient, sigmas

BOUNDS = [Elbo(), *(Renyi(alpha) for alpha in (0.0, 0.5, -1.0, 2.0, -math.inf))]


def centred(baseline: Baseline, bound: Bound, log_w: Tensor, *args: Any) -> Tensor:
    out: Tensor = baseline(bound, log_w, args)[0]
    return out


# ---------------------------------------------------------------------------------------------
# A discrete latent y beside a continuous one z | y, whose bounds are known by quadrature

PRIOR = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
GUIDE = torch.tensor([[0.4, -0.2, 0.1], [0.3, -0.5, 0.2]], dtype=torch.float64)  # logits, loc
SCALE, X = 0.8, 0.7


def log_joint(y: Tensor, z: Tensor, x: Tensor | float) -> Tensor:
    x = torch.as_tensor(x)
    log_p: Tensor = dist.Normal(MEANS[y] + 0.5 * z, 1.0).log_prob(x)
    prior: Tensor = PRIOR.log()[y] + dist.Normal(0.0, 1.0).log_prob(z)
    return prior + log_p


class MixedModel(nn.Module):
    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(PRIOR))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(MEANS[y] + 0.5 * z, 1.0), obs=x)


class MixedGuide(nn.Module):
    """Holds its parameters once per row, so that one pass gives a gradient per row."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.logits, self.loc = (nn.Parameter(part.expand(rows, 3).clone()) for part in GUIDE)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            loc = self.loc.expand(*y.shape, 3).gather(-1, y[..., None]).squeeze(-1)
            pyro.sample("z", dist.Normal(loc, SCALE))


def exact(reduce: Callable[[Tensor], Tensor], x: float = X) -> tuple[Tensor, Tensor]:
    """Value of a bound of two particles, and its gradient ``[6]`` in the guide's logits and means."""
    parameters = GUIDE.clone().requires_grad_()
    logits, loc = parameters
    nodes, weights = map(torch.as_tensor, np.polynomial.hermite_e.hermegauss(40))
    y = torch.arange(3)[:, None].expand(3, 40)
    z = loc[:, None] + SCALE * nodes
    log_q = logits.log_softmax(0)[:, None]
    chance = (log_q.exp() * weights / weights.sum()).flatten()
    log_w = log_joint(y, z, x) - log_q - dist.Normal(loc[:, None], SCALE).log_prob(z)
    log_w = log_w.flatten()
    pairs = reduce(torch.stack(torch.broadcast_tensors(log_w[:, None], log_w)))
    value = chance @ pairs @ chance
    return value.detach(), torch.autograd.grad(value, parameters)[0].flatten()


def gradients(objective: Objective, x: Tensor, seed: int = 1) -> Tensor:
    """The loss's gradient ``[rows, 6]``, row by row."""
    guide = MixedGuide(len(x))
    pyro.set_rng_seed(seed)
    loss = objective.differentiable_loss(MixedModel(), guide, x)
    return torch.cat(torch.autograd.grad(loss, [guide.logits, guide.loc]), 1)


class Offset(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(3 * torch.arange(len(x))) - 2


BASELINES: dict[str, Callable[[], Baseline | None]] = {
    "none": lambda: None,
    "leave one out": LeaveOneOut,
    "moving average": MovingAverage,
    "neural": NeuralBaseline,
    "wild net": lambda: NeuralBaseline(Offset()),
}
EXACT = [
    (elbo, lambda log_w: log_w.mean(0)),
    (iwae, lambda log_w: torch.logsumexp(log_w, 0) - math.log(2)),
]


@pytest.mark.parametrize("all_sites", [False, True])
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize(("recipe", "reduce"), EXACT, ids=["elbo", "iwae"])
def test_the_gradient_is_that_of_enumeration(
    recipe: Any, reduce: Any, baseline: str, all_sites: bool
):
    """y by its score, z by its path or by its score."""
    x = torch.full((30_000,), X)
    objective = recipe(num_particles=2, estimator=Score(all_sites, BASELINES[baseline]()))
    gradients(objective, x[:50])  # averages know something
    value, gradient = exact(reduce)
    assert sigmas(gradients(objective, x) + gradient).abs().max() < 5
    rows = objective.rows(MixedModel(), MixedGuide(len(x)), x)
    assert sigmas(rows[:, None] - value).abs() < 5


@pytest.mark.parametrize(
    ("baseline", "recipe", "particles", "most"),
    [
        ("leave one out", elbo, 2, 0.8),
        ("leave one out", elbo, 10, 0.5),
        ("leave one out", iwae, 10, 0.02),
        ("moving average", elbo, 2, 0.5),
        ("moving average", iwae, 10, 0.2),
        ("neural", elbo, 10, 0.6),
        ("neural", iwae, 10, 0.2),
    ],
)
def test_the_variance_falls(baseline: str, recipe: Any, particles: int, most: float):
    x = torch.full((10_000,), X)
    variance = []
    for name in ("none", baseline):
        objective = recipe(num_particles=particles, estimator=Score(True, BASELINES[name]()))
        gradients(objective, x, seed=0)
        variance.append(gradients(objective, x).var(0).sum())
    assert variance[1] < most * variance[0]


# ---------------------------------------------------------------------------------------------
# Leave one out


@pytest.mark.parametrize("bound", [*BOUNDS, Miwae(2), Jackknife(), Thermodynamic(3)], ids=repr)
def test_leave_one_out_by_hand(bound: Bound):
    log_w = torch.randn(4, 3)
    wanted = torch.zeros(4, 3)
    for k in range(4):
        replaced = log_w.clone()
        replaced[k] = torch.cat([log_w[:k], log_w[k + 1 :]]).mean(0)
        wanted[k] = bound(log_w) - bound(replaced)
    assert_same(centred(LeaveOneOut(), bound, log_w), wanted)


def test_leave_one_out_is_vimco():
    """Mnih & Rezende (2016), equations 8 and 9, f the geometric mean of the others."""
    w = torch.rand(5, 2)
    f = torch.stack([(w.log().sum(0) - w[j].log()).div(4).exp() for j in range(5)])
    signal = w.mean(0).log() - ((w.sum(0) - w + f) / 5).log()
    assert_same(centred(LeaveOneOut(), Renyi(0.0), w.log()), signal)


def test_leave_one_out_of_the_elbo():
    log_w = torch.randn(5, 2)
    mean = (log_w.sum(0) - log_w) / 4
    assert_same(centred(LeaveOneOut(), Elbo(), log_w), (log_w - mean) / 5)


@pytest.mark.parametrize("bound", BOUNDS, ids=repr)
def test_closed_forms_are_the_generic_one(bound: Bound):
    log_w, other = 3 * torch.randn(2, 5, 4)
    assert_same(bound.replaced(log_w, other), Bound.replaced(bound, log_w, other))


def test_one_particle_that_outweighs_all():
    """The rest of a sum from which the largest term was taken is no difference."""
    log_w = torch.tensor([[0.0], [900.0], [-900.0], [1.0]])
    out = Renyi(0.0).replaced(log_w, torch.full_like(log_w, -2.0))
    rest = math.log(math.exp(1) + 1 + math.exp(-2)) - math.log(4)
    wanted = torch.tensor([[900 - math.log(4)], [rest], [900 - math.log(4)], [900 - math.log(4)]])
    assert_same(out, wanted)


@pytest.mark.parametrize("baseline", [b for b in BASELINES if b != "none"])
@pytest.mark.parametrize("bound", BOUNDS, ids=repr)
def test_a_baseline_does_not_know_its_own_particle(bound: Bound, baseline: str):
    """Whatever particle 1 drew, even something impossible, what is subtracted from its reward is the
    same, or the gradient would be biased."""
    made: Any = BASELINES[baseline]()
    args = (torch.randn(3, 2),)
    made(Elbo(), torch.randn(4, 3), args)  # not empty
    made.eval()
    log_w = torch.randn(4, 3)
    values = []
    for own in (0.0, -5.0, 40.0, -math.inf):
        if own == -math.inf and not (isinstance(bound, Renyi) and bound.alpha < 1):
            continue  # the bound itself is -inf
        log_w[1] = own
        values.append((bound.reward(log_w) - centred(made, bound, log_w, *args))[1])
    assert values[0].isfinite().all()
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], atol=1e-8, rtol=1e-8)


def test_one_particle_is_refused():
    for recipe in (elbo, iwae):
        with pytest.raises(ValueError, match=r"leave_one_out.*num_particles=1.*>= 2"):
            recipe(num_particles=1, estimator="vimco")


# ---------------------------------------------------------------------------------------------
# Moving average


def test_moving_average_by_hand():
    average, (a, b, c) = MovingAverage(0.8), torch.randn(3, 4, 5)
    bound = Renyi(0.0)
    means = [bound(log_w).mean() for log_w in (a, b)]
    assert_same(centred(average, bound, a), bound.reward(a))
    assert_same(centred(average, bound, b), bound.reward(b) - means[0])
    wanted = bound.reward(c) - (0.8 * means[0] + means[1]) / 1.8
    with torch.no_grad():
        assert_same(centred(average, bound, c), wanted)  # does not move
    average.eval()
    assert_same(centred(average, bound, c), wanted)
    assert_same(centred(average, bound, c), wanted)
    average.train()
    impossible = torch.full((4, 5), -math.inf)
    centred(average, bound, impossible)
    assert_same(centred(average, bound, c), wanted)


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_decay_is_checked(decay: float):
    with pytest.raises(ValueError, match=r"MovingAverage.*\[0, 1\)"):
        MovingAverage(decay)


def test_a_decay_of_0_keeps_the_last_batch():
    average, (a, b) = MovingAverage(0.0), torch.randn(2, 4, 5)
    centred(average, Elbo(), a)
    assert_same(centred(average, Elbo(), b), (b - a.mean()) / 4)


def test_an_average_is_saved_with_the_loss():
    objective = elbo(2, Score(baseline=MovingAverage()))
    loss = objective(MixedModel(), MixedGuide(5))
    loss(torch.randn(5))
    (name,) = (key for key in loss.state_dict() if key.endswith("average"))
    again = elbo(2, Score(baseline=MovingAverage()))(MixedModel(), MixedGuide(5))
    again.load_state_dict(loss.state_dict())
    assert again.state_dict()[name] == loss.state_dict()[name] != 0


# ---------------------------------------------------------------------------------------------
# Neural baseline


def test_a_network_is_trained_by_the_squared_error_alone():
    baseline = NeuralBaseline(nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)))
    log_w, x = torch.randn(4, 3).requires_grad_(), torch.randn(3, 2)
    reward = Renyi(0.0).reward(log_w)
    out, cost = baseline(Renyi(0.0), log_w, (x,))
    expected = baseline.net(x)
    assert_same(out, reward - expected)
    assert cost is not None
    assert_same(cost, (reward - expected).square().sum() / 4)
    assert not torch.autograd.grad(cost, log_w, allow_unused=True, retain_graph=True)[0]
    of_net = flat_gradient(cost, baseline.net.parameters())
    wanted = 2 * (expected - reward).detach().mean(0) @ torch.cat([x, torch.ones(3, 1)], 1)
    assert_same(of_net, wanted)
    assert flat_gradient(out.sum(), baseline.net.parameters()).abs().max() == 0
    baseline.average = MovingAverage()
    out, cost = baseline(Elbo(), log_w, (x,))  # whose reward is a K-th of the bound
    assert_same(out, (log_w - expected) / 4)
    assert_same(cost, (log_w - expected).square().sum() / 4**3)


def test_the_loss_has_the_value_of_the_bound_and_trains_the_network():
    x, baseline = torch.randn(6), NeuralBaseline()
    losses = {}
    for name, estimator in (("none", Score()), ("neural", Score(baseline=baseline))):
        pyro.set_rng_seed(1)
        module = iwae(3, estimator)(MixedModel(), MixedGuide(6))
        losses[name] = module(x)
    assert_same(losses["neural"].detach(), losses["none"].detach())
    assert {id(p) for p in baseline.parameters()} <= {id(p) for p in module.parameters()}
    assert flat_gradient(losses["neural"], baseline.parameters()).abs().max() > 1e-3


def test_a_trained_network_beats_an_average_where_rows_differ():
    x = torch.linspace(-6, 8, 200)
    variance = {}
    for baseline in (MovingAverage(), NeuralBaseline()):
        objective = iwae(5, Score(True, baseline))
        loss = objective(MixedModel(), MixedGuide(len(x)))
        loss(x)
        own = list(baseline.parameters())
        optimizer = torch.optim.Adam(own, lr=0.05) if own else None
        for _ in range(100 if own else 20):
            value = loss(x)
            if optimizer is not None:
                optimizer.zero_grad()
                (value / len(x)).backward(inputs=own)
                optimizer.step()
        draws = torch.stack([gradients(objective, x, seed) for seed in range(10)])
        variance[repr(baseline)] = draws.var(0).sum()
    assert variance["neural_baseline"] < 0.4 * variance["moving_average(0.9)"]


def test_the_default_network_sees_values_and_masks_of_all_sites():
    a, b = torch.randn(4, 2, 3), torch.tensor([1.0, math.nan, 2.0, 3.0])
    baseline = NeuralBaseline()
    baseline(Elbo(), torch.randn(2, 4), (Batch({"a": a, "b": b}),))
    linear: Any = baseline.net[1]  # type: ignore[index]
    assert linear.in_features == 6 + 1 + 1
    flat: Any = baseline.net[0]  # type: ignore[index]
    seen = flat(Batch({"a": a, "b": b}))
    assert_same(seen[:, :6], a.flatten(1))
    assert_same(seen[:, 7], torch.tensor([1.0, 0.0, 1.0, 1.0]))


def test_a_network_of_the_wrong_shape_is_refused():
    baseline, log_w = NeuralBaseline(nn.Linear(2, 1)), torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"net returned \[6, 1\], wanted \[6\]"):
        baseline(Elbo(), log_w, (torch.randn(6, 2),))
    with pytest.raises(ValueError, match=r"came as int.*net="):
        NeuralBaseline()(Elbo(), log_w, (3,))
    with pytest.raises(ValueError, match=r"no arguments.*batch"):
        NeuralBaseline()(Elbo(), log_w, ())


# ---------------------------------------------------------------------------------------------
# In training


@pytest.mark.parametrize("baseline", [b for b in BASELINES if b not in ("none", "wild net")])
def test_traced_steps_are_eager_ones(baseline: str):
    x = torch.randn(8)
    torch.manual_seed(0)
    first = iwae(3, Score(True, BASELINES[baseline]()))(MixedModel(), MixedGuide(8))
    first(x)  # networks see their inputs
    results = []
    for level in ("eager", "traced"):
        loss = copy.deepcopy(first)
        parameters = list(loss.parameters())
        step = make_step(loss, parameters, torch.optim.SGD(parameters, 0.1), level=level)
        torch.manual_seed(1)
        values = [step(x + i) for i in range(5)]
        assert step.level == level
        results.append([*values, *parameters, *loss.buffers()])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced)


def test_under_svi():
    x, baseline = torch.randn(6), NeuralBaseline(nn.Sequential(nn.LayerNorm(6)))
    objective = elbo(2, Score(baseline=baseline))
    before = [p.clone() for p in baseline.parameters()]
    guide = MixedGuide(6)
    svi = SVI(MixedModel(), guide, Adam({"lr": 0.1}), loss=objective)
    svi.step(x)
    assert all((p != q).any() for p, q in zip(baseline.parameters(), before, strict=True))


def test_fit_trains_a_network_that_is_made_when_it_first_runs():
    baseline = NeuralBaseline()
    objective = elbo(2, Score(baseline=baseline))
    x = torch.randn(8)
    pair = MixedModel(), MixedGuide(8)
    fit(*pair, x, objective, steps=3, compile="eager")
    assert float(baseline.average.weight) == pytest.approx(1 - 0.9**3)  # no first look counts
    before = copy.deepcopy(baseline)
    fit(*pair, x, objective, steps=1, compile="eager")
    both = zip(baseline.parameters(), before.parameters(), strict=True)
    assert all((p != q).any() for p, q in both)
