"""SPD and L2-SP against float64 twins, on every way of sharding and in one process."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scale_digrap import AdamL2SP, AdamSPD
from tests.optim.reference import Layer
from tests.optim.sharded_problem import train_alone, train_sharded, worst_error
from tests.optim.zero_problem import ds_config, train_zero, twin

WEIGHT_DECAY = 0.02


@dataclass
class SpdLayer(Layer):
    """SPD from its formulas: one whole layer in float64."""

    strength: float = 0.5
    decays: int = 0
    farthest: float = 0.0

    def step(self, gradient: Tensor, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        before, anchor = self.theta.clone(), self.anchor
        self.anchor = None
        super().step(gradient, lr, betas, eps)  # without an anchor the twin is AdamW
        self.anchor = anchor
        if anchor is None or (gradient.double() * (before - anchor)).sum() <= 0:
            return
        distance = (self.theta - anchor).norm().item()
        if distance == 0:
            return
        r = min(max((distance - (before - anchor).norm().item()) / distance, 0.0), 1.0)
        self.decays += r > 0
        self.farthest = max(self.farthest, r)
        self.theta = self.theta - self.strength * r * (self.theta - anchor)


@dataclass
class L2spLayer(Layer):
    """L2-SP from its formulas."""

    strength: float = 0.01

    def step(self, gradient: Tensor, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        anchor, self.anchor = self.anchor, None
        penalty = 0 if anchor is None else self.strength * (self.theta - anchor)
        super().step(gradient.double() + penalty, lr, betas, eps)
        self.anchor = anchor


METHODS: dict[str, tuple[type, type[Layer], float]] = {
    "spd": (AdamSPD, SpdLayer, 0.8),
    "l2sp": (AdamL2SP, L2spLayer, 0.3),
}
SHARDED = {2: ("fsdp2", "ddp"), 4: ("columns", "hsdp", "fsdp1")}
ZERO: dict[str, dict[str, Any]] = {
    "stage 0 bf16": {"stage": 0, "bf16": True},
    "stage 1": {"stage": 1},
    "stage 2, clip, accumulation": {"stage": 2, "clip": 4.0, "accumulate": 2},
    "stage 3, sub-groups, clip": {"stage": 3, "sub_group_size": 40, "clip": 4.0},
    "stage 3 bf16": {"stage": 3, "bf16": True},
}


def options_of(name: str) -> dict[str, Any]:
    method, _, strength = METHODS[name]
    return {"method": method, "strength": strength, "weight_decay": WEIGHT_DECAY}


@pytest.mark.parametrize("name", METHODS)
def test_one_process_is_the_twin(name):
    _, layer, strength = METHODS[name]
    alone = train_alone(2, 150, options_of(name))
    reference = twin(2, 150, layer=layer, strength=strength, weight_decay=WEIGHT_DECAY)
    shared = {n: alone["params"][n] for n in reference["params"]}
    assert worst_error({**alone, "params": shared}, reference) <= 1e-5
    plain = twin(2, 150, weight_decay=WEIGHT_DECAY, layer=L2spLayer, strength=0.0)
    assert worst_error({**alone, "params": shared}, plain) > 1e-3, "the method does nothing here"
    if name == "spd":
        layers = reference["layers"].values()
        assert sum(one.decays for one in layers) > 20
        assert max(one.farthest for one in layers) > 1e-3


def train_kinds(kinds: tuple[str, ...], steps: int) -> dict[tuple[str, str], dict]:
    return {(kind, name): train_sharded(kind, steps, options_of(name)) for kind in kinds for name in METHODS}


@pytest.mark.distributed
@pytest.mark.parametrize("world", SHARDED)
def test_sharded_is_one_process(dist_pool, world):
    results = dist_pool(world).run(train_kinds, SHARDED[world], 30)
    for name in METHODS:
        reference = train_alone(world, 30, options_of(name))
        for kind in SHARDED[world]:
            for result in results:
                assert worst_error(result[kind, name], reference) <= 1e-6, (kind, name)
                assert np.array_equal(result[kind, name]["packed"], results[0][kind, name]["packed"])
            # SPD must know how far the layers are after the update; without a selected layer it does not ask.
            allowed = {1} if name == "l2sp" else {1, 2}
            assert set(results[0][kind, name]["collectives"]) <= allowed


def train_stages(steps: int) -> dict[tuple[str, str], dict]:
    return {
        (stage, name): train_zero(ds_config(**zero), steps, "three", zero.get("bf16", False), **options_of(name))
        for stage, zero in ZERO.items()
        for name in METHODS
    }


@pytest.mark.distributed
def test_zero_is_the_twin(dist_pool):
    results = dist_pool(2).run(train_stages, 30)
    for stage, zero in ZERO.items():
        for name, (_, layer, strength) in METHODS.items():
            bf16 = zero.get("bf16", False)
            reference = twin(
                2, 30, "three", zero.get("accumulate", 1), zero.get("clip", 0.0),
                gradients=results[0][stage, name]["gradients"] if bf16 else None, bf16=bf16,
                layer=layer, strength=strength, weight_decay=WEIGHT_DECAY,
            )  # fmt: skip
            for result in results:
                assert worst_error(result[stage, name], reference) <= 1e-5, (stage, name)


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_goes_on_bit_for_bit(name):
    method, _, strength = METHODS[name]

    def start() -> tuple[list[nn.Parameter], Any]:
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(5, 4, generator=generator)), nn.Parameter(torch.zeros(3))]
        return parameters, method(parameters, lr=0.01, strength=strength)

    def run(parameters: list[nn.Parameter], optimizer: Any, steps: range) -> None:
        for t in steps:
            generator = torch.Generator().manual_seed(t)
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    parameters, optimizer = start()
    run(parameters, optimizer, range(10))
    saved, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in parameters]
    run(parameters, optimizer, range(10, 20))

    again, fresh = start()
    fresh.init_state()
    with torch.no_grad():
        for p, value in zip(again, values, strict=True):
            p.copy_(value)
    fresh.load_state_dict(saved)
    run(again, fresh, range(10, 20))
    for p, q in zip(parameters, again, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", METHODS)
def test_bad_options_and_bad_gradients(name):
    method = METHODS[name][0]
    parameter = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"Invalid strength: -1.0 \(must be at least 0\)"):
        method([parameter], strength=-1.0)
    with pytest.raises(ValueError, match="did you mean 'strength'"):
        method([{"params": [parameter], "strenght": 0.1}])
    optimizer = method([parameter], lr=0.1)
    parameter.grad = torch.tensor([1.0, float("nan"), 1.0])
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(parameter, torch.ones(3))


def test_a_layer_without_an_anchor_is_adamw():
    for method in (AdamSPD, AdamL2SP):
        start = torch.linspace(-1, 1, 6)
        ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        pair = [
            method([{"params": [ours], "anchor": None}], lr=0.05, strength=0.9, weight_decay=0.1),
            torch.optim.AdamW([theirs], lr=0.05, weight_decay=0.1),
        ]
        for t in range(8):
            ours.grad = torch.sin(start * t + ours.detach())
            theirs.grad = torch.sin(start * t + theirs.detach())
            for optimizer in pair:
                optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
