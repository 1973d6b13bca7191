"""Files: opening what lies in a folder that is not trusted, writing whole or not at all, folders that are private.

A folder from somebody else (a checkpoint, a cache that others can write to) may hold links, fifos, devices and names
that lead out of it. :func:`open_inside` is the one way to open what lies there.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from scale_digrap.errors import ScaleDigrapError


class UntrustedFileError(ScaleDigrapError):
    """Something in a folder that is not trusted is not a regular file inside it."""


def open_inside(folder: str | os.PathLike[str], name: str) -> BinaryIO:
    """Open a regular file that lies inside a folder, for reading, without following links below the folder.

    The folder itself may be a link; nothing below it may be, and nothing is opened that is not a regular file, so that
    neither a fifo nor a device can hang or flood the reader.

    Args:
        folder: where it lies.
        name: relative to ``folder``, parts separated by ``/``.

    Raises:
        UntrustedFileError: the name is absolute or leads out of the folder, a part of it is a link, or it is not a
            regular file.
        FileNotFoundError: there is none.
    """
    parts = name.split("/")
    if not name or name.startswith("/") or any(part in ("", ".", "..") for part in parts) or "\0" in name:
        raise UntrustedFileError(f"{name!r} does not name a file inside {folder}")
    where = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            inner = _open_at(part, where, os.O_RDONLY | os.O_DIRECTORY, folder, name)
            os.close(where)
            where = inner
        # Without O_NONBLOCK opening a fifo waits for a writer.
        descriptor = _open_at(parts[-1], where, os.O_RDONLY | os.O_NONBLOCK, folder, name)
    finally:
        os.close(where)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UntrustedFileError(f"{Path(folder) / name} is not a regular file")
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _open_at(part: str, where: int, flags: int, folder: str | os.PathLike[str], name: str) -> int:
    try:
        return os.open(part, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=where)
    except FileNotFoundError:
        raise FileNotFoundError(f"{Path(folder) / name} does not exist") from None
    except OSError as error:
        if os.path.islink(Path(folder) / name) or _is_link(part, where):
            raise UntrustedFileError(
                f"{Path(folder) / name}: {part!r} is a link, and links are not followed in {folder}: "
                "put the file itself there"
            ) from None
        if isinstance(error, NotADirectoryError) or error.errno == 6:  # ENXIO: a socket, or a fifo without a reader
            raise UntrustedFileError(f"{Path(folder) / name} is not a regular file") from None
        raise


def _is_link(part: str, where: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(part, dir_fd=where, follow_symlinks=False).st_mode)
    except OSError:
        return False


def is_private(folder: str | os.PathLike[str]) -> str | None:
    """Why a folder is not private to this user, or ``None`` where it is.

    Private: a real directory, owned by this user (or root), into which nobody else can write.
    """
    status = os.lstat(folder)
    if stat.S_ISLNK(status.st_mode):
        status = os.stat(folder)
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a folder"
    if status.st_uid not in (os.getuid(), 0):
        return f"it belongs to user {status.st_uid}, not to {os.getuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write to it (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def write_whole(path: str | os.PathLike[str], content: str | bytes | Iterable[bytes], mode: int = 0o644) -> None:
    """Write a file whole or not at all: readers see the old content or the new, also after a kill.

    Args:
        path: the file; its folder exists. A link there is replaced, not followed.
        content: text (UTF-8) or bytes, or chunks of bytes.
        mode: permissions, before the umask; 0o600 for what holds secrets.
    """
    path = Path(path)
    chunks = (
        [content.encode("utf-8")] if isinstance(content, str) else [content] if isinstance(content, bytes) else content
    )
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fchmod(file.fileno(), mode & ~_umask())
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0o077)  # there is no other portable way to read it
    os.umask(mask)
    return mask
