"""How many pairs and objectives run at the level ``"compiled"``, and why the others do not.

The combinations are tried in an order drawn at random, so that the first N are a sample of them all:
``--combinations N`` ends there, ``--resume`` goes on.
"""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import pyro
import torch
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks.speed.options import Options, Record, Results
from benchmarks.speed.process import Failed, Worker, cores, one_line
from pyro_vae import conditionals, pairs
from pyro_vae.compiled import make_step
from pyro_vae.guides import precision_weighted, residual
from pyro_vae.nn import conv_resnet, convolutional, dense_resnet
from pyro_vae.objectives.specs import arguments, parse, recipes
from pyro_vae.pairs.multimodal import GUIDES
from tests.small_pairs import PAIRS as SMALL
from tests.small_pairs import data as small_data

__all__ = ["combinations", "coverage", "objectives", "programs", "table"]

ESTIMATORS = ("pathwise", "stl", "dreg", "score")
CROSSED = ("elbo", "mean_field", "iwae", "renyi", "beta_vae")  # recipes that meet all of them
GIVEN = {  # to recipes that want them
    "num_particles": "3",
    "groups": "3",
    "alpha": "0.5",
    "beta": "2.0",
    "capacity": "5.0",
    "gamma": "2.0",
    "nats": "0.1",
    "offdiagonal": "2.0",
    "sites": "('x', 'y')",
}
FURTHER = (  # what an argument changes in the graph
    "iwae:num_particles=6,chunk=3",
    "renyi:alpha=-inf,num_particles=3",
    "beta_vae:beta=linear(100)",
    "beta_vae:beta=2.0,analytic=True",
)
LEVELS = ("compiled", "traced", "eager")
PATIENCE = 600.0  # seconds for one combination
SERVED = 20  # combinations by one process, and of what a stop can lose

ROWS, BATCH = 64, 32
Program = tuple[Any, Any, Any]  # model, guide, data


def objectives() -> list[str]:
    """Every recipe, the first ones with every estimator, as specs; those that are refused too."""
    found = []
    for name, recipe in recipes().items():
        known = arguments(recipe)
        needed = [f"{key}={value}" for key, value in GIVEN.items() if key in known]
        for estimator in ESTIMATORS if name in CROSSED else (None,):
            parts = [*needed, *([f"estimator={estimator}"] if estimator else [])]
            found.append(name + (":" + ",".join(parts) if parts else ""))
    return [*found, *FURTHER]


# ---------------------------------------------------------------------------------------------
# Pairs


def _real(*event: int) -> Tensor:
    return torch.randn(ROWS, *event)


def _binary(*event: int) -> Tensor:
    return (torch.rand(ROWS, *event) < 0.3).float()


def _counts(top: int, *event: int) -> Tensor:
    return torch.randint(0, top + 1, (ROWS, *event)).float()


def _gaps(x: Tensor) -> Tensor:
    return x.masked_fill(torch.rand(x.shape) < 0.3, torch.nan)


def _vae(make: Callable[[], Tensor], weights: bool = False, **options: Any) -> Program:
    """A pair of the ready builder, for data made at a seed."""
    batch = pv.Batch({"x": make()}, weights=torch.rand(ROWS) if weights else None)
    small: dict[str, Any] = {"latent": 2, "hidden": (8,)}
    return (*pairs.vae(batch, **small | options), batch)


def _bytes() -> Tensor:
    return torch.randint(0, 256, (ROWS, 8, 8), dtype=torch.uint8)


def _image() -> Tensor:
    return _binary(8, 8)


