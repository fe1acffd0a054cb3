"""Distances between draws of the aggregate posterior and of the prior, by kernels and by transport."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_vae.objectives.penalties.latent import Latent, Penalty, chosen
from pyro_vae.objectives.schedules import Schedule

__all__ = ["MMD", "Sinkhorn", "SlicedWasserstein"]

Kernel = Callable[[Tensor], Tensor]


def _rbf(square: Tensor, scale: float, slope: Tensor | None) -> Tensor:
    value = (square * (-1 / scale)).exp_()
    if slope is not None:
        slope.sub_(value, alpha=1 / scale)
    return value


def _imq(square: Tensor, scale: float, slope: Tensor | None) -> Tensor:
    value = torch.add(square.new_ones(()), square, alpha=1 / scale).reciprocal_()
    if slope is not None:
        slope.addcmul_(value, value, value=-1 / scale)
    return value


# k(r / s), whose derivative by r is added to a slope
KERNELS: dict[str, Callable[[Tensor, float, Tensor | None], Tensor]] = {"rbf": _rbf, "imq": _imq}
SCALES = {"imq": (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)}  # of the WAE's code
ESTIMATES = ("unbiased", "biased", "linear")


class MMD(Penalty):
    """Squared maximum mean discrepancy of q(z) and p(z), E k(z, z') + E k(y, y') - 2 E k(z, y).

    With ``"rbf"`` InfoVAE's (Zhao et al. 2019), with ``"imq"`` that of WAE-MMD (Tolstikhin et al.
    2018, whose code sums over scales where this takes the mean). Not in nats, and at most 4 in size:
    its weight counts.

    Args:
        kernel: of r = |z - y|² / (2 D s), where 2 D is what two draws of N(0, I) are apart on average:
            ``"rbf"`` exp(-r), ``"imq"`` 1 / (1 + r), or a function of r, ``[...] -> [...]``.
        scales: s, one number or several, over which k is a mean. Default: 1; for ``"imq"`` seven from
            0.1 to 10.
        estimate: ``"unbiased"`` leaves pairs of the same draw out (and may be negative), ``"biased"``
            does not; ``"linear"`` takes B / 2 pairs (Gretton et al. 2012, section 6): unbiased as well,
            noisier, without any ``[B, B]``.

    Raises:
        ValueError: unknown kernel or estimate, scales that are not positive; at a call, fewer than two
            rows.
    """

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        kernel: str | Kernel = "rbf",
        scales: float | Sequence[float] | None = None,
        estimate: str = "unbiased",
        site: str | None = None,
    ) -> None:
        super().__init__(weight, site)
        if not callable(kernel):
            chosen("MMD", "kernel", kernel, KERNELS)
        chosen("MMD", "estimate", estimate, ESTIMATES)
        if scales is None:
            scales = SCALES.get(kernel, (1.0,)) if isinstance(kernel, str) else (1.0,)
        self.scales = (scales,) if isinstance(scales, int | float) else tuple(scales)
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"MMD: came scales={scales}, wanted positive numbers")
        self.kernel = kernel
        self.how = estimate

    def estimate(self, latent: Latent) -> Tensor:
        z, y = (t / math.sqrt(2.0 * t.shape[2]) for t in (latent.draws, latent.from_prior()))
        rows = z.shape[1]
        if rows < 2 and self.how != "biased":
            raise ValueError(f"MMD: came {rows} row, wanted two at least")
        if self.how == "linear":
            even = rows - rows % 2
            (z1, z2), (y1, y2) = ((t[:, 0:even:2], t[:, 1:even:2]) for t in (z, y))
            pairs = ((z1, z2, 1), (y1, y2, 1), (z1, y2, -1), (z2, y1, -1))
            terms = [s * self._mean((a - b).square().sum(-1)) for a, b, s in pairs]
            return torch.stack(terms).sum()
        alone = self.how == "unbiased"
        within = self._mean(_Squares.apply(z, z), alone) + self._mean(_Squares.apply(y, y), alone)
        return within - 2 * self._mean(_Squares.apply(z, y))

    def _mean(self, square: Tensor, others: bool = False) -> Tensor:
        """Of k over all pairs, or over those of one draw and another."""
        square = _off_diagonal(square) if others else square
        if callable(kernel := self.kernel):
            total = torch.stack([kernel(square / scale).sum() for scale in self.scales]).sum()
        else:
            total = _Sum.apply(square, kernel, self.scales)
        return total / (square.numel() * len(self.scales))


class _Sum(torch.autograd.Function):
    """Of a known kernel over all pairs and scales. Its gradient is taken on the way, so that one table
    is kept and not one for every scale."""

    @staticmethod
    def forward(ctx: Any, square: Tensor, kernel: str, scales: Sequence[float]) -> Tensor:
        slope = torch.zeros_like(square) if ctx.needs_input_grad[0] else None
        sums = [KERNELS[kernel](square, scale, slope).sum() for scale in scales]
        ctx.save_for_backward(slope)
        return torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_sum: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return of_sum * slope, None, None


class SlicedWasserstein(Penalty):
    """W_p^p of q(z) and p(z) along random directions, the mean over them (Kolouri et al. 2019).

    In one dimension transport is a matter of sorting. From B draws on each side it is biased upwards:
    two samples of one distribution are not the same.

    Args:
        projections: number of directions, drawn anew in each call.
        p: power of the distance.

    Raises:
        ValueError: fewer than one projection, p below 1.
    """

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        projections: int = 50,
        p: float = 2.0,
        site: str | None = None,
    ) -> None:
        super().__init__(weight, site)
        if projections < 1 or p < 1:
            raise ValueError(
                f"SlicedWasserstein: came projections={projections}, p={p}, wanted 1 or more of each"
            )
        self.projections, self.p = projections, p

    def estimate(self, latent: Latent) -> Tensor:
        z, y = latent.draws, latent.from_prior()
        directions = torch.randn(z.shape[2], self.projections, dtype=z.dtype, device=z.device)
        directions = directions / directions.norm(dim=0)
        along, prior = ((t @ directions).sort(1).values for t in (z, y))
        distance: Tensor = (along - prior).abs().pow(self.p).mean()
        return distance


class Sinkhorn(Penalty):
    """Debiased entropic transport, S(q, p) = T(q, p) - T(q, q) / 2 - T(p, p) / 2 (Genevay et al. 2018,
    Feydy et al. 2019), for the cost |z - y|²: between W_2² (epsilon to 0) and an MMD (to infinity).

    T is its dual at the potentials that the iterations end with, which are constants to the gradient:
    a lower bound of T, tight when they have converged.

    Args:
        epsilon: regularization, in units of 2 D, what two draws of N(0, I) are apart on average.
        iterations: of the potentials, in the log domain; the smaller epsilon, the more are needed.

    Raises:
        ValueError: epsilon or iterations not positive.
    """

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        epsilon: float = 0.05,
        iterations: int = 20,
        site: str | None = None,
    ) -> None:
        super().__init__(weight, site)
        if not epsilon > 0 or iterations < 1:
            raise ValueError(
                f"Sinkhorn: came epsilon={epsilon}, iterations={iterations}, wanted positive numbers"
            )
        self.epsilon, self.iterations = epsilon, iterations

    def estimate(self, latent: Latent) -> Tensor:
        z, y = latent.draws, latent.from_prior()
        within = self._transport(z, z) + self._transport(y, y)
        return self._transport(z, y) - within / 2

    def _transport(self, x: Tensor, y: Tensor) -> Tensor:
        epsilon = self.epsilon * 2.0 * x.shape[2]
        cost = _Squares.apply(x, y) / epsilon
        with torch.no_grad():
            potential, symmetric = torch.zeros_like(y[..., 0]), x is y
            for _ in range(self.iterations):
                other = _soft_minimum(cost, potential)
                potential = (potential + other) / 2 if symmetric else _soft_minimum(cost.mT, other)
        return epsilon * (_soft_minimum(cost, potential).mean() + potential.mean())


def _soft_minimum(cost: Tensor, potential: Tensor) -> Tensor:
    """Over the second draws, ``[K, n, m]`` and ``[K, m]`` to ``[K, n]``."""
    return math.log(cost.shape[-1]) - (potential[..., None, :] - cost).logsumexp(-1)


class _Squares(torch.autograd.Function):
    """Squared distances ``[K, n, m]``. They are positive but for rounding, which has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        lengths = x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :]
        return lengths.baddbmm_(x, y.mT, alpha=-2).clamp_(min=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        of_x, of_y = ctx.needs_input_grad
        return (
            2 * (g.sum(-1, True) * x - g @ y) if of_x else None,
            2 * (g.sum(-2)[..., None] * y - g.mT @ x) if of_y else None,
        )


def _off_diagonal(table: Tensor) -> Tensor:
    """``[K, n, n]`` to ``[K, n - 1, n]``: what is left lies n at a time between its entries."""
    n = table.shape[-1]
    return table.flatten(-2)[..., 1:].reshape(*table.shape[:-2], n - 1, n + 1)[..., :-1]
