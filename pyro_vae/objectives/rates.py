"""Rates: what weighs log q - log p(z) inside a bound, site by site.

A rate maps particles to ``site -> [K, B, *rest]`` (nats, elementwise where it factorizes) and says
with which weight each site's log q enters log w, which DReG must know.

A rate that is a function f of a mean m over the pass (free bits, capacity) is written as its tangent:
each row keeps its own term, times f'(m), plus what is left of f. So rows add up to B f(m) with the
gradient of that, and row weights and scores still meet each row's own term.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import add, or_

import torch
from torch import Tensor

from pyro_vae.objectives import schedules
from pyro_vae.objectives.particles import Particles
from pyro_vae.objectives.plan import counted
from pyro_vae.objectives.schedules import Schedule, not_negative, shown
from pyro_vae.objectives.tracing import core

__all__ = ["Analytic", "Balance", "Beta", "Capacity", "FreeBits", "MonteCarlo", "Rate"]


class Rate:
    """The weighed sum of log q - log p(z). Wrap a rate to change it.

    Attributes:
        analytic: log q is integrated out at some site (no bound inside a nonlinear bound).
        coupled: a term depends on the other rows or particles, nonlinearly, so that it is unbiased
            in the draws only as far as the rate inside is analytic.
    """

    analytic: bool = False
    coupled: bool = False

    def __call__(self, particles: Particles, step: Tensor) -> dict[str, Tensor]:
        """site -> nats ``[K, B, *rest]`` (``[K, *rest]`` outside the rows)."""
        raise NotImplementedError

    def betas(self, particles: Particles, step: Tensor) -> dict[str, float | Tensor]:
        """site -> weight of log q in log w (0 where the KL is analytic); not asked of a coupled rate,
        which no nonlinear bound takes."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return type(self).__name__.lower()


class MonteCarlo(Rate):
    """log q - log p at the draws."""

    def __call__(self, particles: Particles, step: Tensor) -> dict[str, Tensor]:
        rate = dict(particles.posterior)
        for site, prior in particles.prior.items():
            rate[site] = _subtract(rate[site], prior) if site in rate else -prior
        return rate

    def betas(self, particles: Particles, step: Tensor) -> dict[str, float | Tensor]:
        return dict.fromkeys(particles.posterior, 1.0)


class Analytic(Rate):
    """KL(q || p) in closed form where one is known and the order of the sites allows it.

    For a site s the model's latents before s must precede s in the guide as well; everywhere else
    the rate is Monte Carlo, and the plan's notes say why.
    """

    analytic = True

    def __call__(self, particles: Particles, step: Tensor) -> dict[str, Tensor]:
        rate = MonteCarlo()(particles, step)
        return rate | {site: particles.kl(site) for site in particles.analytic}

    def betas(self, particles: Particles, step: Tensor) -> dict[str, float | Tensor]:
        return MonteCarlo().betas(particles, step) | dict.fromkeys(particles.analytic, 0.0)


class Beta(Rate):
    """A rate times beta (Higgins et al. 2017); a schedule of beta is KL warm-up.

    Args:
        beta: a number or schedule for all sites, or ``site -> number or schedule`` (1 elsewhere).
        rate: what is weighed.

    Raises:
        ValueError: a negative number; at the first call, a site that neither program has. One that
            is data in a batch has no rate there.
    """

    def __init__(
        self, beta: float | Schedule | Mapping[str, float | Schedule], rate: Rate | None = None
    ) -> None:
        not_negative("Beta", beta=beta)
        self.beta = dict(beta) if isinstance(beta, Mapping) else beta
        self.rate = rate or MonteCarlo()
        self.analytic, self.coupled = self.rate.analytic, self.rate.coupled

    def __call__(self, particles: Particles, step: Tensor) -> dict[str, Tensor]:
        rate = self.rate(particles, step)
        return {site: self._at(site, particles, step) * term for site, term in rate.items()}

    def betas(self, particles: Particles, step: Tensor) -> dict[str, float | Tensor]:
        betas = self.rate.betas(particles, step)
        if not isinstance(self.beta, dict):
            beta = schedules.value(
                self.beta, step
            )  # one object, which says that all sites share it
            return {site: beta if b == 1.0 else beta * b for site, b in betas.items()}
        return {site: self._at(site, particles, step) * b for site, b in betas.items()}

    def _at(self, site: str, particles: Particles, step: Tensor) -> float | Tensor:
        if not isinstance(self.beta, dict):
            return schedules.value(self.beta, step)
        _check_known("Beta", self.beta, particles)
        return schedules.value(self.beta.get(site, 1.0), step)

    def __repr__(self) -> str:
        return f"beta({shown(self.beta)}, {self.rate!r})"


