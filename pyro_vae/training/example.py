"""A few rows that stand in for a data set where a pair is built: no more of it than builders look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_vae.batch import Batch

__all__ = ["example", "from_tensors", "to_tensors"]

AT_A_TIME = 10_000  # rows


def example(data: Batch | Tensor) -> Any:
    """Four rows that hold, entry by entry, the smallest observed value, the largest, one that is no
    whole number where there is one, and the smallest again, or a missing one where one is missing.

    So kinds of values (0 or 1, counts up to 255, within [0, 1], ...) are recognised alike, a site
    that is incomplete stays so, and ``total``, fill and record are those of the data.
    """
    if isinstance(data, Tensor):
        return _extremes(data, torch.ones_like(data, dtype=torch.bool))[0]
    values, observed = {}, {}
    for site in data:
        values[site], mask = _extremes(data[site], data.mask(site))
        if site in data.incomplete:
            observed[site] = mask
    return Batch(values, observed, 4, total=data.total, fill=data.fill, record=data.record)


def to_tensors(data: Batch | Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the rest in JSON's types."""
    if isinstance(data, Tensor):
        return {"data": data}, {}
    tensors = {f"values/{site}": data[site] for site in data}
    tensors |= {f"observed/{site}": data.mask(site) for site in data.incomplete}
    rest = {"sites": data.sites, "size": data.size, "total": data.total, "fill": data.fill}
    return tensors, {**rest, "record": data.record}


def from_tensors(tensors: dict[str, Tensor], rest: dict[str, Any]) -> Any:
    """The inverse of ``to_tensors``."""
    if "data" in tensors:
        return tensors["data"]
    values = {site: tensors[f"values/{site}"] for site in rest["sites"]}
    observed = {
        site: mask for site in values if (mask := tensors.get(f"observed/{site}")) is not None
    }
    kept = {name: rest[name] for name in ("total", "fill", "record")}
    return Batch(values, observed, rest["size"], **kept)


def _extremes(value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The four rows of a site and where they are observed; those of parts are those of the whole."""
    if len(value) > AT_A_TIME:
        parts = zip(value.split(AT_A_TIME), mask.split(AT_A_TIME), strict=True)
        values, masks = zip(*(_extremes(*part) for part in parts), strict=True)
        return _extremes(torch.cat(values), torch.cat(masks))
    number = value.double()  # bools and bytes have no infinity
    least = number.masked_fill(~mask, torch.inf).amin(0)
    most = number.masked_fill(~mask, -torch.inf).amax(0)
    broken = number.masked_fill(~mask | (number == number.round()), -torch.inf).amax(0)
    between = torch.where(broken.isinf(), least, broken)
    seen = mask.any(0)
    rows = torch.stack([least, most, between, least]).masked_fill(~seen, 0.0)
    return rows.to(value.dtype), torch.stack([seen, seen, seen, mask.all(0)])
