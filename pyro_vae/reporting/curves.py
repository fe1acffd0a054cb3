"""Numbers of runs: their course, their comparison, the plane of rate and distortion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pyro_vae.reporting.style import COLOURS, GREY, Array, Picture, finite, new, styled

__all__ = ["comparison", "rate_distortion", "training"]

Record = Mapping[str, Any]
PALE = "#C8C8C8"
TRAINING: dict[str, Any] = {"alpha": 0.6, "linewidth": 1.4}
UNITS = {"epoch": "epoch", "step": "step", "seconds": "time (s)"}


@styled()
def training(
    history: Sequence[Record] | Mapping[str, Sequence[Record]], x: str = "epoch"
) -> Picture:
    """The course of one run or of several: minus the loss, and the held-out bound if there was one.

    The two are the same quantity where the run trains a bound on log p(x), and not otherwise (a
    ``Beta`` rate, penalties). The best held-out bound, whose parameters are kept, has a dot.

    Args:
        history: records as in ``Run.history``, or rows of a run's ``history.csv``; or name -> these.
        x: ``"epoch"``, ``"step"`` or ``"seconds"``.

    Raises:
        ValueError: no records, an unknown ``x``, records without a loss.
    """
    if x not in UNITS:
        raise ValueError(f"training: came x={x!r}, wanted one of {list(UNITS)}")
    runs = history if isinstance(history, Mapping) else {"": history}
    if not runs or not all(len(records) for records in runs.values()):
        raise ValueError("training: came a history without records")
    colours = dict(zip(runs, cycle(COLOURS), strict=False))
    several = len(runs) > 1
    figure, (axes,) = new(8.4 if several else 7.0, 4.2)
    held_out = [_course(axes, runs[name], x, colours[name]) for name in runs]
    axes.set_xlabel(UNITS[x])
    axes.set_ylabel("bound (nats per row)")
    axes.set_ylim(*_range(axes))
    if x != "seconds":
        axes.set_xticks(_ticks(axes))
    grey = GREY if several else COLOURS[0]
    lines = [Line2D([], [], color=colours[name], label=name) for name in runs if name]
    lines.append(Line2D([], [], color=grey, **TRAINING, label="training (minus loss)"))
    if any(held_out):
        lines.append(Line2D([], [], color=grey, marker="o", label="held out, and its best"))
    beside: dict[str, Any] = {"loc": "outside lower center", "ncols": 2}
    figure.legend(handles=lines, **({"loc": "outside right upper"} if several else beside))
    return figure


def _ticks(axes: Axes) -> list[float]:
    """Round whole numbers, and the last one that the curves reach."""
    along = np.concatenate([np.asarray(line.get_xdata(), float) for line in axes.get_lines()])
    first, last = np.nanmin(along), np.nanmax(along)
    even = MaxNLocator(integer=True, min_n_ticks=1).tick_values(first, last)
    room = 0.6 * (np.diff(even[:2]).sum() or 1.0)  # that the last one's number needs
    return [float(tick) for tick in even if first <= tick <= last - room] + [float(last)]


def _course(axes: Axes, records: Sequence[Record], x: str, colour: str) -> bool:
    """The lines of one run; whether it had held-out rows."""
    along, loss, valid = (_column(records, name) for name in (x, "loss", "valid"))
    if np.isnan(loss).all():
        raise ValueError("training: came records without a loss; wanted those of Run.history")
    axes.plot(along, -loss, color=colour, marker="." if len(records) == 1 else "", **TRAINING)
    if np.isnan(valid).all():
        return False
    best = int(np.nanargmax(valid))
    axes.plot(along, valid, color=colour)
    axes.plot(along[best], valid[best], "o", color=colour)
    return True


def _column(records: Sequence[Record], name: str) -> Array:
    """Numbers of a column, NaN where a record has none; csv files have text."""
    values = [record.get(name, "") for record in records]
    return np.array([np.nan if value in ("", None) else float(value) for value in values])


def _range(axes: Axes) -> tuple[float, float]:
    """The range of the curves but for what is out of proportion: the first few epochs."""
    values = [np.asarray(line.get_ydata(), float) for line in axes.get_lines()]
    together = finite("training", np.concatenate(values))
    top = together.max()
    # three times the distance from the top to the lower quartile
    low = max(together.min(), top - 3 * max(top - np.quantile(together, 0.25), 1e-12))
    margin = 0.05 * (top - low) or 1.0
    return low - margin, top + margin


@styled()
def comparison(records: Sequence[Record]) -> Picture:
    """Objectives side by side: bounds with standard errors over rows, and the gains over the first.

    A gain is paired by row, so its error is smaller than those of the bounds.

    Args:
        records: what ``Comparison.summary()`` gives, or the ``objectives`` of a ``comparison.json``.

    Raises:
        ValueError: no records, or others.
    """
    if not records:
        raise ValueError("comparison: came no records, wanted those of Comparison.summary()")
    wanted = [f"{name}{end}" for name in ("log_p", "elbo") for end in ("", "_se")]
    wanted += ["log_p_gain", "log_p_gain_se", "objective"]
    if missing := [name for name in wanted if any(name not in record for record in records)]:
        raise ValueError(f"comparison: came records without {missing}, wanted Comparison.summary()")
    names = [record["objective"] for record in records]
    figure, (left, right) = new(12.0, 1.6 + 0.5 * len(names), 2, sharey=True, width_ratios=[4, 3])
    seeds = [(n, i - 0.12) for i, r in enumerate(records) for n in r.get("log_p_per_seed", ())]
    told = f"log p(x) ≥, K = {records[0].get('num_particles', '?')}"
    lines = [
        _errors(left, records, "log_p", -0.12, label=told),
        *left.plot(*np.array(seeds).reshape(-1, 2).T, "|", color=COLOURS[0], label="its seeds"),
        _errors(left, records, "elbo", 0.12, color=GREY, markerfacecolor="white", label="ELBO"),
    ]
    left.set_xlabel("nats")
    left.xaxis.set_major_locator(MaxNLocator(nbins=5))
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.legend(handles=lines, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    _errors(right, records[1:], "log_p_gain", 0.0, first=1)
    right.axvline(0, color=GREY, linewidth=1)
    right.xaxis.set_major_locator(MaxNLocator(nbins=4))
    rightwards = sum(right.get_xlim()) >= 0  # to the side on which there is room
    place: dict[str, Any] = {"ha": "left" if rightwards else "right", "va": "center"}
    place |= {"xytext": (6 if rightwards else -6, 0), "textcoords": "offset points"}
    right.annotate("reference", (0, 0), color=GREY, **place)
    right.set_xlabel("gain in log p(x), paired (nats)")
    right.tick_params(axis="y", length=0)
    return figure


def _errors(
    axes: Axes, records: Sequence[Record], name: str, offset: float, first: int = 0, **look: Any
) -> ErrorbarContainer:
    """A point and its standard error a record."""
    return axes.errorbar(
        [record[name] for record in records],
        [i + offset for i in range(first, first + len(records))],
        xerr=[record[f"{name}_se"] for record in records],
        **{"fmt": "o", "color": COLOURS[0], "linewidth": 1.6, **look},
    )


@styled()
def rate_distortion(points: Mapping[str, Record]) -> Picture:
    """Models in the plane of rate and distortion, with lines of equal ELBO = -(rate + distortion)
    (Alemi et al. 2018, arXiv:1711.00464).

    Args:
        points: name -> ``rate`` and ``distortion`` in nats, each with a standard error ``rate_se``
            and ``distortion_se`` if there is one; or an ``Evaluation.summary()``, which has the rate
            by site. Without ``distortion``, it is -(ELBO + rate).

    Raises:
        ValueError: no points, or without numbers.
    """
    if not points:
        raise ValueError("rate_distortion: came no points")
    places = {name: _place(name, record) for name, record in points.items()}
    figure, (axes,) = new(6.4, 5.0)
    for (r, d, r_se, d_se), colour in zip(places.values(), cycle(COLOURS), strict=False):
        axes.errorbar(r, d, d_se, r_se, fmt="o", color=colour, capsize=3, linewidth=1.6)
    axes.margins(0.2)
    axes.set_xlabel("rate (nats)")
    axes.set_ylabel("distortion (nats)")
    _equal_elbo(axes)
    for (name, (r, d, *_)), colour in zip(places.items(), cycle(COLOURS), strict=False):
        axes.annotate(name, (r, d), (7, 7), textcoords="offset points", color=colour)
    return figure


def _place(name: str, record: Record) -> tuple[float, float, float | None, float | None]:
    """Rate, distortion and their standard errors (None where not known)."""
    try:
        rate = record["rate"]
        r = float(sum(rate.values()) if isinstance(rate, Mapping) else rate)
        d = float(record["distortion"]) if "distortion" in record else -(float(record["elbo"]) + r)
        r_se, d_se = (_known(record.get(f"{each}_se")) for each in ("rate", "distortion"))
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(
            f"rate_distortion: point {name!r}: wanted numbers for rate and distortion, or an "
            f"Evaluation.summary(); came {sorted(record)}"
        ) from None
    return r, d, r_se, d_se


def _known(error: Any) -> float | None:
    """A standard error, of which there is none for a single row."""
    return None if error is None or np.isnan(float(error)) else float(error)


def _equal_elbo(axes: Axes) -> None:
    """Lines on which rate + distortion is the same, named where they are long enough."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    for total in MaxNLocator(8).tick_values(left + low, right + high):
        start, end = max(left, total - high), min(right, total - low)  # in the frame
        if start >= end:
            continue
        axes.plot([start, end], [total - start, total - end], color=PALE, linewidth=1, zorder=0)
        if end - start > 0.3 * (right - left):
            here = start + 0.02 * (right - left)
            axes.text(
                *(here, total - here, f"ELBO {-total:g}".replace("-", "\N{MINUS SIGN}")),
                color=GREY,
                fontsize=10,
                rotation=-45,
                rotation_mode="anchor",
                transform_rotates_text=True,
                va="bottom",
                zorder=0,
            )
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
