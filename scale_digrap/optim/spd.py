"""SPD: Selective Projection Decay (NeurIPS 2024, arXiv 2411.01713), exact on sharded parameters.

For one layer at step t, with parameter θ(t−1), loss gradient g, anchor θ0, drift δ = θ(t−1) − θ0::

    θ~ = AdamW(θ(t−1), g)
    where <g, δ> > 0 (descent leads back to θ0, and yet):
        r    = clip( (‖θ~ − θ0‖ − ‖δ‖) / ‖θ~ − θ0‖, 0, 1 )      how much farther the step went
        θ(t) = θ~ − λ r (θ~ − θ0)                                 λ is not multiplied by the learning rate
    elsewhere:
        θ(t) = θ~

The condition is the opposite of DiGraP's. ‖θ~ − θ0‖ is known only after the update, so that a step in which any layer
is selected needs a second reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scale_digrap.optim import functional as F  # noqa: N812
from scale_digrap.optim.layerwise import DOT, DRIFT, GRAD, HAS_GRAD, Decision, LayerwiseAdamW


class AdamSPD(LayerwiseAdamW):
    r"""AdamW with Selective Projection Decay.

    Takes the same parameters, anchors and ways of sharding as :class:`scale_digrap.DiGraP`.

    Args:
        params, lr, betas, eps, weight_decay, anchor, anchor_dtype, process_group: as for :class:`scale_digrap.DiGraP`.
        strength: λ, at least 0; 1 takes a selected layer back to its distance before the step.

    Raises:
        ValueError, RuntimeError: as :class:`scale_digrap.DiGraP`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        strength: float = 0.5,
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
            "strength": strength,
            "anchor": anchor,
            "anchor_dtype": str(anchor_dtype).removeprefix("torch."),
        }
        super().__init__(params, defaults, process_group, torch_options)

    def _layer_math(self, sums: Tensor, row_sums: Tensor) -> tuple[Callable[[], None], Tensor]:
        """Which layers are selected."""
        live = sums[HAS_GRAD] > 0
        selected = live & self._anchored & (sums[DOT] > 0)
        finite = torch.isfinite(sums[: GRAD + 1]).all()
        report = [torch.zeros_like(sums[DOT]), live.double(), finite.double().expand(live.shape), selected.double()]
        return lambda: self._remember(sums, live), torch.stack(report)

    def _update(self, grads: list[Tensor | None], decision: Decision, layers: Sequence[int]) -> None:
        super()._update(grads, decision, layers)
        (selected,) = decision.marks
        chosen = [i for i in layers if selected[i]]
        if not chosen:  # the same on all ranks
            return
        distance, before = self._distances(chosen).sqrt(), self._last["sums"][DRIFT].sqrt()
        (strength,) = self._options("strength")
        farther = torch.where(distance > 0, (distance - before) / distance, torch.zeros_like(distance))
        factor = strength * farther.clamp(0.0, 1.0)
        for i in chosen:
            param, anchor = self._locals[i], self._anchors[i]
            drift = param if anchor is None else param - anchor.to(param.dtype)
            param.sub_(drift * factor[i].to(param.dtype))

    def _distances(self, layers: Sequence[int]) -> Tensor:
        """‖θ − θ0‖² of some layers after the update, float64 ``[n_layers]``; one reduction, the same blocks as before
        it, so that the two norms are rounded alike."""
        layout, space, wanted = self._layout, self._workspace, set(layers)
        assert layout is not None
        sums = torch.zeros((1, len(self._names)), dtype=torch.float64, device=self._packed.device)
        for whole in self._blocks:
            pieces = [piece for piece in whole.pieces if piece.index in wanted]
            if pieces:
                block = whole.only(pieces)
                p = block.matrix("p", self._locals, space)
                drift = F.drift(p, self._anchor_matrix(block), space.take("drift", p.shape, p.dtype))
                sums[0].index_add_(0, block.owner, F.row_squares(drift))
        layout.reduce_(sums, sums.new_zeros((3, layout.n_slots)))
        return sums[0]
