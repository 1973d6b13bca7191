"""Tar shard → byte ranges of every field of every record, checked strictly.

A tar reader takes a zeroed or missing stretch for the end of the archive and says nothing. The walk here does not: what
follows the last member must be tar's own padding, every record must be whole, and its members must lie together.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np

from scale_digrap.data.errors import SampleError, ShardDamage
from scale_digrap.data.sample import parse_class, parse_json, parse_record

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset.tariterators.base_plus_ext
_META = re.compile(r"__[^/]*__($|/)")  # webdataset.tariterators.tar_file_iterator leaves these out
_BLOCK = 512
_END = 2 * _BLOCK
_LONGEST_TAIL = _END + tarfile.RECORDSIZE
_MOST_FIELDS = 64


class Keys(Sequence[str]):
    """The keys of a shard's records: a sequence of strings over one block of bytes, so that an index opens without
    making a string of every key."""

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, keys: Sequence[str]) -> Keys:
        parts = [key.encode("utf-8", "surrogateescape") for key in keys]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return cls(np.frombuffer(b"".join(parts), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        start = int(self.ends[number - 1]) if number else 0
        return self.text[start : int(self.ends[number])].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        text, start = self.text.tobytes(), 0
        for end in self.ends.tolist():
            yield text[start:end].decode("utf-8", "surrogateescape")
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and not isinstance(other, str) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What lies where in a shard.

    Attributes:
        name: file name of the shard.
        size: its bytes.
        keys: one per record, in the shard's order.
        fields: the extensions that occur in it, lower case, as webdataset cuts them (``json``, ``jpg``, ``0.jpg``, …).
        spans: int64 [records, fields, 2]: byte offset and size of every field; (-1, -1) where a record lacks it.
        questions: int32 [records]: samples that a record makes, 1 unless its JSON groups several questions.
        layout: digest of keys, spans and questions: equal for equal shards wherever they lie.
        require: what :func:`scan_shard` was told to require.
        sha256: of the whole file, in hexadecimal; empty until :func:`index_shards` has read the file.
        ignored: names of the first members that belong to no record by webdataset's rules, and their number.
    """

    name: str
    size: int
    keys: Sequence[str]
    fields: tuple[str, ...]
    spans: np.ndarray
    questions: np.ndarray
    layout: str
    require: tuple[str, ...]
    sha256: str = ""
    ignored: tuple[tuple[str, ...], int] = ((), 0)

    @property
    def samples(self) -> int:
        """Questions in the shard."""
        return int(self.questions.sum())


def scan_shard(path: Path, *, require: Sequence[str] = ("json",)) -> ShardIndex:
    """Walk a tar file's headers once and check every record.

    Args:
        path: a tar file, not compressed.
        require: fields that every record must have. ``image`` stands for any image; ``json`` is also met by ``cls``.

    Raises:
        ShardDamage: cut off or zeroed anywhere, a corrupt header, bytes after the end, a key or member twice, the
            members of a key apart, a required field missing, JSON that is no question. One kind of damage cannot be
            seen in the file alone: a cut within the padding after the archive's end, which loses no sample.
    """
    path = Path(path)
    with open(path, "rb") as file:
        walk = _Walk(str(path), os.fstat(file.fileno()).st_size, tuple(require))
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    walk.member(member)
                end = tar.offset
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            raise ShardDamage(str(path), walk.end, f"not a whole tar file: {error}") from None
        file.seek(end)
        walk.finish(end, file.read(_LONGEST_TAIL + 1))
        questions = walk.questions(file)
    names = sorted({name for parts in walk.records.values() for name in parts}, key=_field_order)
    spans = np.full((len(walk.records), len(names), 2), -1, dtype=np.int64)
    columns = {name: column for column, name in enumerate(names)}
    for row, parts in enumerate(walk.records.values()):
        for name, span in parts.items():
            spans[row, columns[name]] = span
    keys = Keys.of(list(walk.records))
    return ShardIndex(
        name=path.name,
        size=walk.size,
        keys=keys,
        fields=tuple(names),
        spans=spans,
        questions=questions,
        layout=_layout(keys, names, spans, questions),
        require=tuple(require),
        ignored=(tuple(walk.ignored[:3]), len(walk.ignored)),
    )


