"""Batch: construction, methods, pytree. Observed: what is missing is drawn, and counts nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pyro_vae.batch import Batch, Condition, Observed, take

NAN = float("nan")


# --- construction -------------------------------------------------------------------------------


def test_values_and_sizes() -> None:
    y = torch.arange(3)
    batch = Batch({"x": np.zeros((3, 2), dtype=np.float32), "y": y, "z": [1.0, 2.0, 3.0]})
    assert batch.sites == tuple(batch) == ("x", "y", "z")
    assert (batch.size, len(batch), batch.total) == (3, 3, 3)
    assert batch.index.tolist() == [0, 1, 2]
    assert batch["x"].dtype == batch["z"].dtype == torch.float64  # arrays take the default dtype
    assert batch["y"] is y  # tensors are kept as they are
    assert "x" in batch
    assert "w" not in batch
    assert batch.incomplete == ()
    assert batch.mask("x").all()
    assert repr(batch) == "Batch(3 of 3 rows: x [3, 2], y [3], z [3])"


def test_array_is_copied() -> None:
    array = np.zeros(3)
    batch = Batch({"x": array})
    array[0] = 7
    assert batch["x"][0] == 0


def test_size_alone() -> None:
    batch = Batch(size=4)
    assert (batch.size, batch.total, batch.sites) == (4, 4, ())


def test_unsigned_and_bool_arrays() -> None:
    batch = Batch({"a": np.zeros(2, np.uint8), "b": np.zeros(2, np.uint32), "c": [True, False]})
    assert [batch[site].dtype for site in batch] == [torch.uint8, torch.int64, torch.bool]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Batch(), "no values and no size, wanted one"),
        (lambda: Batch({}), "no values and no size, wanted one"),
        (lambda: Batch(np.zeros(3)), "came a bare array, wanted site names"),  # type: ignore[arg-type]
        (lambda: Batch({"x": [1, 2], "y": [1]}), r"number of rows: \{'x': 2, 'y': 1\}"),
        (lambda: Batch({"x": [1, 2]}, size=3), r"number of rows: \{'x': 2, 'size=': 3\}"),
        (lambda: Batch({"x": ["a", "b"]}), "'x': came entries of type <U1, wanted numbers"),
        (lambda: Batch({"x": [None, 1]}), "'x': came entries of type object, wanted numbers"),
        (lambda: Batch({"x": [[1], [1, 2]]}), "'x': came rows of different shapes"),
        (lambda: Batch({"x": 3.0}), "'x': came a single number, wanted rows"),
        (lambda: Batch({"x": [1.0, np.inf]}), "'x': infinite entries .first in row 1"),
        (lambda: Batch({"x": [[1, 1], [1, -np.inf]]}), "'x': infinite entries .first in row 1"),
        (lambda: Batch({"x": [1, 2]}, {"x": [True]}), r"observed= came \[1\], wanted \[2\]"),
        (lambda: Batch({"x": [1, 2]}, {"y": [True]}), r"observed= names \['y'\], .* \['x'\]"),
        (lambda: Batch({"x": [1, 2]}, fill={"y": 0}), r"fill= names \['y'\], .* \['x'\]"),
        (lambda: Batch({"x": [1, 2]}, weights=[1.0]), r"weights= came \[1\], wanted \[2\]"),
        (lambda: Batch({"x": [1, 2]}, index=torch.arange(3)), r"index= came \[3\], wanted \[2\]"),
    ],
)
def test_construction_errors(make: Callable[[], Batch], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_unknown_site_is_named() -> None:
    with pytest.raises(KeyError, match=r"'y' is not in the batch, which has \['x'\]"):
        Batch({"x": [1.0]})["y"]


# --- missing entries ----------------------------------------------------------------------------


def test_nan_is_missing() -> None:
    batch = Batch({"x": np.array([[1.0, NAN], [3.0, 4.0]]), "y": [1.0, 2.0]})
    assert batch.incomplete == ("x",)
    assert batch.mask("x").tolist() == [[True, False], [True, True]]
    assert not batch["x"].isnan().any()
    assert "x [2, 2] (incomplete)" in repr(batch)


def test_observed_adds_to_nan() -> None:
    batch = Batch({"x": torch.tensor([1.0, NAN, 3.0])}, {"x": [True, True, False]})
    assert batch.mask("x").tolist() == [True, False, False]


def test_complete_site_can_be_declared_incomplete() -> None:
    assert Batch({"x": [1.0, 2.0]}, {"x": np.broadcast_to(True, 2)}).incomplete == ("x",)


def test_integers_miss_entries_by_observed() -> None:
    batch = Batch({"y": [5, 99, 7]}, {"y": [1, 0, 1]})
    assert batch["y"].tolist() == [5, 5, 7]  # the lower median of what is observed
    assert batch["y"].dtype == torch.int64


@pytest.mark.parametrize(
    ("values", "fill", "wanted"),
    [
        ([-1.0, 2.0, NAN], None, 0.0),  # data on both sides of 0
        ([0.0, 2.0, NAN], None, 0.0),  # counts
        ([1.0, 2.0, 9.0, NAN], None, 2.0),  # positive data: inside their range
        ([-1.0, -2.0, -9.0, NAN], None, -2.0),
        ([NAN, NAN], None, 0.0),  # nothing to go by
        ([1.0, 2.0, NAN], {"x": 0.5}, 0.5),
    ],
)
def test_missing_entries_read_as_fill(
    values: list[float], fill: dict[str, float] | None, wanted: float
) -> None:
    batch = Batch({"x": values}, fill=fill)
    assert batch["x"][-1] == wanted
    assert batch.fill == {"x": wanted}


def test_bool_site_with_missing_entries() -> None:
    assert Batch({"x": [True, True, False]}, {"x": [True, True, False]})["x"].all()


# --- methods ------------------------------------------------------------------------------------


@pytest.fixture
def mixed() -> Batch:
    return Batch(
        {"x": np.array([[1.0, NAN], [3.0, 4.0], [5.0, 6.0]]), "y": np.arange(3)},
        total=10,
        index=torch.tensor([7, 8, 9]),
        weights=[1.0, 2.0, 3.0],
    )


@pytest.mark.parametrize(
    ("index", "wanted"),
    [
        ([2, 0], [9, 7]),
        (np.array([1, 1]), [8, 8]),
        (torch.tensor([False, True, True]), [8, 9]),
        (slice(1, None), [8, 9]),
        (-1, [9]),
    ],
    ids=["list", "array", "mask", "slice", "number"],
)
def test_rows(mixed: Batch, index: Any, wanted: list[int]) -> None:
    rows = mixed.rows(index)
    at = torch.tensor(wanted) - 7
    assert rows.index.tolist() == wanted
    assert (rows.size, rows.total) == (len(wanted), 10)
    assert torch.equal(rows["x"], mixed["x"][at])
    assert torch.equal(rows.mask("x"), mixed.mask("x")[at])
    assert rows.weights is not None
    assert rows.weights.tolist() == [at + 1 for at in at.tolist()]


@pytest.mark.parametrize("index", [[3], [0, -4]])
def test_rows_that_are_not_there(mixed: Batch, index: list[int]) -> None:
    with pytest.raises(IndexError, match=r"index out of range|out of bounds"):
        mixed.rows(index)


def test_rows_by_numbers_are_those_of_indexing() -> None:
    """Bare tensors as well, with gradients, of any strides and dtype."""
    x = torch.randn(5, 3, 2, requires_grad=True)
    for held in (x, x.mT, x[:, 1:], x > 0, x[:, 0, 0], x[:, :0]):
        for index in ([4, 0, 4], [-1, 2], [], [True, False, True, False, True]):
            at = torch.tensor(index, dtype=None if index else torch.int64)
            assert torch.equal(take(held, at), held[at])
    take(x, torch.tensor([1, 1, -1])).sum().backward()
    assert x.grad is not None
    assert x.grad.sum((1, 2)).tolist() == [0, 12, 0, 0, 6]


def test_ahead(mixed: Batch) -> None:
    """Rows on a device; what is in memory are their tensors and no others."""
    index = torch.tensor([2, 0])
    rows, here = mixed.ahead(index, torch.device("meta")), mixed.ahead(index, torch.device("cpu"))
    assert (rows.sites, rows.incomplete, rows.total) == (mixed.sites, ("x",), 10)
    assert all(tensor.is_meta and len(tensor) == 2 for tensor in rows.tensors())
    wanted = mixed.rows(index)
    assert len(here.tensors()) == 5
    assert all(map(torch.equal, here.tensors(), wanted.tensors()))
    assert here.record == wanted.record


def test_what_is_incomplete_does_not_depend_on_the_rows(mixed: Batch) -> None:
    assert mixed.rows([1, 2]).incomplete == ("x",)
    assert mixed.rows([1, 2]).fill == mixed.fill


def test_to(mixed: Batch) -> None:
    moved = mixed.to("cpu", torch.float32)
    assert moved["x"].dtype == torch.float32
    assert moved["y"].dtype == moved.index.dtype == torch.int64
    assert moved.mask("x").dtype == torch.bool
    assert mixed["x"].dtype == torch.float64


@pytest.mark.gpu
def test_to_accelerator(mixed: Batch) -> None:
    moved = mixed.to("cuda")
    hidden = moved.hide("x", [[True, False]]).rows([0, 2])
    assert {tensor.device.type for tensor in tree_flatten(hidden)[0]} == {"cuda"}
    assert hidden.device.type == "cuda"
    made = Batch({"x": torch.tensor([1.0, NAN], device="cuda")})
    assert made["x"].device == made.mask("x").device == made.index.device


def test_without(mixed: Batch) -> None:
    assert mixed.without("x").sites == ("y",)
    assert mixed.without("x").incomplete == ()
    assert mixed.without(["x", "y"]).size == 3
    assert mixed.without("other").sites == mixed.sites == ("x", "y")


def test_hide(mixed: Batch) -> None:
    hidden = mixed.hide("x", [[False, True]]).hide("y", [True, False, False])
    assert hidden.mask("x").tolist() == [[True, False]] * 3
    assert hidden["x"][:, 1].tolist() == [mixed.fill["x"]] * 3
    assert hidden.incomplete == ("x", "y")
    assert mixed.incomplete == ("x",)
    assert mixed.mask("x").sum() == 5
    assert (hidden.total, hidden.index.tolist()) == (10, [7, 8, 9])


def test_hide_takes_the_fill_of_what_stays() -> None:
    hidden = Batch({"x": [2.0, 3.0, 100.0]}).hide("x", [False, False, True])
    assert hidden["x"].tolist() == [2.0, 3.0, 2.0]


def test_hide_refuses_masks_that_do_not_fit() -> None:
    batch = Batch({"x": np.zeros((3, 2)), "s": np.zeros((3, 3))})
    with pytest.raises(ValueError, match=r"'x': hide\(\) came a mask \[4\], wanted \[3, 2\]"):
        batch.hide("x", torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"'s': .* rows or columns of \[3, 3\]; give it 2 dim"):
        batch.hide("s", torch.zeros(3, dtype=torch.bool))


def test_masks_are_bool() -> None:
    batch = Batch({"x": np.zeros((3, 2))})
    assert batch.hide("x", np.array([[1], [0], [0]])).mask("x")[:, 0].tolist() == [
        False,
        True,
        True,
    ]
    with pytest.raises(ValueError, match=r"'x': hide\(\) came a mask that holds 0.3, wanted bool"):
        batch.hide("x", np.array([[1.0], [0.0], [0.3]]))
    with pytest.raises(ValueError, match=r"'x': observed= came a mask that holds nan, wanted bool"):
        Batch({"x": np.zeros((3, 2))}, observed={"x": np.full((3, 2), np.nan)})


def test_with_mask() -> None:
    batch = Batch({"x": [[1.0, NAN], [NAN, 2.0], [3.0, 4.0]], "y": torch.arange(3)})
    masked = batch.rows([0, 1]).with_mask()
    assert masked.sites == ("x", "y", "s")
    assert masked["s"].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert masked["s"].dtype == torch.get_default_dtype()
    assert masked.incomplete == ("x",)  # the mask itself is complete
    assert batch.sites == ("x", "y")
    assert batch.with_mask("y", "seen")["seen"].tolist() == [1.0, 1.0, 1.0]
    assert masked.rows([1])["s"].tolist() == [[0.0, 1.0]]
    with pytest.raises(ValueError, match=r"site 's': the batch has it already"):
        masked.with_mask()


def test_steps() -> None:
    x = np.arange(12.0).reshape(2, 3, 2) + 1
    x[1, 2] = NAN
    steps = Batch({"x": x, "y": [0, 1]}).steps("x")
    assert steps.sites == ("y", "x_0", "x_1", "x_2")
    assert torch.equal(steps["x_1"], torch.tensor(x[:, 1]))
    assert steps.mask("x_2").tolist() == [[True, True], [False, False]]
    # Alike for all steps, whatever is missing in one of them.
    assert steps.incomplete == ("x_0", "x_1", "x_2")
    assert len(set(steps.fill.values()) - {None}) == 1
    with pytest.raises(ValueError, match=r"'y': steps\(\) came \[2\], wanted \[B, T"):
        steps.steps("y")


def test_what_the_record_says_of_a_site_it_says_of_its_steps() -> None:
    before = {"site": "x", "step": "dequantize", "log_jacobian": -5.5, "text": "x: noise"}
    other = {"site": "y", "step": "cast"}
    mean, scale = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [2.0, 8.0]  # the scale of all steps alike
    step = {"site": "x", "step": "standardize", "mean": mean, "scale": scale, "log_jacobian": -1}
    record = {"steps": [before, other, step], "levels": {"x": 256, "y": 16}, "name": "a"}
    batch = Batch({"x": np.zeros((4, 3, 2)), "y": [0, 1, 2, 3]}, record=record)
    came = batch.steps("x").record
    assert came["levels"] == {"y": 16, "x_0": 256, "x_1": 256, "x_2": 256}
    assert came["name"] == "a"
    assert came["steps"] == [
        *({**before, "site": f"x_{t}"} for t in range(3)),
        other,
        *({**step, "site": f"x_{t}", "mean": mean[t], "scale": scale} for t in range(3)),
    ]
    assert batch.record == record
    assert Batch({"x": np.zeros((4, 3, 2))}).steps("x").record == {}


# --- pytree -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 3.0]])
def test_pytree_round_trip(weights: list[float] | None) -> None:
    batch = Batch({"x": [1.0, NAN, 3.0], "y": [1, 2, 3]}, total=9, weights=weights)
    leaves, spec = tree_flatten(batch)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    again = tree_unflatten(leaves, spec)
    assert (again.sites, again.incomplete) == (batch.sites, batch.incomplete)
    assert (again.size, again.total, again.fill) == (3, 9, batch.fill)
    for ours, theirs in zip(leaves, tree_flatten(again)[0], strict=True):
        assert ours is theirs
    if weights is None:
        assert again.weights is None
    else:
        assert again.weights.tolist() == weights
    doubled = tree_map(lambda leaf: leaf * 2 if leaf.is_floating_point() else leaf, batch)
    assert doubled["x"].tolist() == (2 * batch["x"]).tolist()
    assert doubled.mask("x").tolist() == [True, False, True]


# --- Observed: exact masked densities -----------------------------------------------------------

B = 5


def program(make: Callable[[], Any]) -> Callable[[Batch], None]:
    """A model with the one site x, whose distribution ``make`` returns (batch shape [] or [B])."""

    def model(batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("x", make())

    return model


def traced(program: Callable[..., Any], *args: Batch) -> Any:
    """A trace without Pyro's types, which know neither distributions nor optional fields."""
    return poutine.trace(program).get_trace(*args)


