"""The command line: translates, calls the library, prints. Every error is one line and exit code 2."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pyro_vae import data, pairs
from pyro_vae.batch import Batch
from pyro_vae.evaluation.likelihood import evaluate as evaluate_pair
try:
    from pyro_vae.linter import check as check_pair
except ImportError: pass
from pyro_vae.objectives.recipes import literal, parse
from pyro_vae.training.compare import compare as compare_objectives
from pyro_vae.training.fit import fit as fit_pair
from pyro_vae.training.runs import Folder

__all__ = ["PairSpec", "main"]

app = typer.Typer(
    help="Variational autoencoders as Pyro programs.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Data = Annotated[
    str, typer.Option("--data", help="digits, digits_binary, an .npz file, or NAME in $PYRO_VAE_DATA")
]
Pair = Annotated[str, typer.Option("--pair", help="a builder in pyro_vae.pairs, or my_file.py:build")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", help="argument of the pair: latent=8, hidden=64,64"),
]
Sites = Annotated[
    str | None, typer.Option("--sites", help="sites to load, by comma (default: all)")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Seed = Annotated[int, typer.Option("--seed", help="of initialisation, shuffling and draws")]
Particles = Annotated[int, typer.Option("--num-particles", "-K", help="K of log p(x) >=")]
Epochs = Annotated[int | None, typer.Option(help="passes over the data (default: 50)")]
Steps = Annotated[int | None, typer.Option(help="optimizer steps, instead of epochs")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="rows a step")]
Rate = Annotated[float, typer.Option("--lr", help="learning rate of Adam")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Compile = Annotated[str, typer.Option("--compile", help="auto or eager")]


@dataclass(frozen=True)
class PairSpec:
    """A pair builder by name or ``file.py:function``; picklable, since it is looked up when called.

    Raises:
        ValueError: unknown name, a file that is missing, does not import or lacks the function, a
            builder that raises or returns something else than (model, guide).
    """

    spec: str

    def __call__(self, batch: Batch, **options: Any) -> tuple[Any, Any]:
        build = self.builder()
        try:
            pair = build(batch, **options)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"pair {self.spec!r}: {_where(error)}{_line(error)}") from error
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ValueError(
                f"pair {self.spec!r}: returned a {type(pair).__name__}, wanted (model, guide)"
            )
        return pair

    def builder(self) -> Any:
        file, colon, name = self.spec.rpartition(":")
        if not colon:
            known = [n for n in pairs.__all__ if not n.endswith("_for")]
            if self.spec not in known:
                raise ValueError(
                    f"pair: came {self.spec!r}, wanted one of {known} or my_file.py:build"
                )
            return getattr(pairs, self.spec)
        build = getattr(_module(file), name, None)
        if not callable(build):
            raise ValueError(f"pair: {file} has no function {name!r}")
        return build


@functools.cache
def _module(file: str) -> Any:
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"pair: no such file {file!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"pair: {file!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"pair: {file} does not import: {_where(error)}{_line(error)}") from error
    finally:
        sys.path.pop(0)
    return module


@app.command()
def fit(
    data_name: Data,
    out: Annotated[Path, typer.Option(help="folder that receives the run")],
    pair: Pair = "vae",
    option: Options = None,
    objective: Annotated[str, typer.Option(help="iwae:num_particles=50,estimator=dreg")] = "elbo",
    sites: Sites = None,
    epochs: Epochs = None,
    steps: Steps = None,
    batch_size: BatchSize = 100,
    lr: Rate = 1e-3,
    clip: Annotated[float | None, typer.Option(help="largest norm of the gradient")] = None,
    valid: Annotated[
        float, typer.Option(help="share of the training rows held out to select by")
    ] = 0.0,
    patience: Annotated[int | None, typer.Option(help="epochs without improvement")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    compile: Compile = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="go on where the run stopped")] = False,
) -> None:
    """Train a pair and leave a run folder."""
    loss = parse(objective)
    train = _load(data_name, "train", sites)
    build, options = PairSpec(pair), _options(option)
    held_out = None
    rows = train
    if valid:
        if not 0 < valid < 1:
            raise ValueError(f"--valid: came {valid}, wanted a share between 0 and 1")
        rows, held_out = data.split(train, (1 - valid, valid))
    model, guide = _seeded(build, rows, options, seed)
    run = fit_pair(
        model,
        guide,
        rows,
        loss,
        **_length(epochs, steps),
        batch_size=batch_size,
        optimizer=functools.partial(torch.optim.Adam, lr=lr),
        clip=clip,
        valid=held_out,
        patience=patience,
        seed=seed,
        device=device,
        compile=compile,
        out=out,
        resume=resume,
    )
    Folder(out).update_config(
        {
            "data": {"name": data_name, "sites": sites, "valid": valid},
            "record": data.describe(data_name, _split(data_name, "train"), _names(sites)),
            "pair": {"spec": pair, "options": option or []},
            "objective": objective,
            "lr": lr,
        }
    )
    last = run.history[-1]
    shown = f", valid {run.best['valid']:.3f} at epoch {run.best['epoch']}" if held_out else ""
    typer.echo(
        f"{out}: {last['step']} steps in {last['seconds']:.1f} s, loss {last['loss']:.3f} nats per "
        f"row{shown}, stopped by {run.stopped}"
    )
    for note in run.notes:
        typer.echo(note)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="run folder")],
    data_name: Annotated[
        str | None, typer.Option("--data", help="other data than the run's")
    ] = None,
    split: Annotated[str, typer.Option(help="which rows")] = "test",
    num_particles: Particles = 500,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Judge a run on held-out rows: log p(x) >=, ELBO, rate, active units, with standard errors."""
    folder = Folder(run)
    config = folder.config()
    if "pair" not in config:
        raise ValueError(f"{run}: its config names no pair; it was not made by pyro-vae fit")
    name, sites = config["data"]["name"], config["data"]["sites"]
    train = _load(name, "train", sites)
    if config["data"]["valid"]:
        train, _ = data.split(train, (1 - config["data"]["valid"], config["data"]["valid"]))
    pair = PairSpec(config["pair"]["spec"])
    model, guide = _seeded(pair, train, _options(config["pair"]["options"]), config["seed"])
    folder.load_into(model, guide)
    held_out = _load(data_name or name, split, sites)
    result = evaluate_pair(model, guide, held_out, num_particles, seed=seed)
    summary = result.summary() | {"data": data_name or name, "split": split}
    folder.write("metrics.json", json.dumps(summary, indent=2) + "\n")
    typer.echo(json.dumps(summary) if as_json else str(result))


