"""What shards hold: figures over all of them, and single records. Nothing is written beside the shards."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scale_digrap.data import limits
from scale_digrap.data.decode import ImageDecoder
from scale_digrap.data.errors import SampleError
from scale_digrap.data.fields import image_number, is_image
from scale_digrap.data.progress import bar
from scale_digrap.data.sample import parse_class, parse_json
from scale_digrap.data.scan import ShardIndex, scan_shard
from scale_digrap.data.store import ShardStore
from scale_digrap.data.validate import Shard, in_parallel
from scale_digrap.runtime.text import printable

_TYPE_FIELDS = ("question_type", "answer_type", "dataset")


@dataclass
class Figures:
    """Counts over shards.

    Attributes:
        samples: questions; records may group several.
        fields: extension → records that have it.
        field_bytes: extension → bytes of them.
        images: number of images → records.
        answers: number of answers → questions.
        top_answers: the most frequent answer of each question → questions. Ties go to the answer named first.
        types: ``question_type``, ``answer_type`` and ``dataset``, where strings → questions.
        classes: class number → records.
        question_words: words of all questions together.
        ignored: members that belong to no record.
    """

    shards: int = 0
    bytes: int = 0
    records: int = 0
    samples: int = 0
    question_words: int = 0
    ignored: int = 0
    fields: Counter[str] = field(default_factory=Counter)
    field_bytes: Counter[str] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)
    top_answers: Counter[str] = field(default_factory=Counter)
    types: dict[str, Counter[str]] = field(default_factory=dict)
    classes: Counter[int] = field(default_factory=Counter)

    def add(self, other: Figures) -> None:
        """Add the counts of other shards."""
        for name in ("shards", "bytes", "records", "samples", "question_words", "ignored"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("fields", "field_bytes", "images", "answers", "top_answers", "classes"):
            getattr(self, name).update(getattr(other, name))
        for name, counts in other.types.items():
            self.types.setdefault(name, Counter()).update(counts)

    def as_dict(self, top: int = 20) -> dict[str, Any]:
        """For JSON: the `top` most frequent answers, and the number of different ones."""
        plain = {name: value for name, value in self.__dict__.items() if not isinstance(value, (Counter, dict))}
        plain |= {name: dict(sorted(getattr(self, name).items())) for name in ("fields", "field_bytes", "images")}
        plain["answers_per_question"] = dict(sorted(self.answers.items()))
        plain["different_answers"] = len(self.top_answers)
        plain["top_answers"] = dict(_ranked(self.top_answers)[:top])
        plain["types"] = {name: dict(_ranked(counts)) for name, counts in sorted(self.types.items())}
        plain["classes"] = dict(sorted(self.classes.items()))
        return plain


def _ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def shard_figures(shards: Sequence[Shard], store: ShardStore, *, workers: int = 0, progress: bool = False) -> Figures:
    """Figures over all shards.

    Raises:
        ShardDamage: a shard is damaged; its figures would mislead.
    """
    total = Figures()
    with bar(progress, "reading", len(shards)) as advance:
        for figures in in_parallel(_figures, [(shard, store) for shard in shards], workers):
            total.add(figures)
            advance(1)
    return total


def _figures(job: tuple[Shard, ShardStore]) -> Figures:
    path = job[1].path(job[0].url)
    index = scan_shard(path)
    figures = Figures(1, index.size, len(index.keys), index.samples, ignored=index.ignored[1])
    with open(path, "rb") as file:
        for record in range(len(index.keys)):
            spans = _fields(index, record)
            figures.fields.update(spans.keys())
            figures.field_bytes.update({name: size for name, (_, size) in spans.items()})
            figures.images[sum(is_image(name) for name in spans)] += 1
            if "cls" in spans:
                figures.classes[parse_class(_read(file.fileno(), spans["cls"]))] += 1
            if "json" in spans:
                _count_questions(parse_json(_read(file.fileno(), spans["json"])), figures)
    return figures


def _count_questions(meta: dict[str, Any], figures: Figures) -> None:
    for question in meta.get("questions", [meta]):
        answers = question.get("answers")
        if not answers:  # a class number with other facts, but no question
            continue
        figures.question_words += len(question["question"].split())
        figures.answers[len(answers)] += 1
        figures.top_answers[Counter(answers).most_common(1)[0][0]] += 1
        for name in _TYPE_FIELDS:
            value = question.get(name, meta.get(name))
            if isinstance(value, str):
                figures.types.setdefault(name, Counter())[value] += 1


@dataclass(frozen=True)
class Peeked:
    """One record: its JSON and class as stored, and (field, bytes, width, height or why not) of its images."""

    shard: str
    key: str
    json: dict[str, Any] | None
    label: int | None
    images: list[dict[str, Any]]
    other: dict[str, int]
    """Further fields → bytes. Their content is not looked at."""


def peek(
    shards: Sequence[Shard], store: ShardStore, *, count: int = 3, skip: int = 0, key: str | None = None
) -> list[tuple[Peeked, list[bytes]]]:
    """Records, in order, with the bytes of their images.

    Args:
        shards: read one after the other, as far as needed.
        store: fetches what is not local.
        count: records at most.
        skip: records to leave out first.
        key: only the record of this key.

    Raises:
        ShardDamage: a shard is damaged.
    """
    found: list[tuple[Peeked, list[bytes]]] = []
    for shard in shards:
        path = store.path(shard.url)
        index = scan_shard(path)
        rows = range(len(index.keys))
        if key is not None:
            wanted = [row for row in rows if index.keys[row] == key]
        else:
            wanted = list(rows[skip : skip + count - len(found)])
            skip = max(0, skip - len(rows))
        if wanted:
            with open(path, "rb") as file:
                found += [_peek(shard, index, row, file.fileno()) for row in wanted]
        if len(found) >= count or (key is not None and found):
            break
    return found


def _peek(shard: Shard, index: ShardIndex, row: int, descriptor: int) -> tuple[Peeked, list[bytes]]:
    spans = _fields(index, row)
    names = sorted((name for name in spans if is_image(name)), key=lambda name: image_number(name) or 0)
    try:
        limits.check_sizes({name: spans[name][1] for name in (*names, *({"json", "cls"} & spans.keys()))})
    except SampleError as error:
        raise SampleError(f"{shard.name}: record {index.keys[row]!r}: {error}") from None
    contents = [_read(descriptor, spans[name]) for name in names]
    return Peeked(
        shard=shard.name,
        key=index.keys[row],
        json=parse_json(_read(descriptor, spans["json"])) if "json" in spans else None,
        label=parse_class(_read(descriptor, spans["cls"])) if "cls" in spans else None,
        images=[_picture(name, data) for name, data in zip(names, contents, strict=True)],
        other={name: size for name, (_, size) in spans.items() if name not in (*names, "json", "cls")},
    ), contents


def _picture(name: str, data: bytes) -> dict[str, Any]:
    try:
        image = ImageDecoder()(data)
    except SampleError as error:
        return {"field": name, "bytes": len(data), "error": str(error)}
    return {"field": name, "bytes": len(data), "width": image.width, "height": image.height}


def as_json(content: Any) -> str:
    """JSON for people: indented, in their script."""
    return printable(json.dumps(content, indent=2, ensure_ascii=False))


def _fields(index: ShardIndex, record: int) -> dict[str, tuple[int, int]]:
    spans = index.spans[record].tolist()
    return {name: (offset, size) for name, (offset, size) in zip(index.fields, spans, strict=True) if size >= 0}


def _read(descriptor: int, span: tuple[int, int]) -> bytes:
    return os.pread(descriptor, span[1], span[0])


def save_image(data: bytes, path: Path) -> None:
    """Write an image's bytes to a file of the caller's choice, never to a name that a shard holds."""
    path.write_bytes(data)
