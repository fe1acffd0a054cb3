"""Data sets by name and from files, as a Batch and a record of what was done to them."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_vae.batch import Batch
from pyro_vae.data.npz import Array, read_arrays, sha256

__all__ = ["describe", "load", "split"]

FOLDER = "PYRO_VAE_DATA"
BUILT_IN = ("digits", "digits_binary")
BINARY_SEED = 0  # of the one Bernoulli draw per pixel of digits_binary
MASK = "observed_"  # prefix of the arrays that say where a site is observed
SPLIT_SEED = 0  # of the 80/20 split of the digits, which have no official one


def load(
    name_or_path: str | os.PathLike[str],
    split: str | None = None,
    sites: Collection[str] | None = None,
) -> Batch:
    """Load a data set; ``describe`` with the same arguments says what was done to it.

    * ``"digits"``: the 1797 digits of scikit-learn, ``x`` [B, 64] counts 0..16 (floating) and ``y``
      [B] labels. Splits ``train`` (1437 rows) and ``test`` (360) by a fixed seed.
    * ``"digits_binary"``: the same rows with ``x`` in {0, 1}: one Bernoulli draw per pixel, with
      probability count / 16 and a fixed seed (static binarization).
    * a path to an ``.npz`` file, or ``NAME`` for ``NAME.npz`` in the folder that the environment
      variable ``PYRO_VAE_DATA`` names. Arrays ``x_train``, ``x_valid``, ``x_test`` are site ``x``
      of three splits; without such suffixes the file is one split.

    How an array becomes a site: NaN means missing, and a bool array ``observed_x``
    (``observed_x_train``) is the mask of ``x``, which integers need to miss anything. Floating
    arrays take torch's default dtype. Bool and uint8 arrays of two or more dimensions (pixels)
    become floating *unscaled* values: 0..255 stays 0..255. All other integers become int64. A file
    ``mnist_static_binary.npz`` with bit-packed rows [N, 98] is unpacked to ``x`` [N, 28, 28] in
    {0, 1}.

    Args:
        name_or_path: name or path as above. With a folder or an ending in it, it is a path.
        split: ``train``, ``valid``, ``test``, or ``all`` for the rows of a data set that is not
            stored in parts. Default: ``train`` for files stored in parts, otherwise ``all``.
        sites: the arrays to take, by site name (default: every array).

    Returns:
        The rows of the split, numbered from 0, with ``total`` the split's number of rows.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: an unknown name or split, a broken file, arrays that are not rows of numbers.
    """
    return _load(name_or_path, split, sites)[0]


def describe(
    name_or_path: str | os.PathLike[str],
    split: str | None = None,
    sites: Collection[str] | None = None,
) -> dict[str, Any]:
    """What ``load`` with the same arguments does, as a record that can be written as JSON.

    Returns:
        ``name``, ``source``, ``sha256`` (of the file; of the raw arrays for built-in data),
        ``split``, ``splits`` (those there are), ``rows``, ``sites`` (shape, dtype, number of
        missing entries), ``steps`` (what was done to the values, in words), and the seeds used.
    """
    return _load(name_or_path, split, sites)[1]


def split(
    batch: Batch, fractions: Sequence[float] = (0.8, 0.2), seed: int = 0
) -> tuple[Batch, ...]:
    """Cut a batch into parts by a seeded permutation of its rows.

    Each part is a data set of its own: its ``total`` is its number of rows, counted from 0. Which
    sites are incomplete and what missing entries read as stay as they are in ``batch``.

    Args:
        batch: the rows to divide.
        fractions: positive numbers that add up to 1.
        seed: of the permutation, which is the same on every platform and version.

    Raises:
        ValueError: fractions that are not positive or do not add up to 1, a part without rows.
    """
    if not fractions or min(fractions) <= 0 or not math.isclose(sum(fractions), 1.0):
        raise ValueError(
            f"fractions= came {list(fractions)}, wanted positive numbers that add up to 1"
        )
    ends = [math.floor(batch.size * part + 1e-6) for part in np.cumsum(fractions)]
    ends[-1] = batch.size
    starts = [0, *ends[:-1]]
    if any(start >= end for start, end in zip(starts, ends, strict=True)):
        raise ValueError(
            f"fractions= came {list(fractions)}, which leave a part of the {batch.size} rows empty"
        )
    order = np.random.RandomState(seed).permutation(batch.size)  # its stream is frozen by numpy
    return tuple(
        _renumber(batch.rows(torch.from_numpy(order[start:end])))
        for start, end in zip(starts, ends, strict=True)
    )


def _renumber(part: Batch) -> Batch:
    """Make a part (fresh from ``Batch.rows``) a data set of its own."""
    part.total, part.index = part.size, torch.arange(part.size, device=part.device)
    return part


def _load(
    name_or_path: str | os.PathLike[str], split_name: str | None, sites: Collection[str] | None
) -> tuple[Batch, dict[str, Any]]:
    if isinstance(sites, str):
        raise ValueError(f"sites= came the text {sites!r}, wanted a list of names: [{sites!r}]")
    name = os.fspath(name_or_path)
    if isinstance(name_or_path, str) and name in BUILT_IN:
        batch, record = _digits(name, split_name, sites)
    else:
        batch, record = _file(_resolve(name_or_path), split_name, sites)
    described = {
        site: {
            "shape": list(batch[site].shape),
            "dtype": str(batch[site].dtype).removeprefix("torch."),
            "missing": int((~batch.mask(site)).sum()),
        }
        for site in batch.sites
    }
    return batch, {"name": name, **record, "rows": batch.size, "sites": described}


def _resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """The file that a name or a path stands for."""
    name = os.fspath(name_or_path)
    if not isinstance(name_or_path, str) or "/" in name or os.sep in name or Path(name).suffix:
        return Path(name).expanduser()
    folder = os.environ.get(FOLDER)
    if folder and (path := Path(folder) / f"{name}.npz").exists():
        return path
    if not folder:
        where = f"set {FOLDER} to a folder with {name}.npz, or give a path"
    elif not Path(folder).is_dir():
        where = f"{FOLDER} names {folder}, which is not a folder"
    else:
        files = sorted(path.stem for path in Path(folder).glob("*.npz"))
        where = f"{FOLDER} ({folder}) has {files or 'no .npz file'}"
    raise ValueError(f"data set {name!r} is unknown: built in are {list(BUILT_IN)}; {where}")


# --- built-in data ------------------------------------------------------------------------------


def _digits(
    name: str, split_name: str | None, sites: Collection[str] | None
) -> tuple[Batch, dict[str, Any]]:
    import sklearn  # here, since it takes a second to import
    from sklearn.datasets import load_digits

    counts, labels = load_digits(return_X_y=True)
    counts, labels = counts.astype(np.uint8), labels.astype(np.int64)
    record: dict[str, Any] = {
        "source": f"scikit-learn {sklearn.__version__}, load_digits",
        "sha256": hashlib.sha256(counts.tobytes() + labels.tobytes()).hexdigest(),
    }
    if name == "digits_binary":
        # Drawn for all rows at once, so that a row is the same in every split.
        uniform = np.random.RandomState(BINARY_SEED).random_sample(counts.shape)
        pixels = uniform < counts / 16
        record["binarization"] = {"kind": "static", "draw": "count / 16", "seed": BINARY_SEED}
        record["steps"] = ["x: one Bernoulli draw per pixel with probability count / 16"]
    else:
        pixels, record["steps"] = counts, ["x: counts 0..16, unscaled"]
    arrays = {"x": pixels, "y": labels}
    if unknown := sorted(set(sites or ()) - set(arrays)):
        raise ValueError(f"{name}: sites= names {unknown}, the data set holds {sorted(arrays)}")
    batch = Batch(
        {site: _numbers(arrays[site]) for site in arrays if sites is None or site in sites}
    )

    chosen = "all" if split_name is None else split_name
    splits = ["train", "test", "all"]
    if chosen not in splits:
        raise ValueError(f"{name}: split= came {chosen!r}, wanted one of {splits}")
    if chosen != "all":
        batch = split(batch, (0.8, 0.2), seed=SPLIT_SEED)[splits.index(chosen)]
        record["split_seed"] = SPLIT_SEED
    return batch, {**record, "split": chosen, "splits": splits}


# --- files --------------------------------------------------------------------------------------


def _file(
    path: Path, split_name: str | None, sites: Collection[str] | None
) -> tuple[Batch, dict[str, Any]]:
    parts = read_arrays(path, sites)
    steps = _unpack_bits(path, parts) if path.stem == "mnist_static_binary" else []
    chosen = _choose(path, parts, split_name)
    part = parts[chosen]
    _check_rows(path, part)
    # Every split agrees on what is incomplete, and missing entries read as they do in the first.
    incomplete = {site for each in parts.values() for site in each if _has_missing(each, site)}
    first = next(iter(parts.values()))
    try:
        fill = _batch(first, incomplete, only=incomplete).fill if incomplete & set(first) else {}
        batch = _batch(part, incomplete, {site: fill[site] for site in fill if site in part})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    steps += [
        f"{site}: {part[site].dtype} to floating, unscaled"
        for site in batch.sites
        if _is_pixels(part[site])
    ]
    return batch, {
        "source": str(path),
        "sha256": sha256(path),
        "split": chosen or "all",
        "splits": [each or "all" for each in parts],
        "steps": steps,
    }


def _choose(
    path: Path, parts: Mapping[str | None, Mapping[str, Array]], split_name: str | None
) -> str | None:
    stored = [each for each in parts if each is not None]
    if not stored:
        if split_name in (None, "all"):
            return None
        raise ValueError(
            f"{path}: split= came {split_name!r}, but the file is not stored in parts; divide it "
            "by pyro_vae.data.split(batch, fractions)"
        )
    if loose := sorted(parts.get(None, ())):
        raise ValueError(
            f"{path}: arrays {loose} belong to no split, others are of {stored}; leave them out by "
            "sites="
        )
    if split_name is None and "train" not in stored:
        raise ValueError(f"{path}: has no training rows, only {stored}; name them SITE_train")
    chosen = "train" if split_name is None else split_name
    if chosen not in stored:
        raise ValueError(f"{path}: split= came {chosen!r}, wanted one of {stored}")
    return chosen


def _check_rows(path: Path, part: Mapping[str, Array]) -> None:
    rows = {site: len(array) if array.ndim else 0 for site, array in part.items()}
    if len(set(rows.values())) > 1:
        raise ValueError(
            f"{path}: the arrays differ in their number of rows: {rows}; name them SITE_train, "
            "SITE_valid, SITE_test, or take some by sites="
        )
    if not all(rows.values()):
        raise ValueError(f"{path}: arrays {list(rows)} have no rows, wanted [B, *event]")
    for name in part:
        site = name.removeprefix(MASK)
        if site != name and site not in part:
            raise ValueError(f"{path}: array {name!r} is the mask of {site!r}, which is not there")
        if site != name and not np.isin(part[name], (0, 1)).all():
            raise ValueError(
                f"{path}: array {name!r} is a mask, wanted True or False (1 or 0) only"
            )


def _batch(
    part: Mapping[str, Array],
    incomplete: Collection[str],
    fill: Mapping[str, float] | None = None,
    only: Collection[str] | None = None,
) -> Batch:
    values = {
        site: _numbers(array)
        for site, array in part.items()
        if not site.startswith(MASK) and (only is None or site in only)
    }
    everywhere = {site: np.ones(values[site].shape, bool) for site in values if site in incomplete}
    observed = {site: part.get(MASK + site, mask) for site, mask in everywhere.items()}
    return Batch(values, observed, fill=fill)


def _has_missing(part: Mapping[str, Array], site: str) -> bool:
    array = part[site]
    return MASK + site in part or (array.dtype.kind == "f" and bool(np.isnan(array).any()))


def _is_pixels(array: Array) -> bool:
    return array.ndim > 1 and array.dtype in (np.bool_, np.uint8)


def _numbers(array: Array) -> Array:
    """Floating for floating arrays and pixels, int64 for the rest; in this machine's byte order."""
    if array.dtype.kind != "f" and not _is_pixels(array):
        return array.astype(np.int64)
    double = torch.get_default_dtype() == torch.float64
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which Batch refuses
        return array.astype(np.float64 if double else np.float32)


def _unpack_bits(path: Path, parts: dict[str | None, dict[str, Array]]) -> list[str]:
    """Turn bit-packed rows [N, 98] of site x into [N, 28, 28] of 0 and 1, in place."""
    for part in parts.values():
        if "x" in part:
            if part["x"].dtype != np.uint8 or part["x"].shape[1:] != (98,):
                came = f"{part['x'].dtype} {list(part['x'].shape)}"
                raise ValueError(f"{path}: array 'x' came {came}, wanted bit-packed uint8 [N, 98]")
            part["x"] = np.unpackbits(part["x"], axis=1).reshape(-1, 28, 28)
    return ["x: unpacked from bits, 1 = ink (static binarization of the file's authors)"]
