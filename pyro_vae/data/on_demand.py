"""Rows that are made when they are taken: drawn anew, or read from files larger than memory."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.batch import Batch, ahead, pick, sent
from pyro_vae.data.draws import Draw
from pyro_vae.data.source import Array, numbers

__all__ = ["LOOK", "Column", "OnDemand", "Present", "first_rows", "standardized"]

LOOK, ENTRIES = 10_000, 1 << 26  # rows of a mapped file that stand for all, and their entries
LATE = (
    "NaN in row {row} and in none of the first rows, which say whether entries are missing; save "
    "where they are observed as observed_SITE.npy beside SITE.npy, in a folder"
)


def first_rows(shape: Sequence[int], rows: int = LOOK) -> slice:
    """The rows of ``[N, *event]`` that are looked at: fewer where they are large."""
    return slice(0, max(1, min(rows, ENTRIES // max(1, math.prod(shape[1:])))))


def _ask_for(source: Any, rows: Array) -> None:
    """Have the system read rows side by side; one after another, each would wait for the disk."""
    if len(rows) and source.flags.c_contiguous and hasattr(mmap, "MADV_WILLNEED"):  # not on Windows
        size, begin = source[:1].nbytes, source.offset % mmap.ALLOCATIONGRANULARITY
        pages = np.unique((begin + rows * size) // mmap.PAGESIZE)
        reach = size // mmap.PAGESIZE + 2  # pages that a row may touch
        gaps = np.flatnonzero(np.diff(pages) > reach)
        first, last = pages[np.r_[0, gaps + 1]], pages[np.r_[gaps, -1]] + reach
        for start, length in zip(first.tolist(), (last - first).tolist(), strict=True):
            source._mmap.madvise(mmap.MADV_WILLNEED, start * mmap.PAGESIZE, length * mmap.PAGESIZE)


def _let_go(source: Any) -> None:
    """Of the pages that were read: they stay in the system's cache, and out of this process."""
    if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        source._mmap.madvise(mmap.MADV_DONTNEED)


