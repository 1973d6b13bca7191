"""What cannot work with an anchored optimizer, told by name and before any work is lost."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.runtime.text import TextError, read_json


class DeepSpeedError(ScaleDigrapError):
    """A DeepSpeed configuration or engine under which an anchored optimizer would be wrong, or was never tried."""


def read_config(config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """A copy of a DeepSpeed configuration, given as a dictionary or as a JSON file."""
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    try:
        settings = read_json(config)
    except TextError as error:
        raise DeepSpeedError(f"the DeepSpeed configuration: {error}") from None
    if not isinstance(settings, dict):
        raise DeepSpeedError(f"the DeepSpeed configuration {config} holds a {type(settings).__name__}, not an object")
    return settings


def check_config(config: Mapping[str, Any]) -> None:
    """What is certain to be refused is refused before the model is partitioned."""
    zero = config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    if "optimizer" in config:
        raise DeepSpeedError("the DeepSpeed configuration names an optimizer too: remove its 'optimizer' section")
    if not config["zero_allow_untested_optimizer"] or config["zero_force_ds_cpu_optimizer"]:
        raise DeepSpeedError(
            "a client optimizer needs zero_allow_untested_optimizer=true and zero_force_ds_cpu_optimizer=false: remove "
            "both from the DeepSpeed configuration"
        )
    for wrong, reason in (
        (zero.get("elastic_checkpoint"), _ELASTIC),
        (offload.get("device") == "nvme", _NVME),
        ((zero.get("offload_param") or {}).get("device") == "nvme", _NVME),
        (float(offload.get("ratio", 1.0)) < 1.0, _PARTIAL),
        (offload.get("super_offload"), _SUPER),
        (zero.get("zenflow"), _ZENFLOW),
    ):
        if wrong:
            raise DeepSpeedError(reason)


_ELASTIC = (
    "zero_optimization.elastic_checkpoint truncates per-layer state when it saves: remove it; a checkpoint for another "
    "number of ranks is a Universal Checkpoint"
)
_NVME = "NVMe offload swaps only Adam's own state, all of one dtype: use offload_optimizer.device=cpu"
_PARTIAL = "offload_optimizer.ratio below 1 steps a part of each partition in DeepSpeed's own Adam: use ratio=1"
_SUPER = "SuperOffload steps partitions in DeepSpeed's own Adam, in other processes: remove super_offload"
_ZENFLOW = "ZenFlow steps chosen columns in DeepSpeed's own Adam: remove zenflow"


def check_engine(engine: Any) -> None:
    """Refuse what an engine was built with where an anchored optimizer would be wrong, or was never tried."""
    zero = engine.optimizer
    if getattr(zero.step, "attached", False):
        raise DeepSpeedError("this engine's optimizer is attached already: scale_digrap.deepspeed.initialize does it")
    mpu = getattr(engine, "mpu", None)
    tensor_parallel = max(
        int(engine.autotp_size() or 0) if hasattr(engine, "autotp_size") else 0,
        int(mpu.get_model_parallel_world_size()) if mpu is not None else 1,
    )
    for wrong, reason in (
        (getattr(zero, "elastic_checkpoint", False), _ELASTIC),
        (getattr(zero, "swap_optimizer", False) or getattr(zero, "params_in_nvme_and_cpu", False), _NVME),
        (getattr(zero, "partial_offload", 1.0) not in (None, 1.0, 0.0, False, True), _PARTIAL),
        (hasattr(engine, "super_offload") and engine.super_offload(), _SUPER),
        (getattr(zero, "zenflow", False), _ZENFLOW),
        (getattr(engine, "has_moe_layers", False), "mixture-of-experts layers are partitioned over other ranks"),
        (tensor_parallel > 1, _tensor_parallel_reason(engine)),
        (
            getattr(zero, "torch_autocast_gradscaler", None) is not None,
            "torch's GradScaler may skip a step on one rank alone: use bf16",
        ),
        (
            hasattr(engine, "is_deepcompile_enabled") and engine.is_deepcompile_enabled(),
            "DeepCompile reduces gradients in a graph of its own: remove compile.deepcompile",
        ),
    ):
        if wrong:
            raise DeepSpeedError(reason)


def _tensor_parallel_reason(engine: Any) -> str:
    names = [
        name
        for name, param in engine.module.named_parameters()
        if getattr(param, "tensor_model_parallel", False) or getattr(param, "ds_tp_meta", None) is not None
    ]
    first = f" (first: {names[0]!r})" if names else ""
    return (
        f"tensor-parallel layers{first} are cut over other ranks than ZeRO's, and their sums would be incomplete: use "
        "ZeRO alone, or FSDP2 with tensor parallelism, which is supported"
    )
