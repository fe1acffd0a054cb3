"""Exact sums over discrete draws, against Pyro's, the score function's mean and a table of z."""

from __future__ import annotations

import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.batch import Batch
from pyro_vae.objectives.enumeration import Enumerate, enumerated_log_p
from pyro_vae.objectives.objective import Objective
from pyro_vae.objectives.rates import Analytic, Beta
from pyro_vae.objectives.recipes import elbo, iwae, mean_field
from tests.small_pairs import (
    assert_same,
    data,
    flat_gradient,
    parameters,
    sigmas,
    value_and_gradient,
)

X = 3


class One(nn.Module):
    """z of 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.randn(4))
        self.loc = nn.Parameter(torch.randn(4, X))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=self.prior))
            pyro.sample("x", dist.Normal(self.loc[z], 0.8).to_event(1), obs=x)


class OneGuide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(X, 4)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=self.net(x)))


class Two(nn.Module):
    """a, then b given a; ``given`` is what b and x depend on a by."""

    def __init__(self, given: float = 1.0) -> None:
        super().__init__()
        self.prior, self.up = nn.Parameter(torch.randn(3)), nn.Parameter(given * torch.randn(3))
        self.loc = nn.Parameter(torch.randn(3, 2, X))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(logits=self.prior))
            b = pyro.sample("b", dist.Bernoulli(logits=self.up[a]))
            pyro.sample("x", dist.Normal(self.loc[a, b.long()], 0.8).to_event(1), obs=x)


class TwoGuide(nn.Module):
    def __init__(self, given: float = 1.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(X, 3), nn.Linear(X, 1)
        self.shift = nn.Parameter(given * torch.randn(3))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(logits=self.first(x)))
            logits = self.second(x).squeeze(-1) + self.shift[a]
            pyro.sample("b", dist.Bernoulli(logits=logits))


class Bits(nn.Module):
    """Several entries in one event, and a site of one-hot vectors that depends on them."""

    def __init__(self) -> None:
        super().__init__()
        self.prior, self.up = nn.Parameter(torch.randn(3)), nn.Linear(3, 2)
        self.net = nn.Linear(5, X)

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            a = pyro.sample("a", dist.Bernoulli(logits=self.prior).to_event(1))
            b = pyro.sample("b", dist.OneHotCategorical(logits=self.up(a)))
            loc = self.net(torch.cat([a.expand(*b.shape[:-1], 3), b], -1))
            pyro.sample("x", dist.Normal(loc, 0.8).to_event(1))

    def joint(self, x: Tensor) -> Tensor:
        """log p(x, z) of all 16 z, ``[16, B]``."""
        out = []
        for bits in itertools.product([0.0, 1.0], repeat=3):
            a = torch.tensor(bits)
            log_a = dist.Bernoulli(logits=self.prior).log_prob(a).sum()
            for b in torch.eye(2):
                log_b = self.up(a).log_softmax(-1) @ b
                loc = self.net(torch.cat([a, b]))
                out.append(log_a + log_b + dist.Normal(loc, 0.8).log_prob(x).sum(-1))
        return torch.stack(out)


class BitsGuide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(X, 3), nn.Linear(3 + X, 2)

    def forward(self, batch: Batch) -> None:
        x = batch["x"]
        with pyro.plate("data", batch.size, dim=-1):
            a = pyro.sample("a", dist.Bernoulli(logits=self.first(x)).to_event(1))
            both = torch.cat([a, x.expand(*a.shape[:-1], X)], -1)
            pyro.sample("b", dist.OneHotCategorical(logits=self.second(both)))


class Mixed(nn.Module):
    """A continuous latent c between two discrete ones."""

    def __init__(self) -> None:
        super().__init__()
        self.prior, self.loc = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2, X))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=self.prior))
            c = pyro.sample("c", dist.Normal(z - 0.5, 1.0))
            y = pyro.sample("y", dist.Bernoulli(logits=c))
            loc = self.loc[z] + (c * (1 + y)).unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, 0.8).to_event(1), obs=x)


class MixedGuide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(X, 4)

    def forward(self, x: Tensor) -> None:
        out = self.net(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=out[:, :2]))
            c = pyro.sample("c", dist.Normal(out[:, 2] + 0.3 * z, 0.7))
            pyro.sample("y", dist.Bernoulli(logits=out[:, 3] - c))


PAIRS: dict[str, Any] = {
    "one site": lambda: (One(), OneGuide()),
    "two sites": lambda: (Two(0.0), TwoGuide(0.0)),
    "hierarchy": lambda: (Two(), TwoGuide()),
}


def enumerated(**options: Any) -> Objective:
    return elbo(estimator=Enumerate(), **options)


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("name", list(PAIRS))
def test_value_and_gradient_are_those_of_pyro(name: str, chunk: int | None) -> None:
    model, guide = PAIRS[name]()
    x = data()
    ours = value_and_gradient(enumerated(chunk=chunk), model, guide, x)
    theirs = TraceEnum_ELBO(max_plate_nesting=1)
    everywhere = config_enumerate(guide, default="parallel")
    loss = theirs.differentiable_loss(model, everywhere, x)
    assert_same(ours, (loss.detach(), flat_gradient(loss, parameters(model, guide))))


def test_repeats_change_nothing_where_all_is_discrete() -> None:
    model, guide = PAIRS["hierarchy"]()
    one, three = (
        value_and_gradient(enumerated(num_particles=k), model, guide, data()) for k in (1, 3)
    )
    assert_same(one, three)


def test_event_entries_are_enumerated_too() -> None:
    model, guide = Bits(), BitsGuide()
    batch = Batch({"x": data()})
    log_p = model.joint(batch["x"]).logsumexp(0)
    assert_same(enumerated_log_p(model, guide, batch), log_p.detach())
    assert_same(enumerated_log_p(model, guide, batch, chunk=5), log_p.detach())
    parts = []
    for bits in itertools.product([0.0, 1.0], repeat=3):
        a = torch.tensor(bits)
        first = dist.Bernoulli(logits=guide.first(batch["x"])).log_prob(a).sum(-1)
        both = torch.cat([a.expand(6, 3), batch["x"]], -1)
        parts += (first + guide.second(both).log_softmax(-1).T).unbind()
    log_q = torch.stack(parts)
    value = (log_q.exp() * (model.joint(batch["x"]) - log_q)).sum(0)
    assert_same(enumerated().rows(model, guide, batch), value.detach())
    loss, gradient = value_and_gradient(enumerated(), model, guide, batch)
    assert_same(loss, -value.sum().detach())
    assert_same(gradient, flat_gradient(-value.sum(), parameters(model, guide)))


def test_analytic_kl_and_beta_agree_with_the_sum() -> None:
    """In expectation the KL in closed form is the log ratio's, site by site."""
    model, guide = PAIRS["hierarchy"]()
    parts: Any = {"estimator": Enumerate()}
    assert_same(
        value_and_gradient(mean_field(**parts), model, guide, data()),
        value_and_gradient(elbo(**parts), model, guide, data()),
    )
    weighed = [
        Objective(rate=Beta({"a": 2.0, "b": 0.5}, rate), **parts) for rate in (None, Analytic())
    ]
    first, second = (value_and_gradient(o, model, guide, data()) for o in weighed)
    assert_same(first, second)


