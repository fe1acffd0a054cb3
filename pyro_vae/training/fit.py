"""The training loop, to be read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae.batch import Batch, still, take
from pyro_vae.compiled import make_step
from pyro_vae.evaluation.likelihood import Evaluation, check_rows, evaluate
from pyro_vae.objectives.objective import Objective, ObjectiveModule
from pyro_vae.objectives.particles import run as run_particles
from pyro_vae.objectives.recipes import elbo
from pyro_vae.objectives.support import check_data
from pyro_vae.objectives.swap import own_parameters, owner, preserved
from pyro_vae.training.runs import Folder

__all__ = ["NonFiniteError", "Run", "fit"]

Program = Callable[..., Any]
CHECK_EVERY = 100  # steps between looks at the loss, each of which waits for the device
SAVE_EVERY = 1.0  # seconds at least between epochs whose state is saved


class NonFiniteError(RuntimeError):
    """Training met NaN or inf. ``.run`` holds the last good state."""

    run: Run


@dataclass(repr=False)
class Run:
    """What ``fit`` leaves.

    Attributes:
        model, guide: trained in place; at their best step if there was a validation set.
        objective: what was optimised.
        history: a record an epoch: step, epoch, seconds, loss and valid in nats per row, lr.
        config: seeds, sizes, versions.
        best: the record of the parameters that were kept.
        stopped: why training ended, ``"epochs"``, ``"steps"``, ``"patience"``, ``"callback"`` or
            ``"non-finite"``.
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

    def __repr__(self) -> str:
        if not self.history:
            return f"Run({self.objective!r}, not trained)"
        last = self.history[-1]
        return (
            f"Run({last['step']} steps in {last['seconds']:.1f} s, loss {last['loss']:.3f} nats per "
            f"row, stopped by {self.stopped})"
        )

    def evaluate(
        self, data: Batch | Tensor, num_particles: int = 500, **options: Any
    ) -> Evaluation:
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
        device: ``"auto"`` takes CUDA where available; functions, whose tensors can't be moved, stay
            with the data.
        compile: level of ``compiled.make_step``.
        out: folder that receives the run.
        resume: go on from the state in ``out``, exactly where it stopped.
        progress: show a progress bar (default: if the terminal can).

    Raises:
        ValueError: bad arguments, or a pair that the objective can't train.
        NonFiniteError: NaN or inf in a loss, naming the site and the rows; the pair is left in its
            last good state.
    """
    check_rows("fit: data", data)
    length = _length(len(data), epochs, steps, batch_size)
    objective = objective or elbo()
    monitor = monitor or elbo(num_particles=8, estimator="score")
    callbacks = list(callbacks) if isinstance(callbacks, Iterable) else [None]
    _check(objective, monitor, clip, patience, valid, callbacks, resume, out)
    place = _device(device, model, guide, data)
    folder = None if out is None else Folder(out)
    saved = folder.state() if folder is not None and resume else None
    if folder is not None and not resume:
        folder.claim()

    data = data.to(place)
    valid = None if valid is None else still(valid).to(place)
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
    if isinstance(data, Batch):
        config["data"] = data.record
    run = Run(model, guide, objective, config=config)
    bar = tqdm(total=length, unit="step", disable=None if progress is None else not progress)
    with bar, own_parameters(model, guide), torch.random.fork_rng():
        torch.manual_seed(seed)
        first = take(data, slice(0, batch_size))
        plan = objective.plan(model, guide, (first,), {})
        for rows in (data, valid):
            check_data(plan.supports, rows.look() if isinstance(rows, Batch) else rows)
        run.notes = plan.notes
        parameters = _materialize(loss, first)
        optim = _optimizer(optimizer, parameters)
        schedule = _scheduler(scheduler, optim)
        step = make_step(loss, parameters, optim, schedule, clip, compile)
        state = _State(loss, parameters, optim, schedule)
        if valid is not None:  # what the monitor refuses it should refuse now
            _held_out(monitor, loss, take(valid, slice(0, 2)), batch_size, seed)
        if folder is not None and saved is not None:
            state.resume(saved, run, folder)
            bar.update(state.step)
            run.stopped = "patience" if _waited(run, patience) else ""

        good = state.snapshot()
        per_epoch = math.ceil(len(data) / batch_size)
        since = time.perf_counter() - (run.history[-1]["seconds"] if run.history else 0.0)
        next_save = 0.0
        while (state.step < length or state.rows) and not run.stopped:
            epoch, offset = divmod(state.step, per_epoch)
            now = _epoch(data, seed, epoch)
            order = _order(len(data), seed, epoch).to(place).split(batch_size)
            for rows in order[offset : offset + length - state.step]:
                try:
                    with pyro.validation_enabled(False):
                        state.total = state.total + step(take(now, rows)) * len(rows)
                except (RuntimeError, ValueError):  # NaN in a parameter is an error to some draws
                    if state.healthy(state.total):
                        raise
                    break
                state.rows += len(rows)
                state.step += 1
                bar.update()
                if state.step % CHECK_EVERY == 0:
                    if not state.healthy(state.total):
                        break
                    good = state.snapshot()
                    bar.set_postfix_str(_postfix(state, run.history), refresh=False)
            if not state.healthy(state.total):
                problem = _replay(state, good, step, data, seed, batch_size)
                run.stopped, problem.run = "non-finite", run
                raise problem
            if folder is not None and state.step % per_epoch:  # a longer run goes on from here
                folder.save_state(state.dump(run))
            record = {
                "step": state.step,
                "epoch": epoch + 1,
                "seconds": time.perf_counter() - since,
                "loss": float(state.total) / state.rows,
                "lr": float(optim.param_groups[0]["lr"]),
            }
            state.total, state.rows = torch.zeros_like(state.total), 0
            if valid is not None:
                record["valid"] = _held_out(monitor, loss, valid, batch_size, seed)
            run.history.append(record)
            if _improves(record, run.best):
                run.best = record
                state.best_parameters = state.parameters_now() if valid is not None else {}
            try:
                for callback in callbacks:
                    callback(run, record)
            except StopIteration:
                run.stopped = "callback"
            if not run.stopped and _waited(run, patience):
                run.stopped = "patience"
            good = state.snapshot()
            due = run.stopped or state.step >= length or time.perf_counter() > next_save
            if folder is not None and state.step % per_epoch == 0 and due:
                folder.save_state(state.dump(run))
                next_save = time.perf_counter() + SAVE_EVERY
        run.stopped = run.stopped or ("steps" if steps else "epochs")
        if state.best_parameters:
            state.set_parameters(state.best_parameters)
    if folder is not None:
        folder.save(run)
    return run


def _length(rows: int, epochs: int | None, steps: int | None, batch_size: int) -> int:
    """Number of steps."""
    if (epochs is None) == (steps is None):
        raise ValueError(f"fit: came epochs={epochs} and steps={steps}, wanted one of them")
    for name, number in (("epochs", epochs), ("steps", steps), ("batch_size", batch_size)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"fit: came {name}={number!r}, wanted a whole number >= 1")
    return steps or (epochs or 0) * math.ceil(rows / batch_size)


def _check(
    objective: Any,
    monitor: Any,
    clip: float | None,
    patience: int | None,
    valid: Any,
    callbacks: list[Any],
    resume: bool,
    out: str | Path | None,
) -> None:
    for name, value in (("objective", objective), ("monitor", monitor)):
        if not isinstance(value, Objective):
            raise ValueError(
                f"fit: {name} came as {type(value).__name__}, wanted an Objective such as elbo()"
            )
    if clip is not None and not clip > 0:
        raise ValueError(f"fit: came clip={clip!r}, wanted a number > 0")
    if patience is not None and patience < 1:
        raise ValueError(f"fit: came patience={patience!r}, wanted a whole number >= 1")
    if patience is not None and valid is None:
        raise ValueError("fit: came patience without valid, wanted held-out rows to judge by")
    if valid is not None:
        check_rows("fit: valid", valid)
    if not all(map(callable, callbacks)):
        raise ValueError("fit: callbacks: wanted a list of functions of the run and the record")
    if resume and out is None:
        raise ValueError("fit: came resume=True without out, wanted the folder of the run")


def _device(device: str, model: Program, guide: Program, data: Batch | Tensor) -> torch.device:
    if device == "auto":
        if owner(model) is None or owner(guide) is None:  # functions, whose tensors stay put
            return data.device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"device: came {device!r}, wanted one that works here: {line}") from None
    return place


def _optimizer(make: Any, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    make = make or torch.optim.Adam  # lr=1e-3
    optim = make(parameters) if callable(make) else make
    if not callable(make) or not isinstance(optim, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer: came {type(optim).__name__}, wanted a function that makes a torch "
            "optimizer: functools.partial(torch.optim.Adam, lr=1e-3)"
        )
    return optim


def _scheduler(make: Any, optim: torch.optim.Optimizer) -> Any:
    schedulers = torch.optim.lr_scheduler
    if make is None:
        return None
    schedule = make(optim) if callable(make) else make
    if not callable(make) or not isinstance(schedule, schedulers.LRScheduler):
        raise ValueError(
            f"scheduler: came {type(schedule).__name__}, wanted a function that makes one: "
            "functools.partial(torch.optim.lr_scheduler.StepLR, step_size=100)"
        )
    if isinstance(schedule, schedulers.ReduceLROnPlateau):
        raise ValueError("scheduler: ReduceLROnPlateau waits for a metric, and none is given it")
    return schedule


def _epoch(data: Batch | Tensor, seed: int, number: int) -> Batch | Tensor:
    return data.epoch(seed, number) if isinstance(data, Batch) else data


def _order(rows: int, seed: int, epoch: int) -> Tensor:
    """The rows in the order of an epoch: a function of seed and epoch, so that resuming needs none."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(rows, generator=generator)


