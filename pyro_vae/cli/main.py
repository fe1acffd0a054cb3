"""The command line: translates, calls the library, prints. Every error is one line and exit code 2."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pyro
import torch
import typer

from pyro_vae import conditionals, data, nn, pairs
from pyro_vae.batch import Batch
from pyro_vae.evaluation.likelihood import evaluate as evaluate_pair
from pyro_vae.linter import check as check_pair
from pyro_vae.objectives.recipes import arguments, literal, parse, recipes
from pyro_vae.objectives.swap import owner
from pyro_vae.training.compare import compare as compare_objectives
from pyro_vae.training.fit import fit as fit_pair
from pyro_vae.training.runs import Folder, versions

__all__ = ["PairSpec", "main"]

LARGEST_SEED = 2**32 - 1
COMPARED = (  # unless others are asked for
    "elbo",
    "mean_field",
    "elbo:estimator=stl",
    "iwae:num_particles=10",
    "iwae:num_particles=10,estimator=dreg",
)

app = typer.Typer(
    help="Variational autoencoders as Pyro programs. PYRO_VAE_DEBUG=1 shows the traceback of errors.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _positive(number: float | None) -> float | None:
    if number is not None and not (0 < number < math.inf):
        raise typer.BadParameter(f"came {number}, wanted a number above 0")
    return number


def _share(number: float) -> float:
    if not 0 <= number < 1:
        raise typer.BadParameter(f"came {number}, wanted a share of the rows, from 0 to below 1")
    return number


Data = Annotated[
    str,
    typer.Option("--data", help="digits, digits_binary, an .npz file, or NAME in $PYRO_VAE_DATA"),
]
Pair = Annotated[
    str, typer.Option("--pair", help="a builder in pyro_vae.pairs, or my_file.py:build")
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        help="argument of the pair; repeat: -o latent=8 -o hidden=64,64 -o likelihood=Bernoulli. "
        "Names in pyro_vae.conditionals, pyro_vae.nn and torch.nn stand for what they name",
    ),
]
Sites = Annotated[
    str | None, typer.Option("--sites", help="sites to load, by comma (default: all)")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Seed = Annotated[
    int,
    typer.Option("--seed", min=0, max=LARGEST_SEED, help="of initialisation, shuffling and draws"),
]
Particles = Annotated[int, typer.Option("--num-particles", "-K", min=1, help="K of log p(x) >=")]
Epochs = Annotated[int | None, typer.Option(min=1, help="passes over the data (default: 50)")]
Steps = Annotated[int | None, typer.Option(min=1, help="optimizer steps, instead of epochs")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="rows a step")]
Rate = Annotated[float, typer.Option("--lr", callback=_positive, help="learning rate of Adam")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Compile = Annotated[str, typer.Option("--compile", help="auto or eager")]


# --- pairs --------------------------------------------------------------------------------------


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
            raise ValueError(f"--pair {self}: {_line(error)}") from error
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(map(callable, pair)):
            raise ValueError(
                f"--pair {self}: it returned {_kind(pair)}, wanted (model, guide), both of which "
                "can be called"
            )
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
            return getattr(pairs, name)  # type: ignore[no-any-return]
        build = getattr(_module(str(Path(file).resolve()), self.digest), name, None)
        if not callable(build):
            raise ValueError(f"--pair: {file} has no function {name!r}")
        return build  # type: ignore[no-any-return]

    def arguments(self, build: Callable[..., Any]) -> dict[str, Any]:
        parameters = list(inspect.signature(build).parameters.values())
        known = [
            p.name for p in parameters[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        found = {}
        for item in self.options:
            name, _, value = (part.strip() for part in item.partition("="))
            if not value:
                raise ValueError(f"--option: came {item!r}, wanted name=value")
            if name not in known and not any(p.kind is p.VAR_KEYWORD for p in parameters):
                raise ValueError(f"--option: {self.spec} has no {name!r}, wanted one of {known}")
            found[name] = _part(literal(value))
        try:
            inspect.signature(build).bind(None, **found)
        except TypeError as error:
            raise ValueError(
                f"--pair {self.spec}: {error}; it is called as build(batch, **options)"
            ) from None
        return found


_imported: set[str] = set()  # files of pairs, into which an error may point


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
    _imported.add(file)
    spec.loader.exec_module(module)
    return module


def _part(value: Any) -> Any:
    """What a word names: a conditional, a network, a class of torch.nn; else the word itself."""
    if not isinstance(value, str):
        return value
    for place in (conditionals, nn):
        if value in place.__all__:
            return getattr(place, value)
    found = getattr(torch.nn, value, None)
    return found if isinstance(found, type) else value


# --- data ---------------------------------------------------------------------------------------


class Source:
    """A data set by name or path, and what ``describe`` says of it."""

    def __init__(self, name: str, sites: str | None) -> None:
        self.name = name
        self.sites = None if sites is None else [site.strip() for site in sites.split(",")]
        self.record = data.describe(name, None, self.sites)

    @property
    def place(self) -> str:
        """The name, or the absolute path of the file."""
        path = Path(self.record["source"])
        return str(path.resolve()) if path.is_file() else self.name

    def rows(self, split: str) -> Batch:
        """The rows of a split; data that are not stored in parts are cut 80 / 20 by a fixed seed."""
        splits = self.record["splits"]
        if split in splits:
            return data.load(self.name, split, self.sites)
        if splits != ["all"]:
            raise ValueError(f"{self.name}: came split {split!r}, wanted one of {splits}")
        if split not in ("train", "test"):
            raise ValueError(f"{self.name}: came split {split!r}, wanted train, test or all")
        return self._cut(data.load(self.name, "all", self.sites), 0.2)[split == "test"]

    def train_and_valid(self, share: float) -> tuple[Batch, Batch | None]:
        train = self.rows("train")
        return self._cut(train, share) if share else (train, None)

    def _cut(self, batch: Batch, share: float) -> tuple[Batch, Batch]:
        try:
            first, second = data.split(batch, (1 - share, share))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        return first, second


def _check_alike(train: Batch, other: Batch, split: str) -> None:
    for site in train.sites:
        if site in other and train[site].shape[1:] != other[site].shape[1:]:
            raise ValueError(
                f"site {site!r}: {split} rows have event shape {list(other[site].shape[1:])}, "
                f"training rows {list(train[site].shape[1:])}; wanted the same"
            )


# --- commands -----------------------------------------------------------------------------------


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(", ".join(f"{name} {version}" for name, version in versions().items()))
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="print versions and exit"),
    ] = False,
) -> None:
    pass


@app.command()
def fit(
    data_name: Data,
    out: Annotated[Path, typer.Option(help="folder that receives the run")],
    pair: Pair = "vae",
    option: Options = None,
    objective: Annotated[
        str, typer.Option(help="iwae:num_particles=50,estimator=dreg; see pyro-vae objectives")
    ] = "elbo",
    sites: Sites = None,
    epochs: Epochs = None,
    steps: Steps = None,
    batch_size: BatchSize = 100,
    lr: Rate = 1e-3,
    clip: Annotated[
        float | None, typer.Option(callback=_positive, help="largest norm of the gradient")
    ] = None,
    valid: Annotated[
        float,
        typer.Option(callback=_share, help="share of the training rows held out to select by"),
    ] = 0.0,
    patience: Annotated[
        int | None, typer.Option(min=1, help="epochs without improvement, with --valid")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    compile: Compile = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="go on where the run in --out stopped")
    ] = False,
) -> None:
    """Train a pair and leave a run folder.

    \b
    pyro-vae fit --data digits --out runs/a -o latent=16 --objective iwae:num_particles=10
    pyro-vae fit --data my_table.npz --out runs/b --pair my_file.py:build --valid 0.1 --patience 5

    A run that was interrupted goes on by the same command with --resume.
    """
    loss = parse(objective)
    build = PairSpec(pair, tuple(option or ()))
    build.builder()
    source = Source(data_name, sites)
    train, held_out = source.train_and_valid(valid)
    command = {
        "data": source.place,
        "data_sha256": source.record["sha256"],
        "sites": sites,
        "valid": valid,
        "pair": build.place,
        "pair_sha256": build.digest,
        "options": list(build.options),
        "objective": objective,
        "batch_size": batch_size,
        "lr": lr,
        "clip": clip,
        "patience": patience,
        "seed": seed,
    }
    folder = Folder(out)
    if resume:
        _check_same(out, _command(folder), command)

    def note(*_: Any) -> None:  # before the end, for a run that is interrupted
        if not (out / "config.json").exists():
            folder.update_config({"command": command, "data": source.record})

    pyro.set_rng_seed(seed)
    model, guide = build(train)
    with _nothing_empty(out):
        run = fit_pair(
            model,
            guide,
            train,
            loss,
            **_length(epochs, steps),
            batch_size=batch_size,
            optimizer=functools.partial(torch.optim.Adam, lr=lr),
            clip=clip,
            valid=held_out,
            patience=patience,
            callbacks=[note],
            seed=seed,
            device=device,
            compile=compile,
            out=out,
            resume=resume,
        )
    last = run.history[-1]
    shown = (
        f", valid bound {run.best['valid']:.3f} at epoch {run.best['epoch']}" if held_out else ""
    )
    typer.echo(
        f"{out}: {last['step']} steps in {last['seconds']:.1f} s, loss {last['loss']:.3f} nats per "
        f"row{shown}, stopped by {run.stopped}"
    )
    for line in run.notes:
        typer.echo(line)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="run folder")],
    data_name: Annotated[
        str | None,
        typer.Option("--data", help="other data than the run's, or where those are now"),
    ] = None,
    split: Annotated[str, typer.Option(help="which rows: train, valid, test, all")] = "test",
    num_particles: Particles = 500,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Judge a run on held-out rows.

    log p(x) >=, ELBO, rate and active units, each with its standard error over rows.

    \b
    pyro-vae evaluate runs/a -K 5000
    """
    folder = Folder(run)
    made = _command(folder)
    if not (run / "model.safetensors").exists() and (run / "state.safetensors").exists():
        raise ValueError(f"{run}: the run is not finished; repeat its fit with --resume")
    source, judged = _sources(run, made, data_name)
    build = PairSpec(made["pair"], tuple(made["options"]))
    changed = _changed(made, source.record["sha256"], build.digest)
    train, _ = source.train_and_valid(made["valid"])
    pyro.set_rng_seed(made["seed"])
    model, guide = build(train)
    trained, trained_guide = owner(model), owner(guide)
    if trained is None or trained_guide is None:
        raise ValueError(
            f"{run}: --pair {build} makes functions, wanted modules, which can be loaded"
        )
    try:
        folder.load_into(trained, trained_guide)
    except ValueError as error:
        why = f"; changed since the run: {changed}" if changed else ""
        raise ValueError(f"{error}{why}") from error
    held_out = judged.rows(split)
    _check_alike(train, held_out, split)
    result = evaluate_pair(model, guide, held_out, num_particles, seed=seed)
    if changed:
        typer.echo(f"note: changed since the run: {changed}", err=True)
    summary = result.summary() | {"data": judged.place, "split": split}
    typer.echo(_json(summary) if as_json else str(result))
    folder.write("metrics.json", _json(summary, indent=2) + "\n")