@pytest.mark.parametrize("name", ["hierarchy", "mixed"])
def test_agrees_with_the_score_function(name: str) -> None:
    pairs = {**PAIRS, "mixed": lambda: (Mixed(), MixedGuide())}
    model, guide = pairs[name]()
    x, losses = data(2), (enumerated(num_particles=10), elbo(100, "score"))
    exact, noisy = (
        torch.stack(
            [
                torch.cat([value[None], gradient])
                for seed in range(60)
                for value, gradient in [value_and_gradient(loss, model, guide, x, seed=seed)]
            ]
        )
        for loss in losses
    )
    assert sigmas(noisy - exact).abs().max() < 4.5
    if name == "hierarchy":
        assert exact.var(0).max() < 1e-20


def test_labels_that_are_known_are_not_summed_over() -> None:
    """Semi-supervised: a row with its label counts log p(x, y), one without the sum."""
    model, guide = Bits(), BitsGuide()
    x = data(4)
    known = torch.tensor([1.0, 0.0, 1.0]).expand(4, 3)
    observed = torch.tensor([True, False, True, False])[:, None].expand(4, 3)
    batch = Batch({"x": x, "a": known}, observed={"a": observed})
    part = model.joint(x).reshape(8, 2, 4)[5].logsumexp(0)  # a = (1, 0, 1)
    whole = model.joint(x).logsumexp(0)
    assert_same(enumerated_log_p(model, guide, batch), torch.where(observed[:, 0], part, whole))
    rows = enumerated().rows(model, guide, batch)
    complete = enumerated().rows(model, guide, Batch({"x": x, "a": known}))
    none = enumerated().rows(model, guide, Batch({"x": x}))
    assert_same(rows, torch.where(observed[:, 0], complete, none))


