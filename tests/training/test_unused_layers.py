"""Layers that no sample of a step uses, and parameters that are not decayed: against a plain loop in one process, where
autograd leaves ``grad`` None and ``torch.optim.AdamW`` the parameter alone."""

import pytest
import torch

from scale_digrap.config import ModelConfig
from scale_digrap.data.loader import TrainLoader
from scale_digrap.models import load_model
from scale_digrap.training import train
from tests.models import tiny
from tests.training import runs

pytestmark = pytest.mark.distributed

STEPS, BATCH, ACCUMULATION = 5, 4, 2
ADAMW = {"name": "adamw", "lr": 3e-3, "eps": 1e-4, "weight_decay": 0.5, "betas": [0.8, 0.9]}


def zero(stage):
    return {
        "engine": "deepspeed",
        "zero": {"stage": stage, **({"param_persistence_threshold": 0} if stage == 3 else {})},
    }


SHARDINGS = {
    "fsdp2": {},
    "hsdp": {"dp_replicate_size": 2},
    "zero0": zero(0),
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
}


@pytest.fixture(scope="module")
def text_shards(tmp_path_factory):
    """No sample has a picture."""
    return tiny.write_shards(tmp_path_factory.mktemp("text"), text_only=tuple(range(48)))


@pytest.fixture(scope="module")
def rare_shards(tmp_path_factory):
    """One sample in sixteen has a picture: the tower is used in some steps only, mostly by one rank."""
    return tiny.write_shards(tmp_path_factory.mktemp("rare"), text_only=tuple(i for i in range(48) if i % 16))


def cases(folder, model, data, shardings, common):
    """Several runs on this rank; what they end with."""
    ended = []
    for name, sharding in shardings.items():
        sections = {key: dict(value) for key, value in common.items()}
        result = train(runs.config(model, data, f"{folder}/{name}", sharding=sharding, **sections))
        ended.append(runs.outcome(result))
    return ended


def plain(model, data, optimizer, global_batch, steps=STEPS, undecayed=lambda name, parameter: False):
    """A loop by hand: parameters, and in how many steps each had a gradient."""
    loaded = load_model(ModelConfig(path=str(model)))
    parameters = dict(loaded.model.named_parameters())
    groups = [[], []]
    for name, parameter in parameters.items():
        groups[undecayed(name, parameter)].append(parameter)
    decay = optimizer["weight_decay"]
    torch_adamw = torch.optim.AdamW(
        [{"params": group, "weight_decay": d} for group, d in zip(groups, (decay, 0.0), strict=True) if group],
        lr=optimizer["lr"], eps=optimizer["eps"], betas=optimizer["betas"],
    )  # fmt: skip
    loader = TrainLoader(data, batch_size=global_batch, collate=loaded.collator.train)
    counts = dict.fromkeys(parameters, 0)
    loaded.model.train()
    for _, batch in zip(range(steps), loader, strict=False):
        loaded.model(**batch).loss.backward()
        for name, parameter in parameters.items():
            counts[name] += parameter.grad is not None
        torch_adamw.step()
        torch_adamw.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}, counts


def same(ended, expected, start, tolerance=1e-4):
    way = runs.distance(expected, start)
    assert way > 1e-3
    for name, value in ended["parameters"].items():
        off = float((value - expected[name]).abs().max())
        assert off < tolerance * way, (name, off)


