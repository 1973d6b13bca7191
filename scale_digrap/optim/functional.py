"""The maths on local, plain tensors: no layer is whole here, no rank is known.

Symbols as in :mod:`scale_digrap.optim.digrap`. Matrices are ``[rows, cols]``: rows of one or several layers, or parts
of rows, one under another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# The devices for which torch ships a fused AdamW kernel.
_FUSED_DEVICES = frozenset({"cpu", "cuda", "xpu", "mps"})


class Workspace:
    """Temporaries of one block, used again for the next.

    On a CPU a fresh megabyte costs more in page faults than the arithmetic in it (measured: 47 ms against 143 ms for
    the sums of 20 M elements); elsewhere the caching allocator does this already.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, role: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized ``[rows, cols]``, valid until the next call for the same role and dtype."""
        rows, cols = shape
        if self.device.type != "cpu":
            return torch.empty((rows, cols), dtype=dtype, device=self.device)
        buffer = self._buffers.get((role, dtype))
        if buffer is None or buffer.numel() < rows * cols:
            buffer = self._buffers[role, dtype] = torch.empty(rows * cols, dtype=dtype)
        return buffer[: rows * cols].view(rows, cols)

    def gather(self, role: str, pieces: Sequence[Tensor], rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """``[rows, cols]``: pieces of equal ``cols`` as one matrix of ``dtype`` (theirs by default).

        A single piece that has the dtype is not copied.
        """
        dtype = dtype or pieces[0].dtype
        same = all(piece.dtype == dtype for piece in pieces)
        if same and len(pieces) == 1:
            return pieces[0]
        out = self.take(role, (rows, pieces[0].shape[1]), dtype)
        if same:
            return torch.cat(list(pieces), out=out)
        torch._foreach_copy_(list(out.split([piece.shape[0] for piece in pieces])), list(pieces))
        return out


def drift(params: Tensor, anchors: Tensor | None, out: Tensor) -> Tensor:
    """δ = θ − θ0 in the parameters' dtype. Without anchors (θ0 = 0) it is ``params`` itself: not to be written to.

    Args:
        out: like ``params``, overwritten.
    """
    if anchors is None:
        return params
    return torch.sub(params, out.copy_(anchors), out=out)


def previous_drift(
    params: Tensor,
    drift: Tensor,
    anchors: Tensor | None,
    exp_avgs: Tensor,
    exp_avg_sqs: Tensor,
    step: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    out: Tensor,
) -> Tensor:
    """δ of one step earlier, rebuilt from what Adam keeps instead of from a stored copy of the model.

    θ(t−2) = ( θ(t−1) + α m̂ / (√v̂ + ε) ) / (1 − α λ), all as of step t−1. Relative error about 5e-6 with fp32 weights.

    Args:
        params, drift, anchors, exp_avgs, exp_avg_sqs: ``[rows, cols]``.
        step: t − 1, at least 1.
        lr, weight_decay, betas, eps: α, λ, (β1, β2) and ε that step t − 1 used: schedulers change any of them.
        out: like ``params``, overwritten and returned.
    """
    # α m̂ / (√v̂ + ε) = k m / (√v + ε r), with the bias corrections in two scalars: two passes less.
    root = math.sqrt(1 - betas[1] ** step)
    factor = lr * root / (1 - betas[0] ** step)
    torch.sqrt(exp_avg_sqs, out=out).add_(eps * root)
    shrink = 1 - lr * weight_decay
    if shrink == 1:
        # δ(t−1) = δ + α û: no cancellation against a large θ.
        return torch.addcdiv(drift, exp_avgs, out, value=factor, out=out)
    torch.addcdiv(params, exp_avgs, out, value=factor, out=out).div_(shrink)
    return out if anchors is None else out.sub_(anchors)


def row_dots(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """float64 ``[rows]``: <left[r], right[r]>; ``out`` is overwritten and may be ``right``."""
    return torch.mul(left, right, out=out).sum(1).double()


def row_squares(values: Tensor) -> Tensor:
    """float64 ``[rows]``: ‖values[r]‖²."""
    return torch.linalg.vector_norm(values, dim=1).double().square_()


def cosines(dot: Tensor, left_sq: Tensor, right_sq: Tensor) -> Tensor:
    """dot / (‖left‖ ‖right‖), 0 where either vector is zero."""
    norm = left_sq.sqrt() * right_sq.sqrt()
    return torch.where(norm > 0, dot / norm, torch.zeros_like(dot))


def next_omega(
    omega: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    hypergrad: Tensor,
    step: Tensor,
    omega_lr: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    omega_max: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One Adam step on ω of all layers at once (algorithm 1, line "update ω"); ε = 1e-8.

    Args:
        omega, exp_avg, exp_avg_sq, hypergrad, step: float64 ``[n_layers]``; ``step`` is t of this step.
        omega_lr, beta1, beta2, omega_max: float64 ``[n_layers]``.

    Returns:
        ω in [0, ω_max], and its moments.
    """
    exp_avg = beta1 * exp_avg + (1 - beta1) * hypergrad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * hypergrad**2
    update = (exp_avg / (1 - beta1**step)) / ((exp_avg_sq / (1 - beta2**step)).sqrt() + 1e-8)
    return torch.minimum((omega - omega_lr * update).clamp_min(0), omega_max), exp_avg, exp_avg_sq


