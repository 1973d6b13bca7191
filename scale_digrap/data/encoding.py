"""The pictures of records: read, checked, made smaller where asked, by several processes, in order."""

from __future__ import annotations

import io
import os
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from scale_digrap.data import limits
from scale_digrap.data.decode import ImageDecoder, orientation, to_rgb, upright, without_metadata
from scale_digrap.data.errors import SampleError
from scale_digrap.data.shards import ShardWriteError, image_extension, image_fields
from scale_digrap.data.sources.records import Record
from scale_digrap.data.written import WriteOptions

_CHUNK = 8
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_DECODER = ImageDecoder()
MISSING = "no such file"


@dataclass(frozen=True)
class Unreadable:
    """A picture that cannot be stored, and why."""

    image: str
    reason: str


@dataclass(frozen=True)
class Encoded:
    """A record and its fields (extension → bytes), or why it has none."""

    record: Record
    result: dict[str, bytes] | Unreadable


def encode_all(
    records: Iterator[Record], options: WriteOptions, missing: frozenset[str], workers: int
) -> Iterator[Encoded]:
    """Encode records in order.

    Args:
        records: their pictures are read here.
        options: how.
        missing: pictures that are known not to exist.
        workers: processes; 0 works in this one. At most four chunks per process wait, so memory stays bounded.

    Raises:
        BrokenProcessPool: a process died.
    """
    if workers <= 0:
        for record in records:
            yield Encoded(record, encode_record(record, options, missing))
        return
    waiting: deque[tuple[list[Record], Future[list[dict[str, bytes] | Unreadable]]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        try:
            more = True
            while more or waiting:
                while more and len(waiting) < 4 * workers:
                    chunk = [record for _, record in zip(range(_CHUNK), records, strict=False)]
                    more = len(chunk) == _CHUNK
                    if chunk:
                        here = missing.intersection(image for record in chunk for image in record.images)
                        waiting.append((chunk, pool.submit(_encode_chunk, chunk, options, here)))
                if waiting:
                    chunk, future = waiting.popleft()
                    for record, result in zip(chunk, future.result(), strict=True):
                        yield Encoded(record, result)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _encode_chunk(
    records: list[Record], options: WriteOptions, missing: frozenset[str]
) -> list[dict[str, bytes] | Unreadable]:
    return [encode_record(record, options, missing) for record in records]


def encode_record(record: Record, options: WriteOptions, missing: frozenset[str]) -> dict[str, bytes] | Unreadable:
    images = []
    for path in record.images:
        if path in missing:
            return Unreadable(path, MISSING)
        try:
            size = os.stat(path).st_size
            if size > limits.IMAGE_BYTES:
                return Unreadable(path, f"has {size:,} bytes, the limit is {limits.IMAGE_BYTES:,}")
            data = Path(path).read_bytes()
        except OSError as error:
            # Storage that fails is no property of the picture: the next call may read it.
            raise ShardWriteError(f"cannot read {path}: {error.strerror}. The same command goes on from here") from None
        try:
            images.append(_picture(data, options))
        except SampleError as error:
            return Unreadable(path, str(error))
        except UnidentifiedImageError:  # its own text holds a memory address
            return Unreadable(path, "not a picture in a known format")
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, … on damaged files
            return Unreadable(path, str(error))
    if options.verify:
        try:
            _DECODER.check([data for _, data in images])
        except SampleError as error:
            return Unreadable(record.images[0], str(error))
    found = image_fields(images) if images else {}
    if record.label is not None:
        found["cls"] = str(record.label).encode()
    return {**found, "json": record.json}


def _picture(data: bytes, options: WriteOptions) -> tuple[str, bytes]:
    """Extension and bytes of a picture: those of its file, unless it has to become smaller."""
    extension = image_extension(data)
    if options.resize is None and not options.verify:
        if extension is None:
            raise ValueError(
                f"neither JPEG, PNG nor WebP (starts with {data[:8]!r}); with resize it would be converted"
            )
        return extension, data
    if options.verify and extension is not None:
        _DECODER(data)
        if options.resize is None:
            return extension, data
    try:
        return _reduced(data, extension, options) or (extension or "", data)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise
    except Exception:
        bare = without_metadata(data)
        if bare is None:
            raise
        return _reduced(bare, extension, options) or (extension or "", data)


def _reduced(data: bytes, extension: str | None, options: WriteOptions) -> tuple[str, bytes] | None:
    """The picture made smaller, or in a format that is read; None if its file can be stored as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        smaller = _smaller(image.size, options)
        if smaller is None and extension is not None:
            return None
        if extension is None and options.resize is None:
            raise ValueError(f"{image.format}, neither JPEG, PNG nor WebP; with resize it would be converted")
        if smaller is not None:
            image.draft("RGB", smaller)  # a JPEG decodes at a fraction of its size, never below this one
        profile = image.info.get("icc_profile")
        on_its_side = orientation(image) in (5, 6, 7, 8)
        picture = to_rgb(upright(image))
    if smaller is not None:
        picture = picture.resize(smaller[::-1] if on_its_side else smaller, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    kind = {"jpg": "JPEG", "webp": "WEBP"}.get(extension or "", "PNG")
    picture.save(buffer, kind, **({} if kind == "PNG" else {"quality": options.quality}), icc_profile=profile)
    return {"JPEG": "jpg", "WEBP": "webp", "PNG": "png"}[kind], buffer.getvalue()


def _smaller(size: tuple[int, int], options: WriteOptions) -> tuple[int, int] | None:
    """The size to reduce to; None if it is small enough."""
    if options.resize is None:
        return None
    side = min(size) if options.resize_side == "shortest" else max(size)
    if side <= options.resize:
        return None
    scale = options.resize / side
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
