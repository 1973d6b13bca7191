"""The VQA datasets' own files (visualqa.org): a questions JSON and an annotations JSON over COCO pictures.

VQAv2, VQA-CP (lists with a ``coco_split`` in every entry), VQA-Rephrasings, AdVQA, OK-VQA and others share the form.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scale_digrap.data.shards import ShardWriteError
from scale_digrap.data.sources.records import Question, Source, load_json, string_list, to_records

_SHARED = ("image_id", "coco_split", "data_subtype")
_NOT_KEPT = frozenset({"answers", "question", "image"})


def read_vqa(
    questions: Sequence[str | Path], annotations: Sequence[str | Path], images: str | Path, *, grouped: bool = False
) -> Source:
    """Questions with the annotations of the same ``question_id``.

    Args:
        questions: ``v2_OpenEnded_mscoco_train2014_questions.json``, …: ``{"questions": [{"question_id", "image_id",
            "question"}, …], "data_subtype": "train2014"}``, or the list alone.
        annotations: ``v2_mscoco_train2014_annotations.json``, …: ``{"annotations": [{"question_id", "answers":
            [{"answer": …} × 10], "question_type", "answer_type", …}, …]}``, or the list alone.
        images: folder with ``COCO_train2014_000000000009.jpg``, the same in ``train2014/``, or COCO 2017's
            ``000000000009.jpg``.
        grouped: all questions about a picture in one record.

    Raises:
        ShardWriteError: files of another form, a question without annotation or the reverse.
    """
    annotated: dict[str, dict[str, Any]] = {}
    for file in annotations:
        for entry, _ in _entries(file, "annotations"):
            identity = str(_field(entry, "question_id", file))
            if identity in annotated:
                raise ShardWriteError(f"{file}: question_id {identity} is annotated twice")
            annotated[identity] = entry
    finder = _Finder(Path(images))
    found: list[Question] = []
    seen: set[str] = set()
    total = len(annotated)
    for file in questions:
        for entry, subset in _entries(file, "questions"):
            identity = str(_field(entry, "question_id", file))
            if identity in seen:
                raise ShardWriteError(f"{file}: question_id {identity} is asked twice; are two of the files the same?")
            seen.add(identity)
            annotation = annotated.pop(identity, None)  # VQAv2's would otherwise be in memory twice
            if annotation is None:
                raise ShardWriteError(
                    f"{file}: question_id {identity} has no annotation (test sets have none and cannot be written); "
                    f"annotations read: {total} from {', '.join(map(str, annotations))}"
                )
            found.append(_question(identity, entry, annotation, finder, entry.get("coco_split", subset), file))
    if annotated:
        raise ShardWriteError(
            f"{len(annotated)} annotations belong to no question, such as question_id {next(iter(annotated))}: "
            "is a questions file missing?"
        )
    return Source(
        f"vqa: {', '.join(Path(file).name for file in questions)}",
        to_records(found, grouped=grouped, shared=_SHARED),
    )


def _question(
    identity: str, entry: dict[str, Any], annotation: dict[str, Any], finder: _Finder, subset: str, file: str | Path
) -> Question:
    if str(annotation.get("image_id", entry.get("image_id"))) != str(_field(entry, "image_id", file)):
        raise ShardWriteError(
            f"{file}: question_id {identity} is about image {entry['image_id']}, its annotation about image "
            f"{annotation['image_id']}: the files do not belong together"
        )
    answers = string_list(annotation.get("answers"), lambda one: one["answer"] if isinstance(one, dict) else one)
    if answers is None:
        raise ShardWriteError(f"{file}: the annotation of question_id {identity} has no list of answers")
    extra = {name: value for name, value in {**annotation, **entry}.items() if name not in _NOT_KEPT}
    content = {**extra, "question_id": identity, "question": entry.get("question"), "answers": answers}
    return Question(identity, (finder.path(entry["image_id"], subset),), content)


class _Finder:
    """Where the picture of an image_id lies: the naming that the first one found has is tried first."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ShardWriteError(f"no such image folder: {folder}")
        self._folder = folder
        self._patterns = ["COCO_{subset}_{name}.jpg", "{subset}/COCO_{subset}_{name}.jpg", "{name}.jpg"]
        self._patterns += ["{subset}/{name}.jpg", "{name}"]
        self._known: dict[tuple[str, str], str] = {}

    def path(self, image_id: Any, subset: str) -> str:
        name = f"{image_id:012d}" if isinstance(image_id, int) else str(image_id)
        known = self._known.get((name, subset))
        if known is None:
            known = self._known[name, subset] = self._search(name, subset)
        return known

    def _search(self, name: str, subset: str) -> str:
        for pattern in self._patterns:
            path = self._folder / pattern.format(subset=subset, name=name)
            if path.is_file():
                self._patterns.remove(pattern)
                self._patterns.insert(0, pattern)
                return str(path)
        # Missing pictures are counted, and named, when all are known.
        return str(self._folder / self._patterns[0].format(subset=subset, name=name))


def _entries(file: str | Path, name: str) -> list[tuple[dict[str, Any], str]]:
    """The entries of a file, each with the COCO subset that the file is about."""
    content = load_json(file)
    subset = ""
    if isinstance(content, dict):
        subset = str(content.get("data_subtype", ""))
        content = content.get(name)
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise ShardWriteError(f"{file}: expected a list of {name}, or an object with one under {name!r}")
    return [(entry, subset) for entry in content]


def _field(entry: dict[str, Any], name: str, file: str | Path) -> Any:
    if name not in entry:
        raise ShardWriteError(f"{file}: an entry lacks {name!r} (it has {', '.join(entry) or 'nothing'})")
    return entry[name]
