"""Rendered shapes: what is seen follows from the factors, and the split is fixed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_vae.data import available, load
from pyro_vae.data.source import Source
from pyro_vae.data.sprites import (
    FACTORS,
    FIRST,
    HEART_AREA,
    HEART_RADIUS,
    PERIODS,
    SHORT,
    SIZE,
    radii,
    read_sprites,
    render,
)

SQUARE, ELLIPSE, HEART = range(3)
UNIT_AREAS = (2.0, math.pi * SHORT, HEART_AREA / HEART_RADIUS**2)  # in the unit circle


def grid(**levels: int) -> Tensor:
    """All factors ``[B, 5]`` that have the given levels."""
    ranges = [
        torch.tensor([levels[name]]) if name in levels else torch.arange(count)
        for name, count in FACTORS.items()
    ]
    return torch.cartesian_prod(*ranges)


def at(shape: int, scale: int = 5, orientation: int = 0, x: int = 16, y: int = 16) -> Tensor:
    return render(torch.tensor([[shape, scale, orientation, x, y]]))[0]


# --- images -------------------------------------------------------------------------------------


def test_images_are_black_and_white():
    images = render(grid(orientation=7, scale=3))
    assert (images.shape, images.dtype) == ((3 * 32 * 32, 32, 32), torch.uint8)
    assert images.unique().tolist() == [0, 1]


@pytest.mark.parametrize("shape", range(3))
def test_area_is_that_of_the_shape(shape: int):
    """By scale, averaged over turns and places within a pixel, of which 40 count as independent."""
    factors = grid(shape=shape)
    factors = factors[(factors[:, 3:] // 2 == 8).all(1)]
    areas = render(factors).flatten(1).sum(1).double()
    for scale in range(FACTORS["scale"]):
        here = areas[factors[:, 1] == scale]
        wanted = UNIT_AREAS[shape] * float(radii(torch.tensor(scale))) ** 2
        assert abs(float(here.mean()) - wanted) < 5 * float(here.std()) / 40**0.5
        assert abs(float(here.mean()) / wanted - 1) < 0.015


def test_area_grows_with_scale():
    """At every turn and place, whatever a pixel's centre makes of it."""
    factors = grid(x=16, y=17)
    areas = render(factors).flatten(1).sum(1).long().view(3, 6, 40)
    assert (areas.diff(dim=1) > 0).all()


@pytest.mark.parametrize("shape", range(3))
def test_centre_of_mass_is_at_x_and_y(shape: int):
    factors = grid(shape=shape)[::7]
    images = render(factors).double()
    mass = images.sum((1, 2))
    pixel = torch.arange(SIZE) + 0.5
    found = torch.stack([images.sum(1) @ pixel / mass, images.sum(2) @ pixel / mass], 1)
    off = found - (FIRST + factors[:, 3:] / 2)
    assert off.abs().max() < 0.45  # the edge of a small shape is a few pixels
    assert (off.mean(0).abs() < 5 * off.std(0) / 40**0.5).all()
    assert off.std() < 0.12


def test_nothing_is_cut_off():
    ends = torch.tensor([0, 31])
    factors = torch.cartesian_prod(torch.arange(3), torch.tensor([5]), torch.arange(40), ends, ends)
    images = render(factors)
    inner = torch.cartesian_prod(
        torch.arange(3), torch.tensor([5]), torch.arange(40), 16 + ends % 2, 16 + ends % 2
    )
    assert torch.equal(images.flatten(1).sum(1), render(inner).flatten(1).sum(1))


def test_two_levels_are_a_pixel():
    factors = grid(scale=4, orientation=11, x=9, y=12)
    right, down = torch.tensor([0, 0, 0, 2, 0]), torch.tensor([0, 0, 0, 0, 2])
    images = render(factors)
    assert torch.equal(render(factors + right), images.roll(1, 2))
    assert torch.equal(render(factors + down), images.roll(1, 1))


def test_a_quarter_turn_is_ten_levels_counterclockwise():
    """Of the whole image, in which x = 16, y = 15 lies a quarter of a pixel right of and above the
    middle, and so goes to x = 15, y = 15."""
    for shape in range(3):
        turned = at(shape, orientation=13, x=15, y=15)
        assert torch.equal(turned, at(shape, orientation=3, x=16, y=15).rot90())


@pytest.mark.parametrize("shape", range(3))
def test_symmetries_are_the_periods_and_no_others(shape: int):
    images = render(grid(shape=shape, scale=5, x=16, y=17))
    same = [torch.equal(images[0], image) for image in images]
    assert [k for k, it in enumerate(same) if it] == list(range(0, 40, PERIODS[shape]))


