"""The outcome of several methods on several suites over several seeds, and what can honestly be said about it.

One file per (method, seed), written when that pair is done, so that a killed comparison goes on where it was;
`Comparison` puts them together.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.evaluation.runner import SuiteResult
from scale_digrap.evaluation.statistics import (
    Interval,
    bootstrap_means,
    over_seeds,
    paired_half_width,
    percentile_interval,
)
from scale_digrap.evaluation.suites import AVERAGES, Suite

SCHEMA = 1
"""Version of the files written here; another one is refused rather than misread."""


class ResultsError(ScaleDigrapError):
    """Result files that do not belong together or cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of a comparison."""

    key: str
    """Short and unique: file names and JSON keys."""
    label: str
    """As the reader sees it."""
    family: str
    """Methods of one family share a hue in the plots: "base", "full", "lora"."""
    baseline: str | None = None
    """Key of the method that this one is compared with, question by question."""
    variant_of: str | None = None
    """Key of the method whose trained weights this one starts from: the plots draw it alike."""


@dataclass(kw_only=True)
class MethodRun:
    """One method with one seed."""

    method: str
    seed: int
    suites: dict[str, SuiteResult]
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of "train" and "evaluate"."""
    training: dict[str, Any] = field(default_factory=dict)
    """Summary of the training run, free form."""
    drift: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """Layer → {"drift", "relative_drift"} at the end of training."""
    telemetry: list[dict[str, Any]] = field(default_factory=list)
    """DiGraP's layers over time: [{"step": int, "layers": {name: {"omega": …, "conflict_rate": …}}}]."""
    fingerprint: str = ""
    """Of the settings that the numbers depend on; runs with different ones are never mixed."""

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["schema"] = SCHEMA
        data["suites"] = {name: result.to_json() for name, result in self.suites.items()}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MethodRun:
        if data.get("schema") != SCHEMA:
            raise ResultsError(f"results of schema {data.get('schema')!r}; this version reads schema {SCHEMA}")
        fields = {name: value for name, value in data.items() if name != "schema"}
        fields["suites"] = {name: SuiteResult.from_json(value) for name, value in data["suites"].items()}
        return cls(**fields)

    def save(self, folder: Path) -> Path:
        """Write `folder/METHOD-seedN.json` whole or not at all."""
        path = self.path(folder, self.method, self.seed)
        write_atomically(path, json.dumps(self.to_json()))
        return path

    @staticmethod
    def path(folder: Path, method: str, seed: int) -> Path:
        return folder / f"{method}-seed{seed}.json"

    @classmethod
    def load(cls, path: Path) -> MethodRun:
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResultsError(f"{path} is not a result file: {error}; delete it to have it made again") from error


@dataclass(frozen=True)
class Column:
    """A column of the table: a suite, or an average over suites."""

    key: str
    heading: str
    suites: tuple[str, ...]
    is_average: bool


@dataclass(frozen=True)
class Cell:
    """A figure in the table, as fractions in [0, 1]."""

    mean: float
    std: float | None
    """Over seeds; None for one seed or a method that no seed changes."""
    interval: Interval
    """95 % bootstrap over questions of the score averaged over seeds."""
    best: bool
    """The highest of its column, or not distinguishable from it."""


def columns(suites: Sequence[Suite]) -> list[Column]:
    """Suites by group, then the averages that are not a single suite again."""
    ordered = [suite for group in ("id", "near", "far") for suite in suites if suite.group == group]
    result = [Column(suite.name, suite.heading, (suite.name,), False) for suite in ordered]
    headings = {"near": "Near OOD", "far": "Far OOD", "ood": "OOD", "all": "All"}
    for name, groups in AVERAGES.items():
        members = tuple(suite.name for suite in ordered if suite.group in groups)
        if len(members) > 1:
            result.append(Column(name, headings[name], members, True))
    return result


