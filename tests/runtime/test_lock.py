"""One writer per folder: who comes second is told who was first, and nobody who is gone keeps the folder."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from scale_digrap.runtime import lock as module
from scale_digrap.runtime.lock import FolderLock, LockedError, holder

HOLD = """
import sys, time
from scale_digrap.runtime.lock import FolderLock
FolderLock(sys.argv[1], "training run").acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of ``tmp_path``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def refused(folder, **options):
    with pytest.raises(LockedError) as error:
        FolderLock(folder, "training run", wait_s=0.0, **options).acquire()
    assert error.value.exit_status == 2
    return str(error.value)


def no_locks(monkeypatch):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("locks", [True, False], ids=["flock", "no-flock"])
def test_the_second_is_told_who_was_first_and_takes_over_when_it_was_killed(tmp_path, other, monkeypatch, locks):
    if not locks:
        no_locks(monkeypatch)
    message = refused(tmp_path)
    assert f"another training run is writing to {tmp_path}" in message
    assert f"process {other.pid} on {os.uname().nodename}, since 2" in message
    assert holder(tmp_path).pid == other.pid
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert holder(tmp_path) is None
    with FolderLock(tmp_path, "training run", wait_s=0.0):
        assert holder(tmp_path).pid == os.getpid()
    assert holder(tmp_path) is None


@pytest.mark.parametrize("locks", [True, False], ids=["flock", "no-flock"])
def test_a_second_one_in_the_same_process_is_refused_until_the_first_is_done(tmp_path, monkeypatch, locks):
    if not locks:
        no_locks(monkeypatch)
    first = FolderLock(tmp_path, "training run")
    first.acquire()
    first.acquire()
    assert f"process {os.getpid()}" in refused(tmp_path)
    first.release()
    first.release()
    with FolderLock(tmp_path, "evaluation", wait_s=0.0):
        pass


def test_a_number_that_another_process_has_got_since_is_not_the_holder(tmp_path, monkeypatch):
    no_locks(monkeypatch)
    first = FolderLock(tmp_path, "training run")
    first.acquire()
    content = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / ".lock").write_text(json.dumps({**content, "born": "1"}))
    assert holder(tmp_path) is None
    FolderLock(tmp_path, "training run", wait_s=0.0).acquire()


def elsewhere(folder, age, boot="another boot"):
    content = {
        "host": "node7", "pid": 1, "since": "2026-01-01T00:00:00+00:00", "what": "training run",
        "boot": boot, "space": "pid:[1]", "born": "5", "token": "x",
    }  # fmt: skip
    (folder / ".lock").write_text(json.dumps(content))
    past = time.time() - age
    os.utime(folder / ".lock", (past, past))


@pytest.mark.parametrize("locks", [True, False], ids=["flock", "no-flock"])
def test_of_another_machine_the_time_of_the_file_tells(tmp_path, monkeypatch, caplog, locks):
    """Also where the system's lock is to be had: some network file systems lock for each host alone."""
    if not locks:
        no_locks(monkeypatch)
    elsewhere(tmp_path, 100)
    with FolderLock(tmp_path, "training run", wait_s=0.0):
        pass
    assert "taking over from process 1 on node7" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]

    elsewhere(tmp_path, 0)
    began = time.monotonic()
    with FolderLock(tmp_path, "training run", wait_s=0.0, stale_s=1.0):
        pass
    assert 0.7 < time.monotonic() - began < 5, "it might have been there still"

    elsewhere(tmp_path, 0)
    renew = threading.Timer(0.5, lambda: os.utime(tmp_path / ".lock"))
    renew.start()
    assert "process 1 on node7" in refused(tmp_path, stale_s=30.0)
    renew.join()


def test_a_container_of_this_machine_that_was_killed_is_not_waited_for(tmp_path):
    elsewhere(tmp_path, 0, module._boot())
    with FolderLock(tmp_path, "training run", wait_s=0.0):
        pass


def test_the_holder_renews_the_time_and_notices_a_deleted_folder(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "RENEW_S", 0.05)
    folder = tmp_path / "run"
    with FolderLock(folder, "training run"):
        os.utime(folder / ".lock", (1, 1))
        until = time.monotonic() + 10
        while (folder / ".lock").stat().st_mtime < 100:
            assert time.monotonic() < until
            time.sleep(0.01)
        (folder / ".lock").unlink()
        folder.rmdir()
        while "was removed" not in caplog.text:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert caplog.text.count(f"{folder} was removed while training run is writing in it") == 1


@pytest.mark.parametrize("content", [b"", b"null", b"{}", b"\xff", b'{"host": 1', b"[" * 9000])
def test_what_is_left_in_the_file_names_nobody(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with FolderLock(tmp_path, "training run", wait_s=0.0):
        assert holder(tmp_path).what == "training run"
    assert (tmp_path / ".lock").read_bytes() == b""


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    first = FolderLock(tmp_path, "training run")
    first.acquire()
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        first.release()
        with FolderLock(tmp_path, "training run", wait_s=10.0):  # the child has yet to close its copy
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert f"cannot write in {tmp_path / 'file' / 'run'}: Not a directory" in refused(tmp_path / "file" / "run")
