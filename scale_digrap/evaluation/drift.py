"""How far each layer went from its pre-trained value, for any optimizer and for LoRA.

For LoRA a layer is an adapted weight, and its drift is ‖scaling · B·A‖ against ‖W‖: comparable with full fine-tuning,
which ‖B‖ and ‖A‖ are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scale_digrap.evaluation.wise import local, local_anchor, reshard
from scale_digrap.sharding import zero3
from scale_digrap.sharding.dtensor import sharded_dims


@dataclass(frozen=True)
class Drift:
    """‖θ − θ0‖ and ‖θ − θ0‖ / ‖θ0‖ of one layer (Frobenius norms over the full tensor)."""

    drift: float
    relative_drift: float | None
    """None where ‖θ0‖ = 0."""

    def to_json(self) -> dict[str, float | None]:
        return asdict(self)


def layer_drift(model: nn.Module, anchors: Mapping[str, Tensor] | None = None) -> dict[str, Drift]:
    """Drift per layer, the same on every rank. Collective where the model is sharded: call it on all ranks.

    Args:
        model: plain, sharded by FSDP2 or by ZeRO-3, full or LoRA (peft).
        anchors: as for `wise.interpolate`; trained parameters without one are left out (a new head has no drift).
    """
    reshard(model)
    anchors = anchors or {}
    result: dict[str, Drift] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name in anchors:
            anchor = local_anchor(name, parameter, anchors[name]).double()
            delta = local(parameter).double() - anchor
            result[name] = _drift(_full_square_sum(delta, parameter), _full_square_sum(anchor, parameter))
    for name, module in model.named_modules():
        for adapter in getattr(module, "lora_A", None) or ():
            a = _full(module.lora_A[adapter].weight).double()  # [r, in]
            b = _full(module.lora_B[adapter].weight).double()  # [out, r]
            # ‖BA‖² = tr((BᵀB)(AAᵀ)): r × r products in place of the out × in update
            square = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0.0) * float(module.scaling[adapter]) ** 2
            weight = module.get_base_layer().weight
            result[f"{name}.weight"] = _drift(square, _full_square_sum(local(weight).double(), weight))
    return result


def _full(parameter: Tensor) -> Tensor:
    if zero3.is_partitioned(parameter):
        return zero3.full(parameter)
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _full_square_sum(piece: Tensor, parameter: Tensor) -> Tensor:
    """Sum of squares of the whole tensor of which `piece` is this rank's part, float64."""
    square = piece.square().sum()
    if zero3.is_partitioned(parameter):
        # on the device that communicates, which the shard need not be on
        square = square.to(parameter.device)
        torch.distributed.all_reduce(square, group=parameter.ds_process_group)  # type: ignore[attr-defined]
    if isinstance(parameter, DTensor):
        for dim in sharded_dims(parameter):
            torch.distributed.all_reduce(square, group=parameter.device_mesh.get_group(dim))
    return square


def _drift(delta_square: Tensor, anchor_square: Tensor) -> Drift:
    drift, anchor = delta_square.sqrt().item(), anchor_square.sqrt().item()
    return Drift(drift, drift / anchor if anchor > 0 else None)
