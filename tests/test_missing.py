"""The rule of missing data against exact answers: enumeration, quadrature, closed forms.

What is neither observed nor in the guide is drawn from the model itself; where batch and guide both
have a site, the data count where observed and the guide elsewhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.batch import Batch, Condition, Observed
from pyro_vae.objectives import Elbo, Objective, Score, elbo, iwae, mean_field
from pyro_vae.objectives import objective as objective_module
from pyro_vae.objectives.bounds import Bound, Renyi
from pyro_vae.objectives.particles import run
from pyro_vae.objectives.plan import make_plan

NAN = math.nan
SIGMAS = 5.0


# ---------------------------------------------------------------------------------------------
# How an estimate is held against an exact answer


def assert_evidence(
    model: Any,
    guide: Any,
    batch: Batch,
    exact: Tensor,
    objective: Objective | None = None,
    copies: int = 2000,
    precision: float = 0.05,
) -> None:
    """exp of the importance weighted bound is unbiased for p(data) at any K; exact ``[B]``."""
    objective = objective or iwae(20, "score")
    many = batch.rows(torch.arange(batch.size).repeat(copies))
    ratio = (objective.rows(model, guide, many).reshape(copies, -1) - exact.detach()).exp()
    mean, error = ratio.mean(0), ratio.std(0) / math.sqrt(copies)
    assert bool((error < precision).all()), f"too noisy to tell: {error}"
    assert bool(((mean - 1).abs() <= SIGMAS * error + 1e-9).all()), f"{mean - 1} +- {error}"


def assert_gradient(
    model: nn.Module,
    guide: nn.Module,
    batch: Batch,
    exact: Callable[[], Tensor],
    objective: Objective,
    copies: int = 1000,
    repeats: int = 16,
) -> None:
    """Loss and gradient against minus ``exact()``, the expected bound summed over the rows."""
    parameters = {**dict(model.named_parameters()), **dict(guide.named_parameters())}
    assert parameters
    truth = exact()
    gradients = torch.autograd.grad(-truth, list(parameters.values()))
    wanted = torch.cat([-truth.reshape(1), *(g.reshape(-1) for g in gradients)]).detach()
    many = batch.rows(torch.arange(batch.size).repeat(copies))
    loss_of, came = objective(model, guide), []
    for _ in range(repeats):
        loss = loss_of(many)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        parts = [loss.reshape(1), *(g.reshape(-1) for g in gradients)]
        came.append(torch.cat(parts).detach() / copies)
    sample = torch.stack(came)
    error = sample.std(0) / math.sqrt(repeats)
    z = (sample.mean(0) - wanted) / (error + 1e-9)
    names = ["loss", *(n for n, p in parameters.items() for _ in range(p.numel()))]
    off = {name: float(value) for name, value in zip(names, z, strict=True) if abs(value) > SIGMAS}
    assert not off, f"standard errors off: {off}"
    assert bool((error < 0.1 * wanted.abs().max()).all()), f"too noisy to tell: {error}"


def assert_agree(
    model: Any, guide: Any, batch: Batch, parameters: Sequence[Tensor], estimators: list[Any]
) -> None:
    """Gradients of one multi-sample bound do not depend on how they are estimated."""
    many = batch.rows(torch.arange(batch.size).repeat(2000))
    found = []
    for estimator in estimators:
        loss_of, came = iwae(4, estimator)(model, guide), []
        for _ in range(16):
            gradients = torch.autograd.grad(loss_of(many), parameters)
            came.append(torch.cat([g.reshape(-1) for g in gradients]) / 2000)
        sample = torch.stack(came)
        found.append((sample.mean(0), sample.var(0) / len(came)))
    for (a, var_a), (b, var_b) in itertools.combinations(found, 2):
        assert bool(((a - b).abs() < SIGMAS * (var_a + var_b).sqrt()).all()), f"{a} and {b}"


def expected_bound(bound: Bound, outcomes: list[tuple[Tensor, Tensor]], particles: int) -> Tensor:
    """E[bound] by enumeration. An outcome is (log probability of proposing it, its log w)."""
    total = torch.zeros(())
    for chosen in itertools.product(outcomes, repeat=particles):
        log_r = torch.stack([log_r for log_r, _ in chosen]).sum()
        log_w = torch.stack([log_w for _, log_w in chosen])
        total = total + log_r.exp() * bound(log_w[:, None])[0]
    return total


def gauss_hermite(count: int = 40) -> tuple[Tensor, Tensor]:
    """Nodes and weights under N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.as_tensor(nodes), torch.as_tensor(weights / math.sqrt(2 * math.pi))


def grids(*axes: Tensor) -> tuple[Tensor, ...]:
    return torch.meshgrid(*axes, indexing="ij")


# ---------------------------------------------------------------------------------------------
# Labels: rows labelled and unlabelled, mixed


