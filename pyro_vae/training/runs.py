"""The folder that a run leaves: plain files, each renamed into place, none of which is code."""

from __future__ import annotations

import csv
import io
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.objectives.swap import owner
from pyro_vae.training.state import pack, read_tensors, replacing, unpack, write_tensors

if TYPE_CHECKING:
    from pyro_vae.training.fit import Run

__all__ = ["FORMAT", "Folder", "versions"]

FORMAT = 1


class Folder:
    """``config.json``, ``model.safetensors``, ``guide.safetensors``, ``history.csv``, ``metrics.json``
    and ``state.safetensors`` of one run.

    Raises:
        ValueError: a path that can't be a run folder, a file that is missing, broken or of another
            format version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

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

    def save_state(self, state: dict[str, Any]) -> None:
        """All that ``fit`` needs to go on, in one file."""
        self.path.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        meta = pack(state, tensors)
        write_tensors(self.path / "state.safetensors", tensors, {"format": FORMAT, "state": meta})

    def state(self) -> dict[str, Any]:
        """What ``save_state`` saved."""
        tensors, meta = read_tensors(self.path / "state.safetensors")
        self._check_format(meta.get("format") if isinstance(meta, dict) else None)
        return unpack(meta["state"], tensors)  # type: ignore[no-any-return]

    def save(self, run: Run) -> None:
        """Parameters, history and configuration of a finished run."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name, program in (("model", run.model), ("guide", run.guide)):
            module = owner(program)
            tensors = dict(module.state_dict()) if module is not None else {}
            if module is None:
                tensors = {k: v.detach() for k, v in pyro.get_param_store().named_parameters()}
            write_tensors(self.path / f"{name}.safetensors", tensors)
        self.write("history.csv", _table(run.history))
        report = {"best": run.best, "stopped": run.stopped, "notes": list(run.notes)}
        self.update_config({**run.config, **report})

    def update_config(self, entries: dict[str, Any]) -> None:
        """Add entries to ``config.json``, with the format version and those of the packages."""
        config = self.config() if (self.path / "config.json").exists() else {}
        config |= {"format": FORMAT, "versions": versions(), **entries}
        self.write("config.json", json.dumps(config, indent=2) + "\n")

    def config(self) -> dict[str, Any]:
        path = self.path / "config.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; is {self.path} a run folder?")
        try:
            config = json.loads(path.read_text())
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: not readable as JSON ({error})") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path}: came a {type(config).__name__}, wanted a JSON object")
        self._check_format(config.get("format"))
        return config

    def load_into(self, model: nn.Module, guide: nn.Module) -> None:
        """Put the saved parameters into a pair that was built like the run's."""
        for name, module in (("model", model), ("guide", guide)):
            path = self.path / f"{name}.safetensors"
            tensors, _ = read_tensors(path)
            try:
                module.load_state_dict(tensors)
            except RuntimeError as error:
                lines = [line.strip() for line in str(error).splitlines()]
                raise ValueError(f"{path}: not of this pair: {' '.join(lines[1:3])}") from None

    def write(self, name: str, text: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with replacing(self.path / name) as temporary:
            temporary.write_text(text)

    def _check_format(self, came: Any) -> None:
        if came != FORMAT:
            raise ValueError(
                f"{self.path}: run format {came!r}, this version of pyro_vae reads {FORMAT}"
            )


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    try:
        own = version("pyro-vae")
    except PackageNotFoundError:  # run from a checkout that is not installed
        own = "source"
    return {"pyro_vae": own, "torch": torch.__version__, "pyro": pyro.__version__}


def _table(history: list[dict[str, float]]) -> str:
    names = list(dict.fromkeys(name for record in history for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()
