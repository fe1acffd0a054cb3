"""The two ends of an annealing path: what chains start from and log p(x, z), in real coordinates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae.batch import Batch, Condition, take
from pyro_vae.compiled import Fast
from pyro_vae.evaluation.hamiltonian import State
from pyro_vae.evaluation.likelihood import (
    admitted,
    of_rows,
)
from pyro_vae.evaluation.sites import is_discrete, is_drawn, where_data
from pyro_vae.objectives.particles import run
from pyro_vae.objectives.plan import Plan, dependents, make_plan
from pyro_vae.objectives.support import check_data, kind
from pyro_vae.objectives.tracing import Site, close, plate_scale, trace, unmasked_fn, unwrap

__all__ = ["Pair", "Rows", "Space"]

Program = Callable[..., Any]


class Pair:
    """A model and what its chains start from, looked at once.

    Attributes:
        transforms: latent -> from real coordinates to its support, or None where that is all real.
    """

    def __init__(
        self, what: str, model: Program, guide: Program | None, data: Any, compile: str
    ) -> None:
        self.what, self.model, self.guide, self.compile = what, model, guide, compile
        self.start = "prior" if guide is None else "guide"
        self.fast: dict[tuple[int, int], Fast] = {}
        rows = take(data, torch.tensor([0, len(data) - 1]))  # two, so that bounds can differ
        sites = self.prior(rows)
        drawn = set() if guide is None else self._drawn(guide, rows)
        self.transforms = {
            name: _transform(what, sites[name]) for name in self._latents(rows, sites, drawn)
        }
        if not self.transforms:
            raise ValueError(
                f"{what}: no density of the data depends on a latent, so that log p is that of the "
                "data sites; evaluate gives it"
            )
        if guide is not None and (lacking := set(self.transforms) - drawn):
            raise ValueError(
                f"{what}: the guide does not draw {sorted(lacking)}; start from the prior: guide=None"
            )
        values = {name: sites[name]["value"] for name in self.transforms}
        latents = _latents(sites, self.transforms)
        self.plan = make_plan(model, guide or partial(_given, latents, values), (rows,), {})
        of_rows(what, self.plan)
        for name in self.transforms:
            scale = sites[name]["scale"] / plate_scale(sites[name], self.plan.rows)
            if not self.plan.common_scale and not close(scale, 1.0):
                raise ValueError(
                    f"{what}: site {name!r} is a latent whose density poutine.scale weighs, so that "
                    "chains can't start from it; drop the scale"
                )
        check_data(self.plan.supports, data.look() if isinstance(data, Batch) else data)
        if guide is not None:
            self._check_density(guide, rows)

    def prior(self, rows: Any, size: int = 1, nesting: int = 0) -> dict[str, Site]:
        """The model's sites, data where observed."""
        bare, batch = unwrap(self.model, (rows,))
        conditioned = [Condition(batch)] if batch is not None else []
        return trace(bare, (rows,), {}, conditioned, size, nesting)[0]

    def _drawn(self, guide: Program, rows: Any) -> set[str]:
        """What the guide draws."""
        around = [Condition(rows, proposing=True)] if isinstance(rows, Batch) else []
        sites, _ = trace(guide, (rows,), {}, around)
        if extra := [name for name, site in sites.items() if site["infer"].get("is_auxiliary")]:
            raise ValueError(
                f"{self.what}: the guide has an auxiliary site {extra[0]!r}, so that the density of its "
                "latents is not known; start from the prior: guide=None"
            )
        return {name for name, site in sites.items() if is_drawn(site)}

    def _latents(self, rows: Any, sites: Mapping[str, Site], drawn: set[str]) -> list[str]:
        """Sites that are not data, in part at least, and on which densities of data depend, directly or
        through others; and those that the guide draws."""
        bare, _ = unwrap(self.model, (rows,))
        values = {name: site["value"] for name, site in sites.items()}
        counts = {name for name, site in sites.items() if where_data(site) is not False} | drawn
        latents = []
        for name in reversed([n for n, site in sites.items() if where_data(site) is not True]):
            moved = dependents(bare, (rows,), {}, values, name, unmasked_fn(sites[name]))
            if name in drawn or moved & counts:
                counts.add(name)
                latents.append(name)
        return latents[::-1]

    def _check_density(self, guide: Program, rows: Any) -> None:
        table = admitted(self.what, self.plan, self.model, guide, (rows,))
        try:
            for site in table.guide.values():
                site["fn"].log_prob(site["value"].clone())  # a clone is not its own draw
        except (KeyError, NotImplementedError) as error:
            raise ValueError(
                f"{self.what}: the guide knows the density of its own draws alone ({error}), as a flow "
                "without inverse does; start from the prior: guide=None"
            ) from error


