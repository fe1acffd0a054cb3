"""Penalties against the truth about q(z): an objective with one minus the same without.

The latent has two dimensions and the posterior of each of a few rows is Gaussian, so that q(z) is a
known mixture and expectations are Gauss-Hermite sums. What is biased by design is held against a naive
formula at the same draws, and its bias against the truth is measured.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.objectives.bounds import Elbo
from pyro_vae.objectives.objective import Objective
from pyro_vae.objectives.penalties import (
    DIP,
    MMD,
    Adversarial,
    MutualInformation,
    Penalty,
    Sinkhorn,
    SlicedWasserstein,
    TotalCorrelation,
)
from pyro_vae.objectives.penalties.latent import Latent
from pyro_vae.objectives.schedules import linear
from tests.gate.pairs import BIASED, SIGMAS, UNBIASED
from tests.row_pairs import RowPair

__all__ = ["Measured", "PenaltyCell", "penalty_cells"]

ROWS = 5  # of all data
CALLS = 32  # each an independent answer
DIMS = 2


class Critic(nn.Module):
    """T(z), the same whenever it is made."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first, self.last = (
            nn.Parameter(torch.randn(size, generator=generator).double()) for size in ((2, 3), 3)
        )

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.first) @ self.last


@dataclass(frozen=True)
class Draws:
    """What one call saw.

    Attributes:
        z: of the posterior ``[K, B, D]``, with their path.
        y: of the prior.
        loc, scale: of the rows ``[B, D]``.
    """

    z: Tensor
    y: Tensor | None
    loc: Tensor
    scale: Tensor


Truth = Callable[[RowPair, Any], Tensor]  # and the critic, to nats per row
AtDraws = Callable[[Draws], Tensor]


@dataclass
class Measured:
    """In standard errors, or relative to the truth's gradient; ``value_bias`` in nats."""

    problems: list[str]
    worst: float = 0.0
    error: float = 0.0
    bias: float = 0.0
    sigmas: float = 0.0
    value_bias: float = 0.0


@dataclass(frozen=True)
class PenaltyCell:
    """A penalty and what is declared of it.

    Attributes:
        truth: about q(z) of all rows.
        declared: its expectation, or at the draws of a call, where that is not the truth.
        batch: rows of a call, drawn anew; None: all.
        repeats: whether a row may come twice.
        particles: K.
        calls: how many answers make a mean.
    """

    name: str
    make: Callable[[], Penalty]
    truth: Truth
    declared: Truth | None = None
    at_draws: AtDraws | None = None
    batch: int | None = None
    repeats: bool = False
    chunk: int | None = None
    particles: int = 4
    calls: int = CALLS

    def __str__(self) -> str:
        rows = "all rows" if self.batch is None else f"{self.batch} of {ROWS} rows"
        return f"penalty {self.name}, {rows}" + (f" chunk={self.chunk}" if self.chunk else "")

    @property
    def status(self) -> str:
        return BIASED if self.declared or self.at_draws else UNBIASED

    def measure(self) -> Measured:
        """The mean over calls of the difference to what is declared, and to the truth."""
        pair, penalty = RowPair.random(ROWS, DIMS), self.make()
        critic = getattr(penalty, "critic", None)
        parameters = [*pair.parameters(), *(critic.parameters() if critic else ())]
        generator = torch.Generator().manual_seed(0)
        wanted = _answer(self.truth(pair, critic), parameters)
        known = _answer((self.declared or self.truth)(pair, critic), parameters)
        off, bias, problems = [], [], []
        of_model = slice(1 + 2 * ROWS * DIMS, 1 + 2 * ROWS * DIMS + DIMS)
        for call in range(self.calls):
            rows = self._rows(generator)
            found, draws = self._found(pair, penalty, parameters, rows, call)
            if self.at_draws is not None:
                known = _answer(self.at_draws(draws), parameters)
            if float(found[of_model].abs().max()) > 1e-9:
                problems = ["the penalty trains the prior"]
            off.append(found - known)
            bias.append(found - wanted)
        z, norm = _sigmas(torch.stack(off), wanted), wanted[1:].norm()
        worst = float(z.max())
        if not worst <= SIGMAS:  # NaN fails
            problems.append(f"off by {worst:.1f} standard errors")
        away = torch.stack(bias)
        error = away.std(0)[1:].norm() / math.sqrt(self.calls)
        return Measured(
            problems,
            worst,
            float(error / norm),
            float(away.mean(0)[1:].norm() / norm),
            float(_sigmas(away, wanted).max()),
            float(away.mean(0)[0]),
        )

    def _rows(self, generator: torch.Generator) -> Tensor:
        if self.batch is None:
            return torch.arange(ROWS)
        if self.repeats:
            return torch.randint(ROWS, (self.batch,), generator=generator)
        return torch.randperm(ROWS, generator=generator)[: self.batch]

    def _found(
        self, pair: RowPair, penalty: Penalty, parameters: list[Tensor], rows: Tensor, seed: int
    ) -> tuple[Tensor, Draws]:
        """Value and gradient of the penalty ``[1 + parameters]`` by the losses' difference."""
        seen: dict[str, Tensor] = {}

        def watched(particles: Any, step: Tensor) -> Tensor:
            seen["z"] = particles.samples["z"]
            return penalty(particles, step)

        losses = []
        for penalties in ([watched], []):
            objective = Objective(
                Elbo(), "pathwise", None, penalties, num_particles=self.particles, chunk=self.chunk
            )
            torch.manual_seed(seed)
            with _recorded(seen):
                loss = objective.differentiable_loss(pair.model, pair.guide, rows)
            losses.append(_answer(loss, parameters))
        y = seen["y"].detach() if "y" in seen else None
        draws = Draws(seen["z"], y, pair.loc[rows], pair.scale[rows])
        return (losses[0] - losses[1]) / len(rows), draws


