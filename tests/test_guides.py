"""Guides: what they draw and what they read."""

from __future__ import annotations

import pyro
import pytest
import torch
from torch import nn

from pyro_vae.batch import Batch
from pyro_vae.conditionals import DiagonalGaussian
from pyro_vae.guides import AmortizedGuide


def linear_guide(latent="z", site="x"):
    return AmortizedGuide(DiagonalGaussian(nn.Linear(5, 4), (2,)), latent, site)


def test_draws_its_latent_given_its_site():
    guide, x = linear_guide("code", "image"), torch.randn(7, 5)
    trace = pyro.poutine.trace(guide).get_trace(Batch({"image": x}))
    assert trace.nodes["code"]["value"].shape == (7, 2)
    fn = trace.nodes["code"]["fn"]
    torch.testing.assert_close(fn.mean, guide.posterior.net(x)[:, :2])
    assert guide(Batch({"image": x})).shape == (7, 2)


def test_particles_stand_to_the_left_of_rows():
    with pyro.plate("particles", 3, dim=-2):
        z = linear_guide()(Batch({"x": torch.randn(7, 5)}))
    assert z.shape == (3, 7, 2)
    assert not torch.equal(z[0], z[1])


def test_missing_entries_read_as_the_batchs_fill():
    guide, x = linear_guide(), torch.randn(7, 5)
    x[2, 3] = torch.nan
    trace = pyro.poutine.trace(guide).get_trace(Batch({"x": x}, fill={"x": 0.25}))
    wanted = guide.posterior.net(x.nan_to_num(0.25))[:, :2]
    torch.testing.assert_close(trace.nodes["z"]["fn"].mean, wanted)


def test_absent_site_is_named():
    with pytest.raises(KeyError, match="'x' is not in the batch"):
        linear_guide()(Batch(size=3))
