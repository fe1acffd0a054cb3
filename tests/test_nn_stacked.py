"""Stacked networks: each slice goes through its own, and nothing passes between them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyro_vae.nn import Affine, Stacked, convolutional, mlp


def nets(count=3):
    return [nn.Sequential(Affine(float(n), 2.0), mlp((4, 5, 2), nn.Tanh)) for n in range(count)]


@pytest.mark.parametrize("lead", [(), (6,), (2, 6)])
def test_each_slice_goes_through_its_own_network(lead):
    each = nets()
    stacked, x = Stacked(each), torch.randn(*lead, 3, 7, 4)
    came = stacked(x)
    assert came.shape == (*lead, 3, 7, 2)
    for n, net in enumerate(each):  # buffers as well: each shift is another
        torch.testing.assert_close(came[..., n, :, :], net(x[..., n, :, :]))


def test_rows_without_a_slice_go_through_all():
    each, x = nets(), torch.randn(7, 4)
    torch.testing.assert_close(Stacked(each)(x), torch.stack([net(x) for net in each]))


def test_images():
    each = [convolutional((6, 5), (3,), (2,)) for _ in range(2)]
    x = torch.randn(2, 4, 6, 5)
    wanted = torch.stack([net(part) for net, part in zip(each, x, strict=True)])
    torch.testing.assert_close(Stacked(each, event_dim=2)(x), wanted)


def test_gradients_are_those_of_the_networks():
    each, x = nets(), torch.randn(3, 7, 4)
    stacked = Stacked(each)
    stacked(x).square().sum().backward()
    for n, net in enumerate(each):
        net(x[n]).square().sum().backward()
    parts = [dict(net.named_parameters()) for net in each]
    for name, parameter in stacked.net.named_parameters():
        wanted = torch.stack([part[name].grad for part in parts])
        torch.testing.assert_close(parameter.grad, wanted)
    assert len(list(stacked.parameters())) == len(parts[0])


def test_the_networks_themselves_are_left_alone():
    each = nets()
    before = [p.clone() for p in each[0].parameters()]
    stacked = Stacked(each)
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.zero_()
    assert all(map(torch.equal, before, each[0].parameters()))


@pytest.mark.parametrize("given", [[], [mlp((4, 2)), mlp((4, 3))]], ids=["none", "other widths"])
def test_networks_that_do_not_stack_are_refused(given):
    with pytest.raises(ValueError, match=r"Stacked: came \d networks, wanted .* the same layers"):
        Stacked(given)
