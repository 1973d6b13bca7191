"""Watching a run from its folder: progress from ``log.jsonl``, its end from ``DONE`` and ``STOPPED``, what failed."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from scale_digrap.runtime.logs import is_number, parse_record
from scale_digrap.runtime.text import TextError, read_json

LOG = "log.jsonl"
SETTLE_S = 5.0
"""A shared file system may show files so late."""
_LINE_EVERY_S = 30.0
_TAIL_BYTES = 65536
_SHOWN_LINES = 15
_TORCHRUN_CAUSE = re.compile(
    r"Root Cause.*?host\s*:\s*(?P<host>\S+).*?rank\s*:\s*(?P<rank>\d+) \(local_rank: (?P<local>\d+)\).*?"
    r"exitcode\s*:\s*(?P<status>-?\d+)",
    re.DOTALL,
)
_PREFIX = re.compile(r"^(\[[^\]]*\]:\s?|\d+:\s|\S+:\s)")
_OWN_ERROR = re.compile(r"scale-digrap: (error|preflight).*")
_CONSEQUENCE = re.compile(r"lost contact with another rank|Connection (closed|reset) by peer|RendezvousClosed")


@dataclass(frozen=True)
class Outcome:
    """How a run ended, by what it has written itself."""

    kind: str
    """``done``, ``stopped`` or ``failed``."""

    entry: dict[str, Any]
    """What the marker says; of a failure nothing."""


@dataclass(frozen=True)
class Failure:
    """The rank that failed first, as far as the logs tell."""

    what: str
    log: Path | None
    lines: list[str]


def start_stamp(folder: Path) -> Path:
    """A file that is as old as this start, on the file system (and by the clock) that the markers are written on."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "started"
    stamp.unlink(missing_ok=True)
    stamp.touch()
    return stamp


def newer(path: Path, stamp: Path) -> bool:
    """Whether ``path`` was written after ``stamp``."""
    try:
        return path.stat().st_mtime_ns > stamp.stat().st_mtime_ns
    except FileNotFoundError:
        return False


def outcome(run_dir: Path, stamp: Path) -> Outcome:
    """How the run ended. A shared file system may show its markers late: they are waited for.

    Args:
        stamp: of this start; markers that are older are another start's.
    """
    until = time.monotonic() + SETTLE_S
    while True:
        for name, kind in (("DONE", "done"), ("STOPPED", "stopped")):
            if newer(run_dir / name, stamp):
                try:
                    entry = read_json(run_dir / name)
                except TextError:
                    entry = {}
                return Outcome(kind, entry if isinstance(entry, dict) else {})
        if time.monotonic() >= until:
            return Outcome("failed", {})
        time.sleep(0.5)


