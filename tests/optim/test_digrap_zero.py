"""DiGraP under real DeepSpeed engines against the float64 twin, FSDP2 and one process, and what must be refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import scale_digrap.deepspeed
from scale_digrap import DiGraP
from scale_digrap.deepspeed import DeepSpeedError
from scale_digrap.optim.anchored import UnattachedError
from scale_digrap.sharding import zero as zero_module
from scale_digrap.sharding.zero import Segment, ZeroLayoutError, prove, read_table
from tests.optim.sharded_problem import Net, train_sharded, worst_error
from tests.optim.zero_problem import (
    client,
    ds_config,
    full_params,
    make_engine,
    run_step,
    start_deepspeed,
    sum_counter,
    train_zero,
    twin,
)

pytestmark = pytest.mark.distributed

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# Settings of DeepSpeed, parameter groups, options of DiGraP.
SETTINGS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "stage 0": ({"stage": 0}, "three", {}),
    "stage 0 bf16": ({"stage": 0, "bf16": True}, "three", {}),
    "stage 1": ({"stage": 1}, "three", {}),
    "stage 1, one group, weight decay": ({"stage": 1}, "one", {"weight_decay": 0.05}),
    "stage 1, tensor": ({"stage": 1}, "three", {"normalization": "tensor"}),
    "stage 1, round robin": ({"stage": 1, "round_robin_gradients": True}, "three", {}),
    "stage 1, alignment": ({"stage": 1, "parameter_alignment": True}, "three", {}),
    "stage 1 bf16": ({"stage": 1, "bf16": True}, "three", {}),
    "BF16_Optimizer": ({"stage": 1, "bf16": True, "grad_dtype": "fp32", "clip": 4.0}, "three", {}),
    "stage 2, clip, accumulation": ({"stage": 2, "clip": 4.0, "accumulate": 2}, "three", {}),
    "stage 2, round robin, one group": ({"stage": 2, "round_robin_gradients": True}, "one", {}),
    "stage 2, CPU offload, clip": ({"stage": 2, "clip": 4.0, **OFFLOAD}, "three", {}),
    "stage 2 bf16": ({"stage": 2, "bf16": True, "clip": 4.0}, "three", {}),
    "stage 3": ({"stage": 3}, "three", {"weight_decay": 0.05}),
    "stage 3, tensor, one group": ({"stage": 3}, "one", {"normalization": "tensor"}),
    "stage 3, sub-groups, clip, accumulation": (
        {"stage": 3, "sub_group_size": 40, "clip": 4.0, "accumulate": 2},
        "three",
        {},
    ),
    "stage 3, CPU offload, sub-groups, clip": ({"stage": 3, "sub_group_size": 40, "clip": 4.0, **OFFLOAD}, "three", {}),
    "stage 3, persistent parameters": ({"stage": 3, "stage3_param_persistence_threshold": 100}, "three", {}),
    "stage 3 bf16, sub-groups, clip": ({"stage": 3, "bf16": True, "sub_group_size": 40, "clip": 4.0}, "three", {}),
}
HPZ = {"hpZ": ({"stage": 3, "zero_hpz_partition_size": 3}, "three", {})}


def train_all(settings: dict[str, tuple], steps: int) -> dict[str, dict]:
    results = {}
    for name, (zero, groups, options) in settings.items():
        results[name] = train_zero(ds_config(**zero), steps, groups, zero.get("bf16", False), **options)
    return results


def check(name: str, settings: tuple, results: list[dict], world: int, steps: int, tolerance: float) -> None:
    zero, groups, options = settings
    bf16 = zero.get("bf16", False)
    reference = twin(
        world, steps, groups, zero.get("accumulate", 1), zero.get("clip", 0.0),
        gradients=results[0]["gradients"] if bf16 else None, bf16=bf16, **options,
    )  # fmt: skip
    for result in results:
        assert worst_error(result, reference) <= tolerance, name
        # Bitwise the same ω, moments, signs and counts on every rank.
        assert np.array_equal(result["packed"], results[0]["packed"]), name
        assert set(result["reductions"]) == {1}, f"{name}: one reduction per training step, for all groups"
        assert result["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5), name
    stats = results[0]["stats"]
    moment = dict(zip(results[0]["names"], results[0]["packed"][1], strict=True))
    for layer, omega in reference["omega"].items():
        assert stats[layer].omega == pytest.approx(omega, abs=1e-4), (name, layer)
        assert moment[layer] == pytest.approx(reference["moment"][layer], abs=1e-4), (name, layer)
        assert stats[layer].conflict_rate * steps == pytest.approx(reference["conflicts"][layer]), (name, layer)
    assert results[0]["peak_omega"] > 0.05, "without ω > 0 nothing was projected and the run says nothing"
    assert any(0.1 < s.conflict_rate < 0.9 for s in stats.values())
    if zero["stage"] and options.get("normalization") != "tensor":
        assert results[0]["straddling_rows"] > 0, "no row is cut by a rank's end"
    if "sub_group_size" in zero:
        assert results[0]["flats"] > (3 if groups == "three" else 1), "one sub-group per group shows nothing"


# Every setting for a while on 2 ranks; on 3 ranks those where a rank more makes the most difference, for long.
LONG = ["stage 1", "BF16_Optimizer", "stage 2, round robin, one group", "stage 3, sub-groups, clip, accumulation"]


@pytest.mark.parametrize(("world", "steps", "names"), [(2, 30, list(SETTINGS)), (3, 100, LONG), (3, 30, list(HPZ))])
def test_against_the_twin(dist_pool, world, steps, names):
    settings = {name: (SETTINGS | HPZ)[name] for name in names}
    runs = dist_pool(world).run(train_all, settings, steps)
    for name, setting in settings.items():
        check(name, setting, [run[name] for run in runs], world, steps, 1e-5)


def test_like_fsdp2_and_one_process(dist_pool):
    """Short runs, fp32: the same trajectory as another way of sharding, to rounding."""
    settings = {name: SETTINGS[name] for name in ("stage 1", "stage 3")}
    fsdp = dist_pool(2).run(train_sharded, "fsdp2", 30, {})[0]
    distances = twin(2, 30)["far"]
    runs = dist_pool(2).run(train_all, {name: (zero, groups, {}) for name, (zero, groups, _) in settings.items()}, 30)
    reference = {"params": {name: fsdp["params"][name] for name in distances}, "far": distances}
    for run in runs:
        for result in run.values():
            assert worst_error(result, reference) <= 1e-6


# -- integers: sums must be right to the bit -------------------------------------------------------------------------


class Linear(nn.Module):
    """A loss that is linear in every parameter, so that the gradient is whatever integers the test likes."""

    SHAPES = ((7, 13), (13,), (5, 13), (1,), (3, 5), (64,), (11, 3), (1, 1))

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randint(-3, 4, shape, generator=generator).float()) for shape in self.SHAPES
        )

    def forward(self, factors: list[torch.Tensor]) -> torch.Tensor:
        return sum((w * f.to(w.dtype)).float().sum() for w, f in zip(self.weights, factors, strict=True))


def factors(t: int, rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * t + rank)
    return [dist.get_world_size() * torch.randint(-2, 3, s, generator=generator).float() for s in Linear.SHAPES]


def integer_sums(config: dict, poison: bool) -> None:
    start_deepspeed()
    model = Linear()
    start = [w.detach().clone() for w in model.weights]
    # Anchors away from the weights: drift from the first step on. lr = 0 keeps the weights integers.
    generator = torch.Generator().manual_seed(9)
    offsets = [torch.randint(-3, 4, w.shape, generator=generator).float() for w in start]
    anchors = {f"weights.{i}": w - o for i, (w, o) in enumerate(zip(start, offsets, strict=True))}
    groups = [
        {"params": [(n, p) for n, p in model.named_parameters() if (p.dim() > 1) is wide]} for wide in (True, False)
    ]
    optimizer = DiGraP(groups, lr=0.0, anchor=anchors)
    engine, *_ = scale_digrap.deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    layout = optimizer.layout
    if poison:
        for k, flat in enumerate(layout.tensors):
            padding = torch.ones(flat.numel(), dtype=torch.bool)
            for index, holder in enumerate(layout.holders):
                if holder == k:
                    layout.local(index, padding)[:] = False
            for tensor in (flat, optimizer.state[flat]["anchor"], optimizer.state[flat]["exp_avg"]):
                tensor.detach().view(-1)[padding] = math.nan
    for t in range(3):
        engine.backward(engine(factors(t, dist.get_rank())))
        engine.step()
        every = [factors(t, rank) for rank in range(dist.get_world_size())]
        sums = optimizer._last["sums"]
        for index, name in enumerate(optimizer._names):
            i = int(name.split(".")[1])
            gradient = sum(f[i] for f in every) / dist.get_world_size()
            assert sums[0, index].item() == float((gradient * offsets[i]).sum()), (t, name, config)
            norms = [float(offsets[i].square().sum()), float(gradient.square().sum())]
            assert sums[1:3, index].tolist() == pytest.approx(norms, rel=1e-6), (t, name, config)  # squared roots


def all_integer_sums() -> None:
    for poison in (False, True):
        for zero in (
            {"stage": 1},
            {"stage": 2, "round_robin_gradients": True},
            {"stage": 2, **OFFLOAD},
            {"stage": 3, "sub_group_size": 20},
            {"stage": 3, **OFFLOAD},
        ):
            integer_sums(ds_config(**zero), poison)
            integer_sums(ds_config(**zero, bf16=True), poison)


@pytest.mark.parametrize("world", [2, 3])
def test_integer_sums_to_the_bit_and_padding_is_never_read(dist_pool, world):
    dist_pool(world).run(all_integer_sums)


# -- a wrong table is caught -----------------------------------------------------------------------------------------


def wrong_tables() -> None:
    """DeepSpeed's own table of fragments, which is wrong under round robin; and tables that are off by one."""
    engine, _ = make_engine(ds_config(1, round_robin_gradients=True))
    table = read_table(engine)
    names = [f"{i}" for i in range(len(table.params))]
    prove(table, names)
    fragments = []
    for param in table.params:
        mapping = param._hp_mapping
        if mapping is None:
            fragments.append(Segment(0, 0, 0))
            continue
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        fragments.append(Segment(here.start, here.numel, there.start))
    with pytest.raises(ZeroLayoutError, match="is not where"):
        prove(replaced(table, fragments), names)
    moved = [Segment(max(0, s.start - 1), s.numel, s.offset) for s in table.segments]
    with pytest.raises(ZeroLayoutError, match="ranks hold other values"):
        prove(replaced(table, moved), names)
    short = [Segment(s.start, max(0, s.numel - 1), s.offset) for s in table.segments]
    with pytest.raises(ZeroLayoutError, match="elements are covered"):
        prove(replaced(table, short), names)


