"""How sure a figure is: over the questions of a suite, over the seeds of a run, and between two methods.

Two sources of noise are kept apart. A suite is a sample of questions (bootstrap over them), and a training run is a
sample of seeds (sample standard deviation). Differences between methods are paired: the same questions, the same
seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


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


def bootstrap_means(scores: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Means of bootstrap samples of the questions, shape [resamples].

    Averages over suites have the mean of their suites' arrays as their own, if the suites were given different seeds.

    Args:
        scores: one score per question, shape [n].
        resamples: bootstrap samples.
        seed: of the resampling; the same scores and seed give the same means.

    Raises:
        ValueError: no scores.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no scores to take an interval of")
    if values.size == 1 or np.all(values == values[0]):  # scipy warns about a degenerate distribution
        return np.full(resamples, values[0])
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, 4_000_000 // values.size),  # at most 32 MB at a time
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return result.bootstrap_distribution


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


def paired_half_width(differences: Sequence[Sequence[np.ndarray]], *, confidence: float = 0.95) -> float:
    """Half-width of the interval around the mean difference between two methods.

    Args:
        differences: per seed, per suite, the score of the one minus the score of the other on the same questions,
            shape [n_suite]. The figure compared is the mean over seeds of the mean over suites of the mean over
            questions.
        confidence: nominal coverage.

    Returns:
        Half-width of the two-sided interval, in the unit of the scores. Noise over questions (averaged over seeds
        first, as all seeds answer the same questions) and noise over seeds add in quadrature.

    Raises:
        ValueError: seeds with different suites or question counts, or nothing to compare.
    """
    if not differences or not differences[0]:
        raise ValueError("nothing to compare")
    shapes = [[len(suite) for suite in seed] for seed in differences]
    if any(shape != shapes[0] for shape in shapes) or 0 in shapes[0]:
        raise ValueError(f"seeds differ in suites or questions: {shapes}")
    suites = len(differences[0])
    tail = (1 + confidence) / 2
    variance = 0.0
    for index in range(suites):
        per_question = np.mean([np.asarray(seed[index], dtype=np.float64) for seed in differences], axis=0)
        if per_question.size > 1:
            variance += float(per_question.var(ddof=1)) / per_question.size / suites**2
    half = float(stats.norm.ppf(tail)) * math.sqrt(variance)
    if len(differences) > 1:
        per_seed = np.array([np.mean([np.mean(suite) for suite in seed]) for seed in differences])
        error = float(per_seed.std(ddof=1)) / math.sqrt(per_seed.size)
        half = math.hypot(half, float(stats.t.ppf(tail, per_seed.size - 1)) * error)
    return half
