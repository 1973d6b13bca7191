"""The model of awkward shapes under DeepSpeed, and its training in float64, from the formulas alone.

The loss is ½ ‖θ − target‖² of every layer, so that its gradient is known in closed form.
"""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import scale_digrap.deepspeed
from scale_digrap import DiGraP
from scale_digrap.sharding.zero import ZeroLayout
from tests.optim.reference import Layer
from tests.optim.sharded_problem import Net, learning_rate, make_optimizer, targets


def start_deepspeed() -> Any:
    """DeepSpeed on the pool's process group, quiet."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    scale_digrap.deepspeed.skip_cpu_communication_op()
    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo")
    return deepspeed


def ds_config(
    stage: int,
    *,
    bf16: bool = False,
    clip: float = 0.0,
    accumulate: int = 1,
    grad_dtype: str | None = None,
    **zero: Any,
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, **zero},
    }
    if stage == 3:
        config["zero_optimization"].setdefault("stage3_param_persistence_threshold", 0)
    if bf16:
        config["bf16"] = {"enabled": True}
    if grad_dtype:
        config["data_types"] = {"grad_accum_dtype": grad_dtype}
    return config


def one_group(model: nn.Module, **options: Any) -> DiGraP:
    return DiGraP(model.named_parameters(), omega_lr=0.05, **options)


def make_engine(config: dict[str, Any], groups: str = "three", **options: Any) -> tuple[Any, DiGraP]:
    start_deepspeed()
    model = Net(scalar=False)
    optimizer = make_optimizer(model, **options) if groups == "three" else one_group(model, **options)
    engine, *_ = scale_digrap.deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, optimizer


def run_step(engine: Any, t: int, accumulate: int = 1) -> None:
    for group in client(engine).param_groups:
        group["lr"] = learning_rate(t)
    for micro in range(accumulate):
        engine.backward(engine(low(engine, targets(t, dist.get_rank(), micro))))
        engine.step()


def client(engine: Any) -> DiGraP:
    return scale_digrap.deepspeed.client_optimizer(engine)


def low(engine: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    return {name: value.to(dtype) for name, value in values.items()}


def full_params(engine: Any) -> dict[str, np.ndarray]:
    """fp32 weights of all layers; frozen ones from the model."""
    optimizer = client(engine)
    if not isinstance(optimizer.layout, ZeroLayout):
        return {name: p.detach().numpy().copy() for name, p in engine.module.named_parameters() if p.requires_grad}
    return {name: t.float().numpy().copy() for name, t in scale_digrap.deepspeed.full_tensors(engine, "param")}


def given_gradients(engine: Any, into: list[dict[str, Tensor]]) -> None:
    """Record the gradients that the optimizer is given, unsharded: one dictionary per training step."""
    optimizer = client(engine)
    original = optimizer._update

    def update(grads: Any, decision: Any, layers: Any) -> Any:
        layout = optimizer.layout
        if not into or set(into[-1]) == {layer.name for layer in layout.layers}:
            into.append({})
        for index in layers:
            holder = layout.tensors[layout.holders[index]]
            grad = holder.grad if holder.grad is not None else torch.zeros_like(holder)
            into[-1][layout.layers[index].name] = layout.full(index, grad.float()).clone()
        return original(grads, decision, layers)

    optimizer._update = update


def train_zero(
    config: dict[str, Any], steps: int, groups: str = "three", record: bool = False, **options: Any
) -> dict[str, Any]:
    engine, optimizer = make_engine(config, groups, **options)
    accumulate = config["gradient_accumulation_steps"]
    gradients: list[dict[str, Tensor]] = []
    if record:
        given_gradients(engine, gradients)
    reductions, peak, count = [], 0.0, sum_counter(optimizer)
    for t in range(steps):
        before = count[0]
        run_step(engine, t, accumulate)
        reductions.append(count[0] - before)
        peak = max(peak, max(stats.omega for stats in optimizer.layer_stats().values()))
    layout = optimizer.layout
    return {
        "params": full_params(engine),
        "packed": optimizer._packed.numpy().copy(),
        "names": list(optimizer._names),
        "stats": optimizer.layer_stats(),
        "grad_norm": optimizer.grad_norm(),
        "peak_omega": peak,
        "reductions": reductions,
        "straddling_rows": layout.n_slots,
        "flats": len(layout.tensors),
        "empty": sum(placed.numel == 0 for placed in layout.placements),
        "gradients": [{name: g.numpy() for name, g in step.items()} for step in gradients],
    }


def sum_counter(optimizer: DiGraP) -> list[int]:
    """Counts the optimizer's reductions."""
    layout, count = optimizer.layout, [0]
    original = layout.reduce_

    def reduce_(*args: Any) -> Any:
        count[0] += 1
        return original(*args)

    layout.reduce_ = reduce_
    return count


def twin(
    world: int, steps: int, groups: str = "three", accumulate: int = 1, clip: float = 0.0,
    gradients: list[dict[str, np.ndarray]] | None = None, bf16: bool = False, layer: type[Layer] = Layer,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """The same training in float64; with ``gradients``, from those instead of the known ones."""
    layers: dict[str, Layer] = {}
    kinds = {"lora_b": "zero", "head": None} if groups == "three" else {}
    for name, p in Net(scalar=False).named_parameters():
        if not p.requires_grad:
            continue
        start = (p.to(torch.bfloat16) if bf16 else p).detach().double()
        kind = kinds.get(name.split(".")[-1], "initial")
        anchor = {"initial": start, "zero": torch.zeros_like(start), None: None}[kind]
        layers[name] = layer(start, anchor, omega_lr=0.05, **options)
    starts = {name: one.theta.clone() for name, one in layers.items()}
    far = dict.fromkeys(layers, 0.0)
    for t in range(steps):
        if gradients is not None:
            grads = {name: torch.as_tensor(gradients[t][name]).double() for name in layers}
        else:
            grads = {name: torch.zeros_like(one.theta) for name, one in layers.items()}
            for rank in range(world):
                for micro in range(accumulate):
                    aims = targets(t, rank, micro)
                    for name, one in layers.items():
                        leaf = name.split(".")[-1]
                        weight = (2.0 if leaf == "tied" else 1.0) / (world * accumulate)
                        grads[name] += weight * (one.theta - aims[leaf].double())
            if clip:
                norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
                grads = {name: g / max(1.0, (norm + 1e-6) / clip) for name, g in grads.items()}
        for name, one in layers.items():
            one.step(grads[name], learning_rate(t))
            far[name] = max(far[name], float((one.theta - starts[name]).norm()))
    return {
        "layers": layers,
        "params": {name: one.theta.numpy() for name, one in layers.items()},
        "far": far,
        "omega": {name: one.omega for name, one in layers.items() if one.anchor is not None},
        "moment": {name: one.a for name, one in layers.items() if one.anchor is not None},
        "conflicts": {name: one.conflicts for name, one in layers.items()},
        "grad_norm": math.sqrt(sum(float(g.square().sum()) for g in grads.values())),
    }
