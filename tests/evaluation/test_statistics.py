from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from scale_digrap.evaluation.statistics import (
    auroc,
    bootstrap_means,
    correlate,
    over_seeds,
    paired,
    percentile_interval,
    suite_difference,
    units,
)

VQA = np.array([0.0, 0.3, 0.6, 0.9, 1.0])
"""What ten answers can give."""


def interval(scores, clusters=None, resamples=1000):
    return percentile_interval(bootstrap_means(units(scores, clusters), resamples=resamples))


def paired_bootstrap(differences, clusters=None, resamples=5000):
    """Differences per seed and suite."""
    suites = zip(*differences, clusters or [None] * len(differences[0]), strict=True)
    return paired([suite_difference(one[:-1], one[-1], resamples=resamples, seed=i) for i, one in enumerate(suites)])


def images(rng: np.random.Generator, count: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """0/1 scores of one to seven questions about each of `count` images, which differ in how hard they are; the mean
    over questions of such images is 0.6 + shift × 0.6."""
    sizes = rng.integers(1, 8, count)
    easy = np.repeat(rng.beta(0.6, 0.4, count), sizes)
    chance = easy + shift * easy
    return (rng.random(sizes.sum()) < chance).astype(float), np.repeat(np.arange(count), sizes)


def test_bootstrap_agrees_with_scipy():
    rng = np.random.default_rng(0)
    scores = rng.choice(VQA, 300)
    reference = stats.bootstrap((scores,), np.mean, n_resamples=20000, method="percentile", rng=rng)
    ours = bootstrap_means(units(scores), resamples=20000)
    assert interval(scores, resamples=20000).low == pytest.approx(reference.confidence_interval.low, abs=0.002)
    assert interval(scores, resamples=20000).high == pytest.approx(reference.confidence_interval.high, abs=0.002)
    assert ours.std() == pytest.approx(reference.standard_error, rel=0.02)
    assert stats.ks_2samp(ours, reference.bootstrap_distribution).pvalue > 0.001
    assert interval(scores) == interval(scores)


def test_cluster_bootstrap_draws_whole_images():
    """Against a bootstrap that draws images one by one and takes all their questions."""
    rng = np.random.default_rng(1)
    scores, clusters = images(rng, 60)
    members = [scores[clusters == image] for image in range(60)]
    naive = [np.concatenate([members[i] for i in rng.integers(0, 60, 60)]).mean() for _ in range(4000)]
    ours = bootstrap_means(units(scores, clusters), resamples=4000)
    assert stats.ks_2samp(ours, naive).pvalue > 0.001
    assert ours.std() > 1.2 * bootstrap_means(units(scores), resamples=4000).std()
    assert units(scores, np.arange(len(scores))[::-1]).number == len(scores)


def test_bootstrap_of_an_average_over_suites():
    """Independent suites: the variances add, over the square of their number."""
    suites = [[1.0] * 300 + [0.0] * 200, [1.0] * 250 + [0.0] * 250]
    means = np.mean([bootstrap_means(units(scores), seed=index) for index, scores in enumerate(suites)], axis=0)
    made = percentile_interval(means)
    half = 1.96 * math.sqrt((0.6 * 0.4 + 0.5 * 0.5) / 500) / 2
    assert made.high - made.low == pytest.approx(2 * half, rel=0.05)


def test_bootstrap_of_equal_scores_is_a_point():
    assert interval([1.0] * 7).low == 1.0
    with pytest.raises(ValueError, match="no scores"):
        units([])
    with pytest.raises(ValueError, match="3 scores in clusters of 2"):
        units([1.0, 0.0, 1.0], np.zeros(2))


def test_over_seeds_uses_the_sample_standard_deviation():
    summary = over_seeds([1.0, 2.0, 4.0])
    assert summary.mean == pytest.approx(7 / 3)
    assert summary.std == pytest.approx(math.sqrt(7 / 3))
    assert summary.seeds == 3
    assert over_seeds([0.5]).std is None
    with pytest.raises(ValueError, match="no seeds"):
        over_seeds([])


def test_coverage_of_the_plain_interval():
    """1000 suites of 250 questions: 95 ± 2 % of the intervals hold the true score."""
    rng = np.random.default_rng(2)
    shares = np.array([0.3, 0.1, 0.1, 0.1, 0.4])
    made = [interval(rng.choice(VQA, 250, p=shares)) for _ in range(1000)]
    assert 0.93 <= np.mean([one.low <= VQA @ shares <= one.high for one in made]) <= 0.97


def test_coverage_of_the_group_interval():
    """A small hard suite and a large easy one: the truth is the mean of the two, whatever their sizes."""
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(1000):
        suites = [(rng.random(n) < chance).astype(float) for n, chance in ((150, 0.3), (600, 0.8))]
        means = [bootstrap_means(units(scores), resamples=1000, seed=i) for i, scores in enumerate(suites)]
        made = percentile_interval(np.mean(means, axis=0))
        hits += made.low <= 0.55 <= made.high
    assert 0.93 <= hits / 1000 <= 0.97


def test_coverage_of_the_clustered_interval():
    """600 suites of 150 images: 95 ± 2 % with images as units; with questions as units far fewer."""
    rng = np.random.default_rng(4)
    hits = np.zeros(2)
    for _ in range(600):
        scores, clusters = images(rng, 150)
        for kind, made in enumerate((interval(scores, clusters), interval(scores))):
            hits[kind] += made.low <= 0.6 <= made.high
    assert 0.93 <= hits[0] / 600 <= 0.97
    assert hits[1] / 600 < 0.87


def paired_scores(rng: np.random.Generator, n: int, gap: float) -> np.ndarray:
    """Differences of two methods that mostly agree; their mean is `gap` × 0.8."""
    difficulty = rng.random(n)
    a, b = (difficulty < 0.65 + gap).astype(float), (difficulty < 0.65).astype(float)
    flip = rng.random((2, n)) < 0.1
    return np.where(flip[0], 1 - a, a) - np.where(flip[1], 1 - b, b)


def test_coverage_of_the_paired_interval_and_its_p_value():
    """Two suites. 95 ± 2 % hold the true difference; the p-value is below 0.05 exactly where zero is outside, and
    rejects a difference that is there more often than one that is not."""
    rng = np.random.default_rng(5)
    hits, rejected = 0, []
    for draw in range(1000):
        gap = 0.05 if draw % 2 else 0.0
        made = paired_bootstrap([[paired_scores(rng, 400, gap), paired_scores(rng, 150, gap)]], resamples=999)
        hits += made.interval.low <= 0.8 * gap <= made.interval.high
        assert (made.p < 0.05) == (not made.interval.low <= 0.0 <= made.interval.high) == (made.sign != 0)
        rejected.append(made.p < 0.05)
    assert 0.93 <= hits / 1000 <= 0.97
    assert 0.03 <= np.mean(rejected[::2]) <= 0.07
    assert np.mean(rejected[1::2]) > 0.3


def test_p_value_is_uniform_under_the_null():
    rng = np.random.default_rng(6)
    values = []
    for _ in range(600):
        differences = rng.choice(VQA, 600) - rng.choice(VQA, 600)
        values.append(paired_bootstrap([[differences]], resamples=999).p)
    assert stats.kstest(values, "uniform").pvalue > 0.01
    assert min(values) >= 1 / 1000


def test_p_value_agrees_with_the_paired_t_test():
    rng = np.random.default_rng(7)
    differences = rng.choice(VQA, 2000) - rng.choice(VQA, 2000) + 0.015
    made = paired_bootstrap([[differences]], resamples=50000)
    assert made.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.01)
    assert made.half_width == pytest.approx(1.96 * differences.std(ddof=1) / math.sqrt(2000), rel=0.02)


