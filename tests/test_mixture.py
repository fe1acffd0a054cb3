"""Mixtures with a path: strata, densities, moments, and every estimator's gradient by quadrature."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_vae.batch import Batch
from pyro_vae.compiled import make_step
from pyro_vae.conditionals.mixture import StratifiedMixture
from pyro_vae.objectives import Beta, Elbo, Miwae, Objective, Renyi
from tests.gate.pairs import Program
from tests.small_pairs import assert_same, sigmas

X, ROWS, NODES = 0.8, 60_000, 14
MODEL = {"w": 1.3, "b": -0.2, "s": -0.5, "u": 0.8, "k": 0.3, "l": -0.3}
GUIDE = {"a0": -0.4, "a1": 1.1, "r0": -0.6, "r1": -0.1, "d": 0.7, "f": 0.2, "v": -0.4}


def mixture(batch_shape: tuple[int, ...] = (), allowed: Any = None) -> StratifiedMixture:
    loc, scale = torch.tensor([[0.0, 1.0], [2.0, -1.0], [5.0, 3.0]]), torch.tensor([0.5, 1.0, 2.0])
    components = dist.Normal(loc, scale[:, None]).to_event(1).expand((*batch_shape, 3))
    return StratifiedMixture(components, None if allowed is None else torch.tensor(allowed))


def test_density_is_that_of_the_mixture_of_what_is_allowed():
    fn, z = mixture((2,), [[True, True, True], [True, False, True]]), torch.randn(2, 2)
    log_q = fn.components.log_prob(z[:, None])
    wanted = [log_q[0].logsumexp(0) - math.log(3), log_q[1, [0, 2]].logsumexp(0) - math.log(2)]
    assert_same(fn.log_prob(z), torch.stack(wanted))


@pytest.mark.parametrize("number", [1, 4, 6])
def test_strata(number: int):
    """Particles belong to components in turn, each of which has its share of them."""
    fn = mixture((5,), [[True, True, True]] * 4 + [[True, False, True]]).expand((number, 5))
    z = fn.rsample()
    assert z.shape == (number, 5, 2) == (*fn.batch_shape, *fn.event_shape)
    log_q = fn.components.log_prob(z[..., None, :])
    which = fn._drawn
    assert which is not None
    assert (which.diff(dim=0) >= 0).all()
    assert_same(fn.drawn_log_prob(z), log_q.gather(-1, which[..., None]).squeeze(-1))
    assert (which[:, 4] != 1).all()
    if number == 6:
        assert which[:, 0].bincount().tolist() == [2, 2, 2]
        assert which[:, 4].bincount(minlength=3).tolist() == [3, 0, 3]


@pytest.mark.parametrize("number", [1, 2, 5])
def test_every_component_has_its_share_of_particles_on_average(number: int):
    fn = mixture((40_000,)).expand((number, 40_000))
    fn.rsample()
    which = fn._drawn
    assert which is not None
    counts = torch.stack([which.eq(m).double().mean(0) for m in range(3)], -1)
    assert sigmas(counts - 1 / 3).abs().max() < 4


def test_moments():
    fn = mixture((), [True, False, True])
    z = fn.expand((400_000,)).rsample().double()
    assert sigmas(z - fn.mean).abs().max() < 4
    assert sigmas((z - fn.mean).square() - fn.variance).abs().max() < 4


@pytest.mark.parametrize("bound", [Miwae(2), Miwae(3)], ids=repr)
def test_every_group_of_particles_has_all_components(bound: Any):
    """Else it would be a bound with a part of the mixture, far below log p."""
    fn = StratifiedMixture(dist.Normal(torch.tensor([1.2, -1.5]), 0.5)).expand((192, 5000))
    z, x = fn.rsample(), torch.tensor(1.5)
    log_p = dist.Normal(0.0, math.sqrt(1.25)).log_prob(x)
    log_w = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(x) - fn.log_prob(z)
    found = bound(log_w).double()
    assert sigmas(found - Renyi(0.0)(log_w)).item() < 0
    assert float((found.mean() - log_p).abs()) < 0.005


def test_bad_input():
    with pytest.raises(ValueError, match="came components Bernoulli without rsample"):
        StratifiedMixture(dist.Bernoulli(torch.full((2,), 0.5)))
    with pytest.raises(ValueError, match=r"allowed= came \[4\], wanted \[3\]"):
        mixture((), [True] * 4)
    with pytest.raises(RuntimeError, match="before rsample"):
        mixture().drawn_log_prob(torch.zeros(2))


# ---------------------------------------------------------------------------------------------
# Gradients. Every row has parameters of its own, so that each is one draw of the gradient.


class Model(Program):
    def forward(self, batch: Batch) -> None:
        with self.plate(batch):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([batch.size]))
            pyro.sample("x", dist.Normal(self.w * z + self.b, self.s.exp()))


class Guide(Program):
    def mixture(self) -> StratifiedMixture:
        loc, scale = torch.stack([self.a0, self.a1], -1), torch.stack([self.r0, self.r1], -1).exp()
        return StratifiedMixture(dist.Normal(loc, scale))

    def forward(self, batch: Batch) -> None:
        with self.plate(batch):
            pyro.sample("z", self.mixture())


class Chain(Model):
    def forward(self, batch: Batch) -> None:
        with self.plate(batch):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([batch.size]))
            y = pyro.sample("y", dist.Normal(self.u * z + self.k, self.l.exp()))
            pyro.sample("x", dist.Normal(self.w * y + self.b, self.s.exp()))


class ChainGuide(Guide):
    def forward(self, batch: Batch) -> None:
        with self.plate(batch):
            z = pyro.sample("z", self.mixture())
            pyro.sample("y", dist.Normal(self.d * z + self.f, self.v.exp()))


class Mirror(ChainGuide):
    """The mixture depends on the draw before it."""

    def forward(self, batch: Batch) -> None:
        with self.plate(batch):
            y = pyro.sample("y", dist.Normal(self.f, self.v.exp()))
            loc = torch.stack([self.a0 + self.d * y, self.a1 - self.d * y], -1)
            scale = torch.stack([self.r0, self.r1], -1).exp()
            pyro.sample("z", StratifiedMixture(dist.Normal(loc, scale.expand(loc.shape))))


def normal(value: Tensor, loc: Any, log_scale: Tensor) -> Tensor:
    log_p: Tensor = dist.Normal(loc, log_scale.exp()).log_prob(value)
    return log_p


def density(v: dict[str, Tensor], z: Tensor, locs: list[Tensor]) -> Tensor:
    each = [normal(z, loc, v[f"r{m}"]) for m, loc in enumerate(locs)]
    return torch.stack(each).logsumexp(0) - math.log(2)


def one(v: dict[str, Tensor], m: int, e: Tensor, beta: dict[str, float]) -> Tensor:
    z = v[f"a{m}"] + v[f"r{m}"].exp() * e[0]
    log_q = density(v, z, [v["a0"], v["a1"]])
    rate = log_q - normal(z, 0.0, torch.zeros(()))
    return normal(torch.tensor(X), v["w"] * z + v["b"], v["s"]) - beta["z"] * rate


def two(v: dict[str, Tensor], m: int, e: Tensor, beta: dict[str, float]) -> Tensor:
    z = v[f"a{m}"] + v[f"r{m}"].exp() * e[0]
    y = v["d"] * z + v["f"] + v["v"].exp() * e[1]
    rate = density(v, z, [v["a0"], v["a1"]]) - normal(z, 0.0, torch.zeros(()))
    rate_y = normal(y, v["d"] * z + v["f"], v["v"]) - normal(y, v["u"] * z + v["k"], v["l"])
    likelihood = normal(torch.tensor(X), v["w"] * y + v["b"], v["s"])
    return likelihood - beta["z"] * rate - beta["y"] * rate_y


def mirrored(v: dict[str, Tensor], m: int, e: Tensor, beta: dict[str, float]) -> Tensor:
    y = v["f"] + v["v"].exp() * e[1]
    locs = [v["a0"] + v["d"] * y, v["a1"] - v["d"] * y]
    z = locs[m] + v[f"r{m}"].exp() * e[0]
    rate = density(v, z, locs) - normal(z, 0.0, torch.zeros(()))
    rate_y = normal(y, v["f"], v["v"]) - normal(y, v["u"] * z + v["k"], v["l"])
    likelihood = normal(torch.tensor(X), v["w"] * y + v["b"], v["s"])
    return likelihood - beta["z"] * rate - beta["y"] * rate_y


PAIRS: dict[str, tuple[Any, Any, Callable[..., Tensor], int, int]] = {
    "mixture alone": (Model, Guide, one, 1, 24),
    "a site after the mixture": (Chain, ChainGuide, two, 2, NODES),
    "a site before the mixture": (Chain, Mirror, mirrored, 2, NODES),
}
Tuples = list[tuple[int, ...]]
STRATA: dict[int, Tuples] = {  # equally probable tuples of components, for a number of particles
    1: [(0,), (1,)],
    2: [(0, 1)],
    3: [(0, 0, 1), (0, 1, 1)],
}


def quadrature(pair: str, bound: Any, number: int, beta: dict[str, float]) -> Tensor:
    """Gradient of the bound's expectation by Gauss-Hermite quadrature, ``[parameters]``."""
    *_, log_w, latents, nodes = PAIRS[pair]
    v = {name: torch.tensor(value).double() for name, value in (MODEL | GUIDE).items()}
    leaves = [tensor.requires_grad_() for tensor in v.values()]
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    axes = number * latents
    grid = torch.cartesian_prod(*[points] * axes).reshape(-1, axes).T
    mass = torch.cartesian_prod(*[weights / weights.sum()] * axes).reshape(-1, axes).prod(1)
    total = torch.zeros(()).double()
    strata: Tuples = STRATA[number]
    if "before" in pair:  # its rows are particles as well: each draws its component by itself
        strata = list(itertools.product((0, 1), repeat=number))
    for tuple_ in strata:
        each = [
            log_w(v, m, grid[k * latents : (k + 1) * latents], beta) for k, m in enumerate(tuple_)
        ]
        total = total + (mass * bound(torch.stack(each))).sum() / len(strata)
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return torch.stack([torch.zeros(()).double() if g is None else g for g in gradients])


