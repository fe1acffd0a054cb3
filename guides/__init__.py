"""Inference programs: how latents are drawn given data. Import as ``pyro_vae.guides``."""

from pyro_vae.guides.amortized import AmortizedGuide

__all__ = ["AmortizedGuide"]
