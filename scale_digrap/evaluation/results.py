"""The outcome of several methods on several suites over several seeds, and what can honestly be said about it."""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.evaluation.columns import Column, columns
from scale_digrap.evaluation.runs import (
    SCHEMA,
    Method,
    MethodRun,
    ResultsError,
    check_schema,
    environment,
    finite,
    write_atomically,
)
from scale_digrap.evaluation.statistics import (
    Interval,
    Paired,
    SuiteDifference,
    Units,
    bootstrap_means,
    over_seeds,
    paired,
    percentile_interval,
    suite_difference,
    units,
)
from scale_digrap.evaluation.suites import Suite
from scale_digrap.runtime.secrets import mask
from scale_digrap.runtime.text import TextError, printable, read_json
from scale_digrap.runtime.typed import fits, structured

__all__ = [
    "SCHEMA",
    "Cell",
    "Column",
    "Comparison",
    "Method",
    "MethodRun",
    "ResultsError",
    "environment",
    "finite",
    "write_atomically",
]


def _label(text: str) -> str:
    """A heading on one line, cut where it would fill a page."""
    line = printable(" ".join(text.split(" "))).replace("\n", "\\n")
    return line if len(line) <= _LONGEST_LABEL else line[: _LONGEST_LABEL - 1] + "…"


_LONGEST_LABEL = 100


@dataclass(frozen=True)
class Cell:
    """A figure in the table, as fractions in [0, 1]."""

    mean: float
    std: float | None
    """Over seeds; None for one seed or a method that no seed changes."""
    interval: Interval
    """95 % bootstrap of the score averaged over seeds."""
    best: bool
    """The highest of its column, or not distinguishable from it."""
    unit: str
    """What the bootstrap draws: "question", "image" (with all its questions), or both for an average of such suites."""


@dataclass(frozen=True)
class _Scores:
    """One suite's scores of a method, in one order of questions."""

    questions: list[str]
    per_seed: dict[int, np.ndarray]
    clusters: np.ndarray | None
    """Codes of the images, None where they are not known or every question has its own."""
    metric: str

    @cached_property
    def units(self) -> Units:
        return units(np.mean(list(self.per_seed.values()), axis=0), self.clusters)


