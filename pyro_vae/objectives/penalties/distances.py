"""Distances between draws of the aggregate posterior and of the prior, by kernels and by transport."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_vae.objectives.penalties.latent import Latent, Penalty, chosen
from pyro_vae.objectives.schedules import Schedule

__all__ = ["MMD", "Sinkhorn", "SlicedWasserstein"]

Kernel = Callable[[Tensor], Tensor]


def _rbf(square: Tensor, scale: float) -> Tensor:
    return (square * (-1 / scale)).exp_()


def _imq(square: Tensor, scale: float) -> Tensor:
    return torch.add(square.new_ones(()), square, alpha=1 / scale).reciprocal_()


KERNELS: dict[str, Callable[[Tensor, float], Tensor]] = {"rbf": _rbf, "imq": _imq}
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
        self.kernel = (
            KERNELS[kernel] if isinstance(kernel, str) else lambda square, s: kernel(square / s)
        )
        self.how = estimate

    def estimate(self, latent: Latent) -> Tensor:
        z, y = latent.draws, latent.from_prior()
        rows, unit = z.shape[1], 2.0 * z.shape[2]
        if rows < 2 and self.how != "biased":
            raise ValueError(f"MMD: came {rows} row, wanted two at least")
        if self.how == "linear":
            even = rows - rows % 2
            (z1, z2), (y1, y2) = ((t[:, 0:even:2], t[:, 1:even:2]) for t in (z, y))
            pairs = ((z1, z2, 1), (y1, y2, 1), (z1, y2, -1), (z2, y1, -1))
            terms = [s * self._mean((a - b).square().sum(-1) / unit) for a, b, s in pairs]
            return torch.stack(terms).sum()
        alone = self.how == "unbiased"
        within = self._mean(_squares(z, z) / unit, alone) + self._mean(_squares(y, y) / unit, alone)
        return within - 2 * self._mean(_squares(z, y) / unit)

    def _mean(self, square: Tensor, others: bool = False) -> Tensor:
        """Of k over all pairs, or over those of one draw and another."""
        square = _off_diagonal(square) if others else square
        sums = [self.kernel(square, scale).sum() for scale in self.scales]
        return torch.stack(sums).sum() / (square.numel() * len(sums))


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
        cost = _squares(x, y) / epsilon
        with torch.no_grad():
            potential, symmetric = torch.zeros_like(y[..., 0]), x is y
            for _ in range(self.iterations):
                other = _soft_minimum(cost, potential)
                potential = (potential + other) / 2 if symmetric else _soft_minimum(cost.mT, other)
        return epsilon * (_soft_minimum(cost, potential).mean() + potential.mean())


def _soft_minimum(cost: Tensor, potential: Tensor) -> Tensor:
    """Over the second draws, ``[K, n, m]`` and ``[K, m]`` to ``[K, n]``."""
    return math.log(cost.shape[-1]) - (potential[..., None, :] - cost).logsumexp(-1)


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances ``[K, n, m]``."""
    lengths = x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :]
    return torch.baddbmm(lengths, x, y.mT, alpha=-2).clamp(min=0)


def _off_diagonal(table: Tensor) -> Tensor:
    """``[K, n, n]`` to ``[K, n - 1, n]``: what is left lies n at a time between its entries."""
    n = table.shape[-1]
    return table.flatten(-2)[..., 1:].reshape(*table.shape[:-2], n - 1, n + 1)[..., :-1]
