"""Several networks of one kind as one: trainings that differ in nothing but their seed share a step."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["Stacked"]


class Stacked(nn.Module):
    """S networks with the same layers, each for its own slice of the input.

    In a program under ``pyro.plate("seeds", S, dim=-2)`` around its rows, S small trainings cost
    about as much as one. Nothing passes from one to another: every (seed, row) has its own bound.

    Args:
        nets: modules ``[rows, *event] -> [rows, *out]`` that differ in the values of their
            parameters. These are copied, one stack ``[S, *parameter]`` for each.
        event_dim: how many trailing dimensions of the input belong to one row.

    Raises:
        ValueError: no networks, or networks of different layers.
    """

    def __init__(self, nets: Sequence[nn.Module], event_dim: int = 1) -> None:
        super().__init__()
        shapes = [{name: value.shape for name, value in _state(net).items()} for net in nets]
        if not nets or any(other != shapes[0] for other in shapes):
            raise ValueError(
                f"Stacked: came {len(nets)} networks, wanted some with the same layers"
            )
        self.size, self.event_dim = len(nets), event_dim
        self.net = copy.deepcopy(nets[0])
        states = [_state(net) for net in nets]
        for name in shapes[0]:
            home, _, attribute = name.rpartition(".")
            owner = self.net.get_submodule(home)
            stack = torch.stack([state[name].detach() for state in states])
            kept = attribute in owner._parameters
            setattr(owner, attribute, nn.Parameter(stack) if kept else stack)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., S, B, *event] -> [..., S, B, *out]``; of rows ``[B, *event]`` all get the same."""
        lead = x.dim() - self.event_dim
        seeds = max(0, lead - 2)
        rows, dim = (x, None) if lead < 2 else (x.movedim(seeds, 0), 0)
        out: Tensor = torch.vmap(self._one, (0, dim), randomness="different")(
            _state(self.net), rows
        )
        return out.movedim(0, seeds)

    def _one(self, state: dict[str, Tensor], x: Tensor) -> Tensor:
        lead = x.shape[: x.dim() - self.event_dim]
        out: Tensor = functional_call(self.net, state, (x.flatten(0, len(lead) - 1),))
        return out.reshape(*lead, *out.shape[1:])

    def extra_repr(self) -> str:
        return f"{self.size}"


def _state(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their names."""
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}