class FreeBits(Rate):
    """No gain from a rate below ``nats``: max(nats, mean over the rows) (Kingma et al. 2016).

    The mean is over the particles and those rows of one pass (a batch, or a chunk of particles) where
    the entry is a latent, neither masked nor data; row weights do not enter it, and a row where
    nothing is a latent pays nothing. A site outside the rows has its mean over particles. A site that
    one of the two programs lacks has no KL: it keeps its rate unless a group names it.

    With a Monte Carlo rate inside, the expectation of the maximum is larger than the maximum of the
    expectation, where the mean is within its standard error of ``nats`` by .4 such errors.

    Args:
        nats: the floor, a number or schedule; or ``site -> number or schedule`` (other sites keep
            their rate).
        per: what has a floor of its own: every ``"dimension"``, every ``"site"``, or groups
            ``name -> sites`` (other sites keep their rate).
        over: ``"batch"``, or ``"row"``: the floor holds for each row's mean over particles.
        rate: what has the floor; ``Analytic()``.

    Raises:
        ValueError: a negative number, a word that is none of these, a site in two groups; at the
            first call, a group of sites inside and outside the rows, a site that neither program
            has, with ``"dimension"`` one whose KL does not factorize.
    """

    coupled = True

    def __init__(
        self,
        nats: float | Schedule | Mapping[str, float | Schedule],
        per: str | Mapping[str, Sequence[str]] = "dimension",
        over: str = "batch",
        rate: Rate | None = None,
    ) -> None:
        not_negative("FreeBits", nats=nats)
        if isinstance(nats, Mapping) and not isinstance(per, str):
            raise ValueError(
                "FreeBits: came floors by site and groups of sites, wanted one of them; nats= is the "
                "floor of each group"
            )
        if isinstance(per, str) and per not in ("dimension", "site"):
            raise ValueError(
                f"FreeBits: came per={per!r}, wanted 'dimension', 'site' or groups name -> sites"
            )
        if over not in ("batch", "row"):
            raise ValueError(f"FreeBits: came over={over!r}, wanted 'batch' or 'row'")
        self.nats, self.per, self.over, self.rate = nats, per, over, rate or Analytic()
        self.analytic = self.rate.analytic
        self.groups = [] if isinstance(per, str) else [tuple(sites) for sites in per.values()]
        named = [site for sites in self.groups for site in sites]
        if twice := sorted({site for site in named if named.count(site) > 1}):
            raise ValueError(f"FreeBits: came sites {twice} twice, wanted each in one group")

    def __call__(self, particles: Particles, step: Tensor) -> dict[str, Tensor]:
        rate = dict(self.rate(particles, step))
        entrywise, rowwise = self.per == "dimension", self.over == "row"
        for sites in self._present(particles, rate):
            if entrywise:
                _check_factorizes(particles, sites[0], rate[sites[0]])
            floor = self.nats[sites[0]] if isinstance(self.nats, Mapping) else self.nats
            nats = schedules.value(floor, step)
            terms, counts, mean = _pooled(particles, rate, sites, entrywise, rowwise)
            above = (mean > nats).to(mean.dtype)
            below = (1 - above) * nats / len(sites)
            rate |= {site: above * term + below * counts for site, term in terms.items()}
        return rate

    def _present(self, particles: Particles, rate: Mapping[str, Tensor]) -> Sequence[Sequence[str]]:
        """The sites that share a floor, those that are latents in this pass."""
        if isinstance(self.per, str):
            if not isinstance(self.nats, Mapping):
                return [[site] for site in _latents(particles)]
            _check_known("FreeBits", self.nats, particles)
            return [[site] for site in _latents(particles) if site in self.nats]
        _check_known("FreeBits", (site for sites in self.groups for site in sites), particles)
        groups = [[site for site in sites if site in rate] for sites in self.groups]
        for sites in groups:
            if len({particles.local(site) for site in sites}) > 1:
                raise ValueError(
                    f"FreeBits: came a group {sites} of sites inside and outside the plate over rows, "
                    "wanted two groups"
                )
        return [sites for sites in groups if sites]

    def __repr__(self) -> str:
        per = self.per
        if not isinstance(per, str):
            per = f"{{{', '.join(f'{name}: {list(sites)}' for name, sites in per.items())}}}"
        return f"freebits({shown(self.nats)}, {per}, {self.over}, {self.rate!r})"


