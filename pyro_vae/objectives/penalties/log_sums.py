"""log sum_j q(z_i | x_j) over the rows of a batch: of all dimensions together and of each alone.

The table of all pairs and dimensions, ``[B, B, D]``, is never made: pairs are gone through one
dimension at a time where the posterior is Gaussian, some rows at a time where it is not, and once more
in backward. Machine code takes all pairs in one loop.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from pyro_vae.objectives.penalties.latent import Latent
from pyro_vae.objectives.tracing import elementwise
from pyro_vae.operators import operator

__all__ = ["log_sums"]

CACHED = 2**17  # pairs
# Of an exponent beside one near 0: where its result underflows, exp is 20 times slower.
FLOOR = -80.0


def log_sums(latent: Latent, marginals: bool = True) -> tuple[Tensor, Tensor]:
    """``[K, B]`` of all dimensions and ``[K, B, D]`` of each (``[K, B, 0]`` unless asked for)."""
    if (normal := latent.normal()) is None:
        return _by_rows(latent, marginals)
    loc, scale = normal
    each_dim_first = (t.mT.contiguous() for t in (latent.draws, loc, scale.reciprocal()))
    parts = [_OfGaussians.apply(*one, marginals) for one in zip(*each_dim_first, strict=True)]
    joint, each = zip(*parts, strict=True)
    return torch.stack(joint), torch.stack(each).mT


def _by_rows(latent: Latent, marginals: bool) -> tuple[Tensor, Tensor]:
    """For any density: as many rows of z at a time as make a ``[B, B]``."""
    fn, (particles, rows, dims) = latent.posterior, latent.draws.shape
    plates = latent.particles.plan.rows
    at = [dim - fn.event_dim for dim in plates]
    value = latent.here["value"].movedim(at, [*range(len(at))]).flatten(0, len(at) - 1)

    def part(z: Tensor) -> tuple[Tensor, Tensor]:
        size = len(z)
        for dim in reversed(at):
            z = z.unsqueeze(dim)
        density, event_dim = elementwise(fn, z, masked=False)
        density = density.movedim([d - event_dim for d in plates], [*range(-len(plates), 0)])
        density = density.reshape(size, particles, -1, rows)
        each = density if marginals else density[:, :, :0]
        return density.sum(2).logsumexp(-1), each.logsumexp(-1)

    size = max(1, rows // (particles * dims))
    parts = [
        checkpoint(part, z, use_reentrant=False, preserve_rng_state=False)
        for z in value.split(size)
    ]
    joint, each = zip(*parts, strict=True)
    return torch.cat(joint).movedim(0, 1), torch.cat(each).movedim(0, 1)


class _OfGaussians(torch.autograd.Function):
    """For z, means and 1 / scales ``[D, B]``. In each dimension a row's own term keeps the sum away from
    0, so that it is taken as it is; together they would underflow."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, loc: Tensor, rate: Tensor, marginals: bool
    ) -> tuple[Tensor, Tensor]:
        table, joint, sums = _sums()(z, loc, rate, marginals)
        ctx.save_for_backward(z, loc, rate, table, joint, sums)
        return joint, sums.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_joint: Tensor, of_each: Tensor) -> tuple[Tensor | None, ...]:
        *given, sums = ctx.saved_tensors
        return *_gradients()(*given, of_joint, of_each / sums), None


@functools.cache
def _sums() -> Any:
    """``(z, loc, rate, marginals) -> table [B, B], joint [B], sums [D, B]`` or, without marginals,
    ``[0, B]``."""
    return operator(
        "log_sums(Tensor z, Tensor loc, Tensor rate, bool marginals) -> (Tensor, Tensor, Tensor)",
        _sums_by_parts,
        _sums_at_once,
        lambda z, loc, rate, marginals: (
            z.new_empty(z.shape[1], loc.shape[1]),
            z.new_empty(z.shape[1]),
            z.new_empty(len(z) if marginals else 0, z.shape[1]),
        ),
    )


@functools.cache
def _gradients() -> Any:
    """Of z, loc and rate, by those of ``joint`` and of ``sums``."""
    return operator(
        "log_sums_backward(Tensor z, Tensor loc, Tensor rate, Tensor table, Tensor joint, "
        "Tensor of_joint, Tensor of_sums) -> (Tensor, Tensor, Tensor)",
        _gradients_by_parts,
        _gradients_at_once,
        lambda z, loc, rate, *_: tuple(map(torch.empty_like, (z, loc, rate))),
    )


