"""Ready pairs of model and guide, built for given data.

A pair builder is any ``build(batch, **options) -> (model, guide)``. It looks at the batch (training
rows) for shapes, for the kind of values, and for where the outputs should start, and keeps
nothing: whatever it read off the data is in the modules' ``state_dict``.
"""

from pyro_vae.pairs.by_name import BUILDERS as BUILDERS
from pyro_vae.pairs.by_name import part, rebuilt
from pyro_vae.pairs.hierarchical import hierarchical
from pyro_vae.pairs.missing import missing
from pyro_vae.pairs.multimodal import multimodal
from pyro_vae.pairs.parts import inputs_for, likelihood_for
from pyro_vae.pairs.table import table
from pyro_vae.pairs.vae import update_sigma, vae

__all__ = [
    "hierarchical",
    "inputs_for",
    "likelihood_for",
    "missing",
    "multimodal",
    "part",
    "rebuilt",
    "table",
    "update_sigma",
    "vae",
]
