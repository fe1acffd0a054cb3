"""Annealed importance sampling: log p(x) of a model whatever its guide is, in brackets on data of its
own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.batch import Batch, still, take
from pyro_vae.evaluation.hamiltonian import transition
from pyro_vae.evaluation.likelihood import (
    Difference,
    Evaluation,
    check_rows,
    device_of,
    judging,
    mean_and_error,
    whole_numbers,
)
from pyro_vae.evaluation.targets import Pair, Rows, Space
from pyro_vae.objectives.tracing import Site, trace, unwrap

__all__ = ["Annealed", "Bidirectional", "Path", "annealed", "bidirectional", "sigmoidal"]

Program = Callable[..., Any]
PACE = 0.25  # nats of standard deviation between two temperatures of the pilot
LEAST = 1e-6
PILOT_CHAINS = 16
FIRST, SETTLE = 15, 3  # its transitions at the first temperature and at each other


@dataclass(frozen=True)
class Path:
    """Temperatures and step sizes of the chains, found on pilot rows and frozen.

    Attributes:
        betas: ``[T + 1]`` inverse temperatures from 0 to 1.
        steps: ``[T + 1]`` step size of the leapfrog at each of them.
        length: integral over beta of the standard deviation of log p(x, z) - log start(z), in nats.
            Chains that mix at every temperature have a slack of about length² / 2 T each.
    """

    betas: Tensor
    steps: Tensor
    length: float


@dataclass(frozen=True, repr=False)
class Annealed:
    """log p(x) by annealed importance sampling, row by row (nats).

    Attributes:
        log_p: ``[N]`` stochastic lower bound on log p(x): its expectation is below.
        ess: ``[N]`` effective sample size of the chains' weights.
        acceptance: share of the transitions' proposals that were accepted.
        path: temperatures and step sizes.
        chains: per row, K.
        leapfrog: steps of a transition.
        start: ``"prior"`` or ``"guide"``.
        seed: of all draws.
    """

    log_p: Tensor
    ess: Tensor
    acceptance: float
    path: Path
    chains: int
    leapfrog: int
    start: str
    seed: int

    def versus(self, other: Annealed | Evaluation) -> Difference:
        """log p minus that of another result, paired by row.

        Raises:
            ValueError: the two have different numbers of rows.
        """
        if len(self.log_p) != len(other.log_p):
            raise ValueError(
                f"versus: came {len(other.log_p)} rows, wanted the same {len(self.log_p)} rows for "
                "both"
            )
        return Difference(*mean_and_error(self.log_p - other.log_p))

    def summary(self) -> dict[str, Any]:
        """Plain numbers: the mean over rows, its standard error, and how it was made."""
        mean, error = mean_and_error(self.log_p)
        return {
            "rows": len(self.log_p),
            "log_p": mean,
            "log_p_se": error,
            "ess_median": float(self.ess.median()),
            **_settings(self),
        }

    def __str__(self) -> str:
        s = self.summary()
        return (
            f"log p(x) >= {s['log_p']:.3f} ± {s['log_p_se']:.3f} nats  ({s['rows']} rows)\n"
            f"{_told(s)}, ESS median {s['ess_median']:.1f}"
        )

    __repr__ = __str__


@dataclass(frozen=True, repr=False)
class Bidirectional:
    """Lower and upper bounds on log p(x) of rows that the model itself made (nats).

    Attributes:
        lower: ``[N]`` stochastic lower bound, of chains from the start to the posterior.
        upper: ``[N]`` stochastic upper bound, of chains back from the exact posterior draw.
        rows: N rows that the model made.
        acceptance, path, chains, leapfrog, start, seed: as of ``Annealed``, both ways together.
    """

    lower: Tensor
    upper: Tensor
    rows: Batch
    acceptance: float
    path: Path
    chains: int
    leapfrog: int
    start: str
    seed: int

    @property
    def gap(self) -> Difference:
        """Mean of upper - lower, paired by row: in expectation no less than the slack of either."""
        return Difference(*mean_and_error(self.upper - self.lower))

    def summary(self) -> dict[str, Any]:
        """Plain numbers: means over rows, their standard errors, and how they were made."""
        out: dict[str, Any] = {"rows": len(self.lower)}
        for name in ("lower", "upper"):
            out[name], out[f"{name}_se"] = mean_and_error(getattr(self, name))
        return out | {"gap": self.gap.mean, "gap_se": self.gap.error} | _settings(self)

    def __str__(self) -> str:
        s = self.summary()
        return (
            f"{s['lower']:.3f} ± {s['lower_se']:.3f} <= log p(x) <= "
            f"{s['upper']:.3f} ± {s['upper_se']:.3f} nats, gap {self.gap}  "
            f"({s['rows']} rows of the model's own)\n{_told(s)}"
        )

    __repr__ = __str__


def annealed(
    model: Program,
    data: Batch | Tensor,
    guide: Program | None = None,
    *,
    chains: int = 16,
    temperatures: int | Sequence[float] = 500,
    leapfrog: int = 10,
    acceptance: float = 0.65,
    pilot: int | Batch | Tensor = 32,
    batch_size: int = 250,
    compile: str = "auto",
    seed: int = 0,
) -> Annealed:
    """log p(x) of each row by annealed importance sampling (Neal 2001; Wu et al. 2017,
    arXiv:1611.04273): from the prior to prior times likelihood along the geometric path, by
    Hamiltonian transitions with Metropolis correction.

    A stochastic lower bound that does not depend on a guide, much tighter than importance sampling
    where the guide is poor; ``bidirectional`` tells how tight on data of the model's own. Temperatures
    and step sizes are adapted on pilot rows and then frozen. The chains of the rows that are reported
    are drawn after that and anew, so that E[exp(log_p)] = p(x) even where pilot rows are among them.

    Args:
        data: rows, as the model takes them. Missing entries count as everywhere: drawn from the
            model, moved along with the latents where densities of other sites depend on them.
        guide: where to start from instead of the prior.
        chains: per row, K; the weights are averaged over them.
        temperatures: number T of steps from 0 to 1, spaced so that log p(x, z) - log start(z) has the
            same standard deviation times step everywhere; or the T + 1 inverse temperatures
            themselves, such as ``sigmoidal(500)``.
        leapfrog: steps of a transition; the cost is T times as many gradients.
        acceptance: share of proposals towards which step sizes are adapted at each temperature.
        pilot: rows to adapt on, or how many of ``data``.
        batch_size: rows at a time; each batch of rows has a seed of its own.
        compile: level at which gradients are computed, as in ``fit``.
        seed: of all draws; the global random state is left as it was.

    Raises:
        ValueError: no rows, a discrete latent, a latent with constraints that are not the same
            everywhere or outside the plate over rows, no latent at all, a guide whose density is not
            known at any latent, temperatures that do not rise from 0 to 1.
    """
    what = "annealed"
    _check(what, chains, temperatures, leapfrog, acceptance, pilot, batch_size)
    check_rows(f"{what}: data", data)
    with judging(model, guide or _draws_nothing, seed):
        data = still(data).to(device_of(model, guide or _draws_nothing, data))
        pair = Pair(what, model, guide, data, compile)
        path = _path(pair, _pilots(pilot, data), temperatures, leapfrog, acceptance, seed)
        runs = []
        for number, rows in enumerate(parts := _parts(data, batch_size), 1):
            alike = sum(len(part) == len(rows) for part in parts)
            calls = alike * len(path.betas) * leapfrog
            target = Rows(pair, take(data, rows), chains, calls)
            _sow(seed, number)
            runs.append(_walk(target, target.start(), path, leapfrog))
        log_w = torch.cat([weights for weights, _ in runs], 1)
        return Annealed(
            log_p=_log_mean(log_w).cpu(),
            ess=torch.exp(2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).cpu(),
            acceptance=float(torch.stack([share for _, share in runs]).mean()),
            path=path,
            chains=chains,
            leapfrog=leapfrog,
            start=pair.start,
            seed=seed,
        )


def bidirectional(
    model: Program,
    data: Batch,
    guide: Program | None = None,
    *,
    chains: int = 16,
    temperatures: int | Sequence[float] = 500,
    leapfrog: int = 10,
    acceptance: float = 0.65,
    pilot: int = 32,
    batch_size: int = 250,
    compile: str = "auto",
    seed: int = 0,
) -> Bidirectional:
    """How tight ``annealed`` is, on rows that the model made itself (bidirectional Monte Carlo, Grosse
    et al. 2015, arXiv:1511.02543).

    Of such rows an exact posterior draw is known, from which chains run the path backwards; their
    weights give a stochastic upper bound on log p(x).

    Args:
        data: rows to be like: how many, which sites and entries are observed, and what the model
            conditions on. Sites that the model draws take other values.
        guide, chains, temperatures, leapfrog, acceptance, pilot, batch_size, compile, seed: as of
            ``annealed``; pilot rows are among those made.

    Raises:
        ValueError: as for ``annealed``; data that are no Batch, a model with ``obs=``.
    """
    what = "bidirectional"
    _check(what, chains, temperatures, leapfrog, acceptance, pilot, batch_size)
    if not isinstance(data, Batch):
        raise ValueError(f"{what}: data came as {type(data).__name__}, wanted a Batch")
    check_rows(f"{what}: data", data)
    with judging(model, guide or _draws_nothing, seed):
        data = still(data).to(device_of(model, guide or _draws_nothing, data))
        data, drawn = _made(what, model, data)
        pair = Pair(what, model, guide, data, compile)
        ends = Space.of(pair, drawn).coordinates({n: drawn[n]["value"] for n in pair.transforms}, 1)
        path = _path(pair, _pilots(pilot, data), temperatures, leapfrog, acceptance, seed)
        lower, upper, shares = [], [], []
        for number, rows in enumerate(parts := _parts(data, batch_size), 1):
            alike = sum(len(part) == len(rows) for part in parts)
            calls = 2 * alike * len(path.betas) * leapfrog
            target = Rows(pair, take(data, rows), chains, calls)
            _sow(seed, number)
            there, share = _walk(target, target.start(), path, leapfrog)
            end = ends[:, rows].expand(chains, -1, -1)
            back, share_back = _walk(target, end, path, leapfrog, back=True)
            lower.append(_log_mean(there))
            upper.append(-_log_mean(-back))
            shares += [share, share_back]
        return Bidirectional(
            lower=torch.cat(lower).cpu(),
            upper=torch.cat(upper).cpu(),
            rows=data.to("cpu"),
            acceptance=float(torch.stack(shares).mean()),
            path=path,
            chains=chains,
            leapfrog=leapfrog,
            start=pair.start,
            seed=seed,
        )


def sigmoidal(temperatures: int, delta: float = 4.0) -> list[float]:
    """T + 1 inverse temperatures from 0 to 1, close to each other near both ends (Grosse et al. 2015).

    Args:
        temperatures: T.
        delta: the logistic function is taken from -delta to delta.
    """
    whole_numbers("sigmoidal", temperatures=temperatures)
    curve = 1 / (1 + np.exp(-np.linspace(-delta, delta, temperatures + 1)))
    betas: list[float] = ((curve - curve[0]) / (curve[-1] - curve[0])).tolist()
    return betas


# ---------------------------------------------------------------------------------------------
# Chains


def _walk(
    target: Rows, at: Tensor, path: Path, leapfrog: int, back: bool = False
) -> tuple[Tensor, Tensor]:
    """Log weights ``[K, B]`` of chains from the start of the path or, from its other end, back; and the
    share of accepted proposals.

    Transitions are reversible, so that the way back is the way there in the opposite order.
    """
    state = target(at)
    deltas = path.betas.diff().to(at.device)
    betas, steps = (ends[1:-1].to(at) for ends in (path.betas, path.steps))
    if back:
        deltas, betas, steps = deltas.flip(0), betas.flip(0), steps.flip(0)
    log_w, share = deltas[0] * state.ratio.double(), at.new_zeros(())
    for delta, beta, step in zip(deltas[1:], betas, steps, strict=True):
        state, probability = transition(target, state, beta, step, leapfrog)
        log_w = log_w + delta * state.ratio.double()
        share = share + probability.mean() / len(betas)
    return log_w, share


def _path(
    pair: Pair,
    rows: Any,
    temperatures: int | Sequence[float],
    leapfrog: int,
    acceptance: float,
    seed: int,
) -> Path:
    """Temperatures at equal steps of the path's length, and step sizes for ``acceptance``, from chains
    of pilot rows. How far they go at a time, and so what they cost, is as the path is long."""
    _sow(seed, 0)
    target = Rows(pair, rows, PILOT_CHAINS, 300 * leapfrog)
    state = target(target.start())
    beta, step = 0.0, torch.full_like(state.base[0, 0], state.at.shape[-1] ** -0.25)
    grid: list[float] = []
    spreads: list[Tensor] = []
    sizes: list[Tensor] = []
    while not grid or grid[-1] < 1:
        here = torch.full_like(step, beta)
        for _ in range(SETTLE if grid else FIRST):
            state, probability = transition(target, state, here, step, leapfrog)
            step = step * (probability.mean() - acceptance).exp()
        spreads.append(state.ratio.var(0).mean().sqrt())
        grid.append(beta)
        sizes.append(step)
        spread = float(spreads[-1])
        if not math.isfinite(spread):
            raise ValueError(
                f"{pair.what}: log p of the data is not finite at draws from the {pair.start}; give "
                "the likelihood a density above 0 wherever latents can be"
            )
        beta = min(1.0, beta + PACE / max(spread, LEAST))
    # a path without length has its temperatures apart too
    deviations = torch.stack(spreads).double().cpu().numpy().clip(min=LEAST)
    legs = np.diff(grid) * (deviations[1:] + deviations[:-1]) / 2
    along = np.concatenate([[0.0], np.cumsum(legs)])
    if isinstance(temperatures, int):
        betas = np.interp(np.linspace(0, along[-1], temperatures + 1), along, grid)
    else:
        betas = np.array(temperatures, dtype=float)
    betas[0], betas[-1] = 0.0, 1.0
    logs = torch.stack(sizes).double().log().cpu().numpy()
    steps = np.exp(np.interp(np.interp(betas, grid, along), along, logs))
    return Path(torch.from_numpy(betas), torch.from_numpy(steps), float(along[-1]))


# ---------------------------------------------------------------------------------------------
# Rows


def _parts(data: Any, batch_size: int) -> list[Tensor]:
    """Numbers of the rows of each batch."""
    return list(torch.arange(len(data)).split(batch_size))


def _pilots(pilot: int | Batch | Tensor, data: Any) -> Any:
    if isinstance(pilot, int):
        return take(data, torch.linspace(0, len(data) - 1, min(pilot, len(data))).long())
    return still(pilot).to(data.device)


def _made(what: str, model: Program, data: Batch) -> tuple[Batch, dict[str, Site]]:
    """Rows like those of the data, drawn from the model, and all its sites with their draws."""
    bare, _ = unwrap(model, (data,))
    sites, _ = trace(bare, (data,), {}, [])
    if fixed := [name for name, site in sites.items() if site["is_observed"]]:
        raise ValueError(
            f"{what}: site {fixed[0]!r}: the model gives obs= or a factor by itself, so that its rows "
            "can't be drawn; drop it: a model contains no data"
        )
    values = {
        name: sites[name]["value"].reshape(value.shape).to(value.dtype) if name in sites else value
        for name, value in ((name, data[name]) for name in data)
    }
    observed = {name: data.mask(name) for name in data.incomplete}
    made = Batch(
        values,
        observed,
        total=data.total,
        index=data.index,
        weights=data.weights,
        fill=data.fill,
        record=data.record,
    )
    return made, sites


def _draws_nothing(*args: Any) -> None:
    """In the place of a guide that there is not."""


def _sow(seed: int, stream: int) -> None:
    """Draws that neither another seed nor another batch of rows has."""
    state = np.random.SeedSequence((seed % 2**32, stream)).generate_state(1)
    torch.manual_seed(int(state[0]))


def _log_mean(log_w: Tensor) -> Tensor:
    """``[K, B]`` -> ``[B]``."""
    return log_w.logsumexp(0) - math.log(len(log_w))


# ---------------------------------------------------------------------------------------------
# Arguments and words


def _check(
    what: str,
    chains: int,
    temperatures: int | Sequence[float],
    leapfrog: int,
    acceptance: float,
    pilot: int | Batch | Tensor,
    batch_size: int,
) -> None:
    """Refuse settings that are none.

    Raises:
        ValueError: naming the argument.
    """
    whole_numbers(what, chains=chains, leapfrog=leapfrog, batch_size=batch_size)
    if not 0 < acceptance < 1:
        raise ValueError(f"{what}: came acceptance={acceptance!r}, wanted a share between 0 and 1")
    if isinstance(pilot, int):
        whole_numbers(what, pilot=pilot)
    else:
        check_rows(f"{what}: pilot", pilot)
    if isinstance(temperatures, int):
        whole_numbers(what, temperatures=temperatures)
        return
    betas = np.array(temperatures, dtype=float)
    rising = betas.ndim == 1 and len(betas) > 1 and bool((np.diff(betas) > 0).all())
    if not rising or betas[0] != 0 or betas[-1] != 1:
        raise ValueError(
            f"{what}: came temperatures={temperatures!r}, wanted how many steps, or inverse "
            "temperatures that rise from 0 to 1"
        )


def _settings(result: Annealed | Bidirectional) -> dict[str, Any]:
    return {
        "chains": result.chains,
        "temperatures": len(result.path.betas) - 1,
        "leapfrog": result.leapfrog,
        "start": result.start,
        "acceptance": result.acceptance,
        "path_length": result.path.length,
        "seed": result.seed,
    }


def _told(s: Mapping[str, Any]) -> str:
    return (
        f"{s['chains']} chains from the {s['start']}, {s['temperatures']} temperatures of "
        f"{s['leapfrog']} leapfrog steps, acceptance {s['acceptance']:.2f}, path length "
        f"{s['path_length']:.1f}, seed {s['seed']}"
    )
