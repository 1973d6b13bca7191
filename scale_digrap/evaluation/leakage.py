"""Does the training data hold the questions or the pictures that a model is evaluated on?

Four kinds of matches are counted, per suite, in questions:

``question_id``
    the same question: its question_id occurs in the training data, there too with the same picture or the same text
    (ids of different data sets collide). For a question that was made from another one (IV-VQA, CV-VQA,
    VQA-Rephrasings) the training data may hold that one instead.
``question_and_image``
    the same normalised text about the same picture's id (or the id of the picture that it was edited from).
``exact_image``
    one of its pictures has the same pixels as a picture in the training data, whatever it is asked.
``near_image``
    a perceptual hash within `distance` bits of a training picture's that also has the same colours in the same places:
    a candidate to be looked at. Exact copies are among them.

Pictures that show nothing (one colour) are counted, and compared by neither hash. Each rank reads its share of all
shards; the suites' digests are gathered once and the matches reduced once.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from scale_digrap.data.dataset import ShardDataset
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.evaluation.fingerprints import Fingerprints, read_blocks
from scale_digrap.evaluation.image_hash import HammingIndex, same_colours
from scale_digrap.evaluation.suites import Suite
from scale_digrap.runtime.secrets import mask_tree

SCHEMA = 1
EXACT = ("question_id", "question_and_image", "exact_image")
KINDS = (*EXACT, "near_image")
_SHIFT = 48  # a match is one number: its distance, then the training sample
_NONE = np.iinfo(np.int64).max
_NEAR, _IDS = 3, 4
_NO_ROWS = np.zeros(0, np.int64)

T = TypeVar("T")
OpenShards = Callable[[Sequence[str]], ShardDataset]
Progress = Callable[[str, int, int], None]
"""Called as (what is read, blocks done, blocks of this rank)."""


class LeakageError(ScaleDigrapError):
    """The check cannot be done; raised on every rank alike."""


@dataclass(frozen=True, kw_only=True)
class LeakageRow:
    """What the training data holds of one suite."""

    suite: str
    questions: int
    matches: dict[str, int]
    """Kind (see `KINDS`) → questions."""
    leaked: int
    """Questions with a match of any kind but ``near_image``."""
    fraction: float
    """Of the questions that leaked."""
    near_fraction: float
    """Of the questions with a ``near_image``."""
    id_collisions: int
    """Questions whose question_id the training data uses for something else: no leak."""
    flat_images: int
    unreadable: int
    """Questions that could not be compared, or not all of whose pictures could."""
    marked: bool
    """A fraction is above its limit."""
    examples: dict[str, list[dict[str, Any]]]
    """Kind → the first matches: what the two samples are called, and by how many bits their pictures differ."""

    def describe(self) -> str:
        """One line for people."""
        counts = ", ".join(f"{kind.replace('_', ' ')} {self.matches[kind]:,}" for kind in KINDS)
        mark = "LEAK  " if self.marked else "      "
        return f"{mark}{self.suite}: {self.leaked:,} of {self.questions:,} questions ({self.fraction:.2%}); {counts}"


@dataclass(kw_only=True)
class LeakageReport:
    """The outcome, equal on all ranks whatever their number."""

    train: dict[str, Any]
    """``shards``, ``questions``, ``images``, ``flat_images``, ``unreadable``."""
    settings: dict[str, Any]
    rows: list[LeakageRow] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Suites without shards, which were not compared."""

    @property
    def marked(self) -> list[str]:
        """The suites that are marked."""
        return [row.suite for row in self.rows if row.marked]

    def describe(self) -> str:
        """Lines for people, one per suite."""
        lines = [row.describe() for row in self.rows]
        return "\n".join([*lines, *(f"      {name}: no shards, not compared" for name in self.missing)])

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LeakageReport:
        """What `to_json` gave.

        Raises:
            LeakageError: of another schema.
        """
        if data.get("schema") != SCHEMA:
            raise LeakageError(f"leakage report of schema {data.get('schema')!r}; this version reads schema {SCHEMA}")
        values = {name: value for name, value in data.items() if name != "schema"}
        return cls(**{**values, "rows": [LeakageRow(**row) for row in values["rows"]]})


