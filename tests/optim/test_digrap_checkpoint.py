"""State dicts and distributed checkpoints of DiGraP: nothing lost, nothing cast, any number of ranks."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

from scale_digrap import DiGraP
from tests.optim.sharded_problem import Net, full, learning_rate, make_optimizer, targets, worst_error

SAVED_AT, END = 22, 45  # within a spell in which ω rises, and past it
DATA_RANKS = 4  # the data are split four ways on any number of ranks, so that every world sees the same gradients


def build(options: dict, sharded: bool = True) -> tuple[nn.Module, DiGraP]:
    model = Net(scalar=False)
    if sharded:
        for unit in model.units:
            fully_shard(unit)
        fully_shard(model)
    return model, make_optimizer(model, **options)


def advance(model: nn.Module, optimizer: DiGraP, first: int, last: int) -> None:
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    share = DATA_RANKS // world
    for t in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(t)
        optimizer.zero_grad()
        for part in range(share):
            if world > 1:
                model.set_requires_gradient_sync(part == share - 1)
            (model(targets(t, rank * share + part)) / share).backward()
        optimizer.step()


def snapshot(model: nn.Module, optimizer: DiGraP) -> dict:
    state = {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            tensor = full(value)
            state[f"{name}.{key}"] = (str(tensor.dtype), tensor.double().numpy())
    return {"params": {n: full(p).numpy() for n, p in model.named_parameters()}, "state": state}


def save(folder: str, options: dict) -> dict:
    model, optimizer = build(options)
    advance(model, optimizer, 0, SAVED_AT)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    saved = snapshot(model, optimizer)
    advance(model, optimizer, SAVED_AT, END)
    return {"saved": saved, "end": snapshot(model, optimizer), "packed": optimizer._packed.numpy().copy()}


def load(folder: str, options: dict, init_first: bool) -> dict:
    model, optimizer = build(options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)  # anchors must come from the checkpoint, not from here
    if init_first:
        optimizer.init_state()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    loaded = snapshot(model, optimizer)
    advance(model, optimizer, SAVED_AT, END)
    return {"loaded": loaded, "end": snapshot(model, optimizer), "packed": optimizer._packed.numpy().copy()}


def load_alone(folder: str, options: dict) -> dict:
    """On one process without a process group."""
    assert not dist.is_initialized()
    model, optimizer = build(options, sharded=False)
    optimizer.init_state()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder, no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    loaded = snapshot(model, optimizer)
    advance(model, optimizer, SAVED_AT, END)
    return {"loaded": loaded, "end": snapshot(model, optimizer)}


def same_state(ours: dict, theirs: dict) -> None:
    assert set(ours["state"]) == set(theirs["state"])
    for key, (dtype, values) in theirs["state"].items():
        assert ours["state"][key][0] == dtype, key
        assert np.array_equal(ours["state"][key][1], values), key
    for name, values in theirs["params"].items():
        assert np.array_equal(ours["params"][name], values), name


@pytest.mark.distributed
@pytest.mark.parametrize("normalization", ["row", "tensor"])
def test_saved_on_four_ranks_continued_on_four_two_and_one(dist_pool, tmp_path: Path, normalization):
    options = {"normalization": normalization, "weight_decay": 0.05}
    folder = str(tmp_path / "checkpoint")
    written = dist_pool(4).run(save, folder, options)[0]
    assert max(v for k, (_, v) in written["saved"]["state"].items() if k.endswith(".omega")) > 0.01
    dtypes = {k.rsplit(".", 1)[1]: d for k, (d, _) in written["saved"]["state"].items()}
    assert dtypes["omega"] == "torch.float64"
    assert dtypes["exp_avg"] == "torch.float32"
    reference = {"params": written["end"]["params"], "far": {}}
    for name, start in Net(scalar=False).named_parameters():
        reference["far"][name] = float(np.linalg.norm(written["end"]["params"][name] - start.detach().numpy()))

    for init_first in (True, False):
        again = dist_pool(4).run(load, folder, options, init_first)
        same_state(again[0]["loaded"], written["saved"])
        same_state(again[0]["end"], written["end"])  # bit-equal to the run that was not interrupted
        assert all(np.array_equal(result["packed"], written["packed"]) for result in again)
        fewer = dist_pool(2).run(load, folder, options, init_first)[0]
        same_state(fewer["loaded"], written["saved"])
        assert worst_error(fewer["end"], reference) <= 1e-5
    alone = load_alone(folder, options)
    same_state(alone["loaded"], written["saved"])
    assert worst_error(alone["end"], reference) <= 1e-5


def probe() -> None:
    """get_optimizer_state_dict on an optimizer without state steps it with lr = 0 and zero gradients."""
    model, optimizer = build({})
    before = {n: full(p) for n, p in model.named_parameters()}
    get_optimizer_state_dict(model, optimizer)
    assert all(float(state["step"]) == 0 for state in optimizer.state.values()), "t = 1 must not be lost"
    for name, p in model.named_parameters():
        assert torch.equal(full(p), before[name])
    assert optimizer.skipped_steps == 0


def gathered_on_rank_0() -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optimizer = build({})
    advance(model, optimizer, 0, SAVED_AT)
    gathered = get_optimizer_state_dict(model, optimizer, options=options)
    assert bool(gathered) == (dist.get_rank() == 0)
    before = snapshot(model, optimizer)
    other_model, other = build({})
    other_model.load_state_dict(model.state_dict())
    other.init_state()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(other_model, other, optim_state_dict=gathered, options=options)
    same_state(snapshot(other_model, other), before)


def flattened(folder: str) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = build({})
    advance(model, optimizer, 0, SAVED_AT)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"optimizer": state}, checkpoint_id=folder)
    before = snapshot(model, optimizer)
    other_model, other = build({})
    other_model.load_state_dict(model.state_dict())
    other.init_state()
    state = get_optimizer_state_dict(other_model, other, options=options)
    dcp.load({"optimizer": state}, checkpoint_id=folder)
    set_optimizer_state_dict(other_model, other, optim_state_dict=state, options=options)
    same_state(snapshot(other_model, other), before)


@pytest.mark.distributed
def test_the_ways_that_torch_offers(dist_pool, tmp_path: Path):
    dist_pool(2).run(probe)
    dist_pool(2).run(gathered_on_rank_0)
    dist_pool(2).run(flattened, str(tmp_path / "flat"))


# -- one process -------------------------------------------------------------------------------------------------------


def trained(values: torch.Tensor, steps: int = 30, **options) -> tuple[nn.Parameter, DiGraP]:
    parameter = nn.Parameter(values.clone())
    optimizer = DiGraP([("w", parameter)], lr=1e-2, omega_lr=0.05, **options)
    continue_training(parameter, optimizer, 0, steps)
    return parameter, optimizer


def continue_training(parameter: nn.Parameter, optimizer: DiGraP, first: int, last: int) -> None:
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_state_dict_round_trip_is_bit_exact():
    start = torch.randn(6, 5).bfloat16().float()
    straight, _ = trained(start, 50)
    for through_file in (False, True):
        parameter, optimizer = trained(start)
        state = copy.deepcopy(optimizer.state_dict())
        assert state["state"][0]["anchor"].dtype == torch.bfloat16
        if through_file:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            buffer.seek(0)
            state = torch.load(buffer, weights_only=True)
        resumed = nn.Parameter(parameter.detach().clone())
        other = DiGraP([("w", resumed)], lr=1e-2, omega_lr=0.05)
        other.load_state_dict(state)
        assert other.state[resumed]["anchor"].dtype == torch.bfloat16, "torch widens it; the optimizer must not"
        assert other.state[resumed]["omega"].dtype == torch.float64
        assert float(other.state[resumed]["omega"]) == float(optimizer.state[parameter]["omega"])
        continue_training(resumed, other, 30, 50)
        assert torch.equal(resumed, straight)


def test_hooks_of_the_user_see_and_change_what_is_loaded():
    start = torch.randn(4, 4)
    parameter, optimizer = trained(start)
    seen = []

    def before(_, state):
        state["state"][0]["omega"] = torch.tensor(0.25, dtype=torch.float64)
        return state

    other_parameter = nn.Parameter(parameter.detach().clone())
    other = DiGraP([("w", other_parameter)], lr=1e-2)
    other.register_load_state_dict_pre_hook(before)
    other.register_load_state_dict_post_hook(lambda o: seen.append(float(o.state[other_parameter]["omega"])))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert seen == [0.25]


def test_checkpoint_without_anchors_keeps_the_live_ones():
    start = torch.randn(4, 4)
    parameter, optimizer = trained(start)
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][0]["anchor"]
    resumed = nn.Parameter(start.clone())
    other = DiGraP([("w", resumed)], lr=1e-2, omega_lr=0.05)
    other.init_state()  # captures the pre-trained weights
    resumed.data.copy_(parameter)
    other.load_state_dict(state)
    assert torch.equal(other.state[resumed]["anchor"].float(), start)
    straight, _ = trained(start, 40)
    continue_training(resumed, other, 30, 40)
    assert torch.equal(resumed, straight)


def test_anchor_that_would_be_captured_after_training_began_is_refused():
    parameter, optimizer = trained(torch.randn(4, 4))
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][0]["anchor"]
    fresh = DiGraP([("w", nn.Parameter(parameter.detach().clone()))], lr=1e-2)
    with pytest.raises(ValueError, match=r"'w' has taken 30 steps and has no anchor.*init_state\(\)"):
        fresh.load_state_dict(state)
    adamw = torch.optim.AdamW([parameter])
    adamw.step()
    fresh = DiGraP([("w", nn.Parameter(parameter.detach().clone()))], lr=1e-2)
    state = adamw.state_dict()
    state["param_groups"] = fresh.state_dict()["param_groups"]
    with pytest.raises(ValueError, match="has no anchor"):
        fresh.load_state_dict(state)


def test_continuing_an_adamw_checkpoint_from_live_anchors():
    """Switching from AdamW to DiGraP in mid-run: the moments go on, ω starts at 0."""
    start = torch.randn(4, 4)
    parameter = nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        parameter.grad = torch.randn(4, 4)
        adamw.step()
    switched = nn.Parameter(start.clone())
    optimizer = DiGraP([switched], lr=1e-2)
    optimizer.init_state()
    switched.data.copy_(parameter)
    state = copy.deepcopy(adamw.state_dict())
    state["param_groups"] = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(state)
    assert optimizer.state[switched]["step"] == 5
    gradient = torch.randn(4, 4)
    for p, o in ((parameter, adamw), (switched, optimizer)):
        p.grad = gradient.clone()
        o.step()
    assert torch.allclose(parameter, switched, rtol=1e-6)


def test_deepcopy_and_pickle_continue_alike():
    parameter, optimizer = trained(torch.randn(5, 3))
    twin_parameter, twin = copy.deepcopy((parameter, optimizer))
    continue_training(parameter, optimizer, 30, 40)
    continue_training(twin_parameter, twin, 30, 40)
    assert torch.equal(parameter, twin_parameter)
