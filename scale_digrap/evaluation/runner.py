"""Distributed evaluation by generation: every question exactly once, whatever the number of ranks.

Ranks share a suite through `EvalLoader`. A sharded model gathers its weights in every forward pass, so all its ranks
take the same number of batches, short ranks with stand-ins that are never scored, and the same number of decoding
steps (`synced_gpus`). Ranks that have a whole model each take what is theirs and communicate nothing. Neither knows a
collective of the runner's own while questions are answered: what ranks must tell each other goes through
:mod:`scale_digrap.evaluation.signals`.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from scale_digrap.data.loader import ShardDataset
from scale_digrap.data.sample import VqaSample
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.evaluation.batches import Batches, Collator, OpenShards, PreparedBatch, PreparedSuites
from scale_digrap.evaluation.checks import check_records
from scale_digrap.evaluation.generation import generating, generation_settings, is_sharded
from scale_digrap.evaluation.predictions import PartWriter, PredictionFiles
from scale_digrap.evaluation.records import Record, SuiteResult
from scale_digrap.evaluation.scorers import scorer
from scale_digrap.evaluation.signals import EvaluationError, Message, RankFailedError, Signals, StopAsked
from scale_digrap.evaluation.suites import Suite

__all__ = [
    "Collator",
    "EvaluationError",
    "PreparedSuites",
    "RankFailedError",
    "Record",
    "StopAsked",
    "SuiteResult",
    "Task",
    "answer",
    "evaluate",
    "generation_settings",
    "prepare",
]

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called on rank 0 after each of its batches as (suite, its batches done, its batches in all)."""


@dataclass(frozen=True)
class Task:
    """A suite whose answers go to files."""

    suite: Suite
    dataset: ShardDataset
    files: PredictionFiles
    attempt: int
    """From `PredictionFiles.begin`."""
    todo: np.ndarray
    """Indices that are not answered yet, int64 [n], increasing, the same on every rank."""


@dataclass
class _Work:
    """A suite as the inner loop sees it."""

    suite: Suite
    batches: list[PreparedBatch] | Batches
    keep: Callable[[list[tuple[int, Record]]], None]
    seconds: float = 0.0


def prepare(
    collator: Collator,
    suites: Sequence[Suite],
    *,
    dp_rank: int,
    dp_world_size: int,
    batch_size: int,
    open_shards: OpenShards = ShardDataset,
) -> PreparedSuites:
    """Decode and collate this rank's share of small suites once, to evaluate several models on them.

    All of it stays in memory; evaluate big suites without it, batch by batch.

    Raises:
        EvaluationError: on every rank, if a suite cannot be read on one of them.
    """
    share = _Share(dp_rank, dp_world_size)
    prepared: PreparedSuites = {}
    for suite in suites:
        batches, error = _open(collator, suite, share, batch_size, open_shards), None
        try:
            prepared[suite.name] = list(batches)
        except Exception as failure:
            error = _describe(failure)
        _raise_together(suite, error, share)
        batches.verify_coverage()
    return prepared


def evaluate(
    model: nn.Module,
    collator: Collator,
    suites: Sequence[Suite],
    *,
    dp_rank: int = 0,
    dp_world_size: int = 1,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    max_new_tokens: int = 16,
    prepared: PreparedSuites | None = None,
    generation: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    workers: int = 0,
    open_shards: OpenShards = ShardDataset,
) -> dict[str, SuiteResult]:
    """Generate an answer to every question of every suite and score it; nothing is written.

    Args:
        model: a Hugging Face model with `generate`: plain, peft, or sharded by FSDP2 or ZeRO-3. Its training mode is
            restored afterwards.
        collator: the one that training used, so that the prompt is the same.
        suites: with their shards; names must differ.
        dp_rank, dp_world_size: this rank's place among the ranks that share the questions. With more than one, all
            ranks of the default process group call this together.
        device: where the model is.
        batch_size: questions per rank and batch.
        max_new_tokens: most tokens to generate per answer.
        prepared: from `prepare` with the same suites, ranks and collator; `batch_size` is then that of `prepare`.
        generation: more settings for `generate`, over greedy decoding.
        progress: see `Progress`.
        workers: loader processes per rank.
        open_shards: makes a data set of a suite's shards, for those that are not plain local files.

    Returns:
        Suite name → `SuiteResult`, equal on all ranks.

    Raises:
        EvaluationError: on every rank, if any rank failed: unreadable data, duplicate question ids, another number of
            questions than expected, an error in the model. A rank that waits inside a sharded model for one that failed
            ends its process, see :mod:`scale_digrap.evaluation.signals`.
    """
    names = [suite.name for suite in suites]
    if len(set(names)) != len(names):
        raise EvaluationError(f"suites must have different names, got {names}")
    absent = [name for name in names if prepared is not None and name not in prepared]
    if absent:
        raise EvaluationError(f"suites {absent} were not prepared; prepared: {sorted(prepared or ())}")
    share = _Share(dp_rank, dp_world_size, torch.device(device), is_sharded(model) and dp_world_size > 1)
    found: dict[str, list[tuple[int, Record]]] = {name: [] for name in names}
    work = []
    for suite in suites:
        if prepared is not None:
            batches: list[PreparedBatch] | Batches = prepared[suite.name]
        else:
            batches = _open(collator, suite, share, batch_size, open_shards, workers)
        work.append(_Work(suite, batches, found[suite.name].extend))
    settings = {"max_new_tokens": max_new_tokens, **(generation or {})}
    with Signals(share.rank, share.world_size, lockstep=share.lockstep) as signals:
        _run(model, collator, work, settings, share, signals, progress=progress)
    results = {}
    for item in work:
        if isinstance(item.batches, Batches):
            item.batches.verify_coverage()
        merged = _gather(item.suite, found[item.suite.name], share)
        results[item.suite.name] = SuiteResult(item.suite.name, item.suite.metric, merged, item.seconds)
    return results


