"""Tables, from ``.csv``, ``.tsv`` and ``.parquet`` files and DataFrames: columns become sites.

The numeric columns, in their order, are one floating site ``x`` [B, D]; an empty cell (NaN, NA) is
missing. True and False are 1 and 0. ``columns=`` says which columns, ``drop=`` which not.

With ``sites={"x": ["age", "income"], "y": "label"}`` columns become several sites: a list gives
[B, D], floating; one name gives [B], int64 if the column holds whole numbers. ``None`` stands for all
other columns: ``sites={"y": "label", "x": None}``. The names are in ``record["columns"]``.

Text is refused: encode it as numbers, or leave it out.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.data.source import MASK, Array, Source, as_list, near, select, sha256

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["read_csv", "read_frame", "read_parquet"]

Names = str | Collection[str] | None
INDEX = re.compile(
    r"Unnamed: \d+|__index_level_\d+__|"
)  # names that an index gets when it is saved


def read_csv(path: Path, sites: Any = None, columns: Names = None, drop: Names = None) -> Source:
    """A file of text with a header line; ``.csv`` has commas, ``.tsv`` tabs.

    Raises:
        ValueError: no rows, rows of different lengths, what ``read_frame`` refuses.
    """
    import pandas as pd

    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    header = _check_csv(path, separator)
    _check_names(str(path), header)
    frame = pd.read_csv(
        path,
        sep=separator,
        names=header,
        header=0,
        index_col=False,
        skipinitialspace=True,
        encoding="utf-8-sig",
        dtype_backend="numpy_nullable",  # whole numbers stay whole where some are missing
        low_memory=False,
    )

    def line(row: int) -> str:
        records = (number for number, fields in _records(path, separator) if fields)
        return f"line {[number for _, number in zip(range(row + 2), records, strict=False)][-1]}"

    record = {"source": str(path), "sha256": sha256(path)}
    return _sites(str(path), frame, line, record, sites, columns, drop)


def read_parquet(
    path: Path, sites: Any = None, columns: Names = None, drop: Names = None
) -> Source:
    """A ``.parquet`` file; needs pyarrow.

    Raises:
        ValueError: pyarrow is not installed, the file is broken, what ``read_frame`` refuses.
    """
    import pandas as pd

    try:
        frame = pd.read_parquet(path, engine="pyarrow", dtype_backend="numpy_nullable")
    except ImportError:
        raise ValueError(
            f"{path}: .parquet files need pyarrow; install it by pip install pyro-vae[parquet]"
        ) from None
    except (ValueError, OSError) as error:  # pyarrow's own are of these kinds
        line = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a .parquet file, or cut short ({line})") from None
    record = {"source": str(path), "sha256": sha256(path)}
    return _sites(str(path), frame, lambda row: f"row {row}", record, sites, columns, drop)


def read_frame(
    frame: pd.DataFrame, sites: Any = None, columns: Names = None, drop: Names = None
) -> Source:
    """A DataFrame; its index is left out.

    Raises:
        ValueError: something else, no rows, columns of text or of one name, an index among the
            columns, names that are not there.
    """
    import pandas as pd

    if not isinstance(frame, pd.DataFrame):
        raise ValueError(
            f"load: came a {type(frame).__name__}, wanted a name, a path or a DataFrame; arrays go "
            "into a Batch as they are: Batch({'x': array})"
        )
    frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
    found = _sites(
        "the DataFrame",
        frame,
        lambda row: f"row {frame.index[row]}",
        {"source": "DataFrame", "sha256": None},
        sites,
        columns,
        drop,
    )
    digest = hashlib.sha256()
    for name, array in found.parts["all"].items():
        digest.update(name.encode() + array.tobytes())
    found.record["sha256"] = digest.hexdigest()
    return found


# --- columns to sites ---------------------------------------------------------------------------


def _sites(
    place: str,
    frame: pd.DataFrame,
    where: Callable[[int], str],
    record: dict[str, Any],
    sites: Mapping[str, Names] | Collection[str] | None,
    columns: Names,
    drop: Names,
) -> Source:
    if len(frame) == 0:
        raise ValueError(f"{place}: the table has a header and no rows")
    names = list(frame.columns)
    _check_names(place, names)
    chosen = _chosen(place, names, sites, columns, drop)
    arrays: dict[str, Array] = {}
    for site, of in chosen.items():
        arrays |= _site(place, frame, where, site, of)
    if not isinstance(sites, Mapping):
        arrays = select(place, {"all": arrays}, sites)["all"]
    kept = {site: as_list("columns", of) for site, of in chosen.items() if site in arrays}
    return Source(place, {"all": arrays}, {**record, "columns": kept})


def _check_names(place: str, names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{place}: columns {twice} are there more than once; rename them")


def _chosen(
    place: str, names: list[str], sites: Any, columns: Names, drop: Names
) -> dict[str, Any]:
    """Site -> columns."""
    if isinstance(sites, Mapping) and (columns is not None or drop is not None):
        raise ValueError(
            f"{place}: came sites= as a mapping and columns= or drop=, wanted one of them"
        )
    alone = {"x": None if columns is None else as_list("columns", columns)}
    wanted: dict[str, Any] = dict(sites) if isinstance(sites, Mapping) else alone
    taken = [name for of in wanted.values() for name in as_list("columns", of)]
    dropped = as_list("drop", drop)
    for name in [*taken, *dropped]:
        if name not in names:
            raise ValueError(f"{place}: has no column {name!r}, only {names}{near(name, names)}")
    rest = [name for name in names if name not in taken and name not in dropped]
    index = [name for name in rest if INDEX.fullmatch(name)]
    if index and None in wanted.values():
        raise ValueError(
            f"{place}: column {index[0]!r} looks like an index that was saved along; leave it out by "
            f"drop={index}, or name the columns to take by columns="
        )
    chosen = {site: rest if of is None else of for site, of in wanted.items()}
    for site, of in chosen.items():
        kept = of if isinstance(of, str) else [name for name in of if name not in dropped]
        if not kept:
            raise ValueError(f"{place}: no columns are left for site {site!r}, of {names}")
        chosen[site] = kept
    return chosen


def _site(
    place: str, frame: pd.DataFrame, where: Callable[[int], str], site: str, of: str | list[str]
) -> dict[str, Array]:
    """The array of a site, with its mask if whole numbers are missing."""
    columns = [_numbers(place, frame[name], where) for name in as_list("columns", of)]
    if not isinstance(of, str):
        return {site: np.stack([_floating(column) for column in columns], axis=1)}
    (column,) = columns
    missing = column.isna().to_numpy()
    if column.dtype.kind == "f" or missing.all():
        return {site: _floating(column)}
    mask = {MASK + site: ~missing} if missing.any() else {}
    return {site: column.fillna(column.dropna().iloc[0]).to_numpy(np.int64), **mask}


def _floating(column: pd.Series[Any]) -> Array:
    return column.to_numpy(np.float64, na_value=np.nan)


def _numbers(place: str, column: pd.Series[Any], where: Callable[[int], str]) -> pd.Series[Any]:
    """A column of numbers, or of True and False."""
    import pandas as pd

    kind = getattr(column.dtype, "kind", "O")
    if kind in "biuf":
        return column
    plain = column.astype(object)
    odd = plain.map(lambda value: not isinstance(value, str | Real | Decimal | np.bool_))
    parsed = pd.to_numeric(plain.where(~odd, None), errors="coerce")
    bad = (parsed.isna() | odd) & plain.notna()
    if bad.any():
        row = int(np.argmax(bad.to_numpy()))
        value = plain.iloc[row]
        raise ValueError(
            f"{place}: column {column.name!r} holds {value!r} in {where(row)}, wanted numbers; encode "
            f"it as numbers, or leave it out by drop=[{column.name!r}] (or columns=)"
        )
    return parsed


# --- text ---------------------------------------------------------------------------------------


def _records(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of every record; blank lines have no fields."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=separator, skipinitialspace=True)
        try:
            for fields in reader:
                yield reader.line_num, fields
        except csv.Error as error:
            raise ValueError(f"{path}: line {reader.line_num}: {error}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not text in UTF-8 ({error.reason})") from None


def _check_csv(path: Path, separator: str) -> list[str]:
    """The header of a file whose rows are all as long; pandas would fill or cut the others."""
    header: list[str] = []
    for number, fields in _records(path, separator):
        if not fields:
            continue
        if not header:
            stripped = [name.strip() for name in fields]
            header = [name or f"Unnamed: {i}" for i, name in enumerate(stripped)]  # as pandas does
        elif len(fields) != len(header):
            hint = "; is it separated by ';'?" if ";" in header[0] and len(header) == 1 else ""
            raise ValueError(
                f"{path}: line {number} has {len(fields)} fields, the header has {len(header)}{hint}"
            )
    if not header:
        raise ValueError(f"{path}: the file is empty, wanted a header and rows")
    return header
