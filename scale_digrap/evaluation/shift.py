"""How far a suite is from the training set in a model's own embeddings: Mahalanobis distances, per suite and sample.

A Gaussian is fitted over the training set (`gaussian`) to each of three embeddings of the prompt (`embedder`), and a
sample's score is its distance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from scale_digrap.data.loader import ShardDataset
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.evaluation.batches import Batches, Collator, OpenShards, PreparedBatch
from scale_digrap.evaluation.embedder import Embedder, Embeddings, check_embeddings
from scale_digrap.evaluation.gaussian import Mahalanobis, ShiftError, StreamingGaussian, check_regularization
from scale_digrap.evaluation.generation import generating, is_sharded
from scale_digrap.evaluation.runs import write_atomically
from scale_digrap.evaluation.shift_accuracy import SPACES
from scale_digrap.evaluation.suites import Suite
from scale_digrap.runtime.secrets import mask_tree
from scale_digrap.runtime.text import finite, write_json

__all__ = ["SPACES", "Embedder", "Embeddings", "Mahalanobis", "ShiftError", "ShiftReport", "StreamingGaussian"]

SCHEMA = 1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(kw_only=True)
class ShiftReport:
    """Distances of every suite, equal on all ranks whatever their number."""

    model: str
    """Whose embeddings these are."""
    train: dict[str, Any]
    """ "shards", "questions" (all there are), "samples" (those used), "without_image"."""
    settings: dict[str, Any]
    """ "embeddings", "regularization", "template", "dim", and "shrinkage" per space (ρ; None for a pseudo-inverse)."""
    suites: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name → "questions", "without_image", "file" (distances per question, beside the report), and per space "n",
    "mean", "std" (n − 1) and "quantiles"; None for the space of images where the suite or the training set has none."""
    missing: list[str] = field(default_factory=list)
    """Suites without shards."""

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


def check_options(regularization: Any = "oas", embeddings: Any = "tokens", **_: Any) -> None:
    """Refuse values that `shift_scores` does not know, before a model is loaded.

    Raises:
        ShiftError: an unknown regularization or embedding.
    """
    check_regularization(regularization)
    check_embeddings(embeddings)


@torch.no_grad()
def shift_scores(
    model: nn.Module,
    collator: Collator,
    train: str | Sequence[str],
    suites: Sequence[Suite],
    *,
    out: str | Path,
    name: str = "",
    samples: int | None = 20_000,
    suite_samples: int | None = None,
    regularization: str | float = "oas",
    embeddings: str = "tokens",
    batch_size: int = 32,
    workers: int = 0,
    dp_rank: int = 0,
    dp_world_size: int = 1,
    device: torch.device | str = "cpu",
    open_shards: OpenShards = ShardDataset,
) -> ShiftReport:
    """Fit Gaussians to the training set's embeddings and measure every suite's distance to them.

    Args:
        model: see `Embedder`; its training mode is restored afterwards.
        collator: the one of the evaluation: the prompt is part of what is embedded.
        train: training shards.
        suites: those without shards are listed as missing.
        out: folder for `shift/SUITE.jsonl`, written by rank 0: {"index", "question_id", "image", "question", "joint"}
            per line, in the suite's order, null for the image of a question without one.
        name: of the model, for the report.
        samples: how many of the training set, evenly spaced; None takes all.
        suite_samples: how many of each suite, likewise.
        regularization: see `Mahalanobis`.
        embeddings: see `Embedder`. With ``regularization="frames"`` and the bare question as the prompt, ``"frames"``
            gives the distances that FRAMES-VQA's authors compute, in float64.
        batch_size: questions per rank and batch.
        workers: loader processes per rank.
        dp_rank, dp_world_size: this rank's place; with more than one, all ranks of the default group call this.
        device: where the model is.
        open_shards: makes a data set of shards.

    Returns:
        The report, the same on all ranks. `out/shift.json` is the caller's to write.

    Raises:
        ShiftError: on every rank: see `Embedder` and `Mahalanobis`; data that cannot be read; embeddings that are not
            finite.
    """
    for option, value in (("samples", samples), ("suite_samples", suite_samples)):
        if value is not None and value < 2:
            raise ShiftError(f"{option} must be at least 2, got {value}")
    shards = [train] if isinstance(train, str) else list(train)
    check_options(regularization, embeddings)
    embedder = Embedder(model, embeddings)
    work = _Work(embedder, collator, batch_size, workers, dp_rank, dp_world_size, torch.device(device), open_shards)
    with generating(model):
        gaussians: dict[str, StreamingGaussian] = {}
        used = pictures = 0
        dataset = work.open("the training set", shards)
        for batch, found, valid in work.embed("the training set", dataset, samples):
            for space in SPACES:
                vectors = getattr(found, space)
                gaussian = gaussians.setdefault(space, StreamingGaussian(vectors.shape[1], vectors.device))
                gaussian.update(found.rows(space, valid))
            used += sum(batch.valid)
            pictures += int((valid & found.has_image).sum())
        if dp_world_size > 1:
            for gaussian in gaussians.values():
                gaussian.all_reduce()
            used, pictures = (int(value) for value in work.total([used, pictures]))
        distance = {
            space: None if space == "image" and pictures < 2 else Mahalanobis(gaussian, regularization)
            for space, gaussian in gaussians.items()
        }
        template = getattr(collator, "template", None)
        report = ShiftReport(
            model=name,
            train={
                "shards": mask_tree(shards),
                "questions": len(dataset),
                "samples": used,
                "without_image": used - pictures,
            },
            settings={
                "embeddings": embeddings,
                "regularization": regularization,
                "shrinkage": {space: fitted and fitted.shrinkage for space, fitted in distance.items()},
                "dim": {space: len(gaussian.mean) for space, gaussian in gaussians.items()},
                "template": template.to_dict() if template is not None else None,
            },
            missing=[suite.name for suite in suites if not suite.shards],
        )
        for suite in suites:
            if suite.shards:
                rows = work.rows(suite, distance, suite_samples)
                file = Path("shift") / f"{suite.name}.jsonl"
                if dp_rank == 0:
                    write_atomically(Path(out) / file, "".join(write_json(finite(row)) + "\n" for row in rows))
                report.suites[suite.name] = _summary(rows, str(file))
    return report


