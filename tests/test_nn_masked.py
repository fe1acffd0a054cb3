"""Features of rows with missing entries: what stands in a missing entry reaches none of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyro_vae.nn import Affine, EntrySet, OneHot, WithMask, ZeroFilled

KINDS = {"zero": ZeroFilled, "masked": WithMask, "set": EntrySet}
X = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
SEEN = torch.tensor([[True, False, True], [False, False, False]])


def test_zero_filled_is_zero_in_the_inputs_units():
    features = ZeroFilled(Affine(-0.5, 2.0), (3,))
    torch.testing.assert_close(features(X, SEEN), torch.tensor([[1.5, 0.0, 5.5], [0.0, 0.0, 0.0]]))
    assert features.shape == (3,)


def test_with_mask_has_values_and_mask_as_two_channels():
    features = WithMask(nn.Identity(), (3,))
    came = features(X, SEEN).reshape(2, *features.shape)
    torch.testing.assert_close(came[0], torch.tensor([[1.0, 0.0, 3.0], [1.0, 0.0, 1.0]]))
    torch.testing.assert_close(came[1], torch.zeros(2, 3))


def test_set_is_the_sum_over_what_is_observed():
    features = EntrySet(nn.Identity(), (3,), embedding=2, code=4, hidden=(5,))
    wanted = sum(features.net(torch.cat([X[0, d : d + 1], features.places[d]])) for d in (0, 2))
    came = features(X, SEEN)
    torch.testing.assert_close(came[0], wanted / 3)
    torch.testing.assert_close(came[1], torch.zeros(4))
    assert features.shape == (4,)


def test_set_does_not_depend_on_the_order_of_entries():
    features = EntrySet(nn.Identity(), (7,))
    x, seen, order = torch.randn(5, 7), torch.rand(5, 7) < 0.6, torch.randperm(7)
    before = features(x, seen)
    with torch.no_grad():
        features.places.copy_(features.places[order])
    torch.testing.assert_close(features(x[:, order], seen[:, order]), before)
    assert not torch.allclose(features(x, seen), before)  # places are told from each other


@pytest.mark.parametrize("kind", KINDS)
def test_missing_entries_have_no_value_and_no_gradient(kind):
    features = KINDS[kind](Affine(-0.3, 2.0), (7,))
    x, seen = torch.randn(5, 7), torch.rand(5, 7) < 0.6
    came = features(x, seen)
    for filled in (torch.where(seen, x, 1e6), torch.where(seen, x, torch.nan)):
        assert torch.equal(features(filled, seen), came)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(features(x, seen).square().sum(), x)
    assert (gradient[~seen] == 0).all()
    assert (gradient[seen] != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_is_seen_where_it_should_be(kind):
    """A missing entry and one at the column's mean: the same for zero-filled rows only."""
    features = KINDS[kind](nn.Identity(), (2,))
    x = torch.tensor([[0.5, 0.0]])
    seen, unseen = (features(x, torch.tensor([[True, second]])) for second in (True, False))
    assert torch.equal(seen, unseen) is (kind == "zero")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [(), (4,), (3, 4)])
def test_images_and_any_leading_dimensions(kind, lead):
    features = KINDS[kind](nn.Identity(), (2, 5, 6))
    x, seen = torch.randn(*lead, 2, 5, 6), torch.rand(*lead, 2, 5, 6) < 0.5
    assert features(x, seen).shape == (*lead, torch.Size(features.shape).numel())


@pytest.mark.parametrize("kind", KINDS)
def test_classes_share_the_mask_of_their_entry(kind):
    features = KINDS[kind](OneHot(3, 1), (3, 2))
    labels = torch.tensor([[2.0, 1.0]])
    seen = torch.tensor([[True, False]])
    came = features(labels, seen)
    assert torch.equal(came, features(torch.tensor([[2.0, 0.0]]), seen))
    if kind != "set":
        wanted = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
        assert torch.equal(came[0, :6].reshape(3, 2), wanted)
    if kind == "masked":
        assert torch.equal(came[0, 6:].reshape(3, 2), seen.double().expand(3, 2))
