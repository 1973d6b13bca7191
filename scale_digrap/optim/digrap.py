"""DiGraP: Directional Gradient Projection (ICLR 2025, arXiv 2502.15895), exact on sharded parameters.

For one layer at step t, with parameter θ(t−1), loss gradient g, anchor θ0, drift δ = θ(t−1) − θ0::

    d = <g, δ>      n = <δ, δ>      c = d / n   (0 where n = 0)
    t > 1:  h = Σ_rows cos( g, sign(c(t−1)) · δ(t−1) )           the hypergradient dL/dω, normalized
            ω = clip( ω − μ · Adam(h; omega_betas, ε = 1e-8), 0, omega_max )
    conflict ⇔ d < 0 :   g' = g − ω c δ                          else g' = g
    AdamW on g'

A step reads top to bottom as :meth:`DiGraP.step`: the sums of the local pieces, one reduction, the scalars of all
layers at once, one look by the host, the update of the local pieces. The previous projection is not stored: its
direction is ±δ(t−1), which is rebuilt from Adam's moments (:func:`scale_digrap.optim.functional.previous_drifts`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scale_digrap.optim import functional as F  # noqa: N812
from scale_digrap.optim.anchored import AnchoredOptimizer, UnattachedError
from scale_digrap.optim.blocks import Block, Piece, make_blocks
from scale_digrap.optim.telemetry import LayerStats

logger = logging.getLogger(__name__)

# Rows of the packed sums. A layer counts as one row (no row sums) with normalization="tensor" and below two dimensions:
# then DIRECTION holds <g, δ'> and PREVIOUS ‖δ'‖²; else DIRECTION holds the sum of the cosines of the whole rows.
DOT, DRIFT, GRAD, ANCHOR, HAS_GRAD, DIRECTION, PREVIOUS, N_SUMS = range(8)


@dataclass(frozen=True)
class _Decision:
    """What a training step does to each layer, decided once for all.

    Attributes:
        scale: float64 ``[n_layers]``: projection scale ω c, 0 where a layer is not projected.
        scales: the same on the host.
        live: which layers move.
    """

    scale: Tensor
    scales: list[float]
    live: list[bool]


class DiGraP(AnchoredOptimizer):
    r"""AdamW with DiGraP's projection: where the gradient conflicts with the pull back to the pre-trained weights, part
    of the conflicting component is removed; how much, ω, is learned per layer.

    Works unchanged on plain tensors, under DDP, and on FSDP2, HSDP, tensor-parallel and FSDP1
    (``use_orig_params=True``) parameters, with one all-reduce per step for all layers. All ranks of ``process_group``
    step together.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either. Names appear in telemetry and errors.
        lr: learning rate α, a float or a 0-d tensor.
        betas: Adam's (β1, β2) for the parameters.
        eps: Adam's ε, outside the root.
        weight_decay: decoupled weight decay λ towards zero, as in AdamW.
        omega_lr: learning rate μ of ω.
        omega_betas: Adam's betas for ω.
        omega_max: upper bound κ of ω.
        normalization: ``"row"``, the sum over rows of row cosines; ``"tensor"``, one cosine for the layer.
        project_when: ``"conflict"``, project where <g, δ> < 0; ``"agree"``, where it is > 0.
        anchor: ``"initial"``, the value when the state is created; ``"zero"``, nothing is stored (LoRA factors); a
            mapping from names to tensors of the unsharded shapes; ``None``, no anchor, plain AdamW (new heads).
        anchor_dtype: ``"auto"``, bfloat16 where every element of the layer survives it and float32 elsewhere;
            ``"float32"``; or ``"bfloat16"``, refused where not exact.
        process_group: the ranks over which layers are complete; the world by default. Needed only where tensors do not
            tell, such as an optimizer that one pipeline stage or one rank alone steps.

    Every option but ``process_group`` can be set per group. Call :meth:`init_state` after sharding and loading the
    pre-trained weights, or let the first ``step()`` do it.

    Raises:
        ValueError: an option out of range or unknown, an anchor mapping that does not fit; at the latest by the first
            step, parameters in bf16 or fp16.
        RuntimeError: sparse gradients.

    Example::

        optimizer = DiGraP(model.named_parameters(), lr=1e-5)
        optimizer = DiGraP([{"params": lora, "anchor": "zero"}, {"params": head, "anchor": None}], lr=1e-3)
    """

    layer_scalars = (
        "omega",
        "omega_exp_avg",
        "omega_exp_avg_sq",
        "conflict_sign",
        "conflict_count",
        "previous_lr",
        "previous_weight_decay",
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        omega_lr: float = 0.5,
        omega_betas: tuple[float, float] = (0.9, 0.999),
        omega_max: float = 1.0,
        normalization: str = "row",
        project_when: str = "conflict",
        anchor: str | Mapping[str, Tensor] | None = "initial",
        anchor_dtype: str | torch.dtype = "auto",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "omega_lr": omega_lr,
            "omega_betas": omega_betas,
            "omega_max": omega_max,
            "normalization": normalization,
            "project_when": project_when,
            "anchor": anchor,
            "anchor_dtype": str(anchor_dtype).removeprefix("torch."),
        }
        #: Steps left out for all layers on all ranks because a sum was not finite.
        self.skipped_steps = 0
        super().__init__(params, defaults, process_group)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        if not group["omega_lr"] >= 0.0:
            raise ValueError(f"Invalid omega_lr: {group['omega_lr']} (must be at least 0)")
        if not 0.0 <= group["omega_max"] <= 1.0:
            raise ValueError(f"Invalid omega_max: {group['omega_max']} (must be in [0, 1])")
        for key, values in (("normalization", ("row", "tensor")), ("project_when", ("conflict", "agree"))):
            if group[key] not in values:
                raise ValueError(f"Invalid {key}: {group[key]!r} (use {' or '.join(map(repr, values))})")

    def _by_rows(self, group: Mapping[str, Any]) -> bool:
        return group["normalization"] == "row" and group["anchor"] is not None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("skipped_steps", 0)

    def _reset_caches(self) -> None:
        super()._reset_caches()
        self._last: dict[str, Tensor] = {}
        self._decision: _Decision | None = None

    # -- set-up --------------------------------------------------------------------------------------------------------

    def _after_pack(self) -> None:
        """Rebuild what follows from layout and state: views of the moments, blocks, host copies of steps and α."""
        layout, count = self._layout, len(self._names)
        assert layout is not None
        self._last = {}
        self._groups: Sequence[dict[str, Any]] = self.param_groups
        self._bind()
        self._step_views = list(self._steps.unbind())
        self._host_steps = [int(step) for step in self._steps.tolist()]
        scalars = dict(zip(self.layer_scalars, self._packed.tolist(), strict=True))
        self._host_lrs, self._host_decays = scalars["previous_lr"], scalars["previous_weight_decay"]
        device = self._packed.device
        self._group_index = torch.tensor(self._group_of, dtype=torch.int64, device=device)
        anchored = [self._anchor_kind_of(i) is not None for i in range(count)]
        self._anchored = torch.tensor(anchored, dtype=torch.bool, device=device)
        self._one_row = torch.tensor([not layer.by_rows for layer in layout.layers], dtype=torch.bool, device=device)
        agree = [self._option(i, "project_when") == "agree" for i in range(count)]
        self._agree = torch.tensor(agree, dtype=torch.bool, device=device)
        self._slot_layer = layout.slot_layer.to(device)
        self._workspace = F.Workspace(device)
        kinds = [(self._group_of[i], anchored[i], anchor is not None) for i, anchor in enumerate(self._anchors)]
        self._blocks = make_blocks(layout, self._locals, kinds, device)
        # Constant, and sent with every step's sums: ‖θ0‖ then needs no collective of its own.
        self._anchor_sums = torch.zeros(count, dtype=torch.float64, device=device)
        for index, anchor in enumerate(self._anchors):
            if anchor is not None and anchor.numel():
                parts = anchor.reshape(-1).split(1 << 22)
                self._anchor_sums[index] = sum(part.float().square().sum(dtype=torch.float64) for part in parts)

    def _bind(self) -> None:
        """Every layer's local elements: of its parameter, its moments and its anchor."""
        layout, indices = self._layout, range(len(self._names))
        assert layout is not None
        states = [self._state_of(i) for i in indices]
        self._locals = [layout.local(i, self._tensor_of(i)) for i in indices]
        self._exp_avgs = [layout.local(i, states[i]["exp_avg"]) for i in indices]
        self._exp_avg_sqs = [layout.local(i, states[i]["exp_avg_sq"]) for i in indices]
        self._anchors = [layout.local(i, states[i]["anchor"]) if "anchor" in states[i] else None for i in indices]

    def _option(self, index: int, key: str) -> Any:
        return self._groups[self._group_of[index]][key]

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
        if layout.rebound(self.state):
            self._bind()
        elif not self._attached:
            self._locals = [layout.local(i, param) for i, param in enumerate(layout.tensors)]
        if turn.first:
            grads = self._complete(layout.local_grads())
            self._decision = self._decide(*grads)
        else:
            grads = self._complete(layout.local_grads(turn.layers), turn.layers)
        if self._decision is not None:
            self._update(grads[0], self._decision, turn.layers)
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

    def _decide(self, grads: list[Tensor | None], present: list[bool]) -> _Decision | None:
        """The sums of all layers, the one reduction, the scalars; ``None`` where the step is left out."""
        layout = self._layout
        assert layout is not None
        sums, row_sums = self._local_sums(grads, present)
        layout.reduce_(sums, row_sums)
        commit, report = self._layer_math(sums, row_sums)

        # The step's one look at the device: how far each layer is projected, which layers move, whether all is finite.
        scales, moves, finite = report.tolist()
        if not finite[0]:
            self._skip(sums)
            return None
        if self._is_state_probe(sums):
            return None
        commit()
        return _Decision(report[0], scales, [flag > 0 for flag in moves])

    def _local_sums(self, grads: list[Tensor | None], present: list[bool]) -> tuple[Tensor, Tensor]:
        """This rank's part of every layer's sums; ``present`` tells which gradients autograd has made here.

        Returns:
            float64 ``[N_SUMS, n_layers]``, and float64 ``[3, n_slots]`` of <g, δ'>, ‖g‖², ‖δ'‖² of straddling rows.
        """
        layout, device, params = self._layout, self._packed.device, self._locals
        assert layout is not None
        sums = torch.zeros((N_SUMS, len(params)), dtype=torch.float64, device=device)
        row_sums = torch.zeros((3, layout.n_slots), dtype=torch.float64, device=device)
        sums[ANCHOR] = self._anchor_sums
        sums[HAS_GRAD] = torch.tensor(present, dtype=torch.float64).to(device)
        space = self._workspace
        for block, (step, lr, decay) in self._batches(grads):
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
            if step == 0:
                continue
            m, v = block.matrix("m", self._exp_avgs, space), block.matrix("v", self._exp_avg_sqs, space)
            group = self._groups[block.group]
            previous = F.previous_drift(p, drift, a, m, v, step, lr, decay, group["betas"], group["eps"], work)
            previous_sq = F.row_squares(previous)
            dot = F.row_dots(g, previous, previous)
            if block.slots is not None:
                row_sums.index_add_(1, block.slots, torch.stack([dot, grad_sq, previous_sq]))
            elif block.by_rows:
                sums[DIRECTION].index_add_(0, block.owner, F.cosines(dot, grad_sq, previous_sq))
            else:
                sums[DIRECTION].index_add_(0, block.owner, dot)
                sums[PREVIOUS].index_add_(0, block.owner, previous_sq)
        factors = layout.grad_factors()
        if factors is not None:
            factors = factors.to(device)
            sums[DOT] *= factors
            sums[GRAD] *= factors.square()
            sums[DIRECTION] *= torch.where(self._one_row, factors, torch.ones_like(factors))  # else cosines
        return sums, row_sums

    def _anchor_matrix(self, block: Block) -> Tensor | None:
        """θ0 of a block; ``None`` where it is zero."""
        stored = self._anchors[block.pieces[0].index] is not None
        return block.matrix("a", self._anchors, self._workspace) if stored else None

    def _batches(self, grads: list[Tensor | None]) -> Iterator[tuple[Block, tuple[int, float, float]]]:
        """Blocks of the layers with a gradient here, with the steps taken, α and λ that their last step used."""
        for block in self._blocks:
            histories: dict[tuple[int, float, float], list[Piece]] = {}
            for piece in block.pieces:
                i = piece.index
                if grads[i] is not None:
                    history = (self._host_steps[i], self._host_lrs[i], self._host_decays[i])
                    histories.setdefault(history, []).append(piece)
            for history, pieces in histories.items():
                yield block.only(pieces), history

    def _layer_math(self, sums: Tensor, row_sums: Tensor) -> tuple[Callable[[], None], Tensor]:
        """All layers' scalars at once, from the reduced sums; no host sync.

        Returns:
            a function that writes the new scalars, and float64 ``[3, n_layers]``: projection scale ω c (0 where a layer
            is not projected), whether the layer moves, whether all is finite.
        """
        groups = [
            (g["omega_lr"], *g["omega_betas"], g["omega_max"], float(g["lr"]), g["weight_decay"]) for g in self._groups
        ]
        options = torch.tensor(groups, dtype=torch.float64).to(sums.device)[self._group_index].unbind(1)
        omega_lr, beta1, beta2, omega_max, lr, weight_decay = options
        omega, exp_avg, exp_avg_sq, sign, count, previous_lr, previous_decay = self._packed.unbind()
        zero = torch.zeros_like(omega)

        live = sums[HAS_GRAD] > 0
        step = self._steps.double() + live
        cosine = torch.where(self._one_row, F.cosines(sums[DIRECTION], sums[GRAD], sums[PREVIOUS]), sums[DIRECTION])
        cosine = cosine.index_add(0, self._slot_layer, F.cosines(*row_sums))
        # proj(t−1) = c(t−1) δ(t−1): with c(t−1) = 0, as at t = 2, what was rebuilt is rounding noise and must not count
        hypergrad = torch.where(sign == 0, zero, sign * cosine)
        learned = live & self._anchored & (step > 1)
        new = F.next_omega(omega, exp_avg, exp_avg_sq, hypergrad, step.clamp_min(1), omega_lr, beta1, beta2, omega_max)
        new_omega, new_exp_avg, new_exp_avg_sq = (
            torch.where(learned, fresh, old) for fresh, old in zip(new, (omega, exp_avg, exp_avg_sq), strict=True)
        )
        dot, drift_sq = sums[DOT], sums[DRIFT]
        coefficient = torch.where(drift_sq > 0, dot / drift_sq, zero)
        conflict = dot < 0
        project = live & self._anchored & torch.where(self._agree, dot > 0, conflict)
        scale = torch.where(project, new_omega * coefficient, zero)
        finite = torch.isfinite(sums[: GRAD + 1]).all() & torch.isfinite(hypergrad).all()
        # A layer that did not take part keeps its drift; its gradient is 0.
        if self._last:
            sums[DRIFT] = torch.where(live, sums[DRIFT], self._last["sums"][DRIFT])
        last = {"sums": sums, "omega": new_omega, "conflict": conflict}

        def commit() -> None:
            omega.copy_(new_omega)
            exp_avg.copy_(new_exp_avg)
            exp_avg_sq.copy_(new_exp_avg_sq)
            sign.copy_(torch.where(live, coefficient.sign(), sign))
            count.add_(live & conflict)
            previous_lr.copy_(torch.where(live, lr, previous_lr))
            previous_decay.copy_(torch.where(live, weight_decay, previous_decay))
            self._steps.add_(live)
            self._last = last

        return commit, torch.stack([scale, live.double(), finite.double().expand_as(scale)])

    def _update(self, grads: list[Tensor | None], decision: _Decision, layers: Sequence[int]) -> None:
        """AdamW on the local pieces of some layers: projected ones block by block, the others as they are."""
        params, scale, scales = self._locals, decision.scale, decision.scales
        due = [False] * len(params)
        for i in layers:
            due[i] = decision.live[i]
            if due[i]:
                group = self._groups[self._group_of[i]]
                self._host_steps[i] += 1
                self._host_lrs[i], self._host_decays[i] = float(group["lr"]), group["weight_decay"]
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
                    parts[k] = torch.empty_like(tensors[0]).copy_(parts[k].view(tensors[0].shape))
            p, m, v = (list(column) for column in zip(*targets, strict=True))
            self._adamw(self._groups[block.group], p, parts, m, v, [piece.index for piece in pieces])

        if self._attached:
            self._count_held(layers, self._host_steps)

    def _adamw(self, group: Mapping[str, Any], p: list, g: list, m: list, v: list, indices: list[int]) -> None:
        options = {key: group[key] for key in ("betas", "eps", "weight_decay")} | {"lr": float(group["lr"])}
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
        omega, conflict = self._last["omega"].tolist(), self._last["conflict"].tolist()
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
