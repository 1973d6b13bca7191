"""One writer per folder: a lock that names its holder, and that a killed holder does not leave behind for good.

The lock is the file ``.lock``, with a JSON object (host, process, since when, what it does). Its holder keeps an
advisory lock (``flock``) on it, which the system releases whatever becomes of the process, and renews the file's time
of modification. Where storage has no such locks, or has them for each host alone, the name and the time tell: on the
same machine, whether that process is still there; from another machine, whether the time still moves.

Who only reads a folder needs no lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.runtime.logs import reason
from scale_digrap.runtime.text import TextError, one_line, parse_json, write_json

log = logging.getLogger(__name__)

NAME = ".lock"
RENEW_S = 10.0
"""Seconds between two renewals."""
STALE_S = 60.0
"""A lock of another machine that was not renewed for so long is nobody's."""
_MAX_BYTES = 1 << 16


class LockedError(ScaleDigrapError):
    """Another process writes in the folder, or nobody can."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, by what the file says."""

    host: str = ""
    pid: int = 0
    since: str = ""
    what: str = ""
    boot: str = ""
    """Of which boot of which machine; empty where that is not known."""
    space: str = ""
    """Of its process numbers, which a container may have for itself."""
    born: str = ""
    """Tells a process from a later one of the same number."""
    token: str = ""

    @classmethod
    def this(cls, what: str) -> Holder:
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        token = secrets.token_hex(8)
        boot, space = _boot(), _space()
        return cls(socket.gethostname(), os.getpid(), since, what, boot, space, _born(os.getpid()) or "", token)

    @classmethod
    def read(cls, data: bytes) -> Holder | None:
        """``None`` for a file that names nobody."""
        try:
            found = parse_json(data, NAME)
            values = {name: kind(found[name]) for name, kind in _FIELDS.items()}
        except (TextError, TypeError, KeyError, ValueError):
            return None
        return cls(**values)

    def __str__(self) -> str:
        return one_line(f"process {self.pid} on {self.host}, since {self.since}") if self.pid else "it has left no name"

    @property
    def is_here(self) -> bool:
        """It is a process of this machine, whose being there can be asked."""
        return bool(self.boot) and (self.boot, self.space) == (_boot(), _space())

    @property
    def is_alive(self) -> bool:
        """The process of :attr:`is_here` is there, and is the same one."""
        born = _born(self.pid)
        return born is not None and born == self.born


_FIELDS: dict[str, Any] = {
    "host": str, "pid": int, "since": str, "what": str, "boot": str, "space": str, "born": str, "token": str,
}  # fmt: skip