class _Walk:
    """The records of one shard as they come by."""

    def __init__(self, shard: str, size: int, require: tuple[str, ...]) -> None:
        self.shard, self.size, self.require = shard, size, require
        self.records: dict[str, dict[str, tuple[int, int]]] = {}
        self.starts: dict[str, int] = {}
        self.ignored: list[str] = []
        self.end = 0
        self._current: str | None = None
        self._extensions: set[str] = set()

    def member(self, member: tarfile.TarInfo) -> None:
        self.end = member.offset
        if member.isdir():
            return
        if not member.isreg() or member.sparse is not None:
            kind = "sparse" if member.isreg() else "a link or device"
            raise ShardDamage(self.shard, member.offset, f"member {member.name!r} is {kind}: write plain files")
        if member.offset_data + member.size > self.size:
            raise ShardDamage(
                self.shard, member.offset, f"cut off inside {member.name!r}: the file ends at {self.size}"
            )
        match = _KEY.match(member.name)
        if match is None or _META.match(member.name):
            self.ignored.append(member.name)
            return
        key, extension = match[1], match[2].lower()
        if key != self._current:
            if key in self.records:
                raise ShardDamage(
                    self.shard,
                    member.offset,
                    f"the members of key {key!r} do not lie together: {member.name!r} comes after other samples, so "
                    "that a reader of webdataset shards would make two incomplete samples of them",
                )
            self._check_record()
            self._current = key
            self.records[key] = {}
            self.starts[key] = member.offset
        if extension in self.records[key]:
            raise ShardDamage(self.shard, member.offset, f"key {key!r} has two members .{extension}")
        self.records[key][extension] = (member.offset_data, member.size)
        self._extensions.add(extension)
        if len(self._extensions) > _MOST_FIELDS:
            raise ShardDamage(
                self.shard,
                member.offset,
                f"more than {_MOST_FIELDS} different extensions, such as {extension!r}: a key ends at its first dot; "
                "do file names contain more dots?",
            )

    def finish(self, end: int, tail: bytes) -> None:
        """The last record, and what lies between the last member and the end of the file."""
        self._check_record()
        if tail.strip(b"\0"):
            raise ShardDamage(
                self.shard, end, "no tar header here, and not the end of the archive either: damaged, or bytes added"
            )
        if len(tail) < _END or self.size % _BLOCK:
            raise ShardDamage(
                self.shard, end, f"cut off: {len(tail)} bytes follow the last member, an archive ends with {_END} zeros"
            )
        if len(tail) > _LONGEST_TAIL:
            raise ShardDamage(
                self.shard,
                end,
                f"zeros from here to the end at {self.size}, which is more than the padding of an archive: members "
                "were overwritten or never downloaded",
            )

    def questions(self, file: BinaryIO) -> np.ndarray:
        """int32 [records]: how many questions each record holds, after reading and checking its JSON."""
        counts = np.ones(len(self.records), dtype=np.int32)
        for row, (key, parts) in enumerate(self.records.items()):
            try:
                if "cls" in parts:
                    parse_class(_read(file, parts["cls"]))
                    if "json" in parts:
                        meta = parse_json(_read(file, parts["json"]))
                        if "question" in meta or "questions" in meta:
                            counts[row] = len(parse_record(_read(file, parts["json"])).get("questions", "1"))
                elif "json" in parts:
                    counts[row] = len(parse_record(_read(file, parts["json"])).get("questions", "1"))
            except SampleError as error:
                raise ShardDamage(self.shard, self.starts[key], f"sample {key!r}: {error}") from None
        return counts

    def _check_record(self) -> None:
        if self._current is None:
            return
        parts = self.records[self._current]
        pictures = [name for name in parts if name in IMAGE_EXTENSIONS]
        numbered = [name for name in parts if image_number(name) is not None]
        problem = None
        for name in self.require:
            met = name in parts or (name == "json" and "cls" in parts)
            if not (met or (name == "image" and (pictures or numbered))):
                problem = f"has no .{name} (found {', '.join(sorted(parts))})"
        numbers = sorted(number for name in numbered if (number := image_number(name)) is not None)
        if len(pictures) > 1 or (pictures and numbered):
            problem = f"has more than one image: {', '.join(sorted(pictures + numbered))}; name them .0.jpg, .1.jpg, …"
        elif numbers != list(range(len(numbers))):
            problem = f"has images numbered {numbers}, expected 0, 1, … without gaps"
        if problem:
            raise ShardDamage(self.shard, self.starts[self._current], f"sample {self._current!r} {problem}")


def image_number(name: str) -> int | None:
    """The number of a numbered image field such as ``0.jpg``; None for every other field."""
    number, _, extension = name.partition(".")
    return int(number) if extension in IMAGE_EXTENSIONS and number.isdecimal() and len(number) < 4 else None


def _read(file: BinaryIO, span: tuple[int, int]) -> bytes:
    file.seek(span[0])
    return file.read(span[1])


def _field_order(name: str) -> tuple[int, int, str]:
    """json first, then images by number, then the rest by name."""
    number = image_number(name)
    return (0 if name == "json" else 1 if number is not None else 2, number or 0, name)


def _layout(keys: Sequence[str], fields: Sequence[str], spans: np.ndarray, questions: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (*keys, "", *fields):
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    digest.update(spans.astype("<i8").tobytes())
    digest.update(questions.astype("<i4").tobytes())
    return digest.hexdigest()
