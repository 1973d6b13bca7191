"""Which ranks hold the same layers: a mesh tells, copies are proven to be copies, what cannot be told is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from scale_digrap import DiGraP
from scale_digrap.errors import ScaleDigrapError

pytestmark = pytest.mark.distributed


def gradient(stage: int, t: int, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * stage + t)
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(7 + stage))
    return direction * math.sin(t + stage) + 0.2 * torch.randn(shape, generator=generator)


def stage_layer(stage: int, same_seed: bool) -> nn.Linear:
    torch.manual_seed(0 if same_seed else stage)
    return nn.Linear(6, 4)


def alone(stage: int, same_seed: bool) -> dict[str, float]:
    layer = stage_layer(stage, same_seed)
    optimizer = DiGraP(
        layer.parameters(),
        lr=0.02,
        omega_lr=0.05,
        process_group=dist.new_group([dist.get_rank()], use_local_synchronization=True),
    )
    for t in range(15):
        for p in layer.parameters():
            p.grad = gradient(stage, t, p.shape)
        optimizer.step()
    return {n: s.drift for n, s in optimizer.layer_stats().items()}


def unnamed_stages(kind: str, same_seed: bool) -> None:
    """Two pipeline stages of two data-parallel ranks: layers of equal shapes, no names."""
    stage = dist.get_rank() // 2
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    layer: nn.Module = stage_layer(stage, same_seed)
    shapes = {name: p.shape for name, p in layer.named_parameters()}
    if kind == "fsdp2":
        fully_shard(layer, mesh=mesh["dp"])
    else:
        layer = FullyShardedDataParallel(
            layer, process_group=mesh["dp"].get_group(), use_orig_params=True, device_id=torch.device("cpu")
        )
    optimizer = DiGraP(layer.parameters(), lr=0.02, omega_lr=0.05)
    optimizer.init_state()
    for t in range(15):
        for (_, shape), p in zip(shapes.items(), layer.parameters(), strict=True):
            whole = gradient(stage, t, shape)
            if kind == "fsdp2":
                from torch.distributed.tensor import distribute_tensor

                p.grad = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
            elif p.numel():
                assert optimizer.layout is not None
                index = [id(other) for other in optimizer.layout.tensors].index(id(p))
                first = optimizer.layout.first_element(index)
                p.grad = whole.reshape(-1)[first : first + p.numel()].clone()
        optimizer.step()
    found = {n: s.drift for n, s in optimizer.layer_stats().items()}
    assert found == pytest.approx(alone(stage, same_seed), rel=1e-5)


def all_unnamed_stages() -> None:
    for same_seed in (False, True):
        for kind in ("fsdp2", "fsdp1"):
            unnamed_stages(kind, same_seed)


def test_a_mesh_tells_pipeline_stages_apart_without_names(dist_pool):
    dist_pool(4).run(all_unnamed_stages)


def plain_stages(same_seed: bool, named: bool, explicit: bool) -> str:
    """Plain tensors of two stages; only their values, or their gradients, say that they are no copies."""
    stage = dist.get_rank()
    layer = stage_layer(stage, same_seed)
    before = [p.detach().clone() for p in layer.parameters()]
    group = dist.group.WORLD if explicit else None
    optimizer = DiGraP(layer.named_parameters() if named else layer.parameters(), lr=0.02, process_group=group)
    for p in layer.parameters():
        p.grad = gradient(stage, 3, p.shape)
    with pytest.raises(ScaleDigrapError) as caught:
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    message = str(caught.value)
    assert ("other gradients" if same_seed else "other values") in message
    assert "\n" not in message
    return message


def all_plain_stages() -> None:
    for same_seed in (False, True):
        for named in (False, True):
            for explicit in (False, True):
                message = plain_stages(same_seed, named, explicit)
                assert ("'weight'" if named else "'param_0'") in message
                assert "process_group=" in message


def test_plain_stages_that_cannot_be_told_apart_are_refused(dist_pool):
    dist_pool(2).run(all_plain_stages)


def plain_stages_with_names_of_their_own() -> None:
    stage = dist.get_rank()
    layer = stage_layer(stage, False)
    optimizer = DiGraP([(f"stage{stage}.{n}", p) for n, p in layer.named_parameters()], lr=0.02, omega_lr=0.05)
    for t in range(15):
        for p in layer.parameters():
            p.grad = gradient(stage, t, p.shape)
        optimizer.step()
    found = [s.drift for s in optimizer.layer_stats().values()]
    assert found == pytest.approx(list(alone(stage, False).values()), rel=1e-6)


def copies() -> None:
    """DDP without names is what it was; the first steps may be without gradients, or not finite."""
    torch.manual_seed(dist.get_rank())
    model = DistributedDataParallel(nn.Linear(6, 4))
    optimizer = DiGraP(model.parameters(), lr=0.02)
    optimizer.step()
    for t, factor in enumerate((0.0, math.nan, 1.0, 1.0)):
        optimizer.zero_grad()
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(10 * t + dist.get_rank()))
        (model(x).square().mean() * factor).backward()
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.grad_norm() > 0
    seen = [torch.zeros(4, 6) for _ in range(2)]
    dist.all_gather(seen, model.module.weight.detach())
    assert torch.equal(*seen)


def test_named_stages_and_copies(dist_pool):
    dist_pool(2).run(plain_stages_with_names_of_their_own)
    dist_pool(2).run(copies)
