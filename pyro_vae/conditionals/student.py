"""A conditional with heavy tails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.conditionals import marginal
from pyro_vae.conditionals.network import LearnedScale, Network, independent, outputs, positive
from pyro_vae.conditionals.special import HALF_LOG_2PI, remainder
from pyro_vae.nn.affine import Affine

__all__ = ["StudentT"]


class StudentT(LearnedScale):
    """Student's t around m(y), with learned scale s and degrees of freedom n, for outliers.

        p(x | y) ∝ 1/s (1 + ((x - m(y)) / s)² / n)^(-(n + 1) / 2)
        s = scale · (floor + softplus(r))
        n = smallest + softplus(q)

    r and q are plain parameters; neither s nor n depends on the parents y. An outlier costs the
    logarithm of its distance, not its square, and its pull on m(y) fades with distance, which is
    why the t serves for robust regression (Lange, Little and Taylor 1989) and for robust VAEs
    (Takahashi et al. 2018, "Student-t variational autoencoder for robust density estimation").
    The variance, n / (n - 2) times s², is finite since n > 2; the Gaussian is the limit of large n.

    Args:
        net: ``parents -> [..., *event]``.
        event_shape: ``[*event]``.
        scale: initial scale; its shape, which broadcasts to ``[*event]``, says which entries share
            one: a number for all, ``[*event]`` for one each, ``[C, 1, 1]`` for one per channel.
        df: initial n; its shape likewise.
        floor: smallest scale as a fraction of the initial one. A constant entry ends there.
        smallest: n stays above this. At 2 all variances are finite, at 1 all means; 0 is allowed.
    """

    def __init__(
        self,
        net: nn.Module,
        event_shape: Sequence[int],
        scale: Tensor | float = 1.0,
        df: Tensor | float = 5.0,
        floor: float = 1e-3,
        smallest: float = 2.0,
    ) -> None:
        super().__init__(net, event_shape, scale, floor)
        self.smallest = smallest
        start = positive("df", df) - smallest
        if smallest < 0 or not bool((start > 0).all()):
            raise ValueError(f"StudentT: df= came {df}, wanted above smallest={smallest}")
        self.raw_df = nn.Parameter(start + (-torch.expm1(-start)).log())

    @classmethod
    def build(
        cls,
        network: Network,
        event_shape: Sequence[int],
        data: Tensor | None = None,
        shared: bool = False,
    ) -> StudentT:
        """Make the network too; with ``data`` it starts from their median and median deviation.

        Mean and standard deviation would follow the outliers. One scale and one number of degrees
        of freedom per entry, or with ``shared`` one for all.
        """
        net = network(event_shape)
        scale = torch.ones(() if shared else tuple(event_shape))
        if data is not None:
            loc, scale = marginal.median(data), marginal.deviation(data)
            scale = scale.square().mean().sqrt() if shared else scale
            net = nn.Sequential(net, Affine(loc, scale))
        return cls(net, event_shape, scale, torch.full_like(scale, 5.0))

    @property
    def df(self) -> Tensor:
        """The current degrees of freedom, shaped as they were given."""
        return self.smallest + softplus(self.raw_df)

    def forward(self, *parents: Tensor) -> TorchDistribution:
        """StudentT with event ``[*event]``."""
        loc = outputs(self, self.net, parents, *self.event_shape)
        return independent(_StudentT(self.df, loc, self.scale), len(self.event_shape))


class _StudentT(dist.StudentT):  # type: ignore[misc]
    """Pyro's StudentT, whose normaliser cancels in float32 where there are many degrees of freedom.

    With h half of those, log gamma(h + 1/2) - log gamma(h) is written by Stirling's remainders. It
    is computed in the shape in which df and scale came, once and not in every particle and row.
    """

    def __init__(
        self, df: Tensor, loc: Tensor, scale: Tensor, validate_args: bool | None = None
    ) -> None:
        self._came = df, scale
        super().__init__(df, loc, scale, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _StudentT:
        new = self._get_checked_instance(_StudentT, _instance)
        new._came = self._came
        expanded: _StudentT = super().expand(batch_shape, new)
        return expanded

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        df, scale = self._came
        half = 0.5 * df
        ratio = half * (0.5 / half).log1p() - 0.5 + remainder(half + 0.5) - remainder(half)
        square = ((value - self.loc) / scale).square()
        log_prob: Tensor = -(half + 0.5) * (square / df).log1p() + (
            ratio - scale.log() - HALF_LOG_2PI
        )
        return log_prob