@dataclass
class Comparison:
    """Methods × suites × seeds."""

    methods: list[Method]
    suites: list[Suite]
    runs: list[MethodRun]
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    title: str = ""

    def __post_init__(self) -> None:
        self._bootstrap_cache: dict[tuple[str, str], np.ndarray] = {}
        known = {method.key for method in self.methods}
        for method in self.methods:
            if method.baseline is not None and method.baseline not in known:
                raise ResultsError(
                    f"method {method.key!r} is to be compared with {method.baseline!r}, which is not here"
                )
        seen: set[tuple[str, int]] = set()
        for run in self.runs:
            if run.method not in known:
                raise ResultsError(f"results of an unknown method {run.method!r}; methods: {', '.join(sorted(known))}")
            if (run.method, run.seed) in seen:
                raise ResultsError(f"two results of method {run.method!r} with seed {run.seed}")
            seen.add((run.method, run.seed))
        if len({run.fingerprint for run in self.runs}) > 1:
            raise ResultsError("the results come from different settings: start again in an empty folder")

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    @property
    def columns(self) -> list[Column]:
        return columns(self.suites)

    def run(self, method: str, seed: int) -> MethodRun | None:
        return next((run for run in self.runs if run.method == method and run.seed == seed), None)

    def runs_of(self, method: str) -> list[MethodRun]:
        return sorted((run for run in self.runs if run.method == method), key=lambda run: run.seed)

    def questions(self, suite: str) -> int | None:
        """Questions of a suite, None where no method answered it."""
        counts = {run.suites[suite].n for run in self.runs if suite in run.suites}
        if len(counts) > 1:
            raise ResultsError(
                f"suite {suite!r} has {sorted(counts)} questions in different results: not the same data"
            )
        return counts.pop() if counts else None

    def values(self, method: str, column: Column) -> list[float] | None:
        """The column's figure per seed, None where a suite is missing from a run or there is no run."""
        runs = self.runs_of(method)
        if not runs or any(name not in run.suites for run in runs for name in column.suites):
            return None
        return [sum(run.suites[name].accuracy for name in column.suites) / len(column.suites) for run in runs]

    def difference(self, method: str, other: str, column: Column) -> tuple[float, float] | None:
        """Mean of `method` − `other` on the same questions and seeds, and the half-width of its 95 % interval.

        A method with a single run that no seed changes (the zero-shot model) is compared with every seed of the other.
        """
        first, second = self.runs_of(method), self.runs_of(other)
        pairs = _pair(first, second)
        if not pairs or any(name not in run.suites for pair in pairs for run in pair for name in column.suites):
            return None
        differences = [[_score_difference(a, b, name) for name in column.suites] for a, b in pairs]
        mean = float(np.mean([np.mean([suite.mean() for suite in seed]) for seed in differences]))
        return mean, paired_half_width(differences)

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
        return Cell(summary.mean, summary.std, percentile_interval(means), method in self._best[column.key])

    def _bootstrap_means(self, method: str, suite: str) -> np.ndarray:
        """Over the questions of one suite, which all seeds answer: their scores are averaged over the seeds first."""
        if (method, suite) not in self._bootstrap_cache:
            scores = np.mean([run.suites[suite].scores for run in self.runs_of(method)], axis=0)
            seed = [entry.name for entry in self.suites].index(suite)
            self._bootstrap_cache[method, suite] = bootstrap_means(scores, seed=seed)
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
            if difference is not None and difference[0] <= difference[1]:
                result.append(key)
        return result

    def to_json(self) -> dict[str, Any]:
        """Everything but the single predictions, which are in the files of the runs."""
        return {
            "schema": SCHEMA,
            "title": self.title,
            "settings": self.settings,
            "environment": self.environment,
            "seeds": self.seeds,
            "methods": [asdict(method) for method in self.methods],
            "suites": [{**asdict(suite), "questions": self.questions(suite.name)} for suite in self.suites],
            "columns": [asdict(column) for column in self.columns],
            "table": {
                method: {column: cell and asdict(cell) for column, cell in row.items()}
                for method, row in self.table.items()
            },
            "differences": {
                method.key: {
                    "baseline": method.baseline,
                    **{
                        column.key: difference and {"mean": difference[0], "half_width": difference[1]}
                        for column in self.columns
                        for difference in [self.difference(method.key, method.baseline, column)]
                    },
                }
                for method in self.methods
                if method.baseline
            },
            "runs": [
                {
                    "method": run.method,
                    "seed": run.seed,
                    "seconds": run.seconds,
                    "training": run.training,
                    "accuracy": {name: result.accuracy for name, result in run.suites.items()},
                    "by_question_type": {name: result.by_question_type() for name, result in run.suites.items()},
                }
                for run in self.runs
            ],
        }


def _pair(first: Sequence[MethodRun], second: Sequence[MethodRun]) -> list[tuple[MethodRun, MethodRun]]:
    if len(first) == 1 and len(second) > 1:
        first = list(first) * len(second)
    elif len(second) == 1 and len(first) > 1:
        second = list(second) * len(first)
    else:
        seeds = {run.seed: run for run in second}
        return [(run, seeds[run.seed]) for run in first if run.seed in seeds]
    return list(zip(first, second, strict=True))


def _score_difference(a: MethodRun, b: MethodRun, suite: str) -> np.ndarray:
    first, second = a.suites[suite].records, b.suites[suite].records
    if [record.question_id for record in first] != [record.question_id for record in second]:
        raise ResultsError(f"suite {suite!r}: {a.method} and {b.method} answered different questions")
    return np.array([x.score - y.score for x, y in zip(first, second, strict=True)])


def environment() -> dict[str, Any]:
    """Where and with what the numbers were made."""
    versions: dict[str, str | None] = {}
    for package in ("scale-digrap", "torch", "transformers", "peft", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of this source tree, marked where files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + (" with uncommitted changes" if changes.stdout.strip() else "")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or the next run after a kill, sees it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def finite(values: Iterable[float | None]) -> list[float]:
    """The numbers among the values."""
    return [value for value in values if value is not None and math.isfinite(value)]
