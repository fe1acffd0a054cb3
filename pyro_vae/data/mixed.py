"""Tables with columns of several kinds: to sites that ``pairs.table`` takes, and back."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.batch import Batch
from pyro_vae.data.source import near
from pyro_vae.data.table import Cells, cells_of, csv_frame

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Columns", "as_frame", "read_table"]

NUMBERS = ("real", "positive", "count", "binary")  # kinds whose columns share a site of that name
CLASSES = ("category", "ordinal")  # kinds whose columns are a site each
KINDS = (*NUMBERS, *CLASSES)
MOST = 1000  # different texts of a column; more are rather names of rows
FEW = 20  # classes that a column may have whose values hardly repeat


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are, learned from one table and applied to others like it.

    Attributes:
        kinds: column -> one of ``KINDS``.
        classes: column of classes -> its values, in order.
        sites: site -> its columns, a name alone for a site ``[N]``.
        dtypes: column -> what it is in when it is filled.
    """

    kinds: dict[Any, str]
    classes: dict[Any, list[Any]]
    sites: dict[str, Any]
    dtypes: dict[Any, Any]

    @classmethod
    def of(cls, frame: pd.DataFrame, kinds: Mapping[Any, Any] | str | None = None) -> Columns:
        """Look at a table.

        Args:
            frame: its empty cells (NaN, NA, None) are missing.
            kinds: column -> kind, where it is not to be inferred, or the list of its values in order,
                which makes it ordinal; or one kind for all columns. Inferred are ``category`` of text
                and of pandas' own type, ``ordinal`` of that type in order, ``binary`` of True and
                False and of numbers that are all 0 or 1, ``real`` of all other numbers.

        Raises:
            ValueError: no columns, one that holds no value in any row, kinds that there are not or
                that a column's values do not have, ``kinds`` of columns that are not there, text in
                order without the order; and where no kind is given, text among numbers, and classes
                that hardly repeat.
        """
        names = list(frame.columns)
        if not names or not len(frame):
            raise ValueError(f"table: came {len(frame)} rows and {len(names)} columns")
        given = _given(names, kinds)
        if empty := [name for name in names if frame[name].isna().all()]:
            raise ValueError(
                f"columns {empty} hold no value in any of {len(frame)} rows, so that nothing can be "
                "learned of them; drop them"
            )
        found: dict[Any, str] = {}
        classes: dict[Any, list[Any]] = {}
        for name in names:
            column, kind = frame[name], given.get(name)
            found[name] = "ordinal" if isinstance(kind, list) else kind or _kind(column)
            if isinstance(kind, list):
                classes[name] = _in_order(column, kind)
            elif found[name] in CLASSES:
                classes[name] = _classes(column, found[name])
            else:
                _check_numbers(name, found[name], _numbers(column))
            if kind is None and found[name] == "category":
                _check_repeats(column)
        sites: dict[str, Any] = {}
        for kind in NUMBERS:
            if of := [name for name in names if found[name] == kind]:
                sites[kind] = of
        for place, name in enumerate(names):
            if name in classes:
                plain = "class_" + re.sub(r"\W", "_", str(name))
                sites[f"{plain}_{place}" if plain in sites else plain] = name
        dtypes = {name: _dtype(frame[name], found[name]) for name in names}
        return cls(found, classes, sites, dtypes)

    @property
    def ordinal(self) -> list[str]:
        """Sites whose classes are in order."""
        return [site for site, of in self.sites.items() if self._kind_of(of) == "ordinal"]

    def losses(self, loss: str) -> dict[str, str]:
        """What the best value of each site is best for: columns that have whole numbers keep them."""
        return {site: "l1" if site in ("count", "binary") else loss for site in self.sites}

    def batch(self, frame: pd.DataFrame, dtype: torch.dtype | None = None, **options: Any) -> Batch:
        """Rows of a table with the same columns.

        Args:
            dtype: of the floating sites (default: torch's own).
            options: of ``Batch``.

        Raises:
            ValueError: columns that are not there, a class that was not there to be learned, numbers
                that are none, that are infinite or that are not of their column's kind.
        """
        if lost := [name for name in self.kinds if name not in list(frame.columns)]:
            raise ValueError(f"table: lacks columns {lost}, wanted {list(self.kinds)}")
        values: dict[str, Tensor] = {}
        observed: dict[str, Tensor] = {}
        dtype = dtype or torch.get_default_dtype()
        for site, of in self.sites.items():
            if isinstance(of, list):
                cells = [_numbers(column) for _, column in frame[of].items()]
                for name, column in zip(of, cells, strict=True):
                    _check_numbers(name, self.kinds[name], column)
                values[site] = torch.as_tensor(np.stack(cells, 1), dtype=dtype)
            else:
                codes = self._codes(frame[of])
                values[site] = torch.as_tensor(codes.clip(0))
                observed[site] = torch.as_tensor(codes >= 0)
        classes = {
            s: list(map(str, self.classes[of])) for s, of in self.sites.items() if s in observed
        }
        record = {"columns": self.sites, **({"classes": classes} if classes else {})}
        return Batch(values, observed, record=record, **options)

    def filled(self, frame: pd.DataFrame, values: Mapping[str, Tensor]) -> pd.DataFrame:
        """The table with its empty cells filled, in the types that its columns have; a column that
        holds nothing has the type that it was learned in.

        Args:
            values: site -> ``[N, *event]``, such as ``Imputation.values``.
        """
        out = frame.copy()
        for site, of in self.sites.items():
            names = of if isinstance(of, list) else [of]
            for place, name in enumerate(names):
                missing = frame[name].isna().to_numpy()
                if missing.any():
                    made = values[site] if names is not of else values[site][:, place]
                    out[name] = self._column(frame[name], missing, made.cpu().numpy())
        return out

    def beside(self, values: Mapping[str, Tensor], name: str) -> dict[str, Any]:
        """Columns ``COLUMN_name`` of the columns of numbers."""
        return {
            f"{of}_{name}": values[site][:, place].cpu().numpy()
            for site, names in self.sites.items()
            if isinstance(names, list)
            for place, of in enumerate(names)
            if site in values
        }

    def _column(self, column: pd.Series[Any], missing: Any, made: Any) -> Any:
        """A column with new values where it is missing."""
        import pandas as pd

        name, new = column.name, made[missing]
        dtype = self.dtypes[name] if missing.all() else _dtype(column, self.kinds[name])
        if name in self.classes:
            new = [self.classes[name][code] for code in new]
            if isinstance(dtype, pd.CategoricalDtype) and not set(new) <= set(dtype.categories):
                dtype = pd.CategoricalDtype(self.classes[name], dtype.ordered)
        elif pd.api.types.is_bool_dtype(dtype):
            new = new > 0.5
        elif pd.api.types.is_integer_dtype(dtype):
            new = new.round().astype(np.int64)
        filled = column.astype(object)
        filled[missing] = list(new)
        return filled.astype(dtype)

    def _kind_of(self, of: Any) -> str | None:
        return None if isinstance(of, list) else self.kinds[of]

    def _codes(self, column: pd.Series[Any]) -> Any:
        """Numbers of classes ``[N]``, -1 where missing."""
        known = {value: code for code, value in enumerate(self.classes[column.name])}
        missing = column.isna().to_numpy()
        codes = np.full(len(column), -1, dtype=np.int64)
        for row, value in enumerate(column.astype(object)):
            if not missing[row]:
                if value not in known:
                    raise ValueError(
                        f"column {column.name!r}: came {value!r} in row {column.index[row]}, which is "
                        f"none of the {len(known)} classes that were learned, "
                        f"{_shown(list(known))}; make it missing, or learn from rows that have it"
                    )
                codes[row] = known[value]
        return codes