class Progress:
    """One line about where the run is, on a terminal renewed in place, elsewhere written every half a minute.

    Args:
        run_dir: of the run, whose ``log.jsonl`` is read as it grows.
        total: optimizer steps, where known.
        output: a terminal or a file; stderr by default.
    """

    def __init__(self, run_dir: Path, total: int | None, output: TextIO | None = None) -> None:
        self._log = run_dir / LOG
        self._total = total
        self._output = output or sys.stderr
        self._terminal = self._output.isatty()
        self._offset = self._log.stat().st_size if self._log.exists() else 0
        self._last: dict[str, Any] = {}
        self._first: tuple[float, int] | None = None
        self._shown, self._shown_at = "", time.monotonic() - _LINE_EVERY_S

    def update(self, otherwise: str = "") -> None:
        """Look once; ``otherwise`` is shown as long as there is no step."""
        self._read()
        text = self.text() or otherwise
        if text == self._shown or not text:
            return
        if self._terminal:
            self._output.write(f"\r\x1b[K{text}")
        elif time.monotonic() - self._shown_at >= _LINE_EVERY_S or not self._shown:
            self._output.write(f"{text}\n")
        else:
            return
        self._shown, self._shown_at = text, time.monotonic()
        self._output.flush()

    def close(self) -> None:
        """Leave the last line where it is."""
        self._read()
        text = self.text()
        if self._terminal and self._shown:
            self._output.write(f"\r\x1b[K{text or self._shown}\n")
        elif text and text != self._shown:
            self._output.write(f"{text}\n")
        self._output.flush()

    def text(self) -> str:
        """For example ``step 120/1000  loss 0.1234  310 samples/s  12 min left``."""
        if "step" not in self._last:
            return ""
        step = int(self._last["step"])
        parts = [f"step {step}/{self._total}" if self._total else f"step {step}"]
        if is_number(self._last.get("loss")):
            parts.append(f"loss {self._last['loss']:.4f}")
        if is_number(self._last.get("samples_per_s")):
            parts.append(f"{self._last['samples_per_s']:.0f} samples/s")
        if self._total and self._first and step > self._first[1]:
            left = (time.monotonic() - self._first[0]) / (step - self._first[1]) * (self._total - step)
            parts.append(f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left")
        return "  ".join(parts)

    def _read(self) -> None:
        try:
            size = self._log.stat().st_size
            if size < self._offset:  # a run that goes on cuts off what came after its checkpoint
                self._offset = 0
            with self._log.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except OSError:
            return
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            entry = parse_record(line)
            if entry is not None:
                self._last = entry
                self._first = self._first or (time.monotonic(), entry["step"])


def last_line(path: Path) -> str:
    """The last line of a log that is not empty, without the launcher's prefix."""
    lines = [line for line in _tail(path).splitlines() if line.strip()]
    return _PREFIX.sub("", lines[-1])[:150] if lines else ""


def diagnose(logs: Path, stamp: Path) -> Failure:
    """The rank that failed first.

    An error of the package's own comes before a traceback, and both before the errors of ranks that only lost contact
    with it; of equals, the log that has been silent the longest. A rank that was killed leaves no word: torchrun names
    it.
    """
    found = [path for path in sorted(logs.rglob("*")) if path.is_file() and _is_log(path) and newer(path, stamp)]
    ranked: list[tuple[int, int, Path, str]] = []
    for path in found:
        text = _tail(path)
        own = _OWN_ERROR.search(text)
        trace = [line for line in text.splitlines() if re.match(r"^[\w.]*(Error|Exception|Interrupt)\b", line)]
        what = own.group(0) if own else (trace[-1] if trace else "")
        if what:
            level = 3 if _CONSEQUENCE.search(what) else 0 if own else 1
            # Consoles repeat what ranks have said.
            console = path.name.startswith("launch.") or path.suffix == ".out"
            ranked.append((2 * level + console, path.stat().st_mtime_ns, path, what))
    ranked.sort()
    killed = _killed(found)
    if killed is not None and (not ranked or ranked[0][0] >= 6):
        return killed
    if ranked:
        path, what = ranked[0][2:]
        return Failure(what.removeprefix("scale-digrap: "), path, _tail(path).splitlines()[-_SHOWN_LINES:])
    consoles = [path for path in found if path.name.startswith("launch.") or path.suffix == ".out"] or found
    if consoles:
        newest = max(consoles, key=lambda path: path.stat().st_mtime_ns)
        return Failure("no rank has left an error", newest, _tail(newest).splitlines()[-_SHOWN_LINES:])
    return Failure("nothing was written", None, [])


def _is_log(path: Path) -> bool:
    return path.suffix in (".log", ".out") and path.name != "stdout.log"


def _killed(logs: list[Path]) -> Failure | None:
    """What torchrun says of a rank that a signal has ended."""
    for path in logs:
        text = "\n".join(_PREFIX.sub("", line) for line in _tail(path).splitlines())
        match = _TORCHRUN_CAUSE.search(text)
        if match and int(match["status"]) < 0:
            number = -int(match["status"])
            hint = ", by which the system ends processes when memory is short" if number == 9 else ""
            what = f"rank {match['rank']} on {match['host']} was killed by signal {number}{hint}"
            return Failure(what, path, _tail(path).splitlines()[-_SHOWN_LINES:])
    return None


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
