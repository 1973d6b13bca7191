"""Annotation lists as LAVIS reads them: a list per split, ``[{"image", "question", "question_id", "answer": […]}, …]``.

FRAMES-VQA publishes its in-distribution and shifted sets in this form (``vqa_train.json``, ``vqa_val.json``, …).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scale_digrap.data.shards import ShardWriteError
from scale_digrap.data.sources.records import (
    Question,
    Source,
    identifier,
    image_folder,
    load_json,
    printed,
    string_list,
    to_source,
)

_ANSWERS = ("answer", "answers")
_WEIGHTS = ("weight", "weights", "answer_weight", "answer_weights")
_NOT_KEPT = frozenset({"image", "question", *_ANSWERS})
_ANNOTATORS = 10


def read_lavis(
    annotations: Sequence[str | Path], images: str | Path, *, grouped: bool = False, drop_incomplete: bool = False
) -> Source:
    """The entries of annotation lists.

    Args:
        annotations: JSON files. ``image`` is a path below `images`, a list of them, or null for text alone; ``answer``
            (or ``answers``) a string or a list of them. Other fields are kept. A list of ``weight`` with one number
            per answer says what part of ten annotators gave it; the ten answers are written.
        images: folder that the paths begin in.
        grouped: all questions about the same images in one record.
        drop_incomplete: see `records.to_source`.

    Raises:
        ShardWriteError: files of another form, or weights that are not tenths.
    """
    folder = image_folder(images)
    found: list[Question] = []
    for file in annotations:
        content = load_json(file)
        if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
            raise ShardWriteError(f"{file}: expected a list of entries (image, question, question_id, answer)")
        found += [_question(entry, folder, file, number) for number, entry in enumerate(content)]
    description = f"lavis: {', '.join(Path(file).name for file in annotations)}"
    return to_source(description, found, grouped=grouped, drop_incomplete=drop_incomplete)


def _question(entry: dict[str, Any], folder: Path, file: str | Path, number: int) -> Question:
    for name in ("image", "question", "question_id"):
        if name not in entry:
            raise ShardWriteError(f"{file}: entry {number} lacks {name!r} (it has {', '.join(entry) or 'nothing'})")
    identity = str(identifier(entry, "question_id", f"{file}: entry {number}"))
    value = next((entry[name] for name in _ANSWERS if name in entry), None)
    where = f"{file}: entry {number} (question_id {identity})"
    answers = string_list(value, where=where) if value is not None else None
    if answers is None:
        raise ShardWriteError(
            f"{file}: entry {number} (question_id {identity}) has no answer, or not strings: {value!r}"
        )
    weighted = next((name for name in _WEIGHTS if isinstance(entry.get(name), list)), None)
    if weighted is not None:
        answers = _by_weight(answers, entry[weighted], f"{where}: {weighted!r}")
    images = entry["image"]
    names = [] if images is None else images if isinstance(images, list) else [images]
    if not all(isinstance(name, str) for name in names):
        raise ShardWriteError(f"{where}: 'image' must be a path, a list of paths or null, got {printed(images)}")
    content = {name: value for name, value in entry.items() if name not in _NOT_KEPT and name != weighted}
    if names:
        # What tells later which picture a question was about; a contamination check compares it.
        content.setdefault("image_id", names[0] if len(names) == 1 else names)
    content |= {"question_id": identity, "question": entry["question"], "answers": answers}
    return Question(identity, tuple(str(folder / name) for name in names), content)


def _by_weight(answers: list[str], weights: list[Any], where: str) -> list[str]:
    """Unique answers with the part of the annotators that gave each → the annotators' ten answers.

    Written once each, all of them would count as equally frequent: an answer that nine of ten people gave would score
    like that of the tenth.

    Raises:
        ShardWriteError: weights that do not make ten answers.
    """
    shown = f"{where} is {printed(weights)} for {len(answers)} answers"
    numbers = [one for one in weights if isinstance(one, (int, float)) and not isinstance(one, bool) and one > 0]
    if len(weights) != len(answers) or len(numbers) != len(weights):
        raise ShardWriteError(f"{shown}: there must be one positive number per answer")
    parts = numbers if sum(numbers) > 1.5 else [_ANNOTATORS * number for number in numbers]
    counts = [round(part) for part in parts if part <= _ANNOTATORS]
    exact = len(counts) == len(parts) and all(abs(p - c) < 0.05 for p, c in zip(parts, counts, strict=True))
    if not exact or sum(counts) != _ANNOTATORS:
        raise ShardWriteError(
            f"{shown}: they do not make {_ANNOTATORS} answers. Write every annotator's answer, in a list without "
            "weights"
        )
    return [answer for answer, count in zip(answers, counts, strict=True) for _ in range(count)]
