"""(loss, optimizer) -> a training step: the one place where a program is made fast."""

from pyro_vae.compiled.function import Fast
from pyro_vae.compiled.precision import PRECISIONS, in_precision
from pyro_vae.compiled.step import Step, make_step
from pyro_vae.compiled.worth import LEVELS

__all__ = ["LEVELS", "PRECISIONS", "Fast", "Step", "in_precision", "make_step"]
