"""Annotation lists as LAVIS reads them: a list per split, ``[{"image", "question", "question_id", "answer": […]}, …]``.

FRAMES-VQA publishes its in-distribution and shifted sets in this form (``vqa_train.json``, ``vqa_val.json``, …).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scale_digrap.data.shards import ShardWriteError
from scale_digrap.data.sources.records import Question, Source, image_folder, load_json, string_list, to_source

_ANSWERS = ("answer", "answers")
_NOT_KEPT = frozenset({"image", "question", *_ANSWERS})


def read_lavis(
    annotations: Sequence[str | Path], images: str | Path, *, grouped: bool = False, drop_incomplete: bool = False
) -> Source:
    """The entries of annotation lists.

    Args:
        annotations: JSON files. ``image`` is a path below `images`, a list of them, or null for text alone; ``answer``
            (or ``answers``) a string or a list of them. Other fields are kept.
        images: folder that the paths begin in.
        grouped: all questions about the same images in one record.
        drop_incomplete: see `records.to_source`.

    Raises:
        ShardWriteError: files of another form.
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
    identity = str(entry["question_id"])
    value = next((entry[name] for name in _ANSWERS if name in entry), None)
    answers = string_list(value) if value is not None else None
    if answers is None:
        raise ShardWriteError(
            f"{file}: entry {number} (question_id {identity}) has no answer, or not strings: {value!r}"
        )
    images = entry["image"]
    names = [] if images is None else images if isinstance(images, list) else [images]
    if not all(isinstance(name, str) for name in names):
        raise ShardWriteError(
            f"{file}: entry {number}: 'image' must be a path, a list of paths or null, got {images!r}"
        )
    content = {name: value for name, value in entry.items() if name not in _NOT_KEPT}
    if names:
        # What tells later which picture a question was about; a contamination check compares it.
        content.setdefault("image_id", names[0] if len(names) == 1 else names)
    content |= {"question_id": identity, "question": entry["question"], "answers": answers}
    return Question(identity, tuple(str(folder / name) for name in names), content)
