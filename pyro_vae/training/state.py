"""Everything a training run carries from step to step, as one flat file without code in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyro_vae.files import replacing

__all__ = ["pack", "read_tensors", "saving", "unpack", "write_tensors"]


def pack(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """A nested state dict as JSON, its tensors moved to ``tensors`` under a number and their path.

    Raises:
        ValueError: something that is neither tensor, number, text, list nor dict.
    """
    if isinstance(value, Tensor):
        name = f"{len(tensors)}{path}"  # a path alone may occur twice: {"a/b": _, "a": {"b": _}}
        tensors[name] = value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str | int)]:
            raise ValueError(f"{path}: can't be saved without pickling: key {odd[0]!r}")
        items = [[key, pack(item, tensors, f"{path}/{key}")] for key, item in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        return {"list": [pack(item, tensors, f"{path}/{i}") for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{path}: can't be saved without pickling: {type(value).__name__}")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of ``pack``; tuples come back as lists."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "list" in value:
        return [unpack(item, tensors) for item in value["list"]]
    return {key: unpack(item, tensors) for key, item in value["dict"]}


@contextmanager
def saving(path: Path) -> Iterator[Path]:
    """``replacing`` for what a training leaves: a failure is one line, and loses nothing.

    Raises:
        ValueError: the file can't be written (disk full, no permission).
    """
    try:
        with replacing(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{path}: can't be written: {why}; what was saved before is kept"
        ) from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Any = None) -> None:
    """Tensors and a JSON value, in one safetensors file, atomically."""
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with saving(path) as temporary:
        save_file(copies, temporary, metadata={"meta": json.dumps(meta)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """What ``write_tensors`` wrote.

    Raises:
        ValueError: the file is missing, cut off or no safetensors file; a pickle is not read.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads((file.metadata() or {}).get("meta", "null"))
    except (SafetensorError, OSError, ValueError) as error:
        if _is_pickle(path):
            raise ValueError(
                f"{path}: came a file of torch.save or pickle, which may run code when it is read, "
                "wanted a safetensors file"
            ) from None
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def _is_pickle(path: Path) -> bool:
    with suppress(OSError), open(path, "rb") as file:
        return file.read(2) in (b"PK", *(bytes([0x80, version]) for version in range(2, 6)))
    return False
