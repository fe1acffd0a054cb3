"""Tables of several kinds of columns: the parts that are built, training, what comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyro
import pytest
import torch

from pyro_vae.batch import Batch
from pyro_vae.conditionals import (
    Bernoulli,
    Categorical,
    Gaussian,
    LogNormal,
    NegativeBinomial,
    Ordinal,
    Poisson,
    StudentT,
)
from pyro_vae.data.mixed import Columns
from pyro_vae.evaluation.imputation import impute
from pyro_vae.linter import check
from pyro_vae.objectives.recipes import elbo, iwae
from pyro_vae.pairs import rebuilt, table
from pyro_vae.training.fit import fit

KINDS = {"price": "positive", "visits": "count", "grade": "ordinal"}


def people(rows: int = 200, seed: int = 0) -> pd.DataFrame:
    """Columns of every kind, all of which tell the same two groups apart."""
    rng = np.random.default_rng(seed)
    group = rng.integers(2, size=rows)
    return pd.DataFrame(
        {
            "height": 170 + 20 * group + 3 * rng.normal(size=rows),
            "price": np.exp(2 + 2 * group + 0.2 * rng.normal(size=rows)),
            "visits": rng.poisson(np.where(group, 12.0, 1.0)).astype(float),
            "grade": np.where(group, 2.0, 0.0) + rng.integers(2, size=rows),
            "member": (rng.random(rows) < np.where(group, 0.95, 0.05)).astype(float),
            "town": np.where(group, "Rome", "Oslo").astype(object),
        }
    )


def holed(frame: pd.DataFrame, share: float = 0.3, seed: int = 1) -> pd.DataFrame:
    gone = np.random.default_rng(seed).random(frame.shape) < share
    return frame.mask(gone)


def built(frame: pd.DataFrame, **options: Any) -> tuple[Any, Any, Batch, Columns]:
    columns = Columns.of(frame, KINDS)
    batch = columns.batch(frame)
    model, guide = table(batch, 2, (16, 16), ordinal=columns.ordinal, **options)
    return model, guide, batch, columns


def test_sites_likelihoods_and_starts():
    frame = holed(people())
    model, guide, batch, columns = built(frame)
    kinds = {site: type(part) for site, part in model.likelihoods.items()}
    assert kinds == {
        "real": Gaussian,
        "positive": LogNormal,
        "count": NegativeBinomial,
        "binary": Bernoulli,
        "class_grade": Ordinal,
        "class_town": Categorical,
    }
    assert columns.sites["real"] == ["height"]
    assert columns.classes == {"grade": [0.0, 1.0, 2.0, 3.0], "town": ["Oslo", "Rome"]}
    assert batch.record["classes"]["class_town"] == ["Oslo", "Rome"]
    scale = model.likelihoods["real"].scale
    assert float(scale.detach()) == pytest.approx(float(frame["height"].std(ddof=0)))
    assert check(model, guide, batch.rows(slice(0, 32))).ok
    other = built(frame, real=StudentT, count=Poisson)[0].likelihoods
    assert (type(other["real"]), type(other["count"])) == (StudentT, Poisson)


def test_what_the_guide_sees_does_not_depend_on_what_stands_in_a_gap():
    frame = holed(people(50))
    _, guide, batch, _ = built(frame)
    other = Batch(
        {site: torch.where(batch.mask(site), batch[site], batch[site].flip(0)) for site in batch},
        {site: batch.mask(site) for site in batch},
    )
    for site in batch:
        seen = (guide.features[site](rows[site], rows.mask(site)) for rows in (batch, other))
        torch.testing.assert_close(*seen)
    real = guide.features["real"](batch["real"], batch.mask("real"))
    standard = ((frame["height"] - frame["height"].mean()) / frame["height"].std(ddof=0)).fillna(0)
    torch.testing.assert_close(real[:, 0], torch.tensor(list(standard)))
    assert torch.equal(real[:, 1] > 0, batch.mask("real")[:, 0])


@pytest.mark.parametrize("objective", [elbo(), iwae(5, estimator="dreg")], ids=["elbo", "iwae"])
def test_cells_of_every_kind_are_filled_from_the_others(objective):
    """Groups that five other columns tell apart: hidden cells come from the right one."""
    whole = people()
    frame = holed(whole)
    pyro.set_rng_seed(0)
    model, guide, batch, columns = built(frame)
    adam = lambda p: torch.optim.Adam(p, lr=1e-2)  # noqa: E731
    fit(model, guide, batch, objective, epochs=30, batch_size=50, optimizer=adam, progress=False)
    found = impute(model, guide, batch, 100, loss=columns.losses("l2"), interval=0.9)
    filled = columns.filled(frame, found.values)
    hidden = frame.isna()
    told = hidden.sum(axis=1) <= 4  # at least two columns to tell by
    group = whole["town"] == "Rome"

    def right(name: str, cut: float) -> float:
        at = hidden[name] & told
        return float(((filled[name][at] > cut) == group[at]).mean())

    for name, cut in (
        ("height", 180),
        ("price", np.e**3),
        ("visits", 5),
        ("grade", 1),
        ("member", 0),
    ):
        assert right(name, cut) > 0.9, name
    at = hidden["town"] & told
    assert float((filled["town"][at] == whole["town"][at]).mean()) > 0.93
    assert set(filled["member"]) == {0.0, 1.0}
    assert set(filled["visits"] % 1) == {0.0}
    off = (found.values["real"] - found.lower["real"])[~batch.mask("real")]
    inside = ~batch.mask("real")[:, 0]
    truth = torch.tensor(list(whole["height"]))
    low, high = found.lower["real"][:, 0], found.upper["real"][:, 0]
    share = ((truth >= low) & (truth <= high))[inside].double().mean()
    assert float(off.min()) > 0
    assert 0.8 < float(share) <= 1.0


def test_a_table_keeps_what_is_observed():
    frame = holed(people(40))
    model, guide, batch, columns = built(frame)
    filled = columns.filled(frame, impute(model, guide, batch, 8).values)
    assert not filled.isna().any().any()
    pd.testing.assert_frame_equal(filled.where(frame.notna()), frame)
    assert list(filled.dtypes) == list(frame.dtypes)


def test_a_ready_pair_is_built_again_by_its_name():
    frame = holed(people(40))
    model, guide, batch, _ = built(frame, real=StudentT)
    again, other = rebuilt(model.built_by, batch)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(guide.state_dict())
    assert type(again.likelihoods["real"]) is StudentT
    assert type(again.likelihoods["class_grade"]) is Ordinal


def test_refusals():
    frame = people(20)
    batch = Columns.of(frame, KINDS).batch(frame)
    gone = batch.hide("real", torch.ones(20, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="no observed entry"):
        table(gone)
    two = Batch(
        {"real": torch.tensor([[1.0, torch.nan]]).expand(9, 2)},
        record={"columns": {"real": ["a", "b"]}},
    )
    with pytest.raises(ValueError, match=r"site 'real': none of 9 rows has 'b', wanted"):
        table(two)
    for options, words in (
        ({"latent": 0}, "came latent=0"),
        ({"hidden": ()}, "wanted whole numbers above 0"),
        ({"ordinal": ["grades"]}, r"ordinal= names \['grades'\]"),
        ({"real": 3}, "came real=3, wanted a class"),
        ({"positive": None}, "came positive=None"),
    ):
        with pytest.raises(ValueError, match=words):
            table(batch, **options)