def site_of(program: Callable[..., Any], batch: Batch) -> dict[str, Any]:
    site: dict[str, Any] = traced(program, batch).nodes["x"]
    return site


LOGITS = torch.linspace(-1, 1, 6)
USER_MASK = torch.tensor([True, False, True, True, False, True])

FACTORIZED: dict[str, tuple[Callable[[], Any], Callable[[Tensor], Tensor]]] = {
    # name -> (distribution, elementwise log density of x [B, *event])
    "normal": (
        lambda: dist.Normal(LOGITS, 0.7).to_event(1),
        lambda x: dist.Normal(LOGITS, 0.7).log_prob(x),
    ),
    "binomial": (
        lambda: dist.Binomial(16, logits=LOGITS).to_event(1),
        lambda x: dist.Binomial(16, logits=LOGITS).log_prob(x),
    ),
    "bernoulli": (
        lambda: dist.Bernoulli(logits=LOGITS).to_event(1),
        lambda x: dist.Bernoulli(logits=LOGITS).log_prob(x),
    ),
    "categorical": (
        lambda: dist.Categorical(logits=LOGITS),
        lambda x: dist.Categorical(logits=LOGITS).log_prob(x),
    ),
    "two event dimensions": (
        lambda: dist.Normal(LOGITS.reshape(2, 3), 1.0).to_event(2),
        lambda x: dist.Normal(LOGITS.reshape(2, 3), 1.0).log_prob(x),
    ),
    "nested to_event": (
        lambda: dist.Normal(LOGITS.reshape(2, 3), 1.0).to_event(1).to_event(1),
        lambda x: dist.Normal(LOGITS.reshape(2, 3), 1.0).log_prob(x),
    ),
    "expand": (
        lambda: dist.Normal(LOGITS, 1.0).to_event(1).expand([B]),
        lambda x: dist.Normal(LOGITS, 1.0).log_prob(x),
    ),
    "expand inside": (
        lambda: dist.Normal(0.3, 1.0).expand([6]).to_event(1),
        lambda x: dist.Normal(0.3, 1.0).log_prob(x),
    ),
    "masked inside": (
        lambda: dist.Normal(LOGITS, 1.0).mask(USER_MASK).to_event(1),
        lambda x: dist.Normal(LOGITS, 1.0).log_prob(x) * USER_MASK,
    ),
    "masked outside": (
        lambda: dist.Normal(LOGITS, 1.0).to_event(1).mask(torch.arange(B) < 3),
        lambda x: dist.Normal(LOGITS, 1.0).log_prob(x) * (torch.arange(B) < 3)[:, None],
    ),
    "masked by False": (
        lambda: dist.Normal(LOGITS, 1.0).to_event(1).mask(False),
        lambda x: torch.zeros(B, 6),
    ),
    "mixture": (lambda: mixture().to_event(1), lambda x: mixture().log_prob(x)),
    "log-normal": (
        lambda: dist.LogNormal(LOGITS, 0.5).to_event(1),
        lambda x: dist.LogNormal(LOGITS, 0.5).log_prob(x),
    ),
}


