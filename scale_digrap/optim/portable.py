"""An optimizer's state in a form that knows neither ranks nor engines: by layer name, flattened, nothing rounded.

A folder of ``torch.distributed.checkpoint`` that holds, for every layer, ``param`` (the fp32 weights), ``exp_avg``,
``exp_avg_sq`` and ``anchor`` as 1-D tensors of the unsharded layer's elements, and all layers' scalars. Every rank
writes and reads its own range of each, whatever cuts it: FSDP2's rows, FSDP1's and ZeRO's flat slices. What is written
on one way of sharding is read on any other, on any number of ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.optim.anchored import AnchoredOptimizer

_SCALARS = "layers"
_FLAT = ("param", "exp_avg", "exp_avg_sq", "anchor")


class PortableStateError(ScaleDigrapError):
    """A folder that does not fit the optimizer it is loaded into."""


class FlatRange(Tensor):
    """A contiguous range of a 1-D tensor, as ``torch.distributed.checkpoint`` takes it; for nothing else.

    Args:
        size: elements of the whole.
        offset: the first of the range.
        values: 1-D, the range; read when saving, written to when loading. May be empty.
    """

    values: Tensor  # type: ignore[assignment]  # sparse tensors' method of that name
    _offset: int

    @staticmethod
    def __new__(cls: Any, size: int, offset: int, values: Tensor) -> FlatRange:
        whole = Tensor._make_wrapper_subclass(cls, (size,), dtype=values.dtype, device=values.device)  # type: ignore[attr-defined]
        whole.values, whole._offset = values, offset
        return whole

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{function}: a range of a checkpoint takes part in no computation")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if not self.values.numel():
            return []
        return [ChunkStorageMetadata(offsets=torch.Size([self._offset]), sizes=self.values.shape)]

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties.create_from_tensor(self.values), size=self.size()
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self.values


@torch.no_grad()
def save_portable(optimizer: AnchoredOptimizer, folder: str | Path) -> None:
    """Write the optimizer's state and the weights that it steps. A collective call of all ranks.

    Args:
        optimizer: initialised (``init_state()``, or attached to an engine).
        folder: created; every rank must see it.

    Raises:
        CheckpointException: as ``torch.distributed.checkpoint.save``.
    """
    optimizer.init_state()
    ranges, _ = _ranges(optimizer, _held(optimizer), writing=True)
    dcp.save({_SCALARS: json.dumps(optimizer.layer_state()), **ranges}, checkpoint_id=folder)


@torch.no_grad()
def load_portable(optimizer: AnchoredOptimizer, folder: str | Path) -> None:
    """Read :func:`save_portable`'s folder into live weights and state, on any number of ranks and way of sharding.

    An anchor keeps the dtype it was saved in. Anchors that the folder lacks stay as they are.

    Args:
        optimizer: initialised (``init_state()``, or attached to an engine) over the same layers.
        folder: every rank must see it.

    Raises:
        PortableStateError: no such folder, layers missing or of another size; nothing is changed then.
        CheckpointException: as ``torch.distributed.checkpoint.load``.
    """
    optimizer.init_state()
    layout = optimizer.layout
    assert layout is not None
    if not (Path(folder) / ".metadata").is_file():
        raise PortableStateError(f"{folder} holds no portable state: it has no .metadata")
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for layer in layout.layers:
        found: Any = stored.get(f"param.{layer.name}")
        if found is None:
            known = sorted(name.removeprefix("param.") for name in stored if name.startswith("param."))
            raise PortableStateError(
                f"{folder} lacks layer {layer.name!r}; it holds {len(known)} layers, first {known[0]!r}"
                if known
                else f"{folder} holds no layers"
            )
        if tuple(found.size) != (layer.shape.numel(),):
            raise PortableStateError(
                f"layer {layer.name!r} has {layer.shape.numel()} elements, {folder} holds {found.size[0]} of them"
            )
    _match_anchors(optimizer, stored)
    held = [(key, index) for key, index in _held(optimizer) if f"{key}.{layout.layers[index].name}" in stored]
    ranges, late = _ranges(optimizer, held, writing=False)
    target: dict[str, Any] = {_SCALARS: "", **ranges}
    dcp.load(target, checkpoint_id=folder)
    for index, tensor, values in late:
        local = layout.local(index, tensor)
        if values.numel() == layout.layers[index].shape.numel() != local.numel():
            values = layout.local_of_full(index, values.view(layout.layers[index].shape))
        local.copy_(values.view(local.shape))
    optimizer.load_layer_state(json.loads(target[_SCALARS]))


def _tensor(optimizer: AnchoredOptimizer, key: str, index: int) -> Tensor | None:
    layout = optimizer.layout
    assert layout is not None
    holder = layout.tensors[layout.holders[index]]
    return holder.detach() if key == "param" else optimizer.state[holder].get(key)


def _held(optimizer: AnchoredOptimizer) -> list[tuple[str, int]]:
    layout = optimizer.layout
    assert layout is not None
    indices = range(len(layout.layers))
    return [(key, index) for key in _FLAT for index in indices if _tensor(optimizer, key, index) is not None]


def _ranges(
    optimizer: AnchoredOptimizer, held: list[tuple[str, int]], *, writing: bool
) -> tuple[dict[str, FlatRange], list[tuple[int, Tensor, Tensor]]]:
    """The local ranges by key, and (layer, tensor, values) of those that have to be copied back after reading.

    A tensor whose local elements are no contiguous range (cut across its rows, or channels-last) passes through a copy:
    of the whole layer in the first case, of which one rank writes.
    """
    layout = optimizer.layout
    assert layout is not None
    ranges: dict[str, FlatRange] = {}
    late: list[tuple[int, Tensor, Tensor]] = []
    for key, index in held:
        tensor, layer = _tensor(optimizer, key, index), layout.layers[index]
        assert tensor is not None
        local, first, size = layout.local(index, tensor), layout.first_element(index), layer.shape.numel()
        if first is None:
            values = layout.full(index, tensor).reshape(-1) if writing else local.new_empty(size)
            first = 0
        elif local.is_contiguous():
            values = local.view(-1)
        else:
            values = local.reshape(-1) if writing else local.new_empty(local.numel())
        if not writing and values.data_ptr() != local.data_ptr():
            late.append((index, tensor, values))
        ranges[f"{key}.{layer.name}"] = FlatRange(size, first, values)
    return ranges, late


def _match_anchors(optimizer: AnchoredOptimizer, stored: dict[str, Any]) -> None:
    """Make live anchors wide enough for what is stored: never rounded silently."""
    layout = optimizer.layout
    assert layout is not None
    for index, layer in enumerate(layout.layers):
        anchor, found = _tensor(optimizer, "anchor", index), stored.get(f"anchor.{layer.name}")
        if anchor is not None and found is not None and anchor.dtype == torch.bfloat16 != found.properties.dtype:
            holder = layout.tensors[layout.holders[index]]
            optimizer.state[holder]["anchor"] = anchor.to(holder.dtype)
