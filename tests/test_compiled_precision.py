"""Networks in bfloat16, and what stays in full precision."""

from __future__ import annotations

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import MaskedLinear, PyroModule
from torch import Tensor, nn

from pyro_vae.compiled import PRECISIONS, in_precision, make_step
from pyro_vae.objectives import elbo, iwae
from tests.exact_pairs import OptimalGuide
from tests.small_pairs import X_DIM, Z_DIM, Guide, LinearModel, data


def loss_and_parameters(objective: Any = None) -> tuple[Any, list[nn.Parameter]]:
    torch.manual_seed(0)
    loss = (objective or elbo(2))(LinearModel(), OptimalGuide())
    return loss, list(loss.parameters())


@pytest.fixture
def _float32() -> None:
    torch.set_default_dtype(torch.float32)


class Wide(nn.Module):
    """A Gaussian of many entries, whose density is what bfloat16 can't hold."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(Z_DIM, 64), nn.Tanh(), nn.Linear(64, 784))
        self.met: list[torch.dtype] = []

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(Z_DIM), 1.0).to_event(1))
            loc = self.net(z)
            self.met.append(loc.dtype)
            pyro.sample("x", dist.Normal(loc, 0.3).to_event(1), obs=x)


def wide_pair() -> tuple[Wide, Guide]:
    torch.manual_seed(0)
    return Wide(), Guide(nn.Sequential(nn.Linear(784, 64), nn.Tanh(), nn.Linear(64, 2 * Z_DIM)))


@pytest.mark.usefixtures("_float32")
def test_bf16_adds_less_than_the_draws_do():
    """In nats per row at the same draws; a log density in bfloat16 would be off by nats."""
    pair, x = wide_pair(), 0.3 * data(200, 784)

    def rows(context: Any, seed: int = 1) -> Tensor:
        torch.manual_seed(seed)
        with context:
            return elbo().rows(*pair, x).double()

    full = rows(in_precision("full", x.device))
    noise = float((full - rows(in_precision("full", x.device), seed=2)).std())
    ours = rows(in_precision("bf16", x.device)) - full
    naive = rows(torch.autocast("cpu", torch.bfloat16)) - full
    assert float(ours.abs().max()) > 0.0
    assert float(ours.std()) < 0.02 * noise
    error = float(ours.std()) / len(x) ** 0.5
    assert abs(float(ours.mean())) < 4 * error
    assert abs(float(naive.mean())) > 20 * error


def rounded(layer: nn.Linear, x: Tensor) -> Tensor:
    """What a linear layer gives in bfloat16, by hand."""
    x, weight, bias = (t.bfloat16() for t in (x, layer.weight, layer.bias))
    return nn.functional.linear(x, weight, bias).float()


def logits(*values: float) -> nn.Linear:
    """A layer that returns numbers which bfloat16 holds."""
    layer = nn.Linear(1, len(values))
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor(values))
    return layer


class Probe(nn.Module):
    """Notes what comes in, and multiplies it by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        self.met += [x.dtype, (x @ x.mT).dtype]
        return x


@pytest.mark.usefixtures("_float32")
def test_what_is_in_bf16_and_what_is_not():
    """Linear layers are; other modules, a network's output, parameters, gradients, moments are not."""
    probe = Probe()
    layer = nn.Linear(Z_DIM, 8)
    model = Wide(nn.Sequential(layer, probe, nn.Linear(8, 784)))
    loss = iwae(4, chunk=2)(model, Guide(nn.Linear(784, 2 * Z_DIM)))
    parameters = list(loss.parameters())
    optimizer = torch.optim.Adam(parameters)
    step = make_step(loss, parameters, optimizer, precision="bf16")
    products: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, out: products.append(rounded(layer, *args)))
    layer.register_forward_hook(lambda module, args, out: products.append(out))
    loss(data(5, 784))  # the first run, which looks for sites
    for met in (probe.met, model.met, products):
        met.clear()
    value = step(data(5, 784))
    assert len(products) == 8  # two chunks, each run twice
    assert all(map(torch.equal, products[::2], products[1::2]))
    assert {*probe.met, *model.met} == {torch.float32}
    moments = [t for state in optimizer.state.values() for t in state.values()]
    gradients = [p.grad for p in parameters if p.grad is not None]
    assert {t.dtype for t in [value, *parameters, *gradients, *moments]} == {torch.float32}
    assert len(gradients) == len(parameters)