def mixture() -> Any:
    parts = dist.Normal(torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 2.0])).expand([6, 2])
    return dist.MixtureSameFamily(dist.Categorical(logits=torch.ones(6, 2)), parts)


def data_for(make: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """Draws x [B, *event] and a mask with one row of all, one of none."""
    x = dist.Independent(make().expand([B]), 0).sample()
    mask = torch.rand(x.shape) < 0.6
    mask[0], mask[1] = True, False
    return x, mask


@pytest.mark.parametrize("name", FACTORIZED)
def test_log_density_is_masked_elementwise(name: str) -> None:
    make, log_density = FACTORIZED[name]
    x, mask = data_for(make)
    site = site_of(Observed(program(make)), Batch({"x": x}, {"x": mask}))
    elements = torch.where(mask, log_density(x), 0.0)
    wanted = elements.reshape(B, -1).sum(-1) if x.dim() > 1 else elements
    assert site["is_observed"]
    assert torch.equal(site["fn"].log_prob(site["value"]), wanted)
    assert torch.equal(site["value"][mask], x[mask])
    assert site["infer"]["drawn"].equal(mask)
    if x.dim() > 1:  # entry by entry as well
        entries = site["fn"]
        while entries.event_dim:
            entries = entries.base_dist
        if name != "masked outside" and name != "masked by False":
            assert torch.equal(entries.log_prob(site["value"]), elements)


@pytest.mark.parametrize("name", FACTORIZED)
def test_complete_site_is_observed_as_it_is(name: str) -> None:
    make, log_density = FACTORIZED[name]
    x, _ = data_for(make)
    site = site_of(Observed(program(make)), Batch({"x": x}))
    assert site["is_observed"]
    assert site["value"] is x
    wanted = log_density(x)
    wanted = wanted.reshape(B, -1).sum(-1) if x.dim() > 1 else wanted
    assert torch.equal(site["fn"].log_prob(x), wanted)


def test_log_density_of_a_user_mask_and_scale_is_kept() -> None:
    def model(batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1), poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    x = torch.tensor([0.3, NAN, 1.0])
    trace = traced(Observed(model), Batch({"x": x}))
    wanted = 0.5 * dist.Normal(0.0, 1.0).log_prob(x[[0, 2]]).sum()
    assert torch.equal(trace.log_prob_sum(), wanted)


def correlated() -> Any:
    return dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 0.5)


