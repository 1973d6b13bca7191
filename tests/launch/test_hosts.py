"""``--on hosts`` with stand-ins for ssh and for torchrun: what is said before and after, and how hosts are stopped.

Fake hosts with a real sshd and ranks that train are in the tests that end in ``_cluster``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scale_digrap.cli import main
from scale_digrap.launch import run as launch_run
from tests.launch.golden_files import ROOT
from tests.launch.test_run_local import SSH

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
PYTHON = """\
#!{python}
# scale_digrap.launch.node is itself; torchrun and the preflight do what the files in {folder} say for their host.
import json, os, signal, sys, time
from pathlib import Path
words = sys.argv[1:]
if words[:2] == ["-m", "scale_digrap.launch.node"]:
    os.execv({python!r}, [{python!r}, *words])
folder, run = Path({folder!r}), Path({folder!r}) / "run"
host = os.environ["STAND_IN_HOST"]
(folder / f"call.{{host}}").write_text(json.dumps({{"argv": words, "env": dict(os.environ)}}))
mode = (folder / "mode").read_text()
if words[:2] == ["-m", "scale_digrap.launch.preflight"]:
    print(f"preflight of {{host}}")
    sys.exit(2 if mode == f"bad {{host}}" else 0)
def stop(*_):
    (run / "STOPPED").write_text('{{"step": 3, "reason": "SIGTERM"}}')
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
if mode == f"fail {{host}}":
    sys.exit("scale-digrap: error: no GPU on this host")
while (folder / "mode").read_text() != "done":
    time.sleep(0.1)
