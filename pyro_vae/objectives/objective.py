"""The objective: bound x estimator x rate x penalties, on any Pyro model and guide."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer.elbo import ELBO, ELBOModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyro_vae.batch import Batch
from pyro_vae.objectives import estimators
from pyro_vae.objectives.bounds import Bound, Elbo
from pyro_vae.objectives.estimators import Estimator
from pyro_vae.objectives.particles import Boundary, Particles, log_q_at_rest, run
from pyro_vae.objectives.plan import Plan, SitesChanged, factor_blockers, make_plan
from pyro_vae.objectives.rates import MonteCarlo, Rate
from pyro_vae.objectives.swap import Rewound, owner

__all__ = ["Objective", "ObjectiveModule", "refusal"]

Program = Callable[..., Any]
Penalty = Callable[[Particles], Tensor]
_MAX_PLANS = 64


def refusal(bound: Bound, estimator: Estimator, rate: Rate) -> str | None:
    """Why a combination is refused, naming both parts; None if its gradient is unbiased."""
    if rate.analytic and not bound.linear:
        return f"rate {rate!r} inside bound {bound!r} is no bound; use MonteCarlo()"
    if why := estimator.refusal(bound):
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


class Objective(ELBO):
    """A loss for a Pyro model and guide, made of orthogonal parts.

    ``objective(model, guide)`` is an ``nn.Module`` whose call returns the loss; the objective itself
    goes into ``pyro.infer.SVI``. The loss is minus the bound, summed over rows, times N / B of the
    row plate (nats). Its value is the bound's; its gradient is the estimator's.

    Args:
        bound: log weights ``[K, B]`` -> ``[B]``.
        estimator: how its gradient is taken, an ``Estimator`` or its name.
        rate: what weighs log q - log p(z).
        penalties: callables of the ``Particles`` that return nats per row, ``[]`` or ``[B]``; those
            that are modules own parameters, which are trained with the rest. With ``chunk``, the
            mean over chunks.
        num_particles: K.
        chunk: particles processed at a time. Value and gradient stay what they are, training memory
            does not grow with K. ``chunk=1`` runs particle by particle without a particle dim.

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
    ) -> None:
        numbers = {"num_particles": num_particles, "chunk": 1 if chunk is None else chunk}
        for name, number in numbers.items():
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"Objective: came {name}={number!r}, wanted a whole number >= 1")
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.bound = bound or Elbo()
        self.estimator = estimators.get(estimator)
        self.rate = rate or MonteCarlo()
        self.penalties = tuple(penalties)
        self.chunk = chunk
        self.modules = nn.ModuleList(p for p in self.penalties if isinstance(p, nn.Module))
        if why := refusal(self.bound, self.estimator, self.rate):
            raise ValueError(f"Objective: {why}")
        self._plans: dict[Any, Plan] = {}
        self._steps: dict[Any, tuple[Program, Program, Tensor]] = {}  # of each pair under SVI

    @property
    def recomputes(self) -> bool:
        """Whether backward runs the programs again, chunk by chunk."""
        return self.chunk is not None and self.chunk < self.num_particles

    def __call__(self, model: Program, guide: Program) -> ObjectiveModule:
        """The loss of a pair as a module that holds the parameters of model, guide and objective."""
        return ObjectiveModule(model, guide, self)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kw: Any) -> Tensor:
        """The loss as a scalar tensor, at the step that ``SVI`` has reached with this pair."""
        return self.loss_and_rows(model, guide, args, kw, self._step(model, guide))[0]

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, without gradient."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, its gradient added to the parameters; advances the schedules by one step."""
        if len(self.modules):
            pyro.module(
                f"objective_{id(self.modules)}", self.modules
            )  # the store has one name each
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        step = self._step(model, guide) + 1
        self._steps[_identity(model), _identity(guide)] = model, guide, step
        return loss.detach()

    def _step(self, model: Program, guide: Program) -> Tensor:
        pair = _identity(model), _identity(guide)
        return self._steps[pair][2] if pair in self._steps else torch.zeros((), dtype=torch.long)

    def rows(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The bound of each row ``[B]`` in nats, without gradient, N / B or row weights.

        Raises:
            ValueError: no plate over rows.
        """
        return self.rows_at(model, guide, args, kwargs, self._step(model, guide))

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
            programs.append((*_identity(program), training))
        return (
            *programs,
            (batch.sites, batch.incomplete) if batch is not None else None,
            tuple(map(type, args)),
            tuple((name, type(value)) for name, value in kwargs.items()),
        )

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("an Objective fills Particles, not a pair of traces")

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
            if not self.estimator.scores(site, False):
                raise ValueError(
                    f"estimator {self.estimator!r}: site {site!r} of the guide has no rsample and "
                    "would not be trained; use estimator='score'"
                )
        for site in plan.drawn_parents:
            if not self.estimator.scores(site, False):
                raise ValueError(
                    f"estimator {self.estimator!r}: missing entries of site {site!r} are drawn "
                    "without rsample and other sites depend on them, so its parameters would get no "
                    "gradient; use estimator='score', or put the site into the guide"
                )
        if self.estimator.boundary:
            blockers = dict(plan.score_blockers)
            if not blockers and not self.bound.linear:
                blockers = factor_blockers(plan, args, kwargs)
            for site, why in blockers.items():
                raise ValueError(
                    f"estimator {self.estimator!r}: site {site!r}: {why}; use estimator='pathwise'"
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
            if (rest := _join(c.rest for c in chunks)) is not None:
                log_w = log_w - rest
            weights = self.bound.weights(known)
            # an impossible particle counts nothing, while 0 times -inf is no number
            linear = torch.where(weights == 0, torch.zeros_like(weights), weights * log_w)
            if (score := _join(c.score for c in chunks)) is not None:
                if first.late and outside is not None:  # through these, rows depend on each other
                    reward = outside.detach() + (weight * known).sum(1)
                    surrogate = surrogate - (reward @ score).sum() / self.num_particles
                else:
                    linear = linear + self.bound.reward(known) * score
            value = value - (weight * self.bound(known)).sum()
            surrogate = surrogate - (weight * linear).sum()
            if first.boundary is not None:
                factor = self.estimator.factor(self.bound, known, first.beta)
                if factor is not None:
                    for c, part in zip(chunks, factor.split([c.size for c in chunks]), strict=True):
                        c.boundary.factor = part  # type: ignore[union-attr]
        if outside is not None:
            value = value - outside.detach().mean()
            surrogate = surrogate - outside.mean()
            if (score := _join(c.outside_score for c in chunks)) is not None:
                reward = outside.detach()
                if log_w is not None:
                    reward = reward + (weight * log_w.detach()).sum(1)
                surrogate = surrogate - (reward * score).mean()
        if self.penalties:
            nats = sum(c.penalty * (c.size / self.num_particles) for c in chunks)
            penalty = (
                (weight * nats).sum()
                if log_w is None
                else (weight * nats).expand(log_w.shape[1]).sum()
            )
            value, surrogate = value + penalty.detach(), surrogate + penalty
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
        chunk = min(self.chunk or self.num_particles, self.num_particles)
        whole, left = divmod(self.num_particles, chunk)
        sizes = [chunk] * whole + ([left] if left else [])
        differentiable = torch.is_grad_enabled()
        chunks: list[_Chunk] = []
        for size in sizes:
            boundary = Boundary() if self.estimator.boundary and differentiable else None
            # all particles of a row look at the same data
            subsamples = chunks[0].subsamples if chunks else None
            inputs = (plan, args, kwargs, step, size, boundary, subsamples)
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
            )
        except Exception as error:
            if size > 1 and not isinstance(error, SitesChanged):  # the plan's one particle ran
                error.add_note(
                    f"{size} particles stand at dim {-1 - plan.nesting}; for a program that can't "
                    "take this dim, chunk=1 runs particle by particle without it"
                )
            raise
        if self.bound.linear:  # E[grad log q] = 0: noise that a mean over particles can do without
            scored = particles.score.keys() & particles.posterior.keys()
            particles.posterior |= {site: particles.posterior[site].detach() for site in scored}
        rate = {site: -term for site, term in self.rate(particles, step).items()}
        log_w, outside = (
            _add(particles.total(particles.likelihood, out), particles.total(rate, out))
            for out in (False, True)
        )
        beta: float | Tensor = 1.0
        rest = None
        if boundary is not None and not self.bound.linear:
            beta, rest = self._split_betas(particles, args, kwargs, step)
        return _Chunk(
            size=size,
            log_w=log_w,
            outside=outside,
            score=particles.total(particles.score),
            outside_score=particles.total(particles.score, outside=True),
            rest=rest,
            beta=beta,
            penalty=sum((penalty(particles) for penalty in self.penalties), start=torch.zeros(())),
            plate_scale=particles.plate_scale,
            scale=particles.scale,
            subsamples=particles.subsamples,
            boundary=boundary,
            late=plan.late,
        )

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
        return common, particles.total(extra)

    def __repr__(self) -> str:
        parts = [f"bound={self.bound!r}", f"estimator={self.estimator!r}", f"rate={self.rate!r}"]
        if self.penalties:
            parts.append(f"penalties={self.penalties!r}")
        if self.chunk:
            parts.append(f"chunk={self.chunk}")
        return f"Objective({', '.join(parts)}, num_particles={self.num_particles})"


class ObjectiveModule(ELBOModule):
    """The loss of one pair under one objective: ``module(batch)`` is a scalar to differentiate.

    Its parameters are those of model, guide and objective. Its ``step`` is what schedules read; it
    advances by one with every call in training mode with gradients on.
    """

    elbo: Objective
    step: Tensor

    def __init__(self, model: Program, guide: Program, objective: Objective) -> None:
        super().__init__(model, guide, objective)  # type: ignore[arg-type]
        for name, program in (("_model_owner", model), ("_guide_owner", guide)):
            if not isinstance(program, nn.Module) and (module := owner(program)) is not None:
                setattr(self, name, module)
        self.penalties = objective.modules
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.loss_and_rows(*args, **kwargs)[0]

    def rows(self, *args: Any, **kwargs: Any) -> Tensor:
        """The bound of each row ``[B]`` in nats at the module's step; see ``Objective.rows``."""
        return self.elbo.rows_at(self.model, self.guide, args, kwargs, self.step)

    def loss_and_rows(self, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
        """The loss and the number of rows it stands for."""
        out = self.elbo.loss_and_rows(self.model, self.guide, args, kwargs, self.step.clone())
        if self.training and torch.is_grad_enabled():
            self.step += 1
        return out


def _identity(program: Program) -> tuple[int, int]:
    """Of what is called: a bound method is a new object each time, its owner and function are not."""
    return id(getattr(program, "__self__", program)), id(getattr(program, "__func__", program))


def _join(parts: Iterable[Tensor | None]) -> Tensor | None:
    """The chunks' terms ``[k, ...]`` along the particles."""
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0] if tensors else None


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
