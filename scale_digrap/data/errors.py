"""What can be wrong with data. Every class survives pickling: loader processes hand their errors on."""

from __future__ import annotations

from typing import Any

from scale_digrap.errors import ScaleDigrapError


class DataError(ScaleDigrapError):
    """Data that cannot be trusted or read: missing, damaged, incomplete, or not what a saved state was made with."""


class ShardDamage(DataError):  # noqa: N818 (the state of a shard, not an event)
    """A shard whose structure is broken. Never substituted: its samples could be anything, or missing.

    Attributes:
        shard: path or URL.
        offset: byte offset at which the damage shows; None where it has no place.
    """

    def __init__(self, shard: str, offset: int | None, problem: str) -> None:
        place = f"{shard}: " if offset is None else f"{shard}, byte {offset}: "
        super().__init__(place + problem)
        self.shard, self.offset, self.problem = str(shard), offset, problem

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.shard, self.offset, self.problem)


class SampleError(DataError):
    """One sample that cannot be decoded, in a shard that is whole. What happens to it is up to the fault policy."""


class ReadError(DataError):
    """Storage that keeps failing after all retries."""


class TooManyBadSamples(DataError):  # noqa: N818 (a limit that was reached)
    """More samples could not be decoded than the fault policy allows; raised on every rank in the same step."""
