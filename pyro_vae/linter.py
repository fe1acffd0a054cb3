"""``check(model, guide, batch)``: what is wrong with a pair, site by site, before it is trained."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils._pytree import tree_leaves, tree_map

from pyro_vae.batch import Batch, Condition
from pyro_vae.objectives.objective import Objective
from pyro_vae.objectives.plan import Plan, Problem, broadcasts, make_plan, problems
from pyro_vae.objectives.support import inside, kind, outside
from pyro_vae.objectives.swap import own_parameters, owner, preserved
from pyro_vae.objectives.tracing import (
    Program,
    Replay,
    Site,
    core,
    elementwise,
    trace,
    unmasked_fn,
    unwrap,
)

__all__ = ["Finding", "Report", "check"]

Severity = Literal["error", "warning", "note"]
_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_LEADING = (
    "make its networks take any leading dims [K, B, ...] (nn.leading(net, event_dim) wraps "
    "convolutions and BatchNorm)"
)


@dataclass(frozen=True)
class Finding:
    """One thing that was found, and its cure.

    Attributes:
        severity: ``"error"`` gives wrong numbers or fails, ``"warning"`` probably does, ``"note"``
            is good to know.
        site: the sample site, or None if it concerns the pair as a whole.
    """

    severity: Severity
    site: str | None
    found: str
    cure: str

    def __str__(self) -> str:
        return f"{self.severity}: {Problem(self.site, self.found, self.cure)}"


@dataclass(frozen=True)
class Report:
    """Findings, errors first."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there are no errors."""
        return not any(finding.severity == "error" for finding in self.findings)

    def raise_if_errors(self) -> None:
        """Raise what is wrong.

        Raises:
            ValueError: the errors, one per line.
        """
        if not self.ok:
            errors = [str(f) for f in self.findings if f.severity == "error"]
            raise ValueError("\n".join(errors))

    def __str__(self) -> str:
        """One line per finding."""
        return "\n".join(map(str, self.findings)) or "no findings"


def check(model: Program, guide: Program, *args: Any, **kwargs: Any) -> Report:
    """Run a pair a few times on a batch and say what is wrong with it; nothing is trained.

    Parameters, buffers, modes, the parameter store and the random state are left as they were (a
    guide that makes its parameters at its first call has them afterwards). Takes a batch of the size
    that training will use, as ``check(model, guide, batch)``; other people's programs get their own
    arguments.

    Never raises for what it finds: see ``Report.ok`` and ``Report.raise_if_errors()``.
    """
    args = tuple(arg.look() if isinstance(arg, Batch) else arg for arg in args)
    with _untouched(model, guide), torch.no_grad():
        found = list(_findings(model, guide, args, kwargs))
    return Report(tuple(sorted(found, key=lambda finding: _SEVERITIES.index(finding.severity))))


