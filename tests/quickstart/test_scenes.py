"""Generated scenes: the picture shows what the scene says, and a second, word-based solver agrees with every answer."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from scale_digrap.quickstart.questions import (
    ANSWERS,
    COLOURS,
    EASY,
    KNOWN_COLOURS,
    NEW_COLOURS,
    NOVEL,
    QUESTION_TYPES,
    SEEN,
    SHAPES,
    Subject,
    parse_easy,
    phrase,
    split_words,
    vocabulary,
)
from scale_digrap.quickstart.scenes import MIN_CONTRAST, RGB, SIZE, ask, draw_scene, render


def scenes(number: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    for _ in range(number):
        scene = draw_scene(rng)
        pixels, coverage = render(scene, rng)
        yield scene, pixels, coverage, rng


def test_the_seed_decides_pictures_and_questions():
    def draw(seed):
        return [(scene.items, pixels.tobytes(), ask(scene, rng)) for scene, pixels, _, rng in scenes(20, seed)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_each_shape_is_painted_where_and_in_the_colour_the_scene_says():
    for scene, pixels, _, _ in scenes(300):
        assert pixels.shape == (SIZE, SIZE, 3)
        assert pixels.dtype == np.uint8
        for item in scene.items:
            if item.shape == "ring":  # its middle is background
                x, y = item.x + 0.375 * item.width, item.y
            else:
                x, y = item.x, item.y
            seen = pixels[min(SIZE - 1, int(y)), min(SIZE - 1, int(x))].astype(float)
            nearest = min(RGB, key=lambda name: np.linalg.norm(seen - RGB[name]))
            assert nearest == item.colour, (item, seen)


def test_coverage_is_the_area_of_the_shape():
    area = {
        "circle": lambda i: math.pi * i.width**2 / 4,
        "ring": lambda i: math.pi * i.width**2 * 3 / 16,
        "rectangle": lambda i: i.width * i.height,
        "triangle": lambda i: i.width * i.height / 2,
        "cross": lambda i: i.width**2 * 5 / 9,
    }
    checked = Counter()
    for scene, _, coverage, _ in scenes(300):
        assert coverage.shape == (len(scene.items), 16)
        for item, patches in zip(scene.items, coverage, strict=True):
            if item.shape in area:
                expected = area[item.shape](item)
                # Drawing rounds outlines to half or quarter pixels, inclusive of the border.
                border = 2 * (item.width + item.height)
                assert abs(patches.sum() - expected) < 0.5 * border + 2, (item, patches.sum(), expected)
                checked[item.shape] += 1
    assert set(checked) == set(area)


def test_shapes_stand_out_do_not_overlap_and_lie_inside():
    for scene, _, coverage, _ in scenes(300):
        for item in scene.items:
            for end in scene.background:
                assert np.linalg.norm(end - np.asarray(item.rgb)) >= MIN_CONTRAST
            assert 0 <= item.x <= SIZE
            assert 0 <= item.y <= SIZE
        for i, one in enumerate(scene.items):
            for other in scene.items[:i]:
                least = (min(one.width, one.height) + min(other.width, other.height)) / 2
                assert math.hypot(one.x - other.x, one.y - other.y) > least
        assert (coverage.sum(axis=0) <= 256 + 1e-3).all()


def solve(question: str, items) -> str:
    """Answers from the words alone, without the generator's families."""
    words = split_words(question)
    colour = next((w for w in words if w in COLOURS), None)
    plural = {shape + "s": shape for shape in SHAPES} | {"crosses": "cross"}
    shape = next((plural.get(w, w) for w in words if plural.get(w, w) in SHAPES), None)
    about = [i for i in items if colour in (None, i.colour) and shape in (None, i.shape)]
    if "many" in words or "number" in words:
        return str(len(about))
    if "left" in words or "top" in words:
        (item,) = about
        low, high = ("left", "right") if "left" in words else ("top", "bottom")
        return low if (item.x if low == "left" else item.y) < SIZE / 2 else high
    if words[0] in ("is", "does", "can", "do", "would"):
        negated = bool({"no", "not", "nothing", "without"} & set(words))
        return "yes" if bool(about) != negated else "no"
    wanted = "colour" if {"color", "hue"} & set(words) else "shape"
    (value,) = {getattr(item, wanted) for item in about}
    return value


def test_two_colours_of_easy_vqa_are_left_for_fine_tuning_to_teach():
    shown, named = set(), set()
    for scene, _, _, rng in scenes(600):
        shown |= {item.colour for item in scene.items}
        asked = ask(scene, rng)
        if asked is not None:
            named |= {word for word in (*split_words(asked.question), asked.answer) if word in COLOURS}
    assert shown == named == set(KNOWN_COLOURS)
    assert not set(NEW_COLOURS) & set(KNOWN_COLOURS)
    assert set(NEW_COLOURS) <= set(vocabulary()), "a colour that fine-tuning teaches needs a token"


def test_a_second_solver_agrees_with_every_answer():
    types, families, truths, counts = Counter(), Counter(), Counter(), Counter()
    for scene, _, _, rng in scenes(800, seed=1):
        for _ in range(8):
            asked = ask(scene, rng)
            assert solve(asked.question, scene.items) == asked.answer, (asked, scene.items)
            types[asked.question_type] += 1
            families[asked.family] += 1
            truths[asked.answer] += asked.question_type == "yes/no"
            counts[asked.answer] += asked.question_type == "count"
    assert set(types) == set(QUESTION_TYPES)
    assert set(families) == set(SEEN)
    assert min(types.values()) > 0.08 * sum(types.values())
    assert abs(truths["yes"] - truths["no"]) < 0.1 * (truths["yes"] + truths["no"])
    assert min(counts[number] for number in "0123") > 0.04 * types["count"]


@pytest.mark.parametrize("question_type", QUESTION_TYPES)
def test_a_question_type_can_be_asked_for(question_type):
    asked = [ask(scene, rng, question_type=question_type) for scene, _, _, rng in scenes(60)]
    found = [one for one in asked if one is not None]
    assert len(found) > 30
    assert {one.question_type for one in found} == {question_type}


def test_every_word_and_answer_is_in_the_vocabulary():
    words = set(vocabulary())
    assert set(ANSWERS) <= words
    for phrasings in (EASY, SEEN, NOVEL):
        for templates in phrasings.values():
            for template in templates:
                assert set(split_words(phrase(template, Subject("red", "cross")))) <= words


def test_phrasings_are_three_disjoint_sets_and_novel_ones_use_words_that_pretraining_shows():
    sets = [{t for templates in phrasings.values() for t in templates} for phrasings in (EASY, SEEN, NOVEL)]
    assert sum(map(len, sets)) == len(set.union(*sets))
    assert set(NOVEL) == set(EASY)  # easy-VQA's questions are the ones that get paraphrased
    known = {word for template in sets[0] | sets[1] for word in split_words(template)}
    assert {word for template in sets[2] for word in split_words(template)} <= known


def test_easy_vqa_phrasings_are_recognised_and_others_refused():
    for family, templates in EASY.items():
        for template in templates:
            subject = Subject("teal" if "{c}" in template else None, "triangle" if "{s}" in template else None)
            assert parse_easy(phrase(template, subject)) == (family, subject)
    with pytest.raises(ValueError, match="no easy-VQA template"):
        parse_easy("can you see a circle?")
    with pytest.raises(ValueError, match="colour"):
        phrase("is there a {c} shape?", Subject(shape="circle"))
