"""What is trained: nets, rows and bounds, and the same nets in plain PyTorch for the competitors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.conditionals import Binomial
from pyro_vae.nn import convolutional, dense

__all__ = ["CASES", "FLOOR", "LR", "Case", "Shift", "constant", "networks", "our_pair", "rows"]

LR = 1e-3
FLOOR = 1e-4  # smallest scale of a posterior, as in DiagonalGaussian


@dataclass(frozen=True)
class Case:
    """One net with its data and its bound.

    Attributes:
        name: what the tables call it.
        event: shape of a row.
        hidden: widths of the encoder's layers, or channels; the decoder has them in reverse.
        latent: dimensions of z, or of the lower z of two.
        batch: rows of a step.
        counts: n of a Binomial likelihood; 1 makes it a Bernoulli.
        particles: K; above 1 the bound is the importance weighted one, else the ELBO.
        activation: name of the nonlinearity in torch.nn.
        upper: width and dimensions of the upper of two latents.
        rows: size of the data set that rows are picked from.
    """

    name: str
    event: tuple[int, ...]
    hidden: tuple[int, ...]
    latent: int
    batch: int
    counts: int = 1
    particles: int = 1
    activation: str = "ReLU"
    upper: tuple[int, int] | None = None
    rows: int = 10_000

    @property
    def net(self) -> str:
        """784-400-20."""
        sizes = [math.prod(self.event), *self.hidden, self.latent, *(self.upper or ())]
        return "-".join(map(str, sizes))


CASES = {
    case.name: case
    for case in (
        Case("digits", (64,), (64,), 8, 64, rows=22 * 64),
        Case("mnist", (784,), (400,), 20, 100),
        Case("iwae", (784,), (200, 200), 50, 20, particles=50, activation="Tanh", rows=400),
        Case("two latents", (784,), (200,), 50, 100, upper=(100, 20)),
        Case("convolutional", (28, 28), (32, 64), 32, 64, rows=8 * 64),
    )
}


def rows(case: Case, number: int | None = None) -> Tensor:
    """Synthetic rows ``[N, *event]`` from a random model of few factors: no step takes longer or
    shorter for what is in them."""
    generator = torch.Generator().manual_seed(0)
    number, size = number or case.rows, math.prod(case.event)
    loading = torch.randn(5, size, generator=generator)
    logits = torch.randn(number, 5, generator=generator) @ loading - 1.0
    x = torch.zeros(number, size)
    for _ in range(case.counts):
        x += torch.rand(number, size, generator=generator) < logits.sigmoid()
    return x.reshape(number, *case.event)


def constant(case: Case, x: Tensor) -> float:
    """log C(n, x) in nats per row, which has no gradient: code written by hand leaves it out."""
    n = torch.tensor(float(case.counts))
    each = (n + 1).lgamma() - (x + 1).lgamma() - (n - x + 1).lgamma()
    return float(each.sum()) / len(x)


def our_pair(case: Case) -> tuple[Any, Any]:
    """Model and guide for one latent, built as a user of pyro_vae does."""
    torch.manual_seed(0)
    likelihood = partial(Binomial.build, total_count=case.counts) if case.counts > 1 else None
    return pv.pairs.vae(
        pv.Batch({"x": rows(case, 1000)}),
        latent=case.latent,
        hidden=case.hidden,
        likelihood=likelihood,
        net=convolutional if len(case.event) > 1 else dense,
        activation=getattr(nn, case.activation),
    )


def networks(case: Case) -> nn.ModuleDict:
    """The nets of a case in plain PyTorch, with the parameters of ``our_pair``.

    ``encoder`` and ``decoder``, with two latents also ``upward`` and ``downward``. Those that make a
    Gaussian return its means, then its raw scales.
    """
    torch.manual_seed(0)
    if case.upper is not None:
        width, top = case.upper
        return nn.ModuleDict(
            {
                "encoder": _dense(case, *case.event, *case.hidden, 2 * case.latent),
                "upward": _dense(case, case.latent, width, 2 * top),
                "downward": _dense(case, top, width, 2 * case.latent),
                "decoder": _dense(case, case.latent, *case.hidden[::-1], *case.event),
            }
        )
    build = _images if len(case.event) > 1 else _vectors
    nets = nn.ModuleDict(build(case))
    model, guide = our_pair(case)
    _copy(nets, model.state_dict(), guide.state_dict())
    return nets


class Shift(nn.Module):
    """A constant added to each pixel: a convolution's bias is one per channel."""

    start: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("start", torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.start


def _dense(case: Case, *sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(sizes):
        layers += [nn.Linear(narrow, wide), getattr(nn, case.activation)()]
    return nn.Sequential(*layers[:-1])


def _vectors(case: Case) -> dict[str, nn.Module]:
    return {
        "encoder": _dense(case, *case.event, *case.hidden, 2 * case.latent),
        "decoder": _dense(case, case.latent, *case.hidden[::-1], *case.event),
    }


def _images(case: Case) -> dict[str, nn.Module]:
    """Two stages of stride 2 each way, for images of a height and width that 4 divides."""
    (height, width), (few, many) = case.event, case.hidden
    act = getattr(nn, case.activation)
    small = (many, height // 4, width // 4)
    encoder = nn.Sequential(
        nn.Unflatten(1, (1, height)),
        nn.Conv2d(1, few, 3, stride=2, padding=1),
        act(),
        nn.Conv2d(few, many, 3, stride=2, padding=1),
        act(),
        nn.Flatten(1),
        nn.Linear(math.prod(small), 2 * case.latent),
    )
    decoder = nn.Sequential(
        nn.Linear(case.latent, math.prod(small)),
        act(),
        nn.Unflatten(1, small),
        nn.ConvTranspose2d(many, few, 3, stride=2, padding=1, output_padding=1),
        act(),
        nn.ConvTranspose2d(few, few, 3, stride=2, padding=1, output_padding=1),
        act(),
        nn.Conv2d(few, 1, 3, padding=1),
        nn.Flatten(1, 2),
        Shift(*case.event),
    )
    return {"encoder": encoder, "decoder": decoder}


@torch.no_grad()
def _copy(nets: nn.ModuleDict, model: Mapping[str, Tensor], guide: Mapping[str, Tensor]) -> None:
    """Ours to theirs, in the order of the layers; what ours adds to its logits goes into a bias."""
    for net, ours in ((nets["encoder"], guide), (nets["decoder"], model)):
        given = [value for name, value in ours.items() if name.endswith(("weight", "bias"))]
        for theirs, value in zip(net.parameters(), given, strict=True):
            if theirs.shape != value.shape:
                raise ValueError(f"came {list(value.shape)}, wanted {list(theirs.shape)}")
            theirs.copy_(value)
    (start,) = (value for name, value in model.items() if name.endswith("shift"))
    last = [*nets["decoder"].children()][-1]
    (last.start if isinstance(last, Shift) else last.bias).add_(start)  # type: ignore[operator]
