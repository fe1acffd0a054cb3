"""Estimators: how the gradient of a bound is taken. None of them changes a bound's value.

Every gradient here is linear in per-particle terms: the bound enters through weights ``[K, B]``, so
that particles can be processed in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.objectives.baselines import Baseline, LeaveOneOut
from pyro_vae.objectives.bounds import Bound
from pyro_vae.objectives.particles import Treatment
from pyro_vae.objectives.plan import Plan

__all__ = [
    "DReG",
    "Estimator",
    "OneParticle",
    "Pathwise",
    "STL",
    "Score",
    "WakeSleep",
    "get",
]


class Estimator:
    """How gradients flow from a bound to the pair. One that owns parameters is an ``nn.Module``.

    Attributes:
        boundary: the model runs on boundary copies z' of the guide's samples, and log q(z') is taken
            with constant guide parameters, so that only the path through z reaches the guide.
        enumerates: particles are the support of discrete draws, and each counts its probability.
        two_goals: the guide follows another goal than the model, whose parameters it leaves alone.
        unpenalized: why penalties are refused, or empty.
    """

    boundary: bool = False
    enumerates: bool = False
    two_goals: bool = False
    unpenalized: str = ""

    def refusal(self, bound: Bound, num_particles: int) -> str | None:
        """Why this estimator is refused for ``bound``, or None."""
        return None

    def scores(self, site: str, reparameterized: bool) -> bool:
        """Whether a drawn site is trained through its score instead of a path."""
        return False

    def untrained(self, site: str, plan: Plan) -> str | None:
        """Why a site of the guide without ``rsample`` would not be trained, and the cure, or None."""
        if self.scores(site, False):
            return None
        return "has no rsample and would not be trained; use estimator='score'"

    def particles(self, plan: Plan, num_particles: int) -> int:
        """How many particles are run for ``num_particles``."""
        return num_particles

    def treatment(self, plan: Plan, step: Tensor, first: int, size: int) -> Treatment | None:
        """What it makes of discrete draws in a pass of ``size`` particles from the ``first`` on."""
        return None

    def weights(self, bound: Bound, log_w: Tensor) -> Tensor:
        """What each particle's gradient counts, ``[K, B]``."""
        return bound.weights(log_w)

    def path(self, bound: Bound, log_w: Tensor, beta: float | Tensor) -> Tensor | None:
        """What the gradient along the guide's path counts instead, ``[K, B]`` (None: the same)."""
        return None if bound.guide is bound else bound.guide.weights(log_w)

    def keeps_score(self, bound: Bound) -> bool:
        """Whether -log q of a site that is trained by its score keeps its own gradient, which is 0 in
        expectation where the bound is a mean over particles."""
        return not bound.guide.linear

    def reward(
        self, bound: Bound, log_w: Tensor, args: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """What multiplies each particle's score ``[K, B]``, and a loss ``[]`` of the estimator's own
        parameters; ``args`` are the programs'."""
        return bound.guide.reward(log_w), None

    def __repr__(self) -> str:
        return type(self).__name__.lower()


class Pathwise(Estimator):
    """Reparameterization gradient (Kingma & Welling 2014); every drawn site needs ``rsample``."""


class STL(Estimator):
    """Sticking the landing (Roeder et al. 2017): the path gradient without the score of q.

    Zero variance at the exact posterior. Unbiased for the ELBO only.
    """

    boundary = True

    def refusal(self, bound: Bound, num_particles: int) -> str | None:
        if bound.guide.linear:
            return None
        return "its gradient is biased for a multi-sample bound; use 'dreg'"


class DReG(Estimator):
    """Doubly reparameterized gradient (Tucker et al. 2019; hierarchical: Bauer & Mnih 2021).

    The score of q is reparameterized once more, so that the path at z' counts w - beta h. For the
    importance weighted bound that is the paper's w^2, for the ELBO w (which makes it STL).
    """

    boundary = True

    def refusal(self, bound: Bound, num_particles: int) -> str | None:
        return None if bound.guide.smooth else "its weights jump; use 'pathwise'"

    def path(self, bound: Bound, log_w: Tensor, beta: float | Tensor) -> Tensor | None:
        guide = bound.guide
        if guide is bound and guide.linear:
            return None
        return guide.weights(log_w) - beta * guide.diagonal(log_w)


class OneParticle(Estimator):
    """Pathwise gradient of one particle per row, drawn in proportion to its weight (Li & Turner
    2016, section 4.2).

    Unbiased where weights are not negative, and noisier than ``pathwise``: all particles are run,
    and a step costs the same.
    """

    def refusal(self, bound: Bound, num_particles: int) -> str | None:
        if bound.guide is not bound:
            return "one draw can't follow two sets of weights; use 'pathwise'"
        return None if bound.positive else "its weights are no probabilities; use 'pathwise'"

    def weights(self, bound: Bound, log_w: Tensor) -> Tensor:
        w = bound.weights(log_w)
        gumbel = -(-torch.rand_like(w).log()).log()
        drawn = (w.log() + gumbel).argmax(0, keepdim=True)
        return torch.zeros_like(w).scatter(0, drawn, w.sum(0, keepdim=True))

    def __repr__(self) -> str:
        return "one_particle"


class Score(Estimator, nn.Module):
    """Score function gradient (REINFORCE) for the sites without ``rsample``, pathwise for the rest.

    Args:
        all_sites: take the score for reparameterized sites too.
        baseline: what is subtracted from the reward. With ``LeaveOneOut()`` this is VIMCO (Mnih &
            Rezende 2016), ``estimator="vimco"``.
    """

    def __init__(self, all_sites: bool = False, baseline: Baseline | None = None) -> None:
        super().__init__()
        self.all_sites, self.baseline = all_sites, baseline

    def refusal(self, bound: Bound, num_particles: int) -> str | None:
        return self.baseline.refusal(bound.guide, num_particles) if self.baseline else None

    def scores(self, site: str, reparameterized: bool) -> bool:
        return self.all_sites or not reparameterized

    def reward(
        self, bound: Bound, log_w: Tensor, args: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor | None]:
        if self.baseline is None:
            return super().reward(bound, log_w, args)
        centred, cost = self.baseline(bound.guide, log_w, args)
        return centred, cost

    def __repr__(self) -> str:
        parts = ["all"] * self.all_sites + [repr(part) for part in [self.baseline] if part]
        return f"score({', '.join(parts)})" if parts else "score"


class WakeSleep(Estimator):
    """Reweighted wake-sleep with the wake update of the guide (Bornschein & Bengio 2015).

    The model follows the bound. The guide follows sum_k w_k grad log q(z_k) with self-normalised
    importance weights w, at every site by its score: no gradient of the bound, but an estimate, biased
    by O(1 / K), of minus the gradient of KL(p(z | x) || q(z | x)), which becomes less noisy as K grows
    (Le et al. 2019). On the rows of the data, without the sleep phase. What the guide shares with the
    model follows the model's bound alone.
    """

    two_goals = True
    unpenalized = "its guide follows no loss that a penalty could be added to"

    def refusal(self, bound: Bound, num_particles: int) -> str | None:
        if num_particles == 1:
            return "came num_particles=1, wanted >= 2: one particle has weight 1 wherever it is"
        if bound.guide is not bound:
            return "it has an update of its own for the guide; use one bound"
        if bound.linear:
            return "its guide follows importance weights, the model would not; use the iwae"
        return None

    def scores(self, site: str, reparameterized: bool) -> bool:
        return True

    def keeps_score(self, bound: Bound) -> bool:
        return False

    def reward(
        self, bound: Bound, log_w: Tensor, args: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor | None]:
        return torch.softmax(log_w, 0), None

    def __repr__(self) -> str:
        return "rws"


BY_NAME: dict[str, Callable[[], Estimator]] = {
    "pathwise": Pathwise,
    "stl": STL,
    "dreg": DReG,
    "score": Score,
    "vimco": lambda: Score(baseline=LeaveOneOut()),
    "rws": WakeSleep,
    "one_particle": OneParticle,
}


def get(estimator: str | Estimator) -> Estimator:
    """An estimator by name or as it is.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(estimator, Estimator):
        return estimator
    if estimator not in BY_NAME:
        raise ValueError(f"estimator: came {estimator!r}, wanted one of {sorted(BY_NAME)}")
    return BY_NAME[estimator]()
