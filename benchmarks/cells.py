"""Cells of a comparison as ``[seeds, rows]``, and standard errors that count both."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

import pyro_vae as pv

__all__ = ["gain", "mean_and_error", "quantity", "seeds_of", "summaries"]


def seeds_of(comparison: pv.Comparison, name: str) -> list[int]:
    """The seeds with which an objective has a result."""
    return [seed for objective, seed in comparison.cells if objective == name]


def quantity(
    comparison: pv.Comparison, name: str, which: str, seeds: Collection[int] | None = None
) -> Tensor:
    """``[seeds, rows]`` nats: ``log_p``, ``elbo``, ``rate``, ``distortion`` or ``judged``."""
    seeds = seeds_of(comparison, name) if seeds is None else seeds
    return torch.stack([_rows(comparison, (name, seed), which) for seed in seeds]).double()


def _rows(comparison: pv.Comparison, key: tuple[str, int], which: str) -> Tensor:
    if which == "judged":
        return comparison.judged[key]
    evaluation = comparison.cells[key]
    if which not in ("rate", "distortion"):
        rows: Tensor = getattr(evaluation, which)
        return rows
    if evaluation.rate_rows is None:
        raise ValueError(f"{key}: came a cell without the rate of each row; run it again")
    return evaluation.rate_rows if which == "rate" else -(evaluation.elbo + evaluation.rate_rows)


def mean_and_error(cells: Tensor) -> tuple[float, float]:
    """Mean of ``[seeds, rows]`` and its standard error, over rows and over seeds."""
    seeds, rows = cells.shape
    variance = cells.mean(0).var() / rows
    if seeds > 1:
        variance = variance + cells.mean(1).var() / seeds
    return float(cells.mean()), float(variance.sqrt())


def gain(comparison: pv.Comparison, name: str, other: str, which: str) -> tuple[float, float]:
    """First minus second, paired by seed and row, and its standard error; NaN without a common seed."""
    common = [s for s in seeds_of(comparison, name) if s in seeds_of(comparison, other)]
    if not common:
        return float("nan"), float("nan")
    mine, theirs = (quantity(comparison, each, which, common) for each in (name, other))
    return mean_and_error(mine - theirs)


def summaries(comparison: pv.Comparison, name: str) -> list[dict[str, Any]]:
    """Of the evaluation of each seed."""
    return [e.summary() for (objective, _), e in comparison.cells.items() if objective == name]
