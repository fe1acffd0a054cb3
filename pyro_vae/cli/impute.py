"""The command that fills the missing cells of a table."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import pyro
import torch
import typer

from pyro_vae.cli.options import BatchSize, Compile, Device, Rate, Seed, app
from pyro_vae.data.mixed import KINDS, Columns, read_table
from pyro_vae.evaluation.imputation import impute as impute_rows
from pyro_vae.objectives.specs import parse
from pyro_vae.pairs.table import table as table_pair
from pyro_vae.reporting import tables
from pyro_vae.training.fit import fit

__all__ = ["impute"]

INTERVAL = 0.9


@app.command()
def impute(
    table: Annotated[
        Path, typer.Argument(help="file: csv, tsv or parquet; empty cells are missing")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="file to write: csv, tsv or parquet")],
    draws: Annotated[
        int,
        typer.Option(
            min=0, help="write the table so often, each time with other draws: column draw"
        ),
    ] = 0,
    interval: Annotated[
        bool,
        typer.Option("--interval", help="columns of sd and 90 % intervals beside those of numbers"),
    ] = False,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            help="COLUMN=KIND; repeat. Kinds: "
            + ", ".join(KINDS)
            + "; or classes in their order: 'COLUMN=low<mid<high'",
        ),
    ] = None,
    drop: Annotated[
        str | None, typer.Option(help="columns by comma that are copied as they are")
    ] = None,
    latent: Annotated[int, typer.Option(min=1, help="dimensions of z")] = 8,
    objective: Annotated[
        str, typer.Option(help="see pyro-vae objectives")
    ] = "iwae:num_particles=10,estimator=dreg",
    epochs: Annotated[int, typer.Option(min=1, help="passes over the rows")] = 200,
    batch_size: BatchSize = 100,
    lr: Rate = 1e-3,
    num_particles: Annotated[
        int, typer.Option("--num-particles", "-K", min=1, help="of the importance sampling")
    ] = 1000,
    run: Annotated[Path | None, typer.Option(help="folder that keeps the training")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    compile: Compile = "auto",
) -> None:
    """Fill the missing cells of a table.

    Trains a VAE on the table and gives each missing cell its best value given the rest of its row; with
    --draws that many tables below each other, for multiple imputation.

    \b
    pyro-vae impute table.csv -o filled.csv
    pyro-vae impute table.csv -o filled.csv --draws 20 --kind visits=count --drop id
    """
    if draws and interval:
        raise ValueError("came --draws and --interval, wanted one of them")
    tables.check_path(out)
    if table.exists() and out.exists() and out.samefile(table):
        raise ValueError(f"--out: came {out}, which is the table to fill; wanted another file")
    whole = read_table(table)
    left = _left(whole, drop)
    frame = whole.drop(columns=left)
    columns = Columns.of(frame, _kinds(kind))
    rows = columns.batch(frame)
    _note(rows)
    pyro.set_rng_seed(seed)
    model, guide = table_pair(rows, latent, ordinal=columns.ordinal)
    trained = fit(
        *(model, guide, rows, parse(objective)),
        epochs=epochs,
        batch_size=batch_size,
        optimizer=functools.partial(torch.optim.Adam, lr=lr, fused=True),
        seed=seed,
        device=device,
        compile=compile,
        out=run,
    )
    found = impute_rows(
        *(model, guide, rows, num_particles),
        draws=draws,
        loss=columns.losses("l2"),
        interval=INTERVAL if interval else None,
        seed=seed,
    )

    def filled(values: Any) -> Any:
        return columns.filled(whole, values)

    if draws:
        made = [
            filled({site: values[i] for site, values in found.draws.items()}) for i in range(draws)
        ]
        result = tables.stacked(made, "draw")
    else:
        result = filled(found.values)
        for name, values in (("sd", found.sd), ("low", found.lower), ("high", found.upper)):
            result = result.assign(**columns.beside(values, name) if interval else {})
    tables.write_frame(out, result)
    cells = int(frame.isna().to_numpy().sum())
    typer.echo(
        f"{out}: {cells} cells of {len(frame)} rows filled{f', {draws} times' if draws else ''}; loss "
        f"{trained.history[-1]['loss']:.3f} nats per row, effective sample size "
        f"{float(found.ess.median()):.0f} of {num_particles}"
    )


def _left(frame: Any, drop: str | None) -> list[str]:
    names = [name.strip() for name in drop.split(",")] if drop else []
    if unknown := [name for name in names if name not in frame.columns]:
        raise ValueError(f"--drop: came {unknown}, the columns are {list(frame.columns)}")
    return names


def _kinds(given: list[str] | None) -> dict[str, str | list[str]]:
    """Column -> kind, or its classes in order."""
    kinds: dict[str, str | list[str]] = {}
    for text in given or ():
        name, _, kind = text.rpartition("=")
        order = [part.strip() for part in kind.split("<")]
        if not name or not all(order):
            raise ValueError(
                f"--kind: came {text!r}, wanted COLUMN=KIND, or COLUMN=LOWEST<...<HIGHEST"
            )
        kinds[name.strip()] = order if len(order) > 1 else order[0]
    return kinds


def _note(rows: Any) -> None:
    """Say which rows hold nothing."""
    seen = torch.stack([rows.seen(site) for site in rows]).any(0)
    if nothing := (~seen).nonzero().flatten().tolist():
        shown = f"rows {nothing[:5]}{' and others' if len(nothing) > 5 else ''}"
        typer.echo(
            f"note: {len(nothing)} rows hold nothing ({shown}, from 0); they are filled as rows of "
            "which nothing is known",
            err=True,
        )
