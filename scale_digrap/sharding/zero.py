"""DeepSpeed ZeRO: flat fp32 partitions that cut through layers, stepped one after another.

ZeRO puts flat tensors in place of the parameters that an optimizer was given: one per parameter group (stages 1 and 2,
``BF16_Optimizer``), one per sub-group (stage 3), or one fp32 copy per parameter (stage 0 with bf16). Each holds, on
each rank, at most one contiguous segment of each of its layers, and padding, which may be uninitialised memory and is
never read here. :func:`read_table` finds the segments, :func:`prove` checks them by value and by coverage over the
ranks, and :class:`ZeroLayout` makes them what :class:`~scale_digrap.sharding.layout.ShardLayout` promises.

``step()`` of the optimizer is called once per flat tensor, inside the engine's step. The first call of a training step
completes the sums of ALL layers with one reduction: of the tensors that are not stepped in that call the gradients
exist already, not yet unscaled and clipped, which is a factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.sharding.layout import Layer, ShardLayout, Turn
from scale_digrap.sharding.placement import Placement, flat_runs
from scale_digrap.sharding.zero3 import full_shape

_PROVEN_STEPS = 2  # training steps in which early gradients are compared with those that the engine hands over


class ZeroLayoutError(ScaleDigrapError, RuntimeError):
    """Where the layers lie could not be told, or is not what it was when it was proven."""


@dataclass(frozen=True)
class Segment:
    """``flat.view(-1)[start : start + numel]`` is ``layer.view(-1)[offset : offset + numel]``."""

    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class ZeroTable:
    """Which elements of which layers this rank's flat tensors hold.

    Attributes:
        flats: what the optimizer steps, fp32.
        flat_groups: for each flat tensor, the index of its parameter group.
        params: the model's parameter of each layer.
        holders: for each layer, the index of the flat tensor that holds it, on all ranks.
        segments: for each layer, its part on this rank; ``numel`` may be 0.
        shards: into how many distinct parts each layer is cut.
        process_group: the ranks over which layers are complete.
        device: where sums are reduced.
    """

    flats: Sequence[Tensor]
    flat_groups: Sequence[int]
    params: Sequence[nn.Parameter]
    holders: Sequence[int]
    segments: Sequence[Segment]
    shards: int
    process_group: dist.ProcessGroup | None
    device: torch.device


def read_table(engine: Any) -> ZeroTable:
    """The table of a ``DeepSpeedEngine``'s optimizer, stages 0 (bf16) to 3; :func:`prove` it before use.

    Raises:
        ZeroLayoutError: an optimizer wrapper of another kind.
    """
    zero = engine.optimizer
    kind = type(zero).__name__
    device = torch.device(engine.device)
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return _read_stage3(zero, device)
    if kind == "DeepSpeedZeroOptimizer":
        return _read_partitions(zero, zero.bit16_groups, zero.single_partition_of_fp32_groups, device)
    if kind == "BF16_Optimizer":
        return _read_partitions(zero, zero.bf16_groups, zero.fp32_groups_flat_partition, device)
    if kind == "FP16_UnfusedOptimizer":
        return _read_copies(zero, engine.seq_data_parallel_group, device)
    raise ZeroLayoutError(f"DeepSpeed's {kind} is not supported: use ZeRO stage 0, 1, 2 or 3")


def _read_partitions(
    zero: Any, groups: Sequence[Sequence[nn.Parameter]], flats: Sequence[Tensor], device: torch.device
) -> ZeroTable:
    """Stages 1 and 2: a group's parameters one after another, cut into equal slices.

    Every ``p.data`` is a view of its group's flat low-precision buffer, so its offset there is a fact of torch's.
    DeepSpeed's own map of fragments (``_hp_mapping``) is wrong with ``round_robin_gradients``.
    """
    process_groups = {id(group): group for group in zero.real_dp_process_group}
    if len(process_groups) > 1:
        raise ZeroLayoutError("parameter groups are partitioned over different ranks (mixture of experts)")
    process_group = next(iter(process_groups.values()))
    rank = dist.get_rank(process_group)
    params, holders, segments = [], [], []
    for k, (group, flat) in enumerate(zip(groups, flats, strict=True)):
        if not group:
            continue
        if len({param.data.untyped_storage().data_ptr() for param in group}) > 1:
            raise ZeroLayoutError(f"the parameters of group {k} are not views of one buffer")
        size, base = flat.numel(), min(param.data.storage_offset() for param in group)
        for param in group:
            first = int(param.data.storage_offset() - base)
            low, high = max(first, rank * size), min(first + int(param.numel()), (rank + 1) * size)
            empty = high <= low
            params.append(param)
            holders.append(k)
            segments.append(Segment(0, 0, 0) if empty else Segment(low - rank * size, high - low, low - first))
    shards = dist.get_world_size(process_group)
    return ZeroTable(flats, range(len(flats)), params, holders, segments, shards, process_group, device)


def _read_stage3(zero: Any, device: torch.device) -> ZeroTable:
    """Stage 3: every tensor cut into equal slices, a sub-group's slices one after another."""
    flats = zero.fp32_partitioned_groups_flat
    params, holders, segments = [], [], []
    process_group = None
    for group in zero.fp16_groups:
        for param in group:
            if process_group is not None and param.ds_process_group is not process_group:
                raise ZeroLayoutError("parameters are partitioned over different ranks (mixture of experts)")
            process_group = param.ds_process_group
            holder, start, slot = zero.grad_position[zero.get_param_id(param)]
            offset = dist.get_rank(process_group) * slot
            # What is left of the slot is padding, uninitialised.
            numel = max(0, min(slot, param.ds_numel - offset))
            params.append(param)
            holders.append(holder)
            segments.append(Segment(start, numel, offset) if numel else Segment(0, 0, 0))
    flat_groups = [zero.sub_group_to_group_id[k] for k in range(len(flats))]
    shards = dist.get_world_size(process_group)
    return ZeroTable(flats, flat_groups, params, holders, segments, shards, process_group, device)


