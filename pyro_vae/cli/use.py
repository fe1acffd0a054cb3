"""Commands that use a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from torch import Tensor

from pyro_vae import data, reporting
from pyro_vae.batch import Batch
from pyro_vae.cli.options import (
    Device,
    ImageShape,
    Json,
    Particles,
    RunData,
    RunFolder,
    RunPair,
    Seed,
    Split,
    app,
    dumps,
    image_shape,
    show,
)
from pyro_vae.cli.source import Source, check_alike
from pyro_vae.evaluation import predict
from pyro_vae.evaluation.annealing import annealed
from pyro_vae.files import replacing
from pyro_vae.reporting import FORMATS, tables
from pyro_vae.reporting.arviz import to_arviz
from pyro_vae.saved import changed, load
from pyro_vae.training.fit import Run
from pyro_vae.training.runs import Folder

__all__ = ["encode", "evaluate", "export", "reconstruct", "sample"]

Out = Annotated[Path, typer.Option("--out", help="file to write; its suffix says what")]
Raw = Annotated[
    bool, typer.Option("--raw", help="leave values scaled as the model has them, not as they came")
]
Draws = Annotated[int, typer.Option(min=1, help="draws from the posterior of a row")]
Annealed = Annotated[
    int | None,
    typer.Option(
        "--annealed",
        min=2,
        metavar="TEMPERATURES",
        help="judge the model whatever its guide is, too, by annealed importance sampling",
    ),
]
Rows = Annotated[int | None, typer.Option(min=1, help="the first ROWS only")]
Given = Annotated[
    list[str] | None,
    typer.Option(
        "--given",
        metavar="SITE[=FILE]",
        help="draw the rest given SITE of the run's data (see --split), or of a file; repeat",
    ),
]


@dataclass(frozen=True)
class Opened:
    """A run, and where its data are.

    Args:
        path: run folder.
        pair: what builds its pair, unless a ready builder does.
        data: other data than the run's.
        device: where to work.
    """

    path: Path
    pair: str | None
    data: str | None
    device: str = "auto"

    @cached_property
    def config(self) -> dict[str, Any]:
        return Folder(self.path).config()

    @property
    def command(self) -> dict[str, Any]:
        """What the run was started with; nothing, if not from the command line."""
        return self.config.get("command", {})  # type: ignore[no-any-return]

    @property
    def record(self) -> dict[str, Any]:
        """What was done to the training rows."""
        return self.config.get("data", {})  # type: ignore[no-any-return]

    def run(self) -> Run:
        return load(self.path, self.pair, device=self.device)

    @cached_property
    def source(self) -> Source:
        """The data of the run, or those given instead, with the same done to them."""
        return self._source(self.command.get("sites"), self.command.get("data_options"))

    def label(self, name: str) -> Source:
        """A label of the same rows, a site or a column, alone."""
        return self._source(f"{name}={name}" if "columns" in self.record else name)

    def _source(self, sites: str | None, options: list[str] | None = None) -> Source:
        if self.data is None and "data" not in self.command:
            raise ValueError(f"{self.path}: it does not say of which data; say so by --data")
        try:
            return Source(self.data or self.command["data"], sites, options)
        except FileNotFoundError as error:
            if self.data:
                raise
            raise ValueError(
                f"{self.path}: its data are gone: {error}; say where by --data"
            ) from None

    def rows(self, split: str, rows: int | None = None) -> Batch:
        """Rows of a split as the run's training rows were made."""
        judged = self.source.judged(self._split(split), self.record)
        shapes = {site: list(judged.shape(site)[1:]) for site in judged}
        example = Folder(self.path).example()
        if isinstance(example, Batch):
            shapes = {site: list(example.shape(site)[1:]) for site in example}
        check_alike(shapes, judged, split)
        return judged if rows is None else judged.rows(slice(0, rows))

    def given(self, items: Sequence[str], split: str, rows: int | None) -> Batch:
        """Sites to go on from: SITE is that of the run's rows, SITE=FILE a file's own site of that
        name, or its only one."""
        pairs = [[part.strip() for part in item.partition("=")] for item in items]
        own = any(not equals for _, equals, _ in pairs)
        ours = self.rows(split, rows) if own else Batch(size=0)
        values, observed = {}, {}
        for site, equals, file in pairs:
            of = self._file(site, file, rows) if equals else ours
            if site not in of:
                raise ValueError(f"--given: came {site!r}, the run's data have {list(of)}")
            values[site] = of[site]
            if site in of.incomplete:
                observed[site] = of.mask(site)
        return Batch(values, observed)

    def _file(self, site: str, file: str, rows: int | None) -> Batch:
        found = data.load(file).still()
        own = site if site in found else next(iter(found))
        if own != site and len(found.sites) > 1:
            raise ValueError(
                f"--given {site}={file}: the file has sites {list(found)}, not {site!r}"
            )
        masks = {site: found.mask(own)} if own in found.incomplete else {}
        batch = Batch({site: found[own]}, masks)
        steps = [step for step in self.record.get("steps", ()) if step.get("site") == site]
        batch = data.standardize_as({**self.record, "steps": steps}, batch)
        example = Folder(self.path).example()
        if isinstance(example, Batch) and site in example:
            check_alike({site: list(example.shape(site)[1:])}, batch, file)
        return batch if rows is None else batch.rows(slice(0, rows))

    def numbers(self, split: str, size: int) -> Tensor:
        """Numbers that the ``size`` rows of a split have in their file."""
        return self.source.numbers(self._split(split), size)

    def _split(self, split: str) -> str:
        """What the run calls valid may be a share of the training rows."""
        held_out = self.command.get("valid")
        if split != "valid" or held_out in (None, *self.source.record["splits"]):
            return split
        return f"valid={held_out}"

    def changed(self, run: Run) -> str:
        """Files that are not what they were when the run was made."""
        made = self.command.get("data_sha256")
        same = self.data or made in (None, self.source.record.get("sha256"))
        files = ["" if same else self.command["data"], changed(run.config, run.model)]
        return ", ".join(filter(None, files))

    def write(
        self,
        out: Path,
        arrays: Mapping[str, Tensor],
        raw: bool = False,
        shape: str | None = None,
        originals: Batch | None = None,
    ) -> None:
        """Write what a model made of rows by the suffix of ``out``: a figure, or a table."""
        record = self.record
        if not raw:
            arrays = {name: data.undo(record, name, value) for name, value in arrays.items()}
        if out.suffix in FORMATS:
            reporting.plots.save(_picture(arrays, originals, record, shape, raw), out)
        else:
            columns = record.get("columns") or {}
            tables.write(out, {name: value.numpy() for name, value in arrays.items()}, columns)
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in arrays.items())
        typer.echo(f"{out}: {shapes}")


