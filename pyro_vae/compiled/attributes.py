"""What modules hold besides parameters and parts: numbers, texts, tensors, by their names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Attributes"]

NUMBERS = (bool, int, float, complex, str, bytes, type(None))
CONTAINERS = (list, tuple, dict, set)


class Attributes:
    """The attributes of modules as they are now, to be compared with and put back.

    A program that sets one as it runs (a counter, a buffer that it makes anew) does what no graph
    would do again.
    """

    def __init__(self, *modules: nn.Module) -> None:
        parts = {id(part): part for module in modules for part in module.modules()}
        self.parts = [(part, dict(vars(part)), dict(part._buffers)) for part in parts.values()]
        self.copies = [
            {name: type(value)(value) for name, value in held.items() if _is_plain(value)}
            for _, held, _ in self.parts
        ]

        made = [value for _, held, _ in self.parts for value in held.values()]
        generators = [value for value in made if isinstance(value, torch.Generator)]
        self.generators = [(generator, generator.get_state()) for generator in generators]

    def put_back(self) -> None:
        for generator, state in self.generators:
            generator.set_state(state)
        for (part, held, buffers), copies in zip(self.parts, self.copies, strict=True):
            vars(part).clear()
            vars(part).update(held | copies)
            part._buffers.clear()
            part._buffers.update(buffers)

    def changed(self) -> Iterator[tuple[str, Any]]:
        """Name and old value of what is another object now, or another number."""
        for (part, held, buffers), copies in zip(self.parts, self.copies, strict=True):
            now = {**vars(part), **part._buffers}
            for name, old in {**held, **copies, **buffers}.items():
                new = now.get(name)
                if new is old or (isinstance(old, (*NUMBERS, *CONTAINERS)) and _equal(new, old)):
                    continue
                yield f"{type(part).__name__}.{name}", old
            for name in vars(part).keys() - held.keys():  # in front of what the class has
                if hasattr(type(part), name):
                    yield f"{type(part).__name__}.{name}", getattr(type(part), name)

    def unsteady(self, held: list[Tensor]) -> str:
        """Why a graph that reads the tensors ``held`` would not do what the program does."""
        read = {id(tensor) for tensor in held}
        for name, old in self.changed():
            if not isinstance(old, Tensor) or id(old) in read:
                return f"{name} was set anew, and a graph has it as a constant"
        return ""


def _is_plain(value: Any) -> bool:
    """Whether a value is a container of numbers, which a program may change in place."""
    if type(value) not in CONTAINERS:
        return False
    items = [*value, *value.values()] if isinstance(value, dict) else value
    return all(isinstance(item, NUMBERS) for item in items)


def _equal(new: Any, old: Any) -> bool:
    if type(new) is not type(old):
        return False
    return not (_is_plain(old) or isinstance(old, NUMBERS)) or bool(new == old) or old != old
