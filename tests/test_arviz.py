"""The export to ArviZ: numbers against closed forms, names, missing data, and ArviZ's own functions."""

from __future__ import annotations

import math
import subprocess
import sys
import types
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.batch import Batch
from pyro_vae.objectives.particles import run
from pyro_vae.objectives.plan import make_plan
from pyro_vae.reporting import arviz as reporting
from pyro_vae.reporting.convert import container
from tests.exact_pairs import SIGMAS, BatchGuide, ExactGuide, LinearBatchModel, linear_elbo
from tests.small_pairs import X_DIM, Z_DIM, Guide, LinearModel, data

ROWS = 6


def pair(exact: bool = False, scale: float = 1.0) -> tuple[LinearBatchModel, Any]:
    model = LinearBatchModel()
    return model, ExactGuide(model, scale) if exact else BatchGuide()


def get(idata: Any, group: str, name: str) -> Tensor:
    """A variable of the one chain, ``[draw, row, ...]`` or, without draws, ``[row, ...]``."""
    variable = idata[group][name]
    values = torch.from_numpy(np.array(variable.values))
    if variable.dims[0] == "row":
        return values
    assert variable.dims[:3] == ("chain", "draw", "row")
    assert len(values) == 1
    return values[0]


def groups_of(idata: Any) -> set[str]:
    groups = idata.groups() if callable(idata.groups) else idata.groups
    return {group.strip("/") for group in groups} - {""}


def assert_mean(draws: Tensor, wanted: Tensor) -> None:
    error = draws.std(0) / len(draws) ** 0.5
    assert bool(((draws.mean(0) - wanted).abs() < SIGMAS * error).all())


# ---------------------------------------------------------------------------------------------
# Numbers


def test_takes_a_run_and_nothing_else_without_a_guide():
    model, guide = pair()
    batch = Batch({"x": data(ROWS)})
    run = pv.Run(model, guide, None)
    same = [
        pv.to_arviz(given, batch, 5)["posterior"]["z"].values for given in (run, (model, guide))
    ]
    np.testing.assert_array_equal(*same)
    with pytest.raises(ValueError, match="wanted a run, or"):
        pv.to_arviz(model, batch, 5)  # type: ignore[arg-type]


def test_draws_and_densities_are_those_of_the_pair():
    (model, guide), x = pair(), data(ROWS)
    idata = pv.to_arviz((model, guide), Batch({"x": x}), 2000)
    z, q = get(idata, "posterior", "z"), guide.posterior(x)
    assert z.shape == (2000, ROWS, Z_DIM)
    likelihood = dist.Normal(model.net(z), model.log_scale.exp()).log_prob(x).sum(-1).detach()
    log_p = likelihood + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_q = q.log_prob(z).detach()
    torch.testing.assert_close(get(idata, "log_likelihood", "x"), likelihood)
    torch.testing.assert_close(get(idata, "sample_stats", "log_p"), log_p)
    torch.testing.assert_close(get(idata, "sample_stats", "log_q"), log_q)
    torch.testing.assert_close(get(idata, "sample_stats", "log_weight"), log_p - log_q)
    torch.testing.assert_close(get(idata, "observed_data", "x"), x)

    assert_mean(z, q.mean.detach())
    assert_mean(get(idata, "posterior_predictive", "x"), model.net(q.mean).detach())
    assert_mean(get(idata, "sample_stats", "log_weight"), linear_elbo(model, guide, x)[0].detach())
    assert_mean(get(idata, "prior", "z"), torch.zeros(ROWS, Z_DIM))
    prior_x = get(idata, "prior_predictive", "x")
    assert_mean(prior_x, model.net.bias.detach().expand(ROWS, X_DIM))
    w = model.net.weight.detach()
    cov = w @ w.T + (2 * model.log_scale.detach()).exp() * torch.eye(X_DIM)
    torch.testing.assert_close(prior_x.flatten(0, 1).T.cov(), cov, atol=0.1, rtol=0.1)


