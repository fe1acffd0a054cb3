"""The step in stock Pyro, as its tutorials write it; and the pair with two latents that ours takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.speed.cases import FLOOR, LR, Case, networks, rows
from benchmarks.speed.runner import Runner, by_epochs, torch_runner

__all__ = ["TwoLatents", "VAE", "make", "program"]


class VAE(nn.Module):
    """Model and guide as methods that register their networks, as in Pyro's VAE tutorial."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, nets = case, networks(case)
        self.encoder, self.decoder = nets["encoder"], nets["decoder"]

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            loc = x.new_zeros(len(x), self.case.latent)
            scale = x.new_ones(len(x), self.case.latent)
            z = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
            pyro.sample("x", likelihood(self.case, self.decoder(z)), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", gaussian(self.encoder(scaled(self.case, x))))


class TwoLatents(nn.Module):
    """p(z2) p(z1 | z2) p(x | z1) and q(z1 | x) q(z2 | z1)."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.nets = case, networks(case)
        assert case.upper is not None
        self.top = case.upper[1]

    def model(self, x: Tensor) -> None:
        pyro.module("nets", self.nets)
        with pyro.plate("data", len(x)):
            loc, scale = x.new_zeros(len(x), self.top), x.new_ones(len(x), self.top)
            top = pyro.sample("z2", dist.Normal(loc, scale).to_event(1))
            z = pyro.sample("z1", gaussian(self.nets["downward"](top)))
            pyro.sample("x", likelihood(self.case, self.nets["decoder"](z)), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("nets", self.nets)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z1", gaussian(self.nets["encoder"](scaled(self.case, x))))
            pyro.sample("z2", gaussian(self.nets["upward"](z)))


def program(case: Case) -> Any:
    return VAE(case) if case.upper is None else TwoLatents(case)


def gaussian(parameters: Tensor) -> Any:
    loc, raw = parameters.chunk(2, -1)
    return dist.Normal(loc, softplus(raw) + FLOOR).to_event(1)


def likelihood(case: Case, logits: Tensor) -> Any:
    if case.counts > 1:
        return dist.Binomial(case.counts, logits=logits).to_event(len(case.event))
    return dist.Bernoulli(logits=logits).to_event(len(case.event))


def scaled(case: Case, x: Tensor) -> Tensor:
    return x / case.counts if case.counts > 1 else x


def make(case: Case, device: str, pick: bool, way: str) -> Runner:
    """``SVI.step``; ``way`` says how rows are picked, by ``"svi"`` or ``"svi-loader"``."""
    pyro.clear_param_store()
    pair, batch = program(case).to(device), rows(case, case.batch).to(device)
    elbo: Any = Trace_ELBO()
    if case.particles > 1:
        elbo = RenyiELBO(alpha=0, num_particles=case.particles, vectorize_particles=True)
    svi = SVI(pair.model, pair.guide, Adam({"lr": LR}), loss=elbo)

    def step(x: Tensor) -> float:
        return svi.step(x) / len(x)  # type: ignore[no-any-return]

    def loader(data: Tensor) -> Iterable[Tensor]:
        """The tutorial's: rows on the host, collated one by one."""
        for (x,) in loading:
            yield x.to(device)

    runner = torch_runner(step, batch, pair.parameters(), device)
    if not pick:
        return runner
    loading = DataLoader(TensorDataset(rows(case)), batch_size=case.batch, shuffle=True)
    return by_epochs(runner, case, device, step, loader if way == "svi-loader" else None)
