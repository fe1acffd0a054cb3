"""The continuous Bernoulli as a function of its logit, exact wherever that is."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["ExactContinuousBernoulli"]

# B_2k / (2k)! of the Bernoulli numbers: coth(l / 2) / 2 = 1 / l + sum of these times l^(2k - 1)
SERIES = (
    1 / 12,
    -1 / 720,
    1 / 30240,
    -1 / 1209600,
    1 / 47900160,
    -691 / 1307674368000,
    1 / 74724249600,
    -3617 / 10670622842880000,
    43867 / 5109094217170944000,
)
NEAR = 1.0  # below it the series is exact to 1e-13, above it closed forms lose a digit at most


class ExactContinuousBernoulli(dist.ContinuousBernoulli):  # type: ignore[misc]
    """Density p(x) = l e^(l x) / (e^l - 1) on [0, 1] (Loaiza-Ganem and Cunningham 2019).

    Torch's computes all but the density's exponent from probabilities, which it clamps and in which
    no digits are left at large logits. Here everything is a function of the logit l: with
    exp(-|l|), so that nothing overflows, and by series near 0, so that nothing cancels. Gradients
    are those of the same functions.
    """

    def _cont_bern_log_norm(self) -> Tensor:
        """log of l / tanh(l / 2), by its series near 0."""
        near, small, size = self._parts(0.1)
        square = small.square()
        series = math.log(2.0) + square * (1 / 12 - square * (7 / 1440 - square * 31 / 90720))
        return torch.where(near, series, (size / (size / 2).tanh()).log())

    def _parts(self, below: float) -> tuple[Tensor, Tensor, Tensor]:
        """Whether |l| < ``below``, l where it is and 0 elsewhere, |l| where it is not and 1
        elsewhere: each branch of a ``where`` has a finite gradient where the other is taken."""
        size = self.logits.abs()
        near = size < below
        return near, torch.where(near, self.logits, 0.0), torch.where(near, 1.0, size)

    @property
    def mean(self) -> Tensor:
        """1 / (1 - e^-l) - 1 / l."""
        near, small, size = self._parts(NEAR)
        low = 1 / size + (-size).exp() / torch.expm1(-size)  # at -|l|
        away = torch.where(self.logits > 0, 1 - low, low)
        return torch.where(near, 0.5 + small * _horner(SERIES, small.square()), away)

    @property
    def variance(self) -> Tensor:
        """1 / l² - 1 / (4 sinh²(l / 2))."""
        near, small, size = self._parts(NEAR)
        away = size.square().reciprocal() - (-size).exp() / torch.expm1(-size).square()
        slopes = tuple((2 * k + 1) * c for k, c in enumerate(SERIES))
        return torch.where(near, _horner(slopes, small.square()), away)

    def entropy(self) -> Tensor:
        """-E log p(x)."""
        entropy: Tensor = softplus(self.logits) - self.logits * self.mean
        return entropy - self._cont_bern_log_norm()

    def cdf(self, value: Tensor) -> Tensor:
        """(e^(l x) - 1) / (e^l - 1); 0 and 1 outside [0, 1]."""
        if self._validate_args:
            self._validate_sample(value)
        x = value.clamp(0, 1)
        near, small, size = self._parts(self._tiny())
        to_second_order = x * (small * (x - 1) / 2 + small.square() * (x.square() - 1) / 24).exp()
        away = torch.expm1(-size * x) / torch.expm1(-size)
        away = away * (self.logits.clamp(min=0) * (x - 1)).exp()
        return torch.where(near, to_second_order, away)

    def icdf(self, value: Tensor) -> Tensor:
        """log(1 + u (e^l - 1)) / l."""
        tiny, least, _ = self._parts(self._tiny())
        spread = value * (1 - value)  # and the other cumulants of a Bernoulli variable, mean u
        third, fourth = spread * (1 - 2 * value), spread * (1 - 6 * spread)
        series = value + least * (spread / 2 + least * (third / 6 + least * fourth / 24))

        near, _, size = self._parts(NEAR)
        some = torch.where(near & ~tiny, self.logits, 1.0)
        middle = (value * torch.expm1(some)).log1p() / some

        # 1 + log(u + (1 - u) e^-l) / l for l > 0, and else the same of 1 - u, 1 - x and -l
        rising = self.logits > 0
        log_u, log_rest = value.log(), (-value).log1p()
        above, below = log_u.where(rising, log_rest), log_rest.where(rising, log_u)
        share = torch.logaddexp(above, below - size) / size
        far = torch.where(rising, 1 + share, -share)
        return torch.where(tiny, series, torch.where(near, middle, far)).clamp(0, 1)

    def _tiny(self) -> float:
        """The |l| below which the first terms of a series have as many digits as the closed form."""
        return float(torch.finfo(self.logits.dtype).eps ** 0.2)


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """The polynomial with these coefficients, the constant first."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = coefficient + x * total
    return total
