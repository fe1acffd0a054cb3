"""Bounds: maps from log weights ``[K, B]`` to ``[B]``, with their weights in closed form.

With w = d bound / d log w and h the diagonal of d w / d log w, an estimator needs w (what each
particle's gradient counts), h (what DReG takes off it) and the reward of the score function. A
smooth bound may leave all three to autodiff; the closed forms here are cheaper and stay finite where
weights underflow.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["Bound", "Cubo", "Elbo", "Jackknife", "Mix", "Miwae", "Renyi", "Split", "Thermodynamic"]

_MAX_SUBSETS = 1_000  # of particles that a jackknife leaves


class Bound:
    """A differentiable reduction of log weights over particles. Wrap it to change it.

    Attributes:
        linear: the bound is a mean over particles (global latents, analytic KL, STL ask for it).
        smooth: the weights are a differentiable function of log w (DReG asks for it).
        guarantee: what the expectation is at finite K, ``"lower bound"`` or ``"no bound"``.
        min_particles: the least K.
        positive: no weight is negative (drawing one particle by its weight asks for it).
    """

    linear: bool = False
    smooth: bool = True
    guarantee: str = "no bound"
    min_particles: int = 1
    positive: bool = False

    @property
    def guide(self) -> Bound:
        """The bound whose gradient the guide follows."""
        return self

    def __call__(self, log_w: Tensor) -> Tensor:
        """``[K, B] -> [B]`` in nats."""
        raise NotImplementedError

    def weights(self, log_w: Tensor) -> Tensor:
        """w = d bound / d log w, ``[K, B]``."""
        with torch.enable_grad():
            log_w = log_w.detach().requires_grad_()
            return torch.autograd.grad(self(log_w).sum(), log_w)[0]

    def diagonal(self, log_w: Tensor) -> Tensor:
        """h_k = d w_k / d log w_k, ``[K, B]``."""
        with torch.enable_grad():
            log_w = log_w.detach().requires_grad_()
            w = torch.autograd.grad(self(log_w).sum(), log_w, create_graph=True)[0]
            if not w.requires_grad:  # constant weights
                return torch.zeros_like(w)
            h = [
                torch.autograd.grad(w[k].sum(), log_w, retain_graph=True)[0][k]
                for k in range(len(w))
            ]
        return torch.stack(h)

    def reward(self, log_w: Tensor) -> Tensor:
        """What multiplies particle k's score so that the score term is unbiased, ``[K, B]``."""
        return self(log_w).expand_as(log_w)

    def replaced(self, log_w: Tensor, other: Tensor) -> Tensor:
        """The bound if particle k had log weight ``other[k]``, ``[K, B]`` (a baseline asks for it)."""
        itself = torch.eye(len(log_w), dtype=torch.bool, device=log_w.device)
        copies = torch.where(itself[..., None], other, log_w[:, None])  # [K particles, K copies, B]
        return self(copies.flatten(1)).reshape(log_w.shape)

    def __repr__(self) -> str:
        return type(self).__name__.lower()


class Elbo(Bound):
    """Evidence lower bound, E[log w], estimated by the mean over particles (Kingma & Welling 2014)."""

    linear = positive = True
    guarantee = "lower bound"

    def __call__(self, log_w: Tensor) -> Tensor:
        return log_w.mean(0)

    def weights(self, log_w: Tensor) -> Tensor:
        return torch.full_like(log_w, 1 / len(log_w))

    def diagonal(self, log_w: Tensor) -> Tensor:
        return torch.zeros_like(log_w)

    def reward(self, log_w: Tensor) -> Tensor:
        return log_w / len(log_w)  # the other particles' terms are independent of particle k

    def replaced(self, log_w: Tensor, other: Tensor) -> Tensor:
        return (log_w.sum(0) - log_w + other) / len(log_w)


