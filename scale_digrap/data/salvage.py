"""What can be saved of a damaged shard: every record that is whole beyond doubt.

Where a header is not one, the next is searched for. What lies next to such a stretch may have lost members (an answer
without its picture looks like a text-only sample), so the record before it and the one after it are given up too.
"""

from __future__ import annotations

import mmap
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from scale_digrap.data.decode import ImageDecoder
from scale_digrap.data.errors import SampleError, ShardDamage
from scale_digrap.data.index import IMAGE_EXTENSIONS, image_number
from scale_digrap.data.scan import _KEY, _LONGEST_TAIL, _META, _Walk
from scale_digrap.data.validate import check_field

_BLOCK = tarfile.BLOCKSIZE
_MAGIC, _MAGIC_AT = b"ustar", 257


@dataclass
class Found:
    """A record of a damaged shard: extension → (offset, size), and why it is not kept, if it is not."""

    key: str
    offset: int
    fields: dict[str, tuple[int, int]] = field(default_factory=dict)
    members: list[tarfile.TarInfo] = field(default_factory=list)
    samples: int = 1
    problem: str | None = None


@dataclass(frozen=True)
class Stretch:
    """Bytes of a shard that hold nothing that can be read."""

    offset: int
    size: int


def salvage(
    path: Path, *, require: tuple[str, ...] = ("json",), decode: bool = True, classes: int | None = None
) -> tuple[list[Found], list[Stretch]]:
    """All records of a shard, in order, the bad ones with their problem; and the stretches that cannot be read.

    Args:
        path: a tar file, not compressed, in whatever state.
        require: see :func:`scale_digrap.data.scan.scan_shard`.
        decode: a record whose images cannot be decoded is bad.
        classes: a class number from this on is bad.
    """
    found: list[Found] = []
    stretches: list[Stretch] = []
    after_damage = True
    with open(path, "rb") as file:
        for item in _items(file):
            if isinstance(item, Stretch):
                stretches.append(item)
                if found:
                    found[-1].problem = f"may have lost members: byte {item.offset} and after cannot be read"
                after_damage = True
                continue
            match = _KEY.match(item.name)
            if match is None or _META.match(item.name):
                continue
            if after_damage or match[1] != found[-1].key:
                found.append(Found(match[1], item.offset))
                if after_damage and stretches:
                    found[-1].problem = f"may have lost members: what lies before byte {item.offset} cannot be read"
                after_damage = False
            found[-1].members.append(item)
        counts = Counter(one.key for one in found)
        decoder = ImageDecoder()
        for one in found:
            if counts[one.key] > 1:
                one.problem = f"its key stands in {counts[one.key]} places: which members belong together is unknown"
            if one.problem is None:
                _check(one, file, path, require, decoder if decode else None, classes)
    return found, stretches


def _check(
    one: Found, file: BinaryIO, path: Path, require: tuple[str, ...], decoder: ImageDecoder | None, classes: int | None
) -> None:
    """Judge a record by the rules of an index, as if it were alone."""
    walk = _Walk(str(path), os.fstat(file.fileno()).st_size, require)
    try:
        for member in one.members:
            walk.member(member)
        walk._check_record()
        one.samples = int(walk.questions(file).sum())
        one.fields = walk.records[one.key]
        for name, (offset, size) in one.fields.items():
            if decoder is not None and (name == "cls" or name in IMAGE_EXTENSIONS or image_number(name) is not None):
                file.seek(offset)
                check_field(name, file.read(size), decoder, classes)
    except ShardDamage as damage:
        one.problem = damage.problem
    except SampleError as error:
        one.problem = f".{name}: {error}"


def _items(file: BinaryIO) -> Iterator[tarfile.TarInfo | Stretch]:
    """Members and unreadable stretches of an archive, in order."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        yield Stretch(0, 0)
        return
    position = 0
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while position < size:
            end = position
            for member in _members(file, position):
                content = member.size if member.isfile() else 0
                if member.offset_data + content > size:
                    break
                if not member.isdir():
                    yield member
                end = min(member.offset_data + -(-content // _BLOCK) * _BLOCK, size)
            tail = data[end : end + _LONGEST_TAIL + 1]
            if not tail.strip(b"\0") and 2 * _BLOCK <= len(tail) <= _LONGEST_TAIL and (size - end) % _BLOCK == 0:
                return
            following = _next_header(data, end + 1)
            yield Stretch(end, (size if following is None else following) - end)
            if following is None:
                return
            position = following


def _members(file: BinaryIO, position: int) -> Iterator[tarfile.TarInfo]:
    """Members from a header on, until one is not a header."""
    file.seek(position)
    try:
        yield from tarfile.TarFile(fileobj=file, mode="r")  # type: ignore[arg-type]
    except (tarfile.TarError, ValueError, OverflowError, EOFError):
        return


def _next_header(data: mmap.mmap, position: int) -> int | None:
    """The first valid header at or after a position, wherever it lies; None if there is none."""
    while True:
        magic = data.find(_MAGIC, position + _MAGIC_AT)
        if magic < 0:
            return None
        start = magic - _MAGIC_AT
        try:
            tarfile.TarInfo.frombuf(data[start : start + _BLOCK], "utf-8", "surrogateescape")
            return start
        except tarfile.HeaderError:
            position = start + 1
