"""Data sets on their way into a Batch: named ones, and files of arrays."""

from pyro_vae.data.load import describe, load, split

__all__ = ["load", "describe", "split"]
