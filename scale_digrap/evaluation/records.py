"""What a model answered: one record per question, one result per suite. Imports no torch, so that reading results is
quick."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """One question's outcome."""

    question_id: str
    prediction: str
    answers: list[str]
    score: float
    """In [0, 1], as the suite's metric says."""
    question_type: str | None = None
    answer_type: str | None = None
    """ "yes/no", "number" or "other" in the VQA family."""
    image_id: str | None = None
    """Questions about one image are not independent: intervals resample images where every record names its own."""


@dataclass
class SuiteResult:
    """One suite's outcome, the same on every rank."""

    suite: str
    metric: str
    """The scorer and its variant, see `scorers.scorer`."""
    records: list[Record] = field(default_factory=list)
    """In one order for every method."""
    seconds: float = 0.0
    """Wall time of generation and scoring on this rank."""
    excluded: dict[str, int] = field(default_factory=dict)
    """Reason → questions that were left out of the score."""
    predictions: str | None = None
    """File with the records, a JSON object per line; a result file then names it in place of holding them."""

    @property
    def n(self) -> int:
        return len(self.records)

    @property
    def accuracy(self) -> float:
        """Mean score in [0, 1]."""
        return sum(record.score for record in self.records) / len(self.records)

    @property
    def scores(self) -> list[float]:
        return [record.score for record in self.records]

    def by_question_type(self) -> dict[str, tuple[float, int]]:
        """Question type → (mean score, questions); empty where the shards name no types."""
        return _by_type((record.question_type, record.score) for record in self.records)

    def by_answer_type(self) -> dict[str, tuple[float, int]]:
        """Answer type → (mean score, questions); empty where the shards name no types."""
        return _by_type((record.answer_type, record.score) for record in self.records)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SuiteResult:
        return cls(**{**data, "records": [Record(**record) for record in data["records"]]})


_FIELDS = tuple(entry.name for entry in fields(Record))
_REPEATED = ("question_id", "prediction", "question_type", "answer_type", "image_id")


def read_predictions(path: str | Path) -> list[Record]:
    """The records of a predictions file, in its order. Keys that are no fields of `Record` (``index``) are left out.

    Raises:
        ValueError: a line that is no record, with its number.
        OSError: no such file.
    """
    records = []
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                data = json.loads(line, parse_constant=_refuse)
                values = {name: data[name] for name in _FIELDS if name in data}
                _check(values)
                for name in _REPEATED:  # ten methods answer the same questions: their ids are kept once
                    if isinstance(values.get(name), str):
                        values[name] = sys.intern(values[name])
                values["answers"] = [sys.intern(answer) for answer in values["answers"]]
                records.append(Record(**values))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is not a record: {error!r}") from error
    return records


def _check(values: dict[str, Any]) -> None:
    """Types of a record's fields, by hand: there may be millions of them."""
    if not (
        isinstance(values["question_id"], str)
        and isinstance(values["prediction"], str)
        and isinstance(values["answers"], list)
        and all(isinstance(answer, str) for answer in values["answers"])
        and type(values["score"]) in (int, float)
        and 0 <= values["score"] <= 1
        and all(values.get(name) is None or isinstance(values[name], str) for name in _REPEATED[2:])
    ):
        raise TypeError("a field of another type")


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no score")


def _by_type(scored: Iterable[tuple[str | None, float]]) -> dict[str, tuple[float, int]]:
    types: dict[str, list[float]] = {}
    for name, score in scored:
        if name is not None:
            types.setdefault(name, []).append(score)
    return {name: (sum(scores) / len(scores), len(scores)) for name, scores in sorted(types.items())}
