"""Pyro programs as they are: the shapes of Pyro's own examples, small, and what its ELBOs make of them.

Where Pyro's estimators are right, loss and gradient are equal at the same seed; where they are wrong,
ours are held against numbers by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.objectives import Elbo, Objective, Particles, Renyi, elbo, iwae, mean_field, renyi
from tests.small_pairs import Program, assert_same, flat_gradient, sigmas


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def counts(rows: int, vocab: int, total: int = 20) -> Tensor:
    """Every row adds up to ``total``."""
    words = (vocab * uniform(rows, total)).long()
    return nn.functional.one_hot(words, vocab).sum(1).double()


# ---------------------------------------------------------------------------------------------
# The examples


class VAE(nn.Module):
    """examples/vae: grey pixels under a Bernoulli, ``pyro.module``, ``obs=``."""

    def __init__(self, pixels: int = 12, z_dim: int = 3) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(pixels, 2 * z_dim), nn.Linear(z_dim, pixels)
        self.z_dim = z_dim

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = torch.zeros(x.shape[0], self.z_dim)
            z_scale = torch.ones(x.shape[0], self.z_dim)
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            loc = torch.sigmoid(self.decoder(z))
            pixels = dist.Bernoulli(loc, validate_args=False).to_event(1)
            pyro.sample("obs", pixels, obs=x.reshape(-1, 12))

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_raw = self.encoder(x.reshape(-1, 12)).chunk(2, -1)
            pyro.sample("latent", dist.Normal(z_loc, z_raw.exp()).to_event(1))


def joined(*tensors: Tensor) -> Tensor:
    """Concatenate last dims, broadcasting the others: labels have no particle dim."""
    shape = torch.broadcast_shapes(*[t.shape[:-1] for t in tensors])
    return torch.cat([t.expand(*shape, t.shape[-1]) for t in tensors], -1)


class SSVAE(nn.Module):
    """examples/vae/ss_vae_M2: y is data in some calls and a discrete latent in others."""

    def __init__(self, pixels: int = 8, z_dim: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.classes, self.z_dim = classes, z_dim
        self.encoder_y = nn.Linear(pixels, classes)
        self.encoder_z = nn.Linear(pixels + classes, 2 * z_dim)
        self.decoder = nn.Linear(z_dim + classes, pixels)

    def model(self, xs: Tensor, ys: Tensor | None = None) -> None:
        pyro.module("ss_vae", self)
        with pyro.plate("data", len(xs)):
            prior = dist.Normal(torch.zeros(len(xs), self.z_dim), 1.0).to_event(1)
            zs = pyro.sample("z", prior)
            alpha = torch.ones(len(xs), self.classes) / self.classes
            ys = pyro.sample("y", dist.OneHotCategorical(alpha), obs=ys)
            loc = torch.sigmoid(self.decoder(joined(zs, ys)))
            pyro.sample("x", dist.Bernoulli(loc, validate_args=False).to_event(1), obs=xs)

    def guide(self, xs: Tensor, ys: Tensor | None = None) -> None:
        with pyro.plate("data", len(xs)):
            if ys is None:
                alpha = torch.softmax(self.encoder_y(xs), -1)
                ys = pyro.sample("y", dist.OneHotCategorical(alpha))
            loc, raw = self.encoder_z(joined(xs, ys)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    def model_classify(self, xs: Tensor, ys: Tensor | None = None) -> None:
        """An auxiliary loss of its own; without labels it has nothing to say."""
        pyro.module("ss_vae", self)
        with pyro.plate("data", len(xs)):
            if ys is not None:
                alpha = torch.softmax(self.encoder_y(xs), -1)
                with poutine.scale(scale=50.0):
                    pyro.sample("y_aux", dist.OneHotCategorical(alpha), obs=ys)

    def guide_classify(self, xs: Tensor, ys: Tensor | None = None) -> None:
        """A dummy guide."""


class CVAE(nn.Module):
    """examples/cvae: a learned prior p(z | x), and a likelihood of the hidden pixels alone, which are
    picked by an index that knows no particle dim."""

    def __init__(self, pixels: int = 6, z_dim: int = 2) -> None:
        super().__init__()
        self.baseline = nn.Linear(pixels, pixels)
        self.prior_net = nn.Linear(2 * pixels, 2 * z_dim)
        self.generation_net = nn.Linear(z_dim, pixels)
        self.recognition_net = nn.Linear(2 * pixels, 2 * z_dim)

    def model(self, xs: Tensor, ys: Tensor | None = None) -> None:
        pyro.module("generation_net", self)
        with pyro.plate("data", len(xs)):
            with torch.no_grad():
                y_hat = torch.sigmoid(self.baseline(xs))
            loc, raw = self.prior_net(torch.cat([xs, y_hat], -1)).chunk(2, -1)
            zs = pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))
            loc = torch.sigmoid(self.generation_net(zs))
            if ys is None:
                pyro.deterministic("y", loc)
                return
            mask_loc = loc[xs == -1].view(len(xs), -1)
            mask_ys = ys[xs == -1].view(len(xs), -1)
            hidden = dist.Bernoulli(mask_loc, validate_args=False).to_event(1)
            pyro.sample("y", hidden, obs=mask_ys)

    def guide(self, xs: Tensor, ys: Tensor | None = None) -> None:
        with pyro.plate("data", len(xs)):
            assert ys is not None
            loc, raw = self.recognition_net(torch.cat([ys, xs], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


class DMM(nn.Module):
    """examples/dmm: z_1 .. z_T one after the other, lengths by masks, annealing by ``poutine.scale``."""

    def __init__(self, x_dim: int = 4, z_dim: int = 2, hidden: int = 3) -> None:
        super().__init__()
        self.emitter = nn.Linear(z_dim, x_dim)
        self.trans = nn.Linear(z_dim, 2 * z_dim)
        self.combiner = nn.Linear(z_dim, hidden)
        self.posterior = nn.Linear(hidden, 2 * z_dim)
        self.rnn = nn.RNN(x_dim, hidden, batch_first=True)
        self.z_0, self.z_q_0 = nn.Parameter(torch.zeros(z_dim)), nn.Parameter(torch.zeros(z_dim))

    def model(
        self, batch: Tensor, backwards: Tensor, mask: Tensor, annealing_factor: float = 1.0
    ) -> None:
        pyro.module("dmm", self)
        z_prev = self.z_0.expand(len(batch), -1)
        with pyro.plate("z_minibatch", len(batch)):
            for t in pyro.markov(range(1, batch.size(1) + 1)):
                loc, raw = self.trans(z_prev).chunk(2, -1)
                with poutine.scale(scale=annealing_factor):
                    z = dist.Normal(loc, softplus(raw)).mask(mask[:, t - 1 : t]).to_event(1)
                    z_t = pyro.sample(f"z_{t}", z)
                probs = torch.sigmoid(self.emitter(z_t))
                x = dist.Bernoulli(probs).mask(mask[:, t - 1 : t]).to_event(1)
                pyro.sample(f"obs_x_{t}", x, obs=batch[:, t - 1, :])
                z_prev = z_t

    def guide(
        self, batch: Tensor, backwards: Tensor, mask: Tensor, annealing_factor: float = 1.0
    ) -> None:
        pyro.module("dmm", self)
        hidden = self.rnn(backwards)[0].flip(1)
        z_prev = self.z_q_0.expand(len(batch), -1)
        with pyro.plate("z_minibatch", len(batch)):
            for t in pyro.markov(range(1, batch.size(1) + 1)):
                state = 0.5 * (torch.tanh(self.combiner(z_prev)) + hidden[:, t - 1, :])
                loc, raw = self.posterior(state).chunk(2, -1)
                with poutine.scale(scale=annealing_factor):
                    z = dist.Normal(loc, softplus(raw)).mask(mask[:, t - 1 : t]).to_event(1)
                    z_prev = pyro.sample(f"z_{t}", z)


class ProdLDA(nn.Module):
    """tutorial/prodlda: softmax of a Gaussian, Multinomial counts, BatchNorm and dropout."""

    def __init__(self, vocab: int = 8, topics: int = 3) -> None:
        super().__init__()
        self.topics = topics
        self.encoder = nn.Sequential(nn.Linear(vocab, 6), nn.Softplus(), nn.Dropout(0.2))
        self.mean, self.log_var = nn.Linear(6, topics), nn.Linear(6, topics)
        self.mean_norm = nn.BatchNorm1d(topics, affine=False)
        self.beta = nn.Linear(topics, vocab, bias=False)
        self.norm = nn.BatchNorm1d(vocab, affine=False)

    def model(self, docs: Tensor) -> None:
        pyro.module("prodlda", self)
        with pyro.plate("documents", docs.shape[0]):
            prior = dist.Normal(docs.new_zeros(docs.shape[0], self.topics), 1.0).to_event(1)
            theta = torch.softmax(pyro.sample("logtheta", prior), -1)
            words = torch.softmax(self.norm(self.beta(theta)), -1)
            total_count = int(docs.sum(-1).max())
            pyro.sample("obs", dist.Multinomial(total_count, words), obs=docs)

    def guide(self, docs: Tensor) -> None:
        pyro.module("prodlda", self)
        with pyro.plate("documents", docs.shape[0]):
            hidden = self.encoder(docs)
            loc, scale = self.mean_norm(self.mean(hidden)), (0.5 * self.log_var(hidden)).exp()
            pyro.sample("logtheta", dist.Normal(loc, scale).to_event(1))


class LDA:
    """examples/lda in shape: topics outside the plate over documents, which is subsampled; functions
    with ``pyro.param``. A plain object, not a module."""

    def __init__(self, topics: int = 3, vocab: int = 5, subsample: int | None = 4) -> None:
        self.docs, self.topics, self.subsample = counts(8, vocab), topics, subsample

    def model(self) -> None:
        vocab = self.docs.shape[1]
        with pyro.plate("topics", self.topics):
            words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(vocab)))
        with pyro.plate("documents", len(self.docs), self.subsample) as rows:
            theta = pyro.sample("doc_topics", dist.Dirichlet(torch.ones(self.topics)))
            pyro.sample("doc_words", dist.Multinomial(20, theta @ words), obs=self.docs[rows])

    def guide(self) -> None:
        positive = constraints.positive
        eta = pyro.param("eta", 2 * torch.ones(self.topics, self.docs.shape[1]), positive)
        phi = pyro.param("phi", 2 * torch.ones(len(self.docs), self.topics), positive)
        with pyro.plate("topics", self.topics):
            pyro.sample("topic_words", dist.Dirichlet(eta))
        with pyro.plate("documents", len(self.docs), self.subsample) as rows:
            pyro.sample("doc_topics", dist.Dirichlet(phi[rows]))


class SparseGammaDEF:
    """examples/sparse_gamma_def: a ladder of Gammas with global weights, guide by ``pyro.param``."""

    top, bottom = 2, 3

    def model(self, x: Tensor) -> None:
        with pyro.plate("weights", self.top * self.bottom):
            w = pyro.sample("w", dist.Gamma(0.5, 0.3))
        w = w.reshape(*w.shape[:-1], self.top, self.bottom)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(0.5, 0.5).expand([self.top]).to_event(1))
            pyro.sample("obs", dist.Poisson(z @ w + 0.01).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("weights", self.top * self.bottom):
            self._gamma("w", self.top * self.bottom, 0)
        with pyro.plate("data", len(x)):
            self._gamma("z", (len(x), self.top), 1)

    def _gamma(self, name: str, shape: Any, event_dim: int) -> None:
        alpha = softplus(pyro.param(f"alpha_{name}", torch.full((), 0.9).expand(shape).clone()))
        mean = softplus(pyro.param(f"mean_{name}", torch.full((), 0.5).expand(shape).clone()))
        pyro.sample(name, dist.Gamma(alpha, alpha / mean).to_event(event_dim))


def bayesian_ppca(x: Tensor) -> None:
    """Global weights and noise, a latent a row."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = z[..., None] * w
        pyro.sample("x", dist.Normal(loc, sigma[..., None]).to_event(1), obs=x)


