"""Progress, markers, and which rank failed first."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import pytest

from scale_digrap.launch import follow
from scale_digrap.launch.follow import Outcome, Progress, diagnose, last_line, outcome, start_stamp


def append(path: Path, *entries: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def test_progress_is_that_of_this_start(tmp_path):
    log = tmp_path / "log.jsonl"
    append(log, {"step": 99, "loss": 9.0})
    output = io.StringIO()
    progress = Progress(tmp_path, 1000, output)
    progress.update("waiting")
    assert output.getvalue() == "waiting\n"
    append(log, {"step": 100, "loss": 0.5, "samples_per_s": 12.3})
    with log.open("a") as file:
        file.write('{"step": 101, "lo')  # half a line
    assert progress.text() == ""
    progress.close()
    assert output.getvalue().endswith("step 100/1000  loss 0.5000  12 samples/s\n")
    append(log)
    log.write_text('{"step": 50, "loss": "NaN"}\n')  # a run that goes on from an older checkpoint cuts the log off
    progress.update()
    assert progress.text().startswith("step 50/1000")


def test_only_markers_of_this_start_count(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "SETTLE_S", 0)
    (tmp_path / "DONE").write_text('{"step": 1}')
    time.sleep(0.01)
    stamp = start_stamp(tmp_path / "launch")
    assert outcome(tmp_path, stamp).kind == "failed"
    time.sleep(0.01)
    (tmp_path / "STOPPED").write_text('{"step": 7, "reason": "SIGTERM"}')
    stopped = outcome(tmp_path, stamp)
    assert (stopped.kind, stopped.entry["step"]) == ("stopped", 7)
    (tmp_path / "DONE").write_text("not JSON")
    assert outcome(tmp_path, stamp).kind == "done"


def write(path: Path, text: str, age_s: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    changed = time.time() - age_s
    os.utime(path, (changed, changed))
    return path


LOST = "scale-digrap: error on rank 0: rank 0 lost contact with another rank (step 3): one has died"


def test_the_rank_that_failed_first_is_named(tmp_path):
    stamp = start_stamp(tmp_path / "launch")
    os.utime(stamp, (time.time() - 100, time.time() - 100))
    logs = tmp_path / "logs"
    write(logs / "old" / "stderr.log", "scale-digrap: error: of an older start", age_s=500)
    write(logs / "node0" / "a" / "0" / "stderr.log", LOST, age_s=5)
    write(logs / "launch.node0.log", f"[default0]:{LOST}\nRoot Cause", age_s=1)
    guilty = write(
        logs / "node1" / "a" / "0" / "stderr.log", "x\nTraceback (most recent call last):\nOSError: [Errno 5] disk\n"
    )
    failure = diagnose(logs, stamp)
    assert (failure.what, failure.log) == ("OSError: [Errno 5] disk", guilty)
    own = write(logs / "ranks" / "20260101_rank1.log", "scale-digrap: error on rank 1: 11 bad samples\n")
    failure = diagnose(logs, stamp)
    assert (failure.what, failure.log) == ("error on rank 1: 11 bad samples", own)


def test_a_rank_that_was_killed_is_named_by_torchrun(tmp_path):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    stamp = start_stamp(tmp_path / "launch")
    os.utime(stamp, (time.time() - 100, time.time() - 100))
    words = str(ChildFailedError("scale_digrap", {3: ProcessFailure(1, 4242, -9, "<N/A>")}))
    write(tmp_path / "logs" / "node0" / "a" / "0" / "stderr.log", LOST, age_s=5)
    console = write(tmp_path / "logs" / "job.12.out", "\n".join(f"1: {line}" for line in words.splitlines()))
    failure = diagnose(tmp_path / "logs", stamp)
    assert failure.what.startswith("rank 3 on ")
    assert "was killed by signal 9, by which the system ends processes when memory is short" in failure.what
    assert failure.log == console


def test_without_any_word_the_newest_console_is_shown(tmp_path):
    stamp = start_stamp(tmp_path / "launch")
    os.utime(stamp, (time.time() - 100, time.time() - 100))
    assert diagnose(tmp_path / "logs", stamp).what == "nothing was written"
    console = write(tmp_path / "logs" / "launch.here.log", "[default0]: one\n[default0]:two words\n\n")
    assert diagnose(tmp_path / "logs", stamp).log == console
    assert last_line(console) == "two words"


def test_odd_lines_of_a_log_end_nothing(tmp_path):
    output = io.StringIO()
    progress = Progress(tmp_path, 10, output)
    odd = ["null", "[1]", '{"step": "x"}', '{"step": true}', "{" * 100_000, '{"a": ' + "[" * 100_000, '{"step": 1e400}']
    good = json.dumps({"step": 3, "loss": "1.5", "samples_per_s": None})
    (tmp_path / "log.jsonl").write_bytes("\n".join([*odd, good, "7"]).encode() + b"\n\xff\xfe\n")
    progress.update()
    assert progress.text() == "step 3/10"


@pytest.mark.parametrize("content", [b"null", b"[]", b"\xff", b"", b'"x"'])
def test_a_marker_without_an_entry_is_a_marker(tmp_path, content):
    stamp = start_stamp(tmp_path / "launch")
    time.sleep(0.02)
    (tmp_path / "DONE").write_bytes(content)
    assert outcome(tmp_path, stamp) == Outcome("done", {})
