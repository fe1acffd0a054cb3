"""Mixtures of discretized logistics, for values on many ordered levels such as 8-bit pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn
from torch.distributions.utils import clamp_probs
from torch.nn.functional import logsigmoid, softplus

from pyro_vae.conditionals import marginal
from pyro_vae.conditionals.discrete import Binomial
from pyro_vae.conditionals.network import Network, independent, outputs, positive, several
from pyro_vae.nn.affine import Affine
from pyro_vae.nn.leading import Reshape

__all__ = ["DiscretizedLogisticMixture", "LogisticMixture"]


class LogisticMixture(nn.Module):
    """Levels 0, 1, ..., L - 1 by a mixture of M logistics, rounded and clipped.

    The likelihood of PixelCNN++ (Salimans et al. 2017, arXiv:1701.05517), without what it adds
    across the channels of a pixel, so that it factorizes and any entry may be missing:

        p(x | y) = Σ_j π_j(y) [sigmoid((x + 1/2 - m_j(y)) / s_j(y))
                               - sigmoid((x - 1/2 - m_j(y)) / s_j(y))]
        s_j(y) = floor + unit · softplus(r_j(y))

    where the first level also has all that is below it, the last one all that is above. Unlike
    Binomial, whose variance is tied to its mean, it can be as sharp or as wide as the data are,
    and have several modes; unlike Categorical, it knows that levels are ordered.

    Args:
        net: ``parents -> [..., 3, M, *event]``: M logits of the weights, then M locations m in
            levels, then M raw scales r.
        event_shape: ``[*event]``.
        components: M.
        levels: L. Saved with the parameters.
        unit: number or ``[*event]``, in which the scale counts, in levels.
        floor: smallest scale, in levels. One level then has at most 0.987 of a component, except
            the first and the last, which can have all (the paper's own limit is 0.116).
    """

    levels: Tensor
    unit: Tensor

    def __init__(
        self,
        net: nn.Module,
        event_shape: Sequence[int],
        components: int = 5,
        levels: int = 256,
        unit: Tensor | float = 1.0,
        floor: float = 0.1,
    ) -> None:
        super().__init__()
        self.net, self.event_shape, self.floor = net, tuple(event_shape), floor
        self.components = components
        for name, value, least in (("components", components, 1), ("levels", levels, 2)):
            if value < least:
                raise ValueError(f"LogisticMixture: {name}= came {value}, wanted at least {least}")
        self.register_buffer("levels", torch.tensor(float(levels)))
        self.register_buffer("unit", positive("unit", unit))

    @staticmethod
    def takes(data: Tensor) -> bool:
        """Whether all observed entries are whole numbers from 0 to 255."""
        return Binomial.takes(data)

    @classmethod
    def build(
        cls,
        network: Network,
        event_shape: Sequence[int],
        data: Tensor | None = None,
        components: int = 5,
        levels: int | None = None,
    ) -> LogisticMixture:
        """Make the network too; with ``data`` it starts from their mean and spread.

        The locations of the components start apart: half of the data's variance lies between them
        (if there are more than one), half within them. L is ``levels``, or else one more than the
        largest level seen; 256 if that is above 127, or where there are no data.
        """
        event = tuple(event_shape)
        if levels is None:
            levels = 256 if data is None else marginal.top(data) + 1
        if data is None:
            center, unit = torch.full(event, (levels - 1) / 2), torch.full(event, levels / 4)
        else:
            center, unit = marginal.mean(data), marginal.spread(data)
        apart = torch.linspace(-1.0, 1.0, components) if components > 1 else torch.zeros(1)
        if components > 1:
            apart = apart * math.sqrt(0.5 / float(apart.square().mean()))
        within = math.sqrt(3 * (0.5 if components > 1 else 1.0)) / math.pi  # a logistic's s / sd

        apart = apart.to(center).reshape(-1, *[1] * len(event))
        one = torch.ones_like(apart * unit)
        shift = torch.stack([0 * one, center + unit * apart, math.log(math.expm1(1.0)) * one])
        scale = torch.stack([one, unit * one, one])
        net = nn.Sequential(
            several(network, 3 * components, event),
            Reshape((3 * components, *event), (3, components, *event)),
            Affine(shift, scale),
        )
        return cls(net, event, components, levels, within * unit)

    def forward(self, *parents: Tensor) -> TorchDistribution:
        """DiscretizedLogisticMixture with event ``[*event]``."""
        out = outputs(self, self.net, parents, 3, self.components, *self.event_shape)
        parts = out.dim() - 2 - len(self.event_shape)
        logits, loc, raw = out.movedim(parts + 1, -1).unbind(parts)
        scale = self.floor + self.unit.unsqueeze(-1) * softplus(raw)
        fn = DiscretizedLogisticMixture(logits, loc, scale, self.levels)
        return independent(fn, len(self.event_shape))


class DiscretizedLogisticMixture(TorchDistribution):
    """A mixture of M logistics, rounded to levels 0, 1, ..., L - 1 and clipped.

    With a and b the lower and upper edge of a level, both less m and divided by s, a component's
    probability is

        sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(-1/s))

    Its logarithm is a sum of three terms that are each accurate however far m is from x: nothing
    cancels, and neither a density in the middle of the level nor a smallest probability has to
    stand in. The first level lacks the second and third factor, the last one the first and third.

    Args:
        logits: of the weights, ``[*batch, M]``.
        loc: m, in levels, ``[*batch, M]``.
        scale: s, in levels, ``[*batch, M]``.
        levels: L, a number or a tensor of one element.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "logits": constraints.real_vector,
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
    }
    has_enumerate_support = True

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor,
        levels: Tensor | int = 256,
        validate_args: bool | None = None,
    ) -> None:
        self.logits, self.loc, self.scale = torch.broadcast_tensors(logits, loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape[:-1], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        return constraints.integer_interval(0, self.levels - 1)

    def expand(
        self, batch_shape: Sequence[int], _instance: Any = None
    ) -> DiscretizedLogisticMixture:
        new: Any = self._get_checked_instance(DiscretizedLogisticMixture, _instance)
        shape = (*batch_shape, self.loc.shape[-1])
        for name in ("logits", "loc", "scale"):
            setattr(new, name, getattr(self, name).expand(shape))
        new.levels = self.levels
        super(DiscretizedLogisticMixture, new).__init__(
            torch.Size(batch_shape), validate_args=False
        )
        new._validate_args = self._validate_args
        mixture: DiscretizedLogisticMixture = new
        return mixture

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.to(self.loc.dtype)
        if self._validate_args:
            self._validate_sample(value)
        x = value.unsqueeze(-1)
        first, last = x <= 0, x >= self.levels - 1
        lower, upper = (x - 0.5 - self.loc) / self.scale, (x + 0.5 - self.loc) / self.scale
        inside = (-torch.expm1(-1 / self.scale)).log()
        log_prob = (
            self.logits.log_softmax(-1)
            + logsigmoid(upper).masked_fill(last, 0.0)
            + logsigmoid(-lower).masked_fill(first, 0.0)
            + inside.masked_fill(first | last, 0.0)
        )
        total: Tensor = log_prob.logsumexp(-1)
        return total

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        index = dist.Categorical(logits=self.logits).sample(torch.Size(sample_shape)).unsqueeze(-1)
        loc, scale = (
            parameter.expand((*index.shape[:-1], -1)).gather(-1, index).squeeze(-1)
            for parameter in (self.loc, self.scale)
        )
        # uniform numbers of exactly 0 would draw level 0 where its probability is 0
        noise = clamp_probs(torch.rand_like(loc)).logit()
        drawn: Tensor = (loc + scale * noise).round().clamp(min=0)
        return drawn.minimum(torch.as_tensor(self.levels - 1).to(drawn))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """``[L, *batch]``, or ``[L, 1, ...]``."""
        levels = torch.arange(int(self.levels), dtype=self.loc.dtype, device=self.loc.device)
        levels = levels.reshape(-1, *[1] * len(self.batch_shape))
        shape = (-1, *self.batch_shape) if expand else levels.shape
        return levels.expand(shape)

    @property
    def mean(self) -> Tensor:
        """The sum over levels t of P(x > t), one at a time: memory does not grow with L."""
        weights, mean = self.logits.softmax(-1), torch.zeros_like(self.loc[..., 0])
        for t in range(int(self.levels) - 1):
            mean += (weights * torch.sigmoid((self.loc - t - 0.5) / self.scale)).sum(-1)
        return mean

    @property
    def variance(self) -> Tensor:
        mean = self.mean
        variance = torch.zeros_like(mean)
        for level in self.enumerate_support(expand=False):
            variance += self.log_prob(level).exp() * (level - mean).square()
        return variance
