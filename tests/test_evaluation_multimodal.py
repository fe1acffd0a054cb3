"""log p of subsets and coherence, against closed forms and pairs whose answers are known."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.conditionals import StandardNormal
from pyro_vae.evaluation.multimodal import Coherence, coherence, subsets
from pyro_vae.guides import ExpertsGuide
from pyro_vae.models import MultimodalModel
from tests.modality_pairs import data, evidence, guide_of, linear_model


def test_every_subset_and_every_condition():
    """With the exact posterior every bound is log p, whatever a row lacks."""
    model, batch = linear_model(), data()
    found = subsets(model, guide_of(model), batch, 4, widen=False, compile="eager")
    assert list(found.of) == [("x",), ("y",), ("x", "y")]
    exact = {names: evidence(model, batch, names) for names in found.of}
    for names, log_p in exact.items():
        torch.testing.assert_close(found.joint(*reversed(names)).log_p, log_p)
    both = batch.seen("x") & batch.seen("y")
    assert both.sum() == 2
    differences = (exact["x", "y"] - exact["y",])[both]
    conditional = found.conditional("x", "y")
    assert conditional.mean == pytest.approx(float(differences.mean()))
    assert conditional.error == pytest.approx(float(differences.std()) / 2**0.5)
    summary = found.summary()
    assert list(summary) == ["x", "y", "x,y", "y|x", "x|y"]
    wanted = {"log_p": conditional.mean, "log_p_se": conditional.error, "rows": 2}
    assert summary["x|y"] == wanted
    assert summary["x"]["log_p"] == pytest.approx(float(exact["x",][batch.seen("x")].mean()))
    with pytest.raises(ValueError, match=r"came \['y'\] on both sides"):
        found.conditional("y", ["x", "y"])
    assert f"log p(x | y) ~ {conditional.mean:.3f} ± {conditional.error:.3f} nats" in str(found)


def test_a_condition_asks_for_rows_that_have_both():
    model, batch = linear_model(), data()
    apart = batch.rows((~(batch.seen("x") & batch.seen("y"))).nonzero().squeeze(1))
    found = subsets(model, guide_of(model), apart, 4, widen=False, compile="eager")
    assert list(found.summary()) == ["x", "y"]
    with pytest.raises(ValueError, match=r"none of 6 rows has \['x', 'y'\] together"):
        found.conditional("x", "y")


def test_sites_may_be_chosen():
    model, batch = linear_model(), data(4)
    found = subsets(model, guide_of(model), batch, 4, sites=["y"], widen=False, compile="eager")
    assert list(found.of) == [("y",)]
    with pytest.raises(ValueError, match=r"joint: came \['x'\], wanted one of \[\['y'\]\]"):
        found.joint("x")


# --- coherence ----------------------------------------------------------------------------------


class Sign(nn.Module):
    """q(z | x) at the sign of x; a site that ``lies`` says the other."""

    def __init__(self, lies: bool = False) -> None:
        super().__init__()
        self.factor = -3.0 if lies else 3.0

    def forward(self, x: Tensor):
        return dist.Normal(self.factor * x.sign(), 1e-6).to_event(1)


class Same(nn.Module):
    """x | z ~ N(z, 1)."""

    def forward(self, z: Tensor):
        return dist.Normal(z, 1.0).to_event(1)


def by_sign(x: Tensor) -> Tensor:
    return (x[:, 0] > 0).long()


def pair(*liars: str) -> tuple[MultimodalModel, ExpertsGuide]:
    model = MultimodalModel(StandardNormal(1), {"x": Same(), "y": Same()})
    return model, ExpertsGuide({s: Sign(s in liars) for s in ("x", "y")}, model.prior)


def rows(number: int = 40) -> tuple[Batch, Tensor]:
    x = torch.randn(number, 1)
    return Batch({"x": x, "y": x.clone()}), by_sign(x)


def test_coherence_of_a_pair_that_is_right_and_of_one_that_is_not():
    batch, labels = rows()
    found = coherence(*pair("y"), batch, labels, {"x": by_sign, "y": by_sign})
    shares = {(one.given, one.site): one.share for one in found}
    assert shares == {((), ""): 1.0, (("x",), "y"): 1.0, (("y",), "x"): 0.0}
    assert str(found[1]) == "y from x: 100.0% ± 0.0%"


def test_coherence_is_of_rows_that_have_what_is_given():
    batch, labels = rows(40)
    lacks = torch.arange(40)[:, None] < 10
    found = coherence(*pair(), batch.hide("x", lacks), labels, {"x": by_sign, "y": by_sign})
    assert [one.share for one in found] == [1.0, 1.0, 1.0]
    nothing = batch.hide("x", torch.ones(40, 1, dtype=torch.bool))
    left = coherence(*pair(), nothing, labels, {"x": by_sign, "y": by_sign})
    assert [one.given for one in left] == [(), ("y",)]


def test_shares_of_what_does_not_agree():
    """Classifiers that look at different things of fresh rows agree by chance."""
    batch, labels = rows(4000)
    labels = torch.where(torch.arange(4000) < 1000, 1 - labels, labels)
    other: dict[str, Any] = {"x": by_sign, "y": lambda y: torch.randint(2, (len(y),))}
    found = coherence(*pair(), batch, labels, other)
    chance = 0.25 / 4000
    error: Any = pytest.approx((0.75 * 0.25 / 4000) ** 0.5)
    assert abs(found[0].share - 0.5) < 4 * chance**0.5
    assert abs(found[1].share - 0.5) < 4 * chance**0.5
    assert found[2] == Coherence(("y",), "x", 0.75, error)


def test_refuses():
    batch, labels = rows()
    with pytest.raises(ValueError, match=r"coherence: came sites \['sound'\], the data have"):
        coherence(*pair(), batch, labels, {"x": by_sign, "sound": by_sign})
    with pytest.raises(ValueError, match=r"labels \[3\] for 40 rows, wanted two sites"):
        coherence(*pair(), batch, labels[:3], {"x": by_sign, "y": by_sign})
    bare: Any = batch["x"]
    with pytest.raises(ValueError, match="subsets: came a Tensor, wanted a Batch of named sites"):
        subsets(*pair(), bare)
