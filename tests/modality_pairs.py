"""Two views of one latent, linear and Gaussian: log p of any part of the data is known, and so are the
messages that each site sends to the latent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.batch import Batch
from pyro_vae.conditionals import Gaussian, StandardNormal
from pyro_vae.guides import ExpertsGuide
from pyro_vae.models import MultimodalModel

__all__ = ["Message", "data", "evidence", "guide_of", "linear_model"]

SIZES = {"x": 4, "y": 3}
Z_DIM = 2
PATTERNS = ((True, True), (True, False), (False, True), (False, False))  # of x and y, row by row


class Message(nn.Module):
    """p(x_m | z) as a function of z, normalised: a Gaussian, independent dimensions since the columns
    of W are orthogonal. ``posterior`` multiplies it by N(0, I)."""

    def __init__(self, likelihood: Any, posterior: bool = False) -> None:
        super().__init__()
        w, scale = likelihood.net.weight.detach(), likelihood.scale.detach()
        precision = w.square().sum(0) / scale**2
        self.net = nn.Linear(w.shape[0], w.shape[1])
        total = precision + (1.0 if posterior else 0.0)
        with torch.no_grad():
            self.net.weight.copy_((w / scale**2 / total).T)
            self.net.bias.copy_(-self.net.weight @ likelihood.net.bias)
        self.log_scale = nn.Parameter(-0.5 * total.log())

    def forward(self, x: Tensor) -> Any:
        return dist.Normal(self.net(x), self.log_scale.exp()).to_event(1)


def linear_model() -> MultimodalModel:
    """z ~ N(0, I), x_m ~ N(W_m z + b_m, s²), the columns of W_m orthogonal."""
    likelihoods = {}
    for site, size in SIZES.items():
        net = nn.Linear(Z_DIM, size)
        basis, _ = torch.linalg.qr(torch.randn(size, Z_DIM))
        net.weight.data = basis * torch.tensor([1.5, 0.7])
        likelihoods[site] = Gaussian(net, (size,), scale=0.8)
    return MultimodalModel(StandardNormal(Z_DIM), likelihoods)


def guide_of(
    model: MultimodalModel,
    subsets: Sequence[Sequence[str]] | None = None,
    prior_expert: bool = True,
    posterior: bool = False,
) -> ExpertsGuide:
    """The experts that are exact for the model."""
    experts = {site: Message(p, posterior) for site, p in model.likelihoods.items()}
    return ExpertsGuide(experts, model.prior, subsets, prior_expert=prior_expert)


def data(rows: int = 8) -> Batch:
    """Rows that have both sites, x, y, none, and again."""
    batch = Batch({site: 1.5 * torch.randn(rows, size) for site, size in SIZES.items()})
    for site, column in zip(SIZES, zip(*PATTERNS, strict=True), strict=True):
        has = torch.tensor(column).repeat(rows // len(column))
        batch = batch.hide(site, (~has).unsqueeze(1))
    return batch


def evidence(model: MultimodalModel, batch: Batch, sites: Iterable[str] = SIZES) -> Tensor:
    """log p of what is observed of some sites, ``[B]``; sites are missing as a whole."""
    sites = list(sites)
    rows = []
    for row in range(len(batch)):
        has = [site for site in sites if site in batch and bool(batch.mask(site)[row].all())]
        if not has:
            rows.append(torch.zeros(()))
            continue
        parts: list[Any] = [model.likelihoods[site] for site in has]
        w = torch.cat([p.net.weight for p in parts])
        noise = torch.cat([p.scale.expand(p.net.bias.shape) for p in parts]).square().diag()
        normal = dist.MultivariateNormal(torch.cat([p.net.bias for p in parts]), w @ w.T + noise)
        rows.append(normal.log_prob(torch.cat([batch[site][row] for site in has])))
    return torch.stack(rows).detach()
