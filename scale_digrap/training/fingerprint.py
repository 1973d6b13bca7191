"""Whether a run goes on from the base weights that it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from scale_digrap.sharding import dtensor, zero3

_CHUNK = 1 << 22


@torch.no_grad()
def weights_fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """A checksum of named parameters that does not depend on how they are sharded, or on how many ranks. Collective.

    Values count as rounded to bfloat16, so that a run may change its precision. It detects other weights and weights in
    another order, not malice.
    """
    here = []
    for name, parameter in parameters:
        values, first = _piece(parameter)  # not detached: that would hide that ZeRO-3 has partitioned it
        here.append((name, first, values.numel(), _sum(values, first)))
    everywhere = [here]
    if dist.is_initialized():
        everywhere = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, here)
    totals: dict[str, tuple[int, int]] = {}
    # Replicas tell the same piece: it counts once.
    for name, _, numel, value in sorted({piece for rank in everywhere for piece in rank}):
        count, total = totals.get(name, (0, 0))
        totals[name] = (count + numel, (total + value) % (1 << 64))
    return hashlib.sha256(repr(sorted(totals.items())).encode()).hexdigest()[:32]


def _piece(parameter: Tensor) -> tuple[Tensor, int]:
    """This rank's elements, flattened, and the place of the first in the whole parameter."""
    if zero3.is_partitioned(parameter):
        piece = zero3.piece(parameter)
        slot = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        return piece, dist.get_rank(parameter.ds_process_group) * slot  # type: ignore[attr-defined]
    if not isinstance(parameter, DTensor):
        return parameter.reshape(-1), 0
    first = dtensor.first_element(parameter)
    if first is None:
        return parameter.full_tensor().reshape(-1), 0
    return parameter.to_local().reshape(-1), first


def _sum(values: Tensor, first: int) -> int:
    """Σ bits · (2 · position + 1), modulo 2⁶⁴."""
    total = 0
    for start in range(0, values.numel(), _CHUNK):
        part = values[start : start + _CHUNK].to(torch.bfloat16)
        bits = part.view(torch.int16).long() + 32769
        position = torch.arange(first + start, first + start + part.numel(), device=values.device)
        total += int((bits * (2 * position + 1)).sum())
    return total % (1 << 64)