class RowWise(PyroModule):
    """All in the plate; the guide is made by Pyro."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.3))
            pyro.sample("x", dist.Normal(self.net(z), sigma[..., None]).to_event(1), obs=x)


class BayesianDecoder(PyroModule):
    """tutorial/bayesian_regression: a weight that is a random variable, by ``PyroSample``."""

    def __init__(self) -> None:
        super().__init__()
        linear: Any = PyroModule[nn.Linear]
        self.linear = linear(2, 3)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = self.linear(z)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


class Factor:
    """tutorial/custom_objectives: a likelihood that is no distribution."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.factor("fit", -(x - pyro.param("slope", torch.ones(())) * z).abs())

    def guide(self, x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, pyro.param("scale", 0.5 * torch.ones(len(x)))))


@dataclass(frozen=True)
class Example:
    """How to make a pair with its arguments, and what may be asked of it.

    Attributes:
        rows: all sites lie in one plate, without scales of their own.
        mean_field: ``TraceMeanField_ELBO`` can take it, and is right.
        loop: knows no particle dim: particle by particle.
        estimator: ``"score"`` where a latent is discrete.
    """

    make: Callable[[], tuple[Any, ...]]
    rows: bool = True
    mean_field: bool = True
    loop: bool = False
    estimator: str = "pathwise"

    def __call__(self) -> tuple[Program, Program, tuple[Any, ...]]:
        model, guide, *args = self.make()
        return model, guide, tuple(args)

    @property
    def chunk(self) -> int | None:
        return 1 if self.loop else None


