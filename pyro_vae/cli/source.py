"""The rows that a command works on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae import data
from pyro_vae.batch import Batch
from pyro_vae.saved import keywords

__all__ = ["Source", "check_alike"]

LISTS = {"columns", "drop"}  # options that are names by comma
HELD_OUT = 0.2  # share of the rows of data that are not stored in parts


class Source:
    """A data set by name or path, with what is done to it, and what ``describe`` says of it.

    Args:
        name: as ``data.load`` takes it.
        sites: names by comma; of a table also SITE=COLUMN+COLUMN, and SITE alone for the rest.
        options: further arguments of ``data.load`` as NAME=VALUE, and ``standardize=True`` (or
            ``standardize=x,t``), which takes mean and scale from the training rows; ``mask=x`` adds
            the mask of x as site s (``Batch.with_mask``).
    """

    def __init__(self, name: str, sites: str | None, options: Sequence[str] | None = None) -> None:
        self.name, self.given = name, tuple(options or ())
        self.sites = _sites(sites)
        self.options = keywords(self.given, data.load, "--data-option", {"standardize", "mask"})
        for key in {"split", "sites"} & set(self.options):
            raise ValueError(f"--data-option: {key} is an option of its own: --{key}")
        for key in LISTS & set(self.options):
            self.options[key] = _names(str(self.options[key]))
        self.mask = self.options.pop("mask", None)
        scaled = self.options.pop("standardize", False)
        self.standardized = _names(scaled) if isinstance(scaled, str) else None
        self.standardize = bool(scaled)
        self.record = data.describe(name, None, self.sites, **self.options)

    @property
    def place(self) -> str:
        """The name, or the absolute path of the file."""
        path = Path(self.record["source"])
        return str(path.resolve()) if path.exists() else self.name

    def rows(self, split: str) -> Batch:
        """The rows of a split, as they came but for what ``data.load`` does; data that are not stored
        in parts are cut 80 / 20 by a fixed seed."""
        splits = self.record["splits"]
        if split.startswith("valid="):
            return self._cut(self.rows("train"), self._share(split.removeprefix("valid=")))[1]
        if split in splits:
            return self._load(split)
        if splits != ["all"]:
            raise ValueError(f"{self.name}: came split {split!r}, wanted one of {splits}")
        if split not in ("train", "test"):
            raise ValueError(f"{self.name}: came split {split!r}, wanted train, test or all")
        parts = self._cut(self._load("all"), HELD_OUT)
        return parts[0] if split == "train" else parts[1].still()

    def numbers(self, split: str, size: int) -> Tensor:
        """Numbers that the ``size`` rows of a split have where they are stored: in the file, if that is
        not stored in parts."""
        if split.startswith("valid="):
            share = self._share(split.removeprefix("valid="))
            return self._cut(Batch({"row": self.numbers("train", self.record["rows"])}), share)[1][
                "row"
            ]
        if split in self.record["splits"]:
            return torch.arange(size)
        everything = Batch({"row": torch.arange(self.record["rows"])})
        parts = self._cut(everything, HELD_OUT)
        return parts[0 if split == "train" else 1]["row"]

    def training(self, held_out: str | None = None) -> tuple[Batch, Batch | None]:
        """Training rows, and rows to select by: a share of those or a split; standardised if asked."""
        train, valid = self.rows("train"), None
        if held_out in self.record["splits"]:
            valid = self.rows(str(held_out))
        elif held_out is not None and (share := self._share(held_out)):
            train, valid = self._cut(train, share)
        if self.standardize:
            train, *others = data.standardize(
                train, *filter(None, [valid]), sites=self.standardized
            )
            valid = others[0] if others else None
        return self._masked(train), None if valid is None else self._masked(valid)

    def _share(self, text: str) -> float:
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            raise ValueError(
                f"--valid: came {text!r}, wanted a share of the rows, from 0 to below 1, or one of "
                f"{self.record['splits']}"
            )
        return share

    def judged(self, split: str, record: dict[str, Any]) -> Batch:
        """The rows of a split, standardised as a run's training rows were by its record."""
        rows = self.rows(split).still()
        return self._masked(data.standardize_as(record, rows) if record else rows)

    def _masked(self, batch: Batch) -> Batch:
        return batch if self.mask is None else batch.with_mask(str(self.mask))

    def _load(self, split: str) -> Batch:
        return data.load(self.name, split, self.sites, **self.options)

    def _cut(self, batch: Batch, share: float) -> tuple[Batch, Batch]:
        try:
            first, second = data.split(batch, (1 - share, share))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        return first, second


def check_alike(shapes: dict[str, Any], other: Batch, split: str) -> None:
    """Compare event shapes with those of the training rows."""
    for site, shape in shapes.items():
        if site in other and list(other.shape(site)[1:]) != list(shape):
            raise ValueError(
                f"site {site!r}: {split} rows have event shape {list(other.shape(site)[1:])}, "
                f"training rows {list(shape)}; wanted the same"
            )


def _sites(text: str | None) -> list[str] | dict[str, Any] | None:
    if text is None or "=" not in text:
        return None if text is None else _names(text)
    pairs = [name.partition("=") for name in _names(text)]
    columns: dict[str, list[str] | None] = {}
    for site, _, of in pairs:
        if site in columns:
            joined = "+".join(of for name, _, of in pairs if name == site and of)
            raise ValueError(
                f"--sites: site {site!r} came twice, wanted once, its columns joined by +: "
                f"{site}={joined or 'COLUMN+COLUMN'}"
            )
        columns[site] = of.split("+") if of else None
    return {site: of[0] if of and len(of) == 1 else of for site, of in columns.items()}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
