"""DiGraP where tensors are cut in several ways at once: TP, sequence parallelism's Partial gradients, FSDP2 x TP,
meshes that differ between layers, and pipeline stages that hold other layers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

from scale_digrap import DiGraP
from tests.optim.sharded_problem import full, worst_error

pytestmark = pytest.mark.distributed
STEPS = 30


class Block(nn.Module):
    def __init__(self, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.outside_plan = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x)))) * self.outside_plan


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def batch(t: int, dp_rank: int) -> tuple[Tensor, Tensor]:
    """Targets that swing and jump: <g, δ> changes sign, ω rises."""
    generator = torch.Generator().manual_seed(1000 * t + dp_rank)
    x = torch.randn(4, 4, 8, generator=generator)
    sway = math.sin(t / 5) + (2.0 * (-1) ** t if t % 20 > 6 else 0.0)
    return x, x.flip(-1) * sway


def loss_of(model: nn.Module, t: int, dp_rank: int) -> Tensor:
    x, y = batch(t, dp_rank)
    return ((model(x) - y) ** 2).mean()


def plan_of(sequence: bool) -> dict[str, Any]:
    plan: dict[str, Any] = {}
    for i in range(2):
        if sequence:
            plan[f"blocks.{i}.norm"] = SequenceParallel()
            plan[f"blocks.{i}"] = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),))
            plan[f"blocks.{i}.up"] = ColwiseParallel(input_layouts=Shard(1))
            plan[f"blocks.{i}.down"] = RowwiseParallel(output_layouts=Replicate())
        else:
            plan[f"blocks.{i}.up"] = ColwiseParallel()
            plan[f"blocks.{i}.down"] = RowwiseParallel()
    return plan


def train(kind: str, options: dict) -> dict:
    world = dist.get_world_size()
    model: nn.Module = Net()
    dp_rank = 0
    if kind in ("tp", "sequence"):
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
        parallelize_module(model, mesh, plan_of(kind == "sequence"))
    elif kind == "fsdp_tp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], plan_of(False))
        for block in model.blocks:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
        dp_rank = mesh["dp"].get_local_rank()
        placements = {type(pl) for p in model.parameters() for pl in p.placements}
        assert _StridedShard in placements, "the case that is_shard() misses"
        assert len({p.device_mesh for p in model.parameters()}) > 1, "layers outside the plan live on another mesh"
    optimizer = DiGraP(model.named_parameters(), lr=1e-2, omega_lr=0.05, **options)
    partial = False
    for t in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, t, dp_rank).backward()
        grads = [p.grad for p in model.parameters()]
        partial |= any(isinstance(g, DTensor) and any(pl.is_partial() for pl in g.placements) for g in grads)
        optimizer.step()
    assert partial == (kind == "sequence"), "a Partial gradient is what the sequence-parallel case is about"
    return result_of(model, optimizer)


def result_of(model: nn.Module, optimizer: DiGraP) -> dict:
    return {
        "params": {name: full(p).numpy() for name, p in model.named_parameters()},
        "packed": optimizer._packed.numpy().copy(),
        "stats": optimizer.layer_stats(),
        "straddling": optimizer._layout.n_slots,
    }


def train_alone(dp: int, options: dict) -> dict:
    model = Net()
    optimizer = DiGraP(model.named_parameters(), lr=1e-2, omega_lr=0.05, **options)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    far = dict.fromkeys(start, 0.0)
    for t in range(STEPS):
        optimizer.zero_grad()
        (sum(loss_of(model, t, r) for r in range(dp)) / dp).backward()
        optimizer.step()
        for n, p in model.named_parameters():
            far[n] = max(far[n], (p.detach() - start[n]).norm().item())
    return result_of(model, optimizer) | {"far": far}


@pytest.mark.parametrize("normalization", ["row", "tensor"])
@pytest.mark.parametrize(("kind", "world"), [("tp", 2), ("tp", 4), ("sequence", 2), ("fsdp_tp", 4)])
def test_tensor_parallel(dist_pool, kind, world, normalization):
    options = {"normalization": normalization}
    reference = train_alone(2 if kind == "fsdp_tp" else 1, options)
    results = dist_pool(world).run(train, kind, options)
    for result in results:
        assert np.array_equal(result["packed"], results[0]["packed"])
        # Activations are reduced in another order than in one process, from the first step on.
        assert worst_error(result, reference) <= 2e-5
    assert max(stats.omega for stats in results[0]["stats"].values()) > 0.01
    assert (results[0]["straddling"] > 0) == (normalization == "row"), "row-wise weights are cut across their rows"


def strided_sums() -> None:
    """Full sums of every layer under FSDP2 x TP, by value: what is_shard() gets wrong."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = Net()
    whole = {n: p.detach().clone() for n, p in model.named_parameters()}
    parallelize_module(model, mesh["tp"], plan_of(False))
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = DiGraP(model.named_parameters(), lr=0.0, anchor="zero")
    for p in model.parameters():
        p.grad = p.detach().clone()
    optimizer.step()
    for name, stats in optimizer.layer_stats().items():
        assert stats.grad_norm == pytest.approx(whole[name].norm().item(), rel=1e-6), name
        assert stats.cosine == pytest.approx(1.0, rel=1e-6) or not whole[name].any(), name
    mapping = {name: value + torch.arange(float(value.numel())).view_as(value) for name, value in whole.items()}
    mapped = DiGraP(model.named_parameters(), lr=0.0, anchor=mapping)
    mapped.init_state()
    for name, p in model.named_parameters():
        assert torch.equal(mapped.state[p]["anchor"].full_tensor().float(), mapping[name]), name


def test_strided_shards_are_counted_once(dist_pool):
    dist_pool(4).run(strided_sums)


def pipeline_stage() -> dict:
    """Two stages of two data-parallel ranks, each with layers of its own: a sum over the world would be wrong."""
    rank, stage = dist.get_rank(), dist.get_rank() // 2
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    torch.manual_seed(stage)
    layer = nn.Linear(6, 5 + stage)
    start = {n: p.detach().clone() for n, p in layer.named_parameters()}
    fully_shard(layer, mesh=mesh["dp"])
    named = [(f"stage{stage}.{n}", p) for n, p in layer.named_parameters()]
    optimizer = DiGraP(named, lr=1e-2, omega_lr=0.05)
    for t in range(20):
        for _, p in named:
            p.grad = torch.full_like(p, math.sin(t) * (-1) ** t)
        optimizer.step()
    norms = {n: s.grad_norm for n, s in optimizer.layer_stats().items()}
    numel = {f"stage{stage}.{n}": p.numel() for n, p in start.items()}
    for name, norm in norms.items():
        assert norm == pytest.approx(abs(math.sin(19)) * math.sqrt(numel[name]), rel=1e-6)
    return {"stage": stage, "rank": rank, "packed": optimizer._packed.numpy().copy()}


def test_pipeline_stages_reduce_among_themselves(dist_pool):
    results = dist_pool(4).run(pipeline_stage)
    for a in results:
        for b in results:
            if a["stage"] == b["stage"]:
                assert np.array_equal(a["packed"], b["packed"])


def disagreeing_group() -> str:
    layer = nn.Linear(3, 2 + dist.get_rank())
    optimizer = DiGraP(layer.named_parameters(), process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="different sets of layers") as caught:
        optimizer.init_state()
    return str(caught.value)


def test_an_explicit_group_must_agree(dist_pool):
    assert "pipeline stage" in dist_pool(2).run(disagreeing_group)[0]