@app.command()
def compare(
    data_name: Data,
    objective: Annotated[
        list[str], typer.Option("--objective", help="repeat; the first is the reference")
    ],
    pair: Pair = "vae",
    option: Options = None,
    sites: Sites = None,
    seeds: Annotated[str, typer.Option(help="by comma")] = "0",
    epochs: Epochs = None,
    steps: Steps = None,
    batch_size: BatchSize = 100,
    lr: Rate = 1e-3,
    num_particles: Particles = 5000,
    out: Annotated[Path | None, typer.Option(help="keeps finished cells; run again to go on")] = None,
    jobs: Annotated[int, typer.Option(help="processes")] = 1,
    device: Device = "auto",
    compile: Compile = "auto",
    as_json: Json = False,
) -> None:
    """Train a pair under several objectives and seeds and compare them on the same held-out rows."""
    build = PairSpec(pair)
    build.builder()
    result = compare_objectives(
        build,
        _load(data_name, "train", sites),
        _load(data_name, "test", sites),
        objective,
        _integers(seeds),
        options=_options(option),
        num_particles=num_particles,
        jobs=jobs,
        out=out,
        **_length(epochs, steps),
        batch_size=batch_size,
        optimizer=functools.partial(torch.optim.Adam, lr=lr),
        device=device,
        compile=compile,
    )
    typer.echo(json.dumps(result.summary()) if as_json else str(result))


@app.command()
def check(
    data_name: Data,
    pair: Pair = "vae",
    option: Options = None,
    sites: Sites = None,
    rows: Annotated[int, typer.Option(help="rows to look at")] = 64,
) -> None:
    """Look for mistakes in a pair: plates, shapes, sites, missing data, gradients."""
    train = _load(data_name, "train", sites)
    model, guide = _seeded(PairSpec(pair), train, _options(option), 0)
    report = check_pair(model, guide, train.rows(slice(0, rows)))
    typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(2)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code. ``PYRO_VAE_DEBUG=1`` adds the traceback."""
    try:
        return int(app(args=arguments, standalone_mode=False) or 0)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        return 130
    except Exception as error:
        if os.environ.get("PYRO_VAE_DEBUG"):
            traceback.print_exc()
        message = getattr(error, "format_message", lambda: _line(error))()
        typer.echo(f"error: {message or 'see --help'}", err=True)
        return 2


def _line(error: BaseException) -> str:
    """The error as one line."""
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
    kind = "" if type(error) in (ValueError, FileNotFoundError) else f"{type(error).__name__}: "
    return f"{kind}{text}" if text else type(error).__name__


def _where(error: BaseException) -> str:
    """Place in the user's own file where an error arose."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "pyro_vae" not in frame.filename and "site-packages" not in frame.filename:
            if frame.filename.startswith("<"):
                continue
            return f"{Path(frame.filename).name}:{frame.lineno}: "
    return ""


def _seeded(build: PairSpec, batch: Batch, options: dict[str, Any], seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    return build(batch, **options)


def _length(epochs: int | None, steps: int | None) -> dict[str, int | None]:
    return {"epochs": 50 if epochs is None and steps is None else epochs, "steps": steps}


def _split(name: str, wanted: str) -> str:
    """The wanted rows of a data set; one without parts is cut 80 / 20 by a fixed seed."""
    return wanted if wanted in data.describe(name)["splits"] else "all"


def _load(name: str, wanted: str, sites: str | None) -> Batch:
    split = _split(name, wanted)
    batch = data.load(name, split, _names(sites))
    if split != "all" or wanted == "all":
        return batch
    if wanted not in ("train", "test"):
        raise ValueError(f"--split: came {wanted!r}, wanted train, test or all")
    return data.split(batch)[wanted == "test"]


def _names(sites: str | None) -> list[str] | None:
    return None if sites is None else [site.strip() for site in sites.split(",")]


def _options(option: list[str] | None) -> dict[str, Any]:
    options = {}
    for item in option or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--option: came {item!r}, wanted name=value")
        options[key.strip()] = literal(value.strip())
    return options


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds: came {text!r}, wanted whole numbers by comma") from None


if __name__ == "__main__":
    sys.exit(main())
