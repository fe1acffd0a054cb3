"""One pass: the table of log densities, the plan it relies on, and what is refused."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.batch import Batch
from pyro_vae.objectives import elbo
from pyro_vae.objectives.particles import Boundary, log_q_at_rest, run
from pyro_vae.objectives.plan import SitesChanged
from tests.small_pairs import (
    PAIRS,
    BottomUp,
    Guide,
    LadderModel,
    LinearModel,
    data,
    flat_gradient,
    plan_of,
    standard,
    table,
)

# ---------------------------------------------------------------------------------------------
# The table


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("number", [1, 3])
def test_the_table_adds_up_to_what_pyro_traces(pair: str, number: int):
    model, guide = PAIRS[pair]()
    x = data()
    plan = plan_of(model, guide, x)
    pyro.set_rng_seed(2)
    particles = run(model, guide, (x,), {}, plan, number)
    pyro.set_rng_seed(2)
    with pyro.plate("particles", number, dim=-2):
        traced = poutine.trace(guide).get_trace(x)
        replayed = poutine.trace(poutine.replay(model, traced)).get_trace(x)
    for trace, terms in (
        (traced, particles.posterior),
        (replayed, particles.prior | particles.likelihood),
    ):
        trace.compute_log_prob()
        for site, term in terms.items():
            assert term.shape[:2] == (number, 6)
            total = particles.summed({site: term})
            torch.testing.assert_close(total, trace.nodes[site]["log_prob"])


def test_densities_that_factorize_stay_elementwise():
    particles = table(LinearModel(), Guide(), data())
    shapes = {"prior": (3, 6, 2), "posterior": (3, 6, 2), "likelihood": (3, 6, 3)}
    for kind, shape in shapes.items():
        (term,) = getattr(particles, kind).values()
        assert term.shape == shape
    assert particles.samples["z"].shape == (3, 6, 2)


def test_a_density_that_does_not_factorize_is_one_number_a_row():
    particles = table(*PAIRS["coupling flow"](), data())
    assert particles.posterior["z"].shape == (3, 6)
    assert particles.prior["z"].shape == (3, 6, 2)


def test_samples_are_attached_to_the_guide():
    guide = Guide()
    particles = table(LinearModel(), guide, data())
    assert flat_gradient(particles.samples["z"].sum(), guide.parameters()).abs().max() > 0


def test_masks_and_own_scales_stay_and_the_plates_scale_does_not():
    """Entry masks, row masks, a scale on one site, and N / B, which goes outside the bound."""
    entries = torch.tensor([True, False, True])
    rows: Any = torch.tensor([True, True, False, True])

    def model() -> None:
        with pyro.plate("data", 20, subsample_size=4), poutine.mask(mask=rows):
            with poutine.scale(scale=0.5):
                z = pyro.sample("z", standard(3))
            x = dist.Normal(z, 1.0).mask(entries).to_event(1)
            pyro.sample("x", x, obs=torch.ones(4, 3))

    def guide() -> None:
        plate = pyro.plate("data", 20, subsample_size=4)
        with plate, poutine.mask(mask=rows), poutine.scale(scale=2.0):
            pyro.sample("z", standard(3))

    particles = table(model, guide)
    z = particles.samples["z"]
    kept = rows[:, None].double()
    log_n = dist.Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close(particles.prior["z"], 0.5 * kept * log_n)
    torch.testing.assert_close(particles.posterior["z"], 2.0 * kept * log_n)
    log_x = dist.Normal(z, 1.0).log_prob(torch.ones(()))
    torch.testing.assert_close(particles.likelihood["x"], kept * entries * log_x)
    assert particles.plate_scale == 5
    assert particles.scale == 5
    assert not particles.common_scale


def test_a_scale_that_all_sites_share_goes_outside():
    scaled = [poutine.scale(program, scale=0.5) for program in (LinearModel(), Guide())]
    particles = table(*scaled, data())
    assert particles.common_scale
    assert particles.scale == 0.5
    assert particles.plate_scale == 1
    log_x = dist.Normal(0.0, 1.0).log_prob(particles.samples["z"])
    torch.testing.assert_close(particles.prior["z"], log_x)


def test_a_scale_for_each_row_goes_outside():
    weights = torch.linspace(0.5, 2.0, 6)
    scaled = [poutine.scale(program, scale=weights) for program in (LinearModel(), Guide())]
    particles = table(*scaled, data())
    torch.testing.assert_close(particles.scale, weights)


def test_what_lies_outside_the_rows_has_its_own_column():
    def model(x: Tensor) -> None:
        w = pyro.sample("w", standard(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard())
            pyro.sample("x", dist.Normal(z + w.sum(-1, keepdim=True), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("w", standard(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", standard())

    particles = table(model, guide, torch.ones(5), number=4)
    assert particles.plan.outside == {"w"}
    assert not particles.local("w")
    outside = particles.summed(particles.prior, outside=True)
    local = particles.summed(particles.prior)
    assert outside is not None
    assert local is not None
    assert outside.shape == (4,)
    assert local.shape == (4, 5)
    assert particles.summed({}, outside=True) is None
    w = particles.samples["w"].squeeze()
    torch.testing.assert_close(outside, dist.Normal(0.0, 1.0).log_prob(w).sum(-1))


def test_the_kl_is_taken_entry_by_entry_and_weighed_like_the_guide():
    entries = torch.tensor([True, False])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.scale(scale=3.0):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).mask(entries).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.scale(scale=3.0):
            pyro.sample("z", dist.Normal(torch.ones(2), 1.0).mask(entries).to_event(1))

    particles = table(model, guide, torch.ones(5))
    torch.testing.assert_close(particles.kl("z"), torch.tensor([0.5, 0.0]).expand(3, 5, 2))
    assert particles.analytic == {"z"}


def test_log_q_at_rest_has_no_path():
    """Neither through a site's own draw nor through the draws it depends on."""
    guide = BottomUp()
    particles = table(LadderModel(), guide, data())
    log_q = log_q_at_rest(particles, (data(),), {})
    torch.testing.assert_close(log_q, particles.posterior)
    upper = flat_gradient(log_q["z2"].sum(), guide.parameters())
    lower = sum(p.numel() for p in guide.net.parameters())
    assert upper[:lower].abs().max() == 0
    assert upper[lower:].abs().max() > 0


