"""Tables column by column: samples beside data, data against their reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from pyro_vae.reporting.images import same_shape
from pyro_vae.reporting.style import (
    ACCENT,
    COLOURS,
    GREY,
    Array,
    Picture,
    array,
    names_of,
    small_multiples,
    styled,
)

__all__ = ["against", "histograms"]

SHOWN = 12  # columns at most
FEW_VALUES = 20  # whole numbers up to which each has a bar of its own
BINS = 30


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
        axes.set_title(title)
    if width > SHOWN:
        figure.suptitle(f"the first {SHOWN} of {width} columns", fontsize=12, color=GREY)
    return figure, panels


def _known(values: Array) -> Array:
    return values[~np.isnan(values)]


def _histogram(axes: Axes, values: dict[str, Array]) -> None:
    together = np.concatenate(list(values.values()))
    if not together.size:
        return
    whole = np.array_equal(together, together.round()) and np.ptp(together) < FEW_VALUES
    low, high = together.min(), together.max()
    edges = np.arange(low - 0.5, high + 1) if whole else _edges(low, high)
    for (name, each), colour in zip(values.items(), (GREY, COLOURS[0]), strict=False):
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


def _edges(low: float, high: float) -> Array:
    return np.linspace(low, high if high > low else low + 1.0, BINS + 1)


def _scatter(axes: Axes, x: Array, mean: Array, missing: int) -> None:
    if x.size:
        ends = [min(x.min(), mean.min()), max(x.max(), mean.max())]
        axes.plot(ends, ends, color=GREY, linewidth=1, zorder=1)
        axes.scatter(x, mean, s=10, alpha=min(1.0, 60 / len(x) ** 0.5 / 4), linewidths=0, zorder=2)
        rest, spread = ((x - mean) ** 2).mean(), x.var()
        if spread > 0:
            axes.text(0.04, 0.96, f"R² {1 - rest / spread:.2f}", va="top", transform=axes.transAxes)
    if missing:
        axes.text(
            *(0.96, 0.04, f"{missing} missing"),
            color=ACCENT,
            ha="right",
            transform=axes.transAxes,
        )
