"""DiGraP on real gloo ranks against one process, for every kind of sharding it supports."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from scale_digrap import DiGraP
from tests.optim.sharded_problem import Net, shard, targets, train_alone, train_sharded, worst_error

pytestmark = pytest.mark.distributed


def check(results: list[dict], reference: dict, tolerance: float) -> None:
    for result in results:
        assert worst_error(result, reference) <= tolerance
        # Bitwise the same ω, moments, signs and counts on every rank and replica.
        assert np.array_equal(result["packed"], results[0]["packed"])
        assert repr(result["stats"]) == repr(results[0]["stats"])  # repr: NaN equals NaN
        assert result["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
        assert set(result["collectives"]) == {1}, "one all-reduce per step, for all layers"
    for name, stats in reference["stats"].items():
        assert results[0]["stats"][name].omega == pytest.approx(stats.omega, abs=1e-4), name
        assert results[0]["stats"][name].drift == pytest.approx(stats.drift, rel=1e-4), name


@pytest.mark.parametrize(("world", "normalization"), [(2, "row"), (4, "row"), (2, "tensor")])
def test_fsdp2_200_steps(dist_pool, world, normalization):
    options = {"normalization": normalization, "weight_decay": 0.05}
    reference = train_alone(world, 200, options)
    results = dist_pool(world).run(train_sharded, "fsdp2", 200, options)
    check(results, reference, 1e-5)
    assert results[0]["peak_omega"] > 0.05, "without ω > 0 nothing was projected and the run says nothing"
    assert any(0.1 < stats.conflict_rate < 0.9 for stats in results[0]["stats"].values())


@pytest.mark.parametrize(
    ("kind", "world", "options", "accumulate"),
    [
        ("fsdp2", 2, {}, 3),
        ("columns", 2, {}, 1),
        ("columns", 4, {"normalization": "tensor"}, 1),
        ("columns", 4, {"weight_decay": 0.1}, 1),
        ("hsdp", 4, {}, 1),
        ("ddp", 2, {}, 1),
        ("ddp", 4, {}, 2),
        ("fsdp1", 2, {}, 1),
        ("fsdp1", 4, {"weight_decay": 0.05}, 2),
        ("fsdp1", 4, {"normalization": "tensor"}, 1),
    ],
)
def test_short_runs(dist_pool, kind, world, options, accumulate):
    reference = train_alone(world, 30, options, accumulate)
    results = dist_pool(world).run(train_sharded, kind, 30, options, accumulate)
    check(results, reference, 1e-6)
    assert results[0]["peak_omega"] > 0.01


def test_mixed_precision_with_fp32_parameters(dist_pool):
    """Compute in bf16, parameters and reduction in fp32: as one process that rounds the weights itself."""
    reference = train_alone(2, 30, {}, mixed=True)
    results = dist_pool(2).run(train_sharded, "mixed", 30, {})
    check(results, reference, 1e-6)


def mapped(kind: str) -> None:
    """Anchors given as unsharded tensors: every rank must keep its own part of each, in the right place."""
    model = Net(scalar=False)
    generator = torch.Generator().manual_seed(0)
    offsets = {n: torch.randint(-4, 5, p.shape, generator=generator).float() for n, p in model.named_parameters()}
    anchors = {n: p.detach() + offsets[n] for n, p in model.named_parameters()}
    wrapped, group = shard(model, kind)
    clean = {n.replace("_fsdp_wrapped_module.", "").removeprefix("module."): p for n, p in wrapped.named_parameters()}
    optimizer = DiGraP(clean.items(), lr=0.0, anchor=anchors, process_group=group)
    wrapped(targets(0, dist.get_rank())).backward()
    optimizer.step()
    for name, stats in optimizer.layer_stats().items():
        assert stats.drift == pytest.approx(offsets[name].norm().item(), rel=1e-5), name
        assert stats.relative_drift == pytest.approx((offsets[name].norm() / anchors[name].norm()).item(), rel=1e-5)
    for name, p in clean.items():
        if isinstance(p, DTensor) and p.requires_grad:
            assert torch.equal(optimizer.state[p]["anchor"].full_tensor().float(), anchors[name]), name


@pytest.mark.parametrize(("kind", "world"), [("fsdp2", 4), ("columns", 4), ("hsdp", 4), ("ddp", 2), ("fsdp1", 4)])
def test_anchors_from_a_mapping(dist_pool, kind, world):
    dist_pool(world).run(mapped, kind)


def half_without_gradient() -> None:
    """A shard without a gradient beside one that has it: zero there, and its drift counts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    start = torch.randn(4, 3)
    sharded = torch.nn.Parameter(distribute_tensor(start, init_device_mesh("cpu", (2,)), [Shard(0)]))
    alone = torch.nn.Parameter(start.clone())
    ours = DiGraP([("w", sharded)], lr=1e-2, omega_lr=0.05)
    theirs = DiGraP([("w", alone)], lr=1e-2, omega_lr=0.05, process_group=dist.new_subgroups(1)[0])
    for t in range(40):
        gradient = torch.randn(4, 3, generator=torch.Generator().manual_seed(t)) + (-1) ** t
        if t % 3 == 1:
            gradient[2:] = 0  # rank 1's half
        alone.grad = gradient
        sharded.grad = DTensor.from_local(
            gradient[:2] if dist.get_rank() == 0 else gradient[2:], sharded.device_mesh, [Shard(0)]
        )
        if t % 3 == 1 and dist.get_rank() == 1:
            sharded.grad = None
        ours.step()
        theirs.step()
    assert torch.allclose(sharded.full_tensor(), alone, rtol=1e-5, atol=1e-6)
    assert ours.layer_stats()["w"].drift == pytest.approx(theirs.layer_stats()["w"].drift, rel=1e-5)


def some_ranks_without_gradient() -> dict:
    """FSDP1 leaves ``grad = None`` on a rank without a piece; a layer moves if any rank has a gradient for it."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = DiGraP(layer.named_parameters(), lr=1e-2)
    for _ in range(3):
        layer.weight.grad = torch.ones(2, 3) if dist.get_rank() == 0 else None
        layer.bias.grad = None
        optimizer.step()
    return {
        "steps": [float(optimizer.state[p]["step"]) for p in (layer.weight, layer.bias)],
        "packed": optimizer._packed.numpy().copy(),
        "norm": optimizer.layer_stats()["weight"].grad_norm,
    }


def test_layers_live_by_agreement(dist_pool):
    dist_pool(2).run(half_without_gradient)
    results = dist_pool(2).run(some_ranks_without_gradient)
    for result in results:
        assert result["steps"] == [3.0, 0.0]
        assert np.array_equal(result["packed"], results[0]["packed"])
        assert result["norm"] == pytest.approx(math.sqrt(3))
