"""The small interface between the training loop and a way of sharding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from scale_digrap.config import Config
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.models.loading import LoadedModel


class TrainingError(ScaleDigrapError):
    """A run that cannot go on."""


class Engine(Protocol):
    """What the loop asks of a way of sharding. Everything that knows about ranks is behind it.

    Attributes:
        rank, world_size: this process among all.
        dp_rank, dp_world_size: this process among those that see different data.
        device: where this rank computes.
    """

    rank: int
    world_size: int
    dp_rank: int
    dp_world_size: int
    device: torch.device

    def load(self, config: Config) -> LoadedModel:
        """The model on this rank's device, sharded, with trained parameters in fp32."""
        ...

    def compute(self) -> AbstractContextManager[Any]:
        """The context of a forward pass: autocast where the precision asks for it."""
        ...

    def backward(self, model: nn.Module, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate gradients. They are reduced over the ranks (averaged) only with ``last``."""
        ...

    def finish_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every trained parameter a gradient: the same set on every rank, whatever its batches held."""
        ...

    def grad_norm(self, parameters: Iterable[nn.Parameter]) -> float:
        """Global L2 norm of all gradients, equal on all ranks."""
        ...

    def scale_gradients(self, parameters: Iterable[nn.Parameter], factor: float) -> None:
        """Multiply all gradients by a number."""
        ...

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum small vectors over the data-parallel ranks, in double precision."""
        ...

    def max(self, value: float) -> float:
        """The largest value of any rank."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...

    def to_device(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch on this rank's device."""
        ...


def create_engine(config: Config) -> Engine:
    """The engine that ``sharding.engine`` names, with ``torch.distributed`` initialised where there are several ranks.

    Raises:
        TrainingError: no such device, or ranks that do not divide as configured.
    """
    from scale_digrap.training.fsdp import FsdpEngine

    return FsdpEngine(config)
