"""Discrete draws summed out: particles run over the joint support of a row's discrete sites."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.objectives import estimators
from pyro_vae.objectives.bounds import Bound
from pyro_vae.objectives.estimators import Estimator
from pyro_vae.objectives.particles import Particles, Treatment, run
from pyro_vae.objectives.plan import Plan, SitesChanged, make_plan
from pyro_vae.objectives.swap import preserved
from pyro_vae.objectives.tracing import Program, core

__all__ = ["Enumerate", "enumerated_log_p"]

LIMIT = 1024


class Enumerate(Estimator):
    """The exact expectation over the discrete draws of a row, its gradient included.

    sum_z q(z | x) (log p(x, z) - log q(z | x)) over the joint support of the guide's sites without
    ``rsample``, whatever their order and their event; the others are drawn, and follow their path.
    Agrees with Pyro's ``TraceEnum_ELBO`` where the guide is enumerated. Every value is one particle of
    the programs, so this is for small supports; ``chunk`` bounds the memory. ``num_particles`` repeats
    the sum, which is of use where other sites are drawn.

    Args:
        limit: on the number of values of a row's discrete sites together.

    Raises:
        ValueError: a bound that is no mean over particles; at the first call, a support that is too
            large or has no end, a site outside the plate over rows.
    """

    enumerates = True
    unpenalized = "penalties see particles as draws"

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit

    def refusal(self, bound: Bound, num_particles: int) -> str | None:
        if bound.linear and bound.guide is bound:
            return None
        return "an exact sum over z is an expectation of log weights; use the elbo"

    def untrained(self, site: str, plan: Plan) -> str | None:
        if site in plan.outside:
            return "lies outside the plate over rows, which all rows would share; use 'score'"
        if plan.late:
            return (
                "comes before a site outside the plate over rows, whose density all rows together "
                "would weigh; draw that site first, or use 'score'"
            )
        return _too_many(plan, self.limit)

    def particles(self, plan: Plan, num_particles: int) -> int:
        return num_particles * _values(plan)

    def treatment(self, plan: Plan, step: Tensor, first: int, size: int) -> Treatment:
        return _Joint(plan, first, size)


def enumerated_log_p(
    model: Program, guide: Program, *args: Any, limit: int = 2**16, chunk: int = LIMIT
) -> Tensor:
    """log p(x) = log sum_z p(x, z) of each row, ``[B]`` nats, without gradient: exact where all latents
    are discrete and few. The guide only says which they are.

    Args:
        args: of the programs: a batch.
        limit: on the number of values of a row's latents together.
        chunk: values at a time.

    Raises:
        ValueError: a latent that can't be listed, or that the guide does not draw; too many values.
    """
    with torch.no_grad(), preserved(model, guide), poutine.block():
        plan = make_plan(model, guide, args, {})
        if why := _too_many(plan, limit):
            raise ValueError(f"enumerated_log_p: site {next(iter(plan.discrete))!r} {why}")
        table = run(model, guide, args, {}, plan, 1)
        drawn = {name for name, site in table.model.items() if not site["is_observed"]}
        if continuous := [s for s in drawn | table.posterior.keys() if s not in plan.discrete]:
            raise ValueError(
                f"enumerated_log_p: sites {sorted(continuous)} are latents that are not discrete sites "
                "of the guide; use importance sampling (evaluate)"
            )
        if plan.outside:
            raise ValueError(
                f"enumerated_log_p: sites {sorted(plan.outside)} lie outside the plate over rows; put "
                "every site into that plate"
            )
        total, count = [], _values(plan)
        for first in range(0, count, chunk):
            joint = _Joint(plan, first, size := min(chunk, count - first))
            particles = run(model, guide, args, {}, plan, size, treatment=joint)
            terms = (particles.likelihood, particles.prior, joint.volume(particles))
            sums = [nats for term in terms if (nats := particles.summed(term)) is not None]
            total.append(torch.stack(torch.broadcast_tensors(*sums)).sum(0))
        return torch.cat(total).logsumexp(0) - math.log(count)


class _Joint(Treatment):
    """Particle k has the k-th value of the joint support; its share is its probability times their
    number, since bounds take a mean over particles. Where entries are data it is 1."""

    def __init__(self, plan: Plan, first: int, size: int) -> None:
        super().__init__()
        self.plan, self.first, self.size = plan, first, size
        self.stride, self.strides = 1, dict[str, int]()
        for name, site in plan.discrete.items():
            self.strides[name] = self.stride
            self.stride *= (site.values or 1) ** site.entries

    def _pyro_sample(self, msg: Any) -> None:
        if (
            msg["name"] not in self.plan.discrete or msg["done"]
        ):  # the model gets the guide's values
            return
        value, observed = self._value(msg["name"], msg["fn"]), msg["infer"].get("observed")
        msg["value"] = value if observed is None else torch.where(observed, msg["value"], value)

    def _value(self, name: str, fn: Any) -> Tensor:
        """``[(K), *plates, *event]``, the same in every row."""
        entry, site = core(fn), self.plan.discrete[name]
        event = fn.event_shape[: fn.event_dim - entry.event_dim]
        plates = fn.batch_shape[1 if self.size > 1 else 0 :]
        rows = {len(plates) + dim for dim in self.plan.rows}
        shape = [1 if dim in rows else size for dim, size in enumerate(plates)] + list(event)
        if math.prod(shape) != site.entries:
            raise SitesChanged(
                f"site {name!r} had {site.entries} entries a row and has now {math.prod(shape)}"
            )
        support = entry.enumerate_support(expand=False).reshape(-1, *entry.event_shape)
        places = [self.strides[name] * len(support) ** i for i in range(site.entries)]
        index = torch.arange(self.first, self.first + self.size, device=support.device)
        strides = torch.tensor(places, device=support.device)
        digits = index[:, None] // strides % len(support)
        values: Tensor = support[digits].reshape(self.size, *shape, *entry.event_shape)
        return (values if self.size > 1 else values[0]).expand(fn.shape())

    def volume(self, particles: Particles) -> dict[str, Tensor]:
        """site -> log number of values of each entry that is drawn, ``[K, B, *rest]``."""
        out = {}
        for name, site in self.plan.discrete.items():
            here = particles.guide[name]
            number = torch.full_like(particles.log_draw(here), math.log(site.values or 1))
            out[name] = particles.drawn(here, number)
        return out

    def share(self, particles: Particles) -> Tensor | None:
        sites = [particles.guide[name] for name in self.plan.discrete]
        log_q = {s["name"]: particles.drawn(s, particles.log_draw(s)) for s in sites}
        parts = [particles.summed(terms) for terms in (log_q, self.volume(particles))]
        return torch.exp(parts[0] + parts[1]) if sites else None  # type: ignore[operator]


def _values(plan: Plan) -> int:
    """Number of values of a row's discrete sites together."""
    return math.prod((site.values or 1) ** site.entries for site in plan.discrete.values())


def _too_many(plan: Plan, limit: int) -> str | None:
    """Why the joint support can't be listed, and the cure, or None."""
    cure = "use estimator='score', 'vimco' or a relaxation"
    if endless := [name for name, site in plan.discrete.items() if site.values is None]:
        return f"can't be enumerated: values of {endless} can't be listed; {cure}"
    if _values(plan) <= limit:
        return None
    sizes = [f"{name!r}: {s.values}**{s.entries}" for name, s in plan.discrete.items()]
    number = f"{{{', '.join(sizes)}}} values of a row"
    return f"can't be enumerated: came {number}, wanted <= {limit} together; {cure}"


estimators.BY_NAME["enumerate"] = Enumerate