LABELS = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0, 1, 2]]


def _methods(kind: Callable[[], Any], *args: Any) -> Callable[[], tuple[Any, ...]]:
    def make() -> tuple[Any, ...]:
        pair = kind()
        return pair.model, pair.guide, *args

    return make


def _cvae() -> tuple[Any, ...]:
    cvae, ys = CVAE(), uniform(5, 6).round()
    xs = ys.clone()
    xs[:, 3:] = -1
    return cvae.model, cvae.guide, xs, ys


def _dmm(annealing: float) -> tuple[Any, ...]:
    dmm, batch = DMM(), uniform(4, 3, 4).round()
    mask = torch.arange(3) < torch.tensor([3, 1, 2, 3])[:, None]
    return dmm.model, dmm.guide, batch, batch.flip(1), mask, annealing


def _auto(kind: Callable[[Program], Any], model: Callable[[], Program]) -> tuple[Any, ...]:
    program, x = model(), gaussian(5, 3)
    guide = kind(program)
    guide(x)  # makes its parameters
    return program, guide, x


EXAMPLES = {
    "vae": Example(_methods(VAE, uniform(6, 3, 4))),
    "ss_vae with labels": Example(_methods(SSVAE, uniform(6, 8).round(), LABELS)),
    "ss_vae without labels": Example(
        _methods(SSVAE, uniform(6, 8).round()), mean_field=False, estimator="score"
    ),
    "cvae": Example(_cvae, loop=True),
    "dmm": Example(lambda: _dmm(annealing=1.0)),
    "dmm annealed": Example(lambda: _dmm(annealing=0.2), rows=False),
    "prodlda": Example(_methods(ProdLDA, counts(6, 8)), loop=True),
    "lda": Example(_methods(lambda: LDA(subsample=None)), rows=False),
    "lda subsampled": Example(_methods(LDA), rows=False),
    "sparse gamma def": Example(_methods(SparseGammaDEF, uniform(5, 3).mul(9).round()), rows=False),
    "factor": Example(_methods(Factor, gaussian(5))),
    "PyroSample": Example(
        lambda: _auto(AutoNormal, BayesianDecoder), rows=False, mean_field=False, loop=True
    ),
    "AutoNormal": Example(lambda: _auto(AutoNormal, RowWise), mean_field=False),
    "AutoNormal with globals": Example(
        lambda: _auto(AutoNormal, lambda: bayesian_ppca), rows=False, mean_field=False
    ),
    "AutoMultivariateNormal": Example(
        lambda: _auto(AutoMultivariateNormal, lambda: bayesian_ppca), rows=False, mean_field=False
    ),
}


