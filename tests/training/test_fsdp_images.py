"""Ranks whose batches hold no image: no hang, and the gradient of one process with the whole batch."""

import pytest

from scale_digrap.data.sample import VqaSample
from scale_digrap.training.engine import create_engine
from scale_digrap.training.loss import answer_loss, first_answer_position
from tests.models import tiny
from tests.training import runs

pytestmark = pytest.mark.distributed

LORA = {"enabled": True, "rank": 2}


def gradients(model_path, batches_of, **sections):
    """The gradients of one step on this rank's own batch, in full (collective)."""
    config = runs.config(model_path, "unused", "unused", **sections)
    engine = create_engine(config)
    loaded = engine.load(config)
    loaded.model.train()
    micro_batches = [loaded.collator.train(samples) for samples in batches_of[engine.dp_rank]]
    tokens = sum(int((batch["labels"] != -100).sum()) for batch in micro_batches)
    (total,) = engine.sum([tokens])
    for index, batch in enumerate(micro_batches):
        loss = answer_loss(loaded.model, batch, first_answer_position(batch["labels"]))
        last = index == len(micro_batches) - 1
        engine.backward(loaded.model, loss * engine.dp_world_size / total, last=last)
    engine.finish_gradients(loaded.trained().values())
    return {name: runs.full(p.grad) for name, p in loaded.trained().items()}


def samples(numbers, images):
    return [
        VqaSample(f"s{i}", tiny.picture("red", i) if images else None, "what color is the shape", ["red"], str(i), {})
        for i in numbers
    ]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("sections", [{}, {"sharding": {"load_sharded": False}}, {"lora": LORA}], ids=str)
def test_a_rank_without_images_does_not_hang_and_the_gradient_is_that_of_one_process(
    dist_pool, checkpoint, family, sections
):
    pictured, plain = samples([0, 1], True), samples([2, 3], False)
    two = dist_pool(2).run(gradients, checkpoint(family), [[plain], [pictured]], timeout=60, **sections)
    one = gradients(checkpoint(family), [[pictured, plain]], **sections)
    scale = max(float(g.abs().max()) for g in one.values())
    for rank in two:
        assert runs.distance(rank, one) < 1e-5 * scale
    vision = [float(g.abs().max()) for name, g in one.items() if "vision" in name or "visual" in name]
    assert sections.get("lora") or max(vision) > 0


def test_accumulating_batches_with_and_without_images(dist_pool, checkpoint):
    pictured, plain = samples([0, 1], True), samples([2, 3], False)
    ranks = [[plain, pictured], [pictured, plain]]
    two = dist_pool(2).run(gradients, checkpoint("paligemma"), ranks, timeout=60)
    one = gradients(checkpoint("paligemma"), [[plain, pictured, pictured, plain]])
    for rank in two:
        assert runs.distance(rank, one) < 1e-5 * max(float(g.abs().max()) for g in one.values())
    none_at_all = dist_pool(2).run(gradients, checkpoint("paligemma"), [[plain], [plain]], timeout=60)
    assert all(not g.any() for name, g in none_at_all[0].items() if "vision_tower" in name)
