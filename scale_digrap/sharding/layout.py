"""Where layers live: the pieces of each layer on this rank, and how per-layer sums are completed over the ranks.

A *layer* is one named parameter tensor of the unsharded model. An optimizer that needs a layer's inner products adds up
its local pieces and calls :meth:`ShardLayout.reduce_` once per step for all layers; everything that a particular way of
sharding requires is behind this class and the :class:`Placement` that describes one tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.sharding import dtensor, fsdp1
from scale_digrap.sharding.placement import Placement, RowRun

_PICKED = 32  # elements of a layer that are compared over the ranks


class LayoutError(ScaleDigrapError, ValueError):
    """Which ranks hold a layer could not be told, or is not as they say."""


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
        last: whether the training step ends with this call.
    """

    first: bool
    layers: Sequence[int]
    groups: Sequence[dict[str, Any]]
    last: bool = True


@dataclass
class ShardLayout:
    """The layers of one optimizer, their local pieces, and the one reduction that completes their sums.

    Building it is a collective call over ``process_group`` (the world where it is ``None``): every rank passes the same
    layers in the same order. Ranks that hold other layers (pipeline stages) get a reduction of their own: sharded
    tensors tell which ranks complete them; plain ones are told apart by name and shape, and are proven to be copies
    of each other by their values, and in the first step by their gradients.

    Raises:
        LayoutError: a rank lacks layers that its mesh says it holds; plain layers of equal names and shapes that are no
            copies of each other.

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
        # Whether only names and shapes say that the ranks hold copies of the same layers, and no gradient has yet.
        self.copies_assumed = False
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
        linked = sorted({rank for placed in self.placements for rank in placed.ranks or ()})
        gathered: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, (identity, packed, linked), group=group)
        identities = [name for name, _, _ in gathered]
        if group is not None:
            if len(set(identities)) > 1:
                raise LayoutError(
                    f"the {len(identities)} ranks of process_group hold {len(set(identities))} different sets of"
                    " layers; pass the group of the ranks that hold the same layers (one pipeline stage)"
                )
        else:
            sets = _sets_of_ranks(identities, [ranks for _, _, ranks in gathered])
            here = next(ranks for ranks in sets if dist.get_rank() in ranks)
            if len(sets) > 1:
                for ranks in sets:
                    subgroup = dist.new_group(ranks)  # every rank takes part in the making of every group
                    if ranks is here:
                        self.process_group = subgroup
            gathered = [gathered[rank] for rank in here]
        self.world_size = len(gathered)
        if not linked and self.world_size > 1:
            self._compare_copies()
            self.copies_assumed = True
        union: list[list[int] | None] = []
        for index, layer in enumerate(self.layers):
            if not layer.by_rows:
                union.append(None)
                continue
            rows: set[int] = set()
            for _, theirs, _ in gathered:
                part = theirs[index]
                rows.update(range(part) if isinstance(part, int) else part)
            union.append(sorted(rows))
        return union

    @torch.no_grad()
    def _compare_copies(self) -> None:
        """Prove by value that plain layers are copies of each other; collective.

        Raises:
            LayoutError: on every rank, naming the first layer that is none.
        """
        rows = []
        for index in range(len(self.layers)):
            values = self.local(index, self.tensors[self.holders[index]]).detach()
            picked = torch.zeros(_PICKED + 1, dtype=torch.float64)
            if values.numel():
                wide = values.reshape(-1)
                at = torch.linspace(0, wide.numel() - 1, _PICKED, dtype=torch.float64, device=wide.device).long()
                picked[:_PICKED] = wide[at].double().cpu()
                picked[_PICKED] = torch.linalg.vector_norm(wide, dtype=torch.float64).cpu()
            rows.append(picked)
        if not rows:
            return
        figures = torch.stack(rows)
        low, high = self._extremes(figures)
        size = torch.maximum(low.abs(), high.abs())
        size[:, :_PICKED] = size[:, :_PICKED].amax(1, keepdim=True)
        differs = ((high - low) > 1e-3 * size).any(1)
        self._refuse_copies(differs, "values")

    @torch.no_grad()
    def prove_copies(self, grad_sq: Tensor, present: Sequence[bool]) -> None:
        """Prove by their gradients that plain layers are copies of each other, once; collective until that is done.

        Args:
            grad_sq: float64 ``[n_layers]``, this rank's ‖g‖².
            present: for each layer, whether it has a gradient on this rank.

        Raises:
            LayoutError: on every rank, naming the first layer whose gradients differ.
        """
        here = torch.tensor(present, dtype=torch.bool)
        figures = grad_sq.detach().cpu()
        low, high = self._extremes(figures, here)
        if not torch.isfinite(high[high > -math.inf]).all():  # nan or inf: the step is left out
            return
        differs = (high > -math.inf) & ((high - low) > 1e-3 * high)
        self._refuse_copies(differs, "gradients")
        self.copies_assumed = not bool((high > 0).any())

    def _extremes(self, figures: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The smallest and the largest of all ranks' figures, on the host; those that are not valid do not count."""
        both = torch.stack([-figures, figures])
        if valid is not None:
            both = torch.where(valid, both, -math.inf)
        both = both.to(self.comm_device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.process_group)
        low, high = both.cpu()
        return -low, high

    def _refuse_copies(self, differs: Tensor, what: str) -> None:
        if not bool(differs.any()):
            return
        name = self.layers[int(differs.nonzero()[0])].name
        raise LayoutError(
            f"layer {name!r} and {int(differs.sum()) - 1} more have the same name and shape on {self.world_size} "
            f"ranks, but other {what}: are these copies (broadcast the weights, average the gradients, as DDP does) or "
            "other layers (give every pipeline stage's layers names of their own, or pass process_group=, the ranks "
            "that hold the same layers)?"
        )

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

    def mend(self, state: Mapping[Any, dict[str, Any]]) -> None:
        """Undo, before a training step, what an engine's loader has done to the tensors of the state."""

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


def _sets_of_ranks(identities: Sequence[str], linked: Sequence[Sequence[int]]) -> list[list[int]]:
    """The ranks whose sums belong together, in order.

    Args:
        identities: for each rank of the world, what layers it holds.
        linked: for each rank, the ranks that hold its sharded layers; empty where all of them are plain tensors.

    Raises:
        LayoutError: ranks that complete each other's layers hold different ones.
    """
    root = list(range(len(identities)))

    def find(rank: int) -> int:
        while root[rank] != rank:
            rank = root[rank]
        return rank

    plain: dict[str, int] = {}
    for rank, others in enumerate(linked):
        # Without a sharded layer nothing but names and shapes tells which ranks hold the same.
        for other in others or [plain.setdefault(identities[rank], rank)]:
            low, high = sorted((find(rank), find(other)))
            root[high] = low
    sets: dict[int, list[int]] = {}
    for rank in range(len(identities)):
        sets.setdefault(find(rank), []).append(rank)
    for first, ranks in sets.items():
        for other in [rank for rank in ranks if identities[rank] != identities[first]]:
            raise LayoutError(
                f"ranks {first} and {other} are in one device mesh but gave the optimizer different layers: give it "
                "the same names and parameters, in the same order, on all ranks of a mesh"
            )
    return list(sets.values())


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
