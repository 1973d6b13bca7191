from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scale_digrap.evaluation.runner import EvaluationError, SuiteResult, evaluate, prepare
from tests.evaluation.tiny import shard_fsdp2, tiny_collator, tiny_model, with_lora, write_suite

COUNT = 45  # not a multiple of ranks × batch size


def _evaluate(folder: Path, kind: str, batch_size: int, *, cached: bool = False) -> dict[str, SuiteResult]:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    collator = tiny_collator()
    model = tiny_model(collator)
    if "lora" in kind:
        model = with_lora(model)
    if "fsdp" in kind:
        model = shard_fsdp2(model)
    model.train()
    model.get_submodule("base_model.model" if "lora" in kind else "").lm_head.eval()  # a part with a mode of its own
    modes = [module.training for module in model.modules()]
    suites = [write_suite_lazily(folder, "id"), write_suite_lazily(folder, "far")]
    ranks = {"dp_rank": rank, "dp_world_size": world}
    batches = prepare(collator, suites, batch_size=batch_size, **ranks) if cached else None
    results = evaluate(model, collator, suites, batch_size=batch_size, max_new_tokens=3, prepared=batches, **ranks)
    assert [module.training for module in model.modules()] == modes
    if cached:  # prepared batches serve again
        again = evaluate(model, collator, suites, max_new_tokens=3, prepared=batches, **ranks)
        assert {name: result.records for name, result in again.items()} == {
            name: result.records for name, result in results.items()
        }
    for result in results.values():
        result.seconds = 0.0
    return results


def write_suite_lazily(folder: Path, name: str):
    from scale_digrap.evaluation.registry import QUICKSTART

    return QUICKSTART[name].at(folder / f"{name}-{{0,1}}.tar")


@pytest.fixture(scope="module")
def suites_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("suites")
    write_suite(folder, "id", COUNT)
    write_suite(folder, "far", 8, seed=1)
    return folder


@pytest.fixture(scope="module")
def plain(suites_folder: Path) -> dict[str, SuiteResult]:
    return _evaluate(suites_folder, "full", 16)


@pytest.fixture(scope="module")
def plain_lora(suites_folder: Path) -> dict[str, SuiteResult]:
    return _evaluate(suites_folder, "lora", 16)


def test_against_generating_one_question_at_a_time(suites_folder: Path, plain: dict[str, SuiteResult]):
    from scale_digrap.data.loader import ShardDataset

    collator = tiny_collator()
    model = tiny_model(collator).eval()
    dataset = ShardDataset(list(write_suite_lazily(suites_folder, "id").shards))
    expected = {}
    for index in range(len(dataset)):
        sample = dataset[index]
        inputs = collator.processor(text=f"<image>{sample.question}", images=sample.image, return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        expected[sample.question_id] = collator.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    records = plain["id"].records
    assert {record.question_id: record.prediction for record in records} == expected
    assert len(set(expected.values())) > 3, "the random model must not answer everything alike"
    assert len(records) == COUNT
    assert all(record.score == float(record.prediction == "circle") for record in records)
    types = plain["id"].by_question_type()
    assert sum(count for _, count in types.values()) == COUNT
    assert set(types) == {"color", "yes/no", "shape", "count"}


def test_prepared_batches_and_other_batch_sizes_change_nothing(suites_folder: Path, plain: dict[str, SuiteResult]):
    assert _evaluate(suites_folder, "full", 7, cached=True) == plain


def test_results_survive_json(plain: dict[str, SuiteResult]):
    import json

    for result in plain.values():
        assert SuiteResult.from_json(json.loads(json.dumps(result.to_json()))) == result


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["full", "fsdp", "lora", "fsdp-lora"])
def test_two_ranks_answer_as_one(dist_pool, suites_folder: Path, plain, plain_lora, kind: str):
    expected = plain_lora if "lora" in kind else plain
    for result in dist_pool(2).run(_evaluate, suites_folder, kind, 8, cached=kind == "fsdp"):
        assert result == expected
    assert plain["id"].records != plain_lora["id"].records


def _expect_failure(folder: Path, kind: str) -> str:
    with pytest.raises(EvaluationError) as caught:
        _evaluate(folder, kind, 4)
    return str(caught.value)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["full", "fsdp"])
def test_a_damaged_image_on_one_rank_stops_all_ranks(dist_pool, tmp_path: Path, kind: str):
    write_suite(tmp_path, "id", 24, corrupt=21)
    write_suite(tmp_path, "far", 8)
    first, second = dist_pool(2).run(_expect_failure, tmp_path, kind, timeout=60)
    assert first == second
    assert "'00021'" in first
    assert "failed on rank" in first


def _expect_missing(folder: Path) -> str:
    if dist.get_rank() == 1:
        folder = folder / "elsewhere"
    with pytest.raises(EvaluationError) as caught:
        _evaluate(folder, "full", 4)
    return str(caught.value)


@pytest.mark.distributed
def test_shards_that_one_rank_cannot_see_stop_all_ranks(dist_pool, suites_folder: Path):
    first, second = dist_pool(2).run(_expect_missing, suites_folder, timeout=60)
    assert first == second
    assert "rank 1" in first
    assert "no such shard" in first


def test_refusals(tmp_path: Path):
    from scale_digrap.evaluation.suites import Suite

    collator = tiny_collator()
    model = tiny_model(collator)
    suite = write_suite(tmp_path, "id", 4)
    with pytest.raises(EvaluationError, match="different names"):
        evaluate(model, collator, [suite, suite])
    with pytest.raises(EvaluationError, match=r"\['id'\] were not prepared"):
        evaluate(model, collator, [suite], prepared={})
    wrong = Suite(name="id", group="id", shift="none", expected=5).at(suite.shards)
    with pytest.raises(EvaluationError, match="has 4 questions, expected 5"):
        evaluate(model, collator, [wrong], max_new_tokens=1)
