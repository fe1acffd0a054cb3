"""Data sets by name, from files and from tables, as a Batch that says what was done to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pyro_vae.batch import Batch
from pyro_vae.data.draws import check_choice, draws_for, step
from pyro_vae.data.images import read_images
from pyro_vae.data.named import MADE, available, obtain, read_named
from pyro_vae.data.npy import read_npy
from pyro_vae.data.sites import images, make_batch, summary
from pyro_vae.data.source import Array, Source, as_list, is_pixels, near
from pyro_vae.data.table import read_csv, read_frame, read_parquet

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["describe", "load"]

Sites = Collection[str] | Mapping[str, str | Collection[str] | None]


def load(
    source: str | os.PathLike[str] | pd.DataFrame,
    split: str | None = None,
    sites: Sites | None = None,
    *,
    columns: str | Collection[str] | None = None,
    drop: str | Collection[str] | None = None,
    size: tuple[int, int] | None = None,
    binarize: str | None = None,
    dequantize: bool = False,
    seed: int = 0,
    mmap: bool = False,
) -> Batch:
    """Load a data set; its ``record`` says where it is from and what was done to it.

    * ``"digits"``: the 1797 digits of scikit-learn, ``x`` [B, 64] counts 0..16 and ``y`` [B] labels,
      in splits ``train`` (1437 rows) and ``test`` (360); ``"digits_binary"``: the same rows with
      ``x`` in {0, 1}, one Bernoulli draw per pixel with probability count / 16.
    * ``"sprites"``: shapes rendered from five known factors, ``x`` [B, 32, 32] in {0, 1} and
      ``factors`` [B, 5], in splits ``train`` (50,000 rows) and ``test`` (10,000); see
      ``pyro_vae.data.sprites``.
    * ``"mnist"``, ``"fashion_mnist"``, ``"omniglot28"``, ``"mnist_static_binary"``: images ``x``
      [B, 28, 28]; see ``pyro_vae.data.named``. Any NAME is looked for as ``NAME.npz`` in the folder
      that the environment variable ``PYRO_VAE_DATA`` names; these four are else downloaded once.
    * an ``.npz`` file: its arrays are sites; ``x_train``, ``x_valid``, ``x_test`` are the parts of
      site ``x``. An ``.npy`` file is site ``x``, a folder of them a data set like an ``.npz`` file.
    * ``.csv``, ``.tsv``, ``.parquet`` and DataFrames: the numeric columns are one floating site
      ``x`` [B, D], an empty cell is missing; see ``pyro_vae.data.table``.
    * a folder of images: site ``x``, [B, H, W] or [B, 3, H, W] for colour, 0..255, and subfolders as
      splits and as classes ``y``; see ``pyro_vae.data.images``.

    How an array becomes a site: NaN means missing, and a bool array ``observed_x``
    (``observed_x_train``) is the mask of ``x``, which integers need to miss anything. Floating
    arrays take torch's default dtype. Bool and uint8 arrays of two or more dimensions (pixels)
    become floating *unscaled* values: 0..255 stays 0..255. All other integers become int64.

    Args:
        source: what to load. A word is a name, or else a folder that is here; with a folder or an
            ending in it, it is a path.
        split: ``train``, ``valid``, ``test``, or ``all`` for the rows of a data set that is not
            stored in parts. Default: ``train`` for data stored in parts, otherwise ``all``.
        sites: the sites to take, by name (default: every one). For tables also site -> columns.
        columns: of a table, the columns that make site ``x``, or the sites that are None.
        drop: of a table, the columns to leave out.
        size: (H, W) that images are resized to.
        binarize: 8-bit images (``record["levels"]``) become 0 and 1. ``static``: one Bernoulli draw
            with probability x / 255, the same whenever a row is loaded. ``dynamic``: drawn anew
            whenever rows are taken in training (Salakhutdinov and Murray 2008). ``epoch``: one draw
            an epoch. ``threshold``: x > 127.
        dequantize: 8-bit images become (x + u) / 256, u ~ U[0, 1) drawn anew whenever rows are taken
            in training (Theis et al. 2016, arXiv:1511.01844). The record has the log-Jacobian:
            log p of an image >= E_u log p(y) - D log 256.
        seed: of fixed draws. The rows of ``valid`` and ``test``, and whatever rows are judged by
            (``Batch.still()``), have one draw, a function of seed, site, split and row number.
        mmap: leave the rows of ``.npy`` files where they are and read them when they are taken; see
            ``pyro_vae.data.on_demand.OnDemand``.

    Returns:
        The rows of the split, numbered from 0, with ``total`` the split's number of rows.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: an unknown name or split, a broken file, what are no rows of numbers, an option
            that the kind of data does not have.
        OSError: a download that failed.
    """
    check_choice(binarize, dequantize, seed)
    given = {"columns": columns, "drop": drop, "size": size, "mmap": mmap or None}
    found = _read(source, sites, {name: it for name, it in given.items() if it is not None})
    chosen = found.choose(split)
    found.check(chosen)
    levels = images(found)
    if (binarize or dequantize) and not levels:
        raise ValueError(
            f"{found.place}: {'binarize' if binarize else 'dequantize'}= is for 8-bit images, uint8 "
            f"[B, H, W] up to 255, and of the sites {sorted(found.parts[chosen])} none is one"
        )
    fixed = chosen not in ("train", "all") or binarize in ("static", "threshold")
    batch = make_batch(found, chosen, draws_for(levels, chosen, binarize, dequantize, seed))
    batch = batch.still() if fixed else batch
    steps = list(found.record.get("steps", ()))
    for site, array in found.parts[chosen].items():
        if site in levels and (binarize or dequantize):
            steps.append(step(site, binarize, seed, fixed))
        elif is_pixels(array) and site in batch:
            steps.append(_cast(site, array))
    left = {} if binarize else {site: 256 for site in levels if site in batch}
    batch.record = {
        "name": os.fspath(source) if isinstance(source, str | os.PathLike) else "DataFrame",
        **found.record,
        "split": chosen,
        "splits": list(found.parts),
        **summary(batch),
        "steps": steps,
        **({"levels": left} if left else {}),
    }
    return batch


def describe(
    source: str | os.PathLike[str] | pd.DataFrame,
    split: str | None = None,
    sites: Sites | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What ``load`` with the same arguments does, as a record that can be written as JSON.

    Returns:
        ``name``, ``source``, ``sha256`` (of the file; of the raw arrays for built-in data and
        DataFrames; None for mapped files), ``split``, ``splits`` (those there are), ``rows``,
        ``sites`` (shape, dtype, number of missing entries), ``steps`` (what was done to the values),
        ``levels`` of 8-bit images, and what the kind of data adds: ``columns``, ``classes``, ...
    """
    return load(source, split, sites, **options).record


