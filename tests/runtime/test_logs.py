"""Logs: odd lines are skipped and counted, and nothing that goes wrong while writing is raised."""

import json
import logging
import math
import os

import pytest

from scale_digrap.runtime import logs
from scale_digrap.runtime.logs import LogFile, figures, read_log, scan_log

ODD = [
    b"null",
    b"{}",
    b"[1, 2]",
    b'"step"',
    b"7",
    b"\xff\xfe\x00garbage",
    b'{"step": 2, "lo',
    b'{"step": "2"}',
    b'{"step": true}',
    b'{"step": 2.5}',
    b'{"step": -1}',
    b'{"step": NaN}',
    b'{"step": 3, "loss": Infinity}',
    b'{"step": ' + b"9" * 5000 + b"}",
    b'{"step": 3, "a": ' + b"[" * 100_000,
]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_an_odd_line_is_skipped_and_counted_wherever_it_stands(tmp_path, odd, caplog):
    path = tmp_path / "log.jsonl"
    good = [json.dumps({"step": step, "loss": step / 2}).encode() for step in (1, 2, 3)]
    for place in range(4):
        path.write_bytes(b"\n".join([*good[:place], odd, *good[place:]]))
        scan = scan_log(path)
        assert [record["loss"] for record in scan.records] == [0.5, 1.0, 1.5]
        assert scan.odd == 1
        file = LogFile(path)
        assert [record["step"] for record in file.begin(2)] == [1, 2]
        file.write({"step": 3, "loss": 9.0})
        assert lines(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 9.0}]
        assert file.odd == 1
        assert file.lost == 0
    assert "1 lines are no records" in caplog.text


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "MAX_LINE_BYTES", 100)
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"x" * 1000 + b'\n{"step": 2}\n' + bytes(350))
    scan = scan_log(path)
    assert [record["step"] for record in scan.records] == [1, 2]
    assert scan.odd == 2


def test_of_a_step_that_is_there_twice_the_last_record_counts(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": s, "n": n}) + "\n" for n, s in enumerate([1, 2, 3, 2, 4])))
    assert [(r["step"], r["n"]) for r in scan_log(path).by_step()] == [(1, 0), (2, 3), (3, 2), (4, 4)]
    file = LogFile(path)
    assert [r["n"] for r in file.begin(3)] == [0, 3, 2]
    assert file.odd == 1, "a line that was left out is counted"


def test_figures_are_the_numbers_among_the_values():
    values = [1, None, "2", True, math.nan, math.inf, 10**400, 2.5, [3], {}]
    assert figures([{"a": value} for value in values] + [{}], "a") == [1.0, 2.5]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    file = LogFile(tmp_path / "log.jsonl")
    file.write({"step": 1, "a": math.nan, "b": {"c": [math.inf, 1.0]}})
    assert lines(tmp_path / "log.jsonl") == [{"step": 1, "a": None, "b": {"c": [None, 1.0]}}]


def test_a_full_disk_costs_lines_and_is_told_once(tmp_path, monkeypatch, caplog):
    path = tmp_path / "log.jsonl"
    file = LogFile(path)
    file.begin(None)
    file.write({"step": 1})
    real = os.write

    def full(descriptor, data):
        real(descriptor, data[:5])  # what still fits
        return 5

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for step in (2, 3, 4):
            file.write({"step": step})
    assert caplog.text.count("cannot write") == 1
    assert "No space left on device" in caplog.text
    file.write({"step": 5})
    assert file.lost == 3
    assert "can be written again; 3 lines" in caplog.text
    assert [record["step"] for record in read_log(path)] == [1, 5], "the torn lines do not spoil the one after them"


@pytest.mark.parametrize("kind", ["full", "folder", "fifo", "missing link"])
def test_whatever_stands_in_the_files_place_ends_nothing(tmp_path, kind, caplog):
    path = tmp_path / "log.jsonl"
    if kind == "full":
        path.symlink_to("/dev/full")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "no" / "such" / "folder")
    for until in (None, 3):
        file = LogFile(path)
        assert file.begin(until) == []
        file.write({"step": 4})
        file.write({"step": 5})
        file.close()
        assert file.lost == 2
    assert "the run goes on without it" in caplog.text


def test_a_log_that_cannot_be_trimmed_keeps_its_lines_and_is_still_read_right(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": step, "try": 1}) + "\n" for step in (1, 2, 3)))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logs, "write_whole", full)
    file = LogFile(path)
    assert [record["step"] for record in file.begin(1)] == [1]
    file.write({"step": 2, "try": 2})
    assert [(r["step"], r["try"]) for r in scan_log(path).by_step()] == [(1, 1), (2, 2), (3, 1)]


def test_a_folder_that_is_deleted_meanwhile_is_told_and_the_log_begins_anew(tmp_path, caplog):
    path = tmp_path / "run" / "log.jsonl"
    file = LogFile(path)
    file.begin(None)
    file.write({"step": 1})
    path.unlink()
    path.parent.rmdir()
    with caplog.at_level(logging.WARNING):
        file.write({"step": 2})
        file.write({"step": 3})
    assert caplog.text.count("was removed while the run was writing to it") == 1
    assert str(path.parent) in caplog.text
    assert lines(path) == [{"step": 2}, {"step": 3}]
