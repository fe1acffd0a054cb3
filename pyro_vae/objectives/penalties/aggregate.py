"""The rate by what it is made of: mutual information, total correlation, dimension-wise KL."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from pyro_vae.objectives.particles import Particles
from pyro_vae.objectives.penalties.latent import Latent, Penalty, chosen
from pyro_vae.objectives.penalties.log_sums import log_sums
from pyro_vae.objectives.schedules import Schedule
from pyro_vae.objectives.tracing import core

__all__ = ["MutualInformation", "TotalCorrelation", "decomposition"]

# (rows B, data N) -> weights in q(z) = sum_j w_j q(z | x_j) of the draw's own row and of each other
SAMPLING: dict[str, Callable[[int, int], tuple[float, float]]] = {
    "batch": lambda b, n: (1 / b, 1 / b),
    "weighted": lambda b, n: (1 / (n * b), 1 / (n * b)),
    "stratified": lambda b, n: (1 / n, (n - 1) / (n * max(b - 1, 1))),
}


def decomposition(
    particles: Particles,
    site: str | None = None,
    sampling: str = "weighted",
    total: int | None = None,
) -> dict[str, Tensor]:
    """log q(z | x) - log p(z) at the draws as a sum of three, ``[K, B]`` nats each (Chen et al. 2018):

    * ``mutual_information``, log q(z | x) - log q(z), of x and z;
    * ``total_correlation``, log q(z) - sum_d log q(z_d), of the dimensions of z;
    * ``dimensionwise_kl``, sum_d log q(z_d) - log p(z), from the product of the marginals to the prior.

    q(z) is estimated from the B rows of a batch, and the logarithm of an estimate is biased:

    * ``"batch"``: q(z) of these rows alone. Mutual information is log B at most.
    * ``"weighted"``: the paper's minibatch-weighted sampling, which is that with 1 / (N B) for 1 / B:
      log N less in each logarithm, and the same gradient whatever N.
    * ``"stratified"``: 1 / N for the row that z was drawn from and (N - 1) / (N (B - 1)) for each of
      the others: the estimate of q(z) itself is unbiased. (The paper's code gives one of the others
      another weight, to the same expectation.)

    Both ``"batch"`` and ``"stratified"`` are exact sums if the batch is all the data, B = N.

    Args:
        site: default: the only latent.
        total: N; default: the rows of the data set that the batch was cut from.

    Raises:
        ValueError: as ``TotalCorrelation``.
    """
    latent = Latent(particles, site, "decomposition")
    own, joint, each = _log_densities(latent, sampling, total, marginals=True)
    marginals = each.sum(-1)
    return {
        "mutual_information": own - joint,
        "total_correlation": joint - marginals,
        "dimensionwise_kl": marginals - latent.log_p().sum(2),
    }


class _Part(Penalty):
    """A part of the decomposition."""

    default: str

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        sampling: str | None = None,
        total: int | None = None,
        site: str | None = None,
    ) -> None:
        super().__init__(weight, site)
        self.sampling, self.total = sampling or self.default, total
        chosen(type(self).__name__, "sampling", self.sampling, SAMPLING)


class TotalCorrelation(_Part):
    """KL(q(z) || prod_d q(z_d)), estimated from a batch by ``decomposition``.

    beta-TCVAE (Chen et al. 2018) is the elbo with weight beta - 1; with its alpha and gamma as well, the
    rate ``Beta(gamma)``, ``MutualInformation(alpha - gamma)`` and this with beta - gamma. Memory is that
    of a few ``[B, B]``, whatever D.

    Args:
        sampling: ``"weighted"`` (value off by (D - 1) log N), ``"stratified"`` or ``"batch"``.
        total: N; default: that of the batch's data set.

    Raises:
        ValueError: unknown sampling; at a call, a posterior that does not factorize over dimensions,
            rows whose latent is data, N below B.
    """

    default = "weighted"

    def estimate(self, latent: Latent) -> Tensor:
        _, joint, each = _log_densities(latent, self.sampling, self.total, marginals=True)
        return (joint - each.sum(-1)).mean()


class MutualInformation(_Part):
    """I_q(x, z) = E[log q(z | x) - log q(z)], estimated from a batch by ``decomposition``.

    InfoVAE (Zhao et al. 2019) rewards it: beta KL(q(z | x) || p) - a I is the rate ``Beta(beta)`` and
    ``MutualInformation(-a)``, and equals (beta - a) KL(q(z | x) || p) + a KL(q(z) || p). In the paper's
    letters beta = lambda and a = alpha + lambda - 1; with another divergence D in place of the last KL
    (``MMD``), the rate is ``Beta(1 - alpha)`` and D's weight alpha + lambda - 1.

    The default, ``sampling="batch"``, is log B at most, and its gradient vanishes where it gets there.
    Any posterior with a density will do.
    """

    default = "batch"

    def estimate(self, latent: Latent) -> Tensor:
        own, joint, _ = _log_densities(latent, self.sampling, self.total, marginals=False)
        return (own - joint).mean()


def _log_densities(
    latent: Latent, sampling: str, total: int | None, marginals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """log q(z | x) and log q(z) of the draws ``[K, B]``, log q(z_d) ``[K, B, D]`` (or D = 0)."""
    latent.needs_all()
    chosen(latent.who, "sampling", sampling, SAMPLING)
    if getattr(core(latent.posterior), "relaxed", False):
        raise ValueError(
            f"{latent.who}: site {latent.name!r}: a relaxed density is that of its own draw, not of "
            "other rows'; use Gumbel(density='discrete') or MMD"
        )
    own = latent.log_q()
    if marginals and not latent.factorizes(own):
        raise ValueError(
            f"{latent.who}: site {latent.name!r}: its {latent.kind()} does not factorize, and the "
            "densities of single dimensions are not known; use independent dimensions, as of "
            "Normal(...).to_event(1), or Adversarial(against='permuted')"
        )
    rows, data = own.shape[1], latent.particles.total if total is None else total
    if data < rows:
        raise ValueError(f"{latent.who}: came total={data} for a batch of {rows} rows")
    weights = SAMPLING[sampling](rows, data)
    joint, each = log_sums(latent, marginals)
    alone = own.sum(2)
    return (
        alone,
        _weighed(joint, alone, *weights),
        _weighed(each, own, *weights) if marginals else each,
    )


def _weighed(log_sum: Tensor, own: Tensor, mine: float, other: float) -> Tensor:
    """log sum_j w_j q_j from log sum_j q_j and the one term that has a weight of its own."""
    if mine == other:
        return log_sum + math.log(other)
    behind = (own - log_sum).clamp(max=0)  # a term above its sum is rounding
    return log_sum + (mine + (mine - other) * behind.expm1()).log()