def named(wanted: Callable[[Example], bool]) -> list[str]:
    return [name for name, example in EXAMPLES.items() if wanted(example)]


def loss_and_gradients(
    objective: Any, model: Program, guide: Program, *args: Any
) -> tuple[float, dict[str, Tensor]]:
    """As ``SVI`` asks for them: the gradients in the parameter store."""
    pyro.set_rng_seed(1)
    loss = objective.loss_and_grads(model, guide, *args)
    gradients = {}
    for name, p in pyro.get_param_store().named_parameters():
        if p.grad is not None:
            gradients[name], p.grad = p.grad, None
    return float(loss), gradients


def agree(ours: Objective, theirs: Any, model: Program, guide: Program, *args: Any) -> None:
    loss_and_gradients(ours, model, guide, *args)  # makes parameters, which may take random numbers
    loss, gradients = loss_and_gradients(ours, model, guide, *args)
    their_loss, their_gradients = loss_and_gradients(theirs, model, guide, *args)
    assert gradients
    assert loss == pytest.approx(their_loss, rel=1e-10, abs=1e-10)
    assert_same(gradients, their_gradients)


def pyros(kind: Any, number: int, loop: bool = False, nesting: int = 1, **options: Any) -> Any:
    vectorized = {} if loop else {"vectorize_particles": True, "max_plate_nesting": nesting}
    return kind(num_particles=number, **vectorized, **options)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("number", [1, 4])
