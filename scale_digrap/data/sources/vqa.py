"""The VQA datasets' own files (visualqa.org): a questions JSON and an annotations JSON over COCO pictures.

VQAv2, VQA-CP v2 (lists with a ``coco_split`` in every entry), AdVQA and OK-VQA share the form; VQA-CE is a list of
question_ids of VQAv2. Three sets that were derived from VQAv2's validation set have it too, but their question_ids are
not unique (see `DERIVED`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scale_digrap.data.shards import ShardWriteError
from scale_digrap.data.sources.records import (
    Question,
    Source,
    identifier,
    image_folder,
    load_entries,
    load_json,
    string_list,
    to_source,
    whole,
)

_SHARED = ("image_id", "coco_split", "data_subtype")
_NOT_KEPT = frozenset({"answers", "question", "image"})
_SUBSET = re.compile(r"(?:train|val|test)20\d\d")


def read_vqa(
    questions: Sequence[str | Path],
    annotations: Sequence[str | Path],
    images: str | Path,
    *,
    grouped: bool = False,
    only: str | Path | None = None,
    derived: str | None = None,
    subset: str | None = None,
    drop_incomplete: bool = False,
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
        only: JSON file with the question_ids to keep: a list of them (VQA-CE's ``counterexamples.json``), or entries
            with a ``question_id`` each.
        derived: ``edited`` or ``rephrased``, see `DERIVED`: question_ids are made unique, and the records keep
            ``original_question_id`` and ``original_image_id`` of the question that theirs was made from.
        subset: COCO's subset in the pictures' names, instead of the one that the files name.
        drop_incomplete: see `records.to_source`.

    Raises:
        ShardWriteError: files of another form, a question without annotation or the reverse, an id in `only` that no
            question has.
    """
    kept = None if only is None else _ids(only)
    if derived is not None and derived not in DERIVED:
        raise ShardWriteError(f"derived must be one of {', '.join(DERIVED)}, got {derived!r}")
    pair = _pair if derived is not None else _question_id
    annotated: dict[str, dict[str, Any]] = {}
    total = 0
    for file in annotations:
        for entry in load_entries(file, "annotations")[0]:
            identity = pair(entry, file)
            if identity in annotated:
                raise ShardWriteError(
                    f"{file}: question_id {identity} is annotated twice{_HINT if not derived else ''}"
                )
            annotated[identity] = entry
            total += 1
    finder = _Finder(image_folder(images))
    found: list[Question] = []
    seen: set[str] = set()
    for file in questions:
        entries, head = load_entries(file, "questions")
        part = subset or str(head.get("data_subtype") or _subset_of(file))
        for entry in entries:
            identity = pair(entry, file)
            if identity in seen:
                raise ShardWriteError(
                    f"{file}: question_id {identity} is asked twice; are two of the files the same?"
                    f"{_HINT if not derived else ''}"
                )
            seen.add(identity)
            if kept is not None and _question_id(entry, file) not in kept:
                annotated.pop(identity, None)
                continue
            annotation = annotated.pop(identity, None)  # VQAv2's would otherwise be in memory twice
            if annotation is None:
                raise ShardWriteError(
                    f"{file}: question_id {identity} has no annotation (test sets have none and cannot be written); "
                    f"annotations read: {total} from {', '.join(map(str, annotations))}"
                )
            found.append(_question(entry, annotation, finder, subset or entry.get("coco_split", part), file, derived))
    if annotated:
        raise ShardWriteError(
            f"{len(annotated)} annotations belong to no question, such as question_id {next(iter(annotated))}: "
            "is a questions file missing?"
        )
    description = f"vqa: {', '.join(Path(file).name for file in questions)}"
    if kept is not None:
        description += f", the {len(found)} of {Path(str(only)).name}"
        _check_kept(kept, found, only)
    return to_source(description, found, grouped=grouped, shared=_SHARED, drop_incomplete=drop_incomplete)


_HINT = " (VQA-Rephrasings, IV-VQA and CV-VQA repeat ids: --derived rephrased or edited tells them apart)"


