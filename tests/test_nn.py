"""Networks: shapes with and without particles, row by row the same as batched."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from pyro_vae.nn import (
    Affine,
    OneHot,
    Reshape,
    conv_resnet,
    convolutional,
    dense,
    dense_resnet,
    leading,
    mlp,
)

CONV = partial(convolutional, hidden=(3, 4))
NETS: dict[str, tuple[Callable[..., nn.Module], Any, Any]] = {
    "mlp": (partial(mlp, (5, 7, 3)), (5,), (3,)),
    "mlp, affine": (partial(mlp, (5, 3)), (5,), (3,)),
    "mlp, LayerNorm": (partial(mlp, (5, 7, 3), norm=nn.LayerNorm), (5,), (3,)),
    "mlp, BatchNorm": (partial(mlp, (5, 7, 3), norm=nn.BatchNorm1d), (5,), (3,)),
    "dense": (partial(dense, hidden=(7, 6), activation=nn.Tanh), (2, 3), (4,)),
    "dense, numbers": (partial(dense, hidden=(7,)), (), ()),
    "dense, linear": (partial(dense, hidden=()), (4,), (2, 3)),
    "dense_resnet": (partial(dense_resnet, hidden=(7, 7, 5)), (2, 3), (4,)),
    "dense_resnet, linear": (partial(dense_resnet, hidden=()), (4,), (2, 3)),
    "encoder 8x8": (CONV, (8, 8), (4,)),
    "encoder 2x28x28": (CONV, (2, 28, 28), (4,)),
    "encoder 2x2x5x7": (CONV, (2, 2, 5, 7), (4,)),
    "encoder, BatchNorm": (partial(CONV, block=nn.BatchNorm2d), (8, 8), (4,)),
    "decoder 8x8": (CONV, (4,), (8, 8)),
    "decoder 2x28x28": (CONV, (4,), (2, 28, 28)),
    "decoder 1x5x7": (CONV, (4,), (1, 5, 7)),
    "decoder, 3 stages": (partial(CONV, hidden=(5, 4, 3)), (4,), (3, 9, 2)),
    "decoder 1x1": (CONV, (4,), (1, 1)),
    "conv_resnet encoder": (partial(conv_resnet, hidden=(3, 4)), (1, 8, 7), (4,)),
    "conv_resnet decoder": (partial(conv_resnet, hidden=(4, 3)), (4,), (1, 8, 7)),
    "Affine": (lambda: Affine(torch.arange(6.0).reshape(2, 3), 0.5), (2, 3), (2, 3)),
    "Reshape": (Reshape, (2, 3), (3, 2, 1)),
    "Reshape to numbers": (Reshape, (1,), ()),
}


@pytest.fixture(params=list(NETS))
def case(request: pytest.FixtureRequest):
    make, inputs, outputs = NETS[request.param]
    ready = request.param.startswith(("mlp", "Affine"))
    net = make() if ready else make(inputs, outputs)
    return net.eval(), inputs, outputs  # eval: BatchNorm makes rows depend on each other


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
def test_batched_equals_row_by_row(case, lead):
    net, inputs, outputs = case
    x = torch.randn((*lead, *inputs))
    out = net(x)
    assert out.shape == (*lead, *outputs)
    rows = x.reshape((math.prod(lead), *inputs))
    looped = torch.stack([net(row) for row in rows]).reshape(out.shape)
    torch.testing.assert_close(out, looped, rtol=1e-10, atol=1e-10)


def test_every_parameter_receives_a_gradient(case):
    net, inputs, _ = case
    net(torch.randn((2, 5, *inputs), requires_grad=True)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_state_is_tensors(case):
    net, _, _ = case
    assert all(isinstance(value, torch.Tensor) for value in net.state_dict().values())


def test_image_size_comes_back_exactly():
    for height in range(1, 10):
        for width in (1, 4, 7, 28):
            shape = (2, height, width)
            assert CONV((3,), shape)(torch.randn(2, 3)).shape == (2, *shape)
            assert CONV(shape, (3,))(torch.randn(2, *shape)).shape == (2, 3)


def test_batchnorm_normalises_features_where_rows_equal_features():
    x = torch.randn(5, 4, 4) * torch.tensor([1.0, 10.0, 100.0, 1000.0])  # K, B = C, C
    bare, wrapped = nn.BatchNorm1d(4), leading(nn.BatchNorm1d(4), event_dim=1)
    torch.testing.assert_close(wrapped(x), nn.BatchNorm1d(4)(x.reshape(20, 4)).reshape(5, 4, 4))
    spread = wrapped(x).reshape(20, 4).std(0, correction=0)
    torch.testing.assert_close(spread, torch.ones(4), rtol=1e-4, atol=0)
    spread = bare(x).reshape(20, 4).std(0, correction=0)
    assert spread[0] < 0.2 < 1.5 < spread[3]  # the trap: it normalised rows, and said nothing


def test_batchnorm_in_mlp_sees_all_particles():
    net = mlp((3, 4, 2), norm=nn.BatchNorm1d)
    x = torch.randn(6, 4, 3)
    torch.testing.assert_close(net(x), net(x.reshape(24, 3)).reshape(6, 4, 2))


def test_dropout_drops_hidden_units():
    net = mlp((3, 50, 2), dropout=0.5)
    x = torch.randn(4, 3)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_affine_takes_data_to_the_dtype_of_weights(dtype):
    x = torch.tensor([[0, 1], [1, 1]]).to(dtype)
    out = Affine(1.0, 1 / 16)(x)
    assert out.dtype == torch.float64
    assert out.tolist() == [[1, 1 + 1 / 16], [1 + 1 / 16, 1 + 1 / 16]]


def test_affine_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"Affine: came \[3, 1\], wanted \[..., \*\[2\]\]"):
        Affine(torch.zeros(2))(torch.zeros(3, 1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64])
def test_one_hot_equals_torch(dtype):
    x = torch.randint(5, (3, 4, 2))
    wanted = nn.functional.one_hot(x, 5).to(torch.float64)
    assert torch.equal(OneHot(5, 2)(x.to(dtype)), wanted.movedim(-1, 1))
    assert torch.equal(OneHot(5, 0)(x.to(dtype)), wanted)
    assert torch.equal(OneHot(5, 1)(x[0, 0].to(dtype)), wanted[0, 0].T)  # no leading dimension


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: mlp((3,)), "sizes= came"),
        (lambda: Reshape((2, 3), (5,)), "differ in their size"),
        (lambda: convolutional((3,), (4,)), "wanted an image on one side"),
        (lambda: convolutional((8, 8), (8, 8)), "wanted an image on one side"),
        (lambda: convolutional((8, 8), (4,), ()), "at least one hidden stage"),
    ],
)
def test_wrong_shapes_are_refused_in_words(build, match):
    with pytest.raises(ValueError, match=match):
        build()