def projected_gradient(grads: Tensor, drift: Tensor, scale: Tensor | float, out: Tensor) -> Tensor:
    """g' = g − s δ with s = ω c of each row's layer.

    Args:
        grads, drift: ``[rows, cols]``.
        scale: float64 ``[rows]``, or one number where all rows are of one layer (a cheaper kernel).
        out: like ``grads``, overwritten and returned.
    """
    if isinstance(scale, float):
        return torch.add(grads, drift, alpha=-scale, out=out)
    return torch.addcmul(grads, drift, scale.to(grads.dtype).unsqueeze(1), value=-1, out=out)


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    host_steps: Sequence[int],
    options: dict[str, Any],
) -> None:
    """AdamW in place, as ``torch.optim.AdamW`` (decoupled decay, ε outside the root), whatever the strides.

    The fused kernel walks through memory: it is right only where parameter, gradient and moments are dense and lie
    alike. Others pass through copies that lie as the moments do.

    Args:
        exp_avgs, exp_avg_sqs: dense, of equal strides.
        steps: 0-d float32 tensors on the parameters' device, already counting this step.
        host_steps: the same numbers on the host.
        options: ``lr`` (float), ``betas``, ``eps``, ``weight_decay``.
    """
    if not params:
        return
    lr, (beta1, beta2), eps, decay = options["lr"], options["betas"], options["eps"], options["weight_decay"]
    strides = [m.stride() for m in exp_avgs]
    grads = [_laid_out(g, m) if g.stride() != s or g.dtype != m.dtype else g
             for g, m, s in zip(grads, exp_avgs, strides, strict=True)]  # fmt: skip
    given = params
    params = [_laid_out(p, m) if p.stride() != s else p for p, m, s in zip(given, exp_avgs, strides, strict=True)]
    _adamw_alike_(params, grads, exp_avgs, exp_avg_sqs, steps, host_steps, lr, beta1, beta2, eps, decay)
    for param, copy in zip(given, params, strict=True):
        if copy is not param:
            param.copy_(copy)


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of ``empty_like(tensor)``: the tensor's own where it is dense."""
    return tensor.stride() if tensor.is_contiguous() else torch.empty_like(tensor, device="meta").stride()


def _laid_out(values: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like).copy_(values)


def _adamw_alike_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    host_steps: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    """AdamW on tensors that are dense and lie alike."""
    if params[0].device.type in _FUSED_DEVICES:
        torch._fused_adamw_(
            params, grads, exp_avgs, exp_avg_sqs, [], steps,
            amsgrad=False, lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps, maximize=False,
        )  # fmt: skip
        return
    if decay:
        torch._foreach_mul_(params, 1 - lr * decay)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    denominator = list(torch._foreach_sqrt(exp_avg_sqs))
    torch._foreach_mul_(denominator, [1 / math.sqrt(1 - beta2**step) for step in host_steps])
    torch._foreach_add_(denominator, eps)
    torch._foreach_addcdiv_(params, exp_avgs, denominator, [-lr / (1 - beta1**step) for step in host_steps])