class FolderLock:
    """The right to write in a folder; a context manager, or :meth:`acquire` and :meth:`release`.

    Args:
        folder: made where it is not there.
        what: what its holder does, for whoever comes second: ``training``.
        wait_s: how long to wait for a holder that may be about to end.
        stale_s: see :data:`STALE_S`.
    """

    def __init__(
        self, folder: str | os.PathLike[str], what: str, *, wait_s: float = 3.0, stale_s: float = STALE_S
    ) -> None:
        self.folder, self.path = Path(folder), Path(folder) / NAME
        self._what, self._wait_s, self._stale_s = what, wait_s, stale_s
        self._descriptor: int | None = None
        self._own: Holder | None = None
        self._unsure = False  # whether who was found is still there: their machine cannot be asked
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """This process has it."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            LockedError: someone else has it, and who; or the folder cannot be written to.
        """
        if self.held:
            return
        until = time.monotonic() + self._wait_s
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            first: float | None = None
            while (other := self._try()) is not None:
                if self._unsure:
                    renewed = self.path.stat().st_mtime
                    if first is None:
                        first = renewed
                        log.info("%s: waiting to see whether %s (%s) is still there", self.folder, other.what, other)
                    if renewed == first:
                        time.sleep(0.2)
                        continue
                elif time.monotonic() < until:
                    time.sleep(0.2)
                    continue
                raise LockedError(
                    f"another {other.what} is writing to {self.folder} ({other}): wait for it or end it, or name "
                    f"another folder; if it is surely gone, delete {self.path}"
                )
        except OSError as error:
            raise LockedError(
                f"cannot write in {self.folder}: {reason(error)}. Make room and make it writable, or name another "
                f"folder"
            ) from None
        _held.add(self)
        self._end.clear()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lock")
        self._thread.start()

    def _try(self) -> Holder | None:
        """Take it, or tell who has it."""
        self._unsure = False
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        try:
            locks = True
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return _read(descriptor) or Holder(what=self._what)
            except OSError:  # storage without locks
                locks = False
            if not _is_at(descriptor, self.path):  # somebody has deleted it between the two calls
                return Holder(what=self._what)
            found = _read(descriptor)
            if found is not None and self._in_use(found, descriptor, locks):
                return found
            own = Holder.this(self._what)
            _write(descriptor, own)
            if not locks:
                time.sleep(0.5)  # of several that come at once, the last one to write stays
                found = _read_path(self.path)
                if found is None or found.token != own.token:
                    return found or Holder(what=self._what)
            self._own, self._descriptor = own, descriptor
            return None
        finally:
            if self._descriptor != descriptor:
                with contextlib.suppress(OSError):
                    os.close(descriptor)

    def _in_use(self, found: Holder, descriptor: int, locks: bool) -> bool:
        """Whether a holder that did not release its lock is still there, where the system's lock does not say so."""
        if found.is_here:
            # With locks it would hold this one: it is another process that has got its number, or was killed.
            return not locks and found.is_alive
        if locks and found.boot == _boot():
            return False  # a container of this machine, whose kernel keeps the locks
        # On another machine, or before this one's last boot: a clock of the storage's own, both times.
        before = os.fstat(descriptor).st_mtime
        probe = self.folder / f"{NAME}.{secrets.token_hex(4)}"
        try:
            probe.touch()
            age = probe.stat().st_mtime - before
        finally:
            probe.unlink(missing_ok=True)
        if age < self._stale_s:
            self._unsure = True
            return True
        log.warning("%s: taking over from %s, which has not been heard of for %.0f s", self.folder, found, age)
        return False

    def _renew(self) -> None:
        told = False
        while not self._end.wait(RENEW_S):
            descriptor = self._descriptor
            if descriptor is None:
                return
            try:
                os.utime(descriptor)
                there = _is_at(descriptor, self.path)
            except OSError:
                continue  # storage that is away for a while
            if not there and not told:
                told = True
                gone = self.path if self.folder.is_dir() else self.folder
                log.warning("%s was removed while %s is writing in it", gone, self._what)

    def release(self) -> None:
        """Give it back: the file stays, and names nobody."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        _held.discard(self)
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        try:
            os.ftruncate(descriptor, 0)
        except OSError as error:
            log.warning("cannot clear %s: %s", self.path, reason(error))
        with contextlib.suppress(OSError):
            os.close(descriptor)

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def holder(folder: str | os.PathLike[str]) -> Holder | None:
    """Who writes in a folder now, for whoever wants to say so before they begin; takes nothing.

    A lock that was left behind is nobody's: by a process of this machine that is gone, by one of another machine that
    has not renewed it for :data:`STALE_S`, as far as the two clocks agree.
    """
    path = Path(folder) / NAME
    found = _read_path(path)
    if found is None or found.is_here:
        return found if found is not None and found.is_alive else None
    try:
        return found if time.time() - path.stat().st_mtime < STALE_S else None
    except OSError:
        return None


def _read(descriptor: int) -> Holder | None:
    return Holder.read(os.pread(descriptor, _MAX_BYTES, 0))


def _read_path(path: Path) -> Holder | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _read(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _write(descriptor: int, own: Holder) -> None:
    data = write_json({name: getattr(own, name) for name in _FIELDS}).encode() + b"\n"
    os.ftruncate(descriptor, 0)
    if os.pwrite(descriptor, data, 0) < len(data):
        raise OSError(28, os.strerror(28))
    os.utime(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    own = os.fstat(descriptor)
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _born(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks; ``None`` where there is none, or a dead one."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass
        return ""
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in "ZX" else fields[18]


_held: set[FolderLock] = set()


def _forget() -> None:
    """In a forked child: the lock is its parent's, and must not outlive it."""
    for lock in list(_held):
        if lock._descriptor is not None:
            os.close(lock._descriptor)
            lock._descriptor = None
    _held.clear()


os.register_at_fork(after_in_child=_forget)
