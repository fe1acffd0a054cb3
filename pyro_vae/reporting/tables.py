"""Named arrays with a row each, as a file that other programs read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyro_vae.files import replacing

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["check_path", "columns", "stacked", "write", "write_frame"]

Arrays = Mapping[str, NDArray[Any]]


def write(
    path: str | Path, arrays: Arrays, names: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Write arrays ``[N, *event]`` by the suffix of ``path``; nothing half-written is left.

    ``.npz`` keeps them as they are. ``.csv``, ``.tsv`` and ``.parquet`` have a column for every entry,
    as ``columns`` names them.

    Args:
        names: array -> names of its columns.

    Raises:
        ValueError: another suffix, no such folder, a parquet file without pyarrow.
    """
    path = check_path(path, WRITERS)
    with replacing(path) as temporary:
        WRITERS[path.suffix](temporary, arrays, names or {})


def write_frame(path: str | Path, frame: pd.DataFrame) -> None:
    """Write a table by the suffix of ``path``, ``.csv``, ``.tsv`` or ``.parquet``, without its index.

    Raises:
        ValueError: another suffix, no such folder, a parquet file without pyarrow.
    """
    path = check_path(path)
    with replacing(path) as temporary:
        FRAMES[path.suffix](frame, temporary)


def check_path(path: str | Path, suffixes: Collection[str] | None = None) -> Path:
    """Refuse a path that nothing can be written to, before there is something to write.

    Raises:
        ValueError: another suffix, no such folder.
    """
    path, suffixes = Path(path), FRAMES if suffixes is None else suffixes
    if path.suffix not in suffixes:
        raise ValueError(f"{path}: came suffix {path.suffix!r}, wanted one of {list(suffixes)}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: no such folder: {path.parent}")
    return path


def stacked(frames: Sequence[pd.DataFrame], name: str) -> pd.DataFrame:
    """Tables below each other, and in front a column that says which of them a row is of, from 1."""
    import pandas as pd

    numbered = enumerate(frames, start=1)
    parts = [pd.concat([frame.assign(**{name: i})[[name]], frame], axis=1) for i, frame in numbered]
    return pd.concat(parts, ignore_index=True)


def columns(arrays: Arrays, names: Mapping[str, Sequence[str]] | None = None) -> pd.DataFrame:
    """A column for every entry of the arrays ``[N, *event]``: ``z_0, z_1``, ``x_0_0``, or as named."""
    import pandas as pd  # here, since it takes a while to import

    table: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        given = (names or {}).get(name, ())
        flat = array.reshape(len(array), -1)
        told = list(given) if len(given) == flat.shape[1] else _places(name, array)
        table |= dict(zip(told, flat.T, strict=True))
    return pd.DataFrame(table)


def _places(name: str, array: NDArray[Any]) -> list[str]:
    return ["_".join([name, *map(str, place)]) for place in np.ndindex(array.shape[1:])]


def _npz(path: Path, arrays: Arrays, names: Mapping[str, Sequence[str]]) -> None:
    values: Any = arrays  # a site called allow_pickle would be taken for an option
    np.savez_compressed(path, **values)


def _table(path: Path, arrays: Arrays, names: Mapping[str, Sequence[str]]) -> None:
    FRAMES[path.suffix](columns(arrays, names), path)


def _csv(frame: pd.DataFrame, path: Path, sep: str = ",") -> None:
    frame.to_csv(path, index=False, sep=sep)


def _parquet(frame: pd.DataFrame, path: Path) -> None:
    try:
        frame.to_parquet(path, index=False)
    except ImportError:
        raise ValueError(
            f"{path}: parquet needs pyarrow: pip install 'pyro-vae[parquet]'; or write .csv"
        ) from None


FRAMES: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    ".csv": _csv,
    ".tsv": partial(_csv, sep="\t"),
    ".parquet": _parquet,
}
WRITERS: dict[str, Callable[[Path, Arrays, Mapping[str, Sequence[str]]], None]] = {
    ".npz": _npz,
    **dict.fromkeys(FRAMES, _table),
}
