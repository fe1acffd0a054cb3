"""Arrays out of ``.npy`` files, read into memory or mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.data.source import Array, Source, by_split, check_numbers, select, sha256

__all__ = ["read_npy"]


def read_npy(path: Path, sites: Collection[str] | None = None, mmap: bool = False) -> Source:
    """One ``.npy`` file as site ``x``, or a folder of them: ``SITE.npy``, or ``SITE_train.npy``,
    ``SITE_valid.npy``, ``SITE_test.npy``.

    Args:
        mmap: leave the rows in the files. These are then not hashed.

    Raises:
        ValueError: a file that is broken or no ``.npy``, or holds text or objects.
    """
    inside = {file.stem: file for file in sorted(path.glob("*.npy"))}
    files = inside if path.is_dir() else {"x": path}
    names = select(str(path), by_split(files), sites)
    parts = {
        split: {site: _read(files[name], name, mmap) for site, name in inside.items()}
        for split, inside in names.items()
    }
    used = [files[name] for inside in names.values() for name in inside.values()]
    record: dict[str, Any] = {"source": str(path), "sha256": None if mmap else _sha256(used)}
    if mmap:
        record["bytes"] = sum(file.stat().st_size for file in used)
    return Source(str(path), parts, record)


def _read(path: Path, name: str, mmap: bool) -> Array:
    """The header first: it says what is wrong more plainly than ``numpy.load`` does."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0}
            _, _, dtype = read.get(version, np.lib.format.read_array_header_2_0)(file)
            if not dtype.hasobject and not mmap:
                file.seek(0)
                array = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        line = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: not an .npy file, or cut short ({line}); write it by numpy.save"
        ) from None
    if dtype.hasobject:
        raise ValueError(
            f"{path}: holds Python objects, wanted numbers; save it with a numeric dtype"
        )
    if mmap:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: cannot be mapped, or is cut short ({error})") from None
    return check_numbers(str(path), name, array)


def _sha256(files: list[Path]) -> str:
    """Hash of a file, or of the names and hashes of several."""
    if len(files) == 1:
        return sha256(files[0])
    lines = "".join(f"{file.name} {sha256(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()