@app.command()
def compare(
    data_name: Data,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            "--objective",
            help="repeat; the first is the reference (default: " + ", ".join(COMPARED) + ")",
        ),
    ] = None,
    pair: Pair = "vae",
    option: Options = None,
    sites: Sites = None,
    seeds: Annotated[str, typer.Option(help="by comma: 0,1,2")] = "0",
    epochs: Epochs = None,
    steps: Steps = None,
    batch_size: BatchSize = 100,
    lr: Rate = 1e-3,
    num_particles: Particles = 5000,
    out: Annotated[
        Path | None, typer.Option(help="keeps what is finished; run again to go on")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="processes")] = 1,
    device: Device = "auto",
    compile: Compile = "auto",
    as_json: Json = False,
) -> None:
    """Compare objectives on the same held-out rows.

    Trains the pair under every objective and seed; differences are paired by row.

    \b
    pyro-vae compare --data digits --objective elbo --objective iwae:num_particles=10 --seeds 0,1
    """
    build = PairSpec(pair, tuple(option or ()))
    build.builder()
    source = Source(data_name, sites)
    train, test = source.rows("train"), source.rows("test")
    _check_alike(train, test, "test")
    with _nothing_empty(out):
        result = compare_objectives(
            build,
            train,
            test,
            objective or COMPARED,
            _integers(seeds),
            num_particles=num_particles,
            jobs=jobs,
            out=out,
            **_length(epochs, steps),
            batch_size=batch_size,
            optimizer=functools.partial(torch.optim.Adam, lr=lr),
            device=device,
            compile=compile,
        )
    typer.echo(_json(result.summary()) if as_json else str(result))


