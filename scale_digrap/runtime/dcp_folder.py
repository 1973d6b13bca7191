"""A folder of ``torch.distributed.checkpoint``, looked into without torch and without trust.

Its ``.metadata`` is a pickle. It is read into the plain values below, and every size and place that it claims is
compared with the files that are there, so that a forged one can neither run code nor make the reader allocate or open
what the folder does not hold.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.runtime.files import UntrustedFileError, open_inside
from scale_digrap.runtime.pickles import DTYPES, PickleError, Record, check_saved_tensor, load
from scale_digrap.runtime.text import one_line, printable, read_at_most

METADATA = ".metadata"
MAX_METADATA_BYTES = 1 << 30
"""Largest ``.metadata`` that is read; one of 100,000 layers on a thousand ranks has some hundred MB."""
_MAX_PICKLE_BYTES = 1 << 24

_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_KNOWN = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata")),
    *(
        (_METADATA, name)
        for name in ("ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")
    ),
    (_FILES, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    # StorageMeta notes the folder that was written to.
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath", "Path")),
}


class FolderError(ScaleDigrapError):
    """A folder that holds no checkpoint, or one that is damaged or forged."""


@dataclass(frozen=True)
class Chunk:
    """One rank's part of a tensor: first element and extent in every dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the folder: dtype (torch's name of it), whole shape, and the parts that are in files."""

    dtype: str
    size: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Slice:
    """Where the bytes of an entry lie: a ``torch.save`` archive inside a file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Index:
    """What a folder holds.

    Attributes:
        tensors: key → tensor.
        objects: keys of what is not a tensor.
        slices: (key, first element of the part or None for an object, position in the list of parts) → where it lies.
        version: torch's, of the format.
    """

    tensors: dict[str, StoredTensor]
    objects: list[str]
    slices: dict[tuple[str, tuple[int, ...] | None, int | None], Slice]
    version: str | None


