"""Bounds: their values, and weights, diagonal and reward against autodiff."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.objectives.bounds import (
    Bound,
    Cubo,
    Elbo,
    Jackknife,
    Miwae,
    Mix,
    Renyi,
    Split,
    Thermodynamic,
)
from tests.small_pairs import sigmas

IWAE = Renyi(0.0)
VR_MAX = Renyi(-math.inf)
LOWER = [
    *(Elbo(), IWAE, Renyi(0.5), Renyi(2.0), Renyi(0.999)),
    *(Miwae(2), Miwae(2, Renyi(0.5)), Mix((0.3, Elbo()), (0.7, IWAE)), Split(IWAE, Miwae(2))),
    *(Thermodynamic(4), Thermodynamic((0, 0.3, 1))),
]
NO_BOUND = [Renyi(-1.0), Cubo(3.0), Mix((2, IWAE), (-1, Elbo())), Thermodynamic(2, right=True)]
JACKKNIFES = [Jackknife(order) for order in (0, 1, 2)]
SMOOTH: list[Bound] = [*LOWER, *NO_BOUND, *JACKKNIFES]
EVERY = [*SMOOTH, VR_MAX, Miwae(2, VR_MAX)]


def log_weights(particles: int = 6, rows: int = 4, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(particles, rows) - 3


def extremes(particles: int) -> Tensor:
    """Equal weights, usual ones, 200 nats from first to last, two equal ones 200 nats above."""
    spread = torch.linspace(-200, 0, particles)[torch.randperm(particles)]
    two = torch.where(torch.arange(particles) < 2, 0.0, -200.0)
    return torch.stack([torch.full((particles,), -3.0), torch.randn(particles), spread, two], 1)


@pytest.mark.parametrize("bound", SMOOTH, ids=repr)
@pytest.mark.parametrize("particles", ["fewest", 6])
def test_closed_forms_equal_autodiff(bound: Bound, particles: Any):
    log_w = extremes(bound.min_particles if particles == "fewest" else particles)
    close: Any = {"atol": 1e-10, "rtol": 1e-10}
    torch.testing.assert_close(bound.weights(log_w), Bound.weights(bound, log_w), **close)
    torch.testing.assert_close(bound.diagonal(log_w), Bound.diagonal(bound, log_w), **close)


@pytest.mark.parametrize("bound", EVERY, ids=repr)
def test_what_all_particles_share_adds_up(bound: Bound):
    """All their numbers sum to 1, so a constant in log w is one in the bound."""
    log_w = extremes(6)
    torch.testing.assert_close(bound.weights(log_w).sum(0), torch.ones(4))
    torch.testing.assert_close(bound(log_w + 1e4), bound(log_w) + 1e4)


@pytest.mark.parametrize("bound", EVERY, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_impossible_particle_leaves_finite_weights(bound: Bound, dtype: torch.dtype):
    """They are those of a particle that is nearly impossible; the bound itself may be infinite."""
    log_w = extremes(6).to(dtype)
    log_w[3] = -math.inf
    nearly = log_w.clamp(min=-1e7)
    assert not bound(log_w).isnan().any()
    for closed_form in (bound.weights, bound.diagonal):
        torch.testing.assert_close(closed_form(log_w), closed_form(nearly), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bound", EVERY, ids=repr)
def test_where_all_are_impossible_so_is_the_row(bound: Bound):
    """Or those of a group, or of a subset."""
    log_w = torch.full((6, 2), -math.inf)
    log_w[0, 1] = 0.0
    assert not bound(log_w)[0].isfinite()
    assert bound.weights(log_w).isfinite().all()
    assert bound.diagonal(log_w).isfinite().all()


def test_closed_forms_survive_weights_that_underflow():
    log_w = torch.tensor([[0.0], [-5000.0]])
    assert IWAE.diagonal(log_w).flatten().tolist() == [0, 0]
    assert IWAE(log_w - 1e5) == pytest.approx(-1e5 - math.log(2))


@pytest.mark.parametrize("bound", EVERY, ids=repr)
def test_traced_equals_eager(bound: Bound):
    """Recorded at one draw, replayed at another: nothing was read from the first."""

    def everything(log_w: Tensor) -> list[Tensor]:
        return [f(log_w) for f in (bound, bound.weights, bound.diagonal, bound.reward)]

    graph = make_fx(everything)(log_weights())
    constants = [node for node in graph.graph.nodes if node.op == "get_attr"]
    assert constants == []  # that would have to be copied to the device
    log_w = log_weights()
    torch.testing.assert_close(graph(log_w), everything(log_w))


@pytest.mark.parametrize("bound", [*LOWER, *NO_BOUND, VR_MAX, Jackknife(0)], ids=repr)
def test_one_particle_is_the_elbo(bound: Bound):
    if bound.min_particles == 1:
        log_w = log_weights(1)
        torch.testing.assert_close(bound(log_w), log_w[0])
        torch.testing.assert_close(bound.weights(log_w), torch.ones(1, 4))
        torch.testing.assert_close(bound.diagonal(log_w), torch.zeros(1, 4))


# ---------------------------------------------------------------------------------------------
# What is guaranteed


@pytest.mark.parametrize("bound", [*LOWER, *NO_BOUND, VR_MAX], ids=repr)
def test_the_guarantee_holds_at_few_particles(bound: Bound):
    """Log-normal weights with E[w] = 1: a lower bound must not exceed log 1 = 0 on average."""
    log_w = torch.randn(4, 20_000) - 0.5
    excess = sigmas(bound(log_w))
    if bound in LOWER:
        assert bound.guarantee == "lower bound"
        assert excess < 0
    else:
        assert bound.guarantee == "no bound"
        assert excess > 5


def binary(particles: int, low: float, chance: float) -> tuple[Tensor, Tensor, float]:
    """log w of all outcomes up to order where each is ``low`` by ``chance`` and else 0, how likely
    each is, and log E[w]."""
    lows = torch.arange(particles + 1)
    log_w = torch.where(torch.arange(particles)[:, None] < lows, low, 0.0)
    weights = torch.distributions.Binomial(particles, torch.tensor(chance)).log_prob(lows).exp()
    return log_w, weights, math.log(chance * math.exp(low) + 1 - chance)


def test_the_jackknife_is_no_bound():
    log_w, weights, log_p = binary(2, low=-20.0, chance=0.25)
    assert Jackknife(1).guarantee == "no bound"
    assert weights @ Jackknife(1)(log_w) > log_p + 1


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_jackknife_takes_off_one_order_of_the_bias_at_a_time(order: int):
    """Halving 1 / K divides the bias by 2^(order + 1); exact expectations."""
    bias = []
    for particles in (20, 40):
        log_w, weights, log_p = binary(particles, low=-1.0, chance=0.4)
        bias.append(weights @ Jackknife(order)(log_w) - log_p)
    assert bias[0] / bias[1] == pytest.approx(2 ** (order + 1), rel=0.1)


@pytest.mark.parametrize("partition", [1, 2, 6, (0, 0.5, 1), (0, 1e-9, 0.999, 1)], ids=str)
def test_riemann_sums_enclose_the_importance_weighted_bound(partition: Any):
    """For every log w, not only on average."""
    log_w = torch.cat([extremes(6), *(log_weights(6, 500, s) for s in (0.01, 1, 20))], 1)
    middle, rounding = IWAE(log_w), 1e-10
    assert (Thermodynamic(partition)(log_w) <= middle + rounding).all()
    assert (Thermodynamic(partition, right=True)(log_w) >= middle - rounding).all()


def test_fine_riemann_sums_meet():
    log_w = log_weights()
    left, right = (
        Thermodynamic([j / 4000 for j in range(4001)], right=right)(log_w)
        for right in (False, True)
    )
    torch.testing.assert_close((left + right) / 2, IWAE(log_w), atol=1e-5, rtol=0)
    assert (right - left > 1e-5).all()


@pytest.mark.parametrize(
    ("bound", "linear", "smooth"),
    [
        (Elbo(), True, True),
        (IWAE, False, True),
        (VR_MAX, False, False),
        (Cubo(), False, True),
        (Miwae(2), False, True),
        (Miwae(2, Elbo()), True, True),
        (Miwae(2, VR_MAX), False, False),
        (Mix((2, Elbo()), (-1, Elbo())), True, True),
        (Mix((0.5, Elbo()), (0.5, IWAE)), False, True),
        (Mix((0.5, Elbo()), (0.5, VR_MAX)), False, False),
        (Split(Elbo(), Elbo()), True, True),
        (Split(Elbo(), IWAE), False, True),
        (Split(IWAE, Elbo()), False, True),
        (Split(VR_MAX, IWAE), False, False),
        (Split(IWAE, VR_MAX), False, False),
        (Thermodynamic(1), True, True),
        (Thermodynamic(2), False, True),
        (Jackknife(), False, True),
    ],
    ids=repr,
)
def test_what_parts_are_the_whole_is(bound: Bound, linear: bool, smooth: bool):
    assert (bound.linear, bound.smooth) == (linear, smooth)


NOT_LOWER = [
    Mix((0.5, Elbo()), (0.4, IWAE)),
    Mix((1.5, Elbo()), (-0.5, IWAE)),
    Mix((0.5, Elbo()), (0.5, Renyi(-1.0))),
    Miwae(2, Cubo()),
    Split(Cubo(), IWAE),
]


@pytest.mark.parametrize("bound", NOT_LOWER, ids=repr)
def test_a_whole_is_a_lower_bound_only_as_its_parts_are(bound: Bound):
    assert bound.guarantee == "no bound"


@pytest.mark.parametrize("bound", EVERY, ids=repr)
def test_the_reward_makes_the_score_term_unbiased(bound: Bound):
    """E[bound] under w = f(y), y ~ Bernoulli(p): its derivative by p is known by enumeration. And
    what a bound takes off the reward makes the term vary less."""
    p, particles = torch.tensor(0.3, requires_grad=True), 4
    log_f = torch.tensor([-3.0, -1.5])
    outcomes = torch.cartesian_prod(*[torch.arange(2)] * particles).T  # [K, 2^K]
    log_prob = torch.where(outcomes == 1, p.log(), (1 - p).log())
    log_w = log_f[outcomes]
    (exact,) = torch.autograd.grad((log_prob.sum(0).exp() * bound(log_w)).sum(), p)

    weight = log_prob.sum(0).exp().detach()
    score = torch.where(outcomes == 1, 1 / p, -1 / (1 - p)).detach()
    terms = (bound.reward(log_w) * score).sum(0)
    torch.testing.assert_close(weight @ terms, exact)
    plain = (Bound.reward(bound, log_w) * score).sum(0)
    share = (weight @ terms**2 - exact**2) / (weight @ plain**2 - exact**2)  # of the variance
    centred = isinstance(bound, Elbo | Miwae | Jackknife) and repr(bound) != "jackknife(0)"
    assert share < (0.9 if centred else 1 + 1e-9)


# ---------------------------------------------------------------------------------------------
# Each by hand


def test_vr_max_takes_the_largest_weight():
    log_w = torch.tensor([[1.0, 2.0], [3.0, -1.0], [3.0, 0.0]])
    assert VR_MAX(log_w).tolist() == [3.0, 2.0]
    assert VR_MAX.weights(log_w).tolist() == [[0, 1], [1, 0], [0, 0]]  # one of equals
    assert VR_MAX.diagonal(log_w).tolist() == [[0, 0]] * 3


def test_renyi_falls_with_alpha_from_max_to_min_and_passes_the_elbo():
    log_w = log_weights()
    alphas = [-math.inf, -2.0, 0.0, 0.5, 0.999999, 1.000001, 3.0, 2000.0]
    values = torch.stack([Renyi(alpha)(log_w) for alpha in alphas])
    assert (values.diff(dim=0) < 0).all()
    torch.testing.assert_close(values[4], Elbo()(log_w), atol=1e-4, rtol=0)
    torch.testing.assert_close(values[-1], log_w.min(0).values, atol=1e-2, rtol=0)


def test_renyi_by_hand():
    log_w = torch.tensor([[math.log(1.0)], [math.log(4.0)]])
    assert IWAE(log_w).item() == pytest.approx(math.log(2.5))
    assert Renyi(0.5)(log_w).item() == pytest.approx(2 * math.log(1.5))
    assert Renyi(-1.0)(log_w).item() == pytest.approx(0.5 * math.log(8.5))


@pytest.mark.parametrize("n", [1.5, 2, 3])
def test_cubo_is_renyi(n: float):
    log_w = log_weights()
    torch.testing.assert_close(Cubo(n)(log_w), (n * log_w).exp().mean(0).log() / n)
    torch.testing.assert_close(Cubo(n).weights(log_w), Renyi(1 - n).weights(log_w))


def test_miwae_by_hand():
    log_w = log_weights(6)
    torch.testing.assert_close(Miwae(2)(log_w), (IWAE(log_w[::2]) + IWAE(log_w[1::2])) / 2)
    halves = log_w[::2], log_w[1::2]
    w = torch.stack([torch.softmax(half, 0) for half in halves], 1).flatten(0, 1) / 2
    torch.testing.assert_close(Miwae(2).weights(log_w), w)
    torch.testing.assert_close(Miwae(2).diagonal(log_w), w * (1 - 2 * w))
    torch.testing.assert_close(Miwae(1)(log_w), IWAE(log_w))
    torch.testing.assert_close(Miwae(6)(log_w), Elbo()(log_w))
    reward = torch.stack([IWAE(half) / 2 for half in halves]).repeat(3, 1)
    torch.testing.assert_close(Miwae(2).reward(log_w), reward)


def test_mix_by_hand():
    log_w = log_weights()
    ciwae = Mix((0.3, Elbo()), (0.7, IWAE))
    torch.testing.assert_close(ciwae(log_w), 0.3 * log_w.mean(0) + 0.7 * IWAE(log_w))
    torch.testing.assert_close(Mix((1, IWAE), (0, VR_MAX))(log_w), IWAE(log_w))
    assert Mix((1, IWAE), (0, VR_MAX)).smooth
    down = Mix((-1, Cubo()))
    for name in ("__call__", "weights", "diagonal", "reward"):
        torch.testing.assert_close(getattr(down, name)(log_w), -getattr(Cubo(), name)(log_w))


def test_split_is_the_model_s_and_points_to_the_guide_s():
    log_w, guide = log_weights(), Miwae(2)
    split = Split(Cubo(), guide)
    assert split.guide is guide
    for name in ("__call__", "weights", "diagonal", "reward"):
        torch.testing.assert_close(getattr(split, name)(log_w), getattr(Cubo(), name)(log_w))


@pytest.mark.parametrize("bound", [b for b in EVERY if not isinstance(b, Split)], ids=repr)
def test_the_guide_follows_the_same_bound(bound: Bound):
    assert bound.guide is bound


@pytest.mark.parametrize(
    ("bound", "guide"),
    [
        (Split(IWAE, Split(Cubo(), Elbo())), Elbo()),
        (Split(Split(IWAE, Cubo()), Elbo()), Elbo()),
        (Miwae(2, Split(IWAE, Elbo())), Miwae(2, Elbo())),
        (Mix((0.5, Split(IWAE, Cubo())), (0.5, Elbo())), Mix((0.5, Cubo()), (0.5, Elbo()))),
    ],
    ids=repr,
)
def test_the_guide_of_parts(bound: Bound, guide: Bound):
    log_w = log_weights()
    assert repr(bound.guide) == repr(guide)
    assert bound.guide.guide is not bound
    torch.testing.assert_close(bound.guide.weights(log_w), guide.weights(log_w))


@pytest.mark.parametrize("right", [False, True])
def test_thermodynamic_by_hand(right: bool):
    log_w = log_weights()
    points = [0, 0.2, 0.7, 1]
    mean = [(torch.softmax(b * log_w, 0) * log_w).sum(0) for b in points]
    ends = mean[1:] if right else mean[:-1]
    by_hand = 0.2 * ends[0] + 0.5 * ends[1] + 0.3 * ends[2]
    torch.testing.assert_close(Thermodynamic(points, right=right)(log_w), by_hand)


def test_thermodynamic_takes_points_evenly_spaced_in_log():
    log_w = log_weights()
    points = (0, 0.001, 0.01, 0.1, 1)
    torch.testing.assert_close(Thermodynamic(4, first=0.001)(log_w), Thermodynamic(points)(log_w))
    torch.testing.assert_close(Thermodynamic(1)(log_w), Elbo()(log_w))


@pytest.mark.parametrize(("order", "particles"), [(0, 4), (1, 2), (1, 5), (2, 3), (2, 5), (3, 6)])
def test_jackknife_by_hand(order: int, particles: int):
    log_w = log_weights(particles)
    by_hand = torch.zeros(4)
    for j in range(order + 1):
        subsets = itertools.combinations(range(particles), particles - j)
        mean = torch.stack([IWAE(log_w[list(subset)]) for subset in subsets]).mean(0)
        number = math.factorial(order - j) * math.factorial(j)
        by_hand += (-1) ** j * (particles - j) ** order / number * mean
    torch.testing.assert_close(Jackknife(order)(log_w), by_hand)


def test_jackknife_of_order_1_by_hand():
    log_w = torch.log(torch.tensor([[1.0], [2.0], [3.0]]))
    others = (math.log(2.5) + math.log(2.0) + math.log(1.5)) / 3
    assert Jackknife()(log_w).item() == pytest.approx(3 * math.log(2) - 2 * others)


def test_jackknife_in_single_precision():
    """The coefficients reach 800 at 40 particles and must not multiply a rounding error of log w."""
    log_w = log_weights(40, 50) - 1000
    exact = Jackknife(2)(log_w.float().double())
    torch.testing.assert_close(Jackknife(2)(log_w.float()).double(), exact, atol=2e-3, rtol=0)


# ---------------------------------------------------------------------------------------------
# Errors and names

REFUSED: list[tuple[Callable[[], Any], str]] = [
    *((lambda a=a: Renyi(a), f"Renyi: .*alpha={a}") for a in (1, math.nan, math.inf)),
    *((lambda n=n: Cubo(n), f"Cubo: came n={n}") for n in (1, 0, math.nan, math.inf)),
    *((lambda m=m: Miwae(m), f"Miwae: came groups={m}") for m in (0, 2.0)),
    *((lambda m=m: Jackknife(m), f"Jackknife: came order={m}") for m in (-1, 1.0)),
    (Mix, "Mix: came no bound"),
    (lambda: Mix((0, IWAE)), "Mix: came no bound"),
    (lambda: Mix((math.nan, IWAE)), "Mix: came nan, wanted finite"),
    (lambda: Thermodynamic(0), "Thermodynamic: came 0 intervals"),
    (lambda: Thermodynamic(3, first=1), "Thermodynamic: .* first=1"),
    *(
        (lambda p=p: Thermodynamic(p), "Thermodynamic: came points")
        for p in ((), (0,), (0, 0.5), (0.1, 1), (0, 0.5, 0.5, 1), (0, math.nan, 1))
    ),
    (lambda: Miwae(4)(log_weights(6)), r"miwae\(4\): came 6 particles, wanted a multiple of 4"),
    (lambda: Miwae(4).weights(log_weights(6)), "wanted a multiple of 4"),
    (lambda: Jackknife(2)(log_weights(2)), r"jackknife\(2\): came 2 particles, wanted >= 3"),
    (lambda: Jackknife(2)(log_weights(45)), "45 particles with 1036 subsets, wanted at most 1000"),
]


@pytest.mark.parametrize(("wrong", "match"), REFUSED, ids=[match for _, match in REFUSED])
def test_refused(wrong: Callable[[], Any], match: str):
    with pytest.raises(ValueError, match=match) as error:
        wrong()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("bound", "least"),
    [
        (Elbo(), 1),
        (Miwae(3), 3),
        (Miwae(3, Jackknife(2)), 9),
        (Jackknife(2), 3),
        (Mix((1, Jackknife(1)), (1, IWAE)), 2),
        (Split(IWAE, Miwae(4)), 4),
    ],
    ids=repr,
)
def test_min_particles(bound: Bound, least: int):
    assert bound.min_particles == least
    assert bound(log_weights(least)).isfinite().all()


NAMES = {
    "elbo": Elbo(),
    "iwae": IWAE,
    "renyi(0.5)": Renyi(0.5),
    "vr_max": VR_MAX,
    "cubo(2)": Cubo(),
    "miwae(8)": Miwae(8),
    "miwae(8, renyi(0.5))": Miwae(8, Renyi(0.5)),
    "mix(0.5 elbo + 0.5 iwae)": Mix((0.5, Elbo()), (0.5, IWAE)),
    "split(iwae, miwae(8))": Split(IWAE, Miwae(8)),
    "split(elbo, mix(-1 cubo(2)))": Split(Elbo(), Mix((-1, Cubo()))),
    "tvo(5 from 0.08)": Thermodynamic(5),
    "tvo(0, 0.3, 1, right)": Thermodynamic((0, 0.3, 1), right=True),
    "tvo(0, 1)": Thermodynamic(1),
    "jackknife(1)": Jackknife(),
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str):
    assert repr(NAMES[name]) == name
