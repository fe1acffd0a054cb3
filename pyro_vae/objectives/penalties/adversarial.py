"""A density ratio that a critic estimates, where no density of q(z) is at hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.objectives.particles import Particles
from pyro_vae.objectives.penalties.latent import Latent, Penalty, chosen
from pyro_vae.objectives.schedules import Schedule
from pyro_vae.objectives.swap import swapped

__all__ = ["Adversarial"]

AGAINST = ("prior", "permuted")


class Adversarial(Penalty, nn.Module):
    """KL(q(z) || r(z)) by a critic T(z) that learns to tell the two apart, T = log q(z) / r(z) at best.

    ``against="prior"`` has the model's prior for r, as adversarial autoencoders and WAE-GAN do
    (Makhzani et al. 2016, Tolstikhin et al. 2018); ``"permuted"`` the product of the marginals of q(z),
    its draws by permuting each dimension over the rows, which makes it FactorVAE's total correlation
    (Kim & Mnih 2018, who take the rows of a second batch). The value is E_q T; its gradient reaches z,
    not the critic. The critic's own loss, the cross entropy of both kinds of draws with z detached, is
    added with value 0, so that one optimizer step trains both.

    Args:
        critic: module ``[n, D]`` -> logits ``[n, 1]`` or ``[n]``, an MLP say.
        speed: what multiplies the critic's gradient. (Adam does not mind; a learning rate of its own is
            a parameter group of the optimizer.)

    Raises:
        ValueError: unknown ``against``.
    """

    def __init__(
        self,
        critic: nn.Module,
        weight: float | Schedule = 1.0,
        against: str = "prior",
        speed: float = 1.0,
        site: str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        Penalty.__init__(self, weight, site)
        chosen("Adversarial", "against", against, AGAINST)
        self.critic, self.against, self.speed = critic, against, speed

    def __call__(self, particles: Particles, step: Tensor) -> Tensor:
        """``[]``; see ``Penalty``."""
        latent = self.latent(particles)
        own = self.cross_entropy(latent)
        return super().__call__(particles, step) + self.speed * (own - own.detach())

    def estimate(self, latent: Latent) -> Tensor:
        constant = {id(p): p.detach() for p in self.critic.parameters()}
        # running statistics move once, by the cross entropy
        constant |= {id(b): b.clone() for b in self.critic.buffers()}
        with swapped(self.critic, constant):
            return self._logits(latent.draws).mean()

    def cross_entropy(self, latent: Latent) -> Tensor:
        """What the critic minimizes, ``[]`` nats: log 4 where it can't tell the draws apart."""
        z = latent.draws.detach()
        other = latent.from_prior() if self.against == "prior" else _permuted(z)
        of_q, of_other = self._logits(torch.cat([z, other], 1)).chunk(2, 1)
        return softplus(-of_q).mean() + softplus(of_other).mean()

    def _logits(self, z: Tensor) -> Tensor:
        """``[K, n, D]`` -> ``[K, n]``."""
        logits: Tensor = self.critic(z.flatten(0, 1))
        return logits.reshape(z.shape[:2])


def _permuted(z: Tensor) -> Tensor:
    """Each dimension in an order of its own over the rows."""
    return z.gather(1, torch.rand_like(z).argsort(1))
