"""Commands that train: fit, compare, and check, which looks before."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import pyro
import torch
import typer

from pyro_vae.cli.options import (
    LARGEST_SEED,
    BatchSize,
    Compile,
    Data,
    DataOptions,
    Device,
    Epochs,
    Json,
    Options,
    Pair,
    Particles,
    Rate,
    Seed,
    Sites,
    Steps,
    app,
    positive,
    show,
)
from pyro_vae.cli.source import Source, check_alike
from pyro_vae.linter import check as check_pair
from pyro_vae.objectives.specs import arguments, parse, recipes
from pyro_vae.saved import PairSpec
from pyro_vae.training.compare import compare as compare_objectives
from pyro_vae.training.fit import fit as fit_pair
from pyro_vae.training.runs import Folder

__all__ = ["check", "compare", "fit", "objectives"]

COMPARED = (  # unless others are asked for
    "elbo",
    "mean_field",
    "elbo:estimator=stl",
    "iwae:num_particles=10",
    "iwae:num_particles=10,estimator=dreg",
)


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
    data_option: DataOptions = None,
    epochs: Epochs = None,
    steps: Steps = None,
    batch_size: BatchSize = 100,
    lr: Rate = 1e-3,
    clip: Annotated[
        float | None, typer.Option(callback=positive, help="largest norm of the gradient")
    ] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="batches of a step")] = 1,
    ema: Annotated[
        float | None, typer.Option(help="decay of a moving average of the parameters: 0.999")
    ] = None,
    precision: Annotated[str, typer.Option(help="full or bf16")] = "full",
    valid: Annotated[
        str | None,
        typer.Option(help="rows to select by: a share of the training rows, or a split: valid"),
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="epochs without improvement, with --valid")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    compile: Compile = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="go on where the run in --out stopped, if there is one")
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
    source = Source(data_name, sites, data_option)
    train, held_out = source.training(valid)
    command = {
        "data": source.place,
        "data_sha256": source.record.get("sha256"),
        "sites": sites,
        "data_options": list(source.given),
        "valid": valid,
        "pair": build.place,
        "pair_sha256": build.digest,
        "options": list(build.options),
        "objective": objective,
        "batch_size": batch_size,
        "lr": lr,
        "clip": clip,
        "accumulate": accumulate,
        "ema": ema,
        "precision": precision,
        "patience": patience,
        "seed": seed,
    }
    resume = resume and any((out / name).exists() for name in ("config.json", "state.safetensors"))
    if resume:
        _check_same(out, Folder(out).config().get("command"), command)

    pyro.set_rng_seed(seed)
    model, guide = build(train)
    run = fit_pair(
        model,
        guide,
        train,
        loss,
        **_length(epochs, steps),
        batch_size=batch_size,
        accumulate=accumulate,
        optimizer=functools.partial(torch.optim.Adam, lr=lr, fused=True),
        clip=clip,
        precision=precision,
        compile=compile,
        valid=held_out,
        patience=patience,
        ema=ema,
        seed=seed,
        device=device,
        out=out,
        resume=resume,
        note={"command": command},
    )
    last = run.history[-1]
    shown = (
        f", valid bound {run.best['valid']:.3f} at epoch {run.best['epoch']}" if held_out else ""
    )
    typer.echo(
        f"{out}: {last['step']} steps in {last['seconds']:.1f} s, loss {last['loss']:.3f} nats per "
        f"row{shown}, stopped by {run.stopped}"
    )
    for line in (*run.notes, *filter(None, [run.level])):
        typer.echo(line)


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
    data_option: DataOptions = None,
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
    source = Source(data_name, sites, data_option)
    train, _ = source.training()
    test = source.judged("test", train.record)
    check_alike({site: train.shape(site)[1:] for site in train}, test, "test")
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
            optimizer=functools.partial(torch.optim.Adam, lr=lr, fused=True),
            device=device,
            compile=compile,
        )
    show(result.summary(), str(result), as_json)


@app.command()
def check(
    data_name: Data,
    pair: Pair = "vae",
    option: Options = None,
    sites: Sites = None,
    data_option: DataOptions = None,
    rows: Annotated[int, typer.Option(min=1, help="rows to look at")] = 64,
) -> None:
    """Look for mistakes in a pair.

    Plates, shapes, sites, missing data, gradients. Exit code 2 if there are any.

    \b
    pyro-vae check --data my_table.npz --pair my_file.py:build
    """
    train = Source(data_name, sites, data_option).training()[0]
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


def _check_same(out: Path, made: Any, command: dict[str, Any]) -> None:
    """Refuse to go on with a run as if it were another one."""
    if not isinstance(made, dict):
        raise ValueError(f"--resume: {out} was not made by pyro-vae fit; go on where it was")
    if changed := [
        made[name]
        for name in ("data", "pair")
        if made[f"{name}_sha256"] != command[f"{name}_sha256"] and made[name] == command[name]
    ]:
        raise ValueError(f"--resume: changed since {out} was started: {', '.join(changed)}")
    for name, came in command.items():
        moved = name == "data" and made["data_sha256"] == command["data_sha256"]
        if name in made and made[name] != came and not moved and not name.endswith("_sha256"):
            raise ValueError(
                f"--resume: {name} came {came!r}, wanted {made[name]!r} as in {out}; a run goes on "
                "as it was started"
            )


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
