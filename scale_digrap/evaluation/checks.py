"""What must hold of a suite's questions."""

from __future__ import annotations

from collections.abc import Sequence

from scale_digrap.evaluation.records import Record
from scale_digrap.evaluation.signals import EvaluationError
from scale_digrap.evaluation.suites import Suite, SuiteError


def check_records(suite: Suite, records: Sequence[Record]) -> None:
    """Whether these are a suite's questions.

    Raises:
        EvaluationError: none at all, question ids twice, another number than expected.
    """
    check_ids(suite, [record.question_id for record in records])


def check_ids(suite: Suite, ids: Sequence[str]) -> None:
    """Whether every question has an id of its own, and there are as many as expected.

    Raises:
        EvaluationError: not so.
    """
    seen: set[str] = set()
    twice = [question_id for question_id in ids if question_id in seen or seen.add(question_id)]  # type: ignore[func-returns-value]
    if twice:
        raise EvaluationError(
            f"suite {suite.name!r}: {len(twice)} question ids occur more than once, first {twice[0]!r}; predictions "
            "could not be told apart: give every question its own question_id"
        )
    try:
        suite.check_count(len(ids))
    except SuiteError as error:
        raise EvaluationError(str(error)) from None