def standardized(value: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """(x - mean) / scale of ``[B, *event]``, in float64: rounded to float32, a large mean alone would
    be off by a part of the scale."""
    return ((value.double() - mean) / scale).to(value.dtype)


@dataclass(frozen=True)
class Column:
    """The values of a site, made for the rows that are taken.

    Attributes:
        name: what errors call it.
        source: numbers as they are stored: a tensor ``[B, *event]`` of these rows, on the device, or a
            mapped file ``[M, *event]`` of them and others.
        ids: ``[B]`` numbers of the rows in the file, of which fixed draws are a function.
        dtype: of the values.
        device: where rows go.
        draw: what is drawn for 8-bit images.
        mean, scale: ``[*event]`` float64, of values that are standardized.
        incomplete: whether NaN is expected; it means missing.
    """

    name: str
    source: Tensor | Array
    ids: Tensor
    dtype: torch.dtype
    device: torch.device
    draw: Draw | None = None
    mean: Tensor | None = None
    scale: Tensor | None = None
    incomplete: bool = False

    @property
    def mapped(self) -> bool:
        return not isinstance(self.source, Tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.ids), *self.source.shape[1:])

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Tensor:
        """Values of rows, ``[b, *event]``; NaN where missing."""
        rows = self.part(index)
        stored = rows.stored()
        if self.draw is None:
            value = stored.to(self.dtype)
        else:
            value = self.draw(stored, rows.ids.to(stored.device), self.dtype)
        if self.mean is not None and self.scale is not None:
            value = standardized(value, self.mean, self.scale)
        return value

    def ahead(self, index: Tensor, device: torch.device) -> Any:
        """Values of rows, or where these are drawn anew, a column of what they are drawn for."""
        rows = self.part(index)
        rows = replace(rows, source=sent(rows.stored(), device), ids=rows.ids.to(device)).to(device)
        return rows if self.draw is not None and self.draw.stream is None else rows[:]

    def part(self, index: Any) -> Column:
        """The column of some of the rows."""
        index = index.to(self.ids.device) if isinstance(index, Tensor) else index
        source = pick(self.source, index) if isinstance(self.source, Tensor) else self.source
        return replace(self, source=source, ids=self.ids[index])

    def stored(self) -> Tensor:
        """What ``source`` holds of the rows, on the device."""
        return self.source if isinstance(self.source, Tensor) else self.read(self.source)

    def read(self, source: Array) -> Tensor:
        """The rows out of a mapped file."""
        rows = self.ids.numpy()
        _ask_for(source, rows)
        array = source[rows]
        _let_go(source)
        if array.dtype in (np.uint8, np.bool_):  # as they are: less to send
            return sent(torch.from_numpy(np.array(array)), self.device)
        array = numbers(array)
        if array.dtype.kind == "f":
            self._check(np.isinf(array), "infinite entries in row {row}; NaN means missing")
            if not self.incomplete:
                self._check(np.isnan(array), LATE)
        return sent(torch.from_numpy(array), self.device)

    def tensors(self) -> list[Tensor]:
        """What is in memory."""
        held = (self.source, self.ids, self.mean, self.scale)
        return [tensor for tensor in held if isinstance(tensor, Tensor)]

    def to(self, device: torch.device | str | None = None, dtype: Any = None) -> Column:
        """Move what is in memory; a mapped column only notes where its rows go."""
        dtype = dtype or self.dtype
        new: dict[str, Any] = {"dtype": dtype, "device": torch.device(device or self.device)}
        if isinstance(self.source, Tensor):
            new |= {"source": self.source.to(device), "ids": self.ids.to(device)}
        if self.mean is not None and self.scale is not None:
            new |= {"mean": self.mean.to(device), "scale": self.scale.to(device)}
        return replace(self, **new)

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: of a mapped file, its name."""
        place = {"source": Path(self.source.filename)} if self.mapped else {}  # type: ignore[union-attr]
        return {**vars(self), **place}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["source"], Path):
            state["source"] = np.load(state["source"], mmap_mode="r")
        vars(self).update(state)

    def _check(self, bad: Array, problem: str) -> None:
        if bad.any():
            row = int(self.ids[int(np.argmax(bad.reshape(len(bad), -1).any(1)))])
            raise ValueError(f"{self.name}: {problem.format(row=row)}")


@dataclass(frozen=True)
class Present:
    """Where a mapped site is observed, as far as NaN does not say so.

    Attributes:
        values: the site.
        mask: what is stored of it, as floating or whole numbers.
    """

    values: Column
    mask: Column | None = None

    @property
    def mapped(self) -> bool:
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def is_floating_point(self) -> bool:
        return False

    def __getitem__(self, index: Any) -> Tensor:
        """Bool ``[b, *event]``."""
        if self.mask is not None:
            return self.mask[index].bool()
        shape = self.values.part(index).shape
        return torch.ones(shape, dtype=torch.bool, device=self.values.device)

    def ahead(self, index: Tensor, device: torch.device) -> Tensor:
        return self.to(device)[index]

    def tensors(self) -> list[Tensor]:
        return [] if self.mask is None else self.mask.tensors()

    def part(self, index: Any) -> Present:
        return self._each(lambda column: column.part(index))

    def to(self, device: torch.device | str | None = None) -> Present:
        return self._each(lambda column: column.to(device))

    def _each(self, change: Callable[[Column], Column]) -> Present:
        return Present(change(self.values), None if self.mask is None else change(self.mask))


class OnDemand(Batch):
    """A batch some of whose sites are made when rows are taken.

    ``rows`` returns plain batches. Two kinds of sites are made so:

    * 8-bit images that are binarized or dequantized anew: ``rows`` draws from torch's global
      generator (or, with a draw per epoch, ``epoch`` says which), while ``batch["x"]``, ``still()``
      and ``look()`` are the one draw to judge by, the same every time.
    * sites in mapped files: ``rows`` reads those rows and no others, and moves them to ``device``.
      The whole of such a site is refused. What stands for all rows before training, the check of the
      support and the ready pairs' starting values, looks at the first 10,000 (fewer where rows are
      large). Whether entries are missing is looked for there too, unless a mask is stored, and a NaN
      found later is an error. Another process opens the files anew.
      Memory holds the numbers of the rows, 8 bytes each, whatever a row takes.

    Args:
        values: site -> values in memory, or how they are made. At least one is made.
        observed: site -> where observed, of sites that miss something.
        fill: site -> number that missing entries read as.
        record: as ``Batch`` has it.
    """

    _values: dict[str, Any]
    _observed: dict[str, Any]

    def __init__(
        self,
        values: Mapping[str, Tensor | Column],
        observed: Mapping[str, Any] | None = None,
        *,
        fill: Mapping[str, float] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        observed, fill = dict(observed or {}), dict(fill or {})
        made = {site: value for site, value in values.items() if isinstance(value, Column)}
        held = {site: value for site, value in values.items() if site not in made}
        super().__init__(
            held,
            {site: mask for site, mask in observed.items() if site in held},
            size=next(iter(made.values())).shape[0],
            fill={site: number for site, number in fill.items() if site in held},
            record=record,
        )
        self._values = {site: made.get(site, self._values.get(site)) for site in values}
        self._observed |= {site: mask for site, mask in observed.items() if site in made}
        self._fill |= {site: fill[site] for site in made if site in observed}

    @property
    def mapped(self) -> bool:
        """Whether rows are read from files."""
        return any(column.mapped for column in self._made().values())

    def __getitem__(self, site: str) -> Tensor:
        """Values ``[B, *event]`` of a site in memory, as one draw.

        Raises:
            ValueError: the site is in a mapped file.
        """
        return self._whole(site, super().__getitem__(site))

    def shape(self, site: str) -> tuple[int, ...]:
        return tuple(super().__getitem__(site).shape)

    def mask(self, site: str) -> Tensor:
        if site in self._observed:
            return self._whole(site, self._observed[site])
        return super().mask(site)

    def epoch(self, seed: int, number: int) -> Batch:
        return self._draws(lambda draw: draw.epoch(seed, number))

    def still(self) -> Batch:
        """The rows as one fixed draw; a plain batch unless they are read from files."""
        fixed = self._draws(Draw.still)
        return fixed if self.mapped else fixed.rows(slice(None))

    def look(self, rows: int = LOOK) -> Batch:
        fixed = self.still()
        if not self.mapped:
            return fixed
        largest = max((column.shape for column in self._made().values()), key=math.prod)
        return fixed.rows(first_rows(largest, rows))

    def rows(self, index: Any) -> Batch:
        return self._filled(super().rows(index))

    def ahead(self, index: Tensor, device: torch.device) -> Batch:
        return self._filled(self._map(lambda held: ahead(held, index, device)))

    def part(self, index: Tensor) -> Batch:
        """Some of the rows, which go on being made when they are taken."""
        return self._map(lambda held: held[index] if isinstance(held, Tensor) else held.part(index))

    def hide(self, site: str, mask: Any) -> Batch:
        new = super().hide(site, mask)
        new._values[site] = self._values[site]  # goes on being drawn anew
        return new

    def steps(self, site: str) -> Batch:
        if site in self._made():
            raise ValueError(
                f"site {site!r}: steps() came rows that are made when they are taken, wanted values: "
                "batch.still().steps(...)"
            )
        return super().steps(site)

    def scaled(self, site: str, mean: Tensor, scale: Tensor) -> Batch:
        """The site as (x - mean) / scale, ``[*event]``; missing entries read as 0."""
        new = self._map(lambda held: held)
        held = self._values[site]
        mean, scale = mean.to(held.device), scale.to(held.device)
        if isinstance(held, Tensor):
            value = standardized(held, mean, scale)
            complete = site not in self._observed
            new._values[site] = value if complete else value.where(self._observed[site], 0.0)
        elif held.mean is None or held.scale is None:
            new._values[site] = replace(held, mean=mean, scale=scale)
        else:
            both = {"mean": held.mean + held.scale * mean, "scale": held.scale * scale}
            new._values[site] = replace(held, **both)
        if site in self._fill:
            new._fill[site] = 0.0
        return new

    def _made(self) -> dict[str, Column]:
        return {site: v for site, v in self._values.items() if isinstance(v, Column)}

    def _filled(self, new: Batch) -> Batch:
        """With the fill where entries are missing, in the sites of ``new`` that are made by now."""
        for site, column in self._made().items():
            value = new._values[site]
            if site in new._observed and isinstance(value, Tensor):
                observed = new._observed[site]
                if column.mapped:
                    observed = new._observed[site] = observed & ~value.isnan()
                fill = torch.as_tensor(self._fill[site]).to(value)
                new._values[site] = torch.where(observed, value, fill)
        return new

    def _draws(self, change: Callable[[Draw], Draw]) -> Batch:
        def changed(held: Any) -> Any:
            draw = held.draw if isinstance(held, Column) else None
            return held if draw is None else replace(held, draw=change(draw))

        return self._map(changed)

    def _whole(self, site: str, held: Any) -> Tensor:
        if isinstance(held, Tensor):
            return held
        if held.mapped:
            size = math.prod(held.shape) * torch.get_default_dtype().itemsize / 2**30
            raise ValueError(
                f"site {site!r}: the whole of a mapped file was asked for, {list(held.shape)}, "
                f"{size:.1f} GiB in memory; take rows(index) or look(n), or load it without mmap=True"
            )
        return self.still()[site]

    def _map(self, move: Callable[[Any], Any]) -> Batch:
        new = super()._map(move)
        if any(isinstance(value, Column) for value in new._values.values()):
            new.__class__ = OnDemand
        return new

    def __repr__(self) -> str:
        made = ", ".join(self._made())
        return f"OnDemand{super().__repr__().removeprefix('Batch')[:-1]}; made when taken: {made})"