class Renyi(Bound):
    """Variational Rényi bound, ``1/(1 - alpha) log 1/K sum_k w_k^(1 - alpha)``.

    ``alpha=0`` is the importance weighted bound (Burda et al. 2016), ``alpha=-inf`` VR-max (Li &
    Turner 2016), ``alpha -> 1`` the ELBO (use ``Elbo``). A lower bound in expectation for every
    ``alpha >= 0``; for ``alpha < 0`` no bound at finite K > 1.

    Raises:
        ValueError: ``alpha`` is 1, NaN or +inf.
    """

    positive = True

    def __init__(self, alpha: float = 0.0) -> None:
        if alpha == 1:
            raise ValueError("Renyi: alpha=1 is the ELBO; use Elbo()")
        if math.isnan(alpha) or alpha == math.inf:
            raise ValueError(f"Renyi: came alpha={alpha}, wanted a number or -inf")
        self.alpha = float(alpha)
        self.smooth = alpha > -math.inf
        self.guarantee = "lower bound" if alpha >= 0 else "no bound"

    def __call__(self, log_w: Tensor) -> Tensor:
        if not self.smooth:
            return log_w.max(0).values
        power = 1 - self.alpha
        return (torch.logsumexp(power * log_w, 0) - math.log(len(log_w))) / power

    def weights(self, log_w: Tensor) -> Tensor:
        if not self.smooth:
            first = torch.zeros_like(log_w)
            return first.scatter(0, log_w.argmax(0, keepdim=True), 1.0)
        return torch.softmax(_finite((1 - self.alpha) * log_w), 0)

    def diagonal(self, log_w: Tensor) -> Tensor:
        if not self.smooth:
            return torch.zeros_like(log_w)
        w = self.weights(log_w)
        return (1 - self.alpha) * w * (1 - w)

    def replaced(self, log_w: Tensor, other: Tensor) -> Tensor:
        if not self.smooth:
            return super().replaced(log_w, other)
        power = 1 - self.alpha
        both = torch.logaddexp(_logsumexp_of_others(power * log_w), power * other)
        return (both - math.log(len(log_w))) / power

    def __repr__(self) -> str:
        names = {0.0: "iwae", -math.inf: "vr_max"}
        return names.get(self.alpha, f"renyi({self.alpha:g})")


class Cubo(Renyi):
    """Chi upper bound, ``1/n log 1/K sum_k w_k^n`` (Dieng et al. 2017): the Rényi bound at 1 - n.

    An upper bound only as K grows without limit. At finite K it is biased low and no bound; at K = 1
    it is the ELBO. For chi-VI the guide descends: ``Split(Elbo(), Mix((-1, Cubo())))``.

    Raises:
        ValueError: n is no number above 1.
    """

    def __init__(self, n: float = 2.0) -> None:
        if not 1 < n < math.inf:
            raise ValueError(f"Cubo: came n={n}, wanted a number > 1 (1 is Renyi(0))")
        super().__init__(1 - n)

    def __repr__(self) -> str:
        return f"cubo({1 - self.alpha:g})"


class Miwae(Bound):
    """Mean of a bound over groups of particles (MIWAE, Rainforth et al. 2018): log w ``[M * K, B]``
    is M groups of K, one after the other.

    What its bound guarantees at K particles, it guarantees.

    Args:
        groups: M.
        bound: of the K particles of a group (None: the importance weighted bound).

    Raises:
        ValueError: M is no whole number >= 1; when called, a number of particles that M does not
            divide.
    """

    def __init__(self, groups: int, bound: Bound | None = None) -> None:
        if not isinstance(groups, int) or groups < 1:
            raise ValueError(f"Miwae: came groups={groups!r}, wanted a whole number >= 1")
        self.groups, self.bound = groups, bound or Renyi(0.0)
        self.linear, self.smooth = self.bound.linear, self.bound.smooth
        self.guarantee = self.bound.guarantee
        self.min_particles = groups * self.bound.min_particles
        self.positive = self.bound.positive

    @property
    def guide(self) -> Bound:
        guide = self.bound.guide
        return self if guide is self.bound else Miwae(self.groups, guide)

    def __call__(self, log_w: Tensor) -> Tensor:
        return self.bound(self._apart(log_w)).reshape(self.groups, -1).mean(0)

    def weights(self, log_w: Tensor) -> Tensor:
        return self._mean_of(self.bound.weights, log_w)

    def diagonal(self, log_w: Tensor) -> Tensor:
        return self._mean_of(self.bound.diagonal, log_w)

    def reward(self, log_w: Tensor) -> Tensor:
        return self._mean_of(self.bound.reward, log_w)  # other groups are independent of particle k

    def _mean_of(self, function: Callable[[Tensor], Tensor], log_w: Tensor) -> Tensor:
        """The share of each particle, ``[M * K, B]``, where ``function`` keeps shapes."""
        return function(self._apart(log_w)).reshape(log_w.shape) / self.groups

    def _apart(self, log_w: Tensor) -> Tensor:
        """``[M * K, B] -> [K, M * B]``: groups are rows.

        Particle k is one of group k mod M: neighbours may be draws of one component of a mixture.
        """
        size, left = divmod(len(log_w), self.groups)
        if left:
            raise ValueError(
                f"bound {self!r}: came {len(log_w)} particles, wanted a multiple of {self.groups}"
            )
        return log_w.reshape(size, -1)

    def __repr__(self) -> str:
        inner = repr(self.bound)
        return f"miwae({self.groups}{'' if inner == 'iwae' else f', {inner}'})"


