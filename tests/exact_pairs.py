"""Linear-Gaussian pairs in which log p(x), the posterior and the ELBO are known."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.batch import Batch
from tests.small_pairs import X_DIM, Z_DIM, Guide, LinearModel

SIGMAS = 5.0


class LinearBatchModel(LinearModel):
    """The same program without its data."""

    def forward(self, batch: Any) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.z_dim]).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), self.log_scale.exp()).to_event(1))

    def marginal(self, x: Tensor, mask: Tensor) -> Tensor:
        """log p of the observed entries of each row."""
        w, b, noise = self.net.weight, self.net.bias, (2 * self.log_scale).exp()
        cov = w @ w.T + noise * torch.eye(X_DIM)
        rows = []
        for row, seen in zip(x, mask, strict=True):
            if not bool(seen.any()):
                rows.append(torch.zeros(()))
                continue
            part = dist.MultivariateNormal(b[seen], cov[seen][:, seen])
            rows.append(part.log_prob(row[seen]))
        return torch.stack(rows)


class BatchGuide(Guide):
    """A guide that reads the site ``x`` of a batch."""

    def forward(self, batch: Any) -> None:
        with pyro.plate("data", batch.size, dim=-1):
            pyro.sample("z", self.posterior(batch["x"]))


class ExactGuide(nn.Module):
    """The posterior of a ``LinearModel``, its scale multiplied."""

    def __init__(self, model: LinearModel, scale: float = 1.0) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def posterior(self, x: Tensor) -> Any:
        w, noise = self.model.net.weight, (2 * self.model.log_scale).exp()
        precision = torch.eye(self.model.z_dim) + w.T @ w / noise
        cov = torch.linalg.inv(precision)
        loc = (x - self.model.net.bias) @ w @ cov / noise
        return dist.MultivariateNormal(loc, scale_tril=self.scale * torch.linalg.cholesky(cov))

    def forward(self, data: Any) -> None:
        x = data["x"] if isinstance(data, Batch) else data
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior(x))


class LinearLadder(nn.Module):
    """z2 ~ N(0, 1), z1 ~ N(A z2, I), x ~ N(W z1 + b, s²)."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.net = nn.Linear(1, Z_DIM, bias=False), nn.Linear(Z_DIM, X_DIM)
        self.noise = 0.8

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(self.down(z2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z1), self.noise).to_event(1), obs=x)

    def prior_cov(self) -> Tensor:
        """Covariance of z1."""
        return torch.eye(Z_DIM) + self.down.weight @ self.down.weight.T

    def evidence(self, x: Tensor) -> Tensor:
        """log p(x) of each row."""
        w = self.net.weight
        cov = w @ self.prior_cov() @ w.T + self.noise**2 * torch.eye(X_DIM)
        density: Tensor = dist.MultivariateNormal(self.net.bias, cov).log_prob(x)
        return density


class ExactLadderGuide(nn.Module):
    """q(z1 | x) q(z2 | z1): not the model's order, and exact."""

    def __init__(self, model: LinearLadder) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> None:
        w, a = self.model.net.weight, self.model.down.weight
        noise = self.model.noise**2
        cov = torch.linalg.inv(torch.linalg.inv(self.model.prior_cov()) + w.T @ w / noise)
        loc = (x - self.model.net.bias) @ w @ cov / noise
        variance = 1 / (1 + a.T @ a).squeeze()
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.MultivariateNormal(loc, cov))
            q = dist.Normal(variance * (z1 @ a), variance.sqrt()).to_event(1)
            pyro.sample("z2", q)


def linear_elbo(model: LinearModel, guide: Guide, x: Tensor) -> tuple[Tensor, Tensor]:
    """ELBO ``[B]`` of a diagonal Gaussian guide, and its KL per row and dimension ``[B, Z_DIM]``."""
    q, w, scale = guide.posterior(x).base_dist, model.net.weight, model.log_scale.exp()
    kl = 0.5 * (q.scale**2 + q.loc**2 - 1) - q.scale.log()
    fit = dist.Normal(model.net(q.loc), scale).log_prob(x).sum(-1)
    spread = 0.5 * (q.scale**2 @ (w**2).sum(0)) / scale**2
    return fit - spread - kl.sum(-1), kl


class OptimalGuide(nn.Module):
    """A family that holds the posterior of a ``LinearModel`` whose W has orthogonal columns."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.raw = nn.Linear(X_DIM, Z_DIM), nn.Parameter(torch.zeros(Z_DIM))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), softplus(self.raw)).to_event(1))


class DiscreteModel(nn.Module):
    """y ~ Categorical, x ~ N(loc_y, I): log p(x) by enumeration."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(classes))
        self.loc = nn.Parameter(1.5 * torch.randn(classes, X_DIM))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            pyro.sample("x", dist.Normal(self.loc[y], 1.0).to_event(1), obs=x)

    def evidence(self, x: Tensor) -> Tensor:
        """log p(x) of each row."""
        joint = dist.Normal(self.loc, 1.0).to_event(1).log_prob(x[:, None])
        return torch.logsumexp(joint + torch.log_softmax(self.logits, -1), -1)


class DiscreteGuide(nn.Module):
    """q(y | x), as wrong as its starting point."""

    def __init__(self, classes: int = 3, sharpness: float = 1.0) -> None:
        super().__init__()
        self.net, self.sharpness = nn.Linear(X_DIM, classes), sharpness

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=self.sharpness * self.net(x)))


def exact_pair(name: str) -> tuple[Any, Any]:
    """A model with ``evidence`` and its exact posterior."""
    if name == "one layer":
        model = LinearModel()
        return model, ExactGuide(model)
    ladder = LinearLadder()
    return ladder, ExactLadderGuide(ladder)


def broad(guide: Any) -> Any:
    """About as wide as the prior, so that importance weights have a variance."""
    with torch.no_grad():
        for linear in (part for part in guide.modules() if isinstance(part, nn.Linear)):
            linear.weight *= 0.1
            linear.bias.zero_()
            linear.bias[len(linear.bias) // 2 :] = 1.2
    return guide
