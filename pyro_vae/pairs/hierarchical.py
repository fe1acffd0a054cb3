"""Several layers of latents above one site of data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn

from pyro_vae.batch import Batch
from pyro_vae.conditionals.gaussian import DiagonalGaussian
from pyro_vae.guides.hierarchical import BottomUpGuide, Merge, TopDownGuide, precision_weighted
from pyro_vae.models.hierarchical import HierarchicalModel
from pyro_vae.nn.concatenated import Concatenated
from pyro_vae.nn.leading import leading
from pyro_vae.nn.mlp import dense
from pyro_vae.pairs.by_name import ready
from pyro_vae.pairs.parts import (
    Architecture,
    Part,
    built,
    built_prior,
    check_parts,
    check_support,
    inputs_for,
    likelihood_for,
    observed,
    tupled,
)

__all__ = ["hierarchical"]


@ready
def hierarchical(
    batch: Batch,
    latent: int | Sequence[int] = (32, 16),
    hidden: int | Sequence[int | Sequence[int]] = 200,
    likelihood: Part | None = None,
    prior: Part | None = None,
    family: Part = DiagonalGaussian,
    merge: Merge | None = None,
    skip: bool = False,
    net: Architecture = dense,
    activation: Callable[[], nn.Module] = nn.ReLU,
    norm: Callable[[int], nn.Module] | None = None,
    site: str = "x",
) -> tuple[HierarchicalModel, BottomUpGuide | TopDownGuide]:
    """Layers of latents z1, z2, ... above one site, z1 next to the data.

    Each layer has one network up and one down, the second the mirror of the first. The published
    nets are ``latent=(100, 50), hidden=((200, 200), (100, 100)), activation=nn.Tanh`` (Burda et al.
    2016, arXiv:1509.00519), and ``latent=(64, 32, 16, 8, 4)``, ``hidden`` the pairs (512, 512) to
    (32, 32), ``merge=precision_weighted, activation=nn.LeakyReLU, norm=nn.BatchNorm1d`` (Sønderby et
    al. 2016, arXiv:1602.02282).

    Args:
        batch: training rows, on the device where the pair is to live.
        latent: dimensions of z1, z2, ...
        hidden: widths of the network below each layer, from the data up: one number or several, the
            last of them that of the features of which the latent is inferred; or one number for all
            layers. For images, channels of the stages, then the features: ``((32, 64, 128), 50)``.
        likelihood: p(x | z1), as for ``vae``.
        prior: of the topmost latent, as for ``vae``.
        family: what every other latent is given its parents, in the model and in the guide, as
            ``vae``'s posterior. ``Bernoulli`` makes a sigmoid belief network.
        merge: None infers from the bottom up, z1 of the data and every other latent of the one below;
            ``precision_weighted`` (ladder), ``residual`` or any other function of what the data say
            and what the model expects, two distributions, from the top down, sharing the model's
            conditionals.
        skip: every latent sees all that are above it, and the data see all.
        net: makes the networks next to the data, as for ``vae``; the others are ``dense``.
        activation: makes the nonlinearity.
        norm: makes a normalization of a given width before each nonlinearity, such as
            ``nn.BatchNorm1d``; for ``net=dense``.
        site: name of x.

    Raises:
        ValueError: as for ``vae``; not one entry of ``hidden`` for each layer.
    """
    batch = batch.look() if isinstance(batch, Batch) else batch
    data = observed(batch, site)
    optional = {"likelihood": likelihood, "prior": prior, "merge": merge, "norm": norm}
    needed = {"family": family, "net": net, "activation": activation}
    check_parts("hierarchical", {**optional, **needed}, optional)
    nets = _Networks(*_sizes(latent, hidden), skip, net, activation, norm)
    _check(family, net, norm)

    chosen = likelihood_for(batch, site) if likelihood is None else likelihood
    p = built(chosen, partial(nets.down, 0), data.shape[1:], data)
    inputs, input_shape = inputs_for(batch, site, p)
    shapes = [(size,) for size in nets.latent]
    layers = [
        built(family, partial(nets.down, level), shape, None)
        for level, shape in enumerate(shapes[:-1], 1)
    ]
    below = shapes if merge is None else [(widths[-1],) for widths in nets.hidden]
    stages = [nets.up(level, shape) for level, shape in enumerate([input_shape, *below[:-1]])]
    stages[0] = nn.Sequential(inputs, stages[0])
    informed = merge not in (None, precision_weighted)  # whose one factor is of the data alone
    posteriors = [
        built(family, partial(nets.head, level, informed), shape, None)
        for level, shape in enumerate(shapes)
    ]
    layers.append(built_prior(prior, posteriors[-1], shapes[-1]))
    if skip:
        p, layers = Concatenated(p), [*map(Concatenated, layers[:-1]), layers[-1]]
    if informed:
        posteriors = [Concatenated(posterior) for posterior in posteriors]
    model = HierarchicalModel(layers, p, skip, site=site).to(batch.device)
    guide: BottomUpGuide | TopDownGuide
    if merge is None:
        guide = BottomUpGuide(map(nn.Sequential, stages, posteriors), site=site)
    else:
        guide = TopDownGuide(stages, posteriors, layers, merge, informed, skip, site=site)
    zeros = [torch.zeros(1, size, device=batch.device) for size in nets.above(0)]
    check_support(batch, site, p, zeros, data)
    return model, guide.to(batch.device)


@dataclass(frozen=True)
class _Networks:
    """The networks of a hierarchy; level 0 lies next to the data."""

    latent: tuple[int, ...]
    hidden: tuple[tuple[int, ...], ...]
    skip: bool
    net: Architecture
    activation: Callable[[], nn.Module]
    norm: Callable[[int], nn.Module] | None

    def above(self, level: int) -> tuple[int, ...]:
        """Sizes of the latents on which what lies below a level depends."""
        return self.latent[level:] if self.skip else self.latent[level : level + 1]

    def up(self, level: int, inputs: Sequence[int]) -> nn.Module:
        """From what lies below a level to its features."""
        *hidden, wide = self.hidden[level]
        return nn.Sequential(self._net(level, inputs, (wide,), hidden), *self._bend(wide))

    def head(self, level: int, informed: bool, outputs: Sequence[int]) -> nn.Module:
        """From the features of a level, and from the latents above it, to its latent."""
        wide, above = self.hidden[level][-1], self.above(level + 1) if informed else ()
        hidden = (wide,) if above else ()
        return dense((wide + sum(above),), outputs, hidden, self.activation, self.norm)

    def down(self, level: int, outputs: Sequence[int]) -> nn.Module:
        """From the latents of a level, and of those above it, to what lies below."""
        (*hidden, wide), above = self.hidden[level], self.above(level)
        return nn.Sequential(
            dense((sum(above),), (wide,), ()),
            *self._bend(wide),
            self._net(level, (wide,), outputs, hidden[::-1]),
        )

    def _net(
        self, level: int, inputs: Sequence[int], outputs: Sequence[int], hidden: Sequence[int]
    ) -> nn.Module:
        net: Any = dense if level else self.net
        more = {} if self.norm is None else {"norm": self.norm}
        made: nn.Module = net(inputs, outputs, hidden, self.activation, **more)
        return made

    def _bend(self, wide: int) -> list[nn.Module]:
        norm = [] if self.norm is None else [leading(self.norm(wide), event_dim=1)]
        return [*norm, self.activation()]


def _sizes(latent: Any, hidden: Any) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Sizes of the latents, and the widths of the networks below each."""
    sizes = tupled(latent)
    each = tuple(hidden) if isinstance(hidden, Sequence) else (hidden,) * len(sizes)
    widths = tuple(map(tupled, each))
    numbers = [*sizes, *(n for wide in widths for n in wide)]
    if not sizes or not all(widths) or not all(isinstance(n, int) and n > 0 for n in numbers):
        raise ValueError(
            f"hierarchical: came latent={latent!r}, hidden={hidden!r}, wanted whole numbers above 0"
        )
    if len(widths) != len(sizes):
        raise ValueError(
            f"hierarchical: came hidden={hidden!r} for {len(sizes)} layers of latents, wanted one "
            "number for all or an entry for each: ((200, 200), 100)"
        )
    return sizes, widths


def _check(family: Part, net: Architecture, norm: Any) -> None:
    if isinstance(family, nn.Module):
        raise ValueError(
            f"hierarchical: came a ready {type(family).__name__} as family=, wanted its class: every "
            "layer has its own"
        )
    if norm is not None and "norm" not in signature(net).parameters:
        raise ValueError(
            f"hierarchical: came norm={_name(norm)} with net={_name(net)}, which takes none, wanted "
            "net=dense"
        )


def _name(part: Any) -> str:
    return getattr(part, "__name__", repr(part))