def test_joint_density_of_a_partly_missing_row_is_refused() -> None:
    x = torch.randn(B, 3)
    x[2, 1] = NAN
    with pytest.raises(ValueError, match=r"'x': MultivariateNormal does not factorize .* \[3\]"):
        Observed(program(correlated))(Batch({"x": x}))


def test_joint_density_of_missing_rows() -> None:
    x = torch.randn(B, 3)
    x[2] = NAN
    site = site_of(Observed(program(correlated)), Batch({"x": x}))
    wanted = correlated().log_prob(x.nan_to_num()) * (torch.arange(B) != 2)
    assert torch.equal(site["fn"].log_prob(site["value"]), wanted)


def test_joint_density_inside_an_event() -> None:
    x = torch.randn(B, 4, 3)
    x[2, 1] = NAN  # one whole vector of four
    make = lambda: correlated().expand([4]).to_event(1)  # noqa: E731
    site = site_of(Observed(program(make)), Batch({"x": x}))
    wanted = correlated().log_prob(x.nan_to_num())
    wanted[2, 1] = 0
    assert torch.allclose(site["fn"].log_prob(site["value"]), wanted.sum(-1), rtol=1e-14)
    x[0, 0, 0] = NAN
    with pytest.raises(ValueError, match="'x': MultivariateNormal does not factorize"):
        Observed(program(make))(Batch({"x": x}))