@app.command()
def check(
    data_name: Data,
    pair: Pair = "vae",
    option: Options = None,
    sites: Sites = None,
    rows: Annotated[int, typer.Option(min=1, help="rows to look at")] = 64,
) -> None:
    """Look for mistakes in a pair.

    Plates, shapes, sites, missing data, gradients. Exit code 2 if there are any.

    \b
    pyro-vae check --data my_table.npz --pair my_file.py:build
    """
    train = Source(data_name, sites).rows("train")
    pyro.set_rng_seed(0)
    model, guide = PairSpec(pair, tuple(option or ()))(train)
    report = check_pair(model, guide, train.rows(slice(0, rows)))
    typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(2)


@app.command()
def objectives() -> None:
    """List the objectives and their arguments.

    \b
    pyro-vae objectives
    """
    for name, recipe in recipes().items():
        shown = ", ".join(
            key if default is inspect.Parameter.empty else f"{key}={default}"
            for key, default in arguments(recipe).items()
        )
        summary = " ".join((inspect.getdoc(recipe) or "").split("\n\n")[0].split())
        typer.echo(f"{name}: {shown}\n    {summary.replace('``', '')}")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code. ``PYRO_VAE_DEBUG=1`` adds the traceback."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        with pyro.get_param_store().scope():  # nothing of what the process did before
            code = int(app(given or ["--help"], prog_name="pyro-vae", standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except (Exception, SystemExit) as error:
        where = _where(error)
        if isinstance(error, SystemExit) and not where:
            raise
        if os.environ.get("PYRO_VAE_DEBUG"):
            traceback.print_exc()
        typer.echo(f"error: {where}{_line(error)}", err=True)
        code = 2
    if code == 130:
        typer.echo("stopped; what is finished is kept, see --help on how to go on", err=True)
    return code


# --- errors -------------------------------------------------------------------------------------


def _line(error: BaseException) -> str:
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


def _where(error: BaseException) -> str:
    """The line of the user's file that an error came through, in whatever process."""
    text = "".join(traceback.format_exception(error))
    places = re.findall(r'File "(.+)", line (\d+)', text)
    mine = [f"{Path(file).name}:{line}: " for file, line in places if file in _imported]
    return mine[-1] if mine else ""


@contextmanager
def _nothing_empty(folder: Path | None) -> Iterator[None]:
    """Take back a folder that an error left empty."""
    there = folder is None or folder.exists()
    try:
        yield
    except BaseException:
        if folder is not None and not there and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise


# --- translations -------------------------------------------------------------------------------


def _command(folder: Folder) -> dict[str, Any]:
    """What a run was started with."""
    made = folder.config().get("command")
    if not isinstance(made, dict):
        raise ValueError(
            f"{folder.path}: it does not say of which pair; wanted a run of pyro-vae fit"
        )
    return made


def _sources(run: Path, made: dict[str, Any], name: str | None) -> tuple[Source, Source]:
    """The data that a run was trained on and those that it is judged on."""
    given = None if name is None else Source(name, made["sites"])
    try:
        source = Source(made["data"], made["sites"])
    except FileNotFoundError as error:
        if given is None:
            raise ValueError(f"{run}: its data are gone: {error}; say where by --data") from None
        source = given
    return source, given or source


def _changed(made: dict[str, Any], data_sha256: str, pair_sha256: str | None) -> str:
    """Which files are not what they were when the run was made."""
    found = {"data": data_sha256, "pair": pair_sha256}
    return ", ".join(made[name] for name, came in found.items() if made[f"{name}_sha256"] != came)


def _check_same(out: Path, made: dict[str, Any], command: dict[str, Any]) -> None:
    """Refuse to go on with a run as if it were another one."""
    for name, came in command.items():
        moved = name == "data" and made["data_sha256"] == command["data_sha256"]
        if made[name] != came and not moved and not name.endswith("_sha256"):
            raise ValueError(
                f"--resume: {name} came {came!r}, wanted {made[name]!r} as in {out}; a run goes on "
                "as it was started"
            )
    if changed := _changed(made, command["data_sha256"], command["pair_sha256"]):
        raise ValueError(f"--resume: changed since {out} was started: {changed}")


def _length(epochs: int | None, steps: int | None) -> dict[str, Any]:
    if epochs and steps:
        raise ValueError("came --epochs and --steps, wanted one of them")
    return {"epochs": epochs or (None if steps else 50), "steps": steps}


def _integers(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = [-1]
    if not all(0 <= seed <= LARGEST_SEED for seed in seeds):
        raise ValueError(f"--seeds: came {text!r}, wanted whole numbers by comma: 0,1,2")
    return seeds


def _json(value: Any, indent: int | None = None) -> str:
    """Strict JSON, which knows neither infinity nor NaN: null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def _kind(value: Any) -> str:
    """A value's type, that of a tuple with what it holds."""
    if isinstance(value, tuple):
        return f"({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__


if __name__ == "__main__":
    sys.exit(main())
