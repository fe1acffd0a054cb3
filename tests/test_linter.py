"""``check``: every trap is found, named by its site, and healthy pairs raise no alarm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.batch import Batch, Observed
from pyro_vae.linter import Finding, Report, check
from pyro_vae.nn import leading

NAN = math.nan
B = 6
FIRST_ROWS: Any = torch.arange(B) < 3


class Model(PyroModule):
    """z [2] -> x [3], with whatever decoder and likelihood."""

    def __init__(self, net: nn.Module | None = None, likelihood: Any = None) -> None:
        super().__init__()
        self.decoder = net or nn.Linear(2, 3)
        self.likelihood = likelihood or (lambda x: dist.Normal(x, 1.0).to_event(1))

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", self.likelihood(self.decoder(z)))


class Guide(PyroModule):
    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = net or nn.Linear(3, 4)

    def forward(self, batch: Batch) -> None:
        loc, log_scale = self.encoder(batch["x"]).chunk(2, -1)
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def data(size: int = B) -> Batch:
    return Batch({"x": torch.randn(size, 3)})


def in_plate(body: Callable[[Batch], None]) -> Callable[[Batch], None]:
    """A program from what happens inside the plate over rows."""

    def program(batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            body(batch)

    return program


def latent(name: str = "z", fn: Any = None) -> Any:
    return pyro.sample(name, fn or dist.Normal(torch.zeros(2), 1.0).to_event(1))


def plain_guide(batch: Batch) -> None:
    with pyro.plate("data", batch.size, dim=-1):
        latent()


def only(report: Report, severity: str, site: str | None, text: str) -> Finding:
    """The one finding of this severity, which names the site and says ``text``."""
    found = [finding for finding in report.findings if finding.severity == severity]
    assert len(found) == 1, str(report)
    assert found[0].site == site, str(report)
    assert text in str(found[0]), str(report)
    assert found[0].cure
    return found[0]


def texts(report: Report) -> list[str]:
    return [str(finding) for finding in report.findings]


# ---------------------------------------------------------------------------------------------
# The report


def test_a_healthy_pair_has_no_findings():
    report = check(Model(), Guide(), data())
    assert report.findings == ()
    assert report.ok
    assert str(report) == "no findings"
    report.raise_if_errors()


def test_a_report_reads_one_line_per_finding_errors_first():
    report = check(Model(), plain_guide, Batch({"X": torch.randn(B, 3)}))
    lines = str(report).splitlines()
    assert len(lines) == len(report.findings) > 1
    severities = [finding.severity for finding in report.findings]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert not report.ok
    assert "error: the model observes nothing" in lines[0]
    with pytest.raises(ValueError, match="the model observes nothing") as caught:
        report.raise_if_errors()
    assert "warning" not in str(caught.value)


def test_nothing_is_changed_by_a_check():
    batch = data()
    model = Model(nn.Sequential(leading(nn.BatchNorm1d(2), 1), nn.Linear(2, 3), nn.Dropout(0.5)))
    model.decoder[1].eval()  # type: ignore[index]
    guide = Guide()
    pyro.param("before", torch.tensor(2.0), constraint=constraints.positive)
    store = pyro.get_param_store()
    kept = {name: id(p) for name, p in store._params.items()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    random = torch.get_rng_state()
    check(model, guide, batch)
    assert torch.equal(random, torch.get_rng_state())
    assert kept == {name: id(p) for name, p in store._params.items()}
    assert [part.training for part in model.modules()] == modes
    assert [id(p) for p in model.parameters()] == parameters
    assert all(p.grad is None for p in [*model.parameters(), *guide.parameters()])
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert pyro.settings.get("validate_distributions_pyro")


def test_a_failed_check_changes_nothing_either():
    model, guide, batch = Model(nn.Linear(7, 3)), Guide(), data()
    random = torch.get_rng_state()
    only(check(model, guide, batch), "error", None, "the model does not run: RuntimeError")
    assert torch.equal(random, torch.get_rng_state())
    assert dict(pyro.get_param_store().named_parameters()) == {}
    assert poutine.runtime._PYRO_STACK == []


def test_the_same_seed_trains_alike_with_and_without_a_check():
    def draws(with_check: bool) -> Tensor:
        pyro.set_rng_seed(3)
        pyro.clear_param_store()
        model, guide = Model(), Guide()
        if with_check:
            check(model, guide, data())
        else:
            data()
        return torch.randn(4)

    assert torch.equal(draws(True), draws(False))


# ---------------------------------------------------------------------------------------------
# Programs that do not run


def test_a_program_that_does_not_run_is_named():
    def guide(batch: Batch) -> None:
        raise RuntimeError("mat1 and mat2\nsecond line")

    found = only(check(Model(), guide, data()), "error", None, "the guide does not run")
    assert "RuntimeError: mat1 and mat2" in found.found
    assert "second line" not in found.found


def test_a_site_that_the_batch_lacks_is_named():
    report = check(Model(), Guide(), Batch({"y": torch.randn(B, 3)}))
    only(report, "error", "x", "is not in the batch, which has ['y']")


def test_the_site_at_which_a_program_fails_is_named():
    @in_plate
    def guide(batch: Batch) -> None:
        latent(fn=dist.Poisson(-torch.ones(2)).to_event(1))

    only(check(Model(), guide, data()), "error", "z", "the guide does not run")


def test_data_of_another_event_shape_are_an_error():
    report = check(Model(), plain_guide, Batch({"x": torch.randn(B, 1)}))
    only(report, "error", "x", "data have event shape [1], the program's distribution has [3]")


@pytest.mark.parametrize("source", ["model", "guide"])
def test_parameters_on_another_device_are_an_error(source):
    model, guide = Model(), Guide()
    {"model": model, "guide": guide}[source].to("meta")
    report = check(model, guide, data())
    only(report, "error", None, f"the data are on cpu, {source}.")
    assert "meta" in str(report)


# ---------------------------------------------------------------------------------------------
# Plates and shapes


def test_a_site_without_a_plate_is_an_error():
    def model(batch: Batch) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(batch.size, 2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(-1, 3), 1.0).to_event(1))

    report = check(model, Guide(), data())
    errors = [f for f in report.findings if f.severity == "error"]
    assert {"z", "x"} <= {finding.site for finding in errors}
    assert any("no plate stands at dim -1" in f.found and "add the plate" in f.cure for f in errors)


def test_data_outside_the_plate_are_an_error():
    def model(batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            latent()
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    report = check(model, Guide(), data())
    only(report, "error", "x", 'is it inside pyro.plate("data", batch.size, dim=-1)')


def test_plates_that_differ_between_model_and_guide_are_an_error():
    def model(batch: Batch) -> None:
        z = latent()
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("x", dist.Normal(z[..., :1].expand(*z.shape[:-1], 3), 1.0).to_event(1))

    only(check(model, Guide(), data()), "error", "z", "in the model in {}")


def test_plates_of_two_names_over_the_same_rows_are_a_warning():
    def model(batch: Batch) -> None:
        with pyro.plate("latents", batch.size, dim=-1):
            z = latent()
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("x", dist.Normal(z[..., :1].expand(*z.shape[:-1], 3), 1.0).to_event(1))

    report = check(model, Guide(), data())
    assert report.ok
    only(report, "warning", "x", "stands in plate 'data' and site 'z' in plate 'latents'")


def test_data_under_a_second_plate_are_an_error():
    """[B] against batch shape [4, B] would count every value four times."""

    def model(batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = latent()
            with pyro.plate("time", 4, dim=-2):
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0))

    report = check(model, plain_guide, Batch({"x": torch.randn(B)}))
    only(report, "error", "x", "would count once for every index")


@pytest.mark.parametrize("program", ["model", "guide"])
def test_a_silent_square_is_an_error(program):
    """[B] and [B, 1] make [B, B]."""

    def model(batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            wide = torch.ones(batch.size, 1) if program == "model" else torch.ones(())
            pyro.sample("x", dist.Normal(z, wide))

    def guide(batch: Batch) -> None:
        loc = batch["x"][:, None] if program == "guide" else batch["x"]
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", dist.Normal(loc, torch.ones(batch.size)))

    report = check(model, guide, Batch({"x": torch.randn(B)}))
    site = {"model": "x", "guide": "z"}[program]
    found = [f for f in report.findings if f.severity == "error" and f.site == site]
    assert found, str(report)
    assert f"batch shape [{B}, {B}]" in found[0].found
    assert "remove a dim of size 1" in found[0].cure


# ---------------------------------------------------------------------------------------------
# Latents of model and guide


def test_a_guide_site_that_the_model_lacks_is_an_error():
    @in_plate
    def guide(batch: Batch) -> None:
        latent("h")

    report = check(Model(), guide, data())
    only(report, "error", "h", "the guide draws it, but the model's sites are ['z', 'x']")
    assert any(f.site == "z" and f.severity == "note" for f in report.findings)


def test_a_model_site_in_neither_data_nor_guide_is_a_note():
    @in_plate
    def model(batch: Batch) -> None:
        z = latent()
        pyro.sample("extra", dist.Normal(z[..., 0], 1.0))
        pyro.sample("x", dist.Normal(z[..., :1].expand(*z.shape[:-1], 3), 1.0).to_event(1))

    report = check(model, Guide(), data())
    assert report.ok
    only(report, "note", "extra", "neither in the data nor in the guide")


def test_event_shapes_that_differ_are_an_error():
    @in_plate
    def guide(batch: Batch) -> None:
        latent(fn=dist.Normal(torch.zeros(5), 1.0).to_event(1))

    report = check(
        Model(likelihood=lambda x: dist.Normal(torch.zeros(3), 1.0).to_event(1)), guide, data()
    )
    assert not report.ok


def test_supports_that_differ_are_an_error_or_a_warning():
    @in_plate
    def positive(batch: Batch) -> None:
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))

    @in_plate
    def real(batch: Batch) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))

    @in_plate
    def guide(batch: Batch) -> None:
        pyro.sample("z", dist.Normal(batch["x"], 1.0))

    @in_plate
    def narrow(batch: Batch) -> None:
        pyro.sample("z", dist.LogNormal(batch["x"], 1.0))

    batch = Batch({"x": torch.randn(40)})
    report = check(positive, guide, batch)
    assert any(
        f.site == "z" and "outside the support of the model's LogNormal" in f.found
        for f in report.findings
        if f.severity == "error"
    )
    only(check(real, narrow, batch), "warning", "z", "can't reach values")


def test_a_site_observed_and_drawn_is_an_error():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    only(check(model, guide, torch.randn(B)), "error", "z", "the model observes it")


@pytest.mark.parametrize("kind", ["scale", "mask"])
def test_a_weight_on_one_side_only_is_a_warning(kind):
    handler: Any = poutine.scale(scale=0.5) if kind == "scale" else poutine.mask(mask=FIRST_ROWS)

    @in_plate
    def model(batch: Batch) -> None:
        with handler:
            z = latent()
        pyro.sample("x", dist.Normal(z[..., :1].expand(*z.shape[:-1], 3), 1.0).to_event(1))

    report = check(model, Guide(), data())
    only(report, "warning", "z", f"poutine.{kind} weighs it differently")

    @in_plate
    def guide(batch: Batch) -> None:
        with handler:
            latent(fn=dist.Normal(batch["x"][:, :2], 1.0).to_event(1))

    assert not [f for f in check(model, guide, data()).findings if f.severity != "note"]


def test_rows_subsampled_in_one_program_only_are_an_error():
    def model(x: Tensor) -> None:
        with pyro.plate("data", 60, subsample=torch.arange(len(x)), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, 1.0))

    only(check(model, guide, torch.randn(B)), "error", "z", "these subsamples differ")


def test_parameters_of_one_name_in_both_programs_are_found():
    class Clash(Guide):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(2, 3)

        def forward(self, batch: Batch) -> None:
            loc, log_scale = self.encoder(self.decoder(batch["x"][:, :2])).chunk(2, -1)
            with pyro.plate("data", batch.size, dim=-1):
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    report = check(Model(), Clash(), data())
    only(report, "warning", None, "decoder.weight, decoder.bias")

    class Scale(PyroModule):
        def __init__(self, program: Any) -> None:
            super().__init__()
            self.program = program
            self.width = PyroParam(torch.ones(()), constraint=constraints.positive)

        def forward(self, batch: Batch) -> None:
            self.program(batch, self.width)

    def model(batch: Batch, width: Tensor) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", dist.Normal(0.0, width))
            pyro.sample("x", dist.Normal(torch.zeros(3), width).to_event(1))

    def guide(batch: Batch, width: Tensor) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", dist.Normal(0.0, width))

    report = check(Scale(model), Scale(guide), data())
    only(report, "error", None, "width: Pyro's parameter store makes them one")
    shared = Model()
    assert check(shared, Guide(), data()).ok


# ---------------------------------------------------------------------------------------------
# Data


def test_data_that_no_program_uses_are_a_warning():
    batch = Batch({"x": torch.randn(B, 3), "label": torch.ones(B)})
    only(check(Model(), Guide(), batch), "warning", "label", "neither program uses it")


def test_covariates_count_as_used():
    class Conditional(Model):
        def forward(self, batch: Batch) -> None:
            shift = batch.to(torch.device("cpu"))["label"]  # through a copy of the batch, too
            with pyro.plate("data", batch.size, dim=-1):
                z = latent()
                pyro.sample("x", dist.Normal(self.decoder(z) + shift[:, None], 1.0).to_event(1))

    batch = Batch({"x": torch.randn(B, 3), "label": torch.randn(B)})
    assert check(Conditional(), Guide(), batch).findings == ()


def test_a_model_that_observes_nothing_is_an_error():
    report = check(Model(), plain_guide, Batch({"X": torch.randn(B, 3)}))
    found = [f for f in report.findings if f.severity == "error"]
    assert "the batch holds ['X']" in found[0].found
    assert any(f.site == "X" and f.severity == "warning" for f in report.findings)


@pytest.mark.parametrize(
    ("likelihood", "good", "bad", "cure"),
    [
        (lambda x: dist.Bernoulli(logits=x), 1.0, 0.3, "ContinuousBernoulli"),
        (lambda x: dist.ContinuousBernoulli(logits=x), 0.3, 1.5, "scale the data to [0, 1]"),
        (lambda x: dist.Binomial(16, logits=x), 16.0, 17.0, "raise total_count"),
        (lambda x: dist.Binomial(16, logits=x), 3.0, 0.5, "whole numbers"),
        (lambda x: dist.LogNormal(x, 1.0), 0.5, -0.5, "likelihood that takes such values"),
        (lambda x: dist.Poisson(x.exp()), 2.0, -1.0, "likelihood that takes such values"),
    ],
)
def test_data_outside_the_support_are_an_error(likelihood, good, bad, cure):
    model = Model(likelihood=lambda x: likelihood(x).to_event(1))
    x = torch.full((B, 3), good)
    assert check(model, Guide(), Batch({"x": x})).findings == ()
    x[4, 1] = bad
    found = only(check(model, Guide(), Batch({"x": x})), "error", "x", "outside the support")
    assert f"1 of {3 * B} entries, such as {bad:g}" in found.found
    assert cure in found.cure
    x[4, 1] = NAN  # what is missing is not held against the support
    assert check(model, Guide(), Batch({"x": x})).ok


def test_labels_outside_the_classes_are_an_error():
    model = Model(nn.Linear(2, 4), lambda x: dist.Categorical(logits=x))

    @in_plate
    def guide(batch: Batch) -> None:
        latent(fn=dist.Normal(batch["x"].double()[:, None].expand(-1, 2), 1.0).to_event(1))

    assert check(model, guide, Batch({"x": torch.arange(B) % 4})).ok
    report = check(model, guide, Batch({"x": torch.arange(B)}))
    only(report, "error", "x", "outside the support of the Categorical: 2 of 6")


def test_simplex_data_are_checked_row_by_row():
    model = Model(likelihood=lambda x: dist.Dirichlet(x.exp()))
    x = torch.softmax(torch.randn(B, 3), -1)
    assert check(model, Guide(), Batch({"x": x})).ok
    x[2] = 1.0
    only(check(model, Guide(), Batch({"x": x})), "error", "x", "1 of 6 entries, such as [1.0, 1.0")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_whole_numbers_under_a_real_likelihood_are_fine(dtype):
    class Encoder(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(torch.get_default_dtype()) / 255)

    batch = Batch({"x": torch.randint(0, 255, (B, 3), dtype=dtype)})
    assert check(Model(), Guide(Encoder(3, 4)), batch).findings == ()


def test_values_that_a_distribution_can_not_score_are_an_error():
    class Encoder(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(torch.get_default_dtype()))

    model = Model(likelihood=lambda x: dist.Bernoulli(logits=x).to_event(1))
    batch = Batch({"x": torch.randint(0, 2, (B, 3))})
    report = check(model, Guide(Encoder(3, 4)), batch)
    only(report, "error", "x", "Bernoulli can't score values of type torch.int64")


def test_a_density_that_is_not_finite_names_site_and_rows():
    class Huge(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.abs() > 50, torch.inf, super().forward(x)[..., :1])

    @in_plate
    def guide(batch: Batch) -> None:
        latent(fn=dist.Delta(batch["x"][:, :2], event_dim=1))

    model = Model(
        Huge(2, 1),
        lambda x: dist.Normal(x.sum(-1, keepdim=True).expand(*x.shape[:-1], 3), 1.0).to_event(1),
    )
    batch = data()
    batch["x"][[1, 4], 0] = 60.0
    found = only(check(model, guide, batch), "error", "x", "log density is not finite")
    assert "in rows [1, 4]" in found.found


def test_arguments_out_of_their_range_are_named():
    model = Model(likelihood=lambda x: dist.Normal(x, -1.0).to_event(1))
    only(check(model, Guide(), data()), "error", "x", "scale of its Normal is not GreaterThan")


def test_the_model_reading_its_own_incomplete_site():
    class Obs(Model):
        def forward(self, batch: Batch) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                z = latent()
                fn = dist.Normal(self.decoder(z), 1.0).to_event(1)
                pyro.sample("x", fn, obs=batch["x"])

    x = torch.randn(B, 3)
    assert check(Obs(), Guide(), Batch({"x": x})).findings == ()
    x[0, 0] = NAN
    only(check(Obs(), Guide(), Batch({"x": x})), "error", "x", "as if their fill were data")

    class Peeks(Model):
        def forward(self, batch: Batch) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                z = latent()
                previous = batch["x"].roll(1, -1)
                pyro.sample("x", dist.Normal(self.decoder(z) + previous, 1.0).to_event(1))

    only(check(Peeks(), Guide(), Batch({"x": x})), "warning", "x", "what it draws itself")


def test_a_guide_that_ignores_the_mask_is_a_note():
    x = torch.randn(B, 3)
    x[0, 0] = NAN
    report = check(Model(), Guide(), Batch({"x": x}))
    only(report, "note", "x", "does not read batch.mask()")

    class Masked(Guide):
        def forward(self, batch: Batch) -> None:
            inputs = torch.cat([batch["x"], batch.mask("x").double()], -1)
            loc, log_scale = self.encoder(inputs).chunk(2, -1)
            with pyro.plate("data", batch.size, dim=-1):
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    assert check(Model(), Masked(nn.Linear(6, 4)), Batch({"x": x})).findings == ()


@pytest.mark.parametrize("complete_batch", [False, True])
def test_missing_entries_with_children_are_an_error_without_rsample(complete_batch):
    @in_plate
    def model(batch: Batch) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Bernoulli(logits=z))
        pyro.sample("s", dist.Bernoulli(logits=2 * x - 1))

    @in_plate
    def guide(batch: Batch) -> None:
        pyro.sample("z", dist.Normal(batch["x"] + batch.mask("x"), 1.0))

    x = torch.tensor([1.0, NAN, 0.0, 1.0, NAN, 1.0])
    batch = Batch({"x": x, "s": (~x.isnan()).double()})
    batch = batch.rows([0, 2, 3]) if complete_batch else batch
    found = only(check(model, guide, batch), "error", "x", "get no gradient")
    assert "estimator='score'" in found.cure
    leaf = batch.without("s")
    assert check(model, guide, leaf).ok


@pytest.mark.parametrize("kind", ["joint", "flow"])
def test_rows_missing_in_part_under_a_joint_likelihood_are_an_error(kind):
    def likelihood(x: Tensor) -> Any:
        if kind == "joint":
            return dist.MultivariateNormal(x, torch.eye(3))
        shift = dist.transforms.AffineTransform(x, 1.0, event_dim=1)
        return dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [shift])

    x = torch.randn(B, 3)
    assert check(Model(likelihood=likelihood), Guide(), Batch({"x": x})).ok
    x[1, 2] = NAN
    found = only(
        check(Model(likelihood=likelihood), Guide(), Batch({"x": x})), "error", "x", "factorize"
    )
    assert "use a factorized likelihood" in found.cure


# ---------------------------------------------------------------------------------------------
# Networks


class Images(nn.Module):
    """A convolution over [B, C, H, W] alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Unflatten(-1, (2, 2, 2)), nn.Conv2d(2, 1, 2))

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.net(z)
        return out.flatten(1).expand(-1, 3)


