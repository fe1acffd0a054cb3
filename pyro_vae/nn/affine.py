"""Fixed maps between the units of the data and those of a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Affine", "OneHot"]


class Affine(nn.Module):
    """``shift + scale * x``, entry by entry, with fixed ``shift`` and ``scale``.

    Takes data of any dtype (``uint8`` and ``float64`` included) to that of a network's weights.

    Args:
        shift: number, or tensor that broadcasts to ``[*event]``.
        scale: likewise.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor | float = 0.0, scale: Tensor | float = 1.0) -> None:
        super().__init__()
        dtype = torch.get_default_dtype()
        self.register_buffer("shift", torch.as_tensor(shift, dtype=dtype).clone())
        self.register_buffer("scale", torch.as_tensor(scale, dtype=dtype).clone())
        self.event_shape = torch.broadcast_shapes(self.shift.shape, self.scale.shape)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., *event] -> [..., *event]``."""
        out = self.shift + self.scale * x.to(self.scale.dtype)
        if out.shape != x.shape:
            raise ValueError(
                f"Affine: came {list(x.shape)}, wanted [..., *{list(self.event_shape)}]"
            )
        return out


class OneHot(nn.Module):
    """Classes as indicators, ``[..., *event] -> [..., C, *event]``, channels first.

    A comparison, since ``torch.nn.functional.one_hot`` checks the range of its input on the host.
    """

    classes: Tensor

    def __init__(self, classes: int, event_dim: int) -> None:
        super().__init__()
        indices = torch.arange(classes, dtype=torch.get_default_dtype())
        self.register_buffer("classes", indices.reshape(-1, *[1] * event_dim), persistent=False)
        self.event_dim = event_dim

    def forward(self, x: Tensor) -> Tensor:
        hits: Tensor = x.unsqueeze(x.dim() - self.event_dim) == self.classes
        return hits.to(self.classes.dtype)