@pytest.mark.usefixtures("_float32")
@pytest.mark.parametrize(
    ("last", "wanted"),
    [
        (nn.Sigmoid(), torch.sigmoid),
        (nn.Softplus(), nn.functional.softplus),
        (nn.Softmax(-1), lambda x: x.exp() / x.exp().sum(-1, keepdim=True)),
        (nn.LayerNorm(3), lambda x: (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()),
    ],
    ids=["sigmoid", "softplus", "softmax", "norm"],
)
def test_a_nonlinearity_is_not_in_bf16(last: nn.Module, wanted: Any):
    layer = logits(7.0, -9.0, 0.5)
    with in_precision("bf16", torch.device("cpu")):
        out = nn.Sequential(layer, last)(torch.ones(1))
    torch.testing.assert_close(out, wanted(layer.bias), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("_float32")
def test_probabilities_in_bf16():
    """log p(0) at a logit of 7, where a sigmoid in bfloat16 is 1, and its gradient."""
    layer = logits(7.0)
    with in_precision("bf16", torch.device("cpu")):
        log_p = dist.Bernoulli(nn.Sequential(layer, nn.Sigmoid())(torch.ones(1, 1))).log_prob(
            torch.zeros(1, 1)
        )
    log_p.sum().backward()
    assert float(log_p.detach()) == pytest.approx(-7.000912, rel=1e-4)
    assert layer.bias.grad is not None
    assert float(layer.bias.grad) == pytest.approx(-0.999089, rel=0.01)


@pytest.mark.usefixtures("_float32")
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (PyroModule[nn.Linear](3, 2), (4, 3)),  # type: ignore[call-arg, arg-type]
        (MaskedLinear(3, 2, torch.ones(2, 3)), (4, 3)),
        (nn.Conv2d(3, 2, 3), (1, 3, 5, 5)),
        (nn.ConvTranspose1d(3, 2, 3), (1, 3, 5)),
        (nn.GRUCell(3, 2), (4, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_layers_in_bf16(layer: nn.Module, shape: tuple[int, ...]):
    x = data(math.prod(shape), 1).float().reshape(shape)
    layer = copy.deepcopy(layer).float()
    with in_precision("bf16", x.device) as reached:
        out = layer(x)
    error = float((out - layer(x)).detach().abs().max())
    assert reached == [layer]
    assert out.dtype == torch.float32
    assert 0 < error < 0.03


@pytest.mark.usefixtures("_float32")
def test_a_pair_of_functions_in_bf16():
    layer, met = nn.Linear(Z_DIM, X_DIM), []

    def model(x: Tensor) -> None:
        pyro.module("net", layer)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(Z_DIM), 1.0).to_event(1))
            loc = layer(z)
            met.append(torch.equal(loc, rounded(layer, z)))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    parameters = list(layer.parameters())
    loss = elbo()(model, Guide())
    loss(data(5))
    assert met.pop() is False
    met.clear()
    make_step(loss, parameters, torch.optim.SGD(parameters, 0.1), precision="bf16")(data(5))
    assert met == [True]


@pytest.mark.usefixtures("_float32")
def test_a_pair_without_a_layer_to_make_faster():
    class ByHand(Wide):
        def __init__(self) -> None:
            super().__init__(nn.Tanh())
            self.weight = nn.Parameter(torch.ones(Z_DIM))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                loc = self.net(self.weight)
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    loss = elbo()(ByHand(), lambda x: None)
    parameters = list(loss.parameters())
    step = make_step(loss, parameters, torch.optim.SGD(parameters, 0.1), precision="bf16")
    with pytest.raises(ValueError, match=r"precision: came 'bf16' for a pair without a layer"):
        step(data(5, Z_DIM))
    assert bool((parameters[0] == 1.0).all())


@pytest.mark.usefixtures("_float32")
def test_networks_that_return_several_tensors():
    rnn, x = nn.LSTM(3, 4, batch_first=True), torch.randn(2, 5, 3)
    with in_precision("bf16", x.device):
        out, (hidden, cell) = rnn(x)
    error = (out - rnn(x)[0]).detach().abs().max()
    assert {out.dtype, hidden.dtype, cell.dtype} == {torch.float32}
    assert 0 < float(error) < 0.02
    with in_precision("bf16", x.device):
        packed, _ = rnn(
            nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
        )
    assert packed.data.dtype == torch.float32


@pytest.mark.usefixtures("_float32")
def test_an_error_leaves_nothing_in_bf16():
    linear_layer = nn.Linear(3, 3)
    with pytest.raises(RuntimeError), in_precision("bf16", torch.device("cpu")):
        linear_layer(torch.ones(5))
    assert not torch.is_autocast_enabled("cpu")
    with in_precision("bf16", torch.device("cpu")):
        pass
    low = rounded(linear_layer, torch.full((2, 3), 1.001))
    assert not torch.equal(linear_layer(torch.full((2, 3), 1.001)), low)


def test_a_precision_that_is_none():
    loss, parameters = loss_and_parameters()
    for precision, message in (
        ("fp8", r"precision: came 'fp8', wanted one of \['full', 'bf16'\]"),
        ("bf16", r"precision: came 'bf16' for parameters in torch\.float64, wanted float32"),
    ):
        with pytest.raises(ValueError, match=message):
            make_step(loss, parameters, torch.optim.SGD(parameters), precision=precision)


@pytest.mark.gpu
@pytest.mark.usefixtures("_float32")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_on_an_accelerator(precision: str):
    model, guide = wide_pair()
    loss, x = elbo()(model, guide).cuda(), 0.3 * data(200, 784).cuda()
    parameters = list(loss.parameters())
    step = make_step(loss, parameters, torch.optim.Adam(parameters, 1e-2), precision=precision)
    values = [float(step(x)) for _ in range(50)]
    assert values[-1] < values[0] - 10
    assert set(model.met) == {torch.float32}
