"""Paths through the latent space: what the model makes of the points on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_vae.batch import Batch, take
from pyro_vae.evaluation.likelihood import whole_numbers
from pyro_vae.evaluation.predict import (
    batches,
    encode,
    generate,
    joined,
    means,
    ready,
)
from pyro_vae.evaluation.sites import expected, is_discrete, is_label
from pyro_vae.objectives.plan import Plan
from pyro_vae.objectives.tracing import Site, core, trace

__all__ = ["interpolate", "traverse"]

Program = Callable[..., Any]


def traverse(
    model: Program,
    guide: Program,
    data: Batch | Tensor,
    dims: int | Sequence[int] | None = None,
    values: Sequence[float] | Tensor | None = None,
    *,
    latent: str | None = None,
    num_draws: int = 64,
    batch_size: int = 250,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Decoded means while one latent dimension at a time takes other values.

    All other latents stay at the row's posterior mean (whole numbers at the most probable one), but
    those whose prior depends on the traversed one move along with their prior's mean.

    Args:
        data: rows to start from.
        dims: numbers of dimensions in the flattened latent (default: all of them).
        values: what each of them becomes (default: -3, -2, ..., 3, as a standard normal prior has
            them).
        latent: the site, if the guide has several.
        num_draws: per row, where posterior means are not known.
        batch_size: rows at a time.
        seed: of all draws, the same at every point of a path; the global random state is left as it
            was.

    Returns:
        site that is data -> ``[N, len(dims), len(values), *event]``.

    Raises:
        ValueError: as for ``encode``; a latent that is not there, a dimension that it does not have,
            a mean that is not known.
    """
    path = torch.linspace(-3, 3, 7) if values is None else torch.as_tensor(values).flatten()
    whole_numbers("traverse", batch_size=batch_size)
    parts = []
    with ready("traverse", model, guide, seed, data) as (plan, data):
        points, whole = _points("traverse", model, guide, data, plan, num_draws, batch_size, seed)
        name = _chosen(points, latent)
        chosen = _dims(name, points[name], dims)
        if not len(path) or (values is None and name in whole):
            raise ValueError(
                f"traverse: came values={values!r}, wanted those that {name!r} is to take"
            )
        for here, rows in batches(data, batch_size):
            held = {site: value[here] for site, value in points.items()}
            base = _prior_means(_at(model, rows, held, seed), held)
            grid = (_moved(held, name, dim, value) for dim in chosen for value in path)
            sites = (_at(model, rows, values, seed, base) for values in grid)
            decoded = _decoded("traverse", plan, sites)
            parts.append(_stacked(decoded, (len(chosen), len(path))))
    return joined("traverse", parts, len(data))


