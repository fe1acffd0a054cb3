"""Networks give the same densities whoever else is in the batch of particles and rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pyro_vae.linter.pair import Failed, Pair, finding_of, parts_of, run, set_modes
from pyro_vae.linter.report import Finding
from pyro_vae.objectives.plan import Plan, broadcasts
from pyro_vae.objectives.tracing import Replay, Site, elementwise

__all__ = ["networks"]

_LEADING = (
    "make its networks take any leading dims [K, B, ...] (nn.leading(net, event_dim) wraps "
    "convolutions and BatchNorm)"
)


@dataclass
class _Values:
    """What to replay a pair with, and what it then gives."""

    guide: dict[str, Tensor]
    model: dict[str, Tensor]
    subsamples: dict[str, Tensor]

    def densities(
        self, pair: Pair, plan: Plan, particles: int = 1, inputs: Any = None
    ) -> dict[tuple[str, str], Tensor]:
        """(program, site) -> log density ``[K or 1, B, *rest]``, wherever it can be had."""
        args, kwargs = inputs or (pair.args, pair.kwargs)
        out = {}
        programs = {"guide": (pair.guide, self.guide), "model": (pair.model, self.model)}
        for source, (program, values) in programs.items():
            replay = [Replay({**self.subsamples, **values})]
            sites, _ = run(source, program, args, kwargs, replay, particles, plan.nesting)
            for name, site in sites.items():
                if problem := next(broadcasts(source, site), None):
                    raise Failed(source, ValueError(str(problem)))
                try:
                    log_prob, event_dim = elementwise(site["fn"], site["value"])
                except (KeyError, NotImplementedError):
                    continue  # a flow without inverse scores its own draws alone
                except Exception as error:
                    raise Failed(source, error, name) from error
                local = name not in plan.outside
                out[source, name] = plan.canonical(log_prob, event_dim, particles, local)
        return out


def _values(pair: Pair) -> _Values:
    drawn = [
        {name: site["value"] for name, site in sites.items()}
        for sites in (pair.guide_sites, pair.model_sites)
    ]
    return _Values(drawn[0], drawn[1], pair.subsamples)


def _stacked(pair: Pair, plan: Plan, a: _Values, b: _Values) -> _Values:
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


def networks(pair: Pair, plan: Plan) -> Iterator[Finding]:
    """Two particles at once against one at a time, and rows among other rows."""
    first = _values(pair)
    try:
        pair.draw()
    except Failed as failure:
        yield finding_of(failure)
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
    modes = {part: part.training for part in parts_of(pair.model, pair.guide)}
    try:
        set_modes(dict.fromkeys(modes, False))
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
        set_modes({part: on and not _drops(part) for part, on in modes.items()})
        once = first.densities(pair, plan)
        if any(modes.values()) and not several and _same(once, first.densities(pair, plan)):
            twice = _stacked(pair, plan, first, first)
            several = _particles(pair, plan, [once, once], twice)
            if not several and not coupling:
                coupling = list(_coupling(pair, plan, first, once, training=True))
        yield from [*several, *coupling]
    except Failed as failure:
        yield finding_of(failure)
    finally:
        set_modes(modes)


def _drops(part: nn.Module) -> bool:
    return isinstance(part, nn.modules.dropout._DropoutNd)


def _particles(
    pair: Pair,
    plan: Plan,
    alone: list[dict[tuple[str, str], Tensor]],
    both: _Values,
) -> list[Finding]:
    try:
        together = both.densities(pair, plan, particles=2)
    except Failed as failure:
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
    pair: Pair, plan: Plan, values: _Values, alone: dict[tuple[str, str], Tensor], training: bool
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


def _near(a: Tensor, b: Tensor) -> bool:
    if a.shape[1:] != b.shape[1:]:
        return False
    tolerance = 10 * torch.finfo(a.dtype).eps ** 0.5 if a.is_floating_point() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def _same(a: dict[Any, Tensor], b: dict[Any, Tensor]) -> bool:
    return all(_near(a[key], b[key]) for key in a)
