"""One visual question, as it lies in a shard and as the rest of the package hands it round."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image


@dataclass
class VqaSample:
    """A question about an image, with its reference answers.

    Attributes:
        key: the sample's name in its shard, unique in a data set.
        image: decoded RGB image, encoded bytes as stored, or None for a text-only sample.
        question: without any prompt around it.
        answers: one answer, or the ten of a VQA annotation; may repeat.
        question_id: identifies the question in result files.
        extra: whatever else the sample carries (``image_id``, ``question_type``, …).
    """

    key: str
    image: Image.Image | bytes | None
    question: str
    answers: list[str]
    question_id: str
    extra: dict[str, Any] = field(default_factory=dict)