class Labels(PyroModule):
    """y ~ Categorical(2), z ~ Categorical(3) given y, x [2] ~ Normal given both."""

    def __init__(self) -> None:
        super().__init__()
        self.y_logits = nn.Parameter(torch.tensor([0.3, -0.2]))
        self.z_logits = nn.Parameter(torch.randn(2, 3))
        self.loc = nn.Parameter(torch.randn(2, 3, 2))

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            y = pyro.sample("y", dist.Categorical(logits=self.y_logits)).long()
            z = pyro.sample("z", dist.Categorical(logits=self.z_logits[y]))
            pyro.sample("x", dist.Normal(self.loc[y, z], 1.0).to_event(1))

    def log_joint(self, x: Tensor, y: int, z: int) -> Tensor:
        log_p: Tensor = self.y_logits.log_softmax(-1)[y] + self.z_logits.log_softmax(-1)[y, z]
        seen = ~x.isnan()
        log_x: Tensor = dist.Normal(self.loc[y, z][seen], 1.0).log_prob(x[seen])
        return log_p + log_x.sum()


class LabelsGuide(PyroModule):
    def __init__(self, draws_y: bool = True) -> None:
        super().__init__()
        self.draws_y = draws_y
        if draws_y:
            self.to_y = nn.Parameter(0.5 * torch.randn(2, 2))
        self.to_z = nn.Parameter(0.5 * torch.randn(2, 2, 3))

    def z_logits(self, x: Tensor, y: Tensor) -> Tensor:
        return (x[..., None, :] @ self.to_z[y]).squeeze(-2)

    def forward(self, batch: Batch) -> None:
        x = batch["x"]
        with pyro.plate("data", batch.size, dim=-1):
            if self.draws_y:
                y = pyro.sample("y", dist.Categorical(logits=x @ self.to_y)).long()
            else:
                y = batch["y"].long()
            pyro.sample("z", dist.Categorical(logits=self.z_logits(x, y)))


LABELLED_X = [[0.5, -1.0], [1.2, 0.1], [-0.7, 0.4], [0.3, 2.0]]
LABELLED_Y = [1.0, NAN, 0.0, NAN]


def labels(y: list[float]) -> tuple[Labels, LabelsGuide, Batch]:
    return Labels(), LabelsGuide(), Batch({"x": LABELLED_X, "y": y})


def label_outcomes(
    model: Labels, guide: LabelsGuide, x: Tensor, y: float
) -> list[tuple[Tensor, Tensor]]:
    """x is complete; log q(y) counts only where y was drawn."""
    out = []
    for drawn in range(2) if math.isnan(y) else [int(y)]:
        log_q_y = (x @ guide.to_y).log_softmax(-1)[drawn] if math.isnan(y) else torch.zeros(())
        log_q_z = guide.z_logits(x, torch.tensor(drawn)).log_softmax(-1)
        for z in range(3):
            log_q = log_q_y + log_q_z[z]
            out.append((log_q, model.log_joint(x, drawn, z) - log_q))
    return out


def label_evidence(model: Labels, x: Tensor, y: float) -> Tensor:
    ys = range(2) if math.isnan(y) else [int(y)]
    terms = [model.log_joint(x, k, z) for k in ys for z in range(3)]
    return torch.stack(terms).logsumexp(0)


def test_rows_with_and_without_label_have_the_exact_evidence():
    model, guide, batch = labels(LABELLED_Y)
    exact = torch.stack(
        [label_evidence(model, x, y) for x, y in zip(batch["x"], LABELLED_Y, strict=True)]
    )
    assert_evidence(model, guide, batch, exact, iwae(50, "score"))


def test_a_large_number_of_particles_reaches_the_evidence():
    model, guide, batch = labels(LABELLED_Y)
    exact = torch.stack(
        [label_evidence(model, x, y) for x, y in zip(batch["x"], LABELLED_Y, strict=True)]
    )
    rows = iwae(20_000, "score").rows(model, guide, batch)
    torch.testing.assert_close(rows, exact.detach(), rtol=0.0, atol=0.05)


@pytest.mark.parametrize(
    ("bound", "particles"), [(Elbo(), 1), (Elbo(), 2), (Renyi(0.0), 2), (Renyi(0.5), 2)]
)
def test_gradient_of_partly_labelled_rows_agrees_with_enumeration(bound, particles):
    model, guide, batch = labels(LABELLED_Y)

    def exact() -> Tensor:
        outcomes = [
            label_outcomes(model, guide, x, y) for x, y in zip(batch["x"], LABELLED_Y, strict=True)
        ]
        return torch.stack([expected_bound(bound, o, particles) for o in outcomes]).sum()

    objective = Objective(bound, "score", num_particles=particles)
    assert_gradient(model, guide, batch, exact, objective)


def test_labels_that_are_complete_in_the_batch_are_data_in_the_guide():
    """log q(y) does not count: the same as a guide that reads y and does not draw it."""
    model, guide, batch = labels([1.0, 0.0, 0.0, 1.0])
    exact = torch.stack(
        [label_evidence(model, x, float(y)) for x, y in zip(batch["x"], batch["y"], strict=True)]
    )
    assert_evidence(model, guide, batch, exact, iwae(50, "score"))
    reads = LabelsGuide(draws_y=False)
    reads.to_z = guide.to_z
    objective = elbo(3, "score")
    pyro.set_rng_seed(1)
    draws = objective.rows(model, guide, batch)
    pyro.set_rng_seed(1)
    torch.testing.assert_close(draws, objective.rows(model, reads, batch), rtol=0.0, atol=0.0)


