"""Training state in a form that knows neither ranks nor engines: by layer name, flattened, nothing rounded.

A folder of ``torch.distributed.checkpoint`` that holds, for every layer, ``param`` (the fp32 weights) and the
optimizer's tensors (``exp_avg``, ``exp_avg_sq``, ``anchor``, …) as 1-D tensors of the unsharded layer's elements, and
all layers' scalars. Every rank writes and reads its own range of each, whatever cuts it: FSDP2's rows, FSDP1's and
ZeRO's flat slices. What is written on one way of sharding is read on any other, on any number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.optim import Optimizer

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.optim.anchored import AnchoredOptimizer
from scale_digrap.sharding.layout import ShardLayout, layout_for

SCALARS = "layers"
PARAM = "param"


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

    @property
    def offset(self) -> int:
        """Place of the first element of the range."""
        return self._offset

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


class PortableState:
    """The weights that an optimizer steps, and its state, seen layer by layer.

    Args:
        optimizer: any optimizer whose state is, per tensor that it steps, tensors of that shape and numbers.
        layout: where the layers lie. By default an anchored optimizer's own, and for others one layer per named
            parameter; to be given where an engine has put other tensors in the place of the parameters.
    """

    def __init__(self, optimizer: Optimizer, layout: ShardLayout | None = None) -> None:
        if layout is None and isinstance(optimizer, AnchoredOptimizer):
            optimizer.init_state()
            layout = optimizer.layout
        elif layout is None:
            named = [
                pair
                for group in optimizer.param_groups
                for pair in zip(group["param_names"], group["params"], strict=True)
                if pair[1].requires_grad
            ]
            names, params = [name for name, _ in named], [param for _, param in named]
            layout = layout_for(names, params, [False] * len(names))
        assert layout is not None
        self.optimizer, self.layout = optimizer, layout

    # -- saving --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """What ``torch.distributed.checkpoint.save`` takes. Collective where a layer is cut across its rows."""
        ranges: dict[str, Any] = {SCALARS: json.dumps(self.scalars())}
        for name, index, tensor in self._tensors():
            local, first = self.layout.local(index, tensor), self.layout.first_element(index)
            size = self.layout.layers[index].shape.numel()
            if first is None:  # no contiguous range: the whole layer, of which one rank writes
                ranges[name] = FlatRange(size, 0, self.layout.full(index, tensor).reshape(-1))
            else:
                ranges[name] = FlatRange(size, first, local.reshape(-1))
        return ranges

    def scalars(self) -> dict[str, dict[str, float]]:
        """Every layer's numbers, the same on all ranks."""
        if isinstance(self.optimizer, AnchoredOptimizer):
            return self.optimizer.layer_state()
        numbers = {}
        for index, layer in enumerate(self.layout.layers):
            state = self._state(index)
            numbers[layer.name] = {
                key: float(value)
                for key, value in state.items()
                if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0)
            }
        return numbers

    # -- loading -------------------------------------------------------------------------------------------------------

    def check(self, stored: Mapping[str, Any], where: str | Path) -> None:
        """Compare with a folder's metadata, before anything is changed.

        Raises:
            PortableStateError: layers missing, or of another size.
        """
        known = sorted(name.removeprefix(f"{PARAM}.") for name in stored if name.startswith(f"{PARAM}."))
        for layer in self.layout.layers:
            found: Any = stored.get(f"{PARAM}.{layer.name}")
            if found is None:
                has = f"it holds {len(known)} layers, first {known[0]!r}" if known else "it holds no layers"
                raise PortableStateError(f"{where} lacks layer {layer.name!r}; {has}")
            if tuple(found.size) != (layer.shape.numel(),):
                raise PortableStateError(
                    f"layer {layer.name!r} has {layer.shape.numel()} elements, {where} holds {found.size[0]} of them"
                )

    @torch.no_grad()
    def targets(self, stored: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[int, Tensor, Tensor]]]:
        """What ``torch.distributed.checkpoint.load`` fills, made where it is missing; to be handed to :meth:`finish`.

        Returns:
            ranges by key, and (layer, tensor, values) of those that have to be copied back: a layer cut across its rows
            is read whole, one in channels-last order passes through a copy.
        """
        self._make_state(stored)
        ranges: dict[str, Any] = {SCALARS: ""}
        late: list[tuple[int, Tensor, Tensor]] = []
        for name, index, tensor in self._tensors():
            if name not in stored:
                continue
            local, first = self.layout.local(index, tensor), self.layout.first_element(index)
            size = self.layout.layers[index].shape.numel()
            if first is None:
                values, first = local.new_empty(size), 0
            elif local.is_contiguous():
                values = local.view(-1)
            else:
                values = local.new_empty(local.numel())
            if values.data_ptr() != local.data_ptr():
                late.append((index, tensor, values))
            ranges[name] = FlatRange(size, first, values)
        return ranges, late

    @torch.no_grad()
    def finish(self, ranges: Mapping[str, Any], late: list[tuple[int, Tensor, Tensor]]) -> None:
        """Put what was read in its place."""
        for index, tensor, values in late:
            local, shape = self.layout.local(index, tensor), self.layout.layers[index].shape
            if values.numel() == shape.numel() != local.numel():
                values = self.layout.local_of_full(index, values.view(shape))
            local.copy_(values.view(local.shape))
        scalars = json.loads(ranges[SCALARS])
        if isinstance(self.optimizer, AnchoredOptimizer):
            self.optimizer.load_layer_state(scalars)
            return
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for index, layer in enumerate(self.layout.layers):
            holder = self._holder(index)
            group = groups.get(id(holder), {})
            # Where torch's own optimizers keep their step count.
            device = holder.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
            for key, value in scalars.get(layer.name, {}).items():
                self.optimizer.state[holder][key] = torch.tensor(value, dtype=torch.float32, device=device)

    # -- both ----------------------------------------------------------------------------------------------------------

    def _holder(self, index: int) -> Tensor:
        return self.layout.tensors[self.layout.holders[index]]

    def _state(self, index: int) -> dict[str, Any]:
        # .get: reading state[...] would create an entry
        return self.optimizer.state.get(self._holder(index), {})

    def _tensors(self) -> Iterator[tuple[str, int, Tensor]]:
        """(key in the folder, layer, tensor that holds it) of everything that is laid out like the weights."""
        for index, layer in enumerate(self.layout.layers):
            holder = self._holder(index)
            yield f"{PARAM}.{layer.name}", index, holder.detach()
            for key, value in self._state(index).items():
                if isinstance(value, Tensor) and value.shape == holder.shape and (value.dim() or not _is_number(key)):
                    yield f"{key}.{layer.name}", index, value

    def _make_state(self, stored: Mapping[str, Any]) -> None:
        """Tensors that the folder has and the optimizer does not yet; anchors wide enough for what is stored."""
        by_layer: dict[str, list[tuple[str, Any]]] = {}
        for name, found in stored.items():
            key, _, layer_name = name.partition(".")
            if key != PARAM:
                by_layer.setdefault(layer_name, []).append((key, found))
        for index, layer in enumerate(self.layout.layers):
            holder = self._holder(index)
            for key, found in by_layer.get(layer.name, ()):
                present = self.optimizer.state[holder].get(key)
                if present is None and key != "anchor":
                    self.optimizer.state[holder][key] = torch.zeros_like(holder, requires_grad=False)
                elif present is not None and present.dtype == torch.bfloat16 != found.properties.dtype:
                    self.optimizer.state[holder][key] = present.to(holder.dtype)  # never rounded silently


