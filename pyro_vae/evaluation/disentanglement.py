"""Whether each latent dimension holds one factor of variation, and each factor is in one dimension.

Scores of codes ``[N, D]`` (posterior means) against the factors ``[N, F]`` that the rows were made from:
``mig``, ``sap``, ``dci``, ``modularity``; and of an encoder, for images with one factor fixed:
``factor_vae_score``, ``beta_vae_score``. Protocols are those of Locatello et al. 2019 (arXiv:1811.12359)
except where a function says so. None changes when dimensions are reordered, have their sign changed or
are rescaled.

Rows are levels of discrete factors, whole numbers from 0. They should be drawn uniformly from all
combinations: a score takes dependence between factors for entanglement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evaluation.likelihood import whole_numbers

__all__ = [
    "Score",
    "beta_vae_score",
    "dci",
    "factor_vae_score",
    "mig",
    "modularity",
    "mutual_information",
    "sap",
]

RESAMPLES = 100  # of the rows, for standard errors
TEST = 1 / 3  # of the rows, where something is fitted
IMAGES = 4096  # at a time
ROUNDING = 1e-12  # nats: what a constant is told to know, else


@dataclass(frozen=True)
class Score:
    """A number from 0 to 1, the higher the better, and what it comes from.

    Attributes:
        value: the score.
        se: its standard error over rows (over votes, where images are drawn), what was fitted held
            fixed; NaN where none is known.
        each: the score of each factor ``[F]``, or of each code ``[D]``.
        matrix: what was found between codes and factors, ``[D, F]``; empty where nothing is.
    """

    value: float
    se: float
    each: Tensor
    matrix: Tensor

    def __float__(self) -> float:
        return self.value


# --- from codes and factors -----------------------------------------------------------------------


def mutual_information(codes: Tensor, factors: Tensor, bins: int = 20) -> Tensor:
    """Mutual information of every code, cut into bins of equal width, with every factor.

    A plug-in estimate: between independent variables it is about (bins - 1)(levels - 1) / 2N, not 0.

    Args:
        codes: ``[N, D]``.
        factors: ``[N, F]``.
        bins: over the range of a code.

    Returns:
        ``[D, F]`` nats, float64.

    Raises:
        ValueError: wrong shapes, codes that are not finite, factors that are not whole numbers.
    """
    codes, factors = _checked("mutual_information", codes, factors)
    whole_numbers("mutual_information", bins=bins)
    return _information(codes, factors, bins, torch.ones(1, len(codes)))[0][0]


def mig(
    codes: Tensor, factors: Tensor, bins: int = 20, resamples: int = RESAMPLES, seed: int = 0
) -> Score:
    """Mutual information gap (Chen et al. 2018, arXiv:1802.04942).

    By factor, the difference between the two codes that tell most of it, in units of the factor's
    entropy. One with more levels than there are bins does not reach 1, only log(bins) / log(levels).

    Args:
        codes: ``[N, D]``.
        factors: ``[N, F]``.
        bins: of equal width over the range of a code.
        resamples: of the rows, for the standard error.
        seed: of the resamples.

    Returns:
        ``each``: the gap of each factor; ``matrix``: mutual information, nats.

    Raises:
        ValueError: wrong shapes, codes that are not finite, factors that are not whole numbers or have
            one level.
    """
    codes, factors = _checked("mig", codes, factors)
    whole_numbers("mig", bins=bins)
    information, entropy = _information(
        codes, factors, bins, _weights("mig", codes, resamples, seed)
    )
    return _score(_gap(information) / entropy, information)


def modularity(
    codes: Tensor, factors: Tensor, bins: int = 20, resamples: int = RESAMPLES, seed: int = 0
) -> Score:
    """Modularity (Ridgeway and Mozer 2018, arXiv:1802.05312): whether a code tells of one factor only.

    By code, 1 - (sum of I^2 over all factors but the one it tells most of) / ((F - 1) max I^2); 0 for a
    constant code. Noise between the rows counts like information (see ``mutual_information``).

    Args:
        codes: ``[N, D]``.
        factors: ``[N, F]``.
        bins: of equal width over the range of a code.
        resamples: of the rows, for the standard error.
        seed: of the resamples.

    Returns:
        ``each``: the modularity of each code; ``matrix``: mutual information, nats.

    Raises:
        ValueError: as for ``mig``.
    """
    codes, factors = _checked("modularity", codes, factors)
    whole_numbers("modularity", bins=bins)
    weights = _weights("modularity", codes, resamples, seed)
    information, _ = _information(codes, factors, bins, weights)
    squared = information.square()
    top = squared.amax(2)
    excess = (squared.sum(2) - top) / (factors.shape[1] - 1)
    return _score(torch.where(top > 0, 1 - excess / top, 0.0), information)


def sap(
    codes: Tensor,
    factors: Tensor,
    continuous: Collection[int] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Score:
    """Separated attribute predictability (Kumar et al. 2018, arXiv:1711.00848).

    By factor, the difference between the two codes that predict it best, each by itself: by the share of
    a third of the rows that a linear support vector machine puts right (C = 0.01, classes weighted to be
    balanced, codes in units of their deviation), or by R^2 on these rows.

    Args:
        codes: ``[N, D]``.
        factors: ``[N, F]``.
        continuous: the factors, by number, that are judged by R^2; they may have any values.
        resamples: of the rows that are judged by, for the standard error.
        seed: of the split and the resamples.

    Returns:
        ``each``: the gap of each factor; ``matrix``: accuracy or R^2.

    Raises:
        ValueError: wrong shapes, numbers that are not finite, factors that are not whole numbers or
            have one level, factors that there are not.
    """
    codes, factors = _checked("sap", codes, factors, continuous)
    train, test = _parts("sap", codes, seed)
    codes = _unit(codes, train)
    weights = _weights("sap", codes[test], resamples, seed)

    def found(k: int) -> Tensor:
        if k in continuous:
            return _r_squared(codes[test], factors[test, k], weights)
        right = _separated(codes[train], factors[train, k], codes[test], factors[test, k], seed)
        return weights @ right / len(test)

    scores = torch.stack([found(k) for k in range(factors.shape[1])], 2)
    return _score(_gap(scores), scores)


def dci(
    codes: Tensor,
    factors: Tensor,
    classifier: Callable[[], Any] | None = None,
    seed: int = 0,
) -> dict[str, Score]:
    """Disentanglement, completeness and informativeness (Eastwood and Williams 2018, ICLR).

    A classifier per factor is given all codes, and says how much each mattered. Disentanglement: 1 -
    entropy of a code's importances over factors, weighted by the code's share of all importance;
    completeness: 1 - entropy of a factor's importances over codes; informativeness: accuracy on a third
    of the rows. Entropies are in units of their maximum.

    Args:
        codes: ``[N, D]``.
        factors: ``[N, F]``.
        classifier: makes a classifier with ``fit``, ``predict`` and, once fitted,
            ``feature_importances_`` [D], such as scikit-learn's ``GradientBoostingClassifier``, which
            Locatello et al. take and which needs minutes to hours. Default: a random forest of 20 trees
            that look at all codes in every split and have 10 rows or more in every leaf.
        seed: of the split and of the default classifier.

    Returns:
        ``disentanglement`` with ``each`` by code, ``completeness`` and ``informativeness`` by factor;
        ``matrix``: importances, which sum to 1 for each factor. Only informativeness has an error.

    Raises:
        ValueError: wrong shapes, codes that are not finite, factors that are not whole numbers or have
            one level.
    """
    codes, factors = _checked("dci", codes, factors)
    train, test = _parts("dci", codes, seed)
    importance, right = [], []
    for factor in factors.T:
        fitted = _forest(seed) if classifier is None else classifier()
        fitted.fit(codes[train].numpy(), factor[train].numpy())
        importance.append(torch.as_tensor(fitted.feature_importances_).double().abs())
        predicted = torch.as_tensor(fitted.predict(codes[test].numpy()))
        right.append((predicted == factor[test]).double())
    matrix = torch.stack(importance, 1)
    matrix = matrix / matrix.sum(0).clamp(min=torch.finfo(matrix.dtype).tiny)
    by_code, by_factor = _concentration(matrix), _concentration(matrix.T)
    share = matrix.sum(1) / matrix.sum().clamp(min=torch.finfo(matrix.dtype).tiny)
    correct = torch.stack(right, 1)
    return {
        "disentanglement": Score(float(share @ by_code), math.nan, by_code, matrix),
        "completeness": Score(float(by_factor.mean()), math.nan, by_factor, matrix),
        "informativeness": Score(*_mean(correct.mean(1)), correct.mean(0), matrix),
    }


# --- from an encoder and a renderer -----------------------------------------------------------------

Encode = Callable[[Tensor], Tensor]
Render = Callable[[Tensor], Tensor]


def factor_vae_score(
    encode: Encode,
    render: Render,
    levels: Sequence[int],
    *,
    batch_size: int = 64,
    num_train: int = 10_000,
    num_eval: int = 5_000,
    num_rows: int = 10_000,
    collapsed: float = 0.05,
    seed: int = 0,
) -> Score:
    """FactorVAE score (Kim and Mnih 2018, arXiv:1802.05983): which code stays when a factor does.

    A vote: one factor, chosen at random, is the same in a batch of images, and the code that varies
    least, in units of its variance over all images, votes for it. The score is how often the factor for
    which a code votes most was the one that was fixed, in votes that did not count for that. At chance:
    1 / F.

    Args:
        encode: images ``[B, *event]`` to codes ``[B, D]``.
        render: factors ``[B, F]`` int64 to images.
        levels: how many levels each factor has.
        batch_size: images of a vote.
        num_train: votes that say which factor a code stands for.
        num_eval: votes that are judged.
        num_rows: images for the variance of the codes.
        collapsed: codes whose standard deviation is no larger have no vote.
        seed: of the factors.

    Returns:
        ``each``: accuracy by the factor that was fixed; ``matrix``: votes of ``num_train``.

    Raises:
        ValueError: levels below 2, codes that are not finite or no rows ``[B, D]``.
    """
    name = "factor_vae_score"
    draw = _Sampler(name, encode, render, levels, seed)
    whole_numbers(name, at_least=2, batch_size=batch_size, num_rows=num_rows)
    whole_numbers(name, num_train=num_train, num_eval=num_eval)
    variance = draw.codes(draw.factors(num_rows)).var(0)
    chosen, least = [], []
    for fixed, factors in draw.with_one_fixed(num_train + num_eval, batch_size):
        share = draw.codes(factors).var(1) / variance
        chosen.append(fixed)
        least.append(share.masked_fill(variance.sqrt() <= collapsed, torch.inf).argmin(1))
    factor, code = torch.cat(chosen), torch.cat(least)
    place = code * len(levels) + factor
    votes = (
        place[:num_train].bincount(minlength=len(variance) * len(levels)).view(len(variance), -1)
    )
    right = (votes.argmax(1)[code] == factor)[num_train:].double()
    return Score(*_mean(right), _by_factor(right, factor[num_train:], len(levels)), votes.double())


def beta_vae_score(
    encode: Encode,
    render: Render,
    levels: Sequence[int],
    *,
    batch_size: int = 64,
    num_train: int = 10_000,
    num_eval: int = 5_000,
    seed: int = 0,
) -> Score:
    """beta-VAE score (Higgins et al. 2017, ICLR): whether pairs show which factor they share.

    One factor, chosen at random, is the same within each of ``batch_size`` pairs of images; a linear
    classifier (logistic regression) is to tell it from the mean of |z1 - z2| over the pairs, in units of
    its deviation. At chance: 1 / F.

    Args:
        encode: images ``[B, *event]`` to codes ``[B, D]``.
        render: factors ``[B, F]`` int64 to images.
        levels: how many levels each factor has.
        batch_size: pairs that are averaged.
        num_train: averages that the classifier is fitted to.
        num_eval: averages that are judged.
        seed: of the factors.

    Returns:
        ``each``: accuracy by the factor that was shared; ``matrix``: means of what the
        classifier is given, by code and factor.

    Raises:
        ValueError: levels below 2, codes that are not finite or no rows ``[B, D]``.
    """
    from sklearn.linear_model import LogisticRegression  # here, since it takes a second to import

    name = "beta_vae_score"
    draw = _Sampler(name, encode, render, levels, seed)
    whole_numbers(name, batch_size=batch_size, num_train=num_train, num_eval=num_eval)
    chosen, differences = [], []
    for shared, factors in draw.with_one_shared(num_train + num_eval, batch_size):
        first, second = draw.codes(factors).unbind(2)
        chosen.append(shared)
        differences.append((first - second).abs().mean(1))
    factor, difference = torch.cat(chosen), torch.cat(differences)
    train = torch.arange(num_train)
    difference = _unit(difference, train)
    fitted = LogisticRegression(max_iter=1000).fit(difference[train].numpy(), factor[train].numpy())
    predicted = torch.from_numpy(fitted.predict(difference[num_train:].numpy()))
    right = (predicted == factor[num_train:]).double()
    by_factor = _by_factor(right, factor[num_train:], len(levels))
    return Score(*_mean(right), by_factor, _by_factor(difference, factor, len(levels)))


class _Sampler:
    """Factors drawn uniformly, and the codes of their images."""

    def __init__(
        self, name: str, encode: Encode, render: Render, levels: Sequence[int], seed: int
    ) -> None:
        self.name, self.encode, self.render = name, encode, render
        if len(levels) < 2 or any(not isinstance(n, int) or n < 2 for n in levels):
            raise ValueError(
                f"{name}: levels= came {list(levels)}, wanted the numbers of levels of two or more "
                "factors, each 2 or more"
            )
        self.levels = torch.tensor(levels)
        self.generator = torch.Generator().manual_seed(seed)

    def factors(self, *shape: int) -> Tensor:
        """``[*shape, F]``."""
        drawn = torch.rand(*shape, len(self.levels), generator=self.generator, dtype=torch.float64)
        return (drawn * self.levels).long()

    def with_one_fixed(self, votes: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Votes ``[V]``: which factor is fixed, and factors ``[V, size, F]`` in which it is."""
        for fixed in self._chosen(votes, size):
            factors = self.factors(len(fixed), size)
            yield fixed, _same(factors, fixed, dim=1)

    def with_one_shared(self, votes: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Which factor is shared, and factors ``[V, size, 2, F]`` of pairs that share it."""
        for shared in self._chosen(votes, 2 * size):
            factors = self.factors(len(shared), size, 2)
            yield shared, _same(factors, shared, dim=2)

    def codes(self, factors: Tensor) -> Tensor:
        """``[*shape, D]`` float64 of factors ``[*shape, F]``."""
        with torch.no_grad():
            parts = [
                self._rows(self.encode(self.render(part)), part)
                for part in factors.flatten(0, -2).split(IMAGES)
            ]
        codes = torch.cat(parts)
        return codes.view(*factors.shape[:-1], codes.shape[1])

    def _chosen(self, votes: int, images: int) -> Iterator[Tensor]:
        shape = (votes,)
        chosen = torch.randint(len(self.levels), shape, generator=self.generator)
        return iter(chosen.split(max(1, IMAGES // images)))

    def _rows(self, codes: Tensor, factors: Tensor) -> Tensor:
        if codes.dim() != 2 or len(codes) != len(factors):
            raise ValueError(
                f"{self.name}: encode= gave {list(codes.shape)} for {len(factors)} images, wanted codes "
                f"[{len(factors)}, D]"
            )
        return _finite(self.name, "encode=", codes)


def _same(factors: Tensor, which: Tensor, dim: int) -> Tensor:
    """Factors ``[V, ..., F]`` with factor ``which`` [V] as it is first along ``dim``."""
    is_it = torch.arange(factors.shape[-1]) == which[:, None]
    first = factors.narrow(dim, 0, 1)
    return torch.where(is_it.view(len(which), *[1] * (factors.dim() - 2), -1), first, factors)


# --- parts --------------------------------------------------------------------------------------------


def _checked(
    name: str, codes: Tensor, factors: Tensor, continuous: Collection[int] = ()
) -> tuple[Tensor, Tensor]:
    """Codes in float64; factors as numbers of their levels, those that are continuous as they are."""
    codes, factors = torch.as_tensor(codes).detach().cpu(), torch.as_tensor(factors).detach().cpu()
    rows = codes.dim() == factors.dim() == 2 and len(codes) == len(factors) > 1
    if not rows or min(codes.shape[1], factors.shape[1]) < 2:
        raise ValueError(
            f"{name}: came codes {list(codes.shape)} and factors {list(factors.shape)}, wanted [N, D] "
            "and [N, F] with the same rows and two or more columns each"
        )
    if unknown := sorted(set(continuous) - set(range(factors.shape[1]))):
        raise ValueError(
            f"{name}: continuous= came with {unknown}, wanted numbers of the {factors.shape[1]} factors"
        )
    codes, factors = _finite(name, "codes", codes), _finite(name, "factors", factors)
    for k, factor in enumerate(factors.T):
        discrete = k not in continuous
        if discrete and bool((factor != factor.round()).any()):
            raise ValueError(
                f"{name}: factor {k} came with numbers that are not whole, wanted its levels; cut a "
                "continuous factor into bins first"
            )
        if bool((factor == factor[0]).all()):
            raise ValueError(f"{name}: factor {k} has the same value in all rows; leave it out")
        if discrete:
            factors[:, k] = factor.unique(return_inverse=True)[1]
    return codes, factors


def _finite(name: str, what: str, values: Tensor) -> Tensor:
    values = values.cpu().double().clone()
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name}: {what} came with numbers that are not finite")
    return values


def _weights(name: str, codes: Tensor, resamples: int, seed: int) -> Tensor:
    """How often each row counts, ``[1 + R, N]``: once, and in resamples with replacement."""
    whole_numbers(name, at_least=2, resamples=resamples)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(codes), (resamples, len(codes)), generator=generator)
    counts = torch.zeros(resamples, len(codes), dtype=torch.float64)
    counts.scatter_add_(1, rows, torch.ones_like(counts))
    return torch.cat([torch.ones_like(counts[:1]), counts])


def _score(each: Tensor, matrix: Tensor) -> Score:
    """From ``[1 + R, n]`` and ``[1 + R, D, F]``, the rows themselves before their resamples."""
    value = each.mean(1)
    return Score(float(value[0]), float(value[1:].std()), each[0], matrix[0])


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean of ``[n]`` and its standard error."""
    return float(values.mean()), float(values.var(correction=0).sqrt() / len(values) ** 0.5)


def _gap(scores: Tensor) -> Tensor:
    """Best minus second best code, ``[R, D, F]`` to ``[R, F]``."""
    first, second = scores.topk(2, 1).values.unbind(1)
    return first - second


def _information(
    codes: Tensor, factors: Tensor, bins: int, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Mutual information ``[R, D, F]`` and the factors' entropy ``[R, F]``, for rows that count
    ``weights`` [R, N]."""
    low, high = codes.aminmax(dim=0)
    width = torch.where(high > low, high - low, 1.0)
    cells = ((codes - low) / width * bins).long().clamp(max=bins - 1)
    dims, count, levels = codes.shape[1], factors.shape[1], int(factors.max()) + 1
    table = torch.arange(dims)[:, None] * count + torch.arange(count)
    place = (table * bins + cells[:, :, None]) * levels + factors.long()[:, None, :]  # [N, D, F]
    shape = (dims, count, bins, levels)
    found = [_from_counts(_counts(place, shape, weight)) for weight in weights]
    information, entropy = zip(*found, strict=True)
    return torch.stack(information), torch.stack(entropy)


def _counts(place: Tensor, shape: tuple[int, ...], weight: Tensor) -> Tensor:
    weights = weight.double()[:, None, None].expand(place.shape)
    flat = place.flatten().bincount(weights.flatten(), minlength=math.prod(shape))
    return flat.view(shape)


def _from_counts(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Of counts ``[D, F, bins, levels]``: mutual information ``[D, F]`` and factor entropy ``[F]``."""
    p = counts / counts.sum((2, 3), keepdim=True)
    code, factor = p.sum(3, keepdim=True), p.sum(2, keepdim=True)
    information = (torch.xlogy(p, p) - torch.xlogy(p, code * factor)).sum((2, 3))
    information = torch.where(information > ROUNDING, information, 0.0)
    return information, -torch.xlogy(factor, factor).sum((2, 3))[0]


def _parts(name: str, codes: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit to and rows to judge by."""
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed))
    held = int(len(codes) * TEST)
    if not held:
        raise ValueError(f"{name}: came {len(codes)} rows, wanted 3 or more")
    return order[held:], order[:held]


def _unit(values: Tensor, train: Tensor) -> Tensor:
    """Columns with mean 0 and deviation 1 on the rows to fit to; constant ones become 0."""
    center, scale = values[train].mean(0), values[train].std(0)
    return (values - center) / torch.where(scale > 0, scale, 1.0)


def _separated(train: Tensor, levels: Tensor, test: Tensor, truth: Tensor, seed: int) -> Tensor:
    """Which of the rows ``[n, D]`` are put right from each code alone."""
    from sklearn.svm import LinearSVC  # here, since it takes a second to import

    def from_one(d: int) -> Tensor:
        machine = LinearSVC(C=0.01, class_weight="balanced", dual=False, random_state=seed)
        machine.fit(train[:, d : d + 1].numpy(), levels.numpy())
        return (torch.from_numpy(machine.predict(test[:, d : d + 1].numpy())) == truth).double()

    return torch.stack([from_one(d) for d in range(train.shape[1])], 1)


def _r_squared(codes: Tensor, factor: Tensor, weights: Tensor) -> Tensor:
    """Squared correlation of codes ``[n, D]`` and a factor ``[n]``, rows weighted: ``[R, D]``."""
    codes, factor = codes - codes.mean(0), (factor - factor.mean())[:, None]
    share = weights / weights.sum(1, keepdim=True)
    mean, mean_factor = share @ codes, share @ factor
    var = share @ codes.square() - mean.square()
    var_factor = share @ factor.square() - mean_factor.square()
    cov = share @ (codes * factor) - mean * mean_factor
    return torch.where(var > 0, cov.square() / (var * var_factor).where(var > 0, 1.0), 0.0)


def _forest(seed: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier  # here, since it takes a second to import

    return RandomForestClassifier(20, max_features=None, min_samples_leaf=10, random_state=seed)


def _concentration(shares: Tensor) -> Tensor:
    """1 - entropy of each row of ``[n, m]`` in units of log m; 0 for a row of zeros."""
    total = shares.sum(1, keepdim=True)
    p = shares / torch.where(total > 0, total, 1.0)
    score = 1 + torch.xlogy(p, p).sum(1) / math.log(shares.shape[1])
    return torch.where(total[:, 0] > 0, score, 0.0)


def _by_factor(values: Tensor, factor: Tensor, count: int) -> Tensor:
    """Means of ``[n, *rest]`` by factor, ``[*rest, F]``; NaN for one that was never chosen."""
    return torch.stack([values[factor == k].mean(0) for k in range(count)], -1)
