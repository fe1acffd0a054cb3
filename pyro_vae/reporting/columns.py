"""Tables column by column: samples beside data, data against their reconstruction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pyro_vae.reporting.images import same_shape
from pyro_vae.reporting.style import (
    ACCENT,
    COLOURS,
    GREY,
    Array,
    Picture,
    array,
    inches,
    names_of,
    small_multiples,
    styled,
)

__all__ = ["against", "histograms"]

SHOWN = 12  # columns at most
FEW_VALUES = 20  # whole numbers up to which each has a bar of its own
BINS = 30  # at most
TITLE = 1.9, (13, 11)  # inches of a panel that its title may take, points


@styled()
def histograms(drawn: Any, data: Any, names: Sequence[str] | None) -> Picture:
    """Samples ``[N, D]`` beside data ``[M, D]``, a panel a column."""
    sets = {} if data is None else {"data": _table("samples: data", data)}
    sets["samples"] = _table("samples", drawn)
    widths = {values.shape[1] for values in sets.values()}
    if len(widths) > 1:
        raise ValueError(f"samples: came tables of {sorted(widths)} columns, wanted equally many")
    figure, panels = _panels("samples", names, widths.pop())
    for column, axes in enumerate(panels):
        values = {name: _known(table[:, column]) for name, table in sets.items()}
        _histogram(axes, values)
    panels[0].legend(loc="best", handlelength=1.2)
    figure.supylabel("density", fontsize=13)
    return figure


@styled()
def against(
    originals: Any, reconstructed: Any, observed: Any, names: Sequence[str] | None
) -> Picture:
    """Data ``[N, D]`` against their reconstruction, a panel a column; missing entries left out."""
    x = _table("reconstructions: originals", originals)
    mean = _table("reconstructions: reconstructed", reconstructed)
    same_shape("reconstructions", x, mean)
    if observed is not None:
        seen = _table("reconstructions: observed", observed)
        same_shape("reconstructions: observed", x, seen)
        x = np.where(seen != 0, x, np.nan)
    figure, panels = _panels("reconstructions", names, x.shape[1])
    for column, axes in enumerate(panels):
        known = ~np.isnan(x[:, column])
        _scatter(axes, x[known, column], mean[known, column], int((~known).sum()))
    figure.supxlabel("data", fontsize=13)
    figure.supylabel("reconstruction", fontsize=13)
    return figure


def _table(what: str, values: Any) -> Array:
    """``[N, D]`` of one event dim at most."""
    values = array(what, values)
    if values.ndim not in (1, 2):
        raise ValueError(
            f"{what}: came {list(values.shape)}, wanted a table [N, D], or images [N, H, W], "
            "[N, 1, H, W] or [N, 3, H, W]"
        )
    table: Array = values.reshape(len(values), -1)
    return table


def _panels(what: str, names: Sequence[str] | None, width: int) -> tuple[Picture, list[Axes]]:
    """An axes a column, as many as can be read."""
    titles = names_of(what, names, "column", width)[:SHOWN]
    figure, panels = small_multiples(len(titles))
    for axes, title in zip(panels, titles, strict=True):
        text, size = _fitting(title)
        axes.set_title(text, fontsize=size)
    if width > SHOWN:
        figure.suptitle(f"the first {SHOWN} of {width} columns", fontsize=12, color=GREY)
    return figure, panels


def _fitting(title: str) -> tuple[str, int]:
    """A title no wider than its panel, and its size: smaller, and then without its middle."""
    width, sizes = TITLE
    for size in sizes:
        if inches(title, size) <= width:
            return title, size
    for kept in range(len(title) - 1, 1, -1):  # both ends, as columns often begin or end alike
        short = f"{title[: kept - kept // 2]}…{title[len(title) - kept // 2 :]}"
        if inches(short, sizes[-1]) <= width:
            break
    return short, sizes[-1]


def _known(values: Array) -> Array:
    return values[~np.isnan(values)]


def _histogram(axes: Axes, values: dict[str, Array]) -> None:
    together = np.concatenate(list(values.values()))
    if not together.size:
        return
    whole = np.array_equal(together, together.round()) and np.ptp(together) < FEW_VALUES
    low, high = together.min(), together.max()
    edges = np.arange(low - 0.5, high + 1) if whole else _edges(low, high, values.values())
    for (name, each), colour in zip(values.items(), (GREY, COLOURS[0]), strict=False):
        if not each.size:
            continue
        filled = name == "data"
        axes.hist(
            each,
            edges.tolist(),
            density=True,
            histtype="stepfilled" if filled else "step",
            color=colour,
            alpha=0.35 if filled else 1.0,
            linewidth=0 if filled else 2,
            label=name,
        )
    axes.set_yticks([])
    axes.spines.left.set_visible(False)


def _edges(low: float, high: float, sets: Iterable[Array]) -> Array:
    """As many bins as the square root of the smaller set; more of them would make a comb of it."""
    bins = min(BINS, math.ceil(min(len(each) for each in sets if each.size) ** 0.5))
    return np.linspace(low, high if high > low else low + 1.0, bins + 1)


def _scatter(axes: Axes, x: Array, mean: Array, missing: int) -> None:
    if x.size:
        ends = [min(x.min(), mean.min()), max(x.max(), mean.max())]
        margin = 0.05 * (ends[1] - ends[0]) or 0.5
        for axis in (axes.xaxis, axes.yaxis):  # the same ticks on both
            axis.set_major_locator(MaxNLocator(3))
        axes.set(xlim=(ends[0] - margin, ends[1] + margin), box_aspect=1)
        axes.set_ylim(axes.get_xlim())
        axes.plot(ends, ends, color=GREY, linewidth=1, zorder=1)
        axes.scatter(x, mean, s=10, alpha=min(1.0, 60 / len(x) ** 0.5 / 4), linewidths=0, zorder=2)
        rest, spread = ((x - mean) ** 2).mean(), x.var()
        told = (f"R² {1 - rest / spread:.2f}, " if spread > 0 else "") + f"n = {len(x)}"
        place: dict[str, Any] = {"va": "top", "fontsize": 11, "transform": axes.transAxes}
        axes.text(0.04, 0.98, told, **place)
    if missing:
        axes.text(
            *(0.96, 0.04, f"{missing} missing"),
            color=ACCENT,
            ha="right",
            transform=axes.transAxes,
        )
