"""Training batches: endless, shuffled, the same number on every rank, resumable at any step on any number of ranks.

Where a run is in its data is one integer, the number of samples that all ranks together have received. Which samples a
batch holds follows from it through :mod:`scale_digrap.data.plan`; loader processes keep no state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scale_digrap.data.dataset import ShardDataset
from scale_digrap.data.errors import DataError, SampleError
from scale_digrap.data.evaluation import EvalBatch, EvalLoader, check_ranks
from scale_digrap.data.faults import BadSample, BadSampleLog, FaultPolicy
from scale_digrap.data.mixture import Mixture, Stream
from scale_digrap.data.plan import Plan, default_window, sample_seed, signature
from scale_digrap.data.sample import VqaSample
from scale_digrap.data.workers import Feeder, Fetched

__all__ = ["DataError", "EvalBatch", "EvalLoader", "ShardDataset", "TrainLoader"]

Collate = Callable[[list[VqaSample]], Any]
_STATE_VERSION = 2


class TrainLoader:
    """Endless shuffled batches.

    The samples form one endless stream: epoch after epoch, each in an order of its own. Global batch k is the next
    ``batch_size × dp_world_size`` samples of the stream, dealt to the ranks one by one. Batches reach over the end of
    an epoch, so nothing is dropped, and the stream does not depend on how many ranks share it.

    A sample that cannot be decoded is replaced, counted and logged (:class:`FaultPolicy`). With several ranks the
    limits need a sum over them: call :meth:`agree` once a step, or pass :meth:`take_bad` through a reduction of your
    own and the sum to :meth:`count_bad`.

    Args:
        shards: shard patterns, a data set, or a mixture of data sets.
        batch_size: samples per rank and batch.
        dp_rank, dp_world_size: this rank among the data-parallel ranks.
        seed: of the shuffle, of substitutes, and of ``VqaSample.rng``.
        collate: called with a list of samples; its result is what iteration yields.
        workers: loader processes; 0 loads in the calling process.
        window: shards that are shuffled together; see :func:`scale_digrap.data.plan.default_window`.
        lanes: parts of the shards that are read side by side, a multiple of ``nodes``.
        nodes: hosts that the data-parallel ranks are spread over, with consecutive ranks on a host: with several lanes
            each host reads its lanes' shards only.
        faults: what to do about bad samples.
        bad_log: file for this rank's bad samples; None writes none.
        timeout_s: longest wait for a batch; 0 waits for ever.

    Raises:
        DataError: see :class:`ShardDataset`; also arguments that make no sense.
    """

    def __init__(
        self,
        shards: ShardDataset | Mixture | str | Path | Sequence[str | Path],
        *,
        batch_size: int,
        dp_rank: int = 0,
        dp_world_size: int = 1,
        seed: int = 0,
        collate: Collate,
        workers: int = 0,
        window: int | None = None,
        lanes: int = 1,
        nodes: int = 1,
        faults: FaultPolicy | None = None,
        bad_log: Path | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        check_ranks(batch_size, dp_rank, dp_world_size)
        if nodes < 1 or dp_world_size % nodes or lanes % nodes:
            raise DataError(
                f"nodes={nodes} must divide both dp_world_size={dp_world_size} and lanes={lanes}: every host reads "
                "whole lanes"
            )
        mixture = shards if isinstance(shards, Mixture) else Mixture({"train": shards}, {"train": 1.0})
        shares = mixture.shares()
        self.names = list(mixture.sources)
        self.datasets = [
            source if isinstance(source, ShardDataset) else ShardDataset(source) for source in mixture.sources.values()
        ]
        self.batch_size, self.dp_rank, self.dp_world_size = batch_size, dp_rank, dp_world_size
        self.seed, self.lanes = seed, lanes
        self.faults = FaultPolicy() if faults is None else faults
        self.plan = Stream(
            [
                Plan(
                    data.counts,
                    seed=seed + number,
                    window=default_window(data.counts, remote=data.remote) if window is None else window,
                    lanes=lanes,
                )
                for number, data in enumerate(self.datasets)
            ],
            shares,
            mixture.block,
            mixture.epoch,
            seed,
            lanes,
        )
        self.consumed = 0
        """Samples that all ranks together have received."""
        self.bad = 0
        """Bad samples of all ranks together, as far as they have been added up."""
        self.samples = len(self.plan)
        """Samples in an epoch."""
        self.batch_samples: list[tuple[str, str]] = []
        """(shard, key) of every sample of the batch that was handed out last, substitutes as what they are."""
        per_node = dp_world_size // nodes
        # Hosts take turns in the stream as lanes do, so that a host's positions lie in its own lanes.
        slot = (dp_rank % per_node) * nodes + dp_rank // per_node
        self._share = _Share(self.datasets, self.plan, slot, batch_size, dp_world_size)
        self._feeder = Feeder(
            _Training(self.datasets, self.plan, seed, collate, self.faults), workers=workers, timeout_s=timeout_s
        )
        self.bad_log = BadSampleLog(bad_log)
        """Where this rank's bad samples are listed."""
        self._new_bad = 0
        self._latest: BadSample | None = None
        self._run = 0

    @property
    def global_batch_size(self) -> int:
        """Samples that one batch of every rank holds together."""
        return self.batch_size * self.dp_world_size

    def __iter__(self) -> Iterator[Any]:
        """Batches from the current position on, without end. One iteration at a time."""
        return self._batches(None)

    def epoch(self, epoch: int) -> Iterator[Any]:
        """The whole batches of one epoch, from its start: ``samples // global_batch_size`` on every rank.

        The remainder (less than one global batch, another one each epoch) is left out.
        """
        self.consumed = epoch * self.samples
        return self.rest_of_epoch()

    def rest_of_epoch(self) -> Iterator[Any]:
        """The whole batches from the current position to the end of its epoch."""
        if self.samples < self.global_batch_size:
            raise DataError(
                f"an epoch of {self.samples} samples has no whole batch of {self.batch_size} × "
                f"{self.dp_world_size} ranks: use a smaller batch_size"
            )
        return self._batches((self.samples - self.consumed % self.samples) // self.global_batch_size)

    def epochs(self) -> dict[str, float]:
        """How often each data set has been gone through, by name."""
        drawn = self.plan.drawn(self.consumed)
        return {name: count / len(data) for name, count, data in zip(self.names, drawn, self.datasets, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The position, below 1 KiB, equal on all ranks; counted when a batch is handed out, not when it is loaded."""
        epoch, position = divmod(self.consumed, self.samples)
        return {
            "version": _STATE_VERSION,
            "consumed": self.consumed,
            "epoch": epoch,
            "position": position,
            "global_batch": self.global_batch_size,
            "bad": self.bad,
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any], *, strict: bool = True) -> None:
        """Continue at a saved position, on any number of ranks and with any batch size.

        Args:
            state: from :meth:`state_dict`.
            strict: False goes on with other data or another order: samples will repeat and others be missed.

        Raises:
            DataError: the state belongs to other data or another order.
        """
        if state.get("version") != _STATE_VERSION:
            raise DataError(
                f"cannot resume the data: its state has version {state.get('version')}, this is version "
                f"{_STATE_VERSION}, whose order is another: start afresh"
            )
        if strict:
            for name, now in self._identity().items():
                if state.get(name) != now:
                    raise DataError(f"cannot resume the data: {name} was {state.get(name)!r} and is now {now!r}")
        self.consumed, self.bad = int(state["consumed"]), int(state["bad"])
        self._new_bad = 0

    def take_bad(self) -> int:
        """Bad samples in the batches that this rank has received since the last call."""
        count, self._new_bad = self._new_bad, 0
        return count

    def count_bad(self, count: int) -> None:
        """Add the sum of every rank's :meth:`take_bad`. With the same number on all ranks, all raise or none.

        Raises:
            TooManyBadSamples: a limit of the fault policy is reached.
        """
        self.bad += count
        if count:
            latest = self._latest
            example = "None of them on this rank." if latest is None else f"The latest: {latest.reason}."
            self.faults.check(self.bad, self.consumed, example)

    def agree(self, group: Any = None) -> None:
        """Add up the bad samples of all ranks by one small all-reduce; every rank calls it, once a step.

        Raises:
            TooManyBadSamples: on all ranks.
        """
        count = torch.tensor(self.take_bad(), dtype=torch.int64)
        if dist.is_initialized() and self.dp_world_size > 1:
            if dist.get_backend(group) == "nccl":
                count = count.cuda()
            dist.all_reduce(count, group=group)
        self.count_bad(int(count))

    def close(self) -> None:
        """End loader processes and downloads."""
        self._feeder.close()
        for data in self.datasets:
            data.close()
            data.store.close()

    def _identity(self) -> dict[str, Any]:
        """What decides which sample a position means."""
        windows = [plan.window for plan in self.plan.plans]
        fingerprints = [data.fingerprint() for data in self.datasets]
        mixture = None
        if len(self.datasets) > 1:
            shares = ", ".join(f"{name} {share}" for name, share in zip(self.names, self.plan.shares, strict=True))
            mixture = _short(f"{shares}; block {self.plan.block}, epoch {self.plan.epoch}")
        return {
            "samples": self.samples,
            "fingerprint": fingerprints[0] if len(fingerprints) == 1 else _digest(" ".join(fingerprints)),
            "seed": self.seed,
            "window": windows[0] if len(set(windows)) == 1 else _short(str(windows)),
            "lanes": self.lanes,
            "mixture": mixture,
            "order": signature(),
        }

    def _batches(self, count: int | None) -> Iterator[Any]:
        self._run += 1
        run = self._run
        for fetched in self._feeder.run(self._share.places(self.consumed, count)):
            if run != self._run:
                raise DataError("another iteration over this loader has begun: this one cannot go on")
            self.consumed += self.global_batch_size
            try:
                self._receive(fetched)
            except Exception:
                self._feeder.close()  # now: the traceback may keep this loader, and its processes, for long
                raise
            yield fetched.batch

    def _receive(self, fetched: Fetched) -> None:
        self.batch_samples = fetched.samples
        self.bad_log.write(fetched.bad)
        if fetched.bad:
            self._new_bad += len(fetched.bad)
            self._latest = fetched.bad[-1]
        if fetched.error is not None:
            raise fetched.error
        if self.dp_world_size == 1:
            self.count_bad(self.take_bad())


@dataclass(frozen=True, slots=True)
class _Place:
    """One position of the stream, and the sample that belongs there."""

    position: int
    source: int
    shard: int
    number: int


class _Share:
    """Which positions of the stream are this rank's. Knows nothing of the loader, whose processes end with it."""

    def __init__(
        self, datasets: list[ShardDataset], plan: Stream, slot: int, batch_size: int, dp_world_size: int
    ) -> None:
        self._datasets, self._plan = datasets, plan
        self._slot, self._batch_size, self._world = slot, batch_size, dp_world_size
        self._ahead: dict[int, tuple[list[str], list[str]]] = {}

    def places(self, start: int, count: int | None) -> Iterator[list[_Place]]:
        """Batch by batch, from a position on."""
        remote = any(data.remote for data in self._datasets)
        step = self._batch_size * self._world
        number = 0
        while count is None or number < count:
            first = start + number * step + self._slot
            if remote:
                self._look_ahead(first)
            yield [_Place(position, *self._plan.at(position)) for position in range(first, first + step, self._world)]
            number += 1

    def _look_ahead(self, position: int) -> None:
        """Tell the stores which shards this rank reads now and next."""
        lanes = self._plan.lanes
        own_lanes = sorted({(position + turn * self._world) % lanes for turn in range(lanes)})
        stores: dict[int, tuple[Any, list[str], list[str], list[Any]]] = {}
        drawn = self._plan.drawn(position)
        for data, plan, own in zip(self._datasets, self._plan.plans, drawn, strict=True):
            now, then = plan.ahead(own, own_lanes)
            _, pinned, wanted, lines = stores.setdefault(id(data.store), (data.store, [], [], []))
            pinned += [data.urls[shard] for shard in now]
            wanted += [data.urls[shard] for shard in now + then]
            lines += [data.line(shard) for shard in now + then]
        for number, (store, pinned, wanted, lines) in stores.items():
            if self._ahead.get(number) != (pinned, wanted):
                self._ahead[number] = (pinned, wanted)
                store.pin(pinned)
                store.prefetch(wanted, lines)


class _Training:
    """Places → a collated batch, with substitutes for what cannot be decoded."""

    def __init__(
        self, datasets: list[ShardDataset], plan: Stream, seed: int, collate: Collate, faults: FaultPolicy
    ) -> None:
        self._datasets, self._plan, self._seed = datasets, plan, seed
        self._collate, self._faults = collate, faults

    def fetch(self, items: list[_Place]) -> Fetched:
        bad: list[BadSample] = []
        shards, samples = zip(*[self._sample(place, bad) for place in items], strict=True)
        keys = [(shard, sample.key) for shard, sample in zip(shards, samples, strict=True)]
        return Fetched(self._collate(list(samples)), bad, keys)

    def _sample(self, place: _Place, bad: list[BadSample]) -> tuple[str, VqaSample]:
        """Its shard's name and the sample."""
        data, plan = self._datasets[place.source], self._plan.plans[place.source]
        shard, number = place.shard, place.number
        reason = ""
        for attempt in range(self._faults.max_attempts + 1):
            try:
                sample = data.sample(shard, number)
            except SampleError as error:
                reason = str(error)
                bad.append(BadSample(place.position, data.name(shard), data.key(shard, number), reason))
                shard, number = plan.substitute(place.position, place.shard, attempt)
                continue
            sample.seed = sample_seed(self._seed, place.position)
            return data.name(shard), sample
        raise DataError(
            f"position {place.position}: {self._faults.max_attempts} substitutes in a row could not be decoded either. "
            f"The last: {reason}. Check the shards with `scale-digrap shards validate --decode`"
        )


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:120]}… ({_digest(text)})"
