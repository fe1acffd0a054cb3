"""What the library says of a cell, held against what is exact.

Rows hold their own copy of every parameter, so that one backward pass gives a gradient per row and hence
standard errors; where all latents are discrete the rows are all K-tuples of states, weighed by their
probability, and there is no error.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_vae.objectives.relaxed import Gumbel
from tests.gate.cells import Cell, bias, refusals
from tests.gate.exact import grid_of
from tests.gate.pairs import BIASED, REFUSED, SIGMAS
from tests.gate.penalties import PenaltyCell

PRECISION = 0.02  # largest standard error of a gradient, relative to its norm
ROWS = 16_384  # per block
BATCHES = 16  # that a block is made of where rows depend on each other
BLOCKS = 1_000


@dataclass
class Result:
    """What a cell showed. ``worst`` and ``sigmas``, the bias, are in standard errors, the other numbers
    relative to the norm of the exact gradient."""

    cell: Cell | PenaltyCell
    problems: list[str] = field(default_factory=list)
    worst: float = 0.0
    error: float = 0.0
    bias: float = 0.0
    sigmas: float = 0.0
    rows: int = 0
    seconds: float = 0.0


def check(cell: Cell | PenaltyCell, precision: float | None = None, rows: int = ROWS) -> Result:
    """Whether a cell is what it is declared to be; one block of rows, or as many as the precision
    of the gradient needs."""
    start = time.process_time()
    result = Result(cell)
    if isinstance(cell, PenaltyCell):
        found = cell.measure()
        result = Result(
            cell, found.problems, found.worst, found.error, found.bias, found.sigmas, cell.calls
        )
    elif cell.status == REFUSED:
        _check_refusal(result, cell)
    else:
        _check_numbers(result, cell, precision, rows)
    result.seconds = time.process_time() - start
    return result


def _check_refusal(result: Result, cell: Cell) -> None:
    try:
        Draw(cell, 4).block()  # what a pair shows is refused at the first call
    except ValueError as refused:
        pairs = refusals(cell.bound, cell.estimator, cell.weighting.rate, cell.pair)
        if not any(repr(a) in str(refused) and repr(b) in str(refused) for a, b in pairs):
            result.problems.append(f"refused without naming both parts: {refused}")
    else:
        result.problems.append("should be refused")


def _check_numbers(result: Result, cell: Cell, precision: float | None, rows: int) -> None:
    of_bound, wanted = cell.exact(), cell.declared() or cell.exact()
    norm = of_bound.gradient.norm()
    coupled = cell.weighting.rate.coupled and bias(cell.bound, cell.estimator, cell.weighting.rate)
    draw = _draw(cell, rows // BATCHES if coupled else rows)
    value_spread = draw.spread(result.problems)
    value, gradient = _Mean(), _Mean()
    while True:
        loss, gradients = draw.block()
        value.add(-loss[None] / draw.rows)
        gradient.add(gradients.mean(1, keepdim=True) if coupled else gradients)
        error = gradient.error() * (not draw.exact)
        result.rows += draw.rows
        result.error = float(error.norm() / norm)
        enough = precision is None or result.error <= precision
        enough = enough and (not coupled or gradient.count >= BATCHES)
        if draw.exact or enough or result.rows >= BLOCKS * rows:
            break
    off = {
        "value": (value.mean() - wanted.value, value_spread / math.sqrt(result.rows)),
        "gradient": (gradient.mean() - wanted.gradient, error),
    }
    reference = {"value": wanted.value_error, "gradient": wanted.gradient_error}
    rounding = 1e-10 * (1 + norm)
    for what, (difference, spread) in off.items():
        if cell.declared() is None and what in _unknown(cell):
            continue
        z = difference.abs() / (spread**2 + reference[what] ** 2 + rounding**2).sqrt()
        worst = float(z.max())
        result.worst = max(result.worst, worst)
        if not worst <= SIGMAS:  # NaN fails
            result.problems.append(f"{what} off by {worst:.1f} standard errors")
    away = gradient.mean() - of_bound.gradient
    result.bias = float(away.norm() / norm)
    result.sigmas = float((away.abs() / (error**2 + rounding**2).sqrt()).max())
    if precision is not None and not result.error <= precision:
        result.problems.append(f"standard error {result.error:.1%} after {result.rows} rows")


def _unknown(cell: Cell) -> tuple[str, ...]:
    """What of a cell is biased by design, and by how much is not known."""
    if cell.status != BIASED or cell.weighting.rate.coupled:  # that of a rate is O(1 / rows)
        return ()
    soft = isinstance(cell.estimator, Gumbel) and (
        not cell.estimator.hard or cell.estimator.density == "relaxed"
    )
    return ("value", "gradient") if soft else ("gradient",)


class Draw:
    """A cell's loss and the gradient of every row in all parameters, block by block."""

    exact = False

    def __init__(self, cell: Cell, rows: int) -> None:
        pyro.clear_param_store()
        torch.manual_seed(zlib.crc32(str(cell).encode()))
        pair = cell.pair
        self.cell, self.rows, self.batch = cell, rows, pair.batch(rows)
        self.handler: AbstractContextManager[Any] = nullcontext()
        self.model = pair.model(pair.model_values, rows)
        self.guide = pair.guide(pair.guide_values, rows)
        self.objective = cell.objective()
        self.loss = self.objective(self.model, self.guide)
        # A PyroParam's leaf is called "name_unconstrained".
        of_model, of_guide = (
            {name.removesuffix("_unconstrained"): p for name, p in program.named_parameters()}
            for program in (self.model, self.guide)
        )
        self.leaves = [
            *(of_model[name] for name in pair.model_values),
            *(of_guide[name] for name in pair.guide_values),
        ]

    def block(self) -> tuple[Tensor, Tensor]:
        """The loss, and the bound's gradient ``[parameters, rows]``."""
        self.loss.step.fill_(self.cell.weighting.step)
        with self.handler:
            loss = self.loss(self.batch)
        gradients = torch.autograd.grad(loss, self.leaves, materialize_grads=True)
        return loss.detach(), -torch.stack(gradients)

    def values(self) -> Tensor:
        """Of the rows, times what the bound is multiplied by."""
        self.loss.step.fill_(self.cell.weighting.step)
        with self.handler:
            return self.cell.pair.multiplier * self.loss.rows(self.batch)

    def spread(self, problems: list[str]) -> Tensor:
        """The standard deviation of a row's value; at one seed the rows' values add up to the loss."""
        state = torch.get_rng_state()
        values = self.values()
        torch.set_rng_state(state)
        loss = Draw.block(self)[0]
        torch.set_rng_state(state)
        if not torch.isclose(-values.sum(), loss, rtol=1e-9):
            problems.append(f"rows() adds up to {values.sum():.6g}, the loss is {loss:.6g}")
        return values.std() * (not self.exact)


