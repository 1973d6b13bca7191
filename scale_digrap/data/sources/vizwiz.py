"""VizWiz's own files (Gurari et al., CVPR 2018): a list of pictures, each with one question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scale_digrap.data.shards import ShardWriteError
from scale_digrap.data.sources.records import (
    Question,
    Source,
    image_folder,
    load_entries,
    required,
    string_list,
    to_source,
    whole,
)

_KEPT = ("answer_type", "answerable")


def read_vizwiz(
    annotations: Sequence[str | Path],
    images: str | Path,
    *,
    drop_unanswerable: bool = False,
    drop_incomplete: bool = False,
) -> Source:
    """The entries of ``val.json``: ``[{"image": "VizWiz_val_00000000.jpg", "question", "answers": [{"answer",
    "answer_confidence"} × 10], "answer_type", "answerable": 0 or 1}, …]``.

    The set has no question_ids: that of a question is its picture's name without the extension.

    Args:
        annotations: one or more of the files.
        images: folder with the pictures.
        drop_unanswerable: leave out, and count, the questions with ``"answerable": 0``. Scores on the rest are not
            those that are published.
        drop_incomplete: see `records.to_source`.

    Raises:
        ShardWriteError: files of another form, an entry without answers (the test set has none).
    """
    folder = image_folder(images)
    found: list[Question] = []
    unanswerable = 0
    for file in annotations:
        for entry in load_entries(file)[0]:
            image = required(entry, "image", file)
            if not isinstance(image, str) or not image:
                raise ShardWriteError(f"{file}: 'image' is {image!r}, and must be the name of a picture")
            if drop_unanswerable:
                answerable = whole(required(entry, "answerable", file))
                if answerable not in (0, 1):
                    raise ShardWriteError(f"{file}: 'answerable' of {image} is {answerable!r}, and must be 0 or 1")
                if answerable == 0:
                    unanswerable += 1
                    continue
            answers = string_list(
                entry.get("answers"),
                lambda one: one["answer"] if isinstance(one, dict) else one,
                where=f"{file}: the entry of {image}",
            )
            if answers is None:
                raise ShardWriteError(
                    f"{file}: the entry of {image} has no list of answers (the test set has none and cannot be written)"
                )
            identity = Path(image).stem
            content: dict[str, Any] = {name: entry[name] for name in _KEPT if name in entry}
            content |= {"image_id": image, "question_id": identity}
            content |= {"question": entry.get("question"), "answers": answers}
            found.append(Question(identity, (str(folder / image),), content))
    return to_source(
        f"vizwiz: {', '.join(Path(file).name for file in annotations)}",
        found,
        grouped=False,
        drop_incomplete=drop_incomplete,
        left_out={"unanswerable": unanswerable},
    )