def _likelihoods() -> dict[str, Callable[[], Program]]:
    """Every likelihood there is, on values that it takes."""
    values: dict[str, Callable[[], Tensor]] = {
        "Bernoulli": partial(_binary, 12),
        "Binomial": partial(_counts, 16, 12),
        "Categorical": lambda: torch.randint(0, 4, (ROWS, 12)),
        "ContinuousBernoulli": lambda: torch.rand(ROWS, 12),
        "LogisticMixture": lambda: _bytes().flatten(1),
        "LogNormal": lambda: _real(12).exp(),
        "NegativeBinomial": partial(_counts, 400, 12),
        "OneHotCategorical": lambda: torch.eye(5)[torch.randint(0, 5, (ROWS, 3))],
        "Ordinal": lambda: torch.randint(0, 4, (ROWS, 12)),
        "Poisson": partial(_counts, 9, 12),
    }
    return {
        f"vae, {name}": partial(_vae, values.get(name, partial(_real, 12)), likelihood=kind)
        for name in conditionals.__all__
        if hasattr(kind := getattr(conditionals, name), "build")
        and not name.startswith(("Learned", "Uniform"))  # priors
    }


def _hierarchical(**options: Any) -> Program:
    data = pv.Batch({"x": _binary(12)})
    return (*pairs.hierarchical(data, (4, 2), 8, **options), data)


def _multimodal(**options: Any) -> Program:
    """Rows that lack one of two sites here and there."""
    x, y = _gaps(_real(6)), _binary(4)
    y[::4] = torch.nan
    data = pv.Batch({"x": x, "y": y})
    return (*pairs.multimodal(data, latent=2, hidden=(8,), **options), data)


def _missing(**options: Any) -> Program:
    data = pv.Batch({"x": _gaps(_real(6))})
    data = data.with_mask() if "mechanism" in options else data
    return (*pairs.missing(data, latent=2, hidden=(8,), **options), data)


def _table() -> Program:
    columns = {
        "real": _gaps(_real(3)),
        "positive": _gaps(_real(2).exp()),
        "count": _counts(9, 2),
        "binary": _gaps(_binary(2)),
        "grade": torch.randint(0, 4, (ROWS,)),
        "kind": torch.randint(0, 3, (ROWS,)),
    }
    data = pv.Batch(columns)
    return (*pairs.table(data, latent=2, hidden=(8,), ordinal=("grade",)), data)


def programs() -> dict[str, Callable[[], Program]]:
    """The pairs of the ready builders by likelihood, network and kind of data, and the small pairs of
    the tests, which are other people's programs."""
    merges = {"precision_weighted": precision_weighted, "residual": residual}
    encoders: dict[str, dict[str, Any]] = {
        "masked": {"encoder": "masked"},
        "set": {"encoder": "set"},
        "self-masking": {"mechanism": "self_masking"},
        "nonlinear mechanism": {"mechanism": "nonlinear"},
    }
    stages: dict[str, Any] = {"hidden": (4, 8)}
    return {
        **_likelihoods(),
        "vae, three layers, Tanh": partial(
            _vae, partial(_binary, 12), hidden=(8, 8, 8), activation=nn.Tanh
        ),
        "vae, dense_resnet": partial(_vae, partial(_real, 12), net=dense_resnet),
        "vae, convolutional": partial(_vae, _image, net=convolutional, **stages),
        "vae, conv_resnet": partial(_vae, _bytes, net=conv_resnet, **stages),
        "vae, Bernoulli latents": partial(_vae, _image, posterior=conditionals.Bernoulli),
        "vae, categorical latents": partial(
            _vae, _image, latent=(2, 3), posterior=conditionals.OneHotCategorical
        ),
        "vae, missing entries, Gaussian": partial(_vae, lambda: _gaps(_real(12))),
        "vae, missing entries, Bernoulli": partial(_vae, lambda: _gaps(_binary(12))),
        "vae, row weights": partial(_vae, partial(_real, 12), weights=True),
        "hierarchical, bottom-up, skip": partial(_hierarchical, skip=True),
        **{f"hierarchical, {n}": partial(_hierarchical, merge=m) for n, m in merges.items()},
        **{f"multimodal, {guide}": partial(_multimodal, guide=guide) for guide in GUIDES},
        **{f"missing, {name}": partial(_missing, **given) for name, given in encoders.items()},
        "table": _table,
        **{f"program, {name}": partial(_small, make) for name, make in SMALL.items()},
    }


def _small(make: Callable[[], Any]) -> Program:
    return (*make(), small_data(ROWS))


# ---------------------------------------------------------------------------------------------
# Trying