def replaced(table: Any, segments: list[Segment]) -> Any:
    import dataclasses

    return dataclasses.replace(table, segments=segments)


def train_with_swapped_layers() -> dict:
    """A table whose proof is left out, with two layers of equal size swapped: the comparison must notice."""
    real_read, real_prove = zero_module.read_table, zero_module.prove
    from scale_digrap.deepspeed import engine as engine_module

    def swapped(engine: Any) -> Any:
        table = real_read(engine)
        segments = list(table.segments)
        sizes = [getattr(p, "ds_numel", p.numel()) for p in table.params]
        a, b = sizes.index(1), sizes.index(7)
        segments[a], segments[b] = Segment(segments[b].start, min(1, segments[b].numel), 0), segments[a]
        return replaced(table, segments)

    engine_module.read_table, engine_module.prove = swapped, lambda *_: None
    try:
        return train_zero(ds_config(2), 30)
    finally:
        engine_module.read_table, engine_module.prove = real_read, real_prove


def test_a_wrong_table_is_caught_by_the_proof_and_by_the_trajectory(dist_pool):
    dist_pool(2).run(wrong_tables)
    results = dist_pool(2).run(train_with_swapped_layers)
    assert max(worst_error(result, twin(2, 30)) for result in results) > 1e-3


# -- unused parameters, overflow -------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, use_b: bool) -> torch.Tensor:
        return (self.a(x) + (self.b(x) if use_b else 0)).square().mean()


