"""Steps that go wrong: which samples and layers are named, on which ranks, and what a run that stops of it leaves."""

import json
import math
import statistics
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist

from scale_digrap.config import ModelConfig
from scale_digrap.data.loader import TrainLoader
from scale_digrap.models import load_model
from scale_digrap.training import manifest, train
from scale_digrap.training.health import BadStepsError, SpikeDetector
from scale_digrap.training.metrics import read_log
from tests.training import runs

LAYER = "model.multi_modal_projector.linear_2.weight"
SHARDINGS = {
    "fsdp2": {},
    "hsdp": {"dp_replicate_size": 2},
    **{f"zero{stage}": {"engine": "deepspeed", "zero": {"stage": stage}} for stage in range(3)},
    "zero3": {"engine": "deepspeed", "zero": {"stage": 3, "param_persistence_threshold": 0}},
    "zero2-bf16": {"engine": "deepspeed", "zero": {"stage": 2}},
    "zero0-bf16": {"engine": "deepspeed", "zero": {"stage": 0}},
}


def test_spikes_are_those_of_a_direct_calculation():
    random = np.random.default_rng(0)
    losses = 2.0 + 0.1 * random.standard_normal(300)
    losses[[90, 200, 201, 299]] = [3.5, 9.0, 9.0, 2.9]
    losses[120] = 0.1  # a fall is none
    detector, found = SpikeDetector(6.0, 50), []
    for i, loss in enumerate(losses.tolist()):
        if detector.add(loss) is not None:
            found.append(i)
    direct = []
    for i in range(20, 300):
        before = losses[max(0, i - 50) : i]
        sigma = 1.4826 * np.median(np.abs(before - np.median(before)))
        if losses[i] > np.median(before) + 6 * sigma:
            direct.append(i)
    assert found == direct == [90, 200, 201, 299]


def test_what_is_no_spike():
    detector = SpikeDetector(6.0, 10)
    assert [detector.add(1.0) for _ in range(10)] == [None] * 10
    assert detector.add(1.05) is None, "a loss that stood still has no spread"
    assert detector.add(math.nan) is detector.add(math.inf) is None
    assert detector.add(1.2) == 1.0
    assert not any(SpikeDetector(0.0, 10).add(loss) for loss in [1.0] * 30 + [99.0])


@contextmanager
def bad_gradient(model):
    """Within the block, the model computes what it did, and the gradient of one layer is NaN."""
    module = model.get_submodule(LAYER.removesuffix(".weight"))
    forward = module.forward
    # In the forward pass itself, where FSDP and ZeRO have gathered the weight.
    module.forward = lambda x: forward(x) + torch.sqrt((module.weight * 0.0).sum())
    yield
    module.forward = forward


def poisoned(folder, model, shards, cases, poison, batch_size):
    """Runs of three steps; in the second, rank 1's loss is poisoned."""
    from deepspeed import DeepSpeedEngine

    from scale_digrap.training import loop

    original = loop.answer_loss
    for name, sections in cases.items():
        calls = iter(range(100))

        def answer_loss(module, *args, calls=calls):
            if next(calls) != 1 or dist.get_rank() != 1:
                return original(module, *args)
            if poison == "loss":
                return original(module, *args) + math.inf
            with bad_gradient(module.module if isinstance(module, DeepSpeedEngine) else module):
                return original(module, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "answer_loss", answer_loss)
            training = {"steps": 3, "batch_size": batch_size, **sections.get("training", {})}
            result = train(runs.config(model, shards, f"{folder}/{name}", **{**sections, "training": training}))
            assert result.skipped_steps == 1


