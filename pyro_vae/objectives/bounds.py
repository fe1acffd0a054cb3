"""Bounds: maps from log weights ``[K, B]`` to ``[B]``, with their weights in closed form.

With w = d bound / d log w and h the diagonal of d w / d log w, an estimator needs w (what each
particle's gradient counts), h / w (DReG's factor) and the reward of the score function. A smooth
bound may leave all three to autodiff; the closed forms here are cheaper and never divide by zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Bound", "Elbo", "Renyi"]


class Bound:
    """A differentiable reduction of log weights over particles. Wrap it to change it.

    Attributes:
        linear: the bound is a mean over particles (global latents, analytic KL, STL ask for it).
        smooth: the weights are a differentiable function of log w (DReG asks for it).
        guarantee: what the expectation is at finite K, ``"lower bound"`` or ``"no bound"``.
    """

    linear: bool = False
    smooth: bool = True
    guarantee: str = "no bound"

    def __call__(self, log_w: Tensor) -> Tensor:
        """``[K, B] -> [B]`` in nats."""
        raise NotImplementedError

    def weights(self, log_w: Tensor) -> Tensor:
        """w = d bound / d log w, ``[K, B]``."""
        with torch.enable_grad():
            log_w = log_w.detach().requires_grad_()
            return torch.autograd.grad(self(log_w).sum(), log_w)[0]

    def curvature(self, log_w: Tensor) -> Tensor:
        """h / w with h_k = d w_k / d log w_k, ``[K, B]`` (0 where w is: no gradient arrives there)."""
        with torch.enable_grad():
            log_w = log_w.detach().requires_grad_()
            w = torch.autograd.grad(self(log_w).sum(), log_w, create_graph=True)[0]
            if not w.requires_grad:  # constant weights
                return torch.zeros_like(w)
            h = [
                torch.autograd.grad(w[k].sum(), log_w, retain_graph=True)[0][k]
                for k in range(len(w))
            ]
        w = w.detach()
        return torch.where(w == 0, torch.zeros_like(w), torch.stack(h) / w)

    def reward(self, log_w: Tensor) -> Tensor:
        """What multiplies particle k's score so that the score term is unbiased, ``[K, B]``."""
        return self(log_w).expand_as(log_w)

    def __repr__(self) -> str:
        return type(self).__name__.lower()


class Elbo(Bound):
    """Evidence lower bound, E[log w], estimated by the mean over particles (Kingma & Welling 2014)."""

    linear = True
    guarantee = "lower bound"

    def __call__(self, log_w: Tensor) -> Tensor:
        return log_w.mean(0)

    def weights(self, log_w: Tensor) -> Tensor:
        return torch.full_like(log_w, 1 / len(log_w))

    def curvature(self, log_w: Tensor) -> Tensor:
        return torch.zeros_like(log_w)

    def reward(self, log_w: Tensor) -> Tensor:
        return log_w / len(log_w)  # the other particles' terms are independent of particle k


class Renyi(Bound):
    """Variational Rényi bound, ``1/(1 - alpha) log 1/K sum_k w_k^(1 - alpha)``.

    ``alpha=0`` is the importance weighted bound (Burda et al. 2016), ``alpha=-inf`` VR-max (Li &
    Turner 2016), ``alpha -> 1`` the ELBO (use ``Elbo``). A lower bound in expectation for every
    ``alpha >= 0``; for ``alpha < 0`` no bound at finite K > 1.

    Raises:
        ValueError: ``alpha`` is 1, NaN or +inf.
    """

    def __init__(self, alpha: float = 0.0) -> None:
        if alpha == 1:
            raise ValueError("Renyi: alpha=1 is the ELBO; use Elbo()")
        if math.isnan(alpha) or alpha == math.inf:
            raise ValueError(f"Renyi: came alpha={alpha}, wanted a number or -inf")
        self.alpha = float(alpha)
        self.smooth = alpha > -math.inf
        self.guarantee = "lower bound" if alpha >= 0 else "no bound"

    def __call__(self, log_w: Tensor) -> Tensor:
        if not self.smooth:
            return log_w.max(0).values
        power = 1 - self.alpha
        return (torch.logsumexp(power * log_w, 0) - math.log(len(log_w))) / power

    def weights(self, log_w: Tensor) -> Tensor:
        if not self.smooth:
            first = torch.zeros_like(log_w)
            return first.scatter(0, log_w.argmax(0, keepdim=True), 1.0)
        return torch.softmax((1 - self.alpha) * log_w, 0)

    def curvature(self, log_w: Tensor) -> Tensor:
        return (1 - self.alpha) * (1 - self.weights(log_w))

    def __repr__(self) -> str:
        names = {0.0: "iwae", -math.inf: "vr_max"}
        return names.get(self.alpha, f"renyi({self.alpha:g})")
