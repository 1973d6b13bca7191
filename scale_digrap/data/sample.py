"""One visual question, as it lies in a shard and as the rest of the package hands it round."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from scale_digrap.data import limits
from scale_digrap.data.errors import SampleError
from scale_digrap.runtime import text

_SIGNALS = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?s>|\[/?INST\]|\[IMG(?:_BREAK|_END)?\]|"
    r"<(?:image|video|audio|img|IMG_CONTEXT|boi|eoi|pad|bos|eos|image_pad|image_soft_token|"
    r"(?:start|end)_of_(?:image|turn|audio|text))>"
)


@dataclass
class VqaSample:
    """A question about images, with its reference answers.

    Attributes:
        key: the sample's name in its shard; ``KEY#i`` for question i of a record that groups several.
        image: decoded RGB image, encoded bytes as stored, or None for a text-only sample.
        question: without any prompt around it.
        answers: one answer, or the ten of a VQA annotation; may repeat.
        question_id: identifies the question in result files.
        extra: whatever else the sample carries (``image_id``, ``question_type``, …).
        more_images: the second image and those after it.
        seed: what random augmentation of this sample must be drawn from, see :meth:`rng`. Not part of its identity.
    """

    key: str
    image: Image.Image | bytes | None
    question: str
    answers: list[str]
    question_id: str
    extra: dict[str, Any] = field(default_factory=dict)
    more_images: list[Image.Image | bytes] = field(default_factory=list)
    seed: int = field(default=0, compare=False)

    @property
    def images(self) -> list[Image.Image | bytes]:
        """All images, in order; empty for a text-only sample."""
        return [] if self.image is None else [self.image, *self.more_images]

    def rng(self) -> np.random.Generator:
        """A fresh generator for augmentation. It depends on (seed, position in the data) alone, so that neither the
        number of ranks or loader processes nor a resume changes what is drawn."""
        return np.random.default_rng(self.seed)


def parse_record(data: bytes) -> dict[str, Any]:
    """The JSON object of a record, with the fields of its questions checked.

    A record is one question, ``{"question", "answers", "question_id", ...}``, or several about the same images,
    ``{"questions": [{"question", "answers", "question_id", ...}, ...], ...}``.

    Raises:
        SampleError: not a JSON object, a field missing or of the wrong type, or no answers.
    """
    meta = parse_json(data)
    if "questions" not in meta:
        _check_question(meta, "its .json")
        return meta
    questions = meta["questions"]
    if not isinstance(questions, list) or not questions:
        raise SampleError("'questions' in its .json must be a list of one or more questions")
    if len(questions) > limits.QUESTIONS:
        raise SampleError(f"its .json has {len(questions):,} questions, the limit is {limits.QUESTIONS:,}")
    for number, question in enumerate(questions):
        if not isinstance(question, dict):
            raise SampleError(f"question {number} in its .json must be an object, got {type(question).__name__}")
        _check_question(question, f"question {number} in its .json")
    return meta


def check_text(meta: dict[str, Any]) -> None:
    """Refuse the text of a question that no tokenizer or file takes, or that is larger than any real one.

    A record with such text is whole; like a picture that cannot be decoded, it is a bad sample, not a damaged shard.

    Args:
        meta: a question with its answers, of a record that :func:`parse_record` has checked.

    Raises:
        SampleError: lone surrogates, which are halves of characters; or over a limit of `scale_digrap.data.limits`.
    """
    if len(meta["answers"]) > limits.ANSWERS:
        raise SampleError(f"its question has {len(meta['answers']):,} answers, the limit is {limits.ANSWERS:,}")
    parts = [("question", meta["question"], limits.QUESTION_CHARACTERS)]
    parts += [("answer", answer, limits.ANSWER_CHARACTERS) for answer in meta["answers"]]
    parts.append(("question_id", str(meta["question_id"]), limits.ANSWER_CHARACTERS))
    for name, value, limit in parts:
        if len(value) > limit:
            raise SampleError(f"its {name} has {len(value):,} characters, the limit is {limit:,}")
        if text.has_surrogates(value):
            raise SampleError(
                f"its {name} holds half a character (a lone surrogate): '{text.one_line(value, 80)}'. Whatever wrote "
                "it has cut a character in two"
            )


def signal_in(meta: dict[str, Any]) -> str | None:
    """What in the text of a question or an answer some model's tokenizer takes for a signal, such as ``<image>`` or
    ``</s>``; None where nothing is known to be. Collators read it as plain text."""
    found = next(filter(None, map(_SIGNALS.search, (meta["question"], *meta["answers"]))), None)
    return None if found is None else found[0]


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object, in UTF-8 with or without a byte order mark.

    Raises:
        SampleError: anything else; a number that is not finite; nested or larger than any real one.
    """
    if len(data) > limits.JSON_BYTES:
        raise SampleError(f"its .json has {len(data):,} bytes, the limit is {limits.JSON_BYTES:,}")
    try:
        meta = text.parse_json(data, "its .json")
    except text.TextError as error:
        raise SampleError(str(error).replace("is not JSON", "is not valid JSON")) from None
    if not isinstance(meta, dict):
        raise SampleError(f"its .json must be an object, got {type(meta).__name__}")
    return meta


def parse_class(data: bytes) -> int:
    """The class number of a ``.cls`` field.

    Raises:
        SampleError: not a decimal number of at most nine digits.
    """
    text = data.strip()
    if not text.isdigit() or len(text) > 9:
        raise SampleError(f"its .cls must be a decimal class number, got {data[:20]!r}")
    return int(text)


def _check_question(meta: dict[str, Any], where: str) -> None:
    for name, kind in (("question", str), ("answers", list), ("question_id", (str, int))):
        if name not in meta:
            raise SampleError(f"{where} lacks {name!r}")
        if not isinstance(meta[name], kind) or isinstance(meta[name], bool):
            raise SampleError(f"{where}: {name!r} has type {type(meta[name]).__name__}")
    if not meta["answers"] or not all(isinstance(answer, str) for answer in meta["answers"]):
        shown = text.one_line(repr(meta["answers"][:20]), 200)
        raise SampleError(f"{where}: 'answers' must be a list of one or more strings, got {shown}")
