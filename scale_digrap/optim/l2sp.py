"""L2-SP: AdamW with a penalty on the distance from the pre-trained weights (Li et al., ICML 2018, arXiv 1802.01483).

For every layer with an anchor θ0::

    g' = g + λ (θ − θ0)          the gradient of the loss plus λ/2 ‖θ − θ0‖²
    AdamW on g'
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scale_digrap.optim.layerwise import GRAD, HAS_GRAD, LayerwiseAdamW


class AdamL2SP(LayerwiseAdamW):
    r"""AdamW on the loss plus λ/2 ‖θ − θ0‖².

    Takes the same parameters, anchors and ways of sharding as :class:`scale_digrap.DiGraP`. The penalty goes through
    Adam's moments, as published; ``weight_decay`` is decoupled and towards zero.

    Args:
        params, lr, betas, eps, weight_decay, anchor, anchor_dtype, process_group: as for :class:`scale_digrap.DiGraP`.
        strength: λ of the penalty, at least 0.

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
        strength: float = 0.01,
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
        """−λ as the scale of δ in the gradient."""
        live = sums[HAS_GRAD] > 0
        (strength,) = self._options("strength")
        scale = torch.where(live & self._anchored, -strength, torch.zeros_like(strength))
        finite = torch.isfinite(sums[: GRAD + 1]).all()
        return lambda: self._remember(sums, live), torch.stack([scale, live.double(), finite.double().expand_as(scale)])
