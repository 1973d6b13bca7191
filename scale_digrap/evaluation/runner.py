"""Distributed evaluation by generation: every question exactly once, whatever the number of ranks.

Ranks share a suite through `EvalLoader`: the same number of batches everywhere, short ranks padded with repeats that
a mask marks and that are never scored. A sharded model gathers its weights in every forward pass, so all its ranks
must also take the same number of decoding steps (`synced_gpus`). Records are merged once per suite; between batches a
replicated model communicates nothing.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from scale_digrap.data.loader import EvalLoader, ShardDataset
from scale_digrap.data.sample import VqaSample
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.evaluation.records import Record, SuiteResult
from scale_digrap.evaluation.scorers import scorer
from scale_digrap.evaluation.suites import Suite
from scale_digrap.evaluation.wise import reshard
from scale_digrap.sharding.zero3 import is_partitioned

Progress = Callable[[str, int, int], None]
"""Called on rank 0 after each batch as (suite, batches done, batches in all); all ranks have the same number of
batches."""


OpenShards = Callable[[Sequence[str]], ShardDataset]


class EvaluationError(ScaleDigrapError):
    """An evaluation that could not be finished; raised on every rank alike."""


class Collator(Protocol):
    """What the runner needs of `models.collate.VqaCollator`."""

    pad_id: int

    def generate(self, samples: Sequence[VqaSample]) -> Mapping[str, Tensor]:
        """Left-padded prompts without answers."""
        ...

    def decode(self, tokens: Tensor, prompt_length: int) -> list[str]:
        """Generated texts of [batch, prompt_length + new tokens]."""
        ...


@dataclass
class PreparedBatch:
    """A collated batch together with what scoring needs. `valid` marks the questions that are this rank's and not
    padding."""

    inputs: Mapping[str, Tensor]
    question_ids: list[str]
    answers: list[list[str]]
    question_types: list[str | None]
    valid: list[bool]


PreparedSuites = dict[str, list[PreparedBatch]]
"""Suite name → this rank's batches: made once by `prepare`, used for as many models as share the processor and the
template."""


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
    """Generate an answer to every question of every suite and score it.

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
            questions than expected, an error in the model.
    """
    names = [suite.name for suite in suites]
    if len(set(names)) != len(names):
        raise EvaluationError(f"suites must have different names, got {names}")
    absent = [name for name in names if prepared is not None and name not in prepared]
    if absent:
        raise EvaluationError(f"suites {absent} were not prepared; prepared: {sorted(prepared or ())}")
    lockstep = dp_world_size > 1 and any(isinstance(p, DTensor) or is_partitioned(p) for p in model.parameters())
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens, "pad_token_id": collator.pad_id}
    settings |= {"synced_gpus": lockstep, **(generation or {})}
    share = _Share(dp_rank, dp_world_size, torch.device(device), lockstep)

    results: dict[str, SuiteResult] = {}
    with _eval_mode(model), _fsdp_generation(model), torch.no_grad():
        for suite in suites:
            started = time.perf_counter()
            batches: list[PreparedBatch] | _Batches
            if prepared is not None:
                batches = prepared[suite.name]
            else:
                batches = _open(collator, suite, share, batch_size, open_shards, workers)
            error, records = None, []
            try:
                records = _answer(model, collator, suite, batches, settings, share, progress)
            except _LockstepError:
                raise
            except _PeerError:
                pass  # the rank that failed says why, below
            except Exception as failure:
                error = _describe(failure)
            _raise_together(suite, error, share)
            if isinstance(batches, _Batches):
                batches.verify_coverage()
            merged = _merge(suite, records, share)
            results[suite.name] = SuiteResult(suite.name, suite.metric, merged, time.perf_counter() - started)
    return results


@dataclass(frozen=True)
class _Share:
    """This rank's part in the evaluation."""

    rank: int
    world_size: int
    device: torch.device | None = None
    lockstep: bool = False
    """The model is sharded: a rank that stops keeps the others waiting in a collective."""


class _PeerError(Exception):
    """Another rank could not read its next batch."""


class _LockstepError(EvaluationError):
    """The model failed on this rank alone, while the others wait inside it: nothing can be agreed on any more."""


class _Batches:
    """A suite's batches of this rank, decoded and collated one at a time."""

    def __init__(
        self,
        collator: Collator,
        suite: Suite,
        share: _Share,
        batch_size: int,
        open_shards: OpenShards,
        workers: int,
    ) -> None:
        self._loader = EvalLoader(
            open_shards(suite.shards),
            batch_size=batch_size,
            dp_rank=share.rank,
            dp_world_size=share.world_size,
            collate=collator.generate,
            workers=workers,
        )
        self.verify_coverage = self._loader.verify_coverage

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[PreparedBatch]:
        for batch in self._loader:
            if batch.errors:
                raise EvaluationError(
                    f"{batch.errors[0].reason}. A score without it would not be the suite's: repair the shards (find "
                    "all such samples with `scale-digrap shards validate --decode`)"
                )
            yield PreparedBatch(  # without the decoded images, which would double the memory of prepared suites
                inputs=batch.inputs,
                question_ids=[sample.question_id for sample in batch.samples],
                answers=[sample.answers for sample in batch.samples],
                question_types=[sample.extra.get("question_type") for sample in batch.samples],
                valid=batch.valid.tolist(),
            )