@dataclass(frozen=True)
class _Work:
    """This rank's part."""

    embedder: Embedder
    collator: Collator
    batch_size: int
    workers: int
    rank: int
    world_size: int
    device: torch.device
    open_shards: OpenShards

    def open(self, what: str, shards: Sequence[str]) -> ShardDataset:
        """Find shards, or fail on all ranks alike."""
        dataset, failure = None, None
        try:
            dataset = self.open_shards(shards)
            if len(dataset) < 2:
                raise ShiftError(f"{what} holds {len(dataset)} samples: name shards with at least two")
        except ScaleDigrapError as error:
            failure = error
        self._agree(what, failure)
        assert dataset is not None
        return dataset

    def embed(
        self, what: str, dataset: ShardDataset, samples: int | None
    ) -> Iterator[tuple[PreparedBatch, Embeddings, Tensor]]:
        """Batches of this rank with their embeddings and, bool [batch] on the device, which rows of them count."""
        todo = None
        if samples is not None and samples < len(dataset):
            todo = np.linspace(0, len(dataset) - 1, samples).round().astype(np.int64)
        batches = Batches(
            self.collator,
            dataset,
            dp_rank=self.rank,
            dp_world_size=self.world_size,
            batch_size=self.batch_size,
            workers=self.workers,
            todo=todo,
        )
        lockstep = self.world_size > 1 and is_sharded(self.embedder._model)
        failure: Exception | None = None
        iterator = iter(batches)
        for _ in range(len(batches)):
            try:
                batch = next(iterator)
            except Exception as error:
                failure = error
            # inside a sharded model the others would wait for a rank without a batch; elsewhere they can finish first
            if lockstep and self.total([int(failure is not None)])[0]:
                break
            if failure is None:
                try:
                    embeddings, valid = self._one(batch)
                except Exception as error:
                    if lockstep:
                        raise
                    failure = error
            if failure is not None:
                break
            yield batch, embeddings, valid
        self._agree(what, failure)
        batches.verify_coverage()

    def _one(self, batch: PreparedBatch) -> tuple[Embeddings, Tensor]:
        inputs = {name: value.to(self.device, non_blocking=True) for name, value in batch.inputs.items()}
        embeddings = self.embedder(inputs)
        # a collator may have added a row with a blank image (VqaCollator.always_image): it does not count
        padding = len(embeddings.has_image) - len(batch.valid)
        valid = torch.tensor([*batch.valid, *[False] * padding], device=self.device)
        for space in SPACES:
            if not embeddings.rows(space, valid).isfinite().all():
                raise ShiftError(
                    f"the {space} embeddings of samples {batch.samples[0].key!r} to {batch.samples[-1].key!r} are not "
                    "finite: compute them in float32 or bfloat16"
                )
        return embeddings, valid

    def rows(
        self, suite: Suite, distance: Mapping[str, Mahalanobis | None], samples: int | None
    ) -> list[dict[str, Any]]:
        """Distances per question of all ranks, in the suite's order."""
        what = f"suite {suite.name!r}"
        found: list[dict[str, Any]] = []
        for batch, embeddings, valid in self.embed(what, self.open(what, suite.shards), samples):
            columns: dict[str, list[float | None]] = {}
            for space, fitted in distance.items():
                if fitted is None:
                    columns[space] = [None] * len(valid)
                else:
                    values = fitted.distances(getattr(embeddings, space)).tolist()
                    there = embeddings.has_image.tolist() if space == "image" else [True] * len(valid)
                    columns[space] = [value if has else None for value, has in zip(values, there, strict=True)]
            for place, counts in enumerate(batch.valid):
                if counts:
                    row = {"index": batch.indices[place], "question_id": batch.samples[place].question_id}
                    found.append({**row, **{space: column[place] for space, column in columns.items()}})
        parts = [found]
        if self.world_size > 1:
            parts = [[] for _ in range(self.world_size)]
            dist.all_gather_object(parts, found)
        return sorted((row for part in parts for row in part), key=lambda row: row["index"])

    def total(self, values: Sequence[int]) -> list[int]:
        """Sums over the ranks."""
        sums = torch.tensor(values, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def _agree(self, what: str, failure: Exception | None) -> None:
        """Raise one rank's failure on every rank."""
        texts: list[str | None] = [None if failure is None else str(failure) or repr(failure)]
        if self.world_size > 1:
            texts = [None] * self.world_size
            dist.all_gather_object(texts, None if failure is None else str(failure) or repr(failure))
        for rank, text in enumerate(texts):
            if text is not None:
                if failure is not None and not isinstance(failure, ScaleDigrapError):
                    raise failure
                raise ShiftError(f"shift scores of {what} failed on rank {rank}: {text}")


def _summary(rows: Sequence[Mapping[str, Any]], file: str) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "questions": len(rows),
        "without_image": sum(row["image"] is None for row in rows),
        "file": file,
    }
    for space in SPACES:
        values = np.array([row[space] for row in rows if row[space] is not None])
        summary[space] = None
        if len(values):
            summary[space] = {
                "n": len(values),
                "mean": float(values.mean()),
                "std": float(values.std(ddof=1)) if len(values) > 1 else None,
                "quantiles": {
                    str(q): float(value) for q, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)
                },
            }
    return summary
