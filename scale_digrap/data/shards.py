"""Writing webdataset tar shards: a record is ``KEY.jpg`` (png, webp; ``KEY.0.jpg``, … for several) with ``KEY.json``.

The same records always give the same bytes (times, users and modes in the tar headers are fixed), so a checksum says
whether two data sets are equal. Shards appear under their final names only when all of them are complete.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from scale_digrap.data import limits
from scale_digrap.data.errors import DataError, SampleError
from scale_digrap.data.fields import MOST_IMAGES, SNIFFED, picture_format
from scale_digrap.data.sample import VqaSample, check_text
from scale_digrap.runtime.text import one_line, write_json

_OWN_FIELDS = ("question", "answers", "question_id", "questions")
_BLOCK = tarfile.BLOCKSIZE
_LONGEST_NAME = 100


class ShardWriteError(DataError):
    """A sample or a folder that shards cannot be written of or to."""


class ShardFile:
    """One shard being written: the bytes that `webdataset.TarWriter` with ``mtime=0`` and user root would write.

    Args:
        stream: open for writing; stays open after `close`.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._bytes = 0
        self.records = 0

    def add(self, key: str, fields: Mapping[str, bytes]) -> None:
        """Append a record: extension → content."""
        # webdataset.TarWriter would do the same, and import torch first.
        for extension in sorted(fields):
            data = fields[extension]
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size, member.mode = len(data), 0o444
            member.uname = member.gname = "root"
            for part in (_header(member), data, bytes(-len(data) % _BLOCK)):
                self._stream.write(part)
                self._bytes += len(part)
        self.records += 1

    def close(self) -> None:
        """Write the end of the archive and make it last on the disk."""
        self._stream.write(bytes(padded_size(self._bytes) - self._bytes))
        self._stream.flush()
        os.fsync(self._stream.fileno())


