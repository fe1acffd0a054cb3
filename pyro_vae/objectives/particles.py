"""One pass over a model and a guide: the table of log densities that everything is computed from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_vae.batch import Batch, Condition, Observed
from pyro_vae.objectives.swap import owner, preserved, swapped

__all__ = [
    "Boundary",
    "Particles",
    "Plan",
    "Problem",
    "Replay",
    "SitesChanged",
    "broadcasts",
    "core",
    "elementwise",
    "log_q_at_rest",
    "make_plan",
    "problems",
    "run",
    "trace",
    "unwrap",
]

Program = Callable[..., Any]
Site = dict[str, Any]
PLATE = "_particles"


class SitesChanged(ValueError):
    """The sites of a run are not those of the plan."""


@dataclass(frozen=True)
class Plan:
    """What one run of a pair shows and every later run relies on; made once per kind of batch.

    Attributes:
        nesting: number of plate dims; the particle plate stands at dim ``-1 - nesting``.
        rows: dims of the plates over rows, which all local sites share.
        outside: sites outside those plates (global latents), which get their own ``[K]`` column.
        common_scale: all local sites carry one user scale, which is then taken outside the bound
            (scales that are numbers are compared anew in every pass).
        analytic: latent sites whose KL is known in closed form, given the order of the sites.
        notes: why a site is not among them.
        unreparameterized: guide sites without ``rsample``.
        drawn_parents: sites drawn from the model without ``rsample`` that densities depend on.
        subsampled: plates inside a row that are subsampled.
        sites: names of the guide's and of the model's sites, and whether each is observed.
        score_blockers: why log q of a site can't be taken at boundary copies.
    """

    programs: tuple[Program, Program]
    nesting: int
    rows: tuple[int, ...]
    outside: frozenset[str]
    common_scale: bool
    analytic: frozenset[str]
    notes: tuple[str, ...]
    unreparameterized: tuple[str, ...]
    drawn_parents: tuple[str, ...]
    subsampled: tuple[str, ...]
    sites: tuple[Any, ...]
    score_blockers: Mapping[str, str] = field(default_factory=dict)

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


class Boundary:
    """Boundary copies of samples, on which DReG's ``factor`` meets the arriving gradient once.

    The factor is a function of all particles' log weights, so it is set after the pass and read by
    the hooks during backward.
    """

    def __init__(self) -> None:
        self.factor: Tensor | None = None

    def copy(self, value: Tensor, event_dim: int, plan: Plan, local: bool) -> Tensor:
        copy = value.view_as(value)
        if local and copy.requires_grad:

            def weigh(grad: Tensor) -> Tensor:
                if self.factor is None:
                    return grad
                return grad * plan.spread(self.factor, grad.shape, event_dim)

            copy.register_hook(weigh)
        return copy


@dataclass
class Particles:
    """Log densities of one pass, ``[K, B, *rest]`` where they factorize (``[K, *rest]`` outside the
    rows), with masks and the user's own scales but without the row plate's N / B.

    Attributes:
        samples: the guide's draws ``[K, B, *event]``, attached to its parameters.
        likelihood: log p of what is observed.
        prior: log p of what the guide drew.
        posterior: log q of what the guide drew.
        score: log density of the draws that are trained through their score, values detached.
        subsamples: the rows that plates drew.
        common_scale: all local sites share one user scale.
        plate_scale: N / B of the row plate.
        scale: that times the user's scale, if all local sites share one.
    """

    plan: Plan
    num_particles: int
    samples: dict[str, Tensor]
    likelihood: dict[str, Tensor]
    prior: dict[str, Tensor]
    posterior: dict[str, Tensor]
    score: dict[str, Tensor]
    subsamples: dict[str, Tensor]
    common_scale: bool
    plate_scale: float
    scale: float | Tensor
    guide: dict[str, Site]
    model: dict[str, Site]

    def local(self, site: str) -> bool:
        return site not in self.plan.outside

    @property
    def analytic(self) -> frozenset[str]:
        """Latent sites whose KL is in closed form: the plan's, unless this pass scales the site of
        the model and that of the guide differently."""
        scales = {s: (self.model[s]["scale"], self.guide[s]["scale"]) for s in self.plan.analytic}
        return frozenset(site for site, (p, q) in scales.items() if _close(p, q) is not False)

    def total(self, terms: Mapping[str, Tensor], outside: bool = False) -> Tensor | None:
        """Sum of terms to ``[K, B]`` over the local sites, or to ``[K]`` over the ones outside."""
        keep = 1 if outside else 2
        parts = [
            term.flatten(keep).sum(keep) if term.dim() > keep else term
            for site, term in terms.items()
            if self.local(site) is not outside
        ]
        return sum(parts[1:], start=parts[0]) if parts else None

    def weight(self, site: str) -> float | Tensor:
        """What the user's own scale makes of log q at a latent site."""
        here = self.guide[site]
        return 0.0 if here["mask"] is False else self._inner_scale(here)

    def log_draw(self, site: Site) -> Tensor:
        """Log density with which a detached draw was made: scales and masks weigh what a draw
        counts, not how it came about."""
        log_prob, event_dim = elementwise(_source(site), site["value"].detach(), masked=False)
        local = self.local(site["name"])
        return self.plan.canonical(log_prob, event_dim, self.num_particles, local)

    def kl(self, site: str) -> Tensor:
        """Analytic KL(q || p) of a latent site, elementwise where it factorizes."""
        q = self.guide[site]
        kl, event_dim = _elementwise_kl(q["fn"], self.model[site]["fn"])
        return self._weigh(q, kl, event_dim)

    def _density(self, site: Site, value: Tensor | None = None) -> Tensor:
        log_prob, event_dim = elementwise(site["fn"], site["value"] if value is None else value)
        return self._weigh(site, log_prob, event_dim)

    def _weigh(
        self, site: Site, term: Tensor, event_dim: int, scale: float | Tensor | None = None
    ) -> Tensor:
        scale, mask = self._inner_scale(site) if scale is None else scale, site["mask"]
        if isinstance(scale, Tensor) and scale.dim():
            scale = scale[(...,) + (None,) * event_dim]
        if isinstance(mask, Tensor) and mask.dim():
            mask = mask[(...,) + (None,) * event_dim]
        term = scale_and_mask(term, scale, mask)
        return self.plan.canonical(term, event_dim, self.num_particles, self.local(site["name"]))

    def _inner_scale(self, site: Site) -> float | Tensor:
        if not self.local(site["name"]):
            return site["scale"]  # type: ignore[no-any-return]
        if self.common_scale:
            return 1.0
        return site["scale"] / self.scale  # type: ignore[no-any-return]


