"""GQA's own files (Hudson & Manning, CVPR 2019), and those of GQA-OOD (Kervadec et al., CVPR 2021), which have the
same form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scale_digrap.data.shards import ShardWriteError
from scale_digrap.data.sources.records import Question, Source, identifier, image_folder, load_json, to_source


def read_gqa(
    questions: Sequence[str | Path], images: str | Path, *, grouped: bool = False, drop_incomplete: bool = False
) -> Source:
    """The entries of ``testdev_balanced_questions.json``: ``{question_id: {"question", "answer", "imageId", "types":
    {"structural", "semantic", "detailed"}, …}, …}``.

    A record's ``question_type`` is the structural type. Its ``answer_type`` is ``head`` or ``tail`` for questions from
    GQA-OOD's ``ood_testdev_head.json`` and ``ood_testdev_tail.json`` (together they are ``ood_testdev_all.json``);
    else, as in GQA's own evaluation, ``open`` for structural type ``query`` and ``binary`` for the others.

    Args:
        questions: one or more of the files.
        images: folder with ``IMAGEID.jpg``.
        grouped: all questions about a picture in one record.
        drop_incomplete: see `records.to_source`.

    Raises:
        ShardWriteError: files of another form, an entry without its answer (the test set has none).
    """
    folder = image_folder(images)
    found: list[Question] = []
    for file in questions:
        content = load_json(file)
        if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
            raise ShardWriteError(f"{file}: expected an object of question_id: {{question, answer, imageId, …}}")
        part = Path(file).stem.rpartition("_")[2]
        found += [
            _question(identity, entry, folder, file, part if part in ("head", "tail") else None)
            for identity, entry in content.items()
        ]
    description = f"gqa: {', '.join(Path(file).name for file in questions)}"
    return to_source(description, found, grouped=grouped, shared=("image_id",), drop_incomplete=drop_incomplete)


def _question(identity: str, entry: dict[str, Any], folder: Path, file: str | Path, part: str | None) -> Question:
    answer, image = entry.get("answer"), str(identifier(entry, "imageId", file))
    if not isinstance(answer, str):
        raise ShardWriteError(
            f"{file}: question_id {identity} has no answer, or not text: {answer!r} (the test set has none and cannot "
            "be written)"
        )
    content: dict[str, Any] = {"image_id": image}
    types = entry.get("types")
    if isinstance(types, dict):
        content |= {f"{name}_type": types[name] for name in ("semantic", "detailed") if name in types}
        if "structural" in types:
            content["question_type"] = types["structural"]
            content["answer_type"] = "open" if types["structural"] == "query" else "binary"
    if part is not None:
        content["answer_type"] = part
    content |= {"question_id": identity, "question": entry.get("question"), "answers": [answer] if answer else []}
    return Question(identity, (str(folder / f"{image}.jpg"),), content)