def test_a_network_that_knows_one_batch_dimension_is_an_error():
    report = check(Model(Images()), Guide(), data())
    found = only(report, "error", None, "the model does not run with 2 particles")
    assert "nn.leading" in found.cure
    assert "chunk=1" in found.cure
    assert check(Model(leading(Images(), 1)), Guide(), data()).findings == ()


@pytest.mark.parametrize("training", [True, False])
def test_batchnorm_over_the_wrong_axis_is_an_error(training):
    """[K, B, C] with B equal to C runs without a word."""
    norm = nn.BatchNorm1d(2)
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor([0.5, -2.0]))  # type: ignore[union-attr]
    model = Model(nn.Sequential(norm, nn.Linear(2, 3))).train(training)
    batch = data(2)
    report = check(model, Guide(), batch)
    assert not report.ok
    found = next(f for f in report.findings if f.severity == "error")
    assert found.site == "x"
    assert "differs between 2 particles at once and one at a time" in found.found
    assert "nn.leading" in found.cure
    fresh = Model(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3)))  # same on every axis in eval
    assert not check(fresh, Guide(), batch).ok
    wrapped = Model(nn.Sequential(leading(norm, 1), nn.Linear(2, 3))).train(training)
    assert check(wrapped, Guide(), batch).ok


def test_particles_that_are_mixed_up_are_an_error():
    class Mixed(nn.Linear):
        def forward(self, z: Tensor) -> Tensor:
            out = super().forward(z)
            return out.flip(0) if out.dim() > 2 else out

    report = check(Model(Mixed(2, 3)), Guide(), data())
    only(report, "error", "x", "differs between 2 particles at once and one at a time")


