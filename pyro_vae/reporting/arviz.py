"""A pair's draws, predictions and log densities as ArviZ's container."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.batch import Batch, still, take
from pyro_vae.evaluation.diagnostics import khat_threshold, pareto_khat, tail_length
from pyro_vae.evaluation.likelihood import (
    CELLS,
    admitted,
    check_rows,
    device_of,
    entries_per_row,
    judging,
    whole_numbers,
)
from pyro_vae.evaluation.sites import is_drawn, where_data, whole
from pyro_vae.objectives.particles import Particles, run
from pyro_vae.objectives.plan import Plan, make_plan
from pyro_vae.objectives.support import check_data
from pyro_vae.objectives.tracing import Replay, Site, trace, unwrap
from pyro_vae.reporting.convert import SINGLE, container

__all__ = ["GROUPS", "to_arviz"]

Program = Callable[..., Any]
PREDICTIVE = ("posterior_predictive", "prior", "prior_predictive", "log_likelihood")
GROUPS = ("posterior", *PREDICTIVE, "sample_stats", *SINGLE)
RESERVED = ("chain", "draw", "row")
STATS = ("log_p", "log_q", "log_weight")
DIAGNOSTICS = ("khat", "ess")


class HasPair(Protocol):
    """What a run has."""

    @property
    def model(self) -> Program: ...
    @property
    def guide(self) -> Program: ...


def to_arviz(
    pair: tuple[Program, Program] | HasPair,
    data: Batch | Tensor,
    num_draws: int = 500,
    *,
    importance_resample: bool = False,
    groups: Collection[str] = GROUPS,
    batch_size: int = 250,
    chunk: int | None = None,
    seed: int = 0,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
) -> Any:
    """Draws from the guide, and what the model makes of them, for ArviZ.

    The draws called ``posterior`` come from the *guide*, not from the exact posterior; ``khat`` and
    ``ess`` say row by row how far the two are apart, and ``importance_resample`` brings them closer.

    Every variable has dims ``chain`` (one), ``draw``, ``row`` (labelled by ``data.index``) and those
    of its event:

    * ``posterior``: the guide's latents ``[draw, row, *event]``; data that the guide proposes where
      they are missing are among them.
    * ``posterior_predictive``: the model's other sites given those: data drawn anew where they were
      observed, imputations where they were missing or absent.
    * ``prior``, ``prior_predictive``: the same sites drawn from the model alone.
    * ``log_likelihood``: log p of the observed entries of a site, ``[draw, row]``. It is 0 where a
      row has none; leave such rows out for ``az.loo``, which counts them (0.x) or fails (1.x).
    * ``sample_stats``: ``log_p`` of data and latents, ``log_q``, ``log_weight = log_p - log_q``, of
      the row, ``[draw, row]``. Row weights are not applied.
    * ``observed_data``: NaN where missing.
    * ``constant_data``: Pareto ``khat`` and effective sample size ``ess`` of a row's weights, and the
      sites that no program samples (covariates).

    ``az.loo`` takes rows as observations. Here latents belong to a row and parameters are fixed, so
    leaving a row out leaves nothing to learn about its latents from: with exact posterior draws,
    ``elpd_loo`` estimates the sum over rows of log p(x), by weights that lead back from posterior
    to prior (the harmonic mean), whose k-hat is seldom below 0.7; with the guide's draws it is off
    by what the guide is, to either side. It compares pairs roughly. ``pyro_vae.evaluate`` estimates
    the same log p(x) from below, with a widened proposal, K as large as it takes, and a standard
    error; rely on its ``log_p``.

    Args:
        pair: (model, guide), or a run of ``fit`` or ``load``.
        data: rows, as the programs take them. The result holds ``num_draws`` times the data, twice.
        num_draws: per row.
        importance_resample: draw, per row, ``num_draws`` times with replacement from the guide's
            draws in proportion to their importance weights: approximate posterior draws, of which
            about ``ess`` are distinct. Of no use where ``khat`` exceeds ``attrs["khat_threshold"]``.
        groups: what to make and hold, of ``GROUPS``.
        batch_size: rows at a time.
        chunk: draws at a time (default: by the size of a row).
        seed: of all draws; the global random state is left as it was.
        dims: site -> names of its event dims (default: ``x_dim_0``, ...).
        coords: dim -> labels.

    Returns:
        ``InferenceData`` with ArviZ 0.x, ``DataTree`` with ArviZ 1.x.

    Raises:
        ValueError: no rows, an unknown group, dims that do not fit, a site outside the plate over
            rows, a posterior that is a point mass (it has no importance weights).
    """
    if not (isinstance(pair, tuple) and len(pair) == 2) and not hasattr(pair, "guide"):
        raise ValueError(
            f"to_arviz: came a {type(pair).__name__} first, wanted a run, or (model, guide), and "
            "then the data"
        )
    model, guide = pair if isinstance(pair, tuple) else (pair.model, pair.guide)
    whole_numbers("to_arviz", num_draws=num_draws, batch_size=batch_size, chunk=chunk)
    if unknown := set(groups) - set(GROUPS):
        raise ValueError(f"to_arviz: came groups {sorted(unknown)}, wanted some of {list(GROUPS)}")
    check_rows("to_arviz: data", data)
    with judging(model, guide, seed):
        data = still(data).to(device_of(model, guide, data))
        plan = _admitted(model, guide, (take(data, slice(0, 2)),))
        check_data(plan.supports, data.look() if isinstance(data, Batch) else data)
        chunk = chunk or max(1, CELLS // (entries_per_row(data) * min(batch_size, len(data))))
        arrays = _Arrays(num_draws, len(data), groups)
        for start in range(0, len(data), batch_size):
            rows = slice(start, min(start + batch_size, len(data)))
            args = (take(data, rows),)
            for done in range(0, num_draws, chunk):
                draws = slice(done, min(done + chunk, num_draws))
                _add(arrays, draws, rows, model, guide, args, plan)
            _weigh(arrays, rows, importance_resample)
    names = _dims(arrays, dims or {})
    index = data.index.cpu().numpy() if isinstance(data, Batch) else np.arange(len(data))
    attrs = {
        "inference_library": "pyro_vae",
        "posterior_draws": "guide, resampled by weight" if importance_resample else "guide",
        "num_draws": num_draws,
        "khat_threshold": khat_threshold(num_draws),
        "seed": seed,
    }
    held = {group: of for group, of in arrays.groups.items() if group in groups}
    return container(held, names, {"row": index, **(coords or {})}, attrs)


class _Arrays:
    """Group -> variable -> ``[draw, row, *event]`` (without draw in the groups ``SINGLE``)."""

    def __init__(self, num_draws: int, num_rows: int, wanted: Collection[str]) -> None:
        self.num_draws, self.num_rows = num_draws, num_rows
        # the weights are needed for k-hat, whoever wants them
        self.wanted = {*wanted, "sample_stats"}
        self.groups: dict[str, dict[str, NDArray[Any]]] = {
            group: {} for group in GROUPS if group in self.wanted
        }

    def put(self, group: str, name: str, draws: slice, rows: slice, value: Tensor) -> None:
        """Store ``value [K, B, *event]`` (``[B, *event]`` in the groups ``SINGLE``)."""
        if group not in self.wanted:
            return
        value = value.detach().cpu()
        array = (value.float() if value.dtype in (torch.bfloat16, torch.half) else value).numpy()
        single = group in SINGLE
        leading = (self.num_rows,) if single else (self.num_draws, self.num_rows)
        held = self.groups[group]
        if name not in held:
            held[name] = np.empty((*leading, *array.shape[len(leading) :]), array.dtype)
        held[name][rows if single else (draws, rows)] = array


class _Redraw(Messenger):
    """Draw every site anew from the model, but for the values to keep.

    Args:
        keep: site -> value and where (bool, None: everywhere) it is drawn anew all the same.
    """

    def __init__(self, keep: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
        super().__init__()
        self.keep = keep

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or site_is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        value, anew = self.keep.get(msg["name"], (None, None))
        if value is None:
            value = msg["fn"]()
        elif anew is not None:
            value = torch.where(anew, msg["fn"](), value)
        msg["value"], msg["is_observed"], msg["done"] = value, False, True


def _admitted(model: Program, guide: Program, args: tuple[Any, ...]) -> Plan:
    """The plan of a pair whose draws fit into groups row by row."""
    plan = make_plan(model, guide, args, {})
    first = admitted("to_arviz", plan, model, guide, args)
    rows = {len(term[0]) for term in first.likelihood.values()}
    if rows != {len(args[0])}:
        raise ValueError(
            f"to_arviz: the model took {sorted(rows)} rows of {len(args[0])}; "
            "make its plate over rows hold all rows of the data it is given"
        )
    if taken := {*first.model, *first.guide} & set(RESERVED):
        raise ValueError(f"to_arviz: sites {sorted(taken)} have names of dims; rename them")
    return plan


def _add(
    arrays: _Arrays,
    draws: slice,
    rows: slice,
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    plan: Plan,
) -> None:
    """Some draws of some rows."""
    size = draws.stop - draws.start
    particles = run(model, guide, args, {}, plan, size)
    latents = [
        name for name, q in particles.guide.items() if is_drawn(q) and name in particles.model
    ]
    bare, batch = unwrap(model, args)

    def put(group: str, name: str, value: Tensor) -> None:
        arrays.put(group, name, draws, rows, value)

    def canonical(value: Tensor, site: Site) -> Tensor:
        return plan.canonical(value, site["fn"].event_dim, size, True)

    for name in latents:
        put("posterior", name, particles.samples[name])
    for name, term in particles.likelihood.items():
        put("log_likelihood", name, _per_row(particles, {name: term}))
    log_p = _per_row(particles, particles.likelihood) + _per_row(particles, particles.prior)
    log_q = _per_row(particles, particles.posterior)
    shape = (size, rows.stop - rows.start)
    for name, stat in zip(STATS, (log_p, log_q, log_p - log_q), strict=True):
        put("sample_stats", name, stat.double().expand(shape))

    if draws.start == 0:
        for name, site in particles.model.items():
            seen = where_data(site)
            if seen is not False:
                value = canonical(site["value"], site)[0]
                if seen is not True:
                    value = _with_nan(value, canonical(seen, site)[0])
                put("observed_data", name, value)
        if batch is not None:
            for name in [site for site in batch if site not in particles.model]:
                put("constant_data", name, _with_nan(batch[name], batch.mask(name)))

    keep: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, site in particles.model.items():
        seen = where_data(site)
        if name in particles.guide or seen is False:
            keep[name] = (site["value"], None)
        elif seen is not True:
            keep[name] = (site["value"], seen)
    for group, kept in (("posterior", keep), ("prior", {})):
        wanted = {f"{group}_predictive"} | ({"prior"} & {group})
        if arrays.wanted.isdisjoint(wanted):
            continue
        handlers = [Replay(particles.subsamples), _Redraw(kept)]
        for name, site in trace(bare, args, {}, handlers, size, plan.nesting)[0].items():
            value = whole(site, batch, canonical(site["value"], site))
            if name not in latents:
                put(f"{group}_predictive", name, value)
            elif group == "prior":
                put(group, name, value)


def _with_nan(value: Tensor, seen: Tensor) -> Tensor:
    """NaN where not seen, in whole numbers too."""
    if bool(seen.all()):
        return value
    value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    return torch.where(seen, value, torch.nan)


def _per_row(particles: Particles, terms: Mapping[str, Tensor]) -> Tensor:
    """``[K, B]``, up to broadcasting."""
    total = particles.summed(terms)
    return torch.zeros(1, 1) if total is None else total.cpu()


def _weigh(arrays: _Arrays, rows: slice, resample: bool) -> None:
    """k-hat and effective sample size of some rows, and one more draw by their weights on demand."""
    log_w = torch.from_numpy(arrays.groups["sample_stats"]["log_weight"][:, rows])
    total = torch.logsumexp(log_w, 0)
    if bool((~torch.isfinite(total)).any()):
        row = rows.start + int((~torch.isfinite(total)).nonzero()[0])
        raise ValueError(f"to_arviz: row {row} has importance weights that are no numbers or all 0")
    khat = pareto_khat(log_w.topk(min(tail_length(len(log_w)) + 1, len(log_w)), 0).values)
    ess = torch.exp(2 * total - torch.logsumexp(2 * log_w, 0))
    for name, value in zip(DIAGNOSTICS, (khat, ess), strict=True):
        arrays.put("constant_data", name, slice(None), rows, value)
    if not resample:
        return
    probabilities = torch.softmax(log_w, 0).T
    picked = torch.multinomial(probabilities, len(log_w), replacement=True).T.numpy()  # [K, B]
    for group in ("posterior", "posterior_predictive", "log_likelihood", "sample_stats"):
        for array in arrays.groups.get(group, {}).values():
            index = picked.reshape(*picked.shape, *(1,) * (array.ndim - 2))
            array[:, rows] = np.take_along_axis(array[:, rows], index, 0)


def _dims(arrays: _Arrays, given: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Variable -> names of its dims, ``row`` first."""
    rank: dict[str, int] = {}
    for group, variables in arrays.groups.items():
        for name, array in variables.items():
            events = array.ndim - (1 if group in SINGLE else 2)
            rank[name] = max(rank.get(name, 0), events)
    if unknown := set(given) - set(rank):
        raise ValueError(f"to_arviz: dims= names {sorted(unknown)}, there are {sorted(rank)}")
    out = {}
    for name, events in rank.items():
        names = list(given.get(name, [f"{name}_dim_{i}" for i in range(events)]))
        if len(names) != events:
            raise ValueError(f"to_arviz: dims= came {names} for {name!r}, wanted {events} names")
        out[name] = ["row", *names]
    return out
