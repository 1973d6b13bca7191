"""Predictions in files that a kill leaves readable.

While a suite is being answered every rank appends to a file of its own in ``SUITE.parts/``; what is done is the set of
the data set's indices in them. When all are there rank 0 merges them into ``SUITE.jsonl``, in order of the index, whose
bytes do not depend on how many ranks answered or how often they were killed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.evaluation.records import Record

_PART = re.compile(r"attempt-(\d+)-rank-(\d+)\.jsonl")


class PredictionsError(ScaleDigrapError):
    """Files of predictions that cannot be used, or are not of this evaluation."""


class PredictionFiles:
    """The files of one model's predictions on one suite.

    Args:
        folder: of the model, ``predictions/MODEL``.
        suite: name of the suite.

    Attributes:
        merged: ``SUITE.jsonl``, there when every question is answered.
        parts: ``SUITE.parts``, there before that.
        settings: ``SUITE.settings.json``, what the predictions depend on.
    """

    def __init__(self, folder: Path, suite: str) -> None:
        self.folder, self.suite = folder, suite
        self.merged = folder / f"{suite}.jsonl"
        self.parts = folder / f"{suite}.parts"
        self.settings = folder / f"{suite}.settings.json"

    @property
    def complete(self) -> bool:
        return self.merged.is_file()

    def check(self, settings: Mapping[str, Any]) -> bool:
        """Whether predictions are here, made with these settings.

        Args:
            settings: whatever the predictions depend on: plain values, nested.

        Raises:
            PredictionsError: they were made with others; the first differences are named.
        """
        if not self.merged.is_file() and not self._files():
            return False
        try:
            before = json.loads(self.settings.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PredictionsError(
                f"{self.settings} cannot be read ({error}), so nobody knows what the predictions beside it were made "
                f"with: delete {self.folder} to have them made again"
            ) from None
        then, now = _flatten(before), _flatten(json.loads(json.dumps(settings)))
        changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
        if changed:
            told = ", ".join(f"{key}: {_show(then.get(key))} → {_show(now.get(key))}" for key in changed[:4])
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            raise PredictionsError(
                f"{self.folder} holds predictions on {self.suite!r} that were made with other settings ({told}{more}): "
                "name another folder (out), or delete this one"
            )
        return True

    def begin(self, settings: Mapping[str, Any]) -> int:
        """Make ready for a new attempt, on one rank; returns its number."""
        self.parts.mkdir(parents=True, exist_ok=True)
        write_whole(self.settings, [json.dumps(settings, indent=1, sort_keys=True).encode() + b"\n"])
        return 1 + max((int(_PART.fullmatch(path.name)[1]) for path in self._files()), default=0)  # type: ignore[index]

    def done(self) -> tuple[np.ndarray, int]:
        """Indices that are answered, int64 [n], increasing, and the number of lines that a kill has left torn."""
        found: set[int] = set()
        torn = 0
        for _, index in self._lines():
            if index is None:
                torn += 1
            else:
                found.add(index)
        return np.array(sorted(found), dtype=np.int64), torn

    def writer(self, attempt: int, rank: int) -> PartWriter:
        """Where a rank puts what it answers in an attempt."""
        return PartWriter(self.parts / f"attempt-{attempt:04d}-rank-{rank:05d}.jsonl")

    def merge(self, total: int) -> None:
        """Write ``SUITE.jsonl``, whole or not at all, and take the parts away.

        Raises:
            PredictionsError: an answer is missing, or there are two different ones to a question.
        """
        lines: dict[int, bytes] = {}
        for line, index in self._lines():
            if index is not None and lines.setdefault(index, line) != line:
                raise PredictionsError(
                    f"{self.parts} holds two different answers to question {index}: two evaluations have written there "
                    "at the same time; delete it to have the suite answered again"
                )
        missing = total - len(lines)
        if missing or (lines and max(lines) >= total):
            raise PredictionsError(
                f"{self.parts} holds {len(lines)} of {total} answers: the ranks do not see the same folder (out must "
                "be on storage that all hosts share)"
            )
        write_whole(self.merged, (lines[index] + b"\n" for index in sorted(lines)))
        shutil.rmtree(self.parts)

    def remove(self) -> None:
        """Forget everything that is here of the suite."""
        shutil.rmtree(self.parts, ignore_errors=True)
        for path in (self.merged, self.settings):
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.parts.glob("attempt-*-rank-*.jsonl")) if self.parts.is_dir() else []

    def _lines(self) -> Iterator[tuple[bytes, int | None]]:
        """Lines of all parts with their indices; None for one that is not whole."""
        for path in self._files():
            for line in path.read_bytes().split(b"\n"):
                if not line:
                    continue
                try:
                    index = json.loads(line)["index"]
                    yield line, index if isinstance(index, int) and line.endswith(b"}") else None
                except (ValueError, TypeError, KeyError):
                    yield line, None


class PartWriter:
    """Appends records to one rank's file; every call reaches the operating system before it returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def write(self, records: Sequence[tuple[int, Record]]) -> None:
        """Append (index, record) pairs.

        Raises:
            PredictionsError: the disk is full or the folder cannot be written.
        """
        if not records:
            return
        data = b"".join(_line(index, record) for index, record in records)
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise PredictionsError(f"cannot write {self.path}: {error.strerror}") from None

    def close(self) -> None:
        """Make what was written durable."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None


def write_whole(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file so that a reader sees it whole or not at all, durably.

    Raises:
        PredictionsError: it cannot be written.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        with open(partial, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise PredictionsError(f"cannot write {path}: {error.strerror}") from None


def _line(index: int, record: Record) -> bytes:
    """A line of the files; the order of the keys is part of the format."""
    values = {
        "index": index,
        "question_id": record.question_id,
        "prediction": record.prediction,
        "answers": record.answers,
        "score": record.score,
        "question_type": record.question_type,
        "answer_type": record.answer_type,
        "image_id": record.image_id,
    }
    return json.dumps(values).encode() + b"\n"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
