"""What every source gives: records whose images are still paths."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scale_digrap.data.shards import ShardWriteError, encode_json

_LONGEST_KEY = 80
_NO_TEXT, _NO_ANSWERS = "without text", "without answers"


@dataclass(frozen=True, slots=True)
class Record:
    """A record to be written.

    Attributes:
        key: unique in the data set.
        images: paths, none for text alone.
        json: its encoded JSON.
        samples: questions in it.
        label: class number for its ``.cls``, or None.
    """

    key: str
    images: tuple[str, ...]
    json: bytes
    samples: int = 1
    label: int | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """All records of a data set, in its own order, the names of its classes if it has any, and what was left out on
    request: reason → questions."""

    description: str
    records: list[Record]
    classes: list[str] | None = None
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Question:
    """One question as a source has it; `content` is its JSON object, `shared` what all questions of its images have."""

    identity: str
    images: tuple[str, ...]
    content: dict[str, Any]


def to_source(
    description: str,
    questions: Sequence[Question],
    *,
    grouped: bool,
    shared: Sequence[str] = (),
    drop_incomplete: bool = False,
    left_out: Mapping[str, int] | None = None,
) -> Source:
    """A source of questions.

    Args:
        description: of where they come from; what is left out is added to it, and so to ``written.json``.
        questions, grouped, shared: as `to_records`.
        drop_incomplete: leave out questions without text or without answers, and count them, instead of refusing them.
        left_out: reason → questions that the caller has left out already.

    Raises:
        ShardWriteError: as `to_records`.
    """
    left = Counter(left_out or {})
    if drop_incomplete:
        kept = []
        for question in questions:
            reason = _incomplete(question.content)
            left[reason] += 1
            if not reason:
                kept.append(question)
        questions = kept
        del left[""]
    left_out = {reason: count for reason, count in left.items() if count}
    if left_out:
        description += "; left out: " + ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    return Source(description, to_records(questions, grouped=grouped, shared=shared), left_out=left_out)


def to_records(questions: Sequence[Question], *, grouped: bool, shared: Sequence[str] = ()) -> list[Record]:
    """One record per question, or one per set of images with all its questions.

    Args:
        questions: in the source's order.
        grouped: whether questions about the same images share a record (and one copy of them).
        shared: fields of `content` that belong to the images: moved out of the questions when grouped.

    Raises:
        ShardWriteError: none at all, a question without text or answers, or the same identity twice.
    """
    if not questions:
        raise ShardWriteError("the source holds no questions")
    for question in questions:
        check_content(question.identity, question.content)
    twice = [identity for identity, count in Counter(q.identity for q in questions).items() if count > 1]
    if twice:
        raise ShardWriteError(
            f"{len(twice)} question_ids occur more than once, such as {twice[0]!r}: results could not be told apart. "
            "Are two of the files the same?"
        )
    if not grouped:
        keys = unique_keys([question.identity for question in questions])
        return [Record(key, q.images, encode_json(q.content)) for key, q in zip(keys, questions, strict=True)]
    groups: dict[tuple[str, ...], list[Question]] = {}
    for question in questions:
        # Text alone has nothing to share.
        groups.setdefault(question.images or ("", question.identity), []).append(question)
    keys = unique_keys(
        [Path(images[0]).stem if images[0] else images[1] for images in groups],
        ["\0".join(images) for images in groups],
    )
    return [_group(key, members, shared) for key, members in zip(keys, groups.values(), strict=True)]


def _group(key: str, members: list[Question], shared: Sequence[str]) -> Record:
    common = {}
    for name in shared:
        values = {encode_json(member.content.get(name)) for member in members}
        if len(values) == 1 and name in members[0].content:
            common[name] = members[0].content[name]
    contents = [{name: value for name, value in m.content.items() if name not in common} for m in members]
    return Record(key, members[0].images, encode_json({"questions": contents, **common}), samples=len(members))


def check_content(identity: str, content: dict[str, Any]) -> None:
    """Refuse a question that no loader would take.

    Raises:
        ShardWriteError: no text, or no answers, or answers that are not strings.
    """
    question, answers = content.get("question"), content.get("answers")
    incomplete = _incomplete(content)
    if incomplete == _NO_TEXT:
        raise ShardWriteError(
            f"question {identity}: its text must not be empty, got {question!r}. --drop-incomplete leaves such ones out"
        )
    if incomplete or not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ShardWriteError(
            f"question {identity}: needs a list of one or more answers, got {answers!r}. --drop-incomplete leaves out "
            "those that have none"
        )


def _incomplete(content: dict[str, Any]) -> str:
    """What a question lacks, "" if nothing."""
    question, answers = content.get("question"), content.get("answers")
    if not isinstance(question, str) or not question.strip():
        return _NO_TEXT
    return _NO_ANSWERS if isinstance(answers, list) and not answers else ""


def unique_keys(names: Sequence[str], identities: Sequence[str] | None = None) -> list[str]:
    """Keys for names: letters, digits, ``_`` and ``-`` alone.

    Args:
        names: what a key should look like; need not be unique.
        identities: unique; names by default. Keys that would be equal or too long get a digest of theirs.
    """
    plain = [re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_") or "x" for name in names]
    counts = Counter(plain)
    keys = []
    for identity, key in zip(identities or names, plain, strict=True):
        if counts[key] > 1 or len(key) > _LONGEST_KEY:
            key = f"{key[: _LONGEST_KEY - 13]}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        keys.append(key)
    return keys


def load_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        ShardWriteError: it cannot be read, or is not JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise ShardWriteError(f"cannot read {path}: {error}") from None


def load_entries(path: str | Path, name: str = "") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The entries of a JSON file: those of its list, or of the list under `name` in its object.

    Returns:
        The entries, and what else the object holds.

    Raises:
        ShardWriteError: the file cannot be read or has another form.
    """
    content = load_json(path)
    head: dict[str, Any] = {}
    if name and isinstance(content, dict):
        head = {key: value for key, value in content.items() if key != name}
        content = content.get(name)
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        expected = f"a list of {name}, or an object with one under {name!r}" if name else "a list of entries"
        raise ShardWriteError(f"{path}: expected {expected}")
    return content, head


def required(entry: dict[str, Any], name: str, file: str | Path) -> Any:
    """A field of an entry.

    Raises:
        ShardWriteError: the entry lacks it.
    """
    if name not in entry:
        raise ShardWriteError(f"{file}: an entry lacks {name!r} (it has {', '.join(entry) or 'nothing'})")
    return entry[name]


def image_folder(path: str | Path) -> Path:
    """A folder that pictures lie in.

    Raises:
        ShardWriteError: there is none.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ShardWriteError(f"no such image folder: {folder}")
    return folder


def string_list(answers: Any, take: Callable[[Any], Any] = lambda answer: answer) -> list[str] | None:
    """Answers as a list of strings: a lone string or number is a list of one; None for anything else."""
    items: Iterable[Any] = answers if isinstance(answers, list) else [answers]
    try:
        values = [take(item) for item in items]
    except (TypeError, KeyError):
        return None
    if not all(isinstance(value, (str, int, float)) and not isinstance(value, bool) for value in values):
        return None
    return [str(value) for value in values]
