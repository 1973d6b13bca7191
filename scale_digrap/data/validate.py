"""Looking for everything that is wrong with shards, and saying all of it, not only the first thing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO, TypeVar

from scale_digrap.data import limits
from scale_digrap.data.decode import ImageDecoder
from scale_digrap.data.errors import DataError, SampleError, ShardDamage
from scale_digrap.data.fields import is_image
from scale_digrap.data.index import Manifest, ShardEntry
from scale_digrap.data.listing import as_path, plain, shards_in
from scale_digrap.data.progress import bar
from scale_digrap.data.sample import check_text, parse_class, parse_json, signal_in
from scale_digrap.data.scan import ShardIndex, scan_shard
from scale_digrap.data.store import MANIFEST_NAME, ShardStore
from scale_digrap.data.urls import basename, is_local, local_path, show
from scale_digrap.runtime.text import home

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class BadRecord:
    """A record of a shard that is whole, which no loader can use: byte offset of its first member, and why."""

    key: str
    offset: int
    problem: str


@dataclass
class ShardReport:
    """What was found in one shard.

    Attributes:
        shard: path or URL.
        bytes, records, samples: 0 where they could not be counted.
        damage: what is wrong with the shard as a whole, or None; at byte `offset`, if it has a place.
        bad: records that no loader can use: text, sizes, and, when asked, pictures that cannot be decoded.
        notes: what a loader leaves out though nothing is wrong: fields that are not read, members of no record.
    """

    shard: str
    bytes: int = 0
    records: int = 0
    samples: int = 0
    damage: str | None = None
    offset: int | None = None
    bad: list[BadRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.damage is None and not self.bad


@dataclass(frozen=True)
class Shard:
    """A shard to look at, with its line in the manifest, if there is one."""

    url: str
    entry: ShardEntry | None = None
    listed: bool = True
    """False where a manifest lies beside it and does not have it."""
    classes: int | None = None

    @property
    def name(self) -> str:
        return show(self.url)


def find_shards(urls: Sequence[str | Path], store: ShardStore) -> list[Shard]:
    """All shards that are meant: of a local folder, its ``*.tar`` and what its manifest lists.

    Raises:
        DataError: see :meth:`ShardStore.expand`.
    """
    names: list[str] = []
    for url in urls:
        path = Path(home(local_path(str(url)))) if is_local(str(url)) else None
        if path is not None and path.is_dir():
            found = {as_path(str(one)) for one in shards_in(path)}
            manifest = store.manifest(str(path / MANIFEST_NAME))
            found |= {
                as_path(str(path / plain(entry.name, str(path / MANIFEST_NAME))))
                for entry in (manifest.shards if manifest else ())
            }
            if not found:
                raise DataError(f"folder {str(path)!r} holds neither {MANIFEST_NAME} nor a *.tar")
            names += sorted(found)
        else:
            names += store.expand(url)
    if len(set(names)) < len(names):
        raise DataError("the same shard was named twice")
    manifests: dict[str, Manifest | None] = {}
    shards = []
    for name in names:
        folder = name.rpartition("/")[0]
        if folder not in manifests:
            manifests[folder] = store.manifest(name)
        manifest = manifests[folder]
        lines = {entry.name: entry for entry in manifest.shards} if manifest else {}
        entry = lines.get(basename(name))
        classes = len(manifest.classes) if manifest is not None and manifest.classes is not None else None
        shards.append(Shard(name, entry, listed=manifest is None or entry is not None, classes=classes))
    return shards


def validate_shards(
    shards: Sequence[Shard],
    store: ShardStore,
    *,
    decode: bool = False,
    checksums: bool = True,
    require: Sequence[str] = ("json",),
    workers: int = 0,
    progress: bool = False,
) -> list[ShardReport]:
    """Look at every shard, also after damage was found in one. Indexes are neither needed nor trusted nor written.

    Args:
        shards: from `find_shards`.
        store: fetches what is not local.
        decode: decode every image too. Damage within an image shows in no header.
        checksums: compare SHA-256 where a manifest has it.
        require: see :func:`scale_digrap.data.scan.scan_shard`.
        workers: processes; 0 works in this one.
        progress: show a bar on standard error.
    """
    jobs = (_Job(shard, store, decode, checksums, tuple(require)) for shard in shards)
    with bar(progress, "validating", len(shards)) as advance:
        reports = []
        for report in in_parallel(_validate, jobs, workers):
            reports.append(report)
            advance(1)
    return reports


@dataclass(frozen=True)
class _Job:
    shard: Shard
    store: ShardStore
    decode: bool
    checksums: bool
    require: tuple[str, ...]


def in_parallel(function: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """Results in order, from this process or from several."""
    if workers <= 0:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        yield from pool.map(function, jobs)


def _validate(job: _Job) -> ShardReport:
    shard, report = job.shard, ShardReport(job.shard.name)
    if not shard.listed:
        report.damage = f"is not in the {MANIFEST_NAME} beside it, so a loader leaves it out; index the folder again"
        return report
    try:
        path = job.store.path(shard.url)
        report.bytes = path.stat().st_size
        index = scan_shard(path, require=job.require)
        report.records, report.samples, report.notes = len(index.keys), index.samples, index.notes()
        _compare(path, index, shard, job.checksums)
        signals: list[tuple[str, str]] = []
        report.bad = unusable(path, index, shard.classes, decode=job.decode, signals=signals)
        if signals:
            key, found = signals[0]
            report.notes.append(
                f"{len(signals)} records hold text that models take for a signal, such as {found!r} in sample {key!r}: "
                "it is read as plain text"
            )
    except ShardDamage as damage:
        report.damage, report.offset = damage.problem, damage.offset
    except DataError as error:
        report.damage = str(error)
    except OSError as error:
        report.damage = f"cannot be read: {error.strerror}"
    return report


def _compare(path: Path, index: ShardIndex, shard: Shard, checksums: bool) -> None:
    entry = shard.entry
    if entry is None:
        return
    for what, here, there in (("bytes", index.size, entry.bytes), ("samples", index.samples, entry.samples)):
        if here != there:
            raise ShardDamage(shard.name, None, f"has {here} {what}, its manifest says {there}")
    if checksums and entry.sha256:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != entry.sha256:
            raise ShardDamage(
                shard.name, None, f"its sha256 is {digest.hexdigest()[:16]}…, its manifest says {entry.sha256[:16]}…"
            )


def unusable(
    path: Path,
    index: ShardIndex,
    classes: int | None = None,
    *,
    decode: bool = True,
    signals: list[tuple[str, str]] | None = None,
) -> list[BadRecord]:
    """The records of a whole shard that a loader counts as bad: too large, with text that cannot be used, a class
    without a name, or, where `decode` says so, images that cannot be decoded.

    Args:
        path: the shard.
        index: of it.
        classes: a class number from this on is bad.
        decode: decode images.
        signals: gets (key, text) of records that are usable and hold what some model takes for a signal.
    """
    decoder = ImageDecoder() if decode else None
    columns = [(column, name) for column, name in enumerate(index.fields) if name in ("json", "cls") or is_image(name)]
    bad = []
    with open(path, "rb") as file:
        for record, spans in enumerate(index.spans.tolist()):
            parts = {name: (spans[column][0], spans[column][1]) for column, name in columns if spans[column][1] >= 0}
            found: list[str] = []
            problem = record_problem(file, parts, decoder, classes, found)
            if found and signals is not None:
                signals.append((index.keys[record], found[0]))
            if problem is not None:
                start = min(offset for offset, size in spans if size >= 0) - 512
                bad.append(BadRecord(index.keys[record], start, problem))
    return bad


def record_problem(
    file: BinaryIO,
    parts: Mapping[str, tuple[int, int]],
    decoder: ImageDecoder | None,
    classes: int | None,
    signals: list[str] | None = None,
) -> str | None:
    """Why a record of a whole shard is bad; None if it is not.

    Args:
        file: the shard.
        parts: field → (offset, size), of the fields that are read.
        decoder: of images; None does not look into them.
        classes: a class number from this on is bad.
        signals: gets what in its text some model takes for a signal.
    """
    name = ""
    try:
        limits.check_sizes({name: size for name, (_, size) in parts.items()})
        images: list[bytes] = []
        for name, (offset, size) in parts.items():
            if name in ("json", "cls"):
                file.seek(offset)
                _check_field(name, file.read(size), classes, [] if signals is None else signals)
            elif decoder is not None:
                file.seek(offset)
                images.append(file.read(size))
                decoder(images[-1])
        name = ""
        if decoder is not None:
            decoder.check(images)
    except SampleError as error:
        return f".{name}: {error}" if name and is_image(name) else str(error)
    return None


def _check_field(name: str, data: bytes, classes: int | None, signals: list[str]) -> None:
    if name == "cls":
        if classes is not None and parse_class(data) >= classes:
            raise SampleError(f".cls: class {parse_class(data)}, but the manifest names {classes} classes")
        return
    meta = parse_json(data)
    for number, question in enumerate(meta.get("questions", [meta])):
        if "question" not in question:  # other facts about an image with a class
            continue
        try:
            check_text(question)
        except SampleError as error:
            raise SampleError(f"question {number}: {error}" if "questions" in meta else str(error)) from None
        if (signal := signal_in(question)) is not None:
            signals.append(signal)
