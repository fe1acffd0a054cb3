"""Small pairs with known answers, and how losses and gradients are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions import transforms as flows
from pyro.nn import PyroModule, PyroParam
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.nn import leading, mlp
from pyro_vae.objectives.particles import Particles, run
from pyro_vae.objectives.plan import Plan, make_plan

X_DIM, Z_DIM = 3, 2
Program = Callable[..., Any]


def data(rows: int = 6, dim: int = X_DIM, seed: int = 5) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def normal(parameters: Tensor) -> Any:
    """Diagonal Gaussian from ``[..., 2 * D]``."""
    loc, raw = parameters.chunk(2, -1)
    return dist.Normal(loc, 0.1 + softplus(raw)).to_event(1)


# ---------------------------------------------------------------------------------------------
# One latent


class LinearModel(nn.Module):
    """z ~ N(0, I), x ~ N(W z + b, s² I): log p(x) is known."""

    def __init__(self, z_dim: int = Z_DIM) -> None:
        super().__init__()
        self.net = nn.Linear(z_dim, X_DIM)
        self.log_scale = nn.Parameter(torch.tensor(-0.3))
        self.z_dim = z_dim

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.z_dim]).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), self.log_scale.exp()).to_event(1), obs=x)

    def evidence(self, x: Tensor) -> Tensor:
        """log p(x) of each row."""
        w, noise = self.net.weight, torch.eye(X_DIM) * (2 * self.log_scale).exp()
        log_p: Tensor = dist.MultivariateNormal(self.net.bias, w @ w.T + noise).log_prob(x)
        return log_p


class Guide(nn.Module):
    """One site, a diagonal Gaussian."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Linear(X_DIM, 2 * Z_DIM)

    def posterior(self, x: Tensor) -> Any:
        return normal(self.net(x))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))


def as_functions(model: nn.Module, guide: nn.Module) -> tuple[Program, Program]:
    """The pair as plain functions, which do not say which modules they use."""

    def run_model(x: Tensor) -> None:
        pyro.module("model", model)
        model.forward(x)

    def run_guide(x: Tensor) -> None:
        pyro.module("guide", guide)
        guide.forward(x)

    return run_model, run_guide


class PyroParamGuide(PyroModule):
    """A constrained parameter, which Pyro's store would put back."""

    weight: Any
    scale: Any

    def __init__(self) -> None:
        super().__init__()
        self.weight = PyroParam(0.3 * torch.randn(Z_DIM, X_DIM))
        self.scale = PyroParam(torch.full((Z_DIM,), 0.7), constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.weight.T, self.scale).to_event(1))


class FlowGuide(Guide):
    """A Gaussian pushed through a flow, which reads its parameters when a density is taken."""

    def __init__(self, flow: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.flow = flow()

    def posterior(self, x: Tensor) -> Any:
        return dist.TransformedDistribution(super().posterior(x), [self.flow])


class MethodPair(nn.Module):
    """Model and guide as methods that register their module by hand, as Pyro's examples do."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp((X_DIM, 4, 2 * Z_DIM), nn.Tanh), nn.Linear(Z_DIM, X_DIM)
        self.second = nn.Linear(Z_DIM, 2)

    def model(self, x: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            top = pyro.sample("z2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            loc = 0.5 * top.expand(*top.shape[:-1], Z_DIM)
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.8).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(self.encoder(x)))
            pyro.sample("z2", normal(self.second(z)))


class VampModel(nn.Module):
    """The prior is a mixture of the guide's posteriors at pseudo-inputs: a shared network."""

    def __init__(self, guide: Guide, components: int = 3) -> None:
        super().__init__()
        self.guide = guide
        self.pseudo_inputs = nn.Parameter(torch.randn(components, X_DIM))
        self.net = nn.Linear(Z_DIM, X_DIM)

    def forward(self, x: Tensor) -> None:
        weights = dist.Categorical(torch.ones(len(self.pseudo_inputs)))
        prior = dist.MixtureSameFamily(weights, self.guide.posterior(self.pseudo_inputs))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(self.net(z), 0.8).to_event(1), obs=x)


# ---------------------------------------------------------------------------------------------
# Two latents


class LadderModel(nn.Module):
    """z2 -> z1 -> x."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.net = nn.Linear(1, 2 * Z_DIM), nn.Linear(Z_DIM, X_DIM)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", normal(self.down(z2)))
            pyro.sample("x", dist.Normal(self.net(z1), 0.8).to_event(1), obs=x)


class BottomUp(nn.Module):
    """z1 | x, then z2 | z1: not the model's order."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.up = net or nn.Linear(X_DIM, 2 * Z_DIM), nn.Linear(Z_DIM, 2)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", normal(self.net(x)))
            pyro.sample("z2", normal(self.up(z1)))


