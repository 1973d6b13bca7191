"""Hashes that tell whether two pictures are the same, or nearly.

* exact: a digest of the decoded pixels, so that other compression without loss, other metadata or another name do not
  hide a copy;
* perceptual: the signs of 64 low frequencies of the picture's cosine transform against their median (Zauner,
  "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010). Scaling, recompression and small edits
  change few bits of it, so that pictures are compared by the number of bits that differ. It is blind to colour: a
  picture of 4 × 4 coloured cells goes with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from PIL import Image
from scipy.fft import dctn

_SIDE, _KEPT = 32, 8
_FLAT = 2.0
"""Grey levels of standard deviation below which a picture shows nothing (black, white, covered lens): such pictures
are all alike, and alike means nothing."""

_CELLS = 4
COLOURS = 3 * _CELLS**2
_SPREAD = 8.0
"""Levels of standard deviation between the cells of two pictures, up to which they have the same colours. Compression
stays below 2, a third more brightness below; the same shape in another colour, or elsewhere, is above."""

_CHUNKS, _BITS = 4, 16
_PAIRS = 1 << 22


@dataclass(frozen=True)
class ImageHash:
    """What a picture is compared by.

    Attributes:
        pixels: 64-bit digest of size and pixels.
        perceptual: 64-bit perceptual hash.
        colours: `COLOURS` bytes, the means of red, green and blue in 4 × 4 cells.
        flat: the picture shows nothing; neither hash identifies it.
    """

    pixels: int
    perceptual: int
    colours: bytes
    flat: bool


def image_hash(image: Image.Image) -> ImageHash:
    """The hashes of a decoded picture.

    Args:
        image: RGB, upright, as `scale_digrap.data.decode.ImageDecoder` gives it.
    """
    digest = hashlib.blake2b(f"{image.width} {image.height} ".encode(), digest_size=8)
    digest.update(image.tobytes())
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    # Without the first row and column: brightness and plain gradients say little.
    low = dctn(grey, norm="ortho")[1 : _KEPT + 1, 1 : _KEPT + 1]
    bits = np.packbits((low > np.median(low)).ravel())
    return ImageHash(
        pixels=int.from_bytes(digest.digest(), "big"),
        perceptual=int.from_bytes(bits.tobytes(), "big"),
        colours=image.resize((_CELLS, _CELLS), Image.Resampling.BOX).tobytes(),
        flat=bool(grey.std() < _FLAT),
    )


def same_colours(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Which pairs of pictures have the same colours in the same places, overall brightness apart.

    Args:
        first, second: `ImageHash.colours` as uint8 [pairs, COLOURS].

    Returns:
        bool [pairs].
    """
    return (first.astype(np.float32) - second.astype(np.float32)).std(axis=1) <= _SPREAD


class HammingIndex:
    """Hashes that can be searched by the number of bits in which they differ from others; exact, not approximate.

    Two hashes with at most `distance` different bits have, among their four 16-bit chunks, one with at most
    ``distance // 4`` (Norouzi, Punjani & Fleet, "Fast search in Hamming space with multi-index hashing", CVPR 2012).
    So a search looks up each chunk, and each value near it, in a table of 65,536 buckets.

    Args:
        hashes: uint64 [n].
        distance: largest number of different bits that counts as a match, 0 to 15.

    Raises:
        ValueError: `distance` out of range.
    """

    def __init__(self, hashes: np.ndarray, distance: int) -> None:
        if not 0 <= distance < _BITS:
            raise ValueError(f"distance must be 0 to {_BITS - 1} bits, got {distance}")
        self.hashes, self.distance = np.ascontiguousarray(hashes, dtype=np.uint64), distance
        self._tables = [self._table(chunk) for chunk in range(_CHUNKS)]
        self._masks = [
            sum(1 << bit for bit in bits)
            for flipped in range(distance // _CHUNKS + 1)
            for bits in combinations(range(_BITS), flipped)
        ]

    def search(self, queries: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All pairs within the distance.

        Args:
            queries: uint64 [m].

        Yields:
            (number of the query, number of the hash, bits that differ), int64 [pairs] each. A pair may come more than
            once.
        """
        queries = np.ascontiguousarray(queries, dtype=np.uint64)
        for chunk, (order, starts) in enumerate(self._tables):
            values = _chunk(queries, chunk)
            for mask in self._masks:
                probes = values ^ mask
                first, counts = starts[probes], starts[probes + 1] - starts[probes]
                for begin, end in _spans(counts):
                    repeats = counts[begin:end]
                    asked = np.repeat(np.arange(begin, end), repeats)
                    inside = np.arange(len(asked)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
                    found = order[np.repeat(first[begin:end], repeats) + inside]
                    different = np.bitwise_count(queries[asked] ^ self.hashes[found]).astype(np.int64)
                    near = different <= self.distance
                    if near.any():
                        yield asked[near], found[near], different[near]

    def _table(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the hashes ordered by one chunk, and where each value of it begins."""
        values = _chunk(self.hashes, chunk)
        order = np.argsort(values, kind="stable")
        return order, np.searchsorted(values[order], np.arange((1 << _BITS) + 1))


def _chunk(hashes: np.ndarray, chunk: int) -> np.ndarray:
    return ((hashes >> np.uint64(chunk * _BITS)) & np.uint64((1 << _BITS) - 1)).astype(np.int64)


def _spans(counts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Cut queries so that each part has a bounded number of pairs, or is a single query."""
    ends = np.cumsum(counts)
    begin, done = 0, 0
    while begin < len(counts):
        end = max(begin + 1, int(np.searchsorted(ends, done + _PAIRS, side="right")))
        if ends[end - 1] > done:
            yield begin, end
        begin, done = end, int(ends[end - 1])
