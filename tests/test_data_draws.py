"""Draws of 8-bit images: their distribution, and what fixed ones are a function of."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from pyro_vae.data.draws import Draw, uniform

EVENT = torch.Size((4, 3))


def splitmix64(seed: int, place: int) -> int:
    """The reference algorithm, in unbounded integers."""
    z = (seed + 0x9E3779B97F4A7C15 * place) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def test_the_generator_is_splitmix64() -> None:
    assert splitmix64(1234567, 1) == 6457827717110365317  # published with the reference code
    assert splitmix64(1234567, 2) == 3203168211198807973
    seed = int.from_bytes(hashlib.sha256(b"key").digest()[:8], "little")
    found = uniform("key", torch.tensor([0, 7, 10**9]), EVENT)
    for row, values in zip((0, 7, 10**9), found.flatten(1), strict=True):
        for entry, value in enumerate(values.tolist()):
            assert value == (splitmix64(seed, 12 * row + entry) >> 40) / 2**24


def test_uniform() -> None:
    u = uniform("key", torch.arange(20_000), EVENT).double()
    n = u.numel()
    assert (u.min() >= 0) & (u.max() < 1)
    assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    shares = torch.histc(u, 16, 0, 1) / n
    assert (abs(shares - 1 / 16) < 4.5 * math.sqrt(15 / 256 / n)).all()
    flat = u.flatten()
    for lag in (1, 12, 13):  # next entry, next row, both
        covariance = ((flat[lag:] - 0.5) * (flat[:-lag] - 0.5)).mean()
        assert abs(covariance) < 4 / 12 / math.sqrt(n)


def test_uniform_is_a_function_of_key_row_and_entry() -> None:
    rows = torch.tensor([5, 100_000, 3])
    u = uniform("key", rows, EVENT)
    assert torch.equal(u[1:2], uniform("key", rows[1:2], EVENT))
    assert torch.equal(u.flatten(1), uniform("key", rows, torch.Size((12,))))
    assert not torch.equal(u, uniform("other", rows, EVENT))
    assert uniform("key", rows[:0], EVENT).shape == (0, *EVENT)
    assert u.dtype == torch.float32


def pixels(rows: int = 256) -> Tensor:
    """Row k is k everywhere."""
    return torch.arange(rows, dtype=torch.uint8)[:, None, None].expand(rows, 40, 50)


@pytest.mark.parametrize("stream", [None, "still"])
def test_binarization_has_mean_x_over_255(stream: str | None) -> None:
    x = pixels()
    drawn = Draw("binarize", "key", stream=stream)(x, torch.arange(256), torch.float64)
    assert drawn.unique().tolist() == [0, 1]
    p = torch.arange(256) / 255
    error = (p * (1 - p) / 2000).sqrt()
    assert (abs(drawn.mean((1, 2)) - p) <= 4 * error).all()
    assert drawn[0].sum() == 0
    assert drawn[255].min() == 1


def test_binarization_does_not_depend_on_the_dtype() -> None:
    draw, drawn = Draw("binarize", "key"), []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        drawn.append(draw(pixels(), torch.arange(256), dtype).double())
    assert torch.equal(*drawn)


def test_threshold() -> None:
    drawn = Draw("threshold", "key")(pixels(), torch.arange(256), torch.float32)
    assert drawn[:128].max() == 0
    assert drawn[128:].min() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stream", [None, "still"])
def test_dequantization_stays_in_its_level(dtype: torch.dtype, stream: str | None) -> None:
    x = pixels().repeat(1, 3, 3)  # rounding up to the next level takes some tries
    y = Draw("dequantize", "key", stream=stream)(x, torch.arange(256), dtype)
    assert y.dtype == dtype
    assert torch.equal((y * 256).floor(), x.to(dtype))
    u = (y * 256 - x.to(dtype)).double()
    assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / u.numel())
    assert y.max() < 1


def test_streams() -> None:
    x, rows = pixels(20), torch.arange(20)

    def drawn(draw: Draw) -> Tensor:
        return draw(x, rows, torch.float64)

    by_epoch, anew = Draw("binarize", "key", by_epoch=True), Draw("binarize", "key", stream=None)
    assert not torch.equal(drawn(by_epoch.epoch(0, 1)), drawn(by_epoch.epoch(0, 2)))
    assert not torch.equal(drawn(by_epoch.epoch(0, 1)), drawn(by_epoch.epoch(1, 1)))
    assert torch.equal(drawn(by_epoch.epoch(0, 1)), drawn(by_epoch.epoch(0, 1)))
    assert torch.equal(drawn(by_epoch.epoch(0, 1).still()), drawn(by_epoch))
    assert anew.epoch(0, 1) == anew
    assert not torch.equal(drawn(anew), drawn(anew))
    torch.manual_seed(3)
    first = drawn(anew)
    torch.manual_seed(3)
    assert torch.equal(drawn(anew), first)
    before = torch.get_rng_state()
    drawn(anew.still())
    assert torch.equal(torch.get_rng_state(), before)