def _materialize(loss: ObjectiveModule, batch: Any) -> list[nn.Parameter]:
    """All parameters of a pair, after one run in which lazy modules and ``pyro.param`` make theirs."""
    model, guide = loss.model, loss.guide
    with preserved(model, guide), poutine.trace(param_only=True) as traced:
        total = loss.elbo.differentiable_loss(model, guide, batch)
    nodes: list[Any] = list(traced.trace.nodes.values())
    stored = [node["value"].unconstrained() for node in nodes]
    unique = {id(p): p for p in [*loss.parameters(), *stored] if p.requires_grad}
    if not unique:
        raise ValueError("fit: model and guide have no parameters to train")
    for leaf in _leaves(total):
        if id(leaf) not in unique:
            raise ValueError(
                f"fit: a tensor {list(leaf.shape)} wants a gradient and belongs to no parameter of "
                "model, guide or objective, so it would not be trained; make it an nn.Parameter, keep "
                "its module as an attribute (lists as nn.ModuleList), or register it by pyro.module"
            )
    return list(unique.values())


def _leaves(total: Tensor) -> list[Tensor]:
    """The tensors that a loss differentiates to."""
    waiting: list[Any] = [total.grad_fn]
    seen, leaves = set(waiting), []
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        for parent, _ in node.next_functions if node is not None else ():
            if parent is not None and parent not in seen:
                seen.add(parent)
                waiting.append(parent)
    return leaves


