"""Missing entries of rows, filled in: by one best value with its uncertainty, and by draws."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import torch
from pyro import distributions as dist
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_vae.batch import Batch, take
from pyro_vae.evaluation.likelihood import (
    CELLS,
    admitted,
    entries_per_row,
    evaluate,
    whole_numbers,
)
from pyro_vae.evaluation.predict import batches, generate, joined, leaves, ready
from pyro_vae.evaluation.proposals import log_weights_of
from pyro_vae.evaluation.sites import (
    event_dim_of,
    indicators,
    is_label,
    moments,
    where_data,
)
from pyro_vae.objectives.particles import run
from pyro_vae.objectives.plan import Plan
from pyro_vae.objectives.tracing import Site, unmasked_fn

__all__ = ["Imputation", "held_out_log_p", "impute"]

Program = Callable[..., Any]
LOSSES = ("l2", "l1")
REST = "_rest"  # what random numbers are for that belong to no site
AT_ONCE = 250  # particles; a number of its own, so that no row's depend on how many rows there are


@dataclass(frozen=True)
class Imputation:
    """What is missing, given what is observed, row by row. Entries that are observed are as they came.

    Attributes:
        values: site -> ``[N, *event]``, missing entries at their best value.
        sd: site -> ``[N, *event]``, standard deviation of the missing entries given what is observed,
            0 where observed. Not for labels.
        probabilities: label -> ``[N, *event, C]``, of the classes.
        lower, upper: site -> ``[N, *event]``, ends of the interval, if one was asked for. Not for
            labels.
        draws: site -> ``[M, N, *event]``, the rows M times, completed each time.
        ess: ``[N]`` effective sample size of the importance weights. Where it is near 1 a single
            particle decides, and the uncertainty is understated.
        log_p: ``[N]`` lower bound on the log density of what is observed, nats.
    """

    values: dict[str, Tensor]
    sd: dict[str, Tensor]
    probabilities: dict[str, Tensor]
    lower: dict[str, Tensor]
    upper: dict[str, Tensor]
    draws: dict[str, Tensor]
    ess: Tensor
    log_p: Tensor


def impute(
    model: Program,
    guide: Program,
    data: Batch,
    num_particles: int = 1000,
    *,
    draws: int = 0,
    loss: str | Mapping[str, str] = "l2",
    interval: float | None = None,
    sites: Collection[str] | None = None,
    batch_size: int = 250,
    chunk: int | None = None,
    seed: int = 0,
) -> Imputation:
    """Fill missing entries by self-normalised importance sampling (Mattei and Frellsen 2019).

        E[x_mis | x_obs] ≈ Σ_k w_k E[x_mis | z_k],   w ∝ p(x_obs, z_k) / q(z_k)

    Where other sites depend on the missing entries (a mask model: not-MIWAE, Ipsen et al. 2021), the
    entries are drawn with z, and their draws take the place of the inner mean. Draws, medians and
    intervals are by resampling: z by its weight, then x_mis given z.

    The numbers that a row's draws are made from depend on ``seed`` and the row's ``data.index`` alone,
    so that parts of the data give what the whole gives, to rounding. Memory does not grow with
    ``num_particles``, unless medians or intervals are asked for, for which as many draws are kept. Rows
    come one at a time where a site is drawn on which others depend, and where it is not known how to
    draw from a distribution row by row.

    Args:
        num_particles: K.
        draws: M completions of every row, for multiple imputation.
        loss: what the best value is to be best for: ``"l2"`` the mean, ``"l1"`` the median; or site ->
            one of them. For labels it is the most probable class. Whole numbers stay whole.
        interval: probability of the interval between two quantiles, 0.9 say.
        sites: those to fill (default: every incomplete one). One that the data lack is missing in every
            entry.
        batch_size: rows at a time, at most.
        chunk: particles at a time.
        seed: of all draws; the global random state is left as it was.

    Raises:
        ValueError: no rows, sites that the model lacks or the guide infers, a posterior that is a point
            mass, latents outside the plate over rows, losses that there are not or of sites that there
            are not.
    """
    whole_numbers("impute", num_particles=num_particles, batch_size=batch_size, chunk=chunk)
    whole_numbers("impute", at_least=0, draws=draws)
    if not isinstance(data, Batch):
        raise ValueError(
            f"impute: data came as {type(data).__name__}, wanted a Batch, in which NaN mean missing"
        )
    if interval is not None and not 0 < interval < 1:
        raise ValueError(f"impute: came interval={interval}, wanted a probability: 0.9")
    with ready("impute", model, guide, seed, data) as (plan, data):
        job = _Job.prepare(model, guide, take(data, slice(0, 2)), plan, sites)
        losses = _losses(loss, job)
        quantiles = bool(interval) or "l1" in losses.values()
        slots = max(draws, num_particles if quantiles else 0)
        cells = entries_per_row(data)
        at_once = num_particles if job.by_row else AT_ONCE
        chunk = chunk or min(at_once, max(1, CELLS // cells))
        job.by_row |= bool(slots) and job.odd_leaves
        size = min(batch_size, max(1, CELLS // (cells * chunk)))
        size = 1 if job.by_row else min(size, max(1, 10 * CELLS // (cells * max(1, slots))))
        parts = []
        for _, rows in batches(data, size):
            noise = _Noise(seed, rows.index, rows.device)
            found = _stream(job, rows, num_particles, chunk, slots, noise)
            part: dict[str, Tensor] = {"ess": found.ess(), "log_p": found.log_p(num_particles)}
            fresh = _completed(job, rows, found.kept, slots, chunk, noise) if slots else {}
            for site in job.sites:
                at_rows = _Filled(job, rows, site, found, fresh.get(site))
                part |= at_rows.table(losses[site], interval, draws)
            parts.append(part)
        table = joined("impute", parts, len(data))

    def of(what: str) -> dict[str, Tensor]:
        return {s: table[f"{what}/{s}"] for s in job.sites if f"{what}/{s}" in table}

    return Imputation(
        **{name: of(name) for name in ("values", "sd", "probabilities", "lower", "upper")},
        draws={site: rows.movedim(1, 0) for site, rows in of("draws").items()},
        ess=table["ess"],
        log_p=table["log_p"],
    )


def held_out_log_p(
    model: Program,
    guide: Program,
    data: Batch,
    truth: Batch,
    num_particles: int = 1000,
    **options: Any,
) -> Tensor:
    """log p(x_mis = truth | x_obs) of each row: log p(truth) - log p(data), each as ``evaluate`` has it.

    A difference of two lower bounds, so neither: with a guide that is as good for whole rows as for
    those with gaps their slacks cancel.

    Args:
        data: rows with missing entries.
        truth: the same rows, with those entries, or some of them.
        options: of ``evaluate``.

    Returns:
        ``[N]`` nats, in the units that the model saw; 0 where nothing was hidden.

    Raises:
        ValueError: ``truth`` has other rows, or lacks or changes what ``data`` observes.
    """
    _check_truth(data, truth)
    whole, part = (
        evaluate(model, guide, rows, num_particles, **options).log_p for rows in (truth, data)
    )
    hidden = torch.zeros(len(data), dtype=torch.bool)
    for site in truth:
        seen = truth.mask(site)
        seen = seen & ~data.mask(site) if site in data else seen
        hidden |= seen.reshape(len(data), -1).any(1).cpu()
    return torch.where(hidden, whole - part, torch.zeros_like(whole))


def _check_truth(data: Batch, truth: Batch) -> None:
    if len(data) != len(truth):
        raise ValueError(
            f"held_out_log_p: truth has {len(truth)} rows, data {len(data)}; wanted the same rows"
        )
    for site in data:
        if site not in truth or truth.shape(site) != data.shape(site):
            raise ValueError(f"held_out_log_p: truth lacks site {site!r} of data, or its shape")
        seen = data.mask(site)
        if not bool((truth.mask(site) & (truth[site] == data[site]))[seen].all()):
            raise ValueError(
                f"held_out_log_p: site {site!r}: truth lacks or changes entries that data observe"
            )


def _losses(loss: str | Mapping[str, str], job: _Job) -> dict[str, str]:
    given = dict(loss) if isinstance(loss, Mapping) else dict.fromkeys(job.sites, loss)
    if unknown := [site for site in given if site not in job.known]:
        raise ValueError(f"impute: loss= names sites {unknown}, wanted some of {list(job.known)}")
    if odd := [one for one in given.values() if one not in LOSSES]:
        raise ValueError(
            f"impute: came loss {odd[0]!r}, wanted one of {list(LOSSES)}, or site -> one of them"
        )
    return {site: given.get(site, "l2") for site in job.sites}


# ---------------------------------------------------------------------------------------------
# A row's own random numbers


class _Noise:
    """Random numbers of rows: each row's, for each purpose, from a generator of its own."""

    def __init__(self, seed: int, index: Tensor, device: torch.device) -> None:
        numbers, place = torch.unique(index.cpu(), return_inverse=True)
        self.seed, self.numbers = seed, numbers.tolist()
        self.place, self.device = place.to(device), device
        self.generators: dict[str, list[torch.Generator]] = {}

    def __call__(
        self, what: str, make: Callable[..., Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        """``[K, B, *event]`` of ``torch.rand`` or ``torch.randn`` for a purpose."""
        size, _, *event = shape
        made = [make(size, *event, generator=g, dtype=dtype) for g in self._of(what)]
        return torch.stack(made, 1).to(self.device).index_select(1, self.place)

    def each(self, what: str, make: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
        """``[K, B, *event]`` of what takes parameters ``[K, B, *event]`` and a generator, and takes as
        many random numbers as it needs, row by row."""
        seeds = [int(torch.randint(2**62, (), generator=g)) for g in self._of(what)]
        rows = zip(*(parameter.cpu().unbind(1) for parameter in parameters), strict=True)
        made = [
            make(*row, generator=torch.Generator().manual_seed(seeds[place]))
            for row, place in zip(rows, self.place.tolist(), strict=True)
        ]
        return torch.stack(made, 1).to(self.device)

    def restart(self, what: str) -> None:
        """Let torch's own generator go on from here, for rows that come one at a time."""
        torch.manual_seed(int(torch.randint(2**62, (), generator=self._of(what)[0])))

    def _of(self, what: str) -> list[torch.Generator]:
        if what not in self.generators:
            entropy = [[self.seed, number % 2**63, crc32(what.encode())] for number in self.numbers]
            states = [np.random.SeedSequence(e).generate_state(1, np.uint64)[0] for e in entropy]
            self.generators[what] = [torch.Generator().manual_seed(int(s >> 1)) for s in states]
        return self.generators[what]


def _draw(fn: Any, what: str, noise: _Noise, size: int) -> Tensor | None:
    """A draw ``[(K), B, *event]`` from the rows' own numbers; None if it is not known how."""
    if isinstance(fn, dist.Independent | MaskedDistribution):
        return _draw(fn.base_dist, what, noise, size)
    if isinstance(fn, torch.distributions.TransformedDistribution):
        value = _draw(fn.base_dist, what, noise, size)
        for transform in fn.transforms if value is not None else ():
            value = transform(value)
        return value
    how = next((how for kind, how in KNOWN.items() if isinstance(fn, kind)), None)
    if how is None:
        return None

    def numbers(make: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
        """Of torch.rand and torch.randn, shaped as the one parameter, or of what takes parameters."""
        full = [p.expand(fn.batch_shape + fn.event_shape) for p in parameters]
        full = [p[None] for p in full] if size == 1 else full
        if make in (torch.rand, torch.randn):
            made = noise(what, make, full[0].shape, full[0].dtype)
        else:
            made = noise.each(what, make, *full)
        return made[0] if size == 1 else made

    return how(fn, numbers)


def _classes(fn: Any, numbers: Callable[..., Tensor]) -> Tensor:
    below: Tensor = fn.probs.cumsum(-1)[..., :-1]
    return (numbers(torch.rand, fn.probs[..., 0])[..., None] > below).sum(-1)


def _student(fn: Any, numbers: Callable[..., Tensor]) -> Tensor:
    half = numbers(torch._standard_gamma, fn.df / 2)
    value: Tensor = fn.loc + fn.scale * numbers(torch.randn, fn.loc) * (fn.df / half / 2).sqrt()
    return value


def _negative_binomial(fn: Any, numbers: Callable[..., Tensor]) -> Tensor:
    rate = numbers(torch._standard_gamma, fn.concentration) / fn.rate
    return numbers(torch.poisson, rate)


KNOWN: dict[type, Callable[[Any, Callable[..., Tensor]], Tensor]] = {  # the first that fits
    torch.distributions.Normal: lambda fn, numbers: (
        fn.loc + fn.scale * numbers(torch.randn, fn.loc)
    ),
    torch.distributions.MultivariateNormal: lambda fn, numbers: (
        fn.loc + (fn.scale_tril @ numbers(torch.randn, fn.loc)[..., None])[..., 0]
    ),
    torch.distributions.StudentT: _student,
    torch.distributions.Bernoulli: lambda fn, numbers: (
        numbers(torch.rand, fn.probs) < fn.probs
    ).to(fn.probs),
    torch.distributions.Categorical: _classes,
    torch.distributions.Binomial: lambda fn, numbers: numbers(
        torch.binomial, fn.total_count, fn.probs
    ),
    torch.distributions.Poisson: lambda fn, numbers: numbers(torch.poisson, fn.rate),
    dist.GammaPoisson: _negative_binomial,
}


class _Own(Messenger):
    """Let the guide draw from the rows' own numbers."""

    def __init__(self, noise: _Noise, size: int) -> None:
        super().__init__()
        self.noise, self.size = noise, size

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and not msg["is_observed"] and msg["cond_indep_stack"]:
            msg["value"] = _draw(msg["fn"], msg["name"], self.noise, self.size)


# ---------------------------------------------------------------------------------------------
# One pass after the other


@dataclass
class _Job:
    """A pair, and what has to be known of it before rows come.

    Attributes:
        known: those that the model has, latents apart.
        sites: those to fill.
        labels: those of them that are numbers of classes.
        inner: sites that the model draws and on which others depend: their draws bear the weights.
        by_row: rows come one at a time, since some draw can't be made from a row's own numbers.
        odd_leaves: whether a site that is only drawn for itself is such a one.
    """

    model: Program
    guide: Program
    plan: Plan
    known: tuple[str, ...]
    sites: tuple[str, ...]
    labels: frozenset[str]
    inner: tuple[str, ...]
    by_row: bool
    odd_leaves: bool

    @classmethod
    def prepare(
        cls, model: Program, guide: Program, rows: Batch, plan: Plan, sites: Collection[str] | None
    ) -> _Job:
        table = admitted("impute", plan, model, guide, (rows,))
        if plan.nesting != 1 or plan.rows != (-1,):
            raise ValueError("impute: wanted one plate, the one over rows, at dim -1")
        made = {name: site for name, site in table.model.items() if where_data(site) is not True}
        latents = {name for name in table.guide if name not in rows}
        known = tuple(site for site in table.model if site not in latents)
        wanted = tuple(s for s in made if s in rows) if sites is None else tuple(sites)
        if unknown := [site for site in wanted if site not in known]:
            raise ValueError(f"impute: came sites {unknown}, wanted some of {list(known)}")
        free = leaves(model, guide, rows)
        inner = tuple(name for name in made if name not in table.guide and name not in free)
        noise = _Noise(0, rows.index, rows.device)
        odd_guide = any(
            site["infer"].get("observed") is not True
            and (name in rows or _draw(site["fn"], name, noise, 1) is None)
            for name, site in table.guide.items()
        )
        shown = {name: unmasked_fn(made[name]) for name in wanted if name in free and name in made}
        no_moments = any(moments({"fn": fn}) is None for fn in shown.values())
        odd = any(_draw(fn, name, noise, 1) is None for name, fn in shown.items())
        by_row = odd_guide or bool(inner) or no_moments
        labels = frozenset(s for s in wanted if is_label(unmasked_fn(table.model[s])))
        return cls(model, guide, plan, known, wanted, labels, inner, by_row, odd)

    def moments(self, site: Site, size: int) -> tuple[Tensor, Tensor]:
        """Mean and variance ``[K, B, *event]`` of a site given the particle; of one whose draw bears the
        weight, the draw and 0."""
        fn = unmasked_fn(site)
        bears = site["name"] in self.inner or site["name"] in self.plan.latents
        known = None if bears else moments({"fn": fn})
        drawn = indicators(fn, site["value"]).to(torch.float64)
        mean, variance = known or (drawn, torch.zeros_like(drawn))
        mean, variance = (
            self.plan.canonical(moment, event_dim_of(fn), size, True) for moment in (mean, variance)
        )
        return mean, variance


class _Sums:
    """Sums over weighted particles at constant memory, and ``slots`` draws of them by their weight."""

    def __init__(self, rows: int, slots: int, device: torch.device) -> None:
        self.total = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.total)
        self.start: dict[str, Tensor] = {}
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self.slots = slots

    def add(self, log_w: Tensor, table: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Particles with log weights ``[k, B]`` and a mean and variance of each site; returns the share
        ``[B]`` of all weight so far that is theirs."""
        log_w = log_w.double()
        here = log_w.logsumexp(0)
        total = torch.logaddexp(self.total, here)
        old, new = ((part - total).exp().nan_to_num(0.0) for part in (self.total, log_w))
        self.squares = self.squares * old.square() + new.square().sum(0)
        for site, (mean, variance) in table.items():
            mean, variance = mean.double(), variance.double()
            start = self.start.setdefault(site, mean[0])  # small numbers keep their digits
            off, over = mean - start, (...,) + (None,) * (mean.dim() - 2)
            for sums, terms in ((self.first, off), (self.second, off.square() + variance)):
                now = (new[over] * terms).sum(0)
                sums[site] = old[over] * sums[site] + now if site in sums else now
        self.total = total
        return (here - total).exp()

    def keep(
        self, log_w: Tensor, share: Tensor, values: Mapping[str, Tensor], noise: _Noise
    ) -> None:
        """Put these particles into each slot with the probability that is theirs."""
        shape = torch.Size([self.slots, log_w.shape[1]])
        moves = noise(REST, torch.rand, shape, torch.float64) < share
        cdf = log_w.double().softmax(0).cumsum(0).T.contiguous()
        place = noise(REST, torch.rand, shape, torch.float64).T.contiguous()
        which = torch.searchsorted(cdf, place).clamp(max=len(log_w) - 1).T
        rows = torch.arange(shape[1], device=which.device)
        for name, value in values.items():
            chosen = value[which, rows]
            over = moves[(...,) + (None,) * (value.dim() - 2)]
            self.kept[name] = torch.where(over, chosen, self.kept.get(name, chosen))

    def ess(self) -> Tensor:
        return 1 / self.squares

    def log_p(self, num_particles: int) -> Tensor:
        return self.total - float(np.log(num_particles))

    def mean(self, site: str) -> Tensor:
        return self.start[site] + self.first[site]

    def deviation(self, site: str) -> Tensor:
        return (self.second[site] - self.first[site].square()).clamp(min=0).sqrt()


def _chunks(number: int, chunk: int) -> Iterator[int]:
    for done in range(0, number, chunk):
        yield min(chunk, number - done)


def _stream(
    job: _Job, rows: Batch, num_particles: int, chunk: int, slots: int, noise: _Noise
) -> _Sums:
    found = _Sums(len(rows), slots, rows.device)
    for size in _chunks(num_particles, chunk):
        if job.by_row:
            noise.restart(REST)
        own = [_Own(noise, size)]
        table = run(job.model, job.guide, (rows,), {}, job.plan, size, handlers=own)
        log_w = log_weights_of(table).expand(size, len(rows))
        share = found.add(log_w, {s: job.moments(table.model[s], size) for s in job.sites})
        if slots:
            bearing = {name: table.guide[name] for name in job.plan.latents}
            bearing |= {name: table.model[name] for name in job.inner}
            values = {
                name: job.plan.canonical(site["value"], _event_dim(site), size, True)
                for name, site in bearing.items()
            }
            found.keep(log_w, share, values, noise)
    return found


def _event_dim(site: Site) -> int:
    return int(unmasked_fn(site).event_dim)


def _completed(
    job: _Job, rows: Batch, kept: Mapping[str, Tensor], slots: int, chunk: int, noise: _Noise
) -> dict[str, Tensor]:
    """The sites to fill ``[M, B, *event]``, drawn given the draws that were kept."""
    parts: dict[str, list[Tensor]] = {site: [] for site in job.sites}
    start = 0
    for size in _chunks(slots, chunk):
        here = {name: value[start : start + size] for name, value in kept.items()}
        here = {name: value[0] if size == 1 else value for name, value in here.items()}
        made = generate(job.model, rows, here, job.plan.nesting, size)
        for site in job.sites:
            fn, value = unmasked_fn(made[site]), here.get(site)
            if value is None:
                value = _draw(fn, f"{site} given", noise, size)
            if value is None:  # a row alone
                noise.restart(f"{site} given")
                value = fn()
            parts[site].append(job.plan.canonical(value, int(fn.event_dim), size, True))
        start += size
    return {site: torch.cat(part) for site, part in parts.items()}


@dataclass
class _Filled:
    """A site of some rows, and what was found of it."""

    job: _Job
    rows: Batch
    site: str
    sums: _Sums
    fresh: Tensor | None

    def table(self, loss: str, interval: float | None, draws: int) -> dict[str, Tensor]:
        """What ``Imputation`` holds, by ``name/site`` and row by row."""
        mean, dtype = self.sums.mean(self.site), torch.get_default_dtype()
        rows = self.rows
        data = rows[self.site] if self.site in rows.sites else None
        out: dict[str, Tensor] = {}
        if self.site in self.job.labels:
            best = mean.argmax(-1)
            if data is not None:
                known = one_hot(data.long(), mean.shape[-1]).to(mean)
                mean = torch.where(self.rows.mask(self.site)[..., None], known, mean)
            out["probabilities"] = mean.to(dtype)
        else:
            best = mean if loss == "l2" else self._quantile(0.5)
            sd = self.sums.deviation(self.site).to(dtype)
            out["sd"] = self._merged(sd, torch.zeros_like(sd))
            if interval is not None:
                for name, at in (("lower", 0.5 - interval / 2), ("upper", 0.5 + interval / 2)):
                    out[name] = self._merged(self._quantile(at), data)
        out["values"] = self._merged(best, data)
        if draws:
            assert self.fresh is not None
            out["draws"] = self._merged(self.fresh[:draws], data).movedim(0, 1)
        return {f"{name}/{self.site}": value for name, value in out.items()}

    def _quantile(self, at: float) -> Tensor:
        """A value among the draws, so that whole numbers stay whole."""
        assert self.fresh is not None
        number = len(self.fresh)
        return self.fresh.sort(0).values[min(number - 1, int(at * number))]

    def _merged(self, value: Tensor, data: Tensor | None) -> Tensor:
        """The data where there are some, as which the rest then comes."""
        if data is None or self.site not in self.rows:
            return value.to(torch.get_default_dtype()) if value.is_floating_point() else value
        if not data.is_floating_point() and value.is_floating_point():
            value = value.round()
        return torch.where(self.rows.mask(self.site), data, value.to(data.dtype))
