"""State under DeepSpeed that must come back: on the same ranks, on others, in another stage, in another engine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import scale_digrap.deepspeed as sdds
from scale_digrap import AdamFTP
from scale_digrap.deepspeed import DeepSpeedError
from scale_digrap.optim.portable import PortableStateError, load_portable, save_portable
from tests.optim.sharded_problem import Net, full, learning_rate, make_optimizer, shard, targets
from tests.optim.zero_problem import client, ds_config, full_params, make_engine, start_deepspeed

pytestmark = pytest.mark.distributed

MICRO_BATCHES = 6  # of the whole job, on any number of ranks


def train(engine: Any, start: int, stop: int) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    for t in range(start, stop):
        for group in client(engine).param_groups:
            group["lr"] = learning_rate(t)
        for k in range(MICRO_BATCHES // world):
            dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
            batch = {name: value.to(dtype) for name, value in targets(t, 0, rank + world * k).items()}
            engine.backward(engine(batch))
            engine.step()


def config_for(zero: dict[str, Any], **more: Any) -> dict[str, Any]:
    return ds_config(**zero, accumulate=MICRO_BATCHES // dist.get_world_size()) | more


def state_of(engine: Any) -> dict[str, Any]:
    kinds = ("exp_avg", "exp_avg_sq", "anchor")
    return {
        "param": full_params(engine),
        "layers": client(engine).layer_state(),
        **{kind: {n: t.float().numpy().copy() for n, t in sdds.full_tensors(engine, kind)} for kind in kinds},
    }


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["layers"] == theirs["layers"]
    for kind in ("param", "exp_avg", "exp_avg_sq", "anchor"):
        assert set(ours[kind]) == set(theirs[kind]), kind
        for name in ours[kind]:
            assert np.array_equal(ours[kind][name].reshape(-1), theirs[kind][name].reshape(-1)), (kind, name)


def distance(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    start = {name: p.detach().numpy() for name, p in Net(scalar=False).named_parameters()}
    return max(
        float(np.linalg.norm(ours[n].reshape(-1) - theirs[n].reshape(-1)))
        / float(np.linalg.norm(theirs[n].reshape(-1) - start[n].reshape(-1)))
        for n in theirs
    )


# -- the same ranks ----------------------------------------------------------------------------------------------------

STAGES: list[dict[str, Any]] = [
    {"stage": 0, "bf16": True},
    {"stage": 1},
    {"stage": 1, "bf16": True, "grad_dtype": "fp32"},
    {"stage": 2, "round_robin_gradients": True},
    {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    {"stage": 3, "sub_group_size": 40},
    {"stage": 3, "bf16": True},
]


def resume(folder: str) -> None:
    for number, zero in enumerate(STAGES):
        config, place = config_for(zero), f"{folder}/{number}"
        engine, _ = make_engine(config)
        train(engine, 0, 6)
        engine.save_checkpoint(place, tag="six", client_state={"step": 6})
        train(engine, 6, 12)
        anchors = [state.get("anchor") for state in client(engine).state.values()]

        again, optimizer = make_engine(config)
        train(again, 20, 22)  # a state that must be gone after loading
        path, client_state = sdds.load_checkpoint(again, place, tag="six")
        assert path is not None
        assert client_state["step"] == 6
        dtypes = [state["anchor"].dtype for state in optimizer.state.values() if "anchor" in state]
        assert dtypes == [anchor.dtype for anchor in anchors if anchor is not None], "the library widens anchors"
        assert (torch.bfloat16 in dtypes) is zero.get("bf16", False)
        train(again, 6, 12)
        assert_same(state_of(again), state_of(engine))


def test_same_ranks_go_on_bit_for_bit(dist_pool, tmp_path):
    dist_pool(2).run(resume, str(tmp_path))


def attach_after_loading(folder: str) -> None:
    """Frameworks load before anybody can attach: the state waits."""
    deepspeed = start_deepspeed()
    for stage in (2, 3):
        config = config_for({"stage": stage}) | {
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        engine, _ = make_engine(config)
        train(engine, 0, 6)
        engine.save_checkpoint(f"{folder}/{stage}", tag="six")
        model = Net(scalar=False)
        late, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=config)
        late.load_checkpoint(f"{folder}/{stage}", tag="six")
        sdds.attach(late)
        assert_same(state_of(late), state_of(engine))
        train(engine, 6, 9)
        train(late, 6, 9)
        assert_same(state_of(late), state_of(engine))


def test_attach_after_loading(dist_pool, tmp_path):
    dist_pool(2).run(attach_after_loading, str(tmp_path))


# -- other ranks, other stages, other engines --------------------------------------------------------------------------


def save_zero(zero: dict[str, Any], folder: str, groups: str = "three") -> dict[str, Any]:
    engine, _ = make_engine(config_for(zero), groups)
    train(engine, 0, 8)
    engine.save_checkpoint(folder, tag="eight")
    sdds.save_portable(engine, f"{folder}/portable")
    saved = state_of(engine)
    train(engine, 8, 14)
    return {"saved": saved, "end": state_of(engine)}


def load_zero(zero: dict[str, Any], folder: str, universal: bool = False, groups: str = "three") -> dict[str, Any]:
    more = {"checkpoint": {"load_universal": True}} if universal else {}
    engine, optimizer = make_engine(config_for(zero, **more), groups)
    for tensor in optimizer.layout.tensors:  # as after a start from other weights: anchors must come from the folder
        if "anchor" in optimizer.state[tensor]:
            optimizer.state[tensor]["anchor"].fill_(1.0)
    if universal:
        assert sdds.load_checkpoint(engine, folder, tag="eight_universal")[0] is not None
    else:
        sdds.load_portable(engine, folder)
    loaded = state_of(engine)
    train(engine, 8, 14)
    return {"loaded": loaded, "end": state_of(engine)}


def run_fsdp(kind: str, start: int, stop: int, load: str | None, save: str | None) -> dict[str, Any]:
    """The same training under FSDP or in one process per rank, from or to the portable form."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model, group = shard(Net(scalar=False), kind)
    optimizer = make_optimizer(model, process_group=group)
    optimizer.init_state()
    if load:
        load_portable(optimizer, load)
    loaded = portable_state(optimizer)
    for t in range(start, stop):
        for options in optimizer.param_groups:
            options["lr"] = learning_rate(t)
        optimizer.zero_grad()
        for k in range(MICRO_BATCHES // world):
            if kind != "ddp":
                model.set_requires_gradient_sync(k == MICRO_BATCHES // world - 1)
            (model(targets(t, 0, rank + world * k)) / (MICRO_BATCHES // world)).backward()
        optimizer.step()
    if save:
        save_portable(optimizer, save)
    return {"loaded": loaded, "end": portable_state(optimizer)}


def portable_state(optimizer: Any) -> dict[str, Any]:
    def whole(tensor: Tensor) -> np.ndarray:
        return full(tensor).float().numpy()

    result: dict[str, Any] = {"layers": optimizer.layer_state(), "param": {}}
    result |= {"exp_avg": {}, "exp_avg_sq": {}, "anchor": {}}
    for layer, param in zip(optimizer.layout.layers, optimizer.layout.tensors, strict=True):
        result["param"][layer.name] = whole(param)
        for kind in ("exp_avg", "exp_avg_sq", "anchor"):
            if kind in optimizer.state[param]:
                result[kind][layer.name] = whole(optimizer.state[param][kind])
    return result


def test_portable_form_between_ranks_stages_and_engines(dist_pool, tmp_path):
    two, three = dist_pool(2), dist_pool(3)
    zero2 = two.run(save_zero, {"stage": 2}, str(tmp_path / "z2"))[0]
    for zero in ({"stage": 3, "sub_group_size": 40}, {"stage": 1, "round_robin_gradients": True}):
        loaded = three.run(load_zero, zero, str(tmp_path / "z2/portable"))[0]
        assert_same(loaded["loaded"], zero2["saved"])
        assert distance(loaded["end"]["param"], zero2["end"]["param"]) <= 1e-5
    for kind in ("fsdp2", "columns", "ddp"):  # cut by rows, across rows, not at all
        loaded = two.run(run_fsdp, kind, 8, 14, str(tmp_path / "z2/portable"), str(tmp_path / kind))[0]
        assert_same(loaded["loaded"], zero2["saved"])
        assert distance(loaded["end"]["param"], zero2["end"]["param"]) <= 1e-5
        back = three.run(load_zero, {"stage": 3}, str(tmp_path / kind))[0]
        assert_same(back["loaded"], loaded["end"])


def test_portable_form_keeps_narrow_anchors(dist_pool, tmp_path):
    saved = dist_pool(3).run(save_zero, {"stage": 3, "bf16": True}, str(tmp_path / "b"))[0]
    loaded = dist_pool(2).run(load_zero, {"stage": 2, "bf16": True}, str(tmp_path / "b/portable"))[0]
    assert_same(loaded["loaded"], saved["saved"])


@pytest.mark.slow
def test_universal_checkpoints(dist_pool, tmp_path):
    for name, zero in (("one", {"stage": 1}), ("three", {"stage": 3, "sub_group_size": 40, "bf16": True})):
        saved = dist_pool(2).run(save_zero, zero, str(tmp_path / name))[0]
        sdds.to_universal(tmp_path / name / "eight", tmp_path / name / "eight_universal", workers=1)
        loaded = dist_pool(3).run(load_zero, zero, str(tmp_path / name), universal=True)[0]
        assert_same(loaded["loaded"], saved["saved"])
        if "bf16" not in zero:  # another number of ranks rounds bf16 gradients otherwise
            assert distance(loaded["end"]["param"], saved["end"]["param"]) <= 1e-5
    script = tmp_path / "three" / "zero_to_fp32.py"
    out = tmp_path / "fp32"
    subprocess.run([sys.executable, script, script.parent, out, "--tag", "eight"], check=True, capture_output=True)
    weights = torch.load(next(out.glob("pytorch_model.bin")), weights_only=True)
    for layer, values in saved["saved"]["param"].items():
        assert np.array_equal(weights[layer].detach().float().numpy(), values), layer


# -- refusals ----------------------------------------------------------------------------------------------------------


def save_for_refusals(folder: str) -> None:
    for name, zero in (("rr", {"stage": 2, "round_robin_gradients": True}), ("plain", {"stage": 3})):
        engine, _ = make_engine(config_for(zero))
        train(engine, 0, 1)
        engine.save_checkpoint(f"{folder}/{name}", tag="one")
    sdds.save_portable(engine, f"{folder}/portable")
    engine, _ = make_engine(config_for({"stage": 2}), method=AdamFTP)
    train(engine, 0, 1)
    engine.save_checkpoint(f"{folder}/ftp", tag="one")


def refuse_on_three(folder: str) -> None:
    engine, optimizer = make_engine(config_for({"stage": 3}))
    with pytest.raises(DeepSpeedError, match="was saved on 2 data-parallel ranks, these are 3"):
        sdds.load_checkpoint(engine, f"{folder}/plain", tag="one")
    before = state_of(engine)
    with pytest.raises(PortableStateError, match="no portable state"):
        sdds.load_portable(engine, f"{folder}/plain")
    layers = list(optimizer.layout.layers)
    import dataclasses

    for field, value, message in (
        ("name", "other", "lacks layer 'other'"),
        ("shape", torch.Size([3, 3]), "has 9 elements"),
    ):
        optimizer.layout.layers = [dataclasses.replace(layers[0], **{field: value}), *layers[1:]]
        with pytest.raises(PortableStateError, match=message):
            sdds.load_portable(engine, f"{folder}/portable")
        optimizer.layout.layers = layers
    assert_same(state_of(engine), before)
    # A group of one element: on two of three ranks there is only padding.
    start_deepspeed()
    model = Net(scalar=False)
    named = dict(model.named_parameters())
    one = named.pop("units.0.one")
    from scale_digrap import DiGraP

    split = DiGraP([{"params": list(named.items())}, {"params": [("units.0.one", one)]}], lr=1e-2)
    config = config_for({"stage": 1}, checkpoint={"load_universal": True})
    engine, *_ = sdds.initialize(model=model, optimizer=split, config=config)
    with pytest.raises(DeepSpeedError, match="only padding"):
        sdds.load_checkpoint(engine, folder, tag="any")


def test_refusals(dist_pool, tmp_path):
    dist_pool(2).run(save_for_refusals, str(tmp_path))
    dist_pool(3).run(refuse_on_three, str(tmp_path))
    with pytest.raises(DeepSpeedError, match="wrong with round_robin_gradients"):
        sdds.to_universal(tmp_path / "rr" / "one", tmp_path / "out")
    with pytest.raises(DeepSpeedError, match=r"AdamFTP.*save_portable"):
        sdds.to_universal(tmp_path / "ftp" / "one", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DeepSpeedError, match="holds no ZeRO optimizer states"):
        sdds.to_universal(tmp_path / "rr", tmp_path / "out")
    # A rank's file that is missing leaves gaps, and a gap is not filled with whatever is there.
    files = sorted((tmp_path / "plain" / "one").glob("*optim_states.pt"))
    files[0].unlink()
    with pytest.raises(DeepSpeedError):
        sdds.to_universal(Path(tmp_path / "plain" / "one"), tmp_path / "out")


def planted_file(folder: Path, pattern: str, marker: Path) -> None:
    from tests.training.planted import Payload

    (path,) = sorted(folder.rglob(pattern))[:1]
    torch.save({**torch.load(path, weights_only=False), "extra": Payload(marker)}, path)


def load_planted(folder: Path, pattern: str) -> list[str]:
    """On one rank: what loading and converting a planted checkpoint say."""
    engine, _ = make_engine(config_for({"stage": 2}))
    train(engine, 0, 1)
    engine.save_checkpoint(str(folder), tag="good")
    sdds.load_checkpoint(engine, folder, tag="good")
    planted_file(folder / "good", pattern, folder / "ran")
    told = []
    for call in (
        lambda: sdds.load_checkpoint(engine, folder, tag="good"),
        lambda: sdds.to_universal(folder / "good", folder / "universal", workers=1),
    ):
        try:
            call()
        except DeepSpeedError as error:
            told.append(str(error))
    return told


@pytest.mark.parametrize("pattern", ["*_optim_states.pt", "mp_rank_00_model_states.pt"])
def test_no_pickle_of_a_deepspeed_checkpoint_is_run(dist_pool, tmp_path, pattern):
    told = dist_pool(1).run(load_planted, tmp_path, pattern)[0]
    assert len(told) == 2
    assert re.search(r"not safe to read: it calls '[\w.]*eval'", told[0]), told
    assert not (tmp_path / "ran").exists()
    assert all("\n" not in line for line in told)


def told_of_clipping(asked: float | None) -> tuple[float, list[str]]:
    import logging

    config = config_for({"stage": 2})
    del config["gradient_clipping"]
    if asked is not None:
        config["gradient_clipping"] = asked
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("scale_digrap.deepspeed.engine")
    log.addHandler(handler)
    try:
        engine, _ = make_engine(config)
    finally:
        log.removeHandler(handler)
    return float(engine.gradient_clipping()), lines


def test_clipping_that_nobody_asked_for_is_said(dist_pool):
    norm, lines = dist_pool(2).run(told_of_clipping, None)[0]
    assert norm == 1.0, "DeepSpeed's default is another now: docs/deepspeed.md says 1.0"
    assert len(lines) == 1
    assert "clips gradients at a global norm of 1, its default" in lines[0]
    for asked in (0.0, 1.0):
        assert dist_pool(2).run(told_of_clipping, asked)[0] == (asked, [])
