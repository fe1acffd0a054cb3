"""Arrays out of an ``.npz`` file, sorted by split, with a clear error for what is broken."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["SPLITS", "Array", "by_split", "read_arrays", "sha256"]

Array = npt.NDArray[Any]

SPLITS = ("train", "valid", "test")


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def by_split(names: Collection[str]) -> dict[str | None, dict[str, str]]:
    """Group array names by their suffix: ``x_train`` is array ``x`` of split ``train``.

    Returns:
        split -> site -> name in the file. Arrays without a suffix are under ``None``.
    """
    groups: dict[str | None, dict[str, str]] = {}
    for name in names:
        site, _, suffix = name.rpartition("_")
        if site and suffix in SPLITS:
            groups.setdefault(suffix, {})[site] = name
        else:
            groups.setdefault(None, {})[name] = name
    order = [*SPLITS, None]
    return {split: groups[split] for split in order if split in groups}


def read_arrays(
    path: Path, sites: Collection[str] | None = None
) -> dict[str | None, dict[str, Array]]:
    """Read ``split -> name -> array`` from a file; with ``sites``, only those and their masks.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, broken or no ``.npz``, an array holds text or objects, arrays
            are missing.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise ValueError(f"{path}: came a folder, wanted an .npz file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty, wanted an .npz file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not an .npz file, or cut short; write it by numpy.savez")
    with np.load(path, allow_pickle=False) as archive:
        groups = by_split(archive.files)
        if sites is not None:
            groups = _select(path, groups, sites)
        arrays = {
            split: {site: _read(path, archive, name) for site, name in names.items()}
            for split, names in groups.items()
        }
    if not any(arrays.values()):
        raise ValueError(f"{path}: the file holds no arrays")
    return arrays


def _select(
    path: Path, groups: Mapping[str | None, Mapping[str, str]], sites: Collection[str]
) -> dict[str | None, dict[str, str]]:
    held = {site for names in groups.values() for site in names}
    if unknown := sorted(set(sites) - held):
        raise ValueError(f"{path}: sites= names {unknown}, the file holds {sorted(held)}")
    wanted = {*sites, *(f"observed_{site}" for site in sites)}
    chosen = {
        split: {site: name for site, name in names.items() if site in wanted}
        for split, names in groups.items()
    }
    return {split: names for split, names in chosen.items() if names}


def _read(path: Path, archive: Any, name: str) -> Array:
    try:
        array = archive[name]
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise ValueError(
                f"{path}: array {name!r} holds Python objects, wanted numbers; save it with a "
                "numeric dtype, or leave it out by sites="
            ) from None
        raise ValueError(f"{path}: array {name!r} cannot be read ({error})") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        raise ValueError(f"{path}: array {name!r} cannot be read ({error})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        held = array.dtype if isinstance(array, np.ndarray) else "raw bytes"
        raise ValueError(
            f"{path}: array {name!r} holds {held}, wanted numbers; encode it as integers, or leave "
            "it out by sites="
        )
    return array
