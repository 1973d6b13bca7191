"""Replicas that differ in one bit: found, on all ranks, with the rank named; and replicas that agree pass."""

import pytest
import torch
import torch.distributed as dist

from scale_digrap.sharding.dtensor import local
from scale_digrap.training.agreement import DivergenceError
from tests.training import runs

pytestmark = pytest.mark.distributed

LAYER = "model.multi_modal_projector.linear_1.weight"


def zero(stage):
    return {"engine": "deepspeed", "zero": {"stage": stage}}


def flip_bit(tensor):
    """The lowest bit of one element."""
    bits = local(tensor.detach()).reshape(-1).view(torch.int32)
    bits[3] ^= 1


def spoil(run, what):
    if what == "position":
        run.loader.consumed += 1
    elif what == "omega":
        run.optimizer._packed[0, 2] += 1e-12
    elif what == "learning rate":
        run.optimizer.param_groups[0]["lr"] *= 1 + 1e-12
    else:
        with torch.no_grad():
            flip_bit(dict(run.replicas._model.named_parameters())[what])


def ends(folder, model, shards, cases):
    """How runs end in which one rank goes astray before step 4, with a check every 2 steps."""
    from scale_digrap.training import loop

    original, told = loop._Run.step, []
    for i, (sharding, what, rank, sections) in enumerate(cases):

        def step(self, number, batches, what=what, rank=rank):
            if number == 4 and dist.get_rank() == rank:
                spoil(self, what)
            return original(self, number, batches)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop._Run, "step", step)
            training = {"steps": 6, "batch_size": 2, "sync_check_every": 2}
            common = {"training": training, "optimizer": {"name": "digrap"}, "sharding": sharding, **sections}
            try:
                runs.run(model, shards, f"{folder}/{i}", **common)
                told.append("no difference found")
            except DivergenceError as error:
                told.append(str(error))
    return told


FROZEN = "base_model.model.model.language_model.layers.0.mlp.up_proj.weight"
HSDP = {"dp_replicate_size": 2}
LORA = {"lora": {"enabled": True, "rank": 2}}
FOUR_RANKS = [
    (zero(2), LAYER, 2, {}, "rank 2 differs from the other 3 in parameters:"),
    (zero(1), "omega", 1, {}, "rank 1 differs from the other 3 in omega and its moments:"),
    # frozen weights are never written to and never reduced: nothing else would tell
    (zero(2), FROZEN, 3, LORA, "rank 3 differs from the other 3 in parameters:"),
    ({}, "position", 0, {}, "rank 0 differs from the other 3 in position in the data:"),
    ({}, "omega", 3, {}, "rank 3 differs from the other 3 in omega"),
    ({}, "learning rate", 2, {}, "rank 2 differs from the other 3 in learning rate:"),
    # ranks 0 and 2, 1 and 3 hold the same shards; of two, none is the majority
    (HSDP, LAYER, 3, {}, "rank 1 and rank 3 hold different sharded parameters, and no side is the majority"),
    (HSDP, LAYER, 0, {}, "rank 0 and rank 2 hold different sharded parameters"),
    *((sharding, "omega", None, {}, "no difference found") for sharding in ({}, HSDP, zero(0), zero(2), zero(3))),
]  # fmt: skip


def test_a_rank_that_went_astray_is_named_by_all(dist_pool, checkpoint, shards, tmp_path):
    cases = [case[:-1] for case in FOUR_RANKS]
    told = dist_pool(4).run(ends, str(tmp_path), checkpoint("llava"), shards, cases)
    for rank in range(1, 4):
        assert told[rank] == told[0], "one message on all ranks"
    for (*case, expected), message in zip(FOUR_RANKS, told[0], strict=True):
        assert expected in message, case
        if case[2] is not None:
            assert message.startswith("before step 4, "), case
            assert "After step 1 they still agreed" in message, case
    assert DivergenceError.exit_status == 4


def first_step(folder, model, shards):
    """Rank 1 has other pre-trained weights."""
    from scale_digrap.training.zero import ZeroEngine

    original = ZeroEngine.prepare

    def prepare(self, loaded, config):
        result = original(self, loaded, config)
        if self.rank == 1:
            with torch.no_grad():
                flip_bit(dict(loaded.model.named_parameters())[LAYER])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ZeroEngine, "prepare", prepare)
        with pytest.raises(DivergenceError) as error:
            runs.run(model, shards, folder, sharding=zero(2))
    return str(error.value)


def test_other_files_on_a_host_are_found_before_the_first_step(dist_pool, checkpoint, shards, tmp_path):
    for message in dist_pool(2).run(first_step, str(tmp_path), checkpoint("llava"), shards):
        assert "before step 1, rank 0 and rank 1 hold different parameters" in message
        assert "same model files" in message