def _open(
    collator: Collator, suite: Suite, share: _Share, batch_size: int, open_shards: OpenShards, workers: int = 0
) -> _Batches:
    """Find the suite's shards, or fail on all ranks alike."""
    batches, error = None, None
    try:
        batches = _Batches(collator, suite, share, batch_size, open_shards, workers)
    except Exception as failure:
        error = _describe(failure)
    _raise_together(suite, error, share)
    assert batches is not None
    return batches


def _answer(
    model: nn.Module,
    collator: Collator,
    suite: Suite,
    batches: Sequence[PreparedBatch] | _Batches,
    settings: Mapping[str, Any],
    share: _Share,
    progress: Progress | None,
) -> list[Record]:
    """This rank's records of one suite."""
    score = scorer(suite.metric)
    records: list[Record] = []
    iterator = iter(batches)
    for done in range(1, len(batches) + 1):
        batch: PreparedBatch | None = None
        failure: Exception | None = None
        try:
            batch = next(iterator)
        except Exception as error:
            failure = error
        if share.lockstep and isinstance(batches, _Batches) and _anywhere(failure is not None, share):
            raise failure or _PeerError
        if failure is not None:
            raise failure
        assert batch is not None
        predictions = _generate(model, collator, batch, settings, suite, share)
        for index, prediction in enumerate(predictions):
            if batch.valid[index]:
                answers = batch.answers[index]
                records.append(
                    Record(
                        question_id=batch.question_ids[index],
                        prediction=prediction,
                        answers=answers,
                        score=score(prediction, answers),
                        question_type=batch.question_types[index],
                    )
                )
        if progress is not None and share.rank == 0:
            progress(suite.name, done, len(batches))
    return records


def _generate(
    model: nn.Module,
    collator: Collator,
    batch: PreparedBatch,
    settings: Mapping[str, Any],
    suite: Suite,
    share: _Share,
) -> list[str]:
    inputs = {name: tensor.to(share.device, non_blocking=True) for name, tensor in batch.inputs.items()}
    try:
        tokens = model.generate(**inputs, **settings)  # type: ignore[operator]
    except Exception as error:
        if not share.lockstep:
            raise
        raise _LockstepError(
            f"rank {share.rank} failed in generation on suite {suite.name!r} while the other ranks go on: {error!r}. "
            "End this process so that the launcher stops the others"
        ) from error
    # A collator may have added a row (VqaCollator.always_image).
    return collator.decode(tokens[: len(batch.valid)], inputs["input_ids"].shape[1])


def _anywhere(flag: bool, share: _Share) -> bool:
    """Whether the flag is up on any rank."""
    total = torch.tensor(int(flag), device=share.device)
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return bool(total)


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


def _merge(suite: Suite, records: list[Record], share: _Share) -> list[Record]:
    """All ranks' records in order of their question ids, checked for completeness."""
    parts = [records]
    if share.world_size > 1:
        parts = [[] for _ in range(share.world_size)]
        dist.all_gather_object(parts, records)
    merged = sorted((record for part in parts for record in part), key=lambda record: record.question_id)
    if not merged:
        raise EvaluationError(f"suite {suite.name!r} has no questions: check its shards {list(suite.shards)}")
    twice = [a.question_id for a, b in pairwise(merged) if a.question_id == b.question_id]
    if twice:
        raise EvaluationError(
            f"suite {suite.name!r}: {len(twice)} question ids occur more than once, first {twice[0]!r}; predictions "
            "could not be told apart: give every question its own question_id"
        )
    if suite.expected is not None and len(merged) != suite.expected:
        raise EvaluationError(
            f"suite {suite.name!r} has {len(merged)} questions, expected {suite.expected}: its shards are incomplete "
            "or of another version"
        )
    return merged


@contextmanager
def _fsdp_generation(model: nn.Module) -> Iterator[None]:
    """Let FSDP2 gather its root unit for the whole of `generate`, not only for the forward passes in it.

    `generate` runs the vision tower before its first forward pass of the model, and peft's `generate` calls the forward
    of the model inside the root unit: neither would trigger the root's hooks.
    """
    units = [
        module
        for module in model.modules()
        if isinstance(module, FSDPModule) and callable(getattr(module, "generate", None))
    ]
    fresh = [module for module in units if "generate" not in vars(module)]
    for module in fresh:
        register_fsdp_forward_method(module, "generate")
    try:
        yield
    finally:
        for module in fresh:
            del module.generate


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off; afterwards each module in its own mode again, frozen parts included, and the shards in place."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        reshard(model)
        for module, training in modes:
            module.training = training
