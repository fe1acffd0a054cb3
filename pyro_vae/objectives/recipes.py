"""One short function per paper: a choice of parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from pyro_vae.objectives.baselines import LeaveOneOut
from pyro_vae.objectives.bounds import (
    Cubo,
    Elbo,
    Jackknife,
    Miwae,
    Mix,
    Renyi,
    Split,
    Thermodynamic,
)
from pyro_vae.objectives.enumeration import Enumerate
from pyro_vae.objectives.estimators import Estimator, Score, WakeSleep
from pyro_vae.objectives.objective import Objective
from pyro_vae.objectives.penalties import (
    DIP,
    MMD,
    Adversarial,
    ConditionalBottleneck,
    ExpertKL,
    MutualInformation,
    Penalty,
    Sinkhorn,
    SlicedWasserstein,
    TotalCorrelation,
)
from pyro_vae.objectives.rates import Analytic, Beta, Capacity, FreeBits, MonteCarlo
from pyro_vae.objectives.relaxed import Gumbel, StraightThrough
from pyro_vae.objectives.schedules import Schedule
from pyro_vae.objectives.views import Sum, Term, only

__all__ = [  # in the order in which they are listed to users
    "elbo",
    "mean_field",
    "iwae",
    "renyi",
    "miwae",
    "ciwae",
    "piwae",
    "tvo",
    "jackknife",
    "chi",
    "vimco",
    "rws",
    "gumbel",
    "concrete",
    "straight_through",
    "enumerated",
    "beta_vae",
    "capacity",
    "free_bits",
    "info_vae",
    "info_mi",
    "wae_mmd",
    "aae",
    "swae",
    "sinkhorn",
    "beta_tcvae",
    "factor_vae",
    "dip_vae",
    "mvae",
    "jmvae",
    "mvtcae",
]


# ---------------------------------------------------------------------------------------------
# Bounds


def elbo(
    num_particles: int = 1, estimator: str | Estimator = "pathwise", **parts: Any
) -> Objective:
    """Evidence lower bound, E_q[log p(x, z) - log q(z | x)] (Kingma & Welling 2014).

    ``estimator="stl"`` drops the score of q (Roeder et al. 2017), ``"score"`` trains discrete
    sites.
    """
    return Objective(Elbo(), estimator, num_particles=num_particles, **parts)


def mean_field(
    num_particles: int = 1, estimator: str | Estimator = "pathwise", **parts: Any
) -> Objective:
    """Evidence lower bound, its KL in closed form wherever one is known (Kingma & Welling 2014)."""
    return Objective(Elbo(), estimator, Analytic(), num_particles=num_particles, **parts)


def iwae(num_particles: int, estimator: str | Estimator = "pathwise", **parts: Any) -> Objective:
    """Importance weighted bound, E[log 1/K sum_k w_k] (Burda et al. 2016).

    ``estimator="dreg"`` is IWAE-DReG (Tucker et al. 2019).
    """
    return Objective(Renyi(0.0), estimator, num_particles=num_particles, **parts)


def renyi(
    alpha: float, num_particles: int, estimator: str | Estimator = "pathwise", **parts: Any
) -> Objective:
    """Variational Rényi bound (Li & Turner 2016); ``alpha=float("-inf")`` is VR-max.

    No bound at finite K for ``alpha < 0``. ``estimator="one_particle"`` is the paper's stochastic
    choice of the particle that is differentiated.
    """
    return Objective(Renyi(alpha), estimator, num_particles=num_particles, **parts)


def miwae(
    groups: int, num_particles: int, estimator: str | Estimator = "pathwise", **parts: Any
) -> Objective:
    """Mean of M importance weighted bounds with K / M particles each (Rainforth et al. 2018)."""
    return Objective(Miwae(groups), estimator, num_particles=num_particles, **parts)


def ciwae(
    beta: float, num_particles: int, estimator: str | Estimator = "pathwise", **parts: Any
) -> Objective:
    """beta times the ELBO plus 1 - beta times the importance weighted bound (Rainforth et al. 2018)."""
    bound = Mix((beta, Elbo()), (1 - beta, Renyi(0.0)))
    return Objective(bound, estimator, num_particles=num_particles, **parts)


def piwae(
    groups: int, num_particles: int, estimator: str | Estimator = "pathwise", **parts: Any
) -> Objective:
    """The model follows the importance weighted bound of K particles, the guide the mean of M with
    K / M each (Rainforth et al. 2018)."""
    bound = Split(Renyi(0.0), Miwae(groups))
    return Objective(bound, estimator, num_particles=num_particles, **parts)


def tvo(
    num_particles: int,
    partition: int | Sequence[float] = 5,
    first: float = 0.08,
    right: bool = False,
    estimator: str | Estimator = "pathwise",
    **parts: Any,
) -> Objective:
    """Thermodynamic variational objective: left Riemann sum of E_b[log w] over b from 0 to 1 (Masrani
    et al. 2019), below the importance weighted bound; the right sum is no bound."""
    bound = Thermodynamic(partition, first, right)
    return Objective(bound, estimator, num_particles=num_particles, **parts)


def jackknife(
    num_particles: int, order: int = 1, estimator: str | Estimator = "pathwise", **parts: Any
) -> Objective:
    """Importance weighted bounds of subsets combined so that their bias cancels up to an order
    (Nowozin 2018); no bound."""
    return Objective(Jackknife(order), estimator, num_particles=num_particles, **parts)


def chi(
    num_particles: int, n: float = 2.0, estimator: str | Estimator = "pathwise", **parts: Any
) -> Objective:
    """The guide descends the chi upper bound CUBO_n (Dieng et al. 2017), the model follows the
    importance weighted bound.

    At finite K CUBO is no bound; its guide covers the posterior rather than a mode of it. The paper
    descends exp(n CUBO), which is unbiased and varies more. Raise K until weights are nearly even: with
    two particles the descent leaves the posterior behind.

    Raises:
        ValueError: one particle, whose CUBO is the ELBO, which the guide would descend.
    """
    if num_particles == 1:
        raise ValueError("chi: came num_particles=1, wanted many: CUBO is the ELBO there")
    bound = Split(Renyi(0.0), Mix((-1.0, Cubo(n))))
    return Objective(bound, estimator, num_particles=num_particles, **parts)


# ---------------------------------------------------------------------------------------------
# Estimators with a name of their own


def vimco(num_particles: int, **parts: Any) -> Objective:
    """Importance weighted bound, discrete sites by their score with leave-one-out baselines (Mnih &
    Rezende 2016)."""
    return iwae(num_particles, Score(baseline=LeaveOneOut()), **parts)


def rws(num_particles: int, **parts: Any) -> Objective:
    """Reweighted wake-sleep: the model by the importance weighted bound, the guide by the wake update
    (Bornschein & Bengio 2015)."""
    return iwae(num_particles, WakeSleep(), **parts)


def gumbel(
    temperature: float | Schedule = 0.5, hard: bool = False, num_particles: int = 1, **parts: Any
) -> Objective:
    """ELBO of discrete latents along relaxed draws, their KL that of the discrete distributions (Jang
    et al. 2017); ``hard`` is straight-through Gumbel. Biased."""
    return mean_field(num_particles, Gumbel(temperature, hard), **parts)


def concrete(
    temperature: float | Schedule = 0.5, num_particles: int = 1, **parts: Any
) -> Objective:
    """ELBO of the relaxed model: discrete latents and their prior both relaxed (Maddison et al.
    2017)."""
    return elbo(num_particles, Gumbel(temperature), **parts)


def straight_through(num_particles: int = 1, **parts: Any) -> Objective:
    """ELBO of discrete latents, the gradient of a draw taken for that of its probabilities (Bengio et
    al. 2013). Biased."""
    return mean_field(num_particles, StraightThrough(), **parts)


def enumerated(limit: int = 1024, **parts: Any) -> Objective:
    """ELBO of discrete latents summed over all their values, exact; up to ``limit`` of them."""
    return elbo(1, Enumerate(limit), **parts)


# ---------------------------------------------------------------------------------------------
# Rates


def beta_vae(
    beta: float | Schedule | Mapping[str, float | Schedule],
    num_particles: int = 1,
    estimator: str | Estimator = "pathwise",
    analytic: bool = False,
    **parts: Any,
) -> Objective:
    """ELBO with its rate times beta (Higgins et al. 2017); with ``schedules.linear(n)``, KL warm-up
    over n steps (Bowman et al. 2016)."""
    rate = Beta(beta, Analytic() if analytic else MonteCarlo())
    return Objective(Elbo(), estimator, rate, num_particles=num_particles, **parts)


def capacity(
    capacity: float | Schedule,
    gamma: float | Schedule,
    num_particles: int = 1,
    estimator: str | Estimator = "pathwise",
    **parts: Any,
) -> Objective:
    """ELBO whose rate is held at a capacity of C nats, gamma |KL - C| (Burgess et al. 2018)."""
    rate = Capacity(capacity, gamma)
    return Objective(Elbo(), estimator, rate, num_particles=num_particles, **parts)


def free_bits(
    nats: float | Schedule | Mapping[str, float | Schedule],
    per: str | Mapping[str, Sequence[str]] = "dimension",
    over: str = "batch",
    num_particles: int = 1,
    estimator: str | Estimator = "pathwise",
    **parts: Any,
) -> Objective:
    """ELBO that gains nothing from a rate below ``nats`` per dimension, site or group of sites (Kingma
    et al. 2016)."""
    rate = FreeBits(nats, per, over)
    return Objective(Elbo(), estimator, rate, num_particles=num_particles, **parts)


# ---------------------------------------------------------------------------------------------
# Terms on the aggregate posterior of a latent: ``site``, where there are several. Those beside it keep
# their rate as it is.


def info_vae(
    alpha: float = 0.0,
    divergence: float = 1000.0,
    kernel: str = "rbf",
    num_particles: int = 1,
    estimator: str | Estimator = "pathwise",
    site: str | None = None,
    **parts: Any,
) -> Objective:
    """InfoVAE, also MMD-VAE: ELBO with 1 - alpha times its rate, plus ``divergence`` times
    MMD(q(z), p(z)) (Zhao et al. 2019, whose alpha + lambda - 1 that is)."""
    rate = _rate(1.0 - alpha, site)
    parts = _penalized(parts, MMD(divergence, kernel, site=site))
    return Objective(Elbo(), estimator, rate, num_particles=num_particles, **parts)


def info_mi(
    alpha: float,
    beta: float = 1.0,
    num_particles: int = 1,
    estimator: str | Estimator = "pathwise",
    site: str | None = None,
    **parts: Any,
) -> Objective:
    """InfoVAE in the form beta KL - alpha I(x, z) (Zhao et al. 2019), the mutual information estimated
    from the batch: at most log B."""
    parts = _penalized(parts, MutualInformation(-alpha, site=site))
    return Objective(Elbo(), estimator, _rate(beta, site), num_particles=num_particles, **parts)


def wae_mmd(
    weight: float | Schedule = 1000.0,
    kernel: str = "imq",
    num_particles: int = 1,
    estimator: str | Estimator = "pathwise",
    site: str | None = None,
    **parts: Any,
) -> Objective:
    """Wasserstein autoencoder: distortion plus ``weight`` times MMD(q(z), p(z)), no rate (Tolstikhin et
    al. 2018). No bound."""
    parts = _penalized(parts, MMD(weight, kernel, site=site))
    return Objective(Elbo(), estimator, _rate(0.0, site), num_particles=num_particles, **parts)


def aae(
    weight: float | Schedule = 1.0,
    hidden: Sequence[int] = (200, 200),
    num_particles: int = 1,
    estimator: str | Estimator = "pathwise",
    site: str | None = None,
    **parts: Any,
) -> Objective:
    """Adversarial autoencoder, also WAE-GAN: distortion plus ``weight`` times KL(q(z) || p(z)) by a
    critic, no rate (Makhzani et al. 2016). No bound."""
    parts = _penalized(parts, Adversarial(_critic(hidden), weight, site=site))
    return Objective(Elbo(), estimator, _rate(0.0, site), num_particles=num_particles, **parts)


def swae(
    weight: float | Schedule = 10.0,
    projections: int = 50,
    num_particles: int = 1,
    estimator: str | Estimator = "pathwise",
    site: str | None = None,
    **parts: Any,
) -> Objective:
    """Sliced Wasserstein autoencoder: distortion plus ``weight`` times the sliced Wasserstein distance
    of q(z) and p(z), no rate (Kolouri et al. 2019). No bound."""
    parts = _penalized(parts, SlicedWasserstein(weight, projections, site=site))
    return Objective(Elbo(), estimator, _rate(0.0, site), num_particles=num_particles, **parts)


def sinkhorn(
    weight: float | Schedule = 10.0,
    epsilon: float = 0.05,
    num_particles: int = 1,
    estimator: str | Estimator = "pathwise",
    site: str | None = None,
    **parts: Any,
) -> Objective:
    """Sinkhorn autoencoder: distortion plus ``weight`` times the Sinkhorn divergence of q(z) and p(z),
    no rate (Patrini et al. 2019). No bound."""
    parts = _penalized(parts, Sinkhorn(weight, epsilon, site=site))
    return Objective(Elbo(), estimator, _rate(0.0, site), num_particles=num_particles, **parts)


def beta_tcvae(
    beta: float,
    alpha: float = 1.0,
    gamma: float = 1.0,
    sampling: str = "weighted",
    num_particles: int = 1,
    estimator: str | Estimator = "pathwise",
    site: str | None = None,
    **parts: Any,
) -> Objective:
    """ELBO whose rate is weighed in parts: alpha I(x, z) + beta TC(z) + gamma times the KL of each
    dimension, TC estimated from the batch (Chen et al. 2018)."""
    terms: list[Penalty] = [TotalCorrelation(beta - gamma, sampling, site=site)]
    if alpha != gamma:
        terms.append(MutualInformation(alpha - gamma, sampling, site=site))
    parts = _penalized(parts, *terms)
    return Objective(Elbo(), estimator, _rate(gamma, site), num_particles=num_particles, **parts)


def factor_vae(
    gamma: float | Schedule,
    hidden: Sequence[int] = (1000, 1000, 1000, 1000, 1000),
    num_particles: int = 1,
    estimator: str | Estimator = "pathwise",
    site: str | None = None,
    **parts: Any,
) -> Objective:
    """ELBO minus gamma times the total correlation of q(z), which a critic estimates (Kim & Mnih
    2018)."""
    parts = _penalized(parts, Adversarial(_critic(hidden), gamma, against="permuted", site=site))
    return Objective(Elbo(), estimator, num_particles=num_particles, **parts)


def dip_vae(
    offdiagonal: float | Schedule,
    diagonal: float | Schedule | None = None,
    kind: str = "II",
    num_particles: int = 1,
    estimator: str | Estimator = "pathwise",
    site: str | None = None,
    **parts: Any,
) -> Objective:
    """ELBO whose posterior means (kind I) or aggregate posterior (kind II) are drawn towards
    uncorrelated dimensions of variance 1 (Kumar et al. 2018)."""
    parts = _penalized(parts, DIP(offdiagonal, diagonal, kind, site=site))
    return Objective(Elbo(), estimator, num_particles=num_particles, **parts)


# ---------------------------------------------------------------------------------------------
# Several modalities


def mvae(
    sites: Sequence[str],
    beta: float | Schedule = 1.0,
    num_particles: int = 1,
    estimator: str | Estimator = "pathwise",
    **parts: Any,
) -> Sum:
    """ELBO of all sites together plus that of each of them alone, ``sites=('x', 'y')``, the KL in closed
    form (Wu & Goodman 2018). No bound, but a sum of them.

    The paper adds random subsets for more than two sites; write those as ``Term``s of a ``Sum``.
    """
    if isinstance(sites, str):
        raise ValueError(f"mvae: came sites={sites!r}, wanted several: sites=('x', 'y')")
    loss = beta_vae(beta, num_particles, estimator, analytic=True, **parts)
    return Sum([loss, *(Term(loss, 1.0, only(site)) for site in sites)])


def jmvae(
    alpha: float | Schedule = 0.1,
    beta: float | Schedule = 1.0,
    num_particles: int = 1,
    estimator: str | Estimator = "pathwise",
    **parts: Any,
) -> Objective:
    """ELBO of a joint posterior, minus alpha times its KL to the surrogate of each site (Suzuki et al.
    2017), which ``pairs.multimodal(guide="joint")`` has."""
    parts = _penalized(parts, ExpertKL(alpha))
    return beta_vae(beta, num_particles, estimator, analytic=True, **parts)


def mvtcae(
    alpha: float,
    beta: float | Schedule = 1.0,
    num_particles: int = 1,
    estimator: str | Estimator = "pathwise",
    **parts: Any,
) -> Objective:
    """Total correlation objective of a product of experts (Hwang et al. 2021): of the n modalities that
    a row has, (n - alpha) / n times the log-likelihood, minus beta times (1 - alpha) KL(q || p) and
    alpha / n times the KL to each expert; all of it divided by the first factor, so that alpha = 0, and
    every row of one modality, is beta-VAE.

    Raises:
        ValueError: alpha outside [0, 1].
    """
    parts = _penalized(parts, ConditionalBottleneck(alpha, beta))
    return beta_vae(beta, num_particles, estimator, analytic=True, **parts)


def _rate(beta: float, site: str | None) -> Beta:
    """Of one latent alone, or of all."""
    return Beta(beta if site is None else {site: beta})


def _penalized(parts: Mapping[str, Any], *penalties: Penalty | ExpertKL) -> dict[str, Any]:
    return {**parts, "penalties": (*penalties, *parts.get("penalties", ()))}


def _critic(hidden: Sequence[int]) -> nn.Module:
    """``[n, D] -> [n, 1]``, its weights drawn when it first runs: under the seed of the training."""
    layers = [layer for size in hidden for layer in (nn.LazyLinear(size), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers, nn.LazyLinear(1))
