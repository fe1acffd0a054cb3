"""Does a run that is killed at any instant go on to exactly where it would have come?

Every run is ended by SIGKILL one to three times at random instants, many of which fall into the
writing of a file (the writer dawdles, in the processes of this benchmark alone), and goes on in
another process that starts from other parameters. What it leaves is compared bit by bit with a run
that nobody touched.

    python -m benchmarks.interrupted
"""

from __future__ import annotations

import argparse
import functools
import importlib
import math
import os
import random
import signal
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyro_vae as pv
from benchmarks.report import write
from pyro_vae.training import runs, state
from pyro_vae.training.runs import Folder

EPOCHS = 12
LATEST = 0.8  # of the time of a run, at which it may be killed
DAWDLE = 0.03  # seconds in which a file is half written, and again in which it is not renamed yet
SHOWN = ("killed", "in a write", "resumed", "begun anew", "equal")


@functools.cache
def rows() -> tuple[pv.Batch, ...]:
    return pv.data.split(pv.data.load("digits_binary", "train", ["x"]), (0.8, 0.2))


def train(out: Path, start: int) -> None:
    """Begin a run or go on with it. All that a state may hold is in it: moments, an average, a
    schedule, dropout, best parameters, several batches a step."""
    vars(runs).update(SAVE_EVERY=0.0, SAVE_SHARE=math.inf)  # a state every epoch
    vars(state).update(save_file=functools.partial(slowly, vars(state)["save_file"]))
    train, valid = rows()
    resume = (out / "state.safetensors").exists()
    torch.manual_seed(start if resume else 0)
    model, guide = pv.pairs.vae(train, latent=4, hidden=(32,), net=dropped)
    pv.fit(
        *(model, guide, train, pv.objectives.beta_vae(pv.objectives.linear(60))),
        epochs=EPOCHS,
        batch_size=50,
        accumulate=2,
        ema=0.9,
        clip=10.0,
        optimizer=functools.partial(torch.optim.Adam, lr=3e-3),
        scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=50, gamma=0.7),
        valid=valid,
        out=out,
        resume=resume,
        progress=False,
    )


def dropped(*shapes: Any) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Dropout(0.1), pv.nn.dense(*shapes))


def slowly(save_file: Any, tensors: dict[str, Tensor], path: Path, metadata: Any) -> None:
    save_file(tensors, path, metadata)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    time.sleep(DAWDLE)
    path.write_bytes(content)
    time.sleep(DAWDLE)


def begin(out: Path, start: int) -> int:
    """The number of a process that trains. Forked from this one, which never trains, so that all it
    shares with other processes is what was imported."""
    number = os.fork()
    if number == 0:
        try:
            train(out, start)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return number


def ended(process: int) -> int:
    """How a process ended: its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def finish(out: Path, start: int) -> float:
    """Seconds that it took."""
    since = time.perf_counter()
    if code := ended(begin(out, start)):
        raise RuntimeError(f"a run ended with exit code {code}")
    return time.perf_counter() - since


def left(out: Path) -> Any:
    """Parameters, averages, moments, history: all but what time it was."""
    saved = Folder(out).state()
    for record in [*saved["history"], saved["best"]]:
        record.pop("seconds")
    tensors: dict[str, Tensor] = {}
    said = state.pack(saved, tensors)
    for name in ("model", "guide"):
        kept, _ = state.read_tensors(out / f"{name}.safetensors")
        tensors |= {f"{name}/{key}": value for key, value in kept.items()}
    return said, tensors


def equal(a: Any, b: Any) -> bool:
    (said, mine), (also, theirs) = a, b
    return (
        said == also
        and mine.keys() == theirs.keys()
        and all(torch.equal(mine[name], theirs[name]) for name in mine)
    )


def trial(out: Path, kills: int, longest: float, chance: random.Random) -> dict[str, int]:
    """Kill a run, let it go on, and again; then let it finish."""
    counts = dict.fromkeys(SHOWN, 0)
    for start in range(kills + 1):
        if start:
            again = (out / "state.safetensors").exists()
            counts["resumed" if again else "begun anew"] += 1
        if start == kills:
            finish(out, start)
            break
        process = begin(out, start)
        time.sleep(chance.uniform(0.0, longest / kills))
        os.kill(process, signal.SIGKILL)
        if ended(process) == -signal.SIGKILL:  # else it had finished
            counts["killed"] += 1
            counts["in a write"] += any(out.glob(f".*.{process}.tmp*"))
    return counts


def measure(trials: int, seed: int, folder: Path) -> list[dict[str, int]]:
    """A record of each trial."""
    torch.set_num_threads(1)
    rows()
    importlib.import_module("torch._dynamo")  # which every process would do when it makes Adam
    chance, records = random.Random(seed), []
    longest = LATEST * finish(folder / "whole", 0)
    whole = left(folder / "whole")
    for number in range(trials):
        out = folder / str(number)
        counts = trial(out, 1 + number % 3, longest, chance)
        records.append(counts | {"equal": int(equal(left(out), whole))})
    return records


def table(records: list[dict[str, int]]) -> str:
    total = {name: sum(record[name] for record in records) for name in SHOWN}
    head = "run  " + "  ".join(SHOWN)
    lines = [head, "-" * len(head)]
    for number, record in enumerate([*records, total]):
        row = "  ".join(f"{record[name]:>{len(name)}}" for name in SHOWN)
        lines.append(f"{number if record is not total else 'all':>3}  {row}")
    return "\n".join(
        [
            *lines,
            "",
            f"{total['equal']} of {len(records)} equal: the last state (parameters, average, moments, "
            "history) and the kept parameters, bit by bit,",
            f"after {total['killed']} kills, {total['in a write']} of them inside a write, and "
            f"{total['resumed']} resumes",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        records = measure(given.trials, given.seed, Path(folder))
    settings = {"trials": given.trials, "seed": given.seed, "epochs": EPOCHS}
    write("interrupted", settings, records, table(records))


if __name__ == "__main__":
    main()
