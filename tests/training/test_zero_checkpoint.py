"""DeepSpeed's checkpoints inside ours, the final model, and a model that is read straight into ZeRO-3's shards."""

import gc
import shutil
import weakref

import pytest
import torch

from scale_digrap.config import ModelConfig
from scale_digrap.models import load_model
from scale_digrap.training import train
from scale_digrap.training.checkpoint import CheckpointError, completed
from scale_digrap.training.engine import create_engine
from tests.training import runs

pytestmark = pytest.mark.distributed

LORA = {"enabled": True, "rank": 2}


def zero(stage, **options):
    # Below DeepSpeed's threshold ZeRO-3 keeps parameters whole, and a tiny model has no others.
    threshold = {"param_persistence_threshold": 0} if stage == 3 else {}
    return {"engine": "deepspeed", "zero": {"stage": stage, **threshold, **options}}


def resumed(model, shards, folder, cases):
    """Each case straight through and, by way of its checkpoint of step 2, in two parts."""
    outcomes = []
    for i, sections in enumerate(cases):
        saving = {"every": 2, "keep": 5, "save_final": True, "resume": "never"}
        straight = runs.run(model, shards, f"{folder}/{i}a", checkpoint=saving, **sections)
        middle = {"resume": f"{folder}/{i}a/checkpoints/step-2"}
        again = runs.run(model, shards, f"{folder}/{i}b", checkpoint=middle, **sections)
        outcomes.append((straight, again))
    return outcomes


@pytest.mark.parametrize("optimizer", ["adamw", "digrap"])
def test_resumed_equals_uninterrupted_and_the_final_model_loads_back(
    dist_pool, checkpoint, shards, tmp_path, optimizer
):
    model = checkpoint("paligemma")
    common = {"optimizer": {"name": optimizer}, "schedule": {"name": "cosine", "warmup_steps": 1}}
    training = {"steps": 4, "batch_size": 2}
    cases = [
        {**common, "training": training, "sharding": zero(0)},
        {**common, "training": training, "sharding": zero(1)},
        {**common, "training": training, "sharding": zero(2), "lora": {**LORA, "dropout": 0.1}},
        {**common, "training": training, "sharding": zero(3)},
        {**common, "training": training, "sharding": zero(3), "lora": LORA},
        {**common, "training": {**training, "precision": "bf16"}, "sharding": zero(3, sub_group_size=900)},
    ]
    ranks = dist_pool(2).run(resumed, model, shards, str(tmp_path), cases)
    for i, (straight, again) in enumerate(ranks[0]):
        assert again["loss"] == straight["loss"][2:], cases[i]
        assert runs.distance(again["parameters"], straight["parameters"]) == 0, cases[i]
        assert runs.read_dir(tmp_path / f"{i}a" / "checkpoints") == ["step-2", "step-4"]
        final = dict(load_model(ModelConfig(path=str(tmp_path / f"{i}a" / "final"))).model.named_parameters())
        if "precision" not in cases[i]["training"]:
            assert runs.distance(straight["parameters"], final) == 0, cases[i]


def save_one(model, shards, folder, **sections):
    saving = {"every": 2, "save_final": False}
    return runs.run(model, shards, folder, checkpoint=saving, training={"steps": 2, "batch_size": 2}, **sections)


def refusals(model, shards, cases):
    """What is said to each way of going on; the same on all ranks."""
    said = []
    for folder, sections in cases:
        try:
            training = {"steps": 4, "batch_size": 2, **sections.pop("training", {})}
            runs.run(model, shards, folder, checkpoint={"resume": "auto"}, training=training, **sections)
            said.append("went on")
        except CheckpointError as error:
            said.append(str(error))
        torch.distributed.barrier()
    return said