def test_an_all_true_mask_equals_complete_labels():
    complete = Batch({"x": LABELLED_X, "y": [1.0, 0.0, 0.0, 1.0]})
    kept = Batch({"x": LABELLED_X, "y": [1.0, 0.0, 0.0, 1.0]}, observed={"y": [True] * 4})
    model, guide = Labels(), LabelsGuide()
    exact = torch.stack(
        [label_evidence(model, x, float(y)) for x, y in zip(kept["x"], kept["y"], strict=True)]
    )
    assert complete.incomplete == ()
    assert kept.incomplete == ("y",)
    assert_evidence(model, guide, kept, exact, iwae(50, "score"))


def test_integer_labels_with_a_mask_equal_floating_ones_with_nan():
    model, guide, floating = labels(LABELLED_Y)
    integer = Batch(
        {"x": LABELLED_X, "y": torch.tensor([1, 0, 0, 0])},
        observed={"y": [True, False, True, False]},
    )
    objective = iwae(4, "score")
    pyro.set_rng_seed(1)
    wanted = objective.rows(model, guide, floating)
    pyro.set_rng_seed(1)
    torch.testing.assert_close(objective.rows(model, guide, integer), wanted, rtol=0.0, atol=0.0)


def test_labels_that_only_the_model_has_are_drawn_from_it():
    """y is in the batch, partly, and not in the guide: its prior proposes it."""
    model = Labels()

    class OnlyZ(PyroModule):
        def forward(self, batch: Batch) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                pyro.sample("z", dist.Categorical(torch.ones(3) / 3))

    batch = Batch({"x": LABELLED_X, "y": LABELLED_Y})
    exact = torch.stack(
        [label_evidence(model, x, y) for x, y in zip(batch["x"], LABELLED_Y, strict=True)]
    )
    assert_evidence(model, OnlyZ(), batch, exact, iwae(50, "score"))
    with pytest.raises(ValueError, match=r"pathwise.*missing entries of site 'y'.*score"):
        iwae(5).plan(model, _no_discrete_latents(), (batch,), {})