@dataclass
class Comparison:
    """Methods × suites × seeds."""

    methods: list[Method]
    suites: list[Suite]
    runs: list[MethodRun]
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    leakage: dict[str, Any] | None = None
    """What `leakage.check` found, as in its JSON file; None where it was not asked."""
    shift: dict[str, Any] | None = None
    """What `shift.shift_scores` measured, as in its JSON file; None where it was not asked."""
    pairs: list[tuple[str, str]] = field(default_factory=list)
    """Methods to compare besides those with their baselines."""
    folder: Path | None = None
    """Where it was loaded from."""

    def __post_init__(self) -> None:
        # People's own words: shown as text, in places that a control character or a lone surrogate would break.
        self.title = printable(self.title)
        self.methods = [dataclasses.replace(one, label=_label(one.label)) for one in self.methods]
        self.suites = [
            dataclasses.replace(one, title=_label(one.title), description=printable(one.description))
            for one in self.suites
        ]
        self._scores_cache: dict[tuple[str, str], _Scores | None] = {}
        self._bootstrap_cache: dict[tuple[str, str], np.ndarray] = {}
        self._difference_cache: dict[tuple[str, str, str], Paired | None] = {}
        self._suite_cache: dict[tuple[str, str, str], SuiteDifference | None] = {}
        known = {method.key: method for method in self.methods}
        if len(known) < len(self.methods):
            raise ResultsError(f"methods with the same key: {[method.key for method in self.methods]}")
        for method in self.methods:
            if method.baseline is not None and method.baseline not in known:
                raise ResultsError(
                    f"method {method.key!r} is to be compared with {method.baseline!r}, which is not here"
                )
        seen: set[tuple[str, int]] = set()
        fingerprints: dict[str, str] = {}
        for run in self.runs:
            if run.method not in known:
                raise ResultsError(f"results of an unknown method {run.method!r}; methods: {', '.join(sorted(known))}")
            if (run.method, run.seed) in seen:
                raise ResultsError(f"two results of method {run.method!r} with seed {run.seed}")
            seen.add((run.method, run.seed))
            if fingerprints.setdefault(known[run.method].source, run.fingerprint) != run.fingerprint:
                raise ResultsError("the results come from different settings: start again in an empty folder")
        for suite in self.suites:
            self.questions(suite.name)

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Read an evaluation's folder again, with every record.

        Raises:
            ResultsError: no `results.json`, one of another schema, or a file that it names is missing or damaged.
        """
        folder = Path(folder)
        path = folder / "results.json"
        if not path.is_file():
            raise ResultsError(f"{folder} holds no results.json: name the folder of a finished evaluation")
        try:
            data = read_json(path)
            check_schema(data, path)
            pairs = data["pairs"]
            if not fits(pairs, list[list[str]]) or any(len(pair) != 2 for pair in pairs):
                raise TextError(f"pairs is {pairs!r}, expected pairs of methods' keys")
            return cls(
                methods=[structured(Method, entry, "a method") for entry in data["methods"]],
                suites=[_suite(entry) for entry in data["suites"]],
                runs=[_run(folder, entry) for entry in data["runs"]],
                pairs=[(first, second) for first, second in pairs],
                folder=folder,
                **structured(_Kept, {name: data[name] for name in _KEPT}, "it").__dict__,
            )
        except ResultsError:
            raise
        except (ScaleDigrapError, KeyError, TypeError) as error:
            told = str(error) if isinstance(error, ScaleDigrapError) else f"{type(error).__name__} {error}"
            raise ResultsError(f"{path} is not a results file: {told}; repeat the evaluation's command") from None

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    @property
    def columns(self) -> list[Column]:
        return columns(self.suites)

    def method(self, key: str) -> Method:
        return next(method for method in self.methods if method.key == key)

    def zero_shot(self, method: Method) -> Method | None:
        """The published model that a method started from: the first one of the same evaluation."""
        return next((other for other in self.methods if other.seedless and other.source == method.source), None)

    def run(self, method: str, seed: int) -> MethodRun | None:
        return next((run for run in self.runs if run.method == method and run.seed == seed), None)

    def runs_of(self, method: str) -> list[MethodRun]:
        return sorted((run for run in self.runs if run.method == method), key=lambda run: run.seed)

    def alpha(self, method: Method) -> float | None:
        """Weight of the fine-tuned model in a mixture; 0 for the published model, 1 for a trained one."""
        if method.variant_of is None:
            return 0.0 if method.seedless else 1.0
        return next((run.provenance["alpha"] for run in self.runs_of(method.key) if "alpha" in run.provenance), None)

    def questions(self, suite: str) -> int | None:
        """Questions of a suite, None where no method answered it."""
        counts = {run.suites[suite].n for run in self.runs if suite in run.suites}
        if len(counts) > 1:
            raise ResultsError(
                f"suite {suite!r} has {sorted(counts)} questions in different results: not the same data, so the "
                "results cannot be compared"
            )
        return counts.pop() if counts else None

    def present(self, method: str, column: Column) -> int:
        """How many of the column's suites every run of the method has answered."""
        runs = self.runs_of(method)
        return sum(all(name in run.suites for run in runs) for name in column.suites) if runs else 0

    def values(self, method: str, column: Column) -> list[float] | None:
        """The column's figure per seed, None where a suite is missing from a run or there is no run."""
        if self.present(method, column) < len(column.suites):
            return None
        runs = self.runs_of(method)
        return [sum(run.suites[name].accuracy for name in column.suites) / len(column.suites) for run in runs]

    def scores(self, method: str, suite: str) -> _Scores | None:
        """A suite's scores of all seeds, in the question order of the first run that has it; None where it is missing.

        Raises:
            ResultsError: seeds of one method that answered different questions or were scored differently.
        """
        if (method, suite) not in self._scores_cache:
            self._scores_cache[method, suite] = self._collect(method, suite)
        return self._scores_cache[method, suite]

    def _collect(self, method: str, suite: str) -> _Scores | None:
        runs = self.runs_of(method)
        if not runs or any(suite not in run.suites for run in runs):
            return None
        first = runs[0].suites[suite]
        questions = [record.question_id for record in first.records]
        per_seed = {}
        for run in runs:
            result = run.suites[suite]
            scores = np.array(result.scores)
            ids = [record.question_id for record in result.records]
            if ids != questions:
                order = _order(ids, questions)
                if order is None:
                    raise ResultsError(
                        f"suite {suite!r}: the seeds {runs[0].seed} and {run.seed} of {method} answered different "
                        "questions"
                    )
                scores = scores[order]
            if result.metric != first.metric:
                raise ResultsError(
                    f"suite {suite!r}: {method} was scored by {first.metric} with seed {runs[0].seed} and by "
                    f"{result.metric} with seed {run.seed}"
                )
            per_seed[run.seed] = scores
        images = [record.image_id for record in first.records]
        clusters = None
        if None not in images:
            names, codes = np.unique(np.array(images, dtype=object).astype(str), return_inverse=True)
            clusters = codes if len(names) < len(images) else None
        return _Scores(questions, per_seed, clusters, first.metric)

    def difference(self, method: str, other: str, column: Column) -> Paired | None:
        """`method` − `other` on the same questions and seeds; None where a suite is missing from one of them, or they
        answered different questions, were scored differently, or have no seed in common.

        A method that no seed changes (the zero-shot model) is compared with every seed of the other.
        """
        key = (method, other, column.key)
        if key not in self._difference_cache:
            self._difference_cache[key] = self._paired(method, other, column)
        return self._difference_cache[key]

    def _paired(self, method: str, other: str, column: Column) -> Paired | None:
        suites = []
        for name in column.suites:
            key = (method, other, name)
            if key not in self._suite_cache:
                self._suite_cache[key] = self._suite_difference(*key)
            suites.append(self._suite_cache[key])
        there = [suite for suite in suites if suite is not None]
        return paired(there) if there and len(there) == len(suites) else None

    def _suite_difference(self, method: str, other: str, name: str) -> SuiteDifference | None:
        pairs = self._seed_pairs(method, other)
        a, b = self.scores(method, name), self.scores(other, name)
        if not pairs or a is None or b is None or a.metric != b.metric:
            return None
        order = slice(None) if a.questions == b.questions else _order(b.questions, a.questions)
        if order is None:
            return None
        differences = [a.per_seed[first] - b.per_seed[second][order] for first, second in pairs]
        return suite_difference(differences, a.clusters, seed=zlib.crc32(name.encode()))

    def _seed_pairs(self, method: str, other: str) -> list[tuple[int, int]]:
        first, second = ([run.seed for run in self.runs_of(key)] for key in (method, other))
        if self.method(method).seedless and first:
            return [(first[0], seed) for seed in second]
        if self.method(other).seedless and second:
            return [(seed, second[0]) for seed in first]
        return [(seed, seed) for seed in first if seed in second]

    @cached_property
    def table(self) -> dict[str, dict[str, Cell | None]]:
        """Method → column → figure, None where it is incomplete."""
        return {
            method.key: {column.key: self._cell(method.key, column) for column in self.columns}
            for method in self.methods
        }

    def _cell(self, method: str, column: Column) -> Cell | None:
        values = self.values(method, column)
        if values is None:
            return None
        summary = over_seeds(values)
        means = np.mean([self._bootstrap_means(method, name) for name in column.suites], axis=0)
        scored = [self.scores(method, name) for name in column.suites]
        unit = "/".join(sorted({"image" if one and one.clusters is not None else "question" for one in scored}))
        std = None if self.method(method).seedless else summary.std
        return Cell(
            summary.mean,
            std,
            percentile_interval(means),
            len(self.methods) > 1 and method in self._best[column.key],
            unit,
        )

    def _bootstrap_means(self, method: str, suite: str) -> np.ndarray:
        """Over the units of one suite, which all seeds answer: their scores are averaged over the seeds first."""
        if (method, suite) not in self._bootstrap_cache:
            scores = self.scores(method, suite)
            assert scores is not None
            self._bootstrap_cache[method, suite] = bootstrap_means(scores.units, seed=zlib.crc32(suite.encode()))
        return self._bootstrap_cache[method, suite]

    @cached_property
    def _best(self) -> dict[str, list[str]]:
        return {column.key: self.best(column) for column in self.columns}

    def best(self, column: Column) -> list[str]:
        """The method with the highest mean first, then those that it does not beat beyond the noise of the
        comparison."""
        means = {}
        for method in self.methods:
            values = self.values(method.key, column)
            if values is not None:
                means[method.key] = sum(values) / len(values)
        if not means:
            return []
        top = max(means, key=means.__getitem__)
        result = [top]
        for key in means:
            if key == top:
                continue
            difference = self.difference(top, key, column)
            if difference is not None and difference.sign == 0:
                result.append(key)
        return result

    def to_json(self, folder: Path | None = None) -> dict[str, Any]:
        """Everything but the single predictions, which are in the files of the runs.

        Args:
            folder: where the JSON will lie: files are named relative to it.
        """

        def name(path: Path | None) -> str | None:
            return None if path is None else os.path.relpath(path, folder) if folder else str(path)

        return {
            "schema": SCHEMA,
            "title": self.title,
            "settings": self.settings,
            "environment": self.environment,
            "seeds": self.seeds,
            "methods": [asdict(method) for method in self.methods],
            "pairs": self.pairs,
            "suites": [
                {**asdict(suite), "shards": list(map(mask, suite.shards)), "questions": self.questions(suite.name)}
                for suite in self.suites
            ],
            "columns": [asdict(column) for column in self.columns],
            "table": {
                method: {column: cell and asdict(cell) for column, cell in row.items()}
                for method, row in self.table.items()
            },
            "present": {
                method.key: {column.key: self.present(method.key, column) for column in self.columns}
                for method in self.methods
            },
            "differences": [
                {
                    "method": first,
                    "other": second,
                    "columns": {
                        column.key: paired and asdict(paired)
                        for column in self.columns
                        for paired in [self.difference(first, second, column)]
                    },
                }
                for first, second in self.compared
            ],
            "leakage": self.leakage,
            "shift": self.shift,
            "runs": [
                {
                    "method": run.method,
                    "seed": run.seed,
                    "file": name(run.file),
                    "provenance": run.provenance,
                    "seconds": run.seconds,
                    "training": run.training,
                    "metric": {suite: result.metric for suite, result in run.suites.items()},
                    "accuracy": {suite: result.accuracy for suite, result in run.suites.items()},
                    "excluded": {suite: result.excluded for suite, result in run.suites.items()},
                    "predictions": {
                        suite: result.predictions and name(Path(result.predictions))
                        for suite, result in run.suites.items()
                    },
                    "by_question_type": {suite: result.by_question_type() for suite, result in run.suites.items()},
                    "by_answer_type": {suite: result.by_answer_type() for suite, result in run.suites.items()},
                }
                for run in self.runs
            ],
        }

    @property
    def compared(self) -> list[tuple[str, str]]:
        """Every pair that is reported: methods with their baselines, mixtures with what they were mixed of, all with
        the zero-shot model of their evaluation, then `pairs`."""
        pairs = [(method.key, method.baseline) for method in self.methods if method.baseline is not None]
        known = {method.key for method in self.methods}
        pairs += [(method.key, method.variant_of) for method in self.methods if method.variant_of in known]
        for method in self.methods:
            base = self.zero_shot(method)
            if base is not None and not method.seedless:
                pairs.append((method.key, base.key))
        return list(dict.fromkeys([*pairs, *self.pairs]))


@dataclass
class _Kept:
    """What `results.json` keeps as it is."""

    title: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    leakage: dict[str, Any] | None
    shift: dict[str, Any] | None


_KEPT = tuple(entry.name for entry in dataclasses.fields(_Kept))


def _suite(data: Any) -> Suite:
    known = {entry.name for entry in dataclasses.fields(Suite)}
    if isinstance(data, Mapping):
        data = {name: value for name, value in data.items() if name in known}
    return structured(Suite, data, "a suite")


def _run(folder: Path, entry: Any) -> MethodRun:
    if not (isinstance(entry, Mapping) and fits([entry.get("file"), entry.get("method")], list[str])):
        raise TextError(f"a run names no file and method: {entry!r}")
    return dataclasses.replace(MethodRun.load(folder / entry["file"]), method=entry["method"])


def _order(ids: Sequence[str], wanted: Sequence[str]) -> np.ndarray | None:
    """Places in `ids` of the `wanted` ones; None where they are not the same set."""
    places = {name: place for place, name in enumerate(ids)}
    if len(places) != len(wanted) or any(name not in places for name in wanted):
        return None
    return np.array([places[name] for name in wanted])
