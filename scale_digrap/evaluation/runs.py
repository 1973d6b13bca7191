"""Methods, one file per (method, seed), and what is recorded of how it came about.

A file is written when its pair is done, so that a killed comparison goes on where it was; `results.Comparison` puts
them together. docs/results.md names every field.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.evaluation.records import Record, SuiteResult, read_predictions
from scale_digrap.runtime.logs import is_number, read_log
from scale_digrap.runtime.text import TextError, read_json, write_json
from scale_digrap.runtime.text import finite as finite_json
from scale_digrap.runtime.typed import fits, structured

SCHEMA = 2
"""Version of the files written here; another one is refused rather than misread."""


class ResultsError(ScaleDigrapError):
    """Result files that do not belong together or cannot be read."""


def check_schema(data: Any, path: Path | str) -> None:
    """Refuse what another version of the package has written.

    Raises:
        ResultsError: `data` is no object or has another schema.
    """
    schema = data.get("schema") if isinstance(data, Mapping) else None
    if schema != SCHEMA:
        advice = "use the version that wrote it, or repeat the evaluation in an empty folder"
        raise ResultsError(f"{path} has schema {schema!r}; this version reads schema {SCHEMA}: {advice}")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of a comparison."""

    key: str
    """Short and unique: file names and JSON keys."""
    label: str
    """As the reader sees it."""
    family: str
    """Methods of one family share a hue in the plots: "base", "full", "lora". A "base" method is a model as it was
    published, which no seed changes: it is compared with every seed of the others."""
    baseline: str | None = None
    """Key of the method that this one is compared with, question by question."""
    variant_of: str | None = None
    """Key of the method whose trained weights this one starts from (a WiSE-FT mixture): the plots draw it alike."""
    source: str = ""
    """Which evaluation it comes from, where several are compared."""

    @property
    def seedless(self) -> bool:
        return self.family == "base"


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
    provenance: dict[str, Any] = field(default_factory=dict)
    """What the model was and how it was asked. The report knows "checkpoint" (path or name), "step", "sha256",
    "alpha" (weight of the fine-tuned model in a mixture), "template" (`PromptTemplate.to_dict()`), "generation",
    "engine", "world_size"; more is kept and shown."""
    file: Path | None = field(default=None, compare=False)
    """Where it was saved or loaded; not part of the content."""

    def to_json(self, folder: Path | None = None) -> dict[str, Any]:
        """The file's content. Records that lie in a predictions file are named relative to `folder`, not repeated."""
        data: dict[str, Any] = {"schema": SCHEMA}
        data |= {name: value for name, value in vars(self).items() if name not in ("suites", "file")}
        data["suites"] = {name: _suite_to_json(result, folder) for name, result in self.suites.items()}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any], path: Path) -> MethodRun:
        """The content of the file `path`, with the predictions files that it names."""
        check_schema(data, path)
        if not isinstance(data.get("suites"), dict):
            raise TextError(f"suites is {data.get('suites')!r}, expected an object")
        fields = {name: value for name, value in data.items() if name not in ("schema", "file")}
        fields["suites"] = {}
        run = structured(cls, fields, "it")
        if not all(fits(entry, dict[str, Any]) and _is_telemetry(entry) for entry in run.telemetry):
            raise TextError("telemetry is not a list of objects with a step and layers")
        run.suites = {name: _suite_from_json(value, path.parent) for name, value in data["suites"].items()}
        run.file = path
        return run

    def save(self, folder: Path) -> Path:
        """Write `folder/METHOD-seedN.json` whole or not at all."""
        path = self.path(folder, self.method, self.seed)
        write_atomically(path, write_json(finite_json(self.to_json(folder))))
        self.file = path
        return path

    @staticmethod
    def path(folder: Path, method: str, seed: int) -> Path:
        return folder / f"{method}-seed{seed}.json"

    @classmethod
    def load(cls, path: Path) -> MethodRun:
        """Read a file of `save`.

        Raises:
            ResultsError: it is damaged, of another schema, or its predictions files are not those it was written with.
        """
        try:
            return cls.from_json(read_json(path), path)
        except ResultsError:
            raise
        except (ScaleDigrapError, OSError, ValueError, KeyError, TypeError) as error:
            raise ResultsError(f"{path} is not a result file: {error}; delete it to have it made again") from error


