"""Mutual information, total correlation and dimension-wise KL, against sums over all pairs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_vae.objectives import Particles
from pyro_vae.objectives.penalties import MutualInformation, TotalCorrelation, decomposition
from tests.row_pairs import RowPair, gradient
from tests.small_pairs import X_DIM, FlowGuide, LinearModel, assert_same, data, table

STEP = torch.zeros(())
KINDS: dict[str, Any] = {"Normal": dist.Normal, "Laplace": dist.Laplace}


def by_hand(particles: Particles, pair: RowPair, mine: float, other: float) -> dict[str, Tensor]:
    """From the table ``[K, B, B, D]``; weights of the own row and of each other."""
    z = particles.samples["z"]
    rows = z.shape[1]
    pairs = pair.kind(pair.loc, pair.scale).log_prob(z[:, :, None])
    weights = torch.full((rows, rows), other).fill_diagonal_(mine).log()
    own = pairs.diagonal(dim1=1, dim2=2).sum(1)
    joint = (weights + pairs.sum(-1)).logsumexp(2)
    each = (weights[..., None] + pairs).logsumexp(2).sum(-1)
    prior = dist.Normal(pair.prior_loc, 1.0).log_prob(z).sum(-1)
    return {
        "mutual_information": own - joint,
        "total_correlation": joint - each,
        "dimensionwise_kl": each - prior,
    }


WEIGHTS = {
    "batch": lambda b, n: (1 / b, 1 / b),
    "weighted": lambda b, n: (1 / (n * b), 1 / (n * b)),
    "stratified": lambda b, n: (1 / n, (n - 1) / n / (b - 1)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", WEIGHTS)
@pytest.mark.parametrize("number", [1, 3])
def test_values_and_gradients_are_those_of_all_pairs(kind: str, sampling: str, number: int):
    pair = RowPair.random(7, 4, KINDS[kind])
    particles = pair.particles(number=number)
    found = decomposition(particles, sampling=sampling, total=50)
    wanted = by_hand(particles, pair, *WEIGHTS[sampling](7, 50))
    assert_same(found, wanted)
    upstream = torch.randn(3, number, 7)
    ours, theirs = (
        gradient(
            sum((w * parts[n]).sum() for n, w in zip(wanted, upstream, strict=True)),
            pair.parameters(),
        )
        for parts in (found, wanted)
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_each_penalty_has_its_part_and_its_gradient(kind: str):
    pair = RowPair.random(6, 3, KINDS[kind])
    particles = pair.particles(number=2)
    cases = {
        "total_correlation": TotalCorrelation(0.7, "stratified", total=30),
        "mutual_information": MutualInformation(0.7, "stratified", total=30),
    }
    wanted = by_hand(particles, pair, *WEIGHTS["stratified"](6, 30))
    for name, penalty in cases.items():
        ours, theirs = penalty(particles, STEP), 0.7 * wanted[name].mean()
        assert_same(ours, theirs)
        assert_same(*(gradient(loss, pair.parameters()) for loss in (ours, theirs)))


def test_parts_add_up_to_the_rate():
    pair = RowPair.random()
    particles = pair.particles(number=2)
    rate = particles.posterior["z"].sum(-1) - particles.prior["z"].sum(-1)
    for sampling in WEIGHTS:
        parts = decomposition(particles, sampling=sampling, total=1000)
        assert_same(torch.stack(list(parts.values())).sum(0), rate)


# ---------------------------------------------------------------------------------------------
# The truth: all data in the batch, and fewer


def test_with_all_data_in_the_batch_the_estimates_are_exact():
    """Quadrature over z of a mixture in two dimensions."""
    loc = torch.tensor([[-1.5, -1.0], [0.2, 0.4], [1.4, 1.6], [0.0, 1.0]])
    pair = RowPair(loc, torch.full_like(loc, 0.6))
    axis = torch.linspace(-7, 7, 401)
    grid = torch.cartesian_prod(axis, axis)
    cell = float(axis[1] - axis[0])
    each = dist.Normal(loc, 0.6).log_prob(grid[:, None]).exp()  # [points, N, D]
    joint, marginals = each.prod(-1).mean(1), each.mean(1)
    true = {
        "mutual_information": sum(
            float((q * (q / joint).log()).sum()) for q in each.prod(-1).clamp(min=1e-300).unbind(1)
        )
        / 4,
        "total_correlation": float((joint * (joint / marginals.prod(-1)).log()).sum()),
    }
    pyro.set_rng_seed(0)
    found = decomposition(pair.particles(number=4000), sampling="stratified", total=4)
    for name, value in true.items():
        draws = found[name].mean(1)
        error = draws.std() / len(draws) ** 0.5
        assert abs(draws.mean() - value * cell**2) < 4 * error, name
        assert error < 0.02


def test_total_correlation_is_zero_where_the_aggregate_factorizes():
    axis = torch.tensor([-1.0, 0.3, 2.0])
    loc = torch.cartesian_prod(axis, axis, axis)
    pair = RowPair(loc, torch.tensor([0.4, 0.9, 1.3]).expand_as(loc).clone())
    for sampling in ("batch", "stratified"):
        found = decomposition(pair.particles(number=3), sampling=sampling, total=27)
        assert_same(found["total_correlation"], torch.zeros(3, 27))


def test_mutual_information_is_at_most_log_b_and_gets_there():
    for spread in (0.1, 1.0, 100.0):
        loc = spread * torch.randn(16, 2)
        pair = RowPair(loc, torch.ones(16, 2))
        value = MutualInformation()(pair.particles(number=5), STEP)
        assert value <= math.log(16) + 1e-12
    assert_same(value, torch.tensor(math.log(16)).double())
    assert gradient(value, pair.parameters()).abs().max() < 1e-12


def aggregate(particles: Particles, sampling: str, total: int) -> Tensor:
    """The estimate of q(z) of the first row's draw."""
    parts = decomposition(particles, sampling=sampling, total=total)
    log_q = particles.posterior["z"].sum(-1)
    return (log_q - parts["mutual_information"])[0, 0].exp()