def _sums_by_parts(
    z: Tensor, loc: Tensor, rate: Tensor, marginals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows of z at a time, whose pairs stay in a core's cache."""
    level, size = _level(rate), max(1, CACHED // loc.shape[1])
    table = z.new_zeros(z.shape[1], loc.shape[1])
    sums = z.new_empty(len(z) if marginals else 0, z.shape[1])
    for part, rows, each in zip(
        table.split(size), z.split(size, 1), sums.split(size, 1), strict=True
    ):
        for d, one in enumerate(zip(rows, loc, rate, level, strict=True)):
            _, log_q = _pairs(*one)
            part.add_(log_q)
            if marginals:
                torch.sum(_exp(log_q), 1, out=each[d])
    return table, _log_sum(table), sums


def _gradients_by_parts(
    z: Tensor,
    loc: Tensor,
    rate: Tensor,
    table: Tensor,
    joint: Tensor,
    of_joint: Tensor,
    of_sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    level, size = _level(rate), max(1, CACHED // loc.shape[1])
    of_z, of_loc, of_rate = torch.empty_like(z), torch.zeros_like(loc), torch.zeros_like(rate)
    for start in range(0, len(table), size):
        rows = slice(start, start + size)
        shares = _exp(table[rows] - joint[rows, None]).mul_(of_joint[rows, None])
        for d, (here, m, r, at) in enumerate(zip(z[:, rows], loc, rate, level, strict=True)):
            away, log_q = _pairs(here, m, r, at)
            share = shares  # what each pair's log density counts
            if len(of_sums):
                share = torch.addcmul(shares, _exp(log_q), of_sums[d, rows, None])
            pull = away.mul_(share)
            first, second = torch.stack([torch.ones_like(here), here]) @ pull
            of_z[d, rows] = -(pull @ r)
            of_loc[d] += r * first
            of_rate[d] += share.sum(0) / r - (second - m * first)  # pull times z - m
    return of_z, of_loc, of_rate


def _sums_at_once(
    z: Tensor, loc: Tensor, rate: Tensor, marginals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """For a compiler, which makes one loop of each sum and no table of all dimensions, as long as what
    sums have in common is written out for each."""
    given = _beside(z, loc, rate)
    table = _all_pairs(*given)[1].sum(0)
    sums = _exp(_all_pairs(*given)[1]).sum(2) if marginals else z[:0]
    return table, _log_sum(table), sums


def _gradients_at_once(
    z: Tensor,
    loc: Tensor,
    rate: Tensor,
    table: Tensor,
    joint: Tensor,
    of_joint: Tensor,
    of_sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    shares = _exp(table - joint[:, None]) * of_joint[:, None]
    given, of_sums = _beside(z, loc, rate), _in_memory(of_sums)

    def shared() -> tuple[Tensor, Tensor]:
        away, log_q = _all_pairs(*given)
        return away, shares + _exp(log_q) * of_sums[..., None] if len(of_sums) else shares

    (a, for_z), (b, for_loc), (c, for_rate) = shared(), shared(), shared()
    of_z = -(for_z * a * given[2]).sum(2)
    of_loc = (for_loc * b).sum(1) * rate
    of_rate = (for_rate * (1 - c.square())).sum(1) / rate
    return of_z, of_loc, of_rate


def _exp(x: Tensor) -> Tensor:
    """In place."""
    return x.clamp_(min=FLOOR).exp_()


def _log_sum(table: Tensor) -> Tensor:
    most = table.amax(1)
    return most + _exp(table - most[:, None]).sum(1).log()


def _level(rate: Tensor) -> Tensor:
    return rate.log() - 0.5 * math.log(2 * math.pi)


def _pairs(z: Tensor, loc: Tensor, rate: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """(z_i - m_j) / s_j and its log density, ``[n, m]``."""
    away = (z[:, None] - loc).mul_(rate)
    return away, torch.addcmul(level, away, away, value=-0.5)


def _beside(z: Tensor, loc: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z ``[D, n, 1]``; mean, rate and level ``[D, 1, m]``."""
    z, loc, rate, level = map(_in_memory, (z, loc, rate, _level(rate)))
    return z[..., None], loc[:, None], rate[:, None], level[:, None]


def _in_memory(x: Tensor) -> Tensor:
    """Where a compiler has to put it first: not made anew, nor gathered, for every pair."""
    return x.as_strided(x.shape, x.stride())


def _all_pairs(z: Tensor, loc: Tensor, rate: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """As ``_pairs``, of all dimensions."""
    away = (z - loc) * rate
    return away, level - 0.5 * away.square()