def _read_copies(zero: Any, process_group: Any, device: torch.device) -> ZeroTable:
    """Stage 0 with a low-precision model: one whole fp32 copy per parameter, on every rank."""
    params = [param for group in zero.fp16_groups for param in group]
    flats = [copy for group in zero.fp32_groups for copy in group]
    groups = [number for number, group in enumerate(zero.fp32_groups) for _ in group]
    segments = [Segment(0, param.numel(), 0) for param in params]
    return ZeroTable(flats, groups, params, range(len(params)), segments, 1, process_group, device)


@torch.no_grad()
def prove(table: ZeroTable, names: Sequence[str]) -> None:
    """Check a table by value, against the parameters, and by coverage, over the ranks. A collective call.

    Raises:
        ZeroLayoutError: on every rank, naming the first layer that is elsewhere than the table says.
    """
    wrong = torch.zeros(len(names), dtype=torch.float64)
    covered = torch.zeros(len(names), dtype=torch.float64)
    for index, (param, segment) in enumerate(zip(table.params, table.segments, strict=True)):
        here = table.flats[table.holders[index]].detach().view(-1).narrow(0, segment.start, segment.numel)
        if hasattr(param, "ds_tensor"):
            there = param.ds_tensor.detach().view(-1)[: segment.numel]  # type: ignore[operator]
        else:
            there = param.detach().reshape(-1)[segment.offset : segment.offset + segment.numel]
        wrong[index] = not torch.equal(here.to(there.device, there.dtype), there)
        covered[index] = segment.numel
    figures = torch.stack([wrong, covered]).to(table.device)
    dist.all_reduce(figures, group=table.process_group)
    wrong, covered = figures.cpu()
    copies = dist.get_world_size(table.process_group) / table.shards
    for index, name in enumerate(names):
        numel = full_shape(table.params[index]).numel()
        if wrong[index] or covered[index] != numel * copies:
            raise ZeroLayoutError(
                f"layer {name!r} is not where DeepSpeed's buffers should hold it ({int(wrong[index])} ranks hold other "
                f"values, {int(covered[index])} of {int(numel * copies)} elements are covered): this version of "
                "DeepSpeed lays out its partitions in a way that is not known here"
            )


