"""Folders that this package keeps files in for later runs, and the one way to open what lies there.

Whoever can write to such a folder decides what a run reads from it, and where the run's own writes go: through links.
So a folder is used only if it is private, nothing in it is opened through a link, and nothing is opened that is not a
regular file.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
import tempfile
from pathlib import Path

from scale_digrap.data.errors import DataError
from scale_digrap.runtime.files import is_private
from scale_digrap.runtime.text import home

log = logging.getLogger(__name__)

SMALL = 1 << 16
"""Bytes of the notes that lie beside what is kept; a larger one is not a note."""

_chosen: dict[tuple[str, str, int], Path] = {}


class CacheError(DataError):
    """The shard cache cannot be used, or has no room."""


class NotPrivateError(CacheError):
    """Others can write to a folder whose content is going to be trusted."""


def private_folder(folder: Path, *, shared: bool = False, what: str = "the cache folder") -> Path:
    """Make a folder for this user alone (mode 0700), or see that an existing one is private.

    Args:
        folder: its parents are made too.
        shared: whoever else can write to it is trusted.
        what: it is, for the error.

    Raises:
        NotPrivateError: it belongs to somebody else, or others can write to it.
        OSError: it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        problem = is_private(folder)
        if problem and not (shared and folder.is_dir()):
            raise NotPrivateError(
                f"{what} {folder} is not private: {problem}. What others put there would be trained on. Name a folder "
                f"that does not exist yet (such as {folder / 'own'}), take the others' right to write away "
                "(chmod go-w) and delete what it holds, or set data.cache_shared=true if you trust all who can write "
                "to it"
            ) from None
    return folder


def default_cache() -> Path:
    """The folder for indexes where nobody has named one; exists and is private.

    ``$XDG_CACHE_HOME/scale_digrap/index``, else ``~/.cache/scale_digrap/index``. Where neither can be had (no home
    directory, as in many containers; read-only; not private) a private folder in the temporary one, which is said once.

    Raises:
        OSError: the temporary folder cannot be written to either.
    """
    key = (os.environ.get("XDG_CACHE_HOME", ""), os.environ.get("HOME", ""), os.getuid())
    found = _chosen.get(key)
    if found is not None and found.is_dir():
        return found
    try:
        cache = key[0] if os.path.isabs(key[0]) else str(Path(home("~")) / ".cache")
        folder = private_folder(private_folder(Path(cache) / "scale_digrap") / "index")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{folder} cannot be written to")
    except (DataError, OSError, RuntimeError, ValueError) as error:
        folder = _temporary()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        log.warning(
            "no cache folder at home (%s): indexes are kept in %s. Set data.cache_dir or XDG_CACHE_HOME to keep them",
            reason,
            folder,
        )
    _chosen[key] = folder
    return folder


def _temporary() -> Path:
    """A private folder that every run of this user finds again; one of this process alone where somebody holds the
    name."""
    folder = Path(tempfile.gettempdir()) / f"scale_digrap-{os.getuid()}"
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        # Not through a link: in a folder that all can write to, it would lead where somebody else has chosen.
        if folder.is_symlink() or is_private(folder) or os.stat(folder).st_uid != os.getuid():
            return Path(tempfile.mkdtemp(prefix="scale_digrap-"))
    return folder


def open_kept(path: Path, flags: int, *, shared: bool = True, mode: int = 0o600) -> int:
    """A descriptor of a regular file in a cache folder, never through a link.

    Args:
        path: the file.
        flags: as for :func:`os.open`.
        shared: False: it must also be this user's (or root's) and be closed to others' writes.
        mode: of a file that is made.

    Raises:
        CacheError: a link, or not a regular file, or not as ``shared=False`` asks.
        OSError: as of :func:`os.open`.
    """
    try:
        # Without O_NONBLOCK opening a fifo waits for its other end.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise CacheError(f"{path} is a link, and links in a cache are not followed: delete it") from None
        if error.errno in (errno.EISDIR, errno.ENXIO):
            raise CacheError(f"{path} is not a regular file: delete it") from None
        raise
    try:
        status = os.fstat(descriptor)
        problem = _foreign(status, shared)
        if problem is None and flags & (os.O_WRONLY | os.O_RDWR) and status.st_nlink > 1:
            problem = f"has {status.st_nlink} names: what is written to it changes a file elsewhere"
        if problem:
            raise CacheError(f"{path} {problem}: delete it")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_kept(path: Path, *, shared: bool = True) -> bool:
    """Whether :func:`open_kept` takes the file, without opening it."""
    try:
        return not _foreign(os.lstat(path), shared)
    except OSError:
        return False


def _foreign(status: os.stat_result, shared: bool) -> str | None:
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if not shared and status.st_uid not in (os.getuid(), 0):
        return f"belongs to user {status.st_uid}"
    if not shared and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written to by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def read_note(path: Path, *, shared: bool = True) -> bytes | None:
    """The bytes of a small file in a cache folder; None if there is none that can be trusted."""
    try:
        descriptor = open_kept(path, os.O_RDONLY, shared=shared)
    except (OSError, CacheError):
        return None
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(SMALL + 1)
    return data if len(data) <= SMALL else None


def write_note(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a small file in a cache folder whole or not at all; the caller holds the lock of what it is about.

    Raises:
        OSError: it cannot be written.
    """
    unfinished = path.with_name(path.name + ".tmp")
    # What lies there is left of a process that was killed, or a link: it is replaced, never written through.
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    os.replace(unfinished, path)


def open_lock(path: Path, *, shared: bool) -> int:
    """A descriptor of a lock file, made if need be.

    Raises:
        CacheError, OSError: see :func:`open_kept`.
    """
    while True:
        try:
            return open_kept(path, os.O_RDWR)
        except FileNotFoundError:
            pass
        # O_CREAT alone is refused for the files of others in folders with the sticky bit (fs.protected_regular).
        try:
            descriptor = open_kept(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode=0o666 if shared else 0o600)
        except FileExistsError:
            continue
        if shared:
            os.fchmod(descriptor, 0o666)  # whatever the umask: every user must be able to lock it
        return descriptor


def identity(path: Path) -> tuple[int, int, int] | None:
    """(inode, time of the last write, time of the last change of any kind, in ns): another one once a file has been
    written to or put in place of another. None if there is none."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
