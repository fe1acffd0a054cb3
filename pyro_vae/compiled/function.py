"""A function of a batch without gradient, by a graph where that is faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae.compiled.attributes import Attributes
from pyro_vae.compiled.graph import Graph, put_back, record, told
from pyro_vae.compiled.ways import Given, Refused, copied, given, turned
from pyro_vae.compiled.worth import check_level, not_worth

__all__ = ["Fast"]

Run = Callable[[Given], Tensor]


class Fast:
    """``function(batch)``, the same numbers at the same seed, by a graph for each shape of a batch.

    Attributes:
        level: at which the last batch of a new shape was taken.
        reason: why not at the level that was asked for.

    Args:
        function: of a batch; reads parameters wherever they are.
        level: as in ``make_step``.
        calls: how many are to come, for ``"auto"``.

    Raises:
        ValueError: unknown level.
    """

    def __init__(
        self, function: Callable[[Any], Tensor], level: str = "auto", calls: float | None = None
    ) -> None:
        check_level(level)
        self.function, self.asked, self.calls = function, level, calls
        self.level, self.reason = "eager", ""
        self._runs: dict[Any, Run] = {}
        self._graphs: dict[Any, tuple[Graph, Attributes]] = {}
        self._doubted: set[Any] = set()

    def __call__(self, batch: Any) -> Tensor:
        one = given(batch)
        run = self._runs.get(one.key)
        if run is None:
            run = self._runs[one.key] = self._found(one)
        if one.key in self._doubted:
            run = self._checked(one)
        with torch.no_grad():
            return run(one)

    def doubt(self) -> None:
        """Compare graphs with the function once more before they are used; see ``Step.doubt``."""
        self._doubted = set(self._graphs)

    def _eager(self, one: Given) -> Tensor:
        return self.function(one.batch)

    def _found(self, one: Given) -> Run:
        self.level, self.reason = "eager", ""
        if self.asked == "eager":
            return self._eager
        asked = self.asked != "auto" and not self._runs
        self.reason = "" if asked else not_worth(self.calls, "calls")
        if self.reason:
            return self._eager
        try:
            before = Attributes(self.function, tensors=False)
            with put_back([], self.function), torch.no_grad():
                fresh = copied(one)
                graph = record(lambda: [self.function(fresh.batch)], fresh.leaves)
                if why := before.unsteady(graph.held) or before.drawn():
                    raise Refused(why)
            run = self._accepted(one, graph, exactly=True)
            self._graphs[one.key] = graph, Attributes(self.function, tensors=False)
        except Exception as error:  # whatever a program does that a graph can't hold
            self.reason = told(error)
            return self._eager
        if self.asked != "traced":
            if not asked and (why := not_worth(self.calls, "calls", [graph])):
                self.reason = why
                return self._eager
            try:
                run = self._accepted(one, graph.lowered(one.leaves), exactly=False)
            except Exception as error:  # of the compiler, or that there is none
                self.reason = told(error)
        self.level = "traced" if self.asked == "traced" or self.reason else "compiled"
        return run

    def _checked(self, one: Given) -> Run:
        self._doubted.discard(one.key)
        graph, attributes = self._graphs[one.key]
        try:
            if why := attributes.unsteady(graph.held):
                raise Refused(why)
            self._accepted(one, graph, exactly=True)
        except Exception as error:
            self.level = "eager"
            self.reason = f"the function is not what its graph was: {told(error)}"
            self._runs[one.key] = self._eager
            del self._graphs[one.key]
        return self._runs[one.key]

    def _accepted(self, one: Given, graph: Graph | Callable[..., Any], exactly: bool) -> Run:
        """The graph as a run, if it has the function's numbers on other rows, with other draws: a
        number that is no tensor would be a constant in it.

        Args:
            exactly: it runs the very same operations; machine code has others.
        """
        other = turned(one)

        def run(one: Given) -> Tensor:
            return graph(*one.leaves)[0]

        def value(way: Run) -> Tensor:
            with put_back([], self.function), torch.no_grad():
                pyro.set_rng_seed(1)
                return way(other)

        ours, theirs = value(self._eager), value(run)
        rounding = 100 * torch.finfo(ours.dtype).eps if exactly else 1e-3
        if not torch.allclose(ours, theirs, rtol=rounding, atol=rounding, equal_nan=True):
            error = float((ours - theirs).abs().max())
            raise Refused(f"the graph's numbers are off by {error:.3g}")
        return run
