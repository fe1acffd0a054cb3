"""Entry point of the command line: every error is one line and exit code 2."""

from __future__ import annotations

import os
import re
import sys
import traceback
from pathlib import Path

import pyro
import typer

from pyro_vae.cli import data, impute, plot, train, use
from pyro_vae.cli.options import app
from pyro_vae.saved import imported, line

__all__ = ["main"]

COMMANDS = (data, train, use, impute, plot)  # which register theirs


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
        typer.echo(f"error: {where}{line(error)}", err=True)
        code = 2
    if code == 130:
        typer.echo("stopped; what is finished is kept: repeat a fit with --resume", err=True)
    return code


def _where(error: BaseException) -> str:
    """The line of the user's file that an error came through, in whatever process."""
    text = "".join(traceback.format_exception(error))
    places = re.findall(r'File "(.+)", line (\d+)', text)
    mine = [f"{Path(file).name}:{line}: " for file, line in places if file in imported]
    return mine[-1] if mine else ""
