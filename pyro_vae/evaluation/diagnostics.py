"""How far importance weights can be trusted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["has_tail", "khat_threshold", "pareto_khat", "tail_length"]

EQUAL = 1e-3  # nats
FEWEST = 5  # weights above the cut-off that a fit takes


def tail_length(num_particles: int) -> int:
    """Number of largest weights in the Pareto fit: min(K / 5, 3 sqrt(K)), rounded up."""
    return math.ceil(min(num_particles / 5, 3 * math.sqrt(num_particles)))


def has_tail(num_particles: int) -> bool:
    """Whether K weights are enough for a k-hat at all: 21 or more."""
    return tail_length(num_particles) >= FEWEST


def khat_threshold(num_particles: int) -> float:
    """k-hat above which K weights do not suffice: min(1 - 1 / log10 K, 0.7) (Vehtari et al. 2024)."""
    if num_particles <= 1:
        return 0.0
    return min(1 - 1 / math.log10(num_particles), 0.7)


def pareto_khat(largest: Tensor) -> Tensor:
    """Shape of a generalized Pareto distribution fitted to the largest importance weights.

    Args:
        largest: ``[M + 1, B]`` log weights, the ``M = tail_length(K)`` largest of K and the next one,
            which is the cut-off; in any order.

    Returns:
        ``[B]``; ``inf`` where fewer than 5 weights exceed the cut-off or one is not a number, -inf
        where all are equal up to rounding (what is left of an exact posterior in float32).
    """
    log_w = largest.double().sort(0).values
    log_w = log_w - log_w[-1]
    cut = log_w[0].clamp(min=math.log(torch.finfo(torch.float64).tiny))
    equal = (log_w[0] > -EQUAL) & (len(log_w) > 1)
    khat = torch.where(equal, -torch.inf, torch.full_like(cut, torch.inf))
    above = (log_w[1:] > cut).sum(0).masked_fill(equal, 0)  # less than M where weights are tied
    for n in above.unique().tolist():
        if n >= FEWEST:
            columns = above == n
            khat[columns] = _shape(log_w[-n:, columns].exp() - cut[columns].exp())
    return khat


def _shape(tail: Tensor) -> Tensor:
    """The estimator of Zhang & Stephens (2009) with the weak prior of PSIS (Vehtari et al. 2024).

    Args:
        tail: ``[n, B]`` exceedances, ascending.
    """
    n = len(tail)
    grid = torch.arange(1, 31 + int(n**0.5), dtype=tail.dtype, device=tail.device)
    quartile = tail[int(n / 4 + 0.5) - 1]
    steps = (1 - torch.sqrt(len(grid) / (grid - 0.5)))[:, None]
    b = steps / (3 * quartile) + 1 / tail[-1]  # [G, B]
    k = torch.stack([torch.log1p(-row * tail).mean(0) for row in b])  # [G, B], no [G, n, B] tensor
    weights = torch.softmax(n * (torch.log(-b / k) - k - 1), 0)
    weights = torch.where(weights >= 10 * torch.finfo(tail.dtype).eps, weights, 0.0)
    b_mean = (weights / weights.sum(0) * b).sum(0)
    khat = torch.log1p(-b_mean * tail).mean(0)
    khat = (n * khat + 10 * 0.5) / (n + 10)
    return torch.where(khat.isnan(), torch.inf, khat)
