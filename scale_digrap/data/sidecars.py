"""Files that systems leave beside a person's own: never data, wherever they lie. They are left out, and counted."""

from __future__ import annotations

import os

_NAMES = frozenset(
    {
        ".ds_store",
        ".localized",
        ".spotlight-v100",
        ".trashes",
        ".fseventsd",
        ".temporaryitems",
        ".documentrevisions-v100",
        ".appledouble",
        ".apdisk",
        "__macosx",
        "icon\r",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "$recycle.bin",
        "system volume information",
        "@eadir",
        ".directory",
        ".ipynb_checkpoints",
    }
)


def is_sidecar(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a sidecar, or lies in a folder of them: ``._x.jpg`` and ``.DS_Store`` (macOS), ``__MACOSX/…``
    (its zip archives), ``Thumbs.db`` and ``desktop.ini`` (Windows), ``@eaDir/…`` (Synology), ``.ipynb_checkpoints/…``.

    Args:
        path: relative to the folder or archive that was named; every part of it is looked at.
    """
    parts = os.fspath(path).split("/")
    return any(part.startswith("._") or part.casefold() in _NAMES for part in parts)
