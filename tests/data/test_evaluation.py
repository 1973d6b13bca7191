"""Evaluation batches: every sample exactly once, proven; broken samples reported and never substituted."""

import json
import os

import pytest
import torch
import torch.distributed as dist

from scale_digrap.data.errors import DataError
from scale_digrap.data.loader import EvalLoader, ShardDataset
from tests.data import made
from tests.data.made import flat, numbers


def loaders(shards, world, size=3, **options):
    return [
        EvalLoader(shards, batch_size=size, dp_rank=rank, dp_world_size=world, collate=numbers, **options)
        for rank in range(world)
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_sample_exactly_once(tmp_path, world, workers):
    for count in sorted({0, 1, world - 1, 3 * world, 2 * 3 * world + 1}) if not workers else (2 * 3 * world + 1,):
        folder = tmp_path / str(count)
        folder.mkdir()
        shards = made.write(folder, count, per_shard=7, text_only=None)
        ranks = loaders(shards, world, workers=workers)
        batches = [list(loader) for loader in ranks]
        assert {len(mine) for mine in batches} | {len(loader) for loader in ranks} == {-(-count // (3 * world))}
        seen = []
        for batch in flat(batches):
            assert len(batch.samples) == 3
            assert batch.valid.dtype == torch.bool
            assert batch.inputs == numbers(batch.samples)
            assert batch.errors == []
            seen += [number for number, valid in zip(batch.inputs, batch.valid, strict=True) if valid]
        assert sorted(seen) == list(range(count))


def test_order_is_that_of_the_shards(tmp_path):
    shards = made.write(tmp_path, 20, text_only=None)
    (loader,) = loaders(shards, 1, size=8)
    assert flat(batch.inputs for batch in loader)[:20] == list(range(20))


def broken(folder, bad, count=12):
    members = []
    for i in range(count):
        members += [(f"s{i:02d}.png", made.png(i)[: 45 if i in bad else None])]
        members += [(f"s{i:02d}.json", json.dumps(made.meta(i)).encode())]
    return str(made.tar(folder / "a.tar", members))


@pytest.mark.parametrize("bad", [{0}, {5}, {4, 5, 6, 7}, {11}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}])
def test_broken_samples_are_errors_with_an_invalid_stand_in(tmp_path, bad):
    shards = broken(tmp_path, bad)
    (loader,) = loaders(shards, 1, size=4)
    seen, errors = [], []
    for batch in loader:
        assert len(batch.inputs) == 4
        errors += batch.errors
        seen += [number for number, valid in zip(batch.inputs, batch.valid, strict=True) if valid]
    assert sorted(seen) == sorted(set(range(12)) - bad)
    assert sorted((error.position, error.key) for error in errors) == [(i, f"s{i:02d}") for i in sorted(bad)]
    assert all("cannot be decoded" in error.reason for error in errors)
    assert loader.errors == len(bad)
    loader.verify_coverage()  # reported is not missed


def test_nothing_but_broken_samples(tmp_path):
    (loader,) = loaders(broken(tmp_path, set(range(12))), 1)
    with pytest.raises(DataError, match="none of"):
        list(loader)


def test_coverage_of_one_rank(tmp_path):
    (loader,) = loaders(made.write(tmp_path, 10, text_only=None), 1)
    with pytest.raises(DataError, match="received 0 of 10 samples"):
        loader.verify_coverage()
    batches = iter(loader)
    next(batches)
    with pytest.raises(DataError, match="received 3 of 10 samples"):
        loader.verify_coverage()
    for _ in range(2):
        list(loader)
        loader.verify_coverage()
    loader._sum += 1
    with pytest.raises(DataError, match="some samples twice"):
        loader.verify_coverage()


def _cover(folder, sizes):
    """With a collective in every step, as a sharded model has: uneven ranks would hang."""
    rank, world = dist.get_rank(), dist.get_world_size()
    counts = []
    for size in sizes:
        loader = EvalLoader(f"{folder}/{size}/*.tar", batch_size=2, dp_rank=rank, dp_world_size=world, collate=numbers)
        valid = 0
        for batch in loader:
            step = torch.tensor(len(batch.samples))
            dist.all_reduce(step)
            assert int(step) == 2 * world
            valid += int(batch.valid.sum())
        loader.verify_coverage()
        counts.append(valid)
    # one rank that stops early is noticed by all of them
    loader = EvalLoader(f"{folder}/{sizes[-1]}/*.tar", batch_size=2, dp_rank=rank, dp_world_size=world, collate=numbers)
    for step, _ in enumerate(loader):
        if rank == world - 1 and step == 0:
            break
    try:
        loader.verify_coverage()
    except DataError as error:
        return counts, str(error)
    return counts, ""


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3, 4])
def test_coverage_over_ranks(dist_pool, tmp_path, world):
    sizes = [0, 1, world - 1, 2 * world * 3 + 1] if world > 2 else [0, 1, 13]
    for size in sizes:
        (tmp_path / str(size)).mkdir()
        made.write(tmp_path / str(size), size, per_shard=5, text_only=None)
    outcomes = dist_pool(world).run(_cover, str(tmp_path), sizes)
    assert [sum(counts) for counts in zip(*(counts for counts, _ in outcomes), strict=True)] == sizes
    messages = {message for _, message in outcomes}
    assert len(messages) == 1
    assert f"of {sizes[-1]} samples" in messages.pop()