class _State:
    """What changes from step to step: enough to go on, or to go back.

    Attributes:
        step: steps taken.
        total, rows: sum of the loss over the rows of this epoch so far, and their number.
        best_parameters: those that were best on the validation set.
    """

    def __init__(
        self,
        loss: ObjectiveModule,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
    ) -> None:
        self.loss, self.parameters = loss, parameters
        self.optimizer, self.scheduler = optimizer, scheduler
        self.step, self.rows = 0, 0
        self.total = torch.zeros((), device=loss.step.device)
        self.best_parameters: dict[str, Any] = {}
        inside = {id(parameter) for parameter in loss.parameters()}
        self.stored = [p for p in parameters if id(p) not in inside]  # made by pyro.param

    def healthy(self, loss: Tensor) -> bool:
        """Whether the loss and all parameters are finite; waits for the device once."""
        tensors = [loss, *self.parameters]
        return bool(torch.stack([torch.isfinite(t.detach()).all() for t in tensors]).all())

    def parameters_now(self) -> dict[str, Any]:
        """Copies of all parameters and buffers, those of ``pyro.param`` included."""
        modules = {name: t.detach().clone() for name, t in self.loss.state_dict().items()}
        return {"modules": modules, "stored": [p.detach().clone() for p in self.stored]}

    def set_parameters(self, values: dict[str, Any]) -> None:
        self.loss.load_state_dict(values["modules"])
        with torch.no_grad():
            for parameter, value in zip(self.stored, values["stored"], strict=True):
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

    def dump(self, run: Run) -> dict[str, Any]:
        """What ``resume`` needs."""
        return self.snapshot() | {
            "made_by": self._made_by(run),
            "total": self.total,
            "rows": self.rows,
            "history": run.history,
            "best": run.best,
            "best_parameters": self.best_parameters,
        }

    def resume(self, state: dict[str, Any], run: Run, folder: Folder) -> None:
        """Go on from ``dump``.

        Raises:
            ValueError: the state of a run of another kind.
        """
        for name, wanted in state["made_by"].items():
            if (came := self._made_by(run)[name]) != wanted:
                raise ValueError(f"{folder.path}: came {name} {came}, the run has {wanted}")
        try:
            self.restore(state)
        except (RuntimeError, ValueError, KeyError, AttributeError) as error:
            lines = " ".join(line.strip() for line in str(error).splitlines()[:3])
            raise ValueError(f"{folder.path}: the state is not of this pair: {lines}") from None
        self.total = state["total"].to(self.total.device)
        self.rows, self.best_parameters = state["rows"], state["best_parameters"]
        run.history, run.best = state["history"], state["best"]

    def _made_by(self, run: Run) -> dict[str, Any]:
        """What must not change for a run to go on as if it had not stopped."""
        return {name: run.config[name] for name in ("seed", "batch_size", "rows")} | {
            "optimizer": type(self.optimizer).__name__,
            "scheduler": type(self.scheduler).__name__,
        }


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
    return not best or record["valid"] > best["valid"] or math.isnan(best["valid"])


