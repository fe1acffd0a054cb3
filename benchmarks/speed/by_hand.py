"""The step in plain PyTorch, as somebody who knows it well would write it for one net."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from benchmarks.speed.cases import FLOOR, LR, Case, networks, rows
from benchmarks.speed.runner import Runner, by_epochs, torch_runner

__all__ = ["STEPS", "loss", "make"]

BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam

Nets = nn.ModuleDict
Step = Callable[[Tensor], Tensor]


def make(case: Case, device: str, pick: bool, way: str) -> Runner:
    """One of ``STEPS``, ready."""
    nets = networks(case).to(device)
    batch = rows(case, case.batch).to(device)
    before = copy.deepcopy(nets.state_dict())
    step = STEPS[way](nets, case, batch)
    nets.load_state_dict(before)  # a CUDA graph is captured after some steps
    runner = torch_runner(step, batch, nets.parameters(), device)
    return by_epochs(runner, case, device, step) if pick else runner


# ---------------------------------------------------------------------------------------------
# The loss, nats per row, without log C(n, x)


def loss(nets: Nets, case: Case, x: Tensor) -> Tensor:
    if case.upper is not None:
        if case.particles > 1:
            raise ValueError("by hand: two latents are written for the ELBO alone")
        return _two_latents(nets, case, x)
    return _elbo(nets, case, x) if case.particles == 1 else _iwae(nets, case, x)


def _gaussian(net: nn.Module, y: Tensor) -> tuple[Tensor, Tensor]:
    loc, raw = net(y).chunk(2, -1)
    return loc, softplus(raw) + FLOOR


def _encoded(nets: Nets, case: Case, x: Tensor) -> tuple[Tensor, Tensor]:
    return _gaussian(nets["encoder"], x / case.counts if case.counts > 1 else x)


def _distortion(case: Case, logits: Tensor, x: Tensor, reduction: str = "sum") -> Tensor:
    if case.counts == 1:
        return binary_cross_entropy_with_logits(logits, x, reduction=reduction)
    scaled = binary_cross_entropy_with_logits(logits, x / case.counts, reduction=reduction)
    return case.counts * scaled


def _elbo(nets: Nets, case: Case, x: Tensor) -> Tensor:
    loc, scale = _encoded(nets, case, x)
    noise = torch.randn_like(loc)
    z = loc + scale * noise
    rate = 0.5 * (z.square() - noise.square()).sum() - scale.log().sum()
    return (_distortion(case, nets["decoder"](z), x) + rate) / len(x)


def _iwae(nets: Nets, case: Case, x: Tensor) -> Tensor:
    loc, scale = _encoded(nets, case, x)
    noise = torch.randn(case.particles, *loc.shape, device=x.device)
    z = loc + scale * noise
    rate = 0.5 * (z.square() - noise.square()).sum(-1) - scale.log().sum(-1)
    logits = nets["decoder"](z)
    distortion = _distortion(case, logits, x.expand_as(logits), "none").sum(-1)
    log_w = -(distortion + rate)
    return math.log(case.particles) - log_w.logsumexp(0).mean()


def _two_latents(nets: Nets, case: Case, x: Tensor) -> Tensor:
    loc, scale = _encoded(nets, case, x)
    noise = torch.randn_like(loc)
    z = loc + scale * noise
    up_loc, up_scale = _gaussian(nets["upward"], z)
    up_noise = torch.randn_like(up_loc)
    top = up_loc + up_scale * up_noise
    down_loc, down_scale = _gaussian(nets["downward"], top)
    away = (z - down_loc) / down_scale
    rate = 0.5 * (away.square() - noise.square()).sum() + (down_scale.log() - scale.log()).sum()
    rate = rate + 0.5 * (top.square() - up_noise.square()).sum() - up_scale.log().sum()
    return (_distortion(case, nets["decoder"](z), x) + rate) / len(x)


# ---------------------------------------------------------------------------------------------
# The step


def _eager(nets: Nets, case: Case, batch: Tensor) -> Step:
    """Fused Adam is the fastest there is without a compiler."""
    optimizer = torch.optim.Adam(nets.parameters(), lr=LR, fused=True)
    return _stepping(lambda x: loss(nets, case, x), optimizer.zero_grad, optimizer.step)


def _compiled(nets: Nets, case: Case, batch: Tensor) -> Step:
    """Loss and gradients compiled, fused Adam; on CUDA as CUDA graphs."""
    optimizer = torch.optim.Adam(nets.parameters(), lr=LR, fused=True)
    return _stepping(_compiled_loss(nets, case, batch), optimizer.zero_grad, optimizer.step)


def _compiled_twice(nets: Nets, case: Case, batch: Tensor) -> Step:
    """Adam's step compiled too, as in PyTorch's recipe for it."""
    optimizer = torch.optim.Adam(nets.parameters(), lr=LR, capturable=batch.is_cuda)
    update = torch.compile(optimizer.step)
    return _stepping(_compiled_loss(nets, case, batch), optimizer.zero_grad, update)


def _compiled_loss(nets: Nets, case: Case, batch: Tensor) -> Step:
    mode = "reduce-overhead" if batch.is_cuda else None
    compiled: Step = torch.compile(lambda x: loss(nets, case, x), mode=mode, dynamic=False)
    return compiled


def _stepping(value: Step, forget: Callable[[], Any], update: Callable[[], Any]) -> Step:
    def step(x: Tensor) -> Tensor:
        out = value(x)
        out.backward()
        update()
        forget()
        return out.detach()

    return step


def _one_graph(nets: Nets, case: Case, batch: Tensor) -> Step:
    """Loss, gradients and a hand-written Adam as one compiled function; on CUDA the whole of it
    captured in one CUDA graph."""
    module = _Loss(nets, case)
    values = {name: p.detach() for name, p in module.named_parameters()}
    first, second = ({name: torch.zeros_like(p) for name, p in values.items()} for _ in range(2))
    taken = torch.zeros((), device=batch.device)

    def of(given: dict[str, Tensor], x: Tensor) -> Tensor:
        value: Tensor = torch.func.functional_call(module, given, (x,))
        return value

    @torch.compile(fullgraph=True, dynamic=False)
    def update(x: Tensor) -> Tensor:
        gradients: dict[str, Tensor]
        value: Tensor
        gradients, value = torch.func.grad_and_value(of)(values, x)
        taken.add_(1)
        bias, bias2 = 1 - BETAS[0] ** taken, 1 - BETAS[1] ** taken
        for name, g in gradients.items():
            p, m, v = values[name], first[name], second[name]
            m.lerp_(g, 1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            p.sub_(LR / bias * m / ((v / bias2).sqrt() + EPS))
        return value

    def plain(x: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = update(x)
        return out

    return _captured(plain, batch) if batch.is_cuda else plain


class _Loss(nn.Module):
    """The loss as a module, so that its parameters can be given by name."""

    def __init__(self, nets: Nets, case: Case) -> None:
        super().__init__()
        self.nets, self.case = nets, case

    def forward(self, x: Tensor) -> Tensor:
        return loss(self.nets, self.case, x)


def _captured(step: Step, batch: Tensor) -> Step:
    """A step replayed as a CUDA graph; other rows than those it was captured on are copied in."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(batch)
    torch.cuda.current_stream().wait_stream(side)
    graph, held = torch.cuda.CUDAGraph(), batch
    with torch.cuda.graph(graph):
        out = step(held)

    def replay(x: Tensor) -> Tensor:
        if x is not held:
            held.copy_(x)
        graph.replay()
        return out

    return replay


STEPS: dict[str, Callable[[Nets, Case, Tensor], Step]] = {
    "hand": _eager,
    "hand-compiled": _compiled,
    "hand-twice": _compiled_twice,
    "hand-graph": _one_graph,
}
