"""Every file under configs/: it loads, and with a tiny model of its family and real shards it trains."""

import math
from pathlib import Path

import pytest

from scale_digrap.config import load_config, validate_for_training
from scale_digrap.evaluation.evaluate_config import load_evaluate_config
from scale_digrap.training import train
from tests.models import tiny
from tests.models.conftest import checkpoint  # noqa: F401

FOLDER = Path(__file__).parent.parent / "configs"
FAMILY = {
    "quickstart": "paligemma",
    "paligemma_vqav2_lora": "paligemma",
    "paligemma_vqav2_full": "paligemma",
    "paligemma_vqav2_zero3": "paligemma",
    "llava_vqav2_lora": "llava",
    "qwen2_5_vl_vqav2_lora": "qwen2_5_vl",
}


def test_all_are_covered():
    training = {path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("evaluate_")}
    assert set(FAMILY) == training


def test_evaluations_are_of_the_runs_that_the_other_files_make():
    runs = {load_config(FOLDER / f"{name}.yaml").run_dir for name in FAMILY}
    files = sorted(FOLDER.glob("evaluate_*.yaml"))
    assert len(files) >= 2
    for file in files:
        config = load_evaluate_config(file)
        assert {entry.run for entry in config.models.values() if entry.run is not None} <= runs
        assert config.baseline in config.models


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.write_shards(tmp_path_factory.mktemp("shards"))


def trained(config):
    """What a run leaves behind; on the ranks of a pool too."""
    result = train(config)
    return result.history, bool(result.loaded.adapters)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.distributed] * ("zero" in name)) for name in FAMILY]
)
def test_configuration_trains_a_tiny_model_of_its_family(name, checkpoint, shards, tmp_path, dist_pool):  # noqa: F811
    path = FOLDER / f"{name}.yaml"
    validate_for_training(load_config(path))
    config = load_config(
        path,
        [
            f"model.path={checkpoint(FAMILY[name])}",
            f"data.train=[{shards}]",
            f"run_dir={tmp_path}",
            "data.workers=0",
            "training.steps=3",
            "training.epochs=null",
            "training.batch_size=4",
            "schedule.warmup_steps=1",
            "log.every=1",
            "log.layers_every=1",
        ],
    )
    # DeepSpeed in processes of its own: it leaves a process group behind.
    history, adapters = dist_pool(2).run(trained, config)[0] if "zero" in name else trained(config)
    assert [line["step"] for line in history] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in history)
    assert history[-1]["omega_mean"] is not None
    assert adapters == config.lora.enabled == ("lora" in name)
    assert (tmp_path / "final").exists() == config.checkpoint.save_final


def test_known_settings_of_the_papers_run():
    config = load_config(FOLDER / "paligemma_vqav2_lora.yaml")
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 16, 0.05)
    assert (config.optimizer.lr, config.optimizer.omega_lr, config.optimizer.weight_decay) == (1e-3, 0.5, 0)
    assert (config.schedule.warmup_steps, config.schedule.min_lr_ratio) == (1000, 0.1)
    assert config.training.batch_size * config.training.gradient_accumulation * 8 == 256
    assert config.training.epochs == 10
    assert not any("val" in pattern for pattern in config.data.train)


def test_quickstart_file_is_what_the_quickstart_runs():
    from scale_digrap.quickstart.pipeline import training_config

    assert load_config(FOLDER / "quickstart.yaml") == training_config("full-digrap")
