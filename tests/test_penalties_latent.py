"""Which latent a penalty looks at, and every penalty inside an objective."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.compiled import make_step
from pyro_vae.nn import mlp
from pyro_vae.objectives import Objective, Renyi, linear
from pyro_vae.objectives.penalties import (
    DIP,
    MMD,
    Adversarial,
    MutualInformation,
    Penalty,
    Sinkhorn,
    SlicedWasserstein,
    TotalCorrelation,
    decomposition,
)
from pyro_vae.objectives.penalties.latent import Latent
from tests.exact_pairs import BatchGuide, LinearBatchModel
from tests.row_pairs import RowPair
from tests.small_pairs import (
    X_DIM,
    Z_DIM,
    Guide,
    LadderModel,
    LinearModel,
    TopDown,
    assert_same,
    data,
    flat_gradient,
    parameters,
    table,
)

STEP = torch.zeros(())
PENALTIES: dict[str, Callable[[], Penalty]] = {
    "MMD": MMD,
    "MMD, linear": lambda: MMD(kernel="imq", estimate="linear"),
    "mutual information": MutualInformation,
    "total correlation": TotalCorrelation,
    "total correlation, stratified": lambda: TotalCorrelation(linear(9), "stratified", total=99),
    "DIP I": lambda: DIP(1.0, kind="I"),
    "DIP II": lambda: DIP(1.0),
    "sliced Wasserstein": SlicedWasserstein,
    "Sinkhorn": lambda: Sinkhorn(iterations=3),
    "against the prior": lambda: Adversarial(mlp((Z_DIM, 4, 1), nn.Tanh)),
    "against the permuted": lambda: Adversarial(mlp((Z_DIM, 4, 1), nn.Tanh), 1.0, "permuted"),
}


class Mean(Penalty):
    def estimate(self, latent: Latent) -> Tensor:
        return latent.draws.mean((0, 2))


def test_the_only_latent_is_the_default_and_the_weight_a_schedule():
    particles = table(LinearModel(), Guide(), data(), number=2)
    z = particles.samples["z"].mean((0, 2))
    assert_same(Mean(2.0)(particles, STEP), 2 * z)
    assert_same(Mean(linear(4))(particles, STEP + 1), z / 4)
    assert_same(Mean(-1.0, site="z")(particles, STEP), -z)


def test_one_of_several_latents_is_named():
    particles = table(LadderModel(), TopDown(), data(), number=2)
    assert_same(Mean(site="z1")(particles, STEP), particles.samples["z1"].mean((0, 2)))
    latent = Latent(particles, "z1", "test")
    torch.manual_seed(0)
    y = latent.from_prior()
    torch.manual_seed(0)
    fn = particles.model["z1"]["fn"]
    assert_same(y, fn.sample())
    with pytest.raises(ValueError, match=r"Mean: came no site, wanted one of .* \['z2', 'z1'\]"):
        Mean()(particles, STEP)
    with pytest.raises(ValueError, match=r"Mean: came site='w', wanted one of"):
        Mean(site="w")(particles, STEP)


def test_what_is_trained_by_its_score_is_refused():
    particles = table(
        LinearModel(), Guide(), data(), number=2, scores=lambda site, reparameterized: True
    )
    with pytest.raises(ValueError, match=r"site 'z' is trained by its score"):
        Mean()(particles, STEP)


def test_repr_says_weight_and_site():
    assert repr(MMD(0.5)) == "MMD(0.5)"
    assert (
        repr(TotalCorrelation(linear(3), site="z")) == "TotalCorrelation(linear(3, 0, 1), site='z')"
    )


# ---------------------------------------------------------------------------------------------
# In an objective


@pytest.mark.parametrize("name", PENALTIES)
def test_steps_of_a_graph_are_those_of_the_program(name: str):
    x = data(8)

    def trained(level: str) -> tuple[str, list[Tensor]]:
        torch.manual_seed(0)
        loss = Objective(penalties=[PENALTIES[name]()])(LinearModel(), Guide())
        wanted = list(loss.parameters())
        step = make_step(loss, wanted, torch.optim.Adam(wanted, lr=0.1), level=level)
        losses = [step(x + i) for i in range(5)]
        assert step.level == level, step.reason
        return step.reason, [*losses, *wanted]

    (reason, ours), (_, by_program) = trained("traced"), trained("eager")
    assert not reason
    for a, b in zip(ours, by_program, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", PENALTIES)
def test_in_single_precision_and_with_particles(name: str):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model, guide, penalty = LinearModel(), Guide(), PENALTIES[name]()
    loss = Objective(penalties=[penalty], num_particles=4, chunk=2)(model, guide)
    loss.step += 1
    plain = Objective(num_particles=4)(model, guide)
    value = loss(data(8))
    assert value.dtype == torch.float32
    assert value.isfinite()
    found, without = (flat_gradient(v, guide.parameters()) for v in (value, plain(data(8))))
    assert found.isfinite().all()
    assert (found - without).abs().max() > 1e-4


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
def test_it_sees_z_itself_and_chunks_change_nothing(estimator: str, chunk: int | None):
    model, guide, x = LinearModel(), Guide(), data(8)
    wanted = parameters(model, guide)

    def result(*penalties: Penalty) -> tuple[Tensor, Tensor]:
        pyro.set_rng_seed(1)
        loss = Objective(Renyi(), estimator, None, penalties, num_particles=4, chunk=chunk)
        value = loss(model, guide)(x)
        return value.detach(), flat_gradient(value, wanted)

    penalty = TotalCorrelation(3.0, "stratified", total=40)
    value, gradient = (a - b for a, b in zip(result(penalty), result(), strict=True))
    pyro.set_rng_seed(1)
    by_hand = 8 * penalty(table(model, guide, x, number=4), STEP)
    assert_same(value, by_hand.detach())
    assert_same(gradient, flat_gradient(by_hand, wanted))


def test_n_is_that_of_the_data_set():
    torch.manual_seed(0)
    model, guide = LinearBatchModel(), BatchGuide()
    found = {}
    for total in (None, 8, 800):
        batch = Batch({"x": data(8, X_DIM)}, total=800 if total is None else 80)
        pyro.set_rng_seed(1)
        particles = table(model, guide, batch, number=1)
        found[total] = decomposition(particles, sampling="stratified", total=total)
    assert_same(found[None], found[800])
    assert (found[8]["total_correlation"] - found[800]["total_correlation"]).abs().max() > 1e-3


def test_rows_whose_latent_is_data_have_no_density():
    z = torch.full((8, Z_DIM), torch.nan)
    z[0] = 0.5
    batch = Batch({"x": data(8, X_DIM), "z": z})
    particles = table(LinearBatchModel(), BatchGuide(), batch, number=2)
    assert_same(Latent(particles, None, "test").draws[:, 0], torch.full((2, Z_DIM), 0.5))
    assert MMD()(particles, STEP).isfinite()
    with pytest.raises(
        ValueError, match=r"TotalCorrelation: site 'z' is data in a part of the rows"
    ):
        TotalCorrelation()(particles, STEP)


def test_one_step_trains_model_guide_and_critic():
    pair = RowPair.random(6, Z_DIM)
    penalty = Adversarial(mlp((Z_DIM, 4, 1), nn.Tanh))
    loss = Objective(penalties=[penalty])(pair.model, pair.guide)
    every = list(loss.parameters())
    before = [p.detach().clone() for p in every]
    ids = {id(p) for p in every}
    assert {id(p) for p in penalty.critic.parameters()} <= ids
    step = make_step(loss, every, torch.optim.SGD(every, lr=0.1), level="eager")
    step(torch.arange(6))
    for old, new in zip(before, every, strict=True):
        assert not torch.equal(old, new)
