"""Standard output and error as they come: closed, another encoding than UTF-8, a pipe that ends before we do."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from scale_digrap.errors import ScaleDigrapError


def prepare(*, outlives_readers: bool = False) -> None:
    """Make standard output and error safe to write to; called once, before anything is written.

    A stream that is closed leads nowhere, and its number is taken, so that no file that is opened later gets what
    libraries write to it. Characters that an encoding does not have become backslash escapes.

    Args:
        outlives_readers: when nobody reads any more (``| head -1``, a terminal that is gone) or the disk of a log is
            full, go on without output, in place of ``BrokenPipeError`` or :class:`OutputError`. For runs.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (as long as the process)
            setattr(sys, name, stream)
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")
        if isinstance(stream, _Stream):
            stream.outlives = outlives_readers
        else:
            setattr(sys, name, _Stream(stream, outlives_readers))


def give_up(stream: TextIO | Any) -> None:
    """After ``BrokenPipeError``: what is left in a stream's buffer goes nowhere, and the interpreter ends in peace."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class OutputError(ScaleDigrapError):
    """Standard output cannot be written: the disk that it is redirected to is full, for example."""


class _Stream:
    """A stream that leads nowhere once it is broken: for a run in silence, else after an error of one line."""

    def __init__(self, stream: Any, outlives: bool) -> None:
        self._stream, self.outlives = stream, outlives

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as error:
            give_up(self._stream)
            if self.outlives:
                return
            if isinstance(error, BrokenPipeError):
                raise
            raise OutputError(f"cannot write output: {error.strerror}") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