def test_coverage_of_the_paired_clustered_interval():
    rng = np.random.default_rng(8)
    hits = np.zeros(2)
    for _ in range(600):
        sizes = rng.integers(1, 8, 120)
        clusters = np.repeat(np.arange(120), sizes)
        shared = np.repeat(rng.choice([-0.5, 0.0, 0.7], 120), sizes)
        differences = shared + rng.choice([-0.2, 0.0, 0.3], sizes.sum())
        for kind, codes in enumerate((clusters, None)):
            made = paired_bootstrap([[differences]], [codes], resamples=499)
            hits[kind] += made.interval.low <= 0.1 <= made.interval.high  # 0.2 / 3 + 0.1 / 3
    assert 0.93 <= hits[0] / 600 <= 0.97
    assert hits[1] / 600 < 0.87


def test_coverage_over_seeds():
    """Noise over questions and over three seeds: at least nominal, and one seed alone is far too sure of itself."""
    rng = np.random.default_rng(9)
    hits = np.zeros(2)
    for _ in range(600):
        per_question = rng.choice([-1.0, 0.0, 1.0], 400, p=[0.15, 0.6, 0.25])
        seeds = [[per_question + rng.normal(0, 0.05)] for _ in range(3)]
        for kind, some in enumerate((seeds, seeds[:1])):
            made = paired_bootstrap([[one[0].round(6)] for one in some], resamples=499)
            hits[kind] += made.interval.low <= 0.1 <= made.interval.high
    assert 0.94 <= hits[0] / 600 <= 0.99
    assert hits[1] / 600 < 0.87


def test_paired_grows_with_disagreement_between_seeds():
    calm = [[np.full(100, 0.1)], [np.full(100, 0.1)]]
    wild = [[np.full(100, 0.0)], [np.full(100, 0.2)]]
    assert paired_bootstrap(calm).half_width == pytest.approx(0.0, abs=1e-12)
    assert paired_bootstrap(calm).p < 0.001
    # t quantile for one degree of freedom
    assert paired_bootstrap(wild, resamples=200_000).half_width == pytest.approx(12.706 * 0.1, rel=0.05)
    assert paired_bootstrap([[np.zeros(10)]]).p == 1.0


def test_paired_refuses_what_is_not_paired():
    with pytest.raises(ValueError, match=r"seeds differ in questions: \[3, 4\]"):
        suite_difference([np.zeros(3), np.zeros(4)])
    for nothing in ([], [np.zeros(0)]):
        with pytest.raises(ValueError, match="nothing to compare"):
            suite_difference(nothing)
    with pytest.raises(ValueError, match="nothing to compare"):
        paired([])
    with pytest.raises(ValueError, match=r"suites differ in seeds: \[1, 2\]"):
        paired([suite_difference([np.zeros(3)]), suite_difference([np.zeros(3)] * 2)])


def test_correlations():
    rng = np.random.default_rng(10)
    x = rng.normal(size=40)
    y = -x + rng.normal(size=40)
    made = correlate(x, y)
    assert made.n == 40
    assert made.pearson == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks = np.argsort(np.argsort(x)), np.argsort(np.argsort(y))
    assert made.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert made.pearson_p < 0.001
    assert correlate([1, 2], [1, 2]) is None
    assert correlate([1, 1, 1], [1, 2, 3]) is None
    wrong = y < 0
    above = [(a > b) + 0.5 * (a == b) for a in x[wrong] for b in x[~wrong]]
    assert auroc(x, wrong) == pytest.approx(np.mean(above))
    assert auroc(x, np.ones(40, bool)) is None
