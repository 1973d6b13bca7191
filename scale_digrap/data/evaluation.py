"""Evaluation batches: every sample exactly once over all ranks, proven afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from scale_digrap.data.dataset import ShardDataset
from scale_digrap.data.errors import DataError, SampleError
from scale_digrap.data.faults import BadSample
from scale_digrap.data.sample import VqaSample
from scale_digrap.data.workers import Feeder, Fetched

_STAND_INS = 64


@dataclass
class EvalBatch:
    """One evaluation batch of one rank.

    Attributes:
        samples: ``batch_size`` samples; fewer at the end where the loader does not fill up.
        inputs: what ``collate`` made of them.
        valid: bool [samples]; False marks a sample that only keeps the ranks in step: do not count it.
        errors: samples of this batch that could not be decoded. They have an invalid stand-in each in ``samples`` and
            are never substituted in a score: it is up to the caller to count them as wrong or to stop.
        indices: of the samples in the data set; -1 for what fills up.
    """

    samples: list[VqaSample]
    inputs: Any
    valid: torch.Tensor
    errors: list[BadSample] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)


class EvalLoader:
    """Every sample exactly once over all ranks, in order, with the same number of batches on every rank.

    The last batches are filled up with repeats that ``batch.valid`` marks: sharded models need every rank in every
    forward pass. Where each rank has a whole model, ``fill_up=False`` leaves them as short as they are, and a rank
    whose turn does not come again without one. Fewer samples than ranks, one, or none at all are fine.

    Args:
        shards: shard patterns, or a data set.
        batch_size: samples per rank and batch.
        dp_rank, dp_world_size: this rank among the data-parallel ranks.
        collate: called with ``batch_size`` samples, for :attr:`EvalBatch.inputs`.
        workers: loader processes; 0 loads in the calling process.
        timeout_s: longest wait for a batch; 0 waits for ever.
        indices: numbers of the samples that are wanted, int64 [n], strictly increasing, the same on every rank; all by
            default. What an interrupted evaluation has not done yet can so be dealt out anew to any ranks.
        fill_up: give every rank the same number of full batches.

    Raises:
        DataError: see :class:`ShardDataset`; also ``batch_size``, ranks or ``indices`` that make no sense.
    """

    def __init__(
        self,
        shards: ShardDataset | str | Path | Sequence[str | Path],
        *,
        batch_size: int,
        dp_rank: int = 0,
        dp_world_size: int = 1,
        collate: Callable[[list[VqaSample]], Any],
        workers: int = 0,
        timeout_s: float = 600.0,
        indices: np.ndarray | Sequence[int] | None = None,
        fill_up: bool = True,
    ) -> None:
        check_ranks(batch_size, dp_rank, dp_world_size)
        self.dataset = shards if isinstance(shards, ShardDataset) else ShardDataset(shards)
        self._wanted = None if indices is None else _check_indices(indices, len(self.dataset))
        self.total = len(self.dataset) if self._wanted is None else len(self._wanted)
        """Samples of all ranks together."""
        self.fill_up = fill_up
        self.batch_size, self.dp_rank, self.dp_world_size = batch_size, dp_rank, dp_world_size
        self.errors = 0
        """Samples of this rank that could not be decoded, in the present iteration."""
        self._feeder = Feeder(_Evaluation(self.dataset, collate), workers=workers, timeout_s=timeout_s)
        self._seen = self._sum = 0

    def __len__(self) -> int:
        """Batches of this rank, which is the number of every rank where they are filled up."""
        batches = -(-self.total // self.batch_size)
        mine = 0 if self.fill_up else self.dp_rank
        return -(-max(0, batches - mine) // self.dp_world_size)

    def __iter__(self) -> Iterator[EvalBatch]:
        self._seen = self._sum = self.errors = 0
        for indices, fetched in zip(self._indices(), self._feeder.run(self._indices(look_ahead=True)), strict=True):
            if fetched.error is not None:
                raise fetched.error
            delivered = [index for index in indices if index >= 0]
            fetched.batch.indices = list(indices)
            self._seen += len(delivered)
            self._sum += int(_hashes(np.array(delivered, dtype=np.uint64)).sum())
            self.errors += len(fetched.batch.errors)
            yield fetched.batch

    def verify_coverage(self, group: Any = None) -> None:
        """Prove, after the loop, that all ranks together have received every sample once: one all-reduce of a count
        and of a sum over hashes. Every rank calls it. Samples that could not be decoded count as received.

        Args:
            group: the data-parallel process group; None is all ranks, whose copies of a data-parallel rank are allowed
                for.

        Raises:
            DataError: on all ranks, if a sample was missed or came twice, or a rank has not finished its loop.
        """
        totals = torch.tensor([self._seen, self._sum], dtype=torch.int64)
        copies = 1
        if self.dp_world_size > 1:
            if not dist.is_initialized():
                raise DataError("verify_coverage needs torch.distributed when the data has several ranks")
            copies = dist.get_world_size(group) // self.dp_world_size
            if dist.get_backend(group) == "nccl":
                totals = totals.cuda()
            dist.all_reduce(totals, group=group)
        seen, checksum = totals.tolist()
        total = self.total
        steps = range(0, total, 1 << 20)
        expected = sum(int(_hashes(self._dealt(i, i + (1 << 20)).astype(np.uint64)).sum()) for i in steps)
        if seen != total * copies or checksum != expected * copies:
            what = (
                f"{seen // copies} of {total} samples" if seen != total * copies else "some samples twice, others not"
            )
            raise DataError(f"the evaluation has received {what}: its result would be wrong. Did all ranks finish?")

    def close(self) -> None:
        """End the loader processes; the next iteration starts new ones."""
        self._feeder.close()

    def _indices(self, look_ahead: bool = False) -> Iterator[list[int]]:
        """This rank's sample indices, batch by batch; -1 fills up."""
        for number in range(len(self)):
            first = (number * self.dp_world_size + self.dp_rank) * self.batch_size
            mine = self._dealt(first, first + self.batch_size).tolist()
            if look_ahead and self.dataset.remote and mine:
                shard, _ = self.dataset.place(mine[0])
                coming = range(shard, min(shard + 3, len(self.dataset.urls)))
                self.dataset.store.prefetch(
                    [self.dataset.urls[i] for i in coming], [self.dataset.line(i) for i in coming]
                )
            yield mine + [-1] * (self.batch_size - len(mine) if self.fill_up else 0)

    def _dealt(self, first: int, end: int) -> np.ndarray:
        """Sample indices of positions in what is dealt out, int64."""
        end = min(end, self.total)
        return np.arange(first, max(first, end)) if self._wanted is None else self._wanted[first:end]