def test_batchnorm_in_training_mode_is_a_note():
    model = Model(nn.Sequential(leading(nn.BatchNorm1d(2), 1), nn.Linear(2, 3)))
    report = check(model, Guide(), data())
    assert report.ok
    only(report, "note", "x", "depends on the other rows of its batch")
    assert check(model.eval(), Guide(), data()).findings == ()


def test_rows_that_see_each_other_are_a_warning():
    class Centred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(-2, keepdim=True))

    only(
        check(Model(), Guide(Centred(3, 4)), data()), "warning", "z", "the guide's density of a row"
    )
    only(
        check(Model(Centred(2, 3)), Guide(), data()), "warning", "x", "the model's density of a row"
    )


def test_a_square_inside_the_event_is_found_by_its_coupling():
    """x [B, B]: the event hides the row."""

    @in_plate
    def model(batch: Batch) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.reshape(*z.shape[:-1], 1, B), torch.ones(B, 1)).to_event(1))

    @in_plate
    def guide(batch: Batch) -> None:
        pyro.sample("z", dist.Normal(batch["x"].mean(-1), 1.0))

    report = check(model, guide, Batch({"x": torch.randn(B, B)}))
    only(report, "warning", "x", "depends on the data or latents of other rows")


def test_dropout_does_not_look_like_a_network_that_mixes():
    net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    assert check(Model(net), Guide(encoder), data()).findings == ()


