"""Writing webdataset tar shards: a sample is ``KEY.png`` (or jpg, webp) with ``KEY.json``.

The same samples always give the same bytes (times, users and modes in the tar headers are fixed), so a checksum says
whether two data sets are equal. Shards appear under their final names only when all of them are complete.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image

from scale_digrap.data.sample import VqaSample
from scale_digrap.errors import ScaleDigrapError

_OWN_FIELDS = ("question", "answers", "question_id")


class ShardWriteError(ScaleDigrapError):
    """A sample or a folder that shards cannot be written of or to."""


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
    writer: webdataset.TarWriter | None = None
    stream: io.BufferedWriter | None = None
    try:
        for index, sample in enumerate(samples):
            if index % samples_per_shard == 0:
                _close(writer, stream)
                # ASCII digits sort like numbers: readers that sort by name keep the order.
                finished.append(folder / f"{prefix}-{index // samples_per_shard:06d}.tar")
                stream = open(_unfinished(finished[-1]), "wb")  # noqa: SIM115 - closed by _close
                writer = webdataset.TarWriter(stream, user="root", group="root", mtime=0, encoder=False)
            if sample.key in keys:
                raise ShardWriteError(f"sample key {sample.key!r} occurs twice; keys name samples and must be unique")
            keys.add(sample.key)
            assert writer is not None
            writer.write(encode_sample(sample))
        if not finished:
            raise ShardWriteError(f"no samples to write to {folder}/{prefix}-*.tar")
        _close(writer, stream)
    except BaseException:
        _close(writer, stream)
        for path in finished:
            _unfinished(path).unlink(missing_ok=True)
        raise
    for path in finished:
        os.replace(_unfinished(path), path)
    return finished


def encode_sample(sample: VqaSample) -> dict[str, Any]:
    """A sample as `webdataset.TarWriter` takes it: ``__key__``, ``json`` bytes and, with an image, its bytes.

    Raises:
        ShardWriteError: see `write_shards`.
    """
    name = sample.key.rsplit("/", 1)[-1]
    if not name or "." in name or name.startswith("_"):
        raise ShardWriteError(
            f"sample key {sample.key!r}: its last part must not be empty, hold a dot (readers take what follows for a "
            "file extension) or start with an underscore"
        )
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
    record: dict[str, Any] = {
        "__key__": sample.key,
        "json": json.dumps(content, ensure_ascii=False, sort_keys=True).encode(),
    }
    if sample.image is not None:
        extension, data = _encode_image(sample)
        record[extension] = data
    return record


def _encode_image(sample: VqaSample) -> tuple[str, bytes]:
    image = sample.image
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="PNG")
        return "png", buffer.getvalue()
    assert image is not None
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png", image
    if image.startswith(b"\xff\xd8\xff"):
        return "jpg", image
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp", image
    raise ShardWriteError(
        f"sample {sample.key!r}: image bytes are neither PNG, JPEG nor WebP (they start with {image[:8]!r}); "
        "decode them to a PIL image first"
    )


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _close(writer: webdataset.TarWriter | None, stream: io.BufferedWriter | None) -> None:
    if stream is None or stream.closed:
        return
    if writer is not None:
        writer.close()
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
