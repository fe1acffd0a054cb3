"""Linear hierarchies of two layers made of the library's parts: log p(x) and the posterior are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.conditionals import Gaussian, StandardNormal
from pyro_vae.guides import BottomUpGuide, TopDownGuide, precision_weighted, residual
from pyro_vae.models import HierarchicalModel
from pyro_vae.nn import Concatenated

Z, X = 2, 3
NOISE = 0.8  # of x
SPREAD = torch.tensor([0.7, 1.3], dtype=torch.float64)  # of z1 given z2
BIAS = torch.tensor([0.2, -0.4], dtype=torch.float64)  # of its mean


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    net = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        net.weight.copy_(weight)
        net.bias.copy_(bias)
    return net


def gaussian(weight: Tensor, bias: Tensor, scale: Tensor | float) -> Gaussian:
    return Gaussian(linear(weight, bias), (len(weight),), scale)


class LinearHierarchy(HierarchicalModel):
    """z2 ~ N(0, I), z1 ~ N(a + A z2, S), x ~ N(b + W z1 [+ V z2], s² I); A is diagonal, and the columns
    of W are orthogonal, so that without V all posteriors have independent entries."""

    def __init__(self, skip: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)
        weights = torch.randn(X, 2 * Z, generator=generator, dtype=torch.float64)
        orthogonal, _ = torch.linalg.qr(weights[:, :Z])
        w = orthogonal * torch.tensor([1.2, 0.6])
        first: Any = Gaussian(linear(torch.diag(torch.tensor([0.9, -0.5])), BIAS), (Z,), SPREAD)
        columns = torch.cat([w, weights[:, Z:]], 1) if skip else w
        likelihood: Any = gaussian(columns, 0.3 * torch.ones(X), NOISE)
        if skip:
            likelihood = Concatenated(likelihood)
        super().__init__([first, StandardNormal(Z)], likelihood, skip)
        self.columns = columns

    @property
    def first(self) -> nn.Linear:
        """From z2 to the mean of z1."""
        net: Any = self.layers[0].net
        return net  # type: ignore[no-any-return]

    @torch.no_grad()
    def joint(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of (z2, z1, x)."""
        a: Tensor = self.first.weight
        to_x = self.columns[:, :Z] @ a
        to_x = to_x + self.columns[:, Z:] if self.skip else to_x
        loadings = torch.block_diag(torch.eye(Z), torch.diag(SPREAD), NOISE * torch.eye(X))
        mix = torch.eye(2 * Z + X)
        mix[Z : 2 * Z, :Z] = a
        mix[2 * Z :, :Z] = to_x
        mix[2 * Z :, Z : 2 * Z] = self.columns[:, :Z]
        root = mix @ loadings
        means = torch.cat([torch.zeros(Z), BIAS, 0.3 + self.columns[:, :Z] @ BIAS])
        return means, root @ root.T

    def evidence(self, x: Tensor) -> Tensor:
        """log p(x) of each row."""
        mean, cov = self.joint()
        log_p: Tensor = dist.MultivariateNormal(mean[2 * Z :], cov[2 * Z :, 2 * Z :]).log_prob(x)
        return log_p

    def given(self, wanted: Sequence[int], known: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Slope, intercept and standard deviations of some entries of (z2, z1, x) given others."""
        mean, cov = self.joint()
        i, j = list(wanted), list(known)
        slope = torch.linalg.solve(cov[j][:, j], cov[j][:, i]).T
        left = cov[i][:, i] - slope @ cov[j][:, i]
        assert torch.allclose(left, torch.diag(left.diagonal()))  # independent entries
        return slope, mean[i] - slope @ mean[j], left.diagonal().sqrt()


Z2, Z1, DATA = range(Z), range(Z, 2 * Z), range(2 * Z, 2 * Z + X)


def _bottom_up(model: LinearHierarchy) -> Any:
    return BottomUpGuide([gaussian(*model.given(Z1, DATA)), gaussian(*model.given(Z2, Z1))])


def _ladder(model: LinearHierarchy) -> Any:
    """What the data say of z1 is p(x | z1) as a function of z1, which has independent entries."""
    w = model.columns
    square = (w.T @ w).diagonal()
    seen = gaussian(w.T / square[:, None], -0.3 * w.sum(0) / square, NOISE / square.sqrt())
    return _top_down(model, seen, precision_weighted)


def _residual(model: LinearHierarchy) -> Any:
    slope, bias, scale = model.given(Z1, [*DATA, *Z2])
    down = model.first
    slope[:, X:] -= down.weight.detach()
    change = gaussian(slope, bias - down.bias.detach(), scale / SPREAD)
    return _top_down(model, Concatenated(change), residual, informed=True)


def _top_down(model: LinearHierarchy, first: nn.Module, merge: Any, informed: bool = False) -> Any:
    top: nn.Module = gaussian(*model.given(Z2, DATA))
    stages = [nn.Identity(), nn.Identity()]
    return TopDownGuide(stages, [first, top], model.layers, merge, informed)


EXACT: dict[str, Callable[[LinearHierarchy], Any]] = {
    "bottom-up": _bottom_up,
    "ladder": _ladder,
    "residual": _residual,
}


def pair(guide: str) -> tuple[LinearHierarchy, Any]:
    """A model and its exact posterior."""
    model = LinearHierarchy()
    return model, EXACT[guide](model)


def wrong(guide: str) -> tuple[LinearHierarchy, Any]:
    """A model and a guide beside its posterior, with a gradient everywhere."""
    model, q = pair(guide)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in q.posteriors.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model, q


def rows(number: int = 6) -> Tensor:
    return torch.randn(number, X, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