def test_log_normal_has_finite_value_and_gradient() -> None:
    location = torch.zeros(3, requires_grad=True)
    x = torch.tensor([[1.0, NAN, 2.0], [NAN, NAN, NAN]])
    model = Observed(program(lambda: dist.LogNormal(location, 1.0).to_event(1)))
    value = traced(model, Batch({"x": x})).log_prob_sum()
    (gradient,) = torch.autograd.grad(value, location)
    assert value.isfinite()
    # d/dm log p(x) = log x - m for each observed entry.
    assert torch.allclose(gradient, torch.tensor([0.0, 0.0, np.log(2)]), atol=1e-15)


# --- Observed: refusals -------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [False, True])
def test_event_shape_mismatch_is_refused(missing: bool) -> None:
    x = torch.zeros(B, 1)
    x[0] = NAN if missing else 0.0
    model = Observed(program(lambda: dist.Normal(LOGITS, 1.0).to_event(1)))
    with pytest.raises(ValueError, match=r"'x': data have event shape \[1\], .* has \[6\]; resh"):
        model(Batch({"x": x}))


def test_event_shape_without_to_event_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'x': data have event shape \[5\], .* has \[\]; .*to_ev"):
        Observed(program(lambda: dist.Normal(0.0, 1.0)))(Batch({"x": torch.zeros(B, B)}))


