"""What a question and its pictures are known by: 64-bit digests, read from shards in blocks that ranks share.

A block's digests are a few dozen bytes a question, so that a training set of millions fits into memory although its
pictures do not. They depend on the shards alone and can be kept in a cache, block by block, so that a check which was
killed goes on where it was and the next one reads nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from scale_digrap.data.dataset import ShardDataset
from scale_digrap.data.decode import ImageDecoder
from scale_digrap.data.errors import SampleError
from scale_digrap.data.sample import VqaSample
from scale_digrap.data.urls import is_local
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.evaluation.image_hash import COLOURS, ImageHash, image_hash

BLOCK = 1024
"""Samples that a rank reads at a time."""
_REMEMBERED = 1 << 18
"""Pictures whose hashes are kept, for the other questions about them: about 100 MB."""
_VERSION = 2
"""Raised when the same samples would give other digests."""

_COCO = re.compile(r"(?:.*/)?(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})")
_EXTENSION = re.compile(r"\.(?:jpe?g|png|webp|bmp|gif|tiff?)$", re.IGNORECASE)
_BETWEEN_WORDS = re.compile(r"[\W_]+")


class CacheError(ScaleDigrapError):
    """A cache that cannot be written."""


@dataclass
class Fingerprints:
    """Of n samples in a row with m pictures. 0 stands for "has none".

    Attributes:
        ids: uint64 [n], of the question_id alone.
        questions: uint64 [n, 3], of the question_id together with the picture's id, with the question's text, and of
            the original question's id with the original picture's id. Ids of different data sets collide, so none of
            them counts alone.
        texts: uint64 [n, 2], of the normalised text together with the picture's id and with the original picture's.
        owners: int64 [m], the sample that each picture belongs to.
        pixels, perceptual: uint64 [m], see `ImageHash`.
        colours: uint8 [m, COLOURS], see `ImageHash`.
        flat: bool [m], pictures that show nothing.
        unreadable: int64 [n], 1 where a sample or a picture of it could not be decoded.
    """

    ids: np.ndarray
    questions: np.ndarray
    texts: np.ndarray
    owners: np.ndarray
    pixels: np.ndarray
    perceptual: np.ndarray
    colours: np.ndarray
    flat: np.ndarray
    unreadable: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def pictures(self, chosen: np.ndarray) -> Fingerprints:
        """The same samples with some of their pictures: bool [m]."""
        names = ("owners", "pixels", "perceptual", "colours", "flat")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})

    @classmethod
    def join(cls, parts: Sequence[tuple[int, Fingerprints]]) -> Fingerprints:
        """Several as one. Each comes with the number of its first sample, and `owners` become numbers like that."""
        moved = [replace(part, owners=part.owners + start) for start, part in parts] or [cls.empty()]
        return cls(*(np.concatenate([getattr(part, one.name) for part in moved]) for one in fields(cls)))

    @classmethod
    def empty(cls) -> Fingerprints:
        words, numbers = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        wide = words.reshape
        colours = np.zeros((0, COLOURS), np.uint8)
        return cls(words, wide(0, 3), wide(0, 2), numbers, words, words, colours, np.zeros(0, bool), numbers)


def read_blocks(
    dataset: ShardDataset,
    *,
    rank: int,
    ranks: int,
    images: bool = True,
    workers: int = 0,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Fingerprints]]:
    """A rank's share of a data set, block by block.

    Args:
        dataset: of which only the encoded pictures are read; its decoder is replaced.
        rank, ranks: this reader among all.
        images: whether pictures are hashed.
        workers: threads that decode and hash; 0 does it in the calling one.
        cache_dir: where blocks are kept.
        progress: called with (blocks done, blocks of this rank).

    Yields:
        (first sample of the block, its fingerprints).

    Raises:
        CacheError: the cache cannot be written.
        ShardDamage, ReadError: see `ShardDataset.sample`.
    """
    dataset.decoder = _undecoded  # type: ignore[assignment]
    cache = None if cache_dir is None else _Cache(Path(cache_dir) / _identity(dataset, images))
    blocks = -(-len(dataset) // BLOCK)
    # In a row, so that a host fetches only its part of remote shards.
    starts = [BLOCK * number for number in range(blocks * rank // ranks, blocks * (rank + 1) // ranks)]
    hashes = _ImageHashes(workers)
    for done, start in enumerate(starts, start=1):
        block = cache.load(start) if cache is not None else None
        if block is None:
            block = _block(dataset, range(start, min(start + BLOCK, len(dataset))), hashes if images else None)
            if cache is not None:
                cache.save(start, block)
        yield start, block
        if progress is not None:
            progress(done, len(starts))


def question_text(text: str) -> str:
    """A question without case, punctuation and extra spaces."""
    return _BETWEEN_WORDS.sub(" ", text.casefold()).strip()


def image_key(value: Any) -> str:
    """A picture's id such that the forms that data sets write it in are equal; "" for none.

    COCO's numbers are equal as number, as ``000000262148`` and as ``val2014/COCO_val2014_000000262148.jpg``. Other
    strings count as they are, without a picture's extension: Visual Genome's "262148" is not COCO's 262148.
    """
    if value is None or value == "":
        return ""
    if isinstance(value, (list, tuple)):
        return "+".join(image_key(one) for one in value)
    if isinstance(value, int):
        return f"number {value}"
    name = _EXTENSION.sub("", str(value))
    coco = _COCO.fullmatch(name)
    return f"number {int(coco.group(1))}" if coco else f"name {name}"


def _block(dataset: ShardDataset, numbers: range, hashes: _ImageHashes | None) -> Fingerprints:
    count = len(numbers)
    ids, unreadable = np.zeros(count, np.uint64), np.zeros(count, np.int64)
    questions, texts = np.zeros((count, 3), np.uint64), np.zeros((count, 2), np.uint64)
    owners: list[int] = []
    pictures: list[bytes] = []
    for row, number in enumerate(numbers):
        try:
            sample = dataset[number]
        except SampleError:
            unreadable[row] = 1
            continue
        ids[row], questions[row], texts[row] = _question(sample)
        for image in sample.images if hashes is not None else ():
            assert isinstance(image, bytes)
            owners.append(row)
            pictures.append(image)
    found = hashes(pictures) if hashes is not None else []
    for owner, one in zip(owners, found, strict=True):
        if one is None:
            unreadable[owner] = 1
    good = [(owner, one) for owner, one in zip(owners, found, strict=True) if one is not None]
    return Fingerprints(
        ids,
        questions,
        texts,
        np.array([owner for owner, _ in good], np.int64),
        np.array([one.pixels for _, one in good], np.uint64),
        np.array([one.perceptual for _, one in good], np.uint64),
        np.frombuffer(b"".join(one.colours for _, one in good), np.uint8).reshape(-1, COLOURS),
        np.array([one.flat for _, one in good], bool),
        unreadable,
    )


def _question(sample: VqaSample) -> tuple[int, list[int], list[int]]:
    """`Fingerprints.ids`, `questions` and `texts` of one sample."""
    extra: Mapping[str, Any] = sample.extra
    text, image = question_text(sample.question), image_key(extra.get("image_id"))
    original_id = str(extra.get("original_question_id") or "")
    original_image = image_key(extra.get("original_image_id")) if "original_image_id" in extra else image
    same = [
        _digest("image", sample.question_id, image) if image else 0,
        _digest("text", sample.question_id, text) if text else 0,
        _digest("image", original_id, original_image) if original_id and original_image else 0,
    ]
    asked = [
        _digest("asked", text, image) if text and image else 0,
        _digest("asked", text, original_image) if text and original_image not in ("", image) else 0,
    ]
    return _digest("id", sample.question_id), same, asked


def _digest(*parts: str) -> int:
    text = "\0".join(parts).encode("utf-8", "surrogatepass")  # an image_id may hold anything
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") or 1


def _undecoded(data: bytes) -> bytes:
    """In place of the decoder: the bytes as they are stored."""
    return data


class _ImageHashes:
    """Encoded pictures → hashes; a picture that several questions are about is decoded once."""

    def __init__(self, workers: int) -> None:
        self._decode = ImageDecoder()
        self._known: dict[bytes, ImageHash | None] = {}
        self._workers = workers

    def __call__(self, pictures: list[bytes]) -> list[ImageHash | None]:
        """One hash each, None for pictures that cannot be decoded."""
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        names = [hashlib.blake2b(picture, digest_size=16).digest() for picture in pictures]
        new = {name: picture for name, picture in zip(names, pictures, strict=True) if name not in self._known}
        if self._workers > 1:  # PIL, hashlib and numpy let go of the interpreter's lock
            with ThreadPoolExecutor(self._workers) as pool:
                self._known |= dict(zip(new, pool.map(self._hash, new.values()), strict=True))
        else:
            self._known |= {name: self._hash(picture) for name, picture in new.items()}
        return [self._known[name] for name in names]

    def _hash(self, picture: bytes) -> ImageHash | None:
        try:
            return image_hash(self._decode(picture))
        except SampleError:
            return None


def _identity(dataset: ShardDataset, images: bool) -> str:
    """Changes when the samples, or what is taken from them, change."""
    shards = []
    for number, (url, entry) in enumerate(zip(dataset.urls, dataset.entries, strict=True)):
        seen = os.stat(url).st_mtime_ns if is_local(url) else dataset.name(number)
        shards.append([entry.layout, entry.bytes, entry.sha256, seen])
    head = [_VERSION, BLOCK, images, dataset.classes, dataset.class_question, shards]
    return hashlib.blake2b(json.dumps(head).encode(), digest_size=12).hexdigest()


class _Cache:
    """Blocks in files of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, start: int) -> Fingerprints | None:
        """A block; None where it is not there, or not whole."""
        try:
            with np.load(self._path(start), allow_pickle=False) as data:
                return Fingerprints(**{one.name: data[one.name] for one in fields(Fingerprints)})
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None

    def save(self, start: int, block: Fingerprints) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        except OSError as error:
            raise CacheError(
                f"cache_dir={str(self.folder.parent)!r} cannot be written: {error.strerror}; name another folder"
            ) from None
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.savez(file, **{one.name: getattr(block, one.name) for one in fields(Fingerprints)})
            os.replace(partial, self._path(start))
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:010d}.npz"
