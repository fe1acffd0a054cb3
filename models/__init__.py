"""Generative programs: what is drawn from what. Import as ``pyro_vae.models``."""

from pyro_vae.models.latent import LatentVariableModel
from pyro_vae.models.multimodal import MultimodalModel

__all__ = ["LatentVariableModel", "MultimodalModel"]
