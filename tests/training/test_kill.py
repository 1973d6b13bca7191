"""A run that is killed at any point goes on as if nothing had happened: nothing lost, nothing silently wrong."""

from __future__ import annotations

import pytest

from scale_digrap.training.checkpoint import Checkpointer
from scale_digrap.training.watchdog import LostRankError
from tests.training import kills, runs
from tests.training.killed_run import MOMENT, POINTS, Kill, start
from tests.training.kills import ENGINES, NOT_REACHED, Row, Whole, sections, survived

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def uninterrupted(checkpoint, shards, tmp_path_factory):
    class Runs(dict):
        def __missing__(self, engine: str) -> Whole:
            folder = tmp_path_factory.mktemp(f"whole-{engine}")
            self[engine] = kills.uninterrupted(engine, checkpoint("llava"), shards, folder)
            return self[engine]

    return Runs()


def check(rows: list[Row]) -> None:
    # A moment may come after the end; a point that is not reached is a mistake of the test.
    bad = [
        row for row in rows if not survived(row.outcome) and not (row.outcome == NOT_REACHED and row.point == MOMENT)
    ]
    assert not bad, kills.summarise(bad)


@pytest.mark.timeout(1800)
def test_a_dozen_kills(checkpoint, shards, tmp_path, uninterrupted):
    for engine in ENGINES:  # before several threads ask for them
        assert uninterrupted[engine].seconds > 0
    check(kills.matrix(range(12), checkpoint("llava"), shards, tmp_path, uninterrupted))


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_kills(request, checkpoint, shards, tmp_path, uninterrupted, capsys):
    number, first, jobs, budget, report = (
        request.config.getoption(f"--{name}")
        for name in ("kills", "kill-seed", "kill-jobs", "kill-budget", "kill-report")
    )
    if not number:
        pytest.skip("a dozen kills were enough; --kills 48 makes 48 more, in about six minutes")
    for engine in ENGINES:
        assert uninterrupted[engine].seconds > 0
    seeds = range(first, first + number)
    rows = kills.matrix(
        seeds, checkpoint("llava"), shards, tmp_path, uninterrupted, jobs=jobs, budget=budget, report=report
    )
    with capsys.disabled():
        print(f"\n{kills.summarise(rows if report is None else kills.read_report(report))}")
    check(rows)


def test_the_table_of_kills_counts_every_row_and_names_those_that_were_not_survived(tmp_path):
    rows = [
        Row(3, "fsdp2", "forward", 2, 0, False, "step 1", 1.0),
        Row(4, "fsdp2", "forward", 3, 0, True, "step 1", 1.0),
        Row(5, "zero3", "a moment", 812, None, False, kills.WRONG, 1.0, "rank 0: other samples"),
        Row(6, "zero1", "a moment", 9999, 1, False, kills.NOT_REACHED, 1.0),
    ]
    text = kills.summarise(rows)
    assert "forward    step 1 ×2" in text
    assert "4 kills, 2 survived, 1 not reached, 1 not survived; 1 with a background writer" in text
    assert "points that no seed has drawn: the configuration, after the loss, a reduction," in text
    assert text.splitlines()[-1].startswith("seed 5: zero3, a moment (call 812, rank None, background False)")


def test_seeds_that_a_report_has_are_not_killed_again_and_a_budget_ends_the_rest(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(kills, "survive", lambda *arguments: asked.append(arguments) or ("step 2", ""))
    whole = {engine: Whole([], 10.0) for engine in ENGINES}
    report = tmp_path / "report.jsonl"
    arguments = ("model", "shards", tmp_path, whole)
    first = kills.matrix(range(5), *arguments, report=report)
    with open(report, "a") as file:
        file.write('{"seed": 6, "eng')
    assert [row.seed for row in kills.read_report(report)] == [row.seed for row in first] == [0, 1, 2, 3, 4]
    with open(report, "a") as file:
        file.write("\n")
    assert [row.seed for row in kills.matrix(range(8), *arguments, report=report)] == [5, 6, 7]
    assert kills.matrix(range(9), *arguments, report=report, budget=0) == []
    assert len(asked) == len(kills.read_report(report)) == 8


def test_every_point_and_engine_is_drawn():
    whole = {engine: Whole([], 10.0) for engine in ENGINES}
    drawn = [kills.draw(seed, whole) for seed in range(1000)]
    assert {kill.point for kill, _, _ in drawn} == {*POINTS, MOMENT}
    assert {(engine, background) for _, engine, background in drawn} == {(e, b) for e in ENGINES for b in (0, 1)}
    assert kills.draw(7, whole) == kills.draw(7, whole)


def test_killed_on_two_ranks_resumed_on_one(checkpoint, shards, tmp_path, uninterrupted):
    """Another number of ranks, another engine: the same samples, the same losses to rounding."""
    model, whole = checkpoint("llava"), uninterrupted["fsdp2"].ranks
    arguments = (model, shards, tmp_path)
    assert start(2, *arguments, sections("fsdp2"), kill=Kill("after the loss", 4, None)) is None
    alone = start(1, *arguments, sections("zero1", world=1))
    assert alone is not None
    assert alone[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-4)
    for mine, pair in zip(alone[0]["keys"], zip(*(rank["keys"][-2:] for rank in whole), strict=True), strict=True):
        assert sorted(mine) == sorted(key for keys in pair for key in keys)


def test_a_writer_in_the_background_that_dies_ends_the_run(checkpoint, shards, tmp_path, monkeypatch):
    """Its collectives fail when another rank is killed; unnoticed, the run would go on without checkpoints."""

    def lost(*_):
        raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1")

    monkeypatch.setattr(Checkpointer, "_write", lost)
    saving = {"every": 1, "background": True}
    with pytest.raises(LostRankError, match="rank 0 lost contact with another rank"):
        runs.run(checkpoint("llava"), shards, tmp_path, checkpoint=saving, training={"steps": 2, "batch_size": 2})
