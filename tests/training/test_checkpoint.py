"""Checkpoints of two ranks: going on on two and on one, the final model, and what counts as a whole checkpoint."""

import json

import pytest

from scale_digrap.config import ModelConfig
from scale_digrap.models import load_model
from scale_digrap.training import checkpoint as checkpoints
from tests.training import runs

LORA = {"enabled": True, "rank": 2}


@pytest.mark.distributed
@pytest.mark.parametrize("sections", [{}, {"lora": {**LORA, "dropout": 0.0}}], ids=["full", "lora"])
@pytest.mark.parametrize("optimizer", ["adamw", "digrap"])
def test_saved_on_two_ranks_goes_on_on_two_and_on_one(dist_pool, checkpoint, shards, tmp_path, optimizer, sections):
    model, schedule = checkpoint("paligemma"), {"name": "cosine", "warmup_steps": 1}
    options = {"optimizer": {"name": optimizer}, "schedule": schedule, **sections}
    saving = {"every": 2, "keep": 5, "save_final": False, "resume": "never"}
    two = {"steps": 4, "batch_size": 2}
    whole = dist_pool(2).run(runs.run, model, shards, tmp_path / "a", training=two, checkpoint=saving, **options)
    middle = {"resume": str(tmp_path / "a" / "checkpoints" / "step-2"), "save_final": False}
    again = dist_pool(2).run(runs.run, model, shards, tmp_path / "b", training=two, checkpoint=middle, **options)
    assert again[0]["loss"] == whole[0]["loss"][2:]
    assert runs.distance(again[0]["parameters"], whole[0]["parameters"]) == 0
    alone = runs.run(
        model, shards, tmp_path / "c", training={"steps": 4, "batch_size": 4}, checkpoint=middle, **options
    )
    start = runs.initial(model, **sections)
    assert alone["loss"] == pytest.approx(whole[0]["loss"][2:], rel=1e-4)
    tolerance = (2e-3 if optimizer == "digrap" else 1e-4) * runs.travelled(whole[0], start)
    assert runs.distance(alone["parameters"], whole[0]["parameters"]) < tolerance


@pytest.mark.distributed
@pytest.mark.parametrize("sections", [{}, {"lora": LORA}], ids=["full", "lora"])
def test_final_model_of_two_ranks_loads_back_equal(dist_pool, checkpoint, shards, tmp_path, sections):
    final = {"save_final": True, "resume": "never"}
    for family in ("paligemma", "qwen2_5_vl"):
        folder = tmp_path / family
        ranks = dist_pool(2).run(runs.run, checkpoint(family), shards, folder, checkpoint=final, **sections)
        again = load_model(ModelConfig(path=str(folder / "final")))
        assert runs.distance(ranks[0]["parameters"], dict(again.model.named_parameters())) == 0


def fake(folder, name, *files):
    (folder / name).mkdir(parents=True)
    for file in files:
        (folder / name / file).write_text("{}")


def test_only_whole_checkpoints_count(tmp_path):
    whole = (".metadata", "trainer.json")
    fake(tmp_path, "step-2", *whole)
    fake(tmp_path, "step-10", *whole)
    fake(tmp_path, "step-12.tmp", *whole)
    fake(tmp_path, "step-11", "trainer.json")
    fake(tmp_path, "step-13", ".metadata")
    assert [step for step, _ in checkpoints.completed(tmp_path)] == [2, 10]
    assert checkpoints.find(tmp_path, "auto") == tmp_path / "step-10"
    assert checkpoints.find(tmp_path, "never") is None
    assert checkpoints.find(tmp_path / "none", "auto") is None
    with pytest.raises(checkpoints.CheckpointError, match="no whole checkpoint"):
        checkpoints.find(tmp_path, str(tmp_path / "step-11"))


def test_checkpoints_of_another_optimizer_or_in_pieces_are_refused(checkpoint, shards, tmp_path):
    model, saving = checkpoint("llava"), {"every": 2, "keep": 1, "save_final": False}
    runs.run(model, shards, tmp_path, training={"steps": 2}, checkpoint=saving)
    on = {"resume": "auto", "save_final": False}
    with pytest.raises(checkpoints.CheckpointError, match=r"with AdamW, this run uses DiGraP.*resume=never"):
        runs.run(model, shards, tmp_path, training={"steps": 4}, checkpoint=on, optimizer={"name": "digrap"})
    folder = tmp_path / "checkpoints" / "step-2"
    data = next(folder.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(checkpoints.CheckpointError, match=r"cannot read .*step-2"):
        runs.run(model, shards, tmp_path, training={"steps": 4}, checkpoint=on)


def test_the_newest_are_kept_and_leftovers_of_a_kill_are_replaced(checkpoint, shards, tmp_path):
    folder = tmp_path / "checkpoints"
    fake(folder, "step-2.tmp", "rubbish")
    saving = {"every": 1, "keep": 2, "save_final": False}
    runs.run(checkpoint("llava"), shards, tmp_path, training={"steps": 4}, checkpoint=saving)
    assert runs.read_dir(folder) == ["step-3", "step-4"]
    state = json.loads((folder / "step-4" / "trainer.json").read_text())
    assert state["step"] == 4
    assert state["loader"]["consumed"] == 4 * 8
