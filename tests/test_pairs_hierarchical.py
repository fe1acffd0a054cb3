"""Hierarchical pairs: their networks, that every objective trains them, and what becomes of a run."""

from __future__ import annotations

import json
import math
from itertools import chain
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae.batch import Batch, Observed
from pyro_vae.cli import main
from pyro_vae.conditionals import (
    Bernoulli,
    Binomial,
    DiagonalGaussian,
    Gaussian,
    LearnedBernoulli,
    StandardNormal,
    UniformBernoulli,
)
from pyro_vae.evaluation.annealing import annealed
from pyro_vae.guides import BottomUpGuide, TopDownGuide, precision_weighted, residual
from pyro_vae.linter import check
from pyro_vae.nn import Concatenated, conv_resnet, convolutional, dense_resnet
from pyro_vae.objectives import Objective, elbo, free_bits, iwae, vimco
from pyro_vae.objectives.penalties import MMD, TotalCorrelation
from pyro_vae.objectives.specs import parse
from pyro_vae.pairs import hierarchical, rebuilt
from tests.test_compiled_step import assert_equal_to_eager
from tests.test_pairs import elbo_gradients
from tests.trainings import SGD, fit

MERGES: dict[str, Any] = {"bottom-up": None, "ladder": precision_weighted, "residual": residual}
SIZES: dict[str, Any] = {"latent": (4, 2), "hidden": (7, 5)}


def bits(n=40, *shape):
    return Batch({"x": torch.randint(2, (n, *(shape or (8,)))).to(torch.float64)})


def pair(merge: str = "ladder", batch: Batch | None = None, **options: Any) -> Any:
    return hierarchical(batch or bits(), **{**SIZES, "merge": MERGES[merge], **options})


def matrices(*modules):
    return [tuple(p.shape) for m in modules for p in m.parameters() if p.dim() == 2]


# ---------------------------------------------------------------------------------------------
# Networks


def test_the_published_net_of_two_layers():
    """784-200-200-(100)-100-100-(50) and back."""
    model, guide = hierarchical(
        bits(5, 784), latent=(100, 50), hidden=((200, 200), (100, 100)), activation=nn.Tanh
    )
    up = [(200, 784), (200, 200), (200, 200), (100, 100), (100, 100), (100, 100)]
    down = [(100, 50), (100, 100), (200, 100), (200, 100), (200, 200), (784, 200)]
    assert matrices(guide) == up
    assert matrices(model.layers, model.likelihood) == down
    assert sum(isinstance(m, nn.Tanh) for m in guide.modules()) == 4
    assert sum(isinstance(m, nn.Tanh) for m in model.modules()) == 4


def test_the_published_ladder_of_five():
    widths = (512, 256, 128, 64, 32)
    model, guide = hierarchical(
        bits(5, 784),
        latent=(64, 32, 16, 8, 4),
        hidden=tuple((n, n) for n in widths),
        merge=precision_weighted,
        activation=nn.LeakyReLU,
        norm=nn.BatchNorm1d,
    )
    inputs = (784, *widths)
    up = chain.from_iterable([(n, inputs[k]), (n, n)] for k, n in enumerate(widths))
    assert matrices(guide.stages) == list(up)
    heads = [(2 * z, n) for z, n in zip((64, 32, 16, 8, 4), widths, strict=True)]
    assert matrices(guide.posteriors) == heads
    assert matrices(model.layers[3]) == [(32, 4), (32, 32), (16, 32)]
    for program, number in ((model, 10), (guide.stages, 10), (guide.posteriors, 0)):
        assert sum(isinstance(m, nn.BatchNorm1d) for m in program.modules()) == number


def test_skip_connections_see_all_above():
    model, guide = hierarchical(
        bits(), latent=(4, 3, 2), hidden=6, merge=residual, skip=True, likelihood=Bernoulli
    )
    assert [m[0] for m in map(matrices, (model.likelihood, *model.layers[:2]))] == [
        (6, 9),
        (6, 5),
        (6, 2),
    ]
    assert [m[0] for m in map(matrices, guide.posteriors)] == [(6, 11), (6, 8), (4, 6)]
    assert type(model.likelihood) is Concatenated
    assert type(model.likelihood.net) is Bernoulli


