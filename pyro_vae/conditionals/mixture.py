"""A mixture with a path: its components share the particles of a row between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

__all__ = ["StratifiedMixture"]


class StratifiedMixture(TorchDistribution):
    """Σ_m q_m / n over the n components that are allowed in a row, by systematic draws.

    Of K particles (the dims that an expansion or a sample shape puts to the left) number k belongs to
    component ⌊(k + u) n / K⌋ of those allowed, u uniform on [0, 1) and one for each row: K a multiple
    of n gives every component K / n particles in turn (the strata of MMVAE, Shi et al. 2019,
    arXiv:1911.03393), and for any K the mean over particles of any function has the expectation of
    K independent draws. Given its component a particle moves with that component's parameters, and
    the weights are fixed, so that the mixture is reparameterized.

    ``drawn_log_prob`` is the density of the component that a value was drawn from: -log q_mix =
    log r_m - log q_m + log n, of which estimators without a score drop the second term alone, the
    responsibility r_m keeps its gradient.

    Args:
        components: batch shape ``[..., M]``, reparameterized.
        allowed: bool ``[..., M]``, at least one in a row (default: all). Those that are not allowed
            must still have finite parameters.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(
        self,
        components: TorchDistribution,
        allowed: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        *lead, number = components.batch_shape
        if not components.has_rsample:
            raise ValueError(
                f"StratifiedMixture: came components {type(components).__name__} without rsample, "
                "wanted reparameterized ones"
            )
        if allowed is None:
            allowed = torch.ones((), dtype=torch.bool, device=components.mean.device)
        if allowed.dim() and allowed.shape[-1] not in (1, number):
            raise ValueError(
                f"StratifiedMixture: allowed= came {list(allowed.shape)}, wanted "
                f"{list(components.batch_shape)}"
            )
        self.components = components
        self.allowed = allowed.expand(components.batch_shape)
        self._rows = len(lead)  # dims that are rows; what an expansion adds is particles
        self._drawn: Tensor | None = None
        super().__init__(torch.Size(lead), components.event_shape, validate_args=False)
        self._validate_args = bool(validate_args)

    @property
    def support(self) -> Any:
        return self.components.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> StratifiedMixture:
        shape = torch.Size((*batch_shape, self.allowed.shape[-1]))
        new = StratifiedMixture(self.components.expand(shape), self.allowed.expand(shape))
        new._rows = self._rows
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """``[*sample_shape, ..., *event]``; remembers which component each draw came from."""
        every = self.components.rsample(torch.Size(sample_shape))
        shape = torch.Size((*sample_shape, *self.batch_shape))
        particles, rows = shape[: len(shape) - self._rows], shape[len(shape) - self._rows :]
        number = math.prod(particles)
        place = torch.arange(number, device=every.device, dtype=every.dtype).reshape(
            (*particles, *[1] * len(rows))
        )
        allowed = self.allowed.expand((*shape, self.allowed.shape[-1]))
        many = allowed.sum(-1)
        start = torch.rand(rows, device=every.device, dtype=every.dtype)
        turn = ((place + start) * many / number).long().minimum(many - 1)
        chosen = allowed & (allowed.cumsum(-1) - 1 == turn.unsqueeze(-1))
        self._drawn = chosen.long().argmax(-1)
        return self._of_component(every, self._drawn)

    def log_prob(self, value: Tensor) -> Tensor:
        """log of the mixture's density, ``[...]``."""
        terms = self._log_probs(value)
        many = self.allowed.sum(-1).to(terms.dtype)
        return terms.masked_fill(~self.allowed, -math.inf).logsumexp(-1) - many.log()

    def drawn_log_prob(self, value: Tensor) -> Tensor:
        """log of the density of the component from which the last draw came, ``[...]``.

        Raises:
            RuntimeError: before the first draw.
        """
        if self._drawn is None:
            raise RuntimeError("StratifiedMixture: drawn_log_prob came before rsample")
        terms = self._log_probs(value)
        return terms.gather(-1, self._drawn.unsqueeze(-1).expand((*terms.shape[:-1], 1))).squeeze(
            -1
        )

    def as_drawn(self, other: StratifiedMixture) -> StratifiedMixture:
        """This distribution, with the components from which another's last draw came."""
        self._drawn = other._drawn
        return self

    @property
    def mean(self) -> Tensor:
        return self._average(self.components.mean)

    @property
    def variance(self) -> Tensor:
        second = self._average(self.components.variance + self.components.mean.square())
        return second - self.mean.square()

    def _average(self, of_components: Tensor) -> Tensor:
        weights = self.allowed / self.allowed.sum(-1, keepdim=True)
        event = self.components.event_dim
        weights = weights[(...,) + (None,) * event].to(of_components.dtype)
        return (weights * of_components).sum(-1 - event)

    def _log_probs(self, value: Tensor) -> Tensor:
        return self.components.log_prob(value.unsqueeze(-1 - self.components.event_dim))

    def _of_component(self, every: Tensor, which: Tensor) -> Tensor:
        """``[..., M, *event] -> [..., *event]``."""
        event: Sequence[int] = self.components.event_shape
        index = which[(..., None) + (None,) * len(event)].expand((*which.shape, 1, *event))
        return every.gather(-1 - len(event), index).squeeze(-1 - len(event))
