"""Does a model fail where a suite, or a question, is far from the training set? Correlations of shift scores with
accuracy. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from scale_digrap.evaluation.results import Comparison
from scale_digrap.evaluation.runs import ResultsError
from scale_digrap.evaluation.statistics import auroc, correlate

SPACES = ("image", "question", "joint")
"""The embeddings that distances are measured in, see `shift`."""


def suite_points(comparison: Comparison, method: str, space: str) -> list[tuple[str, float, float]]:
    """(suite, mean distance, accuracy averaged over seeds) of the suites that have both."""
    points = []
    for name, suite in (comparison.shift or {}).get("suites", {}).items():
        scores = comparison.scores(method, name)
        if scores is not None and suite[space] is not None:
            points.append((name, suite[space]["mean"], scores.units.mean))
    return points


def correlations(comparison: Comparison, folder: Path) -> dict[str, dict[str, Any]]:
    """Across suites and within them.

    Args:
        comparison: with a shift report.
        folder: where the files lie that the shift report names.

    Returns:
        Method → space → {"suites": correlation over suites of mean distance and accuracy, or None; "samples": suite →
        {"n", "correlation" of distance and score, "auroc": of the distance as a detector of wrong answers (score below
        one half)}}. Empty without a shift report.

    Raises:
        ResultsError: a file that the shift report names cannot be read.
    """
    if comparison.shift is None:
        return {}
    distances = {name: _distances(folder / suite["file"]) for name, suite in comparison.shift["suites"].items()}
    result: dict[str, dict[str, Any]] = {}
    for method in comparison.methods:
        for space in SPACES:
            points = suite_points(comparison, method.key, space)
            across = correlate([x for _, x, _ in points], [y for _, _, y in points])
            samples = {}
            for name, per_question in distances.items():
                within = _within(comparison, method.key, name, per_question, space)
                if within is not None:
                    samples[name] = within
            result.setdefault(method.key, {})[space] = {"suites": across and asdict(across), "samples": samples}
    return result


def _within(
    comparison: Comparison, method: str, suite: str, distances: dict[str, dict[str, float | None]], space: str
) -> dict[str, Any] | None:
    scores = comparison.scores(method, suite)
    if scores is None:
        return None
    averaged = np.mean(list(scores.per_seed.values()), axis=0)
    pairs = [
        (distance, score)
        for question, score in zip(scores.questions, averaged, strict=True)
        for distance in [distances.get(question, {}).get(space)]
        if distance is not None
    ]
    if not pairs:
        return None
    x, y = np.array(pairs).T
    correlation = correlate(x, y)
    return {"n": len(pairs), "correlation": correlation and asdict(correlation), "auroc": auroc(x, y < 0.5)}


def _distances(path: Path) -> dict[str, dict[str, float | None]]:
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return {row["question_id"]: {space: row[space] for space in SPACES} for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} does not hold the shift scores that the report names: {error!r}") from error
