"""The first look at a pair: does it fit together, and what can later runs rely on?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import dropwhile
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from torch import Tensor, nn

from pyro_vae.batch import Batch, Condition
from pyro_vae.objectives.support import Support, supports
from pyro_vae.objectives.swap import owner, parameters, preserved, shaken, swapped
from pyro_vae.objectives.tracing import (
    Program,
    Replay,
    Site,
    core,
    elementwise,
    elementwise_kl,
    is_point,
    plate_scale,
    trace,
    unmasked_fn,
    unwrap,
)

__all__ = [
    "Discrete",
    "Plan",
    "Problem",
    "SitesChanged",
    "broadcasts",
    "check_sites",
    "counted",
    "dependents",
    "factor_blockers",
    "make_plan",
    "problems",
    "site_names",
]


SUPPORT = 32  # values of a support that are tried


class Discrete(NamedTuple):
    """A site of the guide whose draws have no path.

    Attributes:
        kind: its innermost distribution's type.
        values: of one entry, None if they can't be listed.
        entries: independent ones, of one row.
    """

    kind: type
    values: int | None
    entries: int


class SitesChanged(ValueError):
    """The sites of a run are not those of the plan."""


@dataclass(frozen=True)
class Plan:
    """What one run of a pair shows and every later run relies on; made once per kind of batch.

    Attributes:
        nesting: number of plate dims; the particle plate stands at dim ``-1 - nesting``.
        rows: dims of the plates over rows, which all local sites share.
        outside: sites outside those plates (global latents), which get their own ``[K]`` column.
        late: whether one of them comes after a local site, on whose draw it may depend.
        common_scale: all local sites carry one user scale, which is then taken outside the bound
            (scales that are numbers are compared anew in every pass).
        analytic: latent sites whose KL is known in closed form, given the order of the sites.
        notes: why a site is not among them.
        discrete: guide sites that are drawn without ``rsample``.
        drawn_parents: sites drawn from the model without ``rsample`` that densities depend on.
        subsampled: plates inside a row that are subsampled.
        sites: names of the guide's and of the model's sites, and whether each is observed.
        score_blockers: why log q of a site can't be taken at boundary copies.
        supports: of the sites that the batch observes, where all rows have the same one.
    """

    programs: tuple[Program, Program]
    nesting: int
    rows: tuple[int, ...]
    outside: frozenset[str]
    late: bool
    common_scale: bool
    analytic: frozenset[str]
    notes: tuple[str, ...]
    drawn_parents: tuple[str, ...]
    subsampled: tuple[str, ...]
    sites: tuple[Any, ...]
    score_blockers: Mapping[str, str] = field(default_factory=dict)
    supports: Mapping[str, Support] = field(default_factory=dict)
    discrete: Mapping[str, Discrete] = field(default_factory=dict)

    @property
    def unreparameterized(self) -> tuple[str, ...]:
        """Names of the guide's sites without ``rsample``."""
        return tuple(self.discrete)

    @property
    def latents(self) -> tuple[str, ...]:
        """Sites of the guide."""
        return tuple(name for name, _ in self.sites[0])

    def canonical(self, tensor: Tensor, event_dim: int, particles: int, local: bool) -> Tensor:
        """``[(K), *plates, *event]`` -> ``[K, B, *rest]``, or ``[K, *rest]`` outside the rows."""
        plates = self.nesting + (particles > 1)
        missing = plates - (tensor.dim() - event_dim)
        tensor = tensor[(None,) * missing] if missing > 0 else tensor
        if particles == 1:
            tensor = tensor[None]
        if not local:
            return tensor
        rows = [self.nesting + 1 + dim for dim in self.rows]
        if rows != [1]:
            tensor = tensor.movedim(rows, list(range(1, 1 + len(rows))))
            tensor = tensor.flatten(1, len(rows))
        others = range(2, 2 + self.nesting - len(rows))
        return tensor.squeeze([dim for dim in others if tensor.shape[dim] == 1])

    def spread(self, factor: Tensor, shape: torch.Size, event_dim: int) -> Tensor:
        """``[K, B]`` -> broadcastable to a sample ``[(K), *plates, *event]`` of ``shape``."""
        plates = len(shape) - event_dim
        new = [1] * plates
        if len(factor) > 1:
            new[0] = len(factor)
        for dim in self.rows:
            new[plates + dim] = shape[plates + dim]
        return factor.reshape(new + [1] * event_dim)


