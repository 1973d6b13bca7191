"""How far a suite is from the training set in a model's own embeddings: Mahalanobis distances, per suite and sample.

Three embeddings out of one forward pass of the prompt, as in the analysis of FRAMES-VQA: the mean of the image tokens
where they enter the language model, the mean of the prompt's other tokens at its last layer, and the mean of all of its
tokens at the last layer. A Gaussian is fitted to each over the training set (`gaussian`), and a sample's score is its
distance. (The authors print the distance with a minus sign.)
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from scale_digrap.evaluation.gaussian import Mahalanobis, ShiftError, StreamingGaussian
from scale_digrap.evaluation.generation import generating, is_sharded
from scale_digrap.evaluation.runs import write_atomically
from scale_digrap.evaluation.shift_accuracy import SPACES
from scale_digrap.evaluation.suites import Suite

__all__ = ["SPACES", "Embedder", "Embeddings", "Mahalanobis", "ShiftError", "ShiftReport", "StreamingGaussian"]

SCHEMA = 1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Embeddings:
    """Of one batch, float64 on the model's device."""

    image: Tensor
    """[batch, d]; meaningless where `has_image` is False."""
    question: Tensor
    """[batch, d]."""
    joint: Tensor
    """[batch, d]."""
    has_image: Tensor
    """bool [batch]."""

    def rows(self, space: str, wanted: Tensor) -> Tensor:
        """The vectors of one space where `wanted`, bool [batch], and where there is an image if it takes one."""
        return getattr(self, space)[wanted & self.has_image if space == "image" else wanted]


class Embedder:
    """Takes the embeddings out of a Hugging Face vision-language model while it reads a prompt, by two hooks on its
    language model. The model may be plain, peft, or sharded by FSDP2 or ZeRO-3.

    Args:
        model: PaliGemma, LLaVA, Qwen-VL, Gemma 3 or any other whose ``input_ids`` have one image token per image
            feature, named by ``config.image_token_id``.

    Raises:
        ShiftError: the model has no such token or no decoder.
    """

    def __init__(self, model: nn.Module) -> None:
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        config = getattr(base, "config", None)
        self._model = model
        self._image_token = getattr(config, "image_token_id", None)
        if self._image_token is None:
            self._image_token = getattr(config, "image_token_index", None)
        self._decoder: nn.Module | None = base.get_decoder() if hasattr(base, "get_decoder") else None
        if self._image_token is None or self._decoder is None or self._decoder is base:
            raise ShiftError(
                f"{type(base).__name__} has no {'image_token_id' if self._decoder else 'language model of its own'}: "
                "shift scores need a vision-language model that puts image features in the place of image tokens. "
                "Leave the shift section out of the configuration"
            )
        self._options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(base.forward).parameters:
            self._options["logits_to_keep"] = 1  # a vocabulary of 257 thousand for every token would fill the memory

    def __call__(self, inputs: Mapping[str, Tensor]) -> Embeddings:
        """Embed a batch of `Collator.generate`. One forward pass: a collective where the model is sharded.

        Raises:
            ShiftError: the language model has seen other tokens than ``input_ids``.
        """
        seen: dict[str, Tensor] = {}
        with self._hooks(seen):
            self._model(**inputs, **self._options)
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        for name in ("first", "last"):
            if name not in seen or seen[name].shape[:2] != ids.shape:
                raise ShiftError(
                    f"the language model of {type(self._model).__name__} has taken "
                    f"{tuple(seen[name].shape) if name in seen else 'no embeddings'} for input_ids of shape "
                    f"{tuple(ids.shape)}: its image tokens cannot be told from the others"
                )
        pictured = mask & (ids == self._image_token)
        return Embeddings(
            image=_mean(seen["first"], pictured),
            question=_mean(seen["last"], mask & ~pictured),
            joint=_mean(seen["last"], mask),
            has_image=pictured.any(dim=1),
        )

    @contextmanager
    def _hooks(self, seen: dict[str, Tensor]) -> Iterator[None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            embeds = kwargs.get("inputs_embeds")
            if embeds is not None:
                seen["first"] = embeds.detach()

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            last = getattr(output, "last_hidden_state", None)
            seen["last"] = (output[0] if last is None else last).detach()

        assert self._decoder is not None
        handles = [
            self._decoder.register_forward_pre_hook(before, with_kwargs=True),
            self._decoder.register_forward_hook(after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of the mask, float64 [batch, d]; zero where there is none."""
    weights = mask.double() / mask.sum(dim=1, keepdim=True).clamp(min=1)
    # padding may hold anything, and 0 × inf is not 0
    return torch.einsum("bt,btd->bd", weights, states.double().masked_fill(~mask[..., None], 0.0))


@dataclass(kw_only=True)
class ShiftReport:
    """Distances of every suite, equal on all ranks whatever their number."""

    model: str
    """Whose embeddings these are."""
    train: dict[str, Any]
    """ "shards", "questions" (all there are), "samples" (those used), "without_image"."""
    settings: dict[str, Any]
    """ "regularization", "template", "dim", and "shrinkage" per space (ρ, None for the pseudo-inverse)."""
    suites: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name → "questions", "without_image", "file" (distances per question, beside the report), and per space "n",
    "mean", "std" (n − 1) and "quantiles"; None for the space of images where the suite or the training set has none."""
    missing: list[str] = field(default_factory=list)
    """Suites without shards."""

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


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
    embedder = Embedder(model)
    work = _Work(embedder, collator, batch_size, workers, dp_rank, dp_world_size, torch.device(device), open_shards)
    with generating(model):
        gaussians: dict[str, StreamingGaussian] = {}
        used = pictures = 0
        dataset = work.open("the training set", shards)
        for batch, embeddings, valid in work.embed("the training set", dataset, samples):
            for space in SPACES:
                vectors = getattr(embeddings, space)
                gaussian = gaussians.setdefault(space, StreamingGaussian(vectors.shape[1], vectors.device))
                gaussian.update(embeddings.rows(space, valid))
            used += sum(batch.valid)
            pictures += int((valid & embeddings.has_image).sum())
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
                "shards": shards,
                "questions": len(dataset),
                "samples": used,
                "without_image": used - pictures,
            },
            settings={
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
                    write_atomically(Path(out) / file, "".join(json.dumps(row) + "\n" for row in rows))
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
