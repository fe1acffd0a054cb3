"""A map of each entry by itself."""

from __future__ import annotations

import pytest
import torch

from pyro_vae.nn import Entrywise


@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_each_output_depends_on_its_own_input(sign):
    net = Entrywise((3,), sign)
    with torch.no_grad():
        net.raw.copy_(torch.tensor([-2.0, 0.3, 4.0]))
        net.threshold.copy_(torch.tensor([0.5, -1.0, 2.0]))
    x = torch.randn(4, 3)
    torch.testing.assert_close(net(x), net.slope * x - net.slope * net.threshold)
    jacobian = torch.func.jacrev(net)(x[0])
    torch.testing.assert_close(jacobian, torch.diag(net.slope))
    if sign:  # whatever the parameters are
        assert (net.slope.sign() == sign).all()


def test_starts_at_slope_one_of_the_known_sign_and_at_zero_of_an_unknown_one():
    for sign in (-1, 0, 1):
        torch.testing.assert_close(Entrywise((2,), sign).slope, torch.full((2,), float(sign)))


def test_another_sign_is_refused():
    with pytest.raises(ValueError, match=r"Entrywise: sign= came 2, wanted 1, -1, or 0"):
        Entrywise((2,), 2)