class Rows:
    """The two ends of the path for the rows of a batch."""

    def __init__(self, pair: Pair, batch: Any, chains: int, calls: float) -> None:
        self.pair, self.batch, self.chains = pair, batch, chains
        self.space = Space.of(pair, pair.prior(batch))
        key = len(batch), chains
        if key not in pair.fast:
            function = partial(_densities, pair.model, pair.guide, self.space)
            pair.fast[key] = Fast(function, pair.compile, calls)
        self.fast = pair.fast[key]

    def start(self) -> Tensor:
        """Coordinates ``[K, B, D]`` of draws from the guide, or from the prior."""
        pair, plan = self.pair, self.pair.plan
        if pair.guide is None:
            sites = pair.prior(self.batch, self.chains, plan.nesting)
        else:
            sites = run(pair.model, pair.guide, (self.batch,), {}, plan, self.chains).guide
        values = {name: sites[name]["value"] for name in pair.transforms}
        return self.space.coordinates(values, self.chains)

    def __call__(self, at: Tensor) -> State:
        width = at.shape[-1]
        base, ratio, *slopes = self.fast((self.batch, at)).split([1, 1, width, width], -1)
        return State(at, base[..., 0], ratio[..., 0], *slopes)


def _densities(
    model: Program, guide: Program | None, space: Space, given: tuple[Any, Tensor]
) -> Tensor:
    """``[K, B, 2 + 2 D]``: log density of the start in coordinates, log p(x, z) - log start(z), and
    their gradients."""
    rows, at = given
    with torch.enable_grad():
        at = at.detach().requires_grad_()
        values, log_volume = space.values(at, rows)
        program = guide or partial(_given, space.latents, values)
        table = run(
            model, program, (rows,), {}, space.plan, len(at), subsamples=values
        )  # which the guide replays
        zero = torch.zeros_like(log_volume)
        likelihood, prior, posterior = (
            zero if (total := table.summed(terms)) is None else total
            for terms in (table.likelihood, table.prior, table.posterior)
        )
        start, ratio = (
            (prior, likelihood) if guide is None else (posterior, likelihood + prior - posterior)
        )
        ends = [(start + log_volume).expand_as(zero), ratio.expand_as(zero)]
        slopes = [
            torch.autograd.grad(end.sum(), at, retain_graph=True, materialize_grads=True)[0]
            for end in ends
        ]
    return torch.cat([*(end.detach()[..., None] for end in ends), *slopes], -1)


def _given(latents: Mapping[str, _Latent], values: Mapping[str, Tensor], *args: Any) -> None:
    """The guide that draws nothing of its own."""
    standing = {plate for latent in latents.values() for plate in latent.plates}
    plates = {plate: pyro.plate(plate[0], plate[1], dim=plate[2]) for plate in sorted(standing)}
    for name, latent in latents.items():
        with ExitStack() as stack:
            for plate in latent.plates:
                stack.enter_context(plates[plate])
            point = dist.Delta(values[name]).to_event(latent.event_dim)  # entry by entry
            pyro.sample(name, point)


@dataclass(frozen=True)
class _Latent:
    """Where a latent stands, and its shape.

    Attributes:
        plates: name, size and dim of each plate around it.
        shape: ``[*plates]``.
        event: shape of the coordinates of one event.
        event_dim: of its values.
        transform: from coordinates to values, or None.
    """

    plates: tuple[tuple[str, int, int], ...]
    shape: tuple[int, ...]
    event: tuple[int, ...]
    event_dim: int
    transform: Any


def _latents(sites: Mapping[str, Site], transforms: Mapping[str, Any]) -> dict[str, _Latent]:
    latents = {}
    for name, transform in transforms.items():
        site, value = sites[name], sites[name]["value"]
        event_dim = unmasked_fn(site).event_dim
        leading = value.dim() - event_dim
        at = value if transform is None else transform.inv(value)
        frames = (frame for frame in site["cond_indep_stack"] if frame.vectorized)
        latents[name] = _Latent(
            tuple((frame.name, frame.size, frame.dim) for frame in frames),
            tuple(value.shape[:leading]),
            tuple(at.shape[leading:]),
            event_dim,
            transform,
        )
    return latents


