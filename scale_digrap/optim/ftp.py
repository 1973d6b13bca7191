"""FTP: Fast Trainable Projection (NeurIPS 2023, arXiv 2310.19182) of AdamW's steps, exact on sharded parameters.

For one layer at step t, with loss gradient g, anchor θ0 and γ, the radius of its constraint::

    θ~ = AdamW(θ(t−1), g)        C = θ~ − θ0        N[r] = Σ_j |C[r, j]| + 1e-8        (rows as in DiGraP)
    t = 1:  γ = 1e-8
    t > 1:  q = Σ_r <g, C(t−1)>_r / N(t−1)[r] ;  q ← k q where q > 0
            γ = clip( γ − μ · Adam(q; gamma_betas, ε = 1e-8), 1e-8, max_r N[r] )
    θ(t)[r] = θ0[r] + min(1, γ / N[r]) · C[r]

The first step takes every layer back to θ0, and γ opens the way from there. C(t−1) / N(t−1), before the projection, is
stored (4 bytes a parameter in fp32): after a projection to a radius of the size of a rounding it cannot be rebuilt.
A step needs three reductions: of q, of the rows that straddle ranks, and of the longest row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scale_digrap.optim import functional as F  # noqa: N812
from scale_digrap.optim.blocks import Block
from scale_digrap.optim.layerwise import GRAD, HAS_GRAD, Decision, LayerwiseAdamW, View

logger = logging.getLogger(__name__)

#: <g, C(t−1) / N(t−1)>, the gradient of the loss with respect to −γ.
SLOPE = HAS_GRAD + 1
_SMALLEST = 1e-8
DIRECTION = "direction"


class AdamFTP(LayerwiseAdamW):
    r"""AdamW with Fast Trainable Projection, published as AdamP (no relation to NAVER's).

    Takes the same parameters, anchors and ways of sharding as :class:`scale_digrap.DiGraP`. With ``anchor="zero"``
    (LoRA factors) the first step takes a layer back to 1e-8, as the authors' code does: a warning says so.

    Args:
        params, lr, betas, eps, weight_decay, anchor, anchor_dtype, process_group: as for :class:`scale_digrap.DiGraP`.
        gamma_lr: learning rate μ of γ.
        gamma_betas: Adam's betas for γ.
        k: in [0, 1], the weight of a q that would tighten the constraint; 1 is the strongest regularization.

    Raises:
        ValueError, RuntimeError: as :class:`scale_digrap.DiGraP`.
    """

    layer_scalars = ("gamma", "gamma_exp_avg", "gamma_exp_avg_sq", "conflict_count")
    n_sums = SLOPE + 1
    _warned = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gamma_lr: float = 1e-2,
        gamma_betas: tuple[float, float] = (0.9, 0.999),
        k: float = 1.0,
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
            "gamma_lr": gamma_lr,
            "gamma_betas": gamma_betas,
            "k": k,
            "anchor": anchor,
            "anchor_dtype": str(anchor_dtype).removeprefix("torch."),
        }
        super().__init__(params, defaults, process_group, torch_options)

    def _by_rows(self, group: Mapping[str, Any]) -> bool:
        return group["anchor"] is not None

    # -- state ---------------------------------------------------------------------------------------------------------

    def _init_tensors(self) -> None:
        super()._init_tensors()
        self._warn_of_zero_anchors()
        for index in range(len(self._names)):
            state = self._state_of(index)
            if self._anchor_kind_of(index) is not None and DIRECTION not in state:
                state[DIRECTION] = torch.zeros_like(self._tensor_of(index), memory_format=torch.preserve_format)

    def _bind(self) -> None:
        super()._bind()
        self._directions = self._held(DIRECTION)

    def _release(self) -> None:
        super()._release()
        self._directions = []

    def _after_pack(self) -> None:
        super()._after_pack()
        assert self._layout is not None
        self._slot_layer = self._layout.slot_layer.to(self._packed.device)

    def _warn_of_zero_anchors(self) -> None:
        layers = [name for i, name in enumerate(self._names) if self._anchor_kind_of(i) == "zero"]
        if not layers or self._warned or (dist.is_initialized() and dist.get_rank() != 0):
            return
        self._warned = True
        logger.warning(
            "AdamFTP's first step takes every anchored layer back to its anchor: the %d layers with anchor='zero', "
            "first %r, lose their values (LoRA's A and B become 1e-8). Give them anchor='initial', "
            "which holds them near where they begin, or anchor=None; or use DiGraP, AdamSPD or AdamL2SP",
            len(layers), layers[0],
        )  # fmt: skip

    # -- before the update ---------------------------------------------------------------------------------------------

    def _more_sums(self, view: View, block: Block, history: tuple, sums: Tensor, row_sums: Tensor) -> None:
        previous = block.matrix("m", self._directions, self._workspace)
        sums[SLOPE].index_add_(0, block.owner, F.row_dots(view.g, previous, view.work))

    def _scale_gradients(self, sums: Tensor, factors: Tensor) -> None:
        super()._scale_gradients(sums, factors)
        sums[SLOPE] *= factors

    def _layer_math(self, sums: Tensor, row_sums: Tensor) -> tuple[Callable[[], None], Tensor]:
        """γ before its upper bound, which only the update tells, and its moments."""
        beta1, beta2 = (
            torch.tensor([group["gamma_betas"][i] for group in self._groups], dtype=torch.float64)
            .to(sums.device)[self._group_index]
            for i in range(2)
        )  # fmt: skip
        gamma_lr, k = self._options("gamma_lr", "k")
        gamma, exp_avg, exp_avg_sq, _ = self._packed.unbind()
        live = sums[HAS_GRAD] > 0
        step = self._steps.double() + live
        moved, learned = live & self._anchored, live & self._anchored & (step > 1)
        slope = torch.where(sums[SLOPE] > 0, k * sums[SLOPE], sums[SLOPE])
        unbounded = torch.full_like(gamma, torch.inf)
        new = F.next_omega(gamma, exp_avg, exp_avg_sq, slope, step.clamp_min(1), gamma_lr, beta1, beta2, unbounded)
        new_gamma, new_exp_avg, new_exp_avg_sq = (
            torch.where(learned, fresh, old) for fresh, old in zip(new, (gamma, exp_avg, exp_avg_sq), strict=True)
        )
        new_gamma = torch.where(moved, new_gamma.clamp_min(_SMALLEST), gamma)
        finite = torch.isfinite(sums[: GRAD + 1]).all() & torch.isfinite(slope).all()

        def commit() -> None:
            gamma.copy_(new_gamma)
            exp_avg.copy_(new_exp_avg)
            exp_avg_sq.copy_(new_exp_avg_sq)
            self._remember(sums, live)

        return commit, torch.stack([torch.zeros_like(gamma), live.double(), finite.double().expand_as(gamma)])

    # -- after it ------------------------------------------------------------------------------------------------------

    def _update(self, grads: list[Tensor | None], decision: Decision, layers: Sequence[int]) -> None:
        super()._update(grads, decision, layers)
        chosen = [i for i in layers if decision.live[i] and self._option(i, "anchor") is not None]
        if not chosen:  # the same on all ranks
            return
        layer_norms, slot_norms = self._norms(chosen)
        gamma = self._packed[0]
        for block, change in self._changes(chosen):
            norms = self._rows(block, change, layer_norms, slot_norms)
            ratio = (gamma[block.owner] / norms).clamp_max(1.0)
            to_dtype = change.dtype
            direction = change / norms.to(to_dtype).unsqueeze(1)
            anchor = self._anchor_matrix(block)
            # from θ0, not from θ~: a radius near 0 gives θ0 itself, not its rounding
            projected = change * ratio.to(to_dtype).unsqueeze(1)
            if anchor is not None:
                projected += anchor
            counts = [piece.rows for piece in block.pieces]
            parts = zip(block.pieces, projected.split(counts), direction.split(counts), strict=True)
            for piece, values, towards in parts:
                target, kept = self._locals[piece.index], self._directions[piece.index]
                assert kept is not None
                if target.is_contiguous():
                    piece.of(target).copy_(values)
                    piece.of(kept).copy_(towards)
                else:  # channels-last and the like: such a layer is one piece
                    target.copy_(values.reshape(target.shape))
                    kept.copy_(towards.reshape(kept.shape))

    def _norms(self, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Row norms that only a reduction completes, and γ brought below the longest row of each layer.

        Returns:
            float64 ``[n_layers]``, N of the layers that are one row, and float64 ``[n_slots]``, of straddling rows.
        """
        layout, device = self._layout, self._packed.device
        assert layout is not None
        count = len(self._names)
        sums = torch.zeros((1, count), dtype=torch.float64, device=device)
        row_sums = torch.zeros((3, layout.n_slots), dtype=torch.float64, device=device)
        longest = torch.zeros(count, dtype=torch.float64, device=device)
        for block, change in self._changes(layers):
            lengths = change.abs().sum(1).double()
            if block.slots is not None:
                row_sums[0].index_add_(0, block.slots, lengths)
            elif block.by_rows:
                longest.scatter_reduce_(0, block.owner, lengths, "amax")
            else:
                sums[0].index_add_(0, block.owner, lengths)
        layout.reduce_(sums, row_sums)
        layer_norms, slot_norms = sums[0] + _SMALLEST, row_sums[0] + _SMALLEST
        longest = torch.maximum(longest, sums[0])
        if layout.n_slots:
            longest.scatter_reduce_(0, self._slot_layer, row_sums[0], "amax")
        layout.max_(longest)
        gamma = self._packed[0]
        chosen = torch.zeros(count, dtype=torch.bool, device=device)
        chosen[list(layers)] = True
        gamma.copy_(torch.where(chosen, torch.minimum(gamma, longest + _SMALLEST), gamma))
        return layer_norms, slot_norms

    def _changes(self, layers: Sequence[int]) -> Iterator[tuple[Block, Tensor]]:
        """Blocks of some layers with C = θ~ − θ0, ``[rows, cols]``, not to be written to."""
        wanted, space = set(layers), self._workspace
        for whole in self._blocks:
            pieces = [piece for piece in whole.pieces if piece.index in wanted]
            if pieces:
                block = whole.only(pieces)
                p = block.matrix("p", self._locals, space)
                yield block, F.drift(p, self._anchor_matrix(block), space.take("drift", p.shape, p.dtype))

    @staticmethod
    def _rows(block: Block, change: Tensor, layer_norms: Tensor, slot_norms: Tensor) -> Tensor:
        """N of every row of a block, float64 ``[rows]``."""
        if block.slots is not None:
            return slot_norms[block.slots]
        if block.by_rows:
            return change.abs().sum(1).double() + _SMALLEST
        return layer_norms[block.owner]