def unused(accumulate: int, offload: bool) -> None:
    """b is used in some steps only, or only in late micro-batches: never with the gradient of an earlier step."""
    start_deepspeed()
    model = Branches()
    alone = copy.deepcopy(model)
    extra = OFFLOAD if offload else {}
    engine, *_ = scale_digrap.deepspeed.initialize(
        model=model,
        optimizer=DiGraP(model.named_parameters(), lr=1e-2, omega_lr=0.05),
        config=ds_config(3, accumulate=accumulate, clip=0.5, **extra),
    )
    theirs = DiGraP(alone.named_parameters(), lr=1e-2, omega_lr=0.05, process_group=dist.new_subgroups(1)[0])
    pattern = [[True], [False], [True], [False], [False], [True]]
    if accumulate == 2:
        pattern = [[True, True], [False, True], [True, False], [False, False], [False, True], [True, True]]
    for t, uses in enumerate(pattern):
        for micro, use in enumerate(uses):
            every = [data(t, micro, rank) for rank in range(dist.get_world_size())]
            engine.backward(engine(every[dist.get_rank()], use))
            engine.step()
            for x in every:
                (alone(x, use) / (len(every) * len(uses))).backward()
        nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
        theirs.step()
        theirs.zero_grad()
    params = dict(scale_digrap.deepspeed.full_tensors(engine, "param"))
    for name, p in alone.named_parameters():
        assert torch.allclose(params[name], p, atol=1e-6), (name, accumulate, offload)
    ours, expected = client(engine).layer_state(), theirs.layer_state()
    for name in expected:
        assert ours[name]["step"] == expected[name]["step"], name
        assert ours[name]["omega_exp_avg"] == pytest.approx(expected[name]["omega_exp_avg"], abs=1e-4), name


