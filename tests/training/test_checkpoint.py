"""Checkpoints of two ranks: going on on two, on one and in the other engine, damage, and what is kept."""

import contextlib
import json
import logging
import os
import random
import re
import shutil

import pytest

from scale_digrap.config import ModelConfig
from scale_digrap.models import load_model
from scale_digrap.training import manifest
from scale_digrap.training.engine import CheckpointError
from tests.training import runs

LORA = {"enabled": True, "rank": 2}
ZERO = {"engine": "deepspeed", "zero": {"stage": 3}}


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
@pytest.mark.parametrize("optimizer", ["adamw", "digrap", "ftp"])
def test_between_engines_and_ranks(dist_pool, checkpoint, shards, tmp_path, optimizer):
    """Two ranks → four → one → four → two → four, through FSDP2 and ZeRO-1, 2 and 3: the same run throughout."""
    model, options = checkpoint("paligemma"), {"optimizer": {"name": optimizer, "weight_decay": 0.01}}
    options["schedule"] = {"name": "constant"}
    whole = runs.run(model, shards, tmp_path / "w", training={"steps": 7, "batch_size": 4}, **options)
    legs = [
        (2, 2, {}),
        (4, 3, ZERO),
        (1, 4, {}),
        (4, 5, {"engine": "deepspeed", "zero": {"stage": 2}}),
        (2, 6, {"engine": "deepspeed", "zero": {"stage": 1}}),
        (4, 7, {}),
    ]
    losses: list[float] = []
    for world, until, sharding in legs:
        leg = {
            "training": {"steps": until, "batch_size": 4 // world},
            "checkpoint": {"every": 1, "save_final": False, "resume": "auto"},
            "sharding": sharding,
            **options,
        }
        folder = tmp_path / "legs"
        if world == 1:
            result = runs.run(model, shards, folder, **leg)
        else:
            result = dist_pool(world).run(runs.run, model, shards, folder, **leg)[0]
        losses = result["loss"]
    assert len(losses) == 7, "the log goes on in the same file"
    assert losses == pytest.approx(whole["loss"], rel=2e-4)
    start = runs.initial(model)
    tolerance = (1e-4 if optimizer == "adamw" else 2e-3) * runs.travelled(whole, start)
    assert runs.distance(result["parameters"], whole["parameters"]) < tolerance


@pytest.mark.distributed
@pytest.mark.parametrize("sharding", [{}, ZERO], ids=["fsdp", "zero3"])
def test_in_the_background(dist_pool, checkpoint, shards, tmp_path, sharding):
    """The snapshot is of its step, though the next ones run while it is written; resuming is bit-equal."""
    model = checkpoint("llava")
    saving = {"every": 1, "keep": 9, "background": True, "save_final": False}
    options = {"optimizer": {"name": "digrap"}, "sharding": sharding, "training": {"steps": 4, "batch_size": 2}}
    whole = dist_pool(2).run(runs.run, model, shards, tmp_path / "a", checkpoint=saving, **options)
    folder = tmp_path / "a" / "checkpoints"
    assert [step for step, _ in manifest.checkpoints(folder)] == [1, 2, 3, 4]
    assert not any(manifest.problems(path) for _, path in manifest.checkpoints(folder))
    middle = {"resume": str(folder / "step-2"), "save_final": False}
    again = dist_pool(2).run(runs.run, model, shards, tmp_path / "b", checkpoint=middle, **options)
    assert again[0]["loss"] == whole[0]["loss"][2:]
    assert runs.distance(again[0]["parameters"], whole[0]["parameters"]) == 0


@pytest.mark.distributed
@pytest.mark.parametrize("sections", [{}, {"lora": LORA}], ids=["full", "lora"])
def test_final_model_of_two_ranks_loads_back_equal(dist_pool, checkpoint, shards, tmp_path, sections):
    final = {"save_final": True, "resume": "never"}
    for family in ("paligemma", "qwen2_5_vl"):
        folder = tmp_path / family
        ranks = dist_pool(2).run(runs.run, checkpoint(family), shards, folder, checkpoint=final, **sections)
        again = load_model(ModelConfig(path=str(folder / "final")))
        assert runs.distance(ranks[0]["parameters"], dict(again.model.named_parameters())) == 0


# -- one process: damage, errors, what is kept -------------------------------------------------------------------------

SAVING = {"every": 1, "keep": 9, "save_final": False, "resume": "auto"}


@pytest.fixture(scope="module")
def two_steps(checkpoint, shards, tmp_path_factory):
    """A run of two steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    go_on(checkpoint, shards, folder, steps=2)
    return folder


@pytest.fixture
def copy(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    return tmp_path / "run"


def go_on(checkpoints, shards, folder, steps=3, model="llava", **options):
    sections = {"optimizer": {"name": "digrap"}, "training": {"steps": steps}, "checkpoint": SAVING, **options}
    sections["schedule"] = {"name": "constant"}  # that of a run of other length would be another
    return runs.run(model if "/" in model else checkpoints(model), shards, folder, **sections)


def test_every_flipped_byte_and_every_truncation_is_found(two_steps, tmp_path):
    path = tmp_path / "step-2"
    shutil.copytree(two_steps / "checkpoints" / "step-2", path)
    assert manifest.problems(path) == []
    files = [file for file in path.rglob("*") if file.is_file()]
    sizes = [file.stat().st_size for file in files]
    chance = random.Random(0)
    # As often in a small file as in a large one: the small ones say what the large ones mean.
    places = [(file, chance.randrange(size)) for file, size in zip(files, sizes, strict=True) for _ in range(20)]
    places += [(file, chance.randrange(file.stat().st_size)) for file in chance.choices(files, weights=sizes, k=200)]
    for file, place in places:
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        assert manifest.problems(path), f"a flipped bit at byte {place} of {file.name} was not seen"
        file.write_bytes(whole)
    for file, size in zip(files, sizes, strict=True):
        whole = file.read_bytes()
        for length in {0, 1, size // 2, size - 1, chance.randrange(size)} - {size}:
            file.write_bytes(whole[:length])
            assert manifest.problems(path), f"{file.name} cut to {length} bytes was not seen"
        file.unlink()
        assert manifest.problems(path), f"{file.name} is gone, and was not missed"
        file.write_bytes(whole)
    (path / "state" / "__1_0.distcp").write_bytes(b"of another save")
    assert "state/__1_0.distcp is not in manifest.json" in manifest.problems(path)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(checkpoint, shards, copy, caplog):
    straight = go_on(checkpoint, shards, copy.parent / "straight")
    data = next((copy / "checkpoints" / "step-2" / "state").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"not whole: .*step-2: state/__0_0.distcp has \d+ bytes, \d+ were"):
        go_on(checkpoint, shards, copy, checkpoint={**SAVING, "on_damage": "refuse"})
    with caplog.at_level(logging.WARNING):
        result = go_on(checkpoint, shards, copy)
    assert "an older one is used" in caplog.text
    assert "step-2" in caplog.text
    assert result["loss"] == straight["loss"], "steps 2 and 3 were taken again"
    assert manifest.problems(copy / "checkpoints" / "step-2") == [], "and the damaged one was replaced"


def test_nothing_whole_is_an_error_not_a_fresh_start(checkpoint, shards, copy):
    for _, path in manifest.checkpoints(copy / "checkpoints"):
        (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of 2 checkpoints .* is whole.*resume=never"):
        go_on(checkpoint, shards, copy)


def test_leftovers_of_a_kill(checkpoint, shards, copy):
    """Killed while writing, and between the two renames of a replacement."""
    folder = copy / "checkpoints"
    (folder / "step-3.tmp" / "state").mkdir(parents=True)
    (folder / "step-2").rename(folder / "step-2.old")
    result = go_on(checkpoint, shards, copy, steps=2)
    assert len(result["loss"]) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-1", "step-2"]


def test_other_optimizer_other_model_other_base(checkpoint, shards, copy):
    with pytest.raises(CheckpointError, match=r"with DiGraP, this run uses AdamW.*resume=never"):
        go_on(checkpoint, shards, copy, optimizer={"name": "adamw"})
    with pytest.raises(CheckpointError, match=r"lacks layer .*resume=never"):
        go_on(checkpoint, shards, copy, model="paligemma")
    before = sorted(path.name for path in (copy / "checkpoints").iterdir())
    other = copy.parent / "other"
    shutil.copytree(checkpoint("llava"), other)
    change_one_weight(other)
    go_on(checkpoint, shards, copy, steps=2, model=str(other))  # anchors and all weights are in the checkpoint
    thin = copy.parent / "thin"
    go_on(checkpoint, shards, thin, steps=2, checkpoint={**SAVING, "anchors": False})
    stored = (thin / "checkpoints" / "step-2" / "state").rglob("*")
    assert sum(file.stat().st_size for file in stored) < sum(
        file.stat().st_size for file in (copy / "checkpoints" / "step-2" / "state").rglob("*")
    )
    with pytest.raises(CheckpointError, match=r"leaves out its anchors.*other weights now"):
        go_on(checkpoint, shards, thin, model=str(other))
    straight = go_on(checkpoint, shards, copy.parent / "straight")
    assert go_on(checkpoint, shards, thin)["loss"] == straight["loss"]
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == before


def change_one_weight(folder):
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    name = sorted(name for name in weights if weights[name].is_floating_point())[0]
    weights[name].view(-1)[0] += 1.0
    save_file(weights, file, metadata={"format": "pt"})


def test_frozen_weights_of_another_base_are_refused(checkpoint, shards, tmp_path):
    lora = {"lora": {**LORA, "dropout": 0.0}}
    go_on(checkpoint, shards, tmp_path / "run", steps=1, **lora)
    other = tmp_path / "other"
    shutil.copytree(checkpoint("llava"), other)
    change_one_weight(other)
    with pytest.raises(CheckpointError, match="leaves out its frozen weights"):
        go_on(checkpoint, shards, tmp_path / "run", model=str(other), **lora)


def test_what_is_kept(checkpoint, shards, tmp_path):
    saving = {"every": 1, "keep": 2, "keep_every": 3, "save_final": False}
    runs.run(checkpoint("llava"), shards, tmp_path, training={"steps": 8}, checkpoint=saving)
    assert runs.read_dir(tmp_path / "checkpoints") == ["latest", "step-3", "step-6", "step-7", "step-8"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-8\n"
    state = json.loads((tmp_path / "checkpoints" / "step-8" / "trainer.json").read_text())
    assert state["step"] == 8
    assert state["loader"]["consumed"] == 8 * 8
    assert state["versions"]["torch"]


def test_changed_settings_count_and_are_told(checkpoint, shards, copy, caplog):
    with caplog.at_level(logging.WARNING):
        go_on(checkpoint, shards, copy, optimizer={"name": "digrap", "lr": 1e-5})
    assert "optimizer.lr" in caplog.text
    log = [json.loads(line) for line in (copy / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 3
    assert log[-1]["lr"] <= 1e-5


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_cannot_be_written(checkpoint, shards, copy, monkeypatch, caplog, background):
    """The older checkpoints stay; the run stops, or goes on and counts, as configured."""
    from scale_digrap.training import checkpoint as module

    real = module.dcp.save

    def full(state, checkpoint_id=None, **more):
        if "step-3" in str(checkpoint_id):
            raise OSError(28, "No space left on device", str(checkpoint_id))
        return real(state, checkpoint_id=checkpoint_id, **more)

    monkeypatch.setattr(module.dcp, "save", full)
    saving = {**SAVING, "background": background}
    with pytest.raises(CheckpointError, match=r"cannot write .*step-3: rank 0: No space left on device"):
        go_on(checkpoint, shards, copy, checkpoint=saving)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["latest", "step-1", "step-2"]
    with caplog.at_level(logging.WARNING):
        go_on(checkpoint, shards, copy, steps=4, checkpoint={**saving, "on_error": "continue"})
    assert "training goes on (1 so far)" in caplog.text
    assert [step for step, _ in manifest.checkpoints(copy / "checkpoints")] == [1, 2, 4]
    assert all(not manifest.problems(path) for _, path in manifest.checkpoints(copy / "checkpoints"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_file_system(checkpoint, shards, tmp_path):
    """A real one, of two megabytes, where the third checkpoint does not fit."""
    import subprocess

    folder = tmp_path / "small"
    folder.mkdir()
    size = run_size(checkpoint, shards, tmp_path / "measured")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size)}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*step-3: rank 0: No space left") as told:
            go_on(checkpoint, shards, folder, steps=4)
        free, needed = re.search(
            rf"; {re.escape(str(folder))}/checkpoints had ([\d.]+) MB free, a checkpoint takes ([\d.]+) MB",
            str(told.value),
        ).groups()
        assert 0 < float(free) <= 0.5 * size / 1e6  # the logs take room too
        assert 0.3 * size / 1e6 < float(needed) < 1.2 * size / 1e6
        found = manifest.checkpoints(folder / "checkpoints")
        assert [step for step, _ in found] == [1, 2]
        assert all(not manifest.problems(path) for _, path in found)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def run_size(checkpoint, shards, folder):
    go_on(checkpoint, shards, folder, steps=1)
    return sum(file.stat().st_size for file in (folder / "checkpoints" / "step-1").rglob("*") if file.is_file())


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["one process", "fsdp", "zero3"])
def test_a_layer_that_was_trained_and_is_frozen_now_is_refused_by_name(dist_pool, checkpoint, shards, tmp_path, engine):
    """Its trained value would silently become the base's again."""
    model, path = checkpoint("llava"), tmp_path / "run"
    options = {"optimizer": {"name": "digrap"}, "schedule": {"name": "constant"}, "checkpoint": SAVING}
    options["sharding"] = ZERO if engine == "zero3" else {}
    batch = 8 if engine == "one process" else 4

    def start(steps, **model_options):
        more = {**options, "model": {"path": str(model), **model_options}}
        more["training"] = {"steps": steps, "batch_size": batch}
        if engine == "one process":
            return runs.run(model, shards, path, **more)
        return dist_pool(2).run(runs.run, model, shards, path, **more)

    start(1)
    told_name = r"holds trained weights of layer '[\w.]*vision_tower[\w.]*' and \d+ more layers"
    with pytest.raises(Exception, match=told_name) as told:
        start(2, freeze=["vision_tower"])
    assert "model.freeze: [] → ['vision_tower']" in str(told.value)
    assert "scale-digrap export RUN --to DIR" in str(told.value)
    start(2)


def test_other_targets_of_adapters_are_the_reason_that_is_told(checkpoint, shards, tmp_path):
    run, lora = tmp_path / "run", {**LORA, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}
    go_on(checkpoint, shards, run, steps=1, lora=lora)
    for changed, told in (
        ({"targets": ["q_proj"]}, "lora.targets: ['q_proj', 'v_proj'] → ['q_proj']"),
        (
            {"targets": ["q_proj", "v_proj", "k_proj"]},
            "lora.targets: ['q_proj', 'v_proj'] → ['q_proj', 'v_proj', 'k_proj']",
        ),
        ({"rank": 4}, "lora.rank: 2 → 4"),
    ):
        with pytest.raises(CheckpointError) as error:
            go_on(checkpoint, shards, run, steps=2, lora={**lora, **changed})
        assert told in str(error.value)
        assert "base" not in str(error.value).replace("base_model", "").replace("base_layer", "")


def test_a_run_dir_that_is_deleted_while_the_run_goes_on_is_named(checkpoint, shards, tmp_path, monkeypatch, caplog):
    """The work is not lost: the checkpoint is written there again."""
    from scale_digrap.training.checkpoint import Checkpointer

    save = Checkpointer.save

    def after_a_deletion(self, step):
        if step == 2:
            self.close()
            shutil.rmtree(self.folder.parent)
        save(self, step)

    monkeypatch.setattr(Checkpointer, "save", after_a_deletion)
    with caplog.at_level(logging.WARNING), contextlib.suppress(OSError):  # of the log, which is another's matter
        go_on(checkpoint, shards, tmp_path / "run", steps=2)
    assert f"run_dir {tmp_path / 'run'} was deleted while the run goes on" in caplog.text
    assert [step for step, _ in manifest.checkpoints(tmp_path / "run" / "checkpoints")] == [2]
    assert not manifest.problems(tmp_path / "run" / "checkpoints" / "step-2")


def test_a_folder_that_cannot_be_written_is_named(checkpoint, shards, copy):
    shutil.rmtree(copy / "checkpoints" / "step-2")
    (copy / "checkpoints" / "step-2.tmp").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write .*step-2: rank 0: File exists: .*step-2\.tmp"):
        go_on(checkpoint, shards, copy, steps=2)