def test_numbers_are_those_of_particles():
    (model, guide), batch = pair(), Batch({"x": data(ROWS)})
    idata = pv.to_arviz((model, guide), batch, 50, seed=3, groups=["posterior", "log_likelihood"])
    plan = make_plan(model, guide, (batch,), {})
    torch.manual_seed(3)
    for _ in range(2):  # what the pair is judged by beforehand
        run(model, guide, (batch.rows(slice(0, 2)),), {}, plan, 1)
    with torch.no_grad():
        particles = run(model, guide, (batch,), {}, plan, 50)
    assert torch.equal(get(idata, "posterior", "z"), particles.samples["z"])
    wanted = particles.summed(particles.likelihood)
    assert wanted is not None
    assert torch.equal(get(idata, "log_likelihood", "x"), wanted)


def test_exact_guide_has_the_evidence_as_every_weight():
    (model, guide), x = pair(exact=True), data(ROWS)
    idata = pv.to_arviz((model, guide), Batch({"x": x}), 100)
    evidence = model.evidence(x).detach().expand(100, ROWS)
    torch.testing.assert_close(get(idata, "sample_stats", "log_weight"), evidence)
    assert bool((get(idata, "constant_data", "khat") == -torch.inf).all())
    torch.testing.assert_close(get(idata, "constant_data", "ess"), torch.full((ROWS,), 100.0))


def test_khat_and_ess_are_those_of_evaluate():
    (model, guide), batch = pair(exact=True, scale=1.4), Batch({"x": data(ROWS)})
    idata = pv.to_arviz((model, guide), batch, 4000)
    result = pv.evaluate(model, guide, batch, 4000, widen=False)
    torch.testing.assert_close(
        get(idata, "constant_data", "ess"), result.ess.double(), rtol=0.1, atol=0
    )
    assert idata.attrs["khat_threshold"] == pytest.approx(0.7)
    assert bool((get(idata, "constant_data", "khat") < 0.7).all())


def test_importance_resampling_gives_posterior_draws():
    (model, guide), x = pair(exact=True, scale=1.5), data(ROWS)
    exact = ExactGuide(model).posterior(x)
    plain = pv.to_arviz((model, guide), Batch({"x": x}), 8000)
    resampled = pv.to_arviz((model, guide), Batch({"x": x}), 8000, importance_resample=True)
    for idata, factor in ((plain, 1.5), (resampled, 1.0)):
        z = get(idata, "posterior", "z")
        ratio = z.std(0) / exact.stddev.detach()
        torch.testing.assert_close(ratio, torch.full_like(ratio, factor), rtol=0.06, atol=0)
    assert plain.attrs["posterior_draws"] == "guide"
    assert resampled.attrs["posterior_draws"] == "guide, resampled by weight"
    z = get(resampled, "posterior", "z")  # everything of a draw goes with it
    likelihood = dist.Normal(model.net(z), model.log_scale.exp()).log_prob(x).sum(-1).detach()
    torch.testing.assert_close(get(resampled, "log_likelihood", "x"), likelihood)
    torch.testing.assert_close(
        get(resampled, "sample_stats", "log_q"), guide.posterior(x).log_prob(z).detach()
    )
    for name in ("khat", "ess"):  # of the guide's weights, before
        assert torch.equal(get(plain, "constant_data", name), get(resampled, "constant_data", name))
    assert bool((get(resampled, "constant_data", "ess") < 7000).all())


# ---------------------------------------------------------------------------------------------
# Names


def test_dims_and_coords():
    model, guide = pair()
    batch = Batch({"x": data(10)}).rows([7, 2, 5])
    idata = pv.to_arviz((model, guide), batch, 5)
    assert groups_of(idata) == set(reporting.GROUPS)
    for group in ("posterior_predictive", "prior_predictive"):
        assert idata[group]["x"].dims == ("chain", "draw", "row", "x_dim_0")
    for group in ("posterior", "prior"):
        assert idata[group]["z"].dims == ("chain", "draw", "row", "z_dim_0")
    assert idata["observed_data"]["x"].dims == ("row", "x_dim_0")
    assert idata["log_likelihood"]["x"].dims == ("chain", "draw", "row")
    for name in ("log_p", "log_q", "log_weight"):
        assert idata["sample_stats"][name].dims == ("chain", "draw", "row")
    for group in reporting.GROUPS:
        assert idata[group]["row"].values.tolist() == [7, 2, 5]
    row = idata["observed_data"]["x"].sel(row=2).values
    assert row.tolist() == batch["x"][1].tolist()

    named = pv.to_arviz(
        (model, guide),
        batch,
        5,
        dims={"x": ["part"]},
        coords={"part": list("abc"), "row": [1, 2, 3]},
    )
    assert named["posterior_predictive"]["x"].dims[-1] == "part"
    assert named["observed_data"]["part"].values.tolist() == ["a", "b", "c"]
    assert named["posterior"]["row"].values.tolist() == [1, 2, 3]


