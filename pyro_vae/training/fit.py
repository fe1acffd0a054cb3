"""The training loop, to be read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae.batch import Batch, take
from pyro_vae.compiled import make_step
from pyro_vae.evaluation.likelihood import Evaluation, evaluate
from pyro_vae.objectives.objective import Objective, ObjectiveModule
from pyro_vae.objectives.particles import run as run_particles
from pyro_vae.objectives.recipes import elbo
from pyro_vae.objectives.swap import owner, preserved
from pyro_vae.training.runs import Folder

__all__ = ["NonFiniteError", "Run", "fit"]

Program = Callable[..., Any]
CHECK_EVERY = 100  # steps between looks at the loss, each of which waits for the device


class NonFiniteError(RuntimeError):
    """Training met NaN or inf. ``.run`` holds the last good state."""

    run: Run


@dataclass
class Run:
    """What ``fit`` leaves.

    Attributes:
        model, guide: trained in place; at their best step if there was a validation set.
        objective: what was optimised.
        history: a record an epoch: step, epoch, seconds, loss and valid in nats per row, lr.
        config: seeds, sizes, versions.
        best: the record of the parameters that were kept.
        stopped: why training ended, ``"epochs"``, ``"steps"``, ``"patience"`` or ``"non-finite"``.
        notes: what the objective had to say about the pair.
    """

    model: Program
    guide: Program
    objective: Objective
    history: list[dict[str, float]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    stopped: str = ""
    notes: tuple[str, ...] = ()

    def evaluate(self, data: Batch | Tensor, num_particles: int = 500, **options: Any) -> Evaluation:
        """``evaluate(run.model, run.guide, data, ...)``."""
        return evaluate(self.model, self.guide, data, num_particles, **options)


def fit(
    model: Program,
    guide: Program,
    data: Batch | Tensor,
    objective: Objective | None = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 100,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    clip: float | None = None,
    valid: Batch | Tensor | None = None,
    monitor: Objective | None = None,
    patience: int | None = None,
    callbacks: Iterable[Callable[[Run, dict[str, float]], None]] = (),
    seed: int = 0,
    device: str = "auto",
    compile: str = "auto",
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Run:
    """Train a model and a guide under an objective.

    Losses are in nats per row. The odd last batch of an epoch is used, not dropped. With ``valid``
    the best parameters so far are kept, judged by ``monitor`` and not by what is optimised.

    Args:
        data: training rows, as the programs take them.
        objective: default ``elbo()``.
        epochs, steps: length of the training; one of them.
        optimizer: parameters -> torch optimizer, default ``Adam(lr=1e-3)``:
            ``functools.partial(torch.optim.SGD, lr=0.1)``.
        scheduler: optimizer -> torch learning-rate scheduler, stepped every step.
        clip: largest norm of the gradient of the loss per row.
        valid: held-out rows.
        monitor: the bound to select by, default the ELBO at beta = 1 with 8 particles.
        patience: epochs without improvement on ``valid`` after which training stops.
        callbacks: called with the run and the record after every epoch; one that raises
            ``StopIteration`` ends the training.
        seed: of shuffling and draws; the global random state is left as it was.
        device: ``"auto"`` takes CUDA where available.
        compile: level of ``compiled.make_step``.
        out: folder that receives the run.
        resume: go on from the state in ``out``, exactly where it stopped.
        progress: show a progress bar (default: if the terminal can).

    Raises:
        ValueError: bad arguments, or a pair that the objective can't train.
        NonFiniteError: NaN or inf in a loss, naming the site and the rows; the pair is left in its
            last good state.
    """
    length = _length(data, epochs, steps, batch_size)
    if patience is not None and valid is None:
        raise ValueError("fit: came patience without valid, wanted held-out rows to judge by")
    if resume and out is None:
        raise ValueError("fit: came resume=True without out, wanted the folder of the run")
    place = _device(device)
    objective = objective or elbo()
    monitor = monitor or elbo(num_particles=8, estimator="score")
    folder = None if out is None else Folder(out)
    saved = folder.state() if folder is not None and resume else None
    if folder is not None and not resume:
        folder.claim()

    data = data.to(place)
    valid = None if valid is None else valid.to(place)
    loss = objective(model, guide).to(place)
    loss.train()
    config = {
        "seed": seed,
        "batch_size": batch_size,
        "steps": length,
        "rows": len(data),
        "objective": repr(objective),
        "device": str(place),
    }
    run = Run(model, guide, objective, config=config)
    bar = tqdm(total=length, unit="step", disable=None if progress is None else not progress)
    with bar, _own_parameters(model, guide), torch.random.fork_rng():
        torch.manual_seed(seed)
        parameters = _materialize(loss, take(data, slice(0, batch_size)))
        run.notes = objective.plan(model, guide, (take(data, slice(0, batch_size)),), {}).notes
        optim = optimizer(parameters) if optimizer else torch.optim.Adam(parameters, lr=1e-3)
        if not isinstance(optim, torch.optim.Optimizer):
            raise ValueError(
                f"optimizer: came {type(optim).__name__}, wanted a torch optimizer: "
                "functools.partial(torch.optim.Adam, lr=1e-3)"
            )
        schedule = scheduler(optim) if scheduler else None
        step = make_step(loss, parameters, optim, schedule, clip, compile)
        state = _State(loss, parameters, optim, schedule)
        if saved is not None:
            state.load(saved)
            run.history, run.best = state.history, state.best
            bar.update(state.step)

        good = state.snapshot()
        per_epoch = math.ceil(len(data) / batch_size)
        since = time.perf_counter() - (run.history[-1]["seconds"] if run.history else 0.0)
        while state.step < length and not run.stopped:
            epoch, offset = divmod(state.step, per_epoch)
            order = _order(len(data), seed, epoch).to(place).split(batch_size)
            total, count = torch.zeros((), device=place), 0
            for rows in order[offset : offset + length - state.step]:
                with pyro.validation_enabled(False):
                    total = total + step(take(data, rows)) * len(rows)
                count += len(rows)
                state.step += 1
                bar.update()
                if state.step % CHECK_EVERY == 0:
                    if not math.isfinite(float(total)):
                        break
                    good = state.snapshot()
                    bar.set_postfix_str(_postfix(float(total) / count, run.history), refresh=False)
            if not math.isfinite(float(total)):
                problem = _replay(state, good, step, data, seed, batch_size)
                run.stopped, problem.run = "non-finite", run
                raise problem
            record = {
                "step": state.step,
                "epoch": epoch + 1,
                "seconds": time.perf_counter() - since,
                "loss": float(total) / count,
                "lr": optim.param_groups[0]["lr"],
            }
            if valid is not None:
                record["valid"] = _held_out(monitor, loss, valid, batch_size, seed)
            run.history.append(record)
            if _improves(record, run.best):
                run.best, state.best_parameters = record, state.parameters_now()
            state.history, state.best = run.history, run.best
            good = state.snapshot()
            try:
                for callback in callbacks:
                    callback(run, record)
            except StopIteration:
                run.stopped = "callback"
            if patience is not None and record["epoch"] - run.best["epoch"] >= patience:
                run.stopped = "patience"
            if folder is not None:
                folder.save_state(state.dump())
        run.stopped = run.stopped or ("steps" if steps else "epochs")
        if valid is not None and state.best_parameters:
            state.set_parameters(state.best_parameters)
    if folder is not None:
        folder.save(run)
    return run


def _length(
    data: Batch | Tensor, epochs: int | None, steps: int | None, batch_size: int
) -> int:
    """Number of steps."""
    if (epochs is None) == (steps is None):
        raise ValueError(f"fit: came epochs={epochs} and steps={steps}, wanted one of them")
    for name, number in (("epochs", epochs), ("steps", steps), ("batch_size", batch_size)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"fit: came {name}={number!r}, wanted a whole number >= 1")
    if len(data) == 0:
        raise ValueError("fit: came a data set without rows")
    return steps or (epochs or 0) * math.ceil(len(data) / batch_size)


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"device: came {device!r}, wanted one that works here: {line}") from None
    return place


def _order(rows: int, seed: int, epoch: int) -> Tensor:
    """The rows in the order of an epoch: a function of seed and epoch, so that resuming needs none."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator)


