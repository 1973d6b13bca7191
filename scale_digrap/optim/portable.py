"""Training state in a form that knows neither ranks nor engines: by layer name, flattened, nothing rounded.

A folder of ``torch.distributed.checkpoint`` that holds, for every layer, ``param`` (the fp32 weights) and the
optimizer's tensors (``exp_avg``, ``exp_avg_sq``, ``anchor``, …) as 1-D tensors of the unsharded layer's elements, and
all layers' scalars. Every rank writes and reads its own range of each, whatever cuts it: FSDP2's rows, FSDP1's and
ZeRO's flat slices. What is written on one way of sharding is read on any other, on any number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import dropwhile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.optim import Optimizer

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.optim.anchored import AnchoredOptimizer
from scale_digrap.optim.dcp_reader import FolderReader, load
from scale_digrap.runtime.dcp_folder import FolderError
from scale_digrap.runtime.files import UntrustedFileError
from scale_digrap.sharding.layout import ShardLayout, layout_for

SCALARS = "layers"
PARAM = "param"


class PortableStateError(ScaleDigrapError):
    """A folder that does not fit the optimizer it is loaded into."""


class UnreadLayersError(PortableStateError):
    """A folder that holds trained layers which the optimizer does not step."""


# What wrappers put into the names of what they wrap: torch.compile, activation checkpointing, FSDP1; and DDP's, which a
# module of a model may bear too.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_DDP = "module"


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Name → the name under which a layer is stored, whatever the model is wrapped in.

    DDP, ``torch.compile``, activation checkpointing and FSDP1 each put a part into names, around the model or around
    one of its modules. All are left out. Only where that makes two layers alike, a part ``module`` that does not come
    first is taken for the model's own.

    Raises:
        PortableStateError: two layers that differ by a wrapper's part alone.
    """
    names = list(names)
    bare = {name: [part for part in name.split(".") if part not in _WRAPPERS] for name in names}
    stored = {name: ".".join(part for part in parts if part != _DDP) or name for name, parts in bare.items()}
    if len(set(stored.values())) < len(stored):
        stored = {name: ".".join(dropwhile(lambda part: part == _DDP, parts)) or name for name, parts in bare.items()}
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(stored[name], name)
        if other != name:
            raise PortableStateError(f"layers {other!r} and {name!r} differ by the part of a wrapper alone: rename one")
    return stored


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
        stored = canonical_names(layer.name for layer in layout.layers)
        self._stored = [stored[layer.name] for layer in layout.layers]
        """Every layer's name in a folder."""

    # -- saving --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """What ``torch.distributed.checkpoint.save`` takes. Collective where a layer is cut across its rows."""
        scalars = self.scalars()
        by_name = {
            stored: scalars[layer.name]
            for stored, layer in zip(self._stored, self.layout.layers, strict=True)
            if layer.name in scalars
        }
        ranges: dict[str, Any] = {SCALARS: json.dumps(by_name)}
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
        """Compare with a folder's metadata, before anything is changed. Collective: every rank has layers of its own.

        Raises:
            PortableStateError: layers missing, or of another size; stored layers that no rank's optimizer steps, which
                would silently keep the values that they have now.
        """
        keys = self._keys(stored)
        known = sorted(stored_name for key, stored_name in keys if key == PARAM)
        for name, layer in zip(self._stored, self.layout.layers, strict=True):
            found = stored.get(keys.get((PARAM, name), ""))
            if found is None:
                has = f"it holds {len(known)} layers, first {known[0]!r}" if known else "it holds no layers"
                raise PortableStateError(f"{where} lacks layer {layer.name!r}; {has}")
            if not isinstance(found, TensorStorageMetadata) or not found.properties.dtype.is_floating_point:
                raise PortableStateError(f"{where}: what is stored of layer {layer.name!r} are no weights")
            if tuple(found.size) != (layer.shape.numel(),):
                raise PortableStateError(
                    f"layer {layer.name!r} has {layer.shape.numel()} elements, {where} holds {found.size.numel()} of "
                    "them"
                )
        stepped = {name for names in _of_all_ranks(self._stored) for name in names}
        unread = [name for name in known if name not in stepped]
        if unread:
            more = f" and {len(unread) - 1} more layers" if len(unread) > 1 else ""
            raise UnreadLayersError(
                f"{where} holds trained weights of layer {unread[0]!r}{more}, which this optimizer does not step and "
                "would silently lose"
            )

    @staticmethod
    def _keys(stored: Mapping[str, Any]) -> dict[tuple[str, str], str]:
        """(kind, canonical name of the layer) → key in the folder."""
        pairs = [(*key.partition(".")[::2], key) for key in stored if "." in key]
        canonical = canonical_names(name for kind, name, _ in pairs if kind == PARAM)
        return {(kind, canonical.get(name, name)): key for kind, name, key in pairs}

    @torch.no_grad()
    def targets(self, stored: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[int, Tensor, Tensor]]]:
        """What ``torch.distributed.checkpoint.load`` fills, made where it is missing; to be handed to :meth:`finish`.

        Returns:
            ranges by key, and (layer, tensor, values) of those that have to be copied back: a layer cut across its rows
            is read whole, one in channels-last order passes through a copy.
        """
        keys = self._keys(stored)
        self._make_state(stored, keys)
        ranges: dict[str, Any] = {SCALARS: ""}
        late: list[tuple[int, Tensor, Tensor]] = []
        for own, index, tensor in self._tensors():
            kind, _, layer_name = own.partition(".")
            name = keys.get((kind, layer_name))
            if name is None:
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
        read = parse_scalars(ranges[SCALARS], "the folder")
        stored = canonical_names(read)
        found = {stored[name]: values for name, values in read.items()}
        layers = zip(self._stored, self.layout.layers, strict=True)
        scalars = {layer.name: found[name] for name, layer in layers if name in found}
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
        for index, name in enumerate(self._stored):
            holder = self._holder(index)
            yield f"{PARAM}.{name}", index, holder.detach()
            for key, value in self._state(index).items():
                if isinstance(value, Tensor) and value.shape == holder.shape and (value.dim() or not _is_number(key)):
                    yield f"{key}.{name}", index, value

    def _make_state(self, stored: Mapping[str, Any], keys: Mapping[tuple[str, str], str]) -> None:
        """Tensors that the folder has and the optimizer does not yet; anchors wide enough for what is stored."""
        by_layer: dict[str, list[tuple[str, Any]]] = {}
        for (kind, layer_name), key in keys.items():
            if kind != PARAM and isinstance(stored[key], TensorStorageMetadata):
                by_layer.setdefault(layer_name, []).append((kind, stored[key]))
        for index, name in enumerate(self._stored):
            holder = self._holder(index)
            for key, found in by_layer.get(name, ()):
                present = self.optimizer.state[holder].get(key)
                if present is None and key != "anchor":
                    self.optimizer.state[holder][key] = torch.zeros_like(holder, requires_grad=False)
                elif present is not None and present.dtype == torch.bfloat16 != found.properties.dtype:
                    self.optimizer.state[holder][key] = present.to(holder.dtype)  # never rounded silently