def _no_discrete_latents() -> Callable[[Batch], None]:
    def guide(batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", dist.Delta(torch.zeros((), dtype=torch.long)))

    return guide


def test_missing_labels_differ_between_particles():
    model, guide, batch = labels(LABELLED_Y)
    batch = batch.rows(torch.arange(4).repeat(50))
    plan = make_plan(model, guide, (batch,), {})
    y = run(model, guide, (batch,), {}, plan, 3).samples["y"]
    observed = batch.mask("y")
    torch.testing.assert_close(y[:, observed], batch["y"][observed].expand(3, -1))
    for a, b in itertools.combinations(range(3), 2):
        assert bool((y[a, ~observed] != y[b, ~observed]).any())


@pytest.mark.parametrize("inside", [False, True])
def test_what_the_model_draws_differs_between_particles(inside):
    """Wherever the particle plate stands, and at a site without parents."""
    model, _, batch = labels(LABELLED_Y)
    batch = batch.rows(torch.arange(4).repeat(50))
    handlers = [Condition(batch), pyro.plate("particles", 3, dim=-2)]
    with pyro.poutine.trace() as tracer, ExitStack() as stack:
        for handler in reversed(handlers) if inside else handlers:
            stack.enter_context(handler)
        model(batch)
    nodes: Any = tracer.trace.nodes
    y, missing = nodes["y"]["value"], ~batch.mask("y")
    assert y.shape == (3, 200)
    for a, b in itertools.combinations(range(3), 2):
        assert bool((y[a][missing] != y[b][missing]).any())


# ---------------------------------------------------------------------------------------------
# Not missing at random: the mask is data as well


class SelfMaskedGaussian(PyroModule):
    """z ~ N(0, 1), x ~ N(w z, 0.5), s ~ Bernoulli(sigmoid(a + b x)): large x tend to be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.2))
        self.a = nn.Parameter(torch.tensor(0.4))
        self.b = nn.Parameter(torch.tensor(-1.5))

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            x = pyro.sample("x", dist.Normal(self.w * z, 0.5))
            pyro.sample("s", dist.Bernoulli(logits=self.a + self.b * x))

    def log_likelihood(self, z: Tensor, x: Tensor, s: float) -> Tensor:
        """log p(s | x), with log p(x | z) where x is observed, which is what s says."""
        log_s: Tensor = dist.Bernoulli(logits=self.a + self.b * x).log_prob(torch.full_like(x, s))
        return log_s + (dist.Normal(self.w * z, 0.5).log_prob(x) if s else 0.0)


class OneGaussian(PyroModule):
    """q(z | x) = N(c x + d, e), with x read as the batch has it."""

    def __init__(self, site: str = "x", event_dim: int = 0) -> None:
        super().__init__()
        self.site, self.event_dim = site, event_dim
        self.c = nn.Parameter(torch.tensor(0.3))
        self.d = nn.Parameter(torch.tensor(0.1))
        self.log_e = nn.Parameter(torch.tensor(0.1))  # wide: importance weights with light tails

    def loc(self, x: Tensor) -> Tensor:
        return self.c * x + self.d

    def forward(self, batch: Batch) -> None:
        x = batch[self.site]
        x = x.flatten(1).sum(1) if self.event_dim else x
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", dist.Normal(self.loc(x), self.log_e.exp()))


SELF_MASKED = [0.3, -1.1, NAN, 1.4]


def self_masked() -> tuple[SelfMaskedGaussian, OneGaussian, Batch]:
    x = torch.tensor(SELF_MASKED)
    return SelfMaskedGaussian(), OneGaussian(), Batch({"x": x, "s": (~x.isnan()).double()})


def test_self_masking_gaussian_has_the_evidence_of_quadrature():
    model, guide, batch = self_masked()
    (z, e), (wz, we) = (grids(n, n) for n in gauss_hermite(60))
    exact = []
    for value in SELF_MASKED:
        missing = math.isnan(value)
        x = model.w * z + 0.5 * e if missing else torch.full_like(z, value)
        density = model.log_likelihood(z, x, 0.0 if missing else 1.0).exp()
        exact.append((wz * we * density).sum().log())
    # A filled-in number would be told from the truth in the row whose x is missing.
    wrong = torch.sigmoid(-(model.a + model.b * batch.fill["x"])).log()
    assert abs((wrong - exact[2]).item()) > 0.05
    assert_evidence(model, guide, batch, torch.stack(exact), iwae(50), precision=0.01)


@pytest.mark.parametrize("estimator", ["pathwise", "stl", "dreg"])
def test_gradient_through_a_missing_parent_agrees_with_quadrature(estimator):
    model, guide, batch = self_masked()
    (u, e), (wu, we) = (grids(n, n) for n in gauss_hermite(40))

    def exact() -> Tensor:
        total = torch.zeros(())
        for row, value in enumerate(SELF_MASKED):
            scale = guide.log_e.exp()
            z = guide.loc(batch["x"][row]) + scale * u
            log_q = dist.Normal(0.0, 1.0).log_prob(u) - guide.log_e
            missing = math.isnan(value)
            x = model.w * z + 0.5 * e if missing else torch.full_like(z, value)
            log_w = dist.Normal(0.0, 1.0).log_prob(z) - log_q
            log_w = log_w + model.log_likelihood(z, x, 0.0 if missing else 1.0)
            total = total + (wu * we * log_w).sum()
        return total

    assert_gradient(model, guide, batch, exact, elbo(2, estimator))


def test_dreg_and_pathwise_agree_where_missing_entries_have_children():
    model, guide, batch = self_masked()
    parameters = [*model.parameters(), *guide.parameters()]
    assert_agree(model, guide, batch, parameters, ["pathwise", "dreg"])


class SelfMaskedCells(PyroModule):
    """z ~ Categorical(2), x [2] ~ Bernoulli given z, s [2] ~ Bernoulli given x, cell by cell."""

    def __init__(self) -> None:
        super().__init__()
        self.z_logits = nn.Parameter(torch.tensor([0.2, -0.4]))
        self.x_logits = nn.Parameter(torch.tensor([[0.8, -0.5], [-1.0, 0.3]]))
        self.s_logits = nn.Parameter(torch.tensor([0.9, -0.8]))

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Categorical(logits=self.z_logits))
            x = pyro.sample("x", dist.Bernoulli(logits=self.x_logits[z]).to_event(1))
            pyro.sample("s", dist.Bernoulli(logits=self.s_logits[x.long()]).to_event(1))

    def outcomes(self, x: Tensor, log_q: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(log of q(z) p(x missing | z), log w) for every z and all values of the missing cells."""
        out, observed = [], ~x.isnan()
        cells = [[float(v)] if seen else [0.0, 1.0] for v, seen in zip(x, observed, strict=True)]
        for z in range(2):
            for chosen in itertools.product(*cells):
                value = torch.tensor(chosen)
                log_x = dist.Bernoulli(logits=self.x_logits[z]).log_prob(value)
                log_s = dist.Bernoulli(logits=self.s_logits[value.long()])
                log_w = self.z_logits.log_softmax(-1)[z] - log_q[z] + log_x[observed].sum()
                log_w = log_w + log_s.log_prob(observed.double()).sum()
                out.append((log_q[z] + log_x[~observed].sum(), log_w))
        return out


class CellsGuide(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([[0.5, -0.2], [-0.3, 0.4]]))

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", dist.Categorical(logits=batch["x"] @ self.logits))


CELLS = [[1.0, 0.0], [NAN, 1.0], [1.0, NAN], [NAN, NAN]]


def cells() -> tuple[SelfMaskedCells, CellsGuide, Batch]:
    x = torch.tensor(CELLS)
    return SelfMaskedCells(), CellsGuide(), Batch({"x": x, "s": (~x.isnan()).double()})


def cell_outcomes(
    model: SelfMaskedCells, guide: CellsGuide, batch: Batch
) -> list[list[tuple[Tensor, Tensor]]]:
    log_q = (batch["x"] @ guide.logits).log_softmax(-1)
    return [model.outcomes(x, q) for x, q in zip(torch.tensor(CELLS), log_q, strict=True)]


def test_binary_cells_with_a_mask_child_have_the_exact_evidence():
    model, guide, batch = cells()
    exact = torch.stack(
        [
            torch.stack([log_r + log_w for log_r, log_w in row]).logsumexp(0)
            for row in cell_outcomes(model, guide, batch)
        ]
    )
    assert_evidence(model, guide, batch, exact, iwae(50, "score"))


@pytest.mark.parametrize(("bound", "particles"), [(Elbo(), 1), (Renyi(0.0), 2)])
@pytest.mark.parametrize("chunk", [None, 1])
def test_gradient_of_binary_cells_with_a_mask_child_is_exact(bound, particles, chunk):
    model, guide, batch = cells()

    def exact() -> Tensor:
        rows = cell_outcomes(model, guide, batch)
        return torch.stack([expected_bound(bound, row, particles) for row in rows]).sum()

    objective = Objective(bound, "score", num_particles=particles, chunk=chunk)
    assert_gradient(model, guide, batch, exact, objective)


def test_pathwise_refuses_binary_cells_with_a_child_by_name():
    """Also where the first batch that it meets happens to be complete."""
    model, _, batch = cells()
    for rows in ([0, 1, 2, 3], [0]):
        with pytest.raises(ValueError, match=r"pathwise: missing entries of site 'x'.*score"):
            elbo(2).plan(model, _no_discrete_latents(), (batch.rows(rows),), {})


def test_the_score_of_missing_cells_counts_after_a_complete_first_batch():
    model, guide, batch = cells()
    objective = elbo(1, "score")
    objective.loss(model, guide, batch.rows([0]))

    def exact() -> Tensor:
        rows = cell_outcomes(model, guide, batch)
        return torch.stack([expected_bound(Elbo(), row, 1) for row in rows]).sum()

    assert_gradient(model, guide, batch, exact, objective)


# ---------------------------------------------------------------------------------------------
# Modalities


class Modalities(PyroModule):
    """z [2] ~ N(0, 1); a [3] ~ Normal and b [2] of another kind, each from a network of z."""

    def __init__(self, binary: bool = False) -> None:
        super().__init__()
        self.binary = binary
        self.to_a, self.to_b = nn.Linear(2, 3), nn.Linear(2, 2)
        self.drop: nn.Module = nn.Identity()

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("a", dist.Normal(self.drop(self.to_a(z)), 0.7).to_event(1))
            b = self.to_b(z)
            pyro.sample(
                "b", (dist.Bernoulli(logits=b) if self.binary else dist.Normal(b, 1.0)).to_event(1)
            )

    def gaussian(self, sites: Iterable[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Matrix, offset and variances of the chosen modalities given z."""
        parts = {"a": (self.to_a, 0.49), "b": (self.to_b, 1.0)}
        nets = [(parts[s][0], parts[s][1]) for s in sites]
        variance = torch.cat([torch.full((net.out_features,), v) for net, v in nets])
        return (
            torch.cat([net.weight for net, _ in nets]),
            torch.cat([net.bias for net, _ in nets]),
            variance,
        )

    def evidence(self, batch: Batch) -> Tensor:
        """Exact log p ``[B]`` of what is observed (Gaussian modalities only)."""
        sites = list(batch.sites)
        matrix, offset, variance = self.gaussian(sites)
        x = torch.cat([batch[s] for s in sites], 1)
        seen = torch.cat([batch.mask(s) for s in sites], 1)
        covariance = matrix @ matrix.T + variance.diag()
        out = []
        for row, m in zip(x, seen, strict=True):
            if not bool(m.any()):
                out.append(torch.zeros(()))
                continue
            fn = dist.MultivariateNormal(offset[m], covariance[m][:, m])
            out.append(fn.log_prob(row[m]))
        return torch.stack(out)


class Experts(PyroModule):
    """A product of experts: the prior's, and one for each modality that has an entry observed."""

    def __init__(self) -> None:
        super().__init__()
        self.of_a, self.of_b = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, batch: Batch) -> None:
        precision = torch.ones(batch.size, 2)
        weighted = torch.zeros(batch.size, 2)
        for site, net in (("a", self.of_a), ("b", self.of_b)):
            if site in batch:
                loc, log_precision = net(batch[site]).chunk(2, -1)
                seen = batch.mask(site).any(-1, keepdim=True)
                extra = torch.where(seen, 0.2 * log_precision.exp(), 0.0)
                precision, weighted = precision + extra, weighted + extra * loc
        with pyro.plate("data", batch.size, dim=-1):
            q = dist.Normal(weighted / precision, precision.rsqrt())
            pyro.sample("z", q.to_event(1))


def modalities() -> Batch:
    a = torch.randn(5, 3)
    a[1] = NAN  # this row has only b
    a[2, 1] = NAN
    b = torch.randn(5, 2)
    b[3] = NAN  # this row has only a
    return Batch({"a": a, "b": b})


def test_rows_with_other_modalities_missing_have_the_exact_evidence():
    model, guide, batch = Modalities(), Experts(), modalities()
    assert_evidence(model, guide, batch, model.evidence(batch), iwae(50))
    only_a = batch.without("b")
    assert_evidence(model, guide, only_a, model.evidence(only_a), iwae(50))


@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_an_absent_modality_equals_one_that_is_all_nan(estimator, binary, chunk):
    model, guide, batch = Modalities(binary), Experts(), modalities()
    batch = batch.without("b")
    all_nan = Batch(
        {"a": batch["a"], "b": torch.full((5, 2), NAN)}, observed={"a": batch.mask("a")}
    )
    parameters = [*model.parameters(), *guide.parameters()]
    found = []
    for data in (batch, all_nan):
        pyro.set_rng_seed(3)
        loss = iwae(4, estimator, chunk=chunk)(model, guide)(data)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append([loss, *(torch.zeros(()) if g is None else g for g in gradients)])
    for absent, nan in zip(*found, strict=True):
        assert torch.equal(absent.expand(nan.shape), nan)


def test_a_binary_leaf_that_is_absent_is_not_refused():
    """Nothing depends on it, so that no gradient is lost: in every way of being absent."""
    model, guide = Modalities(binary=True), Experts()
    a, b = torch.randn(4, 3), torch.tensor([[1.0, NAN], [0.0, 1.0], [NAN, NAN], [1.0, 1.0]])
    for batch in (Batch({"a": a}), Batch({"a": a, "b": b})):
        for estimator in ("pathwise", "dreg"):
            assert bool(torch.isfinite(iwae(3, estimator)(model, guide)(batch)))


def test_dropout_does_not_make_a_leaf_look_like_a_parent():
    model, guide = Modalities(binary=True), Experts()
    model.drop = nn.Dropout(0.5)
    plan = make_plan(model, guide, (Batch({"a": torch.randn(4, 3)}),), {})
    assert plan.drawn_parents == ()


def test_a_binary_chain_that_is_absent_as_a_whole_is_not_refused():
    """b_0 has a child, b_1, but neither counts; once b_1 is observed, b_0 needs its score."""

    class Chain(PyroModule):
        def forward(self, batch: Batch) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("a", dist.Normal(z, 1.0))
                b = pyro.sample("b_0", dist.Bernoulli(logits=z))
                middle = pyro.sample("middle", dist.Normal(b, 1.0))
                pyro.sample("b_1", dist.Bernoulli(logits=middle))

    model, guide = Chain(), OneGaussian("a")
    batch = Batch({"a": torch.randn(4), "b_1": torch.ones(4)})
    assert make_plan(model, guide, (batch.without("b_1"),), {}).drawn_parents == ()
    assert make_plan(model, guide, (batch,), {}).drawn_parents == ("b_0",)


def test_rows_with_nothing_observed_contribute_nothing():
    model, guide = Modalities(), Experts()
    batch = Batch({"a": torch.full((3, 3), NAN), "b": torch.randn(3, 2)})
    batch = batch.hide("b", torch.tensor([[True], [False], [True]]))
    for objective in (elbo(3), mean_field(), iwae(4, "dreg")):
        rows = objective.rows(model, guide, batch)
        assert rows[0] == 0
        assert rows[2] == 0
        assert rows[1] < 0
    # A guide that is not the prior there: the bound is an estimate of log 1.
    empty = Batch({"x": torch.full((2,), NAN)})

    class Plain(PyroModule):
        def forward(self, batch: Batch) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0))

    assert_evidence(Plain(), OneGaussian(), empty, torch.zeros(2), iwae(50))
    elbo_rows = mean_field().rows(Plain(), OneGaussian(), empty)
    q = dist.Normal(torch.tensor(0.1), torch.tensor(0.1).exp())
    kl = torch.distributions.kl_divergence(q, dist.Normal(0.0, 1.0))
    torch.testing.assert_close(elbo_rows, -kl.expand(2))