def as_frame(array: Any) -> pd.DataFrame:
    """An array ``[N, D]`` with columns ``x0``, ``x1``, ..."""
    import pandas as pd

    return pd.DataFrame(array, columns=[f"x{i}" for i in range(array.shape[1])])


def read_table(path: str | Path) -> pd.DataFrame:
    """A ``.csv``, ``.tsv`` or ``.parquet`` file as it is, text and empty cells included.

    Raises:
        ValueError: another ending, a broken file, columns of one name.
        FileNotFoundError: no such file.
    """
    import pandas as pd

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix.lower() in (".csv", ".tsv"):
        return csv_frame(path)
    if path.suffix.lower() in (".parquet", ".pq"):
        return pd.read_parquet(path, dtype_backend="numpy_nullable")
    raise ValueError(f"{path}: came a file {path.suffix!r}, wanted .csv, .tsv or .parquet")


def _given(names: list[Any], kinds: Mapping[Any, Any] | str | None) -> dict[Any, Any]:
    """Column -> its kind, or the list of its values in order."""
    given = dict.fromkeys(names, kinds) if isinstance(kinds, str) else dict(kinds or {})
    for name, kind in given.items():
        if name not in names:
            close = near(str(name), map(str, names))
            raise ValueError(f"table: kinds= names {name!r}, the columns are {names}{close}")
        if isinstance(kind, list | tuple):
            if len(kind) < 2 or len(set(kind)) < len(kind):
                raise ValueError(
                    f"column {name!r}: came the order {list(kind)}, wanted at least 2 different values"
                )
            given[name] = list(kind)
        elif kind not in KINDS:
            raise ValueError(
                f"column {name!r}: came kind {kind!r}, wanted one of {list(KINDS)}, or the list of its "
                "values in order"
            )
    return given


def _kind(column: pd.Series[Any]) -> str:
    import pandas as pd

    if isinstance(column.dtype, pd.CategoricalDtype):
        return "ordinal" if column.dtype.ordered else "category"
    cells = cells_of(column)
    if cells.bad.any():
        _check_strays(cells)
        return "category"
    binary = pd.api.types.is_bool_dtype(column.dtype) or cells.numbers.dropna().isin((0, 1)).all()
    return "binary" if binary else "real"


