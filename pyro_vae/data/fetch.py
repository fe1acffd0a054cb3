"""Public data sets from their originals: downloaded once, checked, decoded, and kept as one file."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.data.source import Array, sha256
from pyro_vae.files import replacing

__all__ = ["CACHE", "Original", "Public", "cache_folder", "fetch", "originals"]

CACHE = "PYRO_VAE_CACHE"


@dataclass(frozen=True)
class Original:
    """A file as its authors publish it.

    Attributes:
        name: what it is called.
        urls: where it is, tried in turn.
        known_hash: ``md5:...``, or None where nobody is known to have published one.
    """

    name: str
    urls: tuple[str, ...]
    known_hash: str | None = None


@dataclass(frozen=True)
class Public:
    """A public data set.

    Attributes:
        originals: what is downloaded.
        megabytes: about how much that is.
        decode: original name -> path, to array name -> array.
        shapes: of the decoded uint8 arrays, by name.
        counts: of their values, from 0 up, by name.
        classes: site -> names of its values.
    """

    originals: tuple[Original, ...]
    megabytes: int
    decode: Callable[[Mapping[str, Path]], dict[str, Array]]
    shapes: Mapping[str, tuple[int, ...]]
    counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    classes: Mapping[str, list[str]] = field(default_factory=dict)


def cache_folder() -> Path:
    """Where downloads are kept: ``PYRO_VAE_CACHE``, else the system's place for caches."""
    import pooch  # here, since it takes a while to import

    return Path(os.environ.get(CACHE) or pooch.os_cache("pyro_vae")).expanduser()


def originals(path: Path) -> list[dict[str, Any]]:
    """Name, url, number of bytes and sha256 of what a file in the cache was made from."""
    return _note(path)["originals"] if path.parent == cache_folder() else []


def fetch(name: str, public: Public) -> Path:
    """``NAME.npz`` in the cache, made from the originals if it is not there.

    ``NAME.json`` beside it holds the SHA-256 of the ``.npz`` and of every original. A file that has
    changed since is refused, and so is an original that is not what it was at an earlier download,
    which is the only check of one without a known hash besides that of the decoded arrays.

    Raises:
        ValueError: a file that is not what it was, or not what it should be.
        OSError: no url answers, or the cache cannot be written. Nothing is left behind.
    """
    folder = cache_folder()
    path = folder / f"{name}.npz"
    earlier = _note(path)
    if path.exists() and earlier["sha256"]:
        if sha256(path) != earlier["sha256"]:
            raise ValueError(
                f"{path}: has changed since it was downloaded; delete it to download it again"
            )
        return path
    remembered = {original["name"]: original["sha256"] for original in earlier["originals"]}
    print(
        f"{name}: downloading {len(public.originals)} files, about {public.megabytes} MB, to {folder}",
        file=sys.stderr,
    )
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as temporary:
            came = [
                _download(name, original, Path(temporary), remembered.get(original.name))
                for original in public.originals
            ]
            arrays = _decode(name, public, Path(temporary))
            note = path.with_suffix(".json")
            with replacing(note) as half_note, replacing(path) as half:
                np.savez_compressed(half, **arrays)  # type: ignore[arg-type]
                made = {"sha256": sha256(half), "originals": came}
                half_note.write_text(json.dumps(made, indent=2) + "\n")
    except OSError as error:
        if error.errno is None:  # of a download, and already in words
            raise
        raise OSError(
            f"{folder}: {name} cannot be kept here ({error.strerror}); name another folder by {CACHE}"
        ) from None
    finally:
        if new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return path


def _note(path: Path) -> dict[str, Any]:
    """What was remembered of a file in the cache when it was made."""
    note = path.with_suffix(".json")
    if not note.exists():
        return {"sha256": None, "originals": []}
    try:
        read = json.loads(note.read_text())
        return {"sha256": read["sha256"], "originals": list(read["originals"])}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{note}: not readable; delete it to download again") from None


def _download(
    name: str, original: Original, folder: Path, remembered: str | None
) -> dict[str, Any]:
    """One original from the first url that has it."""
    import pooch

    pooch.get_logger().setLevel("WARNING")  # it would tell of every file
    known_hash = original.known_hash or (f"sha256:{remembered}" if remembered else None)
    tried = []
    for url in original.urls:
        try:
            # not as a stream, of which pooch would leave the connection open
            downloader = pooch.HTTPDownloader(chunk_size=1 << 16, stream=False)
            path = Path(pooch.retrieve(url, known_hash, original.name, folder, None, downloader))
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk, not the net
            tried.append((url, error))
            continue
        size = path.stat().st_size
        return {"name": original.name, "url": url, "bytes": size, "sha256": sha256(path)}
    shown = ", ".join(f"{url} ({_why(error)})" for url, error in tried)
    kind = ValueError if all(isinstance(error, ValueError) for _, error in tried) else OSError
    raise kind(
        f"{name}: {original.name} could not be downloaded: {shown}; or put {name}.npz into a folder "
        "and name that by PYRO_VAE_DATA"
    )


def _why(error: Exception) -> str:
    """A failed download in a few words."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"{response.status_code} {response.reason}"
    if not isinstance(error, OSError):
        return "not the file it should be: its hash differs"
    broken = "IncompleteRead" in str(error) or "ChunkedEncoding" in type(error).__name__
    return "cut off" if broken else "no connection"


def _decode(name: str, public: Public, folder: Path) -> dict[str, Array]:
    """The arrays, after a look at whether they are what they should be."""
    try:
        arrays = public.decode({o.name: folder / o.name for o in public.originals})
    except (ValueError, KeyError, EOFError, OSError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{name}: what came cannot be decoded: {error}") from None
    for site, shape in public.shapes.items():
        array = arrays[site]
        if array.shape != shape or array.dtype != np.uint8:
            came = f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"{name}: {site} came as {came}, wanted uint8 {list(shape)}")
    for site, counts in public.counts.items():
        found = np.bincount(arrays[site].ravel()).tolist()
        if found != list(counts):
            raise ValueError(
                f"{name}: {site} holds its values {found} times, wanted {list(counts)}"
            )
    return arrays
