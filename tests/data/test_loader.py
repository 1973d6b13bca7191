"""The loader: coverage, equal batches, determinism, resume, and damaged shards. Shards are written by webdataset."""

import io
import itertools
import json
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from scale_digrap.data.loader import DataError, EvalLoader, ShardDataset, TrainLoader


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), number % 256, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def write(folder, count, per_shard=10, text_only=()):
    """`count` samples named s000…; the image's grey value and the question tell the number."""
    for shard in range(-(-count // per_shard)):
        with webdataset.TarWriter(str(folder / f"shard-{shard:06d}.tar")) as tar:
            for i in range(shard * per_shard, min(count, (shard + 1) * per_shard)):
                meta = {"question": f"number {i}", "answers": [str(i)], "question_id": i, "image_id": i}
                sample = {"__key__": f"s{i:03d}", "json": json.dumps(meta).encode()}
                if i not in text_only:
                    sample["png"] = png(i)
                tar.write(sample)
    return str(folder / "shard-*.tar")


def numbers(samples):
    return [int(sample.question_id) for sample in samples]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def take(loader, count):
    batches = iter(loader)
    return [next(batches) for _ in range(count)]


def test_samples_are_what_was_written(tmp_path):
    dataset = ShardDataset(write(tmp_path, 25, text_only={3}))
    assert len(dataset) == 25
    sample = dataset[17]
    assert (sample.key, sample.question, sample.answers, sample.question_id) == ("s017", "number 17", ["17"], "17")
    assert sample.extra == {"image_id": 17}
    assert sample.image.mode == "RGB"
    assert sample.image.getpixel((0, 0)) == (17, 17, 17)
    assert dataset[3].image is None


def test_every_epoch_covers_every_sample_once_in_another_order(tmp_path):
    loader = TrainLoader(write(tmp_path, 24), batch_size=4, collate=numbers)
    stream = flat(take(loader, 18))
    epochs = [stream[:24], stream[24:48], stream[48:]]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_straddle_epochs_and_drop_nothing(tmp_path):
    loader = TrainLoader(write(tmp_path, 7), batch_size=3, collate=numbers)
    stream = flat(take(loader, 7))
    assert [stream.count(i) for i in range(7)] == [3] * 7


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_global_batches_do_not_depend_on_the_ranks(tmp_path, world):
    shards = write(tmp_path, 29)
    whole = take(TrainLoader(shards, batch_size=12, seed=5, collate=numbers), 6)
    ranks = [
        TrainLoader(shards, batch_size=12 // world, dp_rank=rank, dp_world_size=world, seed=5, collate=numbers)
        for rank in range(world)
    ]
    shares = [take(loader, 6) for loader in ranks]
    for number, batch in enumerate(whole):
        assert sorted(flat(share[number] for share in shares)) == sorted(batch)
    assert all(loader.state_dict() == ranks[0].state_dict() for loader in ranks)


def test_seed_decides_the_order(tmp_path):
    shards = write(tmp_path, 20)
    first, again, other = (take(TrainLoader(shards, batch_size=5, seed=s, collate=numbers), 4) for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_resume_goes_on_as_if_never_stopped(tmp_path, at, workers):
    shards = write(tmp_path, 17)
    straight = take(TrainLoader(shards, batch_size=4, collate=numbers), 9)
    stopped = TrainLoader(shards, batch_size=4, collate=numbers, workers=workers)
    assert take(stopped, at) == straight[:at]
    state = json.loads(json.dumps(stopped.state_dict()))
    assert state["consumed"] == 4 * at
    resumed = TrainLoader(shards, batch_size=4, collate=numbers, workers=workers)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert take(resumed, 9 - at) == straight[at:]
    halves = [TrainLoader(shards, batch_size=2, dp_rank=r, dp_world_size=2, collate=numbers) for r in range(2)]
    for half in halves:
        half.load_state_dict(state)
    pairs = zip(*(take(half, 9 - at) for half in halves), strict=True)
    assert [sorted(a + b) for a, b in pairs] == [sorted(batch) for batch in straight[at:]]


def test_one_epoch(tmp_path):
    loader = TrainLoader(write(tmp_path, 11), batch_size=2, dp_rank=1, dp_world_size=2, collate=numbers)
    assert [len(list(loader.epoch(e))) for e in (0, 1)] == [2, 2]
    (tmp_path / "few").mkdir()
    with pytest.raises(DataError, match="no whole batch"):
        TrainLoader(write(tmp_path / "few", 3), batch_size=2, dp_rank=0, dp_world_size=2, collate=numbers).epoch(0)


def test_resume_on_other_data_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    state = TrainLoader(write(tmp_path / "a", 10), batch_size=2, collate=numbers).state_dict()
    with pytest.raises(DataError, match="samples was 10 and is now 12"):
        TrainLoader(write(tmp_path / "b", 12), batch_size=2, collate=numbers).load_state_dict(state)
    with pytest.raises(DataError, match="seed was 0 and is now 1"):
        TrainLoader(write(tmp_path / "a", 10), batch_size=2, seed=1, collate=numbers).load_state_dict(state)


@pytest.mark.parametrize("count", [1, 3, 8, 13])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_sees_every_sample_exactly_once(tmp_path, count, world):
    shards = write(tmp_path, count)
    loaders = [
        EvalLoader(shards, batch_size=3, dp_rank=rank, dp_world_size=world, collate=numbers) for rank in range(world)
    ]
    batches = [list(loader) for loader in loaders]
    assert len({len(mine) for mine in batches} | {len(loader) for loader in loaders}) == 1
    seen = []
    for batch in flat(batches):
        assert len(batch.samples) == 3
        assert batch.valid.dtype == torch.bool
        assert batch.inputs == numbers(batch.samples)
        seen += [number for number, valid in zip(batch.inputs, batch.valid, strict=True) if valid]
    assert sorted(seen) == list(range(count))


def test_patterns(tmp_path):
    write(tmp_path, 30)
    braces = expand_urls(str(tmp_path / "shard-{000000..000002}.tar"))
    assert braces == expand_urls([str(tmp_path / "shard-*.tar")])
    assert len(braces) == 3
    for pattern, words in (("no-*.tar", "no file matches"), ("shard-{000000..000009}.tar", "and 4 more")):
        with pytest.raises(DataError, match=words):
            expand_urls(str(tmp_path / pattern))
    with pytest.raises(DataError, match="listed twice"):
        expand_urls([str(braces[0]), str(tmp_path / "shard-*.tar")])
    with pytest.raises(DataError, match="no shards"):
        expand_urls([])


@pytest.mark.parametrize("where", ["boundary", "header", "data", "zeroed"])
def test_a_damaged_shard_is_an_error(tmp_path, where):
    write(tmp_path, 10)
    path = tmp_path / "shard-000000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        member = tar.getmembers()[9]
    cut = {"boundary": member.offset, "header": member.offset + 100, "data": member.offset_data + 3}.get(where)
    if where == "zeroed":
        damaged = whole[: member.offset] + bytes(1024) + whole[member.offset + 1024 :]
    else:
        damaged = whole[:cut]
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"shard-000000\.tar"):
        ShardDataset(str(path))


META = {"question": "q", "answers": ["a"], "question_id": 1}


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ({"png": png(1)}, "no .json"),
        ({"png": png(1), "jpg": b"x", "json": META}, "more than one image"),
        ({"json": {**META, "question": 3}}, "'question' has type int"),
        ({"json": {"question": "q", "answers": ["a"]}}, "lacks 'question_id'"),
        ({"json": {**META, "answers": []}}, "one or more strings"),
        ({"json": b"{"}, "not valid JSON"),
        ({"json": b"[]"}, "must be an object"),
    ],
)
def test_an_incomplete_sample_is_an_error_before_training(tmp_path, sample, words):
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        values = {k: json.dumps(v).encode() if isinstance(v, dict) else v for k, v in sample.items()}
        tar.write({"__key__": "bad", **values})
    with pytest.raises(DataError, match=words) as caught:
        ShardDataset(str(path))
    assert "a.tar" in str(caught.value)
    assert "'bad'" in str(caught.value)


def test_duplicate_keys_and_undecodable_images(tmp_path):
    write(tmp_path, 10)
    (tmp_path / "copy.tar").write_bytes((tmp_path / "shard-000000.tar").read_bytes())
    with pytest.raises(DataError, match="key 's000' occurs in"):
        ShardDataset(str(tmp_path / "*.tar"))
    with webdataset.TarWriter(str(tmp_path / "bad.tar"), encoder=False) as tar:
        tar.write({"__key__": "x", "json": json.dumps(META).encode(), "png": b"not a png"})
    dataset = ShardDataset(str(tmp_path / "bad.tar"))
    with pytest.raises(DataError, match=r"'x'.*cannot be decoded"):
        dataset[0]
