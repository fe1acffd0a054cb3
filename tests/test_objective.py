"""The objective: chunks, weights outside the bound, penalties, plans, refusals, both training faces."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.elbo import ELBO, ELBOModule
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_vae.batch import Batch
from pyro_vae.nn import mlp
from pyro_vae.objectives import (
    Analytic,
    Beta,
    Bound,
    DReG,
    Elbo,
    Estimator,
    FreeBits,
    Jackknife,
    Miwae,
    MonteCarlo,
    Objective,
    Particles,
    Rate,
    Renyi,
    Score,
    Split,
    elbo,
    iwae,
    linear,
    mean_field,
    renyi,
    schedules,
)
from pyro_vae.objectives import objective as objective_module
from pyro_vae.objectives.estimators import get
from pyro_vae.objectives.objective import refusal
from pyro_vae.objectives.particles import run
from pyro_vae.objectives.plan import make_plan
from tests.small_pairs import (
    PAIRS,
    X_DIM,
    Z_DIM,
    Annealed,
    BottomUp,
    Guide,
    LadderModel,
    LinearModel,
    MethodPair,
    Program,
    PyroParamGuide,
    TopDown,
    assert_same,
    batch_norm,
    data,
    flat_gradient,
    parameters,
    value_and_gradient,
)

VR_MAX = Renyi(-math.inf)


# ---------------------------------------------------------------------------------------------
# Chunks

CHUNKED: dict[str, Callable[[int | None], Objective]] = {
    "elbo": lambda chunk: elbo(6, chunk=chunk),
    "elbo stl": lambda chunk: elbo(6, "stl", chunk=chunk),
    "elbo score": lambda chunk: elbo(6, Score(all_sites=True), chunk=chunk),
    "analytic": lambda chunk: mean_field(6, chunk=chunk),
    "iwae": lambda chunk: iwae(6, chunk=chunk),
    "iwae dreg": lambda chunk: iwae(6, "dreg", chunk=chunk),
    "iwae score": lambda chunk: iwae(6, Score(all_sites=True), chunk=chunk),
    "renyi dreg": lambda chunk: renyi(0.5, 6, "dreg", chunk=chunk),
    "vr_max": lambda chunk: renyi(-math.inf, 6, chunk=chunk),
    "iwae dreg beta": lambda chunk: Objective(
        Renyi(), "dreg", Beta(2.0), num_particles=6, chunk=chunk
    ),
}


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("chunk", [1, 2, 4, 100])
def test_chunks_change_neither_value_nor_gradient(name: str, chunk: int):
    """8 rows x 2 dims: 16 draws a particle, which read the same random stream in any chunks."""
    model, guide, x = LinearModel(), Guide(), data(8)
    whole = value_and_gradient(CHUNKED[name](None), model, guide, x)
    parts = value_and_gradient(CHUNKED[name](chunk), model, guide, x)
    assert_same(parts, whole)


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Records what normal distributions draw, or plays what was put into ``play``."""

    class Noise:
        drawn: ClassVar[list[Tensor]] = []
        play: ClassVar[list[Tensor]] = []

    module: Any = torch.distributions.normal
    real = module._standard_normal

    def draw(shape: Any, dtype: Any, device: Any) -> Tensor:
        if Noise.play:
            return Noise.play.pop(0)
        Noise.drawn.append(real(shape, dtype, device))
        return Noise.drawn[-1]

    monkeypatch.setattr(module, "_standard_normal", draw)
    return Noise


