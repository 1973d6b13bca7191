"""TextVQA's own file (Singh et al., CVPR 2019): questions, answers and picture names in one JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scale_digrap.data.shards import ShardWriteError
from scale_digrap.data.sources.records import (
    Question,
    Source,
    identifier,
    image_folder,
    load_entries,
    string_list,
    to_source,
    whole,
)

_KEPT = ("image_id", "image_classes", "set_name")
_SHARED = ("image_id", "image_classes")


def read_textvqa(
    annotations: Sequence[str | Path], images: str | Path, *, grouped: bool = False, drop_incomplete: bool = False
) -> Source:
    """The entries of ``TextVQA_0.5.1_val.json``: ``{"data": [{"question_id", "question", "image_id", "answers": [ten
    strings], …}, …]}``.

    Args:
        annotations: one or more of the files.
        images: folder with ``IMAGE_ID.jpg`` (``train_images`` holds those of the training and the validation set).
        grouped: all questions about a picture in one record.
        drop_incomplete: see `records.to_source`.

    Raises:
        ShardWriteError: files of another form, an entry without answers (the test set has none).
    """
    folder = image_folder(images)
    found: list[Question] = []
    for file in annotations:
        for entry in load_entries(file, "data")[0]:
            identity = str(identifier(entry, "question_id", file))
            image = str(identifier(entry, "image_id", file))
            answers = string_list(entry.get("answers"), where=f"{file}: question_id {identity}")
            if answers is None:
                raise ShardWriteError(
                    f"{file}: question_id {identity} has no list of answers (the test set has none and cannot be "
                    "written)"
                )
            content = {name: entry[name] for name in _KEPT if name in entry}
            content |= {
                "image_id": whole(entry["image_id"]),
                "question_id": identity,
                "question": entry.get("question"),
                "answers": answers,
            }
            found.append(Question(identity, (str(folder / f"{image}.jpg"),), content))
    description = f"textvqa: {', '.join(Path(file).name for file in annotations)}"
    return to_source(description, found, grouped=grouped, shared=_SHARED, drop_incomplete=drop_incomplete)
