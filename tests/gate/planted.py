"""Errors in the library that the gate must catch."""

from __future__ import annotations
import __future__ as future

import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import FunctionType
from typing import Any

from pyro.poutine.messenger import Messenger

from pyro_vae.objectives import (
    bounds,
    loss,
    objective,
    particles,
    plan,
    rates,
    relaxed,
    swap,
    tracing,
)
from pyro_vae.objectives.baselines import LeaveOneOut, MovingAverage, NeuralBaseline
from pyro_vae.objectives.bounds import Bound, Elbo, Jackknife, Miwae, Mix, Renyi
from pyro_vae.objectives.enumeration import Enumerate, _Joint
from pyro_vae.objectives.estimators import (
    STL,
    DReG,
    Estimator,
    OneParticle,
    Pathwise,
    Score,
    WakeSleep,
)
from pyro_vae.objectives.objective import Objective
from pyro_vae.objectives.penalties import (
    DIP,
    MMD,
    Adversarial,
    MutualInformation,
    Sinkhorn,
    SlicedWasserstein,
    adversarial,
    aggregate,
)
from pyro_vae.objectives.penalties.latent import Latent
from pyro_vae.objectives.rates import Analytic, Beta, MonteCarlo
from pyro_vae.objectives.relaxed import Gumbel, StraightThrough
from tests.gate.answers import check
from tests.gate.cells import (
    Cell,
    Weighting,
    balance_rates,
    beta_per_site,
    beta_rates,
    capacity_rates,
    cell,
    free_bits_rates,
)
from tests.gate.pairs import (
    ANNEALED,
    BIT,
    BITS,
    BOTTOM_UP,
    CLASSES,
    LAZY,
    MIXED,
    ONE_LAYER,
    SCALED,
    STORED,
    SUBSAMPLED,
    TEMPERED,
    TOP_DOWN,
    UNBIASED,
    WEIGHTED,
)
from tests.gate.penalties import PenaltyCell, penalty_cells

Edit = tuple[Callable[..., Any], str, str]  # function, what its source says, what it says instead


class Stale(LookupError):
    """The library no longer says what a planted error replaces."""


@functools.cache
def _source(function: FunctionType) -> str:
    return textwrap.dedent(inspect.getsource(function))


@contextmanager
def edited(function: Callable[..., Any], texts: Mapping[str, str]) -> Iterator[None]:
    """Let a function of the library run with other source text."""
    function = inspect.unwrap(function)
    assert isinstance(function, FunctionType)
    source = _source(function)
    for old, new in texts.items():
        if source.count(old) != 1:
            raise Stale(f"{function.__qualname__} does not hold {old!r} once: plant it anew")
        source = source.replace(old, new)
    code = compile(source, "<planted>", "exec", future.annotations.compiler_flag)
    space: dict[str, Any] = {}
    exec(code, function.__globals__, space)
    kept = function.__code__
    function.__code__ = inspect.unwrap(space[function.__name__]).__code__
    try:
        yield
    finally:
        function.__code__ = kept


class SharedDraw(Messenger):
    """Stands inside the particle plate, so that what it draws is the same for all particles."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "z1" and msg["value"] is None:
            msg["value"] = msg["fn"].rsample()


class Planted:
    """An error in the library, and cells that must all fail because of it."""

    def __init__(
        self, name: str, found_by: Cell | PenaltyCell | Sequence[Cell | PenaltyCell], *edits: Edit
    ) -> None:
        self.name, self.edits = name, edits
        if isinstance(found_by, Cell | PenaltyCell):
            found_by = [found_by]
        self.cells: Sequence[Cell | PenaltyCell] = found_by
        for function, *_ in edits:  # read now: the file may change before it is used
            _source(inspect.unwrap(function))

    def __str__(self) -> str:
        return self.name

    @contextmanager
    def __call__(self) -> Iterator[None]:
        texts: dict[Callable[..., Any], dict[str, str]] = {}
        for function, old, new in self.edits:
            texts.setdefault(function, {})[old] = new
        with ExitStack() as stack:
            for function, changes in texts.items():
                stack.enter_context(edited(function, changes))
            yield

    def missed(self) -> list[str]:
        """Cells that don't fail, or that fail without the error."""
        found = []
        for one in self.cells:
            admitted = isinstance(one, Cell) and replace(one, status="").status == one.status
            if admitted and (problems := _by_itself(one)):
                found.append(f"{one} fails by itself: {problems}")
            try:
                with self():
                    if not check(one).problems:
                        found.append(f"{one} does not notice")
            except Stale as stale:
                found.append(str(stale))
        return found