def _is_number(key: str) -> bool:
    """State of a 0-d parameter looks like a number; the moments and the anchor are not."""
    return key not in ("exp_avg", "exp_avg_sq", "anchor", "direction", "momentum_buffer")


def _of_all_ranks(value: Any) -> list[Any]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def parse_scalars(text: Any, where: str) -> dict[str, dict[str, Any]]:
    """Every layer's numbers as they are stored.

    Raises:
        PortableStateError: they are something else.
    """
    try:
        scalars = json.loads(text)
        if all(isinstance(values, dict) for values in scalars.values()):
            return dict(scalars)
    except (TypeError, ValueError, AttributeError, RecursionError):
        pass
    raise PortableStateError(f"{where} is damaged: what it holds under {SCALARS!r} are not the layers' numbers")


def open_portable(folder: str | Path) -> tuple[FolderReader, Metadata]:
    """A folder's reader and its metadata; nothing in the folder is trusted, and nothing of it is run.

    Raises:
        PortableStateError: no such folder, or its metadata is damaged, forged, or not that of such a folder.
    """
    reader = FolderReader(folder)
    try:
        return reader, reader.read_metadata()
    except (FolderError, UntrustedFileError) as error:
        raise PortableStateError(str(error)) from None


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
        PortableStateError: no such folder, layers missing or of another size, stored layers that no rank's optimizer
            steps; nothing is changed then.
        CheckpointException: as ``torch.distributed.checkpoint.load``.
    """
    reader, metadata = open_portable(folder)
    stored = metadata.state_dict_metadata
    state = PortableState(optimizer, layout)
    state.check(stored, folder)
    ranges, late = state.targets(stored)
    try:
        load(ranges, reader)
    except FolderError as error:
        raise PortableStateError(str(error)) from error
    state.finish(ranges, late)
