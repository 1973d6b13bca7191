"""A bounded folder of whole shards that the processes of one node share.

Each shard has, besides its file, three lock files that outlive it: ``.lock`` is held by the one process that downloads
or removes it, ``.pin`` is shared by those that use it, ``.ahead`` by those that will. The kernel drops all three when a
process dies, however it dies.

The folder is private (:func:`scale_digrap.data.places.private_folder`), and nothing in it is opened through a link. A
shard counts only together with its note, which names its size, its checksum and the file that was checked: a file that
was put there or written to afterwards is another one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from scale_digrap.data.descriptors import most_pins
from scale_digrap.data.fetch import part_files
from scale_digrap.data.places import (
    CacheError,
    NotPrivateError,
    identity,
    is_kept,
    open_lock,
    private_folder,
    read_note,
    write_note,
)

__all__ = ["CacheError", "Note", "ShardCache"]

log = logging.getLogger(__name__)

_POLL_S = 0.05
_caches: weakref.WeakSet[ShardCache] = weakref.WeakSet()  # of this process: they share one limit
_NAME = re.compile(r"[0-9a-f]{16}-")  # what `urls.cache_name` makes; the rest of the folder is not touched


@dataclass(frozen=True)
class Note:
    """What is known of a complete file in the cache.

    Attributes:
        size: bytes.
        sha256: of the file, as it was when it was complete.
        version: what its source called this content (ETag, time); None if it gave no name.
        file: :func:`scale_digrap.data.places.identity` of the file whose checksum that is.
    """

    size: int
    sha256: str
    version: str | None = None
    file: tuple[int, ...] | None = None


class ShardCache:
    """A folder with at most `max_bytes` of shards; the least recently used ones that nobody has pinned make room.

    Safe with any number of processes and threads.

    Args:
        folder: on a disk of this node: network file systems do not all keep locks.
        max_bytes: of complete and unfinished shards together; None is without limit.
        timeout_s: how long a shard waits for others to give up room before that is an error.
        shared: other users may write to the folder, and are trusted.

    Raises:
        CacheError: the folder cannot be made or written to, or is not private.
    """

    def __init__(self, folder: Path, max_bytes: int | None, timeout_s: float, shared: bool = False) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise CacheError(f"the size limit of the shard cache must be at least 1 byte, got {max_bytes}")
        self.folder, self.max_bytes, self.timeout_s, self.shared = folder, max_bytes, timeout_s, shared
        try:
            private_folder(folder, shared=shared)
            with self.exclusive("evict"):
                pass
        except NotPrivateError:
            raise
        except OSError as error:
            raise CacheError(f"the shard cache {folder} cannot be used: {error.strerror or error}") from None
        self._pins: dict[Path, int] = {}
        self._said = False
        _caches.add(self)
        self._mutex = threading.Lock()

    def after_fork(self) -> None:
        """Call first in a forked child: the pins are the parent's, and one of its threads may have held the mutex."""
        for descriptor in self._pins.values():
            os.close(descriptor)  # without unlocking, which would unlock the parent's
        self._pins = {}
        self._mutex = threading.Lock()

    @property
    def index_folder(self) -> Path:
        """For the indexes of the shards; each user's own where the cache is shared."""
        return self.folder / (f"index-{os.getuid()}" if self.shared else "index")

    def file(self, name: str) -> Path:
        """Where the shard of that cache name lies, if it is there."""
        return self.folder / name

    def note(self, name: str) -> Note | None:
        """Size and checksum of a complete shard, None if it is not (wholly) there."""
        data = read_note(self._note_file(name), shared=self.shared)
        if data is None or not is_kept(self.file(name), shared=self.shared):
            return None
        try:
            content = json.loads(data)
            file, version = content.get("file"), content.get("version")
            note = Note(
                int(content["size"]),
                str(content["sha256"]),
                None if version is None else str(version),
                None if file is None else tuple(int(part) for part in file),
            )
            return note if os.lstat(self.file(name)).st_size == note.size else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def is_as_kept(self, name: str, note: Note) -> bool:
        """Whether the file is the very one that the note was made for."""
        return note.file is not None and note.file == identity(self.file(name))

    def keep(self, name: str, size: int, sha256: str, version: str | None = None) -> None:
        """Record a shard whose checksum has just been computed; the caller holds ``NAME.lock``."""
        self._failure_file(name).unlink(missing_ok=True)
        note = {"size": size, "sha256": sha256, "version": version, "file": identity(self.file(name))}
        self._write(self._note_file(name), json.dumps(note))

    def touch(self, name: str) -> None:
        """Mark a shard as just used."""
        # The note's time, not the shard's: an index holds for one modification time of its shard.
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._note_file(name))

    def remove(self, name: str) -> int:
        """Delete a shard and what is left of unfinished downloads; returns the bytes it held."""
        # The note goes first: a file without one is not trusted, so a death in between leaves nothing wrong.
        self._note_file(name).unlink(missing_ok=True)
        freed = 0
        for path in (self.file(name), *part_files(self.file(name)), self.folder / f"{name}.idx"):
            with contextlib.suppress(FileNotFoundError):
                size = os.lstat(path).st_size
                path.unlink()
                freed += size
        return freed

    def fail(self, name: str, message: str) -> None:
        """Tell those who wait for this download that it cannot be had: they need not all find out for themselves."""
        self._write(self._failure_file(name), message[:8192])

    def failure(self, name: str, since: float) -> str | None:
        """What `fail` was told at or after the time `since` (s since the epoch)."""
        path = self._failure_file(name)
        try:
            fresh = os.lstat(path).st_mtime >= since
        except FileNotFoundError:
            return None
        data = read_note(path, shared=self.shared) if fresh else None
        return None if data is None else data.decode("utf-8", "replace")

    # Locks

    @contextlib.contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Hold ``NAME.lock`` alone; waits for it."""
        with self._opened(self._lock_file(name)) as descriptor:
            pause = _POLL_S
            while not _try_lock(descriptor, fcntl.LOCK_EX):
                time.sleep(pause)
                pause = min(2 * pause, 0.5)
            yield

    def pin(self, name: str, *, ahead: bool = False, must: bool = False) -> None:
        """Keep a shard (there already or not) from being removed by any process.

        A pin is an open file, and their number is limited: beyond a share of the limit only those that must be had.

        Args:
            name: its cache name.
            must: it is going to be opened now.
            ahead: it will be needed later: kept from those who also fetch ahead, given up to those who need room now.
        """
        with self._mutex:
            path = self._pin_file(name, ahead)
            if path in self._pins or self.max_bytes is None:
                return
            held = sum(len(cache._pins) for cache in list(_caches))
            if held >= most_pins() and not must:
                if not self._said:
                    self._said = True
                    log.warning(
                        "%s: %d shards are pinned, as many as the limit on open files allows: others may be removed "
                        "and fetched again. Raise it (ulimit -n) or set a smaller data.window",
                        self.folder,
                        held,
                    )
                return
            descriptor = open_lock(path, shared=self.shared)
            # Waits at most for a removal that is under way.
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            self._pins[path] = descriptor

    def unpin(self, names: Iterable[str], *, ahead: bool = False) -> None:
        """Let shards go that this process had pinned."""
        with self._mutex:
            for name in names:
                self._unpin(self._pin_file(name, ahead))

    def unpin_all(self) -> None:
        """Let go of everything that this process had pinned."""
        with self._mutex:
            for path in list(self._pins):
                self._unpin(path)

    def _unpin(self, path: Path) -> None:
        descriptor = self._pins.pop(path, None)
        if descriptor is not None:
            # A forked child holds a copy of the descriptor: closing ours alone would not unlock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    # Room

    def make_room(self, name: str, size: int, *, ahead: bool = False) -> bool:
        """Remove shards until `size` bytes for `name` fit; the caller holds ``NAME.lock``.

        Args:
            name, size: the shard to come.
            ahead: it is not needed yet: nothing that others fetched ahead is removed for it, and nobody waits.
                Otherwise waits up to `timeout_s` while all the rest is pinned.

        Returns:
            Whether there is room. False only if `ahead`.

        Raises:
            CacheError: the shard is larger than the cache, or the pinned shards leave no room for it.
        """
        if self.max_bytes is None:
            return True
        if size > self.max_bytes:
            raise CacheError(
                f"shard {name} has {size} bytes, more than the whole cache {self.folder} may hold ({self.max_bytes}): "
                "raise the limit or write smaller shards"
            )
        deadline = time.monotonic() + self.timeout_s
        while True:
            with self.exclusive("evict"):
                total = self._shrink(name, self.max_bytes - size, ahead)
                if total + size <= self.max_bytes:
                    # Counts from here on, though nothing is written yet.
                    self._write(self._claim_file(name), str(size))
                    return True
            if ahead:
                return False
            if time.monotonic() > deadline:
                raise CacheError(
                    f"no room for shard {name} ({size} bytes) in the cache {self.folder}: {total} of its "
                    f"{self.max_bytes} bytes are pinned by running processes. Raise the limit, shuffle over a smaller "
                    "window, or write smaller shards"
                )
            time.sleep(_POLL_S)

    def _shrink(self, name: str, bound: int, ahead: bool) -> int:
        """Remove what is not `name` until `bound` bytes are left, or nothing more may go; returns the bytes left."""
        others = self._usage()
        others.pop(name, None)
        total = sum(held for _, held in others.values())
        by_age = sorted(others, key=lambda other: others[other][0])
        # The least recently used first. Then what waits for its use: the youngest is the one furthest from it.
        for candidates, spare_ahead in ((by_age, True), ([] if ahead else by_age[::-1], False)):
            for other in candidates:
                if total <= bound:
                    return total
                if other in others and self._remove_if_free(other, spare_ahead):
                    total -= others.pop(other)[1]
        return total

    def release_claim(self, name: str) -> None:
        """The room claimed for `name` is now its file, or is not needed after all."""
        self._claim_file(name).unlink(missing_ok=True)

    def _usage(self) -> dict[str, tuple[float, int]]:
        """Name → (time of last use in s, bytes held or claimed)."""
        used: dict[str, tuple[float, int]] = {}
        for entry in os.scandir(self.folder):
            name, kind = _split(entry.name)
            if kind not in ("", ".part", ".claim", ".note") or not _NAME.match(name):
                continue
            try:
                stat = entry.stat(follow_symlinks=False)
                held = stat.st_size
                if kind == ".claim":
                    # A claim is worth its size while its download runs; the part file is within it.
                    held = int(read_note(Path(entry.path), shared=self.shared) or 0) if self._is_locked(name) else 0
            except (FileNotFoundError, ValueError):
                continue
            last, before = used.get(name, (0.0, 0))
            used[name] = (max(last, stat.st_mtime), max(before, 0 if kind == ".note" else held))
        return used

    def _is_locked(self, name: str) -> bool:
        with self._opened(self._lock_file(name)) as descriptor:
            return not _try_lock(descriptor, fcntl.LOCK_EX)

    def _remove_if_free(self, name: str, spare_ahead: bool) -> bool:
        paths = [self._lock_file(name), self._pin_file(name), *([self._pin_file(name, True)] if spare_ahead else [])]
        with contextlib.ExitStack() as stack:
            if not all(_try_lock(stack.enter_context(self._opened(path)), fcntl.LOCK_EX) for path in paths):
                return False
            self.remove(name)
            self.release_claim(name)
            return True

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[int]:
        descriptor = open_lock(path, shared=self.shared)
        try:
            yield descriptor
        finally:
            # A process forked meanwhile by another thread holds a copy: closing ours alone would not unlock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _write(self, path: Path, text: str) -> None:
        write_note(path, text, 0o644 if self.shared else 0o600)

    def _note_file(self, name: str) -> Path:
        return self.folder / f"{name}.note"

    def _failure_file(self, name: str) -> Path:
        return self.folder / f"{name}.error"

    def _claim_file(self, name: str) -> Path:
        return self.folder / f"{name}.claim"

    def _lock_file(self, name: str) -> Path:
        return self.folder / f"{name}.lock"

    def _pin_file(self, name: str, ahead: bool = False) -> Path:
        return self.folder / f"{name}.{'ahead' if ahead else 'pin'}"


_KINDS = (
    ".part.json.tmp",
    ".part.json",
    ".part",
    ".note",
    ".claim",
    ".error",
    ".idx",
    ".lock",
    ".pin",
    ".ahead",
    ".tmp",
)


def _split(file_name: str) -> tuple[str, str]:
    for kind in _KINDS:
        if file_name.endswith(kind):
            return file_name[: -len(kind)], kind
    return file_name, ""


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
