"""``torchrun.sh`` and ``deepspeed.sh`` with a stand-in for the launchers: arguments, environment, how a run ended.

``test_run_local.py`` and the tests on fake hosts have the same scripts start ranks that train.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.golden_files import ROOT, SHIPPED

CONFIG = str(ROOT / "configs" / "quickstart.yaml")
STAND_IN = """\
import json, os, signal, sys, time
from pathlib import Path
words = sys.argv[1:]
if words[:2] == ["-m", "scale_digrap.launch.node"]:
    os.execv({python!r}, [{python!r}, *words])
folder = Path({folder!r})
(folder / "call.json").write_text(json.dumps({{"argv": words, "env": dict(os.environ), "pid": os.getpid()}}))
def leave(name):
    (folder / "run" / name).write_text("{{}}")
def stop(*_):
    time.sleep(0.3)
    leave("STOPPED")
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
mode = os.environ["MODE"]
if mode == "done":
    leave("DONE")
    sys.exit(1)  # as a launcher that fails at its very end
if mode == "wait":
    time.sleep(60)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
sys.exit(0)
"""


class Stage:
    def __init__(self, folder: Path) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        self.run_dir.mkdir()
        python = folder / "python"
        text = STAND_IN.format(python=sys.executable, folder=str(folder))
        python.write_text(f"#!{sys.executable}\n{text}")
        python.chmod(0o755)

    def start(self, script: str, *overrides: str, mode: str, **environment: str) -> subprocess.Popen[str]:
        settings = {"PYTHON": str(self.folder / "python"), "MODE": mode, "NODES": "1", "PROCESSES": "3", "SETTLE": "1"}
        command = ["bash", str(SHIPPED / script), CONFIG, f"run_dir={self.run_dir}", *overrides]
        return subprocess.Popen(
            command, env=os.environ | settings | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self, script: str, *overrides: str, mode: str, **environment: str) -> tuple[int, str]:
        process = self.start(script, *overrides, mode=mode, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out + err

    def call(self) -> dict:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                return json.loads((self.folder / "call.json").read_text())
            except (OSError, ValueError):
                time.sleep(0.05)
        raise AssertionError("the launcher was not called")


@pytest.fixture
def stage(tmp_path) -> Stage:
    return Stage(tmp_path)


AWKWARD = ["model.prompt='it''s {question} $HOME *'", "data.train=[/no/a b.tar]"]


def test_torchrun_gets_every_setting_and_awkward_words_unchanged(stage):
    settings = {"NODES": "2:4", "HOST0": "node9", "RUN_ID": "job7", "MASTER_ADDR": "stale", "RESTARTS": "1"}
    variables = stage.folder / "environment"
    variables.write_text("export NCCL_DEBUG=WARN\nexport HF_TOKEN='a \"$HOME\" b'\n")
    settings["ENVIRONMENT_FILE"] = str(variables)
    status, _ = stage.run("torchrun.sh", *AWKWARD, mode="done", **settings)
    assert status == 0  # DONE is there, whatever the launcher returned
    call = stage.call()
    host = os.uname().nodename
    options = [
        "--nnodes=2:4",
        "--nproc-per-node=3",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node9:22948",
        "--rdzv-id=job7",
        "--rdzv-conf=join_timeout=600,last_call_timeout=15,keep_alive_interval=5,keep_alive_max_attempt=3,"
        "close_timeout=30,read_timeout=60",
        "--max-restarts=1",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
        f"--log-dir={stage.run_dir}/logs/{host}",
        "--tee=3",
    ]
    command = ["-m", "scale_digrap", "train", CONFIG, f"run_dir={stage.run_dir}", *AWKWARD]
    assert call["argv"] == ["-m", "torch.distributed.run", *options, *command]
    env = call["env"]
    assert "MASTER_ADDR" not in env
    assert env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "90"
    assert (env["NCCL_DEBUG"], env["HF_TOKEN"]) == ("WARN", 'a "$HOME" b')
    assert env["SCALE_DIGRAP_LAUNCH"].startswith("vqav2-lora.")


def test_a_file_to_meet_in_is_a_new_one(stage):
    folder = stage.folder / "rdzv"
    status, text = stage.run("torchrun.sh", mode="done", NODES="2", RDZV_DIR=str(folder))
    assert (status, "RDZV_DIR needs a RUN_ID" in text) == (2, True)
    assert stage.run("torchrun.sh", mode="done", NODES="2", RDZV_DIR=str(folder), RUN_ID="j.1")[0] == 0
    argv = stage.call()["argv"]
    assert f"--rdzv-endpoint={folder}/j.1" in argv
    assert any(word.startswith("--rdzv-conf=store_type=file,join_timeout") for word in argv)


def test_markers_decide_and_old_ones_do_not_count(stage):
    (stage.run_dir / "DONE").write_text("{}")
    status, text = stage.run("torchrun.sh", mode="nothing")  # the launcher returns 0
    assert status == 1
    assert "neither DONE nor STOPPED" in text
    process = stage.start("torchrun.sh", mode="wait")
    stage.folder.joinpath("call.json").unlink()
    stage.call()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, "stopped with a checkpoint" in out) == (75, True), err


def test_the_second_signal_kills(stage):
    process = stage.start("torchrun.sh", mode="stubborn")
    pid = stage.call()["pid"]
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode not in (0, 75)
    assert not Path(f"/proc/{pid}").exists()


def test_deepspeed_gets_a_file_and_an_environment_that_a_remote_shell_reads_back(stage):
    hostfile = stage.folder / "hosts"
    hostfile.write_text("# two\nalpha slots=2\n\nbeta slots=2\n")
    values = {
        "HF_PLAIN": "/a/b-c,d:e=f@1",
        "HF_SPACES": "two words  and * $HOME `id` \\ \"quoted\" 'it''s'",
        "HF_PERCENT": "100% %n %h %",
        "HF_EMPTY": "",
        "NOT_CARRIED": "x",
        "HF_LINES": "a\nb",
    }
    settings = {"LAUNCHER": "no_ssh", "NODE_RANK": "1", "HOSTFILE": str(hostfile)}
    status, text = stage.run("deepspeed.sh", *AWKWARD, mode="done", **settings, **values)
    assert status == 0, text
    assert "HF_LINES holds a line break" in text
    call = stage.call()
    logs = stage.run_dir / "logs" / os.uname().nodename
    words = ["--no_ssh", "--node_rank", "1", "--master_addr", "alpha", "--master_port", "22948", "--no_local_rank"]
    command = ["--enable_each_rank_log", f"{logs}/ranks", "--module", "scale_digrap", "train", f"{logs}/config.yaml"]
    assert call["argv"] == ["-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), *words, *command]
    assert "it's {question} $HOME *" in (logs / "config.yaml").read_text()

    # deepspeed's reading of the file, and pdsh's of the command, then a shell's.
    from deepspeed.launcher.multinode_runner import PDSHRunner

    runner = PDSHRunner.__new__(PDSHRunner)
    runner.exports = {}
    path = Path(call["env"]["DS_ENV_FILE"])
    assert path.stat().st_mode & 0o077 == 0
    for line in path.read_text().splitlines(keepends=True):
        runner.add_export(*line.split("=", maxsplit=1))
    exports = "".join(f"export {name}={value}; " for name, value in runner.exports.items()).replace("%%", "%")
    seen = subprocess.run(["bash", "-c", f"{exports} env -0"], capture_output=True, text=True, env={}, check=True)
    remote = dict(item.split("=", 1) for item in seen.stdout.split("\0") if item)
    for name in ("HF_PLAIN", "HF_SPACES", "HF_PERCENT", "HF_EMPTY"):
        assert remote[name] == values[name]
    assert remote["SCALE_DIGRAP_LAUNCH"] == call["env"]["SCALE_DIGRAP_LAUNCH"]
    assert not {"NOT_CARRIED", "HF_LINES"} & remote.keys()


@pytest.mark.parametrize(
    ("script", "settings", "words"),
    [
        ("torchrun.sh", {"NODES": "2", "HOST0": "", "CHANGE": "s/HOST0:-node0/HOST0:-/"}, "HOST0 is not set"),
        ("torchrun.sh", {"COMMAND": "train", "BAD": "optimizer.lrr=1"}, "did you mean 'optimizer.lr'"),
        ("deepspeed.sh", {"LAUNCHER": "mpich"}, "LAUNCHER=mpich does not work"),
        ("deepspeed.sh", {"LAUNCHER": "no_ssh", "HOSTFILE": "EMPTY"}, "names no host"),
    ],
)
def test_bad_calls_are_refused_before_anything_starts(stage, script, settings, words):
    (stage.folder / "EMPTY").write_text("# nobody\n")
    (stage.folder / "hosts").write_text("alpha slots=2\n")
    settings = {"HOSTFILE": "hosts", **settings}
    settings["HOSTFILE"] = str(stage.folder / settings["HOSTFILE"])
    text = (SHIPPED / script).read_text()
    if change := settings.pop("CHANGE", None):
        _, old, new, _ = change.split("/")
        text = text.replace(old, new)
    copy = stage.folder / script
    copy.write_text(text)
    overrides = [settings.pop("BAD")] if "BAD" in settings else []
    status, said = stage.run(str(copy), *overrides, mode="done", **settings)
    assert status == 2, said
    assert words in said
    assert not (stage.folder / "call.json").exists()