class Mix(Bound):
    """A weighted sum of bounds: ``Mix((beta, Elbo()), (1 - beta, Renyi(0)))`` is CIWAE (Rainforth et
    al. 2018), ``Mix((-1, bound))`` descends.

    A lower bound in expectation where all parts are and the numbers are >= 0 and sum to 1.

    Args:
        terms: (number, bound) pairs; a 0 drops its bound.

    Raises:
        ValueError: a number that is not finite; nothing but zeros.
    """

    def __init__(self, *terms: tuple[float, Bound]) -> None:
        if infinite := [number for number, _ in terms if not math.isfinite(number)]:
            raise ValueError(f"Mix: came {infinite[0]}, wanted finite numbers")
        self.terms = [(float(number), bound) for number, bound in terms if number]
        if not self.terms:
            raise ValueError("Mix: came no bound, wanted (number, bound) with numbers other than 0")
        numbers, parts = zip(*self.terms, strict=True)
        means = all(part.linear for part in parts)
        self.linear = means and math.isclose(sum(numbers), 1)  # a mean, not a multiple of one
        self.smooth = all(part.smooth for part in parts)
        self.min_particles = max(part.min_particles for part in parts)
        lower = all(part.guarantee == "lower bound" for part in parts)
        convex = min(numbers) > 0 and math.isclose(sum(numbers), 1)
        self.guarantee = "lower bound" if lower and convex else "no bound"
        self.positive = min(numbers) > 0 and all(part.positive for part in parts)

    @property
    def guide(self) -> Bound:
        if all(part.guide is part for _, part in self.terms):
            return self
        return Mix(*((number, part.guide) for number, part in self.terms))

    def __call__(self, log_w: Tensor) -> Tensor:
        return self._sum(lambda part: part(log_w))

    def weights(self, log_w: Tensor) -> Tensor:
        return self._sum(lambda part: part.weights(log_w))

    def diagonal(self, log_w: Tensor) -> Tensor:
        return self._sum(lambda part: part.diagonal(log_w))

    def reward(self, log_w: Tensor) -> Tensor:
        if min(number for number, _ in self.terms) < 0:  # what a part leaves out centres the others
            return super().reward(log_w)
        return self._sum(lambda part: part.reward(log_w))

    def _sum(self, of: Callable[[Bound], Tensor]) -> Tensor:
        return functools.reduce(torch.add, (number * of(part) for number, part in self.terms))

    def __repr__(self) -> str:
        return f"mix({' + '.join(f'{number:g} {part!r}' for number, part in self.terms)})"


