"""What the first run of a pair shows: sites, plates, scales, support and densities."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.linter.pair import Failed, Pair
from pyro_vae.linter.report import Finding
from pyro_vae.objectives.plan import problems
from pyro_vae.objectives.support import inside, kind, outside
from pyro_vae.objectives.tracing import Site, core, elementwise, unmasked_fn

__all__ = ["RULES"]


def _fit_together(pair: Pair) -> Iterator[Finding]:
    for problem in problems(pair.model_sites, pair.guide_sites, pair.batch):
        yield Finding("error", *problem)
    for name, q in pair.guide_sites.items():
        p = pair.model_sites.get(name)
        if p is None or q["fn"].event_shape != p["fn"].event_shape:
            continue
        if _sizes(p) != _sizes(q):
            yield Finding(
                "error",
                name,
                f"in the guide it stands in plates {_sizes(q)} (dim: size), in the model in "
                f"{_sizes(p)}",
                "put it into the same plates in both",
            )
        elif not p["is_observed"] and not _reaches(q["fn"], p["fn"]):
            yield Finding(
                "warning",
                name,
                f"the guide's {kind(q['fn'])} can't reach values that the model's "
                f"{kind(p['fn'])} draws",
                "give both the same support",
            )


def _plates(pair: Pair) -> Iterator[Finding]:
    by_hand = pair.read["model"].values_read if pair.read else set()  # the model's own obs=
    first: dict[int, tuple[str, str]] = {}
    for name, site in pair.model_sites.items():
        frames = {f.dim: f for f in site["cond_indep_stack"] if f.vectorized}
        extra = [f.name for dim, f in frames.items() if dim != -1 and f.size > 1]
        if pair.batch is not None and name in pair.batch and extra and name not in by_hand:
            yield Finding(
                "error",
                name,
                f"plates {extra} stand around it besides the one over rows, so that its data would "
                "count once for every index of them",
                "move those dims into the event by .to_event()",
            )
        if -1 in frames:
            plate, size = frames[-1].name, frames[-1].size
            other, where = first.setdefault(size, (name, plate))
            if where != plate:
                yield Finding(
                    "warning",
                    name,
                    f"it stands in plate {plate!r} and site {other!r} in plate {where!r}, so that "
                    "they do not count as the same rows",
                    "give the plate over rows one name: pyro.plate('data', batch.size, dim=-1)",
                )
    for name, q in pair.guide_sites.items():
        drawn = [
            {f.name for f in site["cond_indep_stack"] if f.full_size != f.size}
            for site in (q, pair.model_sites.get(name, q))
        ]
        if drawn[0] != drawn[1]:
            yield Finding(
                "error",
                name,
                f"the guide draws it for rows of plate {sorted(drawn[0])}, the model for rows of "
                f"plate {sorted(drawn[1])}: these subsamples differ",
                "give both programs the same pyro.plate(name, N, subsample_size=B)",
            )


def _scales(pair: Pair) -> Iterator[Finding]:
    for name, q in pair.guide_sites.items():
        p = pair.model_sites.get(name)
        if p is None or _sizes(p) != _sizes(q):
            continue
        if _plate_scale(p) != _plate_scale(q):  # said among the plates
            continue
        for key in ("scale", "mask"):
            if not _equal(p[key], q[key]) and q["infer"].get("observed") is not True:
                yield Finding(
                    "warning",
                    name,
                    f"poutine.{key} weighs it differently in the model and in the guide, so that "
                    "log p and log q do not count alike",
                    f"put the same poutine.{key} around it in both",
                )


def _reads(pair: Pair) -> Iterator[Finding]:
    if pair.batch is None:
        return
    model, guide = pair.read["model"], pair.read["guide"]
    used = model.values_read | model.masks_read | guide.values_read | guide.masks_read
    used |= {*pair.model_sites, *pair.guide_sites}
    for name in pair.batch:
        if name not in used:
            yield Finding(
                "warning",
                name,
                "the batch holds it and neither program uses it",
                f"rename it to one of the model's sites, {list(pair.model_sites)}, or drop it by "
                "batch.without()",
            )
    for name in pair.batch.incomplete:
        site = pair.model_sites.get(name)
        by_itself = site is not None and site["is_observed"] and "drawn" not in site["infer"]
        if name in model.values_read and site is not None and not by_itself:
            yield Finding(
                "warning",
                name,
                "the model reads from the batch what it draws itself; missing entries read as their "
                "fill",
                "use what pyro.sample returned",
            )
        if name in guide.values_read and name not in guide.masks_read:
            yield Finding(
                "note",
                name,
                "it has missing entries and the guide does not read batch.mask(), so that it can't "
                "tell them from observed ones",
                "give its network the mask too, if many entries are missing",
            )


def _unobserved(pair: Pair) -> Iterator[Finding]:
    for name, site in pair.model_sites.items():
        if not site["is_observed"] and name not in pair.guide_sites:
            yield Finding(
                "note",
                name,
                "it is neither in the data nor in the guide, so it is drawn from the model and "
                "counts 0",
                "if it is a latent variable, draw it in the guide",
            )


def _support(pair: Pair) -> Iterator[Finding]:
    for name, site in pair.model_sites.items():
        if not site["is_observed"] and "observed" not in site["infer"]:
            continue
        fn = core(unmasked_fn(site))
        mask = site["infer"].get("drawn", site["infer"].get("observed"))
        mask = mask if isinstance(mask, Tensor) else None
        with suppress(NotImplementedError):
            if problem := outside(kind(fn), fn.support, fn.event_dim, site["value"], mask):
                yield Finding("error", name, *problem)


def _finite(pair: Pair) -> Iterator[Finding]:
    outside = {finding.site for finding in _support(pair)}
    for source, site in pair.sites():
        if source == "model" and site["name"] in outside:
            continue
        wrong = [
            f"{name} of its {kind(site['fn'])} is not {constraint}"
            for name, constraint, value in _arguments(core(site["fn"]))
            if not bool(constraint.check(value).all())
        ]
        try:
            log_prob, event_dim = elementwise(site["fn"], site["value"])
        except Exception as error:
            reason = Failed(source, error).reason
            yield Finding(
                "error",
                site["name"],
                f"the {source}'s {kind(site['fn'])} can't score values of type "
                f"{site['value'].dtype}: {reason}",
                "convert the data, say by .float()",
            )
            continue
        finite = log_prob.isfinite()
        if bool(finite.all()) and not wrong:
            continue
        finite = finite.flatten(-event_dim).all(-1) if event_dim else finite
        rows = (~finite).nonzero()[:, -1].unique().tolist() if finite.dim() else []
        text = f"the {source}'s log density is not finite" if not bool(finite.all()) else ""
        if text and rows:
            more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
            text += f" in rows {rows[:5]}{more}"
        yield Finding(
            "error",
            site["name"],
            ": ".join(part for part in (text, ", ".join(wrong)) if part),
            "look at what the network returns there, and at the scale of the data",
        )


def _arguments(fn: Any) -> Iterator[tuple[str, Any, Tensor]]:
    for name, constraint in getattr(fn, "arg_constraints", {}).items():
        value = vars(fn).get(name)
        if isinstance(value, Tensor) and not constraints.is_dependent(constraint):
            yield name, constraint, value


def _sizes(site: Site) -> dict[int, int]:
    """Vectorised plates around a site, dim -> size."""
    return {f.dim: f.size for f in site["cond_indep_stack"] if f.vectorized}


def _plate_scale(site: Site) -> float:
    scale = 1.0
    for frame in site["cond_indep_stack"]:
        scale *= frame.full_size / frame.size if frame.size else 1.0
    return scale


def _reaches(q: Any, p: Any) -> bool:
    """Whether q's support holds what p draws, as far as it can be told."""
    try:
        allowed = inside(q.support, p.sample())
    except (NotImplementedError, RuntimeError):
        return True
    return allowed is None or bool(allowed.all())


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a, b = (torch.as_tensor(True if x is None else x) for x in (a, b))
        try:
            return bool((a == b.to(a.device)).all())
        except RuntimeError:
            return False
    return bool(a == b)


RULES = (_fit_together, _plates, _scales, _reads, _unobserved, _support, _finite)