# ---------------------------------------------------------------------------------------------
# Boundary copies


def test_a_boundary_copy_weighs_the_arriving_gradient_once():
    boundary, plan = Boundary(), plan_of(LinearModel(), Guide(), data())
    value = torch.randn(3, 6, 2, requires_grad=True)
    copy = boundary.copy(value, 1, plan, local=True)
    other = boundary.copy(2 * copy, 1, plan, local=True)
    boundary.factor = torch.randn(3, 6)
    torch.testing.assert_close(copy, value)
    (gradient,) = torch.autograd.grad(copy.sum() + other.sum(), value)
    wanted = boundary.factor * (1 + 2 * boundary.factor)  # twice only where it passes two copies
    torch.testing.assert_close(gradient, wanted[..., None].expand(3, 6, 2))


@pytest.mark.parametrize("local", [True, False])
def test_no_factor_or_outside_the_rows_the_gradient_passes(local: bool):
    boundary, plan = Boundary(), plan_of(LinearModel(), Guide(), data())
    value = torch.randn(3, 6, 2, requires_grad=True)
    copy = boundary.copy(value, 1, plan, local)
    boundary.factor = None if local else torch.randn(3, 6)
    (gradient,) = torch.autograd.grad(copy.sum(), value)
    torch.testing.assert_close(gradient, torch.ones_like(value))


def test_sites_that_change_from_call_to_call_are_named():
    def model(x: Tensor, wide: list[bool]) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard())
            if wide:
                pyro.sample("extra", dist.Normal(z, 1.0), obs=x)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, wide: list[bool]) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", standard())

    x, wide = torch.ones(4), [True]
    plan = plan_of(model, guide, x, wide)
    with pytest.raises(SitesChanged, match="'extra'"):
        run(model, guide, (x, []), {}, plan, 2)
    objective = elbo()  # looks once more, and goes on
    first = objective.loss(model, guide, x, wide)
    assert objective.loss(model, guide, x, []) < first


def test_handlers_draw_for_each_particle():
    """Inside the particle plate, all K particles would share what a handler draws."""

    def model(batch: Batch) -> None:
        with pyro.plate("data", batch.size):
            y = pyro.sample("y", dist.Bernoulli(0.5 * torch.ones(())))
            pyro.sample("x", dist.Normal(y, 1.0))

    def guide(batch: Batch) -> None:
        with pyro.plate("data", batch.size):
            pyro.sample("y", dist.Bernoulli(0.5 * torch.ones(())))

    batch = Batch({"x": torch.full((50,), torch.nan)})
    particles = table(model, guide, batch, number=4, scores=lambda site, path: not path)
    assert not (particles.samples["y"][0] == particles.samples["y"][1]).all()
    drawn = particles.model["x"]["value"]
    assert not (drawn[0] == drawn[1]).any()


def test_rows_of_a_subsampled_plate_can_be_shared():
    seen: list[Any] = []

    def model() -> None:
        with pyro.plate("data", 100, subsample_size=4) as rows:
            seen.append(rows)
            pyro.sample("x", dist.Normal(pyro.sample("z", standard()), 1.0), obs=torch.ones(4))

    def guide() -> None:
        with pyro.plate("data", 100, subsample_size=4) as rows:
            seen.append(rows)
            pyro.sample("z", standard())

    first = table(model, guide)
    seen.clear()
    table(model, guide, subsamples=first.subsamples)
    assert seen[-2].tolist() == seen[-1].tolist() == first.subsamples["data"].tolist()
