"""Every file under configs/: it loads, and with a tiny model of its family and real shards it trains."""

import math
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from scale_digrap.config import load_config, validate_for_training
from scale_digrap.evaluation.evaluate_config import load_evaluate_config
from scale_digrap.evaluation.registry import FRAMES_VQA, load_suites
from scale_digrap.evaluation.shift import check_options
from scale_digrap.models.loading import load_model
from scale_digrap.training import train
from tests.models import tiny
from tests.models.conftest import checkpoint  # noqa: F401

FOLDER = Path(__file__).parent.parent / "configs"
FAMILY = {
    "quickstart": "paligemma",
    "paligemma_vqav2_lora": "paligemma",
    "paligemma_vqav2_lora_paper": "paligemma",
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


@pytest.mark.parametrize("name", ["paligemma_vqav2_lora", "paligemma_vqav2_lora_paper"])
def test_known_settings_of_the_authors_run(name):
    config = load_config(FOLDER / f"{name}.yaml")
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 16, 0.05)
    assert (config.optimizer.lr, config.optimizer.omega_lr, config.optimizer.weight_decay) == (1e-3, 0.5, 0)
    assert (config.schedule.warmup_init_ratio, config.schedule.min_lr_ratio) == (0.1, 0.1)
    assert config.training.batch_size * config.training.gradient_accumulation * 8 == 256
    assert config.training.epochs == 10
    assert not any("val" in pattern for pattern in config.data.train)


def test_the_papers_file_warms_up_by_micro_batches_and_trains_on_the_bare_question():
    config = load_config(FOLDER / "paligemma_vqav2_lora_paper.yaml")
    assert config.schedule.warmup_steps * config.training.gradient_accumulation == 1000
    assert config.model.prompt == "{question}"


def adapted(checkpoint, name):  # noqa: F811
    """Names of the modules with an adapter, of both towers."""
    config = load_config(FOLDER / f"{name}.yaml")
    config.model.path = str(checkpoint(FAMILY[name]))
    model = load_model(config.model, lora=config.lora).model
    return sorted(n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n)


def test_the_papers_file_adapts_what_peft_does_by_the_authors_list(checkpoint):  # noqa: F811
    """Their list has no prefix; peft takes a name's last part, and the vision tower's output is called out_proj."""
    from peft import LoraConfig, get_peft_model

    ours = adapted(checkpoint, "paligemma_vqav2_lora_paper")
    model = tiny.paligemma()[0]
    theirs = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    assert ours == sorted(n.split(".lora_A")[0] for n, _ in theirs.named_parameters() if ".lora_A" in n)
    vision = {n.rsplit(".", 1)[1] for n in ours if "vision_tower" in n}
    language = {n.rsplit(".", 1)[1] for n in ours if "language_model" in n}
    assert vision == {"q_proj", "k_proj", "v_proj"}
    assert language == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not any("vision_tower" in n for n in adapted(checkpoint, "paligemma_vqav2_lora"))


@pytest.mark.parametrize("metric", ["vqa/official", "vqa/lavis"])
def test_the_frames_evaluation_names_its_metric_and_takes_the_published_one(metric, tmp_path):
    """And its shift section takes what its comment offers."""
    file = FOLDER / "evaluate_frames_vqa.yaml"
    more = [] if metric == "vqa/official" else [f"suites.metric={metric}"]
    config = load_evaluate_config(file, [*more, "shift.embeddings=frames", "shift.regularization=frames"])
    for name in (suite.name for suite in FRAMES_VQA.values()):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tar").touch()
    assert {suite.metric for suite in load_suites(asdict(config.suites), tmp_path)} == {metric}
    check_options(**config.shift)


def test_the_command_that_the_papers_file_names_is_right():
    text = (FOLDER / "paligemma_vqav2_lora_paper.yaml").read_text()
    start = text.index("scale-digrap evaluate ")
    command = shlex.split(text[start : text.index("\nrun_dir")].replace("\\\n#", " "))
    config = load_evaluate_config(FOLDER.parent / command[2], command[3:])
    assert config.models["digrap"].run == load_config(FOLDER / "paligemma_vqav2_lora_paper.yaml").run_dir
    assert config.model.prompt == "Question: {question} Answer:"
    assert config.suites.metric == "vqa/lavis"


def test_quickstart_file_is_what_the_quickstart_runs():
    from scale_digrap.quickstart.pipeline import training_config

    assert load_config(FOLDER / "quickstart.yaml") == training_config("full-digrap")
