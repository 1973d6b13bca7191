from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from scale_digrap.evaluation.image_hash import COLOURS, HammingIndex, image_hash, same_colours
from tests.evaluation.test_leakage import scene


def slow_hash(image: Image.Image) -> int:
    """The perceptual hash from its definition: sums of cosines, bit by bit."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
    waves = np.array([[math.cos(math.pi * u * (2 * x + 1) / 64) for x in range(32)] for u in range(1, 9)])
    low = [float(waves[u] @ grey @ waves[v]) for u in range(8) for v in range(8)]
    median = sorted(low)[31] / 2 + sorted(low)[32] / 2
    value = 0
    for one in low:
        value = 2 * value + (one > median)
    return value


def recompressed(image: Image.Image, kind: str, **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(buffer).convert("RGB")


def distance(a: Image.Image, b: Image.Image) -> int:
    return (image_hash(a).perceptual ^ image_hash(b).perceptual).bit_count()


def test_the_perceptual_hash_is_its_definition():
    for seed in range(8):
        assert image_hash(scene(seed)).perceptual == slow_hash(scene(seed))


def test_what_keeps_pixels_keeps_the_exact_hash_and_what_changes_little_keeps_the_perceptual_one():
    for seed in range(12):
        picture = scene(seed, (160, 120))
        same = [recompressed(picture, "PNG"), recompressed(picture, "WEBP", lossless=True)]
        assert {image_hash(one).pixels for one in same} == {image_hash(picture).pixels}
        changed = [
            recompressed(picture, "JPEG", quality=60),
            picture.resize((80, 60), Image.Resampling.LANCZOS),
            picture.point(lambda value: min(255, int(value * 1.1))),
        ]
        for one in changed:
            assert image_hash(one).pixels != image_hash(picture).pixels
            assert distance(one, picture) <= 4
            assert alike(one, picture)
    # Size is part of the exact hash: the same bytes as 2 × 3 and as 3 × 2 pixels are other pictures.
    assert image_hash(Image.new("RGB", (2, 3))).pixels != image_hash(Image.new("RGB", (3, 2))).pixels


def test_the_same_shapes_in_other_colours_are_other_pictures():
    def drawing(colour: str, x: int = 20) -> Image.Image:
        picture = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(picture).ellipse((x, 20, x + 24, 44), fill=colour)
        return picture

    assert distance(drawing("green"), drawing("#008080")) <= 4  # to the perceptual hash, nearly the same grey
    assert not alike(drawing("green"), drawing("#008080"))
    assert not alike(drawing("red"), drawing("blue"))
    assert alike(drawing("red"), recompressed(drawing("red"), "JPEG", quality=80))


def alike(a: Image.Image, b: Image.Image) -> bool:
    colours = [np.frombuffer(image_hash(one).colours, np.uint8)[None] for one in (a, b)]
    assert colours[0].shape == (1, COLOURS)
    return bool(same_colours(*colours)[0])


def test_different_pictures_are_far_apart():
    hashes = [image_hash(scene(seed)).perceptual for seed in range(60)]
    assert min((a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]) > 10


def test_pictures_that_show_nothing():
    rng = np.random.default_rng(0)
    assert image_hash(Image.new("RGB", (64, 64), (9, 9, 9))).flat
    assert image_hash(Image.fromarray(rng.integers(100, 103, (64, 64, 3), dtype=np.uint8))).flat
    assert not image_hash(scene(0)).flat


@pytest.mark.parametrize("bits", [0, 1, 3, 4, 7, 8])
def test_the_search_finds_what_comparing_all_pairs_finds(bits: int):
    rng = np.random.default_rng(bits)
    hashes = rng.integers(0, 2**64, 400, dtype=np.uint64)
    queries = rng.integers(0, 2**64, 300, dtype=np.uint64)
    for number in range(150):  # neighbours at every distance up to 10, and equal hashes
        flips = rng.choice(64, size=number % 11, replace=False)
        mask = np.uint64(sum(1 << int(flip) for flip in flips))
        queries[number] = hashes[number % 40] ^ mask
    hashes[-20:] = hashes[:20]
    hashes[100:140] = np.arange(40, dtype=np.uint64)  # a crowded bucket
    found = {}
    for asked, own, different in HammingIndex(hashes, bits).search(queries):
        found |= dict(zip(zip(asked.tolist(), own.tolist(), strict=True), different.tolist(), strict=True))
    pairs = np.bitwise_count(queries[:, None] ^ hashes[None, :])
    expected = {(int(i), int(j)): int(pairs[i, j]) for i, j in np.argwhere(pairs <= bits)}
    assert found == expected
    assert len(expected) > 20


def test_a_search_in_parts_finds_the_same(monkeypatch):
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 1 << 20, 500).astype(np.uint64)  # three of four chunks the same: buckets of hundreds
    whole = sorted(_pairs(HammingIndex(hashes, 2).search(hashes)))
    monkeypatch.setattr("scale_digrap.evaluation.image_hash._PAIRS", 700)
    parts = list(HammingIndex(hashes, 2).search(hashes))
    assert max(len(asked) for asked, _, _ in parts) <= 700
    assert sorted(_pairs(parts)) == whole
    assert len(whole) > 500


def _pairs(parts) -> list[tuple[int, int, int]]:
    return [triple for part in parts for triple in zip(*(column.tolist() for column in part), strict=True)]


def test_nothing_to_search():
    assert list(HammingIndex(np.zeros(0, np.uint64), 4).search(np.arange(3, dtype=np.uint64))) == []
    assert list(HammingIndex(np.arange(3, dtype=np.uint64), 4).search(np.zeros(0, np.uint64))) == []
    with pytest.raises(ValueError, match="distance must be 0 to 15"):
        HammingIndex(np.zeros(1, np.uint64), 16)
