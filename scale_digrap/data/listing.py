"""Names of shards: what patterns, folders and manifests mean.

Patterns come from a configuration or a command line. Names of files and lines of manifests are data: whatever they
look like, they are names of files and nothing else.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from braceexpand import braceexpand

from scale_digrap.data.errors import DataError
from scale_digrap.data.urls import is_local, local_path, scheme, show
from scale_digrap.runtime.text import home, printable

log = logging.getLogger(__name__)

_MOST_NAMES = 1_000_000
_RANGE = re.compile(r"\{(-?\d{1,19})\.\.(-?\d{1,19})(?:\.\.-?\d+)?\}")


def as_path(name: str) -> str:
    """The name of a file such that it can only be read as a path: a file may be called ``pipe:…``."""
    return name if scheme(name) == "file" and not name.startswith("file:") else f"./{name}"


def shards_in(folder: Path) -> list[Path]:
    """The ``*.tar`` files of a folder, sorted. Hidden names, such as the ``._x.tar`` that macOS leaves beside files,
    and folders are left out, which is said."""
    return files(folder.glob("*.tar"), str(folder))


def files(found: Iterable[Path], where: str) -> list[Path]:
    """Those of some paths that can be shards, sorted; what is left out is said."""
    everything = sorted(found)
    kept = [path for path in everything if not path.name.startswith(".") and not path.is_dir()]
    wanted = set(kept)
    say_left_out(where, [str(path) for path in everything if path not in wanted])
    return kept


def say_left_out(where: str, names: Sequence[str]) -> None:
    """Count and name what a folder or a pattern holds besides shards."""
    if names:
        log.warning(
            "%s: %d left out, which are hidden or folders, not shards: %s",
            where,
            len(names),
            printable(", ".join(name.rpartition("/")[2] for name in names[:3]) + (", …" if len(names) > 3 else "")),
        )


def braces(pattern: str) -> Iterator[str]:
    """The names that braces mean, each with ``~`` expanded; a file of exactly that name is meant itself.

    Raises:
        DataError: braces that are not balanced, or mean more than a million names.
    """
    if scheme(pattern) == "pipe":
        yield pattern
        return
    if "{" not in pattern or (is_local(pattern) and os.path.exists(home(local_path(pattern)))):
        yield home(pattern)
        return
    # Counted first: braceexpand makes all numbers of a range before it gives the first one.
    many = math.prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(pattern))
    if many > _MOST_NAMES:
        raise DataError(f"{show(pattern)}: its braces mean {many:,} names, more than {_MOST_NAMES:,}")
    try:
        names = list(itertools.islice(braceexpand(pattern), _MOST_NAMES + 1))
    except ValueError:  # its own UnbalancedBracesError is not public
        raise DataError(
            f"{show(pattern)}: no such file, and its braces are not balanced: a pattern is written "
            "name-{000000..000041}.tar; put \\ before a brace that is part of a name"
        ) from None
    if len(names) > _MOST_NAMES:
        raise DataError(f"{show(pattern)}: its braces mean more than {_MOST_NAMES:,} names")
    yield from map(home, names)


def plain(name: str, manifest: str) -> str:
    """A shard's name in a manifest; it must not lead out of the manifest's folder.

    Raises:
        DataError: it does, or it is not printable.
    """
    if "/" in name or name in ("", ".", "..") or not name.isprintable():
        raise DataError(f"{manifest}: {name!r} is not the name of a file beside it")
    return name
