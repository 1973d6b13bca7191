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
from typing import Any, BinaryIO, overload

import numpy as np

from scale_digrap.data import fields, limits
from scale_digrap.data.errors import SampleError, ShardDamage
from scale_digrap.data.fields import image_number, is_image
from scale_digrap.data.sample import parse_class, parse_json, parse_record
from scale_digrap.data.sidecars import is_sidecar

RULES = 2
"""Raised when a scan refuses or reads what it did not before: an index made by other rules is made anew."""

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
        ignored: names of the first members that belong to no record (no extension, hidden, or what a system has left
            there), and their number.
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

    @property
    def unread(self) -> dict[str, int]:
        """Fields that nothing reads (``npy``, ``txt``, ``pyd``, …) → records that have them."""
        found = {column: name for column, name in enumerate(self.fields) if not fields.is_read(name)}
        return {name: int((self.spans[:, column, 1] >= 0).sum()) for column, name in found.items()}

    def notes(self) -> list[str]:
        """What a loader leaves out of this shard though nothing is wrong with it: one line each."""
        found = []
        if self.ignored[1]:
            found.append(
                f"{self.ignored[1]} members belong to no sample (no extension, hidden, or left there by a system): "
                + ", ".join(self.ignored[0])
            )
        if self.unread:
            counted = ", ".join(f".{name} ({count} records)" for name, count in self.unread.items())
            found.append(f"members that are not read: {counted}")
        return found


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
        walk = Walk(str(path), os.fstat(file.fileno()).st_size, tuple(require))
        try:
            with tarfile.open(fileobj=BoundedFile(file), mode="r:") as tar:  # type: ignore[call-overload]
                for member in tar:
                    walk.member(member)
                end = tar.offset
        except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as error:
            raise ShardDamage(str(path), walk.end, _no_tar(file, error)) from None
        file.seek(end)
        walk.finish(end, file.read(_LONGEST_TAIL + 1))
        questions = walk.questions(file)
    names = sorted({name for parts in walk.records.values() for name in parts}, key=fields.field_order)
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
        layout=layout_of(keys, names, spans, questions),
        require=tuple(require),
        ignored=(tuple(walk.ignored[:3]), len(walk.ignored)),
    )


def key_of(name: str) -> str | None:
    """The key that a member belongs to; None for what belongs to no record: a name without an extension, a hidden
    file, webdataset's own notes (``__name__``), and what systems leave behind."""
    match = _KEY.match(name)
    if match is None or match[1].endswith("/") or _META.match(name) or is_sidecar(name):  # "a/.b" has the key "a/"
        return None
    return match[1]


def may_be_loose(name: str) -> bool:
    """Whether a member without a key may be a picture that has lost its extension."""
    return "." not in name.rpartition("/")[2] and not _META.match(name) and not is_sidecar(name)


def loose_picture(file: BinaryIO, start: int, size: int) -> str | None:
    """What is wrong with a member without an extension, if it is a picture."""
    kind = fields.picture_format(_read(file, (start, min(size, fields.SNIFFED))), size)
    if kind is None:
        return None
    return (
        f"is a {kind} picture without an extension, so it belongs to no sample: name it KEY.jpg (or .png, .webp), next "
        "to KEY.json"
    )


