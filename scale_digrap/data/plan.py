"""Which sample comes at which position: a pure function, so that the state of a loader is one integer.

The samples of all shards form an endless stream, epoch after epoch. In every epoch the shards are permuted, groups of
`window` shards are formed, and the samples of each group are permuted. Nothing but the groups in use is ever
materialised: any position is reached in the time that one group takes.

With several lanes the shards are dealt to the lanes once and for all, each lane has groups of its own, and position q
of the stream is drawn from lane q mod lanes. Ranks that take positions of one residue then read one lane's shards
alone. (When the lanes hold different numbers of samples, the larger ones are left over at the end of an epoch.)
"""

from __future__ import annotations

import hashlib
import heapq
import struct
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np

from scale_digrap.data.errors import DataError

_VERSION = 1
_SAMPLES_IN_A_WINDOW = 1 << 20
_MOST_IN_A_WINDOW = 1 << 28  # permuted at once: 1 GiB
_REMOTE_WINDOW = 16

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Plan:
    """The order of the samples of one set of shards.

    Args:
        counts: samples of every shard.
        seed: of the shuffle.
        window: shards whose samples are shuffled together. Memory and time to reach a position grow with it.
        lanes: parts of the shards that are read side by side.

    Raises:
        DataError: no samples, or a window or number of lanes that makes no sense.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, *, seed: int, window: int, lanes: int = 1) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.samples = int(self.counts.sum())
        self.seed, self.window, self.lanes = seed, window, lanes
        if self.samples == 0:
            raise DataError("the shards hold no samples: there is nothing to train on")
        if window < 1:
            raise DataError(f"window must be at least 1 shard, got {window}")
        largest = int(np.sort(self.counts)[::-1][:window].sum())
        if largest > _MOST_IN_A_WINDOW:
            raise DataError(
                f"a window of {min(window, len(self.counts))} shards can hold {largest:,} samples, more than the "
                f"{_MOST_IN_A_WINDOW:,} that are shuffled in memory: set a smaller data.window, or check the counts in "
                "manifest.json (scale-digrap shards index)"
            )
        self._lanes = _deal(self.counts, lanes)
        self._stages = _Stages([int(self.counts[shards].sum()) for shards in self._lanes])
        self._schedules: _Recent[tuple[int, int], _Schedule] = _Recent(2 * lanes)
        self._windows: _Recent[tuple[int, int, int], _Window] = _Recent(2 * lanes)

    def at(self, position: int) -> tuple[int, int]:
        """(shard, sample in the shard) at a position of the endless stream."""
        epoch, offset = divmod(position, self.samples)
        lane, index = self._stages.at(offset, epoch * self.samples)
        schedule = self._schedule(epoch, lane)
        number = bisect_right(schedule.starts, index) - 1
        return self._window(epoch, lane, number).at(index - schedule.starts[number])

    def ahead(self, position: int, lanes: Sequence[int]) -> tuple[list[int], list[int]]:
        """Shards that the given lanes read at a position (their present windows), and those that follow."""
        epoch, offset = divmod(position, self.samples)
        now: list[int] = []
        then: list[int] = []
        for lane in lanes:
            index = self._stages.reached(offset, epoch * self.samples, lane)
            schedule = self._schedule(epoch, lane)
            number = bisect_right(schedule.starts, index) - 1
            now += schedule.window(number, self.window)
            following = schedule.window(number + 1, self.window)
            then += following or self._schedule(epoch + 1, lane).window(0, self.window)
        return now, [shard for shard in then if shard not in set(now)]

    def substitute(self, position: int, shard: int, attempt: int) -> tuple[int, int]:
        """(shard, sample) to take in place of one that cannot be decoded; attempts count from 0.

        The first eight come from the same shard, which is at hand; further ones from anywhere.
        """
        words = (word & 0xFFFFFFFFFFFFFFFF for word in (self.seed, position, attempt))
        digest = hashlib.blake2b(struct.pack("<QQQ", *words), digest_size=16).digest()
        number, other = struct.unpack("<QQ", digest)
        if attempt >= 8:
            first = np.cumsum(self.counts)
            shard = int(np.searchsorted(first, other % self.samples, side="right"))
        return shard, number % int(self.counts[shard])

    def _schedule(self, epoch: int, lane: int) -> _Schedule:
        found = self._schedules.get((epoch, lane))
        if found is None:
            shards = _rng(self.seed, epoch, lane, 0).permutation(self._lanes[lane])
            found = self._schedules.put((epoch, lane), _Schedule(shards, self.counts[shards], self.window))
        return found

    def _window(self, epoch: int, lane: int, number: int) -> _Window:
        found = self._windows.get((epoch, lane, number))
        if found is None:
            shards = self._schedule(epoch, lane).window(number, self.window)
            rng = _rng(self.seed, epoch, lane, 1, number)
            found = self._windows.put((epoch, lane, number), _Window(shards, self.counts[shards].tolist(), rng))
        return found


def default_window(counts: Sequence[int] | np.ndarray, *, remote: bool) -> int:
    """16 shards where they must be fetched; else as many as hold about a million samples, which may be all."""
    if remote:
        return _REMOTE_WINDOW
    mean = max(1.0, float(np.mean(counts))) if len(counts) else 1.0
    return max(_REMOTE_WINDOW, int(_SAMPLES_IN_A_WINDOW / mean))


def sample_seed(seed: int, position: int) -> int:
    """What augmentation of the sample at a position is drawn from: 63 bits that depend on nothing else."""
    words = struct.pack("<QQ", seed & 0xFFFFFFFFFFFFFFFF, position)
    digest = hashlib.blake2b(words, digest_size=8, person=b"augmentation").digest()
    return int.from_bytes(digest, "little") >> 1


def signature() -> str:
    """Changes when positions would mean other samples: with this module, or with numpy's random streams, which numpy
    does not promise to keep (NEP 19)."""
    probe = _rng(1, 2, 3).permutation(257).astype("<i4").tobytes()
    return f"{_VERSION}-{hashlib.blake2b(probe, digest_size=4).hexdigest()}"


class _Schedule:
    """A lane's shards in the order of an epoch, and where its windows begin."""

    def __init__(self, shards: np.ndarray, counts: np.ndarray, window: int) -> None:
        self.shards = shards
        sums = np.concatenate([[0], np.cumsum(counts)])
        self.starts: list[int] = sums[:-1:window].tolist()

    def window(self, number: int, window: int) -> list[int]:
        return self.shards[number * window : (number + 1) * window].tolist()


