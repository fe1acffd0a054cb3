"""Pairs by name or from a user's file, and finished runs back from their folders."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pyro_vae import pairs
from pyro_vae.batch import Batch
from pyro_vae.objectives.specs import literal
from pyro_vae.objectives.swap import owner
from pyro_vae.training.fit import Run, device_for
from pyro_vae.training.runs import Folder

__all__ = ["PairSpec", "changed", "imported", "keywords", "line", "load"]

Pair = tuple[Any, Any]
Builder = Callable[[Batch], Pair]

imported: set[str] = set()  # files of pairs, into which an error may point


def load(
    run: str | Path,
    pair: Pair | Builder | str | None = None,
    data: Batch | None = None,
    device: str = "auto",
) -> Run:
    """A finished run of ``fit(..., out=run)``, its pair with the parameters that were kept.

    No code is run that the caller did not name. A ready pair (``pairs.vae``) is built again by the
    name and arguments that the run holds; any other has to be given.

    Args:
        run: the folder.
        pair: ``(model, guide)`` as they were before training; or what builds them, a function
            ``build(batch)`` or ``"my_file.py:build"``.
        data: training rows to build on (default: the stand-in for them that the run holds).
        device: as for ``fit``.

    Raises:
        ValueError: no finished run, a file of it that is missing, broken or of another format, a
            pair that is not the run's.
    """
    folder = Folder(run)
    config = folder.config()
    if not (folder.path / "model.safetensors").exists():
        raise ValueError(
            f"{run}: the run is not finished; go on with the same fit and resume=True (--resume)"
        )
    example = folder.example()
    if not isinstance(pair, tuple):
        build = _builder(folder, config.get("pair"), pair)
        rows = example if data is None else data
        rows = rows.look() if isinstance(rows, Batch) else rows
        with torch.random.fork_rng():  # to draw what is replaced at once is no affair of the caller
            pair = build(rows)
    model, guide = pair
    place = device_for(device, model, guide, example)
    for module in filter(None, (owner(model), owner(guide))):
        module.to(place)
    try:
        folder.load_into(model, guide)
    except ValueError as error:
        file = changed(config, model)
        raise ValueError(f"{error}; changed since the run: {file}" if file else error) from None
    return Run(
        model,
        guide,
        config.get("objective"),
        history=folder.history(),
        config=config,
        best=config.get("best", {}),
        stopped=config.get("stopped", ""),
        notes=tuple(config.get("notes", ())),
    )


def changed(config: dict[str, Any], model: Any) -> str:
    """The file of a run's pair, if it is not what it was, else nothing."""
    made, now = config.get("pair") or {}, getattr(model, "built_by", {})
    same = made.get("sha256") == now.get("sha256")
    return "" if same or "sha256" not in now else str(now["pair"])


def _builder(folder: Folder, made: Any, given: Builder | str | None) -> Builder:
    """What builds a run's pair: what the caller names, else the ready builder that made it."""
    options = made.get("options", {}) if isinstance(made, dict) else {}
    name = made.get("pair") if isinstance(made, dict) else None
    if isinstance(given, str):
        return PairSpec(given, tuple(options) if isinstance(options, list) else ())
    if given is not None:
        return given
    if name in pairs.BUILDERS:
        return functools.partial(_rebuilt, folder, made)
    raise ValueError(
        f"{folder.path}: its pair was built by {name or 'code of its own'}, and no code is run that "
        "was not named; name it by --pair my_file.py:build (pair= in Python)"
    )


def _rebuilt(folder: Folder, made: dict[str, Any], rows: Batch) -> Pair:
    try:
        return pairs.rebuilt(made, rows)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder.path / 'config.json'}: pair: {error}") from None


