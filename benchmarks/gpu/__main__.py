"""Tests, speed and a published result on a GPU, stage by stage.

    python -m benchmarks.gpu --out runs/gpu                 every stage that is not done yet
    python -m benchmarks.gpu --out runs/gpu --stage speed   one of them

Needs no network; data come from PYRO_VAE_DATA. Each stage ends within ``--minutes`` and goes on where
it stopped when it is called again with the same ``--out``, also on another machine to which the folder
was copied. ``stages.json`` in it says what is done, ``STAGE.log`` what was printed; tables are in
benchmarks/results, and copied to the folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer

import torch

from benchmarks.report import RESULTS, machine
from pyro_vae.files import replacing

EPOCHS = 1000

Command = list[str]


def tests(out: Path, minutes: float) -> Command:
    return ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]


def speed(out: Path, minutes: float) -> Command:
    only = ["--only", "steps", "rows", "memory", "first"]
    return ["-m", "benchmarks.speed", "--device", "cuda", "--resume", "--rounds", "7", *only]


def training(out: Path, minutes: float) -> Command:
    place = ["--out", str(out / "training"), "--name", "dynamic_mnist_cuda"]
    length = ["--epochs", str(EPOCHS), "--batch", "100", "--minutes", str(minutes - 1.5)]
    return ["-m", "benchmarks.dynamic_mnist", "--device", "cuda", *place, *length]


STAGES: dict[str, Callable[[Path, float], Command]] = {
    "tests": tests,
    "speed": speed,
    "training": training,
}


def finished(stage: str, out: Path, code: int) -> bool:
    """Whether there is nothing left to do; a training goes on until its result is judged."""
    if stage != "training" or code != 0:
        return code == 0
    rows = json.loads((out / "training" / "rows.json").read_text())
    return all("log_p" in row for row in rows)


def run(stage: str, out: Path, minutes: float) -> dict[str, object]:
    """One stage, its output in a log as well."""
    started = time.monotonic()
    command = [sys.executable, *STAGES[stage](out, minutes)]
    pipe, together = subprocess.PIPE, subprocess.STDOUT
    with (
        open(out / f"{stage}.log", "a") as log,
        subprocess.Popen(command, stdout=pipe, stderr=together, text=True) as process,
    ):
        limit = Timer(60 * minutes, process.terminate)
        limit.start()
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            print(line, end="", flush=True)
        code = process.wait()
        limit.cancel()
    for file in RESULTS.glob("*_cuda.*"):
        shutil.copy(file, out)
    return {
        "done": finished(stage, out, code),
        "code": code,
        "seconds": time.monotonic() - started,
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--minutes", type=float, default=7.5, help="of a stage, at most")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here")
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "stages.json"
    done = json.loads(file.read_text()) if file.exists() else {}
    for stage in [given.stage] if given.stage else STAGES:
        if done.get(stage, {}).get("done"):
            print(f"{stage}: done before")
            continue
        done[stage] = run(stage, given.out, given.minutes)
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(done, indent=2))
    if any(stage["code"] for stage in done.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
