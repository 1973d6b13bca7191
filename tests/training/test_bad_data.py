"""Data that is bad, in a training run: replaced and counted, or an end on every rank in the same step."""

import json
import tarfile

import pytest
import torch.distributed as dist

from scale_digrap.config import config_from_dict
from scale_digrap.data.errors import ShardDamage, TooManyBadSamples
from scale_digrap.data.index import load_index
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.training import train
from scale_digrap.training.metrics import read_log
from tests.data import made
from tests.models import tiny
from tests.training import runs


def spoil(folder, bad):
    """The usual shards, with the images of some samples overwritten inside."""
    shards = tiny.write_shards(folder)
    path = folder / "vqa-000000.tar"
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            if member.name.endswith(".png") and int(member.name[1:5]) in bad:
                made.overwrite(path, member.offset_data + 30, b"broken" * 4)
    return shards


def test_bad_samples_are_replaced_counted_and_shown(checkpoint, tmp_path):
    bad = {5, 17, 30}
    shards = spoil(tmp_path / "shards", bad)
    training = {"steps": 6, "batch_size": 8}  # one epoch of 48
    result = train(runs.config(checkpoint("paligemma"), shards, tmp_path / "run", training=training))
    records = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.rank0.jsonl").read_text().splitlines()]
    assert {record["key"] for record in records} >= {f"s{i:04d}" for i in bad}
    assert result.bad_samples == len(records) >= 3
    counts = [line["bad_samples"] for line in read_log(tmp_path / "run" / "log.jsonl")]
    assert counts[-1] == len(records)
    assert counts == sorted(counts)


def test_the_count_survives_a_resume(checkpoint, tmp_path):
    shards = spoil(tmp_path / "shards", {5, 17, 30})
    options = {
        "data": {"workers": 1, "max_bad": 100},
        "checkpoint": {"every": 3, "save_final": False, "resume": "auto"},
    }
    straight = train(
        runs.config(checkpoint("paligemma"), shards, tmp_path / "a", training={"steps": 9}, **options)
    ).bad_samples
    train(runs.config(checkpoint("paligemma"), shards, tmp_path / "b", training={"steps": 3}, **options))
    resumed = train(runs.config(checkpoint("paligemma"), shards, tmp_path / "b", training={"steps": 9}, **options))
    assert resumed.bad_samples == straight > 3


def test_mixtures_are_configured(checkpoint, tmp_path):
    a, b = tiny.write_shards(tmp_path / "a"), tiny.write_shards(tmp_path / "b", count=24)
    mixture = {"a": {"shards": [a], "weight": 3}, "b": {"shards": [b], "weight": 1}}
    values = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(checkpoint("paligemma"))},
        "data": {"mixture": mixture, "mixture_block": 8, "window": 1, "timeout_s": 60},
        "training": {"epochs": 1, "batch_size": 8, "device": "cpu"},
        "checkpoint": {"save_final": False, "resume": "never"},
        "log": {"progress": False},
    }
    result = train(config_from_dict(values))
    assert result.steps == 12  # 24 samples of b, one draw in four: 96 samples
    last = result.history[-1]
    assert (last["epochs_a"], last["epochs_b"]) == (72 / 48, 24 / 24)


def _end(*args, **sections):
    """How training ended on this rank: the error's class, its text, and the rank."""
    try:
        runs.run(*args, **sections)
    except ScaleDigrapError as error:
        return type(error).__name__, str(error), dist.get_rank()
    return "", "", dist.get_rank()


@pytest.mark.distributed
def test_all_ranks_stop_in_the_same_step(dist_pool, checkpoint, tmp_path):
    shards = spoil(tmp_path / "shards", set(range(0, 48, 3)))
    ends = dist_pool(2).run(
        _end,
        checkpoint("paligemma"),
        shards,
        tmp_path / "run",
        training={"steps": 20, "batch_size": 4},
        data={"max_bad": 6, "max_bad_fraction": 1.0},
    )
    assert [kind for kind, *_ in ends] == [TooManyBadSamples.__name__] * 2
    counts = {text.split(" samples")[0] for _, text, _ in ends}
    assert len(counts) == 1, "the same number of samples, so the same step"
    assert all("max_bad=6" in text for _, text, _ in ends)
    listed = [len((tmp_path / "run" / f"bad_samples.rank{r}.jsonl").read_text().splitlines()) for r in range(2)]
    assert f"{sum(listed)} of" in counts.pop()
    assert all(listed), "both ranks met some"


@pytest.mark.distributed
def test_a_broken_shard_on_one_rank_ends_all(dist_pool, checkpoint, tmp_path):
    shards = tiny.write_shards(tmp_path / "shards")
    path = tmp_path / "shards" / "vqa-000000.tar"
    index = load_index(path)
    made.overwrite(path, int(index.spans[20, 0, 0]) - 512, b"x")
    ends = dist_pool(2).run(
        _end,
        checkpoint("paligemma"),
        shards,
        tmp_path / "run",
        training={"steps": 20, "batch_size": 4},
    )
    assert sorted(kind for kind, *_ in ends) == [ShardDamage.__name__, "TrainingError"]
    (other,) = [text for kind, text, _ in ends if kind == "TrainingError"]
    assert "another rank could not load its batch" in other