class Split(Bound):
    """One bound for the model, another for the guide. All that it says of itself is the model's, and
    so are the parameters that both have, the guide held fixed.

    ``Split(Renyi(0), Miwae(8))`` is PIWAE (Rainforth et al. 2018).
    """

    def __init__(self, model: Bound, guide: Bound) -> None:
        self.model, self._guide = model, guide.guide
        self.linear = model.linear and guide.linear
        self.smooth = model.smooth and guide.smooth
        self.guarantee = model.guarantee
        self.min_particles = max(model.min_particles, guide.min_particles)

    @property
    def guide(self) -> Bound:
        return self._guide

    def __call__(self, log_w: Tensor) -> Tensor:
        return self.model(log_w)

    def weights(self, log_w: Tensor) -> Tensor:
        return self.model.weights(log_w)

    def diagonal(self, log_w: Tensor) -> Tensor:
        return self.model.diagonal(log_w)

    def reward(self, log_w: Tensor) -> Tensor:
        return self.model.reward(log_w)

    def __repr__(self) -> str:
        return f"split({self.model!r}, {self.guide!r})"


class _Tempered(Bound):
    """Mean of log w under weights w^power, ``power > 0``: the slope of log mean w^b at b = power."""

    def __init__(self, power: float) -> None:
        self.power = power

    def __call__(self, log_w: Tensor) -> Tensor:
        return self._moments(log_w)[0]

    def weights(self, log_w: Tensor) -> Tensor:
        _, share, off = self._moments(log_w)
        return share * (1 + off)

    def diagonal(self, log_w: Tensor) -> Tensor:
        _, share, off = self._moments(log_w)
        return self.power * share * (2 * (1 - share) + off * (1 - 2 * share))

    def _moments(self, log_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean ``[B]``, each particle's share in it and power * (log w - mean), ``[K, B]``."""
        share = torch.softmax(_finite(self.power * log_w), 0)
        log_w = log_w.masked_fill(share == 0, 0.0)  # whatever it is, it counts nothing
        mean = (share * log_w).sum(0)
        off = (log_w - mean).nan_to_num(0.0)  # where all are impossible, all are alike
        return mean, share, self.power * off


class Thermodynamic(Mix):
    """Thermodynamic variational objective (TVO, Masrani et al. 2019): a Riemann sum of E_b[log w] over
    b from 0 to 1, where E_b has the weights w^b of the K particles.

    E_b[log w] rises from the ELBO's mean at b = 0, and its integral is the importance weighted bound of
    the same particles. So the left sum is below that bound for every log w, and a lower bound in
    expectation; the right sum is no bound.

    Args:
        partition: the points 0 = b_0 < ... < b_J = 1, or J: 0 and then J points from ``first`` to 1,
            evenly spaced in log b.
        first: b_1 where J is given.
        right: take E_b at the right end of each interval.

    Raises:
        ValueError: no such points.
    """

    def __init__(
        self, partition: int | Sequence[float], first: float = 0.08, right: bool = False
    ) -> None:
        if isinstance(partition, int):
            if partition < 1 or not 0 < first < 1:
                raise ValueError(
                    f"Thermodynamic: came {partition} intervals and first={first}, wanted >= 1 and "
                    "a number between 0 and 1"
                )
            inner = [first ** (1 - j / (partition - 1)) for j in range(partition - 1)]
            points = [0.0, *inner, 1.0]
            name = f"{partition} from {first:g}" if inner else "0, 1"
        else:
            points = list(partition)
            name = ", ".join(f"{point:g}" for point in points)
        intervals = list(itertools.pairwise(points))
        rising = bool(intervals) and all(a < b for a, b in intervals)
        if not rising or (points[0], points[-1]) != (0, 1):
            raise ValueError(f"Thermodynamic: came points {name}, wanted 0 < ... < 1, rising")
        powers = points[1:] if right else points[:-1]
        parts = [_Tempered(power) if power else Elbo() for power in powers]
        super().__init__(*((b - a, part) for (a, b), part in zip(intervals, parts, strict=True)))
        self.guarantee = "no bound" if right else "lower bound"
        self._name = f"tvo({name}{', right' if right else ''})"

    def __repr__(self) -> str:
        return self._name


class Jackknife(Bound):
    """Jackknife variational objective (JVI, Nowozin 2018): a sum of the importance weighted bounds of
    all subsets that leave out at most ``order`` particles, whose bias is O(K^-(order + 1)).

    Its signs change, so it is no bound. ``order=0`` is the importance weighted bound. The bias is
    that of independent particles; of a ``StratifiedMixture``'s, which differ more than their mean
    varies, too much of it is taken off.

    Raises:
        ValueError: ``order`` is no whole number >= 0; when called, too few particles, or so many that
            there are more than 1000 subsets.
    """

    def __init__(self, order: int = 1) -> None:
        if not isinstance(order, int) or order < 0:
            raise ValueError(f"Jackknife: came order={order!r}, wanted a whole number >= 0")
        self.order = order
        self.min_particles = order + 1

    def __call__(self, log_w: Tensor) -> Tensor:
        top = log_w.max(0).values  # kept out of the sum: its coefficients are large and sum to 1

        def log_mean(kept: Tensor, size: int) -> Tensor:
            return torch.logsumexp(kept, 1) - math.log(size)

        off = (log_w - top).nan_to_num(
            0.0, neginf=-math.inf
        )  # all are alike where none is possible
        return top + self._sum(log_mean, off)

    def weights(self, log_w: Tensor) -> Tensor:
        return self._sum(lambda kept, _: torch.softmax(kept, 1), _finite(log_w))

    def diagonal(self, log_w: Tensor) -> Tensor:
        def slope(kept: Tensor, _: int) -> Tensor:
            share = torch.softmax(kept, 1)
            return share * (1 - share)

        return self._sum(slope, _finite(log_w))

    def reward(self, log_w: Tensor) -> Tensor:
        """Less the bound of the other particles, which is independent of particle k."""
        if not self.order:
            return super().reward(log_w)
        return self(log_w) - (_logsumexp_of_others(log_w) - math.log(len(log_w) - 1))

    def _sum(self, of: Callable[[Tensor, int], Tensor], log_w: Tensor) -> Tensor:
        """Sum of coefficient times mean over subsets; ``of`` takes log w ``[subsets, K, B]``, -inf
        where a particle is left out, and the size of a subset."""
        total, order = len(log_w), self.order
        if total <= order:
            raise ValueError(f"bound {self!r}: came {total} particles, wanted >= {order + 1}")
        subsets = sum(math.comb(total, j) for j in range(order + 1))
        if subsets > _MAX_SUBSETS:
            raise ValueError(
                f"bound {self!r}: came {total} particles with {subsets} subsets, wanted at most "
                f"{_MAX_SUBSETS}; take fewer particles or a lower order"
            )
        terms: list[Tensor] = []
        for j, left in enumerate(_left_out(total, order, log_w.device)):
            number = (-1) ** j * math.comb(order, j) * (total - j) ** order / math.factorial(order)
            kept = log_w.masked_fill(left[..., None], -math.inf)
            terms.append(number * of(kept, total - j).mean(0))
        return functools.reduce(torch.add, terms)

    def __repr__(self) -> str:
        return f"jackknife({self.order})"


def _left_out(total: int, order: int, device: torch.device) -> Iterator[Tensor]:
    """For j = 0 ... order, who is left out of each subset of ``total - j``: bools ``[subsets, total]``.

    Made of slices, since a graph takes no table from the host. Subsets are in the order of their last
    member, so that those of the first i particles come first.
    """
    single = torch.eye(total, dtype=torch.bool, device=device)
    left = torch.zeros_like(single[:1])
    yield left
    for j in range(1, order + 1):
        grown = (left[: math.comb(i, j - 1)] | single[i] for i in range(total))
        left = single if j == 1 else torch.cat([*grown])
        yield left


def _logsumexp_of_others(terms: Tensor) -> Tensor:
    """Of all terms but the k-th, ``[K, B]``. The largest is not taken off a sum that it outweighs."""
    top, first = terms.max(0, keepdim=True)
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    shares = (terms - top).exp()
    rest = top + (shares.sum(0) - shares).log()
    without = torch.logsumexp(terms.scatter(0, first, -math.inf), 0, keepdim=True)
    return rest.scatter(0, first, without)


def _finite(log_w: Tensor) -> Tensor:
    """Infinite log weights as the largest numbers there are: equal ones share the weight."""
    limits = torch.finfo(log_w.dtype)
    return log_w.clamp(limits.min, limits.max)