def test_number_of_rows_mismatch_is_refused() -> None:
    def model(batch: Batch) -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"'x': data have 5 rows, .* has 1; is it inside pyro\.pl"):
        Observed(model)(Batch({"x": torch.zeros(B)}))


# --- Observed: drawing what is missing ----------------------------------------------------------


def chain(batch: Batch) -> None:
    """z -> x -> y: a missing x has a child."""
    with pyro.plate("data", batch.size, dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(torch.stack([z, -z], -1), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(-1), 0.5))


def test_child_sees_the_drawn_value() -> None:
    batch = Batch({"x": np.full((B, 2), NAN), "y": np.ones(B)})
    trace = traced(Observed(chain), batch)
    x, y = trace.nodes["x"], trace.nodes["y"]
    assert x["value"].unique().numel() == 2 * B
    assert torch.equal(y["fn"].loc, x["value"].sum(-1))
    assert torch.equal(x["fn"].log_prob(x["value"]), torch.zeros(B))


@pytest.mark.parametrize("particles", [None, 3])
def test_absent_equals_all_nan(particles: int | None) -> None:
    """At one seed, an absent modality and one that is all NaN are the same to all other sites."""
    y = np.linspace(-1, 1, B)
    sums = []
    for batch in (Batch({"y": y}), Batch({"y": y, "x": np.full((B, 2), NAN)})):
        pyro.set_rng_seed(3)
        with pyro.plate("particles", particles, dim=-2) if particles else nullcontext():
            nodes = traced(Observed(chain), batch).nodes
        log_prob = {site: nodes[site]["fn"].log_prob(nodes[site]["value"]) for site in ("z", "y")}
        sums.append((nodes["z"]["value"], nodes["x"]["value"], log_prob["z"], log_prob["y"]))
    for absent, missing in zip(*sums, strict=True):
        assert torch.equal(absent, missing)