def data(t: int, micro: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1000 * t + 100 * micro + rank))


def all_unused() -> None:
    for accumulate in (1, 2):
        for offload in (False, True):
            unused(accumulate, offload)


def test_stage_3_never_steps_with_a_gradient_of_an_earlier_step(dist_pool):
    dist_pool(2).run(all_unused)


def overflow(stage: int) -> None:
    """A NaN on one rank: nothing moves on any, the next steps go on."""
    start_deepspeed()
    model = Branches()
    optimizer = DiGraP(model.named_parameters(), lr=1e-2)
    engine, *_ = scale_digrap.deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(stage))
    for t in range(4):
        x = data(t, 0, dist.get_rank())
        if t == 2 and dist.get_rank() == 1:
            x = x * math.nan
        before, scalars = snapshot(engine), optimizer.layer_state()
        engine.backward(engine(x, True))
        engine.step()
        moved = any(not np.array_equal(before[n], p) for n, p in snapshot(engine).items())
        assert moved is (t != 2)
        assert (optimizer.layer_state() != scalars) is (t != 2)
    assert {state["step"] for state in optimizer.layer_state().values()} == {3.0}


def snapshot(engine: Any) -> dict[str, np.ndarray]:
    return full_params(engine)


def all_overflows() -> None:
    for stage in (0, 1, 2, 3):
        overflow(stage)


def test_overflow_on_one_rank(dist_pool):
    dist_pool(2).run(all_overflows)


# -- refusals --------------------------------------------------------------------------------------------------------


