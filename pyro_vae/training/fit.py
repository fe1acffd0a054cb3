"""The training loop, to be read from top to bottom."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae.batch import Batch, still, take
from pyro_vae.compiled import Fast, Step, in_precision, make_step
from pyro_vae.evaluation.likelihood import Evaluation, check_rows, evaluate
from pyro_vae.objectives.loss import Loss, ObjectiveModule
from pyro_vae.objectives.recipes import elbo
from pyro_vae.objectives.support import check_data
from pyro_vae.objectives.swap import evaluating, own_parameters, owner, preserved
from pyro_vae.training.epochs import Epochs
from pyro_vae.training.nonfinite import NonFiniteError, explain
from pyro_vae.training.prefetch import placed
from pyro_vae.training.progress import Progress
from pyro_vae.training.runs import Folder

__all__ = ["NonFiniteError", "Run", "device_for", "fit"]

Program = Callable[..., Any]
Callback = Callable[["Run", dict[str, float]], None]
CHECK_EVERY = 100  # steps between looks at the loss, each of which waits for the device
LOOK = 10_000  # rows of a data set that is larger than the device
SAME = ("seed", "rows", "batch_size", "accumulate", "precision", "ema")  # in a run that goes on


@dataclass(repr=False)
class Run:
    """What ``fit`` leaves.

    Attributes:
        model: trained in place; at its best step if there was a validation set.
        guide: likewise.
        objective: what was optimised; its repr, in a run that ``load`` read.
        history: a record an epoch: step, epoch, seconds, loss and valid in nats per row, lr.
        config: seeds, sizes, versions.
        best: the record of the parameters that were kept.
        stopped: why training ended, ``"epochs"``, ``"steps"``, ``"patience"``, ``"callback"`` or
            ``"non-finite"``.
        notes: what the objective had to say about the pair.
    """

    model: Program
    guide: Program
    objective: Loss | str | None
    history: list[dict[str, float]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    stopped: str = ""
    notes: tuple[str, ...] = ()

    @property
    def level(self) -> str:
        """At which level most steps were taken, and why not at a higher one; see ``make_step``."""
        return str(self.config.get("level", ""))

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
        """``evaluate(run.model, run.guide, data, ...)``.

        Raises:
            ValueError: rows that are not standardized as the training rows were.
        """
        _check_scaled(self.config.get("data") or {}, data)
        return evaluate(self.model, self.guide, data, num_particles, **options)


def _check_scaled(record: Mapping[str, Any], data: Any) -> None:
    """Refuse rows in other units than those that a run was trained in."""

    def scaling(of: Mapping[str, Any], sites: Iterable[str]) -> list[Any]:
        steps = [step for step in of.get("steps", ()) if step["step"] == "standardize"]
        return [[s["mean"], s["scale"]] for s in steps if s["site"] in sites]

    if not isinstance(data, Batch):
        return
    if scaling(record, data.sites) != scaling(data.record, data.sites):
        raise ValueError(
            "evaluate: the run was trained on rows that were standardized otherwise than these; wanted "
            'pyro_vae.data.standardize_as(run.config["data"], rows)'
        )


def fit(
    model: Program,
    guide: Program,
    data: Batch | Tensor,
    objective: Loss | None = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 100,
    accumulate: int = 1,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    clip: float | None = None,
    precision: str = "full",
    compile: str = "auto",
    valid: Batch | Tensor | None = None,
    monitor: Loss | None = None,
    patience: int | None = None,
    ema: float | None = None,
    callbacks: Iterable[Callback] = (),
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
    resume: bool = False,
    note: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Run:
    """Train a model and a guide under an objective.

    Losses are in nats per row. The odd last rows of an epoch are used, not dropped. With ``valid``
    the best parameters so far are kept, judged by ``monitor`` and not by what is optimised.

    Args:
        data: training rows, as the programs take them.
        objective: default ``elbo()``.
        epochs: length of the training in passes over the data, or
        steps: in steps of the optimizer; one of the two.

        batch_size: rows of a batch.
        accumulate: batches of a step, which takes the gradient of the mean over all their rows. The
            rows of a step are in memory together, activations and gradients those of one batch.
            What looks across the rows of a batch (BatchNorm, a penalty on the aggregate posterior)
            sees ``batch_size`` of them.
        optimizer: parameters -> torch optimizer, default ``Adam(lr=1e-3, fused=True)``:
            ``functools.partial(torch.optim.SGD, lr=0.1)``.
        scheduler: optimizer -> torch learning-rate scheduler, stepped every step.
        clip: largest norm of the gradient of the loss per row.
        precision: ``"bf16"`` computes matrix products in bfloat16, where the hardware is faster at it,
            namely those of linear, convolutional, recurrent and attention layers, and all else as in
            ``"full"``: nonlinearities, parameters, optimizer, log densities and their sums, and what
            judges ``valid``. The noise that it adds to a loss is far below that of the draws.
        compile: ``"eager"``, ``"traced"``, ``"compiled"`` or ``"auto"``, which compiles if the steps
            repay it, see ``compiled.make_step``; ``run.level`` says what came of it, and why.

        valid: held-out rows. With row weights w, bounds here and in the loss are the sum of w times
            a row's bound, divided by the number of rows.
        monitor: the bound to select by, default the ELBO at beta = 1 with 8 particles.
        patience: epochs without improvement on ``valid`` after which training stops.
        ema: decay of an exponential moving average of the parameters, 0.999 say, which is min(ema,
            (1 + t) / (10 + t)) at step t. It is the averaged parameters that ``valid`` judges, that
            callbacks see, and that are kept and left in the pair. Parameters with a constraint are
            averaged unconstrained; buffers (running statistics) are those of the last step.
        callbacks: called with the run and the record after every epoch; one that raises
            ``StopIteration`` ends the training.

        seed: of shuffling and draws; the global random state is left as it was.
        device: ``"auto"`` takes CUDA where available; functions, whose tensors can't be moved, stay
            with the data.
        out: folder that receives the run, from the first step on (see ``Folder``).
        resume: go on from the state in ``out``, exactly where it stopped.
        note: further entries of the run's ``config.json``, in JSON's types.
        progress: show a progress bar (default: if the terminal can).

    Raises:
        ValueError: bad arguments, a pair that the objective can't train, a folder that can't be
            written.
        NonFiniteError: NaN or inf in a loss, naming the site and the rows; the pair is left in its
            last good state (not averaged).
    """
    check_rows("fit: data", data)
    objective = objective or elbo()
    monitor = monitor or elbo(num_particles=8, estimator="score")
    callbacks = list(callbacks) if isinstance(callbacks, Iterable) else [None]
    _check_numbers(epochs, steps, batch_size, accumulate, patience, clip, ema)
    _check(objective, monitor, patience, valid, callbacks, resume, out)
    place = device_for(device, model, guide, data)
    folder = None if out is None else Folder(out)
    saved = folder.state() if folder is not None and resume else None
    if folder is not None and not resume:
        folder.claim()

    data = placed(data, place)
    valid = None if valid is None else still(valid).to(place)
    rows = Epochs(data, batch_size, accumulate, seed, place)
    length = steps or (epochs or 0) * len(rows)
    loss = objective(model, guide).to(place)
    loss.train()
    config = {
        **(note or {}),
        "seed": seed,
        "rows": len(data),
        "batch_size": batch_size,
        "accumulate": accumulate,
        "precision": precision,
        "ema": ema,
        "steps": length,
        "objective": repr(objective),
        "device": str(place),
        **_told(model, data),
    }
    run = Run(model, guide, objective, config=config)
    bar = tqdm(total=length, unit="step", disable=None if progress is None else not progress)
    attempt = nullcontext() if folder is None else folder.attempt()
    with attempt, bar, own_parameters(model, guide), torch.random.fork_rng():
        torch.manual_seed(seed)
        first = take(data, slice(0, batch_size)).to(place)
        plan = objective.plan(model, guide, (first,), {})
        seen = data.look() if isinstance(data, Batch) else data
        if seen.device != place:  # what stays on the host is looked at in part
            seen = take(seen, slice(0, LOOK)).to(place)
        for part in (seen, valid.look() if isinstance(valid, Batch) else valid):
            check_data(plan.supports, part)
        run.notes = plan.notes
        parameters, stored = _materialize(loss, first)
        optim = _optimizer(optimizer, parameters)
        schedule = _scheduler(scheduler, optim)
        step = make_step(
            *(loss, parameters, optim, schedule, clip, compile, precision),
            steps=_steps(rows, length),
            other=lambda number: take(data, _spread(number, data)).to(place),
        )
        same = {name: config[name] for name in SAME}
        state = Progress(loss, parameters, stored, optim, schedule, ema, same)
        bound = partial(monitor.rows, model, guide)
        judge = Fast(bound, compile, math.ceil(length / len(rows)))
        if valid is not None:  # what the monitor refuses it should refuse now
            _held_out(bound, loss, take(valid, slice(0, 2)), batch_size, seed)
        if saved is not None:
            state.load(saved, str(out))
            run.history, run.best = saved["history"], saved["best"]
            run.stopped = "patience" if _waited(run, patience) else ""
            bar.update(state.step)
        if folder is not None:
            folder.begin(config, seen, _dump(state, run) if saved is None else None)

        good = state.snapshot()
        since = time.perf_counter() - (run.history[-1]["seconds"] if run.history else 0.0)
        while (state.step < length or state.rows) and not run.stopped:
            epoch = state.step // len(rows)
            with pyro.validation_enabled(False):
                for numbers, batches in islice(rows.steps(state.step), max(0, length - state.step)):
                    try:
                        loss_now = step(*batches)
                    except (
                        RuntimeError,
                        ValueError,
                    ):  # NaN in a parameter is an error to some draws
                        if state.healthy(state.total):
                            raise
                        break
                    state.total = torch.add(state.total, loss_now, alpha=len(numbers))
                    state.rows += len(numbers)
                    state.advance()
                    bar.update()
                    if state.step % CHECK_EVERY == 0:
                        if not state.healthy(state.total):
                            break
                        good = state.snapshot()
                        bar.set_postfix_str(_postfix(state, run.history), refresh=False)
                        if folder is not None and folder.due():
                            folder.save_state(_dump(state, run))
            if not state.healthy(state.total):
                problem = explain(state, good, step, rows, partial(in_precision, precision, place))
                run.stopped, problem.run = "non-finite", run
                raise problem
            if folder is not None and state.step % len(rows):  # a longer run goes on from here
                folder.save_state(_dump(state, run))
            record = {
                "step": state.step,
                "epoch": epoch + 1,
                "seconds": time.perf_counter() - since,
                "loss": float(state.total) / state.rows,
                "lr": float(optim.param_groups[0]["lr"]),
            }
            state.total, state.rows = torch.zeros_like(state.total), 0
            _tell(run, step, bar)
            with state.averaged():
                if valid is not None:
                    record["valid"] = _held_out(judge, loss, valid, batch_size, seed)
                run.history.append(record)
                if _improves(record, run.best):
                    run.best = record
                    state.best = state.parameters_now() if valid is not None else {}
                run.stopped = _call(callbacks, run, record)
            if callbacks:
                step.doubt()
                judge.doubt()
            if not run.stopped and _waited(run, patience):
                run.stopped = "patience"
            good = state.snapshot()
            ends = bool(run.stopped) or state.step >= length
            if folder is not None and state.step % len(rows) == 0 and (ends or folder.due()):
                folder.save_state(_dump(state, run))
        run.stopped = run.stopped or ("steps" if steps else "epochs")
        state.settle()
        if folder is not None:
            folder.save(run, stored)
    return run


def _check_numbers(
    epochs: Any, steps: Any, batch_size: Any, accumulate: Any, patience: Any, clip: Any, ema: Any
) -> None:
    if (epochs is None) == (steps is None):
        raise ValueError(f"fit: came epochs={epochs} and steps={steps}, wanted one of them")
    counts = {"epochs": epochs, "steps": steps, "batch_size": batch_size, "patience": patience}
    for name, number in {**counts, "accumulate": accumulate}.items():
        optional = name not in ("batch_size", "accumulate") and number is None
        if not optional and (not isinstance(number, int) or number < 1):
            raise ValueError(f"fit: came {name}={number!r}, wanted a whole number >= 1")
    for name, number, limit in (("clip", clip, math.inf), ("ema", ema, 1.0)):
        if number is not None and not (isinstance(number, int | float) and 0 < number < limit):
            below = "" if limit == math.inf else f" and < {limit:g}"
            raise ValueError(f"fit: came {name}={number!r}, wanted a number > 0{below}")


def _check(
    objective: Any,
    monitor: Any,
    patience: int | None,
    valid: Any,
    callbacks: list[Any],
    resume: bool,
    out: str | Path | None,
) -> None:
    for name, value in (("objective", objective), ("monitor", monitor)):
        if not isinstance(value, Loss):
            raise ValueError(
                f"fit: {name} came as {type(value).__name__}, wanted an Objective such as elbo()"
            )
    if patience is not None and valid is None:
        raise ValueError("fit: came patience without valid, wanted held-out rows to judge by")
    if valid is not None:
        check_rows("fit: valid", valid)
    if not all(map(callable, callbacks)):
        raise ValueError("fit: callbacks: wanted a list of functions of the run and the record")
    if resume and out is None:
        raise ValueError("fit: came resume=True without out, wanted the folder of the run")


def device_for(device: str, model: Program, guide: Program, data: Batch | Tensor) -> torch.device:
    """The device that ``device=`` stands for.

    Raises:
        ValueError: one that does not work here.
    """
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


def _told(model: Program, data: Batch | Tensor) -> dict[str, Any]:
    """What the data say of themselves, and the pair of how it was built."""
    module = owner(model)
    built_by = getattr(model if module is None else module, "built_by", None)
    told = {"data": data.record if isinstance(data, Batch) else None, "pair": built_by}
    return {name: value for name, value in told.items() if value is not None}


def _optimizer(make: Any, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    make = make or partial(torch.optim.Adam, lr=1e-3, fused=True)
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


def _materialize(
    loss: ObjectiveModule, batch: Any
) -> tuple[list[nn.Parameter], dict[str, nn.Parameter]]:
    """All parameters of a pair, after one run in which lazy modules and ``pyro.param`` make theirs;
    and those that no module holds, by name."""
    model, guide = loss.model, loss.guide
    with preserved(model, guide), poutine.trace(param_only=True) as traced:
        total = loss.elbo.differentiable_loss(model, guide, batch)
    nodes: dict[str, Any] = traced.trace.nodes
    met = {name: node["value"].unconstrained() for name, node in nodes.items()}
    unique = {id(p): p for p in [*loss.parameters(), *met.values()] if p.requires_grad}
    if not unique:
        raise ValueError("fit: model and guide have no parameters to train")
    leaves = {id(leaf): leaf for leaf in _leaves(total)}
    if strays := [leaf for key, leaf in leaves.items() if key not in unique]:
        idle = [name for name, p in met.items() if "$$$" in name and id(p) not in leaves]
        cure = (
            f"pyro.module({idle[0].partition('$$$')[0]!r}, ...) found another module of that name: call "
            "pyro.clear_param_store() between pairs"
            if idle
            else "make it an nn.Parameter, keep its module as an attribute (lists as nn.ModuleList), or "
            "register it by pyro.module"
        )
        raise ValueError(
            f"fit: a tensor {list(strays[0].shape)} wants a gradient and belongs to no parameter of "
            f"model, guide or objective, so it would not be trained; {cure}"
        )
    held = {id(p) for p in loss.parameters()}
    stored = {name: p for name, p in met.items() if p.requires_grad and id(p) not in held}
    return list(unique.values()), stored


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


def _steps(rows: Epochs, length: int) -> dict[int, int]:
    """Rows of a step -> number of such steps in a training."""
    full = rows.batch_size * rows.accumulate
    whole, rest = divmod(len(rows.data), full)
    epochs = math.ceil(length / len(rows))
    return {full: min(whole * epochs, length), rest: epochs}


def _spread(number: int, data: Batch | Tensor) -> Tensor:
    """Numbers of rows from everywhere in the data."""
    return torch.arange(number, device=data.device) * len(data) // number


def _tell(run: Run, step: Step, bar: Any) -> None:
    """Say once at which level the steps are taken, and why."""
    if run.level != (level := f"{step.level}{': ' if step.reason else ''}{step.reason}"):
        run.config["level"] = level
        if not bar.disable:
            bar.write(level, file=sys.stderr)


def _dump(state: Progress, run: Run) -> dict[str, Any]:
    """All that ``resume`` needs."""
    return state.dump() | {"history": run.history, "best": run.best}


def _held_out(
    bound: Callable[[Any], Tensor],
    loss: ObjectiveModule,
    valid: Batch | Tensor,
    batch_size: int,
    seed: int,
) -> float:
    """Mean bound on the validation rows, always with the same draws, row weights as in the loss: nats
    per row."""
    with evaluating(loss), preserved(loss), pyro.validation_enabled(False), torch.no_grad():
        torch.manual_seed(seed)
        parts = torch.arange(len(valid), device=loss.step.device).split(max(batch_size, 500))
        bounds = [bound(take(valid, rows)) for rows in parts]
    weights = valid.weights if isinstance(valid, Batch) else None
    return float((torch.cat(bounds) * (1.0 if weights is None else weights)).mean())


def _improves(record: dict[str, float], best: dict[str, float]) -> bool:
    if "valid" not in record:
        return True  # nothing to choose by: the last is kept
    return not best or record["valid"] > best["valid"] or math.isnan(best["valid"])


def _waited(run: Run, patience: int | None) -> bool:
    """Whether the last ``patience`` epochs brought nothing."""
    if patience is None or not run.history:
        return False
    return run.history[-1]["epoch"] - run.best["epoch"] >= patience


def _call(callbacks: list[Any], run: Run, record: dict[str, float]) -> str:
    """Call them; why training ends, if one of them says so."""
    try:
        for callback in callbacks:
            callback(run, record)
    except StopIteration:
        return "callback"
    return ""


def _postfix(state: Progress, history: list[dict[str, float]]) -> str:
    valid = f", valid {history[-1]['valid']:.2f}" if history and "valid" in history[-1] else ""
    return f"loss {float(state.total) / state.rows:.2f}{valid}"
