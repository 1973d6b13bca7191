"""How sure a figure is: over the questions of a suite, over the seeds of a run, and between two methods.

Two sources of noise are kept apart. A suite is a sample of questions (bootstrap over them, or over their images where
several questions share one), and a training run is a sample of seeds (sample standard deviation). Differences between
methods are paired: the same questions, the same seeds. docs/statistics.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 5000
"""Bootstrap samples; the smallest p-value is 1 / (RESAMPLES + 1)."""

_CHUNK = 4_000_000
"""Most multinomial counts at a time: 32 MB."""


@dataclass(frozen=True)
class Interval:
    """A two-sided interval."""

    low: float
    high: float


@dataclass(frozen=True)
class SeedSummary:
    """A figure over seeds."""

    mean: float
    std: float | None
    """Sample standard deviation (n − 1); None for a single seed."""
    seeds: int


@dataclass(frozen=True)
class Paired:
    """The difference between two methods on the same questions, from `paired`."""

    mean: float
    interval: Interval
    """95 %, symmetric about the mean; it holds zero exactly where p ≥ 0.05."""
    p: float
    """Two-sided, of no difference; not corrected for other comparisons."""
    seeds: int

    @property
    def half_width(self) -> float:
        return (self.interval.high - self.interval.low) / 2

    @property
    def sign(self) -> int:
        """1 better, −1 worse, 0 where the data do not tell."""
        return 0 if self.p >= 0.05 else (1 if self.mean > 0 else -1)


@dataclass(frozen=True)
class Units:
    """What the bootstrap draws from one suite: questions, or images with all their questions. Equal units are one entry
    with a count, because a bootstrap sample of n units is a multinomial draw of how often each kind occurs."""

    sums: np.ndarray
    """Sum of the unit's scores, float64 [kinds]."""
    sizes: np.ndarray
    """Questions of the unit, float64 [kinds]."""
    counts: np.ndarray
    """Units of this kind, int64 [kinds]."""

    @property
    def number(self) -> int:
        """Units in all."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Mean score over questions."""
        return float((self.sums @ self.counts) / (self.sizes @ self.counts))


def units(scores: Sequence[float] | np.ndarray, clusters: np.ndarray | None = None) -> Units:
    """Group one suite's scores into resampling units.

    Args:
        scores: one per question, [n].
        clusters: which image each question is about, integer codes [n]; None makes every question a unit.

    Raises:
        ValueError: no scores, or clusters of another length.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no scores to take an interval of")
    sums: np.ndarray = values
    sizes: np.ndarray = np.ones_like(values)
    if clusters is not None:
        if len(clusters) != values.size:
            raise ValueError(f"{values.size} scores in clusters of {len(clusters)}")
        _, codes = np.unique(clusters, return_inverse=True)
        sums, sizes = np.bincount(codes, values), np.bincount(codes, np.ones_like(values))
    # rounded: sums of the same scores in another order must be one kind
    kinds, counts = np.unique(np.stack([sizes, sums.round(10)], axis=1), axis=0, return_counts=True)
    return Units(kinds[:, 1], kinds[:, 0], counts)


def bootstrap_means(suite: Units, *, resamples: int = RESAMPLES, seed: int | Sequence[int] = 0) -> np.ndarray:
    """Means of bootstrap samples of a suite's units, float64 [resamples].

    Whole units are drawn with replacement, and the mean is over the questions drawn (a ratio where images have
    different numbers of questions). An average over suites has the mean of its suites' arrays as its own, if the suites
    were given different seeds.

    Args:
        suite: from `units`.
        resamples: bootstrap samples.
        seed: of the resampling; the same units and seed give the same means.
    """
    if len(suite.counts) == 1:
        return np.full(resamples, suite.mean)
    rng = np.random.default_rng(seed)
    n, shares = suite.number, suite.counts / suite.counts.sum()
    step = max(1, _CHUNK // len(shares))
    means = []
    for start in range(0, resamples, step):
        drawn = rng.multinomial(n, shares, size=min(step, resamples - start))
        means.append((drawn @ suite.sums) / (drawn @ suite.sizes))
    return np.concatenate(means)


def percentile_interval(means: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Percentile bootstrap interval out of `bootstrap_means`."""
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def over_seeds(values: Sequence[float]) -> SeedSummary:
    """Mean and sample standard deviation of one figure over seeds.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no seeds to average over")
    array = np.asarray(values, dtype=np.float64)
    return SeedSummary(float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else None, array.size)


@dataclass(frozen=True)
class SuiteDifference:
    """One suite's part in the difference between two methods."""

    per_seed: np.ndarray
    """Mean difference over the questions, float64 [seeds]."""
    deviations: np.ndarray
    """Of bootstrap means of the differences averaged over seeds from their mean, float64 [resamples]."""