def test_no_two_images_are_equal_but_for_symmetries():
    """Two levels of x or y are a whole pixel: images that differ in four places within a pixel, wherever
    they are, differ everywhere."""
    factors = grid()
    factors = factors[(factors[:, 3:] // 2 == 8).all(1)]
    factors = factors[factors[:, 2] < torch.tensor(PERIODS)[factors[:, 0]]]
    assert len(factors) == 70 * 6 * 4
    seen = set()
    for image in render(factors):
        rows, columns = image.any(1).nonzero(), image.any(0).nonzero()
        corner = (-int(rows[0]), -int(columns[0]))
        seen.add(image.roll(corner, (0, 1)).numpy().tobytes())
    assert len(seen) == len(factors)


def test_heart_points_down():
    heart = at(HEART).double()
    widths = heart.sum(1)[heart.sum(1) > 0]
    assert widths[:4].mean() > 2 * widths[-4:].mean()
    assert at(HEART, orientation=20).double().sum(1)[:16].max() < widths.max() + 1


def test_factors_that_there_are_not():
    with pytest.raises(ValueError, match=r"render: factors= came torch.float64 \[2, 5\]"):
        render(torch.zeros(2, 5))
    with pytest.raises(
        ValueError, match=r"came torch.int64 \[2, 4\], wanted whole numbers \[B, 5\]"
    ):
        render(torch.zeros(2, 4, dtype=torch.int64))
    for wrong in ([3, 0, 0, 0, 0], [0, 0, 0, 0, 32], [0, -1, 0, 0, 0]):
        with pytest.raises(ValueError, match="a level outside"):
            render(torch.tensor([wrong]))


# --- data set -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source() -> Source:
    return read_sprites("sprites")


def test_rows_are_what_their_factors_say(source: Source):
    for part in source.parts.values():
        rows = slice(100, 300)
        assert np.array_equal(render(torch.from_numpy(part["factors"][rows])), part["x"][rows])


def test_splits(source: Source):
    train, test = source.parts["train"], source.parts["test"]
    assert (train["x"].shape, test["x"].shape) == ((50_000, 32, 32), (10_000, 32, 32))
    # Pinned: recorded numbers are of these rows.
    assert train["factors"][:2].tolist() == [[0, 3, 2, 23, 10], [1, 4, 25, 25, 28]]
    assert test["factors"][:2].tolist() == [[1, 0, 19, 8, 18], [2, 1, 21, 30, 5]]
    assert (int(train["x"].sum()), int(test["x"].sum())) == (3348175, 671155)
    assert len(np.unique(train["factors"], axis=0)) == 50_000
    images = {image.tobytes() for image in np.packbits(train["x"], axis=(2))}
    assert not any(image.tobytes() in images for image in np.packbits(test["x"], axis=2))


def test_factors_are_uniform_and_independent(source: Source):
    """Chi-squared of all single levels and all pairs of factors, in standard deviations."""
    factors = source.parts["train"]["factors"]
    levels = list(FACTORS.values())
    assert factors.min(0).tolist() == [0] * 5
    assert factors.max(0).tolist() == [n - 1 for n in levels]
    for a in range(5):
        for b in range(a):
            counts = np.bincount(factors[:, a] * levels[b] + factors[:, b])
            cells = levels[a] * levels[b]
            wanted = len(factors) / cells
            chi2 = ((counts - wanted) ** 2 / wanted).sum()
            assert abs(chi2 - (cells - 1)) < 5 * (2 * (cells - 1)) ** 0.5


def test_load():
    assert available()["sprites"] == "rendered"
    batch = load("sprites", split="test")
    assert batch.sites == ("x", "factors")
    assert (batch["x"].dtype, batch["factors"].dtype) == (torch.float64, torch.int64)
    assert batch["x"].unique().tolist() == [0, 1]
    record = batch.record
    assert (record["name"], record["source"], record["splits"]) == (
        "sprites",
        "rendered",
        ["train", "test"],
    )
    assert record["splits_by"] == {"seed": 0, "rows": [50_000, 10_000]}
    assert record["factors"] == FACTORS
    assert "levels" not in record
    assert json.loads(json.dumps(record)) == record


def test_load_of_images_alone(source: Source):
    batch = load("sprites", sites=["x"])
    assert batch.sites == ("x",)
    assert len(batch) == batch.total == 50_000
    assert batch.record["sha256"] == source.record["sha256"]