def test_trace_elbo(name: str, number: int):
    example = EXAMPLES[name]
    model, guide, args = example()
    ours = elbo(number, example.estimator, chunk=example.chunk)
    agree(ours, pyros(Trace_ELBO, number, example.loop), model, guide, *args)


@pytest.mark.parametrize("name", named(lambda example: example.mean_field))
@pytest.mark.parametrize("number", [1, 4])
def test_trace_mean_field_elbo(name: str, number: int):
    example = EXAMPLES[name]
    model, guide, args = example()
    ours = mean_field(number, example.estimator, chunk=example.chunk)
    agree(ours, pyros(TraceMeanField_ELBO, number, example.loop), model, guide, *args)


@pytest.mark.parametrize("name", named(lambda e: e.rows and e.estimator == "pathwise"))
@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0])
def test_renyi_elbo(name: str, alpha: float):
    example = EXAMPLES[name]
    model, guide, args = example()
    theirs = pyros(RenyiELBO, 4, example.loop, alpha=alpha)
    agree(renyi(alpha, 4, chunk=example.chunk), theirs, model, guide, *args)


@pytest.mark.parametrize("name", EXAMPLES)
def test_training_through_svi(name: str):
    example = EXAMPLES[name]
    model, guide, args = example()
    objective = elbo(2, example.estimator, chunk=example.chunk)
    judge = elbo(40, example.estimator, chunk=example.chunk)

    def judged() -> float:
        pyro.set_rng_seed(2)
        return sum(judge.loss(model, guide, *args) for _ in range(1 if example.loop else 4))

    before = judged()
    stored = {name: p.detach().clone() for name, p in pyro.get_param_store()._params.items()}
    svi = SVI(model, guide, Adam({"lr": 0.02}), loss=objective)
    for _ in range(30):
        assert math.isfinite(svi.step(*args))
    assert judged() < before
    still = [name for name, p in pyro.get_param_store()._params.items() if p.equal(stored[name])]
    unused = {"ss_vae with labels": "encoder_y", "cvae": "baseline"}.get(name)
    assert all(unused is not None and unused in name for name in still), still


@pytest.mark.parametrize("name", ["vae", "ss_vae without labels", "dmm", "prodlda", "AutoNormal"])
def test_training_through_torch(name: str):
    example = EXAMPLES[name]
    model, guide, args = example()
    module = elbo(2, example.estimator, chunk=example.chunk)(model, guide)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = module(*args)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-8:]) < sum(losses[:8])


