"""Pixels in a grid: samples, reconstructions, and paths through the latent space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba

from pyro_vae.reporting.style import COLOURS, Array, Picture, array, inches, styled

__all__ = ["grid", "interpolations", "is_image", "pairs", "pixels", "same_shape", "traversals"]

GAP = 0.07  # of an image's height
MISSING = COLOURS[5]
CELL, LIMIT, MARGIN = 0.8, 12.0, 0.08  # inches: an image, all of them, around them


def is_image(event: Sequence[int], image_shape: Sequence[int] | None) -> bool:
    """Whether values of an event shape are pixels: [H, W], [1, H, W], [3, H, W], or said to be."""
    return image_shape is not None or len(event) == 2 or (len(event) == 3 and event[0] in (1, 3))


def pixels(what: str, values: Any, leading: int, image_shape: Sequence[int] | None) -> Array:
    """``[*leading, *event]`` as ``[*leading, H, W]`` or, in colour, ``[*leading, H, W, 3]``.

    Raises:
        ValueError: values that are no pixels, or not as many as ``image_shape`` says.
    """
    values = array(what, values)
    event = values.shape[leading:]
    if not is_image(event, image_shape):
        raise ValueError(
            f"{what}: came {list(values.shape)}, wanted {leading} dims and those of an image, [H, W], "
            "[1, H, W] or [3, H, W]; say image_shape=(H, W) if the rest is one"
        )
    shape = tuple(image_shape or event)
    if not is_image(shape, None) or math.prod(shape) != math.prod(event):
        raise ValueError(
            f"{what}: came image_shape={list(shape)} for events {list(event)}, wanted as many pixels"
        )
    images: Array = values.reshape(*values.shape[:leading], *shape)
    if len(shape) == 2:
        return images
    return images[..., 0, :, :] if shape[0] == 1 else np.moveaxis(images, -3, -1)


@styled()
def grid(images: Any, columns: int | None, image_shape: Sequence[int] | None) -> Picture:
    """Images ``[N, *event]`` row by row."""
    cells = pixels("samples", images, 1, image_shape)
    columns = columns or math.ceil(math.sqrt(len(cells)))
    return _mosaic(_bands(cells[None], columns), limits(cells))[0]


@styled()
def pairs(
    originals: Any,
    reconstructed: Any,
    observed: Any,
    columns: int,
    image_shape: Sequence[int] | None,
) -> Picture:
    """Originals above their reconstructions, in bands of ``columns``; missing pixels in colour."""
    above = pixels("reconstructions: originals", originals, 1, image_shape)
    below = pixels("reconstructions: reconstructed", reconstructed, 1, image_shape)
    same_shape("reconstructions", above, below)
    missing: Array = np.isnan(above)
    if observed is not None:
        seen = pixels("reconstructions: observed", observed, 1, image_shape)
        same_shape("reconstructions: observed", above, seen)
        missing |= seen == 0
    known = limits(below if missing.all() else above[~missing])
    if missing.ndim == 4:  # a pixel in colour is missing if any part of it is
        missing = np.asarray(missing.any(-1))
    rows = ["original", "reconstruction"] * math.ceil(len(above) / columns)
    figure, axes = _mosaic(_bands(np.stack([above, below]), columns), known, rows)
    if missing.any():
        _mark(axes, _bands(np.stack([missing, np.zeros_like(missing)]), columns))
    return figure


@styled()
def interpolations(images: Any, *, image_shape: Sequence[int] | None = None) -> Picture:
    """What ``interpolate`` decodes on the way from one row to another, a path per line.

    Args:
        images: ``[N, steps, *event]``.
        image_shape: of a flat event.

    Raises:
        ValueError: no pixels.
    """
    cells = pixels("interpolations", images, 2, image_shape)
    steps = ["first", *[""] * (cells.shape[1] - 2), "second"]
    return _mosaic(np.ma.array(cells), limits(cells), columns=steps)[0]


@styled()
def traversals(
    images: Any,
    values: Any = None,
    *,
    rate: Any = None,
    dims: Sequence[int] | None = None,
    latent: str = "z",
    top: int | None = None,
    image_shape: Sequence[int] | None = None,
) -> Picture:
    """What ``traverse`` decodes, a line for every latent dimension, the one of the highest rate first.

    Args:
        images: ``[D, values, *event]``, one row of data of what ``traverse`` returns.
        values: ``[values]`` that each dimension takes (default: -3 to 3, as in ``traverse``).
        rate: ``[D]`` nats, of the dimensions shown; without them the order stays.
        dims: ``[D]`` their numbers (default: 0 to D - 1).
        latent: name of the site.
        top: how many of them to show (default: all).
        image_shape: of a flat event.

    Raises:
        ValueError: no pixels, as many rates, values or numbers as nothing else has.
    """
    cells = pixels("traversals", images, 2, image_shape)
    count, steps = cells.shape[:2]
    values = np.linspace(-3, 3, steps) if values is None else array("traversals: values", values)
    numbers = list(range(count) if dims is None else dims)
    rates = None if rate is None else array("traversals: rate", rate).flatten()
    for name, came, wanted in (
        ("values", len(values), steps),
        ("dims", len(numbers), count),
        ("rates", count if rates is None else len(rates), count),
    ):
        if came != wanted:
            raise ValueError(f"traversals: came {came} {name} for images of {wanted}")
    order = list(range(count)) if rates is None else np.argsort(-rates, kind="stable").tolist()
    order = order[:top]
    rows = [f"{latent}[{numbers[i]}]" for i in order]
    if rates is not None:
        rows = [f"{row}  {rates[i]:.2f} nats" for row, i in zip(rows, order, strict=True)]
    told = [f"{value:.3g}".replace("-", "\N{MINUS SIGN}") for value in values]
    label = "value of the dimension"
    return _mosaic(np.ma.array(cells[order]), limits(cells), rows, told, label)[0]


def same_shape(what: str, a: Array, b: Array) -> None:
    """Refuse to compare what is of different shapes.

    Raises:
        ValueError: naming both.
    """
    if a.shape != b.shape:
        raise ValueError(f"{what}: came {list(a.shape)} and {list(b.shape)}, wanted equal shapes")


def limits(values: Array) -> tuple[float, float]:
    """Values that are black and white: those of binary data, of bytes, or the extremes seen."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low < 0 or high > 255:
        return low, high
    return 0.0, 1.0 if high <= 1 else (255.0 if high > 127 else high)