class _Window:
    """The permuted samples of a few shards."""

    def __init__(self, shards: list[int], counts: list[int], rng: np.random.Generator) -> None:
        self._shards = shards
        self._starts: list[int] = np.cumsum([0, *counts])[:-1].tolist()
        total = sum(counts)
        self._order = rng.permutation(np.arange(total, dtype=np.int32 if total < 1 << 31 else np.int64))

    def at(self, index: int) -> tuple[int, int]:
        number = int(self._order[index])
        place = bisect_right(self._starts, number) - 1
        return self._shards[place], number - self._starts[place]


class _Stages:
    """Position within an epoch → (lane, sample of the lane), for lanes of different sizes.

    All lanes take turns until the smallest is used up, then the others until the next one is, and so on.
    """

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes
        self._starts, self._done, self._active = [], [], []
        start = done = 0
        for size in sorted(set(sizes)):
            if size == done:  # lanes without samples
                continue
            active = [lane for lane, own in enumerate(sizes) if own > done]
            self._starts.append(start)
            self._done.append(done)
            self._active.append(active)
            start += len(active) * (size - done)
            done = size

    def at(self, offset: int, before: int) -> tuple[int, int]:
        """``before`` is the number of samples before this epoch: turns go on where they were."""
        if len(self._sizes) == 1:
            return 0, offset
        stage = bisect_right(self._starts, offset) - 1
        active = self._active[stage]
        turn, place = divmod(offset - self._starts[stage], len(active))
        return active[(place + before) % len(active)], self._done[stage] + turn

    def reached(self, offset: int, before: int, lane: int) -> int:
        """The next sample of a lane at a position; its last one where the lane is used up."""
        stage = bisect_right(self._starts, offset) - 1
        active = self._active[stage]
        done = self._done[stage] + (offset - self._starts[stage]) // len(active)
        return min(done, max(0, self._sizes[lane] - 1))


class _Recent(Generic[K, V]):
    """The few values used last."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._values = capacity, OrderedDict[K, V]()

    def get(self, key: K) -> V | None:
        value = self._values.get(key)
        if value is not None and len(self._values) > 1:
            self._values.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> V:
        self._values[key] = value
        if len(self._values) > self._capacity:
            self._values.popitem(last=False)
        return value


def _deal(counts: np.ndarray, lanes: int) -> list[np.ndarray]:
    """Shards of every lane: the largest first, each to the lane with the fewest samples so far."""
    if not 1 <= lanes <= len(counts):
        raise DataError(f"lanes must be from 1 to the number of shards ({len(counts)}), got {lanes}")
    if lanes == 1:
        return [np.arange(len(counts))]
    dealt: list[list[int]] = [[] for _ in range(lanes)]
    heap = [(0, 0, lane) for lane in range(lanes)]
    for shard in np.argsort(-counts, kind="stable").tolist():
        samples, shards, lane = heapq.heappop(heap)
        dealt[lane].append(shard)
        heapq.heappush(heap, (samples + int(counts[shard]), shards + 1, lane))
    return [np.array(sorted(shards)) for shards in dealt]


def _rng(*words: int) -> np.random.Generator:
    return np.random.default_rng([word & 0xFFFFFFFFFFFFFFFF for word in words])
