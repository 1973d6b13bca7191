"""easy-VQA (Victor Zhou, MIT): 5,000 real 64×64 pictures with 48k questions, out of the PyPI package `easy-vqa`.

Its full training set leaves nothing to learn wrongly, so a robustness demo needs a biased part of it. As VQA-CP does
with VQA, we keep the training pictures whose colour is *tied* to one shape (`TIES`): a fine-tuned model may then read
the shape off the colour. Test pictures that break the ties show whether it did.

The package lists questions, not what a picture shows; `load` recovers shape and colour from the answers.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
from PIL import Image

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.quickstart.questions import NOVEL, SEEN, TYPE_OF_FAMILY, Subject, parse_easy, phrase
from scale_digrap.quickstart.scenes import MIN_CONTRAST, RGB, SIZE

Split = Literal["train", "test"]

TIES = {
    "gray": "circle",
    "red": "circle",
    "green": "circle",
    "blue": "rectangle",
    "yellow": "rectangle",
    "teal": "rectangle",
    "brown": "triangle",
    "black": "triangle",
}
"""Colour → the only shape it has in the fine-tuning set ("easy-VQA-CP")."""


class EasyVqaError(ScaleDigrapError):
    """The easy-vqa package is missing or holds something unexpected."""


@dataclass(frozen=True, slots=True)
class EasyQuestion:
    """One question of the package, recognised."""

    index: int
    """Position in the split's question list."""
    text: str
    answer: str
    family: str
    subject: Subject

    @property
    def question_type(self) -> str:
        return TYPE_OF_FAMILY[self.family]


@dataclass(frozen=True, slots=True)
class EasyImage:
    """One picture with all its questions and what they tell about it."""

    split: Split
    image_id: int
    path: Path
    shape: str
    colour: str
    questions: tuple[EasyQuestion, ...]

    @property
    def tied(self) -> bool:
        """Whether its colour goes with its shape as in the fine-tuning set."""
        return TIES[self.colour] == self.shape


@dataclass(frozen=True, slots=True)
class EasySplit:
    """A published split. `unknown` counts pictures whose shape or colour no question gives away; they are left out."""

    images: tuple[EasyImage, ...]
    unknown: int


@lru_cache(maxsize=2)
def load(split: Split) -> EasySplit:
    """Read one split of the installed package.

    Raises:
        EasyVqaError: the package is not installed, or its questions contradict one another.
    """
    package = _package()
    texts, answers, image_ids = getattr(package, f"get_{split}_questions")()
    paths = getattr(package, f"get_{split}_image_paths")()

    questions: dict[int, list[EasyQuestion]] = defaultdict(list)
    for index, (text, answer, image_id) in enumerate(zip(texts, answers, image_ids, strict=True)):
        try:
            family, subject = parse_easy(text)
        except ValueError as error:
            raise EasyVqaError(f"easy-vqa {split} question {index}: {error}; is another version installed?") from None
        questions[image_id].append(EasyQuestion(index, text, answer, family, subject))

    images, unknown = [], 0
    for image_id in sorted(questions):
        shape, colour = _what_it_shows(split, image_id, questions[image_id])
        if shape is None or colour is None:
            unknown += 1
            continue
        path = Path(paths[image_id])
        images.append(EasyImage(split, image_id, path, shape, colour, tuple(questions[image_id])))
    return EasySplit(tuple(images), unknown)


def _package() -> ModuleType:
    try:
        import easy_vqa
    except ImportError:
        raise EasyVqaError(
            "the quick-start's data comes from the package easy-vqa, which is not installed: "
            "pip install 'easy-vqa>=1.0'"
        ) from None
    return easy_vqa


def _what_it_shows(split: str, image_id: int, questions: list[EasyQuestion]) -> tuple[str | None, str | None]:
    """Shape and colour as the answers state them; None where no answer does."""
    shapes: set[str | None] = set()
    colours: set[str | None] = set()
    for question in questions:
        family, subject, answer = question.family, question.subject, question.answer
        if TYPE_OF_FAMILY[family] == "yes/no":
            if (answer == "yes") == family.startswith("has"):
                shapes.add(subject.shape)
                colours.add(subject.colour)
        else:
            shapes.add(answer if TYPE_OF_FAMILY[family] == "shape" else subject.shape)
            colours.add(answer if TYPE_OF_FAMILY[family] == "colour" else subject.colour)
    shapes.discard(None)
    colours.discard(None)
    if len(shapes) > 1 or len(colours) > 1:
        raise EasyVqaError(f"easy-vqa {split} picture {image_id}: contradicting answers {shapes} {colours}")
    return next(iter(shapes), None), next(iter(colours), None)


def paraphrase(question: EasyQuestion, rng: np.random.Generator) -> tuple[str, str]:
    """The same question in words easy-VQA never uses.

    Half of the wordings are known from pre-training ("seen"), half from nowhere ("novel"), so that both are measured:
    what fine-tuning forgets, and what never was there.

    Returns:
        The wording, and "seen" or "novel".
    """
    kind = "seen" if rng.random() < 0.5 else "novel"
    wordings = (SEEN if kind == "seen" else NOVEL)[question.family]
    return phrase(wordings[int(rng.integers(len(wordings)))], question.subject), kind


def shift_vision(image: EasyImage, rng: np.random.Generator) -> Image.Image:
    """The real picture turned by 90, 180 or 270 degrees, its plain light background replaced by dark noise.

    The shape's own pixels stay, anti-aliased edges included. The new background keeps `scenes.MIN_CONTRAST` to the
    shape's colour, so the question can still be answered by eye.
    """
    pixels = load_pixels(image)
    background = most_common_colour(pixels).astype(np.float32)  # no shape covers half of its picture
    colour = np.asarray(RGB[image.colour], dtype=np.float32)
    direction = colour - background
    alpha = ((pixels - background) @ direction / (direction @ direction)).clip(0.0, 1.0)[..., None]

    dark = rng.uniform(20.0, 110.0, size=3)
    while np.linalg.norm(dark - colour) < MIN_CONTRAST:
        dark = rng.uniform(20.0, 110.0, size=3)
    noise = dark + rng.standard_normal((SIZE, SIZE, 3)) * 15.0
    shifted = alpha * colour + (1.0 - alpha) * noise
    shifted = np.rot90(shifted, k=int(rng.integers(1, 4)), axes=(0, 1))
    return Image.fromarray(np.ascontiguousarray(shifted.clip(0, 255).astype(np.uint8)))


def load_pixels(image: EasyImage) -> np.ndarray:
    """The picture, uint8 [64, 64, 3]."""
    with Image.open(image.path) as opened:
        return np.asarray(opened.convert("RGB"))


def most_common_colour(pixels: np.ndarray) -> np.ndarray:
    """The RGB value [3] that most pixels of uint8 [height, width, 3] have."""
    packed = pixels.reshape(-1, 3).astype(np.int64) @ (1 << 16, 1 << 8, 1)
    values, counts = np.unique(packed, return_counts=True)
    most = int(values[counts.argmax()])
    return np.array([most >> 16, most >> 8 & 255, most & 255], dtype=np.uint8)
