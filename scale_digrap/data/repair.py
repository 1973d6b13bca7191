"""New shards out of damaged ones, without the bad records. The old shards are not touched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from scale_digrap.data.errors import ShardDamage
from scale_digrap.data.fetch import sync_folder
from scale_digrap.data.index import Manifest, index_shards
from scale_digrap.data.progress import bar
from scale_digrap.data.salvage import Found, Stretch, salvage
from scale_digrap.data.scan import scan_shard
from scale_digrap.data.shards import ShardFile, ShardWriteError
from scale_digrap.data.store import MANIFEST_NAME, ShardStore
from scale_digrap.data.validate import BadRecord, Shard, in_parallel, unusable
from scale_digrap.runtime.text import write_json

REPORT_NAME = "repaired.json"


@dataclass
class ShardRepair:
    """What becomes of one shard.

    Attributes:
        shard: path or URL.
        whole: nothing is wrong with it: it is copied byte for byte.
        kept, dropped: records.
        stretches: bytes that hold nothing readable.
    """

    shard: str
    whole: bool
    kept: int = 0
    dropped: list[BadRecord] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    shard: Shard
    store: ShardStore
    require: tuple[str, ...]
    decode: bool


def repair_shards(
    shards: Sequence[Shard],
    store: ShardStore,
    folder: str | Path,
    *,
    require: Sequence[str] = ("json",),
    decode: bool = True,
    workers: int = 0,
    progress: bool = False,
) -> list[ShardRepair]:
    """Write shards without bad records to a new folder, with a manifest and ``repaired.json``: what is gone, and why.

    Nothing is written if nothing is wrong. A shard of which nothing is left is left out.

    Args:
        shards: from :func:`scale_digrap.data.validate.find_shards`; their names must differ.
        store: fetches what is not local.
        folder: must not exist, or be empty.
        require: fields that a record must have.
        decode: records whose images cannot be decoded are bad.
        workers: processes that look for what is bad; 0 does it in this one.
        progress: show a bar on standard error.

    Raises:
        ShardWriteError: the folder holds something, two shards of one name, or no good record in any shard.
        DataError: a shard that does not exist.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ShardWriteError(f"{folder} holds files already: repaired shards go to a folder of their own")
    names = [shard.url.rpartition("/")[2] for shard in shards]
    if len(set(names)) < len(names):
        raise ShardWriteError("two of the shards have the same name: repair one folder at a time")
    jobs = [_Job(shard, store, tuple(require), decode) for shard in shards]
    results: list[tuple[ShardRepair, list[Found]]] = []
    with bar(progress, "looking", len(jobs)) as advance:
        for result in in_parallel(_look, jobs, workers):
            results.append(result)
            advance(1)
    repairs = [repair for repair, _ in results]
    if all(repair.whole for repair in repairs):
        return repairs
    if not any(repair.kept for repair in repairs):
        dropped = [(repair.shard, one) for repair in repairs for one in repair.dropped]
        first = "".join(f". The first: {shard}, {one.key!r}: {one.problem}" for shard, one in dropped[:1])
        raise ShardWriteError(f"not one record of these shards is good: nothing to write{first}")

    staging = folder.with_name(f".{folder.name}.writing.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        paths = []
        with bar(progress, "writing", len(jobs)) as advance:
            for name, job, (repair, good) in zip(names, jobs, results, strict=True):
                if repair.kept:
                    paths.append(staging / name)
                    _write(store.path(job.shard.url), paths[-1], repair, good)
                advance(1)
        manifest = index_shards(paths, require=require)
        manifest.classes = _classes(shards, store)
        manifest.save(staging / MANIFEST_NAME)
        content = [asdict(repair) for repair in repairs if not repair.whole]
        # ASCII: keys need not be UTF-8.
        (staging / REPORT_NAME).write_text(write_json(content, indent=1) + "\n", encoding="utf-8")
        os.rename(staging, folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise ShardWriteError(f"cannot write {folder}: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return repairs


def _look(job: _Job) -> tuple[ShardRepair, list[Found]]:
    """What is wrong with a shard, and, if anything is, its good records."""
    path = job.store.path(job.shard.url)
    try:
        index = scan_shard(path, require=job.require)
        if not unusable(path, index, job.shard.classes, decode=job.decode):
            return ShardRepair(job.shard.name, whole=True, kept=len(index.keys)), []
    except ShardDamage:
        pass
    found, stretches = salvage(path, require=job.require, decode=job.decode, classes=job.shard.classes)
    good = [one for one in found if one.problem is None]
    for one in found:
        one.members = []
    dropped = [BadRecord(one.key, one.offset, one.problem) for one in found if one.problem is not None]
    return ShardRepair(job.shard.name, whole=False, kept=len(good), dropped=dropped, stretches=stretches), good


def _write(source: Path, target: Path, repair: ShardRepair, good: Sequence[Found]) -> None:
    if repair.whole:
        shutil.copyfile(source, target)
        return
    with open(source, "rb") as file, open(target, "wb") as stream:
        shard = ShardFile(stream)
        for one in good:
            content = {}
            for name, (offset, size) in one.fields.items():
                file.seek(offset)
                content[name] = file.read(size)
            shard.add(one.key, content)
        shard.close()


def _classes(shards: Sequence[Shard], store: ShardStore) -> list[str] | None:
    """The class names of the shards' manifests, if they agree."""
    manifests: list[Manifest | None] = [store.manifest(shard.url) for shard in shards]
    names = [manifest.classes for manifest in manifests if manifest is not None]
    return names[0] if names and all(name == names[0] for name in names) else None
