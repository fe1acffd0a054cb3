"""CUDA graphs: the same numbers, at the addresses of one call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_vae.compiled.cuda import Replay

pytestmark = pytest.mark.gpu


def test_replay():
    total, x = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")

    def function(x: Tensor, total: Tensor) -> list[Tensor]:
        total.add_(x)
        return [x * 2 + torch.randn_like(x)]

    replay = Replay(function, [x, total], 1)
    total.zero_()
    torch.manual_seed(1)
    (first,), (second,) = replay(x), replay(3 * x)
    torch.manual_seed(1)
    wanted = [x * 2 + torch.randn_like(x), 6 * x + torch.randn_like(x)]
    assert total.tolist() == [4.0, 4.0, 4.0]
    torch.testing.assert_close(first, wanted[0])  # the second did not write over it
    torch.testing.assert_close(second, wanted[1])
