"""Clients that replace, move or empty an optimizer's state between steps: the next step goes on from what is there."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from scale_digrap import DiGraP
from tests.optim.sharded_problem import Net, full, learning_rate, make_optimizer, targets
from tests.optim.test_changing_options import TWINS, make, run, starts


def copied(optimizer: Any) -> None:
    """``state[k] = v.to(…)``, as of libraries that offload the state."""
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.clone()


def copied_data(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


def loaded(optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def other_dicts(optimizer: Any) -> None:
    optimizer.state = defaultdict(dict, {p: dict(state) for p, state in optimizer.state.items()})


WAYS = [copied, copied_data, loaded, other_dicts]


def values_of(optimizer: Any) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": full(torch.as_tensor(v)) for i, own in state.items() for key, v in own.items()}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", TWINS)
def test_state_that_is_replaced_by_equal_tensors_changes_nothing(name, way):
    straight, first = make(name, starts())
    run(straight, first, range(20))
    parameters, optimizer = make(name, starts())
    for t in range(20):
        run(parameters, optimizer, range(t, t + 1))
        if t % 6 == 2:
            way(optimizer)
    for one, other in zip(straight, parameters, strict=True):
        assert torch.equal(one, other)
    expected = values_of(first)
    for key, value in values_of(optimizer).items():
        assert torch.equal(value, expected[key]), f"{key} that is saved is stale"


@pytest.mark.parametrize("name", TWINS)
def test_moments_reset_by_assignment_are_those_reset_in_place(name):
    results = []
    for assign in (True, False):
        parameters, optimizer = make(name, starts())
        run(parameters, optimizer, range(10))
        for p in parameters:
            for key in ("exp_avg", "exp_avg_sq"):
                if assign:
                    optimizer.state[p][key] = torch.zeros_like(p)
                else:
                    optimizer.state[p][key].zero_()
            if assign:
                optimizer.state[p]["step"] = torch.tensor(0.0)
            else:
                optimizer.state[p]["step"].zero_()
        run(parameters, optimizer, range(10, 20))
        assert all(float(optimizer.state[p]["step"]) == 8 + (i != 1) * 2 for i, p in enumerate(parameters))
        results.append((parameters, values_of(optimizer)))
    (one, saved), (other, expected) = results
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(torch.equal(value, expected[key]) for key, value in saved.items())


@pytest.mark.parametrize("name", TWINS)
def test_cleared_state_is_a_new_optimizer(name, caplog):
    """A new trial: other weights, no state."""
    second = [value + 1 for value in starts()]
    expected, fresh = make(name, second)
    run(expected, fresh, range(12))

    parameters, optimizer = make(name, starts())
    run(parameters, optimizer, range(12))
    optimizer.state.clear()
    assert optimizer.state_dict()["state"] == {}
    with torch.no_grad():
        for p, value in zip(parameters, second, strict=True):
            p.copy_(value)
    with caplog.at_level(logging.WARNING):
        run(parameters, optimizer, range(12))
    assert "the state of 3 layers was cleared, first 'p0'" in caplog.text
    for one, other in zip(parameters, expected, strict=True):
        assert torch.equal(one, other)
    kept = values_of(fresh)
    assert all(torch.equal(value, kept[key]) for key, value in values_of(optimizer).items())


def test_what_a_client_writes_is_what_counts():
    parameters, optimizer = make("digrap", starts())
    run(parameters, optimizer, range(10))
    optimizer.param_groups[1]["omega_lr"] = optimizer.param_groups[0]["omega_lr"] = 0.0
    optimizer.state[parameters[0]]["omega"] = torch.tensor(0.75)
    optimizer.state[parameters[2]]["omega"].fill_(0.25)
    run(parameters, optimizer, range(10, 11))
    assert optimizer.layer_stats()["p0"].omega == 0.75
    assert optimizer.layer_stats()["p2"].omega == 0.25
    assert float(optimizer.state_dict()["state"][0]["omega"]) == 0.75


@pytest.mark.parametrize("name", TWINS)
def test_state_of_another_form_is_refused_by_name(name):
    parameters, optimizer = make(name, starts())
    run(parameters, optimizer, range(4))
    state = optimizer.state[parameters[1]]
    before = [p.detach().clone() for p in parameters]
    for key, wrong in (("exp_avg", torch.zeros(2)), ("exp_avg_sq", state["exp_avg_sq"].bfloat16())):
        right, state[key] = state[key], wrong
        with pytest.raises(ValueError, match=f"{key} of layer 'p1' is .* put the state back"):
            run(parameters, optimizer, range(4, 5))
        state[key] = right
    right = state.pop("exp_avg")
    with pytest.raises(ValueError, match="layer 'p1' has no exp_avg"):
        run(parameters, optimizer, range(4, 5))
    state["exp_avg"] = right
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    run(parameters, optimizer, range(4, 5))


def test_state_between_steps_is_held_by_nobody_else():
    """What is moved to the host must not stay on the device."""
    import weakref

    parameters, optimizer = make("ftp", starts())
    run(parameters, optimizer, range(3))
    held = [weakref.ref(v) for state in optimizer.state.values() for v in state.values() if v.dim()]
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.clone()
    del value
    assert len(held) == 12
    assert not any(ref() is not None for ref in held)


@pytest.mark.parametrize("name", TWINS)
def test_an_empty_state_dict_creates_nothing(name):
    parameters, optimizer = make(name, starts())
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(optimizer.state) == 0
    assert optimizer.layout is None
    straight, other = make(name, starts())
    run(parameters, optimizer, range(5))
    run(straight, other, range(5))
    assert all(torch.equal(a, b) for a, b in zip(parameters, straight, strict=True))


def test_an_empty_state_dict_keeps_live_anchors():
    parameters, optimizer = make("digrap", starts())
    empty = optimizer.state_dict()
    run(parameters, optimizer, range(5))
    optimizer.load_state_dict(empty)
    for p, start in zip(parameters, starts(), strict=True):
        assert torch.equal(optimizer.state[p]["anchor"], start)
        assert float(optimizer.state[p]["step"]) == 0


# -- sharded -----------------------------------------------------------------------------------------------------------


def sharded(way: Callable[[Any], None] | None, method: type) -> dict[str, torch.Tensor]:
    model = Net(scalar=False)
    for unit in model.units:
        fully_shard(unit)
    fully_shard(model)
    optimizer = make_optimizer(model, method)
    for t in range(12):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(t)
        optimizer.zero_grad()
        model(targets(t, dist.get_rank())).backward()
        optimizer.step()
        if t % 5 == 2 and way is not None:
            way(optimizer)
    return {n: full(p) for n, p in model.named_parameters()} | values_of(optimizer)


def sharded_ways() -> None:
    for method in (DiGraP, TWINS["ftp"][0]):
        expected = sharded(None, method)
        for way in (copied, loaded, other_dicts):
            for key, value in sharded(way, method).items():
                assert torch.equal(value, expected[key]), (way.__name__, key)


@pytest.mark.distributed
def test_replaced_state_of_sharded_parameters(dist_pool):
    dist_pool(2).run(sharded_ways)