@pytest.mark.parametrize("guide", [TopDown, BottomUp])
@pytest.mark.parametrize(
    "beta",
    [1.0, {"z1": 0.5, "z2": 2.0}, {"z1": linear(4, 0.2)}],
    ids=["no beta", "by site", "schedule"],
)
@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_of_several_sites(
    guide: Callable[[], nn.Module], beta: Any, estimator: str, chunk: int, noise: Any
):
    """Against one pass over the same draws."""
    pair, x = (LadderModel(), guide()), data()

    def objective(chunk: int | None) -> Objective:
        return Objective(Renyi(), estimator, Beta(beta), num_particles=4, chunk=chunk)

    objective(chunk).plan(*pair, (x,), {})
    noise.drawn.clear()
    loss = objective(chunk).differentiable_loss(*pair, x)
    drawn = noise.drawn[-2 * (4 // chunk) :]  # the plan's draws came first
    drawn = [draw.reshape(chunk, *draw.shape[-2:]) for draw in drawn]
    gradient = flat_gradient(loss, parameters(*pair))

    whole = objective(None)
    whole.plan(*pair, (x,), {})
    noise.play.extend(torch.cat(drawn[site::2]) for site in range(2))
    wanted = whole.differentiable_loss(*pair, x)
    assert not noise.play
    assert_same(loss, wanted)
    assert_same(gradient, flat_gradient(wanted, parameters(*pair)))


class TwoDimensional(nn.Module):
    """A network that knows rows and nothing before them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 2, f"came {list(x.shape)}"
        out: Tensor = self.net(x)
        return out


def test_one_particle_at_a_time_has_no_particle_dim():
    model, guide, x = LinearModel(), Guide(), data(8)
    model.net = TwoDimensional(model.net)  # type: ignore[assignment]
    with pytest.raises(AssertionError, match=r"came \[4, 8, 2\]") as error:
        iwae(4).differentiable_loss(model, guide, x)
    assert "chunk=1" in error.value.__notes__[0]
    one_by_one = value_and_gradient(iwae(4, "dreg", chunk=1), model, guide, x)
    model.net = model.net.net  # type: ignore[assignment]
    assert_same(one_by_one, value_and_gradient(iwae(4, "dreg"), model, guide, x))


class Peak(TorchDispatchMode):
    """The largest number of bytes in tensors alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}

    def _free(self, key: int, size: int) -> None:
        del self.known[key]
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self.known:
                storage = tensor.untyped_storage()
                size = storage.nbytes()
                free = weakref.finalize(storage, self._free, id(storage), size)
                self.known[id(storage)] = free
                self.now += size
        self.peak = max(self.peak, self.now)
        return out


@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
def test_training_memory_does_not_grow_with_the_particles(estimator: str):
    model, guide, x = LinearModel(), Guide(), data(8)
    model.net = mlp((Z_DIM, 64, 64, X_DIM))  # type: ignore[assignment]

    def peak(particles: int, chunk: int | None) -> int:
        objective = iwae(particles, estimator, chunk=chunk)
        objective.plan(model, guide, (x,), {})
        with pyro.validation_enabled(False), Peak() as memory:
            objective.differentiable_loss(model, guide, x).backward()
        return int(memory.peak)

    one_chunk = peak(64, 64)
    assert peak(1024, 64) < 1.5 * one_chunk
    assert peak(1024, None) > 8 * one_chunk


def test_recomputation_moves_no_buffers_and_no_random_state():
    guide, x = Guide(batch_norm()), data()

    def buffers() -> list[Tensor]:
        return [buffer.clone() for buffer in guide.buffers()]

    before = buffers()
    loss = iwae(6, "dreg", chunk=2).differentiable_loss(LinearModel(), guide, x)
    forward, state = buffers(), torch.get_rng_state()
    loss.backward()
    assert any(not torch.equal(a, b) for a, b in zip(before, forward, strict=True))
    torch.testing.assert_close(buffers(), forward)
    assert torch.equal(torch.get_rng_state(), state)


class Running(nn.Linear):
    """Scales by a number that every run reads and moves, as codebooks with running means do."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__(X_DIM, 2 * Z_DIM)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x) * self.scale.clone()
        if self.training:
            self.scale.mul_(1.3)
        return out


@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
def test_recomputation_sees_the_buffers_of_the_first_run(
    monkeypatch: pytest.MonkeyPatch, estimator: str
):
    results: list[Any] = []
    scales: list[Tensor] = []
    for recomputed in (True, False):
        if not recomputed:
            monkeypatch.setattr(
                objective_module, "checkpoint", lambda function, *inputs, **_: function(*inputs)
            )
        pyro.set_rng_seed(0)
        guide = Guide(Running())
        objective = iwae(4, estimator, chunk=2)
        results.append(value_and_gradient(objective, LinearModel(), guide, data()))
        scales.append(*guide.buffers())
    assert_same(*results)
    assert_same(*scales)


def test_chunks_of_dropout_keep_their_masks():
    """The recomputed pass draws the masks of the first."""
    pair, x = PAIRS["dropout"](), data(8)
    objective = iwae(4, "dreg", chunk=2)
    value, gradient = value_and_gradient(objective, *pair, x)
    step = 1e-6 * gradient / gradient.norm()
    moved = torch.nn.utils.parameters_to_vector(parameters(*pair)).detach() + step
    pathwise = value_and_gradient(iwae(4, chunk=2), *pair, x)[1]
    torch.nn.utils.vector_to_parameters(moved, parameters(*pair))
    difference = value_and_gradient(objective, *pair, x)[0] - value
    torch.testing.assert_close(difference, (pathwise * step).sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_all_particles_of_a_row_look_at_the_same_data(chunk: int | None):
    """A plate that subsamples must not draw other rows for each chunk."""
    x = 5 * data(32)
    model, guide = LinearModel(), Guide()

    def subsampled(program: nn.Module) -> Program:
        def run() -> None:
            with pyro.plate("data", 32, subsample_size=8) as rows:
                if program is guide:
                    pyro.sample("z", guide.posterior(x[rows]))
                else:
                    z = pyro.sample("z", dist.Normal(torch.zeros(Z_DIM), 1.0).to_event(1))
                    loc = model.net(z)
                    pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x[rows])

        return run

    programs = subsampled(model), subsampled(guide)
    results = []
    for each in (chunk, None):
        pyro.set_rng_seed(1)
        loss = iwae(4, chunk=each).differentiable_loss(*programs)
        results.append((loss.detach(), flat_gradient(loss, parameters(model, guide))))
    assert_same(*results)


# ---------------------------------------------------------------------------------------------
# What acts outside the bound


def in_batches(program: nn.Module) -> Program:
    return lambda batch: program(batch["x"])


@pytest.mark.parametrize("objective", [elbo(3), iwae(3), iwae(3, "dreg")], ids=repr)
def test_row_weights_act_outside_the_bound(objective: Objective):
    x, weights = data(), torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0, 3.0])
    model, guide = LinearModel(), Guide()
    programs = in_batches(model), in_batches(guide)

    def result(batch: Batch) -> tuple[Tensor, Tensor]:
        pyro.set_rng_seed(1)
        loss = objective.differentiable_loss(*programs, batch)
        return loss.detach(), flat_gradient(loss, parameters(model, guide))

    value, gradient = result(Batch({"x": x}, weights=weights))
    pyro.set_rng_seed(1)
    rows = objective.rows(*programs, Batch({"x": x}, weights=weights))
    torch.testing.assert_close(value, -(weights * rows).sum())
    assert gradient.abs().max() > 0
    value, gradient = result(Batch({"x": x}, weights=torch.full((6,), 2.0)))
    for ours, plain in zip((value, gradient), result(Batch({"x": x})), strict=True):
        torch.testing.assert_close(ours, 2 * plain)


def test_row_weights_need_rows():
    def model(batch: Batch) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand([6]).to_event(1), obs=batch["x"])

    def guide(batch: Batch) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    batch = Batch({"x": torch.ones(6)}, weights=torch.ones(6))
    with pytest.raises(ValueError, match=r"weights.*plate over rows"):
        elbo().loss(model, guide, batch)


@pytest.mark.parametrize("objective", [elbo(3), iwae(3), renyi(0.5, 3, "dreg")], ids=repr)
def test_the_size_of_the_data_set_acts_outside_the_bound(objective: Objective):
    def program(observed: bool) -> Program:
        def run(x: Tensor, total: int) -> None:
            with pyro.plate("data", total, subsample=torch.arange(len(x))):
                z = pyro.sample("z", dist.Normal(0.3 * torch.ones(()), 1.0))
                if observed:
                    pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

        return run

    model, guide, x = program(True), program(False), torch.tensor([1.0, -2.0])
    values = []
    for total in (2, 20):
        pyro.set_rng_seed(1)
        values.append(objective.loss(model, guide, x, total))
    assert values[1] == pytest.approx(10 * values[0])
    pyro.set_rng_seed(1)
    assert values[0] == pytest.approx(-objective.rows(model, guide, x, 20).sum().item())
    _, rows = objective.loss_and_rows(model, guide, (x, 20), {}, torch.tensor(0))
    assert rows == 20


@pytest.mark.parametrize("objective", [elbo(3), iwae(3), renyi(-1.0, 3, "dreg")], ids=repr)
def test_a_users_scale_on_everything_acts_outside_the_bound(objective: Objective):
    """Read at every call: annealing starts from a scale of 1, where there is nothing to see."""
    model, guide, x = LinearModel(), Guide(), data()

    def scaled(program: nn.Module) -> Program:
        def run(x: Tensor, scale: float) -> None:
            with poutine.scale(scale=scale):
                program(x)

        return run

    programs = scaled(model), scaled(guide)
    values = []
    for scale in (1.0, 0.01, 10.0):
        pyro.set_rng_seed(1)
        values.append(objective.loss(*programs, x, scale))
    assert values == pytest.approx([values[0], 0.01 * values[0], 10 * values[0]])


def test_a_scale_on_some_sites_is_read_at_every_call():
    """The plan saw one scale around everything; later the latents have another."""
    model = Annealed(LinearModel(), {"z": 0.5, "x": 0.5})
    guide = Annealed(Guide(), {"z": 0.5})
    objective, x = elbo(3), data()
    objective.loss(model, guide, x)
    model.scales, guide.scales = {"z": 0.1, "x": 0.5}, {"z": 0.1}
    losses = []
    for each in (objective, elbo(3)):
        pyro.set_rng_seed(1)
        losses.append(each.loss(model, guide, x))
    assert losses[0] == pytest.approx(losses[1])


def test_a_scale_that_is_a_tensor_may_be_1_at_first():
    """The plan must not take it for one that all sites share."""
    model = Annealed(LinearModel(), {"z": torch.tensor(1.0)})
    guide = Annealed(Guide(), {"z": torch.tensor(1.0)})
    objective, x = iwae(3), data()
    objective.loss(model, guide, x)
    losses = []
    for each, beta in ((objective, torch.tensor(0.3)), (iwae(3), 0.3)):
        model.scales, guide.scales = {"z": beta}, {"z": beta}
        pyro.set_rng_seed(1)
        losses.append(each.loss(model, guide, x))
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.parametrize(
    "objective",
    [elbo, mean_field, partial(iwae, 4), partial(iwae, 4, "dreg"), partial(iwae, 4, "score")],
    ids=["elbo", "mean_field", "iwae", "dreg", "score"],
)
@pytest.mark.parametrize("weight", [0.3, linear(10, 2.0, 4.0)], ids=["number", "schedule"])
def test_a_likelihood_counts_as_under_a_scale_of_its_site(objective: Any, weight: Any):
    """Same draws, value and gradient, with a scale in the program and with a weight outside."""
    model, guide, x = LinearModel(), Guide(), data()
    scaled = Annealed(model, {"x": float(schedules.value(weight, torch.tensor(0)))})
    came = []
    for program, options in ((model, {"likelihood_weights": {"x": weight}}), (scaled, {})):
        pyro.set_rng_seed(1)
        loss = objective(**options).differentiable_loss(program, guide, x)
        came.append((loss, *torch.autograd.grad(loss, parameters(model, guide))))
    torch.testing.assert_close(*came)
    pyro.set_rng_seed(1)
    assert objective().loss(model, guide, x) != pytest.approx(came[0][0].item())


def test_a_likelihood_that_is_weighed_is_known():
    objective = elbo(likelihood_weights={"y": 2.0})
    with pytest.raises(ValueError, match=r"sites \['y'\], the model's observed sites are \['x'\]"):
        objective.loss(LinearModel(), Guide(), data())
    with pytest.raises(ValueError, match="likelihood_weights=-1"):
        elbo(likelihood_weights={"x": -1})


class Cliff(LinearModel):
    """Half of the latent space is impossible."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.z_dim]).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), self.log_scale.exp()).to_event(1), obs=x)
            pyro.factor("cliff", torch.where(z[..., 0] > 0, 0.0, -math.inf))


@pytest.mark.parametrize("estimator", ["pathwise", "dreg", Score(all_sites=True)], ids=str)
@pytest.mark.parametrize("chunk", [None, 3])
def test_an_impossible_particle_counts_nothing(estimator: str | Estimator, chunk: int | None):
    objective, model, guide, x = iwae(20, estimator, chunk=chunk), Cliff(), Guide(), data()
    value, gradient = value_and_gradient(objective, model, guide, x)
    pyro.set_rng_seed(1)
    assert value == pytest.approx(-objective.rows(model, guide, x).sum())
    assert gradient.isfinite().all()


@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
def test_rows_are_the_bound_without_gradient(estimator: str):
    objective, (model, guide), x = iwae(5, estimator), PAIRS["one latent"](), data()
    pyro.set_rng_seed(1)
    rows = objective.rows(model, guide, x)
    assert rows.shape == (6,)
    assert not rows.requires_grad
    assert rows.sum() == pytest.approx(-value_and_gradient(objective, model, guide, x)[0])


def test_rows_need_a_plate():
    def model() -> None:
        pyro.sample(
            "x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=torch.ones(())
        )

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="without a plate over rows"):
        elbo().rows(model, guide)


