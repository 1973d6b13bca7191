"""Generated pictures of coloured shapes with questions: what the tiny base model is pre-trained on.

Wider than easy-VQA's distribution in all but one respect: one to three shapes out of six (easy-VQA: one out of three),
rotated or upright, on light, mid, dark, gradient and noisy backgrounds (easy-VQA: plain light ones), asked about in
more phrasings and about more than easy-VQA asks: how many there are, and where. Two of easy-VQA's eight colours are
never shown or named, so that fine-tuning has something to teach.

A scene is drawn in two steps so that tests and labels need no pixels: `draw_scene` decides what is in it, `render`
paints it. Both take all their randomness from one `numpy` generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from scale_digrap.quickstart.questions import EASY, KNOWN_COLOURS, SEEN, SHAPES, TYPE_OF_FAMILY, Subject, phrase

SIZE = 64
"""Side of a picture in pixels; easy-VQA's own."""

RGB = {
    "gray": (128, 128, 128),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "black": (0, 0, 0),
    "purple": (128, 0, 128),
    "pink": (255, 105, 180),
}
MIN_CONTRAST = 90.0
"""Euclidean RGB distance below which a shape could not be told from its background (or its colour from another)."""

_SIDE_MARGIN = 5.0
"""Position is asked only about shapes whose centre is at least this many pixels from the dividing line."""


@dataclass(frozen=True, slots=True)
class Item:
    """One shape: centre (x, y), width and height in pixels before rotation, `angle` in radians, outline points."""

    shape: str
    colour: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    width: float
    height: float
    angle: float


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows: its items and its background (two RGB ends, a gradient angle or None, noise σ)."""

    items: tuple[Item, ...]
    background: tuple[np.ndarray, np.ndarray]
    gradient_angle: float | None
    noise: float


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with its one-word answer."""

    family: str
    question: str
    answer: str

    @property
    def question_type(self) -> str:
        return TYPE_OF_FAMILY[self.family]


def draw_scene(rng: np.random.Generator) -> Scene:
    """Decide a random scene.

    Half of the scenes hold one shape; with several, colours and shapes repeat often enough for counts above one.
    """
    wanted = int(rng.choice(3, p=(0.5, 0.27, 0.23))) + 1
    shapes = [SHAPES[i] for i in rng.integers(len(SHAPES), size=wanted)]
    colours = [KNOWN_COLOURS[i] for i in rng.integers(len(KNOWN_COLOURS), size=wanted)]
    if wanted > 1 and rng.random() < 0.3:
        shapes[1] = shapes[0]
    if wanted > 1 and rng.random() < 0.3:
        colours[-1] = colours[0]

    placed: list[tuple[float, float, float]] = []
    items = []
    for shape, colour in zip(shapes, colours, strict=True):
        item = _place(rng, shape, colour, placed, alone=wanted == 1)
        if item is not None:
            items.append(item)
    background, gradient_angle, noise = _draw_background(rng, [item.rgb for item in items])
    return Scene(tuple(items), background, gradient_angle, noise)


def _place(
    rng: np.random.Generator, shape: str, colour: str, placed: list[tuple[float, float, float]], *, alone: bool
) -> Item | None:
    """A random item that overlaps none of the `placed` (x, y, radius); None when no free spot is found."""
    smallest = 9.0 if shape in ("circle", "rectangle", "triangle") else 13.0
    for attempt in range(24):
        largest = 34.0 if alone else max(24.0 - attempt, smallest + 1.0)
        width = rng.uniform(smallest, largest)
        if shape == "rectangle":
            height = rng.uniform(smallest, largest)
        elif shape == "triangle":
            height = width * rng.uniform(0.8, 1.1)
        else:
            height = width
        angle = 0.0 if shape in ("circle", "ring") or rng.random() < 0.5 else rng.uniform(0.0, 2.0 * math.pi)
        outline = _outline(shape, width, height, angle)
        reach_x, reach_y = (width / 2, height / 2) if outline is None else np.abs(outline).max(axis=0)
        x = rng.uniform(reach_x, SIZE - reach_x)
        y = rng.uniform(reach_y, SIZE - reach_y)
        radius = math.hypot(reach_x, reach_y) if shape == "rectangle" else max(reach_x, reach_y)
        if all(math.hypot(x - px, y - py) > radius + pr + 1.0 for px, py, pr in placed):
            placed.append((x, y, radius))
            jitter = rng.normal(0.0, 8.0, size=3) if rng.random() < 0.6 else np.zeros(3)
            rgb = np.clip(np.asarray(RGB[colour]) + jitter, 0, 255).astype(int)
            return Item(shape, colour, (int(rgb[0]), int(rgb[1]), int(rgb[2])), x, y, width, height, angle)
    return None


