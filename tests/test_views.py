"""Sums of losses over views: value, gradient, rows, and the same training as one written by hand."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.objectives import Loss, Sum, Term, elbo, iwae, linear, mean_field, only, without

MODALITIES = ("x", "y")


class Two(nn.Module):
    """z ~ N(0, I_2), each modality a linear-Gaussian view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleDict({name: nn.Linear(2, 3) for name in MODALITIES})

    def forward(self, batch: pv.Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            for name, net in self.nets.items():
                pyro.sample(name, dist.Normal(net(z), 0.5).to_event(1))


class Experts(nn.Module):
    """A product of Gaussian experts, one for each modality that the batch holds."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleDict({name: nn.Linear(3, 4) for name in MODALITIES})

    def forward(self, batch: pv.Batch) -> None:
        precision, shift = torch.ones(batch.size, 2), torch.zeros(batch.size, 2)
        for name in batch:
            loc, raw = self.nets[name](batch[name]).chunk(2, -1)
            precision, shift = precision + raw.exp(), shift + raw.exp() * loc
        with pyro.plate("data", batch.size, dim=-1):
            normal = dist.Normal(shift / precision, precision.rsqrt())
            pyro.sample("z", normal.to_event(1))


@pytest.fixture
def batch() -> pv.Batch:
    torch.manual_seed(0)
    return pv.Batch({name: torch.randn(6, 3) for name in MODALITIES})


def value_and_gradients(
    loss: Loss, pair: tuple[nn.Module, nn.Module], batch: pv.Batch
) -> list[Tensor]:
    torch.manual_seed(1)
    value = loss(*pair)(batch)
    parameters = [p for program in pair for p in program.parameters()]
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    return [value.detach(), *(torch.zeros(()) if g is None else g for g in grads)]


def test_a_sum_is_its_terms(batch: pv.Batch):
    """The first term draws first, so that the seed gives it the draws that it has alone."""
    pair = Two(), Experts()
    losses = [elbo(3), iwae(4)]
    torch.manual_seed(1)
    by_hand = losses[0](*pair)(batch) + 0.5 * losses[1](*pair)(batch.without("y"))
    torch.manual_seed(1)
    both = Sum([losses[0], Term(losses[1], 0.5, without("y"))])
    torch.testing.assert_close(both(*pair)(batch), by_hand)


@pytest.mark.parametrize("view", [only("x"), without("y")], ids=["only", "without"])
def test_a_view_is_the_batch_without_the_rest(view: object, batch: pv.Batch):
    pair = Two(), Experts()
    found = value_and_gradients(Sum([Term(elbo(2), 1.0, view)]), pair, batch)  # type: ignore[arg-type]
    wanted = value_and_gradients(elbo(2), pair, batch.without("y"))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_the_first_call_has_a_gradient():
    """Each term looks at the pair before its first run, and leaves buffers as graphs saw them."""
    batch = pv.Batch({"x": torch.randn(6, 3)})
    pair = pv.pairs.vae(batch, latent=2, hidden=(4,))
    value_and_gradients(Sum([mean_field(), elbo(2)]), pair, batch)


def test_rows_are_weighted_sums(batch: pv.Batch):
    pair = Two(), Experts()
    both = Sum([Term(elbo(2), 2.0), Term(elbo(2), -1.0, only("y"))])
    torch.manual_seed(1)
    rows = both.rows(*pair, batch)
    torch.manual_seed(1)
    by_hand = 2 * elbo(2).rows(*pair, batch) - elbo(2).rows(*pair, batch.without("x"))
    torch.testing.assert_close(rows, by_hand)


def test_a_weight_may_be_a_schedule(batch: pv.Batch):
    pair = Two(), Experts()
    module = Sum([Term(elbo(), linear(10))])(*pair)
    for step in range(3):
        torch.manual_seed(step)
        came = module(batch)
        torch.manual_seed(step)
        torch.testing.assert_close(came, step / 10 * elbo()(*pair)(batch))


@pytest.mark.parametrize("level", ["eager", "traced"])
def test_it_trains_like_a_loss(level: str, batch: pv.Batch):
    """The bound of every subset of modalities falls."""
    torch.manual_seed(2)
    pair = Two(), Experts()
    terms = [Term(elbo(8), 1.0, view) for view in (None, only("x"), only("y"))]
    before = [float(Sum([t]).rows(*pair, batch).mean()) for t in terms]
    run = pv.fit(*pair, batch, Sum(terms), steps=150, batch_size=6, compile=level)
    after = [float(Sum([t]).rows(*pair, batch).mean()) for t in terms]
    assert all(late > early + 1 for early, late in zip(before, after, strict=True))
    assert run.level.startswith(level)


def test_svi_takes_it(batch: pv.Batch):
    pyro.clear_param_store()
    pair = Two(), Experts()
    svi = SVI(*pair, Adam({"lr": 0.01}), Sum([elbo(), iwae(2)]))
    first = [float(svi.step(batch)) for _ in range(60)]
    assert sum(first[-10:]) < sum(first[:10])


def test_repr_names_the_terms():
    text = repr(Sum([elbo(), Term(iwae(2), 0.5, only("x"))]))
    assert text.startswith("Sum(Objective(bound=elbo")
    assert "0.5 * Objective(bound=iwae" in text
    assert text.endswith("of only(x))")


def test_what_is_refused(batch: pv.Batch):
    with pytest.raises(ValueError, match="no terms"):
        Sum([])
    with pytest.raises(ValueError, match=r"only: came .'w'."):
        Sum([Term(elbo(), 1.0, only("w"))])(Two(), Experts())(batch)
    with pytest.raises(ValueError, match="wanted a Batch"):
        Sum([Term(elbo(), 1.0, only("x"))])(Two(), Experts())(torch.zeros(3, 3))
