"""WiSE-FT: mix the fine-tuned weights with the pre-trained ones, on the local shards, and take it back exactly.

θ(α) = (1 − α) θ0 + α θ_ft (Wortsman et al., CVPR 2022). A LoRA update is ΔW = scaling · B·A with θ0 ↔ ΔW = 0, so its
mixture is αΔW: B is scaled and A kept. Mixing A and B apart would give α² of the update (and, with A's random start
as θ0, a different subspace).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.sharding import dtensor, zero3

_LORA_A = ("lora_A", "lora_embedding_A")
_LORA_B = ("lora_B", "lora_embedding_B")


class WiseError(ScaleDigrapError):
    """Weights that cannot be mixed."""


def reshard(model: nn.Module) -> None:
    """Put every FSDP2 unit back to its sharded parameters; does nothing to other models.

    After a forward pass without a backward one the root unit keeps its gathered copy. Whoever reads `parameters()`
    then gets the copy, and whoever writes to the shards is not seen by the next forward pass.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's piece: the local tensor of a DTensor, ZeRO-3's slice (1-D), the tensor itself otherwise. Shares
    storage."""
    return zero3.piece(tensor) if zero3.is_partitioned(tensor) else dtensor.local(tensor.detach())


def local_anchor(name: str, parameter: Tensor, anchor: Tensor) -> Tensor:
    """This rank's piece of an anchor given in any of the forms in which anchors are kept.

    Args:
        name: the parameter's, for the error.
        parameter: the live parameter: a DTensor, ZeRO-3's, or a plain tensor.
        anchor: a DTensor with the parameter's placements; the full tensor; or already this rank's piece. Any float
            dtype.

    Returns:
        Shape and dtype of the parameter's local tensor.
    """
    here = local(parameter)
    if isinstance(anchor, DTensor):
        if anchor.placements != getattr(parameter, "placements", None):
            raise WiseError(f"{name}: the anchor's placements {anchor.placements} are not the parameter's")
        piece = local(anchor)
    elif zero3.is_partitioned(parameter) and anchor.shape == zero3.full_shape(parameter):
        piece = zero3.cut(parameter, anchor)
    elif isinstance(parameter, DTensor) and anchor.shape == parameter.shape and anchor.shape != here.shape:
        full = anchor.detach().to(here.device)
        # src_data_rank=None: every rank has the full tensor and cuts out its own piece, so nothing is sent
        piece = local(distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None))
    else:
        piece = anchor.detach()
    if piece.shape != here.shape:
        raise WiseError(
            f"{name}: the anchor has shape {tuple(anchor.shape)}, the parameter {tuple(zero3.full_shape(parameter))} "
            f"(locally {tuple(here.shape)})"
        )
    return piece.to(device=here.device, dtype=here.dtype)


def check_alpha(alpha: float) -> float:
    """The mixing weight as a float in [0, 1]: 0 is the pre-trained model, 1 the fine-tuned one."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0.0 <= alpha <= 1.0:
        raise WiseError(f"alpha must be a number between 0 (pre-trained) and 1 (fine-tuned), got {alpha!r}")
    return float(alpha)


def lora_factor(name: str) -> str | None:
    """``A`` or ``B`` for the name of a LoRA factor, None for any other parameter.

    Raises:
        WiseError: a parameter of DoRA.
    """
    parts = name.split(".")
    if "lora_magnitude_vector" in parts:
        raise WiseError(f"{name}: a DoRA adapter is not linear in B; WiSE-FT is defined here for LoRA and full weights")
    if any(part in _LORA_A for part in parts):
        return "A"
    return "B" if any(part in _LORA_B for part in parts) else None


@contextmanager
def interpolate(
    model: nn.Module, alpha: float, anchors: Mapping[str, Tensor] | None = None, *, new_layers: Collection[str] = ()
) -> Iterator[nn.Module]:
    """Within the block, the model holds the mixture; after it, the very bits of before, whatever happened in between.

    Args:
        model: plain, sharded by FSDP2 or by ZeRO-3, full or LoRA (peft); not in DDP. Every rank calls
            this with the same arguments.
        alpha: weight of the fine-tuned model, in [0, 1].
        anchors: parameter name → pre-trained value (see `local_anchor`) for every trained parameter that is not a
            LoRA factor.
        new_layers: names of trained parameters without a pre-trained value, such as a new head: they stay as
            fine-tuned.

    Raises:
        WiseError: alpha out of range, a trained parameter without an anchor, a wrong shape, or a DoRA adapter.
    """
    alpha = check_alpha(alpha)
    reshard(model)
    anchors = anchors or {}
    mixed: list[tuple[Tensor, Tensor | None]] = []
    missing: list[str] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or name in new_layers:
            continue
        factor = lora_factor(name)
        if factor == "A":
            continue
        if factor == "B":
            mixed.append((local(parameter), None))
        elif name in anchors:
            mixed.append((local(parameter), local_anchor(name, parameter, anchors[name])))
        else:
            missing.append(name)
    if missing:
        raise WiseError(
            f"{len(missing)} trained parameters have no pre-trained value to mix with, first {missing[0]!r}: train "
            "with training.keep_anchors=true, or name them in new_layers"
        )
    if not mixed:
        raise WiseError("the model has no trained parameters (requires_grad) to mix")

    kept = [piece.clone() for piece, _ in mixed]
    try:
        with torch.no_grad():
            for piece, anchor in mixed:
                if anchor is None:
                    piece.mul_(alpha)
                else:
                    piece.copy_(torch.lerp(anchor, piece, alpha))  # lerp is exact at 0 and at 1
        zero3.regather(model.parameters())
        yield model
    finally:
        reshard(model)
        with torch.no_grad():
            for (piece, _), before in zip(mixed, kept, strict=True):
                piece.copy_(before)
        zero3.regather(model.parameters())
