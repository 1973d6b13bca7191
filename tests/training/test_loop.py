"""The loop in one process: against a hand-written step, accumulation, LoRA, freezing, new layers, resume, the log."""

import json
import math
from pathlib import Path

import pytest
import torch

from scale_digrap.config import ConfigError, LoraConfig, ModelConfig, load_config
from scale_digrap.data.loader import ShardDataset, TrainLoader
from scale_digrap.models import load_model
from scale_digrap.training import TrainingError, train
from scale_digrap.training.metrics import read_log
from tests.models import tiny
from tests.training import runs


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_three_steps_are_those_of_a_plain_loop(checkpoint, shards, tmp_path, family):
    ours = runs.run(checkpoint(family), shards, tmp_path)
    loaded = load_model(ModelConfig(path=str(checkpoint(family))))
    start = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=3e-3, eps=1e-4, weight_decay=0)
    # without a schedule of their own, three cosine steps of three
    lrs = [3e-3 * 0.5 * (1 + math.cos(math.pi * step / 3)) for step in range(3)]
    batches = iter(TrainLoader(shards, batch_size=8, collate=loaded.collator.train))
    losses = []
    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        loss = loaded.model(**next(batches)).loss  # the model's own loss: mean over the answer tokens
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert ours["loss"] == pytest.approx(losses, rel=1e-5)
    reached = {name: p.detach() for name, p in loaded.model.named_parameters()}
    assert runs.travelled(ours, start) > 1e-3
    assert runs.distance(ours["parameters"], reached) < 1e-4 * runs.travelled(ours, start)
    assert [line["lr"] for line in ours["history"]] == pytest.approx(lrs)


def test_accumulation_is_the_large_batch(checkpoint, shards, tmp_path):
    model = checkpoint("paligemma")
    whole = runs.run(model, shards, tmp_path / "a", training={"batch_size": 12})
    split = runs.run(model, shards, tmp_path / "b", training={"batch_size": 3, "gradient_accumulation": 4})
    # answers have different lengths: a mean of means would differ by percents
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_clipping_bounds_the_update_that_sgd_would_make(checkpoint, shards, tmp_path):
    free = runs.run(checkpoint("llava"), shards, tmp_path / "a", training={"steps": 1})
    clipped = runs.run(checkpoint("llava"), shards, tmp_path / "b", training={"steps": 1, "clip_norm": 0.5})
    assert clipped["grad_norm"] == pytest.approx(free["grad_norm"])  # logged before clipping
    assert free["grad_norm"][0] > 0.5
    result = train(runs.config(checkpoint("llava"), shards, tmp_path / "c", training={"steps": 1, "clip_norm": 0.5}))
    # after one step Adam's first moment is 0.1 times the clipped gradient
    moments = [result.optimizer.state[p]["exp_avg"] for p in result.loaded.trained().values()]
    assert float(torch.stack([m.norm() for m in moments]).norm()) == pytest.approx(0.1 * 0.5, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "digrap"])
