"""Estimators: how the gradient of a bound is taken. None of them changes a bound's value.

Every gradient here is linear in per-particle terms: the bound enters through its weights w
``[K, B]``, so that particles can be processed in chunks.
"""

from __future__ import annotations

from torch import Tensor

from pyro_vae.objectives.bounds import Bound

__all__ = ["DReG", "Estimator", "Pathwise", "STL", "Score", "get"]


class Estimator:
    """How gradients flow from a bound to the guide.

    Attributes:
        boundary: the model runs on boundary copies z' of the guide's samples, and log q(z') is taken
            with constant guide parameters, so that only the path through z reaches the guide.
    """

    boundary: bool = False

    def refusal(self, bound: Bound) -> str | None:
        """Why this estimator is refused for ``bound``, or None."""
        return None

    def scores(self, site: str, reparameterized: bool) -> bool:
        """Whether a drawn site is trained through its score instead of a path."""
        return False

    def factor(self, bound: Bound, log_w: Tensor, beta: float | Tensor) -> Tensor | None:
        """What multiplies the gradient that arrives at z', ``[K, B]`` (None: 1)."""
        return None

    def __repr__(self) -> str:
        return type(self).__name__.lower()


class Pathwise(Estimator):
    """Reparameterization gradient (Kingma & Welling 2014); every drawn site needs ``rsample``."""


class STL(Estimator):
    """Sticking the landing (Roeder et al. 2017): the path gradient without the score of q.

    Zero variance at the exact posterior. Unbiased for the ELBO only.
    """

    boundary = True

    def refusal(self, bound: Bound) -> str | None:
        if bound.linear:
            return None
        return "its gradient is biased for a multi-sample bound; use 'dreg'"


class DReG(Estimator):
    """Doubly reparameterized gradient (Tucker et al. 2019; hierarchical: Bauer & Mnih 2021).

    The score of q is reparameterized once more, which multiplies the path gradient at z' by
    1 - beta h / w. For the importance weighted bound that is w (the paper's w^2 weighting), for the
    ELBO 1 (which makes it STL).
    """

    boundary = True

    def refusal(self, bound: Bound) -> str | None:
        return None if bound.smooth else "its weights jump; use 'pathwise'"

    def factor(self, bound: Bound, log_w: Tensor, beta: float | Tensor) -> Tensor | None:
        return None if bound.linear else 1 - beta * bound.curvature(log_w)


class Score(Estimator):
    """Score function gradient (REINFORCE) for the sites without ``rsample``, pathwise for the rest.

    Args:
        all_sites: take the score for reparameterized sites too.
    """

    def __init__(self, all_sites: bool = False) -> None:
        self.all_sites = all_sites

    def scores(self, site: str, reparameterized: bool) -> bool:
        return self.all_sites or not reparameterized


_BY_NAME = {"pathwise": Pathwise, "stl": STL, "dreg": DReG, "score": Score}


def get(estimator: str | Estimator) -> Estimator:
    """An estimator by name or as it is.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(estimator, Estimator):
        return estimator
    if estimator not in _BY_NAME:
        raise ValueError(f"estimator: came {estimator!r}, wanted one of {sorted(_BY_NAME)}")
    return _BY_NAME[estimator]()
