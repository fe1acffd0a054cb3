"""Pairs for sites with missing entries: what the guide sees of them, and models of what is missing."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.conditionals import Categorical, Gaussian, OptimalSigma, StudentT
from pyro_vae.guides import JointGuide
from pyro_vae.models import LatentVariableModel, SelectionModel
from pyro_vae.nn import EntrySet, Entrywise, convolutional, dense
from pyro_vae.objectives import elbo, iwae
from pyro_vae.pairs import missing, rebuilt, update_sigma
from pyro_vae.pairs.missing import ENCODERS, MECHANISMS
from pyro_vae.training.fit import fit


def rows(n: int = 60, columns: int = 3) -> Batch:
    """Correlated columns in units of their own, of which a third is missing, with the mask."""
    x = torch.randn(n, 1) + 0.5 * torch.randn(n, columns)
    x = torch.tensor([100.0, 1.0, 0.01])[:columns] * x + 5
    return Batch({"x": x.masked_fill(torch.rand(n, columns) < 0.35, torch.nan)}).with_mask()


def moved(*programs: nn.Module) -> None:
    """Away from a start at which nothing depends on some parameters."""
    with torch.no_grad():
        for program in programs:
            for parameter in program.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))


def gradients(model: nn.Module, guide: nn.Module, batch: Batch) -> dict[str, Tensor]:
    named = dict([*model.named_parameters(), *guide.named_parameters()])
    loss = iwae(5)(model, guide)(batch)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("mechanism", [None, *MECHANISMS])
def test_every_parameter_is_trained(encoder, mechanism):
    batch = rows()
    model, guide = missing(batch, encoder, mechanism, latent=2, hidden=(6,), activation=nn.Tanh)
    assert type(model) is (LatentVariableModel if mechanism is None else SelectionModel)
    moved(model, guide)
    for name, gradient in gradients(model, guide, batch).items():
        assert gradient.isfinite().all(), name
        assert (gradient.flatten(1) if gradient.dim() > 1 else gradient).abs().sum() > 0, name
    assert model(Batch(size=4)).shape == (4, 3)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("mechanism", [None, "linear"])
def test_the_fill_changes_nothing(encoder, mechanism):
    batch = rows()
    other = Batch({"x": batch["x"]}, {"x": batch.mask("x")}, fill={"x": -1e3}).with_mask()
    assert not torch.equal(batch["x"], other["x"])
    model, guide = missing(batch, encoder, mechanism, latent=2, hidden=(6,))
    pyro.set_rng_seed(0)
    here = iwae(3).rows(model, guide, batch)
    pyro.set_rng_seed(0)
    assert torch.equal(iwae(3).rows(model, guide, other), here)


def test_zero_is_the_columns_mean():
    batch = rows()
    _, guide = missing(batch, "zero", latent=2, hidden=())
    means = batch["x"].masked_fill(~batch.mask("x"), torch.nan).nanmean(0)
    filled = Batch({"x": torch.where(batch.mask("x"), batch["x"], means)})
    came, wanted = (guide.posterior_of(b).mean for b in (batch, filled))
    torch.testing.assert_close(came, wanted)


def test_mechanisms_start_from_how_often_each_column_is_seen():
    batch = rows(500)
    for mechanism in MECHANISMS:
        model, _ = missing(batch, mechanism=mechanism, latent=2, hidden=(6,))
        means = batch["x"].masked_fill(~batch.mask("x"), torch.nan).nanmean(0)
        seen = model.mechanism(means[None]).mean[0]
        close = 0.02 if mechanism != "nonlinear" else 0.3
        torch.testing.assert_close(seen, batch["s"].mean(0), rtol=0, atol=close)


@pytest.mark.parametrize(
    ("mechanism", "sign"), [("hides_large", -1), ("hides_small", 1), ("self_masking", 0)]
)
def test_what_is_said_of_the_sign_holds(mechanism, sign):
    model, _ = missing(rows(), mechanism=mechanism, latent=2, hidden=(6,))
    (entrywise,) = [part for part in model.modules() if isinstance(part, Entrywise)]
    assert entrywise.sign == sign
    x = torch.tensor([[0.0, 4.0, 4.99], [200.0, 6.0, 5.01]])
    small, large = model.mechanism(x).base_dist.logits
    assert ((large - small).sign() == sign).all()


@pytest.mark.parametrize("likelihood", [Gaussian, StudentT])
def test_the_mask_tells_where_the_hidden_values_are(likelihood):
    """Most values above 0.5 are hidden: with a model of that the mean comes back."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 1)) + 0.4 * rng.normal(size=(600, 2))
    x[(x[:, 0] > 0.5) & (rng.random(600) < 0.9), 0] = np.nan
    batch = Batch({"x": x}).with_mask()
    adam = partial(torch.optim.Adam, lr=0.03)
    found = {}
    for mechanism in (None, "hides_large"):
        torch.manual_seed(0)
        pair = missing(batch, "masked", mechanism, latent=1, hidden=(), likelihood=likelihood)
        fit(*pair, batch, iwae(10), steps=120, batch_size=100, optimizer=adam, compile="eager")
        found[mechanism] = float(pair[0](Batch(size=20_000))[:, 0].detach().mean())
    assert found[None] < -0.2  # about 0 in truth
    assert abs(found["hides_large"]) < 0.5 * abs(found[None])


