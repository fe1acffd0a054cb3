"""Standardized values, and the way back to the units that the data came in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae.batch import Batch
from pyro_vae.data.draws import CHUNK
from pyro_vae.data.on_demand import OnDemand, standardized
from pyro_vae.data.source import as_list

__all__ = ["standardize", "standardize_as", "undo"]

ROWS = 10_000  # looked at a time

Step = Mapping[str, Any]


def standardize(
    train: Batch, *others: Batch, sites: Collection[str] | None = None
) -> tuple[Batch, ...]:
    """(x - mean) / scale per entry; both from the observed entries of the training rows alone.

    An entry that is constant there, or never observed, has scale 1. Missing entries read as 0. The
    step is in ``record["steps"]``, with the log-Jacobian -log scale per entry that leads back to log
    densities of the data as they came; ``undo`` leads back to their values.

    Args:
        train: training rows; read once, some thousands at a time.
        others: batches with the same sites, scaled by the same numbers.
        sites: floating sites (default: all that ``train`` has).

    Returns:
        As many batches as came.

    Raises:
        ValueError: a site that is missing or not floating, or has another event shape in ``others``.
    """
    nothing = train.rows(slice(0, 0))
    floating = [site for site in train.sites if nothing[site].is_floating_point()]
    wanted = floating if sites is None else as_list("sites", sites)
    for site in wanted:
        if site not in floating:
            kind = "whole numbers" if site in train else f"no such site, only {list(train.sites)}"
            raise ValueError(f"standardize: site {site!r} came as {kind}, wanted a floating site")
    moments = {site: _Moments() for site in wanted}
    still = train.still()
    for start in range(0, train.size, ROWS):
        rows = still.rows(slice(start, start + ROWS))
        for site, moment in moments.items():
            moment.add(rows[site], rows.mask(site))
    steps = [_step(site, moment) for site, moment in moments.items()]
    return tuple(_apply(batch, steps) for batch in (train, *others))


def standardize_as(record: Mapping[str, Any], batch: Batch) -> Batch:
    """``batch`` standardized as the data were that ``record`` is of (``run.config["data"]``).

    Raises:
        ValueError: a site that is missing or has another event shape.
    """
    return _apply(
        batch, [step for step in record.get("steps", ()) if step["step"] == "standardize"]
    )


def undo(data: Batch | Mapping[str, Any], site: str, values: Tensor) -> Tensor:
    """Values of a site ``[..., *event]``, as a model has them, in the units that the data came in.

    Undoes what can be undone of the steps that the record has for the site, the last one first:
    ``standardize``, and ``dequantize``, which gives 0..255 again. Binarization stays.

    Args:
        data: a batch, or the record of one.
        site: its name.
        values: such as draws of the model, or means.
    """
    record = data.record if isinstance(data, Batch) else data
    for step in reversed(record.get("steps", ())):
        if step["site"] == site and step["step"] in _UNDO:
            values = _UNDO[step["step"]](step, values)
    return values


def _unscaled(step: Step, values: Tensor) -> Tensor:
    mean, scale = (
        torch.tensor(step[name], dtype=torch.float64, device=values.device)
        for name in ("mean", "scale")
    )
    return (values.double() * scale + mean).to(values.dtype)


def _quantized(step: Step, values: Tensor) -> Tensor:
    return (values * 256).floor().clamp(0, 255)


_UNDO: dict[str, Callable[[Step, Tensor], Tensor]] = {
    "standardize": _unscaled,
    "dequantize": _quantized,
}


class _Moments:
    """Mean and variance of observed entries, rows at a time (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = (torch.zeros(()).double() for _ in range(3))
        self.least, self.most = torch.tensor(torch.inf), torch.tensor(-torch.inf)
        self.rows = 0

    def add(self, value: Tensor, observed: Tensor) -> None:
        value, observed = value.double().cpu(), observed.cpu()
        self.least = torch.minimum(self.least, value.where(observed, torch.inf).amin(0))
        self.most = torch.maximum(self.most, value.where(observed, -torch.inf).amax(0))
        count = observed.double().sum(0)
        mean = value.where(observed, 0.0).sum(0) / count.clamp(min=1)
        squares = (value - mean).where(observed, 0.0).square().sum(0)
        total = self.count + count
        share = count / total.clamp(min=1)
        shift = mean - self.mean
        self.squares = self.squares + squares + shift.square() * self.count * share
        self.mean = self.mean + shift * share
        self.count, self.rows = total, self.rows + len(value)

    def scale(self) -> Tensor:
        constant = self.least >= self.most  # equal, or nothing was observed
        return (self.squares / self.count.clamp(min=1)).sqrt().where(~constant, 1.0)


def _step(site: str, moments: _Moments) -> dict[str, Any]:
    scale = moments.scale()
    return {
        "site": site,
        "step": "standardize",
        "text": f"{site}: (x - mean) / scale per entry, from {moments.rows} training rows",
        "mean": moments.mean.tolist(),
        "scale": scale.tolist(),
        "log_jacobian": (-scale.log()).tolist(),
    }


def _apply(batch: Batch, steps: Collection[Step]) -> Batch:
    for step in steps:
        site = step["site"]
        mean, scale = (torch.tensor(step[name], dtype=torch.float64) for name in ("mean", "scale"))
        if site not in batch:
            raise ValueError(f"standardize: the batch has no site {site!r}, only {batch.sites}")
        if batch.shape(site)[1:] != mean.shape:
            raise ValueError(
                f"standardize: site {site!r} came with event shape {list(batch.shape(site)[1:])}, "
                f"wanted {list(mean.shape)}"
            )
        record = {**batch.record, "steps": [*batch.record.get("steps", ()), step]}
        batch = _scaled(batch, site, mean, scale)
        batch.record = record
    return batch


def _scaled(batch: Batch, site: str, mean: Tensor, scale: Tensor) -> Batch:
    if isinstance(batch, OnDemand):
        return batch.scaled(site, mean, scale)
    values = {name: batch[name] for name in batch}
    mean, scale = mean.to(batch.device), scale.to(batch.device)
    parts = values[site].split(max(1, CHUNK // max(1, mean.numel())))
    values[site] = torch.cat([standardized(part, mean, scale) for part in parts])
    return Batch(
        values,
        {name: batch.mask(name) for name in batch.incomplete},
        total=batch.total,
        index=batch.index,
        weights=batch.weights,
        fill=batch.fill | {site: 0.0},
    )