class ZeroLayout(ShardLayout):
    """The layers in ZeRO's flat tensors; see the module.

    Args:
        table: proven.
        names: one name per layer.
        by_rows: for each layer, whether its row sums are wanted.
        zero: DeepSpeed's optimizer wrapper, asked for gradients that the flat tensors do not have yet.
        model_names: the layers' names in the engine's module, by which DeepSpeed's own checkpoints know them, where
            they are others.
    """

    def __init__(
        self,
        table: ZeroTable,
        names: Sequence[str],
        by_rows: Sequence[bool],
        zero: Any,
        model_names: Sequence[str] | None = None,
    ) -> None:
        self.table, self._zero = table, zero
        self.model_names = list(names if model_names is None else model_names)
        layers, placements = [], []
        ranks = tuple(dist.get_process_group_ranks(table.process_group or dist.group.WORLD))
        for param, segment, name, rows in zip(table.params, table.segments, names, by_rows, strict=True):
            shape = full_shape(param)
            runs = flat_runs(shape, segment.offset, segment.offset + segment.numel)
            layers.append(Layer(name, shape, rows and len(shape) > 1))
            placements.append(Placement(shape, table.shards, runs, offset=segment.offset, ranks=ranks))
        self.used: set[int] | None = None
        """The layers that the coming training step moves, where the engine's user knows better than the engine, which
        gives every layer a gradient; the same on all ranks. For one step."""
        self._touched: set[int] | None = None
        self._groups: list[dict[str, Any]] = []
        self._pending: set[int] | None = None
        self._visible: set[int] = set()
        self._decided = False
        self._steps = 0
        self._probes: dict[int, Tensor] = {}
        self._anchor_dtypes: dict[int, torch.dtype] = {}
        super().__init__(layers, placements, table.flats, table.device, table.process_group)
        self._number = {id(flat): k for k, flat in enumerate(table.flats)}

    @property
    def holders(self) -> Sequence[int]:
        return self.table.holders

    def local(self, index: int, tensor: Tensor) -> Tensor:
        segment = self.table.segments[index]
        return tensor.detach().view(-1).narrow(0, segment.start, segment.numel)

    def full(self, index: int, tensor: Tensor) -> Tensor:
        segment, shape = self.table.segments[index], self.layers[index].shape
        here = self.local(index, tensor)
        if self.table.shards == 1:
            return here.view(shape).to(self.comm_device)
        buffer = torch.zeros(shape.numel(), dtype=tensor.dtype, device=self.comm_device)
        buffer[segment.offset : segment.offset + segment.numel] = here
        dist.all_reduce(buffer, group=self.process_group)  # every element is on one rank, and 0 on the others
        return buffer.view(shape)

    def pieces(self) -> dict[str, Any]:
        """Name in the model → (number of its flat tensor, first element there, elements, first of the layer's)."""
        parts = zip(self.model_names, self.holders, self.table.segments, strict=True)
        return {name: (k, part.start, part.numel, part.offset) for name, k, part in parts}

    # -- one training step ---------------------------------------------------------------------------------------------

    def begin(self, param_groups: Sequence[dict[str, Any]], touched: set[int] | None) -> None:
        """The engine's step begins.

        Args:
            param_groups: all of them; ZeRO hides groups from the optimizer while it steps one.
            touched: the layers that have a gradient in this training step; ``None`` for all.
        """
        used, self.used = self.used, None
        if used is not None:
            touched = used if touched is None else touched & used
        self._groups, self._touched = list(param_groups), touched
        self._pending, self._decided = set(range(len(self.tensors))), False

    def end(self) -> None:
        """The engine's step is over: every tensor was stepped, or (overflow) none.

        Raises:
            ZeroLayoutError: some were and some were not.
        """
        left, self._pending = self._pending or set(), None
        if self._decided and left:
            raise ZeroLayoutError(f"DeepSpeed stepped all but {len(left)} of {len(self.tensors)} partitions")
        self._steps += self._decided

    def turn(self, param_groups: Sequence[dict[str, Any]]) -> Turn:
        if self._pending is None:
            raise ZeroLayoutError("step() was called outside the engine's: call engine.step()")
        tensors = [tensor for group in param_groups for tensor in group["params"]]
        self._visible = {self._number.get(id(tensor), -1) for tensor in tensors}
        if not self._visible <= self._pending:
            raise ZeroLayoutError("DeepSpeed steps a tensor that it has stepped already, or one that it has made since")
        first, self._decided = not self._decided, True
        self._pending -= self._visible
        self._compare_probes()
        layers = [i for i, k in enumerate(self.holders) if k in self._visible]
        return Turn(first, layers, self._groups, last=not self._pending)

    def local_grads(self, indices: Sequence[int] | None = None) -> list[Tensor | None]:
        which = range(len(self.layers)) if indices is None else indices
        early: dict[int, list[Tensor]] = {}
        grads: list[Tensor | None] = []
        for index in which:
            holder, segment = self.holders[index], self.table.segments[index]
            flat = self.tensors[holder]
            if segment.numel == 0 or (self._touched is not None and index not in self._touched):
                grads.append(None)
            elif flat.grad is not None:
                grads.append(flat.grad.view(-1).narrow(0, segment.start, segment.numel))
            else:
                if holder not in early:
                    early[holder] = _early_gradient(self._zero, holder, flat.numel())
                grads.append(_narrow(early[holder], segment.start, segment.numel))
        self._keep_probes(which, grads)
        return grads

    def grad_factors(self) -> Tensor | None:
        if len(self._visible) == len(self.tensors):
            return None
        factor = self._early_factor()
        ones = torch.ones(len(self.layers), dtype=torch.float64, device=self.comm_device)
        hidden = torch.tensor([k not in self._visible for k in self.holders], device=self.comm_device)
        return torch.where(hidden, factor.to(self.comm_device), ones)

    def _early_factor(self) -> Tensor:
        """What DeepSpeed will multiply a gradient with: 1 / (loss scale · max(1, (norm + 1e-6) / clip))."""
        zero = self._zero
        scale = torch.as_tensor(float(zero.loss_scale), dtype=torch.float64)
        if zero.clip_grad > 0.0:
            norm = torch.as_tensor(zero._global_grad_norm).double()
            scale = scale.to(norm.device) * ((norm + 1e-6) / zero.clip_grad).clamp_min(1.0)
        return scale.reciprocal()

    def _keep_probes(self, which: Sequence[int], grads: Sequence[Tensor | None]) -> None:
        """In the first training steps, remember some elements of the gradients that were taken early."""
        if self._steps >= _PROVEN_STEPS or len(self._visible) == len(self.tensors) or len(which) < len(self.layers):
            return
        factor = self._early_factor()
        for index, grad in zip(which, grads, strict=True):
            if grad is not None and self.holders[index] not in self._visible:
                self._probes[index] = (grad[:16].double() * factor.to(grad.device)).clone()

    def _compare_probes(self) -> None:
        for index in [i for i in self._probes if self.holders[i] in self._visible]:
            expected, segment = self._probes.pop(index), self.table.segments[index]
            grad = self.tensors[self.holders[index]].grad
            assert grad is not None
            found = grad.view(-1).narrow(0, segment.start, segment.numel)[:16].double()
            if not torch.allclose(found, expected.to(found.device), rtol=1e-5, atol=0.0, equal_nan=True):
                raise ZeroLayoutError(
                    f"the gradient of layer {self.layers[index].name!r} is not the one that DeepSpeed held when the "
                    "training step began: use one parameter group, and a sub_group_size that gives one sub-group"
                )

    # -- state that the library replaces -------------------------------------------------------------------------------

    def mend(self, state: Mapping[Any, dict[str, Any]]) -> None:
        """Undo the cast of an anchor: loading a Universal Checkpoint widens it to fp32."""
        for k, flat in enumerate(self.tensors):
            anchor = state[flat].get("anchor")
            if anchor is not None:
                dtype = self._anchor_dtypes.setdefault(k, anchor.dtype)
                if anchor.dtype != dtype:
                    state[flat]["anchor"] = anchor.to(dtype)


def _early_gradient(zero: Any, holder: int, numel: int) -> list[Tensor]:
    """The pieces whose concatenation DeepSpeed will make the gradient of a flat tensor."""
    pieces = zero.averaged_gradients.get(holder)
    if pieces is None:
        raise ZeroLayoutError(f"DeepSpeed has no gradient of its partition {holder}: call engine.backward(loss) first")
    parts = [piece.reshape(-1) for piece in pieces]
    if sum(part.numel() for part in parts) > numel:
        raise ZeroLayoutError(f"DeepSpeed's gradient of its partition {holder} is longer than the partition")
    return parts


def _narrow(parts: Sequence[Tensor], start: int, numel: int) -> Tensor:
    """Elements of a concatenation that is not made; mostly they lie in one of its parts."""
    found = []
    at = 0
    for part in parts:
        low, high = max(start - at, 0), min(start + numel - at, part.numel())
        if high > low:
            found.append(part[low:high])
        at += part.numel()
    result = found[0] if len(found) == 1 else torch.cat(found)
    if result.numel() != numel:
        raise ZeroLayoutError("DeepSpeed's gradient is shorter than its partition")
    return result
