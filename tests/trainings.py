"""Trainings without a progress bar, and how what they leave is compared."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_vae.training import fit as fit_module
from pyro_vae.training.fit import Run

SGD: Any = partial(torch.optim.SGD, lr=0.05)
ADAM: Any = partial(torch.optim.Adam, lr=0.05)
STAND_STILL: Any = partial(torch.optim.SGD, lr=0.0)


def fit(*args: Any, **options: Any) -> Run:
    return fit_module.fit(*args, **{"progress": False, **options})


def parameters(*modules: Any) -> list[Tensor]:
    """Copies of parameters and buffers."""
    tensors = [t for module in modules for t in module.state_dict().values()]
    return [t.detach().clone() for t in tensors]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def plain(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Without the time it took."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]
