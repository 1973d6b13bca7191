"""Resuming in every ZeRO stage, the final model, a model read straight into ZeRO-3's shards, and what stays behind."""

import gc
import json
import weakref

import pytest
import torch

from scale_digrap.config import ModelConfig
from scale_digrap.models import load_model
from scale_digrap.training import train
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
        final = dict(load_model(ModelConfig(path=str(tmp_path / f"{i}a" / "final"))).model.named_parameters())
        if "precision" not in cases[i]["training"]:
            assert runs.distance(straight["parameters"], final) == 0, cases[i]


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


def alive(model, shards, folder, cases):
    """Bytes of tensors that Python still knows after each run, its evaluation copy included."""
    left = []
    for i, sections in enumerate(cases):
        config = runs.config(model, shards, f"{folder}/{i}", training={"steps": 1, "batch_size": 2}, **sections)
        engine = create_engine(config)
        untrained = engine.load(config, train=False)
        engine.close()
        result = train(config)
        result.engine.close()
        del engine, untrained, result
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
        left.append(sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))
    return left


def test_a_closed_engine_leaves_no_model_behind(dist_pool, checkpoint, shards, tmp_path):
    cases = [
        {"sharding": zero(stage), "optimizer": {"name": name}}
        for stage, name in ((3, "digrap"), (3, "adamw"), (2, "digrap"))
    ]
    for left in dist_pool(2).run(alive, checkpoint("llava"), shards, tmp_path, cases):
        assert max(left) - min(left) < 10_000, left  # the model has 190 kB, its optimizer's state twice that


def written(model, shards, folder):
    config = runs.config(model, shards, folder, sharding=zero(3, sub_group_size=500), training={"steps": 1})
    train(config)


def test_the_json_that_deepspeed_got_is_in_the_run_dir(dist_pool, checkpoint, shards, tmp_path):
    dist_pool(1).run(written, checkpoint("llava"), shards, tmp_path)
    values = json.loads((tmp_path / "deepspeed.json").read_text())
    assert values["zero_optimization"]["stage"] == 3
    assert values["zero_optimization"]["sub_group_size"] == 500
    assert values["train_micro_batch_size_per_gpu"] == 8
