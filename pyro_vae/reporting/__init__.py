"""What leaves the library for other tools: ArviZ, figures, tables."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["FORMATS", "images", "plots"]

FORMATS = (".png", ".svg", ".pdf")  # of figures

if TYPE_CHECKING:
    from pyro_vae.reporting import images, plots
else:

    def __getattr__(name: str) -> Any:
        if name in ("images", "plots"):  # on demand, since they import matplotlib
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
