"""Logs of one JSON object a line. Writing one never ends a run; reading one skips and counts what is no record.

A log is read by people, edited, copied while it grows, cut off by a kill or a full disk. None of that is a reason to
lose a run: :class:`LogFile` warns once and counts, :func:`scan_log` reads whatever is there.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from scale_digrap.runtime.files import write_whole
from scale_digrap.runtime.text import TextError, finite, one_line, parse_json, write_json

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 1 << 26
"""Longest line that is parsed; telemetry of a model of a thousand layers takes some hundred kB."""


@dataclass
class LogScan:
    """What a log holds."""

    records: list[dict[str, Any]] = field(default_factory=list)
    """In the order of the file."""
    odd: int = 0
    """Lines that are no record, and are left out of :attr:`records`."""
    problem: str | None = None
    """Why the file, or its rest, could not be read."""

    def by_step(self) -> list[dict[str, Any]]:
        """One record per step, in their order: a step that was repeated counts as it was the last time."""
        return [record for _, record in sorted({record["step"]: record for record in self.records}.items())]


def scan_log(path: str | os.PathLike[str], until: int | None = None, *, steps: bool = True) -> LogScan:
    """Read a log; a file that is not there holds nothing.

    Args:
        path: the file. One line at a time is in memory besides the records.
        until: leave out records of later steps (they are not odd).
        steps: a record must have a ``step``, a whole number above 0.
    """
    scan = LogScan()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            scan.problem = "it is not a regular file"  # a fifo would keep the reader waiting
            return scan
        with open(path, "rb") as file:
            for line in _lines(file):
                record = parse_record(line, steps=steps)
                if record is None:
                    scan.odd += bool(line.strip())
                elif until is None or not steps or record["step"] <= until:
                    scan.records.append(record)
    except FileNotFoundError:
        pass
    except OSError as error:
        scan.problem = error.strerror or str(error)
    return scan


def read_log(path: str | os.PathLike[str], until: int | None = None, *, steps: bool = True) -> list[dict[str, Any]]:
    """The records of a log; what is odd in it is told in one warning. Arguments as :func:`scan_log`."""
    scan = scan_log(path, until, steps=steps)
    if scan.odd:
        log.warning("%s: %d lines are no records of a log and are left out", path, scan.odd)
    if scan.problem:
        log.warning("%s cannot be read: %s", path, scan.problem)
    return scan.records


def figures(records: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    """The values of a figure in those records that have it as a number, finite."""
    found = (record.get(name) for record in records)
    return [float(value) for value in found if is_number(value)]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a log is a number to calculate with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def _lines(file: Any) -> Iterator[bytes]:
    """Lines of bounded length; one that is longer comes as something that is no record."""
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            line = b"too long"
        yield line


def parse_record(line: bytes, *, steps: bool = True) -> dict[str, Any] | None:
    """The record in a line, ``None`` where it is none; ``steps`` as for :func:`scan_log`."""
    try:
        record = parse_json(line, "a line")
    except TextError:
        return None
    if not isinstance(record, dict):
        return None
    step = record.get("step")
    return record if not steps or (type(step) is int and step > 0) else None


class LogFile:
    """Appends JSON objects to a file, one a line, each whole and at once: a killed run keeps what it wrote.

    Nothing that goes wrong is raised. The first line that is lost is told in a warning, all are counted; when writing
    works again, so does the log. A file that is removed while it is written to (with its folder, perhaps) is told and
    begun anew.

    Args:
        path: created with the first line, with its folder.
        what: what the lines are, for the warning.
    """

    def __init__(self, path: str | os.PathLike[str], what: str = "log") -> None:
        self.path = Path(path)
        self.lost = 0
        """Lines that could not be written."""
        self.odd = 0
        """Lines that :meth:`begin` has left out because they were no records."""
        self._what = what
        self._descriptor: int | None = None
        self._failing = False
        self._torn = False

    def begin(self, keep_until: int | None) -> list[dict[str, Any]]:
        """Begin a start of a run: keep the records of steps that are done, drop the others.

        Args:
            keep_until: the last step whose record is kept; ``None`` begins an empty log.

        Returns:
            the records that are kept, one per step.
        """
        self.close()
        scan = LogScan() if keep_until is None else scan_log(self.path, keep_until)
        kept = scan.by_step()
        self.odd = scan.odd + len(scan.records) - len(kept)
        if scan.problem is not None:
            log.warning("%s cannot be read (%s): this run goes on without its earlier lines", self.path, scan.problem)
        if self.odd:
            log.warning("%s: %d lines are no records of this run and are left out", self.path, self.odd)
        try:
            if scan.problem is None and self.path.is_file():  # and no device, which would be replaced
                write_whole(os.path.realpath(self.path), (self._encode(record) for record in kept))
            self._open()
        except OSError as error:
            # The old lines stay where they are, then; of a step that is there twice, readers take the last record.
            self._failed(error, lost=0)
        return kept

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record; a number in it that is not finite is written as null."""
        try:
            line = self._encode(record)
            self._check_there()
            descriptor = self._open()
            if self._torn:
                line = b"\n" + line
            written = os.write(descriptor, line)
            if written < len(line):
                self._torn = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            self._failed(error, lost=1)
            return
        self._torn = False
        if self._failing:
            self._failing = False
            log.warning("%s can be written again; %d lines of the %s were lost", self.path, self.lost, self._what)

    def close(self) -> None:
        """End; a later :meth:`write` opens the file again."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            try:
                os.close(descriptor)
            except OSError as error:  # network storage may tell of a full disk only now
                self._failed(error, lost=0)

    @staticmethod
    def _encode(record: Mapping[str, Any]) -> bytes:
        return write_json(finite(record)).encode("ascii") + b"\n"

    def _open(self) -> int:
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Without O_NONBLOCK a fifo in the file's place keeps the run waiting for a reader.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
            self._descriptor = os.open(self.path, flags, 0o644)
            size = os.fstat(self._descriptor).st_size
            self._torn = size > 0 and not self._ends_with_newline(size)
        return self._descriptor

    def _ends_with_newline(self, size: int) -> bool:
        with open(self.path, "rb") as file:
            file.seek(size - 1)
            return file.read(1) == b"\n"

    def _check_there(self) -> None:
        """Notice a file that was removed or replaced: what is written to it from then on is nowhere."""
        if self._descriptor is None:
            return
        own = os.fstat(self._descriptor)
        try:
            there = os.stat(self.path)
            same = (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)
        except FileNotFoundError:
            same = False
        if not same:
            gone = self.path if self.path.parent.is_dir() else self.path.parent
            log.warning("%s was removed while the run was writing to it: the %s begins anew", gone, self._what)
            self.close()

    def _failed(self, error: Exception, lost: int) -> None:
        self.lost += lost
        if not self._failing:
            self._failing = True
            log.warning("cannot write %s: %s; the run goes on without it", self.path, reason(error))


def reason(error: BaseException) -> str:
    """Why a file could not be written, in the system's words."""
    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