def make_plan(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Plan:
    """Run a pair once, check that it fits together and read off its structure.

    Leaves the random state and the buffers as they were.

    Raises:
        ValueError: naming the site, for guide sites that the model lacks, shapes or supports that
            disagree, data that no site takes, a site that broadcasts beyond its plates.
    """
    with preserved(model, guide), torch.no_grad(), poutine.block():
        bare, batch = unwrap(model, args)
        conditioned = [Condition(batch, proposing=True)] if batch is not None else []
        guide_sites, subsamples = trace(guide, args, kwargs, conditioned)
        values = {**subsamples, **{name: site["value"] for name, site in guide_sites.items()}}
        conditioned = [Condition(batch, proposed=values)] if batch is not None else []
        model_sites, _ = trace(bare, args, kwargs, [Replay(values), *conditioned])
        check_sites(model_sites, guide_sites, batch)
        rows, outside = _rows(model_sites, guide_sites)
        analytic, notes = _analytic(model_sites, guide_sites)
        parents = _drawn_parents(bare, args, kwargs, model_sites, guide_sites, subsamples)
        blockers = _score_blockers(guide, args, kwargs, guide_sites, Replay(values))
    sites = [*model_sites.values(), *guide_sites.values()]
    local = [site for site in sites if site["name"] not in outside]
    dims = [f.dim for site in sites for f in site["cond_indep_stack"] if f.vectorized]
    return Plan(
        programs=(model, guide),
        nesting=-min(dims, default=0),
        rows=rows,
        outside=outside,
        late=any(_late(sites, outside) for sites in (guide_sites, model_sites)),
        common_scale=_common_scale(local, rows),
        analytic=analytic,
        notes=notes,
        drawn_parents=parents,
        subsampled=tuple(
            sorted(
                {
                    frame.name
                    for site in local
                    for frame in site["cond_indep_stack"]
                    if frame.dim not in rows and frame.full_size != frame.size
                }
            )
        ),
        sites=site_names(guide_sites, model_sites),
        score_blockers=blockers,
        supports=supports(model_sites, batch),
        discrete={
            name: _discrete(site, () if name in outside else rows)
            for name, site in guide_sites.items()
            if not site["fn"].has_rsample
            and not site["is_observed"]
            and site["infer"].get("observed") is not True
        },
    )


def _discrete(site: Site, rows: tuple[int, ...]) -> Discrete:
    fn, values = core(site["fn"]), None
    if fn.has_enumerate_support:
        with suppress(NotImplementedError):  # Binomial, where rows differ in their total count
            values = len(fn.enumerate_support(expand=False))
    shape, event_dim = site["value"].shape, site["fn"].event_dim
    of_rows = math.prod(shape[dim - event_dim] for dim in rows)
    return Discrete(type(fn), values, site["value"].numel() // of_rows // fn.event_shape.numel())


class Problem(NamedTuple):
    """What is wrong with a pair, at which site (None: with the pair as a whole), and its cure."""

    site: str | None
    found: str
    cure: str

    def __str__(self) -> str:
        where = "" if self.site is None else f"site {self.site!r}: "
        return f"{where}{self.found}; {self.cure}"


def check_sites(
    model: Mapping[str, Site], guide: Mapping[str, Site], batch: Batch | None = None
) -> None:
    """Refuse a pair that does not fit together.

    Raises:
        ValueError: the first of its ``problems``.
    """
    if problem := next(problems(model, guide, batch), None):
        raise ValueError(str(problem))


def problems(
    model: Mapping[str, Site], guide: Mapping[str, Site], batch: Batch | None = None
) -> Iterator[Problem]:
    """Where latents of model and guide differ in name, shape or support, where a site broadcasts
    beyond its plates, and whether data meet a site at all."""
    for name, q in guide.items():
        if name in model:
            yield from _disagreements(name, model[name], q)
        elif not q["infer"].get("is_auxiliary"):
            yield Problem(
                name,
                f"the guide draws it, but the model's sites are {list(model)}",
                "rename it, or mark it infer={'is_auxiliary': True}",
            )
    for name, q in guide.items():
        if isinstance(core(q["fn"]), torch.distributions.OneHotCategoricalStraightThrough):
            yield Problem(
                name,
                "the gradient of a straight-through draw is biased",
                "use OneHotCategorical with estimator='score'",
            )
    for program, sites in (("guide", guide), ("model", model)):  # the model sees the guide's draws
        for site in sites.values():
            yield from broadcasts(program, site)
    for name in batch.incomplete if batch is not None else ():
        p = model.get(name)
        if p and p["is_observed"] and "drawn" not in p["infer"] and p["mask"] is None:
            yield Problem(
                name,
                "it has missing entries and the model gives obs= by itself, so that they count as if "
                "their fill were data",
                "drop obs=: a model contains no data",
            )
    observed = any(site["is_observed"] or "observed" in site["infer"] for site in model.values())
    if not observed and (model or batch is not None):  # a model may have nothing to do in a call
        held = f"the batch holds {list(batch.sites)}" if batch is not None else "no obs= was given"
        yield Problem(
            None,
            f"the model observes nothing: its sites are {list(model)}, {held}",
            "rename the data or the site",
        )


def _disagreements(name: str, p: Site, q: Site) -> Iterator[Problem]:
    if p["is_observed"] and q["infer"].get("observed") is None and not q["is_observed"]:
        yield Problem(name, "the model observes it and the guide draws it", "drop one of the two")
    if q["fn"].event_shape != p["fn"].event_shape:
        yield Problem(
            name,
            f"event shape {list(q['fn'].event_shape)} in the guide, "
            f"{list(p['fn'].event_shape)} in the model",
            "make them equal",
        )
        return
    with torch.no_grad(), suppress(NotImplementedError):  # distributions that have no support
        if not bool(p["fn"].support.check(q["value"]).all()):
            yield Problem(
                name,
                f"the guide's {type(core(q['fn'])).__name__} draws values outside the support of "
                f"the model's {type(core(p['fn'])).__name__}",
                "give both the same support",
            )


def broadcasts(source: str, site: Site) -> Iterator[Problem]:
    """Where a site has a batch dim beyond its plates."""
    shape = site["fn"].batch_shape
    covered = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    for dim in range(-len(shape), 0):
        if shape[dim] != 1 and dim not in covered:
            yield Problem(
                site["name"],
                f"batch shape {list(shape)} in the {source}, but no plate stands at dim {dim}",
                "move dims into the event by .to_event(), remove a dim of size 1 that made it "
                "broadcast, or add the plate",
            )


def site_names(guide: Mapping[str, Site], model: Mapping[str, Site]) -> tuple[Any, ...]:
    return tuple(
        tuple((name, bool(site["is_observed"])) for name, site in sites.items())
        for sites in (guide, model)
    )


def _frames(site: Site) -> frozenset[tuple[str, int]]:
    return frozenset((f.name, f.dim) for f in site["cond_indep_stack"] if f.vectorized)


def _rows(
    model: Mapping[str, Site], guide: Mapping[str, Site]
) -> tuple[tuple[int, ...], frozenset[str]]:
    """The plates over rows: those of the observed sites that every site inside any of them shares."""
    observed = [_frames(s) for s in model.values() if s["is_observed"] or "observed" in s["infer"]]
    shared = frozenset.intersection(*observed) if observed else frozenset()
    inside = [_frames(site) for site in model.values() if _frames(site) & shared]
    rows = frozenset.intersection(*inside) if inside else frozenset()
    dims = {dim for _, dim in rows}
    outside: set[str] = set()
    for name, site in [*guide.items(), *model.items()]:  # the model has the last word
        here = {dim for _, dim in _frames(site)} if name not in model else None
        local = bool(rows) and (dims <= here if here is not None else rows <= _frames(site))
        (outside.discard if local else outside.add)(name)
    return tuple(sorted(dims)), frozenset(outside)


def _late(sites: Iterable[str], outside: frozenset[str]) -> bool:
    return not outside.isdisjoint(dropwhile(outside.__contains__, sites))


def _common_scale(local: list[Site], rows: tuple[int, ...]) -> bool:
    """Whether all local sites carry one and the same user scale (a weight of the row)."""
    inner = [torch.as_tensor(site["scale"] / plate_scale(site, rows)) for site in local]
    if len({isinstance(site["scale"], Tensor) for site in local}) > 1:
        return False  # a tensor moves on its own, whatever it is now
    return all(
        scale.shape == inner[0].shape and bool(torch.isclose(scale, inner[0]).all())
        for scale in inner
    )


def _analytic(
    model: Mapping[str, Site], guide: Mapping[str, Site]
) -> tuple[frozenset[str], tuple[str, ...]]:
    """Sites whose analytic KL may stand for log q - log p(z).

    The expectation over z_s is taken given what precedes it in the guide, so the model's prior of
    z_s must depend on nothing else.
    """
    analytic, notes = set(), []
    in_model, in_guide = [n for n in model if n in guide], [n for n in guide if n in model]
    for place, name in enumerate(in_guide):
        p, q = model[name], guide[name]
        if q["infer"].get("observed") is True:  # data: nothing is drawn
            continue
        late = set(in_model[: in_model.index(name)]) - set(in_guide[:place])
        if late:
            why = f"the model draws {', '.join(sorted(late))} before it, the guide does not"
        elif q["infer"].get("observed") is not None:
            why = "it is observed in part"
        elif not _same_weight(p, q):
            why = "its scale or mask differs between model and guide"
        else:
            try:
                elementwise_kl(q["fn"], p["fn"])
            except NotImplementedError:
                names = f"{type(core(q['fn'])).__name__} and {type(core(p['fn'])).__name__}"
                why = f"no KL is known for {names}"
            else:
                analytic.add(name)
                continue
        notes.append(f"site {name!r}: Monte Carlo KL, since {why}")
    return frozenset(analytic), tuple(notes)


def _same_weight(p: Site, q: Site) -> bool:
    a, b = ([s["scale"], s["mask"], *(mask for mask, _ in _masks(s["fn"]))] for s in (p, q))
    return len(a) == len(b) and all(map(_equal, a, b))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool((a == b).all())
    return a is b or not (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b)


def _masks(fn: Any) -> Iterator[tuple[Any, int]]:
    """Masks that a distribution carries, each with the number of event dims to its right."""
    while isinstance(fn, dist.Independent | MaskedDistribution | dist.ExpandedDistribution):
        if isinstance(fn, MaskedDistribution):
            yield fn._mask, fn.event_dim
        fn = fn.base_dist


def _drawn_parents(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    sites: Mapping[str, Site],
    guide: Mapping[str, Site],
    subsamples: Mapping[str, Tensor],
) -> tuple[str, ...]:
    """Sites drawn from the model without a path on which a density that counts depends, directly or
    through other draws. Found by changing the draw and looking: in every entry, since a plan holds
    for all batches of its kind, whichever entries are missing."""
    values = {**subsamples, **{name: site["value"] for name, site in sites.items()}}
    drawn = [
        name
        for name, site in sites.items()
        if name not in guide and ("drawn" in site["infer"] or not site["is_observed"])
    ]
    if all(unmasked_fn(sites[name]).has_rsample for name in drawn):
        return ()

    counts, parents = {n for n, site in sites.items() if site["is_observed"] or n in guide}, []
    for name in reversed(drawn):  # children before their parents
        moved = dependents(model, args, kwargs, values, name, unmasked_fn(sites[name]))
        if moved & counts:
            counts.add(name)
            parents.append(name)
    return tuple(name for name in reversed(parents) if not unmasked_fn(sites[name]).has_rsample)


def dependents(
    program: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
    name: str,
    fn: Any,
) -> set[str]:
    """Other sites whose density depends on the value of a site. Found by changing the value and
    looking, at parameters beside the program's own: at weights that start at 0 nothing depends on
    anything. Moves the random state.

    Args:
        values: of all sites.
        name, fn: the site and its distribution.
    """

    def densities(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(0)  # the same dropout each time
        replayed, _ = trace(program, args, kwargs, [Replay(values)])
        found = {n: elementwise(s["fn"], s["value"])[0] for n, s in replayed.items() if n != name}
        return {site: term.nan_to_num() for site, term in found.items()}

    changed = _other_values(fn, values[name])
    with shaken(program), pyro.validation_enabled(False):
        base = densities(values)
        every = [densities({**values, name: other}) for other in changed]
    return {s for moved in every for s in base if not torch.equal(moved[s], base[s])}


def _other_values(fn: Any, value: Tensor) -> list[Tensor]:
    """All values of a small support, some of a large one, a few draws where it has no end."""
    if fn.has_enumerate_support:
        try:
            support = fn.enumerate_support(expand=False)
        except NotImplementedError:  # Binomial, where rows differ in their total count
            pass
        else:
            tried = torch.linspace(0, len(support) - 1, min(len(support), SUPPORT)).round().long()
            return [support[i].to(value.dtype).expand(value.shape) for i in tried]
    return [fn.sample().to(value.dtype) for _ in range(4)]


def _score_blockers(
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    sites: Mapping[str, Site],
    replay: Replay,
) -> dict[str, str]:
    """Why log q can't be taken at boundary copies with constant parameters: site -> reason."""
    blockers = {}
    for name, site in sites.items():
        if site["fn"].has_rsample:
            try:
                site["fn"].log_prob(site["value"].clone())
            except (KeyError, NotImplementedError, RuntimeError):
                blockers[name] = f"its {type(core(site['fn'])).__name__} has no inverse"
    with torch.enable_grad():
        for name, site in trace(guide, args, kwargs, [replay])[0].items():
            point = core(site["fn"])
            if is_point(site) and (point.v.requires_grad or point.log_density.requires_grad):
                blockers[name] = "a point that moves with parameters of its own has no score"
    if len(sites) > 1:
        module, last = owner(guide), list(sites)[-1]
        if module is None:
            blockers[last] = "a guide of several sites must be a module (or a module's method)"
        else:
            for name, part in module.named_modules():
                if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0:
                    blockers[last] = f"dropout ({name}) would draw another mask for its second run"
            if not blockers:
                blockers = _rerun_blockers(module, guide, args, kwargs, sites, replay)
    return blockers


def _rerun_blockers(
    module: nn.Module,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    sites: Mapping[str, Site],
    replay: Replay,
) -> dict[str, str]:
    """Why a second run of a guide would not do with constant parameters: site -> reason."""
    constant = {id(p): p.detach() for p in parameters(module)}
    constant |= {id(b): b.clone() for b in module.buffers()}
    blockers = {}
    with torch.enable_grad(), swapped(module, constant):
        for name, site in trace(guide, args, kwargs, [replay])[0].items():
            log_q, first = (s["fn"].log_prob(s["value"]) for s in (site, sites[name]))
            if log_q.requires_grad:
                blockers[name] = "it depends on parameters that are not the guide module's own"
            elif not torch.allclose(log_q, first, rtol=1e-3, atol=1e-3, equal_nan=True):
                blockers[name] = (
                    "its density changes from run to run (noise that is no sample site)"
                )
    return blockers


def factor_blockers(plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Why the gradient that arrives at a draw must not meet DReG's factor: site -> reason.

    The factor is that of the draw's own row, and it is right where log q of the draw is a part of
    the row's log weight. Found by looking what arrives from other rows, and what where log q is
    masked.
    """
    model, guide = plan.programs
    with preserved(model, guide), torch.enable_grad(), poutine.block():
        bare, batch = unwrap(model, args)
        conditioned = [Condition(batch, proposing=True)] if batch is not None else []
        sites, subsamples = trace(guide, args, kwargs, conditioned)
        values = {name: site["value"].detach() for name, site in sites.items()}
        leaves = {
            name: values[name].clone().requires_grad_()
            for name, site in sites.items()
            if values[name].is_floating_point() and site["infer"].get("observed") is not True
        }
        values |= subsamples | {name: leaf.clone() for name, leaf in leaves.items()}
        again, _ = trace(guide, args, kwargs, [Replay(values)])
        conditioned = [Condition(batch, proposed=values)] if batch is not None else []
        priors, _ = trace(bare, args, kwargs, [Replay(values), *conditioned])
        terms = [
            scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
            for site in [*again.values(), *priors.values()]
        ]
        all_rows = sum(term.sum() for term in terms)
        others = all_rows - sum(_first_row(plan, term).sum() for term in terms)
        arriving, foreign = (_gradients(density, leaves) for density in (all_rows, others))
    blockers = {}
    for name in leaves:
        fn, here, from_others = sites[name]["fn"], arriving[name], foreign[name]
        if bool((_first_row(plan, from_others, fn.event_dim) != 0).any()):
            blockers[name] = "densities of other rows depend on its draw, as with BatchNorm"
        elif bool((here[~counted(sites[name])] != 0).any()):
            blockers[name] = "its log q is masked where other densities depend on its draw"
    return blockers


def _gradients(density: Any, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(density, Tensor) or not density.requires_grad or not leaves:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    gradients = torch.autograd.grad(
        density, list(leaves.values()), retain_graph=True, materialize_grads=True
    )
    return dict(zip(leaves, gradients, strict=True))


def _first_row(plan: Plan, tensor: Tensor, event_dim: int = 0) -> Tensor:
    index: list[Any] = [slice(None)] * tensor.dim()
    for dim in plan.rows:
        index[dim - event_dim] = 0
    return tensor[tuple(index)]


def counted(site: Site) -> Tensor:
    """Where log q of a draw is not masked, in the shape of the draw."""
    fn, value = site["fn"], site["value"]
    counts = torch.ones_like(value, dtype=torch.bool)
    handler = site["mask"] if isinstance(site["mask"], Tensor) else True  # False is a beta of 0
    for mask, event_dim in [(handler, fn.event_dim), *_masks(fn)]:
        mask = torch.as_tensor(mask, dtype=torch.bool, device=value.device)
        counts = counts & mask[(...,) + (None,) * (event_dim if mask.dim() else 0)]
    return counts
