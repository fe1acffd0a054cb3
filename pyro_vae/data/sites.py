"""Stored arrays become the sites of a Batch: types, masks, what is drawn and what stays mapped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.batch import Batch
from pyro_vae.data.draws import Draw
from pyro_vae.data.on_demand import Column, OnDemand, Present, first_rows
from pyro_vae.data.source import MASK, Array, Source, is_pixels, numbers

__all__ = ["images", "make_batch", "summary"]

Part = Mapping[str, Array]
FILL = {"binarize": 0.0, "threshold": 0.0, "dequantize": 0.5}  # what missing entries read as


def images(found: Source) -> list[str]:
    """The sites that are 8-bit images: pixels in uint8, some of them above 1."""
    sites = {
        site
        for part in found.parts.values()
        for site, array in part.items()
        if not site.startswith(MASK) and array.dtype == np.uint8 and is_pixels(array)
        if (_head(array) > 1).any()
    }
    return sorted(sites)


def make_batch(found: Source, split: str, draws: Mapping[str, Draw]) -> Batch:
    """The rows of a split.

    Every split agrees on what is incomplete, and missing entries read as they do in the first.
    """
    part = found.parts[split]
    incomplete = {
        site for each in found.parts.values() for site in each if _has_missing(each, site)
    }
    values, observed, fill = {}, {}, {}
    try:
        for site in (site for site in part if not site.startswith(MASK)):
            name, missing = f"{found.place}: site {site!r}", site in incomplete
            values[site] = _values(part[site], name, draws.get(site), missing)
            if missing:
                observed[site] = _observed(part.get(MASK + site), site, values[site])
                fill[site] = _fill(found, site, draws.get(site))
        made = any(isinstance(value, Column) for value in values.values())
        return (OnDemand if made else Batch)(values, observed, fill=fill)
    except ValueError as error:
        raise ValueError(f"{found.place}: {error}") from None


def summary(batch: Batch) -> dict[str, Any]:
    """Rows and sites, for the record. What mapped files miss is not counted: None."""
    nothing = batch.rows(slice(0, 0))  # draws nothing either
    mapped = isinstance(batch, OnDemand) and batch.mapped

    def missing(site: str) -> int | None:
        if site not in batch.incomplete:
            return 0
        return None if mapped else int((~batch.mask(site)).sum())

    sites = {
        site: {
            "shape": list(batch.shape(site)),
            "dtype": str(nothing[site].dtype).removeprefix("torch."),
            "missing": missing(site),
        }
        for site in batch.sites
    }
    return {"rows": batch.size, "sites": sites}


def _head(array: Array) -> Array:
    """The rows that are looked at: all that are in memory."""
    return np.array(array[first_rows(array.shape)]) if isinstance(array, np.memmap) else array


def _has_missing(part: Part, site: str) -> bool:
    array = part[site]
    return MASK + site in part or (array.dtype.kind == "f" and bool(np.isnan(_head(array)).any()))


def _fill(found: Source, site: str, draw: Draw | None) -> float:
    """What the missing entries of a site read as."""
    if draw is not None:
        return FILL[draw.kind]
    part = next(part for part in found.parts.values() if site in part)
    rows = {site: numbers(_head(part[site]))}
    mask = part.get(MASK + site)
    observed = {site: np.ones(rows[site].shape, bool) if mask is None else _head(mask)}
    return Batch(rows, observed).fill[site]


def _values(array: Array, name: str, draw: Draw | None, incomplete: bool) -> Any:
    """Values in memory, or how they are made."""
    mapped = isinstance(array, np.memmap)
    if draw is None and not mapped:
        return torch.from_numpy(numbers(array))
    return Column(
        name=name,
        source=array if mapped else torch.from_numpy(np.array(array)),
        ids=torch.arange(len(array)),
        dtype=torch.from_numpy(numbers(array[:0])).dtype,
        device=torch.device("cpu"),
        draw=draw,
        incomplete=incomplete,
    )


def _observed(mask: Array | None, site: str, values: Tensor | Column) -> Any:
    """Where a site is observed, as far as NaN does not say so."""
    if mask is not None and mask.shape != values.shape:
        raise ValueError(
            f"site {site!r}: observed= came {list(mask.shape)}, wanted {list(values.shape)}"
        )
    if isinstance(values, Column) and values.mapped:
        stored = None if mask is None else _values(mask, f"mask of {values.name}", None, False)
        return Present(values, stored)
    if mask is None:
        return torch.ones(values.shape, dtype=torch.bool)
    return torch.from_numpy(mask) > 0
