"""Plain tensors and DTensors: one process, DDP, FSDP2, HSDP, tensor parallelism and their products."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement as TensorPlacement

from scale_digrap.sharding.placement import Placement, RowRun


def local(tensor: Tensor) -> Tensor:
    """The local shard as a plain tensor that shares storage with ``tensor``; call under ``no_grad``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor knows of other ranks: it was sharded, or placed on a mesh."""
    return isinstance(tensor, DTensor)


def is_expanded(tensor: Tensor) -> bool:
    """Whether several elements are one place in memory, as after ``expand``."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return not isinstance(tensor, DTensor) and any(stride == 0 and size > 1 for size, stride in strides)


def local_grad(param: Tensor) -> Tensor | None:
    """The local gradient, laid out exactly as the parameter; ``None`` where there is none.

    A tensor-parallel norm's gradient is ``Partial`` while the norm is replicated: it is completed here, by the one
    collective that every optimizer needs for it.

    Raises:
        RuntimeError: the gradient is sparse.
    """
    grad = param.grad
    if grad is None:
        return None
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"sparse gradients are not supported (layout {grad.layout}); build nn.Embedding(sparse=False)"
        )
    if isinstance(grad, DTensor):
        assert isinstance(param, DTensor), "a DTensor gradient of a plain parameter"
        if grad.placements != param.placements:
            grad = grad.redistribute(placements=param.placements)
        grad = grad.to_local()
    return grad


def comm_device(param: Tensor) -> torch.device:
    """Where a parameter's sums are reduced: its mesh's device, also when the shard itself is offloaded to the CPU."""
    if isinstance(param, DTensor):
        kind = param.device_mesh.device_type
        if kind != param.to_local().device.type:
            return torch.device(kind, torch.get_device_module(kind).current_device())
        return param.to_local().device
    return param.device


def sharded_dims(param: DTensor) -> list[int]:
    """Mesh dimensions over which the parameter is cut.

    Not ``placement.is_shard()``: every FSDP2 x TP column-wise weight is a ``_StridedShard``, for which that is False.
    """
    return [i for i, placement in enumerate(param.placements) if not placement.is_replicate()]


def shard_count(tensor: Tensor) -> int:
    """Into how many distinct shards a tensor is cut: ``world`` ranks hold ``world / shards`` copies of each."""
    if not isinstance(tensor, DTensor):
        return 1
    return math.prod(tensor.device_mesh.size(i) for i in sharded_dims(tensor))


def first_element(tensor: Tensor) -> int | None:
    """Where in the flattened unsharded tensor the local elements begin; ``None`` where they are not one range."""
    if not isinstance(tensor, DTensor):
        return 0
    dims = sharded_dims(tensor)
    if any(getattr(tensor.placements[i], "dim", None) != 0 for i in dims):
        return None
    if any(getattr(tensor.placements[i], "split_factor", 1) != 1 for i in dims):
        return None
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0] * tensor.shape[1:].numel() if offset and torch.Size(shape).numel() else 0


def _chunk(values: Tensor, dim: int, chunks: int, which: int) -> Tensor:
    """Chunk ``which`` as DTensor cuts (``torch.chunk``), which may be empty at the end."""
    parts = torch.chunk(values, chunks, dim)
    return parts[which] if which < len(parts) else values.narrow(dim, 0, 0)


def _cut(values: Tensor, placement: TensorPlacement, chunks: int, which: int) -> Tensor:
    """This rank's part of a tensor along one mesh dimension."""
    dim = placement.dim  # type: ignore[attr-defined]
    factor = getattr(placement, "split_factor", 1)
    if factor == 1:
        return _chunk(values, dim, chunks, which)
    # _StridedShard: a mesh dimension to the right has cut first, into `factor` parts, each of which is cut again here.
    return torch.cat([_chunk(part, dim, chunks, which) for part in torch.chunk(values, factor, dim)], dim)


def shard_like(param: Tensor, full: Tensor) -> Tensor:
    """The part of an unsharded tensor that corresponds to ``param``'s local shard, wrapped as ``param`` is."""
    if isinstance(full, DTensor):
        if isinstance(param, DTensor) and (full.device_mesh, full.placements) == (param.device_mesh, param.placements):
            return full.detach().clone()
        full = full.full_tensor()
    if not isinstance(param, DTensor):
        return full.detach().to(param.device).clone()
    mesh, part = param.device_mesh, full.detach()
    for i in sharded_dims(param):
        part = _cut(part, param.placements[i], mesh.size(i), mesh.get_local_rank(i))
    part = part.to(param.to_local().device).clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(part, mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride())


@torch.no_grad()
def placement(param: Tensor) -> Placement:
    """Which rows of its layer the local part of a plain tensor or DTensor holds.

    Raises:
        ValueError: the rows of a sharded DTensor cannot be told from its placements.
    """
    shape = param.shape
    if not isinstance(param, DTensor):
        return Placement(shape, 1, _block(shape, None))
    mesh, here = param.device_mesh, param.to_local()
    dims = sharded_dims(param)
    shards, ranks = shard_count(param), tuple(mesh.mesh.flatten().tolist())
    if here.numel() == 0:
        return Placement(shape, shards, (), ranks=ranks)
    row_ids = None
    if any(getattr(param.placements[i], "dim", None) != 0 for i in dims):
        # Cut across the rows: other ranks hold the rest of each.
        row_ids = torch.arange(shape[0])
        for i in dims:
            if not hasattr(param.placements[i], "dim"):
                raise ValueError(f"parameter of shape {tuple(shape)}: placement {param.placements[i]} is not supported")
            if param.placements[i].dim == 0:  # type: ignore[attr-defined]
                row_ids = _cut(row_ids, param.placements[i], mesh.size(i), mesh.get_local_rank(i))
        if len(row_ids) != here.shape[0]:
            raise ValueError(
                f"parameter of shape {tuple(shape)} on {param.placements}: {here.shape[0]} local rows, "
                f"{len(row_ids)} expected; this kind of uneven sharding is not supported"
            )
    return Placement(shape, shards, _block(here.shape, row_ids), ranks=ranks)


def _block(shape: torch.Size, row_ids: Tensor | None) -> tuple[RowRun, ...]:
    numel = math.prod(shape)
    if numel == 0:
        return ()
    rows = shape[0] if shape else 1
    return (RowRun(0, rows, numel // rows, row_ids),)
