"""The maths on lists of local, plain tensors: no layer is whole here, no rank is known.

Symbols as in :mod:`scale_digrap.optim.digrap`. Every list holds one entry per piece of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# The devices for which torch ships a fused AdamW kernel.
_FUSED_DEVICES = frozenset({"cpu", "cuda", "xpu", "mps"})


def drifts(params: Sequence[Tensor], anchors: Sequence[Tensor | None]) -> list[Tensor]:
    """δ = θ − θ0 of each piece; a piece whose anchor is ``None`` (θ0 = 0) is its own drift and is not copied."""
    if all(anchor is None for anchor in anchors):
        return list(params)
    return list(torch._foreach_sub(list(params), list(anchors)))  # type: ignore[arg-type]


def previous_drifts(
    params: Sequence[Tensor],
    drift: Sequence[Tensor],
    anchors: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    betas: tuple[float, float],
    eps: float,
) -> list[Tensor]:
    """δ of one step earlier, rebuilt from what Adam keeps instead of from a stored copy of the model.

    θ(t−2) = ( θ(t−1) + α m̂ / (√v̂ + ε) ) / (1 − α λ), all as of step t−1. Relative error about 5e-6 with fp32 weights.

    Args:
        steps: t − 1 of each piece's layer, at least 1 (pieces at 0 give a meaningless, finite result).
        lrs, weight_decays: α and λ that step t − 1 used.

    Returns:
        new tensors, one per piece.
    """
    taken = [max(step, 1) for step in steps]
    update = list(torch._foreach_sqrt(list(exp_avg_sqs)))
    torch._foreach_mul_(update, [1 / math.sqrt(1 - betas[1] ** step) for step in taken])
    torch._foreach_add_(update, eps)
    update = list(torch._foreach_div(list(exp_avgs), update))
    torch._foreach_mul_(update, [lr / (1 - betas[0] ** step) for lr, step in zip(lrs, taken, strict=True)])
    shrink = [1 - lr * decay for lr, decay in zip(lrs, weight_decays, strict=True)]
    if all(factor == 1 for factor in shrink):
        torch._foreach_add_(update, list(drift))  # δ(t−1) = δ + α û: no cancellation against a large θ
        return update
    torch._foreach_add_(update, list(params))
    torch._foreach_div_(update, shrink)
    if anchors[0] is not None:
        torch._foreach_sub_(update, list(anchors))  # type: ignore[arg-type]
    return update


def dots(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """float64 ``[n]``: <left, right> of each piece."""
    return torch.stack([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(left, right, strict=True)]).double()


def row_dots(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """float64 ``[total rows]``: <left[r], right[r]> of every row of every piece, one after another."""
    sums = [torch.linalg.vecdot(x.flatten(1), y.flatten(1)) for x, y in zip(left, right, strict=True)]
    return torch.cat(sums).double()


def row_squares(pieces: Sequence[Tensor]) -> Tensor:
    """float64 ``[total rows]``: ‖x[r]‖² of every row of every piece, one after another."""
    return torch.cat([torch.linalg.vector_norm(x.flatten(1), dim=1) for x in pieces]).double().square_()


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


def projected_gradients(
    grads: Sequence[Tensor], drift: Sequence[Tensor], scales: Sequence[float], *, owned: bool
) -> list[Tensor]:
    """g' = g − s δ of each piece, s = ω c of its layer.

    Args:
        owned: ``drift`` may be overwritten.
    """
    minus = [-scale for scale in scales]
    if not owned:
        result = list(torch._foreach_mul(list(drift), minus))
    else:
        result = list(drift)
        torch._foreach_mul_(result, minus)
    torch._foreach_add_(result, list(grads))
    return result


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    host_steps: Sequence[int],
    options: dict[str, Any],
) -> None:
    """AdamW in place, as ``torch.optim.AdamW`` (decoupled decay, ε outside the root).

    Args:
        steps: 0-d float32 tensors on the parameters' device, already counting this step.
        host_steps: the same numbers on the host.
        options: ``lr`` (float), ``betas``, ``eps``, ``weight_decay``.
    """
    if not params:
        return
    lr, (beta1, beta2), eps, decay = options["lr"], options["betas"], options["eps"], options["weight_decay"]
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