def interpolate(
    model: Program,
    guide: Program,
    first: Batch | Tensor,
    second: Batch | Tensor,
    steps: int = 9,
    *,
    path: str = "linear",
    num_draws: int = 64,
    batch_size: int = 250,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Decoded means on the way from one row's posterior mean to another's.

    All latents go together, each along its own path. Whole numbers, such as labels, change in the
    middle, and so do the data that the model conditions on.

    Args:
        first: rows to start from.
        second: as many rows to go to, paired with those.
        steps: points of a path, both ends included.
        path: ``"linear"``, a straight line, or ``"spherical"``, whose points are about as far from
            the origin as draws of a Gaussian prior are in many dimensions (White 2016,
            arXiv:1609.04468).
        num_draws: per row, where posterior means are not known.
        batch_size: rows at a time.
        seed: of all draws, the same at every point of a path; the global random state is left as it
            was.

    Returns:
        site that is data -> ``[N, steps, *event]``.

    Raises:
        ValueError: as for ``encode``; an unknown path, rows that do not pair, a mean that is not
            known.
    """
    whole_numbers("interpolate", at_least=2, steps=steps)
    whole_numbers("interpolate", batch_size=batch_size)
    if path not in PATHS:
        raise ValueError(f"interpolate: came path={path!r}, wanted one of {list(PATHS)}")
    parts = []
    with ready("interpolate", model, guide, seed, first, second) as (plan, first, second):
        if len(first) != len(second):
            raise ValueError(
                f"interpolate: came {len(first)} and {len(second)} rows, wanted equally many"
            )
        (starts, jumps), (ends, _) = (
            _points("interpolate", model, guide, data, plan, num_draws, batch_size, seed)
            for data in (first, second)
        )
        for here, _ in batches(first, batch_size):
            sites = []
            for t in torch.linspace(0, 1, steps).tolist():
                rows = take(first if t < 0.5 else second, here)
                values = dict(starts if t < 0.5 else ends)
                along = set(starts) & set(ends) - jumps
                values |= {site: PATHS[path](starts[site], ends[site], t) for site in along}
                values = {site: value[here] for site, value in values.items()}
                sites.append(_at(model, rows, values, seed))
            parts.append(_stacked(_decoded("interpolate", plan, sites), (steps,)))
    return joined("interpolate", parts, len(first))


# ---------------------------------------------------------------------------------------------
# Points


def _points(
    what: str,
    model: Program,
    guide: Program,
    data: Batch | Tensor,
    plan: Plan,
    num_draws: int,
    batch_size: int,
    seed: int,
) -> tuple[dict[str, Tensor], set[str]]:
    """Latents ``[N, *event]`` to start from: posterior means, and of whole numbers the most probable;
    and which are whole numbers."""
    if plan.nesting != 1:
        raise ValueError(
            f"{what}: wanted one plate, over rows; there are {plan.nesting} dims of them"
        )
    codes = encode(model, guide, data, num_draws=num_draws, batch_size=batch_size, seed=seed)
    sites, _ = trace(guide, (take(data, slice(0, 2)),), {}, [])
    fns = {site: sites[site]["fn"] for site in sites if site in codes}
    if not fns:
        raise ValueError(f"{what}: the data hold every site of the guide, so no latent is left")
    points = {site: _likely(fn, codes[site].to(data.device)) for site, fn in fns.items()}
    return points, {site for site, fn in fns.items() if is_discrete(fn)}


def _likely(fn: Any, mean: Tensor) -> Tensor:
    """A value that the distribution takes: its mean, if there are values between any two."""
    if is_label(fn):
        return mean.argmax(-1)
    if isinstance(core(fn), dist.OneHotCategorical):
        return one_hot(mean.argmax(-1), mean.shape[-1]).to(mean)
    return mean.round() if is_discrete(fn) else mean


def _chosen(points: Mapping[str, Tensor], latent: str | None) -> str:
    name = next(iter(points)) if latent is None and len(points) == 1 else latent
    if name is None or name not in points:
        raise ValueError(f"traverse: came latent={latent!r}, wanted one of {list(points)}")
    return name


def _dims(name: str, value: Tensor, dims: int | Sequence[int] | None) -> list[int]:
    """Numbers of dimensions of the flattened latent."""
    width = math.prod(value.shape[1:])
    chosen = [dims] if isinstance(dims, int) else list(range(width) if dims is None else dims)
    if not chosen or not all(isinstance(dim, int) and 0 <= dim < width for dim in chosen):
        raise ValueError(
            f"traverse: came dims={dims!r}, latent {name!r} has dimensions 0 to {width - 1}"
        )
    return chosen


def _moved(held: Mapping[str, Tensor], name: str, dim: int, value: Tensor) -> dict[str, Tensor]:
    flat = held[name].reshape(len(held[name]), -1).clone()
    flat[:, dim] = value.to(flat)
    return {**held, name: flat.reshape(held[name].shape)}


def _linear(a: Tensor, b: Tensor, t: float) -> Tensor:
    return (1 - t) * a + t * b


def _spherical(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Turn from one point of ``[N, *event]`` to the other by equal angles; nothing to turn by where
    they point the same way."""
    shape, (a, b) = a.shape, (point.reshape(len(point), -1) for point in (a, b))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1)[:, None]
    angle = cosine.clamp(-1, 1).acos()
    sine = angle.sin()
    turned = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / sine
    return torch.where(sine < 1e-4, _linear(a, b, t), turned).reshape(shape)


PATHS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "linear": _linear,
    "spherical": _spherical,
}


# ---------------------------------------------------------------------------------------------
# What the model makes of them


class _Along(Messenger):
    """Give latents values, and let each keep its distance from its prior's mean.

    Args:
        values: site -> value.
        base: site -> its prior's mean where the path starts, of those that move along.
    """

    def __init__(self, values: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values, self.base = values, base

    def _pyro_sample(self, msg: Any) -> None:
        if (site := msg["name"]) in self.base and not msg["is_observed"]:
            msg["value"] = self.values[site] + msg["fn"].mean - self.base[site]


def _prior_means(sites: Mapping[str, Site], latents: Iterable[str]) -> dict[str, Tensor]:
    """Of the latents that there is something between two values of."""
    fns = {site: sites[site]["fn"] for site in latents}
    means = {site: expected(fn) for site, fn in fns.items() if not is_discrete(fn)}
    return {s: mean for s, mean in means.items() if mean is not None and not mean.isnan().any()}


def _at(
    model: Program,
    rows: Batch | Tensor,
    values: Mapping[str, Tensor],
    seed: int,
    base: Mapping[str, Tensor] | None = None,
) -> dict[str, Site]:
    """The model's sites at a point; what the model itself draws is the same along a path."""
    torch.manual_seed(seed)
    return generate(model, rows, values, handlers=[_Along(values, base or {})])


def _decoded(what: str, plan: Plan, points: Iterable[dict[str, Site]]) -> list[dict[str, Tensor]]:
    """Means ``[B, *event]`` of the sites that are data, point by point."""
    every = (means(what, sites, plan) for sites in points)
    return [{site: mean[0] for site, mean in each.items()} for each in every]


def _stacked(decoded: list[dict[str, Tensor]], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Points of a path as one tensor ``[B, *shape, *event]`` a site."""
    return {
        site: torch.stack([each[site] for each in decoded], 1).unflatten(1, shape)
        for site in decoded[0]
    }