# ---------------------------------------------------------------------------------------------
# Sequences


class TwoSteps(PyroModule):
    """z ~ N(0, 1), x_0 ~ N(w z, 0.6), x_1 ~ N(a x_0 + w z, 0.6): x_0 is a parent of x_1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.8))
        self.a = nn.Parameter(torch.tensor(-1.3))

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            x = torch.zeros(())
            for t in range(2):
                x = pyro.sample(f"x_{t}", dist.Normal(self.a * x + self.w * z, 0.6))

    def evidence(self, x: Tensor) -> Tensor:
        unit = torch.stack([self.w, self.w + self.a * self.w])  # what z adds to each step
        noise = torch.stack(
            [torch.tensor([0.6, 0.0]), torch.stack([0.6 * self.a, torch.tensor(0.6)])]
        )
        covariance = unit[:, None] * unit + noise @ noise.T
        seen = ~x.isnan()
        if not bool(seen.any()):
            return torch.zeros(())
        fn = dist.MultivariateNormal(torch.zeros(int(seen.sum())), covariance[seen][:, seen])
        return torch.as_tensor(fn.log_prob(x[seen]))


class TwoStepsGuide(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, 0.3]))

    def loc(self, x: Tensor) -> Tensor:
        return x @ self.weight

    def forward(self, batch: Batch) -> None:
        x = torch.stack([batch["x_0"], batch["x_1"]], -1)
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", dist.Normal(self.loc(x), 0.9))


STEPS = [[0.4, -1.0], [NAN, 1.5], [0.7, NAN], [NAN, NAN]]


def two_steps() -> tuple[TwoSteps, TwoStepsGuide, Batch]:
    return TwoSteps(), TwoStepsGuide(), Batch({"x": STEPS}).steps("x")


def test_a_missing_step_that_is_a_parent_has_the_exact_evidence():
    model, guide, batch = two_steps()
    assert batch.incomplete == ("x_0", "x_1")
    exact = torch.stack([model.evidence(x) for x in torch.tensor(STEPS)])
    assert_evidence(model, guide, batch, exact, iwae(50), precision=0.01)


@pytest.mark.parametrize("estimator", ["pathwise", "stl"])
def test_gradient_through_a_missing_step_agrees_with_quadrature(estimator):
    """The elbo is quadratic in the noise, so that few nodes are exact."""
    model, guide, batch = two_steps()
    (u, e), (wu, we) = (grids(n, n) for n in gauss_hermite(6))
    filled = torch.stack([batch["x_0"], batch["x_1"]], -1)

    def exact() -> Tensor:
        total = torch.zeros(())
        for row, (x_0, x_1) in enumerate(STEPS):
            z = guide.loc(filled[row]) + 0.9 * u
            log_w = dist.Normal(0.0, 1.0).log_prob(z) - (
                dist.Normal(0.0, 1.0).log_prob(u) - math.log(0.9)
            )
            first = dist.Normal(model.w * z, 0.6)
            if math.isnan(x_0):
                value = model.w * z + 0.6 * e
            else:
                value = torch.full_like(z, x_0)
                log_w = log_w + first.log_prob(value)
            if not math.isnan(x_1):
                second = dist.Normal(model.a * value + model.w * z, 0.6)
                log_w = log_w + second.log_prob(torch.full_like(z, x_1))
            total = total + (wu * we * log_w).sum()
        return total

    assert_gradient(model, guide, batch, exact, elbo(2, estimator))


def test_observed_draws_missing_steps_for_any_program_of_pyro():
    """The same rule under plain Pyro: Observed in Pyro's own RenyiELBO, particles vectorised."""
    model, guide, batch = two_steps()
    exact = torch.stack([model.evidence(x) for x in torch.tensor(STEPS)]).detach()
    many = batch.rows(torch.arange(4).repeat(500))
    loss = pyro.infer.RenyiELBO(
        alpha=0.0, num_particles=500, vectorize_particles=True, max_plate_nesting=1
    ).loss(Observed(model), guide, many)
    assert abs(-loss / 500 - float(exact.sum())) < 0.05


