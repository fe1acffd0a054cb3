"""How all figures look, and how they get into a file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.textpath import TextPath
from numpy.typing import NDArray
from torch import Tensor

from pyro_vae.files import replacing
from pyro_vae.reporting import FORMATS

__all__ = [
    "ACCENT",
    "COLOURS",
    "GREY",
    "Array",
    "Picture",
    "array",
    "finite",
    "inches",
    "names_of",
    "new",
    "save",
    "small_multiples",
    "styled",
]

Array = NDArray[Any]

# Okabe and Ito (2008), which the colour-blind can tell apart; without yellow, too pale on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
ACCENT, GREY = COLOURS[1], "#767676"
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.facecolor": "white",
    "axes.grid": False,
    "axes.labelcolor": "black",
    "axes.labelsize": 13,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titleweight": "normal",
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.size": 12,
    "image.interpolation": "nearest",
    "legend.fontsize": 12,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "text.color": "black",
    "xtick.color": GREY,
    "xtick.labelcolor": "black",
    "xtick.labelsize": 12,
    "ytick.color": GREY,
    "ytick.labelcolor": "black",
    "ytick.labelsize": 12,
}


# the settings under which figures are made and written; the user's come back afterwards
styled = partial(matplotlib.rc_context, STYLE)


class Picture(Figure):
    """A ``matplotlib.figure.Figure`` that notebooks show as it is, since pyplot knows nothing of it."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        with styled():
            self.savefig(buffer, format="png", dpi=120)
        return buffer.getvalue()


def new(width: float, height: float, columns: int = 1, **ratios: Any) -> tuple[Picture, list[Axes]]:
    """A figure (sizes in inches) with axes side by side."""
    figure = Picture(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **ratios)
    return figure, list(axes[0])


def small_multiples(panels: int, columns: int = 4, size: float = 2.4) -> tuple[Picture, list[Axes]]:
    """A figure with ``panels`` axes of equal size (inches), row by row."""
    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = Picture(figsize=(size * columns + 0.6, size * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in axes[panels:]:
        spare.remove()
    return figure, axes[:panels]


def inches(text: str, size: float) -> float:
    """Width of a text in a font of so many points."""
    return float(TextPath((0, 0), text, size=size).get_extents().width) / 72


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, SVG or PDF, by the suffix; nothing half-written is left.

    Raises:
        ValueError: another suffix, no such folder.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: came suffix {path.suffix!r}, wanted one of {list(FORMATS)}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: no such folder: {path.parent}")
    with replacing(path) as temporary, styled():
        figure.savefig(temporary, format=path.suffix.lower()[1:])


def array(what: str, value: Any) -> Array:
    """Numbers as a numpy array, wherever they were.

    Raises:
        ValueError: no numbers, or none at all.
    """
    value = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else value
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"{what}: came a {type(value).__name__}, wanted an array of numbers"
        ) from None
    if not numbers.size:
        raise ValueError(f"{what}: came {list(numbers.shape)}, which is empty")
    return numbers


def finite(what: str, values: Array) -> Array:
    """Those that are finite.

    Raises:
        ValueError: there are none.
    """
    kept = values[np.isfinite(values)]
    if not kept.size:
        raise ValueError(f"{what}: came no finite number")
    return kept


def names_of(what: str, given: Sequence[str] | None, name: str, number: int) -> list[str]:
    """A name for each of ``number`` columns.

    Raises:
        ValueError: another number of names.
    """
    names = [f"{name}[{i}]" for i in range(number)] if given is None else list(given)
    if len(names) != number:
        raise ValueError(f"{what}: came {len(names)} names, wanted {number}")
    return names