@dataclass(frozen=True)
class PairSpec:
    """A pair builder by name or ``file.py:function`` with its options, as the command line has them.

    Looked up when called, so that it can be pickled; its repr changes with the file's contents.

    Raises:
        ValueError: unknown name or option, a file that is missing, does not import or lacks the
            function, a builder that returns something else than (model, guide).
    """

    spec: str
    options: tuple[str, ...] = ()
    digest: str | None = field(init=False)

    def __post_init__(self) -> None:
        file, _, _ = self.spec.rpartition(":")
        if file and not Path(file).is_file():
            raise ValueError(f"--pair: {file}: no such file")
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None
        object.__setattr__(self, "digest", digest)

    def __call__(self, batch: Batch) -> tuple[Any, Any]:
        build = self.builder()
        arguments = self.arguments(build)
        try:
            pair = build(batch, **arguments)
        except Exception as error:
            raise ValueError(f"--pair {self}: {line(error)}") from error
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(map(callable, pair)):
            raise ValueError(
                f"--pair {self}: it returned {_kind(pair)}, wanted (model, guide), both of which "
                "can be called"
            )
        if self.digest:
            with contextlib.suppress(AttributeError):  # a method takes no attributes
                pair[0].built_by = {
                    "pair": self.place,
                    "options": list(self.options),
                    "sha256": self.digest,
                }
        return pair

    def __str__(self) -> str:
        return " -o ".join([self.spec, *self.options])

    @property
    def place(self) -> str:
        """The spec, its file by its absolute path."""
        file, _, name = self.spec.rpartition(":")
        return f"{Path(file).resolve()}:{name}" if file else self.spec

    def builder(self) -> Callable[..., Any]:
        file, _, name = self.spec.rpartition(":")
        if not file:
            if name not in pairs.BUILDERS:
                raise ValueError(
                    f"--pair: came {name!r}, wanted one of {list(pairs.BUILDERS)}, or "
                    "my_file.py:build for a function of your own"
                )
            return pairs.BUILDERS[name]
        build = getattr(_module(str(Path(file).resolve()), self.digest), name, None)
        if not callable(build):
            raise ValueError(f"--pair: {file} has no function {name!r}")
        return build  # type: ignore[no-any-return]

    def arguments(self, build: Callable[..., Any]) -> dict[str, Any]:
        found = keywords(self.options, build, "--option")
        found = {name: _meant(value) for name, value in found.items()}
        try:
            inspect.signature(build).bind(None, **found)
        except TypeError as error:
            raise ValueError(
                f"--pair {self.spec}: {error}; it is called as build(batch, **options)"
            ) from None
        return found


def keywords(
    items: Sequence[str], function: Callable[..., Any], option: str, more: Collection[str] = ()
) -> dict[str, Any]:
    """Arguments of a function, after its first, from NAME=VALUE on the command line.

    Raises:
        ValueError: no value, or a name that the function does not know.
    """
    parameters = list(inspect.signature(function).parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [p.name for p in parameters[1:] if p.kind in kinds] + sorted(more)
    found = {}
    for item in items:
        name, _, value = (part.strip() for part in item.partition("="))
        if not value:
            raise ValueError(f"{option}: came {item!r}, wanted name=value")
        if name not in known and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise ValueError(f"{option}: came {name!r}, wanted one of {known}")
        found[name] = literal(value)
    return found


@functools.cache
def _module(file: str, digest: str | None) -> ModuleType:
    """Import a user's file, once as long as its contents stay the same."""
    # Under a name of its own, lest a random.py stand in for the real one.
    spec = importlib.util.spec_from_file_location(f"pyro_vae_pair_{Path(file).stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--pair: {file}: not a Python file, wanted *.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    if (folder := str(Path(file).parent)) not in sys.path:
        sys.path.insert(0, folder)  # as Python does for a script
    imported.add(file)
    spec.loader.exec_module(module)
    return module


def _meant(value: Any) -> Any:
    """The part that a word names, else the word itself; likewise of what a mapping holds."""
    if isinstance(value, dict):
        return {key: _meant(item) for key, item in value.items()}
    named = pairs.part(value) if isinstance(value, str) else None
    return value if named is None else named


def line(error: BaseException) -> str:
    """The error as one line."""
    if usage := getattr(error, "format_message", None):  # the parser's own errors have one
        return _shortened(usage())
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    kind = "" if type(error) in (ValueError, FileNotFoundError) else type(error).__name__
    text = _shortened(str(error.args[0] if isinstance(error, KeyError) else error))
    return ": ".join(filter(None, (kind, text)))


def _shortened(text: str) -> str:
    return textwrap.shorten(text, 500, placeholder=" ...")


def _kind(value: Any) -> str:
    """A value's type, that of a tuple with what it holds."""
    if isinstance(value, tuple):
        return f"({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__
