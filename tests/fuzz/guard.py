"""One case at a time, within bounds of time and memory; what comes out is judged.

A case is fine when it works, or when it raises a :class:`ScaleDigrapError` that says something.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from scale_digrap.errors import ScaleDigrapError

SECONDS = 20.0
"""Nothing here takes a second; the machine may be busy."""

BYTES = 1 << 30


class Hang(BaseException):  # no `except Exception` may swallow it
    """A case took longer than :data:`SECONDS`."""


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a case: ``kind`` is the same for the same fault, ``text`` has the traceback."""

    kind: str
    text: str


@dataclass(frozen=True)
class Refused:
    """Fine: the input was refused in a line."""

    line: str


def judge(case: Callable[[], Any]) -> Verdict | Refused | None:
    """Run a case; None where it worked."""
    try:
        with _bounds():
            case()
    except ScaleDigrapError as error:
        if not str(error).strip():
            return Verdict(f"{type(error).__name__} without a word", "".join(traceback.format_exception(error)))
        return Refused(str(error))
    except Hang as error:
        return Verdict(f"hang at {_place(error)}", "".join(traceback.format_exception(error)))
    except (Exception, SystemExit) as error:
        text = "".join(traceback.format_exception(error))
        return Verdict(f"{type(error).__name__} at {_place(error)}", text[-6000:])
    return None


def _place(error: BaseException) -> str:
    """The innermost line of the package that the error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        frame for frame in frames if f"{os.sep}scale_digrap{os.sep}" in frame.filename and "tests" not in frame.filename
    ]
    frame = (ours or frames)[-1]
    return f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}"


@contextlib.contextmanager
def _bounds() -> Iterator[None]:
    """An alarm, and an address space of a gigabyte more than there is now."""

    def ring(*_: object) -> None:
        raise Hang(f"longer than {SECONDS:g} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, previous)
