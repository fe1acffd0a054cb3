"""Estimators: one value, one expected gradient, or a refusal that names the site."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions import transforms as flows
from torch import Tensor, nn
from torch.nn.functional import dropout

from pyro_vae.compiled import make_step
from pyro_vae.nn import leading, mlp
from pyro_vae.objectives import (
    STL,
    Bound,
    DReG,
    Elbo,
    Estimator,
    Objective,
    Pathwise,
    Renyi,
    Score,
    elbo,
    iwae,
    renyi,
)
from pyro_vae.objectives.baselines import LeaveOneOut
from pyro_vae.objectives.bounds import Split
from pyro_vae.objectives.estimators import OneParticle, WakeSleep, get
from tests.gate.answers import Draw
from tests.gate.cells import cell
from tests.gate.closed_forms import joint
from tests.gate.pairs import ONE_LAYER
from tests.gate.pairs import X as GATE_X
from tests.small_pairs import (
    PAIRS,
    X_DIM,
    Z_DIM,
    Annealed,
    BottomUp,
    FlowGuide,
    Guide,
    LadderModel,
    LinearModel,
    Program,
    TopDown,
    assert_same,
    batch_norm,
    data,
    flat_gradient,
    normal,
    parameters,
    sigmas,
    value_and_gradient,
)

REPEATS, ROWS = 40, 200

COMBINATIONS = [
    *[(elbo, name) for name in ("stl", "dreg", Score(all_sites=True))],
    *[(iwae, name) for name in ("dreg", Score(all_sites=True))],
]


def label(value: Any) -> str | None:
    return getattr(value, "__name__", None) or (
        repr(value) if isinstance(value, Estimator) else None
    )


def test_get():
    names = {
        "pathwise": Pathwise,
        "stl": STL,
        "dreg": DReG,
        "score": Score,
        "vimco": Score,
        "rws": WakeSleep,
        "one_particle": OneParticle,
    }
    assert {name: type(get(name)) for name in names} == names
    vimco: Any = get("vimco")
    assert isinstance(vimco.baseline, LeaveOneOut)
    assert get("vimco") is not vimco  # each has a state of its own
    estimator = Score()
    assert get(estimator) is estimator
    with pytest.raises(ValueError, match="'sticking'"):
        get("sticking")


def test_what_the_path_counts():
    log_w = torch.randn(4, 3)
    w = torch.softmax(log_w, 0)

    def path(bound: Bound, beta: float) -> Any:
        return DReG().path(bound, log_w, beta)

    torch.testing.assert_close(path(Renyi(0.0), 1.0), w * w)
    torch.testing.assert_close(path(Renyi(0.0), 2.0), w * (2 * w - 1))
    tempered = torch.softmax(0.5 * log_w, 0)
    torch.testing.assert_close(path(Renyi(0.5), 1.0), tempered * (0.5 + 0.5 * tempered))
    assert path(Elbo(), 1.0) is None
    for estimator in (Pathwise(), STL(), Score(), WakeSleep(), OneParticle()):
        assert estimator.path(Renyi(0.0), log_w, 1.0) is None


def test_a_guide_with_a_bound_of_its_own():
    """The model's weights are the model's bound's, all that reaches the guide is the other's."""
    log_w = torch.randn(4, 3)
    split = Split(Renyi(0.5), Renyi(0.0))
    for estimator in (Pathwise(), DReG(), Score()):
        assert_same(estimator.weights(split, log_w), Renyi(0.5).weights(log_w))
    w = Renyi(0.0).weights(log_w)
    assert_same(Pathwise().path(split, log_w, 2.0), w)
    assert_same(DReG().path(split, log_w, 2.0), w - 2 * w * (1 - w))
    assert_same(Score().reward(split, log_w, ())[0], Renyi(0.0).reward(log_w))
    centred, _ = Score(baseline=LeaveOneOut()).reward(split, log_w, ())
    assert_same(centred, LeaveOneOut()(Renyi(0.0), log_w, ())[0])
    to_elbo, to_iwae = Split(Renyi(0.0), Elbo()), Split(Elbo(), Renyi(0.0))
    assert_same(DReG().path(to_elbo, log_w, 1.0), torch.full_like(log_w, 0.25))
    assert STL().refusal(to_elbo, 4) is None
    assert "dreg" in str(STL().refusal(to_iwae, 4))
    assert not Score().keeps_score(to_elbo)
    assert Score().keeps_score(to_iwae)
    for other in (WakeSleep(), OneParticle()):
        assert other.refusal(split, 4)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("recipe", "estimator"), COMBINATIONS, ids=label)
def test_the_value_does_not_depend_on_the_estimator(
    pair: str, recipe: Callable[..., Objective], estimator: str | Estimator
):
    model, guide = PAIRS[pair]()
    x = data()
    values = [
        value_and_gradient(recipe(num_particles=3, estimator=e), model, guide, x)[0]
        for e in ("pathwise", estimator)
    ]
    torch.testing.assert_close(*values, atol=1e-10, rtol=1e-10)


def differences(
    pair: tuple[Program, Program], objectives: list[Objective], rows: int = ROWS
) -> Tensor:
    """``[repeats, parameters]`` of gradients at common seeds."""
    x = data(rows)
    return torch.stack(
        [
            torch.sub(*(value_and_gradient(o, *pair, x, seed=seed)[1] for o in objectives))
            for seed in range(REPEATS)
        ]
    )


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    ("recipe", "estimator"), [(elbo, "stl"), (iwae, "dreg")], ids=["elbo-stl", "iwae-dreg"]
)
def test_path_gradients_agree_with_pathwise(
    pair: str, recipe: Callable[..., Objective], estimator: str
):
    objectives = [recipe(num_particles=4, estimator=e) for e in (estimator, "pathwise")]
    difference = differences(PAIRS[pair](), objectives)
    assert difference.abs().max() > 1e-6  # two estimators, not one
    assert sigmas(difference).abs().max() < 5


@pytest.mark.parametrize("pair", ["top-down ladder", "coupling flow", "PyroParam"])
@pytest.mark.parametrize("alpha", [0.5, -1.0])
def test_dreg_for_any_renyi_bound(pair: str, alpha: float):
    objectives = [renyi(alpha, 4, estimator) for estimator in ("dreg", "pathwise")]
    assert sigmas(differences(PAIRS[pair](), objectives)).abs().max() < 5


@pytest.mark.parametrize(
    "scales", [{"z1": 0.3, "z2": 0.3}, {"z1": 0.3}, {"z2": 0.3}, {"z1": 3.0}], ids=str
)
@pytest.mark.parametrize("guide", [TopDown, BottomUp])
def test_dreg_knows_the_users_own_scale(guide: Callable[[], nn.Module], scales: dict[str, float]):
    """KL annealing by hand, ``poutine.scale`` on the latents of both programs, is a beta."""
    pair = Annealed(LadderModel(), scales), Annealed(guide(), scales)
    objectives = [iwae(4, estimator) for estimator in ("dreg", "pathwise")]
    assert sigmas(differences(pair, objectives)).abs().max() < 5


class StoreLadder(nn.Module):
    """Bottom-up, with ``pyro.param`` for what lies above z1."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(X_DIM, 2 * Z_DIM)

    def forward(self, x: Tensor) -> None:
        up = pyro.param("up", lambda: 0.3 * torch.randn(1, Z_DIM))
        scale = pyro.param("scale", torch.tensor([0.6]), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", normal(self.net(x)))
            pyro.sample("z2", dist.Normal(z1 @ up.T, scale).to_event(1))


def test_dreg_holds_what_a_guide_has_in_the_store():
    model, guide, x = LadderModel(), StoreLadder(), data(ROWS)
    guide(x)
    wanted = [*parameters(guide), *pyro.get_param_store()._params.values()]
    gradients = []
    for seed in range(REPEATS):
        pair = []
        for estimator in ("dreg", "pathwise"):
            pyro.set_rng_seed(seed)
            loss = iwae(4, estimator).differentiable_loss(model, guide, x)
            pair.append(flat_gradient(loss, wanted))
        gradients.append(torch.sub(*pair))
    assert sigmas(torch.stack(gradients)).abs().max() < 5


def test_dreg_refuses_scales_that_it_cannot_tell_apart():
    scales = {"z": torch.linspace(0.1, 1.0, 6)}
    pair = Annealed(LinearModel(), scales), Annealed(Guide(), scales)
    assert iwae(4).loss(*pair, data()) > 0
    with pytest.raises(ValueError, match=r"'z'.*not one number.*pathwise"):
        iwae(4, "dreg").differentiable_loss(*pair, data())


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("pair", ["PyroParam", "PyroParam ladder", "methods with pyro.module"])
def test_dreg_under_both_homes_of_parameters(pair: str, local: bool):
    with pyro.settings.context(module_local_params=local):
        objectives = [iwae(4, estimator) for estimator in ("dreg", "pathwise")]
        assert sigmas(differences(PAIRS[pair](), objectives)).abs().max() < 5


@pytest.mark.parametrize("pair", ["one latent", "top-down ladder"])
@pytest.mark.parametrize("recipe", [elbo, iwae])
def test_the_score_agrees_with_the_path(pair: str, recipe: Callable[..., Objective]):
    objectives = [recipe(num_particles=2, estimator=e) for e in (Score(True), "pathwise")]
    assert sigmas(differences(PAIRS[pair](), objectives)).abs().max() < 5


@pytest.mark.parametrize("recipe", [elbo, iwae])
def test_path_gradients_vanish_at_the_exact_posterior(recipe: Callable[..., Objective]):
    model, guide, x = LinearModel(), Guide(), data()
    noise = (2 * model.log_scale).exp().detach()
    w = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])  # orthogonal: the posterior is diagonal
    variance = 1 / (1 + w.square().sum(0) / noise)
    with torch.no_grad():
        model.net.weight.copy_(w)
        model.net.bias.zero_()
        loc, raw_scale = variance[:, None] * w.T / noise, (variance.sqrt() - 0.1).expm1().log()
        weight, bias = guide.parameters()
        weight.copy_(torch.cat([loc, torch.zeros_like(loc)]))
        bias.copy_(torch.cat([torch.zeros(Z_DIM), raw_scale]))
    loss = {}
    for estimator in ("dreg", "pathwise"):
        pyro.set_rng_seed(0)
        loss[estimator] = recipe(num_particles=3, estimator=estimator)(model, guide)(x)
    torch.testing.assert_close(loss["dreg"], -model.evidence(x).sum())
    assert flat_gradient(loss["dreg"], guide.parameters()).abs().max() < 1e-12
    assert flat_gradient(loss["pathwise"], guide.parameters()).abs().max() > 0.1


