"""Shards in, batches out: a map-style data set over tar files, and loaders whose ranks stay in step.

The position in the data is one integer, the number of samples the whole job has consumed. Which samples a batch holds
is a pure function of (seed, position, batch size, rank, ranks); loader processes keep no state.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from braceexpand import braceexpand
from PIL import Image

from scale_digrap.data.errors import DataError
from scale_digrap.data.sample import VqaSample

IMAGE_FIELDS = ("png", "jpg", "jpeg", "webp")
_BLOCK = 512

Collate = Callable[[list[VqaSample]], Any]


def expand_urls(urls: str | Path | Sequence[str | Path]) -> list[Path]:
    """Paths of the shards that paths, globs and brace patterns (``{000000..000041}``) name, in order.

    Raises:
        DataError: a pattern that matches no file, or the same file twice.
    """
    paths: list[Path] = []
    for url in [urls] if isinstance(urls, (str, Path)) else urls:
        for pattern in braceexpand(str(url)):
            if glob.has_magic(pattern) and not Path(pattern).exists():
                found = sorted(glob.glob(pattern))
                if not found:
                    raise DataError(f"no file matches {pattern!r}")
                paths += [Path(name) for name in found]
            else:
                paths.append(Path(pattern))
    if not paths:
        raise DataError("no shards given")
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(f"no such shard: {', '.join(missing[:3])}{more}")
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            raise DataError(f"shard {str(path)!r} is listed twice: its samples would count twice")
        seen.add(path)
    return paths


@dataclass(frozen=True)
class Entry:
    """Where one sample lies in its shard: byte ranges (offset, size) of its fields."""

    key: str
    meta: tuple[int, int]
    image: tuple[int, int] | None


def index_shard(path: Path) -> list[Entry]:
    """Walk a tar file's headers once and check every sample.

    Raises:
        DataError: damaged archive, duplicate key, field missing or wrong.
    """
    stat = path.stat()
    return _index_shard(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _index_shard(name: str, size: int, mtime_ns: int) -> list[Entry]:
    fields: dict[str, dict[str, tuple[int, int]]] = {}
    with open(name, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    folder, _, base = member.name.rpartition("/")
                    stem, _, extension = base.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    parts = fields.setdefault(key, {})
                    if extension.lower() in parts:
                        raise DataError(f"{name}: key {key!r} has two members .{extension}")
                    if member.offset_data + member.size > size:
                        raise DataError(f"{name}: cut off inside {member.name!r}")
                    parts[extension.lower()] = (member.offset_data, member.size)
                end = tar.offset
        except tarfile.TarError as error:
            raise DataError(f"{name}: not a whole tar file: {error}") from None
        # A zeroed or missing stretch looks like the end of the archive to a tar reader: the true end is zeros only.
        file.seek(end)
        tail = file.read()
        if len(tail) < _BLOCK or tail.strip(b"\0"):
            raise DataError(f"{name}: damaged after byte {end}: {len(tail)} bytes follow what reads as its last member")
        entries = []
        for key, parts in fields.items():
            if "json" not in parts:
                raise DataError(f"{name}: sample {key!r} has no .json (found {', '.join(sorted(parts))})")
            images = [extension for extension in IMAGE_FIELDS if extension in parts]
            if len(images) > 1:
                raise DataError(f"{name}: sample {key!r} has more than one image: {', '.join(images)}")
            offset, length = parts["json"]
            file.seek(offset)
            _parse_meta(file.read(length), f"{name}: sample {key!r}")
            entries.append(Entry(key, parts["json"], parts[images[0]] if images else None))
    if not entries:
        raise DataError(f"{name}: holds no samples")
    return entries


def _parse_meta(data: bytes, where: str) -> dict[str, Any]:
    try:
        meta = json.loads(data)
    except ValueError as error:
        raise DataError(f"{where}: its .json is not valid JSON: {error}") from None
    if not isinstance(meta, dict):
        raise DataError(f"{where}: its .json must be an object, got {type(meta).__name__}")
    for field, kind in (("question", str), ("answers", list), ("question_id", (str, int))):
        if field not in meta:
            raise DataError(f"{where}: its .json lacks {field!r}")
        if not isinstance(meta[field], kind):
            raise DataError(f"{where}: {field!r} has type {type(meta[field]).__name__}")
    if not meta["answers"] or not all(isinstance(answer, str) for answer in meta["answers"]):
        raise DataError(f"{where}: 'answers' must be a list of one or more strings, got {meta['answers']!r}")
    return meta


class ShardDataset(torch.utils.data.Dataset[VqaSample]):
    """Random access to the samples of tar shards, in shard order; ``dataset[i]`` is a :class:`VqaSample`.

    Images come decoded to RGB.

    Args:
        urls: paths, globs or brace patterns.

    Raises:
        DataError: missing or damaged shards, keys that occur twice, samples without their fields.
    """

    def __init__(self, urls: str | Path | Sequence[str | Path]) -> None:
        self.paths = expand_urls(urls)
        self._entries: list[tuple[int, Entry]] = []
        where: dict[str, Path] = {}
        for number, path in enumerate(self.paths):
            for entry in index_shard(path):
                if entry.key in where:
                    raise DataError(f"key {entry.key!r} occurs in {where[entry.key]} and in {path}")
                where[entry.key] = path
                self._entries.append((number, entry))
        self._files: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> VqaSample:
        number, entry = self._entries[index]
        where = f"{self.paths[number]}: sample {entry.key!r}"
        meta = _parse_meta(self._read(number, *entry.meta), where)
        image = None
        if entry.image is not None:
            try:
                image = Image.open(io.BytesIO(self._read(number, *entry.image))).convert("RGB")
            except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, … on damaged files
                raise DataError(f"{where}: its image cannot be decoded: {error}") from None
        return VqaSample(
            key=entry.key,
            image=image,
            question=meta.pop("question"),
            answers=meta.pop("answers"),
            question_id=str(meta.pop("question_id")),
            extra=meta,
        )

    @property
    def keys(self) -> list[str]:
        """The keys of all samples, in order."""
        return [entry.key for _, entry in self._entries]

    def fingerprint(self) -> str:
        """Changes when the samples or their order change; not when the files move."""
        digest = hashlib.blake2b(digest_size=12)
        for key in self.keys:
            digest.update(key.encode() + b"\0")
        return digest.hexdigest()

    def _read(self, number: int, offset: int, size: int) -> bytes:
        # One descriptor per process and shard: pread has no shared position, and a fork must not share descriptors.
        slot = (os.getpid(), number)
        if slot not in self._files:
            with self._lock:
                if slot not in self._files:
                    self._files[slot] = os.open(self.paths[number], os.O_RDONLY)
        data = os.pread(self._files[slot], size, offset)
        if len(data) != size:
            raise DataError(f"{self.paths[number]}: has become shorter since it was opened")
        return data

    def close(self) -> None:
        """Close the shards; they open again on the next access."""
        for (process, _), descriptor in self._files.items():
            if process == os.getpid():
                os.close(descriptor)
        self._files.clear()

    def __del__(self) -> None:
        if getattr(self, "_files", None):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


class TrainLoader:
    """Endless shuffled batches, the same number on every rank.

    The samples form one endless stream: epoch after epoch, each a new permutation that depends on (seed, epoch) alone.
    Global batch k is the next ``batch_size × dp_world_size`` samples of the stream, of which rank r takes every
    ``dp_world_size``-th from the r-th on. Batches reach over the end of an epoch, so nothing is dropped, and the global
    batches do not depend on how many ranks share them.

    Args:
        shards: shard patterns, or a data set.
        batch_size: samples per rank and batch.
        dp_rank, dp_world_size: this rank among the data-parallel ranks.
        seed: of the shuffle.
        collate: called with a list of samples; its result is what iteration yields.
        workers: loader processes; 0 loads in the calling process.

    Raises:
        DataError: see :class:`ShardDataset`; also ``batch_size`` or ranks that make no sense.
    """

    def __init__(
        self,
        shards: ShardDataset | str | Path | Sequence[str | Path],
        *,
        batch_size: int,
        dp_rank: int = 0,
        dp_world_size: int = 1,
        seed: int = 0,
        collate: Collate,
        workers: int = 0,
    ) -> None:
        self.dataset = shards if isinstance(shards, ShardDataset) else ShardDataset(shards)
        _check_ranks(batch_size, dp_rank, dp_world_size)
        self.batch_size, self.dp_rank, self.dp_world_size = batch_size, dp_rank, dp_world_size
        self.seed, self.collate, self.workers = seed, collate, workers
        self.consumed = 0
        """Samples that all ranks together have received."""
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def global_batch_size(self) -> int:
        """Samples that one batch of every rank holds together."""
        return self.batch_size * self.dp_world_size

    def __iter__(self) -> Iterator[Any]:
        """Batches from the current position on, without end."""
        return self._batches(None)

    def epoch(self, epoch: int) -> Iterator[Any]:
        """The whole batches of one epoch, from its start: ``len(dataset) // global_batch_size`` on every rank.

        The remainder (less than one global batch, another one each epoch) is left out.
        """
        count = len(self.dataset) // self.global_batch_size
        if count == 0:
            raise DataError(
                f"an epoch of {len(self.dataset)} samples has no whole batch of {self.batch_size} × "
                f"{self.dp_world_size} ranks: use a smaller batch_size"
            )
        self.consumed = epoch * len(self.dataset)
        return self._batches(count)

    def state_dict(self) -> dict[str, Any]:
        """The position, equal on all ranks and counted when a batch is handed out: prefetched batches do not count."""
        epoch, position = divmod(self.consumed, len(self.dataset))
        return {
            "version": 1,
            "consumed": self.consumed,
            "epoch": epoch,
            "position": position,
            "seed": self.seed,
            "samples": len(self.dataset),
            "fingerprint": self.dataset.fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position, on any number of ranks and with any batch size.

        Raises:
            DataError: the state belongs to other data or another seed: continuing would repeat and miss samples.
        """
        for name, now in (
            ("samples", len(self.dataset)),
            ("fingerprint", self.dataset.fingerprint()),
            ("seed", self.seed),
        ):
            if state[name] != now:
                raise DataError(f"cannot resume the data: {name} was {state[name]!r} and is now {now!r}")
        self.consumed = int(state["consumed"])

    def _batches(self, count: int | None) -> Iterator[Any]:
        start = self.consumed
        if self.workers == 0:
            source: Any = (self.collate([self.dataset[i] for i in ids]) for ids in self._indices(start, count))
        else:
            source = torch.utils.data.DataLoader(
                self.dataset,
                batch_sampler=_FromFunction(lambda: self._indices(start, count)),
                collate_fn=self.collate,
                num_workers=self.workers,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator().manual_seed(self.seed),  # or it would draw from the global one
            )
        for number, batch in enumerate(source, 1):
            self.consumed = start + number * self.global_batch_size
            yield batch

    def _indices(self, start: int, count: int | None) -> Iterator[list[int]]:
        """This rank's sample indices, batch by batch."""
        number = 0
        while count is None or number < count:
            first = start + number * self.global_batch_size + self.dp_rank
            yield [self._at(first + i * self.dp_world_size) for i in range(self.batch_size)]
            number += 1

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.dataset))
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
            self._order = (epoch, order)
        return int(self._order[1][offset])