# ---------------------------------------------------------------------------------------------
# Penalties


class Pull(nn.Module):
    """Squared distance of z from a point that is a parameter."""

    def __init__(self, by_row: bool = True) -> None:
        super().__init__()
        self.point, self.by_row = nn.Parameter(torch.ones(Z_DIM)), by_row

    def forward(self, particles: Particles, step: Tensor) -> Tensor:
        square = (particles.samples["z"] - self.point).square().sum(-1)
        return square.mean(0) if self.by_row else square.mean()


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("chunk", [None, 2, 4])
@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
def test_a_penalty_is_nats_per_row(by_row: bool, chunk: int | None, estimator: str):
    """It sees z itself: its gradient is not weighed by DReG's factor."""
    model, guide, x = LinearModel(), Guide(), data(8)
    penalty = Pull(by_row)
    wanted = parameters(model, guide, penalty)

    def result(*penalties: Pull) -> tuple[Tensor, Tensor]:
        pyro.set_rng_seed(1)
        loss = iwae(6, estimator, penalties=penalties, chunk=chunk)(model, guide)(x)
        return loss.detach(), flat_gradient(loss, wanted)

    value, gradient = (a - b for a, b in zip(result(penalty), result(), strict=True))
    pyro.set_rng_seed(1)
    z = guide.posterior(x).rsample((6,))
    by_hand = (z - penalty.point).square().sum(-1).mean(0).sum()
    torch.testing.assert_close(value, by_hand.detach())
    torch.testing.assert_close(gradient, flat_gradient(by_hand, wanted))