class Capacity(Rate):
    """gamma |KL - C|, which holds the rate at a capacity C that grows (Burgess et al. 2018).

    KL is the mean over particles and rows of one pass of the rate of all sites inside the rows, as in
    ``FreeBits``; sites outside them keep their rate. A site's part is s gamma (its own rate - its
    equal share of C), s the sign of KL - C: over sites they add up to gamma |KL - C|, in the mean over
    rows. With a Monte Carlo rate inside, the mean of the distance is larger than the distance of the
    mean.

    Args:
        capacity: C in nats per row, a number or schedule.
        gamma: weight of the distance, a number or schedule.
        rate: whose distance from C counts; ``Analytic()``.

    Raises:
        ValueError: a negative number.
    """

    coupled = True

    def __init__(
        self, capacity: float | Schedule, gamma: float | Schedule, rate: Rate | None = None
    ) -> None:
        not_negative("Capacity", capacity=capacity, gamma=gamma)
        self.capacity, self.gamma, self.rate = capacity, gamma, rate or Analytic()
        self.analytic = self.rate.analytic

    def __call__(self, particles: Particles, step: Tensor) -> dict[str, Tensor]:
        rate = self.rate(particles, step)
        sites = [site for site in rate if particles.local(site)]
        if not sites:
            return rate
        capacity, gamma = (schedules.value(x, step) for x in (self.capacity, self.gamma))
        terms, counts, mean = _pooled(particles, rate, sites)
        slope = gamma * torch.sign(mean - capacity)
        share = capacity / len(sites) * counts
        return rate | {site: slope * (term - share) for site, term in terms.items()}

    def __repr__(self) -> str:
        return f"capacity({shown(self.capacity)}, {shown(self.gamma)}, {self.rate!r})"


class Balance(Rate):
    """Sites that use few nats pay less for them: KL balancing of deep hierarchies (Vahdat & Kautz
    2020).

    A site's coefficient is proportional to its mean KL per dimension (to KL / size, as in the authors'
    code, where their paper says KL times size), constant for the gradient, and 1 in the mean over
    sites. The mean is that of ``FreeBits`` per site; sites outside the rows and sites that one of the
    two programs lacks keep their rate.

    Args:
        share: of these coefficients, the rest is 1: a number in [0, 1] or schedule. The paper
            balances during warm-up alone, ``linear(n, 1, 0)`` fades it out.
        rate: what is balanced; ``Analytic()``.

    Raises:
        ValueError: a share outside [0, 1].
    """

    coupled = True

    def __init__(self, share: float | Schedule = 1.0, rate: Rate | None = None) -> None:
        if not callable(share) and not 0 <= share <= 1:
            raise ValueError(
                f"Balance: came share={share}, wanted a number in [0, 1] or a schedule"
            )
        self.share, self.rate = share, rate or Analytic()
        self.analytic = self.rate.analytic

    def __call__(self, particles: Particles, step: Tensor) -> dict[str, Tensor]:
        rate, share = self.rate(particles, step), schedules.value(self.share, step)
        sites = [site for site in _latents(particles) if particles.local(site)]
        if not sites:
            return rate
        means = [_pooled(particles, rate, [site])[2].clamp(min=0) + _UNUSED for site in sites]
        sizes = [particles.samples[site][0, 0].numel() for site in sites]
        use = torch.cat([mean.reshape(1) / n for mean, n in zip(means, sizes, strict=True)])
        coefficients = 1 + share * (use / use.mean() - 1)
        return rate | {s: c * rate[s] for s, c in zip(sites, coefficients, strict=True)}

    def __repr__(self) -> str:
        return f"balance({shown(self.share)}, {self.rate!r})"


