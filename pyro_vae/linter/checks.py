"""``check(model, guide, batch)``: what is wrong with a pair, site by site, before it is trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_vae.batch import Batch
from pyro_vae.linter.first_run import RULES
from pyro_vae.linter.gradients import gradients
from pyro_vae.linter.networks import networks
from pyro_vae.linter.pair import Failed, Pair, finding_of, parts_of, set_modes
from pyro_vae.linter.report import SEVERITIES, Finding, Report
from pyro_vae.objectives.plan import Plan, make_plan
from pyro_vae.objectives.swap import own_parameters, owner, preserved
from pyro_vae.objectives.tracing import Program, unwrap

__all__ = ["check"]


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
    return Report(tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))))


@contextmanager
def _untouched(model: Program, guide: Program) -> Iterator[None]:
    """Undo what running the programs does. Validation is off, since it would stop at the first
    problem, and all that it looks at is looked at here."""
    store = pyro.get_param_store()
    modes = {part: part.training for part in parts_of(model, guide)}
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
        set_modes(modes)


def _findings(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[Finding]:
    if devices := list(_devices(model, guide, args, kwargs)):
        yield from devices
        return
    bare, batch = unwrap(model, args)
    pair = Pair(bare, guide, args, kwargs, batch)
    yield from _parameter_names(model, guide)
    try:
        pair.draw()
    except Failed as failure:
        yield finding_of(failure)
        return
    found: list[Finding] = []
    for rule in RULES:
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
        yield finding_of(Failed("pair", error))
        return
    yield from _planned(plan)
    yield from networks(pair, plan)
    yield from gradients(model, guide, args, kwargs, plan)


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
