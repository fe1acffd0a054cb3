"""Sums of losses over views of a batch: subsets of modalities, a model's own dreams, several bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.objectives import schedules
from pyro_vae.objectives.loss import Loss, Program
from pyro_vae.objectives.plan import Plan
from pyro_vae.objectives.schedules import Schedule, shown

__all__ = ["Sum", "Term", "View", "only", "without"]

View = Callable[[Batch], Batch]


class Term(NamedTuple):
    """``weight`` times ``loss`` of ``view(batch)``; None is the batch as it is."""

    loss: Loss
    weight: float | Schedule = 1.0
    view: View | None = None

    def seen(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The programs' arguments, the batch among them replaced by its view."""
        if self.view is None:
            return args
        if not args or not isinstance(args[0], Batch):
            came = type(args[0]).__name__ if args else "nothing"
            raise ValueError(f"view {shown(self.view)}: came {came}, wanted a Batch of named sites")
        return (self.view(args[0]), *args[1:])

    def __repr__(self) -> str:
        weight = "" if self.weight == 1 else f"{shown(self.weight)} * "
        return f"{weight}{self.loss!r}" + (f" of {shown(self.view)}" if self.view else "")


class Sum(Loss):
    """A weighted sum of losses, each over a view of the batch (MVAE's subsets of modalities, Wu &
    Goodman 2018; JMVAE, Suzuki et al. 2017).

    Every term runs the programs once, on what its view holds. The value is the sum of the terms'
    values, which is a bound only if its meaning makes it one.

    Args:
        terms: losses, or ``Term(loss, weight, view)``.

    Raises:
        ValueError: no terms; at the first call, whatever a term refuses on its view.
    """

    def __init__(self, terms: Iterable[Loss | Term]) -> None:
        self.terms = tuple(t if isinstance(t, Term) else Term(t) for t in terms)
        if not self.terms:
            raise ValueError("Sum: came no terms, wanted at least one")
        super().__init__(max(term.loss.num_particles for term in self.terms))
        self.modules = nn.ModuleList(m for term in self.terms for m in term.loss.modules)

    @property
    def recomputes(self) -> bool:
        return any(term.loss.recomputes for term in self.terms)

    def loss_and_rows(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        step: Tensor,
    ) -> tuple[Tensor, float]:
        total, rows = torch.zeros((), device=step.device), 1.0
        for term in self.terms:
            loss, rows = term.loss.loss_and_rows(model, guide, term.seen(args), kwargs, step)
            total = total + schedules.value(term.weight, step) * loss
        return total, rows

    def rows_at(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        step: Tensor,
    ) -> Tensor:
        rows = [
            schedules.value(term.weight, step)
            * term.loss.rows_at(model, guide, term.seen(args), kwargs, step)
            for term in self.terms
        ]
        return torch.stack(rows).sum(0)

    def plan(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Plan:
        """The plan of the first term whose view is the whole batch, else of the first term."""
        plans = [t.loss.plan(model, guide, t.seen(args), kwargs) for t in self.terms]
        whole = (plan for t, plan in zip(self.terms, plans, strict=True) if t.view is None)
        return next(whole, plans[0])

    def __repr__(self) -> str:
        return f"Sum({', '.join(map(repr, self.terms))})"


def only(*sites: str) -> View:
    """The view that holds these sites of a batch alone."""

    def view(batch: Batch) -> Batch:
        if unknown := set(sites) - set(batch):
            raise ValueError(f"only: came {sorted(unknown)}, the batch holds {list(batch)}")
        return batch.without([site for site in batch if site not in sites])

    view.__qualname__ = f"only({', '.join(sites)})"
    return view


def without(*sites: str) -> View:
    """The view that lacks these sites of a batch."""

    def view(batch: Batch) -> Batch:
        return batch.without(sites)

    view.__qualname__ = f"without({', '.join(sites)})"
    return view