def test_attributes_say_whose_draws_they_are():
    idata = pv.to_arviz(pair(), Batch({"x": data(ROWS)}), 5, seed=4)
    for where in (idata, idata["posterior"]):
        assert where.attrs["posterior_draws"] == "guide"
        assert where.attrs["num_draws"] == 5
        assert where.attrs["seed"] == 4


# ---------------------------------------------------------------------------------------------
# Missing data


def test_missing_entries_are_nan_and_imputed():
    (model, guide), x = pair(), data(ROWS)
    x[0, 1], x[3] = torch.nan, torch.nan
    batch = Batch({"x": x})
    idata = pv.to_arviz((model, guide), batch, 2000)
    observed = get(idata, "observed_data", "x")
    torch.testing.assert_close(observed, x, equal_nan=True)
    z = get(idata, "posterior", "z")
    entries = dist.Normal(model.net(z), model.log_scale.exp()).log_prob(batch["x"])
    likelihood = torch.where(batch.mask("x"), entries, 0.0).sum(-1).detach()
    torch.testing.assert_close(get(idata, "log_likelihood", "x"), likelihood)
    assert bool((get(idata, "log_likelihood", "x")[:, 3] == 0).all())
    predicted = get(idata, "posterior_predictive", "x")
    assert_mean(predicted, model.net(guide.posterior(batch["x"]).mean).detach())
    assert bool((predicted.std(0) > 0.1).all())


class MarkedModel(nn.Module):
    """z ~ N(0, 1), x ~ N(z, 1), m ~ N(x, 1/2²): x may be missing under m."""

    def forward(self, batch: Any) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            x = pyro.sample("x", dist.Normal(z, 1.0))
            pyro.sample("m", dist.Normal(x, 0.5))


class MarkedGuide(nn.Module):
    def forward(self, batch: Any) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.2))


def test_imputations_are_resampled_with_what_depends_on_them():
    m = torch.tensor([1.0, -2.0])
    batch = Batch({"x": torch.full((2,), torch.nan), "m": m})
    for resample, mean in ((False, 0 * m), (True, m * 2 / 2.25)):
        idata = pv.to_arviz(
            (MarkedModel(), MarkedGuide()), batch, 8000, importance_resample=resample
        )
        x = get(idata, "posterior_predictive", "x")
        torch.testing.assert_close(x.mean(0), mean, atol=0.12, rtol=0)
        assert len(x.unique()) < len(x.flatten()) or not resample
        # m is drawn anew, given that imputation
        residual = get(idata, "posterior_predictive", "m") - x
        torch.testing.assert_close(residual.std(), torch.tensor(0.5), rtol=0.05, atol=0)


class LabelledModel(nn.Module):
    def forward(self, batch: Any) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            y = pyro.sample("y", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Poisson(1 + 3 * y + batch["c"]))


class LabelledGuide(nn.Module):
    def forward(self, batch: Any) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("y", dist.Bernoulli(0.3))


def labelled(**more: Any) -> Batch:
    return Batch({"x": np.array([0, 5, 1, 4]), "c": np.array([0.0, 1.0, np.nan, 3.0]), **more})


def test_labels_that_the_guide_proposes():
    y = np.array([1.0, np.nan, 0.0, np.nan])
    idata = pv.to_arviz((LabelledModel(), LabelledGuide()), labelled(y=y), 400)
    drawn = get(idata, "posterior", "y")
    assert drawn[:, [0, 2]].unique(dim=0).tolist() == [[1.0, 0.0]]
    assert drawn[:, 1].mean() == pytest.approx(0.3, abs=0.12)
    assert "y" in idata["prior"]
    assert set(idata["posterior_predictive"].data_vars) == {"x"}
    assert get(idata, "posterior_predictive", "x").dtype == torch.int64
    np.testing.assert_array_equal(idata["observed_data"]["y"].values, y)
    np.testing.assert_array_equal(idata["observed_data"]["x"].values, [0, 5, 1, 4])
    np.testing.assert_array_equal(idata["constant_data"]["c"].values, [0.0, 1.0, np.nan, 3.0])
    assert set(idata["log_likelihood"].data_vars) == {"x", "y"}