def read_index(folder: str | os.PathLike[str]) -> Index:
    """Read a folder's ``.metadata`` and compare it with the files that are there.

    Raises:
        FolderError: there is none; it is damaged, names what does not belong there, or claims what no file holds.
    """
    name = printable(f"{Path(folder) / METADATA}")
    try:
        with open_inside(folder, METADATA) as file:
            data = read_at_most(file, MAX_METADATA_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise FolderError(f"{folder} holds no portable state: it has no {METADATA}") from None
    except OSError as error:
        raise FolderError(f"cannot read {name}: {error.strerror or error}") from None
    if len(data) > MAX_METADATA_BYTES:
        raise FolderError(f"{name} is larger than {MAX_METADATA_BYTES:,} bytes, the most that is read")
    try:
        index = _index(
            load(data, name, lambda module, key: (module, key) in _KNOWN or (module == "torch" and key in DTYPES))
        )
    except PickleError as error:
        raise FolderError(str(error)) from None
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise FolderError(f"{name} is damaged: {one_line(error)}") from None
    _compare_with_files(Path(folder), index)
    return index


def problems(folder: str | os.PathLike[str]) -> list[str]:
    """What is not safe to read in a folder: one line each; every entry's pickle is looked at, and none is run."""
    try:
        index = read_index(folder)
    except (FolderError, UntrustedFileError) as error:
        return [str(error)]
    found = []
    for key, where, file in _by_file(Path(folder), index):
        name = printable(f"{Path(folder) / where.file} ({key})")
        try:
            check_saved_tensor(_pickle_of(io.BufferedReader(_Window(file, where.offset, where.length))), name)
        except PickleError as error:
            found.append(str(error))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            found.append(f"{name} is damaged: {one_line(error)}")
    return found


def _by_file(folder: Path, index: Index) -> Iterator[tuple[str, Slice, BinaryIO]]:
    files: dict[str, list[tuple[str, Slice]]] = {}
    for (key, _, _), where in index.slices.items():
        files.setdefault(where.file, []).append((key, where))
    for file_name, entries in files.items():
        with open_inside(folder, file_name) as file:
            for key, where in entries:
                yield key, where, file


class _Window(io.RawIOBase):
    """A part of a file as a file of its own: a layer's bytes are not read for its pickle, which is small."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        data = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _pickle_of(archive: Any) -> bytes:
    """``data.pkl`` of a ``torch.save`` archive; without torch, which may not be loaded for a check."""
    with zipfile.ZipFile(archive) as entries:
        named = [entry for entry in entries.infolist() if entry.filename.rpartition("/")[2] == "data.pkl"]
        if len(named) != 1:
            raise ValueError(f"it has {len(named)} pickles, and what torch.save writes has one")
        if named[0].file_size > _MAX_PICKLE_BYTES:
            raise ValueError(f"its pickle has {named[0].file_size:,} bytes, and is more than a tensor's")
        with entries.open(named[0]) as pickle:
            return pickle.read(_MAX_PICKLE_BYTES)


def _compare_with_files(folder: Path, index: Index) -> None:
    sizes: dict[str, int] = {}
    held: dict[str, int] = {}
    for (key, _, _), where in index.slices.items():
        if where.file not in sizes:
            try:
                with open_inside(folder, where.file) as file:
                    sizes[where.file] = os.fstat(file.fileno()).st_size
            except OSError as error:
                raise FolderError(
                    f"{printable(str(folder / where.file))}: {error.strerror or 'it is missing'}"
                ) from None
        if where.offset + where.length > sizes[where.file]:
            raise FolderError(
                f"{printable(str(folder / where.file))} has {sizes[where.file]:,} bytes, and {printable(key)!r} should "
                f"lie at {where.offset:,} to {where.offset + where.length:,}: it is damaged"
            )
        held[key] = held.get(key, 0) + where.length
    for key, tensor in index.tensors.items():
        claimed = math.prod(tensor.size) * DTYPES[tensor.dtype]
        if claimed > held.get(key, 0):
            raise FolderError(
                f"{printable(str(folder))}: {printable(key)!r} should have {claimed:,} bytes, and the files hold "
                f"{held.get(key, 0):,} of it: {METADATA} is damaged"
            )


def _index(found: Any) -> Index:
    state = _state(found, "Metadata")
    tensors: dict[str, StoredTensor] = {}
    objects: list[str] = []
    for key, entry in _checked(state["state_dict_metadata"], dict).items():
        _checked(key, str)
        if _is(entry, "BytesStorageMetadata"):
            objects.append(key)
            continue
        fields = _state(entry, "TensorStorageMetadata")
        properties = _checked(_record(fields["properties"], "TensorProperties").state, tuple)
        dtype = _dtype(properties[0])
        size = _size(fields["size"])
        chunks = []
        for chunk in _checked(fields["chunks"], list):
            parts = _state(chunk, "ChunkStorageMetadata")
            offsets, sizes = _size(parts["offsets"]), _size(parts["sizes"])
            if len(offsets) != len(size) or len(sizes) != len(size):
                raise ValueError(f"a part of {key!r} has {len(offsets)} dimensions, the whole has {len(size)}")
            if any(first + extent > whole for first, extent, whole in zip(offsets, sizes, size, strict=True)):
                raise ValueError(f"a part of {key!r} reaches beyond its shape {size}")
            chunks.append(Chunk(offsets, sizes))
        tensors[key] = StoredTensor(dtype, size, tuple(chunks))
    slices: dict[tuple[str, tuple[int, ...] | None, int | None], Slice] = {}
    for place, info in _checked(state["storage_data"], dict).items():
        where, fields = _state(place, "MetadataIndex"), _state(info, "_StorageInfo")
        key, offset, number = _checked(where["fqn"], str), where.get("offset"), where.get("index")
        if fields.get("transform_descriptors"):
            raise ValueError(f"{key!r} is stored compressed or encrypted, which this package never does")
        slices[key, None if offset is None else _size(offset), None if number is None else _count(number)] = Slice(
            _checked(fields["relative_path"], str), _count(fields["offset"]), _count(fields["length"])
        )
    version = state.get("version")
    return Index(tensors, objects, slices, version if isinstance(version, str) else None)


def _record(value: Any, name: str) -> Record:
    if not _is(value, name):
        raise TypeError(f"{type(value).__name__} stands where {name} belongs")
    record: Record = value
    return record


def _dtype(value: Any) -> str:
    """A dtype is named, not called: the stand-in for it is the class itself."""
    name = value.kind.removeprefix("torch.") if isinstance(value, type) and issubclass(value, Record) else ""
    if name not in DTYPES:
        raise TypeError(f"{type(value).__name__} stands where a dtype belongs")
    return name


def _is(value: Any, name: str) -> bool:
    return isinstance(value, Record) and value.kind.rpartition(".")[2] == name


def _state(value: Any, name: str) -> dict[str, Any]:
    return dict(_checked(_record(value, name).state, dict))


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} stands where {kind.__name__} belongs")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} stands where a count belongs"[:200])
    return value


def _size(value: Any) -> tuple[int, ...]:
    (parts,) = _record(value, "Size").args
    return tuple(_count(part) for part in _checked(parts, tuple))
