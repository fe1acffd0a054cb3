"""Shapes of known factors: images that are rendered, for which the truth about z is known.

The factors are those of dSprites (Matthey et al. 2017): shape, scale, orientation, x and y; the images
are 32 x 32, black and white without shades, and rendered anew by ``render``, not those of the original.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.source import Array, Source, select

__all__ = ["FACTORS", "PERIODS", "SIZE", "radii", "read_sprites", "render"]

FACTORS = {"shape": 3, "scale": 6, "orientation": 40, "x": 32, "y": 32}  # and their levels
PERIODS = (10, 20, 40)  # orientations after which square, ellipse and heart look the same
SPLIT_SEED = 0
ROWS = {"train": 50_000, "test": 10_000}  # of 737,280 factors

# In pixels. Centres are half a pixel apart, so that four places within a pixel are all there are; these
# numbers were searched for until no two images were equal but for the symmetries of PERIODS.
SIZE = 32
RADIUS = 7.9  # of the circle around the largest shape
FIRST = 8.25  # centre of level 0, which leaves room for that circle on all sides
TILT = 3.1  # degrees of orientation 0: upright squares of two scales may have the same pixels
SHORT = 0.44  # short by long axis of the ellipse
CHUNK = 512  # images at a time, so that what lies between stays in the cache


# --- shapes in the unit circle: u [B, H, W] to the right, v [B, H, W] upwards -------------------------


def _square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) <= math.sqrt(0.5)


def _ellipse(u: Tensor, v: Tensor) -> Tensor:
    return u.square() + (v / SHORT).square() <= 1


# A square of side 1 on its corner, and half a disk on each of its upper sides.
HEART_AREA = 1 + math.pi / 4
HEART_RISE = math.sqrt(2) * (math.pi / 16 + 1 / 12) / HEART_AREA  # of its centre of mass
HEART_RADIUS = math.sqrt(0.5) + HEART_RISE  # from there to the lower corner


def _heart(u: Tensor, v: Tensor) -> Tensor:
    u, v = HEART_RADIUS * u.abs(), HEART_RADIUS * v + HEART_RISE
    disk = (u - math.sqrt(0.125)).square() + (v - math.sqrt(0.125)).square() <= 0.25
    return disk | (u + v.abs() <= math.sqrt(0.5))


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "square": _square,
    "ellipse": _ellipse,
    "heart": _heart,
}


# --- images -------------------------------------------------------------------------------------------


def radii(scale: Tensor) -> Tensor:
    """Radius in pixels of the circle around a shape, for levels 0..5: 0.5 to 1 of the largest."""
    return RADIUS * (0.5 + 0.5 * scale / (FACTORS["scale"] - 1))


def render(factors: Tensor) -> Tensor:
    """Images of shapes: a pixel is 1 where its centre is inside.

    Level k of ``orientation`` is a turn by 9 k + 3.1 degrees, counterclockwise; the centre of mass is at
    (8.25 + x / 2, 8.25 + y / 2) pixels from the upper left corner, to the right and downwards.

    Args:
        factors: ``[B, 5]`` whole numbers, the levels of FACTORS in their order, each from 0.

    Returns:
        ``[B, 32, 32]`` uint8 of 0 and 1, on the device of the factors.

    Raises:
        ValueError: another shape, levels that there are not.
    """
    levels = torch.tensor(list(FACTORS.values()), device=factors.device)
    if factors.dim() != 2 or factors.shape[1] != len(levels) or factors.is_floating_point():
        raise ValueError(
            f"render: factors= came {factors.dtype} {list(factors.shape)}, wanted whole numbers [B, 5]: "
            f"{', '.join(FACTORS)}"
        )
    if bool(((factors < 0) | (factors >= levels)).any()):
        raise ValueError(f"render: factors= came with a level outside 0 and those of {FACTORS}")
    out = torch.empty(len(factors), SIZE, SIZE, dtype=torch.uint8, device=factors.device)
    for kind, inside in enumerate(SHAPES.values()):
        for rows in (factors[:, 0] == kind).nonzero()[:, 0].split(CHUNK):
            out[rows] = inside(*_own_axes(factors[rows])).to(torch.uint8)
    return out


def _own_axes(factors: Tensor) -> tuple[Tensor, Tensor]:
    """Where the pixels ``[B, H, W]`` lie along a shape's own axes, in units of its radius."""
    _, scale, turn, x, y = factors.double()[:, :, None].unbind(1)  # each [B, 1]
    pixel = torch.arange(SIZE, device=factors.device) + 0.5
    right, up = pixel - FIRST - x / 2, FIRST + y / 2 - pixel
    angle = math.radians(TILT) + turn * (2 * math.pi / FACTORS["orientation"])
    cos, sin = angle.cos() / radii(scale), angle.sin() / radii(scale)
    u = (cos * right)[:, None, :] + (sin * up)[:, :, None]
    v = (cos * up)[:, :, None] - (sin * right)[:, None, :]
    return u, v


# --- data set -----------------------------------------------------------------------------------------


def read_sprites(name: str, sites: Collection[str] | None = None) -> Source:
    """``x`` [B, 32, 32] in {0, 1} and ``factors`` [B, 5], a seeded part of all combinations.

    50,000 rows in split ``train`` and 10,000 in ``test``, of which no image is in ``train``.
    """
    grid = _shuffled()
    image = _image(grid)
    fresh = ~np.isin(image, image[: ROWS["train"]])
    chosen = {"train": grid[: ROWS["train"]], "test": grid[fresh][: ROWS["test"]]}
    arrays = {
        split: {"x": render(torch.from_numpy(rows)).numpy(), "factors": rows}
        for split, rows in chosen.items()
    }
    digest = hashlib.sha256()
    for part in arrays.values():
        for array in part.values():
            digest.update(array.tobytes())
    record: dict[str, Any] = {
        "source": "rendered",
        "sha256": digest.hexdigest(),
        "splits_by": {"seed": SPLIT_SEED, "rows": list(ROWS.values())},
        "factors": dict(FACTORS),
    }
    return Source(name, select(name, arrays, sites), record)


def _shuffled() -> Array:
    """All combinations of levels, ``[737280, 5]`` int64."""
    levels = tuple(FACTORS.values())
    order = np.random.RandomState(SPLIT_SEED).permutation(math.prod(levels))  # frozen by numpy
    return np.stack(np.unravel_index(order, levels), 1).astype(np.int64)


def _image(factors: Array) -> Array:
    """A number for each of the different images, ``[B]``."""
    shape, scale, turn, x, y = factors.T
    turn = turn % np.array(PERIODS)[shape]
    return np.asarray(np.ravel_multi_index((shape, scale, turn, x, y), tuple(FACTORS.values())))
