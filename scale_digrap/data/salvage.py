"""What can be saved of a damaged shard: every record that is whole beyond doubt.

Where a header is not one, the next is searched for. What lies next to such a stretch may have lost members (an answer
without its picture looks like a text-only sample), so the record before it and the one after it are given up too.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from scale_digrap.data import limits
from scale_digrap.data.decode import ImageDecoder
from scale_digrap.data.errors import ShardDamage
from scale_digrap.data.fields import is_read
from scale_digrap.data.scan import _LONGEST_TAIL, BoundedFile, Walk, key_of, loose_picture, may_be_loose
from scale_digrap.data.validate import record_problem

_BLOCK = tarfile.BLOCKSIZE
_MAGIC, _MAGIC_AT = b"ustar", 257
_WINDOW = 1 << 20


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
            key = key_of(item.name)
            if key is None:
                if may_be_loose(item.name) and (problem := loose_picture(file, item.offset_data, item.size)):
                    # Also a record of this key is given up then: it may be the question about this picture.
                    found.append(Found(item.name, item.offset, problem=problem))
                    after_damage = False
                continue
            if after_damage or key != found[-1].key:
                found.append(Found(key, item.offset))
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
    walk = Walk(str(path), os.fstat(file.fileno()).st_size, require)
    try:
        for member in one.members:
            walk.member(member)
        one.samples = walk.alone(file)
    except ShardDamage as damage:
        one.problem = damage.problem.removeprefix(f"sample {one.key!r}: ").removeprefix(f"sample {one.key!r} ")
        return
    one.fields = walk.records[one.key]
    one.problem = record_problem(file, {n: span for n, span in one.fields.items() if is_read(n)}, decoder, classes)
    size = sum(size for _, size in one.fields.values())
    if one.problem is None and size > limits.RECORD_BYTES:
        one.problem = f"its members have {size:,} bytes together, the limit is {limits.RECORD_BYTES:,}"


def _items(file: BinaryIO) -> Iterator[tarfile.TarInfo | Stretch]:
    """Members and unreadable stretches of an archive, in order."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        yield Stretch(0, 0)
        return
    position = 0
    while position < size:
        end = position
        for member in _members(file, position):
            content = member.size if member.isfile() else 0
            if member.offset_data + content > size:
                break
            if not member.isdir():
                yield member
            end = min(member.offset_data + -(-content // _BLOCK) * _BLOCK, size)
        tail = os.pread(file.fileno(), _LONGEST_TAIL + 1, end)
        if not tail.strip(b"\0") and 2 * _BLOCK <= len(tail) <= _LONGEST_TAIL and (size - end) % _BLOCK == 0:
            return
        following = _next_header(file, end + 1, size)
        yield Stretch(end, (size if following is None else following) - end)
        if following is None:
            return
        position = following


def _members(file: BinaryIO, position: int) -> Iterator[tarfile.TarInfo]:
    """Members from a header on, until one is not a header."""
    file.seek(position)
    try:
        yield from tarfile.TarFile(fileobj=BoundedFile(file), mode="r")  # type: ignore[arg-type]
    except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError):
        return


def _next_header(file: BinaryIO, position: int, size: int) -> int | None:
    """The first valid header at or after a position, wherever it lies; None if there is none.

    Looked for window by window: a shard may be larger than the memory, or than the addresses that a process may use.
    """
    while position < size:
        window = os.pread(file.fileno(), _WINDOW + _BLOCK, position)
        place = 0
        while (magic := window.find(_MAGIC, place + _MAGIC_AT)) >= 0:
            start = magic - _MAGIC_AT
            if start >= _WINDOW:
                break
            try:
                tarfile.TarInfo.frombuf(window[start : start + _BLOCK], "utf-8", "surrogateescape")
                return position + start
            except tarfile.HeaderError:
                place = start + 1
        position += _WINDOW
    return None