CELLS = [
    ("mixture alone", Elbo(), "pathwise", 1, {}),
    ("mixture alone", Elbo(), "stl", 1, {}),
    ("mixture alone", Elbo(), "score", 1, {}),
    ("mixture alone", Elbo(), "stl", 3, {}),
    ("mixture alone", Renyi(0.0), "pathwise", 2, {}),
    ("mixture alone", Renyi(0.0), "dreg", 2, {}),
    ("mixture alone", Renyi(0.0), "vimco", 2, {}),
    ("mixture alone", Renyi(0.0), "dreg", 3, {}),
    ("mixture alone", Renyi(0.5), "dreg", 2, {"z": 0.6}),
    ("mixture alone", Miwae(2), "dreg", 2, {}),
    ("a site after the mixture", Elbo(), "stl", 1, {}),
    ("a site after the mixture", Renyi(0.0), "dreg", 2, {}),
    ("a site after the mixture", Renyi(0.0), "dreg", 2, {"z": 1.4, "y": 0.5}),
    ("a site after the mixture", Renyi(0.0), "vimco", 2, {}),
    ("a site before the mixture", Elbo(), "stl", 1, {}),
    ("a site before the mixture", Renyi(0.0), "pathwise", 2, {}),
    ("a site before the mixture", Renyi(0.0), "dreg", 2, {"z": 0.7, "y": 1.2}),
]


