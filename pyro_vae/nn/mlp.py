"""Multilayer perceptrons."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from pyro_vae.nn.leading import Reshape, leading

__all__ = ["dense", "mlp"]


def mlp(
    sizes: Sequence[int],
    activation: Callable[[], nn.Module] = nn.ReLU,
    norm: Callable[[int], nn.Module] | None = None,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Linear layers of the given sizes, ``[..., sizes[0]] -> [..., sizes[-1]]``.

    Weights start as in Glorot and Bengio (2010), biases at 0. With torch's own start a signal shrinks
    by more than half in every layer, and latents that a deep decoder hardly hears collapse.

    Args:
        sizes: widths from input to output; two of them make an affine map.
        activation: makes the nonlinearity after every layer but the last.
        norm: makes a normalisation of a given width before each activation, such as
            ``nn.LayerNorm`` or ``nn.BatchNorm1d``.
        dropout: probability of dropping a hidden unit.
    """
    if len(sizes) < 2:
        raise ValueError(f"mlp: sizes= came {list(sizes)}, wanted an input and an output size")
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(sizes[:-1]):
        layers.append(_linear(narrow, wide))
        if norm is not None:
            layers.append(leading(norm(wide), event_dim=1))
        layers.append(activation())
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, _linear(sizes[-2], sizes[-1]))


def dense(
    inputs: Sequence[int],
    outputs: Sequence[int],
    hidden: Sequence[int] = (200, 200),
    activation: Callable[[], nn.Module] = nn.ReLU,
    norm: Callable[[int], nn.Module] | None = None,
) -> nn.Sequential:
    """An mlp between two shapes, ``[..., *inputs] -> [..., *outputs]``."""
    flat, wide = math.prod(inputs), math.prod(outputs)
    return nn.Sequential(
        Reshape(inputs, (flat,)),
        mlp((flat, *hidden, wide), activation, norm),
        Reshape((wide,), outputs),
    )


def _linear(narrow: int, wide: int) -> nn.Linear:
    layer = nn.Linear(narrow, wide)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
