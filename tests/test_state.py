"""Nested states as flat files without code in them."""

from __future__ import annotations

import errno
import math
import os
import pickle
import resource
import signal
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.training import state as state_module
from pyro_vae.training.state import pack, read_tensors, unpack, write_tensors


def equal(a: Any, b: Any) -> bool:
    """Equal values, types, dtypes and key types; tuples count as lists."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        same = isinstance(b, dict) and [*map(repr, a)] == [*map(repr, b)]
        return same and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def through_file(value: Any, path: Path) -> Any:
    tensors: dict[str, Tensor] = {}
    meta = pack(value, tensors)
    write_tensors(path, tensors, meta)
    tensors, meta = read_tensors(path)
    return unpack(meta, tensors)


STATES: dict[str, Any] = {
    "numbers": {"a": 1, "b": 0.1, "c": True, "d": None, "e": "text", "f": 10**30},
    "no numbers": [math.inf, -math.inf, math.nan],
    "integer keys": {0: "zero", "0": "text", 1: {2: torch.ones(2)}},
    "empty": [{}, [], (), torch.zeros(0), ""],
    "nested": {"a": [{"b": (torch.arange(3), 2)}, [torch.ones(2, 2)]]},
    "dtypes": [
        torch.tensor(2.5),
        torch.tensor([True, False]),
        torch.arange(3, dtype=torch.uint8),
        torch.ones(2, dtype=torch.bfloat16),
    ],
    "not contiguous": torch.arange(6.0).reshape(2, 3).T,
    "one tensor twice": [torch.ones(3)] * 2,
    "views": list(torch.arange(6.0).split(2)),
    "paths that look alike": {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}},
    "words of the format": {"tensor": "x", "list": [1], "dict": {"dict": 2}},
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_comes_back(name: str, tmp_path: Path):
    state = STATES[name]
    assert equal(state, through_file(state, tmp_path / "state"))


def lbfgs_state() -> Any:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.LBFGS([weight])

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.pow(4).sum()
        loss.backward()
        return loss  # type: ignore[return-value]

    optimizer.step(closure)
    return optimizer.state_dict()


def adam_state() -> Any:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([{"params": [weight], "lr": torch.tensor(0.1)}], amsgrad=True)
    weight.sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def scheduler_state() -> Any:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    schedulers = torch.optim.lr_scheduler
    parts = [
        schedulers.LinearLR(optimizer),
        schedulers.MultiStepLR(optimizer, [2, 4]),
        schedulers.LambdaLR(optimizer, lambda step: 0.9**step),
    ]
    return schedulers.SequentialLR(optimizer, parts, [1, 2]).state_dict()


@pytest.mark.parametrize("make", [lbfgs_state, adam_state, scheduler_state])
def test_states_of_optimizers_and_schedulers(make: Any, tmp_path: Path):
    assert equal(make(), through_file(make(), tmp_path / "state"))


@pytest.mark.parametrize(
    "value", [object(), {"a": print}, [np.zeros(2)], {(1, 2): 3}, {1.5: 2}, 1j], ids=range(6)
)
def test_what_would_need_pickling_is_refused(value: Any):
    with pytest.raises(ValueError, match="pickling"):
        pack(value, {}, "state")


def test_files_have_the_usual_permissions(tmp_path: Path):
    usual = tmp_path / "usual"
    usual.touch()
    write_tensors(tmp_path / "tensors", {"a": torch.ones(2)})
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert len(modes) == 1


def test_tensors_that_share_memory(tmp_path: Path):
    weight = torch.arange(4.0)
    write_tensors(tmp_path / "file", {"a": weight, "b": weight, "c": weight[1:]}, {"k": [1]})
    tensors, meta = read_tensors(tmp_path / "file")
    assert [tensors[name].tolist() for name in "abc"] == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3]]
    assert meta == {"k": [1]}


@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "text", "folder"])
def test_a_broken_file_is_named(damage: str, tmp_path: Path):
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.ones(100)})
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "cut off": content[:-9], "text": b"x" * 99}[damage])
    with pytest.raises(ValueError, match=str(path)):
        read_tensors(path)


PICKLES = {
    "torch.save": lambda path: torch.save({"a": torch.ones(3)}, path),
    "torch.save of old": lambda path: torch.save(
        {"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False
    ),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Trap(path.with_name("sprung")))),
}


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_is_told_and_not_opened(kind: str, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    PICKLES[kind](path)
    with pytest.raises(
        ValueError, match=r"model\.safetensors: came a file of torch\.save or pickle"
    ):
        read_tensors(path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One line, and what was there is there."""
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.ones(2)})

    def full(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half of")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state_module, "save_file", full)
    message = "file: can't be written: No space left on device; what was saved before is kept"
    with pytest.raises(ValueError, match=message):
        write_tensors(path, {"a": torch.zeros(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert read_tensors(path)[0]["a"].tolist() == [1, 1]


def test_a_file_that_grows_too_large(tmp_path: Path):
    """The same from the operating system, through the writer of the tensors."""
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.ones(2)})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"file: can't be written: .*File too large"):
            write_tensors(path, {"a": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert read_tensors(path)[0]["a"].tolist() == [1, 1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=r"file: can't be written: .*Permission denied"):
        write_tensors(tmp_path / "file", {"a": torch.zeros(2)})
    tmp_path.chmod(0o700)