@app.command()
def evaluate(
    run: RunFolder,
    data_name: RunData = None,
    pair: RunPair = None,
    split: Split = "test",
    num_particles: Particles = 500,
    temperatures: Annealed = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Judge a run on held-out rows.

    log p(x) >=, ELBO, rate and active units, each with its standard error over rows; bits/dim too for
    8-bit images.

    \b
    pyro-vae evaluate runs/a -K 5000
    pyro-vae evaluate runs/a --annealed 500
    """
    opened = Opened(run, pair, data_name, device)
    kept = opened.run()
    rows = opened.rows(split)
    result = kept.evaluate(rows, num_particles, seed=seed)
    if files := opened.changed(kept):
        typer.echo(f"note: changed since the run: {files}", err=True)
    summary = result.summary() | {"data": opened.source.place, "split": split}
    text = str(result)
    if temperatures:
        whatever_guide = annealed(kept.model, rows, temperatures=temperatures, seed=seed)
        summary["annealed"] = whatever_guide.summary()
        text += f"\nwhatever the guide: {whatever_guide}"
    show(summary, text, as_json)
    try:
        Folder(run).write("metrics.json", dumps(summary, indent=2) + "\n")
    except ValueError as error:  # the numbers are there all the same
        typer.echo(f"note: {error}", err=True)


@app.command()
def sample(
    run: RunFolder,
    out: Out,
    num: Annotated[
        int | None,
        typer.Option("--num", "-n", min=1, help="rows (default: 64; with --given, all there are)"),
    ] = None,
    mean: Annotated[
        bool, typer.Option("--mean", help="expected values given z, instead of draws")
    ] = False,
    given: Given = None,
    split: Split = "test",
    sites: Annotated[
        str | None, typer.Option("--sites", "--site", help="sites by comma (default: all)")
    ] = None,
    raw: Raw = False,
    shape: ImageShape = None,
    data_name: RunData = None,
    pair: RunPair = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Draw new rows from the model, or what rows lack from the guide and the model.

    \b
    pyro-vae sample runs/a --num 100 --out samples.npz
    pyro-vae sample runs/a --out samples.png
    pyro-vae sample runs/a --given y --site x --num 20 --out from_labels.png
    pyro-vae sample runs/a --given x=images.npy --site y --mean --out labels.csv
    """
    opened = Opened(run, pair, data_name, device)
    options: dict[str, Any] = {"sites": _names(sites), "mean": mean, "seed": seed}
    kept = opened.run()
    if given:
        batch = opened.given(given, split, num)
        drawn = predict.sample(kept.model, given=batch, guide=kept.guide, **options)
    else:
        drawn = predict.sample(kept.model, num or 64, **options)
    opened.write(out, drawn, raw, shape)


@app.command()
def reconstruct(
    run: RunFolder,
    out: Out,
    data_name: RunData = None,
    split: Split = "test",
    rows: Rows = None,
    draws: Draws = 16,
    fill: Annotated[
        bool, typer.Option("--fill", help="keep what is observed, predict what is missing alone")
    ] = False,
    raw: Raw = False,
    shape: ImageShape = None,
    pair: RunPair = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Expected data given what the guide makes of each row; with --fill, in the gaps alone.

    \b
    pyro-vae reconstruct runs/a --split all --fill --out filled.csv
    pyro-vae reconstruct runs/a --rows 10 --out reconstructions.png
    """
    opened = Opened(run, pair, data_name, device)
    kept, batch = opened.run(), opened.rows(split, rows)
    means = predict.reconstruct(kept.model, kept.guide, batch, num_draws=draws, seed=seed)
    if fill:
        means = {site: x.where(~batch.mask(site), batch[site]) for site, x in means.items()}
    opened.write(out, means, raw, shape, batch)


@app.command()
def encode(
    run: RunFolder,
    out: Out,
    data_name: RunData = None,
    split: Split = "test",
    draws: Draws = 64,
    pair: RunPair = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Write the posterior mean and standard deviation of every row's latents.

    \b
    pyro-vae encode runs/a --out codes.csv
    pyro-vae encode runs/a --split train --out codes.parquet
    """
    opened = Opened(run, pair, data_name, device)
    kept, batch = opened.run(), opened.rows(split)
    codes = predict.encode(kept.model, kept.guide, batch, num_draws=draws, seed=seed)
    opened.write(out, {"row": opened.numbers(split, len(batch)), **codes})


@app.command()
def export(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option("--out", help="file to write (default: posterior.nc in RUN)")
    ] = None,
    data_name: RunData = None,
    split: Split = "test",
    rows: Rows = 100,
    draws: Draws = 200,
    pair: RunPair = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Write posterior draws, predictive draws and importance weights for ArviZ (netCDF).

    \b
    pyro-vae export runs/a --rows 50 --draws 500
    python -c "import arviz as az; print(az.from_netcdf('runs/a/posterior.nc'))"
    """
    out = run / "posterior.nc" if out is None else out
    if out.suffix != ".nc":
        raise ValueError(f"--out: came {out}, wanted a name that ends in .nc")
    if not out.parent.is_dir():
        raise ValueError(f"--out: {out}: no such folder: {out.parent}")
    opened = Opened(run, pair, data_name, device)
    kept, batch = opened.run(), opened.rows(split, rows)
    columns = kept.config.get("data", {}).get("columns", {})
    named = {site: names for site, names in columns.items() if len(batch.shape(site)) == 2}
    idata = to_arviz(
        kept,
        batch,
        draws,
        seed=seed,
        dims={site: [f"{site}_column"] for site in named},
        coords={f"{site}_column": names for site, names in named.items()},
    )
    with TemporaryDirectory() as folder:  # what writes netCDF crashes where a disk is full
        file = Path(folder, "posterior.nc")
        idata.to_netcdf(str(file))
        with replacing(out) as temporary:
            temporary.write_bytes(file.read_bytes())
    scaled = [step["text"] for step in batch.record.get("steps", ()) if "log_jacobian" in step]
    typer.echo("; ".join([f"{out}: {draws} draws of {len(batch)} rows", *scaled]))


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _picture(
    arrays: Mapping[str, Tensor],
    originals: Batch | None,
    record: Mapping[str, Any],
    shape: str | None,
    raw: bool,
) -> Any:
    """Samples, or reconstructions below the originals, of the one site that is data."""
    seen = record.get("sites", {}) if originals is None else originals
    sites = [name for name in arrays if name in seen] or list(arrays)
    if len(sites) > 1:
        raise ValueError(f"--out: a figure is of one site, came {sites}; say which by --sites")
    (site,) = sites
    options: dict[str, Any] = {
        "image_shape": image_shape(shape),
        "names": record.get("columns", {}).get(site),
    }
    if originals is None:
        return reporting.plots.samples(arrays[site].numpy(), **options)
    data_values = originals[site] if raw else data.undo(record, site, originals[site])
    return reporting.plots.reconstructions(
        data_values.numpy(), arrays[site].numpy(), originals.mask(site).numpy(), **options
    )
