"""A run that is killed at any point goes on as if nothing had happened: nothing lost, nothing silently wrong."""

from __future__ import annotations

import random

import numpy as np
import pytest

from scale_digrap.training import manifest
from tests.training import kills
from tests.training.kills import AT_RESUME, ON_RANK_0, POINTS, Kill

pytestmark = pytest.mark.distributed

STEPS = 5
ENGINES = {
    "fsdp2": {},
    "zero1": {"engine": "deepspeed", "zero": {"stage": 1}},
    "zero3": {"engine": "deepspeed", "zero": {"stage": 3}},
}


def sections(engine: str, background: bool = False, world: int = 2) -> dict:
    return {
        "training": {"steps": STEPS, "batch_size": 4 // world},
        "optimizer": {"name": "digrap", "lr": 1e-3, "omega_lr": 0.05},
        "checkpoint": {"every": 1, "keep": 2, "save_final": False, "resume": "auto", "background": background},
        "sharding": ENGINES[engine],
    }


@pytest.fixture(scope="module")
def uninterrupted(checkpoint, shards, tmp_path_factory):
    found: dict[str, list[dict]] = {}

    def get(engine: str) -> list[dict]:
        if engine not in found:
            folder = tmp_path_factory.mktemp(f"whole-{engine}")
            result = kills.start(2, checkpoint("llava"), shards, folder, sections(engine))
            assert result is not None
            found[engine] = result
        return found[engine]

    return get


def survive(kill: Kill, engine: str, background: bool, model: str, shards: str, folder, whole: list[dict]) -> str:
    """Kill a run, resume it, compare; returns what it went on from."""
    arguments = (model, shards, folder, sections(engine, background))
    if kill.point in AT_RESUME:  # die first in a step, then again while loading
        assert kills.start(2, *arguments, kill=Kill("forward", 4)) is None
    assert kills.start(2, *arguments, kill=kill) is None, f"{kill} was not reached"
    before = manifest.checkpoints(folder / "checkpoints")
    # What is committed is whole, whenever the run died.
    assert not any(manifest.problems(path) for _, path in before), kill
    again = kills.start(2, *arguments)
    assert again is not None
    for rank in range(2):
        assert again[rank]["loss"] == whole[rank]["loss"], (kill, "the loss sequence is not the uninterrupted one")
        for name, expected in whole[rank]["parameters"].items():
            assert np.array_equal(again[rank]["parameters"][name], expected), (kill, name)
        taken = len(again[rank]["keys"])
        assert again[rank]["keys"] == whole[rank]["keys"][-taken:], (kill, "other samples than without the kill")
    assert not kills.leftovers(folder / "checkpoints")
    assert [step for step, _ in manifest.checkpoints(folder / "checkpoints")] == [STEPS - 1, STEPS]
    # Nothing that was committed is trained again: at most what came after the last checkpoint is lost.
    resumed = STEPS - taken
    assert resumed == (before[-1][0] if before else 0), kill
    return f"step {resumed}"


def draw(chance: random.Random) -> tuple[Kill, str, bool]:
    point = chance.choice(POINTS)
    rank = 0 if point in ON_RANK_0 else chance.choice([0, 1, None])
    most = {"a folder's entries": 12, "a reduction": 8, "reading": 1, "checking": 1, "loaded": 1, "deleting": 4}
    background = chance.random() < 0.4
    call = chance.randint(1, most.get(point, 4))
    return Kill(point, call, rank), chance.choice(list(ENGINES)), background


def matrix(numbers, checkpoint, shards, tmp_path, uninterrupted) -> None:
    model = checkpoint("llava")
    for number in numbers:
        kill, engine, background = draw(random.Random(number))
        survive(kill, engine, background, model, shards, tmp_path / str(number), uninterrupted(engine))


def test_a_dozen_kills(checkpoint, shards, tmp_path, uninterrupted):
    matrix(range(12), checkpoint, shards, tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_kills(request, checkpoint, shards, tmp_path, uninterrupted):
    numbers = range(12, request.config.getoption("--kills"))
    if not numbers:
        pytest.skip("a dozen kills were enough; --kills 60 makes 48 more, in about six minutes")
    matrix(numbers, checkpoint, shards, tmp_path, uninterrupted)


def test_killed_on_two_ranks_resumed_on_one(checkpoint, shards, tmp_path, uninterrupted):
    """Another number of ranks, another engine: the same samples, the same losses to rounding."""
    model, whole = checkpoint("llava"), uninterrupted("fsdp2")
    arguments = (model, shards, tmp_path)
    assert kills.start(2, *arguments, sections("fsdp2"), kill=Kill("after the loss", 4, None)) is None
    alone = kills.start(1, *arguments, sections("zero1", world=1))
    assert alone is not None
    assert alone[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-4)
    for mine, pair in zip(alone[0]["keys"], zip(*(rank["keys"][-2:] for rank in whole), strict=True), strict=True):
        assert sorted(mine) == sorted(key for keys in pair for key in keys)