def expected(model, shards, batch_size):
    """By a plain model, from one process: the gradient of the second batch after the first step; and the samples."""
    loaded = load_model(ModelConfig(path=str(model)))
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=3e-3, eps=1e-4, weight_decay=0)
    batches = iter(TrainLoader(shards, batch_size=2 * batch_size, collate=loaded.collator.train))
    loaded.model(**next(batches)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loaded.model(**next(batches)).loss.backward()
    norms = {n: 0.0 if p.grad is None else float(p.grad.norm()) for n, p in loaded.model.named_parameters()}
    samples = []
    for rank in range(2):
        keys = TrainLoader(
            shards, batch_size=batch_size, dp_rank=rank, dp_world_size=2, collate=lambda s: [x.key for x in s]
        )
        samples.append([next(batch) for batch in [iter(keys)] for _ in range(2)][1])
    return norms, samples


@pytest.mark.distributed
def test_a_bad_step_is_reported_with_its_layers_and_samples(dist_pool, checkpoint, shards, tmp_path):
    """One layer's gradient of one rank, under every way of sharding: the others' norms are a plain model's."""
    model = checkpoint("llava")
    common = {"schedule": {"name": "constant"}}
    cases = {name: {"sharding": sharding, **common} for name, sharding in SHARDINGS.items()}
    for name in ("zero2-bf16", "zero0-bf16"):
        cases[name]["training"] = {"precision": "bf16"}
    cases["clipped"] = {"training": {"clip_norm": 1000.0}, **common}
    dist_pool(2).run(poisoned, str(tmp_path), model, shards, cases, "gradient", 4)
    norms, samples = expected(model, shards, 4)
    for name in cases:
        (record,) = read_log(tmp_path / name / "bad_steps.jsonl")
        assert (record["step"], record["in_a_row"]) == (2, 1), name
        assert [[key for _, key in entry["samples"]] for entry in record["ranks"]] == samples, name
        assert all(shard.endswith(".tar") for entry in record["ranks"] for shard, _ in entry["samples"])
        assert all(isinstance(entry["loss"], float) for entry in record["ranks"]), "the loss was finite"
        assert record["not_finite"] == [LAYER], name
        assert record["grad_norms"].keys() == norms.keys()
        tolerance = 0.2 if "bf16" in name else 1e-3
        largest = max(norms.values())
        for layer, norm in record["grad_norms"].items():
            if layer != LAYER:
                assert norm == pytest.approx(norms[layer], rel=tolerance, abs=tolerance * largest), (name, layer)


@pytest.mark.distributed
def test_an_infinite_loss_with_a_finite_gradient_is_a_bad_step_too(dist_pool, checkpoint, shards, tmp_path):
    cases = {name: {"sharding": SHARDINGS[name]} for name in ("fsdp2", "zero0", "zero2")}
    dist_pool(2).run(poisoned, str(tmp_path), checkpoint("llava"), shards, cases, "loss", 4)
    for name in cases:
        (record,) = read_log(tmp_path / name / "bad_steps.jsonl")
        assert record["step"] == 2
        first, second = (entry["loss"] for entry in record["ranks"])
        assert isinstance(first, float), name
        assert second == "inf", name
        assert LAYER in record["not_finite"]


def always(monkeypatch, change):
    from scale_digrap.training import loop

    original, calls = loop.answer_loss, iter(range(1, 1000))
    monkeypatch.setattr(loop, "answer_loss", lambda *args: change(next(calls), original(*args)))


def test_the_run_stops_at_its_last_good_checkpoint(checkpoint, shards, tmp_path, monkeypatch):
    options = {
        "training": {"steps": 6, "max_skipped_steps": 3},
        "checkpoint": {"every": 1, "keep": 1, "save_final": False, "resume": "auto"},
    }
    arguments = (checkpoint("llava"), shards, tmp_path / "run")
    whole = runs.run(*arguments[:2], tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        always(patch, lambda call, loss: loss * (math.nan if call > 2 else 1.0))
        with pytest.raises(
            BadStepsError, match=r"3 steps in a row, up to step 5.*bad_steps\.jsonl.*step-2\. Lower"
        ) as end:
            runs.run(*arguments, **options)
    assert end.value.exit_status == 3
    assert [path.name for _, path in manifest.checkpoints(tmp_path / "run" / "checkpoints")] == ["step-2"]
    assert [record["step"] for record in read_log(tmp_path / "run" / "bad_steps.jsonl")] == [3, 4, 5]
    again = runs.run(*arguments, **options)
    assert [line["loss"] for line in read_log(tmp_path / "run" / "log.jsonl")] == whole["loss"]
    assert runs.distance(again["parameters"], whole["parameters"]) == 0
    assert len(read_log(tmp_path / "run" / "bad_steps.jsonl")) == 3, "what an attempt left stays"


def spiky(*args, **sections):
    from scale_digrap.training import loop

    original, calls = loop.answer_loss, iter(range(1, 1000))

    def answer_loss(*inner):
        spike = next(calls) in (12, 14) and dist.get_rank() == 1
        return original(*inner) * (1000.0 if spike else 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "answer_loss", answer_loss)
        runs.run(*args, **sections)


@pytest.mark.distributed
def test_loss_spikes_are_logged_with_their_samples(dist_pool, checkpoint, shards, tmp_path):
    """The second one in the last step, which has no step after it to be told in."""
    dist_pool(2).run(
        spiky,
        checkpoint("llava"),
        shards,
        tmp_path,
        training={"steps": 14, "batch_size": 4, "clip_norm": 0.1, "spike_window": 10},
        optimizer={"lr": 1e-5},
    )
    log = {line["step"]: line["loss"] for line in read_log(tmp_path / "log.jsonl")}
    first, second = read_log(tmp_path / "loss_spikes.jsonl")
    keys = TrainLoader(shards, batch_size=4, dp_rank=1, dp_world_size=2, collate=lambda s: [x.key for x in s])
    batches = [batch for batch, _ in zip(keys, range(14), strict=False)]
    for record, step in ((first, 12), (second, 14)):
        assert record["step"] == step
        assert record["loss"] == pytest.approx(log[step], rel=1e-6)
        assert record["ranks"][1]["loss"] > 100 * record["ranks"][0]["loss"]
        assert [key for _, key in record["ranks"][1]["samples"]] == batches[step - 1]
    assert first["median"] == pytest.approx(statistics.median(log[step] for step in range(2, 12)), rel=1e-6)
    json.dumps([first, second], allow_nan=False)
