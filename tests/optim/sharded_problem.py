"""A model of awkward shapes with a known gradient, trained on every kind of sharding and in one process."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from scale_digrap import DiGraP

# 11 rows on 2 or 4 ranks are uneven; (1,) and (1, 9) leave all ranks but one empty; (2, 3) leaves two of four empty.
UNITS = [
    {"odd": (11, 5), "one": (1,), "bias": (7,), "tied": (6, 5)},
    {"conv": (6, 3, 3, 3), "row": (1, 9), "few": (2, 3), "frozen": (4, 4)},
    {"wide": (33, 24), "lora_b": (12, 4), "head": (5, 8)},
]


class Unit(nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            start = torch.zeros(shape) if name == "lora_b" else torch.randn(shape, generator=generator)
            self.register_parameter(name, nn.Parameter(start, requires_grad=name != "frozen"))
        if "tied" in shapes:
            self.tied_again = self.tied

    def forward(self, targets: dict[str, Tensor]) -> Tensor:
        """½ ‖θ − target‖², summed; the tied weight is used under both of its names."""
        loss = torch.zeros(())
        for name, parameter in self.named_parameters(remove_duplicate=False):
            target = targets[name.removesuffix("_again")].to(parameter.dtype)
            loss = loss + (0.5 * (parameter - target) ** 2).float().sum()
        return loss


class Net(nn.Module):
    def __init__(self, scalar: bool = True) -> None:
        super().__init__()
        self.units = nn.ModuleList(Unit(shapes, seed) for seed, shapes in enumerate(UNITS))
        if scalar:
            self.scalar = nn.Parameter(torch.tensor(0.7))

    def forward(self, targets: dict[str, Tensor]) -> Tensor:
        loss = sum(unit(targets) for unit in self.units)
        if hasattr(self, "scalar"):
            loss = loss + 0.5 * (self.scalar - targets["scalar"]) ** 2
        return loss


STARTS = {name.split(".")[-1]: p.detach().clone() for name, p in Net().named_parameters()}


def targets(t: int, rank: int, micro: int = 0) -> dict[str, Tensor]:
    """Minima that swing about the start and at times jump from side to side (so that ω rises), with noise per rank."""
    result = {}
    jump = 1.5 * (-1) ** t if t % 50 > 15 else 0.0
    for index, (name, start) in enumerate(STARTS.items()):
        generator = torch.Generator().manual_seed(index)
        direction = torch.randn(start.shape, generator=generator)
        # A replicated scalar that FSDP does not reduce must see the same data everywhere.
        generator.manual_seed(1 + index + 100 * (t + 1000 * (0 if name == "scalar" else rank + 10 * micro)))
        noise = torch.randn(start.shape, generator=generator)
        result[name] = start + direction * (0.5 * math.sin(t / 9) + jump) + 0.1 * noise
    return result


def learning_rate(t: int) -> float:
    return 1e-2 * (0.6 + 0.4 * math.cos(t / 30))


def make_optimizer(model: nn.Module, method: type = DiGraP, **options: Any) -> Any:
    named = [(n.replace("_fsdp_wrapped_module.", "").removeprefix("module."), p) for n, p in model.named_parameters()]
    kind = {"lora_b": "zero", "head": None}
    groups: dict[Any, dict] = {}
    for name, parameter in named:
        anchor = kind.get(name.split(".")[-1], "initial")
        groups.setdefault(anchor, {"params": [], "anchor": anchor})["params"].append((name, parameter))
    if method is DiGraP:
        options["omega_lr"] = 0.05
    return method(list(groups.values()), **options)


def shard(model: nn.Module, kind: str) -> tuple[nn.Module, Any]:
    """Wrap a model; returns it and the optimizer's ``process_group``."""
    world = dist.get_world_size()
    if kind == "ddp":
        return DistributedDataParallel(model), None
    if kind == "fsdp1":
        wrapped = FullyShardedDataParallel(
            model,
            use_orig_params=True,
            auto_wrap_policy=ModuleWrapPolicy({Unit}),
            device_id=torch.device("cpu"),
            ignored_states=[model.scalar] if hasattr(model, "scalar") else None,
        )
        return wrapped, None
    options: dict[str, Any] = {}
    if kind == "hsdp":
        options["mesh"] = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    else:
        options["mesh"] = init_device_mesh("cpu", (world,))
    if kind == "mixed":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if kind == "columns":
        options["shard_placement_fn"] = lambda p: Shard(1) if p.dim() == 2 and p.shape[1] % world == 0 else None
    for unit in model.units:
        fully_shard(unit, **options)
    ignored = {model.scalar} if hasattr(model, "scalar") else set()
    fully_shard(model, **options, ignored_params=ignored)
    return model, None


