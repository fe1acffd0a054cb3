"""One pass over a model and a guide: the table of log densities that everything is computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.batch import Condition
from pyro_vae.objectives.plan import Plan, SitesChanged, site_names
from pyro_vae.objectives.swap import owner, parameters, swapped
from pyro_vae.objectives.tracing import (
    Program,
    Replay,
    Site,
    close,
    core,
    elementwise,
    elementwise_kl,
    is_point,
    plate_scale,
    trace,
    unmasked_fn,
    unwrap,
)

__all__ = ["Boundary", "Particles", "Treatment", "log_q_at_rest", "run"]


class Boundary:
    """Boundary copies of samples, on which a ``factor`` meets the arriving gradient once.

    The factor is a function of all particles' log weights, so it is set after the pass and read by
    the hooks during backward.

    Args:
        constant: log q is taken with constant guide parameters. Otherwise its densities are boundary
            copies too.
    """

    def __init__(self, constant: bool = True) -> None:
        self.constant = constant
        self.factor: Tensor | None = None

    def copy(self, value: Tensor, event_dim: int, plan: Plan, local: bool) -> Tensor:
        return self._copy(value, local, lambda f: plan.spread(f, value.shape, event_dim))

    def density(self, log_q: Tensor, local: bool) -> Tensor:
        """The same of log densities ``[K, B, *rest]``."""
        return self._copy(log_q, local, lambda f: f[(...,) + (None,) * (log_q.dim() - 2)])

    def _copy(self, value: Tensor, local: bool, spread: Callable[[Tensor], Tensor]) -> Tensor:
        copy = value.view_as(value)
        if local and copy.requires_grad:
            copy.register_hook(lambda g: g if self.factor is None else g * spread(self.factor))
        return copy


class Treatment(Messenger):
    """What an estimator makes of the guide's discrete draws in one pass: a handler that stands around
    the guide and then around the model."""

    def share(self, particles: Particles) -> Tensor | None:
        """What each particle counts, ``[K, B]``, where they are no draws; None: all alike."""
        return None


@dataclass
class Particles:
    """Log densities of one pass, ``[K, B, *rest]`` where they factorize (``[K, *rest]`` outside the
    rows), with masks and the user's own scales but without the row plate's N / B.

    Attributes:
        samples: the guide's draws ``[K, B, *event]``, attached to its parameters.
        share: what each particle counts ``[K, B]``, where a treatment says so.
        likelihood: log p of what is observed.
        prior: log p of what the guide drew.
        posterior: log q of what the guide drew.
        score: log density of the draws that are trained through their score, values detached.
        subsamples: the rows that plates drew.
        total: N, the rows of the data set that these are of.
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
    total: int = 0
    share: Tensor | None = None

    def local(self, site: str) -> bool:
        return site not in self.plan.outside

    @property
    def analytic(self) -> frozenset[str]:
        """Latent sites whose KL is in closed form: the plan's, unless this pass scales the site of
        the model and that of the guide differently."""
        scales = {s: (self.model[s]["scale"], self.guide[s]["scale"]) for s in self.plan.analytic}
        return frozenset(site for site, (p, q) in scales.items() if close(p, q) is not False)

    def summed(self, terms: Mapping[str, Tensor], outside: bool = False) -> Tensor | None:
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
        log_prob, event_dim = elementwise(
            *(unmasked_fn(site), site["value"].detach()), masked=False, drawn=True
        )
        local = self.local(site["name"])
        return self.plan.canonical(log_prob, event_dim, self.num_particles, local)

    def drawn(self, site: Site, density: Tensor) -> Tensor:
        """A density of the entries of a guide's site that are not data."""
        return _where_drawn(self, site, site["infer"].get("observed"), density)

    def counted(self, log_w: Tensor) -> Tensor:
        """Log weights times what each particle counts, ``[K, B]``; one without a share counts 0."""
        if self.share is None:
            return log_w
        return self.share * torch.where(self.share == 0, torch.zeros_like(log_w), log_w)

    def kl(self, site: str) -> Tensor:
        """Analytic KL(q || p) of a latent site, elementwise where it factorizes."""
        q = self.guide[site]
        kl, event_dim = elementwise_kl(q["fn"], self.model[site]["fn"])
        return self._weigh(q, kl, event_dim)

    def _density(self, site: Site, value: Tensor | None = None, drawn: bool = False) -> Tensor:
        value = site["value"] if value is None else value
        log_prob, event_dim = elementwise(site["fn"], value, drawn=drawn)
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


