"""Convolutional encoders and decoders for images of any height and width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

from pyro_vae.nn.leading import Reshape, leading

__all__ = ["convolutional"]

Shape = tuple[int, ...]


def convolutional(
    inputs: Sequence[int],
    outputs: Sequence[int],
    hidden: Sequence[int] = (32, 64),
    activation: Callable[[], nn.Module] = nn.ReLU,
    block: Callable[[int], nn.Module] | None = None,
) -> nn.Module:
    """A network between an image and a vector, ``[..., *inputs] -> [..., *outputs]``.

    The side that is an image, ``[H, W]`` or ``[..., H, W]`` (all axes before the last two are
    channels), decides between encoder and decoder. Each stage halves the image, rounding up, or
    brings it back to the size it was halved from, so that any H and W come back exactly.

    Args:
        inputs: event shape that comes in.
        outputs: event shape that goes out.
        hidden: channels of each stage, in the order in which the data meet them.
        activation: makes the nonlinearity of each stage.
        block: makes a module ``[rows, C, h, w] -> [rows, C, h, w]`` appended to each stage.
    """
    inputs, outputs = tuple(inputs), tuple(outputs)
    if (len(inputs) > 1) == (len(outputs) > 1) or not hidden:
        raise ValueError(
            f"convolutional: came {list(inputs)} -> {list(outputs)} with hidden={list(hidden)}, "
            "wanted an image on one side, a vector on the other, and at least one hidden stage"
        )
    build = _encoder if len(inputs) > 1 else _decoder
    return leading(build(inputs, outputs, hidden, activation, block), event_dim=len(inputs))


def _encoder(
    image: Shape,
    outputs: Shape,
    hidden: Sequence[int],
    activation: Callable[[], nn.Module],
    block: Callable[[int], nn.Module] | None,
) -> nn.Sequential:
    channels, height, width = _as_image(image)
    layers: list[nn.Module] = [Reshape(image, (channels, height, width))]
    for wide in hidden:
        layers += [nn.Conv2d(channels, wide, 3, stride=2, padding=1), activation()]
        layers += [block(wide)] if block else []
        channels, height, width = wide, _half(height), _half(width)
    flat, out = channels * height * width, math.prod(outputs)
    return nn.Sequential(
        *layers,
        Reshape((channels, height, width), (flat,)),
        nn.Linear(flat, out),
        Reshape((out,), outputs),
    )


def _decoder(
    inputs: Shape,
    image: Shape,
    hidden: Sequence[int],
    activation: Callable[[], nn.Module],
    block: Callable[[int], nn.Module] | None,
) -> nn.Sequential:
    channels, height, width = _as_image(image)
    sizes = [(height, width)]  # from fine to coarse
    for _ in hidden:
        sizes.append((_half(sizes[-1][0]), _half(sizes[-1][1])))
    coarse = (hidden[0], *sizes[-1])
    flat = math.prod(inputs)
    layers: list[nn.Module] = [
        Reshape(inputs, (flat,)),
        nn.Linear(flat, math.prod(coarse)),
        activation(),
        Reshape((math.prod(coarse),), coarse),
    ]
    for narrow, wide, (h, w) in zip(hidden, [*hidden[1:], hidden[-1]], sizes[-2::-1], strict=True):
        # from size n, stride 2 gives 2 n - 1 without and 2 n with output padding
        padding = (1 - h % 2, 1 - w % 2)
        layers += [block(narrow)] if block else []
        layers.append(
            nn.ConvTranspose2d(narrow, wide, 3, stride=2, padding=1, output_padding=padding)
        )
        layers.append(activation())
    layers.append(nn.Conv2d(hidden[-1], channels, 3, padding=1))
    return nn.Sequential(*layers, Reshape((channels, height, width), image))


def _as_image(shape: Shape) -> tuple[int, int, int]:
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def _half(size: int) -> int:
    return (size + 1) // 2
