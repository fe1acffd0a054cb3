"""Running a program and looking at its sites: the ground that plans and particles stand on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.batch import Batch, Observed

__all__ = [
    "PLATE",
    "Program",
    "Replay",
    "Site",
    "close",
    "core",
    "elementwise",
    "elementwise_kl",
    "is_point",
    "plate_scale",
    "unmasked_fn",
    "trace",
    "unwrap",
]

Program = Callable[..., Any]
Site = dict[str, Any]
PLATE = "_particles"


class Replay(Messenger):
    """Give sites the values that another run had; a site that is data already keeps its own."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


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
        try:
            program(*args, **kwargs)
        except ValueError as error:
            error.args = (_cure(str(error)), *error.args[1:])  # the same error: it knows the line
            raise
    nodes: list[Any] = [s for s in tracer.trace.nodes.values() if s["type"] == "sample"]
    sites = {
        site["name"]: site
        for site in nodes
        if not site_is_subsample(site) and not site["infer"].get("_deterministic")
    }
    subsamples = {site["name"]: site["value"] for site in nodes if site_is_subsample(site)}
    subsamples.pop(PLATE, None)
    return sites, subsamples


SHAPE = re.compile(
    r"Shape mismatch inside plate\('(.*)'\) at site (\S+) dim (-\d+), (\d+) vs (\d+)"
)
PARAMETER = re.compile(
    r"Expected parameter (\w+) \(.*?\) of distribution (\w+)\(.*?\) to satisfy the constraint "
    r"(.*?), but found invalid values?:(.*)",
    re.DOTALL,
)


def _cure(text: str) -> str:
    """Pyro's own message about a shape beyond a plate, and torch's about a distribution's parameter,
    as one line with the cure; any other as it is."""
    if told := SHAPE.match(text):
        plate, site, dim, size, came = told.groups()
        return (
            f"site {site!r}: its distribution has {came} at batch dim {dim}, where plate {plate!r} "
            f"has {size} rows; move event dims into the event by .to_event(), or give the plate "
            "batch.size"
        )
    if told := PARAMETER.match(text):
        name, kind, constraint, values = told.groups()
        why = (
            "it has NaN: look for parameters or inputs of its network that are not finite"
            if "nan" in values
            else f"wanted {constraint}: softplus or exp make numbers positive"
        )
        return f"a {kind} of the program came with {name} that it does not take; {why}"
    return text


def unwrap(model: Program, args: tuple[Any, ...]) -> tuple[Program, Batch | None]:
    """The bare model and the batch, if the first argument is one."""
    if args and isinstance(args[0], Batch):
        return (model.model if isinstance(model, Observed) else model), args[0]
    return model, None


def core(fn: Any) -> Any:
    """The innermost distribution, under Independent, masks and expansions."""
    while isinstance(fn, dist.Independent | MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn


def is_point(site: Site) -> bool:
    """Whether a site is a point, which has a path but no score."""
    return isinstance(core(site["fn"]), dist.Delta)


def unmasked_fn(site: Site) -> Any:
    return site["infer"].get("source", site["fn"])


def elementwise(
    fn: Any, value: Tensor, masked: bool = True, drawn: bool = False
) -> tuple[Tensor, int]:
    """Log density before the sum over event dims, and how many event dims it still has; with ``drawn``
    that of the part of a mixture which the draw came from."""
    if isinstance(fn, dist.Independent):
        log_prob, event_dim = elementwise(fn.base_dist, value, masked, drawn)
        return log_prob, event_dim + fn.reinterpreted_batch_ndims
    if isinstance(fn, MaskedDistribution) and not masked:
        return elementwise(fn.base_dist, value, masked, drawn)
    if isinstance(fn, MaskedDistribution) and isinstance(fn._mask, Tensor):
        log_prob, event_dim = elementwise(fn.base_dist, value, drawn=drawn)
        return scale_and_mask(log_prob, mask=fn._mask[(...,) + (None,) * event_dim]), event_dim
    density = getattr(fn, "drawn_log_prob", fn.log_prob) if drawn else fn.log_prob
    return density(value), 0


def elementwise_kl(q: Any, p: Any) -> tuple[Tensor, int]:
    if isinstance(q, dist.Independent) and isinstance(p, dist.Independent):
        dims = q.reinterpreted_batch_ndims
        if dims == p.reinterpreted_batch_ndims:
            kl, event_dim = elementwise_kl(q.base_dist, p.base_dist)
            return kl, event_dim + dims
    if isinstance(q, MaskedDistribution) and isinstance(p, MaskedDistribution):
        kl, event_dim = elementwise_kl(q.base_dist, p.base_dist)
        mask = q._mask  # p has the same, or the plan does not list the site
        mask = mask[(...,) + (None,) * event_dim] if isinstance(mask, Tensor) else mask
        return scale_and_mask(kl, mask=mask), event_dim
    if isinstance(core(q), dist.Delta):  # Pyro's KL leaves out the log density of the point
        return q.log_prob(q.mean) - p.log_prob(q.mean), 0
    return kl_divergence(q, p), 0


def plate_scale(site: Site, rows: tuple[int, ...]) -> float:
    """N / B of the site's row plates."""
    scale = 1.0
    for frame in site["cond_indep_stack"]:
        if frame.dim in rows:
            scale *= frame.full_size / frame.size
    return scale


def close(a: float | Tensor, b: float | Tensor) -> bool | None:
    """Whether two scales are equal; None for tensors, whose values would have to leave the device."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return None
    return math.isclose(a, b, rel_tol=1e-9)
