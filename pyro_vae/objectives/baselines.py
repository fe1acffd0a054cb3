"""Baselines: what is subtracted from the reward of a score, so that its gradient varies less.

A baseline of particle k must not depend on that particle's draw, since E[score] = 0 then keeps the
gradient unbiased. It may depend on the other particles, on earlier batches and on the data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.objectives.bounds import Bound

__all__ = ["Baseline", "LeaveOneOut", "MovingAverage", "NeuralBaseline"]


class Baseline(nn.Module):
    """Centres the reward of a bound."""

    def refusal(self, bound: Bound, num_particles: int) -> str | None:
        """Why this baseline is refused for ``bound``, or None."""
        return None

    def forward(
        self, bound: Bound, log_w: Tensor, args: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """The bound's reward minus the baseline ``[K, B]``, and a loss ``[]`` of the baseline's own
        parameters; ``args`` are the programs'."""
        raise NotImplementedError


class LeaveOneOut(Baseline):
    """The bound as it would be with the mean of the others' log weights in place of the particle's.

    VIMCO (Mnih & Rezende 2016) for the importance weighted bound; for the ELBO, the mean of the other
    particles' rewards. Needs two particles.
    """

    def refusal(self, bound: Bound, num_particles: int) -> str | None:
        if num_particles > 1:
            return None
        return "came num_particles=1, wanted >= 2: a particle alone leaves none to learn from"

    def forward(
        self, bound: Bound, log_w: Tensor, args: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor | None]:
        possible = log_w.isfinite()
        finite = torch.where(possible, log_w, torch.zeros_like(log_w))
        others = (possible.sum(0) - possible.long()).clamp(min=1)
        mean = (finite.sum(0) - finite) / others
        return bound(log_w) - bound.replaced(log_w, mean), None

    def __repr__(self) -> str:
        return "leave_one_out"


class MovingAverage(Baseline):
    """Exponential moving average of the rewards of earlier batches (Williams 1992), one number for
    all rows; its start at 0 is corrected for. It moves in training with gradients on.

    Args:
        decay: share of the average that a batch leaves.

    Raises:
        ValueError: ``decay`` outside [0, 1).
    """

    average: Tensor
    weight: Tensor

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"MovingAverage: came decay={decay}, wanted a number in [0, 1)")
        self.decay = decay
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))  # what the rewards so far weigh in it

    def forward(
        self, bound: Bound, log_w: Tensor, args: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor | None]:
        reward = bound.reward(log_w)
        centred = reward - self.average / self.weight.clamp(min=1 - self.decay)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                mean = reward.detach().mean().to(self.average)
                usable = mean.isfinite()  # one impossible row would spoil all that come
                kept = torch.where(usable, self.decay, 1.0).to(self.average)
                self.average.mul_(kept).add_((1 - kept) * mean.nan_to_num(0.0, 0.0, 0.0))
                self.weight.mul_(kept).add_(1 - kept)
        return centred, None

    def __repr__(self) -> str:
        return f"moving_average({self.decay:g})"


class NeuralBaseline(Baseline):
    """What a network expects of each row's bound (Mnih & Gregor 2014).

    It is trained by the squared error of the reward, in the same loop and by the same optimizer as
    the pair; what the rewards of all rows have in common is left to a moving average.

    Args:
        net: the batch (or what else is the programs' first argument) -> ``[B]`` nats. Default: an mlp
            over the values and masks of all sites, or over a bare tensor, which sees the size of its
            input when it first runs.
        decay: of the moving average.

    Raises:
        ValueError: at the first call, programs without data, a network that does not return one
            number per row.
    """

    def __init__(self, net: nn.Module | None = None, decay: float = 0.9) -> None:
        super().__init__()
        self.average = MovingAverage(decay)
        # lazy layers draw their weights when they first run: under the seed of the training
        self.net = net or nn.Sequential(
            _Flat(), nn.LazyLinear(64), nn.Tanh(), nn.LazyLinear(1), _Row()
        )

    def forward(
        self, bound: Bound, log_w: Tensor, args: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor | None]:
        centred, _ = self.average(bound, log_w, args)
        if not args:
            raise ValueError("NeuralBaseline: came programs of no arguments, wanted a batch")
        expected = self.net(args[0])
        if expected.shape != centred.shape[1:]:
            raise ValueError(
                f"NeuralBaseline: its net returned {list(expected.shape)}, wanted "
                f"{list(centred.shape[1:])}, one number per row"
            )
        # a nat more in every log weight: in the ELBO's reward, 1 / K of one
        nat = bound.reward(torch.ones_like(log_w)) - bound.reward(torch.zeros_like(log_w))
        cost = (centred.detach() - nat * expected).square().mean(0).sum()
        return centred - nat * expected.detach(), cost

    def __repr__(self) -> str:
        return "neural_baseline"


class _Flat(nn.Module):
    """Values and masks of a batch's sites as ``[B, D]``."""

    def forward(self, data: Any) -> Tensor:
        if not isinstance(data, Batch | Tensor):
            raise ValueError(
                f"NeuralBaseline: the programs' first argument came as {type(data).__name__}, wanted "
                "a Batch or a tensor; or give it a net="
            )
        if isinstance(data, Batch):
            held = [*(data[s] for s in data.sites), *(data.mask(s) for s in data.incomplete)]
        else:
            held = [data]
        dtype = torch.get_default_dtype()
        return torch.cat([tensor.reshape(len(tensor), -1).to(dtype) for tensor in held], 1)


class _Row(nn.Module):
    def forward(self, column: Tensor) -> Tensor:
        return column.squeeze(-1)