def test_running_statistics_move_once():
    """The second run of a guide of several sites leaves no trace."""
    buffers = []
    for estimator in ("pathwise", "dreg"):
        pyro.set_rng_seed(0)
        net = batch_norm()
        iwae(3, estimator)(LadderModel(), BottomUp(net))(data()).backward()
        buffers.append(torch.cat([buffer.flatten() for buffer in net.buffers()]))
    torch.testing.assert_close(*buffers)


# ---------------------------------------------------------------------------------------------
# Discrete latents, against enumeration

PRIOR = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
LOGITS = torch.tensor([0.4, -0.2, 0.1], dtype=torch.float64)
X = 0.7


def log_terms(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log q(y), log p(y), log p(x | y) for all y."""
    return logits.log_softmax(0), PRIOR.log(), dist.Normal(MEANS, 1.0).log_prob(torch.tensor(X))


def exact_elbo(logits: Tensor, scale: float) -> Tensor:
    log_q, log_prior, log_p = log_terms(logits)
    return (log_q.exp() * (log_p + scale * (log_prior - log_q))).sum()


def exact_iwae(logits: Tensor, scale: float) -> Tensor:
    log_q, log_prior, log_p = log_terms(logits)
    log_w = log_p + scale * (log_prior - log_q)
    pairs = torch.logaddexp(log_w[:, None], log_w) - torch.tensor(2.0).log()
    return (log_q.exp()[:, None] * log_q.exp() * pairs).sum()


NOWHERE: Any = torch.zeros(30_000, dtype=torch.bool)
ONE = poutine.scale(scale=1.0)
WEIGHED: dict[str, tuple[Any, Callable[[Any], Any], float]] = {
    "plain": (ONE, lambda fn: fn, 1.0),
    "scaled": (poutine.scale(scale=0.2), lambda fn: fn, 0.2),  # KL annealing
    "masked": (poutine.mask(mask=NOWHERE), lambda fn: fn, 0.0),
    "masked distribution": (ONE, lambda fn: fn.mask(NOWHERE), 0.0),
}


@pytest.mark.parametrize("weighed", WEIGHED)
@pytest.mark.parametrize(("recipe", "exact"), [(elbo, exact_elbo), (iwae, exact_iwae)], ids=label)
def test_the_score_of_a_discrete_site(
    weighed: str, recipe: Callable[..., Objective], exact: Callable[[Tensor, float], Tensor]
):
    """A scale or mask weighs what a draw counts; the score of the draw itself stays whole."""
    handler, wrap, scale = WEIGHED[weighed]
    rows = 30_000
    logits = LOGITS.expand(rows, 3).clone().requires_grad_()  # a copy per row: a gradient per row

    def model() -> None:
        with pyro.plate("data", rows):
            with handler:
                y = pyro.sample("y", wrap(dist.Categorical(PRIOR)))
            pyro.sample("x", dist.Normal(MEANS[y], 1.0), obs=torch.full((rows,), X))

    def guide() -> None:
        with pyro.plate("data", rows), handler:
            pyro.sample("y", wrap(dist.Categorical(logits=logits)))

    objective = recipe(num_particles=2, estimator="score")
    loss = objective.differentiable_loss(model, guide)
    (gradients,) = torch.autograd.grad(loss, logits)
    wanted = LOGITS.clone().requires_grad_()
    value = exact(wanted, scale)
    (gradient,) = torch.autograd.grad(value, wanted)
    assert sigmas(gradients + gradient).abs().max() < 5
    assert sigmas(objective.rows(model, guide) - value.detach()).abs() < 5


@pytest.mark.parametrize("sequential", [False, True], ids=["plate at -1", "sequential plate"])
def test_the_score_under_a_subsampled_inner_plate(sequential: bool):
    features = torch.tensor([0.7, -0.3, 1.5, 0.2])
    logits = LOGITS.expand(4, 3).clone().requires_grad_()

    def program(sample_x: bool) -> None:
        def features_of(i: Any, name: str) -> None:
            q = dist.Categorical(probs=PRIOR) if sample_x else dist.Categorical(logits=logits[i])
            y = pyro.sample(f"y{name}", q)
            if sample_x:
                pyro.sample(f"x{name}", dist.Normal(MEANS[y], 1.0), obs=features[i])

        plate: Any = pyro.plate("features", 4, subsample_size=2, dim=None if sequential else -1)
        if sequential:
            for place, i in enumerate(plate):
                features_of(i, str(place))
        else:
            with plate as i:
                features_of(i, "")

    objective = elbo(num_particles=8, estimator="score")
    gradients = []
    for _ in range(300):
        loss = objective.differentiable_loss(lambda: program(True), lambda: program(False))
        gradients.append(torch.autograd.grad(loss, logits)[0])

    log_q = logits.log_softmax(-1)
    log_p = dist.Normal(MEANS, 1.0).log_prob(features[:, None])
    exact = (log_q.exp() * (log_p + PRIOR.log() - log_q)).sum()
    (gradient,) = torch.autograd.grad(exact, logits)
    assert sigmas(torch.stack(gradients) + gradient).abs().max() < 5


def test_the_score_of_a_site_that_only_the_model_draws():
    """Its draw is the proposal: E_p(y)[log p(x | y)] trains p(y) through the score."""
    rows = 30_000
    logits = LOGITS.expand(rows, 3).clone().requires_grad_()

    def model() -> None:
        with pyro.plate("data", rows):
            y = pyro.sample("y", dist.Categorical(logits=logits))
            pyro.sample("x", dist.Normal(MEANS[y], 1.0), obs=torch.full((rows,), X))

    def guide() -> None:
        pass

    with pytest.raises(ValueError, match=r"'y'.*score"):
        elbo().differentiable_loss(model, guide)
    loss = elbo(num_particles=2, estimator="score").differentiable_loss(model, guide)
    wanted = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((wanted.softmax(0) * log_terms(wanted)[2]).sum(), wanted)
    assert sigmas(torch.autograd.grad(loss, logits)[0] + gradient).abs().max() < 5


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("chunk", [None, 60])
def test_the_score_of_rows_on_which_a_global_latent_depends(every: bool, chunk: int | None):
    """The guide draws g given all y: a row's draw moves g and, through it, the other rows."""
    x, b, w = torch.tensor([0.3, -1.2, 1.5]), torch.tensor(0.3), torch.tensor(0.8)
    nodes, weights = map(torch.as_tensor, np.polynomial.hermite_e.hermegauss(40))

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([0.4, -0.3, 0.2]))

        def forward(self) -> None:
            with pyro.plate("data", 3):
                y = pyro.sample("y", dist.Bernoulli(logits=self.logits))
            pyro.sample("g", dist.Normal(w * y.mean(-1, keepdim=y.dim() > 1), 0.7))

    def model() -> None:
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            y = pyro.sample("y", dist.Bernoulli(logits=b))
            pyro.sample("x", dist.Normal(g + 2 * y, 1.0), obs=x)

    guide = Mean()
    q, total = dist.Bernoulli(logits=guide.logits), torch.zeros(())
    for y in torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3):
        log_q, q_g = q.log_prob(y).sum(), dist.Normal(w * y.mean(), 0.7)
        g = q_g.mean + 0.7 * nodes
        fit = dist.Normal(g[:, None] + 2 * y, 1.0).log_prob(x).sum(-1)
        log_p = dist.Normal(0.0, 1.0).log_prob(g) + dist.Bernoulli(logits=b).log_prob(y).sum() + fit
        inner = (weights * (log_p - q_g.log_prob(g))).sum() / weights.sum()
        total = total + log_q.exp() * (inner - log_q)
    (exact,) = torch.autograd.grad(-total, guide.logits)
    objective = elbo(200, Score(every), chunk=chunk)
    losses = [objective.differentiable_loss(model, guide) for _ in range(60)]
    gradients = torch.stack([torch.autograd.grad(loss, guide.logits)[0] for loss in losses])
    assert sigmas(gradients - exact).abs().max() < 5