@pytest.mark.parametrize(
    ("pair", "bound", "estimator", "number", "beta"), CELLS, ids=[str(c) for c in CELLS]
)
def test_gradient_is_that_of_the_bound(pair, bound, estimator, number, beta):
    sites = {"z": 1.0, "y": 1.0} if PAIRS[pair][3] == 2 else {"z": 1.0}
    beta = sites | beta
    model, guide = PAIRS[pair][0](MODEL, ROWS), PAIRS[pair][1](GUIDE, ROWS)
    batch = Batch({"x": torch.full((ROWS,), X).double()})
    objective = Objective(bound, estimator, Beta(beta), num_particles=number)
    pyro.set_rng_seed(0)
    loss = objective.differentiable_loss(model, guide, batch)
    parameters = [*model.parameters(), *guide.parameters()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    rows = [torch.zeros(ROWS).double() if g is None else -g for g in found]
    wanted = quadrature(pair, bound, number, beta)
    assert wanted.abs().max() > 0.1
    off = sigmas(torch.stack(rows, 1) - wanted)
    assert off.abs().max() < 5, dict(zip(MODEL | GUIDE, off.tolist(), strict=True))


def test_plain_dreg_would_be_biased(monkeypatch):
    """Dropping the score of the whole mixture, and not of the component alone, is seen."""
    monkeypatch.setattr(StratifiedMixture, "drawn_log_prob", StratifiedMixture.log_prob)
    with pytest.raises(AssertionError):
        test_gradient_is_that_of_the_bound("mixture alone", Renyi(0.0), "dreg", 2, {})


def test_traces():
    """The draw, its component and both densities are the same in a traced graph."""
    batch = Batch({"x": torch.linspace(-1, 1, 6).double()})
    losses = []
    for level in ("eager", "traced"):
        loss = Objective(Renyi(0.0), "dreg", num_particles=4)(Model(MODEL, 6), Guide(GUIDE, 6))
        parameters = list(loss.parameters())
        step = make_step(loss, parameters, torch.optim.Adam(parameters, 1e-2), level=level)
        pyro.set_rng_seed(3)
        losses.append(torch.stack([step(batch) for _ in range(4)]))
        assert step.level == level
    assert_same(losses[1], losses[0])
