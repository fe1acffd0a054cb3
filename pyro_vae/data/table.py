"""Tables, from ``.csv``, ``.tsv`` and ``.parquet`` files and DataFrames: columns become sites.

The numeric columns, in their order, are one floating site ``x`` [B, D]; an empty cell (NaN, NA) is
missing. True and False are 1 and 0. ``columns=`` says which columns, ``drop=`` which not. Columns
without any value are taken only where they are named.

With ``sites={"x": ["age", "income"], "y": "label"}`` columns become several sites: a list gives
[B, D], floating; one name gives [B], int64 if the column holds whole numbers. ``None`` stands for all
other columns: ``sites={"y": "label", "x": None}``, less those of ``drop=``, or those of
``columns=``. The names are in ``record["columns"]``.

A column of text that is a site of its own is a label: its distinct values, sorted, are numbered from
0, ``record["classes"]["y"]`` has their names. Other text is refused.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyro_vae.data.source import MASK, Array, Source, as_list, near, select, sha256

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["csv_frame", "read_csv", "read_frame", "read_parquet"]

Names = str | Collection[str] | None
INDEX = re.compile(
    r"Unnamed: \d+|__index_level_\d+__|"
)  # names that an index gets when it is saved
CLASSES = 1000  # distinct texts of a label, at most; more are rather names of rows


def read_csv(path: Path, sites: Any = None, columns: Names = None, drop: Names = None) -> Source:
    """A file of text with a header line; ``.csv`` has commas, ``.tsv`` tabs.

    Raises:
        ValueError: no rows, rows of different lengths, what ``read_frame`` refuses.
    """
    frame, separator = csv_frame(path), _separator(path)

    def line(row: int) -> str:
        records = (number for number, fields in _records(path, separator) if fields)
        return f"line {[number for _, number in zip(range(row + 2), records, strict=False)][-1]}"

    record = {"source": str(path), "sha256": sha256(path)}
    return _sites(str(path), frame, line, record, sites, columns, drop)


def csv_frame(path: Path) -> pd.DataFrame:
    """A file of text as a DataFrame of pandas' nullable types.

    Raises:
        ValueError: rows of different lengths, columns of one name.
    """
    import pandas as pd

    header = _check_csv(path, _separator(path))
    _check_names(str(path), header)
    return pd.read_csv(
        path,
        sep=_separator(path),
        names=header,
        header=0,
        index_col=False,
        skipinitialspace=True,
        encoding="utf-8-sig",
        dtype_backend="numpy_nullable",  # whole numbers stay whole where some are missing
        low_memory=False,
    )


def _separator(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


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
            columns, columns without any value that nobody named, names that are not there.
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
    for names in found.record.get("classes", {}).values():
        digest.update("\0".join(names).encode())
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
    chosen, rest = _chosen(place, names, sites, columns, drop)
    listed = {site: as_list("columns", of) for site, of in chosen.items()}
    cells = {name: cells_of(frame[name]) for of in listed.values() for name in of}
    labels = [site for site, of in chosen.items() if isinstance(of, str) and cells[of].is_text()]
    plain = {name for site, of in listed.items() if site not in labels for name in of}
    _check_cells(
        place, {n: cells[n] for n in names if n in plain}, where, rest, as_list("drop", drop)
    )
    arrays: dict[str, Array] = {}
    classes: dict[str, list[str]] = {}
    for site, of in chosen.items():
        if site in labels:
            codes, classes[site] = _label(place, site, cells[of])
            arrays |= codes
        else:
            arrays |= _site(site, of, cells)
    if not isinstance(sites, Mapping):
        arrays = select(place, {"all": arrays}, sites)["all"]
    record = {**record, "columns": {site: of for site, of in listed.items() if site in arrays}}
    return Source(place, {"all": arrays}, record | ({"classes": classes} if classes else {}))


def _check_names(place: str, names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{place}: columns {twice} are there more than once; rename them")


def _chosen(
    place: str, names: list[str], sites: Any, columns: Names, drop: Names
) -> tuple[dict[str, Any], list[str]]:
    """Site -> columns; and the columns that were taken without being named."""
    wanted: dict[str, Any] = dict(sites) if isinstance(sites, Mapping) else {"x": None}
    if columns is not None and None not in wanted.values():
        raise ValueError(
            f"{place}: came columns= and sites={wanted}, wanted columns= only beside a site that is "
            "None; name the columns in sites="
        )
    if columns is not None:
        listed = as_list("columns", columns)
        wanted = {site: listed if of is None else of for site, of in wanted.items()}
    taken = [name for of in wanted.values() for name in as_list("columns", of)]
    dropped = as_list("drop", drop)
    for name in [*taken, *dropped]:
        if name not in names:
            raise ValueError(f"{place}: has no column {name!r}, only {names}{near(name, names)}")
    if both := [name for name in dropped if name in taken]:
        raise ValueError(
            f"{place}: columns {both} are named by drop= and by sites= or columns=, wanted one of them"
        )
    rest = [name for name in names if name not in taken and name not in dropped]
    rest = rest if None in wanted.values() else []
    if index := [name for name in rest if INDEX.fullmatch(name)]:
        raise ValueError(
            f"{place}: column {index[0]!r} looks like an index that was saved along; leave it out by "
            f"drop={[*dropped, *index]}, or name the columns to take by columns="
        )
    chosen = {site: rest if of is None else of for site, of in wanted.items()}
    for site, of in chosen.items():
        if not of:
            raise ValueError(f"{place}: no columns are left for site {site!r}, of {names}")
    return chosen, rest


def _site(site: str, of: str | Collection[str], cells: Mapping[str, Cells]) -> dict[str, Array]:
    """The array of a site, with its mask if whole numbers are missing."""
    if not isinstance(of, str):
        return {site: np.stack([_floating(cells[name].numbers) for name in of], axis=1)}
    column = cells[of].numbers
    missing = column.isna().to_numpy()
    if column.dtype.kind == "f" or missing.all():
        return {site: _floating(column)}
    codes = column.fillna(column.dropna().iloc[0]).to_numpy(np.int64)
    return {site: codes, **_mask(site, missing)}


def _label(place: str, site: str, cells: Cells) -> tuple[dict[str, Array], list[str]]:
    """Numbers of the texts of a column in alphabetical order, with a mask, and the texts."""
    import pandas as pd

    codes, texts = pd.factorize(cells.raw, sort=True)  # -1 is missing
    if len(texts) > CLASSES:
        raise ValueError(
            f"{place}: column {cells.raw.name!r} holds {len(texts)} different texts, wanted {CLASSES} "
            f"at most for a label; leave it out of site {site!r}"
        )
    array = codes.clip(0).astype(np.int64)
    return {site: array, **_mask(site, codes < 0)}, [str(text) for text in texts]


def _mask(site: str, missing: Array) -> dict[str, Array]:
    return {MASK + site: ~missing} if missing.any() else {}


def _floating(column: pd.Series[Any]) -> Array:
    return column.to_numpy(np.float64, na_value=np.nan)


# --- cells --------------------------------------------------------------------------------------


class Cells(NamedTuple):
    """A column as it came, as numbers (True and False, too), and where it holds something else."""

    raw: pd.Series[Any]
    numbers: pd.Series[Any]
    bad: Array

    def is_text(self) -> bool:
        """Whether all values are text; text among numbers is rather a slip."""
        values = self.raw[self.bad]
        whole = 0 < len(values) == self.raw.notna().sum()
        return whole and all(isinstance(value, str) for value in values)


def cells_of(column: pd.Series[Any]) -> Cells:
    """Look at the cells of a column."""
    import pandas as pd

    if getattr(column.dtype, "kind", "O") in "biuf":
        return Cells(column, column, np.zeros(len(column), dtype=bool))
    raw = column.astype(object)
    odd = raw.map(lambda value: not isinstance(value, str | Real | Decimal | np.bool_))
    numbers = pd.to_numeric(raw.where(~odd, None), errors="coerce")
    return Cells(raw, numbers, ((numbers.isna() | odd) & raw.notna()).to_numpy(bool))


def _check_cells(
    place: str,
    cells: Mapping[str, Cells],
    where: Callable[[int], str],
    rest: Collection[str],
    dropped: list[str],
) -> None:
    """Refuse columns that are not numbers, and those without any value that nobody named."""
    if odd := [name for name, column in cells.items() if column.bad.any()]:
        first = cells[odd[0]]
        row = int(np.argmax(first.bad))
        others = f"; columns {odd[1:]} are not numbers either" if odd[1:] else ""
        raise ValueError(
            f"{place}: column {odd[0]!r} holds {first.raw.iloc[row]!r} in {where(row)}, wanted "
            f"numbers{others}; {_cure(cells, odd, rest, dropped)}"
        )
    if empty := [name for name in rest if cells[name].numbers.isna().all()]:
        raise ValueError(
            f"{place}: columns {empty} hold no value in any row; {_without(empty, dropped)}, or take "
            "them as they are by naming all columns in columns="
        )


def _cure(
    cells: Mapping[str, Cells], odd: list[str], rest: Collection[str], dropped: list[str]
) -> str:
    loose = [name for name in odd if name in rest]
    named = [name for name in odd if name not in rest]
    cures = [f"leave {named} out of sites= or columns="] if named else []
    cures += [_without(loose, dropped)] if loose else []
    texts = (name for name in odd if cells[name].is_text())
    label = next((name for name in texts if cells[name].raw.nunique() <= CLASSES), None)
    hint = f"; text can be a label, as a site of its own: sites={{'x': None, 'y': {label!r}}}"
    return "encode as numbers, or " + " and ".join(cures) + (hint if label else "")


def _without(names: list[str], dropped: list[str]) -> str:
    names = [*dropped, *names]
    return f"leave out by drop={names} (on the command line -d drop={','.join(names)})"


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