def suite_difference(
    differences: Sequence[np.ndarray],
    clusters: np.ndarray | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int | Sequence[int] = 0,
) -> SuiteDifference:
    """Bootstrap one suite's differences.

    Args:
        differences: per seed, the score of the one method minus the score of the other on the same questions, [n].
        clusters: as in `units`.
        resamples: bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: seeds with different question counts, or nothing to compare.
    """
    lengths = {len(one) for one in differences}
    if not lengths or lengths == {0}:
        raise ValueError("nothing to compare")
    if len(lengths) > 1:
        raise ValueError(f"seeds differ in questions: {sorted(lengths)}")
    stacked = np.asarray(differences, dtype=np.float64)
    # all seeds answer the same questions: they are one sample of questions, not several
    kinds = units(stacked.mean(axis=0), clusters)
    drawn = bootstrap_means(kinds, resamples=resamples, seed=seed)
    # the variance of a bootstrap mean is (n − 1) / n of the unbiased one
    unbiased = math.sqrt(kinds.number / max(1, kinds.number - 1))
    return SuiteDifference(stacked.mean(axis=1), (drawn - kinds.mean) * unbiased)


def paired(suites: Sequence[SuiteDifference], *, confidence: float = 0.95, seed: int = 0) -> Paired:
    """Interval and p-value of the mean over seeds of the mean over suites of the mean difference over questions.

    Its deviations under the null are those of the suites' bootstrap samples and, with several seeds, Student's t with
    seeds − 1 degrees of freedom times the standard error over seeds. The interval is symmetric (Hall 1988): the mean ±
    the quantile of the absolute deviations; p is the share of deviations at least as large as the observed mean.

    Args:
        suites: with the same seeds and resamples.
        confidence: nominal coverage.
        seed: of Student's t.

    Raises:
        ValueError: no suites, or suites with different numbers of seeds.
    """
    counts = {len(suite.per_seed) for suite in suites}
    if len(counts) != 1:
        raise ValueError(f"suites differ in seeds: {sorted(counts)}" if counts else "nothing to compare")
    seeds = counts.pop()
    deviations = np.mean([suite.deviations for suite in suites], axis=0)
    per_seed = np.mean([suite.per_seed for suite in suites], axis=0)
    resamples = len(deviations)
    if seeds > 1:
        error = float(per_seed.std(ddof=1)) / math.sqrt(seeds)
        deviations = deviations + error * np.random.default_rng(seed).standard_t(seeds - 1, resamples)
    mean = float(per_seed.mean())
    absolute = np.abs(deviations)
    p = float((1 + np.count_nonzero(absolute >= abs(mean) - 1e-12)) / (resamples + 1))
    # the order statistic that makes interval and p-value agree: zero is outside exactly where p < 1 − confidence, that
    # is, where fewer than (1 − confidence) (resamples + 1) − 1 deviations are as large as the mean
    larger = math.ceil(round((1 - confidence) * (resamples + 1) - 1, 6)) - 1
    half = float(np.sort(absolute)[resamples - 1 - max(0, larger)])
    return Paired(mean, Interval(mean - half, mean + half), p, seeds)


@dataclass(frozen=True)
class Correlation:
    """Of two figures over `n` points."""

    n: int
    pearson: float
    pearson_p: float
    spearman: float
    spearman_p: float


def correlate(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> Correlation | None:
    """Pearson's and Spearman's correlation with two-sided p-values; None for fewer than three points or where one of
    the figures is the same everywhere. With right/wrong as one of them, Pearson's is the point-biserial one."""
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    pearson, spearman = stats.pearsonr(first, second), stats.spearmanr(first, second)
    return Correlation(
        len(first), *(float(value) for test in (pearson, spearman) for value in (test.statistic, test.pvalue))
    )


def auroc(values: Sequence[float] | np.ndarray, positive: Sequence[bool] | np.ndarray) -> float | None:
    """Probability that a positive's value is above a negative's, ties counting half (the Mann–Whitney statistic over
    the number of pairs); None where one of the two kinds is absent."""
    figures, chosen = np.asarray(values, dtype=np.float64), np.asarray(positive, dtype=bool)
    pairs = int(chosen.sum()) * int((~chosen).sum())
    if pairs == 0:
        return None
    return float(stats.mannwhitneyu(figures[chosen], figures[~chosen]).statistic) / pairs