_UNUSED = 0.01  # nats that a site without KL is given, so that it pays something for the first ones


def _pooled(
    particles: Particles,
    rate: Mapping[str, Tensor],
    sites: Sequence[str],
    entrywise: bool = False,
    rowwise: bool = False,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The terms of sites, 1 where they count (in rows where any is a latent), and the mean of their
    sum over particles and such rows (``rowwise``: over particles), a constant; per row ``[K, B]``, or
    ``entrywise`` ``[K, B, *rest]``."""
    local = particles.local(sites[0])
    terms = {site: rate[site] if entrywise else _sum_rest(rate[site], 1 + local) for site in sites}
    dims = (0, 1) if local and not rowwise else (0,)
    total = reduce(add, terms.values())
    counts = reduce(or_, (_counts(particles, site, term) for site, term in terms.items()))
    counts = counts.to(total.dtype).expand_as(total)
    mean = total.sum(dims, keepdim=True) / counts.sum(dims, keepdim=True).clamp(min=1)
    return terms, counts, mean.detach()


def _counts(particles: Particles, site: str, term: Tensor) -> Tensor:
    """Where a term has an entry that is a latent, neither masked nor data."""
    here, samples = particles.guide[site], particles.samples[site]
    event_dim, local = here["fn"].event_dim, particles.local(site)
    counts = particles.plan.canonical(counted(here), event_dim, particles.num_particles, local)
    if here["mask"] is False:
        counts = torch.zeros_like(counts)
    if (observed := here["infer"].get("observed")) is not None:
        counts = counts & ~torch.as_tensor(observed, device=counts.device)
    lost = samples.dim() - term.dim()
    return counts.flatten(-lost).any(-1) if lost > 0 else counts


def _check_factorizes(particles: Particles, site: str, term: Tensor) -> None:
    fn = particles.guide[site]["fn"]
    one = core(fn).event_dim if core(fn).has_enumerate_support else 0  # one-hot: a single variable
    if particles.samples[site].dim() > term.dim() + one:
        raise ValueError(
            f"FreeBits: site {site!r}: came per='dimension', but the KL does not factorize over its "
            f"event {list(fn.event_shape)}; use per='site'"
        )


def _latents(particles: Particles) -> list[str]:
    """The sites that have a KL: drawn by the guide, with a prior."""
    return [site for site in particles.posterior if site in particles.prior]


def _sum_rest(term: Tensor, keep: int) -> Tensor:
    """Sum over all dims but the first ``keep``."""
    return term.flatten(keep).sum(keep) if term.dim() > keep else term


def _check_known(part: str, sites: Iterable[str], particles: Particles) -> None:
    """Sites that a program has: a label may be data in this batch and a latent in the next."""
    if unknown := set(sites) - {*particles.posterior, *particles.model}:
        raise ValueError(
            f"{part}: came sites {sorted(unknown)}, the guide's latents are "
            f"{sorted(particles.posterior)}"
        )


def _subtract(log_q: Tensor, log_p: Tensor) -> Tensor:
    """log q - log p, elementwise if both factorize alike, else summed to ``[K, B]``."""
    if log_q.shape != log_p.shape:
        keep = min(2, log_q.dim(), log_p.dim())
        log_q, log_p = (_sum_rest(t, keep) for t in (log_q, log_p))
    return torch.sub(log_q, log_p)