class _Detach(Messenger):
    """Draw the chosen sites without a path, in the order in which they would be drawn anyway."""

    def __init__(self, chosen: Callable[[str, bool], bool]) -> None:
        super().__init__()
        self.chosen = chosen

    def _pyro_sample(self, msg: Any) -> None:
        if is_point(msg):
            return
        if msg["value"] is None and not site_is_subsample(msg):
            if self.chosen(msg["name"], msg["fn"].has_rsample):
                with torch.no_grad():
                    msg["value"] = msg["fn"]()
        elif msg["infer"].get("observed") is not None and self.chosen(
            msg["name"], msg["fn"].has_rsample
        ):
            msg["value"] = msg["value"].detach()


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
    treatment: Treatment | None = None,
) -> Particles:
    """One pass of ``num_particles`` vectorised particles.

    Args:
        boundary: run the model on boundary copies of the guide's draws.
        scores: ``(site, has_rsample) -> bool``, the sites that are drawn without a path.
        subsamples: the rows that plates drew in an earlier pass, which this one shares.
        handlers: further handlers around the guide (a widened proposal, say).
        treatment: of the guide's discrete draws.

    Raises:
        SitesChanged: the programs have other sites than the plan says.
    """
    model, batch = unwrap(model, args)
    around_guide: list[Any] = [Replay(subsamples)] if subsamples else []
    if scores:
        around_guide.append(_Detach(scores))
    treated = [] if treatment is None else [treatment]
    around_guide += treated
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
        *(model, args, kwargs, [*treated, Replay(values), *conditioned]),
        *(num_particles, plan.nesting),
    )
    if plan.sites != site_names(guide_sites, model_sites):
        raise SitesChanged(
            f"the sites of guide and model were {plan.sites} and are now "
            f"{site_names(guide_sites, model_sites)}; a program's sites must not depend on its draws"
        )
    particles = Particles(
        *(plan, num_particles, {}, {}, {}, {}, {}),
        guide_rows | model_rows,
        *_row_scales(plan, guide_sites, model_sites),
        guide=guide_sites,
        model=model_sites,
    )
    particles.total = _rows_of_all(particles) if batch is None else batch.total
    for name, site in guide_sites.items():
        particles.samples[name] = plan.canonical(
            site["value"], site["fn"].event_dim, num_particles, particles.local(name)
        )
    _fill_model(particles, scores)
    if boundary is None or not boundary.constant or not guide_sites:
        _fill_guide(particles, {name: particles._density(s) for name, s in guide_sites.items()})
        if boundary is not None:
            for name, log_q in particles.posterior.items():
                particles.posterior[name] = boundary.density(log_q, particles.local(name))
    elif len(guide_sites) == 1:
        _fill_guide(particles, _constant_in_place(particles, draws))
    else:
        rerun = [Replay(values)]
        _fill_guide(particles, _constant_rerun(particles, guide, args, kwargs, rerun))
    if scores is not None:
        for name, site in guide_sites.items():
            if scores(name, site["fn"].has_rsample) and name in particles.posterior:
                if is_point(site):
                    continue
                observed, density = site["infer"].get("observed"), particles.log_draw(site)
                particles.score[name] = _where_drawn(particles, site, observed, density)
    if treatment is not None:
        particles.share = treatment.share(particles)
    return particles


