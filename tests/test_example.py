"""Four rows instead of a data set: builders find the same in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_vae.batch import Batch
from pyro_vae.conditionals import (
    Bernoulli,
    Binomial,
    Categorical,
    ContinuousBernoulli,
    DiagonalGaussian,
    Gaussian,
    LogisticMixture,
    NegativeBinomial,
    OptimalSigma,
    StudentT,
)
from pyro_vae.pairs import likelihood_for, vae
from pyro_vae.training import example as example_module
from pyro_vae.training.example import example, from_tensors, to_tensors

N = 50


def whole(high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, (N, *shape))


def between() -> Tensor:
    """Real values whose least and greatest are whole numbers from 0 to 255."""
    x = 100 * torch.rand(N, 5)
    x[0], x[1] = 0.0, 100.0
    return x


DATA: dict[str, tuple[Callable[[], Tensor], Any]] = {
    "binary": (lambda: whole(2, 4, 4).double(), Bernoulli),
    "binary bools": (lambda: whole(2, 6).bool(), Bernoulli),
    "binary bytes": (lambda: whole(2, 6).to(torch.uint8), Bernoulli),
    "counts up to 16": (lambda: whole(17, 8).double(), Binomial),
    "bytes": (lambda: whole(256, 3, 4, 4).to(torch.uint8), Binomial),
    "dark bytes": (lambda: whole(200, 4, 4).to(torch.uint8), Binomial),
    "counts beyond bytes": (lambda: whole(1000, 6).double(), NegativeBinomial),
    "int64 counts": (lambda: whole(10**6, 6), NegativeBinomial),
    "labels": (lambda: whole(5), Categorical),
    "vectors of labels": (lambda: whole(7, 3), Categorical),
    "greys": (lambda: whole(256, 4, 4).double() / 255, ContinuousBernoulli),
    "real": (lambda: 1e3 * torch.randn(N, 5), Gaussian),
    "real in float32": (lambda: torch.randn(N, 5).float(), Gaussian),
    "real numbers": (lambda: torch.randn(N), Gaussian),
    "real between whole numbers": (between, Gaussian),
    "whole numbers below 0": (lambda: whole(9, 5, low=-9).double(), Gaussian),
    "constant": (lambda: torch.full((N, 3), 2.5), Gaussian),
}


def holed(x: Tensor) -> Batch:
    """About a third is missing, and one entry in all rows."""
    observed = torch.rand(x.shape) < 0.7
    if x.dim() > 1:
        observed.flatten(1)[:, 0] = False
    return Batch({"x": x}, observed={"x": observed})


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "incomplete"])
@pytest.mark.parametrize("name", DATA)
def test_a_pair_is_built_alike(name: str, missing: bool):
    make, wanted = DATA[name]
    batch = holed(make()) if missing else Batch({"x": make()})
    few = example(batch)
    assert len(few) == 4
    assert likelihood_for(few) is likelihood_for(batch) is wanted
    assert few["x"].dtype == batch["x"].dtype
    assert (few.incomplete, few.total, few.fill) == (batch.incomplete, N, batch.fill)
    seen = batch.mask("x")
    assert torch.equal(few.mask("x").any(0), seen.any(0))
    assert torch.equal(few.mask("x").all(0), seen.all(0))
    pairs = [vae(rows, latent=2, hidden=(5,)) for rows in (batch, few)]
    shapes = [
        {name: t.shape for part in pair for name, t in part.state_dict().items()} for pair in pairs
    ]
    assert shapes[0] == shapes[1]


CHOSEN = {
    "binary": [Bernoulli, Binomial, ContinuousBernoulli, LogisticMixture, Categorical],
    "bytes": [Binomial, LogisticMixture, NegativeBinomial, Gaussian],
    "real": [Gaussian, OptimalSigma, StudentT, DiagonalGaussian],
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kinds in CHOSEN.items() for kind in kinds]
)
def test_what_is_loaded_into_a_pair_decides_all_of_it(name: str, kind: Any):
    """A pair built on the example scores the data like that built on the data, once it has its
    parameters: nothing is left that was read off the rows and is not saved."""
    batch = Batch({"x": DATA[name][0]()})
    (model, guide), (copy, other) = [
        vae(rows, latent=2, hidden=(5,), likelihood=kind) for rows in (batch, example(batch))
    ]
    copy.load_state_dict(model.state_dict())
    other.load_state_dict(guide.state_dict())
    z = torch.randn(N, 2)
    with torch.no_grad():
        same_x = [m.likelihood(z).log_prob(batch["x"]) for m in (model, copy)]
        same_z = [g.posterior(batch["x"]).log_prob(z) for g in (guide, other)]
    assert torch.equal(*same_x)
    assert torch.equal(*same_z)


def test_every_entry_for_itself():
    x = torch.tensor([[3.0, 7.0], [1.0, 8.5], [2.0, 9.0]])
    assert example(x).tolist() == [[1.0, 7.0], [3.0, 9.0], [1.0, 8.5], [1.0, 7.0]]
    batch = Batch({"x": x}, observed={"x": torch.tensor([[1, 1], [0, 1], [1, 0]])}, fill={"x": 5})
    few = example(batch)
    assert few["x"].tolist() == [[2.0, 7.0], [3.0, 8.5], [2.0, 8.5], [5.0, 5.0]]
    assert few.mask("x").tolist() == [[True, True]] * 3 + [[False, False]]


def test_a_site_that_misses_nothing_here_stays_incomplete():
    batch = Batch({"x": torch.randn(9, 2)}, observed={"x": torch.ones(9, 2, dtype=torch.bool)})
    assert example(batch).incomplete == ("x",)


def test_parts_of_the_rows_say_the_same_as_all_of_them(monkeypatch: pytest.MonkeyPatch):
    batch = holed(torch.cat([whole(9, 3).double(), torch.randn(N, 3)], 1))
    at_once = example(batch)
    monkeypatch.setattr(example_module, "AT_A_TIME", 20)
    in_parts = example(batch)
    both = [(rows["x"], rows.mask("x")) for rows in (at_once, in_parts)]
    assert torch.equal(both[0][1], both[1][1])
    for row in (0, 1):
        assert torch.equal(both[0][0][row], both[1][0][row])
    broken = [rows != rows.round() for rows, _ in both]
    assert torch.equal(broken[0][2], broken[1][2])


BATCHES: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.randn(6, 3),
    "bytes": lambda: whole(256, 2).to(torch.uint8),
    "sites": lambda: Batch(
        {"x": torch.randn(6, 2), "y": whole(3)[:6]},
        observed={"y": torch.tensor([1, 0, 1, 1, 0, 1])},
        total=99,
        fill={"y": 2},
        record={"steps": [{"site": "x", "step": "scale"}], "levels": {"x": 256}},
    ),
    "no sites": lambda: Batch(size=7),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_there_and_back(kind: str):
    few = example(BATCHES[kind]())
    back = from_tensors(*to_tensors(few))
    if isinstance(few, Tensor):
        assert torch.equal(back, few)
        assert back.dtype == few.dtype
        return
    assert repr(back) == repr(few)
    assert (back.record, back.fill, back.incomplete) == (few.record, few.fill, few.incomplete)
    for site in few:
        assert torch.equal(back[site], few[site])
        assert torch.equal(back.mask(site), few.mask(site))