@dataclass(frozen=True)
class Space:
    """Real coordinates ``[K, B, D]`` of all latents of a batch."""

    plan: Plan
    latents: Mapping[str, _Latent]

    @classmethod
    def of(cls, pair: Pair, sites: Mapping[str, Site]) -> Space:
        return cls(pair.plan, _latents(sites, pair.transforms))

    def coordinates(self, values: Mapping[str, Tensor], chains: int) -> Tensor:
        """Of values ``[(K), *plates, *event]``."""
        parts = []
        for name, latent in self.latents.items():
            at = values[name] if latent.transform is None else latent.transform.inv(values[name])
            at = self.plan.canonical(at, len(latent.event), chains, True)
            parts.append(at.reshape(*at.shape[:2], -1))
        return torch.cat(parts, -1)

    def values(self, at: Tensor, rows: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Values ``[(K), *plates, *event]``, data where the rows have them, and the log determinant of
        their Jacobian ``[K, B]``."""
        values, log_volume = {}, torch.zeros_like(at[..., 0])
        widths = [math.prod((*self._others(x), *x.event)) for x in self.latents.values()]
        for (name, latent), part in zip(self.latents.items(), at.split(widths, -1), strict=True):
            inside = value = self._in_plates(part, latent)
            if latent.transform is not None:
                value = latent.transform(inside)
                term = latent.transform.log_abs_det_jacobian(inside, value)
                term = self.plan.canonical(term, 0, len(at), True)
                log_volume = log_volume + term.reshape(*at.shape[:2], -1).sum(-1)
            if isinstance(rows, Batch) and name in rows:
                value = torch.where(rows.mask(name), rows[name].to(value), value)
            values[name] = value
        return values, log_volume

    def _padded(self, latent: _Latent) -> list[int]:
        return [1] * (self.plan.nesting - len(latent.shape)) + [*latent.shape]

    def _others(self, latent: _Latent) -> list[int]:
        """Sizes of the plates inside rows."""
        rows = {self.plan.nesting + dim for dim in self.plan.rows}
        return [size for i, size in enumerate(self._padded(latent)) if i not in rows]

    def _in_plates(self, part: Tensor, latent: _Latent) -> Tensor:
        """The inverse of ``Plan.canonical``."""
        nesting, rows = self.plan.nesting, self.plan.rows
        sizes = [self._padded(latent)[nesting + dim] for dim in rows]
        whole = part.reshape(len(part), *sizes, *self._others(latent), *latent.event)
        back = [1 + nesting + dim for dim in rows]
        whole = whole.movedim(list(range(1, 1 + len(rows))), back)
        return whole if len(part) > 1 else whole[0]


def _transform(what: str, site: Site) -> Any:
    """From real coordinates to the support of a latent, or None where that is all real.

    Raises:
        ValueError: a discrete latent; a support that no bijection is known to, that moves with other
            sites, or of a latent that is data in part.
    """
    name, fn = site["name"], unmasked_fn(site)
    if is_discrete(fn):
        raise ValueError(
            f"{what}: site {name!r} is a discrete latent ({kind(fn)}), which Hamiltonian chains can't "
            "move; sum it out in the model"
        )
    try:
        support = fn.support
        bare = support
        while hasattr(bare, "base_constraint"):
            bare = bare.base_constraint
        if bare is constraints.real:
            return None
        wrapped = fn.event_dim - bare.event_dim
        bare = _fixed(bare)
        transform = None if bare is None else biject_to(constraints.independent(bare, wrapped))
    except (NotImplementedError, AttributeError):
        transform = None
    if transform is None or isinstance(where_data(site), Tensor):
        why = "is data in part" if transform is not None else "moves, or is not known"
        raise ValueError(
            f"{what}: site {name!r} is a latent whose support ({kind(fn)}) is not all real and {why}; "
            "transform a real latent in the model instead"
        )
    return transform


def _fixed(constraint: Any) -> Any:
    """A constraint with numbers for its bounds; None where they are not everywhere the same."""
    fixed = copy.copy(constraint)
    for name, bound in vars(constraint).items():
        if isinstance(bound, Tensor):
            if bool((bound != bound.reshape(-1)[0]).any()):
                return None
            setattr(fixed, name, float(bound.reshape(-1)[0]))
    return fixed
