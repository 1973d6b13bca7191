"""A suite's batches as the runner takes them: collated questions, with what scoring needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from scale_digrap.data.loader import EvalLoader, ShardDataset
from scale_digrap.data.sample import VqaSample
from scale_digrap.evaluation.signals import EvaluationError

OpenShards = Callable[[Sequence[str]], ShardDataset]


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
    """A collated batch together with what scoring needs; `valid` marks the questions that are this rank's and not
    padding. Without the decoded images, which would double the memory of prepared suites."""

    inputs: Mapping[str, Tensor]
    samples: list[VqaSample]
    indices: list[int]
    valid: list[bool]


PreparedSuites = dict[str, list[PreparedBatch]]
"""Suite name → this rank's batches: made once by `prepare`, used for as many models as share the processor and the
template."""


class Batches:
    """A suite's batches of this rank, decoded and collated one at a time."""

    def __init__(
        self,
        collator: Collator,
        dataset: ShardDataset,
        *,
        dp_rank: int,
        dp_world_size: int,
        batch_size: int,
        workers: int = 0,
        todo: np.ndarray | None = None,
        fill_up: bool = True,
    ) -> None:
        self._loader = EvalLoader(
            dataset,
            batch_size=batch_size,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            collate=collator.generate,
            workers=workers,
            indices=todo,
            fill_up=fill_up,
        )
        self.verify_coverage = self._loader.verify_coverage
        self.close = self._loader.close

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[PreparedBatch]:
        for batch in self._loader:
            if batch.errors:
                raise EvaluationError(
                    f"{batch.errors[0].reason}. A score without it would not be the suite's: repair the shards (find "
                    "all such samples with `scale-digrap shards validate --decode`)"
                )
            for sample in batch.samples:
                sample.image, sample.more_images = None, []
            yield PreparedBatch(batch.inputs, batch.samples, batch.indices, batch.valid.tolist())