def test_gradient_passes_through_the_drawn_value() -> None:
    scale = torch.tensor(1.5, requires_grad=True)

    def model(batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            x = pyro.sample("x", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(x, 1.0))

    trace = traced(Observed(model), Batch({"x": [NAN], "y": [2.0]}))
    (gradient,) = torch.autograd.grad(trace.log_prob_sum(), scale)
    x = trace.nodes["x"]["value"].detach()
    assert torch.allclose(gradient, ((2 - x) * x / 1.5).sum())


@pytest.mark.parametrize("outside", [True, False], ids=["outside", "inside"])
def test_particles_draw_apart(outside: bool) -> None:
    """K particles get K different draws, on whichever side of the particle plate the handler is."""
    batch = Batch({"x": np.array([[NAN, 1.0]] * B), "y": np.zeros(B)})
    particles = pyro.plate("particles", 7, dim=-2)

    def inner() -> None:
        with particles:
            Observed(chain)(batch)

    def outer() -> None:
        with Condition(batch), particles:
            chain(batch)

    trace = traced(outer if outside else inner)
    x = trace.nodes["x"]["value"]
    assert x.shape == (7, B, 2)
    assert x[..., 0].unique().numel() == 7 * B
    assert (x[..., 1] == 1).all()
    assert trace.nodes["y"]["fn"].log_prob(trace.nodes["y"]["value"]).shape == (7, B)


def test_particles_draw_apart_where_the_distribution_is_shared() -> None:
    """A site that depends on nothing has batch shape [B] until the particle plate expands it."""
    batch = Batch({"x": [NAN, 1.0, NAN]})
    with pyro.plate("particles", 7, dim=-2):
        trace = traced(Observed(program(lambda: dist.Normal(0.0, 1.0))), batch)
    assert trace.nodes["x"]["value"].unique().numel() == 15


def test_subsampled_plate_keeps_its_scale() -> None:
    def model(batch: Batch) -> None:
        with pyro.plate("data", 20, subsample_size=batch.size, dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    trace = traced(Observed(model), Batch({"x": [0.5, NAN]}, total=20))
    assert torch.allclose(
        trace.log_prob_sum(), 10 * dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.5))
    )


def test_own_observation_of_a_program_is_left_alone() -> None:
    def model(batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.full((batch.size,), 9.0))

    site = site_of(Observed(model), Batch({"x": [1.0, 2.0]}))
    assert site["value"].tolist() == [9.0, 9.0]


# --- Condition: merging with a guide ------------------------------------------------------------