def _bands(cells: Array, columns: int) -> Any:
    """``[S, N, *pixels]`` -> masked ``[ceil(N / columns) * S, columns, *pixels]``: S lines of N images
    each, broken after ``columns``."""
    sets, count = cells.shape[:2]
    columns = min(columns, count)
    bands = math.ceil(count / columns)
    padded = _empty(sets, bands * columns, *cells.shape[2:])
    padded[:, :count] = cells
    folded = padded.reshape(sets, bands, columns, *cells.shape[2:]).swapaxes(0, 1)
    return folded.reshape(sets * bands, columns, *cells.shape[2:])


def _empty(*shape: int) -> Any:
    """Zeros, all of them masked."""
    return np.ma.array(np.zeros(shape), mask=True)


def _gap(height: int) -> int:
    """Pixels between images."""
    return max(1, round(GAP * height))


def _joined(cells: Any) -> Any:
    """Masked ``[R, C, H, W, ...]`` as one picture, masked between the images."""
    rows, columns, height, width = cells.shape[:4]
    gap = _gap(height)
    whole = (rows * (height + gap) - gap, columns * (width + gap) - gap, *cells.shape[4:])
    canvas = _empty(*whole)
    for i in range(rows):
        for j in range(columns):
            top, left = i * (height + gap), j * (width + gap)
            canvas[top : top + height, left : left + width] = cells[i, j]
    return canvas


def _mosaic(
    cells: Any,
    low_high: tuple[float, float],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    label: str = "",
) -> tuple[Picture, Axes]:
    """A figure of masked ``[R, C, H, W]`` or ``[R, C, H, W, 3]``, its rows and columns named."""
    canvas, (height, width) = _joined(cells), cells.shape[2:4]
    high, wide = canvas.shape[:2]
    scale = min(LIMIT / high, LIMIT / wide, CELL / height)
    font = float(rcParams["ytick.labelsize"])
    left = 0.15 * bool(rows) + max((inches(row, font) for row in rows), default=0.0)
    below = 0.3 * bool(columns) + 0.3 * bool(label)
    size = wide * scale + left + 2 * MARGIN, high * scale + below + 2 * MARGIN
    figure = Picture(figsize=size)
    place = np.array([left + MARGIN, below + MARGIN, wide * scale, high * scale])
    axes = figure.add_axes(tuple(place / (*size, *size)))
    low, top = low_high
    if canvas.ndim == 3:
        colours = np.clip((canvas.filled(0.0) - low) / ((top - low) or 1.0), 0, 1)
        visible = ~np.ma.getmaskarray(canvas).any(-1, keepdims=True)
        axes.imshow(np.concatenate([colours, visible], -1))
    else:
        axes.imshow(canvas, cmap="gray", vmin=low, vmax=top)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for axis, names, size in ((axes.yaxis, rows, height), (axes.xaxis, columns, width)):
        places = [i * (size + _gap(height)) + (size - 1) / 2 for i in range(len(names))]
        axis.set_ticks(places, names)
    axes.set_xlabel(label)
    return figure, axes


def _mark(axes: Axes, where: Any) -> None:
    """Paint over the pixels of masked bool ``[R, C, H, W]``."""
    colour = np.array(to_rgba(MISSING))
    axes.imshow(_joined(where).filled(0.0)[..., None] * colour)
