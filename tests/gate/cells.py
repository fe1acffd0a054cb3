"""Which combinations of parts there are, what each is held against, and which are refused or biased by
design."""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae import objectives
from pyro_vae.objectives import (
    baselines,
    bounds,
    enumeration,
    estimators,
    penalties,
    rates,
    relaxed,
)
from pyro_vae.objectives.baselines import Baseline, LeaveOneOut, MovingAverage, NeuralBaseline
from pyro_vae.objectives.bounds import (
    Bound,
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
from pyro_vae.objectives.estimators import (
    STL,
    DReG,
    Estimator,
    OneParticle,
    Pathwise,
    Score,
    WakeSleep,
)
from pyro_vae.objectives.objective import Objective
from pyro_vae.objectives.penalties import Penalty
from pyro_vae.objectives.rates import Analytic, Balance, Beta, Capacity, FreeBits, MonteCarlo, Rate
from pyro_vae.objectives.relaxed import Gumbel, StraightThrough
from pyro_vae.objectives.schedules import linear
from tests.gate.exact import (
    Exact,
    Reference,
    Target,
    exact,
    gauss_hermite,
    largest,
    smooth,
    trapezoid,
)
from tests.gate.pairs import (
    ANNEALED,
    BIASED,
    BIT,
    BITS,
    BOTTOM_UP,
    CLASSES,
    LAZY,
    MIXED,
    ONE_LAYER,
    PAIRS,
    PATHLESS_CHILD,
    PATHLESS_PARENT,
    REFUSED,
    ROWS_SCALED,
    SCALED,
    STORED,
    SUBSAMPLED,
    TEMPERED,
    UNBIASED,
    WEIGHTED,
    Densities,
    Pair,
    concrete_bit,
    concrete_classes,
    straight_bit,
    straight_classes,
)
from tests.gate.penalties import PenaltyCell

Formula = Callable[[Tensor], Tensor]


def _elbo(log_w: Tensor) -> Tensor:
    return log_w.mean(0)


def _renyi(alpha: float) -> Formula:
    return lambda log_w: ((1 - alpha) * log_w).exp().mean(0).log() / (1 - alpha)


def _tempered(power: float) -> Formula:
    return lambda log_w: (log_w * (power * log_w).exp()).sum(0) / (power * log_w).exp().sum(0)


def _mix(a: float, first: Formula, b: float, second: Formula) -> Formula:
    return lambda log_w: a * first(log_w) + b * second(log_w)


def _jackknife(log_w: Tensor) -> Tensor:
    count, iwae = len(log_w), _renyi(0.0)
    others = [iwae(torch.stack([*log_w[:k], *log_w[k + 1 :]])) for k in range(count)]
    return count * iwae(log_w) - (count - 1) * torch.stack(others).mean(0)


_ELBO, _IWAE, _CUBO = (smooth(formula) for formula in (_elbo, _renyi(0.0), _renyi(-1.0)))

BOUNDS: dict[type[Bound], list[tuple[Bound, Reference]]] = {
    Elbo: [(Elbo(), _ELBO)],
    Renyi: [
        (Renyi(0.0), _IWAE),
        (Renyi(0.5), smooth(_renyi(0.5))),
        (Renyi(-1.0), _CUBO),
        (Renyi(2.0), smooth(_renyi(2.0))),
        (Renyi(-math.inf), Reference(largest, trapezoid)),
    ],
    Cubo: [(Cubo(), _CUBO)],
    Miwae: [(Miwae(2), _IWAE)],  # a cell's particles are those of a group, and groups are alike
    Mix: [
        (Mix((0.3, Elbo()), (0.7, Renyi(0.0))), smooth(_mix(0.3, _elbo, 0.7, _renyi(0.0)))),
        (Mix((0.5, Elbo()), (1.0, Renyi(-1.0))), smooth(_mix(0.5, _elbo, 1.0, _renyi(-1.0)))),
    ],
    Split: [
        (Split(Renyi(0.0), Elbo()), replace(_IWAE, guide=_ELBO)),
        (Split(Elbo(), Cubo()), replace(_ELBO, guide=_CUBO)),
    ],
    Thermodynamic: [
        (Thermodynamic((0, 0.3, 1)), smooth(_mix(0.3, _elbo, 0.7, _tempered(0.3)))),
        (
            Thermodynamic((0, 0.3, 1), right=True),
            smooth(_mix(0.3, _tempered(0.3), 0.7, _tempered(1.0))),
        ),
    ],
    Jackknife: [(Jackknife(), smooth(_jackknife))],
}
EVERY_RATE = (Elbo, Renyi)  # the others meet one rate of each type: a rate does not know its bound
EVERY_PAIR = (Pathwise, DReG)  # of bound and rate; the others meet rates under the elbo

ESTIMATORS: dict[type[Estimator], list[Estimator]] = {
    Pathwise: [Pathwise()],
    STL: [STL()],
    DReG: [DReG()],
    OneParticle: [OneParticle()],
    Score: [
        Score(),
        Score(all_sites=True),
        Score(True, LeaveOneOut()),
        Score(True, MovingAverage()),
        Score(True, NeuralBaseline()),
    ],
    WakeSleep: [WakeSleep()],
    Enumerate: [Enumerate()],
}


RELAXATIONS: list[Estimator] = [
    Gumbel(1.0),
    Gumbel(0.5),
    Gumbel(0.25),
    Gumbel(0.5, prior_temperature=1.0),
    Gumbel(0.5, density="discrete"),
    Gumbel(0.5, hard=True),
    Gumbel(0.5, hard=True, density="discrete"),
    StraightThrough(),
]


# pair -> densities of its relaxed and of its straight-through draws, noises of a relaxed one
RELAXED: dict[str, tuple[Callable[..., Densities], Densities, int]] = {
    "bit": (concrete_bit, straight_bit, 1),
    "classes": (concrete_classes, straight_classes, 3),
}


class Weighting(NamedTuple):
    """A rate at a step, and its meaning: site -> weight of log q - log p(z) inside the bound, and
    nats that are taken off the bound whatever the draws."""

    rate: Rate
    betas: tuple[tuple[str, float], ...]
    step: int = 0
    constant: float = 0.0


Sites = tuple[str, ...]


def _all(sites: Sites, beta: float = 1.0) -> tuple[tuple[str, float], ...]:
    return tuple((site, beta) for site in sites)


def beta_rates(sites: Sites) -> list[Weighting]:
    more, less = (tuple(zip(sites, betas, strict=False)) for betas in ((2.0, 0.5), (0.5, 2.0)))
    last = (*_all(sites[:-1]), (sites[-1], 0.6))
    return [
        Weighting(Beta(2.0), _all(sites, 2.0)),
        Weighting(Beta(0.5), _all(sites, 0.5)),
        Weighting(Beta(dict(more)), more),
        Weighting(Beta(dict(less)), less),
        Weighting(Beta(linear(10)), _all(sites, 0.4), step=4),
        Weighting(Beta({sites[-1]: linear(10)}), last, step=6),
        Weighting(Beta(2.0, Analytic()), _all(sites, 2.0)),
        Weighting(Beta(dict(less), Analytic()), less),
        Weighting(Beta(linear(10), Beta(dict(more))), tuple((s, 0.4 * b) for s, b in more), step=4),
    ]


def _mean_rates(sites: Sites) -> dict[str, float]:
    """E[log q - log p(z)] of each site, by quadrature."""
    pair = next(pair for pair in PAIRS if pair.sites == sites)
    noise, weights = gauss_hermite(len(sites), 1, fine=True)
    numbers = {**pair.model_values, **pair.guide_values}
    terms = pair.terms({name: torch.tensor(n).double() for name, n in numbers.items()}, noise)
    return {site: float(terms.rate[site] @ weights) for site in sites}


def free_bits_rates(sites: Sites) -> list[Weighting]:
    """Floors that all rates, none, or those of some sites are above."""
    mean = _mean_rates(sites)
    low, between = 0.5 * min(mean.values()), sum(mean.values()) / len(sites) + 0.1
    partly = tuple((site, float(mean[site] > between)) for site in sites)
    under = sum(weight == 0 for _, weight in partly)
    group = FreeBits(low, {"all": sites})
    high = FreeBits(linear(10, 0, 100), "site", "row")
    return [
        Weighting(FreeBits(low), _all(sites)),
        Weighting(FreeBits(low, rate=MonteCarlo()), _all(sites)),
        Weighting(Beta(2.0, group), _all(sites, 2.0)),
        Weighting(high, _all(sites, 0.0), step=5, constant=50 * len(sites)),
        Weighting(FreeBits(between), partly, constant=under * between),
    ]


def capacity_rates(sites: Sites) -> list[Weighting]:
    """Below the rate and above it."""
    low, high = (factor * sum(_mean_rates(sites).values()) for factor in (0.5, 2.0))
    return [
        Weighting(Capacity(low, 3.0), _all(sites, 3.0), constant=-3 * low),
        Weighting(Capacity(linear(10, 0, 2 * high), 0.5), _all(sites, -0.5), 5, 0.5 * high),
        Weighting(Capacity(low, 3.0, MonteCarlo()), _all(sites, 3.0), constant=-3 * low),
    ]


def balance_rates(sites: Sites) -> list[Weighting]:
    use = {site: mean + 0.01 for site, mean in _mean_rates(sites).items()}
    whole = {site: use[site] * len(sites) / sum(use.values()) for site in sites}
    half = tuple((site, 0.5 + 0.5 * whole[site]) for site in sites)
    return [
        Weighting(Balance(rate=MonteCarlo()), tuple(whole.items())),
        Weighting(Balance(linear(10, 1, 0)), half, step=5),
    ]


RATES: dict[type[Rate], Callable[[Sites], list[Weighting]]] = {
    MonteCarlo: lambda sites: [Weighting(MonteCarlo(), _all(sites))],
    Analytic: lambda sites: [Weighting(Analytic(), _all(sites))],
    Beta: beta_rates,
    FreeBits: free_bits_rates,
    Capacity: capacity_rates,
    Balance: balance_rates,
}


def refusals(bound: Bound, estimator: Estimator, rate: Rate, pair: Pair) -> list[tuple[Any, Any]]:
    """Parts that don't go together: the library must refuse them by name."""
    found: list[tuple[Any, Any]] = []
    inner, coupled = rate, False
    while isinstance(inner, Beta | FreeBits | Capacity | Balance):
        coupled = coupled or not isinstance(inner, Beta)
        inner = inner.rate
    if not isinstance(bound, Elbo) and (coupled or isinstance(inner, Analytic)):
        found.append((rate, bound))
    if coupled:
        sampled = isinstance(inner, MonteCarlo) or pair.sites == BOTTOM_UP.sites
        if estimator.scores("z", True) or (estimator.boundary and sampled):
            found.append((rate, estimator))
    scored = isinstance(estimator, Score | WakeSleep | Enumerate)
    if pair.states and not (scored or isinstance(estimator, Gumbel | StraightThrough)):
        found.append((estimator, pair.sites[0]))
    if pair.states and coupled and scored:
        found.append((rate, pair.sites[0]))
    if isinstance(estimator, Enumerate) and not isinstance(bound, Elbo):
        found.append((estimator, bound))
    if (
        isinstance(estimator, Gumbel)
        and estimator.density == "relaxed"
        and isinstance(bound, Split)
    ):
        found.append((estimator, bound))
    if isinstance(estimator, STL) and not isinstance(bound.guide, Elbo):
        found.append((estimator, bound))
    if isinstance(bound, Renyi) and bound.alpha == -math.inf and isinstance(estimator, DReG):
        found.append((estimator, bound))
    if isinstance(estimator, OneParticle) and isinstance(bound, Split | Thermodynamic | Jackknife):
        found.append((estimator, bound))
    if isinstance(estimator, WakeSleep) and isinstance(bound, Elbo | Split):
        found.append((estimator, bound))
    return found


def bias(bound: Bound, estimator: Estimator, rate: Rate) -> str | None:
    """Why the gradient is biased by design: then its bias is measured and printed, not bounded."""
    if isinstance(estimator, WakeSleep):
        return "the guide follows another divergence"
    if isinstance(estimator, Gumbel | StraightThrough):
        return "the path of a discrete draw is that of another"
    if isinstance(rate, Balance) or (rate.coupled and not rate.analytic):
        return "a function of a mean over draws is not that of the expectation"
    return None


@dataclass(frozen=True)
class Cell:
    """One combination on one pair, its meaning, and what is declared of its gradient.

    Attributes:
        particles: those of a group, where the bound has groups.
        sampled: discrete latents are drawn, not listed.
        alone: each row is a batch of its own.
    """

    pair: Pair
    bound: Bound
    reference: Reference
    estimator: Estimator
    weighting: Weighting
    particles: int = 2
    chunk: int | None = None
    status: str = ""
    sampled: bool = False
    alone: bool = False

    def __post_init__(self) -> None:
        if not self.status:
            parts = (self.bound, self.estimator, self.weighting.rate)
            refused = refusals(*parts, self.pair)
            status = REFUSED if refused else BIASED if bias(*parts) else UNBIASED
            object.__setattr__(self, "status", status)

    def __str__(self) -> str:
        more = f" K={self.particles}" if self.particles != 2 else ""
        more += f" chunk={self.chunk}" if self.chunk else ""
        more += " sampled" * self.sampled + " alone" * self.alone
        step = f" at {self.weighting.step}" if self.weighting.step else ""
        rate = re.sub(r"<function (.*?) at \w+>", r"\1", repr(self.weighting.rate)) + step
        return f"{self.pair.name}: {self.bound!r} x {self.estimator!r} x {rate}{more}"

    def objective(self) -> Objective:
        estimator = deepcopy(self.estimator)  # baselines remember
        if isinstance(estimator, nn.Module):
            estimator.double()
        parts = (self.bound, estimator, self.weighting.rate)
        return Objective(*parts, num_particles=self.num_particles, chunk=self.chunk)

    @property
    def num_particles(self) -> int:
        return self.particles * getattr(self.bound, "groups", 1)

    @property
    def listed(self) -> bool:
        """Whether all K-tuples of states stand for draws."""
        drawn = isinstance(self.estimator, Gumbel | StraightThrough) or self.sampled
        return len(self.pair.states) == len(self.pair.sites) and not drawn

    def exact(self) -> Exact:
        """Of the bound."""
        guide = self.reference.guide
        of_guide = None if guide is None else self._target(reference=guide)
        return self._known(self._target(), of_guide)

    def declared(self) -> Exact | None:
        """Of an estimator that is biased by design, where its expectation is known."""
        if isinstance(self.estimator, WakeSleep):
            continuous = len(self.pair.sites) - len(self.pair.states)
            if continuous * self.num_particles > 4:
                return None
            more = {"reference": _IWAE, "particles": self.num_particles, "wake": True}
            return self._known(self._target(), self._target(**more))
        if self.pair.name not in RELAXED or self.weighting.rate.analytic:
            return None
        _, straight, noises = RELAXED[self.pair.name]
        if isinstance(self.estimator, StraightThrough):
            return self._known(self._target(terms=straight))
        if isinstance(self.estimator, Gumbel) and not self.estimator.hard:
            if noises * self.num_particles > 4:
                return None
            terms = _concrete(self.pair.name, self.estimator)
            return self._known(self._target(terms=terms, states=(), noises=noises))
        return None

    def _target(self, **changes: Any) -> Target:
        pair = self.pair
        target = Target(
            pair.terms,
            tuple({**pair.model_values, **pair.guide_values}.items()),
            self.weighting.betas,
            pair.tempering,
            self.reference,
            self.particles,
            pair.states,
        )
        return target._replace(**changes)

    def _known(self, of_model: Target, of_guide: Target | None = None) -> Exact:
        found = exact(of_model)
        if of_guide is not None:
            other, split = exact(of_guide), len(self.pair.model_values)
            gradient, error = (
                torch.cat([a[:split], b[split:]])
                for a, b in zip(found[1::2], other[1::2], strict=True)
            )
            found = found._replace(gradient=gradient, gradient_error=error)
        found = found._replace(value=found.value - self.weighting.constant)
        return Exact(*(self.pair.multiplier * part for part in found))


@functools.cache
def _concrete(pair: str, estimator: Gumbel) -> Densities:
    temperatures = (estimator.temperature, estimator.prior_temperature)
    return RELAXED[pair][0](*temperatures, relaxed=estimator.density == "relaxed")


MODULES = (objectives, baselines, bounds, enumeration, estimators, penalties, rates, relaxed)


def exported(module: Any, base: type) -> list[type]:
    """The public subclasses of ``base``."""
    parts = [getattr(module, name) for name in module.__all__]
    return [p for p in parts if isinstance(p, type) and issubclass(p, base) and p is not base]


def cells(pairs: Iterable[Pair] = PAIRS) -> list[Cell]:
    """Every exported bound x estimator, every rate x estimator under the elbo, and every bound x rate
    with two estimators, on every pair."""
    instances = [item for part in exported(bounds, Bound) for item in BOUNDS.get(part, [])]
    return [
        Cell(pair, bound, reference, estimator, weighting)
        for pair in pairs
        for rate_type in exported(rates, Rate)
        for place, (bound, reference) in enumerate(instances)
        for weighting in _weightings(rate_type, pair.sites, bound, place)
        for estimators in ESTIMATORS.values()
        for estimator in estimators
        if isinstance(bound, Elbo) or rate_type is MonteCarlo or type(estimator) in EVERY_PAIR
    ]


def _weightings(rate_type: type[Rate], sites: Sites, bound: Bound, place: int) -> list[Weighting]:
    """What a bound meets of a type of rates: all, or one in turn."""
    found = RATES[rate_type](sites) if rate_type in RATES else []
    if type(bound) in EVERY_RATE or not found:
        return found
    return [found[place % len(found)]]


def uncovered(found: Iterable[Cell | PenaltyCell]) -> list[str]:
    """Exported parts that no cell runs."""
    found = list(found)
    run = [cell for cell in found if isinstance(cell, Cell) and cell.status != REFUSED]
    parts = [part for c in run for part in (c.bound, c.estimator, c.weighting.rate)]
    covered: set[type] = {type(part) for part in parts}
    covered |= {type(part.baseline) for part in parts if isinstance(part, Score)}
    covered |= {type(cell.make()) for cell in found if isinstance(cell, PenaltyCell)}
    tables = {
        Bound: "BOUNDS",
        Estimator: "ESTIMATORS or RELAXATIONS",
        Baseline: "ESTIMATORS",
        Rate: "RATES",
        Penalty: "penalty_cells",
    }
    return [
        f"{part.__name__} is exported but no cell runs it: add an instance to {table}"
        for base, table in tables.items()
        for part in dict.fromkeys(part for module in MODULES for part in exported(module, base))
        if part not in covered
    ]


def cell(
    pair: Pair,
    bound: str | Bound,
    estimator: Estimator,
    rate: Rate | Weighting | None = None,
    **more: Any,
) -> Cell:
    """A single cell; the bound by its name in the tables, a rate that weighs everything by 1."""
    by_name = {repr(b): (b, reference) for known in BOUNDS.values() for b, reference in known}
    weighting = (
        rate if isinstance(rate, Weighting) else Weighting(rate or MonteCarlo(), _all(pair.sites))
    )
    return Cell(pair, *by_name[str(bound)], estimator, weighting, **more)


def further_cells() -> list[Cell]:
    """Other numbers of particles, chunks, plates, scales and programs."""
    score = Score(all_sites=True)
    names = [repr(bound) for known in BOUNDS.values() for bound, _ in known]
    found = [
        cell(ONE_LAYER, name, estimator, particles=count)
        for name in names
        for count in (1, 3)
        for estimator in (Pathwise(), DReG(), score)
    ]
    found += [cell(ONE_LAYER, "elbo", STL(), particles=count) for count in (1, 3)]
    descends = smooth(lambda log_w: -_renyi(-1.0)(log_w))
    found += [
        replace(
            cell(ONE_LAYER, "elbo", estimator),
            bound=Split(Elbo(), Mix((-1, Cubo()))),
            reference=replace(_ELBO, guide=descends),
        )
        for estimator in (Pathwise(), DReG(), score)
    ]
    found += [cell(ONE_LAYER, "iwae", DReG(), particles=3, chunk=1)]
    plates_and_scales = (SUBSAMPLED, SCALED, ROWS_SCALED, TEMPERED, WEIGHTED)
    annealed = Weighting(MonteCarlo(), (("z1", 0.6), ("z2", 1.0)))
    for name in ("elbo", "iwae"):
        for estimator in (Pathwise(), DReG(), score):
            found += [
                cell(ONE_LAYER, name, estimator, particles=3, chunk=2),
                cell(BOTTOM_UP, name, estimator, chunk=1),
                cell(ANNEALED, name, estimator, annealed),
                *(cell(pair, name, estimator) for pair in (*plates_and_scales, LAZY, STORED)),
            ]
        found += [cell(pair, name, Score()) for pair in (PATHLESS_PARENT, PATHLESS_CHILD)]
    return [
        *(c for c in found if c.status != REFUSED and c.num_particles >= c.bound.min_particles),
        cell(SUBSAMPLED, "elbo", Pathwise(), Analytic()),
        cell(SCALED, "elbo", DReG(), Analytic()),
        cell(ANNEALED, "elbo", STL(), annealed._replace(rate=Analytic())),
        cell(LAZY, "elbo", STL(), Analytic()),
        cell(LAZY, "iwae", DReG(), beta_per_site(LAZY)),
        cell(STORED, "iwae", DReG(), beta_per_site(STORED)),
        cell(BOTTOM_UP, "iwae", DReG(), beta_per_site(BOTTOM_UP), chunk=1),
        cell(PATHLESS_PARENT, "elbo", Score(), Analytic()),
        cell(PATHLESS_CHILD, "elbo", Score(), Analytic()),
        cell(PATHLESS_PARENT, "iwae", Score(), beta_per_site(PATHLESS_PARENT)),
    ]


def discrete_cells() -> list[Cell]:
    """Latents whose states are all listed, and relaxations of them."""
    known = [item for found in BOUNDS.values() for item in found]
    by_score = [s for s in ESTIMATORS[Score] if isinstance(s, Score) and s.all_sites]
    every = [*by_score, WakeSleep(), Enumerate()]
    once = {pair.name: Weighting(MonteCarlo(), _all(pair.sites)) for pair in (BITS, CLASSES)}
    found = [
        Cell(pair, *item, estimator, once[pair.name], count)
        for pair, count in ((BITS, 2), (CLASSES, 3))
        for item in known
        for estimator in every
    ]
    found += [Cell(BITS, *i, s, once["bits"], 3) for i in known for s in by_score[:2]]
    found += [cell(BITS, "elbo", refused) for refused in (Pathwise(), STL(), DReG(), OneParticle())]
    found += [cell(BITS, "elbo", Score(), rate) for rate in (FreeBits(0.1), Balance())]
    found += [
        cell(BITS, name, estimator, rate)
        for rate in (*beta_rates(BITS.sites), Weighting(Analytic(), _all(BITS.sites)))
        for name, estimator in (("elbo", Score()), ("iwae", by_score[1]), ("elbo", Enumerate()))
    ]
    found += [
        cell(BIT, name, Score(baseline=baseline), particles=count, alone=True)
        for name in ("elbo", "iwae")
        for count in (1, 2)
        for baseline in (MovingAverage(), NeuralBaseline())
    ]
    found += [
        cell(pair, name, estimator, sampled=pair is not MIXED)
        for pair in (BITS, CLASSES, MIXED)
        for name, estimator in (("elbo", Score()), ("iwae", Score()), ("iwae", by_score[1]))
    ]
    found += [
        cell(MIXED, "elbo", estimator, rate)
        for estimator in (Score(), Enumerate())
        for rate in (MonteCarlo(), Analytic(), beta_per_site(MIXED))
    ]
    found += [
        cell(BIT, name, relaxation)
        for name in ("elbo", "iwae", "renyi(-1)", "miwae(2)", "split(iwae, elbo)", "jackknife(1)")
        for relaxation in RELAXATIONS
    ]
    found += [cell(CLASSES, "elbo", relaxation, particles=1) for relaxation in RELAXATIONS]
    found += [
        cell(pair, "elbo", relaxation, Weighting(Beta(2.0, inner), _all(pair.sites, 2.0)))
        for pair in (BIT, BITS, CLASSES)
        for relaxation in RELAXATIONS
        for inner in (MonteCarlo(), Analytic())
    ]
    return found


def beta_per_site(pair: Pair) -> Weighting:
    betas = tuple(zip(pair.sites, (0.5, 2.0), strict=True))
    return Weighting(Beta(dict(betas)), betas)


def quick_cells() -> list[Cell]:
    """Every combination on one pair."""
    choose = random.Random(0).choice
    return [choose(same) for same in zip(*(cells([pair]) for pair in PAIRS), strict=True)]