def test_stratified_is_unbiased_for_the_density_and_weighted_a_known_multiple():
    """Over every batch of 3 of 6 rows that has the first."""
    pair = RowPair.random(6, 2)
    z = torch.randn(6, 2)
    truth = aggregate(pair.particles(z=z), "batch", 6)
    batches = [torch.tensor((0, *rest)) for rest in itertools.combinations(range(1, 6), 2)]
    found = {
        sampling: torch.stack(
            [aggregate(pair.particles(rows, z=z[rows]), sampling, 6) for rows in batches]
        ).mean()
        for sampling in WEIGHTS
    }
    own = aggregate(pair.particles(torch.tensor([0]), z=z[:1]), "batch", 1)
    assert_same(found["stratified"], truth)
    others = (6 * truth - own) / 5
    assert_same(found["batch"], (own + 2 * others) / 3)
    assert_same(found["weighted"], found["batch"] / 6)


def test_fewer_rows_give_the_bias_that_enumeration_says():
    """Mean over random batches of 4 of 8 rows at fixed draws, against the mean over all 70."""
    pair = RowPair.random(8, 3)
    z = torch.randn(8, 3)
    names = ("mutual_information", "total_correlation")
    pairs = dist.Normal(pair.loc, pair.scale).log_prob(z[:, None]).detach()

    def enumerated(mine: float, other: float) -> Tensor:
        means = []
        for rows in map(list, itertools.combinations(range(8), 4)):
            log_w = torch.full((4, 4), other).fill_diagonal_(mine).log()
            part = pairs[rows][:, rows]
            own, joint = part.diagonal().sum(0), (log_w + part.sum(-1)).logsumexp(1)
            each = (log_w[..., None] + part).logsumexp(1).sum(-1)
            means.append(torch.stack([own - joint, joint - each]).mean(1))
        return torch.stack(means).mean(0)

    full = decomposition(pair.particles(z=z), sampling="batch")
    truth = torch.stack([full[name].mean() for name in names])
    generator = torch.Generator().manual_seed(0)
    for sampling in ("weighted", "stratified"):
        draws = []
        for _ in range(300):
            rows = torch.randperm(8, generator=generator)[:4]
            found = decomposition(pair.particles(rows, z=z[rows]), sampling=sampling, total=8)
            draws.append(torch.stack([found[name].mean() for name in names]))
        values = torch.stack(draws).detach()
        wanted = enumerated(*WEIGHTS[sampling](4, 8))
        away = (values.mean(0) - wanted) / (values.std(0) / len(values) ** 0.5)
        assert away.abs().max() < 4, sampling
        bias = wanted - truth
        assert bias[0] > 0.05  # the logarithm of an unbiased estimate is too small
    weighted, stratified = (
        enumerated(*WEIGHTS[s](4, 8)) - truth for s in ("weighted", "stratified")
    )
    assert abs(stratified[0]) < abs(weighted[0])
    assert abs(stratified[1]) < abs(weighted[1])


# ---------------------------------------------------------------------------------------------
# What it takes