def test_a_point_keeps_its_path_under_the_score():
    """It has no score: with ``all_sites`` its parameters would get no gradient."""
    pair = LinearModel(), MovingPoint()
    results = [
        value_and_gradient(elbo(2, estimator), *pair, data())
        for estimator in (Score(all_sites=True), "pathwise")
    ]
    assert_same(*results)


def test_a_score_beside_a_path():
    """y by its score, z | y by its path: the same gradient as when both take the score."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(Z_DIM + 3, X_DIM)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                y = pyro.sample("y", dist.OneHotCategorical(PRIOR))
                z = pyro.sample("z", dist.Normal(torch.zeros(Z_DIM), 1.0).to_event(1))
                loc = self.net(torch.cat([z, y], -1))
                pyro.sample("x", dist.Normal(loc, 0.8).to_event(1), obs=x)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classes, self.net = nn.Linear(X_DIM, 3), nn.Linear(3, Z_DIM)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                y = pyro.sample("y", dist.OneHotCategorical(logits=self.classes(x)))
                pyro.sample("z", dist.Normal(self.net(y), 0.7).to_event(1))

    pair = Model(), Both()
    objectives = [elbo(num_particles=2, estimator=Score(all_sites)) for all_sites in (False, True)]
    assert sigmas(differences(pair, objectives, rows=100)).abs().max() < 5


# ---------------------------------------------------------------------------------------------
# One particle


def test_one_particle_is_drawn_in_proportion_to_its_weight():
    log_w = torch.tensor([0.5, -1.0, 1.5, -math.inf])[:, None].expand(4, 20_000)
    for bound in (Renyi(0.0), Renyi(-1.0)):
        drawn = OneParticle().weights(bound, log_w)
        assert_same(drawn.sum(0), torch.ones(20_000))
        assert ((drawn == 0) | (drawn == 1)).all()
        assert drawn[3].sum() == 0
        assert sigmas((drawn - bound.weights(log_w))[:3].T).abs().max() < 4
    assert_same(OneParticle().weights(Elbo(), log_w[:3]).sum(0), torch.ones(20_000))


@pytest.mark.parametrize(
    ("recipe", "pair"), [(elbo, "one latent"), (iwae, "top-down ladder")], ids=label
)
def test_one_particle_agrees_with_pathwise(recipe: Callable[..., Objective], pair: str):
    objectives = [recipe(num_particles=4, estimator=e) for e in ("one_particle", "pathwise")]
    difference = differences(PAIRS[pair](), objectives)
    assert difference.abs().max() > 1e-3
    assert sigmas(difference).abs().max() < 5


def test_one_particle_refuses_weights_that_are_no_probabilities():
    class Signed(Bound):
        positive = False

    with pytest.raises(ValueError, match=r"one_particle.*signed.*probabilities.*pathwise"):
        Objective(Signed(), "one_particle", num_particles=3)


# ---------------------------------------------------------------------------------------------
# Wake-sleep


def wake(particles: int) -> Tensor:
    """The expected update of the guide of ``ONE_LAYER``, by quadrature over two particles, or
    for ``particles=0``, of infinitely many: minus the gradient of KL(p(z | x) || q(z | x))."""
    pair = ONE_LAYER
    values = {n: torch.tensor(v) for n, v in {**pair.model_values, **pair.guide_values}.items()}
    own = [values[name].requires_grad_() for name in pair.guide_values]
    loc = values["a0"] * GATE_X[0] + values["a1"] * GATE_X[1] + values["c"]
    if particles == 0:
        posterior = joint(pair, values).given({"x0": GATE_X[0], "x1": GATE_X[1]}).of(["z"])
        p = dist.Normal(posterior.mean[0], posterior.covariance[0, 0].sqrt())
        q = dist.Normal(loc, values["r"].exp())
        divergence = torch.distributions.kl_divergence(p, q)
        return -torch.stack(torch.autograd.grad(divergence, own))
    noise, weights = map(torch.as_tensor, np.polynomial.hermite_e.hermegauss(100))
    chance = weights / weights.sum()
    terms = pair.terms(values, [noise])
    log_w = (terms.likelihood - terms.rate["z"]).detach()
    share = torch.sigmoid(log_w[:, None] - log_w)  # of the first of two
    z = (loc + values["r"].exp() * noise).detach()
    log_q = dist.Normal(loc, values["r"].exp()).log_prob(z)
    return torch.stack(torch.autograd.grad(2 * (chance * (share @ chance)) @ log_q, own))


def test_the_wake_update_of_two_particles():
    """The guide's is that of quadrature, and not the bound's; the model's is the bound's."""
    two = cell(ONE_LAYER, "iwae", WakeSleep())
    names = ONE_LAYER.model_values
    draw = Draw(two, 30_000)
    gradients = draw.block()[1].T
    of_model, of_guide = gradients[:, : len(names)], gradients[:, len(names) :]
    of_bound = two.exact().gradient
    assert sigmas(of_model - of_bound[: len(names)]).abs().max() < 5
    assert sigmas(of_guide - wake(2)).abs().max() < 5
    assert sigmas(of_guide - of_bound[len(names) :]).abs().max() > 10


def test_the_wake_update_of_many_particles_follows_the_forward_kl():
    limit = wake(0)
    assert (wake(2) - limit).norm() > 0.3 * limit.norm()
    draw = Draw(cell(ONE_LAYER, "iwae", WakeSleep(), particles=500), 400)
    update = draw.block()[1].T[:, len(ONE_LAYER.model_values) :].mean(0)
    assert (update - limit).norm() < 0.03 * limit.norm()


def test_wake_sleep_trains_discrete_and_continuous_sites_alike():
    """At the posterior nothing but noise is left, whose mean is 0."""
    logits = (PRIOR.log() + dist.Normal(MEANS, 1.0).log_prob(torch.tensor(X))).log_softmax(0)
    rows = 20_000
    held = logits.expand(rows, 3).clone().requires_grad_()

    def model() -> None:
        with pyro.plate("data", rows):
            y = pyro.sample("y", dist.Categorical(PRIOR))
            pyro.sample("x", dist.Normal(MEANS[y], 1.0), obs=torch.full((rows,), X))

    def guide() -> None:
        with pyro.plate("data", rows):
            pyro.sample("y", dist.Categorical(logits=held))

    loss = iwae(3, "rws").differentiable_loss(model, guide)
    (gradients,) = torch.autograd.grad(loss, held)
    assert gradients.std() > 0.1
    assert sigmas(gradients).abs().max() < 4


def test_wake_sleep_refuses_what_has_no_importance_weights():
    with pytest.raises(ValueError, match=r"rws.*iwae.*num_particles=1.*>= 2"):
        iwae(1, "rws")
    with pytest.raises(ValueError, match=r"rws.*elbo.*use the iwae"):
        elbo(4, "rws")


@pytest.mark.parametrize("estimator", ["one_particle", "rws"])
def test_traced_steps_are_eager_ones(estimator: str):
    """What is drawn between particles is a part of the graph."""
    results = []
    for level in ("eager", "traced"):
        pyro.set_rng_seed(0)
        loss = iwae(3, estimator)(LinearModel(), Guide())
        own = list(loss.parameters())
        step = make_step(loss, own, torch.optim.SGD(own, 0.1), level=level)
        results.append([*(step(data(6, seed=i)) for i in range(4)), *own])
        assert step.level == level
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced)


# ---------------------------------------------------------------------------------------------
# Refusals


def several_sites(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(torch.zeros(Z_DIM), 1.0).to_event(1))
        pyro.sample("z2", dist.Normal(z1[..., :1], 1.0).to_event(1))


class DiscreteGuide(Guide):
    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            q = dist.MultivariateNormal(self.net(x)[..., :Z_DIM], torch.eye(Z_DIM))
            pyro.sample("z", q.has_rsample_(False))


class MovingPoint(Guide):
    """A point that a network moves, as in a maximum a posteriori estimate."""

    def posterior(self, x: Tensor) -> Any:
        return dist.Delta(self.net(x)[..., :Z_DIM], event_dim=1)


class ScaledDraw(Guide):
    """z = s u with an auxiliary u, and a learned s."""

    def __init__(self) -> None:
        super().__init__()
        self.log_s = nn.Parameter(torch.zeros(Z_DIM))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", self.posterior(x), infer={"is_auxiliary": True})
            density = -self.log_s.sum().expand(u.shape[:-1])
            pyro.sample("z", dist.Delta(self.log_s.exp() * u, density, event_dim=1))


class FunctionalDropout(nn.Linear):
    """Dropout that no module shows."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(super().forward(x), 0.5, self.training)