time.sleep(0.3)
(run / "DONE").write_text('{{"step": 8}}')
"""
HOSTS = ("one", "two")


class Stage:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.run_dir, self._capsys = folder, folder / "run", capsys
        python = folder / "python"
        python.write_text(PYTHON.format(python=sys.executable, folder=str(folder)))
        ssh = folder / "bin" / "ssh"
        ssh.parent.mkdir()
        shell = SSH.replace("shift  # the host", "host=$1; shift").replace("env -i", 'env -i STAND_IN_HOST="$host"')
        down = f'grep -qx "$host" {folder}/down && {{ echo "ssh: no route" >&2; exit 255; }}'
        shell = shell.replace("exec env", f"{down}\nset -m\nenv")
        # A connection that breaks leaves what was started behind.
        dropped = f"if [ -e {folder}/drop.$host ]; then rm {folder}/drop.$host; exit 255; fi"
        shell = f"{shell.rstrip()} & while kill -0 $! 2>/dev/null; do {dropped}; sleep 0.1; done; wait $!\n"
        ssh.write_text(shell)
        for path in (python, ssh):
            path.chmod(0o755)
        self.down = folder / "down"
        self.down.touch()
        monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
        monkeypatch.setenv("HF_HOME", "/hf")
        monkeypatch.setenv("SETTLE", "0")

    def launch(self, mode: str, *words: str, more: str = "") -> tuple[int, str, str]:
        spec = self.folder / "spec.yaml"
        spec.write_text(
            f"name: job\nnodes: 2\nhosts: [{', '.join(HOSTS)}]\npython: {self.folder}/python\nprocesses_per_node: 1\n"
            f"stop_within_s: 20\ncarry: [HF_HOME, SETTLE]\n{more}"
        )
        (self.folder / "mode").write_text(mode)
        arguments = ["launch", QUICKSTART, f"run_dir={self.run_dir}", "--on", "hosts", "--spec", str(spec), *words]
        status = main(arguments)
        captured = self._capsys.readouterr()
        return status, captured.out, captured.err

    def called(self) -> set[str]:
        return {path.suffix[1:] for path in self.folder.glob("call.*")}

    def when_called(self, action: Callable[[], None]) -> None:
        def wait() -> None:
            until = time.monotonic() + 30
            while self.called() != set(HOSTS) and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(0.3)
            action()

        threading.Thread(target=wait, daemon=True).start()


@pytest.fixture
def stage(tmp_path, monkeypatch, capsys) -> Stage:
    return Stage(tmp_path, monkeypatch, capsys)


def test_every_host_is_started_with_the_same_rendezvous_and_the_environment(stage):
    status, out, _ = stage.launch("done")
    assert status == 0
    assert "done after step 8" in out
    calls = [json.loads((stage.folder / f"call.{host}").read_text()) for host in HOSTS]
    for call in calls:
        assert call["env"]["HF_HOME"] == "/hf"
        assert call["argv"][:3] == ["-m", "torch.distributed.run", "--nnodes=2"]
        assert any(word.startswith("--rdzv-endpoint=one:2") for word in call["argv"])
        assert call["argv"][-2:] == [QUICKSTART, f"run_dir={stage.run_dir}"]
    assert calls[0]["argv"] == calls[1]["argv"]
    assert calls[0]["env"]["SCALE_DIGRAP_LAUNCH"] == calls[1]["env"]["SCALE_DIGRAP_LAUNCH"]
    assert (stage.run_dir / "launch" / "environment").stat().st_mode & 0o077 == 0


def test_deepspeed_without_ssh_is_one_start_on_every_host(stage):
    status, _, error = stage.launch("done", "--with", "deepspeed", more="deepspeed: {launcher: no_ssh}\n")
    assert status == 0, error
    for rank, host in enumerate(HOSTS):
        argv = json.loads((stage.folder / f"call.{host}").read_text())["argv"]
        assert argv[:2] == ["-m", "deepspeed.launcher.runner"]
        assert argv[argv.index("--no_ssh") + 1 :][:2] == ["--node_rank", str(rank)]
        assert argv[argv.index("--master_addr") + 1] == "one"
        hostfile = Path(argv[argv.index("--hostfile") + 1])
        assert hostfile.read_text() == "one slots=1\ntwo slots=1\n"


def test_a_host_that_cannot_be_reached_is_named_before_anything_starts(stage):
    stage.down.write_text("two\n")
    status, _, error = stage.launch("done")
    assert status == 2
    assert error.count("\n") == 1
    assert "host two cannot be reached by ssh (ssh: no route)" in error
    assert stage.called() == set()


def test_a_folder_that_is_not_shared_is_named(stage, monkeypatch):
    # The stand-in for the second host looks for the files under another name.
    ssh = stage.folder / "bin" / "ssh"
    ssh.write_text(ssh.read_text().replace('bash -c "$*"', 'bash -c "${*//launch\\/environment/launch\\/elsewhere}"'))
    status, _, error = stage.launch("done")
    assert status == 2
    assert "host one cannot take part: " in error
    assert "is not there: run_dir must be a folder that all hosts share" in error


def test_ctrl_c_stops_all_hosts_with_a_checkpoint(stage):
    stage.when_called(lambda: os.kill(os.getpid(), signal.SIGINT))
    status, out, error = stage.launch("wait")
    assert (status, "stopped after step 3 (SIGTERM)" in out) == (75, True), out + error


def test_a_host_that_fails_takes_the_others_with_it_and_is_named(stage, monkeypatch):
    monkeypatch.setattr(launch_run, "_OTHERS_WAIT_S", 3.0)  # the other one is there by then, on a busy machine too
    status, _, error = stage.launch("fail two")
    assert "two: ended with exit status 1" in error
    assert "the other hosts are stopped" in error
    assert "failed: error: no GPU on this host; its log: " in error
    # The other one was stopped with a checkpoint: the same command goes on when the host is well again.
    assert status == 75


def test_a_connection_that_breaks_does_not_end_the_run(stage):
    def drop() -> None:
        (stage.folder / "drop.two").touch()
        while (stage.folder / "drop.two").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        (stage.folder / "mode").write_text("done")

    stage.when_called(drop)
    status, out, error = stage.launch("wait")
    assert "two: the connection is lost" in error
    assert (status, "done after step 8" in out) == (0, True), out + error


def test_preflight_runs_on_all_hosts_and_can_stop_the_start(stage):
    status, out, _ = stage.launch("good", "--check")
    assert (status, out) == (0, "preflight of one\n")
    status, out, _ = stage.launch("bad two", more="preflight: true\n")
    assert status == 2
    assert all("torch.distributed.run" not in (stage.folder / f"call.{host}").read_text() for host in HOSTS)