def test_one_layer_is_the_same_whichever_way():
    pairs = []
    for merge in MERGES:
        torch.manual_seed(1)
        pairs.append(pair(merge, Batch({"x": torch.eye(8)}), latent=3, hidden=6))
    values = []
    for model, guide in pairs:
        torch.manual_seed(2)
        values.append(elbo(4).rows(model, guide, bits(5)))
    for value in values[1:]:
        torch.testing.assert_close(value, values[0])


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("net", [convolutional, conv_resnet, dense_resnet])
def test_networks_next_to_the_data_are_an_argument(net, merge):
    batch = bits(40, 3, 8, 7)
    model, guide = pair(merge, batch, hidden=((4, 5, 6), 5), net=net)
    gradients = elbo_gradients(model, guide, batch)
    assert all(g is not None and bool((g != 0).any()) for g in gradients.values())
    assert model(Batch(size=2)).shape == (2, 3, 8, 7)


OPTIONS: dict[str, Any] = {
    "plain": {},
    "skip": {"skip": True, "latent": (4, 3, 2), "hidden": 6},
    "norm": {"norm": nn.BatchNorm1d, "activation": nn.LeakyReLU},
    "layer norm": {"norm": nn.LayerNorm},
    "scales of their own": {"family": Gaussian},
    "prior": {"prior": StandardNormal(2)},
}


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_every_parameter_is_trained(options, merge):
    model, guide = pair(merge, **options)
    for name, gradient in elbo_gradients(model, guide, bits()).items():
        assert gradient is not None, name
        if not (".bias" in name and "norm" in options):  # a shift that the mean takes away
            assert (gradient != 0).any(), name
    report = check(model.eval(), guide.eval(), bits())
    assert report.ok, str(report)


def test_other_data():
    real = 1e3 * torch.randn(40, 6) + 5
    model, guide = pair("residual", Batch({"x": real}))
    assert type(model.likelihood) is Gaussian
    assert model(Batch(size=1000)).std() > 100
    levels = Batch({"image": torch.randint(17, (40, 8)).double()})
    model, guide = hierarchical(levels, site="image", **SIZES)
    assert type(model.likelihood) is Binomial
    assert elbo_gradients(model, guide, levels)
    holes = real.masked_fill(torch.rand(40, 6) < 0.4, math.nan)
    for merge in MERGES:
        model, guide = pair(merge, Batch({"x": holes}))
        gradients = elbo_gradients(model, guide, Batch({"x": holes}))
        assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_sigmoid_belief_network():
    batch = bits()
    model, guide = pair("bottom-up", batch, family=Bernoulli)
    assert type(model.layers[1]) is UniformBernoulli
    assert set(model(Batch(size=50)).unique().tolist()) <= {0.0, 1.0}
    pv.fit(model, guide, batch, vimco(3), steps=2)
    learned, _ = pair("bottom-up", batch, family=Bernoulli, prior=LearnedBernoulli)
    assert type(learned.layers[1]) is LearnedBernoulli


