"""DeepSpeed's settings, typed, and the JSON that is made of them and of the rest of a configuration.

(No torch here: see ``config.py``.)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from scale_digrap.config import Config

_STAGES: dict[str, tuple[int, ...]] = {
    "offload_optimizer": (1, 2, 3),
    "reduce_bucket_size": (1, 2, 3),
    "allgather_bucket_size": (1, 2),
    "overlap_comm": (1, 2, 3),
    "round_robin_gradients": (1, 2),
    "sub_group_size": (3,),
    "prefetch_bucket_size": (3,),
    "param_persistence_threshold": (3,),
    "max_live_parameters": (3,),
    "hpz_partition_size": (3,),
    "offload_param": (3,),
}
"""Option → the stages in which DeepSpeed looks at it."""

_JSON_NAMES = {
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "param_persistence_threshold": "stage3_param_persistence_threshold",
    "max_live_parameters": "stage3_max_live_parameters",
    "hpz_partition_size": "zero_hpz_partition_size",
}
"""Option → its key in DeepSpeed's JSON, where that differs."""

_OWNED = {
    "train_batch_size": "training.batch_size and training.gradient_accumulation",
    "train_micro_batch_size_per_gpu": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "gradient_clipping": "training.clip_norm",
    "optimizer": "optimizer.name",
    "scheduler": "schedule.name",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "torch_autocast": "training.precision",
    "checkpoint": "checkpoint.resume",
    "data_efficiency": "data.train",
    "curriculum_learning": "data.train",
}
"""Keys of DeepSpeed's JSON that other sections decide → which."""


@dataclass(kw_only=True)
class ZeroConfig:
    """DeepSpeed ZeRO, for ``sharding.engine: deepspeed``. The defaults are DeepSpeed's own.

    An option that DeepSpeed would ignore in the chosen stage is refused. Sizes are numbers of elements.
    """

    stage: int = 2
    """0 (nothing sharded), 1 (optimizer state), 2 (and gradients) or 3 (and parameters)."""

    offload_optimizer: str = "none"
    """``none``, or ``cpu``: optimizer state and step in main memory."""

    offload_param: str = "none"
    """``none``, or ``cpu``: parameters in main memory between their uses."""

    reduce_bucket_size: int = 500_000_000
    """Gradients reduced at a time."""

    allgather_bucket_size: int = 500_000_000
    """Updated parameters gathered at a time."""

    overlap_comm: Optional[bool] = None  # noqa: UP045
    """Reduce gradients during the backward pass; None lets DeepSpeed choose."""

    round_robin_gradients: bool = False
    """Hand parameters to the ranks in turn, which speeds offloading."""

    sub_group_size: int = 1_000_000_000
    """Parameters updated at a time, counted on one rank."""

    prefetch_bucket_size: int = 50_000_000
    """Parameters gathered ahead of their use."""

    param_persistence_threshold: int = 100_000
    """Smaller parameters stay whole on every rank."""

    max_live_parameters: int = 1_000_000_000
    """Most parameters that are whole on a rank at one time."""

    hpz_partition_size: int = 1
    """ZeRO++: a second copy of the shards over groups of this many ranks, so that gathers stay within a host."""

    extra: dict[str, Any] = field(default_factory=dict)
    """Merged into DeepSpeed's JSON last, for settings without a key here, such as ``{data_types: {...}}``."""


def zero_problem(config: "Config") -> Optional[str]:  # noqa: UP045
    """What makes ``sharding.zero`` wrong, in one line with the way out; None if nothing does."""
    sharding = config.sharding
    zero = sharding.zero
    changed = [
        entry.name for entry in fields(ZeroConfig) if getattr(zero, entry.name) != getattr(ZeroConfig(), entry.name)
    ]
    if sharding.engine != "deepspeed":
        if changed:
            return (
                f"sharding.zero.{changed[0]} has no effect with sharding.engine={sharding.engine}: set "
                f"sharding.engine=deepspeed, or remove it"
            )
        return None
    if zero.stage not in (0, 1, 2, 3):
        return f"sharding.zero.stage must be 0, 1, 2 or 3; got {zero.stage}"
    for name in changed:
        stages = _STAGES.get(name)
        if stages is not None and zero.stage not in stages:
            wanted = " or ".join(map(str, stages))
            return (
                f"sharding.zero.{name} has no effect in stage {zero.stage}: set sharding.zero.stage={wanted}, or "
                f"remove it"
            )
    for name in ("offload_optimizer", "offload_param"):
        if getattr(zero, name) not in ("none", "cpu"):
            return f"sharding.zero.{name} must be none or cpu; got {getattr(zero, name)!r}"
    for name in (
        "reduce_bucket_size",
        "allgather_bucket_size",
        "sub_group_size",
        "max_live_parameters",
        "hpz_partition_size",
    ):
        if getattr(zero, name) < 1:
            return f"sharding.zero.{name} must be at least 1, got {getattr(zero, name)}"
    for name in ("prefetch_bucket_size", "param_persistence_threshold"):
        if getattr(zero, name) < 0:
            return f"sharding.zero.{name} must be at least 0, got {getattr(zero, name)}"
    if sharding.dp_replicate_size != 1:
        return (
            f"sharding.dp_replicate_size={sharding.dp_replicate_size} is FSDP's: with sharding.engine=deepspeed use "
            f"sharding.zero.stage=3 and sharding.zero.hpz_partition_size"
        )
    if sharding.wrap:
        return "sharding.wrap is FSDP's: DeepSpeed gathers module by module; remove it"
    if not sharding.reshard_after_forward:
        return "sharding.reshard_after_forward=false is FSDP's: sharding.zero.stage=2 keeps whole parameters"
    for key in zero.extra:
        if key in _OWNED:
            return f"sharding.zero.extra.{key} belongs to {_OWNED[key]}: set that"
    section = zero.extra.get("zero_optimization", {})
    if not isinstance(section, Mapping):
        return f"sharding.zero.extra.zero_optimization must be a section, got {section!r}"
    for key in section:
        name = next((name for name, other in _JSON_NAMES.items() if other == key), key)
        if name == "stage" or name in _STAGES:
            return f"sharding.zero.extra.zero_optimization.{key} has a key of its own: set sharding.zero.{name}"
    return None


def deepspeed_json(config: "Config", *, bf16: bool) -> dict[str, Any]:
    """The configuration that ``deepspeed.initialize`` gets.

    Args:
        config: of the run.
        bf16: bf16 parameters with fp32 masters, DeepSpeed's ``bf16``.
    """
    zero, training = config.sharding.zero, config.training
    section: dict[str, Any] = {"stage": zero.stage}
    for name, stages in _STAGES.items():
        value = getattr(zero, name)
        if zero.stage not in stages or value is None:
            continue
        if name.startswith("offload_"):
            if value != "none":
                section[name] = {"device": value, "pin_memory": training.device != "cpu"}
        else:
            section[_JSON_NAMES.get(name, name)] = value
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "gradient_clipping": training.clip_norm or 0.0,
        "zero_optimization": section,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,  # our own log says more
    }
    return _merged(values, zero.extra)


def _merged(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(values)
    for key, value in more.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result
