"""Scores of codes that are perfect, noise, or mixed in a way that can be worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.metrics import mutual_info_score
from torch import Tensor

from pyro_vae.evaluation.disentanglement import (
    Score,
    beta_vae_score,
    dci,
    factor_vae_score,
    mig,
    modularity,
    mutual_information,
    sap,
)

LEVELS = [3, 6, 5]
ALL = torch.cartesian_prod(*map(torch.arange, LEVELS)).repeat(20, 1)  # uniform and independent
COINS = torch.cartesian_prod(torch.arange(2), torch.arange(2)).repeat(60, 1)
BY_ROWS: dict[str, Callable[[Tensor, Tensor], Score]] = {
    "mig": mig,
    "sap": sap,
    "modularity": modularity,
    "disentanglement": lambda z, f: dci(z, f)["disentanglement"],
    "completeness": lambda z, f: dci(z, f)["completeness"],
    "informativeness": lambda z, f: dci(z, f)["informativeness"],
}
by_rows = pytest.mark.parametrize("score", BY_ROWS.values(), ids=BY_ROWS)


def perfect(factors: Tensor) -> Tensor:
    """Factors reordered, turned around and in other units."""
    return factors[:, [2, 0, 1]] * torch.tensor([-0.01, 3.0, 100.0]) + 5


# --- codes and factors --------------------------------------------------------------------------


def test_mutual_information_is_that_of_scikit_learn():
    codes = torch.randn(500, 4)
    factors = torch.stack([torch.randint(n, (500,)) for n in LEVELS], 1)
    codes[:, 1] += factors[:, 0]
    found = mutual_information(codes, factors, bins=7)
    assert found.shape == (4, 3)
    for d in range(4):
        edges = torch.linspace(*codes[:, d].aminmax(), 8)[1:-1]
        cells = torch.bucketize(codes[:, d].contiguous(), edges, right=True)
        for f in range(3):
            assert float(found[d, f]) == pytest.approx(
                mutual_info_score(cells, factors[:, f]), abs=1e-12
            )


def test_mutual_information_of_a_factor_with_itself_is_its_entropy():
    found = mutual_information(ALL.double(), ALL)
    assert torch.allclose(found.diagonal(), torch.tensor(LEVELS).double().log())
    assert torch.allclose(found - found.diagonal().diag(), torch.zeros(3, 3), atol=1e-12)


@pytest.mark.parametrize("name", [name for name in BY_ROWS if name != "sap"])
def test_perfect_codes(name: str):
    found = BY_ROWS[name](perfect(ALL), ALL)
    assert found.value == pytest.approx(1, abs=1e-9)
    assert torch.allclose(found.each, torch.ones(3))
    assert float(found) == found.value


def test_sap_of_perfect_codes():
    """R^2 is 1 for one code and about 0 for the others; of two classes, all are put right or half."""
    assert sap(perfect(ALL), ALL, continuous=[0, 1, 2]).value == pytest.approx(1, abs=0.02)
    codes = COINS.double() @ torch.tensor([[0.0, 3.0], [-0.1, 0.0]])
    found = sap(codes, COINS)
    assert found.matrix.diagonal().tolist() == pytest.approx([0.5, 0.5], abs=0.12)
    assert found.matrix.fliplr().diagonal().tolist() == [1, 1]


def test_more_levels_than_bins():
    factors = torch.cartesian_prod(torch.arange(40), torch.arange(2)).repeat(5, 1)
    assert mig(factors.double(), factors).each.tolist() == pytest.approx(
        [math.log(20) / math.log(40), 1]
    )


@by_rows
def test_order_and_units_do_not_matter(score: Callable[[Tensor, Tensor], Score]):
    codes = ALL[:300].double() @ torch.randn(3, 4) + 0.3 * torch.randn(300, 4)
    other = codes[:, [3, 1, 0, 2]] * torch.tensor([2.0, 0.25, -1.0, 8.0])
    first, second = score(codes, ALL[:300]), score(other, ALL[:300])
    # trees break ties between equal splits by the order of the columns
    assert second.value == pytest.approx(first.value, abs=1e-9 if score in (mig, sap) else 0.05)


@pytest.mark.parametrize("score", [mig, sap])
def test_noise_has_no_gap(score: Callable[[Tensor, Tensor], Score]):
    assert 0 <= score(torch.randn(1800, 3), ALL).value < 0.05


def test_noise_tells_nothing():
    found = dci(torch.randn(1800, 3), ALL)
    assert found["disentanglement"].value < 0.05
    assert found["completeness"].value < 0.05
    informed = found["informativeness"]
    chance = sum(1 / n for n in LEVELS) / 3
    assert abs(informed.value - chance) < 5 * informed.se


def test_noise_is_not_modular():
    """Equally many levels: what is left of information is the same for both factors but for chance."""
    factors = torch.randint(10, (20_000, 2))
    assert modularity(torch.randn(20_000, 3), factors).value < 0.4


def test_turned_by_45_degrees_by_hand():
    """z = (a + b, a - b): I(z_d; factor) = H(z) - H(z | factor) = 1.5 log 2 - log 2, all alike."""
    codes = COINS.double() @ torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    assert mutual_information(codes, COINS).tolist() == [
        pytest.approx([0.5 * math.log(2)] * 2) for _ in range(2)
    ]
    assert mig(codes, COINS).value == pytest.approx(0, abs=1e-9)
    assert modularity(codes, COINS).value == pytest.approx(0, abs=1e-9)


def test_mixed_in_part_by_hand():
    """z = (a, a + b): I(z_1; a) = log 2, I(z_1; b) = 0, I(z_2; either) = 0.5 log 2."""
    codes = COINS.double() @ torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    gap, modular = mig(codes, COINS), modularity(codes, COINS)
    assert gap.each.tolist() == pytest.approx([0.5, 0.5])
    assert gap.matrix.flatten().tolist() == pytest.approx(
        [math.log(2), 0, 0.5 * math.log(2), 0.5 * math.log(2)], abs=1e-9
    )
    assert modular.each.tolist() == pytest.approx([1, 0], abs=1e-9)
    # alone z_2 = 1 leaves a coin, so that 3 of 4 are right
    assert sap(codes, COINS).matrix[1].tolist() == pytest.approx([0.75, 0.75], abs=0.12)


def test_sap_of_a_turned_gaussian():
    """R^2 = cos^2 and sin^2 of the angle, the gap cos 2 angle for both factors."""
    factors = torch.randn(30_000, 2)
    angle = torch.tensor(math.pi / 9)
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()]).view(2, 2)
    found = sap(factors @ turn, factors, continuous=[0, 1])
    assert abs(found.value - math.cos(2 * math.pi / 9)) < 5 * found.se
    assert found.se < 0.01
    wanted = torch.stack([angle.cos() ** 2, angle.sin() ** 2])
    assert torch.allclose(found.matrix, torch.stack([wanted, wanted.flip(0)]), atol=0.02)


def test_constant_code_counts_for_nothing():
    codes = torch.cat([ALL.double(), torch.ones(len(ALL), 1)], 1)
    assert mig(codes, ALL).value == pytest.approx(1)
    assert modularity(codes, ALL).each.tolist() == pytest.approx([1, 1, 1, 0])
    assert sap(codes, ALL, continuous=[0, 1, 2]).matrix[3].tolist() == [0, 0, 0]
    assert dci(codes, ALL)["disentanglement"].each[3] == 0


class Told:
    """A classifier that finds importances as told, and always says 0."""

    def __init__(self, importances: list[list[float]]) -> None:
        self.importances = iter(importances)

    def fit(self, codes: Any, factor: Any) -> None:
        self.feature_importances_ = next(self.importances)

    def predict(self, codes: Any) -> Any:
        return torch.zeros(len(codes)).numpy()


def test_dci_by_hand():
    """A code of importances (3/4, 1/4) has entropy 2 log 2 - 3/4 log 3; weights are 1 : 1 : 0."""
    told = Told([[0.75, 0.25, 0.0], [1.0, 3.0, 0.0]])
    found = dci(ALL[:, :3].double(), ALL[:, :2], classifier=lambda: told)
    entropy = 2 * math.log(2) - 0.75 * math.log(3)
    assert found["disentanglement"].value == pytest.approx(1 - entropy / math.log(2))
    assert found["disentanglement"].each.tolist() == pytest.approx(
        [1 - entropy / math.log(2)] * 2 + [0]
    )
    assert found["completeness"].each.tolist() == pytest.approx([1 - entropy / math.log(3)] * 2)
    assert found["completeness"].value == pytest.approx(1 - entropy / math.log(3))
    assert found["completeness"].matrix.sum(0).tolist() == pytest.approx([1, 1])
    informed = found["informativeness"]
    assert abs(informed.value - (1 / 3 + 1 / 6) / 2) < 5 * informed.se
    assert math.isnan(found["completeness"].se)


def test_dci_with_the_classifier_of_choice():
    codes = COINS.double() @ torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    found = dci(codes, COINS, lambda: GradientBoostingClassifier(n_estimators=3))
    assert [score.value for score in found.values()] == pytest.approx([1, 1, 1])


# --- standard errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "score",
    [mig, modularity, lambda z, f: sap(z, f, continuous=[0, 1])],
    ids=["mig", "modularity", "sap"],
)
def test_standard_error_is_the_deviation_over_data_sets(score: Callable[[Tensor, Tensor], Score]):
    found = []
    for _ in range(60):
        factors = torch.randint(2, (400, 2))
        codes = factors.double() @ torch.tensor([[1.0, 0.4], [0.0, 1.0]])
        found.append(score(codes + 0.3 * torch.randn(400, 2), factors))
    values = torch.tensor([float(score) for score in found])
    said = torch.tensor([score.se for score in found])
    assert 0.6 < float(said.mean() / values.std()) < 1.6


# --- an encoder and a renderer ------------------------------------------------------------------

FEW: dict[str, Any] = {"num_train": 1500, "num_eval": 600}
BY_IMAGES: dict[str, Callable[..., Score]] = {
    "factor_vae": factor_vae_score,
    "beta_vae": beta_vae_score,
}
by_images = pytest.mark.parametrize("score", BY_IMAGES.values(), ids=BY_IMAGES)


def same(factors: Tensor) -> Tensor:
    return factors.double()


def test_factor_vae_score_of_perfect_codes():
    found = factor_vae_score(perfect, same, LEVELS, **FEW, collapsed=0.0)
    assert (found.value, found.se, found.each.tolist()) == (1, 0, [1, 1, 1])
    assert found.matrix.sum() == 1500
    assert (found.matrix > 0).tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert (found.matrix.sum(0) - 500).abs().max() < 5 * (1500 * 2 / 9) ** 0.5


def test_beta_vae_score_of_perfect_codes():
    found = beta_vae_score(perfect, same, LEVELS, **FEW)
    assert found.value == 1
    assert found.matrix.argmin(0).tolist() == [1, 2, 0]


@by_images
def test_noise_is_at_chance(score: Callable[..., Score]):
    found = score(lambda images: torch.randn(len(images), 4), same, LEVELS, **FEW)
    assert abs(found.value - 1 / 3) < 5 * found.se
    assert found.se == pytest.approx((found.value * (1 - found.value) / 600) ** 0.5)


@by_images
def test_half_way_between_two_factors_is_at_chance(score: Callable[..., Score]):
    """(a + b, a - b): what varies when a is fixed is b, in both codes alike."""
    turn = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    found = score(lambda factors: factors @ turn, same, [20, 20], **FEW)
    assert abs(found.value - 0.5) < 5 * found.se


@by_images
def test_a_turn_by_less_goes_unseen(score: Callable[..., Score]):
    """At 30 degrees the variances of a batch are as 1 to 3, which 64 images tell apart."""
    half = 3**0.5 / 2
    turn = torch.tensor([[half, 0.5], [-0.5, half]])
    assert score(lambda factors: factors @ turn, same, [20, 20], **FEW).value > 0.99


def test_collapsed_codes_have_no_vote():
    def encode(factors: Tensor) -> Tensor:
        dead = torch.stack([torch.zeros(len(factors)), 0.01 * torch.randn(len(factors))], 1)
        return torch.cat([dead, factors], 1)

    found = factor_vae_score(encode, same, LEVELS, **FEW)
    assert found.value == 1
    assert found.matrix[:2].sum() == 0
    nothing = factor_vae_score(lambda f: torch.zeros(len(f), 2), same, LEVELS, **FEW)
    assert abs(nothing.value - 1 / 3) < 5 * nothing.se


@by_images
def test_seed(score: Callable[..., Score]):
    def encode(factors: Tensor) -> Tensor:
        return factors @ torch.tensor([[1.0, 0.0], [0.5, 1.0], [1.0, 1.0]])

    first, again, other = (score(encode, same, LEVELS, **FEW, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.matrix, again.matrix)
    assert not torch.equal(first.matrix, other.matrix)


# --- what is refused ----------------------------------------------------------------------------


@by_rows
@pytest.mark.parametrize(
    ("codes", "factors", "message"),
    [
        (
            torch.zeros(9),
            ALL[:9],
            r"came codes \[9\] and factors \[9, 3\], wanted \[N, D\] and \[N, F\]",
        ),
        (torch.zeros(9, 2), ALL[:8], "with the same rows"),
        (torch.zeros(9, 1), ALL[:9], "two or more columns"),
        (torch.zeros(9, 2), ALL[:9, :1], "two or more columns"),
        (torch.full((9, 2), math.nan), ALL[:9], "codes came with numbers that are not finite"),
        (torch.zeros(9, 2), torch.rand(9, 2), "factor 0 came with numbers that are not whole"),
        (torch.zeros(9, 2), ALL[:9], "factor 0 has the same value in all rows; leave it out"),
    ],
    ids=["flat", "rows", "one code", "one factor", "nan", "continuous", "constant"],
)
def test_wrong_codes_and_factors(
    score: Callable[[Tensor, Tensor], Score], codes: Tensor, factors: Tensor, message: str
):
    with pytest.raises(ValueError, match=message):
        score(codes, factors)


def test_wrong_options():
    codes = ALL.double()
    with pytest.raises(ValueError, match="mig: came bins=0, wanted a whole number >= 1"):
        mig(codes, ALL, bins=0)
    with pytest.raises(
        ValueError, match="modularity: came resamples=1, wanted a whole number >= 2"
    ):
        modularity(codes, ALL, resamples=1)
    with pytest.raises(
        ValueError, match=r"continuous= came with \[3\], wanted numbers of the 3 factors"
    ):
        sap(codes, ALL, continuous=[3])
    with pytest.raises(ValueError, match="dci: came 2 rows, wanted 3 or more"):
        dci(codes[[0, -1]], ALL[[0, -1]])


@by_images
def test_wrong_encoders_and_levels(score: Callable[..., Score]):
    name = score.__name__
    with pytest.raises(
        ValueError, match=rf"{name}: encode= gave \[\d+\] for \d+ images, wanted codes"
    ):
        score(lambda images: images[:, 0], same, LEVELS, **FEW)
    with pytest.raises(ValueError, match=f"{name}: encode= came with numbers that are not finite"):
        score(lambda images: images / 0, same, LEVELS, **FEW)
    with pytest.raises(
        ValueError, match=rf"{name}: levels= came \[3, 1\], wanted the numbers of levels"
    ):
        score(same, same, [3, 1], **FEW)
