"""What a pair makes of rows: samples and completions, codes, reconstructions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_vae.batch import Batch, Condition, still, take
from pyro_vae.evaluation.likelihood import (
    CELLS,
    check_rows,
    device_of,
    entries_per_row,
    judging,
    whole_numbers,
)
from pyro_vae.evaluation.sites import (
    OverDraws,
    beside,
    event_dim_of,
    expected,
    indicators,
    is_drawn,
    is_factor,
    moments,
    where_data,
    whole,
)
from pyro_vae.objectives.plan import Plan, dependents, make_plan
from pyro_vae.objectives.support import check_data, kind, supports
from pyro_vae.objectives.tracing import Replay, Site, trace, unmasked_fn, unwrap

__all__ = [
    "batches",
    "encode",
    "generate",
    "joined",
    "leaves",
    "means",
    "ready",
    "reconstruct",
    "sample",
]

Program = Callable[..., Any]


def sample(
    model: Program,
    num_rows: int | None = None,
    *,
    given: Batch | Tensor | None = None,
    guide: Program | None = None,
    sites: Collection[str] | None = None,
    mean: bool = False,
    batch_size: int = 250,
    seed: int = 0,
) -> dict[str, Tensor]:
    """One draw of every site for each of ``num_rows`` fresh rows, or for each row of ``given``.

    What ``given`` holds counts as data and comes back unchanged; missing entries and other sites
    are drawn from the guide where it has them, else from the model. So this generates (no
    ``given``), generates under conditions (labels as ``given``), completes rows, and predicts one
    modality from another (both with the guide). For several draws a row, repeat it:
    ``given.rows(torch.arange(n).repeat_interleave(100))``.

    Args:
        num_rows: N; not with ``given``, whose rows they are.
        sites: those to return (default: every site of the model).
        mean: instead of a draw, the mean given the draws of all other sites (expected pixels), at
            sites that the guide does not draw and on which no other site depends; at labels
            (``Categorical``) the probabilities of the classes ``[N, *event, C]``.
        batch_size: rows at a time.
        seed: of all draws; the global random state is left as it was.

    Returns:
        site -> ``[N, *event]``.

    Raises:
        ValueError: no rows, a site that the model lacks or that lies outside the plate over rows, a
            mean that is not known; ``given`` of which neither program has a site, or with values that
            the model does not take.
    """
    if (num_rows is None) == (given is None):
        raise ValueError("sample: wanted either num_rows, or given= with the rows to go on from")
    whole_numbers("sample", num_rows=num_rows, batch_size=batch_size)
    given = Batch(size=num_rows) if given is None else given
    check_rows("sample: given", given)
    guide = guide or _draws_nothing
    with judging(model, guide, seed):  # by itself, so that the draws are those of mean=False
        data = still(given).to(device_of(model, guide, given))
        _check_given(model, guide, data)
        free = leaves(model, guide, take(data, slice(0, 2))) if mean else set()
    parts = []
    with judging(model, guide, seed):
        for _, rows in batches(data, batch_size):
            found = _draw(model, guide, rows)[1]
            if unknown := set(sites or ()) - set(found):
                raise ValueError(
                    f"sample: came sites {sorted(unknown)}, the model has {list(found)}"
                )
            dim = _row_dim(found, len(rows))
            wanted = [name for name in found if sites is None or name in sites]
            parts.append({s: _sampled(found[s], rows, dim, s in free) for s in wanted})
    return joined("sample", parts, len(data))


def encode(
    model: Program,
    guide: Program,
    data: Batch | Tensor,
    *,
    num_draws: int = 64,
    batch_size: int = 250,
    chunk: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Mean and standard deviation of the guide's latents, row by row.

    Exact where the guide gives a distribution whose moments are known and that depends on no other
    draw; else from draws, with the known moments given those draws. The mean of a label
    (``Categorical``) is that of its indicators: the probabilities of the classes ``[N, *event, C]``.

    Args:
        data: rows, as the programs take them.
        num_draws: per row, where draws are needed.
        batch_size: rows at a time.
        chunk: draws at a time (default: by the size of a row).
        seed: of all draws; the global random state is left as it was.

    Returns:
        ``z`` and ``z_sd`` for every latent ``z``, each ``[N, *event]``. What the guide proposes for
        missing data is among them; the data stand where they are observed.

    Raises:
        ValueError: no rows, a guide without latents, sites outside the plate over rows.
    """
    whole_numbers("encode", at_least=2, num_draws=num_draws)
    whole_numbers("encode", batch_size=batch_size, chunk=chunk)
    parts = []
    with ready("encode", model, guide, seed, data) as (plan, data):
        sites, _ = _infer(guide, take(data, slice(0, 2)), plan.nesting)
        draws = 1 if len(sites) == 1 and all(map(moments, sites.values())) else num_draws
        for _, rows in batches(data, batch_size):
            latents: dict[str, OverDraws] = {}
            for size in _sizes(draws, chunk, rows):
                for name, site in _infer(guide, rows, plan.nesting, size)[0].items():
                    if is_drawn(site) and not site["infer"].get("is_auxiliary"):
                        latents.setdefault(name, OverDraws()).add(site, plan, size)
            part: dict[str, Tensor] = {}
            for name, over_draws in latents.items():
                part[name], part[f"{name}_sd"] = over_draws.mean(), over_draws.deviation()
            parts.append(part)
    return joined("encode", parts, len(data))


