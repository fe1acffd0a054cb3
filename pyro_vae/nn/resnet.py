"""Residual networks, with the nonlinearity before each layer (He et al. 2016, arXiv:1603.05027)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from pyro_vae.nn.conv import convolutional
from pyro_vae.nn.leading import Reshape

__all__ = ["Residual", "conv_block", "conv_resnet", "dense_block", "dense_resnet"]


class Residual(nn.Module):
    """``x + branch(x)``."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.branch(x)
        return out


def dense_block(width: int, activation: Callable[[], nn.Module] = nn.ReLU) -> Residual:
    """``x + W2 f(W1 f(x))``, ``[..., width] -> [..., width]``."""
    return Residual(
        nn.Sequential(activation(), nn.Linear(width, width), activation(), nn.Linear(width, width))
    )


def conv_block(channels: int, activation: Callable[[], nn.Module] = nn.ReLU) -> Residual:
    """``x + W2 * f(W1 * f(x))``, ``[rows, C, H, W] -> [rows, C, H, W]``."""
    return Residual(
        nn.Sequential(
            activation(),
            nn.Conv2d(channels, channels, 3, padding=1),
            activation(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
    )


def dense_resnet(
    inputs: Sequence[int],
    outputs: Sequence[int],
    hidden: Sequence[int] = (200, 200),
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """One residual block per hidden width, ``[..., *inputs] -> [..., *outputs]``.

    A linear layer leads into each block whose width differs from what comes before it.
    """
    width, out = math.prod(inputs), math.prod(outputs)
    layers: list[nn.Module] = [Reshape(inputs, (width,))]
    for k, wide in enumerate(hidden):
        if k == 0 or wide != width:
            layers.append(nn.Linear(width, wide))
        layers.append(dense_block(wide, activation))
        width = wide
    layers += [activation()] if hidden else []
    return nn.Sequential(*layers, nn.Linear(width, out), Reshape((out,), outputs))


def conv_resnet(
    inputs: Sequence[int],
    outputs: Sequence[int],
    hidden: Sequence[int] = (32, 64),
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Module:
    """``convolutional`` with a residual block in each stage."""
    return convolutional(
        inputs, outputs, hidden, activation, block=partial(conv_block, activation=activation)
    )