class _Listing(Messenger):
    """Every row's draws ``[(K), rows, *event]`` of the sites, in place of what they draw."""

    def __init__(self, draws: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.draws = draws

    def _pyro_sample(self, msg: Any) -> None:
        value = self.draws.get(msg["name"])
        if value is not None and msg["fn"].shape() == value.shape:
            msg["value"] = value


class _Listed(Draw):
    """All K-tuples of states are rows, which count their probabilities: the library's answer is an
    expectation without noise."""

    exact = True

    def __init__(self, cell: Cell) -> None:
        pair, many = cell.pair, math.prod(cell.pair.states)
        places = [torch.arange(many)] * cell.num_particles
        tuples = torch.cartesian_prod(*places).reshape(-1, len(places)).T  # [K, rows]
        super().__init__(cell, tuples.shape[1])
        states, _ = grid_of(cell._target(), fine=True)
        numbers = {**pair.model_values, **pair.guide_values}
        log_q = pair.terms({n: torch.tensor(v).double() for n, v in numbers.items()}, states).log_q
        assert log_q is not None
        self.weights = log_q.exp()[tuples].prod(0)
        self.draws = {}
        for site, count, state in zip(pair.sites, pair.states, states, strict=True):
            chosen = state[tuples] if count == 2 else one_hot(state[tuples].long(), count).double()
            self.draws[site] = chosen if len(places) > 1 else chosen[0]
        self.handler = _Listing(self.draws)

    def block(self) -> tuple[Tensor, Tensor]:
        """As of draws that count alike."""
        gradients = super().block()[1]
        return -(self.weights @ self.values()) * self.rows, gradients * self.weights * self.rows


class _Alone(_Listed):
    """The same, each row in a batch of its own, after one other batch."""

    def block(self) -> tuple[Tensor, Tensor]:
        one = Draw(self.cell, 1)
        found, kept = [], None
        at_row = self.cell.num_particles > 1
        for row in (0, *range(self.rows)):
            one.handler = _Listing(
                {
                    s: d[:, row : row + 1] if at_row else d[row : row + 1]
                    for s, d in self.draws.items()
                }
            )
            if kept is not None:
                one.objective.modules.load_state_dict(kept)
            found.append(one.block()[1][:, 0])
            kept = kept or deepcopy(one.objective.modules.state_dict())
        gradients = torch.stack(found[1:], 1)
        return -(self.weights @ self.values()) * self.rows, gradients * self.weights * self.rows


def _draw(cell: Cell, rows: int) -> Draw:
    if cell.alone:
        return _Alone(cell)
    if not cell.listed:
        return Draw(cell, rows)
    if not cell.estimator.enumerates:
        return _Listed(cell)
    alike = Draw(cell, 2)
    alike.exact = True
    return alike


class _Mean:
    """Mean over rows ``[..., rows]`` and its standard error, block by block."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, block: Tensor) -> None:
        self.count += block.shape[-1]
        self.sum = self.sum + block.sum(-1)
        self.squares = self.squares + (block**2).sum(-1)

    def mean(self) -> Tensor:
        return self.sum / self.count

    def error(self) -> Tensor:
        variance = (self.squares / self.count - self.mean() ** 2).clamp(min=0)
        return (variance / max(self.count - 1, 1)).sqrt()
