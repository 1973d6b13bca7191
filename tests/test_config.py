"""The configuration: what is refused, what the message says, and that a resolved copy is read back unchanged."""

import subprocess
import sys

import pytest

from scale_digrap.config import (
    Config,
    ConfigError,
    config_from_dict,
    config_to_yaml,
    load_config,
    validate_for_training,
)
from scale_digrap.zero_config import deepspeed_json


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_defaults_are_valid_and_typed():
    config = load_config()
    assert isinstance(config, Config)
    assert config.optimizer.betas == [0.9, 0.999]
    assert config.training.steps is None


def test_file_then_overrides_in_order(tmp_path):
    path = write(tmp_path, "optimizer: {lr: 1e-3}\ntraining: {steps: 5}\n")
    config = load_config(path, ["optimizer.lr=2e-3", "optimizer.lr=3e-3", "model.freeze=[vision_tower, lm_head]"])
    assert config.optimizer.lr == 3e-3
    assert config.training.steps == 5
    assert config.model.freeze == ["vision_tower", "lm_head"]


def test_suites_are_typed(tmp_path):
    config = load_config(None, ["evaluation.suites.cv={shards: [a.tar], group: near, shift: vision}"])
    assert config.evaluation.suites["cv"].shift == "vision"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lrr=1", ["optimizer.lrr", "did you mean 'optimizer.lr'"]),
        ("optimiser.lr=1", ["optimiser", "did you mean 'optimizer'"]),
        ("optimizer.batch_size=4", ["optimizer.batch_size", "did you mean 'training.batch_size'"]),
        ("evaluation.suites.x={shard: [a.tar]}", ["evaluation.suites.x.shard", "evaluation.suites.x.shards"]),
        ("training.batch_size=many", ["training.batch_size", "many"]),
        ("training=3", ["training is a section", "batch_size"]),
        ("optimizer.strength=0.1", ["optimizer.strength", "spd and l2sp", "optimizer.name is digrap"]),
        ("optimizer.name=adam", ["optimizer.name", "digrap, ftp, spd, l2sp, adamw", "did you mean 'adamw'"]),
        ("sharding.engine=zero", ["sharding.engine", "fsdp, deepspeed", "zero"]),
        ("sharding.zero.stage=3", ["sharding.zero.stage", "sharding.engine=fsdp", "sharding.engine=deepspeed"]),
        ("optimizer.lr=-1", ["optimizer.lr", "greater than 0", "-1"]),
        ("optimizer.lr=.nan", ["optimizer.lr", "nan"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas", "two numbers"]),
        ("optimizer.betas=[0.9, 1.0]", ["optimizer.betas", "[0, 1)"]),
        ("training.batch_size=0", ["training.batch_size", "at least 1"]),
        ("training.steps=0", ["training.steps", "at least 1"]),
        ("training.clip_norm=0", ["training.clip_norm", "greater than 0"]),
        ("schedule.min_lr_ratio=1.5", ["schedule.min_lr_ratio", "at most 1"]),
        ("lora.dropout=1", ["lora.dropout", "less than 1"]),
        ("model.prompt=hello", ["model.prompt", "{question}"]),
        ("data.window=0", ["data.window", "at least 1"]),
        ("data.lanes=0", ["data.lanes", "at least 1"]),
        ("data.timeout_s=-1", ["data.timeout_s", "at least 0"]),
        ("data.max_bad_fraction=2", ["data.max_bad_fraction", "at most 1"]),
        ("data.max_bad=-1", ["data.max_bad", "at least 0"]),
        ("data.cache_gb=0", ["data.cache_gb", "greater than 0"]),
        ("data.mixture_epoch=never", ["data.mixture_epoch", "all, first"]),
        ("data.mixture.a={weight: 1}", ["data.mixture.a.shards", "empty"]),
        ("data.mixture.a={shards: [a.tar], weight: 0}", ["data.mixture.a.weight", "greater than 0"]),
        ("data.mixture.a={shard: [a.tar]}", ["data.mixture.a.shard", "did you mean"]),
        ("data={train: [a.tar], mixture: {a: {shards: [b.tar]}}}", ["data.train and data.mixture", "both"]),
        ("model.freeze=['(']", ["model.freeze", "regular expression"]),
        ("evaluation.suites.x={shards: [a.tar], group: mid}", ["evaluation.suites.x.group", "id, near, far"]),
        ("evaluation.suites.x={group: id}", ["evaluation.suites.x.shards", "empty"]),
        ("optimizer.lr", ["key=value"]),
        ("optimizer.lr=[", ["override", "optimizer.lr=["]),
    ],
)
def test_refused_with_the_key_and_the_fix(override, words):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_keys_that_must_agree():
    with pytest.raises(ConfigError, match=r"model\.freeze has no effect with lora"):
        load_config(None, ["lora.enabled=true", "model.freeze=[vision_tower]"])
    with pytest.raises(ConfigError, match="random initialisation"):
        load_config(None, ["lora.enabled=true", "optimizer.anchor=initial"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stage=4"], ["sharding.zero.stage", "0, 1, 2 or 3", "4"]),
        (["stage=2", "sub_group_size=100"], ["sharding.zero.sub_group_size", "stage 2", "stage=3"]),
        (["stage=3", "round_robin_gradients=true"], ["round_robin_gradients", "stage 3", "stage=1 or 2"]),
        (["stage=0", "offload_optimizer=cpu"], ["offload_optimizer", "stage 0", "stage=1 or 2 or 3"]),
        (["stage=3", "offload_param=nvme"], ["sharding.zero.offload_param", "none or cpu", "nvme"]),
        (["stage=3", "hpz_partition_size=0"], ["hpz_partition_size", "at least 1"]),
        (["stage=3", "param_persistence_threshold=-1"], ["param_persistence_threshold", "at least 0"]),
        (["extra.bf16={enabled: true}"], ["sharding.zero.extra.bf16", "training.precision"]),
        (["extra.gradient_clipping=1"], ["extra.gradient_clipping", "training.clip_norm"]),
        (["extra.zero_optimization.stage=1"], ["extra.zero_optimization.stage", "set sharding.zero.stage"]),
        (
            ["stage=3", "extra.zero_optimization.stage3_prefetch_bucket_size=1"],
            ["stage3_prefetch_bucket_size", "set sharding.zero.prefetch_bucket_size"],
        ),
        (["../dp_replicate_size=2"], ["sharding.dp_replicate_size=2", "hpz_partition_size"]),
        (["../wrap=[a]"], ["sharding.wrap", "FSDP"]),
        (["../reshard_after_forward=false"], ["reshard_after_forward", "stage=2"]),
    ],
)
def test_contradictions_under_deepspeed(overrides, words):
    prefixed = [f"sharding.{text[3:]}" if text.startswith("../") else f"sharding.zero.{text}" for text in overrides]
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["sharding.engine=deepspeed", *prefixed])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_deepspeeds_json():
    overrides = ["sharding.engine=deepspeed", "training.clip_norm=0.5", "training.gradient_accumulation=4"]
    stage2 = deepspeed_json(load_config(None, [*overrides, "sharding.zero.offload_optimizer=cpu"]), bf16=True)
    assert stage2["zero_optimization"] == {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "reduce_bucket_size": 500_000_000,
        "allgather_bucket_size": 500_000_000,
        "round_robin_gradients": False,
    }
    assert stage2["bf16"] == {"enabled": True}
    assert (stage2["gradient_clipping"], stage2["gradient_accumulation_steps"]) == (0.5, 4)
    zero = ["stage=3", "hpz_partition_size=2", "extra={zero_optimization: {max_x: 1}, data_types: {a: b}}"]
    stage3 = deepspeed_json(load_config(None, [*overrides, *(f"sharding.zero.{item}" for item in zero)]), bf16=False)
    assert stage3["zero_optimization"]["zero_hpz_partition_size"] == 2
    assert stage3["zero_optimization"]["stage3_param_persistence_threshold"] == 100_000
    assert stage3["zero_optimization"]["max_x"] == 1
    assert "allgather_bucket_size" not in stage3["zero_optimization"]
    assert stage3["data_types"] == {"a": "b"}


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(write(tmp_path, "a: [1,\n"))
    with pytest.raises(ConfigError, match="key: value"):
        load_config(write(tmp_path, "- 1\n- 2\n"))


