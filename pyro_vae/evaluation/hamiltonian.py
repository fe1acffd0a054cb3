"""Hamiltonian transitions of many chains at once, between two densities."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["State", "transition"]

JITTER = 0.2  # of step sizes, so that no trajectory closes on itself


class State(NamedTuple):
    """Where chains are, and what is known there: along the path, log f = base + beta * ratio."""

    at: Tensor  # coordinates [K, B, D]
    base: Tensor  # log density of the start in them, [K, B]
    ratio: Tensor  # log p(x, z) - log start(z), [K, B]
    base_slope: Tensor  # gradients, [K, B, D]
    ratio_slope: Tensor

    def log_f(self, beta: Tensor) -> Tensor:
        return self.base + beta * self.ratio

    def slope(self, beta: Tensor) -> Tensor:
        return self.base_slope + beta * self.ratio_slope


def transition(
    target: Callable[[Tensor], State], old: State, beta: Tensor, step: Tensor, leapfrog: int
) -> tuple[State, Tensor]:
    """A Hamiltonian step (Neal 2011) that leaves f as it is, and how probable its proposals were to be
    accepted, ``[K, B]``."""
    jitter = 1 + JITTER * (2 * torch.rand_like(old.base) - 1)
    size = step * jitter[..., None]
    momentum = torch.randn_like(old.at)
    new, moving = old, momentum + 0.5 * size * old.slope(beta)
    for _ in range(leapfrog):
        new = target(new.at + size * moving)
        moving = moving + size * new.slope(beta)
    moving = moving - 0.5 * size * new.slope(beta)
    kinetic = 0.5 * (momentum.square() - moving.square()).sum(-1)
    gain = new.log_f(beta) - old.log_f(beta) + kinetic
    accepted = torch.rand_like(gain).log() < gain  # not where it is NaN
    kept = (
        torch.where(accepted if a.dim() == 2 else accepted[..., None], a, b)
        for a, b in zip(new, old, strict=True)
    )
    return State(*kept), gain.exp().clamp(max=1).nan_to_num(0.0)
