"""Bounds of linear-Gaussian pairs in closed form, which the quadratures have to agree with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.objectives.bounds import Bound, Mix
from pyro_vae.objectives.estimators import DReG, Pathwise
from tests.gate.answers import Draw
from tests.gate.cells import BOUNDS, cell
from tests.gate.pairs import PAIRS, REFUSED, Pair, Values, X


class Gaussian(NamedTuple):
    """Mean ``[n]`` and covariance ``[n, n]`` of named variables."""

    names: tuple[str, ...]
    mean: Tensor
    covariance: Tensor

    def of(self, names: Sequence[str]) -> Gaussian:
        at = [self.names.index(name) for name in names]
        return Gaussian(tuple(names), self.mean[at], self.covariance[at][:, at])

    def given(self, known: Mapping[str, float]) -> Gaussian:
        free = [name for name in self.names if name not in known]
        joint = self.of([*free, *known])
        a, b = slice(len(free)), slice(len(free), None)
        gain = torch.linalg.solve(joint.covariance[b, b], joint.covariance[b, a]).mT
        off = torch.tensor(list(known.values())).double() - joint.mean[b]
        covariance = joint.covariance[a, a] - gain @ joint.covariance[b, a]
        return Gaussian(tuple(free), joint.mean[a] + gain @ off, covariance)

    def regress(self, name: str, on: Sequence[str]) -> tuple[list[float], float, float]:
        """Coefficients, intercept and log scale of one variable given others."""
        at_zero = self.of([name, *on]).given(dict.fromkeys(on, 0.0))
        ones = [self.of([name, *on]).given(dict.fromkeys(on, 0.0) | {o: 1.0}) for o in on]
        intercept = float(at_zero.mean)
        slopes = [float(one.mean) - intercept for one in ones]
        return slopes, intercept, 0.5 * math.log(float(at_zero.covariance))

    def torch(self) -> Any:
        return torch.distributions.MultivariateNormal(self.mean, self.covariance)


Step = tuple[str, dict[str, Tensor], Tensor, Tensor]  # name, slopes, intercept, log scale


def _chain(steps: Sequence[Step]) -> Gaussian:
    """The joint of variables that are each linear in earlier ones."""
    names = [name for name, *_ in steps]
    means: list[Tensor] = []
    roots: list[Tensor] = []  # rows of a root of the covariance
    for place, (_, slopes, intercept, log_scale) in enumerate(steps):
        pairs = [(slope, names.index(name)) for name, slope in slopes.items()]
        means.append(sum((s * means[i] for s, i in pairs), start=intercept))
        own = log_scale.exp() * torch.eye(len(names), dtype=torch.double)[place]
        roots.append(sum((s * roots[i] for s, i in pairs), start=own))
    root = torch.stack(roots)
    return Gaussian(tuple(names), torch.stack(means), root @ root.mT)


def joint(pair: Pair, v: Values) -> Gaussian:
    """Latents and data under the model."""
    top = "z" if len(pair.sites) == 1 else "z2"
    steps: list[Step] = [(top, {}, v["m"], v["t"])]
    if top == "z2":
        steps.append(("z1", {"z2": v["u"]}, v["k"], v["l"]))
    bottom = steps[-1][0]
    steps += [(f"x{i}", {bottom: v[f"w{i}"]}, v[f"b{i}"], v[f"s{i}"]) for i in (0, 1)]
    return _chain(steps)


def proposal(pair: Pair, v: Values) -> Gaussian:
    """Latents under the guide."""
    steps: list[Step] = [(pair.sites[0], {}, v["a0"] * X[0] + v["a1"] * X[1] + v["c"], v["r"])]
    if len(pair.sites) > 1:
        skip = v["h0"] * X[0] + v["h1"] * X[1] if "h0" in v else 0.0
        steps.append((pair.sites[1], {pair.sites[0]: v["d"]}, v["f"] + skip, v["v"]))
    return _chain(steps)


def perfect(pair: Pair) -> Pair:
    """The pair with the model's posterior as its guide."""
    values = {name: torch.tensor(number).double() for name, number in pair.model_values.items()}
    everything = joint(pair, values)
    (a0, a1), c, r = everything.regress(pair.sites[0], ["x0", "x1"])
    guide = {"a0": a0, "a1": a1, "c": c, "r": r}
    if len(pair.sites) > 1:
        on = [pair.sites[0], *(["x0", "x1"] if "h0" in pair.guide_values else [])]
        (d, *skip), f, log_scale = everything.regress(pair.sites[1], on)
        guide |= {"d": d, **dict(zip(("h0", "h1"), skip, strict=False)), "f": f, "v": log_scale}
    return replace(pair, guide_values=guide)


def closed_forms() -> list[str]:
    """With one particle every bound that takes one is the ELBO, log p(x) - KL(q || posterior), in
    value and gradient; at the posterior every bound is log p(x) for every draw, and what drops the
    score of q has no noise."""
    problems = []
    known = [(repr(b), b, reference) for found in BOUNDS.values() for b, reference in found]
    for pair in PAIRS:
        numbers = {**pair.model_values, **pair.guide_values}
        values = {
            name: torch.tensor(number, dtype=torch.double, requires_grad=True)
            for name, number in numbers.items()
        }
        everything, q = joint(pair, values), proposal(pair, values)
        data = {"x0": X[0], "x1": X[1]}
        posterior = everything.given(data).of(pair.sites)
        marginal = everything.of(["x0", "x1"]).torch().log_prob(torch.tensor(X).double())
        elbo = marginal - kl_divergence(q.torch(), posterior.torch())
        gradient = torch.stack(torch.autograd.grad(elbo, list(values.values())))
        for name, bound, _ in known:
            alone = cell(pair, name, Pathwise(), particles=1)
            if alone.num_particles < bound.min_particles:
                continue
            found = alone.exact()
            tolerance = 1e-9 + 10 * (found.value_error + found.gradient_error.max())
            share = _share(bound)
            off = max(
                abs(found.value - share * elbo), (found.gradient - share * gradient).abs().max()
            )
            if not (off <= tolerance and tolerance < 1e-3):
                problems.append(f"{pair.name}: quadrature of {name} at K=1 is off by {off:.1e}")
            problems += _at_the_posterior(perfect(pair), bound, share * float(marginal.detach()))
    return problems


def _share(bound: Bound) -> float:
    """What a nat more in every log weight adds to a bound."""
    return sum(number for number, _ in bound.terms) if isinstance(bound, Mix) else 1.0


def _at_the_posterior(pair: Pair, bound: Bound, log_p: float) -> list[str]:
    problems = []
    for estimator in (Pathwise(), DReG()):
        here = cell(pair, repr(bound), estimator)
        if here.status == REFUSED:
            continue
        draw = Draw(here, rows=64)
        values = draw.objective.rows(draw.model, draw.guide, draw.batch)
        off = float((values - log_p).abs().max())
        if not off < 1e-12 * 64:
            problems.append(f"{here} at the posterior: log p(x) off by {off:.1e}")
        if estimator.boundary:
            of_guide = draw.block()[1][len(pair.model_values) :]
            if not float(of_guide.abs().max()) < 1e-10:
                problems.append(f"{here} at the posterior: the guide's gradient is not 0")
    return problems
