"""Proposals for importance sampling: the guide, made wider so that its tails cover the posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.batch import Condition
from pyro_vae.objectives.particles import Particles, run
from pyro_vae.objectives.plan import Plan
from pyro_vae.objectives.tracing import Replay, core, trace, unwrap

__all__ = ["Proposal", "candidates", "log_weights_of"]

Program = Callable[..., Any]
SCALES = (1.0, 1.25, 1.5, 2.0, 3.0)
SHARES = (0.0, 0.05, 0.2, 0.5)


@dataclass(frozen=True)
class Proposal:
    """A guide with its Gaussians' scales multiplied, or mixed with the model's prior.

    Any choice gives a lower bound on log p(x) in expectation.

    Attributes:
        scale: factor on the scale of the guide's Gaussian sites.
        prior_share: share of the particles drawn from the prior (a defensive mixture, whose density
            is that of the whole mixture).
    """

    scale: float = 1.0
    prior_share: float = 0.0

    def log_weights(
        self, model: Program, guide: Program, args: tuple[Any, ...], plan: Plan, size: int
    ) -> Tensor:
        """log p(x, z) - log q(z) of ``size`` particles, ``[K, B]``."""
        handlers: list[Any] = [_Widen(self.scale)] if self.scale != 1.0 else []
        if self.prior_share:
            handlers = [Replay(_mixed(model, guide, args, plan, size, self.prior_share))]
        table = run(model, guide, args, {}, plan, size, handlers=handlers)
        return log_weights_of(table, self.prior_share)

    def __str__(self) -> str:
        if self.prior_share:
            return f"mixed with {self.prior_share:.0%} prior"
        return f"widened x{self.scale:g}" if self.scale != 1.0 else "not widened"


def candidates(
    guide_sites: Mapping[str, Any], model_sites: Mapping[str, Any]
) -> tuple[Proposal, ...]:
    """The proposals that make sense for a pair, the guide itself first."""
    if any(widened(site["fn"], 2.0) is not None for site in guide_sites.values()):
        return tuple(Proposal(scale=scale) for scale in SCALES)
    if _takes_prior_draws(guide_sites, model_sites):
        return tuple(Proposal(prior_share=share) for share in SHARES)
    return (Proposal(),)


def _takes_prior_draws(guide_sites: Mapping[str, Any], model_sites: Mapping[str, Any]) -> bool:
    """Whether the guide's density of a draw from the prior is known, and the prior's own."""
    drawn = False  # a draw that only the model makes, on which the prior of a latent may depend
    for name, site in model_sites.items():
        if name in guide_sites and drawn:
            return False
        drawn |= name not in guide_sites and (not site["is_observed"] or "drawn" in site["infer"])
    for name, site in guide_sites.items():
        if name not in model_sites or site["infer"].get("observed") is not None:
            return False
        if isinstance(core(site["fn"]), dist.Delta):
            return False
        try:
            site["fn"].log_prob(site["value"].clone())
        except (KeyError, NotImplementedError):  # a flow without inverse
            return False
    return bool(guide_sites)


def widened(fn: Any, scale: float) -> Any:
    """``fn`` with its Gaussian scale multiplied, or None if it has none."""
    if isinstance(fn, dist.Independent):
        base = widened(fn.base_dist, scale)
        return None if base is None else base.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution):
        base = widened(fn.base_dist, scale)
        return None if base is None else base.mask(fn._mask)
    if type(fn) is dist.TransformedDistribution:  # one derived from it has its own density
        base = widened(fn.base_dist, scale)
        return None if base is None else dist.TransformedDistribution(base, fn.transforms)
    if isinstance(fn, dist.Normal):
        return dist.Normal(fn.loc, fn.scale * scale)
    if isinstance(fn, dist.MultivariateNormal):
        return dist.MultivariateNormal(fn.loc, scale_tril=fn.scale_tril * scale)
    return None


class _Widen(Messenger):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["done"] and isinstance(msg["fn"], dist.Distribution):
            fn = widened(msg["fn"], self.scale)
            if fn is not None:
                msg["fn"] = fn


def _mixed(
    model: Program, guide: Program, args: tuple[Any, ...], plan: Plan, size: int, share: float
) -> dict[str, Tensor]:
    """The guide's latents, ``share`` of them drawn from the model given the data's place but not
    their values. Each particle of each row chooses for itself, so that they are independent."""
    bare, batch = unwrap(model, args)
    drawn, _ = trace(guide, args, {}, [], size, plan.nesting)
    conditioned = [Condition(batch, proposed=drawn)] if batch is not None else []
    prior, _ = trace(bare, args, {}, conditioned, size, plan.nesting)
    mixed, choice = {}, None
    for name, site in drawn.items():
        value, event_dim = site["value"], site["fn"].event_dim
        if choice is None:
            rows = math.prod(value.shape[dim - event_dim] for dim in plan.rows)
            choice = torch.rand(size, rows, device=value.device) < share
        here = plan.spread(choice, value.shape, event_dim)
        mixed[name] = torch.where(here, prior[name]["value"], value)
    return mixed


def log_weights_of(particles: Particles, share: float = 0.0) -> Tensor:
    """log p(x, z) - log q(z) of each particle, ``[K, B]``; q is mixed with ``share`` of the prior."""
    likelihood, prior, posterior = (
        torch.zeros(()) if (total := particles.summed(terms)) is None else total
        for terms in (particles.likelihood, particles.prior, particles.posterior)
    )
    if share:
        posterior = torch.logaddexp(posterior + math.log1p(-share), prior + math.log(share))
    return likelihood + prior - posterior