@pytest.mark.parametrize("name", named(lambda example: example.rows))
def test_a_nonlinear_bound_through_svi(name: str):
    example = EXAMPLES[name]
    model, guide, args = example()
    tighter, looser = (
        recipe(20, example.estimator, chunk=example.chunk) for recipe in (iwae, elbo)
    )
    svi = SVI(model, guide, Adam({"lr": 0.01}), loss=tighter)
    assert all(math.isfinite(svi.step(*args)) for _ in range(3))
    losses = []
    for objective in (tighter, looser):
        pyro.set_rng_seed(1)
        losses.append(objective.loss(model, guide, *args))
    assert losses[0] < losses[1]


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("lda", r"\['topic_words'\]"),
        ("sparse gamma def", r"\['w'\]"),
        ("AutoNormal with globals", r"\['sigma', 'sigma_unconstrained', 'w', .*\]"),
        ("AutoMultivariateNormal", r"\['_AutoMultivariateNormal_latent', 'sigma', 'w'\]"),
    ],
)
def test_globals_are_refused_by_name_inside_a_nonlinear_bound(name: str, sites: str):
    model, guide, args = EXAMPLES[name]()
    with pytest.raises(ValueError, match=f"iwae: sites {sites} lie outside the plate over rows"):
        iwae(4).loss(model, guide, *args)


def test_two_losses_share_a_model_with_and_without_labels():
    """ss_vae_M2's epoch: two SVIs, labelled and unlabelled batches in turn."""
    vae, adam, x = SSVAE(), Adam({"lr": 0.01}), uniform(6, 8).round()
    objective = elbo(2, "score")
    losses = [
        SVI(vae.model, vae.guide, adam, loss=objective),
        SVI(vae.model_classify, vae.guide_classify, adam, loss=objective),
    ]
    history = [
        [svi.step(*args) for svi in losses for args in ((x, LABELS), (x,))] for _ in range(20)
    ]
    assert history[-1][2] < history[0][2]  # it learns to classify
    assert all(row[3] == 0 for row in history)  # and has nothing to say without labels


def test_a_program_that_knows_no_particle_dim_is_told_of_chunks():
    model, guide, args = EXAMPLES["cvae"]()
    with pytest.raises(IndexError) as error:
        elbo(4).loss(model, guide, *args)
    assert "chunk=1" in error.value.__notes__[0]


def test_an_autoguide_under_dreg():
    """Auxiliary draws and point masses: the path gradient agrees with the plain one."""
    model, guide, args = EXAMPLES["AutoNormal"]()
    modules = [iwae(4, estimator)(model, guide) for estimator in ("dreg", "pathwise")]
    differences = []
    for seed in range(60):
        pair = []
        for module in modules:
            pyro.set_rng_seed(seed)
            pair.append(flat_gradient(module(*args), module.parameters()))
        differences.append(pair[0] - pair[1])
    assert sigmas(torch.stack(differences)).abs().max() < 5


# ---------------------------------------------------------------------------------------------
# Plates


class Shapes:
    """z -> x with every arrangement of plates; all of them have the same density."""

    x = 2 * gaussian(4, 3)

    def __init__(self, loc: float = 0.3) -> None:
        self.loc = loc

    def _latent(self, observed: bool) -> Any:
        if observed:
            return dist.Normal(torch.zeros(()), 1.0)
        return dist.Normal(pyro.param("loc", torch.tensor(self.loc)), 0.8)

    def inner_plate(self, observed: bool) -> None:
        """Rows at dim -2, features at dim -1."""
        with pyro.plate("rows", 4, dim=-2):
            z = pyro.sample("z", self._latent(observed))
            if observed:
                with pyro.plate("features", 3, dim=-1):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=self.x)

    def nested(self, observed: bool) -> None:
        """Two plates around everything: each cell is a row."""
        with pyro.plate("rows", 4, dim=-2), pyro.plate("features", 3, dim=-1):
            z = pyro.sample("z", self._latent(observed))
            if observed:
                pyro.sample("x", dist.Normal(z, 1.0), obs=self.x)

    def event(self, observed: bool) -> None:
        """No plate at all."""
        z = pyro.sample("z", self._latent(observed).expand([4, 1]).to_event(2))
        if observed:
            pyro.sample("x", self._wide(z).to_event(2), obs=self.x)

    @staticmethod
    def _wide(z: Tensor) -> Any:
        return dist.Normal(z.expand(*z.shape[:-1], 3), 1.0)

    def names(self, observed: bool) -> None:
        """Two plates of one size and different names."""
        with pyro.plate("latents", 4):
            z = pyro.sample("z", self._latent(observed))
        if observed:
            with pyro.plate("data", 4):
                pyro.sample("x", self._wide(z[..., None]).to_event(1), obs=self.x)

    def sequential(self, observed: bool) -> None:
        """A plate as a loop."""
        for i in pyro.plate("rows", 4):
            z = pyro.sample(f"z_{i}", self._latent(observed))
            if observed:
                x = self._wide(z[..., None]).to_event(1)
                pyro.sample(f"x_{i}", x, obs=self.x[int(i)])

    def extra(self, observed: bool) -> None:
        """A global latent beside rows."""
        shift = pyro.sample("shift", self._latent(observed))
        with pyro.plate("rows", 4):
            z = pyro.sample("z", self._latent(observed))
            if observed:
                x = self._wide((z + shift)[..., None])
                pyro.sample("x", x.to_event(1), obs=self.x)


