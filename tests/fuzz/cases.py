"""A reader of files from outside: its whole input, the mutations that fit it, and what a run or person does with it."""

from __future__ import annotations

import contextlib
import io
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.runtime.text import printable

Files = dict[str, bytes]
"""Name within the case's folder → content."""


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        whole: makes the input that is whole, once, in a folder of its own.
        mutated: which files of it are mutated (a regular expression on their names), and how.
        read: what a person or a run does with the folder of a case.
        cost: cases of it are so many times rarer than those of others.
        refuses: some mutations are errors. False where all are mended: an index is made anew.
    """

    whole: Callable[[Path], Files]
    mutated: Mapping[str, Callable[[bytes, random.Random], bytes]]
    read: Callable[[Path], Any]
    cost: float = 1.0
    refuses: bool = True

    def case(self, whole: Files, chance: random.Random) -> Files:
        """The files with one of them mutated, now and then two."""
        files = dict(whole)
        names = [name for name in sorted(files) if any(re.fullmatch(pattern, name) for pattern in self.mutated)]
        for name in chance.sample(names, k=min(len(names), chance.choice((1, 1, 1, 2)))):
            how = next(how for pattern, how in self.mutated.items() if re.fullmatch(pattern, name))
            files[name] = how(files[name], chance)
        return files


def put(files: Files, folder: Path) -> None:
    """Write a case's files."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def taken(folder: Path) -> Files:
    """The files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class RefusedError(ScaleDigrapError):
    """What the command line told on its last line, with status 2."""


def command(*words: object) -> str:
    """Run a command line in this process; returns what it prints.

    Raises:
        RefusedError: it ended with status 2 and one line.
    """
    from scale_digrap import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([str(word) for word in words])
    told = err.getvalue().splitlines()
    for text in (out.getvalue(), err.getvalue()):
        assert printable(text.replace("\t", " ")) == text.replace("\t", " "), f"not printable: {text!r}"
    assert status in (0, 1, 2), status
    if status == 2:
        errors = [line for line in told if line.startswith("scale-digrap: error")]
        assert len(errors) == 1, told
        assert told[-1] == errors[0], told
        raise RefusedError(errors[0])
    return out.getvalue()


def all_of(*calls: Callable[[], Any]) -> None:
    """Make every call, whatever the others raise; then raise the first error that is in order."""
    errors = []
    for call in calls:
        try:
            call()
        except ScaleDigrapError as error:
            errors.append(error)
    if errors:
        raise errors[0]
