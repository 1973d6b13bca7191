from __future__ import annotations

import math

import numpy as np
import pytest

from scale_digrap.evaluation.statistics import bootstrap_means, over_seeds, paired_half_width, percentile_interval


def test_bootstrap_agrees_with_the_normal_interval():
    scores = [1.0] * 300 + [0.0] * 200
    interval = percentile_interval(bootstrap_means(scores))
    half = 1.96 * math.sqrt(0.6 * 0.4 / 500)
    assert interval.low == pytest.approx(0.6 - half, abs=0.006)
    assert interval.high == pytest.approx(0.6 + half, abs=0.006)
    assert percentile_interval(bootstrap_means(scores)) == interval


def test_bootstrap_of_an_average_over_suites():
    """Independent suites: the variances add, over the square of their number."""
    suites = [[1.0] * 300 + [0.0] * 200, [1.0] * 250 + [0.0] * 250]
    means = np.mean([bootstrap_means(scores, seed=index) for index, scores in enumerate(suites)], axis=0)
    interval = percentile_interval(means)
    half = 1.96 * math.sqrt((0.6 * 0.4 + 0.5 * 0.5) / 500) / 2
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.07)


def test_bootstrap_of_equal_scores_is_a_point():
    assert percentile_interval(bootstrap_means([1.0] * 7)).low == 1.0
    with pytest.raises(ValueError, match="no scores"):
        bootstrap_means([])


def test_over_seeds_uses_the_sample_standard_deviation():
    summary = over_seeds([1.0, 2.0, 4.0])
    assert summary.mean == pytest.approx(7 / 3)
    assert summary.std == pytest.approx(math.sqrt(7 / 3))
    assert summary.seeds == 3
    assert over_seeds([0.5]).std is None
    with pytest.raises(ValueError, match="no seeds"):
        over_seeds([])


def test_paired_half_width_covers_the_true_difference():
    """Simulated: two methods whose true accuracies differ by 0.05, one seed; 95 % of the intervals hold 0.05."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(600):
        difficulty = rng.random(400)
        a, b = (difficulty < 0.70).astype(float), (difficulty < 0.65).astype(float)
        flip = rng.random((2, 400)) < 0.1
        a, b = np.where(flip[0], 1 - a, a), np.where(flip[1], 1 - b, b)
        difference = a - b
        hits += abs(difference.mean() - 0.05 * 0.8) <= paired_half_width([[difference]])
    assert 0.93 <= hits / 600 <= 0.97


def test_paired_half_width_grows_with_disagreement_between_seeds():
    calm = [[np.full(100, 0.1)], [np.full(100, 0.1)]]
    wild = [[np.full(100, 0.0)], [np.full(100, 0.2)]]
    assert paired_half_width(calm) == pytest.approx(0.0, abs=1e-12)
    assert paired_half_width(wild) == pytest.approx(12.706 * 0.1, rel=1e-3)  # t quantile for one degree of freedom


def test_paired_half_width_refuses_what_is_not_paired():
    with pytest.raises(ValueError, match="differ in suites or questions"):
        paired_half_width([[np.zeros(3)], [np.zeros(4)]])
    with pytest.raises(ValueError, match="nothing to compare"):
        paired_half_width([])