BAD: dict[str, Any] = {
    "no layer": ({"latent": ()}, "latent=(), hidden="),
    "no dimension": ({"latent": (3, 0)}, "wanted whole numbers above 0"),
    "a fraction": ({"latent": 1.5}, "wanted whole numbers above 0"),
    "no width": ({"hidden": ((), 3)}, "wanted whole numbers above 0"),
    "too few widths": (
        {"latent": (3, 2, 1)},
        "hidden=(7, 5) for 3 layers of latents, wanted one n",
    ),
    "no merge": ({"merge": "ladder"}, "merge='ladder', wanted a class or a function"),
    "no family": ({"family": None}, "family=None, wanted a class"),
    "a ready family": (
        {"family": DiagonalGaussian(nn.Linear(3, 4), (2,))},
        "a ready DiagonalGaussian as family=, wanted its class",
    ),
    "norm": (
        {"norm": nn.BatchNorm1d, "net": convolutional},
        "norm=BatchNorm1d with net=convolutional, which takes none, wanted net=dense",
    ),
    "one width for images": ({"net": convolutional}, "at least one hidden stage"),
    "site": ({"site": "y"}, "site 'y' is not in the batch"),
    "grey": ({"likelihood": Bernoulli}, "Bernoulli does not take these data"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    options, message = BAD[case]
    batch = Batch({"x": torch.rand(9, 8, 8)})
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
        hierarchical(batch, **{**SIZES, **options})
    assert message in str(error.value)


# ---------------------------------------------------------------------------------------------
# Objectives


OF_ALL = ["elbo:estimator=stl", "mean_field", "iwae:num_particles=3,estimator=dreg"]
OF_ONE = [
    "renyi:alpha=0.5,num_particles=3",
    "tvo:num_particles=3",
    "chi:n=2,num_particles=3",
    "ciwae:beta=0.5,num_particles=3",
    "beta_vae:beta={'z1': linear(10), 'z2': 0.5}",
    "free_bits:nats=0.5,per=site",
    "capacity:capacity=linear(10, 0, 5),gamma=10",
]


@pytest.mark.parametrize(
    ("spec", "merge"),
    [
        *((spec, merge) for spec in OF_ALL for merge in MERGES),
        *((spec, "residual") for spec in OF_ONE),
    ],
)
def test_objectives_train(spec, merge):
    batch = bits()
    model, guide = pair(merge, batch)
    options: Any = {"batch_size": 20, "compile": "eager"}
    run = fit(model, guide, batch, parse(spec), steps=2, **options)
    assert math.isfinite(run.history[-1]["loss"])
    assert (run.notes == ()) == (merge != "bottom-up")


def test_batch_norm_and_dreg():
    """Through the shared statistics a row's density depends on the draws of the others."""
    model, guide = pair(norm=nn.BatchNorm1d)
    with pytest.raises(ValueError, match="densities of other rows depend on its draw"):
        fit(model, guide, bits(), iwae(3, "dreg"), steps=1)


GRAPHS = {
    "elbo": lambda: elbo(2),
    "dreg": lambda: iwae(3, "dreg"),
    "free bits": lambda: free_bits(0.3, per="site"),
    "warm-up": lambda: parse("beta_vae:beta={'z1': linear(10), 'z2': linear(20)}"),
}


def rows(i):
    torch.manual_seed(i)
    return bits(12)


@pytest.mark.parametrize(
    ("objective", "merge"),
    [
        ("elbo", "residual"),
        ("dreg", "bottom-up"),
        ("dreg", "ladder"),
        ("free bits", "ladder"),
        ("warm-up", "ladder"),
    ],
)
def test_steps_as_graphs(objective, merge):
    step = assert_equal_to_eager(
        lambda: pair(merge, rows(0)), GRAPHS[objective](), number=3, batch=rows
    )
    assert (step.level, step.reason) == ("traced", "")


def test_statistics_in_graphs():
    step = assert_equal_to_eager(
        lambda: pair("ladder", rows(0), norm=nn.BatchNorm1d), iwae(3), number=3, batch=rows
    )
    assert (step.level, step.reason) == ("traced", "")


@pytest.mark.parametrize("merge", MERGES)
def test_penalties_on_one_layer(merge):
    batch = bits()
    model, guide = pair(merge, batch)
    objective = Objective(penalties=[TotalCorrelation(1.0, site="z1"), MMD(1.0, site="z2")])
    run = fit(model, guide, batch, objective, steps=2, compile="eager")
    assert math.isfinite(run.history[-1]["loss"])


# ---------------------------------------------------------------------------------------------
# Training, runs, what comes of them


def test_what_is_shared_is_optimized_once():
    model, guide = pair()
    handed = []

    def optimizer(parameters):
        handed.extend(parameters)
        return torch.optim.SGD(handed, lr=0.1)

    fit(model, guide, bits(), steps=1, optimizer=optimizer)
    unique = {id(p) for p in chain(model.parameters(), guide.parameters())}
    assert len(handed) == len(unique) == len({id(p) for p in handed})
    assert {id(p) for p in model.layers.parameters()} < unique
    assert guide.layers[0] is model.layers[0]


def test_an_average_of_what_is_shared():
    """With a decay so small that the average is the last step's, and with one that is not."""
    left = {}
    for ema in (None, 1e-9, 0.9):
        torch.manual_seed(3)
        model, guide = pair()
        fit(model, guide, bits(), steps=4, optimizer=SGD, ema=ema, seed=1)
        assert guide.layers[0] is model.layers[0]
        left[ema] = next(model.layers.parameters()).detach().clone()
    torch.testing.assert_close(left[1e-9], left[None], atol=1e-8, rtol=0)
    assert (left[0.9] - left[None]).abs().max() > 1e-6


@pytest.mark.parametrize("merge", MERGES)
def test_a_run_comes_back_and_goes_on(merge, tmp_path):
    batch = bits()
    torch.manual_seed(1)
    model, guide = pair(merge, batch)
    options: Any = {"batch_size": 20, "compile": "eager"}
    run = fit(model, guide, batch, elbo(), steps=3, out=tmp_path / "run", **options)
    again: Any = pv.load(tmp_path / "run")
    if merge != "bottom-up":
        assert again.guide.layers[0] is again.model.layers[0]
    few = batch.rows(slice(0, 5))
    mine, theirs = (each.evaluate(few, 5, widen=False) for each in (run, again))
    assert torch.equal(mine.log_p, theirs.log_p)
    assert set(mine.active) == {"z1", "z2"}
    torch.manual_seed(1)
    other = pair(merge, batch)
    fit(*other, batch, elbo(), steps=6, out=tmp_path / "run", resume=True, **options)
    torch.manual_seed(1)
    whole = pair(merge, batch)
    fit(*whole, batch, elbo(), steps=6, **options)
    for a, b in zip(other, whole, strict=True):
        for name, tensor in a.state_dict().items():
            assert torch.equal(tensor, b.state_dict()[name]), name


@pytest.mark.parametrize("merge", MERGES)
def test_what_is_built_by_name(merge):
    batch = bits(20, 8, 8)
    model, guide = pair(
        merge, batch, hidden=((4, 6), 5), net=convolutional, skip=True, activation=nn.Tanh
    )
    again = rebuilt(json.loads(json.dumps(model.built_by)), batch)
    assert [str(part) for part in again] == [str(model), str(guide)]
    assert type(guide) is (BottomUpGuide if merge == "bottom-up" else TopDownGuide)
    assert getattr(again[1], "merge", None) is MERGES[merge]


@pytest.mark.parametrize("merge", ["bottom-up", "residual"])
def test_predictions(merge):
    batch = bits()
    model, guide = pair(merge, batch)
    drawn = pv.sample(model, 5)
    assert {s: list(v.shape) for s, v in drawn.items()} == {"z2": [5, 2], "z1": [5, 4], "x": [5, 8]}
    codes = pv.encode(model, guide, batch, num_draws=4)
    assert codes["z1"].shape[0] == codes["z2"].shape[0] == 40
    again = pv.reconstruct(model, guide, batch)
    assert again["x"].shape == (40, 8)


def test_annealing():
    """Against importance sampling from the prior, which these few latents allow."""
    batch = bits(4)
    model, _ = pair("residual", batch)
    with torch.no_grad(), pyro.plate("particles", 100_000, dim=-2):
        drawn = poutine.trace(Observed(model)).get_trace(batch)
        drawn.compute_log_prob(lambda name, _: name == "x")
    wanted = torch.logsumexp(drawn.nodes["x"]["log_prob"], 0) - math.log(100_000)
    chains = annealed(
        model, batch, chains=50, temperatures=10, leapfrog=5, pilot=4, compile="eager"
    )
    torch.testing.assert_close(chains.log_p.to(wanted), wanted, atol=0.2, rtol=0)


def test_discrete_layers_are_not_merged():
    model, guide = pair("residual", family=Bernoulli)
    with pytest.raises(ValueError, match=r"\Aresidual: came a Bernoulli, wanted [^\n]*\Z"):
        fit(model, guide, bits(), vimco(2), steps=1)


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    np.savez("bits.npz", x=bits()["x"].numpy())
    sizes = "-o latent=6,3 -o hidden=((16,16),8) -o merge=precision_weighted -o norm=LayerNorm"
    train = ["fit", "--data", "bits.npz", "--pair", "hierarchical", "--steps", "3"]
    objective = ["--objective", "beta_vae:beta={'z1': linear(10), 'z2': 2}"]
    assert main([*train, *sizes.split(), *objective, "--out", "ladder"]) == 0
    assert main(["evaluate", "ladder", "-K", "5"]) == 0
    shown = capsys.readouterr().out
    assert "rate of z1" in shown
    assert "rate of z2" in shown
    assert main([*train, "-o", "latent=4,2,1", "-o", "hidden=5,4", "--out", "other"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "for 3 layers of latents, wanted one number for all or an entry for each" in line
