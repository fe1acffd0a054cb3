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
      variable ``PYRO_VAE_DATA`` names. Arrays ``x_train``, ``x_valid``, ``x_test`` are site ``x`` of
      three splits; without such suffixes the file is one split.

    How an array becomes a site: NaN means missing, and a bool array ``observed_x`` (``observed_x_train``)
    is the mask of ``x``, which integers need. Floating arrays take torch's default dtype. Of bool and
    uint8 arrays, those of two or more dimensions (pixels) become floating *unscaled* values (0..255
    stays 0..255), others (labels) int64, as do all wider integers. A file ``mnist_static_binary.npz``
    with bit-packed rows [N, 98] is unpacked to ``x`` [N, 28, 28] in {0, 1}.

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
        ``split``, ``splits`` (those there are), ``rows``, ``sites`` (shape, dtype, number of missing
        entries), ``steps`` (what was done to the values, in words), and the seeds that were used.
    """
    return _load(name_or_path, split, sites)[1]


def split(batch: Batch, fractions: Sequence[float] = (0.8, 0.2), seed: int = 0) -> tuple[Batch, ...]:
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
    if name in BUILT_IN and isinstance(name_or_path, str):
        batch, record = _digits(name, split_name, sites)
    else:
        batch, record = _file(_resolve(name), split_name, sites)
    described = {
        site: {
            "shape": list(batch[site].shape),
            "dtype": str(batch[site].dtype).removeprefix("torch."),
            "missing": int((~batch.mask(site)).sum()),
        }
        for site in batch.sites
    }
    return batch, {"name": name, **record, "rows": batch.size, "sites": described}


def _resolve(name: str) -> Path:
    """The file that a name or a path stands for."""
    if os.sep in name or "/" in name or Path(name).suffix:
        return Path(name)
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
    batch = Batch({site: _numbers(arrays[site]) for site in arrays if sites is None or site in sites})

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
    arrays = read_arrays(path, sites)
    steps = _unpack_bits(path, arrays) if path.stem == "mnist_static_binary" else []
    chosen = _choose(path, arrays, split_name)
    rows = {site: array.shape[0] if array.ndim else 0 for site, array in arrays[chosen].items()}
    if len(set(rows.values())) > 1:
        raise ValueError(
            f"{path}: the arrays differ in their number of rows: {rows}; name them SITE_train, "
            "SITE_valid, SITE_test, or take some by sites="
        )
    if not all(rows.values()):
        empty = [site for site, number in rows.items() if not number]
        raise ValueError(f"{path}: arrays {empty} have no rows, wanted [B, *event]")
    try:
        batch = _batch(arrays, chosen)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    steps += [
        f"{site}: {array.dtype} to floating, unscaled"
        for site, array in arrays[chosen].items()
        if site in batch and _is_pixels(array)
    ]
    return batch, {
        "source": str(path),
        "sha256": sha256(path),
        "split": "all" if chosen is None else chosen,
        "splits": ["all" if there is None else there for there in arrays],
        "steps": steps,
    }


def _choose(
    path: Path, arrays: Mapping[str | None, Mapping[str, Array]], split_name: str | None
) -> str | None:
    parts = [there for there in arrays if there is not None]
    if not parts:
        if split_name in (None, "all"):
            return None
        raise ValueError(
            f"{path}: split= came {split_name!r}, but the file is not stored in parts; divide it by "
            "pyro_vae.data.split(batch, fractions)"
        )
    if loose := sorted(arrays.get(None, ())):
        raise ValueError(
            f"{path}: arrays {loose} belong to no split, while others are of {parts}; leave them "
            "out by sites="
        )
    chosen = "train" if split_name is None else split_name
    if chosen not in parts:
        raise ValueError(f"{path}: split= came {chosen!r}, wanted one of {parts}")
    return chosen


def _batch(arrays: Mapping[str | None, Mapping[str, Array]], chosen: str | None) -> Batch:
    """One split as a Batch, alike to the others in what is incomplete and what missing reads as."""
    values, observed = _sites(arrays[chosen])
    first = next(iter(arrays))  # the split that says what missing entries read as
    fill: dict[str, float] = {}
    for site, value in values.items():
        peers = [_sites(part) for part in arrays.values() if part is not arrays[chosen]]
        if site not in observed and any(
            site in peer_observed or _has_nan(peer.get(site)) for peer, peer_observed in peers
        ):
            observed[site] = np.ones(value.shape, dtype=bool)
        if chosen != first and site in arrays[first]:
            reference, mask = _sites({**arrays[first]})
            whole = Batch({site: reference[site]}, {site: mask[site]} if site in mask else None)
            fill |= whole.fill
    return Batch(values, observed, fill=fill)


def _sites(arrays: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Values and masks, apart."""
    return {}, {}


def _has_nan(array: Array | None) -> bool:
    return array is not None and array.dtype.kind == "f" and bool(np.isnan(array).any())