class _Evaluation:
    """Sample indices → an :class:`EvalBatch`."""

    def __init__(self, dataset: ShardDataset, collate: Callable[[list[VqaSample]], Any]) -> None:
        self._dataset, self._collate = dataset, collate

    def fetch(self, items: list[int]) -> Fetched:
        errors: list[BadSample] = []
        loaded = [self._sample(index, errors) if index >= 0 else None for index in items]
        stand_in = next((sample for sample in loaded if sample is not None), None)
        if stand_in is None:
            stand_in = self._any(max(0, items[0]))
        samples = [sample or stand_in for sample in loaded]
        valid = torch.tensor([sample is not None for sample in loaded])
        return Fetched(EvalBatch(samples, self._collate(samples), valid, errors))

    def _sample(self, index: int, errors: list[BadSample]) -> VqaSample | None:
        shard, number = self._dataset.place(index)
        try:
            return self._dataset.sample(shard, number)
        except SampleError as error:
            errors.append(BadSample(index, self._dataset.name(shard), self._dataset.key(shard, number), str(error)))
            return None

    def _any(self, start: int) -> VqaSample:
        """Some sample that can be decoded, for a batch without one of its own."""
        last: SampleError | None = None
        for step in range(min(_STAND_INS, len(self._dataset))):
            try:
                return self._dataset[(start + step) % len(self._dataset)]
            except SampleError as error:
                last = error
        raise DataError(f"none of {_STAND_INS} samples in a row can be decoded. The last: {last}")


def check_ranks(batch_size: int, dp_rank: int, dp_world_size: int) -> None:
    """Raise a DataError for a batch size or ranks that make no sense."""
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= dp_rank < dp_world_size:
        raise DataError(f"dp_rank must be in [0, dp_world_size), got {dp_rank} of {dp_world_size}")


def _check_indices(indices: np.ndarray | Sequence[int], total: int) -> np.ndarray:
    wanted = np.asarray(indices, dtype=np.int64)
    if wanted.ndim != 1 or (len(wanted) > 1 and int(np.diff(wanted).min()) <= 0):
        raise DataError("indices must be one strictly increasing list: every sample comes at most once")
    if len(wanted) and not (wanted[0] >= 0 and wanted[-1] < total):
        raise DataError(f"indices must be in [0, {total}), got {int(wanted[0])} to {int(wanted[-1])}")
    return wanted


def _hashes(indices: np.ndarray) -> np.ndarray:
    """uint64 [n] below 2³²: a mix of the bits of every index (splitmix64's finaliser), so that sums tell sets apart."""
    mixed = indices + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(32)
