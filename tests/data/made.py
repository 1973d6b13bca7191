"""Shards for the loader's tests, written by webdataset or tarfile, and ways to damage them."""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image


def picture(number: int, size: int = 4) -> Image.Image:
    return Image.fromarray(np.full((size, size, 3), number % 256, np.uint8))


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(number: int) -> bytes:
    return encoded(picture(number))


def jpg(number: int, size: int = 16) -> bytes:
    return encoded(picture(number, size), "jpeg", quality=95)


def meta(number: int, **more) -> dict:
    return {"question": f"number {number}", "answers": [str(number)], "question_id": number, **more}


def write(folder: Path, count: int, per_shard: int = 10, text_only: Iterable[int] | None = (), prefix="shard") -> str:
    """`count` samples named s00000…; the image's grey value and the question tell the number. `text_only=None`: all."""
    for shard in range(max(1, -(-count // per_shard))):
        with webdataset.TarWriter(str(folder / f"{prefix}-{shard:06d}.tar")) as tar:
            for i in range(shard * per_shard, min(count, (shard + 1) * per_shard)):
                sample = {"__key__": f"s{i:05d}", "json": json.dumps(meta(i, image_id=i)).encode()}
                if text_only is not None and i not in text_only:
                    sample["png"] = png(i)
                tar.write(sample)
    return str(folder / f"{prefix}-*.tar")


def tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Change bytes in place, with the file's size and times as they were: what a disk does, not a program."""
    stat = path.stat()
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def damaged(whole: bytes, where: str) -> bytes:
    """A tar of several samples, broken around the header of its tenth member."""
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        member = archive.getmembers()[9]
        last = archive.getmembers()[-1]
    start, data = member.offset, member.offset_data
    end = last.offset_data + -(-last.size // 512) * 512
    rng = np.random.default_rng(0)
    return {
        "cut at a member": whole[:start],
        "cut in a header": whole[: start + 100],
        "cut in data": whole[: data + 3],
        "cut at the end of the last member": whole[:end],
        "cut in the end of the archive": whole[: end + 512],
        "random header": whole[:start] + rng.bytes(512) + whole[start + 512 :],
        "one bit of a header": whole[: start + 3] + bytes([whole[start + 3] ^ 1]) + whole[start + 4 :],
        "zeroed header": whole[:start] + bytes(512) + whole[start + 512 :],
        "zeroed kilobyte": whole[:start] + bytes(1024) + whole[start + 1024 :],
        "zeroed to the end": whole[:start] + bytes(max(len(whole) - start, 16384)),
        "bytes after the end": whole + b"x" * 512,
        "another archive after the end": whole + whole,
        "empty file": b"",
        "not a tar": b"<html>404</html>" * 100,
    }[where]


DAMAGE = (
    "cut at a member",
    "cut in a header",
    "cut in data",
    "cut at the end of the last member",
    "cut in the end of the archive",
    "random header",
    "one bit of a header",
    "zeroed header",
    "zeroed kilobyte",
    "zeroed to the end",
    "bytes after the end",
    "another archive after the end",
    "empty file",
    "not a tar",
)


def numbers(samples) -> list[int]:
    return [int(sample.question_id) for sample in samples]


def flat(lists) -> list:
    return list(itertools.chain.from_iterable(lists))


def take(loader, count) -> list:
    batches = iter(loader)
    return [next(batches) for _ in range(count)]
