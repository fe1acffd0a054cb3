"""Several sites with one latent: what is drawn from what, and the densities."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae.batch import Batch, Observed
from pyro_vae.conditionals import StandardNormal
from pyro_vae.models import MultimodalModel
from tests.modality_pairs import SIZES, data, evidence, linear_model


class Sum(nn.Module):
    """x | z, w ~ N(z + w, 0.5²)."""

    def forward(self, z, w):
        return dist.Normal(z + w, 0.5).to_event(1)


def test_generates_fresh_rows_of_every_site():
    model = linear_model()
    made = model(Batch(size=7))
    assert {site: tuple(x.shape) for site, x in made.items()} == {"x": (7, 4), "y": (7, 3)}
    with pyro.plate("particles", 3, dim=-2):
        assert model(Batch(size=7))["y"].shape == (3, 7, 3)


def test_sites_are_independent_given_the_latent():
    model, batch = linear_model(), data(4)
    trace = pyro.poutine.trace(Observed(model)).get_trace(batch)
    trace.compute_log_prob()
    z = trace.nodes["z"]["value"]
    for site in SIZES:
        wanted = model.likelihoods[site](z).log_prob(batch[site]) * batch.mask(site)[:, 0]
        torch.testing.assert_close(trace.nodes[site]["log_prob"], wanted)


def test_the_evidence_of_any_part_of_a_row():
    """Importance sampling from the prior, in standard errors."""
    model, batch = linear_model(), data(4)
    with torch.no_grad(), pyro.plate("particles", 200_000, dim=-2):
        trace = pyro.poutine.trace(Observed(model)).get_trace(batch)
        trace.compute_log_prob(lambda name, _: name in SIZES)
    log_p = [trace.nodes[site]["log_prob"] for site in SIZES]
    weights = torch.stack(log_p).sum(0).exp()
    exact = evidence(model, batch).exp()
    error = weights.std(0) / len(weights) ** 0.5
    assert ((weights.mean(0) - exact).abs() <= 4 * error).all()


def test_private_latents():
    model = MultimodalModel(StandardNormal(2), {"x": Sum(), "y": Sum()}, {"y": StandardNormal(2)})
    with pytest.raises(TypeError, match="'w'"):
        model(Batch(size=3))
    model = MultimodalModel(
        StandardNormal(2), {"x": Sum(), "y": Sum()}, {s: StandardNormal(2) for s in ("x", "y")}
    )
    trace = pyro.poutine.trace(model).get_trace(Batch(size=5))
    nodes = {name: node["value"] for name, node in trace.nodes.items() if node["type"] == "sample"}
    assert list(nodes)[1:] == ["z", "w_x", "w_y", "x", "y"]  # the plate first
    for site in ("x", "y"):
        fn: Any = trace.nodes[site]["fn"]
        z, own = (nodes[name] for name in ("z", f"w_{site}"))
        assert isinstance(z, torch.Tensor)
        assert isinstance(own, torch.Tensor)
        torch.testing.assert_close(fn.mean, z + own)


def test_refuses_private_latents_without_a_likelihood():
    with pytest.raises(ValueError, match=r"private latents of .'sound'. and likelihoods of .'x'"):
        MultimodalModel(StandardNormal(2), {"x": Sum()}, {"sound": StandardNormal(1)})
    with pytest.raises(ValueError, match="at least one likelihood"):
        MultimodalModel(StandardNormal(2), {})
