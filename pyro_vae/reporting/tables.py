"""Named arrays with a row each, as a file that other programs read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyro_vae.files import replacing

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["columns", "write"]

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
    path = Path(path)
    if path.suffix not in WRITERS:
        raise ValueError(f"{path}: came suffix {path.suffix!r}, wanted one of {list(WRITERS)}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: no such folder: {path.parent}")
    with replacing(path) as temporary:
        WRITERS[path.suffix](temporary, arrays, names or {})


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


def _csv(path: Path, arrays: Arrays, names: Mapping[str, Sequence[str]], sep: str = ",") -> None:
    columns(arrays, names).to_csv(path, index=False, sep=sep)


def _tsv(path: Path, arrays: Arrays, names: Mapping[str, Sequence[str]]) -> None:
    _csv(path, arrays, names, "\t")


def _parquet(path: Path, arrays: Arrays, names: Mapping[str, Sequence[str]]) -> None:
    try:
        columns(arrays, names).to_parquet(path, index=False)
    except ImportError:
        raise ValueError(
            f"{path}: parquet needs pyarrow: pip install 'pyro-vae[parquet]'; or write .csv"
        ) from None


WRITERS: dict[str, Callable[[Path, Arrays, Mapping[str, Sequence[str]]], None]] = {
    ".npz": _npz,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
