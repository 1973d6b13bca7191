"""Indexes of shards on disk, and the manifest of a set of shards.

An index is a file ``SHARD.idx``: a line of magic, the length of a JSON header and its digest, the header, then arrays
that are mapped into memory. The header holds the digest of the arrays (:attr:`ShardIndex.layout`), which is compared
when an index is opened: an index that has rotted, or was put there with other samples than the manifest's, is made
again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np

from scale_digrap.data.descriptors import is_exhausted
from scale_digrap.data.errors import DataError
from scale_digrap.data.places import CacheError, default_cache, hash_file, open_kept, private_folder
from scale_digrap.data.scan import RULES, Keys, ShardIndex, layout_of, scan_shard
from scale_digrap.runtime.files import write_whole
from scale_digrap.runtime.text import TextError, home, one_line, parse_json, read_bytes

__all__ = [
    "Manifest",
    "ShardEntry",
    "ShardIndex",
    "hash_shard",
    "index_shards",
    "load_index",
    "scan_shard",
]

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_MAGIC = b"scale_digrap shard index 2\n"
_ANY_MAGIC = b"scale_digrap shard index "
_LENGTH, _DIGEST = 16, 32
_TAR_BLOCK = 512
_MANIFEST_VERSION = 1
_MOST_BYTES = 1 << 60
_MAKE_IT = "Make it anew with `scale-digrap shards index`"


def load_index(
    path: Path,
    *,
    cache_dir: Path | None = None,
    require: Sequence[str] = ("json",),
    beside: bool = True,
    sha256: str = "",
) -> ShardIndex:
    """The stored index of a shard, or a new one, which is stored: beside the shard or, where that place is read-only,
    in ``cache_dir`` (None: the user's cache folder).

    A stored index counts only for a file of the size and modification time that it was made from, and only if it was
    checked for all that ``require`` names.

    Args:
        path: a local tar file.
        cache_dir: see above.
        require: see :func:`scan_shard`.
        beside: False keeps the folder of the shard as it is.
        sha256: of the file, if that has just been compared: an index of this checksum then counts as well.

    Raises:
        ShardDamage: see :func:`scan_shard`.
        DataError: no such file.
    """
    path = Path(path)
    stat = _stat(path)
    places = _Places(path, cache_dir, beside)
    index = _stored(places, path, stat, require, sha256)
    if index is None:
        index = replace(scan_shard(path, require=require), sha256=sha256)
        _store(index, places, path, stat)
    return index


def hash_shard(path: Path, index: ShardIndex, *, cache_dir: Path | None = None) -> ShardIndex:
    """The index with the file's SHA-256: read now if it is not known yet, and stored."""
    if index.sha256:
        return index
    path = Path(path)
    stat = _stat(path)
    index = replace(index, sha256=hash_file(path))
    _store(index, _Places(path, cache_dir), path, stat)
    return index


@dataclass
class ShardEntry:
    """One shard in a manifest: file name, bytes, samples (questions), SHA-256 and :attr:`ShardIndex.layout`."""

    name: str
    bytes: int
    samples: int
    sha256: str
    layout: str = ""


@dataclass
class Manifest:
    """The shards of a data set, in order, and the names of its classes, if it has any."""

    version: int = _MANIFEST_VERSION
    shards: list[ShardEntry] = field(default_factory=list)
    classes: list[str] | None = None

    @property
    def samples(self) -> int:
        """Questions in all shards."""
        return sum(entry.samples for entry in self.shards)

    def save(self, path: str | Path) -> None:
        """Write as JSON; the file is replaced whole or not at all."""
        write_whole(path, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: no such file, or not a manifest of this version.
        """
        try:
            data = read_bytes(path)
        except TextError as error:
            raise DataError(f"the manifest cannot be read: {error}") from None
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: bytes, where: str) -> Manifest:
        """A manifest out of its bytes; ``where`` names it in errors.

        Raises:
            DataError: not a manifest of this version, or one whose numbers cannot be so.
        """
        try:
            values = parse_json(data, "it")
        except TextError as error:
            raise DataError(f"{where} is not a manifest: {error}. {_MAKE_IT}") from None
        if not isinstance(values, dict) or not isinstance(values.get("shards"), list) or "version" not in values:
            raise DataError(f"{where} is not a manifest: it has no list of 'shards' and no 'version'. {_MAKE_IT}")
        if values["version"] != _MANIFEST_VERSION:
            raise DataError(
                f"{where} is a manifest of version {values['version']!r}, expected {_MANIFEST_VERSION}. {_MAKE_IT}"
            )
        shards = [_manifest_entry(line, number, where) for number, line in enumerate(values["shards"])]
        names: set[str] = set()
        for entry in shards:
            if entry.name in names:
                raise DataError(f"{where} lists shard {entry.name!r} twice. {_MAKE_IT}")
            names.add(entry.name)
        if sum(entry.bytes for entry in shards) > _MOST_BYTES:
            raise DataError(f"{where}: its shards have more than {_MOST_BYTES} bytes together. {_MAKE_IT}")
        classes = values.get("classes")
        if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
            raise DataError(f"{where}: 'classes' must be a list of names")
        return cls(_MANIFEST_VERSION, shards, classes)


def _manifest_entry(line: Any, number: int, where: str) -> ShardEntry:
    """One line of a manifest, checked: numbers decide about memory and order long before a shard is opened."""
    if not isinstance(line, dict):
        raise DataError(f"{where}: entry {number} is not an object. {_MAKE_IT}")
    name = line.get("name")
    called = f"shard {name!r}" if isinstance(name, str) and name else f"entry {number}"

    def wrong(key: str, expected: str) -> DataError:
        value = repr(line[key]) if key in line else "nothing"
        return DataError(
            f"{where} is not a manifest that can be used: {called} has no valid name, bytes or samples: its {key!r} is "
            f"{value[:80]}, expected {expected}. {_MAKE_IT}"
        )

    if not isinstance(name, str) or not name:
        raise wrong("name", "a file name")
    for key in ("bytes", "samples"):
        value = line.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST_BYTES:
            raise wrong(key, f"a whole number from 0 to {_MOST_BYTES}")
    if line["samples"] > line["bytes"]:
        raise wrong("samples", f"no more samples than its {line['bytes']} bytes")
    sha256, layout = line.get("sha256", ""), line.get("layout", "")
    if not isinstance(sha256, str) or not re.fullmatch(r"|[0-9a-f]{64}", sha256):
        raise wrong("sha256", "64 hexadecimal digits")
    if not isinstance(layout, str):
        raise wrong("layout", "text")
    return ShardEntry(name, line["bytes"], line["samples"], sha256, layout)


def index_shards(
    paths: Iterable[str | Path],
    *,
    workers: int = 0,
    cache_dir: Path | None = None,
    require: Sequence[str] = ("json",),
    progress: bool = False,
) -> Manifest:
    """Index every shard that has no fresh index yet, and describe the set.

    Args:
        paths: local tar files, in the order of the data set; their names must differ.
        workers: processes; 0 works in this one.
        cache_dir: where indexes go if they cannot lie beside the shards.
        require: see :func:`scan_shard`.
        progress: show a bar on standard error.

    Raises:
        ShardDamage: of the first shard, in order, that is damaged.
        DataError: two shards of one name, or with the same samples.
    """
    files = [Path(path) for path in paths]
    names: dict[str, Path] = {}
    for file in files:
        if names.setdefault(file.name, file) is not file:
            raise DataError(f"{names[file.name]} and {file} have the same name: a manifest could not tell them apart")
    jobs = [(file, cache_dir, tuple(require)) for file in files]
    entries: list[ShardEntry] = []
    with contextlib.ExitStack() as stack:
        results: Iterable[ShardEntry]
        if workers and len(files) > 1:
            pool: Executor = ProcessPoolExecutor(min(workers, len(files)), mp_context=get_context("forkserver"))
            stack.callback(pool.shutdown, cancel_futures=True)
            results = pool.map(_entry, jobs)
        else:
            results = map(_entry, jobs)
        if progress and files:
            from rich.console import Console
            from rich.progress import track

            console = Console(file=sys.stderr)
            results = track(results, description="indexing", total=len(files), console=console)
        entries.extend(results)
    check_distinct(entries)
    return Manifest(shards=entries)


def check_distinct(entries: Sequence[ShardEntry], sha256: Callable[[int], str] | None = None) -> None:
    """Refuse a shard that occurs twice under two names: its samples would count twice.

    Args:
        entries: of a set.
        sha256: computes the checksum of shard i; called for those that could be equal and have none yet.

    Raises:
        DataError: naming both.
    """
    seen: dict[str, list[int]] = {}
    for number, entry in enumerate(entries):
        if not entry.layout or not entry.samples:  # an empty shard has no samples to repeat
            continue
        for other in seen.setdefault(entry.layout, []):
            sums = [entries[i].sha256 or (sha256(i) if sha256 else "") for i in (other, number)]
            if sums[0] == sums[1]:
                raise DataError(
                    f"{entries[other].name} and {entry.name} hold the same samples: one is a copy, and its samples "
                    "would count twice"
                )
        seen[entry.layout].append(number)


def _entry(job: tuple[Path, Path | None, tuple[str, ...]]) -> ShardEntry:
    path, cache_dir, require = job
    index = hash_shard(path, load_index(path, cache_dir=cache_dir, require=require), cache_dir=cache_dir)
    for note in index.notes():
        log.warning("%s: %s", path, note)
    return ShardEntry(path.name, index.size, index.samples, index.sha256, index.layout)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror}") from None


class _Places:
    """Where an index of this shard may lie, best place first.

    Args:
        path: of the shard.
        cache_dir: named by the user; None: the user's own cache folder.
        beside: False leaves the shard's folder out.
    """

    def __init__(self, path: Path, cache_dir: Path | None, beside: bool = True) -> None:
        self._path, self._cache_dir, self._beside = path, cache_dir, beside

    def __iter__(self) -> Iterator[tuple[Path, bool]]:
        """(place, whether its folder is this user's own). The cache folder is made, and looked at, only when the place
        beside the shard will not do."""
        path = self._path
        if self._beside:
            yield path.with_name(path.name + ".idx"), False
        if self._cache_dir is not None:
            folder = private_folder(Path(home(str(self._cache_dir))), what="the folder for indexes")
        else:
            try:
                folder = default_cache()
            except OSError:  # not even a temporary folder can be written to
                return
        yield folder / f"{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]}-{path.name}.idx", True


def _stored(
    places: Iterable[tuple[Path, bool]], path: Path, stat: os.stat_result, require: Sequence[str], sha256: str
) -> ShardIndex | None:
    for place, own in places:
        try:
            data = _mapped(place, own)
        except (OSError, ValueError, CacheError) as error:
            if isinstance(error, OSError) and is_exhausted(error):
                raise
            if not isinstance(error, FileNotFoundError):
                log.warning("the index %s cannot be used (%s): made again", place, one_line(error))
            continue
        if data[: len(_MAGIC)] != _MAGIC:
            if data[: len(_ANY_MAGIC)] == _ANY_MAGIC:
                _say_once("indexes of another version of this package, such as %s, are made again", place)
            else:
                log.warning("%s is not an index: made again", place)
            continue
        try:
            index = _parse(data, path.name, stat, sha256)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            log.warning("the index %s is damaged (%s): made again", place, one_line(error))
            continue
        if index is not None and set(require) <= set(index.require):
            return index
    return None


def _mapped(place: Path, own: bool) -> mmap.mmap:
    """The bytes of an index. In the user's own cache folder nothing else than a file is opened, nor through a link;
    beside a shard it has the trust that the shard has, but must be a file, too."""
    if own:
        descriptor = open_kept(place, os.O_RDONLY)
    else:
        descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def _parse(data: mmap.mmap, name: str, stat: os.stat_result, sha256: str) -> ShardIndex | None:
    """The index, or None if it is of another state of the shard.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError: it is damaged.
    """
    start = len(_MAGIC) + _LENGTH + _DIGEST
    length = int(data[len(_MAGIC) : len(_MAGIC) + _LENGTH])
    encoded = data[start : start + length]
    if length < 0 or _digest(encoded) != data[start - _DIGEST : start]:
        raise ValueError("its header has another digest")
    header = parse_json(encoded, "its header")
    unchanged = header["mtime_ns"] == stat.st_mtime_ns or (sha256 and header["sha256"] == sha256)
    if header["size"] != stat.st_size or not unchanged or header.get("rules") != RULES:
        return None
    fields, records, characters = tuple(header["fields"]), header["records"], header["text"]
    if not (isinstance(records, int) and isinstance(characters, int) and min(records, characters) >= 0):
        raise ValueError("its counts are not numbers")
    offset = start + length
    arrays = []
    for kind, count in (("<i8", records * len(fields) * 2), ("<i8", records), ("<i4", records), ("u1", characters)):
        arrays.append(np.frombuffer(data, dtype=kind, count=count, offset=offset))
        offset += arrays[-1].nbytes
    if offset != len(data):
        raise ValueError("its length is another")
    spans, ends, questions, text = arrays
    spans = spans.reshape(records, len(fields), 2)
    _check_ranges(spans, ends, questions, characters, stat.st_size)
    keys = Keys(text, ends)
    if layout_of(keys, fields, spans, questions) != header["layout"]:
        raise ValueError("its arrays have another digest")
    return ShardIndex(
        name=name,
        size=stat.st_size,
        keys=keys,
        fields=fields,
        spans=spans,
        questions=questions,
        layout=header["layout"],
        require=tuple(header["require"]),
        sha256=header["sha256"],
        ignored=(tuple(header["ignored"][0]), header["ignored"][1]),
    )


def _check_ranges(spans: np.ndarray, ends: np.ndarray, questions: np.ndarray, characters: int, size: int) -> None:
    """Refuse byte ranges outside of a shard of ``size`` bytes, keys outside of the text, records without questions."""
    offsets, sizes = spans[..., 0], spans[..., 1]
    absent = (offsets == -1) & (sizes == -1)
    # sizes <= size - offsets, not offsets + sizes <= size, which could overflow.
    inside = (offsets >= _TAR_BLOCK) & (offsets <= size) & (sizes >= 0) & (sizes <= size - offsets)
    if not (absent | inside).all():
        raise ValueError(f"a byte range lies outside of the shard's {size} bytes")
    bounds = np.concatenate([[0], ends, [characters]])
    if (np.diff(bounds) < 0).any() or (len(ends) and ends[-1] != characters):
        raise ValueError("its keys have no place in it")
    if (questions < 1).any():
        raise ValueError("a record has no question")


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST // 2).hexdigest().encode()


_said: set[str] = set()


def _say_once(message: str, *values: object) -> None:
    if message not in _said:
        _said.add(message)
        log.warning(message, *values)


def _store(index: ShardIndex, places: Iterable[tuple[Path, bool]], path: Path, stat: os.stat_result) -> None:
    keys = index.keys if isinstance(index.keys, Keys) else Keys.of(index.keys)
    header: dict[str, Any] = {
        "size": index.size,
        "mtime_ns": stat.st_mtime_ns,
        "fields": index.fields,
        "records": len(keys),
        "text": len(keys.text),
        "layout": index.layout,
        "require": index.require,
        "rules": RULES,
        "sha256": index.sha256,
        "ignored": index.ignored,
    }
    encoded = json.dumps(header).encode()
    # Arrays at multiples of eight bytes, so that they can be used where they are mapped.
    encoded += b" " * (-(len(_MAGIC) + _LENGTH + _DIGEST + len(encoded)) % 8)
    parts = [
        _MAGIC,
        b"%16d" % len(encoded),
        _digest(encoded),
        encoded,
        index.spans.astype("<i8").tobytes(),
        keys.ends.astype("<i8").tobytes(),
        index.questions.astype("<i4").tobytes(),
        keys.text.tobytes(),
    ]
    problem: Exception | str = "no folder for it"
    for place, _ in places:
        try:
            _replace_file(place, parts)
        except OSError as error:
            problem = error
            continue
        return
    log.warning("the index of %s cannot be stored (%s): every run makes it again; set data.cache_dir", path, problem)


def _replace_file(path: Path, parts: Iterable[bytes]) -> None:
    write_whole(path, parts)
