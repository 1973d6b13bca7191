"""One object from a remote place into one file: resumed, checked, with time limits, or a clear error.

What has arrived lies in ``NAME.part``; ``NAME.part.json`` says which version of the object it is the start of, so that
a resumed download never joins two versions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from scale_digrap.data.places import CacheError, is_kept, open_kept, read_note, write_note
from scale_digrap.data.streams import FetchError, FetchOptions, Stream, TryAgainError, open_stream
from scale_digrap.data.urls import scheme, show

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_SLOWEST = 1024  # bytes per second, over a whole timeout: a server that drips is a stalled server
_PROGRESS = 1 << 20  # bytes after which a broken connection starts a new count of retries
_LONGEST_PAUSE_S = 60.0


class Complete(NamedTuple):
    """What has been fetched: bytes, SHA-256 in hexadecimal, and what its source calls this content, if anything."""

    size: int
    sha256: str
    version: str | None


def fetch(
    url: str,
    target: Path,
    options: FetchOptions,
    *,
    size: int | None = None,
    sha256: str | None = None,
    reserve: Callable[[int], None] = lambda size: None,
) -> Complete:
    """Download `url` to `target`, going on from what an earlier attempt left in ``target.part``.

    The caller sees to it that only one process does this at a time.

    Args:
        url: http(s), ``pipe:`` or any protocol of fsspec.
        target: appears complete (synced, then renamed), or not at all.
        size, sha256: what the object must be; None if nobody has said.
        reserve: called with the size in bytes before anything is written, once it is known; may raise.

    Raises:
        FetchError: after the last retry, or at once for what no retry mends (not found, not allowed).
    """
    part, note = part_files(target)
    failures, reached, reason = 0, _length(part), ""
    while True:
        try:
            return _attempt(url, target, options, size, sha256, reserve)
        except TryAgainError as error:
            reason = str(error)
            if error.fresh:
                _remove(part, note)
            elif _length(part) >= reached + _PROGRESS:
                failures = 0
            reached = _length(part)
            failures += 1
            if failures > options.retries:
                break
            pause = error.after if error.after is not None else options.backoff_s * 2 ** (failures - 1)
            pause = min(pause, _LONGEST_PAUSE_S) * random.uniform(0.75, 1.25)
            log.warning("%s: %s; attempt %d of %d in %.1f s", show(url), reason, failures, options.retries, pause)
            time.sleep(pause)
    raise FetchError(f"{show(url)} could not be fetched in {failures} attempts; the last one: {reason}")


def look(url: str, options: FetchOptions) -> tuple[int | None, str | None]:
    """Size in bytes and version of an object as it is now, each None if its place does not say.

    Raises:
        FetchError: it cannot be asked for, after the retries.
    """
    failures = 0
    while True:
        try:
            stream = open_stream(url, 0, None, options, head=True)
            stream.close()
            return stream.size, stream.version
        except TryAgainError as error:
            failures += 1
            if failures > options.retries:
                raise FetchError(
                    f"{show(url)} could not be asked for in {failures} attempts; the last one: {error}"
                ) from None
            time.sleep(min(options.backoff_s * 2 ** (failures - 1), _LONGEST_PAUSE_S))


def part_files(target: Path) -> tuple[Path, Path]:
    """Where an unfinished download lies, and the note about its version."""
    return target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")


def _attempt(
    url: str,
    target: Path,
    options: FetchOptions,
    size: int | None,
    sha256: str | None,
    reserve: Callable[[int], None],
) -> Complete:
    part, note = part_files(target)
    offset, version = _resumable(part, note)
    if size is not None and offset > size:
        offset, version = 0, None
    stream = open_stream(url, offset, version, options)
    try:
        if stream.size is None and size is None and scheme(url) in ("http", "https"):
            raise FetchError(
                f"{show(url)}: the server tells no length, so a transfer cut short could not be noticed. "
                "Put a manifest.json beside the shards (scale-digrap shards index)"
            )
        if size is not None and stream.size is not None and stream.size != size:
            raise TryAgainError(f"it has {stream.size} bytes, the manifest says {size}", fresh=True)
        whole = size if size is not None else stream.size
        if whole is not None:
            reserve(whole)
        _write_note(note, stream.version, whole)
        digest = hashlib.sha256()
        with os.fdopen(_open_part(part), "r+b") as file:
            while file.tell() < stream.start:
                block = file.read(min(_CHUNK, stream.start - file.tell()))
                if not block:
                    raise TryAgainError("the unfinished file has become shorter", fresh=True)
                digest.update(block)
            file.truncate()
            _copy(stream, file, digest, options.timeout_s, whole)
            file.flush()
            os.fsync(file.fileno())
            got = file.tell()
    finally:
        stream.close()
    if whole is not None and got < whole:
        raise TryAgainError(f"the connection ended after {got} of {whole} bytes")
    if sha256 is not None and digest.hexdigest() != sha256:
        raise TryAgainError(
            f"its sha256 is {digest.hexdigest()[:16]}…, the manifest says {sha256[:16]}… (damaged on the way, or the "
            "shard was rewritten without its manifest)",
            fresh=True,
        )
    os.replace(part, target)
    note.unlink(missing_ok=True)
    sync_folder(target.parent)
    return Complete(got, digest.hexdigest(), stream.version)


def _open_part(part: Path) -> int:
    """The unfinished file, if it is this user's own; a new one in place of anything else that lies there."""
    try:
        return open_kept(part, os.O_RDWR, shared=False)
    except (FileNotFoundError, PermissionError, CacheError):
        part.unlink(missing_ok=True)
        return open_kept(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode=0o644)


def _copy(stream: Stream, file: Any, digest: Any, timeout_s: float, whole: int | None) -> None:
    window, moved = time.monotonic(), 0
    while data := stream.read():
        file.write(data)
        digest.update(data)
        if whole is not None and file.tell() > whole:
            raise TryAgainError(f"more than the {whole} bytes it should have", fresh=True)
        moved += len(data)
        now = time.monotonic()
        if now - window >= timeout_s:
            if moved < _SLOWEST * timeout_s:
                raise TryAgainError(f"stalled: {moved} bytes in {now - window:.0f} s")
            window, moved = now, 0


def _resumable(part: Path, note: Path) -> tuple[int, str | None]:
    """How much of which version is there; nothing if its version is unknown."""
    data = read_note(note, shared=False)
    try:
        version = None if data is None else json.loads(data)["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0, None
    return (_length(part), version) if isinstance(version, str) and version else (0, None)


def _write_note(note: Path, version: str | None, size: int | None) -> None:
    write_note(note, json.dumps({"version": version, "size": size}))


def _length(path: Path) -> int:
    return os.lstat(path).st_size if is_kept(path, shared=False) else 0


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
