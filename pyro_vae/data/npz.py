"""Arrays out of an ``.npz`` file, with a clear error for what is broken."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.data.source import Array, Source, by_split, check_numbers, select, sha256

__all__ = ["read_npz"]


def read_npz(path: Path, sites: Collection[str] | None = None) -> Source:
    """The arrays of a file; with ``sites``, only those and their masks.

    Raises:
        ValueError: the file is empty, broken or no ``.npz``, an array holds text or objects, arrays
            are missing.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty, wanted an .npz file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not an .npz file, or cut short; write it by numpy.savez")
    with np.load(path, allow_pickle=False) as archive:
        names = select(str(path), by_split(archive.files), sites)
        parts = {
            split: {site: _read(path, archive, name) for site, name in inside.items()}
            for split, inside in names.items()
        }
    if not parts:
        raise ValueError(f"{path}: the file holds no arrays")
    return Source(str(path), parts, {"source": str(path), "sha256": sha256(path)})


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
    return check_numbers(str(path), name, array)