def _header(member: tarfile.TarInfo) -> bytes:
    try:
        return member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
    except ValueError:  # a name over 100 bytes, from another writer's shard
        return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def record_size(fields: Mapping[str, bytes]) -> int:
    """Bytes that a record takes in a shard, headers and padding included."""
    return sum(_BLOCK + -(-len(data) // _BLOCK) * _BLOCK for data in fields.values())


def padded_size(content: int) -> int:
    """Bytes of a shard whose records take `content` bytes: the end marker, and padding to a tape record."""
    return -(-(content + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def write_shards(
    samples: Iterable[VqaSample], folder: str | Path, *, prefix: str = "shard", samples_per_shard: int = 1000
) -> list[Path]:
    """Write samples, in order, to ``folder/PREFIX-000000.tar``, ``PREFIX-000001.tar``, …

    Args:
        samples: read once, so a generator may be larger than memory. PIL images become PNG; encoded bytes are stored
            untouched; a sample without an image is its JSON alone.
        folder: created if need be. Must not hold shards of this prefix yet.
        prefix: start of the file names.
        samples_per_shard: the last shard may hold fewer.

    Returns:
        The shards' paths, in order.

    Raises:
        ShardWriteError: no samples, a key twice or one that tar readers would split, a sample without question or
            answers, bytes of an unknown image format, or shards of this prefix already there. Nothing is left behind.
    """
    if samples_per_shard < 1:
        raise ShardWriteError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted(folder.glob(f"{prefix}-[0-9]*.tar"))
    if there:
        raise ShardWriteError(
            f"{folder} already holds {len(there)} shards named {prefix}-*.tar (first: {there[0].name}): "
            "old and new ones would be mixed. Remove them or choose another folder or prefix"
        )

    finished: list[Path] = []
    keys: set[str] = set()
    stream: BinaryIO | None = None
    shard: ShardFile | None = None
    try:
        for sample in samples:
            if shard is not None and shard.records == samples_per_shard:
                shard.close()
                shard = None
            if shard is None:
                if stream is not None:
                    stream.close()
                finished.append(folder / shard_name(prefix, len(finished)))
                stream = open(_unfinished(finished[-1]), "wb")  # noqa: SIM115 - closed here, above or below
                shard = ShardFile(stream)
            if sample.key in keys:
                raise ShardWriteError(f"sample key {sample.key!r} occurs twice; keys name samples and must be unique")
            keys.add(sample.key)
            shard.add(sample.key, encode_sample(sample))
        if shard is None:
            raise ShardWriteError(f"no samples to write to {folder}/{prefix}-*.tar")
        shard.close()
    except BaseException:
        for path in finished:
            _unfinished(path).unlink(missing_ok=True)
        raise
    finally:
        if stream is not None:
            stream.close()
    for path in finished:
        os.replace(_unfinished(path), path)
    return finished


def shard_name(prefix: str, number: int) -> str:
    """File name of a shard; digits of equal width sort like numbers, so readers that sort by name keep the order."""
    return f"{prefix}-{number:06d}.tar"


def encode_sample(sample: VqaSample) -> dict[str, bytes]:
    """The fields of a sample: extension → bytes.

    Raises:
        ShardWriteError: see `write_shards`.
    """
    check_key(sample.key)
    if not sample.question or not sample.answers:
        raise ShardWriteError(
            f"sample {sample.key!r} needs a question and at least one answer, "
            f"got {sample.question!r} and {sample.answers!r}"
        )
    taken = sorted(set(sample.extra) & set(_OWN_FIELDS))
    if taken:
        raise ShardWriteError(f"sample {sample.key!r}: extra fields {taken} are the sample's own; rename them")
    content = {
        "question": sample.question,
        "answers": list(sample.answers),
        "question_id": sample.question_id,
        **sample.extra,
    }
    try:
        check_text(content)
        encoded = encode_json(content)
    except (SampleError, ShardWriteError) as error:
        raise ShardWriteError(f"sample {sample.key!r}: {error}") from None
    images = [_encode_image(sample.key, image) for image in sample.images]
    return {"json": encoded, **image_fields(images)}


def check_key(key: str) -> None:
    """Refuse a key that tar readers would not give back.

    Raises:
        ShardWriteError: a dot (readers take what follows for an extension), a leading underscore, empty, or too long.
    """
    name = key.rsplit("/", 1)[-1]
    if not name or "." in name or name.startswith("_"):
        raise ShardWriteError(
            f"sample key {key!r}: its last part must not be empty, hold a dot (readers take what follows for a "
            "file extension) or start with an underscore"
        )
    try:
        length = len(key.encode())
    except UnicodeEncodeError:
        raise ShardWriteError(f"sample key {key!r} is not UTF-8: choose another") from None
    if length > _LONGEST_NAME - len(".999.jpeg"):
        raise ShardWriteError(f"sample key {key!r} is too long for a tar header: at most {_LONGEST_NAME - 9} bytes")


def encode_json(content: Any) -> bytes:
    """JSON with sorted keys: equal content, equal bytes.

    Raises:
        ShardWriteError: a number that is not finite, half a character, what is no plain value, or more than is read.
    """
    try:
        encoded = write_json(content, ensure_ascii=False, sort_keys=True).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise ShardWriteError(f"cannot be written as JSON: {one_line(error)}") from None
    if len(encoded) > limits.JSON_BYTES:
        raise ShardWriteError(f"takes {len(encoded):,} bytes as JSON, the limit is {limits.JSON_BYTES:,}")
    return encoded


def image_fields(images: list[tuple[str, bytes]]) -> dict[str, bytes]:
    """(extension, bytes) of each image → the fields of a record: ``jpg`` for one, ``0.jpg``, ``1.png``, … for more.

    Raises:
        ShardWriteError: more images than a record can hold.
    """
    if len(images) > MOST_IMAGES:
        raise ShardWriteError(f"{len(images)} images in one record; it can hold {MOST_IMAGES}")
    if len(images) == 1:
        return dict(images)
    return {f"{number}.{extension}": data for number, (extension, data) in enumerate(images)}


_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WebP": "webp"}


def image_extension(data: bytes) -> str | None:
    """``png``, ``jpg`` or ``webp`` by the first bytes, whatever the file was called; None for anything else."""
    return _EXTENSIONS.get(picture_format(data[:SNIFFED], len(data)) or "")


def _encode_image(key: str, image: Image.Image | bytes) -> tuple[str, bytes]:
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="PNG")
        return "png", buffer.getvalue()
    extension = image_extension(image)
    if extension is None:
        raise ShardWriteError(
            f"sample {key!r}: image bytes are neither PNG, JPEG nor WebP (they start with {image[:8]!r}); "
            "decode them to a PIL image first"
        )
    return extension, image


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
