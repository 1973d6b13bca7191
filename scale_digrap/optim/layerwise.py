"""The step that the methods share: AdamW whose update of each layer depends on sums over the whole layer.

A step reads top to bottom as :meth:`LayerwiseAdamW.step`: the sums of the local pieces, one reduction, the scalars of
all layers at once, one look by the host, the update of the local pieces. A method says what it makes of the sums in
:meth:`LayerwiseAdamW._layer_math`.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scale_digrap.optim import functional as F  # noqa: N812
from scale_digrap.optim.anchored import AnchoredOptimizer, StateError, UnattachedError
from scale_digrap.optim.blocks import Block, Piece, make_blocks
from scale_digrap.optim.telemetry import LayerStats

logger = logging.getLogger(__name__)

# Rows of the packed sums of every method; its own follow. δ = θ(t−1) − θ0.
DOT, DRIFT, GRAD, ANCHOR, HAS_GRAD = range(5)  # <g, δ>, ‖δ‖², ‖g‖², ‖θ0‖², ranks with a gradient


@dataclass(frozen=True)
class Decision:
    """What a training step does to each layer, decided once for all.

    Attributes:
        scale: float64 ``[n_layers]``: the gradient becomes g − scale δ.
        scales: the same on the host.
        live: which layers move.
        marks: on the host, one list over the layers for every further row of the method's report.
    """

    scale: Tensor
    scales: list[float]
    live: list[bool]
    marks: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class View:
    """A block's matrices during the sums, ``[rows, cols]``: g, θ, θ0 (``None``: zero), δ, and one to write to.

    Attributes:
        grad_sq: float64 ``[rows]``, ‖g‖² of every row.
    """

    g: Tensor
    p: Tensor
    anchor: Tensor | None
    drift: Tensor
    work: Tensor
    grad_sq: Tensor


class LayerwiseAdamW(AnchoredOptimizer):
    """Base of the methods; works unchanged on every way of sharding that a :class:`ShardLayout` describes.

    All ranks of ``process_group`` step together. Subclasses give :meth:`_layer_math`, and where they need them, more
    rows of sums and something to do after the update.
    """

    layer_scalars: tuple[str, ...] = ("conflict_count",)
    #: Rows of the packed sums.
    n_sums = HAS_GRAD + 1

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        process_group: dist.ProcessGroup | None = None,
        torch_options: Mapping[str, Any] | None = None,
    ) -> None:
        #: Steps left out for all layers on all ranks because a sum was not finite.
        self.skipped_steps = 0
        super().__init__(params, defaults, process_group, torch_options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("skipped_steps", 0)

    def _reset_caches(self) -> None:
        super()._reset_caches()
        self._last: dict[str, Tensor] = {}
        self._decision: Decision | None = None

    def _fill_state(self) -> None:
        last = self._last if self._shown else {}
        super()._fill_state()
        self._last = last  # telemetry tells of the last step, whatever a client has done since

    # -- what a method is ----------------------------------------------------------------------------------------------

    def _layer_math(self, sums: Tensor, row_sums: Tensor) -> tuple[Callable[[], None], Tensor]:
        """All layers' scalars at once, from the reduced sums; no host sync.

        Args:
            sums: float64 ``[n_sums, n_layers]``, complete.
            row_sums: float64 ``[3, n_slots]``, complete.

        Returns:
            a function that writes the new scalars and :attr:`_last`, and float64 ``[3 + k, n_layers]``: the scale of δ
            in the gradient, whether the layer moves, whether all is finite, and k rows for :attr:`Decision.marks`.
        """
        raise NotImplementedError

    def _more_sums(self, view: View, block: Block, history: tuple, sums: Tensor, row_sums: Tensor) -> None:
        """Add to the method's own rows of sums what an anchored block holds; ``view.work`` may be written to."""

    def _history(self, index: int) -> tuple:
        """What :meth:`_more_sums` must know of a layer's past, equal for all pieces that it gets at a time."""
        return ()

    # -- set-up --------------------------------------------------------------------------------------------------------

    def _after_pack(self) -> None:
        """Rebuild what follows from layout and state: blocks, host copies of the scalars, ‖θ0‖²."""
        layout, count = self._layout, len(self._names)
        assert layout is not None
        self._last = {}
        self._groups: Sequence[dict[str, Any]] = self.param_groups
        self._step_views = list(self._steps.unbind())
        self._read_scalars()
        device = self._packed.device
        self._group_index = torch.tensor(self._group_of, dtype=torch.int64, device=device)
        # Told here: ZeRO hides parameter groups during a step.
        self._has_anchor = [self._anchor_kind_of(i) is not None for i in range(count)]
        self._anchored = torch.tensor(self._has_anchor, dtype=torch.bool, device=device)
        self._workspace = F.Workspace(device)
        # Constant, and sent with every step's sums: ‖θ0‖ then needs no collective of its own.
        self._anchor_sums = torch.zeros(count, dtype=torch.float64, device=device)
        self._anchors_seen: list[Any] = [None] * count
        self._kinds: list[tuple] = []
        self._bind()
        self._release()

    def _read_scalars(self) -> None:
        """Host copies of the scalars that the sums need, taken anew where a client has written to the state."""
        self._host_steps = [int(step) for step in self._steps.tolist()]
        self._note_scalars()

    def _note_scalars(self) -> None:
        self._versions = self._steps._version, self._packed._version

    def _bind(self) -> None:
        """Every layer's local elements: of its parameter, its moments and its anchor.

        Held for one training step only. Between two steps the state belongs to ``self.state``: whoever moves it to the
        host frees the memory, and whoever replaces it is followed.

        Raises:
            StateError: a tensor of the state of another shape, dtype or device than its layer.
        """
        layout, count = self._layout, len(self._names)
        assert layout is not None
        self._locals = [layout.local(i, self._tensor_of(i)) for i in range(count)]
        self._strides = [F.dense_strides(param) for param in self._locals]
        self._exp_avgs = self._held("exp_avg")
        self._exp_avg_sqs = self._held("exp_avg_sq")
        self._anchors = self._held("anchor")
        for index, anchor in enumerate(self._anchors):
            seen, state = self._anchors_seen[index], self._state_of(index)
            if anchor is None or (seen is not None and seen() is state["anchor"]):
                continue
            self._anchors_seen[index] = weakref.ref(state["anchor"])
            parts = anchor.reshape(-1).split(1 << 22)
            self._anchor_sums[index] = sum(part.float().square().sum(dtype=torch.float64) for part in parts)
        kinds = [
            (self._group_of[i], self._has_anchor[i], self._anchors[i] is not None, p.is_contiguous())
            for i, p in enumerate(self._locals)
        ]
        if kinds != self._kinds:
            self._kinds = kinds
            self._blocks = make_blocks(layout, self._locals, [kind[:3] for kind in kinds], self._packed.device)

    def _held(self, key: str) -> list[Any]:
        """One kind of state of all layers, where the layers' strides say that it should lie; ``None`` where there is
        none."""
        layout = self._layout
        assert layout is not None
        found: list[Any] = []
        for index, param in enumerate(self._locals):
            whole = self._state_of(index).get(key)
            if whole is None:
                found.append(None)
                continue
            here = layout.local(index, whole)
            if not param.numel():
                found.append(here)
                continue
            if here.shape != param.shape or here.device != param.device or not self._fits(key, here, param):
                raise StateError(
                    f"{key} of layer {self._names[index]!r} is {tuple(here.shape)} {here.dtype} on {here.device}, but "
                    f"the layer is {tuple(param.shape)} {param.dtype} on {param.device}: put the state back as it was "
                    "before step()"
                )
            if here.stride() != self._strides[index]:
                here = layout.local(index, self._lay_out(index, key, whole))
            found.append(here)
        return found

    @staticmethod
    def _fits(key: str, here: Tensor, param: Tensor) -> bool:
        return here.dtype == param.dtype or (key == "anchor" and here.dtype.is_floating_point)

    def _lay_out(self, index: int, key: str, whole: Tensor) -> Tensor:
        """The same values in the strides of the layer, put into its state."""
        layout, tensor = self._layout, self._tensor_of(index)
        assert layout is not None
        fresh = torch.empty_like(tensor, dtype=whole.dtype, requires_grad=False)
        layout.local(index, fresh).copy_(layout.local(index, whole))
        self.state[tensor][key] = fresh
        return fresh

    def _release(self) -> None:
        self._locals, self._exp_avgs, self._exp_avg_sqs, self._anchors = [], [], [], []

    def _option(self, index: int, key: str) -> Any:
        return self._groups[self._group_of[index]][key]

    def _options(self, *keys: str) -> tuple[Tensor, ...]:
        """Options of all layers, float64 ``[n_layers]`` each, on the device of the sums."""
        values = [[float(group[key]) for key in keys] for group in self._groups]
        return torch.tensor(values, dtype=torch.float64).to(self._packed.device)[self._group_index].unbind(1)

    # -- the step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of all layers.

        A layer without a gradient on every rank keeps its parameter and its state. Where any sum is not finite, nothing
        changes anywhere and :attr:`skipped_steps` counts it.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            the closure's loss, or ``None``.

        Raises:
            RuntimeError: a sparse gradient; DeepSpeed has replaced the parameters and nobody has called
                ``scale_digrap.deepspeed.attach``.
            ValueError: see :meth:`init_state`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self.init_state()
        except UnattachedError:
            if self._zero_gradients():
                return loss
            raise
        layout = self._layout
        assert layout is not None
        if not self._names:
            return loss
        turn = layout.turn(self.param_groups)
        self._groups = turn.groups
        if turn.first:
            layout.mend(self.state)
            self._bind()
            if self._packed.device.type == "cpu" or self._versions != (self._steps._version, self._packed._version):
                self._read_scalars()
            grads = self._complete(layout.local_grads())
            self._decision = self._decide(*grads)
        else:
            grads = self._complete(layout.local_grads(turn.layers), turn.layers)
        if self._decision is not None:
            self._update(grads[0], self._decision, turn.layers)
        self._note_scalars()
        if turn.last:
            self._release()
        return loss

    def _complete(
        self, given: list[Tensor | None], indices: Sequence[int] | None = None
    ) -> tuple[list[Tensor | None], list[bool]]:
        """One gradient per layer, and which autograd has made here.

        Another rank may have a gradient for its part of a layer: then this part's is zero, and its drift counts.
        """
        assert self._layout is not None
        grads: list[Tensor | None] = [None] * len(self._names)
        for index, grad in zip(range(len(grads)) if indices is None else indices, given, strict=True):
            grads[index] = grad
        present = [grad is not None for grad in grads]
        if self._layout.world_size > 1:
            for index in range(len(grads)) if indices is None else indices:
                if grads[index] is None:
                    grads[index] = torch.zeros_like(self._locals[index])
        return grads, present

    def _decide(self, grads: list[Tensor | None], present: list[bool]) -> Decision | None:
        """The sums of all layers, the one reduction, the scalars; ``None`` where the step is left out."""
        layout = self._layout
        assert layout is not None
        sums, row_sums = self._local_sums(grads, present)
        if layout.copies_assumed:
            layout.prove_copies(sums[GRAD], present)
        layout.reduce_(sums, row_sums)
        commit, report = self._layer_math(sums, row_sums)

        # The step's one look at the device: how far each layer is projected, which layers move, whether all is finite.
        scales, moves, finite, *marks = report.tolist()
        if not finite[0]:
            self._skip(sums)
            return None
        if self._is_state_probe(sums):
            return None
        commit()
        return Decision(report[0], scales, [flag > 0 for flag in moves], marks)

    def _local_sums(self, grads: list[Tensor | None], present: list[bool]) -> tuple[Tensor, Tensor]:
        """This rank's part of every layer's sums; ``present`` tells which gradients autograd has made here.

        Returns:
            float64 ``[n_sums, n_layers]``, and float64 ``[3, n_slots]`` for the rows that straddle ranks.
        """
        layout, device, params = self._layout, self._packed.device, self._locals
        assert layout is not None
        sums = torch.zeros((self.n_sums, len(params)), dtype=torch.float64, device=device)
        row_sums = torch.zeros((3, layout.n_slots), dtype=torch.float64, device=device)
        sums[ANCHOR] = self._anchor_sums
        sums[HAS_GRAD] = torch.tensor(present, dtype=torch.float64).to(device)
        space = self._workspace
        for block, history in self._batches(grads):
            g = block.matrix("g", grads, space, params[block.pieces[0].index].dtype)
            grad_sq = F.row_squares(g)
            sums[GRAD].index_add_(0, block.owner, grad_sq)
            if not block.anchored:
                continue
            p = block.matrix("p", params, space)
            a = self._anchor_matrix(block)
            work = space.take("work", p.shape, p.dtype)
            drift = F.drift(p, a, space.take("drift", p.shape, p.dtype))
            sums[DOT].index_add_(0, block.owner, F.row_dots(g, drift, work))
            sums[DRIFT].index_add_(0, block.owner, F.row_squares(drift))
            self._more_sums(View(g, p, a, drift, work, grad_sq), block, history, sums, row_sums)
        factors = layout.grad_factors()
        if factors is not None:
            self._scale_gradients(sums, factors.to(device))
        return sums, row_sums

    def _scale_gradients(self, sums: Tensor, factors: Tensor) -> None:
        """Sums of gradients that an engine has yet to multiply by a factor per layer."""
        sums[DOT] *= factors
        sums[GRAD] *= factors.square()

    def _anchor_matrix(self, block: Block) -> Tensor | None:
        """θ0 of a block; ``None`` where it is zero."""
        stored = self._anchors[block.pieces[0].index] is not None
        return block.matrix("a", self._anchors, self._workspace) if stored else None

    def _batches(self, grads: list[Tensor | None]) -> Iterator[tuple[Block, tuple]]:
        """Blocks of the layers with a gradient here, each with the history that its layers share."""
        for block in self._blocks:
            histories: dict[tuple, list[Piece]] = {}
            for piece in block.pieces:
                if grads[piece.index] is not None:
                    histories.setdefault(self._history(piece.index), []).append(piece)
            for history, pieces in histories.items():
                yield block.only(pieces), history

    def _remember(self, sums: Tensor, live: Tensor, **more: Tensor) -> None:
        """Keep a step's sums for telemetry. A layer that did not take part keeps its drift; its gradient is 0."""
        if self._last:
            sums[DRIFT] = torch.where(live, sums[DRIFT], self._last["sums"][DRIFT])
        conflict = sums[DOT] < 0
        self._packed[self.layer_scalars.index("conflict_count")].add_(live & conflict)
        self._steps.add_(live)
        self._last = {"sums": sums, "conflict": conflict, **more}

    def _update(self, grads: list[Tensor | None], decision: Decision, layers: Sequence[int]) -> None:
        """AdamW on the local pieces of some layers, with g − scale δ block by block where the scale is not 0."""
        params, scale, scales = self._locals, decision.scale, decision.scales
        due = [False] * len(params)
        for i in layers:
            due[i] = decision.live[i]
            if due[i]:
                self._host_steps[i] += 1
        for number, dtype in sorted({(self._group_of[i], params[i].dtype) for i in layers}, key=str):
            group = self._groups[number]
            plain = [
                i
                for i in layers
                if self._group_of[i] == number
                and params[i].dtype == dtype
                and due[i]
                and scales[i] == 0
                and params[i].numel()
            ]
            moments = [self._exp_avgs[i] for i in plain], [self._exp_avg_sqs[i] for i in plain]
            self._adamw(group, [params[i] for i in plain], [grads[i] for i in plain], *moments, plain)
        for whole in self._blocks:
            pieces = [piece for piece in whole.pieces if due[piece.index] and scales[piece.index] != 0]
            if not pieces:
                continue
            block = whole.only(pieces)
            gathered, space = block.matrix("p", params, self._workspace), self._workspace
            drift = F.drift(gathered, self._anchor_matrix(block), space.take("drift", gathered.shape, gathered.dtype))
            work = space.take("work", gathered.shape, gathered.dtype)
            factor = scales[pieces[0].index] if len(pieces) == 1 else scale[block.owner]
            g = block.matrix("g", grads, space, gathered.dtype)
            projected = F.projected_gradient(g, drift, factor, work)
            parts = list(projected.split([piece.rows for piece in pieces]))
            targets = []
            for k, piece in enumerate(pieces):
                tensors = (params[piece.index], self._exp_avgs[piece.index], self._exp_avg_sqs[piece.index])
                if tensors[0].is_contiguous():
                    targets.append([piece.of(tensor) for tensor in tensors])
                else:  # channels-last and the like: such a layer is one piece, updated in its own strides
                    targets.append(list(tensors))
                    parts[k] = parts[k].view(tensors[0].shape)
            p, m, v = (list(column) for column in zip(*targets, strict=True))
            self._adamw(self._groups[block.group], p, parts, m, v, [piece.index for piece in pieces])

        if self._attached:
            self._count_held(layers, self._host_steps)

    def _adamw(self, group: Mapping[str, Any], p: list, g: list, m: list, v: list, indices: list[int]) -> None:
        options: dict[str, Any] = {key: float(group[key]) for key in ("lr", "eps", "weight_decay")}
        options["betas"] = tuple(float(beta) for beta in group["betas"])
        steps = [self._step_views[index] for index in indices]
        F.adamw_(p, g, m, v, steps, [self._host_steps[index] for index in indices], options)

    def _skip(self, sums: Tensor) -> None:
        """Count a step that is left out, and name the layers; every rank has the same sums and does the same."""
        self.skipped_steps += 1
        bad = (~torch.isfinite(sums[: GRAD + 1])).any(0).tolist()
        names = [name for name, flag in zip(self._names, bad, strict=True) if flag]
        if not dist.is_initialized() or dist.get_rank(self._process_group) == 0:
            logger.warning(
                "step skipped on all ranks (%d so far): non-finite sums in %d of %d layers, first %s",
                self.skipped_steps, len(names), len(self._names), ", ".join(names[:5]) or "the hypergradient",
            )  # fmt: skip

    def _is_state_probe(self, sums: Tensor) -> bool:
        """Whether this is ``torch.distributed.checkpoint`` stepping with zero gradients and lr = 0 to create state.

        Counting that step would lose t = 1, where ω must still be 0 and no previous projection exists.
        """
        if self._attached or any(self._host_steps) or any(float(group["lr"]) != 0 for group in self._groups):
            return False
        return float(sums[GRAD].sum()) == 0.0

    # -- telemetry -----------------------------------------------------------------------------------------------------

    def layer_stats(self) -> dict[str, LayerStats]:
        """The last step's figures of every layer that has an anchor, equal on all ranks, without a collective.

        Raises:
            RuntimeError: no step has been taken since the optimizer was made or loaded.
        """
        sums = self._last_sums()
        dot, drift_sq, grad_sq, anchor_sq = sums[: ANCHOR + 1].tolist()
        conflict = self._last["conflict"].tolist()
        omega = self._last["omega"].tolist() if "omega" in self._last else [math.nan] * len(conflict)
        count = self._packed[self.layer_scalars.index("conflict_count")].tolist()
        stats = {}
        for i, name in enumerate(self._names):
            if self._anchor_kind_of(i) is None:
                continue
            norms = math.sqrt(grad_sq[i]) * math.sqrt(drift_sq[i])
            stats[name] = LayerStats(
                omega=omega[i],
                conflict=bool(conflict[i]),
                conflict_rate=count[i] / max(self._host_steps[i], 1),
                drift=math.sqrt(drift_sq[i]),
                relative_drift=math.sqrt(drift_sq[i] / anchor_sq[i]) if anchor_sq[i] > 0 else math.nan,
                cosine=dot[i] / norms if norms > 0 else 0.0,
                grad_norm=math.sqrt(grad_sq[i]),
            )
        return stats

    def grad_norm(self) -> float:
        """‖g‖ over all layers of the last step, as the optimizer was given it; without a collective.

        Raises:
            RuntimeError: no step has been taken since the optimizer was made or loaded.
        """
        return math.sqrt(self._last_sums()[GRAD].sum().item())

    def _last_sums(self) -> Tensor:
        if "sums" not in self._last:
            raise RuntimeError("no step has been taken yet: telemetry describes the last step()")
        return self._last["sums"]