def _check_strays(cells: Cells) -> None:
    """Refuse text among numbers, which is rather a slip than a class."""
    name, strays = cells.raw.name, cells.raw[cells.bad]
    if cells.raw[cells.numbers.notna()].nunique() >= strays.nunique():
        raise ValueError(
            f"column {name!r}: holds {strays.iloc[0]!r} in row {strays.index[0]} among numbers "
            f"({len(strays)} of {cells.raw.count()} values are none); correct it, make it missing, or "
            f"say the column's kind: {_say_classes(name)}"
        )


def _check_repeats(column: pd.Series[Any]) -> None:
    """Refuse classes that are rather names of rows, or dates."""
    different, held = column.nunique(), column.count()
    if different > FEW and 2 * different > held:
        raise ValueError(
            f"column {column.name!r}: came {different} classes in {held} rows that have a value, wanted "
            f"classes that repeat; drop it (--drop {shlex.quote(str(column.name))}, or from the "
            f"DataFrame), make numbers of it, or say its kind: {_say_classes(column.name)}"
        )


def _say_classes(name: Any) -> str:
    """How to say that a column is one of classes, on the command line and in Python."""
    return f"--kind {shlex.quote(f'{name}=category')}, kinds={ ({name: 'category'}) }"


def _numbers(column: pd.Series[Any]) -> Any:
    """A column as ``float64``, NaN where missing."""
    cells = cells_of(column)
    if cells.bad.any():
        held = cells.raw[cells.bad]
        raise ValueError(
            f"column {column.name!r}: holds {held.iloc[0]!r} in row {held.index[0]}, wanted numbers"
        )
    return cells.numbers.to_numpy(np.float64, na_value=np.nan)


def _dtype(column: pd.Series[Any], kind: str) -> Any:
    """What a column is in when it is filled: what it is in, but numbers that are objects for the sake
    of their holes, or a category, are numbers."""
    import pandas as pd

    if kind in NUMBERS and isinstance(column.dtype, pd.CategoricalDtype):
        return np.dtype(np.float64)
    if kind in NUMBERS and column.dtype == object:
        held = pd.api.types.infer_dtype(column, skipna=True)
        return np.dtype({"boolean": "bool", "integer": "int64"}.get(held, "O"))
    return column.dtype


TAKES: dict[str, tuple[Any, str]] = {
    "positive": (lambda seen: seen > 0, "numbers above 0"),
    "count": (lambda seen: (seen >= 0) & (seen == seen.round()), "whole numbers from 0 on"),
    "binary": (lambda seen: np.isin(seen, (0, 1)), "0 and 1"),
}


def _check_numbers(name: Any, kind: str, numbers: Any) -> None:
    if np.isinf(numbers).any():
        raise ValueError(f"column {name!r}: holds infinity; empty cells (NaN) mean missing")
    if kind in TAKES:
        takes, wanted = TAKES[kind]
        seen = numbers[~np.isnan(numbers)]
        if not (fine := takes(seen)).all():
            raise ValueError(
                f"column {name!r}: holds {seen[~fine][0]:g}, wanted {wanted} of kind {kind!r}"
            )


def _classes(column: pd.Series[Any], kind: str) -> list[Any]:
    """The values of a column, in the order that they have."""
    import pandas as pd

    own = column.dtype if isinstance(column.dtype, pd.CategoricalDtype) else None
    found = list(column.dropna().astype(object).unique() if own is None else own.categories)
    if len(found) > MOST and own is None:
        raise ValueError(
            f"column {column.name!r}: holds {len(found)} different texts, wanted {MOST} at most for "
            "classes; drop it"
        )
    if kind == "ordinal" and not (own and own.ordered):
        if cells_of(column).bad.any():
            typed = shlex.quote(f"{column.name}=LOWEST<...<HIGHEST")
            raise ValueError(
                f"column {column.name!r}: came {_shown(found)} of kind 'ordinal', wanted their order: "
                f"--kind {typed}, kinds={{{column.name!r}: [LOWEST, ..., HIGHEST]}}"
            )
        return sorted(found, key=float)
    if own is not None:
        return found
    try:
        return sorted(found)
    except TypeError:  # text among numbers
        return sorted(found, key=str)


def _in_order(column: pd.Series[Any], order: list[Any]) -> list[Any]:
    """The order that was given, as numbers where the column holds numbers."""
    import pandas as pd

    if getattr(column.dtype, "kind", "O") in "iuf":
        with contextlib.suppress(ValueError):  # words, which then are none of the column's
            order = pd.to_numeric(pd.Series(order)).tolist()
    other = column[column.notna() & ~column.isin(order)].astype(object)
    if len(other):
        raise ValueError(
            f"column {column.name!r}: came {other.iloc[0]!r} in row {other.index[0]}, wanted one of the "
            f"order that was given, {_shown(order)}; add it there, or make it missing"
        )
    return order


def _shown(values: list[Any]) -> str:
    return str(values) if len(values) <= 8 else f"{str(values[:8])[:-1]}, ...]"