def borrowed() -> Program:
    """A guide whose upper network is not among its submodules."""
    guide: Any = BottomUp()
    up, guide.up = guide.up, nn.Identity()
    guide.up.forward = up.forward
    return guide  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Callable[[], tuple[Program, Program]], tuple[str, ...], str]] = {
    "point with parameters": (
        lambda: (LinearModel(), MovingPoint()),
        ("stl", "dreg"),
        "'z'.*parameters of its own.*pathwise",
    ),
    "transformed draw with parameters": (
        lambda: (LinearModel(), ScaledDraw()),
        ("stl", "dreg"),
        "'z'.*parameters of its own.*pathwise",
    ),
    "functional dropout in a guide of several sites": (
        lambda: (LadderModel(), BottomUp(FunctionalDropout(X_DIM, 2 * Z_DIM))),
        ("stl", "dreg"),
        "'z1'.*run to run.*pathwise",
    ),
    "a network that the guide does not own": (
        lambda: (LadderModel(), borrowed()),
        ("stl", "dreg"),
        "'z2'.*not the guide module's own.*pathwise",
    ),
    "planar flow": (
        lambda: (LinearModel(), FlowGuide(lambda: flows.planar(2))),
        ("stl", "dreg"),
        "'z'.*no inverse.*pathwise",
    ),
    "dropout in a guide of several sites": (
        lambda: (LadderModel(), BottomUp(mlp((X_DIM, 4, 2 * Z_DIM), dropout=0.5))),
        ("stl", "dreg"),
        r"'z2'.*dropout \(net.2\).*pathwise",
    ),
    "function of several sites": (
        lambda: (LadderModel(), several_sites),
        ("stl", "dreg"),
        "'z2'.*must be a module.*pathwise",
    ),
    "no rsample": (
        lambda: (LinearModel(), DiscreteGuide()),
        ("pathwise", "stl", "dreg"),
        "'z'.*no rsample.*score",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_the_first_call(case: str):
    make, names, message = REFUSED[case]
    model, guide = make()
    for name in names:
        with pytest.raises(ValueError, match=message):
            elbo(estimator=name).differentiable_loss(model, guide, data())


class MaskedModel(LinearModel):
    """The latent counts in some rows only; the data always, or where it does."""

    def __init__(self, everywhere: bool) -> None:
        super().__init__()
        self.everywhere = everywhere

    def forward(self, x: Tensor) -> None:
        counts: Any = x[:, 0] > 0
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=counts):
                z = pyro.sample("z", dist.Normal(torch.zeros(Z_DIM), 1.0).to_event(1))
            with poutine.mask(mask=counts | self.everywhere):
                pyro.sample("x", dist.Normal(self.net(z), 0.8).to_event(1), obs=x)


class MaskedGuide(Guide):
    def posterior(self, x: Tensor) -> Any:
        return super().posterior(x).mask(x[:, 0] > 0)


def test_dreg_refuses_a_masked_latent_that_counts_elsewhere():
    """There log q is no part of log w, and the gradient that arrives is whole."""
    x = data(ROWS)
    with pytest.raises(ValueError, match=r"'z'.*masked where other densities depend.*pathwise"):
        iwae(3, "dreg").differentiable_loss(MaskedModel(True), MaskedGuide(), x)
    elbo(3, "stl").differentiable_loss(MaskedModel(True), MaskedGuide(), x)
    objectives = [iwae(4, estimator) for estimator in ("dreg", "pathwise")]
    pair = MaskedModel(False), MaskedGuide()
    assert sigmas(differences(pair, objectives)).abs().max() < 5


def test_dreg_refuses_rows_that_depend_on_each_others_draws():
    """BatchNorm in a decoder: the factor is that of one row, the gradient comes from all."""
    model: Any = LinearModel()
    norm, x = leading(nn.BatchNorm1d(4), 1), data()
    model.net = nn.Sequential(nn.Linear(Z_DIM, 4), norm, nn.Linear(4, X_DIM))
    with pytest.raises(ValueError, match=r"'z'.*other rows depend on its draw.*pathwise"):
        iwae(3, "dreg").differentiable_loss(model, Guide(), x)
    for objective in (elbo(3, "stl"), iwae(3)):
        objective.differentiable_loss(model, Guide(), x)
    model.eval()
    iwae(3, "dreg").differentiable_loss(model, Guide(), x)


def test_what_is_refused_in_training_is_right_in_evaluation():
    """Dropout that is off draws no second mask."""
    model, guide = LadderModel(), BottomUp(mlp((X_DIM, 4, 2 * Z_DIM), dropout=0.5))
    module = iwae(3, "dreg")(model, guide)
    module.eval()
    assert module(data()).requires_grad
    module.train()
    with pytest.raises(ValueError, match="dropout"):
        module(data())


@pytest.mark.parametrize("estimator", ["pathwise", "stl", "dreg", "score"])
@pytest.mark.parametrize("recipe", [elbo, iwae])
def test_a_guide_that_draws_nothing(estimator: str, recipe: Callable[..., Objective]):
    if (recipe, estimator) == (iwae, "stl"):
        return

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(X_DIM))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.loc, 1.0).to_event(1), obs=x)

    model, x = Plain(), data()
    loss = recipe(num_particles=3, estimator=estimator)(model, nn.Identity())(x)
    torch.testing.assert_close(loss, -dist.Normal(0.0, 1.0).log_prob(x).sum())
    torch.testing.assert_close(flat_gradient(loss, parameters(model)), -x.sum(0))