def test_a_penalty_that_is_a_module_is_trained():
    model, guide, x, penalty = LinearModel(), Guide(), data(), Pull()
    module = elbo(penalties=[penalty])(model, guide)
    ids = [id(p) for p in module.parameters()]
    assert id(penalty.point) in ids
    assert len(ids) == len(set(ids)) == len(parameters(model, guide)) + 1
    module(x).backward()
    assert penalty.point.grad is not None


def test_a_penalty_that_is_a_module_is_trained_under_svi():
    model, guide, x, penalty = LinearModel(), Guide(), data(), Pull()

    def registered(name: str, program: nn.Module) -> Program:
        return lambda x: pyro.module(name, program)(x)

    objective = elbo(penalties=[penalty])
    adam = Adam({"lr": 0.1})
    svi = SVI(registered("model", model), registered("guide", guide), adam, objective)
    before = penalty.point.detach().clone()
    for _ in range(3):
        svi.step(x)
    assert (penalty.point - before).abs().min() > 0.05


class Labelled(nn.Module):
    """y ~ Bernoulli, z ~ N(2 y, 1/2): a draw with a path below one that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(0.4))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(logits=self.logit.expand(len(x))))
            pyro.sample("z", dist.Normal(2 * y, 0.5))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("estimator", ["score", "vimco"])
def test_a_penalty_trains_what_draws_without_a_path(estimator: str, chunk: int | None):
    """E of the squared mean of z over 4 rows in closed form, against the mean over many draws."""
    guide, x = Labelled(), torch.zeros(4)

    def penalty(particles: Particles, step: Tensor) -> Tensor:
        return particles.samples["z"].mean(1).square().mean()

    def gradient(*penalties: Any) -> Tensor:
        loss = elbo(4, estimator, penalties=penalties, chunk=chunk)(guide.model, guide)(x)
        return torch.autograd.grad(loss, guide.logit)[0]

    found = []
    for seed in range(150):  # the elbo's own gradient cancels: the draws are the same
        torch.manual_seed(seed)
        came = gradient(penalty)
        torch.manual_seed(seed)
        found.append(came - gradient())
    mean, error = torch.stack(found).mean(), torch.stack(found).std() / len(found) ** 0.5
    p = guide.logit.detach().sigmoid().requires_grad_()
    exact = 4 * ((2 * p) ** 2 + (4 * p * (1 - p) + 0.25) / 4)  # summed over rows
    (slope,) = torch.autograd.grad(exact, p)
    assert abs(mean - slope * (p * (1 - p)).detach()) < 4 * error
    assert error < 0.2 * slope


@pytest.mark.parametrize("estimator", ["rws", "enumerate"])
def test_a_penalty_that_would_train_nothing_is_refused(estimator: str):
    objective = Objective(
        Renyi() if estimator == "rws" else None,
        estimator,
        penalties=[lambda *_: torch.zeros(())],
        num_particles=2 if estimator == "rws" else 1,
    )
    with pytest.raises(ValueError, match=f"(?s){estimator}.*penalty"):
        objective.loss(Labelled().model, Labelled(), torch.zeros(4))


def test_a_penalty_may_be_a_function_and_there_may_be_many():
    model, guide, x = LinearModel(), Guide(), data()

    def loss(*penalties: Callable[[Particles, Tensor], Tensor]) -> float:
        pyro.set_rng_seed(1)
        return elbo(penalties=penalties).loss(model, guide, x)

    extra = loss(lambda *_: torch.tensor(1.0), lambda *_: torch.ones(6)) - loss()
    assert extra == pytest.approx(12.0)


# ---------------------------------------------------------------------------------------------
# Plans


def test_an_objective_serves_pairs_of_different_nesting():
    def nested(observed: bool) -> Program:
        def run(x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-2), pyro.plate("features", X_DIM, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                if observed:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        return run

    x = data()
    pairs: list[tuple[Program, Program]] = [
        (LinearModel(), Guide()),
        (nested(True), nested(False)),
    ]
    shared = iwae(3)
    for pair in [*pairs, *pairs]:
        values = []
        for objective in (shared, iwae(3)):
            pyro.set_rng_seed(1)
            values.append(objective.loss(*pair, x))
        assert values[0] == values[1]


class PlainPair:
    """Programs as methods of a plain object."""

    def __init__(self, loc: float) -> None:
        self.loc = loc

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc, 1.0))


def test_two_objects_of_one_class_are_two_pairs():
    objective, x = elbo(), torch.zeros(3)
    near, far = PlainPair(0.0), PlainPair(100.0)
    assert objective.loss(near.model, near.guide, x) < 100
    assert objective.loss(far.model, far.guide, x) > 1e4


def test_labels_may_come_and_go():
    classes, means = 3, torch.tensor([-1.0, 0.5, 2.0])

    def model(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(classes)), obs=y)
            pyro.sample("x", dist.Normal(means[y], 1.0), obs=x)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            if y is None:
                pyro.sample("y", dist.Categorical(torch.ones(classes)))

    x, y = torch.ones(4), torch.tensor([0, 1, 2, 1])
    shared = iwae(3, "score")
    for args in [(x,), (x, y), (x, None), (x, y)]:
        pyro.set_rng_seed(1)
        value = shared.loss(model, guide, *args)
        pyro.set_rng_seed(1)
        assert value == iwae(3, "score").loss(model, guide, *args)
    labelled = dist.Normal(means[y], 1.0).log_prob(x).sum() - 4 * math.log(classes)
    assert shared.loss(model, guide, x, y) == pytest.approx(-labelled.item())


def test_plans_of_throwaway_programs_do_not_pile_up():
    objective, x = elbo(), data()
    for _ in range(100):
        objective.loss(LinearModel(), Guide(), x)
    assert len(objective._plans) <= 64


def test_a_plan_is_made_once_per_kind_of_batch():
    calls = []

    def model(batch: Batch) -> None:
        calls.append(batch)
        with pyro.plate("data", batch.size):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0))

    def guide(batch: Batch) -> None:
        with pyro.plate("data", batch.size):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    objective = elbo()
    for rows in (4, 4, 7):
        objective.loss(model, guide, Batch({"x": torch.ones(rows)}))
    assert len(calls) == 4


# ---------------------------------------------------------------------------------------------
# Refusals

ADMITTED = {"elbo": {"pathwise", "stl", "dreg", "score"}, "iwae": {"pathwise", "dreg", "score"}}
ADMITTED["renyi(0.5)"] = ADMITTED["renyi(-1)"] = ADMITTED["iwae"]
ADMITTED["vr_max"] = {"pathwise", "score"}


@pytest.mark.parametrize("bound", [Elbo(), Renyi(), Renyi(0.5), Renyi(-1.0), VR_MAX], ids=repr)
@pytest.mark.parametrize("estimator", ["pathwise", "stl", "dreg", "score"])
@pytest.mark.parametrize(
    "rate", [MonteCarlo(), Analytic(), Beta(2.0), Beta(2.0, Analytic())], ids=repr
)
def test_every_combination_is_admitted_or_refused_naming_both_parts(
    bound: Bound, estimator: str, rate: Rate
):
    why = refusal(bound, get(estimator), rate, 1)
    if estimator in ADMITTED[repr(bound)] and not (rate.analytic and not bound.linear):
        assert why is None
        assert Objective(bound, estimator, rate).bound is bound
        return
    other = rate if rate.analytic and not bound.linear else get(estimator)
    with pytest.raises(ValueError, match="Objective") as error:
        Objective(bound, estimator, rate)
    assert repr(bound) in str(error.value)
    assert repr(other) in str(error.value)


COUPLED: list[tuple[dict[str, Any], str]] = [
    ({"bound": Renyi()}, "freebits.*no sum over rows.*iwae"),
    ({"estimator": Score(all_sites=True)}, "freebits.*'z' is trained by its score"),
    ({"estimator": "stl", "rate": FreeBits(1.0, rate=MonteCarlo())}, "freebits.*'z'.*Monte Carlo"),
]


@pytest.mark.parametrize(("parts", "message"), COUPLED, ids=[message for _, message in COUPLED])
def test_a_rate_that_couples_rows_is_refused_where_it_would_be_biased(
    parts: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        Objective(**{"rate": FreeBits(1.0, rate=Analytic()), **parts}).loss(
            LinearModel(), Guide(), data()
        )


def test_a_bound_says_how_many_particles_it_needs():
    with pytest.raises(ValueError, match=r"jackknife.*num_particles=1, wanted >= 2"):
        Objective(Jackknife(1))


WEIGHT = (("likelihood", "x", 1), ("prior", "z", 1), ("posterior", "z", -1))


@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
def test_weights_of_the_model_may_vanish_where_those_of_the_guide_do_not(estimator: str):
    """One of two particles weighs less than float32 holds, while the guide's bound takes each alone."""
    model, guide = LinearModel(), Guide()
    with torch.no_grad():
        model.log_scale.fill_(-2.5)  # log weights are hundreds of nats apart
    x = 3 * data(2)
    both = Split(Renyi(0.0), Miwae(2))
    torch.manual_seed(3)
    Objective(both, estimator, num_particles=2)(model, guide)(x).backward()
    came = [parameter.grad for program in (model, guide) for parameter in program.parameters()]
    wanted: list[Tensor] = []
    for program, bound in ((model, Renyi(0.0)), (guide, Miwae(2))):
        torch.manual_seed(3)
        loss = Objective(bound, estimator, num_particles=2)(model, guide)(x)
        wanted += torch.autograd.grad(loss, list(program.parameters()))
    torch.manual_seed(3)
    plan = make_plan(model, guide, (x,), {})
    table = run(model, guide, (x,), {}, plan, 2)
    log_w = sum(getattr(table, name)[site].sum(-1) * sign for name, site, sign in WEIGHT)
    assert (Renyi().weights(log_w) < 1e-45).any()
    for one, other in zip(came, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("numbers", [{"num_particles": 0}, {"num_particles": 2.5}, {"chunk": 0}])
def test_bad_numbers(numbers: dict[str, Any]):
    ((name, number),) = numbers.items()
    with pytest.raises(ValueError, match=f"{name}={number}"):
        elbo(**numbers)


def test_an_analytic_kl_in_a_nonlinear_bound_would_be_no_bound():
    """Why it is refused: log mean p(x | z) - KL exceeds log p(x)."""
    x, particles = torch.tensor(1.0), 100_000
    q = dist.Normal(0.5, 0.5**0.5)  # the exact posterior
    z = q.sample((particles,))
    kl = torch.distributions.kl_divergence(q, dist.Normal(0.0, 1.0))
    value = torch.logsumexp(dist.Normal(z, 1.0).log_prob(x), 0) - math.log(particles) - kl
    assert value > dist.Normal(0.0, 2**0.5).log_prob(x)


class Groups(Bound):
    """A mean of M importance weighted bounds, which states its value and nothing else."""

    def __call__(self, log_w: Tensor) -> Tensor:
        groups = log_w.reshape(2, -1, *log_w.shape[1:])
        return (groups.logsumexp(1) - math.log(groups.shape[1])).mean(0)


@pytest.mark.parametrize("pair", ["one latent", "bottom-up ladder"])
@pytest.mark.parametrize("estimator", ["pathwise", "dreg", Score(all_sites=True)], ids=str)
def test_a_bound_may_leave_everything_to_autodiff(pair: str, estimator: str | Estimator):
    class Plain(Bound):
        def __call__(self, log_w: Tensor) -> Tensor:
            return torch.logsumexp(log_w, 0) - math.log(len(log_w))

    model, guide = PAIRS[pair]()
    results = [
        value_and_gradient(Objective(bound, estimator, num_particles=4), model, guide, data())
        for bound in (Plain(), Renyi())
    ]
    assert_same(*results)


def test_strata_fit_into_a_bound():
    """Derivatives are those of IWAE inside a group, and the groups may lie in several chunks."""
    log_w = torch.randn(6, 4)
    bound = Groups()
    w = torch.cat([torch.softmax(half, 0) for half in log_w.chunk(2)])
    torch.testing.assert_close(bound.weights(log_w), w / 2)
    torch.testing.assert_close(bound.diagonal(log_w), w * (1 - w) / 2)
    torch.testing.assert_close(DReG().path(bound, log_w, 1.0), w.square() / 2)
    model, guide = LinearModel(), Guide()
    results = [
        value_and_gradient(
            Objective(bound, "dreg", num_particles=6, chunk=chunk), model, guide, data(8)
        )
        for chunk in (None, 4)
    ]
    assert_same(*results)


# ---------------------------------------------------------------------------------------------
# The two training faces


def test_it_is_an_elbo_for_pyro():
    objective = iwae(3)
    assert isinstance(objective, ELBO)
    assert isinstance(objective(LinearModel(), Guide()), ELBOModule)
    with pytest.raises(NotImplementedError):
        objective._get_trace(None, None, None, None)


def test_the_module_holds_each_parameter_once():
    pair = MethodPair()
    module = iwae(3)(pair.model, pair.guide)
    assert {id(p) for p in module.parameters()} == {id(p) for p in pair.parameters()}
    assert len(list(module.parameters())) == len(list(pair.parameters()))


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize(
    "make",
    [PAIRS["one latent"], PAIRS["PyroParam"], PAIRS["PyroParam ladder"], PAIRS["BatchNorm ladder"]],
    ids=["one latent", "PyroParam", "PyroParam ladder", "BatchNorm ladder"],
)
def test_training_with_torch_under_both_homes_of_parameters(
    local: bool, make: Callable[[], tuple[Program, Program]]
):
    with pyro.settings.context(module_local_params=local):
        model, guide = make()
        x = data(32)
        module = iwae(4, "dreg", chunk=2)(model, guide)
        before = [p.detach().clone() for p in module.parameters()]
        optimizer = torch.optim.Adam(module.parameters(), lr=0.03)
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            loss = module(x)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert sum(losses[-5:]) < sum(losses[:5])
        for p, old in zip(module.parameters(), before, strict=True):
            assert not torch.equal(p, old)
        if not local:
            stored = {id(p) for p in pyro.get_param_store()._params.values()}
            assert stored <= {id(p) for p in module.parameters()}


def test_both_faces_take_the_same_step():
    """SVI over pyro.module, and torch.optim over the module's parameters."""
    x, results = data(), []
    for face in ("torch", "svi"):
        pyro.set_rng_seed(0)
        model, guide = LinearModel(), Guide()
        objective = iwae(3, "dreg")
        if face == "torch":
            module = objective(model, guide)
            optimizer: Any = torch.optim.Adam(module.parameters(), lr=0.01)
        else:
            svi = SVI(
                lambda x, m=model: pyro.module("m", m)(x),
                lambda x, g=guide: pyro.module("g", g)(x),
                Adam({"lr": 0.01}),
                objective,
            )
        for seed in range(3):
            pyro.set_rng_seed(seed)
            if face == "torch":
                optimizer.zero_grad()
                module(x).backward()
                optimizer.step()
            else:
                svi.step(x)
        results.append(torch.cat([p.detach().flatten() for p in parameters(model, guide)]))
    assert_same(*results)


def test_a_loss_can_stand_beside_other_terms():
    """Recomputing chunks leaves alone what the rest of the graph has saved."""
    guide, model, x, unit = PyroParamGuide(), LinearModel(), data(8), torch.tensor(2.0)
    model.register_buffer("unit", unit)
    loss = iwae(4, chunk=2)(model, guide)(x) + (unit * model.log_scale).square()
    loss.backward()
    assert model.log_scale.grad is not None


def test_without_gradients_there_is_no_graph():
    objective, (model, guide), x = iwae(4, "dreg", chunk=2), PAIRS["one latent"](), data()
    with torch.no_grad():
        assert not objective(model, guide)(x).requires_grad
    assert isinstance(objective.loss(model, guide, x), float)
    assert all(p.grad is None for p in parameters(model, guide))


def test_repr():
    weights = {"x": 3.0, "y": linear(10, 0, 1)}
    parts: Any = {"num_particles": 8, "chunk": 4, "likelihood_weights": weights}
    text = repr(Objective(Renyi(), "dreg", Beta(2.0), [Pull()], **parts))
    assert "likelihood_weights={x: 3.0, y: linear(10, 0, 1)}" in text
    for part in ("iwae", "dreg", "beta(2.0, montecarlo)", "Pull", "chunk=4", "num_particles=8"):
        assert part in text


def test_each_pair_under_svi_has_its_own_step():
    """An objective is a value: warm-up starts anew with the next pair."""
    warm, whole = Objective(rate=Beta(linear(3))), Objective()
    seen = []
    for objective in (warm, warm, whole):
        pyro.set_rng_seed(0)
        model, guide = LinearModel(), Guide()
        pyro.clear_param_store()
        svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), loss=objective)  # type: ignore[attr-defined]
        seen.append([svi.step(data()) for _ in range(4)])
    assert seen[0] == seen[1]
    assert seen[0][0] != pytest.approx(seen[2][0])
    assert seen[0][3] == pytest.approx(seen[2][3])
