"""Inference programs: how latents are drawn given data. Import as ``pyro_vae.guides``."""

from pyro_vae.guides.amortized import AmortizedGuide
from pyro_vae.guides.experts import ExpertsGuide, SurrogatesGuide
from pyro_vae.guides.hierarchical import (
    BottomUpGuide,
    TopDownGuide,
    precision_weighted,
    residual,
)
from pyro_vae.guides.joint import JointGuide

__all__ = [
    "AmortizedGuide",
    "BottomUpGuide",
    "ExpertsGuide",
    "JointGuide",
    "SurrogatesGuide",
    "TopDownGuide",
    "precision_weighted",
    "residual",
]
