"""The command that looks at data."""

from __future__ import annotations

from typing import Annotated

import typer

from pyro_vae import data as library
from pyro_vae.cli.options import DataOptions, Json, Sites, app, show
from pyro_vae.cli.source import Source

__all__ = ["data"]


@app.command()
def data(
    name: Annotated[
        str | None, typer.Argument(help="a name or a file; none lists the data sets by name")
    ] = None,
    sites: Sites = None,
    data_option: DataOptions = None,
    as_json: Json = False,
) -> None:
    """Describe a data set; fetch it first, if it is one by name that is not here yet.

    \b
    pyro-vae data
    pyro-vae data mnist -d binarize=dynamic
    pyro-vae data my_table.csv
    """
    if name is None:
        known = library.available()
        width = max(map(len, known))
        show(
            known, "\n".join(f"{name:<{width}}  {where}" for name, where in known.items()), as_json
        )
        return
    record = Source(name, sites, data_option).record
    show(record, _text(record), as_json)


def _text(record: dict[str, object]) -> str:
    lines = []
    for key, value in record.items():
        if key == "sites" and isinstance(value, dict):
            for site, about in value.items():
                shape, missing = about["shape"], about["missing"]
                lines.append(f"site {site}: {shape} {about['dtype']}, {missing} entries missing")
        elif key == "steps" and isinstance(value, list):
            lines += [f"step: {step['text']}" for step in value]
        else:
            lines.append(
                f"{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
            )
    return "\n".join(lines)