def train_sharded(kind: str, steps: int, options: dict, accumulate: int = 1, first: int = 0) -> dict:
    """Train on this rank; returns what the test compares, with unsharded parameters."""
    rank = dist.get_rank()
    model, group = shard(Net(scalar=kind != "mixed"), kind)
    optimizer = make_optimizer(model, process_group=group, **options)
    optimizer.init_state()
    collectives = []
    peak_omega = 0.0
    for t in range(first, first + steps):
        optimizer.param_groups[0]["lr"] = learning_rate(t)
        for g in optimizer.param_groups[1:]:
            g["lr"] = learning_rate(t)
        optimizer.zero_grad()
        for micro in range(accumulate):
            last = micro == accumulate - 1
            no_sync: Any = contextlib.nullcontext()
            if kind in ("ddp", "fsdp1") and not last:
                no_sync = model.no_sync()
            elif kind not in ("ddp", "fsdp1"):
                model.set_requires_gradient_sync(last)
            with no_sync:
                (model(targets(t, rank, micro)) / accumulate).backward()
        if t % 20 == 5:  # counting takes longer than the step
            with CommDebugMode() as comm:
                optimizer.step()
            collectives.append(comm.get_total_counts())
        else:
            optimizer.step()
        peak_omega = max(peak_omega, max(s.omega for s in optimizer.layer_stats().values()))
    return collect(model, optimizer) | {"collectives": collectives, "peak_omega": peak_omega}


def collect(model: nn.Module, optimizer: DiGraP) -> dict:
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            params = {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}
    else:
        params = {n.removeprefix("module."): full(p) for n, p in model.named_parameters()}
    return {
        "params": {name: p.numpy() for name, p in params.items()},
        "packed": optimizer._packed.numpy().copy(),
        "stats": optimizer.layer_stats(),
        "grad_norm": optimizer.grad_norm(),
    }


def full(p: Tensor) -> Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()


def train_alone(world: int, steps: int, options: dict, accumulate: int = 1, mixed: bool = False) -> dict:
    """The same training in one process: gradients of all ranks averaged."""
    model = Net(scalar=not mixed)
    optimizer = make_optimizer(model, **options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    far = dict.fromkeys(start, 0.0)
    for t in range(steps):
        for g in optimizer.param_groups:
            g["lr"] = learning_rate(t)
        total = [torch.zeros_like(p) for p in parameters]
        for rank in range(world):
            for micro in range(accumulate):
                if mixed:
                    low = Net(scalar=False).to(torch.bfloat16)
                    low.load_state_dict(model.state_dict())
                    (low(targets(t, rank, micro)) / accumulate).backward()
                    grads = [p.grad.float() for p in low.parameters() if p.requires_grad]
                else:
                    grads = torch.autograd.grad(model(targets(t, rank, micro)) / accumulate, parameters)
                for into, gradient in zip(total, grads, strict=True):
                    into += gradient / world
        for p, gradient in zip(parameters, total, strict=True):
            p.grad = gradient
        optimizer.step()
        for name, p in model.named_parameters():
            far[name] = max(far[name], (p.detach() - start[name]).norm().item())
    return collect(model, optimizer) | {"far": far}


def worst_error(ours: dict, reference: dict) -> float:
    """The largest ‖difference‖ over layers, each relative to the distance that the layer has travelled."""
    errors = {}
    for name, expected in reference["params"].items():
        difference = float(np.linalg.norm(ours["params"][name] - expected))
        errors[name] = difference / reference["far"][name] if reference["far"][name] else difference
    return max(errors.values())