def _cast(site: str, array: Array) -> dict[str, Any]:
    return {"site": site, "step": "cast", "text": f"{site}: {array.dtype} to floating, unscaled"}


# --- what is meant ------------------------------------------------------------------------------


class Reader(NamedTuple):
    """What reads a kind of data, and the options that it takes."""

    read: Callable[..., Source]
    options: tuple[str, ...] = ()


MAPPING = "sites= as a mapping"
TABLE = Reader(read_frame, ("columns", "drop", MAPPING))
READERS = {
    ".npz": Reader(read_named),
    ".npy": Reader(read_npy, ("mmap",)),
    ".csv": TABLE._replace(read=read_csv),
    ".tsv": TABLE._replace(read=read_csv),
    ".parquet": TABLE._replace(read=read_parquet),
    ".pq": TABLE._replace(read=read_parquet),
}
FOR = dict.fromkeys(TABLE.options, "tables (.csv, .tsv, .parquet, DataFrame)") | {
    "size": "folders of images",
    "mmap": ".npy files and folders of them",
}


def _read(source: Any, sites: Any, options: dict[str, Any]) -> Source:
    """Read what is meant, or refuse options that it does not have."""
    if isinstance(sites, str):
        raise ValueError(f"sites= came the text {sites!r}, wanted a list of names: [{sites!r}]")
    if sites is not None and not isinstance(sites, Mapping):
        sites = as_list("sites", sites)
    if sites is not None and not sites:
        raise ValueError("sites= came empty, wanted names (or None, for all)")
    reader, source, shown = _reader(source)
    for option in [*options, *([MAPPING] if isinstance(sites, Mapping) else [])]:
        if option not in reader.options:
            raise ValueError(f"{shown}: came {option}, which is for {FOR[option]}")
    return reader.read(source, sites, **options)


def _reader(source: Any) -> tuple[Reader, Any, str]:
    """What reads it, what is handed over, and what errors call it."""
    if not isinstance(source, str | os.PathLike):
        return TABLE, source, "the DataFrame"
    name = os.fspath(source)
    if isinstance(source, str) and name in MADE:
        return Reader(MADE[name]), name, name
    path = _resolve(source, name)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        arrays = any(path.glob("*.npy"))
        return READERS[".npy"] if arrays else Reader(read_images, ("size",)), path, str(path)
    if path.suffix.lower() not in READERS:
        raise ValueError(
            f"{path}: came a file {path.suffix or 'without an ending'}, wanted one of "
            f"{', '.join(READERS)}, or a folder of images or of .npy files"
        )
    return READERS[path.suffix.lower()], path, str(path)


def _resolve(source: Any, name: str) -> Path:
    """The file that a name or a path stands for."""
    if not isinstance(source, str) or "/" in name or os.sep in name or Path(name).suffix:
        return Path(name).expanduser()
    path = obtain(name)
    if path is None and name and Path(name).is_dir():
        return Path(name)
    if path is None:
        known = available()
        raise ValueError(
            f"data set {name!r} is unknown: there are {list(known)}; set PYRO_VAE_DATA to a folder "
            f"with {name}.npz, or give a path{near(name, known)}"
        )
    return path
