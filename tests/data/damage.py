"""Ways in which a shard breaks. Each takes the bytes of a whole one."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable


def members(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()


def _cut_at_member(data: bytes) -> bytes:
    return data[: members(data)[9].offset]


def _cut_at_record(data: bytes) -> bytes:
    return data[: members(data)[10].offset]


def _cut_in_header(data: bytes) -> bytes:
    return data[: members(data)[9].offset + 200]


def _cut_in_data(data: bytes) -> bytes:
    return data[: members(data)[8].offset_data + 100]


def _cut_in_end(data: bytes) -> bytes:
    last = members(data)[-1]
    return data[: last.offset_data + -(-last.size // 512) * 512 + 512]


def _corrupt_header(data: bytes) -> bytes:
    offset = members(data)[9].offset
    return data[: offset + 124] + b"9999999" + data[offset + 131 :]


def _zeroed_header(data: bytes) -> bytes:
    offset = members(data)[9].offset
    return data[:offset] + bytes(1024) + data[offset + 1024 :]


def _zeroed_tail(data: bytes) -> bytes:
    offset = members(data)[9].offset
    return data[:offset] + bytes(len(data) - offset + 20480)


def _bytes_after(data: bytes) -> bytes:
    return data + b"more" * 128


def _missing_stretch(data: bytes) -> bytes:
    offset = members(data)[9].offset + 300
    return data[:offset] + data[offset + 333 :]


def rewritten(data: bytes, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> bytes:
    """A tar of the members that `change` makes of (name, content) pairs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar, tarfile.open(fileobj=buffer, mode="w") as out:
        items = [(member.name, tar.extractfile(member).read()) for member in tar]
        for name, content in change(items):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


STRUCTURAL: dict[str, Callable[[bytes], bytes]] = {
    "cut at a member": _cut_at_member,
    "cut at a record": _cut_at_record,
    "cut in a header": _cut_in_header,
    "cut in data": _cut_in_data,
    "cut in the end": _cut_in_end,
    "corrupt header": _corrupt_header,
    "zeroed header": _zeroed_header,
    "zeroed to the end": _zeroed_tail,
    "bytes after the end": _bytes_after,
    "a stretch missing": _missing_stretch,
    "empty": lambda data: b"",
    "no tar": lambda data: b"<html>" * 500,
}
"""Damage to the archive. Members 8 and 9 (of ``KEY.jpg``, ``KEY.json`` pairs) are those of the fifth record."""

IN_RECORDS: dict[str, Callable[[bytes], bytes]] = {
    "key apart": lambda data: rewritten(data, lambda items: [*items[:9], *items[10:], items[9]]),
    "member twice": lambda data: rewritten(data, lambda items: [*items[:10], items[9], *items[10:]]),
    "no json": lambda data: rewritten(data, lambda items: [*items[:9], *items[10:]]),
    "bad json": lambda data: rewritten(data, lambda items: [*items[:9], (items[9][0], b"{"), *items[10:]]),
    "no answers": lambda data: rewritten(
        data,
        lambda items: [
            *items[:9],
            (items[9][0], b'{"question": "?", "answers": [], "question_id": 1}'),
            *items[10:],
        ],
    ),
    "two images": lambda data: rewritten(
        data, lambda items: [*items[:9], (items[8][0].replace("jpg", "png"), items[8][1]), *items[9:]]
    ),
}
"""The archive is whole, the fifth record is not."""