# ---------------------------------------------------------------------------------------------
# Likelihoods that can't take a filled-in number, or no missing entry at all


class LogNormalModel(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7, -0.4]))

    def forward(self, batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.LogNormal(z[..., None] * self.w, 0.5).to_event(1))


@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
def test_missing_entries_of_a_lognormal_have_value_and_gradient(estimator):
    x = torch.tensor([[0.5, 2.0], [NAN, 1.3], [0.2, NAN], [NAN, NAN]])
    model, guide, batch = LogNormalModel(), OneGaussian(event_dim=1), Batch({"x": x})
    assert batch.fill["x"] > 0
    u, weights = gauss_hermite(60)
    density = dist.LogNormal(u[:, None, None] * model.w, 0.5)
    log_p = density.log_prob(torch.where(x.isnan(), 1.0, x)).masked_fill(x.isnan(), 0.0).sum(-1)
    exact = (weights[:, None] * log_p.exp()).sum(0).log()
    assert_evidence(model, guide, batch, exact, iwae(50), precision=0.02)
    parameters = [*model.parameters(), *guide.parameters()]
    loss = iwae(5, estimator)(model, guide)(batch)
    for gradient in torch.autograd.grad(loss, parameters):
        assert bool(torch.isfinite(gradient).all())
        assert bool((gradient != 0).any())


