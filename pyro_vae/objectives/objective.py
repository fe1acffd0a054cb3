"""The objective: bound x estimator x rate x penalties, on any Pyro model and guide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyro_vae.batch import Batch
from pyro_vae.objectives import estimators, schedules
from pyro_vae.objectives.bounds import Bound, Elbo
from pyro_vae.objectives.estimators import Estimator
from pyro_vae.objectives.loss import Loss, Program, identity
from pyro_vae.objectives.particles import Boundary, Particles, log_q_at_rest, run
from pyro_vae.objectives.plan import Plan, SitesChanged, factor_blockers, make_plan
from pyro_vae.objectives.rates import MonteCarlo, Rate
from pyro_vae.objectives.schedules import Schedule, not_negative, shown
from pyro_vae.objectives.swap import Held, Rewound, owner

__all__ = ["Objective", "refusal"]

Penalty = Callable[[Particles, Tensor], Tensor]
_MAX_PLANS = 64
_TINY = 1e-20  # the least weight with which a gradient is sent through the model


def refusal(bound: Bound, estimator: Estimator, rate: Rate, num_particles: int) -> str | None:
    """Why a combination is refused, naming both parts; None if it is not."""
    if not (bound.linear and bound.guide.linear):
        if rate.coupled:
            return (
                f"rate {rate!r} is no sum over rows, which bound {bound!r} asks for; use the elbo"
            )
        if rate.analytic:
            return f"rate {rate!r} inside bound {bound!r} is no bound; use MonteCarlo()"
    if num_particles < bound.min_particles:
        return (
            f"bound {bound!r}: came num_particles={num_particles}, wanted >= {bound.min_particles}"
        )
    if why := estimator.refusal(bound, num_particles):
        return f"estimator {estimator!r} with bound {bound!r}: {why}"
    return None


@dataclass
class _Chunk:
    """What one pass leaves of ``size`` particles; the rest can be forgotten until backward."""

    size: int
    log_w: Tensor | None  # [k, B]
    outside: Tensor | None  # [k], log weights of the sites outside the rows
    score: Tensor | None  # [k, B], log densities of the draws that have no path
    outside_score: Tensor | None  # [k]
    rest: Tensor | None  # [k, B], sum of (beta_site - beta) log q_site at detached draws
    beta: float | Tensor  # that all sites share
    penalty: Tensor  # [] or [B]
    plate_scale: float
    scale: float | Tensor
    subsamples: dict[str, Tensor]
    boundary: Boundary | None
    late: bool  # sites outside the rows may depend on the rows' draws


class Objective(Loss):
    """A loss for a Pyro model and guide, made of orthogonal parts.

    ``objective(model, guide)`` is an ``nn.Module`` whose call returns the loss; the objective itself
    goes into ``pyro.infer.SVI``. The loss is minus the bound, summed over rows, times N / B of the
    row plate (nats). Its value is the bound's; its gradient is the estimator's.

    Args:
        bound: log weights ``[K, B]`` -> ``[B]``.
        estimator: how its gradient is taken, an ``Estimator`` or its name.
        rate: what weighs log q - log p(z).
        penalties: callables of the ``Particles`` and the step that return nats per row, ``[]`` or
            ``[B]``. With ``chunk``, the mean over chunks.
        num_particles: K.
        chunk: particles processed at a time. Value and gradient stay what they are (but for coupled
            rates, whose means are those of a chunk), training memory does not grow with K. ``chunk=1``
            runs particle by particle without a particle dim.
        likelihood_weights: observed site -> what its log p(x | z) counts, a number or schedule (1
            elsewhere), so that a site of few nats is heard beside one of many (Wu & Goodman 2018). As
            under beta, a bound of log p only where all are 1. Evaluation weighs nothing.

    Parts that are modules own parameters or buffers, which are trained, saved and moved with the rest.

    Raises:
        ValueError: a refused combination, naming both parts; at the first call, a pair that the
            parts can't train, naming the site.
    """

    def __init__(
        self,
        bound: Bound | None = None,
        estimator: str | Estimator = "pathwise",
        rate: Rate | None = None,
        penalties: Iterable[Penalty] = (),
        num_particles: int = 1,
        chunk: int | None = None,
        likelihood_weights: Mapping[str, float | Schedule] | None = None,
    ) -> None:
        numbers = {"num_particles": num_particles, "chunk": 1 if chunk is None else chunk}
        for name, number in numbers.items():
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"Objective: came {name}={number!r}, wanted a whole number >= 1")
        super().__init__(num_particles)
        self.bound = bound or Elbo()
        self.estimator = estimators.get(estimator)
        self.rate = rate or MonteCarlo()
        self.penalties = tuple(penalties)
        self.chunk = chunk
        self.likelihood_weights = dict(likelihood_weights or {})
        not_negative("Objective", likelihood_weights=self.likelihood_weights)
        parts: Iterable[Any] = (self.estimator, self.rate, *self.penalties)
        self.modules = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        if why := refusal(self.bound, self.estimator, self.rate, num_particles):
            raise ValueError(f"Objective: {why}")
        self._plans: dict[Any, Plan] = {}

    @property
    def recomputes(self) -> bool:
        """Whether backward runs the programs again, chunk by chunk."""
        several = self.estimator.enumerates  # how many, the plan says
        return self.chunk is not None and (several or self.chunk < self.num_particles)

    def rows_at(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        step: Tensor,
    ) -> Tensor:
        """``rows`` at a step of the schedules."""
        with torch.no_grad():
            chunks = self._chunks(model, guide, args, kwargs, step)
            log_w = _join(chunk.log_w for chunk in chunks)
        if log_w is None:
            raise ValueError(
                "rows: came a model without a plate over rows around its observed sites"
            )
        return self.bound(log_w)

    def plan(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Plan:
        """What a first run shows of a pair (cached): its notes say where a KL is Monte Carlo."""
        key = self._key(model, guide, args, kwargs)
        if key not in self._plans:
            plan = make_plan(model, guide, args, kwargs)
            self._admit(plan, args, kwargs)
            if self.estimator.two_goals or self.bound.guide is not self.bound:
                plan = replace(plan, programs=(model, Held.around(guide, model)))
            while len(self._plans) >= _MAX_PLANS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = plan
        return self._plans[key]

    def _key(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        """What a plan depends on. Plans keep their programs alive, so that ids stay theirs."""
        batch = args[0] if args and isinstance(args[0], Batch) else None
        programs = []
        for program in (model, guide):
            module = owner(program)
            training = None if module is None else module.training
            programs.append((*identity(program), training))
        return (
            *programs,
            (batch.sites, batch.incomplete) if batch is not None else None,
            tuple(map(type, args)),
            tuple((name, type(value)) for name, value in kwargs.items()),
        )

    def _admit(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a pair that the parts can't train without bias."""
        if not self.bound.linear:
            if plan.outside:
                raise ValueError(
                    f"bound {self.bound!r}: sites {sorted(plan.outside)} lie outside the plate over "
                    "rows that the observed sites share, and the log of a mean over particles does "
                    "not split over rows; put them into that plate, or use the elbo"
                )
            if plan.subsampled:
                raise ValueError(
                    f"bound {self.bound!r}: plates {list(plan.subsampled)} inside a row are "
                    "subsampled, which is no bound; use the elbo, or the whole plate"
                )
        for site in plan.unreparameterized:
            if why := self.estimator.untrained(site, plan):
                raise ValueError(f"estimator {self.estimator!r}: site {site!r} of the guide {why}")
        for site in plan.drawn_parents:
            if not self.estimator.scores(site, False):
                raise ValueError(
                    f"estimator {self.estimator!r}: missing entries of site {site!r} are drawn "
                    "without rsample and other sites depend on them, so its parameters would get no "
                    "gradient; use estimator='score', or put the site into the guide"
                )
        if plan.drawn_parents and self.bound.guide is not self.bound:
            raise ValueError(
                f"bound {self.bound!r}: missing entries of sites {sorted(plan.drawn_parents)} are drawn "
                "by their score, which belongs to the model's bound and to the guide's; use one bound"
            )
        if self.penalties and (why := self.estimator.unpenalized):
            raise ValueError(
                f"estimator {self.estimator!r} with penalty {self.penalties[0]!r}: {why}; use another "
                "estimator"
            )
        if self.rate.coupled:
            self._admit_coupled(plan)
        if self.estimator.boundary:
            blockers = dict(plan.score_blockers)
            if not blockers and not self.bound.linear:
                blockers = factor_blockers(plan, args, kwargs)
            for site, why in blockers.items():
                raise ValueError(
                    f"estimator {self.estimator!r}: site {site!r}: {why}; use estimator='pathwise'"
                )

    def _admit_coupled(self, plan: Plan) -> None:
        """A rate that couples rows has no term of each row that a score could be weighed by."""
        scores, every = self.estimator.scores, self.estimator.enumerates
        scored = [site for site in plan.discrete if every or scores(site, False)]
        scored += [*plan.drawn_parents, *(site for site in plan.latents if scores(site, True))]
        if scored:
            how = "enumeration" if every else "its score"
            raise ValueError(
                f"rate {self.rate!r}: site {scored[0]!r} is trained by {how} (estimator "
                f"{self.estimator!r}), which asks for a sum over rows; use another rate, or a relaxation"
            )
        sampled = sorted(set(plan.latents) - plan.analytic)
        if self.estimator.boundary and (sampled or not self.rate.analytic):
            raise ValueError(
                f"rate {self.rate!r}: the KL of site {(sampled or list(plan.latents))[0]!r} is Monte "
                f"Carlo, whose score estimator {self.estimator!r} drops; use estimator='pathwise'"
            )

    def loss_and_rows(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        step: Tensor,
    ) -> tuple[Tensor, float]:
        """The loss, and the number of rows it stands for (B times N / B of the row plate)."""
        chunks = self._chunks(model, guide, args, kwargs, step)
        log_w, outside = _join(c.log_w for c in chunks), _join(c.outside for c in chunks)
        first = chunks[0]
        batch = args[0] if args and isinstance(args[0], Batch) else None
        weight = first.scale
        if batch is not None and batch.weights is not None:
            if log_w is None:
                raise ValueError("weights: came row weights, but the model has no plate over rows")
            weight = weight * batch.weights
        value = surrogate = torch.zeros((), device=step.device)
        rows = first.plate_scale
        if log_w is not None:
            known, rows = log_w.detach(), log_w.shape[1] * rows
            weights = self.estimator.weights(self.bound, known)
            if first.boundary is not None:
                path = self.estimator.path(self.bound, known, first.beta)
                if path is not None:
                    weights, factor = _apart(weights, path, known)
                    for c, part in zip(chunks, factor.split([c.size for c in chunks]), strict=True):
                        c.boundary.factor = part  # type: ignore[union-attr]
            # an impossible particle counts nothing, while 0 times -inf is no number
            linear = torch.where(weights == 0, torch.zeros_like(weights), weights * log_w)
            if (rest := _join(c.rest for c in chunks)) is not None:
                linear = linear - self.bound.guide.weights(known) * rest
            if (score := _join(c.score for c in chunks)) is not None:
                if first.late and outside is not None:  # through these, rows depend on each other
                    reward = outside.detach() + (weight * known).sum(1)
                    surrogate = surrogate - (reward @ score).sum() / self.num_particles
                else:
                    scores, cost = self.estimator.reward(self.bound, known, args)
                    linear = linear + scores * score
                    surrogate = surrogate if cost is None else surrogate + cost
            value = value - (weight * self.bound(known)).sum()
            surrogate = surrogate - (weight * linear).sum()
        if outside is not None:
            value = value - outside.detach().mean()
            surrogate = surrogate - outside.mean()
            if (score := _join(c.outside_score for c in chunks)) is not None:
                reward = outside.detach()
                if log_w is not None:
                    reward = reward + (weight * log_w.detach()).sum(1)
                surrogate = surrogate - (reward * score).mean()
        for c in chunks if self.penalties else ():
            nats = weight * c.penalty * (c.size / self.num_particles)
            penalty = (nats if log_w is None else nats.expand(log_w.shape[1])).sum()
            value, surrogate = value + penalty.detach(), surrogate + penalty
            if c.score is not None:  # it may look at all draws of a chunk
                surrogate = surrogate + penalty.detach() * c.score.sum()
        return value + (surrogate - surrogate.detach()), rows

    def _chunks(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        step: Tensor,
    ) -> list[_Chunk]:
        try:
            return self._passes(self.plan(model, guide, args, kwargs), args, kwargs, step)
        except SitesChanged:  # the arguments may ask for other sites than before: look once more
            self._plans.pop(self._key(model, guide, args, kwargs))
            return self._passes(self.plan(model, guide, args, kwargs), args, kwargs, step)

    def _passes(
        self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], step: Tensor
    ) -> list[_Chunk]:
        number = self.estimator.particles(plan, self.num_particles)
        chunk = min(self.chunk or number, number)
        whole, left = divmod(number, chunk)
        sizes = [chunk] * whole + ([left] if left else [])
        differentiable = torch.is_grad_enabled()
        chunks: list[_Chunk] = []
        for size in sizes:
            apart = self.estimator.boundary or self.bound.guide is not self.bound
            boundary = Boundary(self.estimator.boundary) if apart and differentiable else None
            # all particles of a row look at the same data
            subsamples = chunks[0].subsamples if chunks else None
            first = sum(done.size for done in chunks)
            inputs = (plan, args, kwargs, step, first, size, boundary, subsamples)
            if len(sizes) == 1 or not differentiable:
                chunks.append(self._chunk(*inputs))
            else:  # recomputed in backward: only log weights stay in memory
                chunks.append(
                    checkpoint(
                        self._chunk,
                        *inputs,
                        use_reentrant=False,
                        context_fn=lambda: (nullcontext(), Rewound(*plan.programs)),
                    )
                )
        return chunks

    def _chunk(
        self,
        plan: Plan,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        step: Tensor,
        first: int,
        size: int,
        boundary: Boundary | None,
        subsamples: dict[str, Tensor] | None,
    ) -> _Chunk:
        model, guide = plan.programs
        scores = self.estimator.scores if self._has_scores(plan) else None
        try:
            particles = run(
                *(model, guide, args, kwargs, plan, size),
                boundary=boundary,
                scores=scores,
                subsamples=subsamples,
                treatment=self.estimator.treatment(plan, step, first, size),
            )
        except Exception as error:
            if size > 1 and not isinstance(error, SitesChanged):  # the plan's one particle ran
                error.add_note(
                    f"{size} particles stand at dim {-1 - plan.nesting}; for a program that can't "
                    "take this dim, chunk=1 runs particle by particle without it"
                )
            raise
        if not self.estimator.keeps_score(self.bound):
            scored = particles.score.keys() & particles.posterior.keys()
            particles.posterior |= {site: particles.posterior[site].detach() for site in scored}
        rate = {site: -term for site, term in self.rate(particles, step).items()}
        likelihood = self._weighed(particles, step)
        log_w, outside = (
            _add(particles.summed(likelihood, out), particles.summed(rate, out))
            for out in (False, True)
        )
        if log_w is not None:
            log_w = particles.counted(log_w)
        beta: float | Tensor = 1.0
        rest = None
        if self.estimator.boundary and boundary is not None and not self.bound.guide.linear:
            beta, rest = self._split_betas(particles, args, kwargs, step)
        return _Chunk(
            size=size,
            log_w=log_w,
            outside=outside,
            score=particles.summed(particles.score),
            outside_score=particles.summed(particles.score, outside=True),
            rest=rest,
            beta=beta,
            penalty=sum(
                (penalty(particles, step) for penalty in self.penalties),
                start=torch.zeros((), device=step.device),
            ),
            plate_scale=particles.plate_scale,
            scale=particles.scale,
            subsamples=particles.subsamples,
            boundary=boundary,
            late=plan.late,
        )

    def _weighed(self, particles: Particles, step: Tensor) -> dict[str, Tensor]:
        """log p of what is observed, times its weight."""
        if unknown := self.likelihood_weights.keys() - particles.model.keys():
            raise ValueError(
                f"likelihood_weights: came sites {sorted(unknown)}, the model's observed sites are "
                f"{sorted(particles.likelihood)}"
            )
        weights = {site: schedules.value(w, step) for site, w in self.likelihood_weights.items()}
        return {
            site: weights[site] * term if site in weights else term
            for site, term in particles.likelihood.items()
        }

    def _has_scores(self, plan: Plan) -> bool:
        """Whether any site may be trained by its score: the rest of the pass is spared it."""
        return self.estimator.scores("", True) or bool(plan.unreparameterized or plan.drawn_parents)

    def _split_betas(
        self, particles: Particles, args: tuple[Any, ...], kwargs: dict[str, Any], step: Tensor
    ) -> tuple[float | Tensor, Tensor | None]:
        """The beta that all sites share, which enters DReG's factor, and the score terms
        (beta_l - beta) log q_l of the sites that have more of it. A user's scale on a site is one."""
        betas = self.rate.betas(particles, step)
        if not betas:  # everything is observed
            return 1.0, None
        for site, beta in betas.items():
            weight = particles.weight(site)
            if isinstance(weight, Tensor) and weight.dim():
                raise ValueError(
                    f"estimator {self.estimator!r}: site {site!r} has a scale of its own that is "
                    "not one number; scale all sites alike, or use estimator='pathwise'"
                )
            if isinstance(weight, Tensor) or weight != 1:
                betas[site] = beta * weight
        numbers = [torch.as_tensor(beta) for beta in betas.values()]
        if len(betas) == 1 or all(beta is numbers[0] for beta in numbers):
            return next(iter(betas.values())), None
        if all(isinstance(beta, float | int) for beta in betas.values()):
            common: float | Tensor = min(float(beta) for beta in betas.values())
            if common == max(float(beta) for beta in betas.values()):
                return common, None
        else:
            common = torch.stack(
                [n.to(step.device, torch.get_default_dtype()) for n in numbers]
            ).amin()
        log_q = log_q_at_rest(particles, args, kwargs)
        extra = {site: (beta - common) * log_q[site] for site, beta in betas.items()}
        return common, particles.summed(extra)

    def __repr__(self) -> str:
        parts = [f"bound={self.bound!r}", f"estimator={self.estimator!r}", f"rate={self.rate!r}"]
        if self.penalties:
            parts.append(f"penalties={self.penalties!r}")
        if self.likelihood_weights:
            parts.append(f"likelihood_weights={shown(self.likelihood_weights)}")
        if self.chunk:
            parts.append(f"chunk={self.chunk}")
        return f"Objective({', '.join(parts)}, num_particles={self.num_particles})"


def _apart(weights: Tensor, path: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Weights that are nowhere 0 but at impossible particles, and what the gradient that arrives at a
    boundary copy is multiplied by, so that it counts ``path``; all ``[K, B]``."""
    kept = torch.where(weights < 0, weights.clamp(max=-_TINY), weights.clamp(min=_TINY))
    zero = torch.zeros_like(weights)
    impossible = log_w == -torch.inf
    return torch.where(impossible, zero, kept), torch.where(impossible, zero, path / kept)


def _join(parts: Iterable[Tensor | None]) -> Tensor | None:
    """The chunks' terms ``[k, ...]`` along the particles."""
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0] if tensors else None


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
