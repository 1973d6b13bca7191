"""What every source gives: records whose images are still paths."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scale_digrap.data import limits
from scale_digrap.data.errors import SampleError
from scale_digrap.data.sample import check_text
from scale_digrap.data.shards import ShardWriteError, encode_json
from scale_digrap.runtime import text

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
    """All records of a data set, in its own order, the names of its classes if it has any, what was left out on
    request (reason → questions), and what else a person should know: one line each."""

    description: str
    records: list[Record]
    classes: list[str] | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


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
    if len(members) > limits.QUESTIONS:
        raise ShardWriteError(f"record {key!r}: {len(members):,} questions, the limit is {limits.QUESTIONS:,}")
    try:
        encoded = encode_json({"questions": contents, **common})
    except ShardWriteError as error:
        raise ShardWriteError(
            f"record {key!r} of {len(members)} questions: {error}; write it without --group"
        ) from None
    return Record(key, members[0].images, encoded, samples=len(members))


def check_content(identity: str, content: dict[str, Any]) -> None:
    """Refuse a question that no loader would take.

    Raises:
        ShardWriteError: no text, or no answers, or answers that are not strings; text that no file or tokenizer takes;
            a number that is not finite anywhere in it (pandas writes ``NaN`` for what is missing).
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
    try:
        check_text({**content, "question_id": identity})
    except SampleError as error:
        raise ShardWriteError(f"question {printed(identity)}: {error}") from None
    if (problem := unwritable(content)) is not None:
        raise ShardWriteError(f"question {printed(identity)}: {problem}")


def printed(value: Any) -> str:
    """A value from a file, short and printable, for a message."""
    return text.one_line(value if isinstance(value, str) else repr(value), 120)


def unwritable(value: Any, name: str = "") -> str | None:
    """What in nested plain values cannot be written as JSON, by name; None if all can."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"its field {name!r} is {value}, which JSON does not have: leave it out, or write null or text"
    if isinstance(value, str):
        return f"its field {name!r} holds half a character: {printed(value)}" if text.has_surrogates(value) else None
    if isinstance(value, Mapping):
        return next(
            (
                problem
                for key, one in value.items()
                if (problem := unwritable(key, str(key)) or unwritable(one, name or str(key))) is not None
            ),
            None,
        )
    if isinstance(value, (list, tuple)):
        return next((problem for one in value if (problem := unwritable(one, name)) is not None), None)
    return None


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
            digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()
            key = f"{key[: _LONGEST_KEY - 13]}-{digest[:12]}"
        keys.append(key)
    return keys


def load_json(path: str | Path) -> Any:
    """The content of a JSON file, UTF-8 with or without a byte order mark.

    Raises:
        ShardWriteError: it cannot be read, or is not JSON.
    """
    try:
        # NaN passes here, and is refused with the entry that it stands in.
        return text.read_json(path, finite=False)
    except text.TextError as error:
        raise ShardWriteError(str(error)) from None


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


def identifier(entry: dict[str, Any], name: str, file: str | Path) -> str | int:
    """An id in an entry: text or a whole number. ``9.0`` is 9: pandas writes so where another id is missing.

    Raises:
        ShardWriteError: the entry lacks it, or it is anything else (NaN, null, true, a list).
    """
    found = whole(required(entry, name, file))
    if isinstance(found, bool) or not isinstance(found, (str, int)) or found == "":
        others = {key: value for key, value in entry.items() if key != name}
        raise ShardWriteError(
            f"{file}: {name!r} is {printed(found)}, and must be text or a whole number, in the entry {printed(others)}"
        )
    return found


def whole(value: Any) -> Any:
    """A whole number that is written with a decimal point as an integer; any other value as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53 else value


def image_folder(path: str | Path) -> Path:
    """A folder that pictures lie in.

    Raises:
        ShardWriteError: there is none.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ShardWriteError(f"no such image folder: {folder}")
    return folder


def string_list(
    answers: Any, take: Callable[[Any], Any] = lambda answer: answer, *, where: str = "the entry"
) -> list[str] | None:
    """Answers as a list of strings: a lone string or number is a list of one; None for anything else.

    Args:
        answers: of an entry.
        take: gets the text out of one of them.
        where: names the entry in errors.

    Raises:
        ShardWriteError: a number that does not say how it is written: NaN (pandas' word for "missing"), or 2.0, which
            may have been 2.
    """
    items: Iterable[Any] = answers if isinstance(answers, list) else [answers]
    try:
        values = [take(item) for item in items]
    except (TypeError, KeyError):
        return None
    for value in values:
        if isinstance(value, float) and not math.isfinite(value):
            raise ShardWriteError(f"{where}: its answer is {value}, which is no answer: write text, or leave it out")
        if isinstance(value, float) and value.is_integer():
            raise ShardWriteError(
                f"{where}: its answer is the number {value}: write it as text, {str(int(value))!r} or {str(value)!r}"
            )
    if not all(isinstance(value, (str, int, float)) and not isinstance(value, bool) for value in values):
        return None
    return [str(value) for value in values]