def reconstruct(
    model: Program,
    guide: Program,
    data: Batch | Tensor,
    *,
    num_draws: int = 16,
    batch_size: int = 250,
    chunk: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """E[x | z] averaged over the guide's draws of z, for every site that is data.

    Missing entries are predicted like the others. The mean is given all that the model draws before
    the site, other data included; draws take its place where it is not known. Labels
    (``Categorical``) give the probabilities of the classes ``[N, *event, C]``.

    Args:
        data: rows, as the programs take them.
        num_draws: per row.
        batch_size: rows at a time.
        chunk: draws at a time (default: by the size of a row).
        seed: of all draws; the global random state is left as it was.

    Returns:
        site -> ``[N, *event]``.

    Raises:
        ValueError: no rows, a guide without latents, sites outside the plate over rows.
    """
    whole_numbers("reconstruct", num_draws=num_draws, batch_size=batch_size, chunk=chunk)
    parts = []
    with ready("reconstruct", model, guide, seed, data) as (plan, data):
        for _, rows in batches(data, batch_size):
            part: dict[str, Tensor] = {}
            for size in _sizes(num_draws, chunk, rows):
                sites = _draw(model, guide, rows, plan.nesting, size)[1]
                for name, mean in means("reconstruct", sites, plan, size, draw=True).items():
                    term = mean.mean(0) * (size / num_draws)
                    part[name] = part[name] + term if name in part else term
            parts.append(part)
    return joined("reconstruct", parts, len(data))


# ---------------------------------------------------------------------------------------------
# Runs


@contextmanager
def ready(
    what: str, model: Program, guide: Program, seed: int, *data: Batch | Tensor
) -> Iterator[tuple[Any, ...]]:
    """The plan of a pair whose latents belong to rows, and its data: fixed, and where the pair is.

    Raises:
        ValueError: no rows, a guide without latents, sites outside the plate over rows; begins with
            ``what`` was asked for.
    """
    for rows in data:
        check_rows(f"{what}: data", rows)
    with judging(model, guide, seed):
        place = device_of(model, guide, data[0])
        fixed = [still(rows).to(place) for rows in data]
        plan = make_plan(model, guide, (take(fixed[0], slice(0, 2)),), {})
        for rows in fixed:
            check_data(plan.supports, rows.look() if isinstance(rows, Batch) else rows)
        if not plan.rows or plan.outside:
            raise ValueError(
                f"{what}: sites {sorted(plan.outside)} lie outside the plate over rows, so they are "
                "not a row's own; put every site into that plate"
            )
        if not plan.sites[0]:
            raise ValueError(f"{what}: the guide has no latents: it draws nothing")
        yield plan, *fixed


def batches(data: Batch | Tensor, size: int) -> Iterator[tuple[slice, Any]]:
    """Rows after rows, and which they are."""
    for start in range(0, len(data), size):
        rows = slice(start, start + size)
        yield rows, take(data, rows)


def _sizes(num_draws: int, chunk: int | None, rows: Batch | Tensor) -> Iterator[int]:
    chunk = chunk or max(1, CELLS // (entries_per_row(rows) * len(rows)))
    for done in range(0, num_draws, chunk):
        yield min(chunk, num_draws - done)


def joined(what: str, parts: list[dict[str, Tensor]], rows: int) -> dict[str, Tensor]:
    """Tensors of batches of rows as one each."""
    out = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
    if wrong := {len(value) for value in out.values()} - {rows}:
        raise ValueError(
            f"{what}: the programs made {sorted(wrong)} rows of {rows}; make their plate over rows "
            "hold all rows of the data they are given"
        )
    return out


def _draws_nothing(*args: Any) -> None:
    """The guide that leaves everything to the model."""


def _infer(
    guide: Program, rows: Batch | Tensor, nesting: int = 0, size: int = 1
) -> tuple[dict[str, Site], dict[str, Tensor]]:
    """The guide's sites, data where observed, and the subsamples of plates."""
    around = [Condition(rows, proposing=True)] if isinstance(rows, Batch) else []
    return trace(guide, (rows,), {}, around, size, nesting)


def generate(
    model: Program,
    rows: Batch | Tensor,
    values: Mapping[str, Tensor],
    nesting: int = 0,
    size: int = 1,
    handlers: Iterable[Any] = (),
) -> dict[str, Site]:
    """The model's sites but for factors: data as they are, latents as in ``values``, the rest drawn.
    Handlers have the last word."""
    bare, batch = unwrap(model, (rows,))
    around = [Condition(batch, proposed=values)] if batch is not None else []
    sites, _ = trace(bare, (rows,), {}, [*handlers, Replay(values), *around], size, nesting)
    return {name: site for name, site in sites.items() if not is_factor(site)}


def _draw(
    model: Program, guide: Program, rows: Batch | Tensor, nesting: int = 0, size: int = 1
) -> tuple[dict[str, Site], dict[str, Site]]:
    """The guide's sites, and the model's under its draws."""
    drawn, subsamples = _infer(guide, rows, nesting, size)
    values = {**subsamples, **{name: site["value"] for name, site in drawn.items()}}
    return drawn, generate(model, rows, values, nesting, size)


class _Watched(Batch):
    """Knows which sites programs asked for: covariates are read and are no sites of theirs."""

    read: set[str]

    def __getitem__(self, site: str) -> Tensor:
        self.read.add(site)
        return super().__getitem__(site)

    def __contains__(self, site: object) -> bool:
        self.read.add(str(site))
        return super().__contains__(site)


def _check_given(model: Program, guide: Program, data: Batch | Tensor) -> None:
    if not isinstance(data, Batch) or not data.sites:
        return
    rows: Any = copy.copy(take(data, slice(0, 2)))
    rows.__class__, rows.read = _Watched, set()
    try:
        _, sites = _draw(model, guide, rows)
    except RuntimeError as error:
        shapes = {site: list(rows.shape(site)[1:]) for site in data}
        reason = str(error).splitlines()[0]
        raise ValueError(f"sample: given came with events {shapes}: {reason}") from error
    if not rows.read & set(data):
        raise ValueError(f"sample: given came with sites {list(data)}, the model has {list(sites)}")
    check_data(supports(sites, data), data.look())


def leaves(model: Program, guide: Program, rows: Batch | Tensor) -> set[str]:
    """Sites that the model draws and on which no other depends."""
    drawn, sites = _draw(model, guide, rows)
    bare, _ = unwrap(model, (rows,))
    values = {name: site["value"] for name, site in sites.items()}

    def is_leaf(name: str) -> bool:
        return not dependents(bare, (rows,), {}, values, name, unmasked_fn(sites[name]))

    candidates = set(sites) - set(drawn)
    return {s for s in candidates if where_data(sites[s]) is not True and is_leaf(s)}


# ---------------------------------------------------------------------------------------------
# Sites


def means(
    what: str, sites: Mapping[str, Site], plan: Plan, size: int = 1, draw: bool = False
) -> dict[str, Tensor]:
    """Means ``[K, B, *event]`` of the sites that are data, and that the guide does not propose.

    Args:
        draw: let a draw stand for a mean that is not known.

    Raises:
        ValueError: a mean that is not known, or that there is none.
    """
    out, proposed = {}, {name for name, _ in plan.sites[0]}
    for name, site in sites.items():
        if site["is_observed"] and name not in proposed:
            fn = unmasked_fn(site)
            mean = _mean(what, name, fn, fn() if draw else None)
            out[name] = plan.canonical(mean, event_dim_of(fn), size, True)
    if not out:
        raise ValueError(
            f"{what}: no site is data alone; the guide proposes {sorted(proposed)}: complete rows by "
            "sample(model, given=rows, guide=guide)"
        )
    return out


def _mean(what: str, name: str, fn: Any, else_: Tensor | None = None) -> Tensor:
    mean = expected(fn)
    mean = else_ if mean is None else mean
    if mean is None or bool(mean.isnan().any()):
        known = "known" if mean is None else "a number"
        raise ValueError(f"{what}: site {name!r}: the mean of its {kind(fn)} is not {known}")
    return mean


def _sampled(site: Site, rows: Batch | Tensor, row_dim: int, leaf: bool) -> Tensor:
    """``[B, *event]``, where it is not data the mean of a leaf."""
    fn, value, known = unmasked_fn(site), site["value"], where_data(site)
    event_dim = int(fn.event_dim)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"sample: site {site['name']!r}: the model gives obs= by itself; drop it: a model "
            "contains no data"
        )
    if leaf and known is not True:
        mean, event_dim = _mean("sample", site["name"], fn), event_dim_of(fn)
        data = indicators(fn, value).to(mean)
        value = mean if known is False else torch.where(beside(fn, known), data, mean)
    else:
        value = whole(site, rows if isinstance(rows, Batch) else None, value)
    return _by_row(site, value, event_dim, row_dim)


def _row_dim(sites: Mapping[str, Site], rows: int) -> int:
    """The dim of the plate over rows, which holds every site."""
    dims = {
        name: {f.dim for f in site["cond_indep_stack"] if f.vectorized and f.size == rows}
        for name, site in sites.items()
    }
    shared: set[int] = set.intersection(*dims.values()) if dims else set()
    if not shared:
        outside = [name for name in dims if not dims[name]] or list(dims)
        raise ValueError(
            f"sample: sites {outside} lie outside a plate over the {rows} rows; put every site into "
            'pyro.plate("data", batch.size, dim=-1)'
        )
    return max(shared)


def _by_row(site: Site, value: Tensor, event_dim: int, row_dim: int) -> Tensor:
    """``[*plates, *event]`` -> ``[B, *rest]``."""
    plates = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    leading = value.dim() - event_dim
    row = leading + row_dim
    stray = [dim for dim in range(leading) if dim - leading not in plates]  # of size 1
    return value.squeeze(stray).movedim(row - sum(dim < row for dim in stray), 0)
