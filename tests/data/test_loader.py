"""The training loader: the same stream whatever the ranks, processes and restarts. Shards are written by webdataset."""

import io
import json
import os
import tarfile
from functools import partial

import numpy as np
import pytest

from scale_digrap.data.errors import DataError
from scale_digrap.data.loader import ShardDataset, TrainLoader
from tests.data import made
from tests.data.made import flat, numbers, take

SAMPLES = 47  # a prime: epochs end inside batches of every size
STEPS = 5
GLOBAL = 24


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return made.write(tmp_path_factory.mktemp("shards"), SAMPLES, per_shard=6, text_only=None)


def positions(samples):
    """Which sample, and what it would be augmented with."""
    return [(int(sample.question_id), sample.seed) for sample in samples]


def ranks_of(shards, world, **options):
    return [
        TrainLoader(shards, batch_size=GLOBAL // world, dp_rank=rank, dp_world_size=world, collate=positions, **options)
        for rank in range(world)
    ]


def dealt(shares):
    """Rank 0's first sample, rank 1's first, …: the stream that the ranks' batches were dealt from."""
    return flat(zip(*(flat(share) for share in shares), strict=True))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_one_stream_for_every_world_and_number_of_processes(shards, world, workers):
    whole = flat(take(TrainLoader(shards, batch_size=1, seed=5, window=3, collate=positions), STEPS * GLOBAL))
    loaders = ranks_of(shards, world, seed=5, window=3, workers=workers)
    states = []
    for step in range(STEPS):
        states.append(loaders[0].state_dict())
        assert all(loader.state_dict() == states[-1] for loader in loaders)
        assert states[-1]["consumed"] == step * GLOBAL
        if step == 0:
            running = [iter(loader) for loader in loaders]
        assert dealt([[next(batches)] for batches in running]) == whole[step * GLOBAL : (step + 1) * GLOBAL]

    # resumed: at 0, on either side of an epoch's end (47 lies in the second batch), and twice in a row
    for step in (0, 1, 2):
        for rank, loader in enumerate(loaders):
            for _ in range(2):
                loader.load_state_dict(json.loads(json.dumps(states[step])))
                assert loader.state_dict() == states[step], "right after loading, before the first batch"
                share = flat(take(loader, 2))
                assert share == whole[step * GLOBAL : (step + 2) * GLOBAL][rank::world]
    for loader in loaders:
        loader.close()


def test_resume_in_new_processes_at_every_step(shards):
    whole = take(TrainLoader(shards, batch_size=8, collate=positions), 14)
    first = TrainLoader(shards, batch_size=8, collate=positions, workers=2)
    batches = iter(first)
    for step in range(0, 12, 3):
        state = first.state_dict()
        assert state["consumed"] == 8 * step, "prefetched batches do not count"
        second = TrainLoader(shards, batch_size=8, collate=positions, workers=1)
        second.load_state_dict(state)
        assert take(second, 2) == whole[step : step + 2]
        assert [next(batches) for _ in range(3)] == whole[step : step + 3]


@pytest.mark.parametrize(("before", "after"), [((8, 2), (3, 5)), ((3, 4), (8, 1)), ((4, 3), (1, 7)), ((1, 5), (2, 1))])
def test_another_world_repeats_and_misses_nothing(shards, before, after):
    """(ranks, batch size) before and after a restart somewhere in the epoch: a proof by sets."""

    def loaders(world, size):
        return [
            TrainLoader(shards, batch_size=size, dp_rank=rank, dp_world_size=world, collate=numbers, window=2)
            for rank in range(world)
        ]

    for steps in (0, 1, 2):
        old, new = loaders(*before), loaders(*after)
        seen = flat(flat(take(loader, steps)) for loader in old)
        for loader in new:
            loader.load_state_dict(old[0].state_dict())
        per_step = after[0] * after[1]
        more = -(-(SAMPLES - len(seen)) // per_step)
        stream = dealt([take(loader, more) for loader in new])
        epoch = seen + stream[: SAMPLES - len(seen)]
        assert len(epoch) == SAMPLES
        assert set(epoch) == set(range(SAMPLES))


def test_every_epoch_covers_every_sample_once_in_another_order(shards):
    stream = flat(take(TrainLoader(shards, batch_size=1, collate=numbers), 3 * SAMPLES))
    epochs = [stream[start : start + SAMPLES] for start in range(0, 3 * SAMPLES, SAMPLES)]
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_one_epoch_at_a_time(shards):
    loader = TrainLoader(shards, batch_size=5, dp_rank=1, dp_world_size=2, collate=numbers)
    assert [len(list(loader.epoch(e))) for e in (0, 1, 0)] == [4, 4, 4]
    assert loader.state_dict()["position"] == 40
    batches = loader.epoch(1)
    first = [next(batches), next(batches)]
    state = loader.state_dict()
    other = TrainLoader(shards, batch_size=5, dp_rank=1, dp_world_size=2, collate=numbers)
    other.load_state_dict(state)
    assert first + list(other.rest_of_epoch()) == list(loader.epoch(1))
    with pytest.raises(DataError, match="no whole batch"):
        TrainLoader(shards, batch_size=48, collate=numbers).epoch(0)


def test_hosts_read_their_own_lanes(tmp_path):
    """16 ranks on 4 hosts, 8 lanes: no shard is read on two hosts, and the stream is the same."""
    shards = made.write(tmp_path, 160, per_shard=10, text_only=None)

    def collate(samples):
        return [int(sample.question_id) for sample in samples]

    options = {"dp_world_size": 16, "batch_size": 2, "lanes": 8, "collate": collate}
    spread = [TrainLoader(shards, dp_rank=rank, nodes=4, **options) for rank in range(16)]
    batches = [take(loader, 12) for loader in spread]  # more than two epochs
    read = [
        {number // 10 for rank in range(host * 4, host * 4 + 4) for number in flat(batches[rank])} for host in range(4)
    ]
    assert [len(shard_numbers) for shard_numbers in read] == [4] * 4
    assert set.union(*read) == set(range(16))
    flat_hosts = [take(TrainLoader(shards, dp_rank=rank, **options), 12) for rank in range(16)]
    for step in range(12):
        assert sorted(flat(b[step] for b in batches)) == sorted(flat(b[step] for b in flat_hosts))
    with pytest.raises(DataError, match="must divide both"):
        TrainLoader(shards, dp_rank=0, nodes=3, **options)


def noise(samples):
    return [(sample.key, *sample.rng().integers(0, 1 << 30, 3).tolist()) for sample in samples]


def test_augmentation_depends_on_the_position_alone(shards):
    """Collation that draws random numbers: equal whatever the processes, ranks and restarts; new in every epoch."""
    whole = flat(take(TrainLoader(shards, batch_size=8, seed=3, collate=noise), 12))
    assert len({draws[1:] for draws in whole}) == len(whole)
    for workers in (1, 2):
        assert flat(take(TrainLoader(shards, batch_size=4, seed=3, collate=noise, workers=workers), 24)) == whole
    resumed = TrainLoader(shards, batch_size=8, seed=3, collate=noise, workers=2)
    resumed.consumed = 40
    assert flat(take(resumed, 7)) == whole[40:]
    by_key = {}
    for key, *draws in whole:
        by_key.setdefault(key, []).append(draws)
    assert all(a[0] != a[1] for a in by_key.values() if len(a) > 1)


def test_the_global_generators_are_left_alone(shards):
    import torch

    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for workers in (0, 2):
        take(TrainLoader(shards, batch_size=4, collate=noise, workers=workers), 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_state_is_small_and_says_what_does_not_fit(shards, tmp_path):
    options = {"batch_size": 4, "collate": numbers}
    state = TrainLoader(shards, seed=1, window=4, **options).state_dict()
    assert len(json.dumps(state)) < 1024
    other = made.write(tmp_path, SAMPLES, per_shard=5, text_only=None)
    for loader, words in (
        (TrainLoader(shards, seed=2, window=4, **options), "seed was 1 and is now 2"),
        (TrainLoader(shards, seed=1, window=5, **options), "window was 4 and is now 5"),
        (TrainLoader(shards, seed=1, window=4, lanes=2, **options), "lanes was 1 and is now 2"),
        (TrainLoader(other, seed=1, window=4, **options), "fingerprint was"),
        (TrainLoader(ShardDataset(other).paths[:-1], seed=1, window=4, **options), "samples was 47 and is now 45"),
    ):
        before = loader.state_dict()
        with pytest.raises(DataError, match=f"cannot resume the data: {words}"):
            loader.load_state_dict(state)
        assert loader.state_dict() == before
        loader.load_state_dict(state, strict=False)
    with pytest.raises(DataError, match="version 1"):
        TrainLoader(shards, seed=1, window=4, **options).load_state_dict({**state, "version": 1})
    with pytest.raises(DataError, match="order was '1-00' and is now"):
        TrainLoader(shards, seed=1, window=4, **options).load_state_dict({**state, "order": "1-00"})


def test_arguments_that_make_no_sense(shards):
    for options, words in (
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 1, "dp_rank": 2, "dp_world_size": 2}, "got 2 of 2"),
        ({"batch_size": 1, "workers": -1}, "workers and timeout_s"),
        ({"batch_size": 1, "window": 0}, "window"),
    ):
        with pytest.raises(DataError, match=words):
            TrainLoader(shards, collate=numbers, **options)


def test_an_older_iteration_ends_when_a_new_one_begins(shards):
    loader = TrainLoader(shards, batch_size=4, collate=numbers)
    old = iter(loader)
    first = next(old)
    new = iter(loader)
    assert next(new) != first
    with pytest.raises(DataError, match="another iteration"):
        next(old)


def break_in_collate(samples, error):
    raise error("broken")


def test_errors_of_the_collator_arrive_as_they_are(shards):
    from scale_digrap.models.collate import CollateError

    for workers in (0, 1):
        loader = TrainLoader(
            shards, batch_size=4, collate=partial(break_in_collate, error=CollateError), workers=workers
        )
        with pytest.raises(CollateError, match=r"^broken$"):
            next(iter(loader))
        loader = TrainLoader(shards, batch_size=4, collate=partial(break_in_collate, error=KeyError), workers=workers)
        with pytest.raises(KeyError, match="broken"):  # not ours: with its traceback
            next(iter(loader))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("where", made.DAMAGE)
def test_a_run_on_a_damaged_shard_ends_in_an_error(tmp_path, where, workers):
    """Nothing was validated before, and nothing is missing afterwards: there is no afterwards."""
    made.write(tmp_path, 20)
    path = tmp_path / "shard-000001.tar"
    path.write_bytes(made.damaged(path.read_bytes(), where))
    with pytest.raises(DataError, match=r"shard-000001\.tar"):
        take(TrainLoader(str(tmp_path / "*.tar"), batch_size=4, collate=numbers, workers=workers), 10)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("where", ["cut", "random header", "zeroed header", "zeroed kilobyte", "a letter of the name"])
def test_damage_after_indexing_ends_in_an_error(tmp_path, where, workers):
    """A fresh index, then the disk changes the shard and not its times."""
    shards = made.write(tmp_path, 20)
    loader = TrainLoader(shards, batch_size=4, collate=numbers, workers=workers)
    path = tmp_path / "shard-000001.tar"
    with tarfile.open(path) as archive:
        header = archive.getmembers()[9].offset_data - 512  # webdataset writes extended headers before the plain one
    stat = path.stat()
    if where == "cut":
        os.truncate(path, header + 600)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        data = {
            "random header": np.random.default_rng(0).bytes(512),
            "zeroed header": bytes(512),
            "zeroed kilobyte": bytes(1024),
            "a letter of the name": b"t",
        }[where]
        made.overwrite(path, header, data)
    with pytest.raises(DataError, match=r"shard-000001\.tar"):
        take(loader, 10)


def test_what_webdataset_reads_is_what_we_read(tmp_path):
    import webdataset

    shards = made.write(tmp_path, 30)
    paths = [str(path) for path in ShardDataset(shards).paths]
    theirs = {s["__key__"]: s for s in webdataset.WebDataset(paths, shardshuffle=False)}
    samples = flat(take(TrainLoader(shards, batch_size=1, collate=list), 30))
    assert {sample.key for sample in samples} == theirs.keys()
    for sample in samples:
        own = theirs[sample.key]
        assert json.loads(own["json"])["question"] == sample.question
        from PIL import Image

        assert np.array_equal(np.asarray(Image.open(io.BytesIO(own["png"]))), np.asarray(sample.image))
