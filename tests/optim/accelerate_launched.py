"""What ``test_accelerate_fsdp2.py`` starts on two ranks: Accelerate's FSDP2 path around an optimizer made before it.

Accelerate takes FSDP on accelerators only: on a CPU the distributed type is set by hand, everything else is its own.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import scale_digrap

METHODS = ("DiGraP", "AdamFTP", "AdamSPD", "AdamL2SP")
STEPS = 20


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip


def make(name: str, model: nn.Module) -> Any:
    return getattr(scale_digrap, name)(model.named_parameters(), lr=5e-3)


def batch(step: int, rank: int) -> Tensor:
    return torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(1000 * step + rank))


def whole(model: nn.Module) -> Tensor:
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for _, p in sorted(model.named_parameters())]
    return torch.cat([p.detach().reshape(-1) for p in parts])


def omegas(optimizer: Any) -> dict[str, float]:
    return {name: stats.omega for name, stats in sorted(optimizer.layer_stats().items())}


def accelerated(accelerator: Accelerator, name: str, folder: Path, init_first: bool) -> dict[str, Any]:
    accelerator.free_memory()
    model = tiny()
    optimizer = make(name, model)
    if init_first:
        optimizer.init_state()
    model, wrapped = accelerator.prepare(model, optimizer)
    if not init_first:
        assert not optimizer.state, "state must be made after sharding"
    halfway = None
    for step in range(STEPS):
        x = batch(step, accelerator.process_index)
        accelerator.backward(model(input_ids=x, labels=x).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        wrapped.step()
        wrapped.zero_grad()
        if step == 9 and name == "DiGraP" and not init_first:
            accelerator.save_state(str(folder / name))
            halfway = whole(model)
    largest = max(v.to_local().numel() for s in optimizer.state.values() for v in s.values() if isinstance(v, DTensor))
    kinds = {type(v).__name__ for s in optimizer.state.values() for k, v in s.items() if k in ("exp_avg", "anchor")}
    result = {"params": whole(model), "omegas": omegas(optimizer), "largest": largest, "kinds": sorted(kinds)}
    if halfway is not None:
        accelerator.load_state(str(folder / name))
        assert torch.equal(whole(model), halfway)
        for step in range(10, STEPS):
            x = batch(step, accelerator.process_index)
            accelerator.backward(model(input_ids=x, labels=x).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            wrapped.step()
            wrapped.zero_grad()
        result["resumed"] = float((whole(model) - result["params"]).abs().max())
    return result


def alone(name: str) -> dict[str, Any]:
    model = tiny()
    optimizer = make(name, model)
    optimizer._process_group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    start, peak = whole(model), 0.0
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(2):
            x = batch(step, rank)
            (model(input_ids=x, labels=x).loss / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        peak = max(peak, *(value for value in omegas(optimizer).values())) if name == "DiGraP" else 0.0
    return {"params": whole(model), "omegas": omegas(optimizer), "start": start, "peak": peak}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    found: dict[str, Any] = {}
    for name in METHODS:
        expected = alone(name)
        for init_first in (False, True):
            result = accelerated(accelerator, name, folder, init_first)
            way = (expected["params"] - expected["start"]).norm()
            found[f"{name}{' after init_state' if init_first else ''}"] = {
                "error": float((result["params"] - expected["params"]).norm() / way),
                "omega": max(
                    (abs(result["omegas"][key] - value) for key, value in expected["omegas"].items() if value == value),
                    default=0.0,
                ),
                "peak": expected["peak"],
                "largest": result["largest"],
                "kinds": result["kinds"],
                "resumed": result.get("resumed"),
            }
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