def test_complete_and_absent_labels():
    full = pv.to_arviz((LabelledModel(), LabelledGuide()), labelled(y=np.ones(4)), 20)
    assert "posterior" not in groups_of(full)  # nothing is left to draw
    assert bool((get(full, "sample_stats", "log_q") == 0).all())
    none = pv.to_arviz((LabelledModel(), LabelledGuide()), labelled(), 20)
    assert get(none, "posterior", "y").shape == (20, 4)
    assert set(none["observed_data"].data_vars) == {"x"}
    generated = pv.to_arviz(
        (LabelledModel(), LabelledGuide()), labelled(y=np.ones(4)).without("x"), 20
    )
    assert get(generated, "posterior_predictive", "x").shape == (20, 4)
    assert set(generated["observed_data"].data_vars) == {"y"}


# ---------------------------------------------------------------------------------------------
# Programs and size


def test_stock_programs_on_a_tensor():
    model, guide, x = LinearModel(), Guide(), data(ROWS)
    idata = pv.to_arviz((model, guide), x, 500)
    torch.testing.assert_close(get(idata, "observed_data", "x"), x)
    assert idata["posterior"]["row"].values.tolist() == list(range(ROWS))
    predicted = get(idata, "posterior_predictive", "x")
    assert predicted.shape == (500, ROWS, X_DIM)
    assert_mean(predicted, model.net(guide.posterior(x).mean).detach())


def test_auxiliary_sites_stay_out():
    class Transformed(BatchGuide):
        """u ~ q, z = 2 u."""

        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                u = pyro.sample("u", self.posterior(batch["x"]), infer={"is_auxiliary": True})
                log_density = torch.tensor(-Z_DIM * math.log(2.0)).expand(u.shape[:-1])
                pyro.sample("z", dist.Delta(2 * u, log_density, event_dim=1))

    guide, x = Transformed(), data(ROWS)
    idata = pv.to_arviz((LinearBatchModel(), guide), Batch({"x": x}), 50)
    assert set(idata["posterior"].data_vars) == set(idata["prior"].data_vars) == {"z"}
    z = get(idata, "posterior", "z")
    log_q = (guide.posterior(x).log_prob(z / 2) - Z_DIM * math.log(2.0)).detach()
    torch.testing.assert_close(get(idata, "sample_stats", "log_q"), log_q)


def test_latents_outside_the_plate_are_refused():
    batch = Batch({"x": data(ROWS)})
    model = pv.Observed(LinearBatchModel())
    with pytest.raises(ValueError, match="outside the plate"):
        pv.to_arviz((model, AutoMultivariateNormal(model)), batch, 5)


@pytest.mark.parametrize(("batch_size", "chunk"), [(2, 1), (4, 7), (250, None)])
def test_chunks_fill_everything(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, chunk: int | None
):
    sizes: list[tuple[int, int]] = []

    def spy(model: Any, guide: Any, args: Any, kwargs: Any, plan: Any, size: int) -> Any:
        sizes.append((size, len(args[0])))
        return run(model, guide, args, kwargs, plan, size)

    monkeypatch.setattr(reporting, "run", spy)
    (model, guide), x = pair(), data(ROWS)
    idata = pv.to_arviz((model, guide), Batch({"x": x}), 23, batch_size=batch_size, chunk=chunk)
    assert max(size for size, _ in sizes) == (chunk or 23)
    assert max(rows for _, rows in sizes) == min(batch_size, ROWS)
    z = get(idata, "posterior", "z")
    assert len(z.flatten(0, 1).unique(dim=0)) == 23 * ROWS
    likelihood = dist.Normal(model.net(z), model.log_scale.exp()).log_prob(x).sum(-1).detach()
    torch.testing.assert_close(get(idata, "log_likelihood", "x"), likelihood)
    torch.testing.assert_close(get(idata, "observed_data", "x"), x)
    assert bool(torch.isfinite(get(idata, "prior_predictive", "x")).all())