def shape(name: str, loc: float = 0.3) -> tuple[Program, Program]:
    program = getattr(Shapes(loc), name)
    return lambda: program(True), lambda: program(False)


NESTING = {"inner_plate": 2, "nested": 2, "event": 0, "names": 1, "sequential": 0, "extra": 1}


@pytest.mark.parametrize("name", NESTING)
@pytest.mark.parametrize("number", [1, 4])
def test_every_arrangement_of_plates_has_the_right_elbo(name: str, number: int):
    agree(elbo(number), pyros(Trace_ELBO, number, nesting=NESTING[name]), *shape(name))


@pytest.mark.parametrize("name", ["inner_plate", "nested"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0])
def test_rows_wherever_they_stand_have_a_nonlinear_bound(name: str, alpha: float):
    theirs = pyros(RenyiELBO, 4, nesting=2, alpha=alpha)
    agree(renyi(alpha, 4), theirs, *shape(name))


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("event", r"\['x', 'z'\]"),
        ("names", r"\['z'\]"),
        ("sequential", r"\['x_0', .*'z_3'\]"),
        ("extra", r"\['shift'\]"),
    ],
)
def test_where_rows_do_not_split_a_nonlinear_bound_is_refused(name: str, sites: str):
    """Pyro sums the batch before the log: a looser number, without a word."""
    with pytest.raises(ValueError, match=f"iwae: sites {sites} lie outside"):
        iwae(4).loss(*shape(name))
    pyro.set_rng_seed(1)
    whole = pyros(RenyiELBO, 50, nesting=NESTING[name], alpha=0.0).loss(*shape(name))
    assert math.isfinite(whole)


def test_the_batch_summed_bound_is_looser():
    """The same density with and without a plate: Pyro's number is another, ours is one or none."""
    exact = -dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(Shapes.x).sum()
    ours, theirs = [], []
    for seed in range(50):
        pyro.set_rng_seed(seed)
        ours.append(iwae(20).loss(*shape("inner_plate", loc=-2.0)))
        renyi_elbo = pyros(RenyiELBO, 20, nesting=0, alpha=0.0)
        theirs.append(renyi_elbo.loss(*shape("event", loc=-2.0)))
    assert sigmas(torch.tensor(ours) - exact) > -5
    assert sigmas(torch.tensor(theirs) - torch.tensor(ours)) > 5


# ---------------------------------------------------------------------------------------------
# Scales


class ByHand:
    """N(0, 1) -> N(z, 1) on 20 rows, whose log weights are written down once more."""

    x = 2 * gaussian(20)

    def model(self, rows: Tensor | None = None) -> None:
        with pyro.plate("data", 20, subsample=rows) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=self.x[index])

    def guide(self, rows: Tensor | None = None) -> None:
        loc = pyro.param("loc", torch.zeros(20))
        with pyro.plate("data", 20, subsample=rows) as index:
            pyro.sample("z", dist.Normal(loc[index], 1.2))

    def log_weights(self, z: Tensor, rows: Tensor) -> Tensor:
        p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(self.x[rows])
        log_w: Tensor = p - dist.Normal(0.0, 1.2).log_prob(z)
        return log_w

    def evidence(self, rows: Tensor) -> Tensor:
        log_p: Tensor = dist.Normal(0.0, 2**0.5).log_prob(self.x[rows])
        return log_p


