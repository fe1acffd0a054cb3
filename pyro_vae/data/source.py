"""What a file or a name turned out to hold: arrays by split and site, and where they are from."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "MASK",
    "SPLITS",
    "Array",
    "Source",
    "as_list",
    "by_split",
    "check_numbers",
    "is_pixels",
    "near",
    "numbers",
    "select",
    "sha256",
]

Array = npt.NDArray[Any]
T = TypeVar("T")

SPLITS = ("train", "valid", "test")
MASK = "observed_"  # prefix of the arrays that say where a site is observed


@dataclass
class Source:
    """Arrays, and the record of where they are from and what was done to them so far.

    Attributes:
        place: what errors name: a path, or the name of a data set.
        parts: split -> site (or ``observed_site``) -> array; ``all`` for what is not stored in parts.
        record: in JSON's types.
    """

    place: str
    parts: dict[str, dict[str, Array]]
    record: dict[str, Any] = field(default_factory=dict)

    def choose(self, split: str | None) -> str:
        """The split that is meant.

        Raises:
            ValueError: there is no such split.
        """
        stored = list(self.parts)
        if split is None and not {"all", "train"} & set(stored):
            raise ValueError(
                f"{self.place}: has no training rows, only {stored}; name them SITE_train"
            )
        chosen = ("all" if "all" in stored else "train") if split is None else split
        if chosen not in stored and stored == ["all"]:
            raise ValueError(
                f"{self.place}: split= came {split!r}, but the data are not stored in parts; divide "
                "them by pyro_vae.data.split(batch, fractions)"
            )
        if chosen not in stored:
            raise ValueError(f"{self.place}: split= came {chosen!r}, wanted one of {stored}")
        return chosen

    def check(self, split: str) -> None:
        """See that the arrays of a split are rows of one data set.

        Raises:
            ValueError: different numbers of rows, none at all, masks of nothing.
        """
        part = self.parts[split]
        rows = {name: len(array) if array.ndim else 0 for name, array in part.items()}
        if len(set(rows.values())) > 1:
            raise ValueError(
                f"{self.place}: the arrays differ in their number of rows: {rows}; name them "
                "SITE_train, SITE_valid, SITE_test, or take some by sites="
            )
        if not all(rows.values()):
            raise ValueError(f"{self.place}: arrays {list(rows)} have no rows, wanted [B, *event]")
        for name in part:
            site = name.removeprefix(MASK)
            if site != name and site not in part:
                raise ValueError(
                    f"{self.place}: array {name!r} is the mask of {site!r}, which is not there"
                )


def by_split(names: Collection[str]) -> dict[str, dict[str, str]]:
    """Group array names by their suffix: ``x_train`` is array ``x`` of split ``train``.

    Returns:
        split -> site -> name; ``all`` where no name has a suffix.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        site, _, suffix = name.rpartition("_")
        if site and suffix in SPLITS:
            groups.setdefault(suffix, {})[site] = name
        else:
            groups.setdefault("all", {})[name] = name
    return {split: groups[split] for split in (*SPLITS, "all") if split in groups}


def _check_loose(place: str, groups: Mapping[str, Collection[str]]) -> None:
    """Refuse arrays without a split beside arrays with one."""
    if len(groups) > 1 and "all" in groups:
        stored = [split for split in groups if split != "all"]
        raise ValueError(
            f"{place}: arrays {sorted(groups['all'])} belong to no split, others are of {stored}; "
            "leave them out by sites="
        )


def select(
    place: str, groups: Mapping[str, Mapping[str, T]], sites: Collection[str] | None
) -> dict[str, dict[str, T]]:
    """The named sites of every split, with their masks; all of them for None.

    Raises:
        ValueError: sites that are not there, arrays that belong to no split beside others.
    """
    held = {site for names in groups.values() for site in names}
    if unknown := sorted(set(sites or ()) - held):
        raise ValueError(
            f"{place}: sites= names {unknown}, the data set holds {sorted(held)}"
            f"{near(unknown[0], held)}"
        )
    wanted = held if sites is None else {*sites, *(MASK + site for site in sites)}
    chosen = {
        split: {site: item for site, item in items.items() if site in wanted}
        for split, items in groups.items()
    }
    chosen = {split: items for split, items in chosen.items() if items}
    _check_loose(place, chosen)
    return chosen


def check_numbers(place: str, name: str, array: Any) -> Array:
    """Refuse an array of text or objects, and a mask that is none."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        held = array.dtype if isinstance(array, np.ndarray) else "raw bytes"
        raise ValueError(
            f"{place}: array {name!r} holds {held}, wanted numbers; encode it as integers, or leave "
            "it out by sites="
        )
    mask = name.startswith(MASK) and not isinstance(array, np.memmap)
    if mask and not np.isin(array, (0, 1)).all():
        raise ValueError(f"{place}: array {name!r} is a mask, wanted True or False (1 or 0) only")
    return array


def as_list(what: str, names: str | Iterable[str] | None) -> list[str]:
    """Names as a list; one name may come bare."""
    if isinstance(names, str):
        return [names]
    listed = list(names or ())
    if odd := [name for name in listed if not isinstance(name, str)]:
        raise ValueError(f"{what}= came with {odd[0]!r}, wanted names")
    return listed


def near(name: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` where something known is near."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_pixels(array: Array) -> bool:
    """Whether the numbers of an array become floating, as they are."""
    return array.ndim > 1 and array.dtype in (np.bool_, np.uint8)


def numbers(array: Array) -> Array:
    """Floating for floating arrays and pixels, int64 for the rest; in this machine's byte order."""
    if array.dtype.kind != "f" and not is_pixels(array):
        return np.array(array, dtype=np.int64)
    double = torch.get_default_dtype() == torch.float64
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is refused
        return np.array(array, dtype=np.float64 if double else np.float32)