@pytest.mark.parametrize("overrides", [[], ["training.steps=3", "training.epochs=1"]])
def test_steps_or_epochs(overrides):
    with pytest.raises(ConfigError, match=r"exactly one of training\.steps and training\.epochs"):
        validate_for_training(load_config(None, ["data.train=[a.tar]", *overrides]))


def test_training_needs_data_and_steps_after_the_warm_up():
    with pytest.raises(ConfigError, match=r"data\.train is empty"):
        validate_for_training(load_config(None, ["training.steps=3"]))
    with pytest.raises(ConfigError, match=r"warmup_steps=3"):
        validate_for_training(load_config(None, ["training.steps=3", "data.train=[a.tar]", "schedule.warmup_steps=3"]))


def test_resolved_copy_reads_back_equal(tmp_path):
    config = load_config(None, ["training.epochs=1.5", "evaluation.suites.x={shards: [a.tar]}", "lora.enabled=true"])
    assert load_config(write(tmp_path, config_to_yaml(config))) == config


def test_from_dict():
    assert config_from_dict({"training": {"steps": 2}}).training.steps == 2
    with pytest.raises(ConfigError, match=r"unknown key 'steps'.*training\.steps"):
        config_from_dict({"steps": 2})


def test_reading_a_configuration_imports_no_torch():
    code = "import sys, scale_digrap.config as c; c.load_config(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
