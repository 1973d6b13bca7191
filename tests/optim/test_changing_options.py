"""Options that schedules change between steps: what a step used belongs to that step."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scale_digrap import DiGraP
from tests.optim.reference import Layer
from tests.optim.test_siblings import METHODS

SHAPES = ((6, 5), (4, 3, 2), (7,))
STEPS = 60
DIGRAP: dict[str, tuple[type, type[Layer], dict[str, float]]] = {"digrap": (DiGraP, Layer, {"omega_lr": 0.05})}
TWINS = DIGRAP | METHODS


def options_at(t: int, group: int) -> dict[str, Any]:
    """Learning rate, betas, ε and decay that differ in every step, and between the groups."""
    return {
        "lr": 0.02 * (1.2 + math.cos(t / 5 + group)),
        "betas": (0.9 - 0.05 * (t % 3) - 0.02 * group, 0.999 - 0.009 * (t % 4)),
        "eps": 10.0 ** -(8 - t % 7),
        "weight_decay": 0.01 * (t % 2),
    }


def starts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradient(t: int, index: int) -> Tensor | None:
    if index == 1 and t % 5 == 3:
        return None  # a step that this layer misses: its last one is older
    generator = torch.Generator().manual_seed(10 * t + index)
    side = (-1.0) ** t if t > 8 else 1.0  # from side to side: ω rises
    direction = torch.randn(SHAPES[index], generator=torch.Generator().manual_seed(index))
    return side * direction + 0.3 * torch.randn(SHAPES[index], generator=generator)


def make(name: str, values: list[Tensor]) -> tuple[list[nn.Parameter], Any]:
    method, _, own = TWINS[name]
    parameters = [nn.Parameter(value.clone()) for value in values]
    first, *rest = [(f"p{i}", parameter) for i, parameter in enumerate(parameters)]
    return parameters, method([{"params": [first]}, {"params": rest}], **own)


def run(parameters: list[nn.Parameter], optimizer: Any, steps: range) -> None:
    for t in steps:
        for number, group in enumerate(optimizer.param_groups):
            group.update(options_at(t, number))
        for index, parameter in enumerate(parameters):
            parameter.grad = gradient(t, index)
        optimizer.step()


def twins(name: str) -> list[Layer]:
    _, layer, own = TWINS[name]
    layers = [layer(start, start, **own) for start in starts()]
    for t in range(STEPS):
        for index, one in enumerate(layers):
            g, options = gradient(t, index), options_at(t, min(index, 1))
            if g is not None:
                one.weight_decay = options["weight_decay"]
                one.step(g, options["lr"], options["betas"], options["eps"])
    return layers


def way_off(parameters: list[nn.Parameter], layers: list[Layer]) -> float:
    errors = []
    for parameter, layer, start in zip(parameters, layers, starts()[: len(layers)], strict=True):
        distance = (layer.theta - start.double()).norm()
        errors.append(float((parameter.detach().double() - layer.theta).norm() / distance))
    return max(errors)


@pytest.mark.parametrize("name", TWINS)
def test_betas_eps_and_rates_that_change_between_steps_are_the_twin(name):
    parameters, optimizer = make(name, starts())
    run(parameters, optimizer, range(STEPS))
    layers = twins(name)
    assert way_off(parameters, layers) <= 2e-5
    if name == "digrap":
        assert max(max(layer.omegas) for layer in layers) > 0.1, "ω must have risen for this to show anything"
        for index, layer in enumerate(layers):
            assert float(optimizer.state[parameters[index]]["omega"]) == pytest.approx(layer.omega, abs=1e-5)


@pytest.mark.parametrize("name", TWINS)
def test_changed_options_at_resume_are_as_without_one(name):
    """The checkpoint holds what its last step used; the groups may say something else by then."""
    straight, optimizer = make(name, starts())
    run(straight, optimizer, range(STEPS))

    parameters, optimizer = make(name, starts())
    run(parameters, optimizer, range(31))
    for group in optimizer.param_groups:
        group.update(lr=0.5, betas=(0.1, 0.2), eps=1.0)  # a scheduler's next values, or a person's
    saved = copy.deepcopy(optimizer.state_dict())
    again, fresh = make(name, [parameter.detach() for parameter in parameters])
    fresh.load_state_dict(saved)
    run(again, fresh, range(31, STEPS))
    for one, other in zip(straight, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("schedule", ["one cycle", "cyclic"])
def test_schedulers_that_cycle_beta1(schedule):
    """Both cycle β1 by default."""
    start = starts()[0]
    parameter = nn.Parameter(start.clone())
    optimizer = DiGraP([parameter], lr=0.01, omega_lr=0.05)
    scheduler: Any
    if schedule == "one cycle":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.03, total_steps=STEPS)
    else:
        scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.03, step_size_up=4)
    layer, betas = Layer(start, start, omega_lr=0.05), set()
    for t in range(STEPS - 1):
        g, group = gradient(t, 0), optimizer.param_groups[0]
        assert g is not None
        betas.add(group["betas"][0])
        layer.step(g, float(group["lr"]), group["betas"])
        parameter.grad = g
        optimizer.step()
        scheduler.step()
    assert len(betas) > 3
    assert max(layer.omegas) > 0.1
    assert way_off([parameter], [layer]) <= 2e-5
    assert float(optimizer.state[parameter]["omega"]) == pytest.approx(layer.omega, abs=1e-5)


def test_a_checkpoint_that_does_not_say_what_its_last_step_used(caplog):
    """Older ones hold no betas and no ε: they are taken to be those of the groups, and that is said."""
    straight, optimizer = make("digrap", starts())

    def steady(parameters: list[nn.Parameter], optimizer: Any, steps: range) -> None:
        for t in steps:
            for index, parameter in enumerate(parameters):
                parameter.grad = gradient(t, index)
            optimizer.step()

    steady(straight, optimizer, range(20))
    saved, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in straight]
    steady(straight, optimizer, range(20, 40))
    for state in saved["state"].values():
        for key in ("previous_beta1", "previous_beta2", "previous_eps"):
            del state[key]
    again, fresh = make("digrap", values)
    with caplog.at_level(logging.WARNING):
        fresh.load_state_dict(saved)
    assert "does not hold previous_beta1, previous_beta2, previous_eps" in caplog.text
    assert "3 layers" in caplog.text
    steady(again, fresh, range(20, 40))
    for one, other in zip(straight, again, strict=True):
        assert torch.equal(one, other), "exact, as the betas have not changed"
