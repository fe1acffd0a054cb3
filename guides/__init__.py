"""Inference programs: how latents are drawn given data. Import as ``pyro_vae.guides``."""

from pyro_vae.guides.amortized import AmortizedGuide
from pyro_vae.guides.joint import JointGuide

__all__ = ["AmortizedGuide", "JointGuide"]