@pytest.mark.parametrize("pair", [("set", None), ("masked", "self_masking"), ("zero", "nonlinear")])
def test_traced_steps_are_those_of_the_programs(pair):
    batch, losses = rows(), {}
    encoder, mechanism = pair
    for level in ("eager", "traced"):
        torch.manual_seed(0)
        model, guide = missing(batch, encoder, mechanism, latent=2, hidden=(6,))
        run = fit(model, guide, batch, iwae(4), steps=6, batch_size=30, compile=level)
        assert run.level == level
        losses[level] = [record["loss"] for record in run.history]
    assert losses["traced"] == pytest.approx(losses["eager"], rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"encoder": "set", "mechanism": "linear", "latent": [2]}])
def test_a_pair_says_how_it_was_built(options):
    batch = rows()
    model, guide = missing(batch, hidden=(4,), **options)
    assert model.built_by == {"pair": "missing", "options": {"hidden": [4], **options}}
    again = rebuilt(model.built_by, batch)
    for one, other in zip((model, guide), again, strict=True):
        assert one.state_dict().keys() == other.state_dict().keys()


def test_what_has_no_name_is_not_said():
    def own(*args: Any) -> EntrySet:
        return EntrySet(*args)

    for encoder in (own, partial(own)):
        model, _ = missing(rows(), encoder, latent=2, hidden=(4,))
        assert getattr(model, "built_by", None) is None


def test_a_part_with_options_is_said():
    batch = rows()
    model, guide = missing(batch, partial(EntrySet, code=5), latent=2, hidden=(4,))
    said = json.loads(json.dumps(model.built_by))
    assert said["options"]["encoder"] == {"part": "EntrySet", "with": {"of": {"code": 5}}}
    again = rebuilt(said, batch)
    for one, other in zip((model, guide), again, strict=True):
        other.load_state_dict(one.state_dict())


def test_parts_of_ones_own():
    batch = rows()
    model, guide = missing(batch, partial(EntrySet, code=5), dense, latent=2, hidden=(4,))
    assert guide.features["x"].shape == (5,)
    moved(model, guide)
    assert all(g.abs().sum() > 0 for g in gradients(model, guide, batch).values())


def test_update_sigma_takes_these_pairs():
    batch = rows()
    model, guide = missing(batch, latent=2, hidden=(6,), likelihood=OptimalSigma)
    started = model.likelihood.state_dict()["scale"].clone()
    fit(model, guide, batch, steps=2, batch_size=60, callbacks=[update_sigma(batch)])
    assert not torch.equal(model.likelihood.state_dict()["scale"], started)


@pytest.mark.parametrize("encoder", ["zero", "masked"])
def test_images_go_through_convolutions(encoder):
    x = torch.randint(2, (20, 6, 7))
    batch = Batch({"x": x}, {"x": torch.rand(x.shape) < 0.5})
    model, guide = missing(batch, encoder, latent=2, hidden=(3,), net=convolutional)
    assert isinstance(guide, JointGuide)
    assert all(g.isfinite().all() for g in gradients(model, guide, batch).values())


@pytest.mark.parametrize("encoder", ENCODERS)
def test_classes(encoder):
    x = torch.randint(4, (40, 3))
    batch = Batch({"x": x}, {"x": torch.rand(x.shape) < 0.7}).with_mask()
    model, guide = missing(batch, encoder, latent=2, hidden=(5,))
    assert isinstance(model.likelihood, Categorical)
    assert all(g.abs().sum() > 0 for g in gradients(model, guide, batch).values())
    with pytest.raises(ValueError, match=r"looks at each entry by itself.*use 'linear'"):
        missing(batch, encoder, "self_masking")
    pair = missing(batch, encoder, "linear", latent=2, hidden=(5,))
    with pytest.raises(ValueError, match=r"site 'x' are drawn without rsample"):
        elbo()(*pair)(batch)


def never() -> Batch:
    x = torch.randn(5, 3)
    x[:, 1] = torch.nan
    return Batch({"x": x}).with_mask()


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "encoder": (rows, {"encoder": "mean"}, r"came encoder='mean', wanted one of \['zero'"),
    "mechanism": (rows, {"mechanism": "mar"}, r"came mechanism='mar', wanted one of \['self_mask"),
    "no mask": (
        lambda: rows().without("s"),
        {"mechanism": "linear"},
        r"no site 's' but \['x'\]; give it batch.with_mask\(\)",
    ),
    "mask of another shape": (
        lambda: Batch({"x": rows()["x"], "s": torch.ones(60)}),
        {"mechanism": "linear"},
        r"site 's': the mask came \[60\], wanted \[60, 3\]",
    ),
    "a mask that says the contrary": (
        lambda: Batch({"x": rows()["x"], "s": 1 - rows()["s"]}),
        {"mechanism": "linear"},
        r"site 's': contradicts what is missing of 'x' in \d+ of 180 entries, wanted 1 where",
    ),
    "a mask with holes": (
        lambda: (kept := rows()).hide("s", kept["s"] == 0),
        {"mechanism": "linear"},
        "site 's': has missing entries itself, wanted 0 or 1 in all",
    ),
    "never observed": (never, {}, r"site 'x': none of 5 rows has \[1\], wanted"),
    "widths": (rows, {"hidden": (0,)}, r"hidden=\(0,\), wanted whole numbers above 0"),
    "no batch": (lambda: torch.randn(5, 3), {}, r"came a Tensor, wanted a Batch"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name):
    make, options, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        missing(make(), **options)
    assert "\n" not in str(error.value)