def test_traces_like_eager() -> None:
    model, guide = Bits(), BitsGuide()
    module = enumerated()(model, guide)

    def loss(batch: Batch) -> Tensor:
        return module.loss_and_rows(batch)[0]

    batch, other = (Batch({"x": data(seed=seed)}) for seed in (5, 6))
    loss(other)  # the plan
    with pyro.validation_enabled(False):
        graph = make_fx(loss)(other)
    assert_same(graph(batch), loss(batch))


def test_impossible_values_count_nothing() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5, 0.0])))
            pyro.sample("x", dist.Normal(z.to(x), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        logits = torch.stack([pyro.param("a", torch.tensor(0.3)), torch.tensor(-torch.inf)])
        logits = torch.cat([torch.zeros(1), logits]).expand(len(x), 3)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=logits))

    pyro.clear_param_store()
    x = torch.tensor([0.2, 1.4])
    loss = enumerated().differentiable_loss(model, guide, x)
    (gradient,) = torch.autograd.grad(loss, pyro.param("a"))
    a = torch.tensor(0.3, requires_grad=True)
    q = torch.stack([torch.zeros(()), a]).softmax(0)
    log_p = torch.stack([dist.Normal(z, 1.0).log_prob(x) for z in (0.0, 1.0)]).sum(1)
    exact = -(q * (log_p + 2 * (torch.tensor(0.5).log() - q.log()))).sum()
    assert_same(loss.detach(), exact.detach())
    assert_same(gradient, torch.autograd.grad(exact, a)[0])


# --- what is refused ------------------------------------------------------------------------------


class Wide(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind, self.rate = kind, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.kind(self.rate))
            pyro.sample("x", dist.Normal(z.reshape(*z.shape[:1], -1).sum(-1), 1.0), obs=x)

    def draw(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.kind(self.rate))


def bits(rate: Tensor) -> Any:
    return dist.Bernoulli(logits=rate.expand(11)).to_event(1)


@pytest.mark.parametrize(
    ("kind", "limit", "message"),
    [
        (bits, 1024, r"enumerate.*site 'z'.*'z': 2\*\*11.*wanted <= 1024"),
        (dist.Poisson, 1024, r"site 'z'.*values of \['z'\] can't be listed"),
    ],
    ids=["large", "endless"],
)
def test_supports_that_are_refused(kind: Any, limit: int, message: str) -> None:
    wide = Wide(kind)
    with pytest.raises(ValueError, match=message):
        elbo(estimator=Enumerate(limit)).differentiable_loss(wide, wide.draw, torch.ones(2))


def test_global_sites_and_other_bounds_are_refused() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(0.4))

    with pytest.raises(ValueError, match=r"site 'z' .*lies outside the plate over rows"):
        enumerated().differentiable_loss(model, guide, torch.ones(3))
    with pytest.raises(ValueError, match=r"enumerate with bound iwae: .* use the elbo"):
        iwae(3, "enumerate")
    penalised = elbo(estimator="enumerate", penalties=[lambda particles, step: torch.zeros(())])
    with pytest.raises(ValueError, match="penalties see particles as draws"):
        penalised.differentiable_loss(One(), OneGuide(), data())


def test_log_p_refuses_what_it_can_not_sum_over() -> None:
    with pytest.raises(ValueError, match=r"sites \['c'\] are latents that are not discrete"):
        enumerated_log_p(Mixed(), MixedGuide(), data())
    with pytest.raises(ValueError, match=r"site 'z' can't be enumerated.*wanted <= 3"):
        enumerated_log_p(One(), OneGuide(), data(), limit=3)