def _draw_background(
    rng: np.random.Generator, shape_colours: list[tuple[int, int, int]]
) -> tuple[tuple[np.ndarray, np.ndarray], float | None, float]:
    """Background ends, gradient angle, noise σ, such that every shape's colour stands out from both ends."""
    tone = rng.choice(3, p=(0.5, 0.2, 0.3))
    low, high = ((228, 256), (60, 228), (15, 115))[tone]
    gradient_angle = rng.uniform(0.0, 2.0 * math.pi) if rng.random() < 0.2 else None
    noise = rng.uniform(3.0, 22.0) if rng.random() < (0.3, 0.4, 0.6)[tone] else 0.0

    def end() -> np.ndarray:
        for _ in range(60):
            colour = rng.uniform(low, high, size=3)
            if all(np.linalg.norm(colour - rgb) >= MIN_CONTRAST for rgb in shape_colours):
                return colour
        return rng.uniform(228, 256, size=3)  # every palette colour stands out from a light background

    first = end()
    return (first, first if gradient_angle is None else end()), gradient_angle, noise


_STAR = np.array(
    [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k in range(10) for r in [(1.0, 0.42)[k % 2]]]
)
_CROSS = np.array(
    [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]
) * (1.0 / 3.0)
_RECTANGLE = np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])
_TRIANGLE = np.array([(0.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])
_POLYGONS = {"star": _STAR, "cross": _CROSS, "rectangle": _RECTANGLE, "triangle": _TRIANGLE}


def _outline(shape: str, width: float, height: float, angle: float) -> np.ndarray | None:
    """Corner points [n, 2] about the item's centre in pixels; None for the round shapes."""
    unit = _POLYGONS.get(shape)
    if unit is None:
        return None
    points = unit * (width / 2.0, height / 2.0)
    if angle:
        cos, sin = math.cos(angle), math.sin(angle)
        points = points @ np.array([(cos, sin), (-sin, cos)])
    return points


def _alpha(item: Item, supersample: int) -> tuple[np.ndarray, int, int]:
    """Coverage of each pixel by the item, in [0, 1], with the window's left and top."""
    outline = _outline(item.shape, item.width, item.height, item.angle)
    reach_x, reach_y = (item.width / 2, item.height / 2) if outline is None else np.abs(outline).max(axis=0)
    left, top = max(0, math.floor(item.x - reach_x)), max(0, math.floor(item.y - reach_y))
    right, bottom = min(SIZE, math.ceil(item.x + reach_x)), min(SIZE, math.ceil(item.y + reach_y))
    k = supersample
    window = Image.new("L", ((right - left) * k, (bottom - top) * k))
    pen = ImageDraw.Draw(window)
    cx, cy = (item.x - left) * k, (item.y - top) * k
    if outline is None:
        for radius, ink in ((item.width / 2 * k, 255), (item.width / 4 * k, 0)):
            pen.ellipse((cx - radius, cy - radius, cx + radius - 1, cy + radius - 1), fill=ink)
            if item.shape == "circle":
                break
    else:
        pen.polygon([(cx + dx * k, cy + dy * k) for dx, dy in outline.tolist()], fill=255)
    return np.asarray(window.reduce(k), dtype=np.float32) / 255.0, left, top


def render(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paint a scene.

    Returns:
        The picture, uint8 [64, 64, 3], and the items' coverage of each 16×16 patch in pixels, float32 [items, 16].
    """
    first, second = scene.background
    if scene.gradient_angle is None:
        canvas = np.empty((SIZE, SIZE, 3), dtype=np.float32)
        canvas[:] = first
    else:
        ramp = _RAMP_X * math.cos(scene.gradient_angle) + _RAMP_Y * math.sin(scene.gradient_angle)
        ramp = ((ramp + 1.0) / 2.0)[..., None]
        canvas = (first * (1.0 - ramp) + second * ramp).astype(np.float32)
    if scene.noise:
        canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(scene.noise)

    coverage = np.zeros((len(scene.items), 16), dtype=np.float32)
    supersample = 2 if rng.random() < 0.5 else 4  # easy-VQA's coarse anti-aliasing, and a finer one
    for index, item in enumerate(scene.items):
        alpha, left, top = _alpha(item, supersample)
        height, width = alpha.shape
        window = canvas[top : top + height, left : left + width]
        window += alpha[..., None] * (np.asarray(item.rgb, dtype=np.float32) - window)
        full = np.zeros((SIZE, SIZE), dtype=np.float32)
        full[top : top + height, left : left + width] = alpha
        coverage[index] = full.reshape(4, 16, 4, 16).sum(axis=(1, 3)).reshape(16)
    return np.clip(canvas, 0, 255).astype(np.uint8), coverage


_RAMP_Y, _RAMP_X = np.mgrid[-1.0 : 1.0 : SIZE * 1j, -1.0 : 1.0 : SIZE * 1j]

_FAMILY_GROUPS = {
    "yes/no": ("has_colour", "lacks_colour", "has_shape", "lacks_shape"),
    "shape": ("shape", "shape_of_colour"),
    "colour": ("colour", "colour_of_shape"),
    "count": ("count", "count_colour", "count_shape"),
    "position": ("side", "side_of_colour", "side_of_shape", "height", "height_of_colour", "height_of_shape"),
}
_GROUP_NAMES = tuple(_FAMILY_GROUPS)
_TRIES = 24
_GROUP_WEIGHTS = np.cumsum((0.36, 0.16, 0.16, 0.16, 0.16))


def ask(
    scene: Scene, rng: np.random.Generator, *, question_type: str | None = None, easy_share: float = 0.5
) -> Asked | None:
    """A random question that the scene answers unambiguously.

    Args:
        scene: what is shown.
        rng: the only source of randomness.
        question_type: one of `questions.QUESTION_TYPES`, or None for a random one.
        easy_share: probability of easy-VQA's own phrasing where the family has one.

    Returns:
        The question; None when this scene answers none of the asked type (never for a random or a yes/no type).
    """
    for _ in range(_TRIES if question_type is not None else _TRIES * _TRIES):
        group = question_type or _GROUP_NAMES[int(np.searchsorted(_GROUP_WEIGHTS, rng.random()))]
        families = _FAMILY_GROUPS[group]
        family = families[int(rng.integers(len(families)))]
        solved = _SOLVERS[group](scene, family, rng)
        if solved is None:
            continue  # not answerable about this scene (two red shapes: which one is "the red shape"?)
        subject, answer = solved
        wordings = EASY[family] if family in EASY and rng.random() < easy_share else SEEN[family]
        return Asked(family, phrase(wordings[int(rng.integers(len(wordings)))], subject), answer)
    return None


def _choose(rng: np.random.Generator, values: list[str] | tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]


def _solve_yes_no(scene: Scene, family: str, rng: np.random.Generator) -> tuple[Subject, str]:
    about_colour = family.endswith("colour")
    shown = [item.colour if about_colour else item.shape for item in scene.items]
    # Present and absent subjects alternate, or "no" would be the answer nine times out of ten.
    exists = rng.random() < 0.5
    everything = KNOWN_COLOURS if about_colour else SHAPES
    name = _choose(rng, shown) if exists else _choose(rng, [v for v in everything if v not in shown])
    answer = "yes" if exists == family.startswith("has") else "no"
    return (Subject(colour=name) if about_colour else Subject(shape=name)), answer


def _solve_attribute(scene: Scene, family: str, rng: np.random.Generator) -> tuple[Subject, str] | None:
    item = scene.items[int(rng.integers(len(scene.items)))]
    if family in ("shape", "colour"):
        values = {getattr(other, family) for other in scene.items}
        return (Subject(item.colour, item.shape), values.pop()) if len(values) == 1 else None
    if family == "shape_of_colour":
        values = {other.shape for other in scene.items if other.colour == item.colour}
    else:
        values = {other.colour for other in scene.items if other.shape == item.shape}
    return (Subject(item.colour, item.shape), values.pop()) if len(values) == 1 else None


def _solve_count(scene: Scene, family: str, rng: np.random.Generator) -> tuple[Subject, str]:
    if family == "count":
        return Subject(), str(len(scene.items))
    about_colour = family == "count_colour"
    shown = [item.colour if about_colour else item.shape for item in scene.items]
    name = _choose(rng, shown) if rng.random() < 0.75 else _choose(rng, KNOWN_COLOURS if about_colour else SHAPES)
    return (Subject(colour=name) if about_colour else Subject(shape=name)), str(shown.count(name))


def _solve_position(scene: Scene, family: str, rng: np.random.Generator) -> tuple[Subject, str] | None:
    item = scene.items[int(rng.integers(len(scene.items)))]
    if family.endswith("_of_colour"):
        same = [other for other in scene.items if other.colour == item.colour]
    elif family.endswith("_of_shape"):
        same = [other for other in scene.items if other.shape == item.shape]
    else:
        same = list(scene.items)
    offset = (item.x if family.startswith("side") else item.y) - SIZE / 2
    if len(same) != 1 or abs(offset) < _SIDE_MARGIN:
        return None
    names = ("left", "right") if family.startswith("side") else ("top", "bottom")
    return Subject(item.colour, item.shape), names[offset > 0]


_SOLVERS = {
    "yes/no": _solve_yes_no,
    "shape": _solve_attribute,
    "colour": _solve_attribute,
    "count": _solve_count,
    "position": _solve_position,
}