@dataclass
class EvalBatch:
    """One evaluation batch of one rank.

    Attributes:
        samples: ``batch_size`` samples.
        inputs: what ``collate`` made of them.
        valid: bool [batch_size]; False marks a repeated sample that only keeps the ranks in step: do not count it.
    """

    samples: list[VqaSample]
    inputs: Any
    valid: torch.Tensor


class EvalLoader:
    """Every sample exactly once over all ranks, in order, with the same number of batches on every rank.

    The last batches are filled up with repeats of the first samples, marked in ``batch.valid``: sharded models need
    every rank in every forward pass.

    Args:
        shards: shard patterns, or a data set.
        batch_size: samples per rank and batch.
        dp_rank, dp_world_size: this rank among the data-parallel ranks.
        collate: called with ``batch_size`` samples, for :attr:`EvalBatch.inputs`.
    """

    def __init__(
        self,
        shards: ShardDataset | str | Path | Sequence[str | Path],
        *,
        batch_size: int,
        dp_rank: int = 0,
        dp_world_size: int = 1,
        collate: Collate,
    ) -> None:
        self.dataset = shards if isinstance(shards, ShardDataset) else ShardDataset(shards)
        _check_ranks(batch_size, dp_rank, dp_world_size)
        self.batch_size, self.dp_rank, self.dp_world_size = batch_size, dp_rank, dp_world_size
        self.collate = collate

    def __len__(self) -> int:
        """Batches of this rank, which is the number of every rank."""
        return -(-len(self.dataset) // (self.batch_size * self.dp_world_size))

    def __iter__(self) -> Iterator[EvalBatch]:
        total = len(self.dataset)
        for number in range(len(self)):
            first = (number * self.dp_world_size + self.dp_rank) * self.batch_size
            positions = range(first, first + self.batch_size)
            samples = [self.dataset[position % total] for position in positions]
            valid = torch.tensor([position < total for position in positions])
            yield EvalBatch(samples, self.collate(samples), valid)


class _FromFunction:
    """A batch sampler out of a function that starts the index stream anew."""

    def __init__(self, function: Callable[[], Iterator[list[int]]]) -> None:
        self._function = function

    def __iter__(self) -> Iterator[list[int]]:
        return self._function()


def _check_ranks(batch_size: int, dp_rank: int, dp_world_size: int) -> None:
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= dp_rank < dp_world_size:
        raise DataError(f"dp_rank must be in [0, dp_world_size), got {dp_rank} of {dp_world_size}")