COMMON = {
    "optimizer": ADAMW,
    "schedule": {"name": "constant"},
    "training": {"steps": STEPS, "batch_size": BATCH // ACCUMULATION, "gradient_accumulation": ACCUMULATION},
}


@pytest.mark.parametrize("clip", [None, 1e6])
@pytest.mark.parametrize("optimizer", ["adamw", "l2sp"])
def test_a_tower_that_no_sample_uses_stays_as_it_is(dist_pool, checkpoint, text_shards, tmp_path, optimizer, clip):
    model, start = checkpoint("paligemma"), runs.initial(checkpoint("paligemma"))
    strength = {} if optimizer == "adamw" else {"strength": 0.0}
    common = {**COMMON, "optimizer": {**ADAMW, "name": optimizer, **strength}}
    common["training"] = {**COMMON["training"], "clip_norm": clip}
    expected, counts = plain(model, text_shards, ADAMW, 2 * BATCH)
    tower = {name for name, count in counts.items() if count == 0}
    assert any("vision_tower" in name for name in tower)
    assert any("projector" in name for name in tower)
    (alone,) = cases(tmp_path / "one", model, text_shards, {"one": {}}, {
        **common, "training": {**common["training"], "batch_size": BATCH},
    })  # fmt: skip
    ranks = dist_pool(2).run(cases, str(tmp_path / "two"), model, text_shards, SHARDINGS, common)
    for ended in [alone, *ranks[0], *ranks[1]]:
        for name in tower:
            assert torch.equal(ended["parameters"][name], start[name]), name
        same(ended, expected, start)


@pytest.mark.parametrize("optimizer", ["adamw", "l2sp"])
def test_a_tower_that_some_steps_use_is_stepped_in_those_alone(dist_pool, checkpoint, rare_shards, tmp_path, optimizer):
    """Its step count, its moments and its decay are those of the steps that used it, on any rank."""
    model, start = checkpoint("paligemma"), runs.initial(checkpoint("paligemma"))
    strength = {} if optimizer == "adamw" else {"strength": 0.0}
    common = {**COMMON, "optimizer": {**ADAMW, "name": optimizer, **strength}}
    expected, counts = plain(model, rare_shards, ADAMW, 2 * BATCH)
    used = {count for name, count in counts.items() if "vision_tower" in name}
    assert 0 < min(used) < STEPS, used
    assert used == {min(used)}
    ranks = dist_pool(2).run(cases, str(tmp_path / "two"), model, rare_shards, SHARDINGS, common)
    for ended in [*ranks[0], *ranks[1]]:
        same(ended, expected, start, tolerance=1e-3)


def test_a_resumed_run_knows_how_often_a_layer_was_used(dist_pool, checkpoint, rare_shards, tmp_path):
    """Saved under one way of sharding, gone on under another."""
    model, start = checkpoint("paligemma"), runs.initial(checkpoint("paligemma"))
    saving = {"every": 3, "save_final": False, "resume": "auto"}
    common = {**COMMON, "checkpoint": saving}
    expected, _ = plain(model, rare_shards, ADAMW, 2 * BATCH)
    short = {**common, "training": {**COMMON["training"], "steps": 3}}
    for first, second in (("fsdp2", "zero1"), ("zero1", "zero3"), ("zero3", "fsdp2")):
        folder = str(tmp_path / first)
        dist_pool(2).run(cases, folder, model, rare_shards, {"run": SHARDINGS[first]}, short)
        ranks = dist_pool(2).run(cases, folder, model, rare_shards, {"run": SHARDINGS[second]}, common)
        same(ranks[0][0], expected, start, tolerance=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "digrap"])
def test_what_is_not_to_be_decayed_is_not(dist_pool, checkpoint, shards, tmp_path, optimizer):
    """Named by patterns and by their dimensions, under every way of sharding, and after a resume."""
    model, start = checkpoint("paligemma"), runs.initial(checkpoint("paligemma"))
    # a learning rate of almost nothing and a decay that makes 1 % of it a step: what moves by that was decayed
    decay = {"lr": 1e-9, "eps": 1e-4, "weight_decay": 1e7, "name": optimizer}
    common = {
        **COMMON,
        "optimizer": {**decay, "no_decay": ["embed_tokens", r"q_proj\.weight$"], "decay_norms_and_biases": False},
        "checkpoint": {"every": 2, "save_final": False, "resume": "auto"},
        "training": {"steps": 2, "batch_size": 2},
    }
    longer = {**common, "training": {"steps": 4, "batch_size": 2}}
    dist_pool(2).run(cases, str(tmp_path), model, shards, SHARDINGS, common)
    ranks = dist_pool(2).run(cases, str(tmp_path), model, shards, SHARDINGS, longer)
    for name, ended in zip(SHARDINGS, ranks[0], strict=True):
        for layer, value in ended["parameters"].items():
            exempt = value.dim() < 2 or "embed_tokens" in layer or layer.endswith("q_proj.weight")
            factor = 1.0 if exempt else 0.99**4
            torch.testing.assert_close(value, start[layer] * factor, rtol=1e-5, atol=1e-7, msg=f"{name} {layer}")


def test_a_pattern_that_matches_no_trained_parameter_is_refused(checkpoint, shards, tmp_path):
    from scale_digrap.models.select import SelectionError

    with pytest.raises(SelectionError, match=r"optimizer\.no_decay: 'embed_tokens' matches nothing"):
        train(
            runs.config(
                checkpoint("paligemma"), shards, tmp_path, model={"freeze": ["embed_tokens"]},
                optimizer={"no_decay": ["embed_tokens"]},
            )
        )  # fmt: skip
