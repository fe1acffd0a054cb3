"""Generative programs: what is drawn from what. Import as ``pyro_vae.models``."""

from pyro_vae.models.hierarchical import HierarchicalModel
from pyro_vae.models.latent import LatentVariableModel
from pyro_vae.models.missing import SelectionModel
from pyro_vae.models.multimodal import MultimodalModel

__all__ = ["HierarchicalModel", "LatentVariableModel", "MultimodalModel", "SelectionModel"]