def unattached() -> None:
    deepspeed = start_deepspeed()
    for stage in (1, 2, 3):
        model = Net(scalar=False)
        optimizer = DiGraP(model.named_parameters(), lr=1e-2)
        config = ds_config(stage) | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        with pytest.raises(UnattachedError, match=r"scale_digrap\.deepspeed\.attach\(engine\)"):
            run_step(engine, 0)
        # After the line that the error asks for, it works.
        model = Net(scalar=False)
        optimizer = DiGraP(model.named_parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        scale_digrap.deepspeed.attach(engine)
        run_step(engine, 0)
        with pytest.raises(DeepSpeedError, match="attached already"):
            scale_digrap.deepspeed.attach(engine)
        with pytest.raises(ZeroLayoutError, match=r"engine\.step"):
            optimizer.step()


def refused() -> None:
    start_deepspeed()
    for zero, reason in (
        ({"stage": 1, "elastic_checkpoint": True}, "elastic_checkpoint"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere"}}, "NVMe"),
        ({"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nowhere"}}, "NVMe"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "ratio"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}, "SuperOffload"),
        ({"stage": 2, "zenflow": {"topk_ratio": 0.1}, **OFFLOAD}, "ZenFlow"),
    ):
        with pytest.raises(DeepSpeedError, match=reason):
            make_engine(ds_config(**zero))
    with pytest.raises(DeepSpeedError, match="names an optimizer too"):
        make_engine(ds_config(1) | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}})
    with pytest.raises(DeepSpeedError, match="zero_allow_untested_optimizer"):
        make_engine(ds_config(1) | {"zero_allow_untested_optimizer": False})
    # At attach, where something else has called deepspeed.initialize.
    for attribute, value, reason in (
        ("elastic_checkpoint", True, "elastic_checkpoint"),
        ("zenflow", True, "ZenFlow"),
        ("swap_optimizer", True, "NVMe"),
        ("torch_autocast_gradscaler", object(), "GradScaler"),
    ):
        with pytest.raises(DeepSpeedError, match=reason):
            attach_with(attribute, value)
    with pytest.raises(DeepSpeedError, match=r"tensor-parallel layers \(first: 'units\.0\.odd'\)"):
        attach_with("mpu", None)
    model = Net(scalar=False)
    optimizer = DiGraP(model.named_parameters(), lr=1e-2)
    engine = bare_engine(model, optimizer)
    optimizer._given = optimizer._given[1:]  # as if a parameter had been put into a group behind its back
    with pytest.raises(DeepSpeedError, match=r"'units\.0\.odd'.* was not given"):
        scale_digrap.deepspeed.attach(engine)


def bare_engine(model: nn.Module, optimizer: DiGraP) -> Any:
    config = ds_config(1) | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return start_deepspeed().initialize(model=model, optimizer=optimizer, config=config)[0]


def attach_with(attribute: str, value: Any) -> None:
    model = Net(scalar=False)
    engine = bare_engine(model, DiGraP(model.named_parameters(), lr=1e-2))
    if attribute == "mpu":

        class TwoWay:
            def get_model_parallel_world_size(self) -> int:
                return 2

        engine.mpu = TwoWay()
        engine.module.units[0].odd.tensor_model_parallel = True
    else:
        setattr(engine.optimizer, attribute, value)
    scale_digrap.deepspeed.attach(engine)


def changed_gradient() -> None:
    """A DeepSpeed that hands over another gradient than it held: refused, not half-stepped with it."""
    engine, _ = make_engine(ds_config(1))
    zero = engine.optimizer
    original = zero._optimizer_step

    def changed(number: int) -> Any:
        zero.single_partition_of_fp32_groups[number].grad.mul_(1.5)
        return original(number)

    zero._optimizer_step = changed
    with pytest.raises(ZeroLayoutError, match="is not the one that DeepSpeed held"):
        run_step(engine, 0)


def test_unattached_steps_are_refused(dist_pool):
    dist_pool(2).run(unattached)


def test_refusals(dist_pool):
    dist_pool(2).run(refused)
    dist_pool(2).run(changed_gradient)


def names_and_options() -> dict:
    """Parameters given without names take the model's; a frozen layer and one without an anchor are left alone."""
    start_deepspeed()
    model = Net(scalar=False)
    optimizer = DiGraP(list(model.parameters()), lr=1e-2)
    engine, *_ = scale_digrap.deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(3))
    count = sum_counter(optimizer)
    run_step(engine, 0)
    trained = [name for name, p in Net(scalar=False).named_parameters() if p.requires_grad]
    assert sorted(optimizer.layer_stats()) == sorted(trained)
    assert count == [1]
    anchors = {name: tensor.dtype for name, tensor in scale_digrap.deepspeed.full_tensors(engine, "anchor")}
    assert sorted(anchors) == sorted(trained)
    plain = nn.Linear(3, 3)
    adamw = torch.optim.AdamW(plain.parameters())
    other, *_ = scale_digrap.deepspeed.initialize(model=plain, optimizer=adamw, config=ds_config(1))
    with pytest.raises(DeepSpeedError, match="keeps no layers"):
        next(scale_digrap.deepspeed.full_tensors(other, "param"))
    return anchors


def test_names_and_other_optimizers(dist_pool):
    dist_pool(2).run(names_and_options)
