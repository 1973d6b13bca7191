"""DiGraP: Directional Gradient Projection (ICLR 2025, arXiv 2502.15895), exact on sharded parameters.

For one layer at step t, with parameter θ(t−1), loss gradient g, anchor θ0, drift δ = θ(t−1) − θ0::

    d = <g, δ>      n = <δ, δ>      c = d / n   (0 where n = 0)
    t > 1:  h = Σ_rows cos( g, sign(c(t−1)) · δ(t−1) )           the hypergradient dL/dω, normalized
            ω = clip( ω − μ · Adam(h; omega_betas, ε = 1e-8), 0, omega_max )
    conflict ⇔ d < 0 :   g' = g − ω c δ                          else g' = g
    AdamW on g'

The step is :meth:`LayerwiseAdamW.step`; here are the sums that DiGraP adds, and what it makes of them. The previous
projection is not stored: its direction is ±δ(t−1), which is rebuilt from Adam's moments
(:func:`scale_digrap.optim.functional.previous_drift`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scale_digrap.optim import functional as F  # noqa: N812
from scale_digrap.optim.blocks import Block
from scale_digrap.optim.layerwise import DOT, DRIFT, GRAD, HAS_GRAD, Decision, LayerwiseAdamW, View

# A layer counts as one row (no row sums) with normalization="tensor" and below two dimensions: then DIRECTION holds
# <g, δ'> and PREVIOUS ‖δ'‖², δ' = δ(t−1); else DIRECTION holds the sum of the cosines of the whole rows.
DIRECTION, PREVIOUS = HAS_GRAD + 1, HAS_GRAD + 2
# What the last step of a layer used, without which its δ(t−1) cannot be rebuilt: schedulers change any of them.
PREVIOUS_OPTIONS = ("previous_lr", "previous_weight_decay", "previous_beta1", "previous_beta2", "previous_eps")


class DiGraP(LayerwiseAdamW):
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
        omega_lr: learning rate μ of ω, at least 0; 0 keeps ω as it is.
        omega_betas: Adam's betas for ω.
        omega_max: upper bound κ of ω, at least 0; 1 in the paper. Above 1 more than the conflicting part is removed.
        normalization: ``"row"``, the sum over rows of row cosines, a row being ``tensor.view(shape[0], -1)[r]``;
            ``"tensor"``, one cosine for the layer. On 2-D layers ``"row"`` is the authors' code. On convolutions it is
            not: a row here is one output channel, while theirs takes cosines over dimension 1, the input channels, one
            for each output channel and place in the kernel. Below two dimensions, which theirs refuses, a layer is one
            row.
        project_when: ``"conflict"``, project where <g, δ> < 0; ``"agree"``, where it is > 0.
        anchor: ``"initial"``, the value when the state is created; ``"zero"``, nothing is stored (LoRA factors); a
            mapping from names to tensors of the unsharded shapes; ``None``, no anchor, plain AdamW (new heads).
        anchor_dtype: ``"auto"``, bfloat16 where every element of the layer survives it and float32 elsewhere;
            ``"float32"``; or ``"bfloat16"``, refused where not exact.
        process_group: the ranks over which layers are complete. By default a sharded tensor's mesh tells, and plain
            tensors of equal names and shapes are copies on all ranks, which is checked. Needed only where that does not
            tell, such as an optimizer that one pipeline stage or one rank alone steps.
        torch_options: keywords of ``torch.optim.AdamW``. ``foreach`` and ``fused`` choose nothing here; ``amsgrad``,
            ``maximize``, ``capturable`` and ``differentiable`` are refused unless they are False.

    Every option but ``process_group`` can be set per group, and changed between steps: what a step used is remembered
    for the next. Keys of a group that are no options are kept and not used. The state may be replaced between steps
    (moved to the host and back, emptied for a new trial): the next step follows. Where the moments are reset, it takes
    the drift before it for that of the step before. Parameters and gradients may have any strides.

    Parameters that a library replaces before the first step (Accelerate's FSDP2) are followed by order and shape.
    Call :meth:`init_state` after sharding and loading the pre-trained weights, or let the first ``step()`` do it.

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
        *PREVIOUS_OPTIONS,
    )
    n_sums = PREVIOUS + 1

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
        **torch_options: Any,
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
        super().__init__(params, defaults, process_group, torch_options)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        for key, values in (("normalization", ("row", "tensor")), ("project_when", ("conflict", "agree"))):
            if group[key] not in values:
                raise ValueError(f"Invalid {key}: {group[key]!r} (use {' or '.join(map(repr, values))})")

    def _by_rows(self, group: Mapping[str, Any]) -> bool:
        return group["normalization"] == "row" and group["anchor"] is not None

    def _after_pack(self) -> None:
        super()._after_pack()
        layout, device = self._layout, self._packed.device
        assert layout is not None
        self._one_row = torch.tensor([not layer.by_rows for layer in layout.layers], dtype=torch.bool, device=device)
        agree = [self._option(i, "project_when") == "agree" for i in range(len(self._names))]
        self._agree = torch.tensor(agree, dtype=torch.bool, device=device)
        self._slot_layer = layout.slot_layer.to(device)

    def _read_scalars(self) -> None:
        super()._read_scalars()
        self._host_previous = self._packed[-len(PREVIOUS_OPTIONS) :].T.tolist()

    def _missing_scalar(self, index: int, key: str) -> float:
        """Checkpoints that do not say what their last step used: it is taken to be what the groups say now."""
        if key not in PREVIOUS_OPTIONS:
            return super()._missing_scalar(index, key)
        return _options_of(self.param_groups[self._group_of[index]])[PREVIOUS_OPTIONS.index(key)]

    def _history(self, index: int) -> tuple[float, ...]:
        """Steps taken, and α, λ, (β1, β2) and ε of the last one."""
        return self._host_steps[index], *self._host_previous[index]

    def _more_sums(self, view: View, block: Block, history: tuple, sums: Tensor, row_sums: Tensor) -> None:
        """<g, δ'>, ‖δ'‖², or the cosines of whole rows; of straddling rows <g, δ'>, ‖g‖², ‖δ'‖²."""
        step, lr, decay, beta1, beta2, eps = history
        if step == 0:
            return
        space = self._workspace
        m, v = block.matrix("m", self._exp_avgs, space), block.matrix("v", self._exp_avg_sqs, space)
        previous = F.previous_drift(
            view.p, view.drift, view.anchor, m, v, step, lr, decay, (beta1, beta2), eps, view.work
        )
        previous_sq = F.row_squares(previous)
        dot = F.row_dots(view.g, previous, previous)
        if block.slots is not None:
            row_sums.index_add_(1, block.slots, torch.stack([dot, view.grad_sq, previous_sq]))
        elif block.by_rows:
            sums[DIRECTION].index_add_(0, block.owner, F.cosines(dot, view.grad_sq, previous_sq))
        else:
            sums[DIRECTION].index_add_(0, block.owner, dot)
            sums[PREVIOUS].index_add_(0, block.owner, previous_sq)

    def _scale_gradients(self, sums: Tensor, factors: Tensor) -> None:
        super()._scale_gradients(sums, factors)
        sums[DIRECTION] *= torch.where(self._one_row, factors, torch.ones_like(factors))  # else cosines

    def _layer_math(self, sums: Tensor, row_sums: Tensor) -> tuple[Callable[[], None], Tensor]:
        """ω, its moments, the sign of c and the projection scale ω c, 0 where a layer is not projected."""
        groups = [(g["omega_lr"], *g["omega_betas"], g["omega_max"]) for g in self._groups]
        options = torch.tensor(groups, dtype=torch.float64).to(sums.device)[self._group_index].unbind(1)
        omega_lr, beta1, beta2, omega_max = options
        omega, exp_avg, exp_avg_sq, sign = self._packed[:4].unbind()
        previous = self._packed[-len(PREVIOUS_OPTIONS) :]
        options_now = torch.tensor([_options_of(group) for group in self._groups], dtype=torch.float64)
        options_now = options_now.to(sums.device)[self._group_index].T
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
        project = live & self._anchored & torch.where(self._agree, dot > 0, dot < 0)
        scale = torch.where(project, new_omega * coefficient, zero)
        finite = torch.isfinite(sums[: GRAD + 1]).all() & torch.isfinite(hypergrad).all()

        def commit() -> None:
            omega.copy_(new_omega)
            exp_avg.copy_(new_exp_avg)
            exp_avg_sq.copy_(new_exp_avg_sq)
            sign.copy_(torch.where(live, coefficient.sign(), sign))
            previous.copy_(torch.where(live, options_now, previous))
            self._remember(sums, live, omega=new_omega)

        return commit, torch.stack([scale, live.double(), finite.double().expand_as(scale)])

    def _update(self, grads: list[Tensor | None], decision: Decision, layers: Sequence[int]) -> None:
        super()._update(grads, decision, layers)
        for i in layers:
            if decision.live[i]:
                self._host_previous[i] = _options_of(self._groups[self._group_of[i]])


def _options_of(group: Mapping[str, Any]) -> list[float]:
    """What a step with a group's options uses, in the order of :data:`PREVIOUS_OPTIONS`."""
    return [float(value) for value in (group["lr"], group["weight_decay"], *group["betas"], group["eps"])]