class BoundedFile:
    """A file of which `tarfile` may read headers and no more: a header that says that its name has gigabytes would
    otherwise be believed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= limits.HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes; the limit is {limits.HEADER_BYTES}")
        return self._file.read(size)


class Walk:
    """The records of one shard as they come by."""

    def __init__(self, shard: str, size: int, require: tuple[str, ...]) -> None:
        self.shard, self.size, self.require = shard, size, require
        self.records: dict[str, dict[str, tuple[int, int]]] = {}
        self.starts: dict[str, int] = {}
        self.ignored: list[str] = []
        self.end = 0
        self.problem: ShardDamage | None = None
        """What is wrong with the first record that is not whole. Raised last: that members lie apart, or that the
        archive is damaged further on, is the reason for it and says more."""
        self._loose: list[tuple[str, int, int, int]] = []  # members without an extension: name, offset, data, size
        self._current: str | None = None
        self._extensions: set[str] = set()

    def member(self, member: tarfile.TarInfo) -> None:
        self.end = member.offset
        if member.isdir():
            return
        if is_sidecar(member.name):
            self.ignored.append(member.name)
            return
        if not member.isreg() or member.sparse is not None:
            kind = "sparse" if member.isreg() else "a link or device"
            raise ShardDamage(self.shard, member.offset, f"member {member.name!r} is {kind}: write plain files")
        if member.offset_data + member.size > self.size:
            raise ShardDamage(
                self.shard, member.offset, f"cut off inside {member.name!r}: the file ends at {self.size}"
            )
        key = key_of(member.name)
        if key is None:
            self.ignored.append(member.name)
            if may_be_loose(member.name):
                self._loose.append((member.name, member.offset, member.offset_data, member.size))
            return
        extension = member.name[len(key) + 1 :].lower()
        if key != self._current:
            if key in self.records:
                raise ShardDamage(
                    self.shard,
                    member.offset,
                    f"the members of key {key!r} do not lie together: {member.name!r} comes after other samples, so "
                    "that a reader of webdataset shards would make two incomplete samples of them. Pack the files "
                    "again in the order of their names: `tar --sort=name -cf NEW.tar -C FOLDER .`",
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
        if self.problem is not None:
            raise self.problem

    def alone(self, file: BinaryIO) -> int:
        """The questions of a record that is looked at alone; raises what is wrong with it."""
        self._check_record()
        if self.problem is not None:
            raise self.problem
        return int(self.questions(file).sum())

    def questions(self, file: BinaryIO) -> np.ndarray:
        """int32 [records]: how many questions each record holds, after reading and checking its JSON; also looks for
        pictures that no loader would read."""
        counts = np.ones(len(self.records), dtype=np.int32)
        hidden: list[tuple[str, str, str]] = []
        for row, (key, parts) in enumerate(self.records.items()):
            try:
                counts[row] = _count_questions(file, parts)
            except SampleError as error:
                raise ShardDamage(self.shard, self.starts[key], f"sample {key!r}: {error}") from None
            hidden += [(key, name, problem) for name, problem in _unread_pictures(file, parts)]
        if hidden:
            key, name, problem = hidden[0]
            counted: dict[str, int] = {}
            for _, other, _ in hidden:
                counted[other] = counted.get(other, 0) + 1
            total = ""
            if len(hidden) > 1:
                total = "; in this shard: " + ", ".join(f".{one} in {count} records" for one, count in counted.items())
            raise ShardDamage(self.shard, self.starts[key], f"sample {key!r}: its .{name} {problem}{total}")
        for member, offset, start, size in self._loose:
            if loose := loose_picture(file, start, size):
                raise ShardDamage(self.shard, offset, f"member {member!r} {loose}")
        return counts

    def _check_record(self) -> None:
        if self._current is None or self.problem is not None:
            return
        problem = _record_problem(self.records[self._current], self.require)
        if problem:
            self.problem = ShardDamage(self.shard, self.starts[self._current], f"sample {self._current!r} {problem}")


def _record_problem(parts: dict[str, Any], require: Sequence[str]) -> str | None:
    """What is wrong with a record by the names of its members alone."""
    pictures = [name for name in parts if is_image(name)]
    dotted = [name for name in parts if name.endswith((".json", ".cls"))]
    for name in require:
        met = name in parts or (name == "json" and "cls" in parts)
        if met or (name == "image" and pictures):
            continue
        if dotted and name == "json":
            return (
                f"has no .json, but .{dotted[0]}: a key ends at the first dot of a file's name, so that files such as "
                f"*.{dotted[0]} are taken for parts of one sample. Replace the other dots in the names, by '_' say"
            )
        return f"has no .{name} (found {', '.join(sorted(parts))})"
    numbers = sorted(number for name in pictures if (number := image_number(name)) is not None)
    if len(pictures) > 1 and len(numbers) < len(pictures):
        return (
            f"has more than one image: {', '.join(sorted(pictures))}; name them .0.jpg, .1.jpg, … in their order, or "
            "take out what the model is not to see"
        )
    if numbers != list(range(len(numbers))):
        return f"has images numbered {numbers}, expected 0, 1, … without gaps"
    return None


def _count_questions(file: BinaryIO, parts: dict[str, tuple[int, int]]) -> int:
    limits.check_sizes({name: parts[name][1] for name in ("json", "cls") if name in parts})
    if "cls" in parts:
        parse_class(_read(file, parts["cls"]))
        if "json" not in parts:
            return 1
        meta = parse_json(_read(file, parts["json"]))
        if "question" not in meta and "questions" not in meta:
            return 1
    elif "json" not in parts:
        return 1
    return len(parse_record(_read(file, parts["json"])).get("questions", "1"))


def _unread_pictures(file: BinaryIO, parts: dict[str, tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """Fields that are pictures which no loader reads, and why it does not."""
    for name, (start, size) in parts.items():
        if not fields.needs_look(name):
            continue
        kind = fields.picture_format(_read(file, (start, min(size, fields.SNIFFED))), size)
        if is_image(name):
            if kind not in fields.READ:
                what = f"is a {kind} picture" if kind else "is no picture in a known format"
                yield name, f"{what}, and only JPEG, PNG and WebP are read: convert it, or take it out"
        elif kind is not None:
            yield name, f"is a {kind} picture under a name that is not read: call it .jpg, .png or .webp"


def _no_tar(file: BinaryIO, error: BaseException) -> str:
    """Why a file is no tar, in words that lead to the fix."""
    file.seek(0)
    head = file.read(fields.SNIFFED)
    if kind := fields.compression(head):
        return (
            f"is compressed ({kind}): samples are read by their place in the file, so shards must be plain tar files. "
            f"Unpack it ({'gunzip' if kind == 'gzip' else kind + ' -d'})"
        )
    if other := fields.other_file(head):
        return f"is {other}"
    return f"not a whole tar file: {str(error) or type(error).__name__}"


def _read(file: BinaryIO, span: tuple[int, int]) -> bytes:
    file.seek(span[0])
    return file.read(span[1])


def layout_of(keys: Sequence[str], names: Sequence[str], spans: np.ndarray, questions: np.ndarray) -> str:
    """The digest :attr:`ShardIndex.layout`. Of :class:`Keys` no strings are made: it is compared at every opening."""
    digest = hashlib.blake2b(digest_size=16)
    packed = keys if isinstance(keys, Keys) else Keys.of(keys)
    digest.update(np.insert(packed.text, packed.ends, 0).tobytes())  # every key and a zero
    for part in ("", *names):
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    digest.update(spans.astype("<i8").tobytes())
    digest.update(questions.astype("<i4").tobytes())
    return digest.hexdigest()
