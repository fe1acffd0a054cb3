"""Every parameter that is trained gets a gradient, and a finite one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.linter.pair import Failed, finding_of
from pyro_vae.linter.report import Finding
from pyro_vae.objectives.objective import Objective
from pyro_vae.objectives.plan import Plan
from pyro_vae.objectives.swap import owner
from pyro_vae.objectives.tracing import Program

__all__ = ["gradients"]


def gradients(
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
            yield finding_of(Failed("elbo", error))
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
        came: Iterable[Tensor | None] = [None] * len(pairs)
        if loss.requires_grad:
            came = torch.autograd.grad(loss, [p for _, p in pairs], allow_unused=True)
    found = list(zip([name for name, _ in pairs], came, strict=True))
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


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