def tried(name: str, spec: str, level: str = "compiled") -> Record:
    """One combination: the level of its step after five, or why it is refused."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    try:
        objective = parse(spec)
        model, guide, data = programs()[name]()
        batches = [pv.batch.take(data, slice(k * BATCH, (k + 1) * BATCH)) for k in range(2)]
        loss = objective(model, guide)
        loss.train()
        loss(batches[0]).backward()
    except Exception as error:
        legal = not isinstance(error, ValueError | NotImplementedError)
        return {"level": "failed" if legal else "refused", "reason": one_line(error)}
    parameters = list(loss.parameters())
    try:
        step: Any = make_step(loss, parameters, torch.optim.Adam(parameters), level=level)
        values = [float(step(batches[k % 2])) for k in range(5)]
    except Exception as error:
        return {"level": "failed", "reason": one_line(error)}
    reached = str(getattr(step, "level", "not said"))
    finite = "" if all(v == v for v in values) else "loss is NaN; "
    return {"level": reached, "reason": finite + str(getattr(step, "reason", ""))}


def _serve(connection: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with pyro.validation_enabled(False):
        while True:
            connection.send(tried(*connection.recv()))


def combinations() -> list[tuple[str, str]]:
    """Every pair with every objective; at any point each objective has met as many pairs, at random."""
    names, generator = list(programs()), random.Random(0)
    orders = {spec: generator.sample(names, len(names)) for spec in objectives()}
    return [(order[k], spec) for k in range(len(names)) for spec, order in orders.items()]


def _served(those: list[tuple[str, str]]) -> list[Record]:
    """Some combinations, in a process that is begun anew where it dies."""
    records, worker = [], Worker(_serve)
    for pair, spec in those:
        try:
            found = worker.ask(pair, spec, within=PATIENCE)
        except Failed as error:
            found = {"level": "failed", "reason": str(error)}
            worker.close()
            worker = Worker(_serve)
        records.append({"pair": pair, "objective": spec, **found})
    worker.close()
    return records


def coverage(options: Options) -> None:
    results = Results("speed_coverage", options, table)
    asked = combinations()[: 1 if options.quick else options.combinations]
    left = [(pair, spec) for pair, spec in asked if not results.has(pair=pair, objective=spec)]
    parts = [left[start : start + SERVED] for start in range(0, len(left), SERVED)]
    with cores(0), ThreadPoolExecutor(options.jobs) as pool:
        for records in pool.map(_served, parts):
            results.add(records)


def table(records: list[Record]) -> str:
    """Fractions, then what is not compiled, by reason."""
    legal = [r for r in records if r["level"] != "refused"]
    counts = Counter(r["level"] for r in legal)
    number = len(combinations())
    left_out = 1 - len(records) / number
    lines = [
        f"{len(records)} of {number} combinations of pairs and objectives, drawn at random: "
        f"{len(legal)} asked for 'compiled', {len(records) - len(legal)} refused",
        "",
    ]
    for level in sorted(counts, key=lambda level: [*LEVELS, level].index(level)):
        fraction = counts[level] / len(legal)
        error = math.sqrt(left_out * fraction * (1 - fraction) / len(legal))
        lines.append(f"{level:10s} {counts[level]:5d}   {fraction:6.1%} ± {error:.1%}")
    for (level, reason), those in _by_reason(records):
        if level == "refused":
            lines += ["", f"{level}, {len(those)}: {reason}"]
            continue
        lines += ["", f"{level}: {reason}"]
        pairs_of: dict[str, list[str]] = {}
        for r in those:
            pairs_of.setdefault(r["pair"], []).append(r["objective"])
        lines += [f"  {pair}: {'; '.join(specs)}" for pair, specs in pairs_of.items()]
    return "\n".join(lines)


def _by_reason(records: list[Record]) -> Iterator[tuple[tuple[str, str], list[Record]]]:
    groups: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        if r["level"] != "compiled":
            groups.setdefault((r["level"], r["reason"]), []).append(r)
    yield from sorted(groups.items(), key=lambda item: -len(item[1]))
