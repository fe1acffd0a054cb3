"""A pair that is looked at: its programs run once, what they read, and where they fail."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vae.batch import Batch, Condition
from pyro_vae.linter.report import Finding
from pyro_vae.objectives.swap import owner
from pyro_vae.objectives.tracing import Program, Replay, Site, trace

__all__ = ["Failed", "Pair", "finding_of", "parts_of", "run", "set_modes"]


@dataclass
class Pair:
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
        self.guide_sites, drawn = run(
            "guide", self.guide, inputs["guide"], self.kwargs, [*around, *conditioned]
        )
        values = {name: site["value"] for name, site in self.guide_sites.items()}
        conditioned = [Condition(batch, proposed=values)] if batch is not None else []
        replay = Replay({**self.subsamples, **drawn, **values})
        self.model_sites, more = run(
            "model", self.model, inputs["model"], self.kwargs, [replay, *conditioned]
        )
        self.subsamples = {**drawn, **more}

    def sites(self) -> Iterator[tuple[str, Site]]:
        for source, sites in (("model", self.model_sites), ("guide", self.guide_sites)):
            for site in sites.values():
                yield source, site


class Failed(Exception):
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


def run(
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
        raise Failed(source, error, current.site) from error


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


def parts_of(*programs: Program) -> list[nn.Module]:
    owners = [module for program in programs if (module := owner(program)) is not None]
    return list(dict.fromkeys(part for module in owners for part in module.modules()))


def set_modes(modes: Mapping[nn.Module, bool]) -> None:
    for part, training in modes.items():
        part.training = training


def finding_of(failure: Failed) -> Finding:
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