def test_what_cannot_be_resumed_is_refused_in_one_line(dist_pool, checkpoint, shards, tmp_path):
    model, pool = checkpoint("llava"), dist_pool(2)
    for stage in (2, 3):
        pool.run(save_one, model, shards, tmp_path / f"{stage}", sharding=zero(stage))
    pool.run(save_one, model, shards, tmp_path / "fsdp")
    (step,) = (path for _, path in completed(tmp_path / "3" / "checkpoints"))
    for name in ("damaged", "incomplete"):
        shutil.copytree(tmp_path / "3", tmp_path / name)
    pieces = sorted((tmp_path / "damaged" / "checkpoints" / step.name / "deepspeed").glob("*optim_states.pt"))
    assert len(pieces) == 2
    for piece in pieces:
        piece.write_bytes(piece.read_bytes()[:2000])
    shutil.rmtree(tmp_path / "incomplete" / "checkpoints" / step.name / "deepspeed")
    cases = [
        (tmp_path / "2", {"sharding": zero(3)}),
        (tmp_path / "2", {}),
        (tmp_path / "fsdp", {"sharding": zero(2)}),
        (tmp_path / "2", {"sharding": zero(2), "training": {"precision": "bf16"}}),
        (tmp_path / "2", {"sharding": zero(2), "optimizer": {"name": "digrap"}}),
        (tmp_path / "damaged", {"sharding": zero(3)}),
        (tmp_path / "incomplete", {"sharding": zero(3)}),
    ]
    words = [
        "engine=deepspeed, stage=2, precision=fp32, ranks=2, this run uses engine=deepspeed, stage=3",
        "ranks=2, this run uses engine=fsdp",
        "written with engine=fsdp, this run uses engine=deepspeed, stage=2",
        "this run uses engine=deepspeed, stage=2, precision=bf16",
        "with AdamW, this run uses DiGraP",
        "cannot read",
        "cannot read",
    ]
    for said in pool.run(refusals, model, shards, cases):
        for message, expected in zip(said, words, strict=True):
            assert expected in message
            assert "\n" not in message
    (said,) = dist_pool(1).run(refusals, model, shards, [(tmp_path / "3", {"sharding": zero(3)})])
    assert "ranks=2, this run uses engine=deepspeed, stage=3, precision=fp32, ranks=1" in said[0]


class Census:
    """How many elements of parameters are whole on this rank at one time, while ZeRO-3 builds and loads a model."""

    def __init__(self, patch):
        import deepspeed
        from deepspeed.runtime.zero.partition_parameters import Init

        self.seen, self.most = {}, 0
        build, enter = Init._post_init_method, deepspeed.zero.GatheredParameters.__enter__

        def built(this, module):
            self.count(module.parameters(recurse=False))
            build(this, module)

        def entered(this):
            enter(this)
            self.count(getattr(this, "params", ()))

        patch.setattr(Init, "_post_init_method", built)
        patch.setattr(deepspeed.zero.GatheredParameters, "__enter__", entered)

    def count(self, parameters):
        self.seen.update({id(p): weakref.ref(p) for p in parameters})
        alive = [ref() for ref in self.seen.values()]
        self.most = max(self.most, sum(p.numel() for p in alive if p is not None))


def loaded_sizes(model, shards, folder, cases):
    results = []
    for sections in cases:
        config = runs.config(model, shards, folder, **sections)
        with pytest.MonkeyPatch.context() as patch:
            census = Census(patch)
            loaded = create_engine(config).load(config)
        parameters = dict(loaded.model.named_parameters())
        results.append(
            {
                "most": census.most,
                "whole": sum(p.numel() for p in parameters.values()),
                "here": sum(p.ds_tensor.numel() for p in parameters.values() if hasattr(p, "ds_tensor")),
                "all": sum(getattr(p, "ds_numel", p.numel()) for p in parameters.values()),
                "module": max(
                    sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters(recurse=False))
                    for module in loaded.model.modules()
                ),
                "values": {name: runs.full(p) for name, p in parameters.items()},
                "tied": loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight,
            }
        )
        del loaded, parameters
        gc.collect()
    return results


def test_zero_3_reads_a_checkpoint_straight_into_its_shards(dist_pool, checkpoint, shards, tmp_path):
    """No rank ever holds more whole parameters than those of one module."""
    model = checkpoint("paligemma")
    cases = [{"sharding": zero(3)}, {"sharding": zero(3), "lora": LORA}]
    expected = runs.initial(model)
    for rank in dist_pool(2).run(loaded_sizes, model, shards, tmp_path, cases):
        full, lora = rank
        assert full["whole"] == 0
        assert full["all"] / 2 <= full["here"] < full["all"] / 2 + 2 * len(full["values"])
        assert full["most"] == full["module"] < 0.5 * full["all"]  # its embedding is half of a tiny model
        assert full["tied"]
        assert runs.distance(full["values"], expected) == 0
        adapters = sum(value.numel() for name, value in lora["values"].items() if "lora_" in name)
        assert lora["whole"] == adapters
        assert lora["most"] == lora["module"]


def written(model, shards, folder):
    config = runs.config(model, shards, folder, sharding=zero(3, sub_group_size=500), training={"steps": 1})
    train(config)


def test_the_json_that_deepspeed_got_is_in_the_run_dir(dist_pool, checkpoint, shards, tmp_path):
    import json

    dist_pool(1).run(written, checkpoint("llava"), shards, tmp_path)
    values = json.loads((tmp_path / "deepspeed.json").read_text())
    assert values["zero_optimization"]["stage"] == 3
    assert values["zero_optimization"]["sub_group_size"] == 500
    assert values["train_micro_batch_size_per_gpu"] == 8