def _question(
    entry: dict[str, Any],
    annotation: dict[str, Any],
    finder: _Finder,
    subset: str,
    file: str | Path,
    derived: str | None,
) -> Question:
    identity, image = _question_id(entry, file), identifier(entry, "image_id", file)
    if str(whole(annotation.get("image_id", image))) != str(image):
        raise ShardWriteError(
            f"{file}: question_id {identity} is about image {entry['image_id']}, its annotation about image "
            f"{annotation['image_id']}: the files do not belong together"
        )
    answers = string_list(
        annotation.get("answers"),
        lambda one: one["answer"] if isinstance(one, dict) else one,
        where=f"{file}: the annotation of question_id {identity}",
    )
    if answers is None:
        raise ShardWriteError(f"{file}: the annotation of question_id {identity} has no list of answers")
    content = {name: value for name, value in {**annotation, **entry}.items() if name not in _NOT_KEPT}
    content |= {"question_id": whole(entry["question_id"]), "image_id": image}
    if derived is not None:
        content |= DERIVED[derived](content, file)
        identity = content["question_id"]
    content |= {"question_id": identity, "question": entry.get("question"), "answers": answers}
    return Question(identity, (finder.path(image, subset),), content)


def _edited(content: Mapping[str, Any], file: str | Path) -> dict[str, Any]:
    """IV-VQA and CV-VQA (Agarwal et al., CVPR 2020): a question is asked again about each edit of its picture, whose
    ``image_id`` is ``ORIGINAL_REMOVED``, both of twelve digits."""
    identity, image = str(content["question_id"]), str(content["image_id"])
    original, _, removed = image.partition("_")
    if not original.isdecimal() or not removed:
        raise ShardWriteError(
            f"{file}: image_id {image!r} of question_id {identity} is not that of an edited picture "
            "(000000262148_000000000005)"
        )
    return {
        "question_id": identity if "-" in identity else f"{identity}-{removed.lstrip('0') or '0'}",
        "original_question_id": identity.partition("-")[0],
        "original_image_id": int(original),
    }


def _rephrased(content: Mapping[str, Any], file: str | Path) -> dict[str, Any]:
    """VQA-Rephrasings (Shah et al., CVPR 2019): originals and, with ``rephrasing_of``, their rephrasings, whose ids
    (ten times the original's, plus a number) are those of other originals."""
    identity = str(content["question_id"])
    if "rephrasing_of" not in content:
        return {"question_id": identity}
    original = str(content["rephrasing_of"])
    return {"question_id": f"{original}-{identity}", "original_question_id": original}


DERIVED: Mapping[str, Callable[[Mapping[str, Any], str | Path], dict[str, Any]]] = {
    "edited": _edited,
    "rephrased": _rephrased,
}
"""Sets whose question_ids are those of the questions that they were made from, or collide with them."""


def _question_id(entry: dict[str, Any], file: str | Path) -> str:
    return str(identifier(entry, "question_id", file))


def _pair(entry: dict[str, Any], file: str | Path) -> str:
    """What an entry of a derived set is known by in both files."""
    return f"{_question_id(entry, file)} about image {identifier(entry, 'image_id', file)}"


def _ids(file: str | Path) -> set[str]:
    content = load_json(file)
    if isinstance(content, dict):
        content = next(
            (content[name] for name in ("annotations", "questions", "question_ids") if name in content), None
        )
    if not isinstance(content, list) or not content:
        raise ShardWriteError(f"{file}: expected a list of question_ids, or of entries that have one")
    return {
        str(identifier(one if isinstance(one, dict) else {"question_id": one}, "question_id", file)) for one in content
    }


def _check_kept(kept: set[str], found: Sequence[Question], file: str | Path | None) -> None:
    absent = kept - {str(question.content.get("original_question_id", question.identity)) for question in found}
    absent -= {question.identity for question in found}
    if absent:
        raise ShardWriteError(
            f"{len(absent)} of {len(kept)} question_ids in {file} belong to no question that was read, such as "
            f"{min(absent)}: is it the list of another version or split?"
        )


def _subset_of(file: str | Path) -> str:
    """The subset in the name of a file that does not say it inside."""
    found = _SUBSET.search(Path(file).name)
    return found.group() if found else ""


class _Finder:
    """Where the picture of an image_id lies: the naming that the first one found has is tried first."""

    def __init__(self, folder: Path) -> None:
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
            if os.path.isfile(path):  # False, and no error, for a name that no file can have
                self._patterns.remove(pattern)
                self._patterns.insert(0, pattern)
                return str(path)
        # Missing pictures are counted, and named, when all are known.
        return str(self._folder / self._patterns[0].format(subset=subset, name=name))
