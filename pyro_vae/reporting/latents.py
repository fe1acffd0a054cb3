"""What the latents are used for: rates, a map of the posterior means, importance weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from pyro_vae.evaluation.diagnostics import has_tail
from pyro_vae.evaluation.latent import ACTIVE
from pyro_vae.reporting.style import (
    ACCENT,
    COLOURS,
    Array,
    Picture,
    array,
    finite,
    new,
    styled,
)

__all__ = ["latent_map", "rates", "weights"]

LONG = 12  # classes up to which a legend has one column
CLASSES = 20  # up to which colours and markers tell labels apart
MARKERS = ("o", "^")
# with wine, olive and indigo of Tol's muted set: ten, none of them grey
TEN = (*COLOURS, "#882255", "#999933", "#332288")
THRESHOLD = 0.01  # nats
PALE = "#BDBDBD"
BAR = 0.25  # inches from which on the number of a dimension fits below its bar


@styled()
def rates(
    rate: Any,
    active: Any = None,
    *,
    latent: str = "z",
    threshold: float = THRESHOLD,
) -> Picture:
    """Rate per latent dimension, the highest first.

    Args:
        rate: ``[*event]`` nats, or site -> nats, as ``Evaluation.rate`` has them.
        active: bool of the same form, as ``Evaluation.active`` has them (default: the rate is above
            ``threshold``, which a line shows). Other dimensions are grey.
        latent: name of the site.
        threshold: nats, where ``active`` is not given.

    Raises:
        ValueError: no numbers, ``active`` of another form.
    """
    sites = rate if isinstance(rate, Mapping) else {latent: rate}
    known = active if isinstance(active, Mapping) else {latent: active}
    values = {site: array(f"rates: {site}", each).flatten() for site, each in sites.items()}
    if not values:
        raise ValueError("rates: came no site")
    widths = [max(6, len(each)) for each in values.values()]
    size = min(14.0, max(5.0, 0.32 * sum(widths) + 1.5))
    figure, panels = new(size, 3.8, len(values), width_ratios=widths, sharey=True)
    for axes, (site, each) in zip(panels, values.items(), strict=True):
        given = known.get(site)
        used = each > threshold if given is None else array("rates: active", given).flatten() != 0
        if len(used) != len(each):
            raise ValueError(f"rates: came {len(used)} of active for {len(each)} of {site!r}")
        _bars(axes, site, each, used, named=size / sum(widths) > BAR)
        if given is None:
            _line(axes, threshold, len(each))
        elif not used.all():
            axes.legend(handles=[Patch(color=PALE, label="not active")], loc="upper right")
    panels[0].set_ylabel("rate (nats)")
    figure.supxlabel("dimension, sorted")
    return figure


def _bars(axes: Axes, site: str, rate: Array, used: Array, named: bool) -> None:
    order = np.argsort(-rate, kind="stable")
    colours = np.where(used[order], COLOURS[0], PALE).tolist()
    axes.bar(np.arange(len(rate)), rate[order], color=colours, width=0.8)
    axes.set_xlim(-0.6, len(rate) - 0.4)
    axes.set_xticks(range(len(rate)) if named else [], list(map(str, order)) if named else [])
    title = f"{site}: {rate.sum():.1f} nats\n{int(used.sum())} of {len(rate)} active"
    axes.set_title(title, loc="left")


def _line(axes: Axes, threshold: float, bars: int) -> None:
    """Where the grey begins."""
    axes.axhline(threshold, color=ACCENT, linestyle="--", linewidth=1.2)
    place: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "color": ACCENT}
    place["path_effects"] = [withStroke(linewidth=3, foreground="white")]  # readable on bars
    axes.annotate(f"{threshold:g} nats", (bars - 0.5, threshold), (0, 4), **place)


@styled()
def latent_map(
    mean: Any,
    labels: Any = None,
    *,
    dims: tuple[int, int] | None = None,
    latent: str = "z",
    label: str = "label",
) -> Picture:
    """Posterior means in a plane, coloured by label.

    The plane is that of the two active dimensions, Var(E[z | x]) > 0.01, if there are no more than
    two, else that of the first two principal components of the means; the axes say which.

    Args:
        mean: ``[N, *event]``, as ``encode`` gives them.
        labels: ``[N]`` classes (names or whole numbers, 20 at most, in a legend), or other numbers
            (a colour bar). Rows whose label is missing, NaN or None, are grey and counted.
        dims: two dimensions to show instead.
        latent: name of the site.
        label: what the labels are.

    Raises:
        ValueError: fewer than two dimensions, ``dims`` that are not there, as many labels as there
            are no rows.
    """
    points = array("latent_map: mean", mean)
    points = points.reshape(len(points), -1)
    plane, names = _plane(points, dims, latent)
    figure, (axes,) = new(6.4, 5.2)
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    axes.set_aspect("equal", adjustable="datalim")
    dots: dict[str, Any] = {"s": float(np.clip(20_000 / len(points), 16, 36)), "linewidths": 0}
    dots["alpha"] = float(np.clip((1000 / len(points)) ** 0.5, 0.35, 0.85))
    if labels is None:
        axes.scatter(plane[:, 0], plane[:, 1], **dots)
        return figure
    values = _labels("latent_map", labels, len(points))
    missing = np.array([each is None or each != each for each in values.tolist()])
    if missing.any():
        axes.scatter(*plane[missing].T, color=PALE, **dots)
        axes.set_title(f"{label}: missing in {missing.sum()} of {len(points)} rows (grey)")
    plane, values = plane[~missing], np.array(values[~missing].tolist())
    classes, which = _classes("latent_map", values)
    if classes is None:
        dots["alpha"] = 1.0  # colours that mix would not be those of the bar
        heat = axes.scatter(plane[:, 0], plane[:, 1], c=which, cmap="viridis", **dots)
        figure.colorbar(heat, ax=axes, label=label).outline.set_visible(False)
    elif classes:
        _by_class(figure, axes, plane, which, classes, label, dots)
    return figure


def _by_class(
    figure: Picture,
    axes: Axes,
    plane: Array,
    which: Array,
    classes: list[Any],
    label: str,
    dots: dict[str, Any],
) -> None:
    """A colour, or a colour and a marker, a class."""
    for number, name in enumerate(classes):
        turn, place = divmod(number, len(TEN))
        look: dict[str, Any] = {"color": TEN[place], "marker": MARKERS[turn], **dots}
        axes.scatter(*plane[which == number].T, label=str(name), **look)
    legend = figure.legend(
        loc="outside right center",
        title=label,
        handletextpad=0.2,
        handlelength=1.2,
        alignment="left",
        markerscale=max(1.0, (50 / dots["s"]) ** 0.5),
        ncols=1 + (len(classes) > LONG),
    )
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)


def _plane(points: Array, dims: tuple[int, int] | None, latent: str) -> tuple[Array, list[str]]:
    """``[N, 2]`` and the names of its axes."""
    width = points.shape[1]
    if width < 2:
        raise ValueError(f"latent_map: came {width} dimension of {latent!r}, wanted two at least")
    if dims is not None:
        if len(dims) != 2 or not all(0 <= dim < width for dim in dims):
            raise ValueError(f"latent_map: came dims={dims}, wanted two of 0 to {width - 1}")
        return points[:, list(dims)], [f"E[{latent}[{dim}] | x]" for dim in dims]
    variance = points.var(0)
    if (variance > ACTIVE).sum() <= 2:
        most = sorted(np.argsort(-variance, kind="stable")[:2].tolist())
        return points[:, most], [f"E[{latent}[{dim}] | x]" for dim in most]
    centred = points - points.mean(0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    share = singular**2 / (singular**2).sum()
    names = [
        f"principal component {i + 1} of E[{latent} | x] ({share[i]:.0%} of variance)"
        for i in range(2)
    ]
    return centred @ directions[:2].T, names


def _labels(what: str, labels: Any, rows: int) -> Array:
    """``[rows]``, as they came."""
    values = np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)
    if values.shape != (rows,):
        raise ValueError(
            f"{what}: came labels {list(values.shape)} for {rows} rows, wanted [{rows}]"
        )
    return values


def _classes(what: str, values: Array) -> tuple[list[Any] | None, Array]:
    """Names of classes and the number of each row's; or None and the rows' numbers."""
    names, which = np.unique(values, return_inverse=True)
    numbers = values.dtype.kind in "biuf"
    few = len(names) <= CLASSES
    if not numbers and not few:
        raise ValueError(f"{what}: came {len(names)} names of classes, wanted {CLASSES} at most")
    if few and (not numbers or np.array_equal(names, names.astype(np.int64))):
        return (names.astype(np.int64) if numbers else names).tolist(), which
    return None, values.astype(np.float64)


@styled()
def weights(khat: Any, threshold: float = 0.7, *, num_particles: int | None = None) -> Picture:
    """Pareto k-hat of the importance weights, row by row: above the threshold their tail is too heavy
    for the slack of log p(x) >= to be known.

    Args:
        khat: ``[N]``, as ``Evaluation.khat`` has them.
        threshold: as ``khat_threshold(num_particles)`` gives it.
        num_particles: K, which the title then names.

    Raises:
        ValueError: no finite number, as with too few particles for a tail.
    """
    if num_particles is not None and not has_tail(num_particles):
        raise ValueError(
            f"weights: came K = {num_particles}, too small for k-hat; wanted 21 or more"
        )
    values = array("weights: khat", khat).flatten()
    shown = finite("weights: khat", values)
    edges = np.linspace(min(shown.min(), threshold - 0.1), max(shown.max(), threshold + 0.1), 31)
    edges = np.sort(np.append(edges, threshold))  # no bar stands on both sides
    figure, (axes,) = new(6.0, 3.6)
    for here, colour, name in (
        (shown <= threshold, COLOURS[0], "can be trusted"),
        (shown > threshold, ACCENT, "too heavy a tail"),
    ):
        axes.hist(shown[here], edges.tolist(), color=colour, label=name)
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1.2)
    axes.set_xlabel("Pareto k-hat of a row's importance weights")
    axes.set_ylabel("rows")
    told = f"{np.mean(values > threshold):.0%} of {len(values)} rows above {threshold:.2f}"
    axes.set_title(told if num_particles is None else f"{told}, K = {num_particles}")
    return figure