def test_an_empty_data_set_has_no_batches(tmp_path):
    made.write(tmp_path, 0)
    dataset = ShardDataset(str(tmp_path))
    assert (len(dataset), dataset.keys) == (0, [])
    (loader,) = loaders(dataset, 1)
    assert list(loader) == []
    loader.verify_coverage()


def test_only_what_is_asked_for(tmp_path):
    """What an interrupted evaluation has not done, dealt out to any ranks, filled up or as short as it is."""
    dataset = ShardDataset(made.write(tmp_path, 23, per_shard=7, text_only=None))
    for wanted in ([], [22], [0, 3, 4, 5, 9, 16, 17, 21], list(range(23))):
        for world in (1, 2, 3, 5):
            for fill_up in (True, False):
                ranks = loaders(dataset, world, indices=wanted, fill_up=fill_up)
                batches = [list(loader) for loader in ranks]
                assert [len(mine) for mine in batches] == [len(loader) for loader in ranks]
                seen = []
                for batch in flat(batches):
                    assert len(batch.samples) == len(batch.indices) == len(batch.valid) <= 3
                    assert len(batch.samples) == 3 or not fill_up
                    assert [index >= 0 for index in batch.indices] == batch.valid.tolist()
                    valid = [number for number, valid in zip(batch.inputs, batch.valid, strict=True) if valid]
                    assert valid == [index for index in batch.indices if index >= 0]
                    seen += valid
                assert sorted(seen) == wanted
                if fill_up:
                    assert len({len(mine) for mine in batches}) == 1
                else:
                    assert all(batch.valid.all() for batch in flat(batches))
    (loader,) = loaders(dataset, 1, indices=[2, 3, 5])
    list(loader)
    loader.verify_coverage()
    loader._sum += 1
    with pytest.raises(DataError, match="some samples twice"):
        loader.verify_coverage()
    for wrong, message in (([3, 2], "strictly increasing"), ([2, 2], "strictly increasing"), ([23], r"\[0, 23\)")):
        with pytest.raises(DataError, match=message):
            EvalLoader(dataset, batch_size=2, collate=numbers, indices=wrong)


def test_questions_without_their_images(tmp_path):
    members = [("a.json", b'{"questions": [{"question": "q", "answers": ["x"], "question_id": 1}, '
                b'{"question": "r", "answers": ["y"], "question_id": 2}], "image_id": 7}'), ("a.png", b"no picture"),
               ("b.json", b'{"question": "s", "answers": ["w"], "question_id": 3}'),
               ("c.json", b'{"question": "t", "answers": ["z"], "question_id": 4}')]  # fmt: skip
    shard = made.tar(tmp_path / "a.tar", members)
    dataset = ShardDataset(str(shard))
    # An answer lost after the shard was indexed, which neither its size nor its time shows.
    before = shard.stat()
    shard.write_bytes(shard.read_bytes().replace(b'["w"]', b"[   ]"))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    first, second, third, fourth = dataset.questions(0)
    assert first == {"question": "q", "answers": ["x"], "question_id": 1, "image_id": 7}
    assert second["question_id"] == 2
    assert "record 'b'" in str(third)
    assert fourth["question_id"] == 4
