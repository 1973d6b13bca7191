"""Which parameters have a gradient in this training step, and DeepSpeed's buffers kept honest about it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from scale_digrap.sharding.zero import ZeroLayoutError

# Where ZeRO-3 with CPU offload adds up the micro-batches' gradients; it has no public access to it.
_ACCUMULATED = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
_FINALIZE = "_finalize_offload_gradient_accumulation"


class GradientWatch:
    """Which parameters have had a gradient since the last step, under ZeRO-3.

    ZeRO-3 keeps the gradient of the last step that had one: a parameter that is unused in this step would be stepped
    with it again, and would count in the norm that everything is clipped by. It is set to zero here before the norm is
    taken, or before a late micro-batch is added to it. With CPU offload, DeepSpeed hands over only gradients of the
    last micro-batch's parameters; those of earlier ones alone are handed over here.

    Args:
        zero: DeepSpeed's stage 3 optimizer.
        params: its parameters, layer by layer.
    """

    def __init__(self, zero: Any, params: Iterable[Any]) -> None:
        self._zero, self._params = zero, list(params)
        self._last_micro_step: dict[int, int] = {}
        for index, param in enumerate(self._params):
            param.register_hook(self._hook(index))

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        own = weakref.ref(self)

        def mark(_: Tensor) -> None:
            watch = own()
            if watch is None:
                return
            micro_step = watch._zero.micro_step_id
            if index not in watch._last_micro_step and micro_step > 0:
                watch._clear(index)
            watch._last_micro_step[index] = micro_step

        return mark

    def _clear(self, index: int) -> None:
        from deepspeed.utils import safe_set_local_grad

        param = self._params[index]
        safe_set_local_grad(param, torch.zeros_like(param.ds_tensor))
        if self._zero.offload_optimizer:
            self._private(_ACCUMULATED)[param.ds_id].zero_()

    def _private(self, name: str) -> Any:
        found = getattr(self._zero, name, None)
        if found is None:
            raise ZeroLayoutError(
                "some parameters have a gradient in some micro-batches only, which this version of DeepSpeed mixes up "
                "under ZeRO-3 with CPU offload: use another stage, no offload, or gradient_accumulation_steps=1"
            )
        return found

    def take(self) -> set[int]:
        """The layers that have a gradient; begins anew."""
        touched, self._last_micro_step = self._last_micro_step, {}
        if self._zero.offload_optimizer and len(set(touched.values())) > 1:
            self._private(_FINALIZE)()
        for index in set(range(len(self._params))) - set(touched):
            self._clear(index)
        return set(touched)
