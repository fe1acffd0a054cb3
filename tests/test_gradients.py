"""The benchmark of gradients' signal-to-noise: its estimate, its slopes, its exactly known case."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch

from benchmarks import gradients as bench
from benchmarks.gradients import CASES, METHODS, figure, measure, signal_to_noise, slope, table
from pyro_vae.batch import Batch
from pyro_vae.evaluation import evaluate


def test_signal_to_noise():
    """Of draws with known mean and variance, the noise of the means taken out."""
    mean, deviation = torch.tensor([0.5, -0.1, 0.0]), torch.tensor([1.0, 2.0, 0.5])
    draws = mean + deviation * torch.randn(4000, 3)
    expected = float(mean.square().sum() / deviation.square().sum()) ** 0.5
    found, error = signal_to_noise(draws)
    assert abs(found - expected) < 4 * error
    assert error < 0.1 * expected
    none, _ = signal_to_noise(torch.randn(4000, 300))
    assert none < 0.03  # where 1 / sqrt(4000) would be the noise of the means


def test_the_error_of_signal_to_noise():
    """Is how far repetitions lie apart."""
    found = np.array([signal_to_noise(0.3 + torch.randn(500, 2)) for _ in range(100)])
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.3)


def records(exponent: float, ks: Any = bench.KS, error: float = 0.01) -> list[dict[str, Any]]:
    return [{"K": k, "guide": 2 * k**exponent, "guide_se": error * k**exponent} for k in ks]


def test_slope_of_a_power():
    for exponent in (-0.5, 0.5):
        fitted = slope(records(exponent), "guide")
        assert fitted is not None
        assert fitted[0] == pytest.approx(exponent)
        logs = np.log([k for k in bench.KS if k >= bench.FIT_FROM])
        spread = ((logs - logs.mean()) ** 2).sum()
        assert fitted[1] == pytest.approx(0.005 / math.sqrt(spread))  # errors of 1/2 % each


def test_slope_leaves_out_the_first_particles_and_what_is_lost():
    rows = records(-0.5)
    rows[0]["guide"] = rows[1]["guide"] = 100.0
    rows[6]["guide"] = 0.0
    rows[7]["guide"] = 100.0  # came up out of the noise again
    fitted = slope(rows, "guide")
    assert fitted is not None
    assert fitted[0] == pytest.approx(-0.5)
    assert slope(rows[:4], "guide") is None


def test_the_known_case():
    """Without the shift it is the optimum: nothing is left of the model's gradient, and log p of the
    guide's importance weights is that of N(mean, 2 I)."""
    point = bench.known(0, 0, dims=3, rows=200)
    model, guide, x = point.model, point.guide, point.test["x"]
    assert isinstance(model, bench.Shift)
    assert isinstance(guide, bench.Linear)
    assert float((model.mean - x.mean(0)).detach().abs().max()) < 4 * bench.OFF
    with torch.no_grad():
        model.mean.copy_(x.mean(0))
        guide.weight.copy_(torch.eye(3) / 2)
        guide.bias.copy_(model.mean / 2)
    exact = torch.distributions.Normal(model.mean.detach(), math.sqrt(2)).log_prob(x).sum(1)
    result = evaluate(model, guide, point.test, 4000, widen=False)
    assert float((result.log_p - exact).abs().max()) < 0.1
    off = result.log_p - exact
    assert abs(float(off.mean())) < 4 * float(off.std()) / len(off) ** 0.5 + 1e-3
    method = METHODS["dreg"].objective(1)
    draws, at_model = bench.gradients(method, model, guide, point.test, 400)
    for gradient in (draws[:, -3:], at_model):  # of b, and of the mean of all rows
        sigmas = gradient.mean(0) / gradient.std(0) * len(gradient) ** 0.5
        assert float(sigmas.abs().max()) < 4


@pytest.mark.parametrize("name", METHODS)
def test_methods_give_one_gradient_of_the_guide(name: str):
    """All of the importance weighted bound; at K = 1 that is the ELBO's too."""
    point = bench.known(0, 0, dims=2, rows=4)
    k = METHODS[name].least
    objective = METHODS[name].objective(k)
    assert objective.num_particles == k
    if name == "rws":
        return  # no gradient of the bound
    with torch.no_grad():
        next(p for name, p in point.guide.named_parameters() if name == "bias").add_(0.5)
    many = Batch({"x": point.test["x"].repeat(50, 1)})  # a mean over so many draws of each row
    found = [
        bench.gradients(each, point.model, point.guide, many, 60)[0]
        for each in (objective, METHODS["pathwise"].objective(k))
    ]
    mean = found[0].mean(0) - found[1].mean(0)
    error = (found[0].var(0) / 60 + found[1].var(0) / 60).sqrt()
    assert float((mean / error).abs().max()) < 4.5
    assert float((found[1].mean(0) / error).abs().max()) > 10


def test_cases_name_methods():
    assert {name for case in CASES.values() for name in case.methods} == {*METHODS}


def test_table_and_figure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "OFF", 0.1)  # much signal
    case = bench.Case(lambda epochs, seed: bench.known(epochs, seed, 2, 40), ["dreg", "vimco"])
    result = measure(case, 40, rows=4, epochs=0, seed=0, ks=(1, 2, 4, 8, 16))
    assert [(r["estimator"], r["K"]) for r in result["snr"]] == [
        *(("dreg", k) for k in (1, 2, 4, 8, 16)),
        *(("vimco", k) for k in (2, 4, 8, 16)),
    ]
    result["slopes"]["vimco guide"] = None
    text = "\n".join(table("two dimensions", result))
    assert "vimco guide     lost in the noise  (-0.5)" in text
    shown = "{:+.3f} ± {:.3f}  (+0.5)".format(*result["slopes"]["dreg guide"])
    assert f"dreg guide      {shown}" in text
    picture = figure({"two dimensions": result})
    assert len(picture.axes) == 2
    line = picture.axes[0].get_lines()[0]
    assert isinstance(line, matplotlib.lines.Line2D)
    seen = bench.visible([r for r in result["snr"] if r["estimator"] == "dreg"], "guide")
    assert np.asarray(line.get_ydata()).tolist() == [r["guide"] for r in seen]
