"""Bad samples, dead and stalled loader processes, and stopping on all ranks in the same step."""

import json
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from scale_digrap.data.errors import DataError, TooManyBadSamples
from scale_digrap.data.faults import FaultPolicy
from scale_digrap.data.loader import TrainLoader
from tests.data import made
from tests.data.made import flat, numbers, take


def corrupt(folder, count, bad, per_shard=250):
    """Shards of JPEGs, those in `bad` with their second half overwritten by the first."""
    for shard in range(-(-count // per_shard)):
        members = []
        for i in range(shard * per_shard, min(count, (shard + 1) * per_shard)):
            data = made.jpg(i)
            members += [(f"s{i:05d}.jpg", data[:20] + bytes(len(data) - 20) if i in bad else data)]
            members += [(f"s{i:05d}.json", json.dumps(made.meta(i)).encode())]
        made.tar(folder / f"shard-{shard:06d}.tar", members)
    return str(folder / "shard-*.tar")


def test_one_in_a_thousand_is_replaced_counted_and_listed(tmp_path):
    bad = {137, 1001}
    shards = corrupt(tmp_path, 2000, bad)  # 0.1 %
    log = tmp_path / "run" / "bad_samples.rank0.jsonl"
    loader = TrainLoader(shards, batch_size=50, collate=numbers, bad_log=log)
    stream = flat(take(loader, 40))
    clean = flat(take(TrainLoader(corrupt_free(tmp_path), batch_size=50, collate=numbers), 40))
    places = [position for position, number in enumerate(clean) if number in bad]
    assert len(places) == 2
    for position, (number, planned) in enumerate(zip(stream, clean, strict=True)):
        if position in places:
            assert number not in bad
            assert number // 250 == planned // 250, "a substitute of the same shard"
        else:
            assert number == planned
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(r["position"], r["key"]) for r in records] == [(p, f"s{clean[p]:05d}") for p in places]
    assert all("cannot be decoded" in r["reason"] and r["shard"].endswith(".tar") for r in records)
    assert loader.bad == 2
    assert loader.state_dict()["bad"] == 2

    # the same substitutes with other processes and ranks, and after a resume
    there = TrainLoader(shards, batch_size=50, collate=numbers, workers=2)
    assert flat(take(there, 40)) == stream
    halves = [TrainLoader(shards, batch_size=25, dp_rank=r, dp_world_size=2, collate=numbers) for r in range(2)]
    assert flat(zip(*(flat(take(half, 40)) for half in halves), strict=True)) == stream
    assert sum(half.take_bad() for half in halves) == 2
    assert [half.take_bad() for half in halves] == [0, 0]


def corrupt_free(folder):
    clean = folder / "clean"
    clean.mkdir()
    return corrupt(clean, 2000, ())


@pytest.mark.parametrize("workers", [0, 2])
def test_one_in_two_stops_the_run(tmp_path, workers):
    shards = corrupt(tmp_path, 400, set(range(0, 400, 2)))
    loader = TrainLoader(shards, batch_size=8, collate=numbers, workers=workers)
    with pytest.raises(TooManyBadSamples, match=r"1\d of \d+ samples.*max_bad_fraction=0\.01.*cannot be decoded"):
        take(loader, 50)
    assert loader.consumed < 60
    loader = TrainLoader(shards, batch_size=8, collate=numbers, workers=workers, faults=FaultPolicy(max_bad=0))
    with pytest.raises(TooManyBadSamples, match="max_bad=0"):
        take(loader, 50)
    allowed = FaultPolicy(max_bad_fraction=1.0)
    loader = TrainLoader(shards, batch_size=8, collate=numbers, workers=workers, faults=allowed)
    stream = flat(take(loader, 50))
    assert all(number % 2 for number in stream)
    assert loader.bad >= 200


def test_nothing_but_bad_samples_is_an_error(tmp_path):
    shards = corrupt(tmp_path, 40, set(range(40)))
    loader = TrainLoader(shards, batch_size=2, collate=numbers, faults=FaultPolicy(max_bad_fraction=1))
    with pytest.raises(DataError, match="64 substitutes in a row"):
        next(iter(loader))


def test_limits():
    policy = FaultPolicy(max_bad=20, max_bad_fraction=0.1, free=3)
    policy.check(3, 3, "")
    policy.check(4, 40, "")
    policy.check(20, 1000, "")
    for bad, consumed in ((4, 39), (21, 10**6)):
        with pytest.raises(TooManyBadSamples):
            policy.check(bad, consumed, "")
    for wrong in ({"max_bad": -1}, {"max_bad_fraction": 1.5}, {"max_attempts": 0}, {"retries": -1}):
        with pytest.raises(DataError, match="faults: "):
            FaultPolicy(**wrong)


def _stop_together(shards, limit):
    """Rank → the step at which it stopped, and why. A collective in every step, as in training."""
    rank, world = dist.get_rank(), dist.get_world_size()
    loader = TrainLoader(
        shards,
        batch_size=2,
        dp_rank=rank,
        dp_world_size=world,
        collate=numbers,
        faults=FaultPolicy(max_bad=limit),
        timeout_s=60,
    )
    own = 0
    for step, batch in enumerate(loader):
        own += loader._new_bad
        try:
            loader.agree()
        except TooManyBadSamples as error:
            return step, loader.bad, own, str(error)
        total = torch.tensor(len(batch))
        dist.all_reduce(total)
        assert int(total) == 2 * world
    raise AssertionError


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3, 4])
def test_all_ranks_stop_in_the_same_step(dist_pool, tmp_path, world):
    """Uneven shards, and a limit that no rank reaches alone."""
    shards = corrupt(tmp_path, 113, set(range(0, 113, 5)), per_shard=17)
    outcomes = dist_pool(world).run(_stop_together, shards, 7)
    assert len({(step, bad) for step, bad, _, _ in outcomes}) == 1
    step, bad, _, _ = outcomes[0]
    assert bad > 7
    assert sum(own for _, _, own, _ in outcomes) == bad
    assert max(own for _, _, own, _ in outcomes) <= 7
    assert all(f"{bad} of {(step + 1) * 2 * world} samples" in message for *_, message in outcomes)


