"""The small interface between the training loop and a way of sharding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from scale_digrap.config import Config
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.models.loading import LoadedModel
from scale_digrap.optim.portable import PortableState
from scale_digrap.training.run_state import CheckpointError as CheckpointError


class TrainingError(ScaleDigrapError):
    """A run that cannot go on."""


@dataclass(frozen=True)
class Update:
    """What became of one optimizer step."""

    grad_norm: float
    """Global L2 norm of the gradient before clipping; not finite for a skipped step."""

    skipped: bool
    """The gradient was not finite, and nothing changed on any rank."""

    layer_norms: Sequence[float] = ()
    """Of a skipped step: the gradient's L2 norm for every trained parameter, not finite where it was not; empty where
    the engine cannot tell."""


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

    def load(self, config: Config, *, train: bool = True) -> LoadedModel:
        """The model on this rank's device, sharded, with trained parameters (or their masters) in fp32.

        Args:
            config: the run's.
            train: False for a model that is only evaluated, and not handed to :meth:`prepare`.
        """
        ...

    def prepare(self, loaded: LoadedModel, config: Config) -> tuple[nn.Module, Optimizer]:
        """What to call for a forward pass, and the optimizer, with the model's values now as its anchors."""
        ...

    def anchors(self, loaded: LoadedModel, optimizer: Optimizer) -> dict[str, torch.Tensor]:
        """The anchors that the optimizer holds, by parameter name and laid out like the parameters. Collective."""
        ...

    def compute(self) -> AbstractContextManager[Any]:
        """The context of a forward pass: autocast where the precision asks for it."""
        ...

    def backward(self, model: nn.Module, loss: torch.Tensor, *, last: bool, placeholder: bool = False) -> None:
        """Accumulate gradients: they add up over calls, and are averaged over the ranks by the time of ``step``.

        Args:
            model: what ``prepare`` returned.
            loss: of this micro-batch.
            last: this is the last one before ``step``.
            placeholder: its only picture is the collator's, not a sample's: see :class:`Usage`.
        """
        ...

    def step(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> Update:
        """Clip, update, free the gradients; a step with a non-finite gradient is skipped on all ranks. A layer that no
        rank has used stays as it is, with its state."""
        ...

    def finish(self, model: nn.Module) -> None:
        """After the last step: whoever reads or evaluates the model next must see the last update."""
        ...

    def close(self) -> None:
        """Model and optimizer are not needed any more: free them. DeepSpeed's hooks would keep them for ever."""
        ...

    def portable(self, optimizer: Optimizer) -> PortableState:
        """Trained weights and optimizer state, layer by layer, for a checkpoint that any engine reads. Collective."""
        ...

    def weights_changed(self, model: nn.Module) -> None:
        """After a checkpoint was loaded into the optimizer's weights: the model computes with them. Collective."""
        ...

    def full_state(self, model: nn.Module, *, trained_only: bool) -> dict[str, torch.Tensor]:
        """The unsharded state dict on rank 0, in main memory; anything on other ranks. Collective."""
        ...

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum small vectors over the data-parallel ranks, in double precision."""
        ...

    def max(self, value: float) -> float:
        """The largest value of any rank."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """A small picklable value of every rank, in rank order. Collective."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...

    def limit_waiting(self, timeout_s: float) -> None:
        """Set the timeout of all process groups: sharding makes groups of its own, which have torch's default."""
        ...

    def to_device(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch on this rank's device."""
        ...


def create_engine(config: Config) -> Engine:
    """The engine that ``sharding.engine`` names, with ``torch.distributed`` initialised where there are several ranks.

    Raises:
        TrainingError: no such device, or ranks that do not divide as configured.
    """
    if config.sharding.engine == "deepspeed":
        from scale_digrap.training.zero import ZeroEngine

        return ZeroEngine(config)
    from scale_digrap.training.fsdp import FsdpEngine

    return FsdpEngine(config)


def short(error: BaseException) -> str:
    """An error of another library on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:397] + "..."
