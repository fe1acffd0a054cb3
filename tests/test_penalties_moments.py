"""DIP: covariances by hand."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_vae.objectives import linear
from pyro_vae.objectives.penalties import DIP
from tests.row_pairs import RowPair, gradient
from tests.small_pairs import X_DIM, FlowGuide, LinearModel, assert_same, data, table

STEP = torch.zeros(())


def terms(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of squares off the diagonal, and of what the diagonal is away from 1."""
    size = len(covariance)
    off = sum(covariance[i, j] ** 2 for i in range(size) for j in range(size) if i != j)
    on = sum((covariance[i, i] - 1) ** 2 for i in range(size))
    return torch.as_tensor(off), torch.as_tensor(on)


@pytest.mark.parametrize(("kind", "usual"), [("I", 10.0), ("II", 1.0)])
@pytest.mark.parametrize("number", [1, 3])
def test_by_hand(kind: str, usual: float, number: int):
    pair = RowPair.random(5, 3)
    covariance = torch.cov(pair.loc.T, correction=0)
    if kind == "II":
        covariance = covariance + pair.scale.square().mean(0).diag()
    off, on = terms(covariance)
    particles = pair.particles(number=number)
    for penalty, wanted in (
        (DIP(2.0, 0.3, kind=kind), 2 * off + 0.3 * on),
        (DIP(2.0, kind=kind), 2 * off + 2 * usual * on),
        (DIP(linear(4), linear(2, 0.0, 5.0), kind=kind), 0.25 * off + 2.5 * on),
    ):
        found = penalty(particles, STEP + 1)
        assert_same(found, wanted)
        assert_same(*(gradient(v, [pair.loc, pair.scale]) for v in (found, wanted)))


class Coupled(RowPair):
    """Full covariances."""

    @classmethod
    def of(cls, rows: int, dims: int) -> Coupled:
        plain = RowPair.random(rows, dims)
        return cls(plain.loc.detach(), plain.scale.detach())

    def covariances(self) -> Tensor:
        factor = torch.tril(self.scale[:, None] * torch.ones(3, 1))
        return factor @ factor.mT

    def posterior(self, rows: Tensor) -> Any:
        return dist.MultivariateNormal(self.loc[rows], self.covariances()[rows])


def test_covariances_inside_a_row_count():
    pair = Coupled.of(5, 3)
    off, on = terms(torch.cov(pair.loc.T, correction=0) + pair.covariances().mean(0))
    assert_same(DIP(2.0, 0.3)(pair.particles(number=2), STEP), 2 * off + 0.3 * on)


def test_refusals():
    guide = FlowGuide(lambda: dist.transforms.affine_coupling(2, [4]))
    particles = table(LinearModel(), guide, data(5, X_DIM), number=1)
    with pytest.raises(
        ValueError, match=r"site 'z': mean and variance of a TransformedDistribution"
    ):
        DIP(1.0)(particles, STEP)
    with pytest.raises(ValueError, match=r"DIP: came kind='III', wanted one of 'I', 'II'"):
        DIP(1.0, kind="III")