def _joint(kind: str) -> Any:
    if kind == "mvn":
        return dist.MultivariateNormal(torch.zeros(3), 0.5 * torch.eye(3) + 0.5)
    mixing = dist.transforms.LowerCholeskyAffine(
        torch.zeros(3), torch.linalg.cholesky(0.5 * torch.eye(3) + 0.5)
    )
    return dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [mixing])


@pytest.mark.parametrize("kind", ["mvn", "flow"])
def test_a_likelihood_that_does_not_factorize_takes_whole_rows_only(kind):
    def model(batch: Batch) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            shift = dist.transforms.AffineTransform(z[..., None], 1.0, event_dim=1)
            pyro.sample("x", dist.TransformedDistribution(_joint(kind), [shift]))

    x = torch.randn(4, 3)
    guide = OneGaussian(event_dim=1)
    with pytest.raises(ValueError, match=r"site 'x'.*does not factorize.*missing in part"):
        iwae(2)(model, guide)(Batch({"x": torch.where(torch.eye(4, 3) > 0, NAN, x)}))
    batch = Batch({"x": x}).hide("x", torch.tensor([[True], [False], [False], [True]]))
    # z adds its variance, 1, to every pair of entries
    evidence = dist.MultivariateNormal(torch.zeros(3), 0.5 * torch.eye(3) + 1.5).log_prob(x)
    exact = torch.where(batch.mask("x")[:, 0], evidence, 0.0)
    assert_evidence(model, guide, batch, exact, iwae(50))


