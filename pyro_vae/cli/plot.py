"""The command that draws figures of a run or of a comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from pyro_vae import data, reporting
from pyro_vae.batch import Batch
from pyro_vae.cli.options import Device, ImageShape, RunData, RunPair, Seed, Split, app, image_shape
from pyro_vae.cli.use import Opened
from pyro_vae.evaluation import paths, predict
from pyro_vae.evaluation.diagnostics import khat_threshold
from pyro_vae.evaluation.likelihood import Evaluation
from pyro_vae.reporting import FORMATS
from pyro_vae.training.fit import Run

__all__ = ["plot"]

ROWS, PARTICLES = 1000, 100  # that figures of numbers are made from


@dataclass(frozen=True)
class Subject:
    """What the figures of a run are made from, each made once and when it is wanted."""

    opened: Opened
    split: str
    site: str | None
    label: str | None
    shape: tuple[int, ...] | None
    seed: int

    @cached_property
    def run(self) -> Run:
        return self.opened.run()

    @cached_property
    def rows(self) -> Batch:
        return self.opened.rows(self.split, ROWS)

    @cached_property
    def judged(self) -> Evaluation:
        return self.run.evaluate(self.rows, PARTICLES, seed=self.seed)

    @cached_property
    def codes(self) -> dict[str, Tensor]:
        return predict.encode(self.run.model, self.run.guide, self.rows, seed=self.seed)

    @cached_property
    def latent(self) -> str:
        return next(iter(self.codes))

    @cached_property
    def x(self) -> str:
        """The site that is drawn."""
        decoded = self.decode(self.few(2))
        sites = [name for name in decoded if self.site in (None, name)]
        if not sites:
            raise ValueError(f"--site: came {self.site!r}, wanted one of {list(decoded)}")
        return sites[0]

    @property
    def is_image(self) -> bool:
        return reporting.images.is_image(self.rows.shape(self.x)[1:], self.shape)

    def decode(self, rows: Batch) -> dict[str, Tensor]:
        return predict.reconstruct(self.run.model, self.run.guide, rows, seed=self.seed)

    def few(self, number: int) -> Batch:
        return self.rows.rows(slice(0, number))

    def undone(self, values: Tensor) -> Any:
        """Values of the site in the units that the data came in."""
        return data.undo(self.run.config.get("data", {}), self.x, values).numpy()

    @property
    def options(self) -> dict[str, Any]:
        columns = self.run.config.get("data", {}).get("columns", {})
        return {"image_shape": self.shape, "names": columns.get(self.x)}

    # --- figures --------------------------------------------------------------------------------

    def training(self) -> Any:
        return reporting.plots.training(self.run.history)

    def samples(self) -> Any:
        number = 64 if self.is_image else ROWS  # expected pixels; draws of a table's columns
        drawn = predict.sample(
            self.run.model, number, sites=[self.x], mean=self.is_image, seed=self.seed
        )
        observed = self.undone(self.rows[self.x].where(self.rows.mask(self.x), torch.nan))
        return reporting.plots.samples(self.undone(drawn[self.x]), observed, **self.options)

    def reconstructions(self) -> Any:
        rows = self.few(20) if self.is_image else self.rows
        decoded = self.undone(self.decode(rows)[self.x])
        originals, seen = self.undone(rows[self.x]), rows.mask(self.x).numpy()
        return reporting.plots.reconstructions(originals, decoded, seen, **self.options)

    def interpolations(self) -> Any:
        first, second = self.rows.rows(slice(0, 6)), self.rows.rows(slice(6, 12))
        path = paths.interpolate(self.run.model, self.run.guide, first, second, seed=self.seed)
        return reporting.plots.interpolations(self.undone(path[self.x]), image_shape=self.shape)

    def traversals(self) -> Any:
        rate = self.judged.rate[self.latent].flatten()
        dims = rate.argsort(descending=True)[:10].tolist()
        steps = paths.traverse(
            self.run.model, self.run.guide, self.few(1), dims, latent=self.latent, seed=self.seed
        )
        return reporting.plots.traversals(
            self.undone(steps[self.x][0]),
            rate=rate[dims].numpy(),
            dims=dims,
            latent=self.latent,
            image_shape=self.shape,
        )

    def latent_map(self) -> Any:
        means, name = self.codes[self.latent].flatten(1).numpy(), self.label
        if name is None:
            return reporting.plots.latent_map(means, latent=self.latent)
        labels = self.rows if name in self.rows else self.opened.label(name).rows(self.split)
        labels = labels.rows(slice(0, len(means)))
        known = labels.mask(name).numpy()
        colours = labels[name].numpy() if known.all() else np.where(known, labels[name], np.nan)
        return reporting.plots.latent_map(means, colours, latent=self.latent, label=name)

    def rates(self) -> Any:
        rate, active = self.judged.rate[self.latent], self.judged.active.get(self.latent)
        return reporting.plots.rates(rate, active, latent=self.latent)

    def weights(self) -> Any:
        khat, threshold = self.judged.khat.numpy(), khat_threshold(PARTICLES)
        return reporting.plots.weights(khat, threshold, num_particles=PARTICLES)


PIXELS = ("interpolations", "traversals")  # what tables have no figure of
KINDS: dict[str, Callable[[Subject], Any]] = {
    "training": Subject.training,
    "samples": Subject.samples,
    "reconstructions": Subject.reconstructions,
    "interpolations": Subject.interpolations,
    "traversals": Subject.traversals,
    "latent_map": Subject.latent_map,
    "rates": Subject.rates,
    "weights": Subject.weights,
}


@app.command()
def plot(
    folder: Annotated[Path, typer.Argument(help="folder of a run, or of a comparison")],
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", help="repeat: " + ", ".join(KINDS) + " (default: what applies)"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for the figures (default: figures in FOLDER)")
    ] = None,
    format: Annotated[str, typer.Option("--format", help="png, svg or pdf")] = "png",
    site: Annotated[str | None, typer.Option(help="what to draw, of several sites")] = None,
    label: Annotated[str | None, typer.Option(help="site that colours the latent map")] = None,
    shape: ImageShape = None,
    data_name: RunData = None,
    pair: RunPair = None,
    split: Split = "test",
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Draw figures of a run (samples, reconstructions, latent space, ...) or of a comparison.

    \b
    pyro-vae plot runs/a --image-shape 8,8 --label y
    pyro-vae plot runs/a --kind samples --kind traversals --format svg
    pyro-vae plot runs/grid
    """
    if f".{format}" not in FORMATS:
        raise ValueError(f"--format: came {format!r}, wanted one of {[f[1:] for f in FORMATS]}")
    figures: dict[str, Any] = {}
    if (folder / "comparison.json").exists():
        if kind:
            raise ValueError(f"--kind: {folder} is a comparison, which has one figure")
        records = json.loads((folder / "comparison.json").read_text())["objectives"]
        figures["comparison"] = reporting.plots.comparison(records)
    else:
        if unknown := set(kind or ()) - set(KINDS):
            raise ValueError(f"--kind: came {sorted(unknown)}, wanted some of {list(KINDS)}")
        opened = Opened(folder, pair, data_name, device)
        subject = Subject(opened, split, site, label, image_shape(shape), seed)
        kinds = kind or [name for name in KINDS if name not in PIXELS or subject.is_image]
        for name in kinds:
            try:
                figures[name] = KINDS[name](subject)
            except ValueError as error:
                if kind:
                    raise
                typer.echo(f"no {name}: {error}", err=True)
    place = out or folder / "figures"
    place.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        reporting.plots.save(figure, place / f"{name}.{format}")
        typer.echo(place / f"{name}.{format}")