def _lockstep(folder, world_samples):
    """A collective per step over an epoch of every size: hangs if the ranks' batches differ in number."""
    rank, world = dist.get_rank(), dist.get_world_size()
    counts = []
    for samples in world_samples:
        loader = TrainLoader(
            f"{folder}/{samples}/*.tar", batch_size=3, dp_rank=rank, dp_world_size=world, collate=numbers, timeout_s=60
        )
        steps = 0
        for batch in loader.epoch(0):
            total = torch.tensor([len(batch), 1])
            dist.all_reduce(total)
            assert total.tolist() == [3 * world, world]
            steps += 1
        counts.append(steps)
    dist.barrier()
    return counts


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_stay_in_step_on_uneven_data(dist_pool, tmp_path, world):
    sizes = (12, 13, 23, 25, 50)
    for size in sizes:
        (tmp_path / str(size)).mkdir()
        made.write(tmp_path / str(size), size, per_shard=7, text_only=None)
    counts = dist_pool(world).run(_lockstep, str(tmp_path), sizes)
    assert counts == [[size // (3 * world) for size in sizes]] * world


def die(samples):
    if samples[0].seed % 3 == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return numbers(samples)


def leave(samples):
    os._exit(3)


@pytest.mark.parametrize("collate", [die, leave])
def test_a_dead_loader_process_is_an_error(tmp_path, collate):
    shards = made.write(tmp_path, 60, text_only=None)
    loader = TrainLoader(shards, batch_size=2, collate=collate, workers=2, timeout_s=30)
    began = time.monotonic()
    with pytest.raises(DataError, match="a loader process died"):
        take(loader, 30)
    assert time.monotonic() - began < 30
    # and the loader can be used again
    loader._feeder._source._collate = numbers
    assert len(take(loader, 3)) == 3


def stall(samples):
    time.sleep(20)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stall_is_an_error_within_the_timeout(tmp_path, workers):
    loader = TrainLoader(
        made.write(tmp_path, 9, text_only=None), batch_size=2, collate=stall, workers=workers, timeout_s=1
    )
    began = time.monotonic()
    with pytest.raises(DataError, match=r"no batch came within data\.timeout_s=1 s"):
        next(iter(loader))
    assert time.monotonic() - began < 12
