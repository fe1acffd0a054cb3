"""The folder that a run leaves: plain files, each renamed into place, none of which is code."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.batch import Batch, take
from pyro_vae.evaluation.likelihood import device_of, judging
from pyro_vae.objectives.plan import make_plan
from pyro_vae.objectives.swap import owner
from pyro_vae.training.example import example, from_tensors, to_tensors
from pyro_vae.training.state import pack, read_tensors, saving, unpack, write_tensors

if TYPE_CHECKING:
    from pyro_vae.training.fit import Run

__all__ = ["FORMAT", "Folder", "versions"]

Program = Callable[..., Any]
FORMAT = 1
SAVE_EVERY = 1.0  # seconds at least from one state to the next
SAVE_SHARE = 0.05  # of the time at most that goes into saving


class Folder:
    """What one run leaves.

    | file                  | holds                                                              |
    | --------------------- | ------------------------------------------------------------------ |
    | `config.json`         | seeds, sizes, versions, record of the data, how the pair was built |
    | `example.safetensors` | stand-in for the training rows, to rebuild the pair without them   |
    | `state.safetensors`   | all that is needed to go on                                        |
    | `model.safetensors`   | parameters and buffers that were kept                              |
    | `guide.safetensors`   | those of the guide                                                 |
    | `params.safetensors`  | what the pair made by `pyro.param`, if anything, unconstrained     |
    | `history.csv`         | a record an epoch                                                  |
    | `metrics.json`        | what an evaluation found                                           |

    The first three are there from the first step on, the others when the training is over.

    Raises:
        ValueError: a path that can't be a run folder or can't be written, a file that is missing,
            broken or of another format version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._next_save = 0.0
        self._begun: tuple[str, ...] = ()  # files of a run that has not got anywhere yet

    # --- a training writes ----------------------------------------------------------------------

    def claim(self) -> None:
        """See that a run can go here; the folder itself is made when there is something to keep. A
        finished or interrupted run in it is not overwritten."""
        if (self.path / "state.safetensors").exists() or (self.path / "config.json").exists():
            raise ValueError(
                f"{self.path}: holds a run already; use resume to go on, or another folder"
            )
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not there.is_dir():
            why = "File exists" if there == self.path else f"Not a directory: {there}"
            raise ValueError(f"{self.path}: can't make the run folder: {why}")
        if not os.access(there, os.W_OK):
            raise ValueError(f"{self.path}: can't make the run folder: Permission denied: {there}")

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Around a training: what ``begin`` wrote is taken back if it fails before a state is saved.
        One that is interrupted can go on from where it began."""
        there = self.path.exists()
        try:
            yield
        except Exception:
            with suppress(OSError):  # somebody else put something there, too
                for name in self._begun:
                    (self.path / name).unlink(missing_ok=True)
                if self._begun and not there:
                    self.path.rmdir()
            raise

    def begin(
        self, config: dict[str, Any], data: Batch | Tensor, state: dict[str, Any] | None
    ) -> None:
        """Before the first step: all that is known of the run. Whenever it is interrupted from now
        on, it can be resumed and rebuilt.

        Args:
            data: training rows in memory.
            state: where a new run starts; None for one that goes on.
        """
        if state is not None:
            self._begun = ("state.safetensors", "example.safetensors", "config.json")
            self._write_state(state)
        for stray in self.path.glob(".*tmp*"):  # of a process that was killed while it wrote
            stray.unlink(missing_ok=True)
        if not (self.path / "example.safetensors").exists():
            tensors, rest = to_tensors(example(data))
            about = {"format": FORMAT, "versions": versions(), "example": rest}
            write_tensors(self.path / "example.safetensors", tensors, about)
        self.update_config(config)

    def due(self) -> bool:
        """Whether it is time for another state."""
        return time.perf_counter() >= self._next_save

    def save_state(self, state: dict[str, Any]) -> None:
        """All that ``fit`` needs to go on, in one file."""
        since = time.perf_counter()
        self._write_state(state)
        self._begun = ()
        now = time.perf_counter()
        self._next_save = now + max(SAVE_EVERY, (now - since) / SAVE_SHARE)

    def _write_state(self, state: dict[str, Any]) -> None:
        self._make()
        tensors: dict[str, Tensor] = {}
        about = {"format": FORMAT, "versions": versions(), "state": pack(state, tensors)}
        write_tensors(self.path / "state.safetensors", tensors, about)

    def save(self, run: Run, stored: Mapping[str, Tensor] | None = None) -> None:
        """Parameters, history and configuration of a finished run.

        Args:
            stored: what the pair made by ``pyro.param``, unconstrained, by name.
        """
        self._make()
        for name, program in (("model", run.model), ("guide", run.guide)):
            module = owner(program)
            tensors = dict(module.state_dict()) if module is not None else {}
            write_tensors(self.path / f"{name}.safetensors", tensors)
        if stored:
            write_tensors(self.path / "params.safetensors", stored)
        self.write("history.csv", _table(run.history))
        report = {"best": run.best, "stopped": run.stopped, "notes": list(run.notes)}
        self.update_config({**run.config, **report})

    def update_config(self, entries: dict[str, Any]) -> None:
        """Add entries to ``config.json``, with the format version and those of the packages."""
        path = self.path / "config.json"
        config = self.config() if path.exists() else {}
        config |= {"format": FORMAT, "versions": versions(), **entries}
        try:
            text = json.dumps(config, indent=2) + "\n"
        except TypeError as error:
            raise ValueError(f"{path}: {error}, wanted numbers, text, lists and dicts") from None
        self.write("config.json", text)

    def write(self, name: str, text: str) -> None:
        """Write a file of text."""
        self._make()
        with saving(self.path / name) as temporary:
            temporary.write_text(text)

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.path}: can't make the run folder: {error.strerror}") from None

    # --- others read ----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What ``save_state`` saved."""
        return unpack(*self._read_tensors("state"))  # type: ignore[no-any-return]

    def example(self) -> Any:
        """Rows that stand in for the training rows where a pair is built: a Batch or a tensor."""
        rest, tensors = self._read_tensors("example")
        return from_tensors(tensors, rest)

    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        path = self.path / "config.json"
        try:
            config = json.loads(self._read_text("config.json"))
        except ValueError as error:
            if not isinstance(error, json.JSONDecodeError):
                raise
            raise ValueError(f"{path}: not readable as JSON, or cut off ({error})") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path}: came a {type(config).__name__}, wanted a JSON object")
        self._check_format(path, config)
        return config

    def history(self) -> list[dict[str, float]]:
        """The record of each epoch, as in ``Run.history``."""
        text = self._read_text("history.csv")
        head, *rows = list(csv.reader(io.StringIO(text))) or [[]]
        try:
            if not text.endswith("\n"):
                raise ValueError("the last line is cut off")
            return [
                {name: _number(entry) for name, entry in zip(head, row, strict=True) if entry}
                for row in rows
            ]
        except ValueError as error:
            raise ValueError(f"{self.path / 'history.csv'}: not a history: {error}") from None

    def load_into(self, model: Program, guide: Program) -> None:
        """Put the saved parameters into a pair that was built like the run's.

        Modules take theirs. What the pair makes by ``pyro.param`` (and all that functions have)
        goes into Pyro's parameter store: the pair is run once on the example, which makes the
        parameters with their constraints, and then they take the saved values.

        Raises:
            ValueError: the run is not finished, or of another pair.
        """
        for name, program in (("model", model), ("guide", guide)):
            path = self.path / f"{name}.safetensors"
            if not path.exists() and (self.path / "state.safetensors").exists():
                raise ValueError(
                    f"{path}: no such file: the run is not finished; go on by resume=True"
                )
            tensors, _ = read_tensors(path)
            module = owner(program)
            try:
                (nn.Module() if module is None else module).load_state_dict(tensors)
            except RuntimeError as error:
                lines = [line.strip() for line in str(error).splitlines()]
                raise ValueError(f"{path}: not of this pair: {' '.join(lines[1:3])}") from None
        if (self.path / "params.safetensors").exists():
            self._load_stored(model, guide)

    def _load_stored(self, model: Program, guide: Program) -> None:
        path = self.path / "params.safetensors"
        saved, _ = read_tensors(path)
        config, rows = self.config(), self.example()
        number = min(config["batch_size"], config["rows"])  # as many as when they were made
        rows = take(rows, torch.arange(number) % len(rows)).to(device_of(model, guide, rows))
        with _replaced(saved), judging(model, guide, 0):
            try:
                make_plan(model, guide, (rows,), {})
            except Exception as error:
                raise ValueError(
                    f"{path}: not of this pair: it does not run on the run's example: {error}"
                ) from error
            made = dict(pyro.get_param_store().named_parameters())
            for name, value in saved.items():
                came = list(made[name].shape) if name in made else "none"
                if came != list(value.shape):
                    raise ValueError(
                        f"{path}: not of this pair: parameter {name!r} {list(value.shape)}, the pair "
                        f"has {came}"
                    )
                made[name].copy_(value)

    def _read_text(self, name: str) -> str:
        path = self.path / name
        if not path.is_file():
            raise ValueError(f"{path}: no such file; is {self.path} a run folder?")
        try:
            return path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not readable ({error})") from None

    def _read_tensors(self, part: str) -> tuple[Any, dict[str, Tensor]]:
        """What a file says besides its tensors, and those."""
        path = self.path / f"{part}.safetensors"
        tensors, about = read_tensors(path)
        about = about if isinstance(about, dict) else {}
        self._check_format(path, about)
        if part not in about:
            raise ValueError(f"{path}: not the {part} of a run")
        return about[part], tensors

    def _check_format(self, path: Path, about: Mapping[str, Any]) -> None:
        if (came := about.get("format")) != FORMAT:
            by = (about.get("versions") or {}).get("pyro_vae", "unknown")
            raise ValueError(
                f"{path}: run format {came!r}, written by pyro_vae {by}; pyro_vae "
                f"{versions()['pyro_vae']} reads {FORMAT}: use the version that wrote the run"
            )


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    try:
        own = version("pyro-vae")
    except PackageNotFoundError:  # run from a checkout that is not installed
        own = "source"
    return {"pyro_vae": own, "torch": torch.__version__, "pyro": pyro.__version__}


@contextmanager
def _replaced(names: Iterable[str]) -> Iterator[None]:
    """Let parameters of these names be made anew (``pyro.module`` would leave a module that is not
    the one in the store as it is); an error puts the old ones back."""
    store = pyro.get_param_store()
    before = store.get_state()
    for name in names:
        if name in store:
            del store[name]
    try:
        yield
    except BaseException:
        store.clear()
        store.set_state(before)
        raise


def _table(history: list[dict[str, float]]) -> str:
    names = list(dict.fromkeys(name for record in history for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()


def _number(entry: str) -> float:
    return int(entry) if entry.isdigit() else float(entry)
