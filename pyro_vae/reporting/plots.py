"""Figures of a pair's results: functions of plain numbers that return a ``matplotlib`` figure.

A notebook shows what they return; ``save(figure, "a.svg")`` writes it. Nothing goes through pyplot,
so that no window opens and no figure stays behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyro_vae.reporting.columns import against, histograms
from pyro_vae.reporting.curves import comparison, rate_distortion, training
from pyro_vae.reporting.images import grid, interpolations, is_image, pairs, traversals
from pyro_vae.reporting.latents import latent_map, rates, weights
from pyro_vae.reporting.style import Picture, save

__all__ = [
    "comparison",
    "interpolations",
    "latent_map",
    "rate_distortion",
    "rates",
    "reconstructions",
    "samples",
    "save",
    "training",
    "traversals",
    "weights",
]


def samples(
    drawn: Any,
    data: Any = None,
    *,
    columns: int | None = None,
    image_shape: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> Picture:
    """Images in a grid; of a table the distribution of every column beside that of the data.

    Args:
        drawn: ``[N, *event]``. Events [H, W], [1, H, W] and [3, H, W] are images; [D] is a table,
            unless ``image_shape`` says otherwise.
        data: ``[M, D]`` to compare a table with, NaN where missing.
        columns: images in a line.
        image_shape: [H, W], [1, H, W] or [3, H, W] of flat events.
        names: of a table's columns.

    Raises:
        ValueError: no rows, an event that is neither, as many names as there are no columns.
    """
    if is_image(np.shape(drawn)[1:], image_shape):
        return grid(drawn, columns, image_shape)
    return histograms(drawn, data, names)


def reconstructions(
    originals: Any,
    reconstructed: Any,
    observed: Any = None,
    *,
    columns: int = 10,
    image_shape: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> Picture:
    """Images above their reconstructions; of a table every column against its reconstruction.

    Args:
        originals: ``[N, *event]``, NaN where missing.
        reconstructed: ``[N, *event]``, as ``reconstruct`` gives them.
        observed: bool ``[N, *event]``, ``batch.mask(site)``. Missing pixels are painted, missing
            entries of a table left out and counted.
        columns: images in a line.
        image_shape: as for ``samples``.
        names: of a table's columns.

    Raises:
        ValueError: as for ``samples``; originals and reconstructions of different shapes.
    """
    if is_image(np.shape(originals)[1:], image_shape):
        return pairs(originals, reconstructed, observed, columns, image_shape)
    return against(originals, reconstructed, observed, names)