def check(
    suites: Sequence[Suite],
    train: str | Sequence[str],
    *,
    open_shards: OpenShards = ShardDataset,
    dp_rank: int = 0,
    dp_world_size: int = 1,
    limit: float = 0.0,
    near_limit: float = 0.01,
    distance: int = 4,
    images: bool = True,
    workers: int = 0,
    cache_dir: str | Path | None = None,
    examples: int = 3,
    progress: Progress | None = None,
) -> LeakageReport:
    """Compare every suite with the training data.

    Args:
        suites: with their shards; those without are listed as missing.
        train: shards of the training data.
        open_shards: makes a data set of shards, for those that are not plain local files.
        dp_rank, dp_world_size: this rank among those that share the reading. With more than one, all ranks of the
            default process group call this together.
        limit: a suite is marked when more than this fraction of its questions leaked.
        near_limit: it is also marked when more than this fraction has a ``near_image``.
        distance: bits, of 64, by which perceptual hashes of the same picture may differ.
        images: whether pictures are compared; without, the check takes minutes less and sees fewer leaks.
        workers: threads per rank that decode pictures.
        cache_dir: keeps what was read of each set of shards, for the next check and for one that was killed.
        examples: matches to name per suite and kind.
        progress: see `Progress`.

    Returns:
        The report, the same on every rank.

    Raises:
        LeakageError: on every rank, if a set cannot be read on one, or an option makes no sense.
    """
    if not 0 <= distance < 16:
        raise LeakageError(f"leakage.distance must be 0 to 15 bits, got {distance}")
    for name, value in (("limit", limit), ("near_limit", near_limit)):
        if not 0 <= value <= 1:
            raise LeakageError(f"leakage.{name} must be a fraction in [0, 1], got {value}")
    train = [train] if isinstance(train, str) else [str(shard) for shard in train]
    if not train:
        raise LeakageError("leakage.train names no shards: the training data must be known to look for leaks from it")
    ranks = _Ranks(dp_world_size)
    present = [suite for suite in suites if not suite.missing]

    def blocks(name: str, dataset: ShardDataset) -> list[tuple[int, Fingerprints]]:
        return list(
            read_blocks(
                dataset,
                rank=dp_rank,
                ranks=dp_world_size,
                images=images,
                workers=workers,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                progress=None if progress is None else lambda done, total: progress(name, done, total),
            )
        )

    sets: dict[str, ShardDataset] = {}
    with ranks.together("reading"):
        sets = {suite.name: open_shards(suite.shards) for suite in present}
        training = open_shards(train)
        asked = {name: blocks(name, dataset) for name, dataset in sets.items()}
        trained_blocks = blocks("train", training)
    everyone = ranks.gather(asked)
    trained = Fingerprints.join(trained_blocks)
    rows = np.concatenate([np.arange(start, start + len(block)) for start, block in trained_blocks] or [_NO_ROWS])
    found: dict[str, _Matches] = {}
    with ranks.together("comparing"):
        for suite in present:
            parts = {start: block for asked in everyone for start, block in asked[suite.name]}
            found[suite.name] = _Matches.of(Fingerprints.join(sorted(parts.items())), trained, rows, distance)
    for matches in found.values():
        ranks.minimum_(matches.first)
    figures = ranks.total([len(trained.pixels), int(trained.flat.sum()), int(trained.unreadable.sum())])
    named: list[LeakageRow] | None = None
    with ranks.together("reporting"):
        if dp_rank == 0:
            named = []
            for name, matches in found.items():
                shown = {kind: _examples(matches.pairs(kind, examples), sets[name], training) for kind in KINDS}
                named.append(matches.row(name, limit, near_limit, shown))
    return LeakageReport(
        train={
            "shards": mask_tree(train),  # kept beside the results, and shared with them
            "questions": len(training),
            **dict(zip(("images", "flat_images", "unreadable"), figures, strict=True)),
        },
        settings={"limit": limit, "near_limit": near_limit, "distance": distance, "images": images},
        rows=ranks.first(named),
        missing=[suite.name for suite in suites if suite.missing],
    )


@dataclass
class _Matches:
    """Of one suite's questions.

    Attributes:
        prints: all of the suite's.
        first: int64 [5, questions], for each of `KINDS`, and for question_ids alone, the closest match: the bits that
            differ, then the training sample's number; `_NONE` where there is none. Over ranks, the smallest counts.
    """

    prints: Fingerprints
    first: np.ndarray

    @classmethod
    def of(cls, prints: Fingerprints, trained: Fingerprints, rows: np.ndarray, distance: int) -> _Matches:
        """The matches among the training samples `rows`, whose fingerprints are `trained`."""
        shown, seen = prints.pictures(~prints.flat), trained.pictures(~trained.flat)
        first = [
            _equal(prints.questions, trained.questions, rows),
            _equal(prints.texts, trained.texts, rows),
            _by_owner(shown, _equal(shown.pixels[:, None], seen.pixels[:, None], seen.owners)),
            _by_owner(shown, _near(shown, seen, distance)),
            _equal(prints.ids[:, None], trained.ids[:, None], rows),
        ]
        return cls(prints, np.stack(first))

    def row(self, suite: str, limit: float, near_limit: float, examples: dict[str, list[dict[str, Any]]]) -> LeakageRow:
        hit = self.first != _NONE
        questions = len(self.prints)
        leaked, near = int(hit[: len(EXACT)].any(axis=0).sum()), int(hit[_NEAR].sum())
        fraction, near_fraction = (count / questions if questions else 0.0 for count in (leaked, near))
        return LeakageRow(
            suite=suite,
            questions=questions,
            matches={kind: int(hit[number].sum()) for number, kind in enumerate(KINDS)},
            leaked=leaked,
            fraction=fraction,
            near_fraction=near_fraction,
            id_collisions=int((hit[_IDS] & ~hit[0]).sum()),
            flat_images=int(self.prints.flat.sum()),
            unreadable=int(self.prints.unreadable.sum()),
            marked=fraction > limit or near_fraction > near_limit,
            examples=examples,
        )

    def pairs(self, kind: str, count: int) -> list[tuple[int, int, int]]:
        """The first matches of a kind: (question, training sample, bits that differ). Of near pictures, those that are
        not the same anyway."""
        first = self.first[KINDS.index(kind)]
        hit = first != _NONE
        if kind == "near_image":
            hit &= self.first[KINDS.index("exact_image")] == _NONE
        chosen = np.flatnonzero(hit)[:count]
        return [(int(i), int(first[i]) & ((1 << _SHIFT) - 1), int(first[i]) >> _SHIFT) for i in chosen]