def spied(bound: Any, number: int) -> tuple[Objective, list[Tensor]]:
    """An objective and the draws it makes."""
    seen: list[Tensor] = []

    def spy(particles: Particles, step: Tensor) -> Tensor:
        seen.append(particles.samples["z"].detach())
        return torch.zeros(())

    return Objective(bound, num_particles=number, penalties=[spy]), seen


@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0])
def test_subsampling_scales_outside_the_bound(alpha: float):
    """N / B inside the log of the mean, as in RenyiELBO, is no bound."""
    pair, rows = ByHand(), torch.tensor([3, 7, 12, 18, 19])
    objective, seen = spied(Renyi(alpha), 50)
    loss = objective.loss(pair.model, pair.guide, rows)
    log_w = pair.log_weights(seen[-1], rows)
    assert loss == pytest.approx(-4 * Renyi(alpha)(log_w).sum().item())
    if alpha == 0:
        theirs = pyros(RenyiELBO, 50, alpha=0.0).loss(pair.model, pair.guide, rows)
        evidence = 4 * pair.evidence(rows).sum().item()
        assert -theirs > evidence + 1  # above the evidence
        assert iwae(5000).loss(pair.model, pair.guide, rows) == pytest.approx(-evidence, abs=0.5)


@pytest.mark.parametrize("scale", [0.01, 0.5, 10.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_scale_around_model_and_guide_stays_outside_the_bound(scale: float, alpha: float):
    pair, rows = ByHand(), torch.arange(20)
    objective, seen = spied(Renyi(alpha), 50)
    model, guide = (poutine.scale(p, scale=scale) for p in (pair.model, pair.guide))
    loss = objective.loss(model, guide) / scale
    assert loss == pytest.approx(-Renyi(alpha)(pair.log_weights(seen[-1], rows)).sum().item())
    theirs = pyros(RenyiELBO, 50, alpha=alpha).loss(model, guide) / scale
    assert abs(theirs - loss) > 0.5


@pytest.mark.parametrize("guide_too", [True, False])
def test_an_analytic_kl_under_a_scale(guide_too: bool):
    """Scaled on the model alone, the rate is no multiple of a KL: Monte Carlo, as in Trace_ELBO."""
    pair = ByHand()

    def annealed(program: Program) -> Program:
        def run() -> None:
            with poutine.scale(scale=4.0):
                program()

        return run

    model, guide = annealed(pair.model), annealed(pair.guide) if guide_too else pair.guide
    agree(elbo(4), pyros(Trace_ELBO, 4), model, guide)
    right, wrong = (Trace_ELBO, TraceMeanField_ELBO)[:: -1 if guide_too else 1]
    agree(mean_field(4), pyros(right, 4), model, guide)
    ours = loss_and_gradients(mean_field(4), model, guide)[0]
    assert abs(ours - loss_and_gradients(pyros(wrong, 4), model, guide)[0]) > 1


def test_a_discrete_guide_is_trained_at_alpha_0():
    """RenyiELBO leaves it where it is."""
    x = torch.tensor([0.3, 1.5, -0.2])

    def model() -> None:
        with pyro.plate("data", 3):
            y = pyro.sample("y", dist.Bernoulli(0.5 * torch.ones(())))
            pyro.sample("x", dist.Normal(2 * y, 1.0), obs=x)

    def guide() -> None:
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Bernoulli(logits=pyro.param("logits", torch.zeros(3))))

    ours = loss_and_gradients(Objective(Renyi(), "score", num_particles=5), model, guide)[1]
    theirs = loss_and_gradients(pyros(RenyiELBO, 5, alpha=0.0), model, guide)[1]
    assert theirs["logits"].abs().max() == 0
    assert ours["logits"].abs().max() > 0


def test_the_elbo_is_renyi_at_one_particle():
    pair = ByHand()
    losses = []
    for bound in (Elbo(), Renyi(), Renyi(-1.0)):
        losses.append(loss_and_gradients(Objective(bound), pair.model, pair.guide))
    for loss, gradients in losses[1:]:
        assert loss == pytest.approx(losses[0][0])
        torch.testing.assert_close(gradients, losses[0][1])
