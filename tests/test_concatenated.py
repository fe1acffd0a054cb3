"""Several parents as one vector, and a part of one."""

from __future__ import annotations

import torch
from torch import nn

from pyro_vae.nn import Concatenated, Selected
from tests.small_pairs import assert_same


def test_parents_stand_side_by_side_and_broadcast():
    net = nn.Linear(5, 3)
    z, w = torch.randn(4, 1, 2), torch.randn(6, 3)
    wanted = net(torch.cat([z.expand(4, 6, 2), w.expand(4, 6, 3)], -1))
    assert_same(Concatenated(net)(z, w), wanted)


def test_a_part_is_read_in_the_order_that_was_said():
    z = torch.randn(4, 6, 5)
    selected = Selected(nn.Identity(), [3, 0])
    assert_same(selected(z), torch.stack([z[..., 3], z[..., 0]], -1))
    assert not selected.state_dict()