@contextmanager
def _untouched(model: Program, guide: Program) -> Iterator[None]:
    """Undo what running the programs does. Validation is off, since it would stop at the first
    problem, and all that it looks at is looked at here."""
    store = pyro.get_param_store()
    modes = {part: part.training for part in _modules(model, guide)}
    try:
        with (
            preserved(model, guide),
            store.scope(store.get_state()),
            own_parameters(model, guide),
            poutine.block(),
            pyro.validation_enabled(False),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        _set_modes(modes)


def _modules(*programs: Program) -> list[nn.Module]:
    owners = [module for program in programs if (module := owner(program)) is not None]
    return list(dict.fromkeys(part for module in owners for part in module.modules()))


def _set_modes(modes: Mapping[nn.Module, bool]) -> None:
    for part, training in modes.items():
        part.training = training


# ---------------------------------------------------------------------------------------------
# The order of the checks


@dataclass
class _Pair:
    """A pair, and what its first run showed."""

    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    batch: Batch | None
    read: dict[str, _Reader] = field(default_factory=dict)  # by "model" and "guide"
    model_sites: dict[str, Site] = field(default_factory=dict)
    guide_sites: dict[str, Site] = field(default_factory=dict)
    subsamples: dict[str, Tensor] = field(default_factory=dict)

    def draw(self) -> None:
        """Run guide and model as an objective would, with one particle."""
        batch, inputs = self.batch, {"model": self.args, "guide": self.args}
        if batch is not None:
            self.read = {name: _Reader(batch) for name in inputs}
            inputs = {name: (reader, *self.args[1:]) for name, reader in self.read.items()}
        around = [Replay(self.subsamples)] if self.subsamples else []
        conditioned = [Condition(batch, proposing=True)] if batch is not None else []
        self.guide_sites, drawn = _run(
            "guide", self.guide, inputs["guide"], self.kwargs, [*around, *conditioned]
        )
        values = {name: site["value"] for name, site in self.guide_sites.items()}
        conditioned = [Condition(batch, proposed=values)] if batch is not None else []
        replay = Replay({**self.subsamples, **drawn, **values})
        self.model_sites, more = _run(
            "model", self.model, inputs["model"], self.kwargs, [replay, *conditioned]
        )
        self.subsamples = {**drawn, **more}

    def sites(self) -> Iterator[tuple[str, Site]]:
        for source, sites in (("model", self.model_sites), ("guide", self.guide_sites)):
            for site in sites.values():
                yield source, site


class _Failed(Exception):
    """A program that did not run, and the site that it was at, if at any."""

    def __init__(self, source: str, error: Exception, site: str | None = None) -> None:
        super().__init__(str(error))
        self.source, self.error, self.site = source, error, site

    @property
    def reason(self) -> str:
        """The type of the error and its first line."""
        lines = str(self.error).strip().splitlines()
        return ": ".join([type(self.error).__name__, *lines[:1]])


class _Current(Messenger):
    """Knows which site is being drawn."""

    site: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        self.site = None if site_is_subsample(msg) else msg["name"]

    def _pyro_post_sample(self, msg: Any) -> None:
        self.site = None


def _run(
    source: str,
    program: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    handlers: Iterable[Any],
    particles: int = 1,
    nesting: int = 0,
) -> tuple[dict[str, Site], dict[str, Tensor]]:
    current = _Current()
    try:
        return trace(program, args, kwargs, [*handlers, current], particles, nesting)
    except Exception as error:
        raise _Failed(source, error, current.site) from error


class _Reader(Batch):
    """A batch that remembers what a program reads from it."""

    def __init__(self, batch: Batch) -> None:
        self.__dict__.update(batch.__dict__)
        self.values_read: set[str] = set()
        self.masks_read: set[str] = set()

    def __getitem__(self, site: str) -> Tensor:
        self.values_read.add(site)
        return super().__getitem__(site)

    def mask(self, site: str) -> Tensor:
        self.masks_read.add(site)
        return super().mask(site)

    def _map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        new = _Reader(super()._map(move))
        new.values_read, new.masks_read = self.values_read, self.masks_read
        return new


def _findings(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[Finding]:
    if devices := list(_devices(model, guide, args, kwargs)):
        yield from devices
        return
    bare, batch = unwrap(model, args)
    pair = _Pair(bare, guide, args, kwargs, batch)
    yield from _parameter_names(model, guide)
    try:
        pair.draw()
    except _Failed as failure:
        yield _failure(failure)
        return
    found: list[Finding] = []
    for rule in (_fit_together, _plates, _scales, _reads, _unobserved, _support, _finite):
        found += rule(pair)
    yield from found
    if any(finding.severity == "error" for finding in found):
        yield Finding(
            "note",
            None,
            "estimators, networks, coupling of rows and gradients were not looked at yet",
            "check again once the errors are cured",
        )
        return
    try:
        plan = make_plan(model, guide, args, dict(kwargs))
    except Exception as error:
        yield _failure(_Failed("pair", error))
        return
    yield from _planned(plan)
    yield from _networks(pair, plan)
    yield from _gradients(model, guide, args, kwargs, plan)


def _failure(failure: _Failed) -> Finding:
    """A program that does not run; our own messages name site and cure already."""
    error = failure.error
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, ValueError | KeyError) and (
        match := re.match(r"site '([^']+)'(?:: | (?=is not in the batch))(.*)", text, re.DOTALL)
    ):
        found, _, cure = match[2].partition("; ")
        return Finding("error", match[1], found, cure or "give it, or rename the site")
    return Finding(
        "error",
        failure.site,
        f"the {failure.source} does not run: {failure.reason}",
        f"call the {failure.source} by itself with the same arguments to see where",
    )


# ---------------------------------------------------------------------------------------------
# Before running


def _devices(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[Finding]:
    data = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()}
    if len(data) > 1:
        yield Finding(
            "error", None, f"the data are on {sorted(map(str, data))}", "move them to one device"
        )
    for source, program in (("model", model), ("guide", guide)):
        module = owner(program)
        if module is None:
            continue
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if data and tensor.dim() and tensor.device not in data:
                here = ", ".join(sorted(map(str, data)))
                yield Finding(
                    "error",
                    None,
                    f"the data are on {here}, {source}.{name} is on {tensor.device}",
                    f"move one of them, say by .to('{here}')",
                )
                break


def _parameter_names(model: Program, guide: Program) -> Iterator[Finding]:
    """Pyro's store knows parameters by their name in the program they belong to."""
    owners = [owner(model), owner(guide)]
    if not all(isinstance(module, PyroModule) for module in owners):
        return
    if pyro.settings.get("module_local_params"):
        return
    named = [
        {f"{module._pyro_name}.{name}": p for name, p in module.named_parameters()}  # type: ignore[union-attr]
        for module in owners
    ]
    twice = [name for name in named[0] if named[1].get(name, named[0][name]) is not named[0][name]]
    if not twice:
        return
    shared = [name for name in twice if name.endswith("_unconstrained")]
    names = ", ".join(name.lstrip(".").removesuffix("_unconstrained") for name in shared or twice)
    yield Finding(
        "error" if shared else "warning",
        None,
        f"model and guide both have parameters named {names}: Pyro's parameter store "
        + ("makes them one" if shared else "keeps one of them, so that SVI would not train both"),
        "rename one, or build the guide with PyroModule.__init__(self, 'guide')",
    )


# ---------------------------------------------------------------------------------------------
# What the first run shows


def _fit_together(pair: _Pair) -> Iterator[Finding]:
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


def _plates(pair: _Pair) -> Iterator[Finding]:
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


def _scales(pair: _Pair) -> Iterator[Finding]:
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


def _reads(pair: _Pair) -> Iterator[Finding]:
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


def _unobserved(pair: _Pair) -> Iterator[Finding]:
    for name, site in pair.model_sites.items():
        if not site["is_observed"] and name not in pair.guide_sites:
            yield Finding(
                "note",
                name,
                "it is neither in the data nor in the guide, so it is drawn from the model and "
                "counts 0",
                "if it is a latent variable, draw it in the guide",
            )


def _support(pair: _Pair) -> Iterator[Finding]:
    for name, site in pair.model_sites.items():
        if not site["is_observed"] and "observed" not in site["infer"]:
            continue
        fn = core(unmasked_fn(site))
        mask = site["infer"].get("drawn", site["infer"].get("observed"))
        mask = mask if isinstance(mask, Tensor) else None
        with suppress(NotImplementedError):
            if problem := outside(kind(fn), fn.support, fn.event_dim, site["value"], mask):
                yield Finding("error", name, *problem)


def _finite(pair: _Pair) -> Iterator[Finding]:
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
            reason = _Failed(source, error).reason
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


# ---------------------------------------------------------------------------------------------
# What the plan says


def _planned(plan: Plan) -> Iterator[Finding]:
    for name in plan.drawn_parents:
        yield Finding(
            "error",
            name,
            "its missing entries are drawn from the model, without rsample, and densities depend on "
            "them, so that its parameters get no gradient",
            "draw it in the guide, or use estimator='score'",
        )
    for name in plan.unreparameterized:
        yield Finding(
            "note",
            name,
            "the guide's distribution has no rsample",
            "use estimator='score', since the others refuse it",
        )
    for name, why in plan.score_blockers.items():
        yield Finding(
            "note", name, f"stl and dreg refuse this guide: {why}", "use estimator='pathwise'"
        )
    for text in plan.notes:
        name, _, why = text.removeprefix("site '").partition("': ")
        yield Finding(
            "note",
            name,
            why,
            "nothing to do, unless mean_field() is meant to take it in closed form",
        )
    for name in sorted(plan.outside):
        yield Finding(
            "note",
            name,
            "it stands outside the plate over rows, and only linear bounds take such sites",
            "if every row has its own, put it into the plate; else use the elbo",
        )
    for name in plan.subsampled:
        yield Finding(
            "note",
            None,
            f"plate {name!r} inside a row is subsampled, and only linear bounds allow that",
            "use the elbo, or the whole plate",
        )


# ---------------------------------------------------------------------------------------------
# Networks: the same densities whoever else is in the batch of particles and rows


@dataclass
class _Values:
    """What to replay a pair with, and what it then gives."""

    guide: dict[str, Tensor]
    model: dict[str, Tensor]
    subsamples: dict[str, Tensor]

    def densities(
        self, pair: _Pair, plan: Plan, particles: int = 1, inputs: Any = None
    ) -> dict[tuple[str, str], Tensor]:
        """(program, site) -> log density ``[K or 1, B, *rest]``, wherever it can be had."""
        args, kwargs = inputs or (pair.args, pair.kwargs)
        out = {}
        programs = {"guide": (pair.guide, self.guide), "model": (pair.model, self.model)}
        for source, (program, values) in programs.items():
            replay = [Replay({**self.subsamples, **values})]
            sites, _ = _run(source, program, args, kwargs, replay, particles, plan.nesting)
            for name, site in sites.items():
                if problem := next(broadcasts(source, site), None):
                    raise _Failed(source, ValueError(str(problem)))
                try:
                    log_prob, event_dim = elementwise(site["fn"], site["value"])
                except (KeyError, NotImplementedError):
                    continue  # a flow without inverse scores its own draws alone
                except Exception as error:
                    raise _Failed(source, error, name) from error
                local = name not in plan.outside
                out[source, name] = plan.canonical(log_prob, event_dim, particles, local)
        return out


def _values(pair: _Pair) -> _Values:
    drawn = [
        {name: site["value"] for name, site in sites.items()}
        for sites in (pair.guide_sites, pair.model_sites)
    ]
    return _Values(drawn[0], drawn[1], pair.subsamples)


def _stacked(pair: _Pair, plan: Plan, a: _Values, b: _Values) -> _Values:
    """Two draws as two particles; data stay as they are."""

    def stack(sites: dict[str, Site], a: dict[str, Tensor], b: dict[str, Tensor]) -> Any:
        out = {}
        for name, site in sites.items():
            missing = plan.nesting - (a[name].dim() - site["fn"].event_dim)
            data = site["is_observed"] and "drawn" not in site["infer"]
            both = [
                value[(None,) * missing] if missing > 0 else value for value in (a[name], b[name])
            ]
            out[name] = a[name] if data else torch.stack(both)
        return out

    return _Values(
        stack(pair.guide_sites, a.guide, b.guide),
        stack(pair.model_sites, a.model, b.model),
        pair.subsamples,
    )


def _networks(pair: _Pair, plan: Plan) -> Iterator[Finding]:
    """Two particles at once against one at a time, and rows among other rows."""
    first = _values(pair)
    try:
        pair.draw()
    except _Failed as failure:
        yield _failure(failure)
        return
    second = _values(pair)
    if set(first.model) != set(second.model) or set(first.guide) != set(second.guide):
        yield Finding(
            "error",
            None,
            "the sites of a program change from run to run",
            "let the sites depend on the arguments, not on what is drawn",
        )
        return
    modes = {part: part.training for part in _modules(pair.model, pair.guide)}
    try:
        _set_modes(dict.fromkeys(modes, False))
        alone = [values.densities(pair, plan) for values in (first, second)]
        if not _same(alone[0], first.densities(pair, plan)):
            yield Finding(
                "note",
                None,
                "densities change from run to run at the same latents, so that networks and coupling "
                "of rows were not checked",
                "draw random numbers by pyro.sample, and let modules follow .eval()",
            )
            return
        several = _particles(pair, plan, alone, _stacked(pair, plan, first, second))
        coupling = [] if several else list(_coupling(pair, plan, first, alone[0], training=False))
        # Only training mode shows which axis BatchNorm takes for its channels. The same particle
        # twice leaves its statistics what they are.
        _set_modes({part: on and not _drops(part) for part, on in modes.items()})
        once = first.densities(pair, plan)
        if any(modes.values()) and not several and _same(once, first.densities(pair, plan)):
            twice = _stacked(pair, plan, first, first)
            several = _particles(pair, plan, [once, once], twice)
            if not several and not coupling:
                coupling = list(_coupling(pair, plan, first, once, training=True))
        yield from [*several, *coupling]
    except _Failed as failure:
        yield _failure(failure)
    finally:
        _set_modes(modes)


def _drops(part: nn.Module) -> bool:
    return isinstance(part, nn.modules.dropout._DropoutNd)


def _particles(
    pair: _Pair,
    plan: Plan,
    alone: list[dict[tuple[str, str], Tensor]],
    both: _Values,
) -> list[Finding]:
    try:
        together = both.densities(pair, plan, particles=2)
    except _Failed as failure:
        return [
            Finding(
                "error",
                failure.site,
                f"the {failure.source} does not run with 2 particles: {failure.reason}",
                _LEADING + ", or run particles one by one: chunk=1",
            )
        ]
    for (source, name), density in together.items():
        for k, one in enumerate(alone):
            here = density[k : k + 1] if len(density) > 1 else density
            if not _near(here, one[source, name]):
                return [
                    Finding(
                        "error",
                        name,
                        f"its density in the {source} differs between 2 particles at once and one "
                        "at a time",
                        _LEADING,
                    )
                ]
    return []


def _coupling(
    pair: _Pair, plan: Plan, values: _Values, alone: dict[tuple[str, str], Tensor], training: bool
) -> Iterator[Finding]:
    """Replace the rows of one half by those of the other, and see whether the latter notice."""
    frames = [f for s in pair.model_sites.values() for f in s["cond_indep_stack"] if f.dim == -1]
    rows = frames[0].size if frames else 0
    if plan.rows != (-1,) or rows < 2 or any(f.full_size != rows for f in frames):
        return
    half = (rows + 1) // 2
    index = torch.cat([torch.arange(half), torch.arange(rows - half)])

    def replaced(sites: dict[str, Site], old: dict[str, Tensor]) -> dict[str, Tensor]:
        new = {}
        for name, value in old.items():
            dim = value.dim() - sites[name]["fn"].event_dim - 1
            here = dim >= 0 and name not in plan.outside and value.shape[dim] == rows
            new[name] = value.index_select(dim, index.to(value.device)) if here else value
        return new

    def take(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == rows:
            return leaf[index.to(leaf.device)]
        return leaf

    mixed = _Values(
        replaced(pair.guide_sites, values.guide),
        replaced(pair.model_sites, values.model),
        values.subsamples,
    )
    inputs = tree_map(take, (pair.args, dict(pair.kwargs)))
    among_others = mixed.densities(pair, plan, inputs=inputs)
    for (source, name), density in alone.items():
        if name in plan.outside or _near(among_others[source, name][:, :half], density[:, :half]):
            continue
        if training:
            yield Finding(
                "note",
                name,
                f"in training mode the {source}'s density of a row depends on the other rows of its "
                "batch, as with BatchNorm",
                "evaluate in .eval() mode, and mind the batch size",
            )
        else:
            yield Finding(
                "warning",
                name,
                f"the {source}'s density of a row depends on the data or latents of other rows, "
                "while a bound is a sum over independent rows",
                "look for a mean, softmax, reshape or broadcast over the rows",
            )
        return


# ---------------------------------------------------------------------------------------------
# Gradients


def _gradients(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    plan: Plan,
) -> Iterator[Finding]:
    """Which parameters the elbo does not reach, or reaches with something that is not a number."""
    with torch.enable_grad():
        scores = plan.unreparameterized or plan.drawn_parents
        objective = Objective(estimator="score" if scores else "pathwise")
        try:
            with poutine.trace(param_only=True) as traced:
                loss = objective.differentiable_loss(model, guide, *args, **kwargs)
        except Exception as error:
            yield _failure(_Failed("elbo", error))
            return
        named: dict[int, tuple[str, Tensor]] = {}
        for source, program in (("model", model), ("guide", guide)):
            if (module := owner(program)) is not None:
                for name, parameter in module.named_parameters():
                    named.setdefault(id(parameter), (f"{source}.{name}", parameter))
        nodes: list[Any] = list(traced.trace.nodes.values())
        for node in nodes:  # made by pyro.param; the store holds those of other programs too
            unconstrained = node["value"].unconstrained()
            named.setdefault(id(unconstrained), (node["name"], unconstrained))
        pairs = [pair for pair in named.values() if pair[1].requires_grad]
        gradients: Iterable[Tensor | None] = [None] * len(pairs)
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, [p for _, p in pairs], allow_unused=True)
    found = list(zip([name for name, _ in pairs], gradients, strict=True))
    if dead := [name for name, gradient in found if gradient is None]:
        yield Finding(
            "warning",
            None,
            f"parameters get no gradient from this batch: {_some(dead)}",
            "look for a .detach() or a part that is not used; freeze what is meant to stay by "
            "requires_grad_(False)",
        )
    if wild := [name for name, g in found if g is not None and not bool(g.isfinite().all())]:
        yield Finding(
            "error",
            None,
            f"gradients that are not finite: {_some(wild)}",
            "look for a square root, logarithm or division at 0 in what leads to them",
        )


# ---------------------------------------------------------------------------------------------
# Small helpers


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


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


def _near(a: Tensor, b: Tensor) -> bool:
    if a.shape[1:] != b.shape[1:]:
        return False
    tolerance = 10 * torch.finfo(a.dtype).eps ** 0.5 if a.is_floating_point() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def _same(a: dict[Any, Tensor], b: dict[Any, Tensor]) -> bool:
    return all(_near(a[key], b[key]) for key in a)
