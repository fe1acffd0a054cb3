"""Data sets on their way into a Batch: named ones, files, tables and images; what is done to them."""

from pyro_vae.data.load import describe, load
from pyro_vae.data.named import available
from pyro_vae.data.scale import standardize, standardize_as, undo
from pyro_vae.data.splits import split

__all__ = ["load", "describe", "available", "split", "standardize", "standardize_as", "undo"]