def test_lora_changes_adapters_and_nothing_else(checkpoint, shards, tmp_path, optimizer):
    ran = runs.run(
        checkpoint("paligemma"),
        shards,
        tmp_path,
        optimizer={"name": optimizer},
        lora={"enabled": True, "rank": 2},
        training={"steps": 3},
        schedule={"name": "constant"},
    )
    lora = LoraConfig(enabled=True, rank=2)
    before = dict(load_model(ModelConfig(path=str(checkpoint("paligemma"))), lora=lora).model.named_parameters())
    changed = {name for name, p in ran["parameters"].items() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert ran["anchored"] == []


def test_frozen_parameters_stay_and_new_layers_have_no_anchor(checkpoint, shards, tmp_path):
    ran = runs.run(
        checkpoint("paligemma"),
        shards,
        tmp_path,
        model={"freeze": ["vision_tower"], "new_layers": ["multi_modal_projector"]},
        optimizer={"name": "digrap"},
    )
    before = dict(load_model(ModelConfig(path=str(checkpoint("paligemma")))).model.named_parameters())
    for name, parameter in ran["parameters"].items():
        assert torch.equal(parameter, before[name]) == ("vision_tower" in name), name
    expected = {name for name in before if "vision_tower" not in name and "multi_modal_projector" not in name}
    assert set(ran["anchored"]) == expected
    layers = (
        set(read_log(tmp_path / "layers.jsonl")[0]["layers"]) if (tmp_path / "layers.jsonl").stat().st_size else set()
    )
    assert not any("vision_tower" in name for name in layers)


def test_anchors_are_the_pretrained_weights(checkpoint, shards, tmp_path):
    before = load_model(ModelConfig(path=str(checkpoint("llava")))).trained()
    for name, keep in (("digrap", False), ("adamw", True)):
        result = train(
            runs.config(
                checkpoint("llava"),
                shards,
                tmp_path / name,
                optimizer={"name": name},
                training={"steps": 2, "keep_anchors": keep},
            )
        )
        assert result.anchored.keys() == before.keys()
        for layer, anchor in result.anchored.items():
            assert anchor.dtype == torch.bfloat16  # the checkpoint is bf16, so that is exact
            assert torch.equal(anchor.float(), before[layer])
            assert (
                not torch.equal(anchor.float(), result.loaded.trained()[layer])
                or "post_layernorm" in layer
                or (
                    "vision_tower" in layer and "layers.2" in layer  # LLaVA reads the last but one vision layer
                )
            )


@pytest.mark.parametrize("optimizer", ["adamw", "digrap", "ftp", "spd", "l2sp"])
def test_resumed_equals_uninterrupted(checkpoint, shards, tmp_path, optimizer):
    options = {
        "optimizer": {"name": optimizer, "lr": 1e-2},
        "schedule": {"name": "cosine", "warmup_steps": 2},
        "lora": {"enabled": True, "rank": 2, "dropout": 0.3},
    }
    model = checkpoint("paligemma")
    straight = runs.run(model, shards, tmp_path / "a", training={"steps": 6}, **options)
    saving = {"every": 2, "keep": 1, "save_final": False, "resume": "auto"}

    class StopError(Exception):
        pass

    def stop(self, step, figures):
        original(self, step, figures)
        if step == 5:  # after the checkpoint of step 4
            raise StopError

    from scale_digrap.training import metrics

    original = metrics.Metrics.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.Metrics, "write", stop)
        with pytest.raises(StopError):
            runs.run(model, shards, tmp_path / "b", training={"steps": 6}, checkpoint=saving, **options)
    assert runs.read_dir(tmp_path / "b" / "checkpoints") == ["latest", "step-4"]
    resumed = runs.run(model, shards, tmp_path / "b", training={"steps": 6}, checkpoint=saving, **options)
    assert resumed["loss"] == straight["loss"]
    assert runs.distance(resumed["parameters"], straight["parameters"]) == 0
    assert [line["step"] for line in read_log(tmp_path / "b" / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert runs.read_dir(tmp_path / "b" / "checkpoints") == ["latest", "step-6"]


def test_log_has_every_figure_of_every_step(checkpoint, shards, tmp_path):
    result = train(
        runs.config(
            checkpoint("paligemma"),
            shards,
            tmp_path,
            optimizer={"name": "digrap"},
            training={"steps": 4},
            log={"layers_every": 2, "progress": False},
        )
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == result.history
    names = (
        "step loss lr grad_norm samples_per_s tokens_per_s memory_mb data_wait_s skipped_steps bad_samples omega_mean "
        "conflict_rate"
    )
    assert [sorted(line) for line in lines] == [sorted(names.split())] * 4
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["grad_norm"] > 0 and line["memory_mb"] > 50 and line["samples_per_s"] > 0 for line in lines)
    assert all(0 <= line["omega_mean"] <= 1 and 0 <= line["conflict_rate"] <= 1 for line in lines)
    layers = read_log(tmp_path / "layers.jsonl")
    assert [record["step"] for record in layers] == [2, 4]
    fields = {"omega", "conflict", "conflict_rate", "drift", "relative_drift", "cosine", "grad_norm"}
    assert set(layers[0]["layers"]) == set(result.loaded.trained())
    assert all(set(stats) == fields for stats in layers[1]["layers"].values())
    assert load_config(tmp_path / "config.yaml").training.steps == 4


def test_log_every_averages_over_the_steps_between(checkpoint, shards, tmp_path):
    every = runs.run(checkpoint("llava"), shards, tmp_path / "a", training={"steps": 4})
    rarely = runs.run(checkpoint("llava"), shards, tmp_path / "b", training={"steps": 4}, log={"every": 4})
    assert [line["step"] for line in rarely["history"]] == [4]
    assert min(every["loss"]) < rarely["loss"][0] < max(every["loss"])


def test_activation_checkpointing_changes_nothing(checkpoint, shards, tmp_path):
    plain = runs.run(checkpoint("qwen2_5_vl"), shards, tmp_path / "a")
    saved = runs.run(checkpoint("qwen2_5_vl"), shards, tmp_path / "b", training={"activation_checkpointing": True})
    assert saved["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert saved["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


def test_bf16_autocast_stays_near_fp32(checkpoint, shards, tmp_path):
    fp32 = runs.run(checkpoint("paligemma"), shards, tmp_path / "a")
    bf16 = runs.run(checkpoint("paligemma"), shards, tmp_path / "b", training={"precision": "bf16"})
    assert bf16["loss"] == pytest.approx(fp32["loss"], rel=0.03)
    assert bf16["loss"] != fp32["loss"]
    assert all(p.dtype == torch.float32 for p in bf16["parameters"].values())


def test_batches_without_images_train_in_one_process(checkpoint, mixed_shards, tmp_path):
    ran = runs.run(checkpoint("paligemma"), mixed_shards, tmp_path, training={"batch_size": 1, "steps": 6})
    assert all(math.isfinite(loss) for loss in ran["loss"])


def test_loader_processes_change_nothing(checkpoint, shards, tmp_path):
    here = runs.run(checkpoint("llava"), shards, tmp_path / "a")
    there = runs.run(checkpoint("llava"), shards, tmp_path / "b", data={"workers": 2})
    assert there["loss"] == here["loss"]


def test_epochs_are_counted_in_whole_steps(checkpoint, shards, tmp_path):
    training = {"steps": None, "epochs": 0.4, "batch_size": 8}
    assert len(ShardDataset(shards)) == 48
    assert len(runs.run(checkpoint("llava"), shards, tmp_path, training=training)["loss"]) == 3  # 19.2 samples
    with pytest.raises(TrainingError, match=r"warmup_steps=3 leaves nothing of the 3 steps"):
        runs.run(checkpoint("llava"), shards, tmp_path, training=training, schedule={"warmup_steps": 3})


@pytest.mark.parametrize("optimizer", ["adamw", "digrap"])
def test_a_run_of_nothing_but_nan_stops_with_the_count(checkpoint, shards, tmp_path, optimizer, monkeypatch):
    from scale_digrap.training import loop

    monkeypatch.setattr(
        loop, "answer_loss", lambda model, batch, first: sum(p.sum() for p in model.parameters()) * math.nan
    )
    with pytest.raises(TrainingError, match=r"not finite in 3 steps in a row.*optimizer\.lr"):
        runs.run(
            checkpoint("llava"),
            shards,
            tmp_path,
            optimizer={"name": optimizer},
            training={"steps": 5, "max_skipped_steps": 3},
        )
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["skipped_steps"] for line in lines] == [1, 2, 3]
    assert lines[0]["loss"] is None


def test_final_model_loads_back_equal(checkpoint, shards, tmp_path):
    for family in tiny.FAMILIES:
        ran = runs.run(checkpoint(family), shards, tmp_path / family, checkpoint={"save_final": True})
        again = load_model(ModelConfig(path=str(tmp_path / family / "final")))
        assert runs.distance(ran["parameters"], dict(again.model.named_parameters())) == 0, family


def test_final_adapter_loads_back_equal_and_trains_on(checkpoint, shards, tmp_path):
    lora = {"enabled": True, "rank": 2, "train": ["multi_modal_projector.linear_1$"]}
    ran = runs.run(checkpoint("llava"), shards, tmp_path / "a", lora=lora, checkpoint={"save_final": True})
    final = tmp_path / "a" / "final"
    assert "model.safetensors" not in runs.read_dir(final)
    again = load_model(ModelConfig(path=str(final)))
    assert runs.distance(ran["parameters"], dict(again.model.named_parameters())) == 0
    assert sorted(again.trained()) == ran["trained"]
    assert again.path == str(checkpoint("llava"))
    more = runs.run(final, shards, tmp_path / "b", training={"steps": 1})
    assert more["trained"] == ran["trained"]


def test_nothing_is_written_for_a_configuration_that_cannot_run(shards, tmp_path):
    with pytest.raises(ConfigError, match="exactly one"):
        train(runs.config("builtin:tiny-vlm", shards, tmp_path / "x", training={"steps": None}))
    assert not Path(tmp_path / "x").exists()