def answer(
    model: nn.Module,
    collator: Collator,
    tasks: Sequence[Task],
    *,
    signals: Callable[[bool], Signals],
    dp_rank: int = 0,
    dp_world_size: int = 1,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    generation: Mapping[str, Any] | None = None,
    workers: int = 0,
    stop: Callable[[], str | None] | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Answer what is not answered yet, into files: each batch is on disk before the next one begins.

    Args:
        model, collator, dp_rank, dp_world_size, device, batch_size, generation, workers, progress: as for `evaluate`.
        tasks: the same on every rank.
        signals: makes the ranks' signals, given whether the model is sharded.
        stop: looked at before each batch; a reason ends the evaluation after that batch.

    Returns:
        Suite name → seconds on this rank, when all ranks have answered all questions.

    Raises:
        EvaluationError, StopAsked: on every rank, with everything on disk that was answered.
    """
    share = _Share(dp_rank, dp_world_size, torch.device(device), is_sharded(model) and dp_world_size > 1)
    work = []
    writers: list[PartWriter] = []
    for task in tasks:
        writer = task.files.writer(task.attempt, share.rank)
        writers.append(writer)
        batches = Batches(
            collator,
            task.dataset,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            batch_size=batch_size,
            workers=workers,
            todo=task.todo,
            fill_up=share.lockstep,
        )
        work.append(_Work(task.suite, batches, writer.write))
    try:
        with signals(share.lockstep) as told:
            _run(model, collator, work, generation or {}, share, told, progress=progress, stop=stop)
    finally:
        for writer in writers:
            writer.close()
    return {item.suite.name: item.seconds for item in work}


@dataclass(frozen=True)
class _Share:
    """This rank's part in the evaluation."""

    rank: int
    world_size: int
    device: torch.device | None = None
    lockstep: bool = True
    """The model is sharded: a rank that stops keeps the others waiting in a collective."""


def _open(
    collator: Collator, suite: Suite, share: _Share, batch_size: int, open_shards: OpenShards, workers: int = 0
) -> Batches:
    """Find the suite's shards, or fail on all ranks alike."""
    batches, error = None, None
    try:
        batches = Batches(
            collator,
            open_shards(suite.shards),
            dp_rank=share.rank,
            dp_world_size=share.world_size,
            batch_size=batch_size,
            workers=workers,
            fill_up=share.lockstep,
        )
    except Exception as failure:
        error = _describe(failure)
    _raise_together(suite, error, share)
    assert batches is not None
    return batches


def _run(
    model: nn.Module,
    collator: Collator,
    work: Sequence[_Work],
    settings: Mapping[str, Any],
    share: _Share,
    signals: Signals,
    *,
    progress: Progress | None = None,
    stop: Callable[[], str | None] | None = None,
) -> None:
    """The inner loop over all suites. Returns when every rank is through."""
    settings = {"do_sample": False, "num_beams": 1, **settings}
    settings |= {"pad_token_id": settings.get("pad_token_id", collator.pad_id), "synced_gpus": share.lockstep}
    number = 0
    with generating(model):
        for item in work:
            started = time.perf_counter()
            score = scorer(item.suite.metric)
            iterator = iter(item.batches)
            for done in range(1, len(item.batches) + 1):
                number += 1
                if stop is not None and (reason := stop()) is not None:
                    signals.post(Message("stop", reason, number))
                batch = _next(iterator, collator, item.suite, share, signals, number)
                predictions = _generate(model, collator, batch, settings, item.suite, share, signals, number)
                records = [
                    (batch.indices[i], _record(batch.samples[i], prediction, score))
                    for i, prediction in enumerate(predictions)
                    if batch.valid[i]
                ]
                _guard(lambda: item.keep(records), item.suite, share, signals, number)  # noqa: B023 (called at once)
                signals.answered(len(records))
                if progress is not None and share.rank == 0:
                    progress(item.suite.name, done, len(item.batches))
                signals.check(number)
            item.seconds = time.perf_counter() - started
            if isinstance(item.batches, Batches):
                item.batches.close()  # ten suites would leave ten sets of loader processes
        signals.finish()


def _next(
    iterator: Iterator[PreparedBatch], collator: Collator, suite: Suite, share: _Share, signals: Signals, number: int
) -> PreparedBatch:
    """The next batch. Without one, a sharded model's rank goes through this batch with a stand-in, so that the others
    can end it, and all of them stop after it."""
    try:
        return next(iterator)
    except Exception as failure:
        _log(failure, share)
        signals.post(_message(failure, suite, share, number))
        if not share.lockstep:
            signals.check(number)
    blank = VqaSample("stand-in", Image.new("RGB", (64, 64)), "?", ["?"], "stand-in")
    return PreparedBatch(collator.generate([blank]), [blank], [-1], [False])


def _guard(action: Callable[[], Any], suite: Suite, share: _Share, signals: Signals, number: int) -> Any:
    """Do something that only this rank does; if it fails all ranks stop."""
    try:
        return action()
    except Exception as failure:
        _log(failure, share)
        raise signals.post(_message(failure, suite, share, number)).exception() from failure


def _generate(
    model: nn.Module,
    collator: Collator,
    batch: PreparedBatch,
    settings: Mapping[str, Any],
    suite: Suite,
    share: _Share,
    signals: Signals,
    number: int,
) -> list[str]:
    def generate() -> list[str]:
        inputs = {name: tensor.to(share.device, non_blocking=True) for name, tensor in batch.inputs.items()}
        if settings["do_sample"]:
            torch.manual_seed(max(0, batch.indices[0]))  # the same draws in a resumed evaluation
        tokens = model.generate(**inputs, **settings)  # type: ignore[operator]
        # A collator may have added a row (VqaCollator.always_image).
        return collator.decode(tokens[: len(batch.valid)], inputs["input_ids"].shape[1])

    return _guard(generate, suite, share, signals, number)  # type: ignore[no-any-return]


def _record(sample: VqaSample, prediction: str, score: Callable[[str, Sequence[str]], float]) -> Record:
    extra = {name: sample.extra.get(name) for name in ("question_type", "answer_type", "image_id")}
    return Record(
        question_id=sample.question_id,
        prediction=prediction,
        answers=sample.answers,
        score=score(prediction, sample.answers),
        **{name: None if value is None else str(value) for name, value in extra.items()},
    )


def _message(failure: Exception, suite: Suite, share: _Share, number: int) -> Message:
    """A failure as the other ranks are told: what the user can put right, or a fault of the rank's."""
    own = isinstance(failure, ScaleDigrapError)
    what = str(failure) if own else f"{type(failure).__name__}: {' '.join(str(failure).split())[:600]}"
    text = f"evaluation of suite {suite.name!r} failed on rank {share.rank}: {what}"
    return Message("error" if own else "failure", text, number)


def _log(failure: Exception, share: _Share) -> None:
    """The traceback of what is not the user's to put right: the other ranks are told one line."""
    if not isinstance(failure, ScaleDigrapError):
        log.error("rank %d failed", share.rank, exc_info=failure)


def _describe(error: Exception) -> str:
    """One line for the user's own mistakes, the whole traceback for ours."""
    return str(error) if isinstance(error, ScaleDigrapError) else "".join(traceback.format_exception(error)).rstrip()


def _raise_together(suite: Suite, error: str | None, share: _Share) -> None:
    errors = [error]
    if share.world_size > 1:
        errors = [None] * share.world_size
        dist.all_gather_object(errors, error)
    for rank, text in enumerate(errors):
        if text is not None:
            raise EvaluationError(f"evaluation of suite {suite.name!r} failed on rank {rank}: {text}")


def _gather(suite: Suite, records: list[tuple[int, Record]], share: _Share) -> list[Record]:
    """All ranks' records in order of the data set, checked for completeness."""
    parts = [records]
    if share.world_size > 1:
        parts = [[] for _ in range(share.world_size)]
        dist.all_gather_object(parts, records)
    merged = [record for _, record in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])]
    check_records(suite, merged)
    return merged
