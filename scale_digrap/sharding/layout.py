"""Where layers live: the pieces of each layer on this rank, and how per-layer sums are completed over the ranks.

A *layer* is one named parameter tensor of the unsharded model. An optimizer that needs a layer's inner products adds up
its local pieces and calls :meth:`ShardLayout.reduce_` once per step for all layers; everything that a particular way of
sharding requires is behind this class and the :class:`Placement` that describes one tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from scale_digrap.sharding import dtensor, fsdp1
from scale_digrap.sharding.placement import Placement, RowRun


@dataclass(frozen=True)
class Layer:
    """A named parameter tensor of the unsharded model; ``by_rows`` asks for its row sums."""

    name: str
    shape: torch.Size
    by_rows: bool


@dataclass(frozen=True)
class Turn:
    """What one call of ``step()`` is to do.

    Attributes:
        first: whether a training step begins: sums and scalars of ALL layers are due, and the one reduction. Engines
            that step their tensors one after another make several calls in one training step.
        layers: the layers whose tensors are to be updated in this call.
        groups: all parameter groups, also those that an engine hides during this call.
    """

    first: bool
    layers: Sequence[int]
    groups: Sequence[dict[str, Any]]


@dataclass
class ShardLayout:
    """The layers of one optimizer, their local pieces, and the one reduction that completes their sums.

    Building it is a collective call over ``process_group`` (the world where it is ``None``): every rank passes the same
    layers in the same order. Ranks that hold other layers (pipeline stages) are told apart by name and shape and get a
    reduction of their own.

    Attributes:
        layers: the layers, in the optimizer's order.
        placements: for each layer, what the local tensor holds.
        tensors: what the optimizer steps, and keeps its state for: here one parameter per layer. Ways of sharding that
            put several layers into one tensor say in ``holders`` which one holds which.
        comm_device: where collectives run (a CPU-offloaded shard on a GPU mesh is reduced on the GPU).
        process_group: the ranks over which sums run.
        slots: for each layer, the position of each straddling row among all straddling rows: ``{row id: slot}``.
        slot_layer: int64 ``[n_slots]``, the layer that each straddling row belongs to.
    """

    layers: Sequence[Layer]
    placements: Sequence[Placement]
    tensors: Sequence[Tensor]
    comm_device: torch.device
    process_group: dist.ProcessGroup | None = None
    slots: list[dict[int, int]] = field(init=False)
    slot_layer: Tensor = field(init=False)

    @property
    def holders(self) -> Sequence[int]:
        """For each layer, the place in ``tensors`` of the tensor that holds it."""
        return range(len(self.layers))

    def __post_init__(self) -> None:
        straddling = [
            None
            if not layer.by_rows
            else sorted({int(r) for run in placed.runs if run.row_ids is not None for r in run.row_ids})
            for layer, placed in zip(self.layers, self.placements, strict=True)
        ]
        self.world_size = 1
        if dist.is_available() and dist.is_initialized():
            straddling = self._agree(straddling)
        self.slots = []
        owner: list[int] = []
        for index, rows in enumerate(straddling):
            self.slots.append({row: len(owner) + k for k, row in enumerate(rows or ())})
            owner += [index] * len(rows or ())
        self.slot_layer = torch.tensor(owner, dtype=torch.int64, device=self.comm_device)
        # Every shard is held by world / shards ranks: weighting each rank's part with the inverse makes ONE sum over
        # all ranks right for every layer at once, sharded, replicated or both, with the same bits on every replica.
        weight = [placed.shards / self.world_size for placed in self.placements]
        self._weight = torch.tensor(weight, dtype=torch.float64, device=self.comm_device)
        self._slot_weight = self._weight[self.slot_layer]

    def _agree(self, straddling: list[list[int] | None]) -> list[list[int] | None]:
        """Find the ranks that hold the same layers, and all rows that straddle any two of them."""
        group = self.process_group
        # Row numbers can be many (a column-sharded matrix straddles in every row): a full range travels as its length.
        packed = [
            rows if rows is None or rows != list(range(layer.shape[0])) else len(rows)
            for layer, rows in zip(self.layers, straddling, strict=True)
        ]
        identity = hashlib.sha256(
            repr([(layer.name, tuple(layer.shape)) for layer in self.layers]).encode()
        ).hexdigest()
        gathered: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, (identity, packed), group=group)
        identities = [name for name, _ in gathered]
        if len(set(identities)) > 1:
            if group is not None:
                raise ValueError(
                    f"the {len(identities)} ranks of process_group hold {len(set(identities))} different sets of"
                    " layers; pass the group of the ranks that hold the same layers (one pipeline stage)"
                )
            for name in sorted(set(identities)):
                ranks = [rank for rank, other in enumerate(identities) if other == name]
                subgroup = dist.new_group(ranks)  # every rank takes part in the making of every group
                if name == identity:
                    self.process_group = subgroup
            gathered = [item for item in gathered if item[0] == identity]
        self.world_size = len(gathered)
        union: list[list[int] | None] = []
        for index, layer in enumerate(self.layers):
            if not layer.by_rows:
                union.append(None)
                continue
            rows: set[int] = set()
            for _, theirs in gathered:
                part = theirs[index]
                rows.update(range(part) if isinstance(part, int) else part)
            union.append(sorted(rows))
        return union

    def local(self, index: int, tensor: Tensor) -> Tensor:
        """A layer's local elements in the tensor that holds it, or in a state tensor made like that; under ``no_grad``.

        Shares storage with ``tensor``.
        """
        return dtensor.local(tensor)

    def local_grads(self, indices: Sequence[int] | None = None) -> list[Tensor | None]:
        """The local gradients of some layers (all by default), laid out as :meth:`local`; ``None`` where there is none.

        Raises:
            RuntimeError: the gradient is sparse.
        """
        which = range(len(self.layers)) if indices is None else indices
        return [dtensor.local_grad(self.tensors[index]) for index in which]

    def full(self, index: int, tensor: Tensor) -> Tensor:
        """A layer's unsharded tensor, out of the tensor that holds it or a state tensor made like that; collective."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()

    def first_element(self, index: int) -> int | None:
        """Where in the flattened layer the local elements begin; ``None`` where they are not one contiguous range."""
        offset = self.placements[index].offset
        return dtensor.first_element(self.tensors[index]) if offset is None else offset

    def pieces(self) -> dict[str, Any]:
        """What a checkpoint's reader needs to find the layers in tensors that hold several; nothing elsewhere."""
        return {}

    def grad_factors(self) -> Tensor | None:
        """float64 ``[n_layers]``: what :meth:`local_grads` has yet to be multiplied with; ``None`` for ones."""
        return None

    def turn(self, param_groups: Sequence[dict[str, Any]]) -> Turn:
        """What one call of ``step()`` is to do."""
        return Turn(True, range(len(self.layers)), param_groups)

    def rebound(self, state: Mapping[Any, dict[str, Any]]) -> bool:
        """Whether tensors of the state, or the storages behind them, were replaced since the last call."""
        return False

    @property
    def n_slots(self) -> int:
        """How many rows are completed only by the reduction."""
        return len(self.slot_layer)

    def row_slots(self, index: int, run: RowRun, device: torch.device) -> Tensor | None:
        """int64 ``[run.rows]``: the slots of a straddling run's rows, ``None`` for a run of whole rows."""
        if run.row_ids is None or not self.layers[index].by_rows:
            return None
        table = self.slots[index]
        return torch.tensor([table[int(row)] for row in run.row_ids], dtype=torch.int64, device=device)

    def local_of_full(self, index: int, full: Tensor) -> Tensor:
        """The local elements of a layer out of a tensor of the unsharded layer's shape (or a DTensor of it)."""
        offset, param = self.placements[index].offset, self.tensors[self.holders[index]]
        if offset is None:
            return dtensor.local(dtensor.shard_like(param, full))
        numel = self.placements[index].numel
        return full.detach().reshape(-1)[offset : offset + numel].to(param.device).clone()

    @torch.no_grad()
    def reduce_(self, sums: Tensor, row_sums: Tensor) -> None:
        """Complete per-layer and per-row partial sums over all ranks, in place, with ONE all-reduce.

        Args:
            sums: float64 ``[k, n_layers]``, this rank's partial sums.
            row_sums: float64 ``[3, n_slots]``, this rank's part of the rows that straddle ranks.
        """
        if self.world_size == 1:
            return
        weighted = (sums.to(self.comm_device) * self._weight, row_sums.to(self.comm_device) * self._slot_weight)
        packed = torch.cat([part.reshape(-1) for part in weighted])
        dist.all_reduce(packed, group=self.process_group)
        sums.copy_(packed[: sums.numel()].view_as(sums))
        row_sums.copy_(packed[sums.numel() :].view_as(row_sums))

    @torch.no_grad()
    def max_(self, values: Tensor) -> None:
        """The largest of all ranks' values, in place, with one all-reduce; float64 ``[n_layers]``."""
        if self.world_size > 1:
            gathered = values.to(self.comm_device)
            dist.all_reduce(gathered, op=dist.ReduceOp.MAX, group=self.process_group)
            values.copy_(gathered)

    @torch.no_grad()
    def any_(self, flags: Tensor) -> None:
        """Make a bool tensor true wherever any rank's is, in place; for set-up, not for steps."""
        if self.world_size > 1:
            counts = flags.to(self.comm_device, torch.float32)
            dist.all_reduce(counts, group=self.process_group)
            flags.copy_(counts > 0)


def layout_for(
    names: Sequence[str],
    params: Sequence[Tensor],
    by_rows: Sequence[bool],
    process_group: dist.ProcessGroup | None = None,
) -> ShardLayout:
    """The layout of plain, DDP, FSDP1, FSDP2, HSDP and tensor-parallel parameters, in any mixture.

    Args:
        names: one name per parameter.
        params: the parameters as the optimizer sees them.
        by_rows: for each parameter, whether its row sums are wanted (ignored below two dimensions).
        process_group: the ranks over which sums run; the world where ``None``.

    Raises:
        ValueError: the parameters live on devices of several types, or ranks of ``process_group`` disagree on the
            layers.
    """
    devices = {dtensor.comm_device(param) for param in params}
    if len(devices) > 1:
        raise ValueError(f"parameters on several devices: {sorted(map(str, devices))}; use one optimizer per device")
    flat = fsdp1.placements(params)
    placements = [flat.get(id(param)) or dtensor.placement(param) for param in params]
    layers = [
        Layer(name, placed.shape, rows and len(placed.shape) > 1)
        for name, placed, rows in zip(names, placements, by_rows, strict=True)
    ]
    return ShardLayout(layers, placements, params, devices.pop() if devices else torch.device("cpu"), process_group)
