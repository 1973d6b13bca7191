"""Short real training runs that the tests compare; the functions also run on the ranks of a process pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from scale_digrap.config import Config, LoraConfig, ModelConfig, config_from_dict
from scale_digrap.models import load_model
from scale_digrap.training import TrainResult, train
from tests.models import tiny  # noqa: F401 (registers the processors of its checkpoints)


def config(path: str, data_: str, run_dir_: str, /, **sections: dict[str, Any]) -> Config:
    """A configuration of a few AdamW steps, with whole sections updated by keyword."""
    values: dict[str, Any] = {
        "run_dir": str(run_dir_),
        "model": {"path": str(path)},
        "data": {"train": [str(data_)]},
        # Some gradients are rounding noise around zero (a key bias): a small eps would make whole steps of it.
        "optimizer": {"name": "adamw", "lr": 3e-3, "eps": 1e-4},
        "training": {"steps": 3, "batch_size": 8, "device": "cpu"},
        "checkpoint": {"save_final": False, "resume": "never"},
        "log": {"progress": False},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return config_from_dict(values)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the unsharded value (collective where sharded)."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def outcome(result: TrainResult) -> dict[str, Any]:
    """What two runs are compared by: losses, gradient norms, all parameters."""
    return {
        "loss": [line["loss"] for line in result.history],
        "grad_norm": [line["grad_norm"] for line in result.history],
        "history": result.history,
        "parameters": {name: full(p) for name, p in result.model.named_parameters()},
        "trained": sorted(result.loaded.trained()),
        "anchored": sorted(result.anchored),
        "skipped": result.skipped_steps,
    }


def run(*args: Any, **sections: Any) -> dict[str, Any]:
    """Train and report; a module-level function, for the ranks of a pool too."""
    return outcome(train(config(*args, **sections)))


def initial(path: str | Path, **sections: Any) -> dict[str, torch.Tensor]:
    """The parameters that a run begins with."""
    lora = LoraConfig(**sections["lora"]) if "lora" in sections else None
    return {n: p.detach() for n, p in load_model(ModelConfig(path=str(path)), lora=lora).model.named_parameters()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of any parameter's element."""
    assert a.keys() == b.keys()
    return max(float((a[name].detach().float() - b[name].detach().float()).abs().max()) for name in a)


def travelled(run_: dict[str, Any], start: dict[str, torch.Tensor]) -> float:
    """Largest way that any element went."""
    return distance(run_["parameters"], start)


def read_dir(path: str | Path) -> list[str]:
    return sorted(entry.name for entry in Path(path).iterdir())