LAYER_FIGURES = ("omega", "conflict_rate", "drift", "relative_drift")


def read_layers(
    path: Path, until: int | None = None
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float | None]]]:
    """What a training run's `layers.jsonl` says for `MethodRun.telemetry` and `MethodRun.drift`.

    Args:
        path: the log; one that is not there gives nothing, as an optimizer without telemetry leaves none. Lines that
            are no records are told and left out.
        until: the last step to read, that of the checkpoint; the log may go on beyond it.

    Returns:
        ω and conflict rate per layer over the steps, and the drift per layer in the last of them.
    """
    entries = [
        {"step": record["step"], "layers": layers}
        for _, record in sorted({record["step"]: record for record in read_log(path, until)}.items())
        if (layers := _layer_figures(record.get("layers")))
    ]
    telemetry = [
        {
            "step": entry["step"],
            "layers": {
                name: {key: layer[key] for key in ("omega", "conflict_rate")} for name, layer in entry["layers"].items()
            },
        }
        for entry in entries
        # methods without ω log the rest
        if any(layer["omega"] is not None for layer in entry["layers"].values())
    ]
    last = entries[-1]["layers"] if entries else {}
    return telemetry, {name: {key: layer[key] for key in ("drift", "relative_drift")} for name, layer in last.items()}


def _layer_figures(layers: Any) -> dict[str, dict[str, float | None]]:
    """A line's figures by layer; what is no number there is none here."""
    if not isinstance(layers, dict):
        return {}
    return {
        name: {key: layer[key] if is_number(layer.get(key)) else None for key in LAYER_FIGURES}
        for name, layer in layers.items()
        if isinstance(layer, dict)
    }


def _suite_to_json(result: SuiteResult, folder: Path | None) -> dict[str, Any]:
    if result.predictions is None or folder is None:
        data = result.to_json()
    else:
        data = {name: value for name, value in vars(result).items() if name != "records"}
        data["predictions"] = os.path.relpath(result.predictions, folder)
    return {**data, "questions": result.n, "accuracy": result.accuracy}


def _is_telemetry(entry: dict[str, Any]) -> bool:
    return fits(entry.get("step"), int) and fits(entry.get("layers"), dict[str, dict[str, float | None]])


def _suite_from_json(data: Any, folder: Path) -> SuiteResult:
    if not isinstance(data, Mapping):
        raise TextError(f"a suite's result is {data!r}, expected an object")
    fields = {name: value for name, value in data.items() if name not in ("questions", "accuracy", "records")}
    result = structured(SuiteResult, fields, "a suite's result")
    if "records" in data:
        if not isinstance(data["records"], list):
            raise TextError(f"records is {data['records']!r}, expected a list")
        result.records = [structured(Record, record, "a record") for record in data["records"]]
    elif result.predictions is None:
        raise TextError(f"suite {result.suite!r} has neither records nor the name of a file with them")
    else:
        result.predictions = os.path.normpath(folder / result.predictions)
        result.records = read_predictions(result.predictions)
    if not (result.records and fits(data.get("questions"), int) and fits(data.get("accuracy"), float)):
        raise TextError(f"suite {result.suite!r} has no records, or says not how many and with which score")
    if result.n != data["questions"] or not math.isclose(result.accuracy, data["accuracy"], abs_tol=1e-9):
        raise ValueError(
            f"suite {result.suite!r} was {data['questions']} questions with a score of {data['accuracy']:.6f}, but "
            f"{result.predictions or 'its records'} holds {result.n} with {result.accuracy:.6f}"
        )
    return result


PACKAGES = ("scale-digrap", "torch", "deepspeed", "transformers", "peft", "webdataset", "numpy", "scipy", "pillow")


def environment() -> dict[str, Any]:
    """Where and with what the numbers were made."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
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
    # A lone surrogate, of a file's name for example, is written as an escape, which JSON has too.
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
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
