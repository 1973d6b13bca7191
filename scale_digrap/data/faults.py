"""What happens to a sample that cannot be decoded, and when there are too many.

A bad sample is replaced by another one, which depends on the seed and the position alone, counted, and written to a
file. The records travel in the batch from the loader process to the main process. Storage that fails is another matter:
reading is retried, and then it is an error; a broken shard is an error at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from scale_digrap.data.errors import DataError, TooManyBadSamples
from scale_digrap.runtime.logs import LogFile

T = TypeVar("T")


@dataclass(frozen=True)
class FaultPolicy:
    """Limits on what a training run puts up with. They are on totals of all ranks, not on failures in a row.

    Attributes:
        max_bad: bad samples at most; None sets no limit, 0 stops at the first.
        max_bad_fraction: bad samples at most, as a fraction of all samples so far; counts once more than
            ``free`` samples were bad.
        free: bad samples that the fraction does not look at: the first one would be a large fraction of few.
        max_attempts: substitutes tried for one position before it is an error.
        retries: attempts to read after a failed one.
        backoff_s: pause before the first retry; it doubles.
    """

    max_bad: int | None = None
    max_bad_fraction: float = 0.01
    free: int = 10
    max_attempts: int = 64
    retries: int = 3
    backoff_s: float = 0.5

    def __post_init__(self) -> None:
        for name, low in (("max_bad", 0), ("free", 0), ("max_attempts", 1), ("retries", 0), ("backoff_s", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise DataError(f"faults: {name} must be at least {low}, got {value}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise DataError(f"faults: max_bad_fraction must lie in [0, 1], got {self.max_bad_fraction}")

    def check(self, bad: int, consumed: int, example: str) -> None:
        """Whether a run may go on.

        Args:
            bad, consumed: samples of all ranks so far.
            example: something about the latest bad one, for the message.

        Raises:
            TooManyBadSamples: over a limit.
        """
        limit = None
        if self.max_bad is not None and bad > self.max_bad:
            limit = f"max_bad={self.max_bad}"
        elif bad > self.free and bad > self.max_bad_fraction * consumed:
            limit = f"max_bad_fraction={self.max_bad_fraction:g}"
        if limit:
            raise TooManyBadSamples(
                f"{bad} of {consumed} samples could not be decoded, more than {limit} allows. {example} "
                "Find them all with `scale-digrap shards validate --decode`, remove them with `shards repair`, or "
                "raise the limit"
            )


@dataclass(frozen=True)
class BadSample:
    """One sample that could not be decoded: where the order put it, which it is, and why it failed."""

    position: int
    shard: str
    key: str
    reason: str


class BadSampleLog:
    """``bad_samples.rank*.jsonl``: one JSON object a line, flushed at once. Created with the first record.

    Args:
        path: appended to; None writes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._file = None if path is None else LogFile(path, "record of bad samples")

    @property
    def lost(self) -> int:
        """Records that could not be written."""
        return 0 if self._file is None else self._file.lost

    def write(self, samples: list[BadSample]) -> None:
        """Append records; one that cannot be written is told and counted, and ends nothing."""
        if self._file is None or not samples:
            return
        for sample in samples:
            self._file.write(asdict(sample))
        self._file.close()


def retry(read: Callable[[], T], *, retries: int, backoff_s: float, again: Callable[[], None]) -> T:
    """Call ``read`` until it raises no OSError.

    Args:
        again: called before every further attempt.

    Raises:
        OSError: the last one.
    """
    for attempt in range(retries):
        try:
            return read()
        except OSError:
            time.sleep(backoff_s * 2**attempt)
            again()
    return read()
