"""What can be asked about a picture of coloured shapes: question families, their phrasings, and their answers.

A *family* is a kind of question (does a colour exist? which shape? how many?); a *phrasing* is one way of wording it.
Three sets of phrasings exist because the quick-start measures what a change of wording does:

- `EASY`: easy-VQA's own templates, verbatim. The fine-tuning set uses only these.
- `SEEN`: paraphrases that the base model meets in pre-training and fine-tuning never shows.
- `NOVEL`: paraphrases that no training at all shows, made of words that pre-training knows.

A subject (the thing asked about) fills ``{c}`` with a colour and ``{s}`` with a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EASY_SHAPES = ("circle", "rectangle", "triangle")
SHAPES = (*EASY_SHAPES, "star", "cross", "ring")
EASY_COLOURS = ("gray", "red", "green", "blue", "yellow", "teal", "brown", "black")
COLOURS = (*EASY_COLOURS, "purple", "pink")
NEW_COLOURS = ("teal", "brown")
"""Colours of easy-VQA that pre-training neither shows nor names: what fine-tuning has to teach."""
KNOWN_COLOURS = tuple(colour for colour in COLOURS if colour not in NEW_COLOURS)
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
COUNTS = ("0", "1", "2", "3")
ANSWERS = ("yes", "no", *SHAPES, *COLOURS, *COUNTS, "left", "right", "top", "bottom")

QUESTION_TYPES = ("yes/no", "shape", "colour", "count", "position")

TYPE_OF_FAMILY = {
    "has_colour": "yes/no",
    "lacks_colour": "yes/no",
    "has_shape": "yes/no",
    "lacks_shape": "yes/no",
    "shape": "shape",
    "shape_of_colour": "shape",
    "colour": "colour",
    "colour_of_shape": "colour",
    "count": "count",
    "count_colour": "count",
    "count_shape": "count",
    "side": "position",
    "side_of_colour": "position",
    "side_of_shape": "position",
    "height": "position",
    "height_of_colour": "position",
    "height_of_shape": "position",
}
"""Family → the question type that suites and reports group by."""

EASY: dict[str, tuple[str, ...]] = {
    "has_colour": (
        "is a {c} shape present?",
        "is there a {c} shape?",
        "is there a {c} shape in the image?",
        "does the image contain a {c} shape?",
    ),
    "lacks_colour": (
        "is no {c} shape present?",
        "is there not a {c} shape?",
        "is there not a {c} shape in the image?",
        "does the image not contain a {c} shape?",
    ),
    "has_shape": (
        "is a {s} present?",
        "is there a {s}?",
        "is there a {s} in the image?",
        "does the image contain a {s}?",
    ),
    "lacks_shape": (
        "is no {s} present?",
        "is there not a {s}?",
        "is there not a {s} in the image?",
        "does the image not contain a {s}?",
    ),
    "shape": ("what shape is in the image?", "what shape is present?", "what shape does the image contain?"),
    "shape_of_colour": ("what is the {c} shape?",),
    "colour": ("what color is the shape?", "what is the color of the shape?"),
    "colour_of_shape": ("what color is the {s}?", "what is the color of the {s}?"),
}

SEEN: dict[str, tuple[str, ...]] = {
    "has_colour": (
        "can you see a {c} figure?",
        "do you see anything {c} here?",
        "would you say there is a {c} figure?",
        "is anything in the picture {c}?",
    ),
    "lacks_colour": (
        "would you say nothing here is {c}?",
        "do you see nothing {c} here?",
        "is nothing in the picture {c}?",
        "is the picture without a {c} figure?",
    ),
    "has_shape": (
        "can you see a {s}?",
        "do you see any {s} here?",
        "would you say there is a {s}?",
        "is any figure in the picture a {s}?",
    ),
    "lacks_shape": (
        "would you say nothing here is a {s}?",
        "do you see no {s} here?",
        "is no figure in the picture a {s}?",
        "is the picture without a {s}?",
    ),
    "shape": ("name the figure you see", "which figure can you see here?", "tell me the kind of figure"),
    "shape_of_colour": (
        "tell me which kind of figure the {c} one is",
        "which figure is {c}?",
        "name the {c} figure",
    ),
    "colour": ("tell me the hue of the figure", "which hue can you see here?", "name the hue you see"),
    "colour_of_shape": (
        "which hue does the {s} have?",
        "name the hue of the {s}",
        "tell me which color the {s} has",
    ),
    "count": (
        "how many shapes are there?",
        "how many figures can you see here?",
        "what is the number of shapes in the image?",
    ),
    "count_colour": (
        "how many {c} shapes are there?",
        "how many {c} figures can you see here?",
        "what is the number of {c} shapes in the image?",
    ),
    "count_shape": (
        "how many {p} are there?",
        "how many {p} can you see here?",
        "what is the number of {p} in the image?",
    ),
    "side": ("is the shape on the left or right?", "on which side is the figure, left or right?"),
    "side_of_colour": (
        "is the {c} shape on the left or right?",
        "on which side is the {c} figure, left or right?",
    ),
    "side_of_shape": ("is the {s} on the left or right?", "on which side is the {s}, left or right?"),
    "height": ("is the shape at the top or bottom?", "at which end is the figure, top or bottom?"),
    "height_of_colour": (
        "is the {c} shape at the top or bottom?",
        "at which end is the {c} figure, top or bottom?",
    ),
    "height_of_shape": ("is the {s} at the top or bottom?", "at which end is the {s}, top or bottom?"),
}

NOVEL: dict[str, tuple[str, ...]] = {
    "has_colour": (
        "can you see anything {c} in the image?",
        "is there anything {c} here?",
        "do you see a {c} shape in the picture?",
    ),
    "lacks_colour": (
        "is there nothing {c} here?",
        "would you say there is no {c} shape?",
        "do you see no {c} figure in the picture?",
    ),
    "has_shape": (
        "can you see any {s} in the image?",
        "do you see a {s} in the picture?",
        "would you say the figure is a {s}?",
    ),
    "lacks_shape": (
        "is there no {s} here?",
        "would you say there is no {s}?",
        "do you see no {s} in the picture?",
    ),
    "shape": ("tell me which shape you see", "what kind of figure is present?", "name the shape in the picture"),
    "shape_of_colour": ("what kind of figure is the {c} one?", "tell me which shape is {c}"),
    "colour": ("tell me the color you see here", "which color has the figure?", "what is the hue of the shape?"),
    "colour_of_shape": ("what hue is the {s}?", "tell me the color of the {s}", "which color does the {s} have?"),
}


@dataclass(frozen=True, slots=True)
class Subject:
    """What a question is about; a field the phrasing does not name stays None."""

    colour: str | None = None
    shape: str | None = None


def phrase(template: str, subject: Subject) -> str:
    """Fill one phrasing. `{c}` colour, `{s}` shape, `{p}` the shape's plural.

    Raises:
        ValueError: the phrasing names a colour or shape that the subject lacks.
    """
    if "{c}" in template and subject.colour is None:
        raise ValueError(f"phrasing {template!r} asks about a colour, but the subject has none: {subject}")
    if ("{s}" in template or "{p}" in template) and subject.shape is None:
        raise ValueError(f"phrasing {template!r} asks about a shape, but the subject has none: {subject}")
    return template.format(c=subject.colour, s=subject.shape, p=PLURALS.get(subject.shape or ""))


def parse_easy(question: str) -> tuple[str, Subject]:
    """Recognise one of easy-VQA's own questions → (family, subject). The inverse of `phrase` over `EASY`.

    Raises:
        ValueError: no easy-VQA template matches.
    """
    words = question.rstrip("?").split()
    colour = next((w for w in words if w in EASY_COLOURS), None)
    shape = next((w for w in words if w in EASY_SHAPES), None)
    key = " ".join("{c}" if w == colour else "{s}" if w == shape else w for w in words) + "?"
    family = _EASY_FAMILY.get(key)
    if family is None:
        raise ValueError(f"no easy-VQA template matches {question!r}")
    return family, Subject(colour, shape)


_EASY_FAMILY = {template: family for family, templates in EASY.items() for template in templates}


def vocabulary() -> list[str]:
    """Every word that any phrasing or answer can hold, sorted: the tiny model's word list."""
    words: set[str] = {"?", ",", *ANSWERS, *PLURALS.values()}
    for phrasings in (EASY, SEEN, NOVEL):
        for templates in phrasings.values():
            for template in templates:
                words.update(split_words(template.replace("{c}", "").replace("{s}", "").replace("{p}", "")))
    return sorted(words)


def split_words(text: str) -> Sequence[str]:
    """Words as the tiny model's tokenizer splits them: at spaces, punctuation apart."""
    return text.replace("?", " ? ").replace(",", " , ").split()
