"""The step: one for every level, with any optimizer, of one batch or several, in any precision."""

from __future__ import annotations

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
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


class Probe(nn.Module):
    """Notes what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        self.met.append(x.dtype)
        return x


@pytest.mark.usefixtures("_float32")
def test_what_is_in_bf16_and_what_is_not():
    """Activations inside a network are, its output is not, nor parameters, gradients, moments."""
    probe = Probe()
    model = Wide(nn.Sequential(nn.Linear(Z_DIM, 8), probe, nn.Linear(8, 784)))
    loss = iwae(4, chunk=2)(model, Guide(nn.Linear(784, 2 * Z_DIM)))
    parameters = list(loss.parameters())
    optimizer = torch.optim.Adam(parameters)
    step = make_step(loss, parameters, optimizer, precision="bf16")
    loss(data(5, 784))  # the first run, which looks for sites
    for met in (probe.met, model.met):
        met.clear()
    value = step(data(5, 784))
    assert set(probe.met) == {torch.bfloat16}  # in the second run of a chunk, too
    assert set(model.met) == {torch.float32}
    moments = [t for state in optimizer.state.values() for t in state.values()]
    gradients = [p.grad for p in parameters if p.grad is not None]
    assert {t.dtype for t in [value, *parameters, *gradients, *moments]} == {torch.float32}
    assert len(gradients) == len(parameters)


@pytest.mark.usefixtures("_float32")
def test_a_pair_of_functions_in_bf16():
    probe = Probe()
    net = nn.Sequential(nn.Linear(Z_DIM, 8), probe, nn.Linear(8, X_DIM))

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(Z_DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    parameters = list(net.parameters())
    loss = elbo()(model, Guide())
    loss(data(5))
    probe.met.clear()
    make_step(loss, parameters, torch.optim.SGD(parameters, 0.1), precision="bf16")(data(5))
    assert probe.met == [torch.bfloat16]


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
    assert torch.equal(nn.Sequential(linear_layer)(torch.eye(3)), linear_layer(torch.eye(3)))
    probe = Probe()
    nn.Sequential(linear_layer, probe)(torch.eye(3))
    assert probe.met == [torch.float32]


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
