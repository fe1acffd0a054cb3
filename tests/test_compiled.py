"""The step: one for every level, with any optimizer, of one batch or several, in any precision."""

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

from pyro_vae.batch import Batch
from pyro_vae.compiled import LEVELS, PRECISIONS, in_precision, make_step
from pyro_vae.objectives import beta_vae, elbo, iwae
from pyro_vae.objectives.schedules import linear
from tests.exact_pairs import OptimalGuide
from tests.small_pairs import X_DIM, Z_DIM, Guide, LinearModel, data


def loss_and_parameters(objective: Any = None) -> tuple[Any, list[nn.Parameter]]:
    torch.manual_seed(0)
    loss = (objective or elbo(2))(LinearModel(), OptimalGuide())
    return loss, list(loss.parameters())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_steps_are_those_of_a_loop_by_hand(level: str, clip: float | None):
    x = data(8)
    loss, parameters = loss_and_parameters(iwae(3))
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    step = make_step(loss, parameters, optimizer, scheduler, clip, level)
    torch.manual_seed(1)
    came = [step(x) for _ in range(5)]

    loss, wanted = loss_and_parameters(iwae(3))
    torch.manual_seed(1)
    by_hand = torch.optim.Adam(wanted, lr=0.1)
    for i in range(5):
        by_hand.param_groups[0]["lr"] = 0.1 * 0.5 ** (i // 2)
        by_hand.zero_grad()
        per_row = loss(x) / len(x)
        per_row.backward()
        if clip is not None:
            norm = torch.stack([p.grad.norm() for p in wanted]).norm()  # type: ignore[union-attr]
            for p in wanted:
                p.grad.mul_(min(1.0, clip / (float(norm) + 1e-6)))  # type: ignore[union-attr]
        by_hand.step()
        torch.testing.assert_close(came[i], per_row.detach())
        assert not came[i].requires_grad
    for p, q in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("level", LEVELS)
def test_lbfgs(level: str):
    """An optimizer that evaluates the loss several times a step; the first value is reported."""
    x = data(8)
    loss, parameters = loss_and_parameters()
    before = copy.deepcopy(loss)
    step = make_step(loss, parameters, torch.optim.LBFGS(parameters, max_iter=5), level=level)
    torch.manual_seed(1)
    value = step(x)
    torch.manual_seed(1)
    torch.testing.assert_close(value, before(x).detach() / 8)
    assert any(not torch.equal(p, q) for p, q in zip(parameters, before.parameters(), strict=True))


@pytest.mark.parametrize("level", LEVELS)
def test_a_module_that_is_not_used_is_left_alone(level: str):
    loss, parameters = loss_and_parameters()
    unused = nn.Parameter(torch.ones(2))
    every = [*parameters, unused]
    step = make_step(loss, every, torch.optim.SGD(every, 0.1, weight_decay=1.0), None, 1.0, level)
    step(data(4))
    assert unused.tolist() == [1.0, 1.0]


def test_unknown_level():
    loss, parameters = loss_and_parameters()
    with pytest.raises(ValueError, match=r"'turbo'.*'auto'"):
        make_step(loss, parameters, torch.optim.SGD(parameters), level="turbo")


def test_the_gradient_of_the_last_step_is_not_in_the_next():
    loss, parameters = loss_and_parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    step = make_step(loss, parameters, optimizer)

    def gradient() -> list[Tensor]:
        torch.manual_seed(3)
        step(data(4))
        return [p.grad.clone() for p in parameters]  # type: ignore[union-attr]

    for a, b in zip(gradient(), gradient(), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------
# Several batches a step


class Marginal(LinearModel):
    """x from its marginal: a loss and a gradient that no draw enters."""

    def forward(self, rows: Any) -> None:
        x = rows["x"] if isinstance(rows, Batch) else rows
        w, noise = self.net.weight, torch.eye(X_DIM) * (2 * self.log_scale).exp()
        with pyro.plate("data", len(x)):
            cov = w @ w.T + noise
            pyro.sample("x", dist.MultivariateNormal(self.net.bias, cov), obs=x)


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("sizes", [[4, 4], [3, 3, 2], [7, 1]])
def test_batches_of_any_size_make_the_step_of_one_large_batch(
    sizes: list[int], name: str, clip: float | None
):
    x, found = data(8), []
    for batches in ([x], x.split(sizes)):
        torch.manual_seed(0)
        loss = elbo()(Marginal(), lambda x: None)
        parameters = list(loss.parameters())
        step = make_step(loss, parameters, OPTIMIZERS[name](parameters), clip=clip)
        values = [float(step(*batches)) for _ in range(3)]
        found.append((values, [p.detach().clone() for p in parameters]))
    (value, large), (others, small) = found
    assert others == pytest.approx(value, rel=1e-12)
    for p, q in zip(large, small, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_row_weights_in_batches():
    weights = torch.tensor([0.0, 1.0, 2.0, 1.5, 0.5])
    batch, found = Batch({"x": data(5)}, weights=weights), []
    for cuts in ([slice(0, 5)], [slice(0, 2), slice(2, 4), slice(4, 5)]):
        torch.manual_seed(0)
        loss = elbo()(Marginal(), lambda batch: None)
        parameters = list(loss.parameters())
        step = make_step(loss, parameters, torch.optim.SGD(parameters, lr=0.1))
        value = step(*(batch.rows(cut) for cut in cuts))
        found.append(torch.cat([value[None], *(p.detach().flatten() for p in parameters)]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("number", [1, 3])
def test_schedules_count_steps_of_the_optimizer(number: int, name: str):
    """Not evaluations of the loss, of which there are several in each."""
    loss, parameters = loss_and_parameters(beta_vae(linear(10)))
    step = make_step(loss, parameters, OPTIMIZERS[name](parameters))
    for taken in range(1, 4):
        step(*data(6).split(6 // number))
        assert int(loss.step) == taken


# ---------------------------------------------------------------------------------------------
# Precision


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
