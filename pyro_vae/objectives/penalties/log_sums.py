"""log sum_j q(z_i | x_j) over the rows of a batch: of all dimensions together and of each alone.

The table of all pairs and dimensions, ``[B, B, D]``, is never made: pairs are gone through one
dimension at a time where the posterior is Gaussian, some rows at a time where it is not, and once more
in backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import checkpoint

from pyro_vae.objectives.penalties.latent import Latent
from pyro_vae.objectives.tracing import elementwise

__all__ = ["log_sums"]

CACHED = 2**17  # pairs


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
        tables, joints, sums = [], [], []
        level, size = _level(rate), _at_once(loc)
        for rows in z.split(size, 1):
            table, each = z.new_zeros(rows.shape[1], loc.shape[1]), list[Tensor]()
            for one in zip(rows, loc, rate, level, strict=True):
                _, log_q = _pairs(*one)
                table.add_(log_q)
                if marginals:
                    each.append(log_q.exp_().sum(1))
            tables.append(table)
            joints.append(table.logsumexp(1))
            sums.append(torch.stack(each) if marginals else rows[:0])
        joint, each_sum = torch.cat(joints), torch.cat(sums, 1)
        ctx.save_for_backward(z, loc, rate, joint, each_sum, *tables)
        return joint, each_sum.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_joint: Tensor, of_each: Tensor) -> tuple[Tensor | None, ...]:
        z, loc, rate, joint, each_sum, *tables = ctx.saved_tensors
        marginals, level, size = len(each_sum) > 0, _level(rate), _at_once(loc)
        of_each = of_each / each_sum
        of_z, of_loc, of_rate = [], torch.zeros_like(loc), torch.zeros_like(rate)
        for k, table in enumerate(tables):
            rows = slice(k * size, k * size + len(table))
            shares = (table - joint[rows, None]).exp_().mul_(of_joint[rows, None])
            pulls = []
            for d, (here, m, r, at) in enumerate(zip(z[:, rows], loc, rate, level, strict=True)):
                away, log_q = _pairs(here, m, r, at)
                share = shares  # what each pair's log density counts
                if marginals:
                    share = torch.addcmul(shares, log_q.exp_(), of_each[d, rows, None])
                pull = away.mul_(share)
                first, second = torch.stack([torch.ones_like(here), here]) @ pull
                pulls.append(-(pull @ r))
                of_loc[d] += r * first
                of_rate[d] += share.sum(0) / r - (second - m * first)  # pull times z - m
            of_z.append(torch.stack(pulls))
        return torch.cat(of_z, 1), of_loc, of_rate, None


def _at_once(loc: Tensor) -> int:
    """Rows of z whose pairs stay in a core's cache. Of a graph, which grows by every part, all: there
    the compiler sees to it."""
    if get_proxy_mode() is not None or loc.device.type != "cpu":
        return loc.shape[1]
    return max(1, CACHED // loc.shape[1])


def _level(rate: Tensor) -> Tensor:
    return rate.log() - 0.5 * math.log(2 * math.pi)


def _pairs(z: Tensor, loc: Tensor, rate: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """(z_i - m_j) / s_j and its log density, ``[n, m]``."""
    away = (z[:, None] - loc).mul_(rate)
    return away, torch.addcmul(level, away, away, value=-0.5)
