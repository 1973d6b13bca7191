"""Evaluation, drift and WiSE-FT of models that DeepSpeed trained, against FSDP2's."""

import pytest
import torch

from scale_digrap.evaluation.drift import layer_drift
from scale_digrap.evaluation.runner import evaluate
from scale_digrap.evaluation.suites import Suite
from scale_digrap.evaluation.wise import interpolate
from scale_digrap.training import train
from scale_digrap.training.engine import create_engine
from tests.models import tiny
from tests.training import runs

pytestmark = pytest.mark.distributed

ALPHA = 0.05  # near the pre-trained model, so that it answers otherwise than the trained one


def zero(stage, **options):
    return {"engine": "deepspeed", "zero": {"stage": stage, **options}}


def answers(model, collator, engine, suites):
    results = evaluate(
        model,
        collator,
        [Suite(name=name, group="id", shift="none", metric="vqa/official", shards=(path,)) for name, path in suites],
        dp_rank=engine.dp_rank,
        dp_world_size=engine.dp_world_size,
        batch_size=2,
        max_new_tokens=3,
    )
    return {name: [(r.question_id, r.prediction) for r in result.records] for name, result in results.items()}


def evaluated(model, shards, folder, suites, cases):
    """Train, generate, measure the drift, mix with the pre-trained weights, take it back."""
    outcomes = []
    for i, sections in enumerate(cases):
        config = runs.config(model, shards, f"{folder}/{i}", **sections)
        engine = create_engine(config)
        untrained = engine.load(config, train=False)
        before = answers(untrained.model, untrained.collator, engine, suites)
        del untrained
        result = train(config)
        outcome = {
            "before": before,
            "after": answers(result.model, result.collator, engine, suites),
            "drift": {
                name: (d.drift, d.relative_drift) for name, d in layer_drift(result.model, result.anchored).items()
            },
            "trained": {name: runs.full(p) for name, p in result.model.named_parameters()},
        }
        with interpolate(result.model, ALPHA, result.anchored):
            outcome["mixed"] = {name: runs.full(p) for name, p in result.model.named_parameters()}
            outcome["answers of the mixture"] = answers(result.model, result.collator, engine, suites)
        outcome["restored"] = {name: runs.full(p) for name, p in result.model.named_parameters()}
        outcomes.append(outcome)
    return outcomes


@pytest.mark.parametrize("optimizer", ["adamw", "digrap"])
def test_generation_drift_and_mixture(dist_pool, checkpoint, shards, tmp_path, optimizer):
    """Most batches of the mixed suite are text alone, on one rank or on both."""
    model = checkpoint("paligemma")
    common = {
        "optimizer": {"name": optimizer, "lr": 2e-2},
        "training": {"steps": 4, "batch_size": 4, "keep_anchors": True},
        "schedule": {"name": "constant"},
    }
    lora = {"lora": {"enabled": True, "rank": 2}}
    cases = [common, {**common, "sharding": zero(2)}, {**common, "sharding": zero(3, param_persistence_threshold=700)}]
    if optimizer == "digrap":
        cases += [{**common, **lora}, {**common, **lora, "sharding": zero(3, param_persistence_threshold=30)}]
    mixed = tiny.write_shards(tmp_path / "mixed", count=11, text_only=tuple(i for i in range(11) if i not in (2, 9)))
    suites = [("images", tiny.write_shards(tmp_path / "images", count=6)), ("mixed", mixed)]
    ranks = dist_pool(2).run(evaluated, model, shards, str(tmp_path), suites, cases)
    full = ranks[0][0]
    assert full["after"] != full["before"]
    assert full["answers of the mixture"] != full["after"]
    assert max(relative or 0 for _, relative in full["drift"].values()) > 0.05
    for i, (first, second) in enumerate(zip(*ranks, strict=True)):
        reference = ranks[0][3] if "lora" in cases[i] else full
        assert first["drift"] == second["drift"]
        for key in ("before", "after", "answers of the mixture"):
            assert first[key] == second[key] == reference[key], (cases[i], key)
        assert first["drift"].keys() == reference["drift"].keys()
        for name, (drift, relative) in reference["drift"].items():
            assert first["drift"][name][0] == pytest.approx(drift, rel=1e-2, abs=1e-5), name
            if relative is None:  # an anchor of zeros
                assert first["drift"][name][1] is None
            else:
                assert first["drift"][name][1] == pytest.approx(relative, rel=1e-2, abs=1e-5), name
        assert runs.distance(first["restored"], first["trained"]) == 0
        assert runs.distance(first["mixed"], reference["mixed"]) < 1e-4
        start = runs.initial(model, **{"lora": cases[i]["lora"]} if "lora" in cases[i] else {})
        for name, value in first["mixed"].items():
            if "lora_" in name:
                expected = first["trained"][name] * (ALPHA if "lora_B" in name else 1.0)
            else:
                expected = torch.lerp(start[name].float(), first["trained"][name].float(), ALPHA)
            torch.testing.assert_close(value, expected.to(value.dtype), rtol=1e-6, atol=1e-7)
