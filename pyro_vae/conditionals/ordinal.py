"""A conditional for classes that have an order."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from pyro_vae.conditionals import marginal
from pyro_vae.conditionals.discrete import Categorical, number_of_classes
from pyro_vae.conditionals.network import Network, independent, outputs

__all__ = ["Ordinal"]


class Ordinal(nn.Module):
    """One of C classes in order, 0 < 1 < ... < C - 1, for each entry (McCullagh 1980; in VAEs Nazábal et
    al. 2020).

        P(x <= c | y) = sigmoid(t_c - h(y)),  t_0 < t_1 < ... < t_(C - 2)

    The thresholds t are learned and do not depend on the parents y, which move all classes at once by
    one number h.

    Args:
        net: ``parents -> h [..., *event]``.
        event_shape: ``[*event]``.
        classes: C, at least 2.
        cumulative: ``[*event, C - 1]``, P(x <= c) at h = 0 that the thresholds start from (default:
            all classes alike).
    """

    def __init__(
        self,
        net: nn.Module,
        event_shape: Sequence[int],
        classes: int,
        cumulative: Tensor | None = None,
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"Ordinal: classes= came {classes}, wanted at least 2")
        self.net, self.event_shape, self.classes = net, tuple(event_shape), classes
        if cumulative is None:
            cumulative = torch.arange(1, classes).expand(*event_shape, classes - 1) / classes
        start = torch.logit(cumulative.to(torch.get_default_dtype()), eps=1e-3)
        self.first = nn.Parameter(start[..., :1].clone())
        steps = start.diff(dim=-1).clamp(min=1e-2)
        self.raw = nn.Parameter(steps + (-torch.expm1(-steps)).log())

    @staticmethod
    def takes(data: Tensor) -> bool:
        """Whether all observed entries are whole numbers from 0 to 255."""
        return Categorical.takes(data)

    @classmethod
    def build(
        cls,
        network: Network,
        event_shape: Sequence[int],
        data: Tensor | None = None,
        classes: int | None = None,
    ) -> Ordinal:
        """Make the network too; with ``data`` it starts from the class frequencies.

        C is ``classes`` or else one more than the largest class seen.
        """
        if classes is None:
            classes = max(2, number_of_classes("Ordinal", data))
        start = None if data is None else marginal.frequencies(data, classes).cumsum(-1)[..., :-1]
        return cls(network(event_shape), event_shape, classes, start)

    @property
    def thresholds(self) -> Tensor:
        """t ``[*event, C - 1]``, in increasing order."""
        return torch.cat([self.first, self.first + softplus(self.raw).cumsum(-1)], -1)

    def forward(self, *parents: Tensor) -> TorchDistribution:
        """Categorical with event ``[*event]``."""
        h = outputs(self, self.net, parents, *self.event_shape)
        below = self.thresholds - h[..., None]
        first, last = logsigmoid(below[..., :1]), logsigmoid(-below[..., -1:])
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), where nothing cancels
        high, low = below[..., 1:], below[..., :-1]
        between = logsigmoid(high) + logsigmoid(-low) + (-torch.expm1(low - high)).log()
        logits = torch.cat([first, between, last], -1)
        return independent(dist.Categorical(logits=logits), len(self.event_shape))