def elementwise(fn: Any, value: Tensor, masked: bool = True) -> tuple[Tensor, int]:
    """Log density before the sum over event dims, and how many event dims it still has."""
    if isinstance(fn, dist.Independent):
        log_prob, event_dim = elementwise(fn.base_dist, value, masked)
        return log_prob, event_dim + fn.reinterpreted_batch_ndims
    if isinstance(fn, MaskedDistribution) and not masked:
        return elementwise(fn.base_dist, value, masked)
    if isinstance(fn, MaskedDistribution) and isinstance(fn._mask, Tensor):
        log_prob, event_dim = elementwise(fn.base_dist, value)
        return scale_and_mask(log_prob, mask=fn._mask[(...,) + (None,) * event_dim]), event_dim
    return fn.log_prob(value), 0


def _elementwise_kl(q: Any, p: Any) -> tuple[Tensor, int]:
    if isinstance(q, dist.Independent) and isinstance(p, dist.Independent):
        dims = q.reinterpreted_batch_ndims
        if dims == p.reinterpreted_batch_ndims:
            kl, event_dim = _elementwise_kl(q.base_dist, p.base_dist)
            return kl, event_dim + dims
    return kl_divergence(q, p), 0


class Replay(Messenger):
    """Give sites the values that another run had; a site that is data already keeps its own."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class _Detach(Messenger):
    """Draw the chosen sites without a path, in the order in which they would be drawn anyway."""

    def __init__(self, chosen: Callable[[str, bool], bool]) -> None:
        super().__init__()
        self.chosen = chosen

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and not site_is_subsample(msg):
            if self.chosen(msg["name"], msg["fn"].has_rsample):
                with torch.no_grad():
                    msg["value"] = msg["fn"]()
        elif msg["infer"].get("observed") is not None and self.chosen(
            msg["name"], msg["fn"].has_rsample
        ):
            msg["value"] = msg["value"].detach()


def trace(
    program: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    handlers: Iterable[Any],
    particles: int = 1,
    nesting: int = 0,
) -> tuple[dict[str, Site], dict[str, Tensor]]:
    """Sample sites and the subsamples of plates. Handlers stand outside the particle plate, or all
    particles would share what they draw."""
    with ExitStack() as stack:
        tracer = stack.enter_context(poutine.trace())
        for handler in handlers:
            stack.enter_context(handler)
        if particles > 1:
            stack.enter_context(pyro.plate(PLATE, particles, dim=-1 - nesting))
        program(*args, **kwargs)
    nodes: list[Any] = [s for s in tracer.trace.nodes.values() if s["type"] == "sample"]
    sites = {
        site["name"]: site
        for site in nodes
        if not site_is_subsample(site) and not site["infer"].get("_deterministic")
    }
    subsamples = {site["name"]: site["value"] for site in nodes if site_is_subsample(site)}
    subsamples.pop(PLATE, None)
    return sites, subsamples


def unwrap(model: Program, args: tuple[Any, ...]) -> tuple[Program, Batch | None]:
    """The bare model and the batch, if the first argument is one."""
    if args and isinstance(args[0], Batch):
        return (model.model if isinstance(model, Observed) else model), args[0]
    return model, None


def run(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    plan: Plan,
    num_particles: int,
    *,
    boundary: Boundary | None = None,
    scores: Callable[[str, bool], bool] | None = None,
    subsamples: Mapping[str, Tensor] | None = None,
    handlers: Iterable[Any] = (),
) -> Particles:
    """One pass of ``num_particles`` vectorised particles.

    Args:
        boundary: run the model on boundary copies and take log q with constant guide parameters.
        scores: ``(site, has_rsample) -> bool``, the sites that are drawn without a path.
        subsamples: the rows that plates drew in an earlier pass, which this one shares.
        handlers: further handlers around the guide (a widened proposal, say).

    Raises:
        SitesChanged: the programs have other sites than the plan says.
    """
    model, batch = unwrap(model, args)
    around_guide: list[Any] = [Replay(subsamples)] if subsamples else []
    if scores:
        around_guide.append(_Detach(scores))
    if batch is not None:
        around_guide.append(Condition(batch, proposing=True))
    guide_sites, guide_rows = trace(
        guide, args, kwargs, [*around_guide, *handlers], num_particles, plan.nesting
    )
    draws = {name: site["value"] for name, site in guide_sites.items()}
    if boundary is not None:
        draws = {
            name: boundary.copy(
                value, guide_sites[name]["fn"].event_dim, plan, name not in plan.outside
            )
            for name, value in draws.items()
        }
    conditioned = [Condition(batch, proposed=draws)] if batch is not None else []
    values = {**(subsamples or {}), **guide_rows, **draws}
    model_sites, model_rows = trace(
        model, args, kwargs, [Replay(values), *conditioned], num_particles, plan.nesting
    )
    if plan.sites != _names(guide_sites, model_sites):
        raise SitesChanged(
            f"the sites of guide and model were {plan.sites} and are now "
            f"{_names(guide_sites, model_sites)}; a program's sites must not depend on its draws"
        )
    particles = Particles(
        *(plan, num_particles, {}, {}, {}, {}, {}),
        guide_rows | model_rows,
        *_row_scales(plan, guide_sites, model_sites),
        guide=guide_sites,
        model=model_sites,
    )
    for name, site in guide_sites.items():
        particles.samples[name] = plan.canonical(
            site["value"], site["fn"].event_dim, num_particles, particles.local(name)
        )
    _fill_model(particles, scores)
    if boundary is None or not guide_sites:
        _fill_guide(particles, {name: particles._density(s) for name, s in guide_sites.items()})
    elif len(guide_sites) == 1:
        _fill_guide(particles, _constant_in_place(particles, draws))
    else:
        rerun = [Replay(values)]
        _fill_guide(particles, _constant_rerun(particles, guide, args, kwargs, rerun))
    if scores is not None:
        for name, site in guide_sites.items():
            if scores(name, site["fn"].has_rsample) and name in particles.posterior:
                observed, density = site["infer"].get("observed"), particles.log_draw(site)
                particles.score[name] = _where_drawn(particles, site, observed, density)
    return particles


def _fill_model(particles: Particles, scores: Callable[[str, bool], bool] | None) -> None:
    for name, site in particles.model.items():
        if site["is_observed"]:
            particles.likelihood[name] = particles._density(site)
        elif name in particles.guide:
            density = particles._density(site)
            observed = site["infer"].get("observed")
            if observed is not None:
                mask = _fit(observed, density, site["fn"].event_dim, particles.plan, name)
                zero = density.new_zeros(())
                particles.likelihood[name] = torch.where(mask, density, zero)
                density = torch.where(mask, zero, density)
            particles.prior[name] = density
        if scores is not None and name in particles.plan.drawn_parents:
            drawn = site["infer"].get("drawn")
            particles.score[name] = _where_drawn(particles, site, drawn, particles.log_draw(site))


def _where_drawn(
    particles: Particles, site: Site, observed: Tensor | None, density: Tensor
) -> Tensor:
    """A density of the entries that are not data."""
    if observed is None:
        return density
    mask = _fit(observed, density, site["fn"].event_dim, particles.plan, site["name"])
    return torch.where(mask, density.new_zeros(()), density)


def _fill_guide(particles: Particles, densities: Mapping[str, Tensor]) -> None:
    for name, density in densities.items():
        site = particles.guide[name]
        observed = site["infer"].get("observed")
        if observed is not True:
            particles.posterior[name] = _where_drawn(particles, site, observed, density)


def _fit(mask: Tensor, density: Tensor, event_dim: int, plan: Plan, site: str) -> Tensor:
    """A mask ``[B, *event]`` beside a density ``[K, B, *rest]``; what does not factorize is missing
    as a whole."""
    lost = event_dim - (density.dim() - 2)
    if lost > 0:
        entries = mask.flatten(-lost)
        mask = entries.all(-1)
        if bool((mask != entries.any(-1)).any()):
            raise ValueError(
                f"site {site!r}: its distribution does not factorize, and rows are missing in part; "
                "use a factorized distribution or make such rows missing as a whole"
            )
    return mask


def _constant_in_place(particles: Particles, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """log q(z'; constant parameters) for one site: the direct dependence cancels on the same
    distribution object, so that dropout, flows and function guides are right without a second run."""
    ((name, site),) = particles.guide.items()
    at_boundary = particles._density(site, draws[name])
    score = particles._density(site, site["value"].detach())
    return {name: at_boundary - score + score.detach()}


def _constant_rerun(
    particles: Particles,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    handlers: list[Any],
) -> dict[str, Tensor]:
    """log q(z'; constant parameters) for several sites: run the guide again on z', its parameters
    swapped for detached ones. Densities are taken inside, since flows read parameters lazily."""
    module = owner(guide)
    assert module is not None
    constant = {id(p): p.detach() for p in module.parameters()}
    constant |= {id(b): b.clone() for b in module.buffers()}  # BatchNorm moves once, not twice
    with swapped(module, constant), poutine.block(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*was not registered in the param store")
        sites, _ = trace(
            guide, args, kwargs, handlers, particles.num_particles, particles.plan.nesting
        )
        return {name: particles._density(site) for name, site in sites.items()}


def log_q_at_rest(
    particles: Particles, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """log q of each latent at its draw, under live parameters and without the user's scales. Draws
    are detached, the ones that later sites depend on as well, so that nothing but the score is left."""
    guide, sites = particles.plan.programs[1], particles.guide
    values = {name: site["value"].detach() for name, site in sites.items()}
    if len(sites) > 1:
        module, plan = owner(guide), particles.plan
        assert module is not None
        buffers = {id(b): b.clone() for b in module.buffers()}
        handlers = [Replay({**particles.subsamples, **values})]
        with swapped(module, buffers), poutine.block():
            sites, _ = trace(guide, args, kwargs, handlers, particles.num_particles, plan.nesting)
    out = {}
    for name in particles.posterior:
        log_prob, event_dim = elementwise(sites[name]["fn"], values[name])
        density = particles._weigh(sites[name], log_prob, event_dim, scale=1.0)
        observed = particles.guide[name]["infer"].get("observed")
        out[name] = _where_drawn(particles, sites[name], observed, density)
    return out


def _row_scales(
    plan: Plan, guide: Mapping[str, Site], model: Mapping[str, Site]
) -> tuple[bool, float, float | Tensor]:
    """Whether the local sites share one user scale, the row plate's, and what goes outside."""
    sites = [*model.values(), *guide.values()]
    local = [site for site in sites if site["name"] not in plan.outside]
    if not local:
        return False, 1.0, 1.0
    plates, scale = _plate_scale(local[0], plan.rows), local[0]["scale"]
    equal = [_close(scale, site["scale"]) for site in local]
    if False in equal or (None in equal and not plan.common_scale):
        return False, plates, plates
    return True, plates, scale.reshape(-1) if isinstance(scale, Tensor) and scale.dim() else scale


def _close(a: float | Tensor, b: float | Tensor) -> bool | None:
    """Whether two scales are equal; None for tensors, whose values would have to leave the device."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return None
    return math.isclose(a, b, rel_tol=1e-9)


def _names(guide: Mapping[str, Site], model: Mapping[str, Site]) -> tuple[Any, ...]:
    return tuple(
        tuple((name, bool(site["is_observed"])) for name, site in sites.items())
        for sites in (guide, model)
    )


def _plate_scale(site: Site, rows: tuple[int, ...]) -> float:
    """N / B of the site's row plates."""
    scale = 1.0
    for frame in site["cond_indep_stack"]:
        if frame.dim in rows:
            scale *= frame.full_size / frame.size
    return scale


# ---------------------------------------------------------------------------------------------
# The first look at a pair


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
        blockers = _score_blockers(guide, guide_sites)
    sites = [*model_sites.values(), *guide_sites.values()]
    local = [site for site in sites if site["name"] not in outside]
    dims = [f.dim for site in sites for f in site["cond_indep_stack"] if f.vectorized]
    return Plan(
        programs=(model, guide),
        nesting=-min(dims, default=0),
        rows=rows,
        outside=outside,
        common_scale=_common_scale(local, rows),
        analytic=analytic,
        notes=notes,
        unreparameterized=tuple(
            name
            for name, site in guide_sites.items()
            if not site["fn"].has_rsample
            and not site["is_observed"]
            and site["infer"].get("observed") is not True
        ),
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
        sites=_names(guide_sites, model_sites),
        score_blockers=blockers,
    )


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
    for source, sites in (("guide", guide), ("model", model)):  # the model sees the guide's draws
        for site in sites.values():
            yield from broadcasts(source, site)
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


def core(fn: Any) -> Any:
    """The innermost distribution, under Independent, masks and expansions."""
    while isinstance(fn, dist.Independent | MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn


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


def _common_scale(local: list[Site], rows: tuple[int, ...]) -> bool:
    """Whether all local sites carry one and the same user scale (a weight of the row)."""
    inner = [torch.as_tensor(site["scale"] / _plate_scale(site, rows)) for site in local]
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
                _elementwise_kl(q["fn"], p["fn"])
            except NotImplementedError:
                names = f"{type(core(q['fn'])).__name__} and {type(core(p['fn'])).__name__}"
                why = f"no KL is known for {names}"
            else:
                analytic.add(name)
                continue
        notes.append(f"site {name!r}: Monte Carlo KL, since {why}")
    return frozenset(analytic), tuple(notes)


def _same_weight(p: Site, q: Site) -> bool:
    for key in ("scale", "mask"):
        a, b = p[key], q[key]
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape or not bool((a == b).all()):
                return False
        elif a is not b and (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b):
            return False
    return True


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
    if all(_source(sites[name]).has_rsample for name in drawn):
        return ()

    def densities(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(0)  # the same dropout each time; the caller restores the random state
        replayed, _ = trace(model, args, kwargs, [Replay(values)])
        return {name: elementwise(s["fn"], s["value"])[0] for name, s in replayed.items()}

    base, parents = densities(values), []
    counts = {name for name, site in sites.items() if site["is_observed"] or name in guide}
    for name in reversed(drawn):  # children before their parents
        for other in _other_values(_source(sites[name]), sites[name]["value"]):
            moved = densities({**values, name: other})
            if any(not torch.equal(moved[s], base[s]) for s in counts - {name}):
                counts.add(name)
                parents.append(name)
                break
    return tuple(name for name in reversed(parents) if not _source(sites[name]).has_rsample)


def _other_values(fn: Any, value: Tensor) -> list[Tensor]:
    if fn.has_enumerate_support:
        try:
            support = fn.enumerate_support(expand=False)
        except NotImplementedError:  # Binomial, where rows differ in their total count
            pass
        else:
            ends = support[[0, -1]].to(value.dtype)
            return [end.expand(value.shape) for end in ends]
    return [fn.sample().to(value.dtype) for _ in range(4)]


def _source(site: Site) -> Any:
    return site["infer"].get("source", site["fn"])


def _score_blockers(guide: Program, sites: Mapping[str, Site]) -> dict[str, str]:
    """Why log q can't be taken at boundary copies with constant parameters: site -> reason."""
    blockers = {}
    for name, site in sites.items():
        if site["fn"].has_rsample:
            try:
                site["fn"].log_prob(site["value"].clone())
            except (KeyError, NotImplementedError, RuntimeError):
                blockers[name] = f"its {type(core(site['fn'])).__name__} has no inverse"
    if len(sites) > 1:
        module, last = owner(guide), list(sites)[-1]
        if module is None:
            blockers[last] = "a guide of several sites must be a module (or a module's method)"
        else:
            for name, part in module.named_modules():
                if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0:
                    blockers[last] = f"dropout ({name}) would draw another mask for its second run"
    return blockers
