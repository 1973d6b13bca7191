"""easy-VQA: what the answers tell about a picture is what its pixels show; the shifts keep it."""

from __future__ import annotations

import sys
from collections import Counter
from functools import lru_cache

import numpy as np
import pytest

pytest.importorskip("easy_vqa")

from scale_digrap.quickstart import easyvqa
from scale_digrap.quickstart.questions import EASY, EASY_COLOURS, EASY_SHAPES, NOVEL, SEEN, TYPE_OF_FAMILY, split_words
from scale_digrap.quickstart.scenes import RGB

EASY_RGB = {name: RGB[name] for name in EASY_COLOURS}


def plain_background(pixels: np.ndarray) -> np.ndarray:
    """The commonest colour along the border: no shape touches most of it."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.array(Counter(map(tuple, border.tolist())).most_common(1)[0][0], dtype=np.uint8)


def read_pixels(pixels: np.ndarray) -> tuple[str, str]:
    """(shape, colour) of a published easy-VQA picture from its pixels alone."""
    flat = pixels.reshape(-1, 3)
    background = plain_background(pixels)
    exact = {name: int((flat == np.asarray(rgb)).all(axis=1).sum()) for name, rgb in EASY_RGB.items()}
    colour = max(exact, key=exact.get)
    full = np.asarray(EASY_RGB[colour], dtype=float) - background
    alpha = (((pixels - background.astype(float)) @ full) / (full @ full)).clip(0, 1)
    # Extents to a fraction of a pixel: a rectangle fills its box, a circle π/4 of it, a triangle half.
    filled = alpha.sum() / (alpha.max(axis=0).sum() * alpha.max(axis=1).sum())
    return ("triangle" if filled < 0.65 else "circle" if filled < 0.9 else "rectangle"), colour


@lru_cache
def test_images():
    return easyvqa.load("test").images


test_images.__test__ = False


def test_shape_and_colour_recovered_from_answers_are_those_in_the_pixels():
    images = test_images()
    assert len(images) > 800
    for image in images:
        assert read_pixels(easyvqa.load_pixels(image)) == (image.shape, image.colour), image.path


def test_nothing_is_dropped_silently():
    import easy_vqa

    for split in ("train", "test"):
        loaded = easyvqa.load(split)
        paths = getattr(easy_vqa, f"get_{split}_image_paths")()
        assert len(loaded.images) + loaded.unknown == len(paths)
        assert loaded.unknown < 0.13 * len(paths)


def test_tied_pictures_agree_with_every_question_about_them():
    """Checked on the raw question texts, not on what the module recovered."""
    tied = [image for image in easyvqa.load("train").images if image.tied]
    assert 1000 < len(tied) < 1500
    assert {image.shape for image in tied} == set(EASY_SHAPES)
    assert {image.colour for image in tied} == set(EASY_COLOURS)
    for image in tied:
        for question in image.questions:
            words = split_words(question.text)
            if words[0] != "what":
                continue
            if question.answer in EASY_SHAPES:
                colour = next((w for w in words if w in EASY_COLOURS), image.colour)
                assert easyvqa.TIES[colour] == question.answer
            else:
                shape = next((w for w in words if w in EASY_SHAPES), image.shape)
                assert easyvqa.TIES[question.answer] == shape


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    easyvqa.load.cache_clear()
    with pytest.raises(easyvqa.EasyVqaError, match=r"pip install 'easy-vqa>=1\.0'"):
        easyvqa.load("test")


def test_paraphrases_keep_the_subject_and_use_no_wording_of_easy_vqa():
    rng = np.random.default_rng(0)
    own = {question.text for image in test_images() for question in image.questions}
    kinds, families = set(), set()
    for image in test_images()[:150]:
        for question in image.questions:
            text, kind = easyvqa.paraphrase(question, rng)
            assert text not in own
            mentioned = {w for w in split_words(text) if w in EASY_COLOURS or w in EASY_SHAPES}
            expected = {w for w in split_words(question.text) if w in EASY_COLOURS or w in EASY_SHAPES}
            assert mentioned == expected, (question.text, text)
            kinds.add(kind)
            families.add(question.family)
    assert kinds == {"seen", "novel"}
    assert families == set(EASY) == set(NOVEL) <= set(SEEN) <= set(TYPE_OF_FAMILY)


def test_vision_shift_keeps_the_shape_s_pixels_and_darkens_the_rest():
    for index, image in enumerate(test_images()[:200]):
        before = easyvqa.load_pixels(image)
        after = np.asarray(easyvqa.shift_vision(image, np.random.default_rng(index)))
        again = np.asarray(easyvqa.shift_vision(image, np.random.default_rng(index)))
        np.testing.assert_array_equal(after, again)

        inside = (before == np.asarray(RGB[image.colour])).all(axis=2)
        turned = [np.rot90(inside, k) for k in (1, 2, 3)]
        kept = [bool((np.abs(after[mask].astype(int) - RGB[image.colour]) <= 1).all()) for mask in turned]
        assert any(kept), image.path
        outside = np.rot90((before == plain_background(before)).all(axis=2), 1 + kept.index(True))
        background = after[outside].astype(float)
        assert background.mean() < 125
        assert 8 < background.std(axis=0).mean() < 20
        assert np.linalg.norm(background.mean(axis=0) - RGB[image.colour]) > 80
