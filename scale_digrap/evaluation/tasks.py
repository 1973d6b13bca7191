"""From suites to what each rank has to answer, and from answers to results: what ranks do together, before and after
generation. Rank 0 looks at the folder, the others are told: a folder on network storage does not look the same to all
hosts at the same moment."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch.distributed as dist

from scale_digrap.data.dataset import ShardDataset
from scale_digrap.data.errors import SampleError
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.evaluation.batches import OpenShards
from scale_digrap.evaluation.checks import check_ids
from scale_digrap.evaluation.predictions import PredictionFiles, PredictionsError
from scale_digrap.evaluation.records import SuiteResult, read_predictions
from scale_digrap.evaluation.runner import Task
from scale_digrap.evaluation.signals import EvaluationError, RankFailedError
from scale_digrap.evaluation.suites import Suite

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Ranks(Protocol):
    """This process among the others; every engine is one."""

    rank: int
    world_size: int


def on_first(ranks: Ranks, action: Callable[[], Result]) -> Result:
    """Do something on rank 0; what it returns, or its error, comes on every rank. Collective.

    Raises:
        EvaluationError: in place of an error of the package.
        RankFailedError: in place of any other.
    """
    if ranks.world_size == 1:
        return action()
    outcome: list[Any] = [None, None, None]
    failure: Exception | None = None
    if ranks.rank == 0:
        try:
            outcome[0] = action()
        except ScaleDigrapError as error:
            failure, outcome[1] = error, str(error)
        except Exception as error:
            log.error("rank 0 failed", exc_info=error)
            failure, outcome[2] = error, f"rank 0: {type(error).__name__}: {' '.join(str(error).split())[:600]}"
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise EvaluationError(outcome[1]) from failure
    if outcome[2] is not None:
        raise RankFailedError(outcome[2]) from failure
    return outcome[0]  # type: ignore[no-any-return]


def gathered(ranks: Ranks, action: Callable[[], Result]) -> list[Result]:
    """Do something on every rank; what each returns, in rank order, or the first error, on all. Collective.

    Raises:
        EvaluationError: on all ranks, whose it was is named.
    """
    outcome: tuple[Any, str | None] = (None, None)
    failure: Exception | None = None
    try:
        outcome = (action(), None)
    except Exception as error:
        if not isinstance(error, ScaleDigrapError):
            log.error("rank %d failed", ranks.rank, exc_info=error)
        failure, outcome = error, (None, f"{type(error).__name__}: {error}" if not str(error) else str(error))
    outcomes: list[tuple[Any, str | None]] = [outcome]
    if ranks.world_size > 1:
        outcomes = [(None, None)] * ranks.world_size
        dist.all_gather_object(outcomes, outcome)
    for rank, (_, told) in enumerate(outcomes):
        if told is not None:
            raise EvaluationError(told if rank == 0 else f"rank {rank}: {told}") from failure
    return [value for value, _ in outcomes]


def open_suites(ranks: Ranks, suites: Sequence[Suite], open_shards: OpenShards) -> dict[str, ShardDataset]:
    """Every suite's shards, on every rank; those that are missing have none. Collective.

    Raises:
        EvaluationError: shards that some rank cannot see, or that are not the same everywhere.
    """

    def open_all() -> dict[str, ShardDataset]:
        return {suite.name: open_shards(suite.shards) for suite in suites if suite.shards}

    on_first(ranks, lambda: open_all() and None)  # it writes the indexes that are not there yet
    datasets: dict[str, ShardDataset] = {}

    def mine() -> dict[str, str]:
        datasets.update(open_all())
        return {name: dataset.fingerprint() for name, dataset in datasets.items()}

    everywhere = gathered(ranks, mine)
    for rank, theirs in enumerate(everywhere):
        for name, fingerprint in theirs.items():
            if fingerprint != everywhere[0][name]:
                raise EvaluationError(f"suite {name!r}: rank {rank} sees other shards than rank 0: copy them anew")
    return datasets


def check_questions(ranks: Ranks, suites: Sequence[Suite], datasets: Mapping[str, ShardDataset]) -> None:
    """Read every question once, without its images, and find what would spoil a score. Collective; each rank reads
    its share of the shards.

    Raises:
        EvaluationError: on all ranks: questions that are not valid or have no answers, ids that come twice, another
            number than expected.
    """
    for suite in suites:
        if suite.name not in datasets:
            continue
        dataset = datasets[suite.name]
        parts = gathered(ranks, lambda dataset=dataset: _read_ids(dataset, ranks))  # type: ignore[misc]
        invalid = [text for part in parts for text in part[1]]
        if invalid:
            raise EvaluationError(
                f"suite {suite.name!r}: {len(invalid)} of {len(dataset)} records cannot be scored, first {invalid[0]}; "
                "write the shards again without them (`scale-digrap shards write` counts what it leaves out)"
            )
        check_ids(suite, [question_id for part in parts for question_id in part[0]])


def _read_ids(dataset: ShardDataset, ranks: Ranks) -> tuple[list[str], list[str]]:
    ids: list[str] = []
    invalid: list[str] = []
    for shard in range(ranks.rank, len(dataset.urls), ranks.world_size):
        for found in dataset.questions(shard):
            if isinstance(found, SampleError):
                invalid.append(str(found))
            else:
                ids.append(str(found["question_id"]))
    return ids, invalid


def check_settings(folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """On one rank: whether what lies in a model's folder was made as its suites are now to be answered.

    Args:
        folder: of the model's predictions.
        settings: suite name → whatever its predictions depend on.

    Raises:
        PredictionsError: not so.
    """
    for name, wanted in settings.items():
        PredictionFiles(folder, name).check(wanted)


def begin(
    ranks: Ranks,
    folder: Path,
    suites: Sequence[Suite],
    datasets: Mapping[str, ShardDataset],
    settings: Mapping[str, Mapping[str, Any]],
) -> list[Task]:
    """What is left to answer of each suite; suites that are complete, or missing, are not among them. Collective.

    Raises:
        EvaluationError: predictions in the folder that were made with other settings.
    """

    def look() -> list[tuple[str, int, np.ndarray]]:
        open_ones = []
        for suite in suites:
            if suite.name not in datasets:
                continue
            files = PredictionFiles(folder, suite.name)
            begun = files.check(settings[suite.name])
            if files.complete:
                continue
            done, torn = files.done() if begun else (np.empty(0, dtype=np.int64), 0)
            if torn:
                log.warning("%s: %d lines were cut off by a kill, their questions are asked again", files.parts, torn)
            todo = np.setdiff1d(np.arange(len(datasets[suite.name])), done, assume_unique=True)
            open_ones.append((suite.name, files.begin(settings[suite.name]), todo))
        return open_ones

    by_name = {suite.name: suite for suite in suites}
    return [
        Task(by_name[name], datasets[name], PredictionFiles(folder, name), attempt, todo)
        for name, attempt, todo in on_first(ranks, look)
    ]


def merge(ranks: Ranks, tasks: Sequence[Task]) -> None:
    """When all ranks are through: one file per suite. Collective.

    Raises:
        EvaluationError: an answer is missing.
    """

    def merge_all() -> None:
        for task in tasks:
            task.files.merge(len(task.dataset))

    on_first(ranks, merge_all)


def read_results(folder: Path, suites: Sequence[Suite]) -> dict[str, SuiteResult]:
    """The results of those suites that are answered, from the merged files; on one rank.

    Raises:
        PredictionsError: a damaged file.
    """
    results = {}
    for suite in suites:
        files = PredictionFiles(folder, suite.name)
        if not files.complete:
            continue
        try:
            records = read_predictions(files.merged)
        except (OSError, ValueError) as error:
            raise PredictionsError(f"{error}: delete {files.merged} to have the suite answered again") from None
        results[suite.name] = SuiteResult(suite.name, suite.metric, records, predictions=str(files.merged))
    return results
