"""ZeRO-3's parameters seen from outside the engine: how large one is, and which piece of it is here.

Stage 3 cuts every parameter, flattened, into equal slices and keeps this rank's in ``parameter.ds_tensor``. The last
slices end in padding, uninitialised memory, which is never part of what is returned here. Small parameters
(``stage3_param_persistence_threshold``) are whole on every rank besides.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO-3 holds this parameter."""
    return hasattr(parameter, "ds_tensor")


def full_numel(parameter: Any) -> int:
    """Elements of the unsharded parameter; works for any parameter."""
    return int(parameter.ds_numel) if is_partitioned(parameter) else int(parameter.numel())


def full_shape(parameter: Any) -> torch.Size:
    """Shape of the unsharded parameter; works for any parameter."""
    return torch.Size(parameter.ds_shape) if is_partitioned(parameter) else parameter.shape


def piece(parameter: Any) -> Tensor:
    """This rank's elements of a partitioned parameter, 1-D, possibly none; shares storage with the shard."""
    shard = parameter.ds_tensor
    first = dist.get_rank(parameter.ds_process_group) * shard.numel()
    return shard.detach().narrow(0, 0, max(0, min(shard.numel(), parameter.ds_numel - first)))


def cut(parameter: Any, full: Tensor) -> Tensor:
    """The elements of an unsharded tensor that correspond to :func:`piece`; shares its storage."""
    first = dist.get_rank(parameter.ds_process_group) * parameter.ds_tensor.numel()
    return full.detach().reshape(-1)[first : first + piece(parameter).numel()]


def full(parameter: Any) -> Tensor:
    """A copy of the unsharded parameter, on every rank. Collective."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


@torch.no_grad()
def regather(parameters: Iterable[nn.Parameter]) -> None:
    """Make parameters that are whole on every rank those of the shards again, after writing to :func:`piece`.

    Collective; does nothing to other parameters.
    """
    whole: list[Any] = [p for p in parameters if is_partitioned(p) and p.ds_status.name == "AVAILABLE"]  # type: ignore[attr-defined]
    if not whole:
        return
    whole[0].partition(whole)  # frees the copies: the shards are not written
    kept = [parameter for parameter in whole if parameter.ds_persist]
    if kept:
        kept[0].all_gather(kept)