def test_randomness_that_follows_no_mode_is_a_note():
    class Noisy(nn.Linear):
        def forward(self, z: Tensor) -> Tensor:
            out = super().forward(z)
            return out + torch.randn_like(out)

    only(check(Model(Noisy(2, 3)), Guide(), data()), "note", None, "change from run to run")


def test_sites_that_change_from_run_to_run_are_an_error():
    calls = []

    class Changing(Model):
        def forward(self, batch: Batch) -> None:
            super().forward(batch)
            calls.append(0)
            pyro.sample(f"step_{len(calls)}", dist.Normal(0.0, 1.0))

    report = check(Changing(), Guide(), data())
    assert any("sites of a program change" in text for text in texts(report))


# ---------------------------------------------------------------------------------------------
# What the estimators and rates will say


class Ladder(PyroModule):
    """Model: z_2 -> z_1 -> x. Guide: z_1 -> z_2 (bottom up)."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(drop))

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z_1 = latent("z_1", dist.Normal(self.net(batch["x"][:, :2]), 1.0).to_event(1))
            latent("z_2", dist.Normal(self.net(z_1), 1.0).to_event(1))


@in_plate
def ladder(batch: Batch) -> None:
    z_2 = latent("z_2")
    z_1 = latent("z_1", dist.Normal(z_2, 1.0).to_event(1))
    pyro.sample(
        "x", dist.Normal(z_1.sum(-1, keepdim=True).expand(*z_1.shape[:-1], 3), 1.0).to_event(1)
    )


def test_the_order_of_sites_is_a_note_for_the_analytic_kl():
    found = only(check(ladder, Ladder(), data()), "note", "z_1", "Monte Carlo KL, since the model")
    assert "draws z_2 before it" in found.found


def test_dropout_in_a_guide_of_several_sites_is_a_note_for_dreg():
    report = check(ladder, Ladder(0.5), data())
    assert report.ok
    assert any("stl and dreg refuse this guide: dropout" in text for text in texts(report))
    assert not any("dropout" in text for text in texts(check(ladder, Ladder(0.5).eval(), data())))


def test_a_flow_without_inverse_is_a_note_for_dreg():
    class Flow(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.flow = dist.transforms.Planar(2)

        def forward(self, batch: Batch) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                base = dist.Normal(batch["x"][:, :2], 1.0).to_event(1)
                latent(fn=dist.TransformedDistribution(base, [self.flow]))

    report = check(Model(), Flow(), data())
    assert any("stl and dreg refuse" in text and "no inverse" in text for text in texts(report))


def test_a_site_without_rsample_is_a_note():
    class Discrete(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)

        def forward(self, batch: Batch) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                pyro.sample("z", dist.Categorical(logits=self.net(batch["x"])))

    class Mixture(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.randn(2, 3))

        def forward(self, batch: Batch) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
                pyro.sample("x", dist.Normal(self.loc[z], 1.0).to_event(1))

    report = check(Mixture(), Discrete(), data())
    assert not [f for f in report.findings if f.severity != "note"]
    assert any(f.site == "z" and "use estimator='score'" in f.cure for f in report.findings)


# ---------------------------------------------------------------------------------------------
# Gradients


def test_parameters_without_gradient_are_a_warning():
    class Unused(Guide):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(3, 1)

    found = only(check(Model(), Unused(), data()), "warning", None, "guide.spare.weight")
    assert "guide.spare.bias" in found.found
    assert "encoder" not in found.found
    guide = Unused()
    guide.spare.requires_grad_(False)
    assert check(Model(), guide, data()).findings == ()


def test_parameters_of_other_programs_are_not_looked_at():
    pyro.module("encoder", nn.Linear(3, 4))
    pyro.param("of another", torch.ones(2))
    assert check(Model(), Guide(), data()).findings == ()


def test_a_detached_path_is_a_warning():
    class Detached(nn.Linear):
        def forward(self, z: Tensor) -> Tensor:
            return super().forward(z).detach()

    report = check(Model(Detached(2, 3)), Guide(), data())
    only(report, "warning", None, "model.decoder.weight, model.decoder.bias")


def test_gradients_that_are_not_finite_are_an_error():
    class Root(nn.Linear):
        def forward(self, z: Tensor) -> Tensor:
            return super().forward(z) + (0.0 * self.weight).abs().sqrt().sum()

    report = check(Model(Root(2, 3)), Guide(), data())
    only(report, "error", None, "gradients that are not finite: model.decoder.weight")


# ---------------------------------------------------------------------------------------------
# Other people's programs


def test_functions_with_bare_tensors_and_further_arguments():
    net = nn.Linear(3, 4)

    def model(x: Tensor, width: float = 1.0) -> None:
        with pyro.plate("data", len(x)):
            z = latent()
            loc = pyro.param("loc", torch.zeros(3))
            pyro.sample("x", dist.Normal(loc + z[..., :1], width).to_event(1), obs=x)

    def guide(x: Tensor, width: float = 1.0) -> None:
        pyro.module("net", net)
        loc, log_scale = net(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            latent(fn=dist.Normal(loc, log_scale.exp()).to_event(1))

    assert check(model, guide, torch.randn(B, 3), width=0.5).findings == ()
    assert "loc" not in pyro.get_param_store()
    only(check(model, guide, torch.randn(B, 3), width=-0.5), "error", "x", "is not GreaterThan")


@pytest.mark.parametrize("automatic", [AutoNormal, AutoDiagonalNormal])
def test_autoguides(automatic):
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.LogNormal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    report = check(model, automatic(model), torch.randn(B))
    assert not [f for f in report.findings if f.severity != "note"], str(report)
    assert any(
        f.site == "mean" and "outside the plate over rows" in f.found for f in report.findings
    )


def test_subsampled_plates_and_inner_plates():
    def model(x: Tensor) -> None:
        with (
            pyro.plate("pixels", 3, dim=-1),
            pyro.plate("data", len(x), subsample_size=4, dim=-2) as rows,
        ):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x: Tensor) -> None:
        with (
            pyro.plate("pixels", 3, dim=-1),
            pyro.plate("data", len(x), subsample_size=4, dim=-2) as rows,
        ):
            pyro.sample("z", dist.Normal(x[rows], 1.0))

    report = check(model, guide, torch.randn(B, 3))
    assert not [f for f in report.findings if f.severity != "note"], str(report)


def test_sequences_with_masks_and_lengths():
    class Chain(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(1, 1)

        def run(self, batch: Batch, shift: Tensor | None) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                z = torch.zeros(1)
                for t in range(3):
                    loc = self.step(z) if shift is None else self.step(z) + shift[:, t, None]
                    reached: Any = t < batch["length"]
                    with poutine.mask(mask=reached):
                        z = latent(f"z_{t}", dist.Normal(loc, 1.0).to_event(1))
                    if shift is None:
                        pyro.sample(f"x_{t}", dist.Normal(z.squeeze(-1), 1.0))

    class Prior(Chain):
        def forward(self, batch: Batch) -> None:
            self.run(batch, None)

    class Posterior(Chain):
        def forward(self, batch: Batch) -> None:
            self.run(batch, torch.stack([batch[f"x_{t}"] for t in range(3)], -1))

    lengths = torch.tensor([3, 2, 1, 3, 2, 3])
    x = torch.randn(B, 3).masked_fill(torch.arange(3) >= lengths[:, None], NAN)
    batch = Batch({"x": x, "length": lengths}).steps("x")
    report = check(Prior(), _guide_named(Posterior), batch)
    assert not [f for f in report.findings if f.severity != "note"], str(report)


def _guide_named(kind: type[PyroModule]) -> PyroModule:
    guide = kind()
    guide._pyro_name = "guide"
    return guide


def test_semi_supervised_pairs_have_notes_only():
    class Labelled(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.randn(2, 3))

        def forward(self, batch: Batch) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                y = pyro.sample("y", dist.Categorical(torch.ones(2) / 2))
                pyro.sample("x", dist.Normal(self.loc[y.long()], 1.0).to_event(1))

    class Labels(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)

        def forward(self, batch: Batch) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                pyro.sample("y", dist.Categorical(logits=self.net(batch["x"])))

    y = torch.tensor([0.0, NAN, 1.0, 1.0, NAN, NAN])
    report = check(Labelled(), Labels(), Batch({"x": torch.randn(B, 3), "y": y}))
    assert not [f for f in report.findings if f.severity != "note"], str(report)
    report = check(
        Labelled(), Labels(), Batch({"x": torch.randn(B, 3), "y": torch.full((B,), 0.5)})
    )
    assert any(f.site == "y" and "outside the support" in f.found for f in report.findings)


def test_an_observed_model_and_a_batch_of_one_row():
    assert check(Observed(Model()), Guide(), data()).findings == ()
    assert check(Model(), Guide(), data(1)).findings == ()
