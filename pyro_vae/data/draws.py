"""What is drawn for 8-bit images, binarization and dequantization: anew, or fixed by a seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["CHUNK", "Draw", "check_choice", "draws_for", "step", "uniform"]

CHUNK = 1 << 17  # entries made at a time, so that what lies between stays in the cache


BINARIZE = {  # what is asked for, in words
    "static": "one Bernoulli draw per pixel with probability x / 255",
    "dynamic": "a Bernoulli draw per pixel with probability x / 255 whenever rows are taken",
    "epoch": "a Bernoulli draw per pixel with probability x / 255 in every epoch",
    "threshold": "x > 127",
}


def _binarize(pixels: Tensor, dtype: torch.dtype, draw: Callable[[], Tensor]) -> Tensor:
    # compared in float32: the same in every dtype; and CUDA would multiply by the inverse of a number
    levels = torch.full((), 255.0, device=pixels.device, dtype=torch.float32)
    return (draw() < pixels.float() / levels).to(dtype)


def _threshold(pixels: Tensor, dtype: torch.dtype, draw: Callable[[], Tensor]) -> Tensor:
    return (pixels > 127).to(dtype)


def _dequantize(pixels: Tensor, dtype: torch.dtype, draw: Callable[[], Tensor]) -> Tensor:
    pixels = pixels.to(dtype)
    # x + u may round up to the next level in float32, which would be another image
    inside = ((pixels + 1) / 256).nextafter(torch.zeros_like(pixels))
    return ((pixels + draw().to(dtype)) / 256).minimum(inside)


DRAWS = {"binarize": _binarize, "threshold": _threshold, "dequantize": _dequantize}


@dataclass(frozen=True)
class Draw:
    """How numbers 0..255 become values, with a number u ~ U[0, 1) per entry.

    Attributes:
        kind: ``binarize`` (u < x / 255), ``threshold`` (x > 127) or ``dequantize`` ((x + u) / 256).
        key: what fixed draws are a function of, besides stream, row and entry.
        by_epoch: whether an epoch of training has one draw.
        stream: names the fixed draw; None draws from torch's global generator, anew every time.
    """

    kind: str
    key: str
    by_epoch: bool = False
    stream: str | None = "still"

    def __call__(self, pixels: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of pixels ``[B, *event]`` (uint8) of the rows with numbers ``rows`` [B]."""

        def draw() -> Tensor:
            if self.stream is None:
                return torch.rand(pixels.shape, device=pixels.device, dtype=torch.float32)
            return uniform(f"{self.key}/{self.stream}", rows, pixels.shape[1:])

        return DRAWS[self.kind](pixels, dtype, draw)

    def still(self) -> Draw:
        """The one draw to judge by."""
        return replace(self, stream="still")

    def epoch(self, seed: int, number: int) -> Draw:
        """The draw of an epoch, where each has its own."""
        return replace(self, stream=f"epoch {seed} {number}") if self.by_epoch else self


def check_choice(binarize: str | None, dequantize: bool, seed: int) -> None:
    """Refuse what cannot be asked for."""
    if binarize is not None and binarize not in BINARIZE:
        raise ValueError(f"binarize= came {binarize!r}, wanted one of {list(BINARIZE)}")
    if binarize is not None and dequantize:
        raise ValueError("came binarize= and dequantize=, wanted one of them")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed= came {seed!r}, wanted a whole number")


def draws_for(
    sites: Iterable[str], split: str, binarize: str | None, dequantize: bool, seed: int
) -> dict[str, Draw]:
    """What is drawn for the rows of a split, by site."""
    if not binarize and not dequantize:
        return {}
    kind = "dequantize" if dequantize else "threshold" if binarize == "threshold" else "binarize"
    stream = None if dequantize or binarize == "dynamic" else "still"
    return {
        site: Draw(kind, f"{seed}/{site}/{split}", binarize == "epoch", stream) for site in sites
    }


def step(site: str, binarize: str | None, seed: int, fixed: bool) -> dict[str, Any]:
    """What is drawn for a site, for the record of the data.

    Args:
        fixed: whether these rows have one draw, whatever others have.
    """
    once = f"; these rows have one fixed draw, by seed {seed}"
    if binarize is None:
        text = "(x + u) / 256, u ~ U[0, 1) anew whenever rows are taken"
        about = {"step": "dequantize", "log_jacobian": -math.log(256)}
    else:
        text = BINARIZE[binarize]
        about = {"step": "binarize", "kind": binarize}
    text = f"{site}: {text}{once if fixed and binarize != 'threshold' else ''}"
    return {"site": site, **about, "seed": seed, "text": text}


def uniform(key: str, rows: Tensor, event_shape: torch.Size) -> Tensor:
    """Numbers in [0, 1), ``[B, *event]`` float32: a function of key, row number and entry alone.

    So a row has the same draw in whatever order, subset and batch it is taken, on every device.
    SplitMix64 (Steele, Lea and Flood 2014, OOPSLA), which can be entered at any place.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    gamma = _signed(0x9E3779B97F4A7C15)
    entries = torch.arange(event_shape.numel(), device=rows.device) * gamma + seed
    starts = rows.unsqueeze(1) * len(entries) * gamma
    size = (len(rows), len(entries))
    out = torch.empty(size, device=rows.device, dtype=torch.float32)
    at_a_time = max(1, CHUNK // max(1, len(entries)))
    for start, into in zip(starts.split(at_a_time), out.split(at_a_time), strict=True):
        z = start + entries  # what follows is in place: memory is what takes time
        z.bitwise_xor_(_shifted(z, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
        z.bitwise_xor_(_shifted(z, 27)).mul_(_signed(0x94D049BB133111EB))
        into.copy_(_shifted(z, 40))  # the last step of SplitMix64 leaves the top bits as they are
    return out.mul_(2.0**-24).reshape(len(rows), *event_shape)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's own drags the sign along."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The int64 with the same bits."""
    return number - (1 << 64) if number >> 63 else number