def _sigmas(difference: Tensor, wanted: Tensor) -> Tensor:
    """Mean over calls in standard errors."""
    error = difference.std(0) / math.sqrt(len(difference))
    rounding = 1e-9 * (1 + wanted.norm())
    sigmas: Tensor = difference.mean(0).abs() / (error**2 + rounding**2).sqrt()
    return sigmas


def _answer(value: Tensor, parameters: list[Tensor]) -> Tensor:
    gradient = torch.autograd.grad(
        value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([value.detach().reshape(1), *(part.flatten() for part in gradient)])


@contextmanager
def _recorded(seen: dict[str, Tensor]) -> Iterator[None]:
    """Draws of the prior."""
    kept = Latent.from_prior

    def from_prior(latent: Latent) -> Tensor:
        seen["y"] = kept(latent)
        return seen["y"]

    Latent.from_prior = from_prior  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Latent.from_prior = kept  # type: ignore[method-assign]


# ---------------------------------------------------------------------------------------------
# The truth


@functools.cache
def _nodes(count: int) -> tuple[Tensor, Tensor]:
    """Standard normal noise ``[points, D]`` and its weights."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    axis, share = torch.as_tensor(nodes), torch.as_tensor(weights / weights.sum())
    return torch.cartesian_prod(axis, axis), torch.outer(share, share).flatten()


def _of_rows(pair: RowPair, function: Callable[[Tensor], Tensor]) -> Tensor:
    """E_q(z) of a function of z ``[..., D]``."""
    nodes, weights = _nodes(40)
    values = function(pair.loc[:, None] + pair.scale[:, None] * nodes)
    return (values @ weights).mean()


def _of_prior(pair: RowPair, function: Callable[[Tensor], Tensor]) -> Tensor:
    nodes, weights = _nodes(40)
    return function(pair.prior_loc.detach() + nodes) @ weights


def _log_normal(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return -0.5 * ((z - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def _pairs(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """log q(z_d | x_j), ``[..., B, D]``."""
    return _log_normal(z[..., None, :], loc, scale)


def _total_correlation(pair: RowPair, _: Any) -> Tensor:
    def term(z: Tensor) -> Tensor:
        table = _pairs(z, pair.loc, pair.scale)
        joint = table.sum(-1).exp().mean(-1).log()
        return joint - table.exp().mean(-2).log().sum(-1)

    return _of_rows(pair, term)


def _mutual_information(pair: RowPair, _: Any) -> Tensor:
    nodes, weights = _nodes(40)
    z = pair.loc[:, None] + pair.scale[:, None] * nodes
    own = _log_normal(z, pair.loc[:, None], pair.scale[:, None]).sum(-1)
    joint = _pairs(z, pair.loc, pair.scale).sum(-1).exp().mean(-1).log()
    return ((own - joint) @ weights).mean()


def _dip(offdiagonal: float, diagonal: float, spread: bool) -> Truth:
    def truth(pair: RowPair, _: Any) -> Tensor:
        mean = pair.loc.mean(0)
        c = sum(torch.outer(m - mean, m - mean) for m in pair.loc) / ROWS
        if spread:
            c = c + torch.diag((pair.scale**2).mean(0))
        assert isinstance(c, Tensor)
        away = (c[0, 0] - 1) ** 2 + (c[1, 1] - 1) ** 2
        return offdiagonal * (c[0, 1] ** 2 + c[1, 0] ** 2) + diagonal * away

    return truth


def _kernel(square: Tensor, name: str, scales: tuple[float, ...]) -> Tensor:
    off = torch.stack([square / (2 * DIMS * s) for s in scales])
    return ((-off).exp() if name == "rbf" else 1 / (1 + off)).mean(0)


def _mmd(name: str, scales: tuple[float, ...]) -> Truth:
    def apart(loc: Tensor, variance: Tensor) -> Tensor:
        """E k of two draws whose difference is Gaussian."""
        nodes, weights = _nodes(100)
        off = loc[..., None, :] + variance.sqrt()[..., None, :] * nodes
        return (_kernel(off.square().sum(-1), name, scales) @ weights).mean()

    def truth(pair: RowPair, _: Any) -> Tensor:
        loc, variance, prior = pair.loc, pair.scale**2, pair.prior_loc.detach()
        within = apart(loc[:, None] - loc, variance[:, None] + variance)
        alone = apart(torch.zeros(1, DIMS), 2 * torch.ones(1, DIMS))
        return within + alone - 2 * apart(loc - prior, variance + 1)

    return truth


def _expected_logit(pair: RowPair, critic: Any) -> Tensor:
    first, last = critic.first.detach(), critic.last.detach()
    return _of_rows(pair, lambda z: torch.tanh(z @ first) @ last)


def _critics(against: str, speed: float) -> Truth:
    """E_q T, and the gradient of the critic's cross entropy at draws that are constants."""

    def declared(pair: RowPair, critic: Any) -> Tensor:
        rest = RowPair(pair.loc.detach(), pair.scale.detach())
        if against == "prior":
            other = _of_prior(pair, lambda z: softplus(critic(z)))
        else:
            one, two = torch.cartesian_prod(torch.arange(ROWS), torch.arange(ROWS)).T
            mixed = (torch.stack([t[one, 0], t[two, 1]], 1) for t in (rest.loc, rest.scale))
            other = _of_rows(RowPair(*mixed), lambda z: softplus(critic(z)))
        own = _of_rows(rest, lambda z: softplus(-critic(z))) + other
        return _expected_logit(pair, critic) + speed * (own - own.detach())

    return declared


def _kl_of_prior(pair: RowPair, _: Any) -> Tensor:
    def term(z: Tensor) -> Tensor:
        joint = _pairs(z, pair.loc, pair.scale).sum(-1).exp().mean(-1).log()
        return joint - _log_normal(z, pair.prior_loc.detach(), torch.ones(DIMS)).sum(-1)

    return _of_rows(pair, term)


# ---------------------------------------------------------------------------------------------
# Naive formulas at the draws


def _by_hand(part: str, mine: float, other: float) -> AtDraws:
    """From the table of all pairs; weights of the draw's own row and of each other."""

    def at_draws(draws: Draws) -> Tensor:
        table = _pairs(draws.z, draws.loc, draws.scale)  # [K, B, B, D]
        rows = table.shape[1]
        weights = torch.full((rows, rows), other).fill_diagonal_(mine)
        joint = (weights * table.sum(-1).exp()).sum(-1).log()
        if part == "mi":
            return (_log_normal(draws.z, draws.loc, draws.scale).sum(-1) - joint).mean()
        each = (weights[..., None] * table.exp()).sum(-2).log()
        return (joint - each.sum(-1)).mean()

    return at_draws


def _biased_mmd(draws: Draws) -> Tensor:
    assert draws.y is not None

    def mean(a: Tensor, b: Tensor) -> Tensor:
        square = (a[:, :, None] - b[:, None]).square().sum(-1)
        return _kernel(square, "rbf", (1.0,)).mean()

    return mean(draws.z, draws.z) + mean(draws.y, draws.y) - 2 * mean(draws.z, draws.y)


def _sliced(p: float, angles: int = 360) -> AtDraws:
    """The best of all assignments, for directions all around."""

    def at_draws(draws: Draws) -> Tensor:
        assert draws.y is not None
        turn = torch.arange(angles) * (math.pi / angles)
        directions = torch.stack([turn.cos(), turn.sin()])
        rows = range(draws.z.shape[1])
        orders = torch.tensor([*itertools.permutations(rows)])  # [orders, B]
        along, prior = draws.z @ directions, draws.y @ directions  # [K, B, angles]
        cost = (along[:, None] - prior[:, orders]).abs().pow(p).mean(2)
        return cost.amin(1).mean()

    return at_draws


def _sinkhorn(epsilon: float) -> AtDraws:
    """By the plans themselves, scaled until they have their marginals."""
    epsilon = epsilon * 2 * DIMS

    def transport(x: Tensor, y: Tensor) -> Tensor:
        cost = (x[:, None] - y).square().sum(-1)
        with torch.no_grad():
            kernel = (-cost / epsilon).exp()
            a, b = torch.ones(len(x)) / len(x), torch.ones(len(y)) / len(y)
            v = torch.ones(len(y))
            for _ in range(100):
                u = a / (kernel @ v)
                v = b / (kernel.T @ u)
            plan = u[:, None] * kernel * v
            entropy = (plan * (plan / torch.outer(a, b)).log()).sum()
        return (plan * cost).sum() + epsilon * entropy

    def at_draws(draws: Draws) -> Tensor:
        assert draws.y is not None
        each = [
            transport(z, y) - (transport(z, z) + transport(y, y)) / 2
            for z, y in zip(draws.z, draws.y, strict=True)
        ]
        return torch.stack(each).mean()

    return at_draws


def _many(at_draws: Callable[[Tensor, Tensor], Tensor], number: int) -> Truth:
    """A distance of samples, of so many draws a row that they stand for the distributions."""

    def truth(pair: RowPair, _: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(2, number, ROWS, DIMS, generator=generator).double()
        z = (pair.loc + pair.scale * noise[0]).flatten(0, 1)
        return at_draws(z, (pair.prior_loc.detach() + noise[1]).flatten(0, 1))

    return truth


def _by_sorting(z: Tensor, y: Tensor, p: float, angles: int = 90) -> Tensor:
    turn = torch.arange(angles) * (math.pi / angles)
    directions = torch.stack([turn.cos(), turn.sin()])
    along, prior = ((t @ directions).sort(0).values for t in (z, y))
    return (along - prior).abs().pow(p).mean()


def _by_plan(z: Tensor, y: Tensor) -> Tensor:
    return _sinkhorn(1.0)(Draws(z[None], y[None], z, z))


# ---------------------------------------------------------------------------------------------
# The cells


def _plus(truth: Truth, constant: float, factor: float = 1.0) -> Truth:
    return lambda pair, critic: factor * truth(pair, critic) + constant


IMQ = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def penalty_cells() -> list[PenaltyCell]:
    """Instances of every exported penalty."""
    correlation, information = _total_correlation, _mutual_information
    log_n, rbf = math.log(ROWS), _mmd("rbf", (1.0,))
    stratified = (1 / ROWS, (ROWS - 1) / (ROWS * 2))
    cell = functools.partial(PenaltyCell, particles=16)
    minibatch = functools.partial(cell, batch=3)
    anew = functools.partial(cell, batch=24, repeats=True)
    return [
        cell("dip I", lambda: DIP(0.7, kind="I"), _dip(0.7, 7.0, False), calls=3),
        cell("dip II", lambda: DIP(0.7, 0.3), _dip(0.7, 0.3, True), calls=3, chunk=12),
        anew("mmd", lambda: MMD(2.0), _plus(rbf, 0, 2)),
        anew("mmd imq", lambda: MMD(kernel="imq"), _mmd("imq", IMQ)),
        anew("mmd linear", lambda: MMD(estimate="linear"), rbf),
        cell("mmd biased", lambda: MMD(estimate="biased"), rbf, at_draws=_biased_mmd),
        cell("tc", lambda: TotalCorrelation(-0.6, "stratified"), _plus(correlation, 0, -0.6)),
        cell(
            "tc of a batch",
            lambda: TotalCorrelation(linear(10, 0.5), "batch"),
            _plus(correlation, 0, 0.5),
        ),
        cell(
            "tc weighted",
            TotalCorrelation,
            correlation,
            declared=_plus(correlation, (DIMS - 1) * log_n),
        ),
        minibatch(
            "tc weighted",
            lambda: TotalCorrelation(total=ROWS),
            correlation,
            at_draws=_by_hand("correlation", 1 / (3 * ROWS), 1 / (3 * ROWS)),
        ),
        minibatch(
            "tc stratified",
            lambda: TotalCorrelation(1.0, "stratified", ROWS),
            correlation,
            at_draws=_by_hand("correlation", *stratified),
        ),
        cell("mi", MutualInformation, information),
        minibatch("mi", MutualInformation, information, at_draws=_by_hand("mi", 1 / 3, 1 / 3)),
        minibatch(
            "mi stratified",
            lambda: MutualInformation(1.0, "stratified", ROWS),
            information,
            at_draws=_by_hand("mi", *stratified),
        ),
        *(
            PenaltyCell(
                f"sliced W{p}",
                functools.partial(SlicedWasserstein, projections=100, p=p),
                _many(functools.partial(_by_sorting, p=p), 1000),
                at_draws=_sliced(p),
            )
            for p in (1, 2)
        ),
        PenaltyCell(
            "sinkhorn",
            lambda: Sinkhorn(epsilon=1.0, iterations=50),
            _many(_by_plan, 20),
            at_draws=_sinkhorn(1.0),
            calls=12,
        ),
        cell(
            "adversarial",
            lambda: Adversarial(Critic(), speed=0.5),
            _kl_of_prior,
            declared=_critics("prior", 0.5),
            particles=64,
        ),
        cell(
            "adversarial permuted",
            lambda: Adversarial(Critic(), against="permuted"),
            correlation,
            declared=_critics("permuted", 1.0),
            particles=64,
        ),
    ]