def test_a_guide_that_does_not_factorize_takes_whole_rows_only():
    """A latent that is observed in part of its rows, under a full covariance in the guide."""

    class Model(PyroModule):
        def forward(self, batch: Batch) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                c = pyro.sample("c", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(c.sum(-1), 1.0))

    class Guide(PyroModule):
        def forward(self, batch: Batch) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                loc = 0.3 * batch["x"][:, None].expand(-1, 2)
                covariance = torch.tensor([[0.7, -0.2], [-0.2, 0.7]])
                pyro.sample("c", dist.MultivariateNormal(loc, covariance))

    x = torch.tensor([0.5, -1.0, 2.0])
    c = torch.tensor([[0.1, -0.3], [NAN, NAN], [NAN, NAN]])
    batch = Batch({"x": x, "c": c})
    prior = dist.Normal(0.0, 1.0)
    labelled = prior.log_prob(c[0]).sum() + dist.Normal(c[0].sum(), 1.0).log_prob(x[0])
    marginal = dist.Normal(0.0, math.sqrt(3.0)).log_prob(x)
    exact = torch.stack([labelled, marginal[1], marginal[2]])
    assert_evidence(Model(), Guide(), batch, exact, iwae(50))
    c[1, 0] = 0.2
    with pytest.raises(ValueError, match=r"site 'c'.*does not factorize.*missing in part"):
        iwae(2)(Model(), Guide())(Batch({"x": x, "c": c}))


def test_a_continuous_latent_observed_in_part_of_its_entries_is_exact():
    """c [2] is data in some entries and drawn by the guide in others; dreg agrees with pathwise."""

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.1, -0.6]))

        def forward(self, batch: Batch) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                c = pyro.sample("c", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal((c * self.w).sum(-1), 0.7))

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(torch.tensor([-0.4, 0.5]))  # far from the optimum

        def forward(self, batch: Batch) -> None:
            with pyro.plate("data", batch.size, dim=-1):
                pyro.sample("c", dist.Normal(batch["x"][:, None] * self.v, 0.9).to_event(1))

    model, guide = Model(), Guide()
    x = torch.tensor([0.5, -1.0, 2.0, 0.1])
    c = torch.tensor([[0.1, -0.3], [NAN, 0.6], [1.0, NAN], [NAN, NAN]])
    batch, exact = Batch({"x": x, "c": c}), []
    w = model.w.detach()
    for value, row in zip(x, c, strict=True):
        seen = ~row.isnan()
        given = dist.Normal((row * w)[seen].sum(), ((w[~seen] ** 2).sum() + 0.49).sqrt())
        exact.append(dist.Normal(0.0, 1.0).log_prob(row[seen]).sum() + given.log_prob(value))
    assert_evidence(model, guide, batch, torch.stack(exact), iwae(50))
    parameters = [model.w, guide.v]
    assert_agree(model, guide, batch, parameters, ["pathwise", "dreg", Score(all_sites=True)])


# ---------------------------------------------------------------------------------------------
# Particles in chunks


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 4])
def test_every_chunk_size_gives_the_exact_evidence(chunk):
    model, guide, batch = self_masked()
    (z, e), (wz, we) = (grids(n, n) for n in gauss_hermite(60))
    exact = []
    for value in SELF_MASKED:
        missing = math.isnan(value)
        x = model.w * z + 0.5 * e if missing else torch.full_like(z, value)
        density = model.log_likelihood(z, x, 0.0 if missing else 1.0).exp()
        exact.append((wz * we * density).sum().log())
    objective = iwae(4, chunk=chunk)
    assert_evidence(model, guide, batch, torch.stack(exact), objective, copies=5000)


@pytest.mark.parametrize("estimator", ["pathwise", "dreg", "score"])
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_recomputed_chunks_draw_the_same_missing_entries_again(monkeypatch, estimator, chunk):
    """Gradients as if every chunk had been kept in memory, to the last digits."""
    model, guide, batch = cells() if estimator == "score" else self_masked()
    parameters = [*model.parameters(), *guide.parameters()]

    def gradients() -> list[Tensor]:
        pyro.set_rng_seed(5)
        loss = iwae(4, estimator, chunk=chunk)(model, guide)(batch)
        return [loss, *torch.autograd.grad(loss, parameters)]

    recomputed = gradients()
    monkeypatch.setattr(
        objective_module, "checkpoint", lambda function, *inputs, **_: function(*inputs)
    )
    for a, b in zip(recomputed, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_positive_support_is_respected_by_the_fill():
    """Whoever scores a missing entry at its fill (an encoder, say) meets a point of the support."""
    batch = Batch({"x": torch.tensor([[0.5, NAN], [3.0, 0.2]])})
    assert bool(constraints.positive.check(batch["x"]).all())
