"""This process among the others: its device, and the small sums that the loop asks for. Both engines begin here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from scale_digrap.config import Config
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.runtime.logs import reason
from scale_digrap.runtime.text import one_line
from scale_digrap.training.engine import TrainingError

Result = TypeVar("Result")


class Told(Protocol):
    """Ranks that tell each other small values; every engine is one."""

    rank: int

    def gather(self, value: Any) -> list[Any]: ...


def on_first(ranks: Told, action: Callable[[], Result]) -> Result:
    """Do something on rank 0, which alone writes in ``run_dir``; its result or its error comes on every rank.
    Collective.

    Raises:
        Exception: rank 0's own there; a :class:`TrainingError` with the same text elsewhere, and everywhere in place of
            an ``OSError``.
    """
    result: Any = None
    failure: Exception | None = None
    if ranks.rank == 0:
        try:
            result = action()
        except ScaleDigrapError as error:
            failure = error
        except OSError as error:
            where = f" {error.filename}" if error.filename else " in run_dir"
            failure = TrainingError(f"cannot write{where}: {reason(error)}: make room there and make it writable")
        except Exception as error:  # a bug: its traceback here, and no rank that waits for ever
            failure = error
    result, told = ranks.gather((result, None if failure is None else one_line(failure)))[0]
    if told is not None:
        raise failure or TrainingError(told)
    return result  # type: ignore[no-any-return]


class Ranks:
    """The part of :class:`scale_digrap.training.engine.Engine` that does not depend on the way of sharding."""

    def __init__(self, config: Config, *, always_distributed: bool = False) -> None:
        self.device = _pick_device(config.training.device)
        _init_distributed(self.device, always_distributed, timedelta(seconds=config.training.timeout_s))
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.dp_rank, self.dp_world_size = self.rank, self.world_size
        self.precision = config.training.precision

    def sum(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        return self._reduce([value], dist.ReduceOp.MAX)[0]

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.world_size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=operation)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def limit_waiting(self, timeout_s: float) -> None:
        if not dist.is_initialized():
            return
        from torch.distributed import distributed_c10d as c10d

        groups = getattr(getattr(c10d, "_world", None), "pg_map", {})
        if hasattr(c10d, "_set_pg_timeout"):  # no public name before or after; without it they keep torch's default
            for group in list(groups):
                c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)

    def to_device(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}


def _pick_device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrainingError("training.device=cuda, but torch sees no CUDA device: use training.device=auto or cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise TrainingError(
            f"local rank {index} has no GPU of its own ({torch.cuda.device_count()} visible): start fewer processes, "
            f"or set training.device=cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _init_distributed(device: torch.device, always: bool, timeout: timedelta) -> None:
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    bound = device if backend == "nccl" else None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(backend, timeout=timeout, device_id=bound)
    elif always:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=bound)