class _Largest(TorchDispatchMode):
    """How many entries the largest tensor has that anything makes."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.entries = max([self.entries, *sizes])
        return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [1, 2])
def test_no_tensor_is_larger_than_all_pairs(kind: str, number: int):
    pair = RowPair.random(40, 12, KINDS[kind])
    particles = pair.particles(number=number)
    with _Largest() as largest:
        TotalCorrelation()(particles, STEP).backward()
    assert largest.entries <= 40 * 40


def test_small_scales_lose_little_in_single_precision():
    """Of a posterior that is narrow beside its distance from 0, value and gradient."""
    torch.manual_seed(0)
    pair = RowPair(3 + torch.randn(30, 2), torch.full((30, 2), 1e-2))
    z = pair.posterior(torch.arange(30)).sample()
    single = RowPair(pair.loc.detach().float(), pair.scale.detach().float())
    found = []
    for one, at in ((single, z.float()), (pair, z)):
        value = TotalCorrelation(sampling="batch")(one.particles(z=at), STEP)
        found.append((value.detach().double(), gradient(value, [one.loc, one.scale]).double()))
    (value, slope), (exact, exact_slope) = found
    torch.testing.assert_close(value, exact, atol=1e-3, rtol=0)
    assert (slope - exact_slope).norm() < 1e-3 * exact_slope.norm()


# ---------------------------------------------------------------------------------------------
# Posteriors of other kinds, and what is refused


class Coupled(RowPair):
    """One covariance for all rows."""

    def posterior(self, rows: Tensor) -> Any:
        covariance = torch.eye(2) + 0.5
        return dist.MultivariateNormal(self.loc[rows], covariance)


def test_mutual_information_takes_any_density():
    pair = Coupled.random(5, 2)
    particles = pair.particles(number=2)
    z = particles.samples["z"]
    pairs = dist.MultivariateNormal(pair.loc, torch.eye(2) + 0.5).log_prob(z[:, :, None])
    own = pairs.diagonal(dim1=1, dim2=2)
    wanted = (own - pairs.logsumexp(2)).mean() + math.log(5)
    found = MutualInformation()(particles, STEP)
    assert_same(found, wanted)
    assert_same(*(gradient(value, [pair.loc]) for value in (found, wanted)))


def test_mutual_information_takes_flows():
    torch.manual_seed(0)
    guide = FlowGuide(lambda: dist.transforms.affine_coupling(2, [4]))
    x = data(5, X_DIM)
    particles = table(LinearModel(), guide, x, number=1)
    z = particles.samples["z"][0]
    log_q = torch.stack([guide.posterior(row.expand_as(x)).log_prob(z) for row in x], 1)
    wanted = (log_q.diagonal() - log_q.logsumexp(1)).mean() + math.log(5)
    found = MutualInformation()(particles, STEP)
    assert_same(found, wanted)
    parameters = list(guide.parameters())
    assert_same(*(gradient(value, parameters) for value in (found, wanted)))


class Plates(RowPair):
    """Rows at dim -2, entries of a row in a plate of their own: D is what a row has in all."""

    def guide(self, rows: Tensor) -> None:
        with pyro.plate("data", len(rows), dim=-2), pyro.plate("time", 2, dim=-1):
            shape = (len(rows), 2, -1)
            fn = self.kind(self.loc[rows].reshape(shape), self.scale[rows].reshape(shape))
            pyro.sample("z", fn.to_event(1))

    def model(self, rows: Tensor) -> None:
        with pyro.plate("data", len(rows), dim=-2):
            with pyro.plate("time", 2, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = z.sum((-2, -1))[..., None]
            pyro.sample("x", dist.Normal(loc, 1.0), obs=rows.to(z)[:, None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [1, 3])
def test_plates_inside_a_row_are_dimensions(kind: str, number: int):
    pair = Plates.random(5, 4, KINDS[kind])
    particles = pair.particles(number=number)
    z = particles.samples["z"].reshape(number, 5, 4)
    pairs = pair.kind(pair.loc, pair.scale).log_prob(z[:, :, None])
    wanted = (pairs.sum(-1).logsumexp(2) - pairs.logsumexp(2).sum(-1)).mean() + 3 * math.log(5)
    assert_same(TotalCorrelation(sampling="batch")(particles, STEP), wanted)


class Grid(RowPair):
    """Rows in two plates."""

    def guide(self, rows: Tensor) -> None:
        with pyro.plate("left", 3, dim=-2), pyro.plate("right", 2, dim=-1):
            fn = self.kind(self.loc.reshape(3, 2, -1), self.scale.reshape(3, 2, -1))
            pyro.sample("z", fn.to_event(1))

    def model(self, rows: Tensor) -> None:
        with pyro.plate("left", 3, dim=-2), pyro.plate("right", 2, dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=rows.to(z).reshape(3, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [1, 3])
def test_rows_may_be_those_of_several_plates(kind: str, number: int):
    pair = Grid.random(6, 3, KINDS[kind])
    particles = pair.particles(number=number)
    wanted = by_hand(particles, pair, 1 / 6, 1 / 6)
    assert_same(decomposition(particles, sampling="batch"), wanted)


def test_refusals_name_the_site_and_the_cure():
    with pytest.raises(ValueError, match=r"site 'z': its MultivariateNormal does not factorize"):
        TotalCorrelation()(Coupled.random(5, 2).particles(), STEP)
    with pytest.raises(ValueError, match=r"came total=3 for a batch of 7 rows"):
        TotalCorrelation(total=3)(RowPair.random().particles(), STEP)
    with pytest.raises(
        ValueError, match=r"TotalCorrelation: came sampling='mws', wanted one of 'ba"
    ):
        TotalCorrelation(sampling="mws")
    with pytest.raises(ValueError, match=r"decomposition: came sampling='mws'"):
        decomposition(RowPair.random().particles(), sampling="mws")