class TopDown(nn.Module):
    """z2 | x, then z1 | z2, x: the model's order."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.up = nn.Linear(X_DIM + 1, 2 * Z_DIM), nn.Linear(X_DIM, 2)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", normal(self.up(x)))
            both = torch.cat([x.expand(*z2.shape[:-1], X_DIM), z2], -1)
            pyro.sample("z1", normal(self.net(both)))


class PyroParamLadder(PyroModule):
    """Bottom-up, with constrained parameters."""

    scale: Any
    up: Any

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(X_DIM, Z_DIM)
        self.scale = PyroParam(torch.full((Z_DIM,), 0.7), constraints.positive)
        self.up = PyroParam(0.3 * torch.randn(1, Z_DIM))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(self.net(x), self.scale).to_event(1))
            pyro.sample("z2", dist.Normal(z1 @ self.up.T, 0.9).to_event(1))


class _ScaleSites(Messenger):
    def __init__(self, scales: Mapping[str, Any]) -> None:
        super().__init__()
        self.scales = scales

    def _pyro_sample(self, msg: Any) -> None:
        msg["scale"] = msg["scale"] * self.scales.get(msg["name"], 1.0)


class Annealed(nn.Module):
    """A program with ``poutine.scale`` around the sites that ``scales`` names."""

    def __init__(self, program: nn.Module, scales: Mapping[str, Any]) -> None:
        super().__init__()
        self.program, self.scales = program, scales

    def forward(self, x: Tensor) -> None:
        with _ScaleSites(self.scales):
            self.program(x)


def _vamp() -> tuple[Program, Program]:
    guide = Guide()
    return VampModel(guide), guide


def _methods() -> tuple[Program, Program]:
    pair = MethodPair()
    return pair.model, pair.guide


def batch_norm() -> nn.Module:
    """Encoder with running statistics."""
    return nn.Sequential(
        nn.Linear(X_DIM, 4), leading(nn.BatchNorm1d(4), 1), nn.Tanh(), nn.Linear(4, 2 * Z_DIM)
    )


PAIRS: dict[str, Callable[[], tuple[Program, Program]]] = {
    "one latent": lambda: (LinearModel(), Guide()),
    "PyroParam": lambda: (LinearModel(), PyroParamGuide()),
    "dropout": lambda: (LinearModel(), Guide(mlp((X_DIM, 8, 2 * Z_DIM), nn.Tanh, dropout=0.5))),
    "coupling flow": lambda: (LinearModel(), FlowGuide(lambda: flows.affine_coupling(2, [4]))),
    "spline flow": lambda: (LinearModel(), FlowGuide(lambda: flows.spline(2, count_bins=4))),
    "inverse autoregressive flow": lambda: (
        LinearModel(),
        FlowGuide(lambda: flows.affine_autoregressive(2, [4])),
    ),
    "prior that shares the guide's network": _vamp,
    "bottom-up ladder": lambda: (LadderModel(), BottomUp()),
    "top-down ladder": lambda: (LadderModel(), TopDown()),
    "PyroParam ladder": lambda: (LadderModel(), PyroParamLadder()),
    "BatchNorm ladder": lambda: (LadderModel(), BottomUp(batch_norm())),
    "methods with pyro.module": _methods,
}


# ---------------------------------------------------------------------------------------------
# Comparing


def parameters(*programs: Program) -> list[nn.Parameter]:
    """The parameters of modules and of the modules whose methods are given, each once."""
    owners: list[Any] = [getattr(program, "__self__", program) for program in programs]
    unique = {id(p): p for owner in owners for p in owner.parameters()}
    return list(unique.values())


def flat_gradient(loss: Tensor, wanted: Iterable[Tensor]) -> Tensor:
    """d loss / d parameters as one vector."""
    wanted = list(wanted)
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    pairs = zip(wanted, grads, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def value_and_gradient(
    objective: Any, model: Program, guide: Program, *args: Any, seed: int = 1, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Loss and flat gradient at a seed; anything with ``differentiable_loss``."""
    pyro.set_rng_seed(seed)
    loss = objective.differentiable_loss(model, guide, *args, **kwargs)
    return loss.detach(), flat_gradient(loss, parameters(model, guide))


def assert_same(ours: Any, wanted: Any) -> None:
    """Equal to 1e-10; tensors, or tuples and mappings of them."""
    torch.testing.assert_close(ours, wanted, atol=1e-10, rtol=1e-10)


def sigmas(samples: Tensor) -> Tensor:
    """How many standard errors the means of ``[repeats, ...]`` are away from 0."""
    mean, error = samples.mean(0), samples.std(0) / len(samples) ** 0.5
    return torch.where(mean.abs() < 1e-12, 0.0, mean / error)


def plan_of(model: Program, guide: Program, *args: Any) -> Plan:
    return make_plan(model, guide, args, {})


def table(model: Program, guide: Program, *args: Any, number: int = 3, **options: Any) -> Particles:
    return run(model, guide, args, {}, plan_of(model, guide, *args), number, **options)


def standard(*shape: int) -> Any:
    return dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))
