"""Records → a folder of shards: shuffled, in parallel, restartable, the same bytes every time.

Everything is written to ``.NAME.writing`` beside the folder, which takes its name when all is complete; so a folder of
shards never holds a part of a data set or two versions of one. Processes only read and encode pictures. One process
puts them into shards, in order, so that their number does not show in the bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import PIL

from scale_digrap.data.encoding import MISSING, Unreadable, encode_all
from scale_digrap.data.fetch import sync_folder
from scale_digrap.data.progress import bar
from scale_digrap.data.shards import ShardFile, ShardWriteError, check_key, padded_size, record_size, shard_name
from scale_digrap.data.sources.records import Record, Source
from scale_digrap.data.written import WriteOptions, Written

RECORD_NAME = "written.json"
"""How a folder of shards was written, beside them; while they are written, how far."""
_FORMAT = 1
"""Raised when the same records and options would give other bytes."""


def write_source(
    source: Source, folder: str | Path, options: WriteOptions, *, workers: int = 0, progress: bool = False
) -> Written:
    """Write all records of a source to ``folder/PREFIX-000000.tar``, … with indexes, ``manifest.json`` and
    ``written.json``.

    A call that was interrupted goes on where it was if the records and options are the same, and starts over if not.

    Args:
        source: what `scale_digrap.data.sources` has read.
        folder: must be new, empty, or the finished result of the same call (which is then reported again).
        workers: processes that read and encode; 0 does it in this one.
        progress: show a bar on standard error.

    Raises:
        ShardWriteError: missing or unreadable pictures beyond ``allow_missing``, a record larger than ``max_size``,
            a folder that holds something else, or that another process is writing; a full disk or a picture that the
            system refuses to read, after which the same call goes on from the last finished shard.
    """
    options.check()
    folder = Path(os.path.abspath(folder))
    if not folder.name:
        raise ShardWriteError(f"{folder} cannot be a folder of shards")
    for record in source.records:
        check_key(record.key)
    if len({record.key for record in source.records}) < len(source.records):
        raise ShardWriteError(f"{source.description}: two records have the same key")
    missing = _missing(source.records, options.allow_missing)
    fingerprint = _fingerprint(source, options, missing)
    finished = _finished(folder, fingerprint)
    if finished is not None:
        return finished
    order = np.arange(len(source.records))
    if options.shuffle_seed is not None:
        order = np.random.default_rng(options.shuffle_seed).permutation(len(source.records))

    staging = folder.with_name(f".{folder.name}.writing")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        with open(staging / "lock", "w") as lock:
            _lock(lock, folder)
            finished = _finished(folder, fingerprint)
            if finished is not None:  # by the process that held the lock
                shutil.rmtree(staging)
                return finished
            written = _taken_up(staging, fingerprint)
            if written is None:
                _empty(staging)
                written = Written(source.description, fingerprint, asdict(options))
            job = _Job(source, order, options, staging, written, missing)
            with bar(progress, "writing", len(order)) as advance:
                job.run(workers, advance)
            _finish(source, staging, written, workers, progress)
            os.rename(staging, folder)
            sync_folder(folder.parent)
    except OSError as error:
        raise ShardWriteError(
            f"cannot write {folder}: {error}. What is finished stays in {staging}; the same command goes on from there"
        ) from None
    return written


class _Job:
    """The shards of one call, one after the other."""

    def __init__(
        self,
        source: Source,
        order: np.ndarray,
        options: WriteOptions,
        staging: Path,
        written: Written,
        missing: frozenset[str],
    ) -> None:
        self.records, self.order, self.options = source.records, order, options
        self.staging, self.written, self.missing = staging, written, missing
        self.done = written.shards[-1]["consumed"] if written.shards else 0
        self.left_out: list[dict[str, str]] = []

    def run(self, workers: int, advance: Callable[[int], None]) -> None:
        advance(self.done)
        jobs = (self.records[int(i)] for i in self.order[self.done :])
        shard: ShardFile | None = None
        stream: Any = None
        content = samples = 0
        try:
            for encoded in encode_all(jobs, self.options, self.missing, workers):
                if isinstance(encoded.result, Unreadable):
                    self._leave_out(encoded.record, encoded.result)
                else:
                    size = record_size(encoded.result)
                    self._check_size(encoded.record, size)
                    if shard is not None and self._full(shard.records, content + size):
                        self._close(shard, stream, samples)
                        shard = None
                    if shard is None:
                        stream = open(self._path(), "wb")  # noqa: SIM115 - closed with the shard, or below
                        shard, content, samples = ShardFile(stream), 0, 0
                    shard.add(encoded.record.key, encoded.result)
                    content += size
                    samples += encoded.record.samples
                self.done += 1
                advance(1)
            if shard is not None:
                self._close(shard, stream, samples)
        except BrokenProcessPool:
            raise ShardWriteError(
                "a process that encodes pictures died (out of memory?). The finished shards stay in "
                f"{self.staging}; the same command goes on from there"
            ) from None
        finally:
            if stream is not None:
                stream.close()
        if not self.written.shards:
            raise ShardWriteError("every record was left out; nothing to write")
        self.written.left_out += self.left_out

    def _full(self, records: int, content: int) -> bool:
        count, size = self.options.max_count, self.options.max_size
        return (count is not None and records >= count) or (size is not None and padded_size(content) > size)

    def _check_size(self, record: Record, size: int) -> None:
        if self.options.max_size is not None and padded_size(size) > self.options.max_size:
            raise ShardWriteError(
                f"record {record.key!r} alone makes a shard of {padded_size(size)} bytes, more than max_size "
                f"{self.options.max_size}"
            )

    def _leave_out(self, record: Record, cause: Unreadable) -> None:
        self.left_out.append({"key": record.key, "image": cause.image, "reason": cause.reason})
        unreadable = {one["image"] for one in (*self.written.left_out, *self.left_out) if one["reason"] != MISSING}
        count = len(self.missing) + len(unreadable)
        if count > self.options.allow_missing:
            raise ShardWriteError(
                f"{cause.image}: {cause.reason} (record {record.key!r}). Pictures missing or unreadable: {count}, "
                f"allowed: {self.options.allow_missing}. Put it right, or raise allow_missing to leave such records "
                "out; the same command goes on from the last finished shard"
            )

    def _path(self) -> Path:
        return self.staging / shard_name(self.options.prefix, len(self.written.shards))

    def _close(self, shard: ShardFile, stream: Any, samples: int) -> None:
        path = self._path()
        shard.close()
        stream.close()
        self.written.left_out += self.left_out
        self.left_out = []
        self.written.shards.append(
            {
                "name": path.name,
                "bytes": path.stat().st_size,
                "records": shard.records,
                "samples": samples,
                "consumed": self.done,
            }
        )
        self.written.save(self.staging / RECORD_NAME)


def _missing(records: Sequence[Record], allowed: int) -> frozenset[str]:
    images = {image: None for record in records for image in record.images}
    missing = [image for image in images if not os.path.isfile(image)]
    if len(missing) > allowed:
        lost = sum(1 for record in records if not set(record.images).isdisjoint(missing))
        raise ShardWriteError(
            f"{len(missing)} of {len(images)} images do not exist, such as {missing[0]}; {lost} records need them. "
            f"allow_missing={len(missing)} leaves these out"
        )
    return frozenset(missing)


def _fingerprint(source: Source, options: WriteOptions, missing: frozenset[str]) -> str:
    """Equal for calls that write the same bytes. Pictures count by their paths."""
    effective = asdict(options)
    effective.pop("allow_missing")  # decides whether, not what
    if options.resize is None:
        effective.pop("quality")
        effective.pop("resize_side")
    head = {"format": _FORMAT, "options": effective, "classes": source.classes, "missing": sorted(missing)}
    if options.resize is not None:
        head["pillow"] = PIL.__version__
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for record in source.records:
        line = [record.key, *record.images, record.label]
        digest.update(json.dumps(line).encode() + b"\n" + record.json + b"\n")
    return digest.hexdigest()


def _finished(folder: Path, fingerprint: str) -> Written | None:
    """What an earlier, identical call wrote there.

    Raises:
        ShardWriteError: the folder holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    written = Written.load(folder / RECORD_NAME)
    if written is None or written.fingerprint != fingerprint:
        what = "shards written from other records or with other options" if written else "files"
        raise ShardWriteError(f"{folder} holds {what} already: choose another folder, or remove it")
    for shard in written.shards:
        path = folder / shard["name"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            raise ShardWriteError(f"{path} was written there and is missing or has another size now: remove {folder}")
    return written


def _taken_up(staging: Path, fingerprint: str) -> Written | None:
    """The state of an interrupted call with the same result; its unfinished shard is removed."""
    written = Written.load(staging / RECORD_NAME)
    if written is None or written.fingerprint != fingerprint:
        return None
    names = {shard["name"]: shard["bytes"] for shard in written.shards}
    if any(not (staging / name).is_file() or (staging / name).stat().st_size != size for name, size in names.items()):
        return None
    for path in staging.glob("*.tar"):
        if path.name not in names:
            path.unlink()
    written.resumed = len(written.shards)
    return written


def _finish(source: Source, staging: Path, written: Written, workers: int, progress: bool) -> None:
    from scale_digrap.data.index import index_shards

    paths = [staging / shard["name"] for shard in written.shards]
    manifest = index_shards(paths, workers=workers, progress=progress)
    manifest.classes = source.classes
    if manifest.samples != written.samples:
        raise ShardWriteError(f"{written.samples} samples were written, the index finds {manifest.samples}")
    manifest.save(staging / "manifest.json")
    written.save(staging / RECORD_NAME)
    (staging / "lock").unlink()


def _empty(staging: Path) -> None:
    for path in staging.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _lock(lock: TextIO, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ShardWriteError(f"another process is writing {folder}: wait for it, or choose another folder") from None
