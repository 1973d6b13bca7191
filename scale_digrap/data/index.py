"""Indexes of shards on disk, and the manifest of a set of shards.

An index is a file ``SHARD.idx``: a line of magic, a JSON header of fixed length, then arrays that are mapped into
memory, so that opening one takes microseconds however many samples it has.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from scale_digrap.data.errors import DataError
from scale_digrap.data.scan import RULES, Keys, ShardIndex, scan_shard

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
_MAGIC = b"scale_digrap shard index 1\n"
_HEADER = 16
_MANIFEST_VERSION = 1


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
    places = _places(path, cache_dir)[0 if beside else 1 :]
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
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    index = replace(index, sha256=digest.hexdigest())
    _store(index, _places(path, cache_dir), path, stat)
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
        _replace_file(Path(path), [json.dumps(asdict(self), indent=1, ensure_ascii=False).encode() + b"\n"])

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: no such file, or not a manifest of this version.
        """
        try:
            return cls.parse(Path(path).read_bytes(), str(path))
        except OSError as error:
            raise DataError(f"cannot read the manifest {path}: {error.strerror}") from None

    @classmethod
    def parse(cls, data: bytes, where: str) -> Manifest:
        """A manifest out of its bytes; ``where`` names it in errors.

        Raises:
            DataError: not a manifest of this version.
        """
        try:
            values = json.loads(data)
            version = values["version"]
            if version != _MANIFEST_VERSION:
                raise DataError(f"{where} is a manifest of version {version}, expected {_MANIFEST_VERSION}")
            known = ShardEntry.__dataclass_fields__
            shards = [ShardEntry(**{k: v for k, v in entry.items() if k in known}) for entry in values["shards"]]
            classes = values.get("classes")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{where} is not a manifest: {error!r}. Make it with `scale-digrap shards index`") from None
        for entry in shards:
            numbers = (entry.bytes, entry.samples)
            if not (isinstance(entry.name, str) and all(isinstance(n, int) and n >= 0 for n in numbers)):
                raise DataError(f"{where}: the entry of shard {entry.name!r} has no valid name, bytes or samples")
        if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
            raise DataError(f"{where}: 'classes' must be a list of names")
        return cls(version, shards, classes)


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


def _places(path: Path, cache_dir: Path | None) -> list[Path]:
    """Where an index of this shard may lie, best place first."""
    unique = f"{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]}-{path.name}.idx"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(cache_dir) if cache_dir is not None else home / "scale_digrap" / "index"
    return [path.with_name(path.name + ".idx"), folder / unique]


def _stored(
    places: Sequence[Path], path: Path, stat: os.stat_result, require: Sequence[str], sha256: str
) -> ShardIndex | None:
    for place in places:
        try:
            with open(place, "rb") as file:
                index = _parse(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path.name, stat, sha256)
        except (OSError, ValueError, KeyError, TypeError):  # absent, empty, cut off or foreign: made anew
            continue
        if index is not None and set(require) <= set(index.require):
            return index
    return None


def _parse(data: mmap.mmap, name: str, stat: os.stat_result, sha256: str) -> ShardIndex | None:
    if data[: len(_MAGIC)] != _MAGIC:
        return None
    start = len(_MAGIC) + _HEADER
    length = int(data[len(_MAGIC) : start])
    header = json.loads(data[start : start + length])
    unchanged = header["mtime_ns"] == stat.st_mtime_ns or (sha256 and header["sha256"] == sha256)
    if header["size"] != stat.st_size or not unchanged or header.get("rules") != RULES:
        return None
    fields, records = header["fields"], header["records"]
    offset = start + length
    arrays = []
    for kind, count in (("<i8", records * len(fields) * 2), ("<i8", records), ("<i4", records), ("u1", header["text"])):
        arrays.append(np.frombuffer(data, dtype=kind, count=count, offset=offset))
        offset += arrays[-1].nbytes
    if offset != len(data):
        return None
    spans, ends, questions, text = arrays
    spans = spans.reshape(records, len(fields), 2)
    return ShardIndex(
        name=name,
        size=stat.st_size,
        keys=Keys(text, ends),
        fields=tuple(fields),
        spans=spans,
        questions=questions,
        layout=header["layout"],
        require=tuple(header["require"]),
        sha256=header["sha256"],
        ignored=(tuple(header["ignored"][0]), header["ignored"][1]),
    )


def _store(index: ShardIndex, places: Sequence[Path], path: Path, stat: os.stat_result) -> None:
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
    encoded += b" " * (-(len(_MAGIC) + _HEADER + len(encoded)) % 8)
    parts = [
        _MAGIC,
        b"%16d" % len(encoded),
        encoded,
        index.spans.astype("<i8").tobytes(),
        keys.ends.astype("<i8").tobytes(),
        index.questions.astype("<i4").tobytes(),
        keys.text.tobytes(),
    ]
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _replace_file(place, parts)
        except OSError as error:
            problem = error
            continue
        return
    log.warning("the index of %s cannot be stored (%s): every run makes it again; set data.cache_dir", path, problem)


def _replace_file(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file so that it is there whole or not at all, whoever else writes it at the same moment."""
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)  # mkstemp makes it private; other users of the shards may read the index
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