@contextmanager
def _own_parameters(model: Program, guide: Program) -> Iterator[None]:
    """Modules keep their parameters to themselves: Pyro's global store would hand those of one pair
    to the next. Programs written with ``pyro.param`` keep the global store."""
    modules = owner(model) is not None and owner(guide) is not None
    with pyro.get_param_store().scope() if modules else nullcontext():
        yield


def _materialize(loss: ObjectiveModule, batch: Any) -> list[nn.Parameter]:
    """All parameters of a pair, after one run in which lazy modules and ``pyro.param`` make theirs."""
    model, guide = loss.model, loss.guide
    with preserved(model, guide), poutine.trace(param_only=True) as traced, torch.no_grad():
        loss.elbo.plan(model, guide, (batch,), {})
        loss.elbo.loss(model, guide, batch)
    stored = [site["value"].unconstrained() for site in traced.trace.nodes.values()]
    unique = {id(p): p for p in [*loss.parameters(), *stored] if p.requires_grad}
    if not unique:
        raise ValueError("fit: model and guide have no parameters to train")
    return list(unique.values())


class _State:
    """What changes from step to step: enough to go on, or to go back."""

    def __init__(
        self,
        loss: ObjectiveModule,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
    ) -> None:
        self.loss, self.parameters = loss, parameters
        self.optimizer, self.scheduler = optimizer, scheduler
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.best_parameters: dict[str, Any] = {}

    def parameters_now(self) -> dict[str, Any]:
        """Copies of all parameters and buffers, those of ``pyro.param`` included."""
        modules = {name: t.detach().clone() for name, t in self.loss.state_dict().items()}
        return {"modules": modules, "stored": [p.detach().clone() for p in self.parameters]}

    def set_parameters(self, values: dict[str, Any]) -> None:
        self.loss.load_state_dict(values["modules"])
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values["stored"], strict=True):
                parameter.copy_(value)

    def snapshot(self) -> dict[str, Any]:
        """A copy of everything that a step may change."""
        state = {
            "step": self.step,
            "parameters": self.parameters_now(),
            "optimizer": deepcopy(self.optimizer.state_dict()),
            "scheduler": deepcopy(self.scheduler.state_dict()) if self.scheduler else None,
            "random": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["random_cuda"] = torch.cuda.get_rng_state_all()
        return state

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.set_parameters(state["parameters"])
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))
        if self.scheduler:
            self.scheduler.load_state_dict(deepcopy(state["scheduler"]))
        torch.set_rng_state(state["random"].cpu())
        if "random_cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["random_cuda"]])

    def dump(self) -> dict[str, Any]:
        report = {"history": self.history, "best": self.best, "best_parameters": self.best_parameters}
        return self.snapshot() | report

    def load(self, state: dict[str, Any]) -> None:
        self.restore(state)
        self.history, self.best = state["history"], state["best"]
        self.best_parameters = state["best_parameters"]