def test_guide_proposes_only_what_is_missing() -> None:
    batch = Batch({"x": [1.0, NAN, 3.0], "y": [4.0, 5.0, 6.0]})

    def guide(batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("x", dist.Normal(-50.0, 1.0))
            pyro.sample("y", dist.Normal(-50.0, 1.0))

    with pyro.plate("particles", 2, dim=-2), Condition(batch, proposing=True):
        trace = traced(guide, batch)
    x, y = trace.nodes["x"], trace.nodes["y"]
    assert x["value"][:, [0, 2]].tolist() == [[1.0, 3.0]] * 2
    assert (x["value"][:, 1] < -40).all()
    assert x["value"][:, 1].unique().numel() == 2
    assert x["infer"]["observed"].tolist() == [True, False, True]
    assert y["value"].tolist() == [[4.0, 5.0, 6.0]] * 2
    assert y["infer"]["observed"] is True
    assert not x["is_observed"]


@pytest.mark.parametrize("inside", [True, False], ids=["inside replay", "outside replay"])
def test_proposed_site_takes_the_replayed_value(inside: bool) -> None:
    batch = Batch({"x": [1.0, NAN], "y": [0.0, 0.0]})

    def guide(batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("x", dist.Normal(-50.0, 1.0))

    def model(batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0))

    with Condition(batch, proposing=True):
        proposal = traced(guide, batch)
    condition, replay = Condition(batch, proposed=["x"]), poutine.replay(trace=proposal)
    with replay if inside else condition, condition if inside else replay:
        trace = traced(model, batch)
    x, y = trace.nodes["x"], trace.nodes["y"]
    assert torch.equal(x["value"], proposal.nodes["x"]["value"])
    assert x["infer"]["observed"].tolist() == [True, False]
    assert torch.equal(y["fn"].loc, x["value"])
    assert y["is_observed"]


# --- Observed as a module -----------------------------------------------------------------------


class Linear(PyroModule):
    """z -> x, with a torch layer, a constrained parameter and a site of its own (bias)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 3)
        self.scale = PyroParam(torch.tensor(0.7), dist.constraints.positive)
        self.bias = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, batch: Batch) -> None:
        bias: Any = self.bias
        scale: Any = self.scale
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = self.net(z[..., None]) + bias[..., None]
            pyro.sample("x", dist.Normal(loc, scale).to_event(1))


def linear_guide(batch: Batch) -> None:
    pyro.sample("bias", dist.Delta(pyro.param("b", torch.tensor(0.0))))
    loc = pyro.param("loc", torch.zeros(()))
    with pyro.plate("data", batch.size, dim=-1):
        pyro.sample("z", dist.Normal(loc + batch["x"].mean(-1), 1.0))


def incomplete_rows() -> Batch:
    x = torch.randn(B, 3)
    x[torch.rand(B, 3) < 0.4] = NAN
    return Batch({"x": x})


def test_parameters_and_names_are_the_models_own() -> None:
    model = Linear()
    observed = Observed(model)
    assert {id(p) for p in observed.parameters()} == {id(p) for p in model.parameters()}
    assert observed.model is model
    batch = incomplete_rows()
    trace = traced(observed, batch)
    assert {"bias", "net$$$weight", "scale", "z", "x"} <= set(trace.nodes)
    assert set(traced(model, batch).nodes) == set(trace.nodes)


def test_wrapping_twice_and_after_use() -> None:
    model, batch = Linear(), incomplete_rows()
    model(Batch(size=3))
    for _ in range(2):
        assert "bias" in traced(Observed(model), batch).nodes


def test_copy_is_independent() -> None:
    observed = Observed(Linear())
    twin = copy.deepcopy(observed)
    assert twin.model is not observed.model
    (child,) = twin.children()
    assert child is twin.model
    twin.load_state_dict(observed.state_dict())


def test_plain_module_and_function() -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = torch.nn.Parameter(torch.zeros(()))

        def forward(self, batch: Batch) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                pyro.sample("x", dist.Normal(self.loc, 1.0))

    batch = Batch({"x": [1.0, NAN, 3.0]})
    plain = Plain()
    svi = SVI(Observed(plain), lambda batch: None, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(200):
        svi.step(batch)
    assert abs(plain.loc.item() - 2.0) < 1e-3
    assert list(Observed(chain).parameters()) == []


@pytest.mark.parametrize("vectorized", [False, True])
def test_svi(vectorized: bool) -> None:
    batch, model = incomplete_rows(), Linear()
    loss = Trace_ELBO(num_particles=4, vectorize_particles=vectorized, max_plate_nesting=1)
    svi = SVI(Observed(model), linear_guide, Adam({"lr": 0.01}), loss)
    before = [p.clone() for p in model.parameters()]
    assert all(np.isfinite(svi.step(batch)) for _ in range(3))
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_svi_loss_is_the_masked_elbo() -> None:
    """At one seed the loss equals the ELBO written out by hand."""
    batch = incomplete_rows()

    def model(batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 3), 0.5).to_event(1))

    def guide(batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", dist.Normal(batch["x"].mean(-1), 0.3))

    pyro.set_rng_seed(5)
    loss = Trace_ELBO().loss(Observed(model), guide, batch)
    pyro.set_rng_seed(5)
    q = dist.Normal(batch["x"].mean(-1), 0.3)
    z = q.rsample()
    log_x = torch.where(batch.mask("x"), dist.Normal(z[:, None], 0.5).log_prob(batch["x"]), 0.0)
    elbo = dist.Normal(0.0, 1.0).log_prob(z).sum() + log_x.sum() - q.log_prob(z).sum()
    assert loss == pytest.approx(-float(elbo), abs=1e-12)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_imputes(parallel: bool) -> None:
    batch = incomplete_rows()
    predictive = Predictive(
        Observed(Linear()),
        guide=linear_guide,
        num_samples=6,
        return_sites=["x", "z"],
        parallel=parallel,
    )
    x = predictive(batch)["x"].reshape(6, B, 3)
    mask = batch.mask("x")
    assert torch.equal(x[:, mask], batch["x"][mask].expand(6, -1))
    assert x[:, ~mask].unique().numel() == 6 * int((~mask).sum())


def test_module_local_parameters() -> None:
    """A model that was built with parameters of its own trains by them."""

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = torch.nn.Parameter(torch.zeros(()))

        def forward(self, batch: Batch) -> None:
            pyro.sample("bias", dist.Delta(self.loc))
            with pyro.plate("data", batch.size, dim=-1):
                pyro.sample("z", dist.Normal(self.loc, 1.0))

    batch = incomplete_rows()
    with pyro.settings.context(module_local_params=True):
        model, guide = Observed(Linear()), Guide()
        Trace_ELBO()(model, guide)(batch).backward()
    gradients = [p.grad for p in (*model.parameters(), *guide.parameters())]
    assert len(gradients) == 4
    assert all(gradient is not None and bool((gradient != 0).all()) for gradient in gradients)


def test_rows_in_which_a_site_is_seen():
    x = torch.tensor([[1.0, 2.0], [3.0, torch.nan], [torch.nan, torch.nan]])
    batch = Batch({"x": x, "y": torch.arange(3)}, observed={"y": torch.tensor([False, True, True])})
    assert batch.seen("x").tolist() == [True, True, False]
    assert batch.seen("y").tolist() == [False, True, True]
