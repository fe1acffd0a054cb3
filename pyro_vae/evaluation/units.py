"""From the numbers that a model saw back to those of the data: other units of the same log density."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from pyro_vae.batch import Batch

__all__ = ["bits_per_dim", "entries", "is_discretized", "log_jacobian"]

ROWS = 10_000  # at a time: masks of data that are larger than memory come by rows


def log_jacobian(data: Batch | Tensor, sites: Iterable[str]) -> Tensor:
    """What to add to log p of the rows to have it in the units that the data came in.

    Every step of ``data.record["steps"]`` that changed the scale says so in ``log_jacobian``, a
    number per entry: -log s after (x - m) / s. Missing entries have no density and add nothing.

    Returns:
        ``[N]`` nats.
    """
    total = torch.zeros(len(data), dtype=torch.float64)
    if not isinstance(data, Batch):
        return total
    for step in data.record.get("steps", ()):
        site = step["site"]
        if "log_jacobian" in step and site in sites and site in data:
            per_entry = torch.as_tensor(step["log_jacobian"], dtype=torch.float64)
            total += _sum(data, site, per_entry)
    return total


def entries(data: Batch | Tensor, sites: Iterable[str]) -> Tensor:
    """Number of observed entries of the sites, ``[N]``."""
    if not isinstance(data, Batch):
        return torch.full((len(data),), data[0].numel(), dtype=torch.float64)
    total = torch.zeros(len(data), dtype=torch.float64)
    for site in sites:
        if site in data:
            total += _sum(data, site, torch.ones((), dtype=torch.float64))
    return total


def is_discretized(data: Batch | Tensor, sites: Iterable[str], masses: Collection[str]) -> bool:
    """Whether bits/dim is the unit: all the sites are 8-bit images, and log p is that of an image.

    Args:
        masses: the sites whose log p is of a probability mass. The density of a dequantized image
            bounds that of the image (Theis et al. 2016); that of a bare whole number bounds nothing.
    """
    if not isinstance(data, Batch) or not sites:
        return False
    steps = data.record.get("steps", ())
    dequantized = {step["site"] for step in steps if step["step"] == "dequantize"}
    levels = data.record.get("levels", {})
    return all(levels.get(site) == 256 and site in {*masses, *dequantized} for site in sites)


def bits_per_dim(log_p: Tensor, entries: Tensor) -> Tensor:
    """Nats per row ``[N]`` as bits per entry, ``-log_p / (entries ln 2)``; rows without entries left
    out."""
    seen = entries > 0
    return -log_p[seen].double() / (entries[seen] * math.log(2))


def _sum(data: Batch, site: str, per_entry: Tensor) -> Tensor:
    if site not in data.incomplete:
        return per_entry.expand(data.shape(site)[1:]).sum().expand(len(data))
    sums = []
    for rows in torch.arange(len(data)).split(ROWS):
        mask = data.rows(rows).mask(site).cpu()
        sums.append((mask * per_entry).flatten(1).sum(1) if mask.dim() > 1 else mask * per_entry)
    return torch.cat(sums)