def test_only_the_groups_asked_for():
    calls = []

    class Counted(LinearBatchModel):
        def forward(self, batch: Any) -> None:
            calls.append(batch)
            super().forward(batch)

    batch = Batch({"x": data(ROWS)})
    idata = pv.to_arviz((Counted(), BatchGuide()), batch, 5, groups=["posterior", "constant_data"])
    assert groups_of(idata) == {"posterior", "constant_data"}
    lean = len(calls)
    pv.to_arviz((Counted(), BatchGuide()), batch, 5)
    assert len(calls) - lean == lean + 2  # posterior predictive and prior


def test_leaves_everything_as_it_was():
    (model, guide), x = pair(), data(ROWS)
    guide.train()
    before = torch.get_rng_state()
    first, second, other = (
        pv.to_arviz((model, guide), Batch({"x": x}), 5, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert guide.training
    assert torch.equal(get(first, "posterior", "z"), get(second, "posterior", "z"))
    assert not torch.equal(get(first, "posterior", "z"), get(other, "posterior", "z"))


# ---------------------------------------------------------------------------------------------
# Refusals


def test_refusals():
    (model, guide), batch = pair(), Batch({"x": data(ROWS)})
    for options, message in (
        ({"num_draws": 0}, "num_draws=0"),
        ({"chunk": 1.5}, "chunk=1.5"),
        ({"groups": ["likelihood"]}, "likelihood"),
        ({"dims": {"y": ["part"]}}, "dims= names"),
        ({"dims": {"x": ["a", "b"]}}, "wanted 1 names"),
    ):
        with pytest.raises(ValueError, match=message):
            pv.to_arviz((model, guide), batch, **{"num_draws": 3, **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without rows"):
        pv.to_arviz((model, guide), batch.rows(slice(0, 0)), 3)


def test_point_mass_is_refused():
    class Point(nn.Module):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                pyro.sample("z", dist.Delta(torch.ones(batch.size, Z_DIM), event_dim=1))

    batch = Batch({"x": data(ROWS)})
    with pytest.raises(ValueError, match="point mass"):
        pv.to_arviz((LinearBatchModel(), Point()), batch, 3)
    model = pv.Observed(LinearBatchModel())
    with pytest.raises(ValueError, match="point mass"):
        pv.to_arviz((model, AutoDelta(model)), batch, 3, batch_size=ROWS)


def test_infinite_weights_are_named():
    class Nothing(LinearBatchModel):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([Z_DIM]).to_event(1))
                scale = torch.where(batch.index == 4, torch.nan, 1.0)[:, None]
                pyro.sample("x", dist.Normal(self.net(z), scale).to_event(1))

    with pytest.raises(ValueError, match="row 4 "):
        pv.to_arviz((Nothing(), BatchGuide()), Batch({"x": data(ROWS)}), 3)


def test_site_with_the_name_of_a_dim_is_refused():
    class Row(nn.Module):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                z = pyro.sample("row", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0))

    class RowGuide(nn.Module):
        def forward(self, batch: Any) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                pyro.sample("row", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="rename"):
        pv.to_arviz((Row(), RowGuide()), Batch({"x": torch.zeros(3)}), 3)


# ---------------------------------------------------------------------------------------------
# ArviZ


@pytest.fixture
def az(monkeypatch: pytest.MonkeyPatch) -> Any:
    """ArviZ, its own warnings silenced."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.filterwarnings("ignore", category=category)
        warnings.filterwarnings("ignore", "(?s).*(deprecated|Estimated shape parameter|non-finite)")
        import arviz

        yield arviz
    if plots := sys.modules.get("matplotlib.pyplot"):
        plots.close("all")


def mild() -> tuple[LinearBatchModel, ExactGuide, Batch]:
    """Posteriors not far from the prior: the harmonic mean has a finite variance."""
    model, guide = pair(exact=True)
    with torch.no_grad():
        model.net.weight *= 0.6
        model.log_scale.fill_(0.3)
    return model, guide, Batch({"x": data(40)})


def test_loo_of_exact_draws_is_log_p(az: Any):
    model, guide, batch = mild()
    result = az.loo(pv.to_arviz((model, guide), batch, 4000), pointwise=True)
    assert result.n_data_points == len(batch)
    elpd = result.elpd_loo if hasattr(result, "elpd_loo") else result.elpd
    evidence = model.evidence(batch["x"]).detach()
    assert float(elpd) == pytest.approx(float(evidence.sum()), abs=0.3)
    assert float(np.max(result.pareto_k.values)) < 0.7


def test_loo_of_wide_draws_is_mended_by_resampling(az: Any):
    model, _, batch = mild()
    guide = ExactGuide(model, 1.5)
    evidence = float(model.evidence(batch["x"]).detach().sum())
    plain, resampled = (
        az.loo(pv.to_arviz((model, guide), batch, 4000, importance_resample=resample))
        for resample in (False, True)
    )
    off = [
        abs(float(result.elpd_loo if hasattr(result, "elpd_loo") else result.elpd) - evidence)
        for result in (plain, resampled)
    ]
    assert off[0] > 2
    assert off[1] < 0.6


def test_summary_compare_and_plots(az: Any):
    model, guide = pair()
    x = data(ROWS)
    x[0, 1], x[3, :2] = torch.nan, torch.nan
    batch = Batch({"x": x})
    idata = pv.to_arviz((model, guide), batch, 200)
    summary = az.summary(idata, var_names=["z"], round_to="none")
    assert len(summary) == ROWS * Z_DIM
    wanted = get(idata, "posterior", "z").mean(0).flatten()
    np.testing.assert_allclose(summary["mean"].astype(float), wanted)
    table = az.compare({"a": idata, "b": pv.to_arviz((model, ExactGuide(model)), batch, 200)})
    assert set(table.index) == {"a", "b"}
    if hasattr(az, "plot_ppc"):
        for group in ("posterior", "prior"):
            az.plot_ppc(idata, num_pp_samples=10, group=group)
        whole = pv.to_arviz((LabelledModel(), LabelledGuide()), labelled(), 50)
        az.plot_ppc(whole, num_pp_samples=10)
    else:
        for group in ("posterior_predictive", "prior_predictive"):
            az.plot_ppc_dist(idata, num_samples=10, group=group)


def test_to_netcdf_and_back(az: Any, tmp_path: Any):
    pytest.importorskip("h5netcdf")
    pytest.importorskip("h5py")
    idata = pv.to_arviz(pair(), Batch({"x": data(ROWS)}), 5)
    idata.to_netcdf(str(tmp_path / "posterior.nc"))
    back = az.from_netcdf(str(tmp_path / "posterior.nc"))
    assert torch.equal(get(back, "posterior", "z"), get(idata, "posterior", "z"))
    assert back["posterior"].attrs["posterior_draws"] == "guide"


def test_import_is_left_to_the_call():
    code = (
        "import sys, pyro_vae; pyro_vae.to_arviz; "
        "assert not {'arviz', 'xarray', 'matplotlib'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("version", ["0.23.4", "1.3.0"])
def test_container_calls_each_version_as_it_wants(monkeypatch: pytest.MonkeyPatch, version: str):
    stub = types.ModuleType("arviz")
    stub.__version__ = version  # type: ignore[attr-defined]
    stub.from_dict = lambda *args, **kwargs: (args, kwargs)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "arviz", stub)
    groups: dict[str, dict[str, Any]] = {
        "posterior": {"z": np.zeros((5, 3, 2))},
        "prior": {},
        "observed_data": {"x": np.zeros((3, 4))},
    }
    attrs: dict[str, str | int | float] = {"seed": 0}
    args, kwargs = container(groups, {"z": ["row", "unit"]}, {"row": [1, 2, 3]}, attrs)
    assert kwargs["dims"] == {"z": ["row", "unit"]}
    assert kwargs["coords"]["row"].tolist() == [1, 2, 3]
    if version.startswith("1"):
        (arrays,) = args
        assert kwargs["attrs"] == {"/": attrs, "posterior": attrs}
    else:
        assert not args
        arrays = {group: kwargs[group] for group in kwargs if group in groups}
        assert kwargs["attrs"] == kwargs["posterior_attrs"] == attrs
    assert set(arrays) == {"posterior", "observed_data"}
    assert arrays["posterior"]["z"].shape == (1, 5, 3, 2)
    assert arrays["observed_data"]["x"].shape == (3, 4)