def _waited(run: Run, patience: int | None) -> bool:
    """Whether the last ``patience`` epochs brought nothing."""
    if patience is None or not run.history:
        return False
    return run.history[-1]["epoch"] - run.best["epoch"] >= patience


def _postfix(state: _State, history: list[dict[str, float]]) -> str:
    valid = f", valid {history[-1]['valid']:.2f}" if history and "valid" in history[-1] else ""
    return f"loss {float(state.total) / state.rows:.2f}{valid}"


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
    now = _epoch(data, seed, epoch)
    for rows in _order(len(data), seed, epoch).to(place).split(batch_size)[offset:]:
        batch = take(now, rows)
        with pyro.validation_enabled(False):
            healthy = state.healthy(step(batch))
        if not healthy:
            culprit = _culprit(state, before, batch, rows)
            state.restore(before)
            return NonFiniteError(f"step {state.step + 1}: {culprit}; the state before it is kept")
        state.step += 1
        before = state.snapshot()
    return NonFiniteError(f"step {state.step}: the loss was not finite, and was when run again")


def _culprit(state: _State, before: dict[str, Any], batch: Any, rows: Tensor) -> str:
    """Which site's log density is not finite, and in which rows; else which gradient."""
    model, guide, objective = state.loss.model, state.loss.guide, state.loss.elbo
    state.restore(before)
    plan = objective.plan(model, guide, (batch,), {})
    left, chunk = objective.num_particles, objective.chunk or objective.num_particles
    while left > 0:
        with torch.no_grad(), pyro.validation_enabled(False):
            table = run_particles(model, guide, (batch,), {}, plan, min(chunk, left))
        left -= chunk
        for source in ("posterior", "prior", "likelihood"):
            for site, term in getattr(table, source).items():
                bad = ~torch.isfinite(term)
                if not bool(bad.any()):
                    continue
                where = _rows_of(bad, batch, rows) if table.local(site) else ""
                return f"site {site!r}: its {source} density is not finite{where}"
    state.restore(before)
    with pyro.validation_enabled(False):
        total, _ = state.loss.loss_and_rows(batch)
    if not bool(torch.isfinite(total)):
        return "the loss is not finite though every site's density is (a rate or a penalty)"
    grads = torch.autograd.grad(total, state.parameters, allow_unused=True)
    stored = pyro.get_param_store().named_parameters()
    names = {id(p): name for name, p in [*stored, *state.loss.named_parameters()]}
    bad_names = [
        names[id(p)]
        for p, grad in zip(state.parameters, grads, strict=True)
        if grad is not None and not bool(torch.isfinite(grad).all())
    ]
    if bad_names:
        return f"the gradient of {', '.join(bad_names[:3])} is not finite"
    return "the optimizer's step left parameters that are not finite; lower the learning rate"


def _rows_of(bad: Tensor, batch: Any, rows: Tensor) -> str:
    """Numbers of the rows in which ``bad``, ``[K, B, *rest]``, is true."""
    per_row = bad.flatten(2).any(2).any(0) if bad.dim() > 2 else bad.any(0)
    index = batch.index if isinstance(batch, Batch) else rows
    if len(index) != len(per_row):  # the program draws rows of its own from the batch
        return ""
    numbers = index[per_row].sort().values.tolist()
    return f" in rows {numbers[:5]}{' and more' if len(numbers) > 5 else ''}"
