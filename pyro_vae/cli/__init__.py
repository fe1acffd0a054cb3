"""The command line: translates, calls the library, prints."""

from pyro_vae.cli.main import main
from pyro_vae.cli.options import app

__all__ = ["app", "main"]
