"""How a run ends: the summary of a run with skipped steps, the last checkpoint, who may write in its folder, and logs
that are damaged or cannot be written."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest

from scale_digrap.runtime.lock import FolderLock, LockedError
from scale_digrap.training import TrainingError, train
from scale_digrap.training import run as run_module
from scale_digrap.training.metrics import read_log
from scale_digrap.training.run import run, summarize
from tests.training import runs


def strict(path):
    def refuse(constant):
        raise AssertionError(f"{constant} in {path}")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


def poisoned(monkeypatch, *bad):
    """The loss of these calls of one process is NaN."""
    from scale_digrap.training import loop

    original, calls = loop.answer_loss, iter(range(1, 1000))
    monkeypatch.setattr(loop, "answer_loss", lambda *a: original(*a) * (math.nan if next(calls) in bad else 1.0))


SAVING = {"every": 18, "save_final": False, "resume": "auto"}


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("bad", [[20], [19, 20]])
def test_skipped_steps_in_the_last_tenth_are_left_out_of_the_summary(
    checkpoint, shards, tmp_path, monkeypatch, resumed, bad
):
    options = {"checkpoint": SAVING}
    arguments = (checkpoint("llava"), shards, tmp_path / "run")
    with monkeypatch.context() as patch:
        poisoned(patch, *bad)
        run(runs.config(*arguments, training={"steps": 20, "batch_size": 2}, **options))
    if resumed:
        (tmp_path / "run" / "DONE").unlink()
        run(runs.config(*arguments, training={"steps": 20, "batch_size": 2}, **options))
    log = {line["step"]: line["loss"] for line in read_log(tmp_path / "run" / "log.jsonl")}
    assert [log[step] is None for step in (18, 19, 20)] == [False, 19 in bad, True]
    summary = strict(tmp_path / "run" / "summary.json")
    assert summary["loss"] == (pytest.approx(log[19]) if bad == [20] else None)
    assert summary["missing_figures"] == {"loss": len(bad)}
    assert summary["skipped_steps"] == len(bad), "of the whole run"
    assert strict(tmp_path / "run" / "DONE")["step"] == 20


def test_a_skipped_step_costs_its_window_of_the_log_no_more_than_itself(checkpoint, shards, tmp_path, monkeypatch):
    training = {"steps": 8, "batch_size": 2}
    with monkeypatch.context() as patch:
        poisoned(patch, 3, 5, 6, 7, 8)
        every = runs.run(checkpoint("llava"), shards, tmp_path / "a", training=training)
    with monkeypatch.context() as patch:
        poisoned(patch, 3, 5, 6, 7, 8)
        rarely = train(
            runs.config(
                checkpoint("llava"), shards, tmp_path / "b", training=training, log={"every": 4, "progress": False}
            )
        )
    assert [line["step"] for line in rarely.history] == [4, 8]
    finite = [every["loss"][i] for i in (0, 1, 3)]
    assert min(finite) < rarely.history[0]["loss"] < max(finite)
    assert read_log(tmp_path / "b" / "log.jsonl")[1]["loss"] is None
    assert summarize(rarely)["loss"] is None or math.isfinite(summarize(rarely)["loss"])


def steps_of(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def test_the_last_step_is_saved_where_anything_is(checkpoint, shards, tmp_path, monkeypatch):
    options = {"checkpoint": {"every": 3, "keep": 5, "save_final": False, "resume": "auto"}}
    runs.run(checkpoint("llava"), shards, tmp_path / "a", training={"steps": 5}, **options)
    assert steps_of(tmp_path / "a") == ["step-3", "step-5"]
    longer = runs.run(checkpoint("llava"), shards, tmp_path / "a", training={"steps": 7}, **options)
    assert steps_of(tmp_path / "a") == ["step-3", "step-5", "step-6", "step-7"]
    assert [line["step"] for line in longer["history"]] == list(range(1, 8))
    runs.run(checkpoint("llava"), shards, tmp_path / "b", training={"steps": 5})
    assert not (tmp_path / "b" / "checkpoints").exists()
    poisoned(monkeypatch, 5)
    runs.run(checkpoint("llava"), shards, tmp_path / "c", training={"steps": 5}, **options)
    assert steps_of(tmp_path / "c") == ["step-3", "step-5"], "what comes after the end begins there"


def test_a_run_that_would_end_before_its_checkpoint_is_refused_and_changes_nothing(checkpoint, shards, tmp_path):
    options = {"checkpoint": {"every": 3, "save_final": False, "resume": "auto"}}
    arguments = (checkpoint("llava"), shards, tmp_path)
    run(runs.config(*arguments, training={"steps": 6}, **options))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        TrainingError, match=r"step-6 is of step 6, and training\.steps asks for 2 steps: raise it to 6"
    ):
        run(runs.config(*arguments, training={"steps": 2}, **options))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    explicit = {"checkpoint": {**options["checkpoint"], "resume": str(tmp_path / "checkpoints" / "step-6")}}
    with pytest.raises(TrainingError, match=r"is of step 6.*training\.steps asks for 2"):
        run(runs.config(checkpoint("llava"), shards, tmp_path / "other", training={"steps": 2}, **explicit))
    with pytest.raises(TrainingError, match=r"is of step 6.*training\.epochs asks for 3 steps"):
        run(runs.config(*arguments, training={"steps": None, "epochs": 0.5}, **options))
    assert not (tmp_path / "other" / "DONE").exists()
    earlier = {"checkpoint": {**options["checkpoint"], "resume": str(tmp_path / "checkpoints" / "step-3")}}
    ended = run(runs.config(checkpoint("llava"), shards, tmp_path / "third", training={"steps": 4}, **earlier))
    assert strict(tmp_path / "third" / "DONE")["step"] == ended.steps == 4


ODD = b"null\n{}\n[1]\n\xff\xfe\n7\n" + b'{"step": "3", "loss": 1}\n{"step": 3, "lo'


def test_odd_lines_in_every_log_end_no_resume_and_are_counted(checkpoint, shards, tmp_path):
    options = {
        "optimizer": {"name": "digrap"},
        "checkpoint": {"every": 2, "save_final": False, "resume": "auto"},
        "log": {"layers_every": 1, "progress": False},
    }
    arguments = (checkpoint("llava"), shards, tmp_path)
    run(runs.config(*arguments, training={"steps": 2}, **options))
    whole = read_log(tmp_path / "log.jsonl")
    for name in ("log.jsonl", "layers.jsonl", "bad_steps.jsonl", "loss_spikes.jsonl", "bad_samples.rank0.jsonl"):
        path = tmp_path / name
        path.write_bytes(ODD + b"\n" + (path.read_bytes() if path.exists() else b"") + ODD)
    ended = run(runs.config(*arguments, training={"steps": 4}, **options))
    assert ended.history[:2] == whole
    assert [line["step"] for line in ended.history] == [1, 2, 3, 4]
    assert [line["step"] for line in read_log(tmp_path / "layers.jsonl")] == [1, 2, 3, 4]
    summary = strict(tmp_path / "summary.json")
    assert summary["log"] == {"odd in log.jsonl": 14, "odd in layers.jsonl": 14}
    assert strict(tmp_path / "DONE")["step"] == 4


def test_lines_that_lack_figures_or_have_them_in_other_types_end_nothing(checkpoint, shards, tmp_path):
    options = {"checkpoint": {"every": 2, "save_final": False, "resume": "auto"}}
    arguments = (checkpoint("llava"), shards, tmp_path)
    run(runs.config(*arguments, training={"steps": 2}, **options))
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1}\n{"step": 2, "loss": "1.5", "memory_mb": [1], "data_wait_s": null}\n'
    )
    run(runs.config(*arguments, training={"steps": 3}, **options))
    summary = strict(tmp_path / "summary.json")
    assert summary["missing_figures"] == dict.fromkeys(["samples_per_s", "tokens_per_s", "memory_mb", "data_wait_s"], 2)
    assert summary["loss"] == read_log(tmp_path / "log.jsonl")[2]["loss"]


def test_logs_on_a_full_disk_cost_lines_and_not_the_run(checkpoint, shards, tmp_path, caplog):
    for name in ("log.jsonl", "layers.jsonl", "bad_steps.jsonl", "loss_spikes.jsonl"):
        (tmp_path / name).symlink_to("/dev/full")
    options = {"optimizer": {"name": "digrap"}, "log": {"layers_every": 1, "progress": False}}
    ended = run(runs.config(checkpoint("llava"), shards, tmp_path, training={"steps": 3}, **options))
    assert [line["step"] for line in ended.history] == [1, 2, 3]
    assert strict(tmp_path / "summary.json")["log"] == {"lost in log.jsonl": 3, "lost in layers.jsonl": 3}
    assert caplog.text.count("log.jsonl: No space left on device") == 1
    assert strict(tmp_path / "DONE")["step"] == 3


def test_a_folder_deleted_under_the_run_is_told_and_made_again(checkpoint, shards, tmp_path, monkeypatch, caplog):
    from scale_digrap.training import metrics

    original = metrics.Metrics.write

    def write(self, step, figures):
        if step == 2:
            shutil.rmtree(tmp_path / "run")
        original(self, step, figures)

    monkeypatch.setattr(metrics.Metrics, "write", write)
    run(runs.config(checkpoint("llava"), shards, tmp_path / "run", training={"steps": 3}))
    assert f"{tmp_path / 'run'} was removed while the run was writing to it" in caplog.text
    assert [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl")] == [2, 3]
    assert strict(tmp_path / "run" / "DONE")["step"] == 3


def test_a_second_start_in_the_same_folder_is_refused_and_changes_nothing(checkpoint, shards, tmp_path):
    arguments = (checkpoint("llava"), shards, tmp_path)
    run(runs.config(*arguments, training={"steps": 1}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with FolderLock(tmp_path, "training run"):
        with pytest.raises(LockedError, match=f"another training run is writing to .*process {os.getpid()} on"):
            run(runs.config(*arguments, training={"steps": 2}))
        with pytest.raises(LockedError, match="another training run"):
            train(runs.config(*arguments, training={"steps": 2}))
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"} == {
            p: data for p, data in before.items() if p.name != ".lock"
        }
    run(runs.config(*arguments, training={"steps": 2}))


def test_the_lock_is_held_until_done_is_written_and_given_back_after_an_error(
    checkpoint, shards, tmp_path, monkeypatch
):
    from scale_digrap.runtime.lock import holder

    seen = []
    original = run_module.write_marker
    monkeypatch.setattr(run_module, "write_marker", lambda *a: seen.append(holder(tmp_path)) or original(*a))
    arguments = (checkpoint("llava"), shards, tmp_path)
    run(runs.config(*arguments, training={"steps": 1}))
    assert seen[0].pid == os.getpid()
    assert holder(tmp_path) is None
    with pytest.raises(Exception, match="no_such_layer"):
        run(runs.config(*arguments, model={"freeze": ["no_such_layer"]}))
    assert holder(tmp_path) is None


def second_start(folder, model, shards):
    with pytest.raises((LockedError, TrainingError)) as error:
        train(runs.config(model, shards, folder))
    return str(error.value), error.value.exit_status


@pytest.mark.distributed
def test_all_ranks_are_told_of_the_other_run(dist_pool, checkpoint, shards, tmp_path):
    with FolderLock(tmp_path, "training run"):
        ends = dist_pool(2).run(second_start, str(tmp_path), checkpoint("llava"), shards)
    assert ends[0] == ends[1]
    assert ends[0][1] == 2
    assert f"process {os.getpid()} on" in ends[0][0]


def test_a_folder_that_cannot_be_written_to_is_one_line_before_any_work(checkpoint, shards, tmp_path, monkeypatch):
    from scale_digrap.training import loop

    (tmp_path / "file").write_text("")
    with pytest.raises(LockedError, match=r"cannot write in .*file/run: Not a directory\. Make room"):
        train(runs.config(checkpoint("llava"), shards, tmp_path / "file" / "run"))

    def full(*_):
        raise OSError(28, "No space left on device", "config.yaml")

    monkeypatch.setattr(loop, "save_config", full)
    with pytest.raises(TrainingError, match=r"cannot write config\.yaml: No space left on device"):
        train(runs.config(checkpoint("llava"), shards, tmp_path / "run"))


@pytest.mark.parametrize("name", ["write_whole", "write_marker"])
def test_a_disk_that_is_full_at_the_end_leaves_no_done_and_says_what_to_do(
    checkpoint, shards, tmp_path, monkeypatch, name
):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    file = {"write_whole": r"summary\.json", "write_marker": "DONE"}[name]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, name, full)
        with pytest.raises(TrainingError, match=rf"training is complete, but .*{file} cannot be written: No space"):
            run(runs.config(checkpoint("llava"), shards, tmp_path, training={"steps": 1}))
    assert not (tmp_path / "DONE").exists()


def test_a_stop_whose_marker_cannot_be_written_is_a_stop_all_the_same(
    checkpoint, shards, tmp_path, monkeypatch, caplog
):
    from scale_digrap.errors import RunStopped
    from scale_digrap.training import stop

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stop, "write_marker", full)
    (tmp_path / "STOP").touch()
    with pytest.raises(RunStopped) as stopped:
        run(runs.config(checkpoint("llava"), shards, tmp_path, training={"steps": 5}))
    assert stopped.value.exit_status == 75
    assert steps_of(tmp_path) == ["step-1"]
    assert not (tmp_path / "STOP").exists()
    assert "STOPPED: No space left on device" in caplog.text


def test_places_that_are_not_watched_end_nothing(checkpoint, shards, tmp_path, caplog):
    (tmp_path / "watchdog").write_text("a file where the folder should be")
    run(runs.config(checkpoint("llava"), shards, tmp_path, training={"steps": 1}))
    assert "hangs are not watched" in caplog.text
    assert strict(tmp_path / "DONE")["step"] == 1