@functools.cache
def _seen() -> dict[str, list[str]]:
    return {}


def _by_itself(cell: Cell | PenaltyCell) -> list[str]:
    """Problems without an error; several errors are found by the same cell."""
    seen = _seen()
    if str(cell) not in seen:
        seen[str(cell)] = check(cell).problems
    return seen[str(cell)]


def planted() -> list[Planted]:
    """What has gone wrong in prototypes, and what a change could break without a message."""
    score, pathwise, dreg = Score(all_sites=True), Pathwise(), DReG()
    doubled, per_site = beta_rates(BOTTOM_UP.sites)[0], beta_per_site(BOTTOM_UP)
    scheduled = next(w for w in beta_rates(ONE_LAYER.sites) if w.step)
    plate = "PLATE, particles, dim=-1 - nesting))"

    def admitted(*parts: Any) -> list[Cell | PenaltyCell]:
        """A refused cell, which must be refused, and if it is not, must be seen to be biased."""
        refused = cell(*parts)
        return [refused, replace(refused, status=UNBIASED)]

    iwae, two_layers = cell(ONE_LAYER, "iwae", pathwise), cell(BOTTOM_UP, "iwae", dreg)
    by_score = cell(ONE_LAYER, "iwae", score)
    vimco, averaged = Score(baseline=LeaveOneOut()), Score(baseline=MovingAverage())
    balanced = cell(BOTTOM_UP, "elbo", pathwise, balance_rates(BOTTOM_UP.sites)[0])
    penalty = {str(found): found for found in penalty_cells()}
    return [
        # The rate.
        Planted(
            "sign of the rate",
            iwae,
            (MonteCarlo.__call__, "_subtract(rate[site], prior)", "_subtract(prior, rate[site])"),
        ),
        Planted(
            "prior of one site dropped",
            two_layers,
            (MonteCarlo.__call__, "particles.prior.items()", "[*particles.prior.items()][1:]"),
        ),
        Planted(
            "beta on log q alone",
            cell(BOTTOM_UP, "iwae", pathwise, doubled),
            (
                Beta.__call__,
                "self._at(site, particles, step) * term for",
                "term + (self._at(site, particles, step) - 1) * particles.posterior[site] for",
            ),
        ),
        Planted(
            "beta on the likelihood too",
            cell(BOTTOM_UP, "elbo", pathwise, doubled),
            (
                Objective._chunk,
                "particles.summed(likelihood, out)",
                "particles.summed({s: 2 * t for s, t in likelihood.items()}, out)",
            ),
        ),
        Planted(
            "free bits: paid for above the floor",
            cell(TOP_DOWN, "elbo", pathwise, free_bits_rates(TOP_DOWN.sites)[-1]),
            (rates.FreeBits.__call__, "(mean > nats)", "(mean < nats)"),
        ),
        Planted(
            "free bits: a floor that is too low",
            cell(BOTTOM_UP, "elbo", pathwise, free_bits_rates(BOTTOM_UP.sites)[-1]),
            (rates.FreeBits.__call__, "* nats / len(sites)", "* nats / len(terms | rate)"),
        ),
        Planted(
            "capacity: the rate is not pushed up",
            cell(ONE_LAYER, "elbo", dreg, capacity_rates(ONE_LAYER.sites)[1]),
            (rates.Capacity.__call__, "torch.sign(mean - capacity)", "(mean > capacity)"),
        ),
        Planted(
            "free bits: the sum over rows against the floor",
            cell(TOP_DOWN, "elbo", pathwise, free_bits_rates(TOP_DOWN.sites)[-1]),
            (rates._pooled, " / counts.sum(dims, keepdim=True).clamp(min=1)", ""),
        ),
        Planted(
            "capacity: without its sign",
            cell(ONE_LAYER, "elbo", dreg, capacity_rates(ONE_LAYER.sites)[1]),
            (rates.Capacity.__call__, "gamma * torch.sign(mean - capacity)", "gamma"),
        ),
        Planted(
            "balance: coefficients with a gradient",
            balanced,
            (rates._pooled, "mean.detach()", "mean"),
        ),
        Planted(
            "balance: coefficients that sum to 1",
            balanced,
            (rates.Balance.__call__, "use / use.mean()", "use / use.sum()"),
        ),
        Planted(
            "schedule read at step 0",
            cell(ONE_LAYER, "iwae", pathwise, scheduled),
            (loss.ObjectiveModule.loss_and_rows, "self.step.clone()", "0 * self.step"),
        ),
        Planted(
            "schedule read one step late",
            cell(ONE_LAYER, "iwae", pathwise, scheduled),
            (loss.ObjectiveModule.loss_and_rows, "self.step.clone()", "self.step + 1"),
        ),
        Planted(
            "analytic KL of a constant guide",
            cell(ONE_LAYER, "elbo", pathwise, Analytic()),
            (
                particles.Particles.kl,
                'elementwise_kl(q["fn"],',
                'elementwise_kl(type(q["fn"])(q["fn"].mean.detach(), q["fn"].stddev.detach()),',
            ),
        ),
        Planted(
            "analytic KL against the order of the sites",
            cell(BOTTOM_UP, "elbo", pathwise, Analytic()),
            (plan._analytic, "if late:", "if False:"),
        ),
        Planted(
            "analytic KL inside a nonlinear bound",
            admitted(ONE_LAYER, "iwae", pathwise, Analytic()),
            (objective.refusal, "if rate.analytic:", "if False:"),
        ),
        # The bound.
        Planted("log K missing", iwae, (Renyi.__call__, " - math.log(len(log_w))", "")),
        Planted("squared weights", iwae, (Renyi.weights, "log_w), 0)", "log_w), 0) ** 2")),
        Planted("softmax over rows", iwae, (Renyi.weights, "log_w), 0)", "log_w), 1)")),
        Planted(
            "weights without 1 - alpha",
            cell(ONE_LAYER, "renyi(0.5)", pathwise),
            (Renyi.weights, "(1 - self.alpha) * log_w", "log_w"),
        ),
        Planted(
            "VR-max: all weight on the smallest",
            cell(ONE_LAYER, "vr_max", pathwise),
            (Renyi.weights, "argmax", "argmin"),
        ),
        Planted(
            "weights not detached",
            iwae,
            (Objective.loss_and_rows, "known, rows = log_w.detach()", "known, rows = log_w"),
        ),
        Planted(
            "MIWAE: weights in the order of the strata",
            cell(ONE_LAYER, "miwae(2)", pathwise),
            (
                Miwae._mean_of,
                ".reshape(log_w.shape)",
                ".unflatten(1, (self.groups, -1)).transpose(0, 1).reshape(log_w.shape)",
            ),
        ),
        Planted(
            "TVO: weights of a mean whose shares stay",
            cell(ONE_LAYER, "tvo(0, 0.3, 1)", pathwise),
            (bounds._Tempered.weights, "share * (1 + off)", "share"),
        ),
        Planted(
            "TVO: half of how the weights move",
            cell(BOTTOM_UP, "tvo(0, 0.3, 1)", dreg),
            (bounds._Tempered.diagonal, "2 * (1 - share)", "(1 - share)"),
        ),
        Planted(
            "jackknife: one coefficient for all subsets",
            cell(ONE_LAYER, "jackknife(1)", pathwise),
            (Jackknife._sum, "(total - j) ** order", "total ** order"),
        ),
        Planted(
            "split: the guide follows the model's bound",
            cell(ONE_LAYER, "split(iwae, elbo)", pathwise),
            (Estimator.path, "if bound.guide is bound", "if True"),
        ),
        Planted(
            "split: remainder of per-site beta counts in the model's bound",
            cell(BOTTOM_UP, "split(elbo, cubo(2))", dreg, per_site),
            (Objective.loss_and_rows, "self.bound.guide.weights(known)", "weights"),
        ),
        Planted(
            "MIWAE: the sign of the groups' mean",
            cell(ONE_LAYER, "miwae(2)", pathwise),
            (Miwae._mean_of, "/ self.groups", "/ -self.groups"),
        ),
        Planted(
            "mix: a term ignored",
            cell(ONE_LAYER, "mix(0.3 elbo + 0.7 iwae)", pathwise),
            (Mix._sum, "in self.terms)", "in self.terms[:1])"),
        ),
        Planted(
            "jackknife: coefficients of K and K - 1 swapped",
            cell(ONE_LAYER, "jackknife(1)", pathwise),
            (Jackknife._sum, "(total - j) ** order", "(total - order + j) ** order"),
        ),
        Planted(
            "split: DReG by the model's bound",
            cell(BOTTOM_UP, "split(elbo, cubo(2))", dreg),
            (DReG.path, "guide = bound.guide", "guide = bound"),
        ),
        # Boundary copies.
        Planted(
            "DReG: h missing",
            two_layers,
            (DReG.path, " - beta * guide.diagonal(log_w)", ""),
        ),
        Planted(
            "DReG: w (1 - beta h)",
            two_layers,
            (DReG.path, "guide.weights(log_w) -", "guide.weights(log_w) * (1 -"),
            (DReG.path, "guide.diagonal(log_w)", "guide.diagonal(log_w))"),
        ),
        Planted(
            "DReG: w - h without beta",
            cell(BOTTOM_UP, "iwae", dreg, doubled),
            (DReG.path, "- beta * ", "- "),
        ),
        Planted(
            "DReG: h without 1 - alpha",
            cell(BOTTOM_UP, "renyi(-1)", dreg),
            (Renyi.diagonal, "(1 - self.alpha) * ", ""),
        ),
        Planted(
            "DReG: factor on the sample, twice along z1 -> z2",
            two_layers,
            (particles.Boundary._copy, "copy.register_hook", "value.register_hook"),
        ),
        Planted(
            "DReG: factor never applied",
            two_layers,
            (particles.Boundary._copy, "self.factor is None", "True"),
        ),
        Planted(
            "DReG: all chunks take the first one's factor",
            cell(ONE_LAYER, "iwae", dreg, particles=3, chunk=1),
            (
                Objective.loss_and_rows,
                "factor.split([c.size for c in chunks])",
                "[factor[: c.size] for c in chunks]",
            ),
        ),
        Planted(
            "DReG: live parameters in the guide's second run",
            two_layers,
            (particles._constant_rerun, "p.detach()", "p"),
        ),
        Planted(
            "DReG: live parameters at a single site",
            cell(ONE_LAYER, "iwae", dreg),
            (particles._constant_in_place, "- score + score.detach()", ""),
        ),
        Planted(
            "DReG: densities taken outside the swapped context",
            cell(LAZY, "iwae", dreg),
            (particles._constant_rerun, "        densities = {", "    densities = {"),
        ),
        Planted(
            "DReG: stored parameters not swapped",
            cell(STORED, "iwae", dreg),
            (swap.swapped, "[*homes, store]", "homes"),
            (plan._rerun_blockers, "if log_q.requires_grad", "if False"),  # or it is refused
        ),
        Planted(
            "DReG: remainder of per-site beta missing",
            cell(BOTTOM_UP, "iwae", dreg, per_site),
            (Objective._split_betas, "particles.summed(extra)", "None"),
        ),
        Planted(
            "DReG: remainder of per-site beta moves along z1 -> z2",
            cell(BOTTOM_UP, "iwae", dreg, per_site),
            (particles._at_rest, "if len(sites) == 1", "if True"),
        ),
        Planted(
            "DReG: the user's scale of a site missing in its beta",
            cell(ANNEALED, "iwae", dreg, Weighting(MonteCarlo(), (("z1", 0.6), ("z2", 1.0)))),
            (Objective._split_betas, "betas[site] = beta * weight", "pass"),
        ),
        Planted(
            "DReG with VR-max",
            admitted(BOTTOM_UP, "vr_max", dreg),
            (DReG.refusal, "if bound.guide.smooth", "if True"),
        ),
        Planted(
            "STL with a multi-sample bound",
            admitted(BOTTOM_UP, "iwae", STL()),
            (STL.refusal, "if bound.guide.linear", "if True"),
        ),
        # One particle.
        Planted(
            "one particle: drawn by w, not by its weight",
            cell(ONE_LAYER, "renyi(0.5)", OneParticle()),
            (OneParticle.weights, "w.log() + gumbel", "log_w + gumbel"),
        ),
        Planted(
            "one particle: the heaviest",
            cell(ONE_LAYER, "iwae", OneParticle()),
            (OneParticle.weights, "w.log() + gumbel", "w.log()"),
        ),
        Planted(
            "one particle: without the sum of the weights",
            cell(ONE_LAYER, "mix(0.5 elbo + 1 renyi(-1))", OneParticle()),
            (OneParticle.weights, "w.sum(0, keepdim=True)", "torch.ones_like(w[:1])"),
        ),
        # The score function.
        Planted(
            "score: draws keep their path",
            by_score,
            (particles._Detach._pyro_sample, "torch.no_grad()", "torch.enable_grad()"),
        ),
        Planted(
            "score of one site missing",
            cell(BOTTOM_UP, "iwae", score),
            (particles.run, "if scores(name,", "if name != 'z1' and scores(name,"),
        ),
        Planted(
            "score: reward of the elbo without 1 / K",
            cell(ONE_LAYER, "elbo", score),
            (Elbo.reward, " / len(log_w)", ""),
        ),
        Planted(
            "score: reward of the particle alone",
            by_score,
            (Bound.reward, "self(log_w).expand_as(log_w)", "log_w / len(log_w)"),
        ),
        Planted(
            "score: reward divided by K",
            by_score,
            (Bound.reward, "expand_as(log_w)", "expand_as(log_w) / len(log_w)"),
        ),
        Planted(
            "score: -log q without a gradient of its own",
            by_score,
            (Estimator.keeps_score, "not bound.guide.linear", "False"),
        ),
        Planted(
            "leave one out: the particle in its own baseline",
            cell(ONE_LAYER, "iwae", Score(True, LeaveOneOut())),
            (
                LeaveOneOut.forward,
                "(finite.sum(0) - finite) / others",
                "finite.mean(0) + 0 * others",
            ),
        ),
        # Latents that are listed.
        Planted(
            "VIMCO: the particle's own weight in its baseline",
            cell(BITS, "iwae", vimco),
            (
                bounds._logsumexp_of_others,
                "return rest.scatter(0, first, without)",
                "return torch.logsumexp(terms, 0, keepdim=True).expand_as(terms)",
            ),
        ),
        Planted(
            "leave one out of the elbo: nobody is left out",
            cell(BITS, "elbo", vimco),
            (Elbo.replaced, "log_w.sum(0) - log_w + other", "log_w.sum(0) + other"),
        ),
        Planted(
            "moving average of the present draws",
            cell(BIT, "elbo", averaged, alone=True),
            (
                MovingAverage.forward,
                "self.average / self.weight.clamp(min=1 - self.decay)",
                "reward.mean()",
            ),
        ),
        Planted(
            "neural baseline: it sees the draws",
            cell(BITS, "iwae", Score(True, NeuralBaseline())),
            (NeuralBaseline.forward, "self.net(args[0])", "self.net(args[0]) + log_w.mean(0)"),
        ),
        Planted(
            "wake-sleep: log q keeps its own gradient",
            cell(BITS, "iwae", WakeSleep()),
            (WakeSleep.keeps_score, "return False", "return True"),
        ),
        Planted(
            "wake-sleep: the bound for a reward",
            cell(ONE_LAYER, "iwae", WakeSleep()),
            (WakeSleep.reward, "torch.softmax(log_w, 0)", "bound.reward(log_w)"),
        ),
        Planted(
            "enumeration: probabilities without a gradient",
            cell(BITS, "elbo", Enumerate()),
            (_Joint.share, "torch.exp(parts[0] + parts[1])", "torch.exp(sum(parts)).detach()"),
        ),
        Planted(
            "enumeration: values count alike",
            cell(MIXED, "elbo", Enumerate()),
            (_Joint.share, "torch.exp(parts[0] + parts[1])", "torch.ones_like(parts[0])"),
        ),
        # Relaxations.
        Planted(
            "relaxed density at a draw without path",
            cell(BIT, "elbo", Gumbel(0.5)),
            (
                relaxed._RelaxedBernoulli.density,
                "self.temperature * self.u",
                "self.temperature * self.u.detach()",
            ),
        ),
        Planted(
            "relaxed density without its temperature",
            cell(BIT, "elbo", Gumbel(0.5, prior_temperature=1.0)),
            (relaxed._RelaxedBernoulli.density, "self.temperature.log() + off", "off"),
        ),
        Planted(
            "relaxed prior at the guide's temperature",
            cell(BIT, "iwae", Gumbel(0.5, prior_temperature=1.0)),
            (
                Gumbel.treatment,
                "(self.temperature, self.prior_temperature)",
                "(self.temperature, self.temperature)",
            ),
        ),
        Planted(
            "relaxed density of classes: a class forgotten",
            cell(CLASSES, "elbo", Gumbel(1.0), particles=1),
            (relaxed._RelaxedOneHot.density, "- classes * off", "- (classes - 1) * off"),
        ),
        Planted(
            "straight-through: the path of a relaxed draw",
            cell(BIT, "elbo", StraightThrough()),
            (relaxed._straight, "fn.probs", "fn.soft(u)"),
        ),
        # Penalties.
        Planted(
            "MMD: biased for unbiased",
            penalty["penalty mmd, 24 of 5 rows"],
            (MMD.estimate, 'self.how == "unbiased"', "False"),
        ),
        Planted(
            "MMD: the cross term once",
            penalty["penalty mmd imq, 24 of 5 rows"],
            (MMD.estimate, "- 2 * self._mean", "- self._mean"),
        ),
        Planted(
            "total correlation: log N forgotten",
            penalty["penalty tc weighted, all rows"],
            (aggregate._weighed, "log_sum + math.log(other)", "log_sum"),
        ),
        Planted(
            "total correlation: the own row counts like others",
            penalty["penalty tc stratified, 3 of 5 rows"],
            (aggregate._weighed, "(mine - other)", "(other - other)"),
        ),
        Planted(
            "mutual information: q(z) without its gradient",
            penalty["penalty mi, all rows"],
            (MutualInformation.estimate, "(own - joint)", "(own - joint.detach())"),
        ),
        Planted(
            "DIP: B - 1 for B",
            penalty["penalty dip I, all rows"],
            (DIP.covariance, "/ mean.shape[1]", "/ (mean.shape[1] - 1)"),
        ),
        Planted(
            "DIP: the posterior's variances are constants",
            penalty["penalty dip II, all rows chunk=12"],
            (DIP.covariance, "latent.parameter(variance)", "latent.parameter(variance).detach()"),
        ),
        Planted(
            "sliced Wasserstein: directions of any length",
            penalty["penalty sliced W2, all rows"],
            (SlicedWasserstein.estimate, "directions / directions.norm(dim=0)", "directions"),
        ),
        Planted(
            "Sinkhorn: twice the debiasing",
            penalty["penalty sinkhorn, all rows"],
            (Sinkhorn.estimate, "within / 2", "within"),
        ),
        Planted(
            "critic: its loss reaches the guide",
            penalty["penalty adversarial, all rows"],
            (Adversarial.cross_entropy, "latent.draws.detach()", "latent.draws"),
        ),
        Planted(
            "critic: the penalty trains it too",
            penalty["penalty adversarial, all rows"],
            (Adversarial.estimate, "p.detach() for p", "p for p"),
        ),
        Planted(
            "critic: rows are permuted as a whole",
            penalty["penalty adversarial permuted, all rows"],
            (
                adversarial._permuted,
                "torch.rand_like(z)",
                "torch.rand_like(z[..., :1]).expand_as(z)",
            ),
        ),
        Planted(
            "penalty: draws of the prior train it",
            penalty["penalty sinkhorn, all rows"],
            (Latent.from_prior, "torch.no_grad()", "torch.enable_grad()"),
        ),
        Planted(
            "penalty: once for all rows",
            penalty["penalty dip I, all rows"],
            (
                Objective.loss_and_rows,
                "(nats if log_w is None else nats.expand(log_w.shape[1])).sum()",
                "nats.sum()",
            ),
        ),
        Planted(
            "penalty: chunks add up",
            penalty["penalty dip II, all rows chunk=12"],
            (Objective.loss_and_rows, "c.penalty * (c.size / self.num_particles)", "c.penalty"),
        ),
        # Plates and scales.
        Planted(
            "particles share what a handler draws",
            by_score,
            (tracing.trace, "for handler in handlers", "for handler in ()"),
            (
                tracing.trace,
                plate,
                f"{plate}\n        for handler in handlers:\n"
                "            stack.enter_context(handler)",
            ),
        ),
        Planted(
            "particles share the draw of one site",
            cell(BOTTOM_UP, "iwae", pathwise),
            (
                tracing.trace,
                plate,
                f"{plate}\n            from tests.gate.planted import SharedDraw\n"
                "            stack.enter_context(SharedDraw())",
            ),
        ),
        Planted(
            "N / B inside the bound",
            cell(SUBSAMPLED, "iwae", pathwise),
            (particles.Particles._inner_scale, "return 1.0", 'return site["scale"]'),
            (Objective.loss_and_rows, "weight = first.scale", "weight = 1.0"),
        ),
        Planted(
            "N / B missing",
            cell(SUBSAMPLED, "elbo", pathwise),
            (Objective.loss_and_rows, "weight = first.scale", "weight = 1.0"),
        ),
        Planted(
            "scale of all sites inside the bound",
            cell(SCALED, "iwae", pathwise),
            (particles._row_scales, "if False in equal", "if True"),
        ),
        Planted(
            "scale of one site dropped",
            cell(TEMPERED, "iwae", pathwise),
            (particles.Particles._inner_scale, 'site["scale"] / self.scale', "1.0"),
        ),
        Planted(
            "score: scaled by what the draw counts",
            cell(ANNEALED, "iwae", score, Weighting(MonteCarlo(), (("z1", 0.6), ("z2", 1.0)))),
            (particles.run, "particles.log_draw(site)", "particles._density(site)"),
        ),
        Planted(
            "weights of rows ignored",
            cell(WEIGHTED, "iwae", pathwise),
            (Objective.loss_and_rows, "weight * batch.weights", "weight"),
        ),
    ]
