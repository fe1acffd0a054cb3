"""The typer application, the options that commands share, and how they print."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from pyro_vae.training.runs import versions

LARGEST_SEED = 2**32 - 1

app = typer.Typer(
    help="Variational autoencoders as Pyro programs. PYRO_VAE_DEBUG=1 shows the traceback of errors.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def positive(number: float | None) -> float | None:
    if number is not None and not (0 < number < math.inf):
        raise typer.BadParameter(f"came {number}, wanted a number above 0")
    return number


Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="a name (see pyro-vae data) or a file: npz, npy, csv, parquet, a folder of images",
    ),
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
    str | None,
    typer.Option("--sites", help="sites by comma (default: all); columns of a table: x,y=label"),
]
ImageShape = Annotated[
    str | None, typer.Option("--image-shape", help="of images in flat sites: 8,8 or 3,32,32")
]
DataOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--data-option",
        "-d",
        help="argument of data.load; repeat: -d binarize=dynamic -d standardize=True -d columns=a,b",
    ),
]
Split = Annotated[str, typer.Option(help="which rows: train, valid, test, all")]
RunFolder = Annotated[Path, typer.Argument(help="run folder")]
RunPair = Annotated[
    str | None,
    typer.Option("--pair", help="my_file.py:build of a run whose pair is not a ready one"),
]
RunData = Annotated[
    str | None, typer.Option("--data", help="other data than the run's, or where those are now")
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
Rate = Annotated[float, typer.Option("--lr", callback=positive, help="learning rate of Adam")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Compile = Annotated[str, typer.Option("--compile", help="auto, eager, traced or compiled")]


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


def dumps(value: Any, indent: int | None = None) -> str:
    """Strict JSON, which knows neither infinity nor NaN: null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def show(value: Any, text: str, as_json: bool) -> None:
    """Print JSON or text."""
    typer.echo(dumps(value) if as_json else text)


def image_shape(text: str | None) -> tuple[int, ...] | None:
    """``--image-shape`` as numbers."""
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"--image-shape: came {text!r}, wanted H,W or C,H,W: 28,28")
    return shape