def _equal(keys: np.ndarray, trained: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Per row of `keys`, the smallest training sample that has one of its digests.

    Args:
        keys: uint64 [n, k]; 0 equals nothing.
        trained: uint64 [t, k].
        rows: int64 [t].
    """
    known, inverse = np.unique(keys.ravel(), return_inverse=True)
    first = np.full(len(known), _NONE)
    if len(known):
        digests = trained.ravel()
        place = np.minimum(np.searchsorted(known, digests), len(known) - 1)
        hit = (known[place] == digests) & (digests != 0)
        np.minimum.at(first, place[hit], np.repeat(rows, trained.shape[1])[hit])
    return first[inverse].reshape(keys.shape).min(axis=1, initial=_NONE)


def _near(prints: Fingerprints, trained: Fingerprints, distance: int) -> np.ndarray:
    """Per picture of a suite, the closest training picture: bits that differ, then its sample."""
    _, places, inverse = np.unique(prints.pixels, return_index=True, return_inverse=True)
    own = prints.colours[places]
    first = np.full(len(places), _NONE)
    # Equal pictures are searched for once; the first of them has the smallest owner.
    _, queries = np.unique(trained.pixels, return_index=True)
    index = HammingIndex(prints.perceptual[places], distance)
    for asked, found, different in index.search(trained.perceptual[queries]):
        same = same_colours(trained.colours[queries[asked]], own[found])
        np.minimum.at(first, found[same], (different[same] << _SHIFT) | trained.owners[queries[asked[same]]])
    return first[inverse]


def _by_owner(prints: Fingerprints, first: np.ndarray) -> np.ndarray:
    """Matches of pictures → matches of the questions that they belong to."""
    result = np.full(len(prints), _NONE)
    np.minimum.at(result, prints.owners, first)
    return result


def _examples(
    pairs: Sequence[tuple[int, int, int]], suite: ShardDataset, training: ShardDataset
) -> list[dict[str, Any]]:
    return [
        {"suite": _called(suite, question), "train": _called(training, sample), "bits": bits}
        for question, sample, bits in pairs
    ]


def _called(dataset: ShardDataset, number: int) -> dict[str, Any]:
    """What a reader of the report can find a sample by."""
    shard, _ = dataset.place(number)
    sample = dataset[number]
    return {
        "shard": dataset.name(shard),
        "key": sample.key,
        "question_id": sample.question_id,
        "question": sample.question,
        "image_id": sample.extra.get("image_id"),
    }


class _Ranks:
    """The ranks that do the check together; `world_size` shares, of which each rank has one."""

    def __init__(self, world_size: int) -> None:
        self.size = 1
        if world_size > 1:
            if not dist.is_initialized():
                raise LeakageError(
                    f"the check was asked to run on {world_size} ranks, torch.distributed is not running"
                )
            self.size = dist.get_world_size()
        self.copies = max(1, self.size // world_size)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Let an error of one rank be an error of all, instead of leaving them waiting."""
        error: str | None = None
        try:
            yield
        except ScaleDigrapError as failure:
            error = str(failure)
        except Exception as failure:
            error = "".join(traceback.format_exception(failure)).rstrip()
        for rank, text in enumerate(self.gather(error)):
            if text is not None:
                where = f" (rank {rank})" if self.size > 1 else ""
                raise LeakageError(f"leakage check, {what}{where}: {text}")

    def gather(self, value: T) -> list[T]:
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def minimum_(self, table: np.ndarray) -> None:
        if self.size > 1:
            self._reduce(table, dist.ReduceOp.MIN)

    def total(self, counts: Sequence[int]) -> list[int]:
        table = np.array(counts, np.int64)
        if self.size > 1:
            self._reduce(table, dist.ReduceOp.SUM)
        return [int(count) // self.copies for count in table]

    def first(self, value: T | None) -> T:
        """What one rank has and the others lack."""
        return next(one for one in self.gather(value) if one is not None)

    @staticmethod
    def _reduce(table: np.ndarray, operation: Any) -> None:
        tensor = torch.from_numpy(table)
        moved = tensor.cuda() if dist.get_backend() == "nccl" else tensor
        dist.all_reduce(moved, op=operation)
        if moved is not tensor:
            tensor.copy_(moved)