def _rows_of_all(particles: Particles) -> int:
    """N by the plate over rows."""
    local = [s for s in particles.model.values() if particles.local(s["name"])]
    plates = (
        [f for f in local[0]["cond_indep_stack"] if f.dim in particles.plan.rows] if local else []
    )
    return math.prod(int(frame.full_size) for frame in plates)


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
    score = particles._density(site, site["value"].detach(), drawn=True)
    return {name: at_boundary - score + score.detach()}


def _constant_rerun(
    particles: Particles,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    handlers: list[Any],
) -> dict[str, Tensor]:
    """log q(z'; constant parameters) for several sites: run the guide again on z', its parameters
    swapped for detached ones. Densities are taken inside, since flows read parameters lazily. The
    responsibilities of mixtures keep their gradient."""
    module = owner(guide)
    assert module is not None
    constant = {id(p): p.detach() for p in parameters(module)}
    constant |= {id(b): b.clone() for b in module.buffers()}  # BatchNorm moves once, not twice
    with swapped(module, constant), poutine.block():
        sites, _ = trace(
            guide, args, kwargs, handlers, particles.num_particles, particles.plan.nesting
        )
        densities = {name: particles._density(site) for name, site in sites.items()}
    mixtures = [name for name, site in sites.items() if hasattr(core(site["fn"]), "as_drawn")]
    at_rest = _at_rest(particles, args, kwargs) if mixtures else {}
    for name in mixtures:
        value = at_rest[name]["value"]
        responsibility = particles._density(at_rest[name], value, drawn=True)
        responsibility = responsibility - particles._density(at_rest[name], value)
        densities[name] = densities[name] - responsibility + responsibility.detach()
    return densities


def log_q_at_rest(
    particles: Particles, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """log q of each latent at its draw, under live parameters and without the user's scales; of a
    mixture that of the component drawn. Draws are detached, the ones that later sites depend on as
    well, so that nothing but the score is left."""
    sites = _at_rest(particles, args, kwargs)
    out = {}
    for name in particles.posterior:
        log_prob, event_dim = elementwise(
            sites[name]["fn"], particles.guide[name]["value"].detach(), drawn=True
        )
        density = particles._weigh(sites[name], log_prob, event_dim, scale=1.0)
        observed = particles.guide[name]["infer"].get("observed")
        out[name] = _where_drawn(particles, sites[name], observed, density)
    return out


def _at_rest(
    particles: Particles, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Site]:
    """The guide's sites under live parameters, where every draw is detached."""
    guide, sites = particles.plan.programs[1], particles.guide
    if len(sites) == 1:
        return sites
    module, plan = owner(guide), particles.plan
    assert module is not None
    values = {name: site["value"].detach() for name, site in sites.items()}
    buffers = {id(b): b.clone() for b in module.buffers()}
    handlers = [Replay({**particles.subsamples, **values})]
    with swapped(module, buffers), poutine.block():
        again, _ = trace(guide, args, kwargs, handlers, particles.num_particles, plan.nesting)
    for name, site in again.items():
        if hasattr(mixture := core(site["fn"]), "as_drawn"):
            mixture.as_drawn(core(sites[name]["fn"]))
    return again


def _row_scales(
    plan: Plan, guide: Mapping[str, Site], model: Mapping[str, Site]
) -> tuple[bool, float, float | Tensor]:
    """Whether the local sites share one user scale, the row plate's, and what goes outside."""
    sites = [*model.values(), *guide.values()]
    local = [site for site in sites if site["name"] not in plan.outside]
    if not local:
        return False, 1.0, 1.0
    plates, scale = plate_scale(local[0], plan.rows), local[0]["scale"]
    equal = [close(scale, site["scale"]) for site in local]
    if False in equal or (None in equal and not plan.common_scale):
        return False, plates, plates
    return True, plates, scale.reshape(-1) if isinstance(scale, Tensor) and scale.dim() else scale