def _is_number(key: str) -> bool:
    """State of a 0-d parameter looks like a number; the moments and the anchor are not."""
    return key not in ("exp_avg", "exp_avg_sq", "anchor", "direction", "momentum_buffer")


def open_portable(folder: str | Path) -> tuple[dcp.FileSystemReader, Metadata]:
    """A folder's reader and its metadata, read once: that of a large checkpoint has an entry per tensor and rank.

    Raises:
        PortableStateError: no such folder.
    """
    if not (Path(folder) / ".metadata").is_file():
        raise PortableStateError(f"{folder} holds no portable state: it has no .metadata")
    reader = dcp.FileSystemReader(folder)
    return reader, reader.read_metadata()


def read_metadata(folder: str | Path) -> Mapping[str, Any]:
    """What a folder holds: key → size and dtype.

    Raises:
        PortableStateError: as :func:`open_portable`.
    """
    return open_portable(folder)[1].state_dict_metadata


def save_portable(optimizer: Optimizer, folder: str | Path, layout: ShardLayout | None = None) -> None:
    """Write the optimizer's state and the weights that it steps. A collective call of all ranks.

    Args:
        optimizer, layout: as :class:`PortableState`.
        folder: created; every rank must see it.

    Raises:
        CheckpointException: as ``torch.distributed.checkpoint.save``.
    """
    dcp.save(PortableState(optimizer, layout).state_dict(), checkpoint_id=folder)


def load_portable(optimizer: Optimizer, folder: str | Path, layout: ShardLayout | None = None) -> None:
    """Read :func:`save_portable`'s folder into live weights and state, on any number of ranks and way of sharding.

    An anchor keeps the dtype it was saved in. Anchors that the folder lacks stay as they are.

    Args:
        optimizer, layout: as :class:`PortableState`, over the same layers.
        folder: every rank must see it.

    Raises:
        PortableStateError: no such folder, layers missing or of another size; nothing is changed then.
        CheckpointException: as ``torch.distributed.checkpoint.load``.
    """
    stored = read_metadata(folder)
    state = PortableState(optimizer, layout)
    state.check(stored, folder)
    ranges, late = state.targets(stored)
    dcp.load(ranges, checkpoint_id=folder)
    state.finish(ranges, late)