def _held_out(
    monitor: Objective, loss: ObjectiveModule, valid: Batch | Tensor, batch_size: int, seed: int
) -> float:
    """Mean bound on the validation rows, always with the same draws; nats per row."""
    loss.eval()
    with preserved(loss.model, loss.guide), pyro.validation_enabled(False), torch.no_grad():
        torch.manual_seed(seed)
        parts = torch.arange(len(valid), device=loss.step.device).split(max(batch_size, 500))
        bounds = [monitor.rows(loss.model, loss.guide, take(valid, rows)) for rows in parts]
    loss.train()
    return float(torch.cat(bounds).mean())


def _improves(record: dict[str, float], best: dict[str, float]) -> bool:
    if "valid" not in record:
        return True  # nothing to choose by: the last is kept
    return not best or record["valid"] > best["valid"]


def _postfix(loss: float, history: list[dict[str, float]]) -> str:
    valid = f", valid {history[-1]['valid']:.2f}" if history and "valid" in history[-1] else ""
    return f"loss {loss:.2f}{valid}"


def _replay(
    state: _State,
    good: dict[str, Any],
    step: Callable[[Any], Tensor],
    data: Batch | Tensor,
    seed: int,
    batch_size: int,
) -> NonFiniteError:
    """Go back to the last good state and walk forward until the step that fails, and look at it."""
    state.restore(good)
    before, place = good, state.loss.step.device
    epoch, offset = divmod(state.step, math.ceil(len(data) / batch_size))
    for rows in _order(len(data), seed, epoch).to(place).split(batch_size)[offset:]:
        batch = take(data, rows)
        healthy = bool(torch.isfinite(step(batch)))
        healthy &= all(bool(torch.isfinite(p).all()) for p in state.parameters)
        if not healthy:
            state.restore(before)
            culprit = _culprit(state, batch, rows)
            state.restore(before)
            return NonFiniteError(f"step {state.step + 1}: {culprit}; the state before it is kept")
        state.step += 1
        before = state.snapshot()
    return NonFiniteError(f"step {state.step}: the loss was not finite, and was when run again")


def _culprit(state: _State, batch: Any, rows: Tensor) -> str:
    """Which site's log density is not finite, and in which rows; else which gradient."""
    model, guide, objective = state.loss.model, state.loss.guide, state.loss.elbo
    random = torch.get_rng_state()
    with torch.no_grad(), pyro.validation_enabled(False):
        plan = objective.plan(model, guide, (batch,), {})
        table = run_particles(model, guide, (batch,), {}, plan, objective.num_particles)
    index = batch.index if isinstance(batch, Batch) else rows
    for source in ("posterior", "prior", "likelihood"):
        for site, term in getattr(table, source).items():
            bad = ~torch.isfinite(term)
            if not bool(bad.any()):
                continue
            if not table.local(site):
                return f"site {site!r}: its {source} density is not finite"
            per_row = bad.flatten(2).any(2).any(0) if term.dim() > 2 else bad.any(0)
            numbers = index[per_row].tolist()
            shown = f"{numbers[:5]}{' and more' if len(numbers) > 5 else ''}"
            return f"site {site!r}: its {source} density is not finite in rows {shown}"
    torch.set_rng_state(random)
    total, _ = state.loss.loss_and_rows(batch)
    if not bool(torch.isfinite(total)):
        return "the loss is not finite though every site's density is (a rate or a penalty)"
    grads = torch.autograd.grad(total, state.parameters, allow_unused=True)
    names = {id(p): name for name, p in state.loss.named_parameters()}
    bad_names = [
        names.get(id(p), "a pyro.param")
        for p, grad in zip(state.parameters, grads, strict=True)
        if grad is not None and not bool(torch.isfinite(grad).all())
    ]
    if bad_names:
        return f"the gradient of {', '.join(bad_names[:3])} is not finite"
    return "the optimizer's step left parameters that are not finite; lower the learning rate"
