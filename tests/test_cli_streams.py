"""The command line where its streams, its variables and its arguments are not as expected: one line, or none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scale_digrap.cli import main

ROOT = Path(__file__).parents[1]
PRINT = "train configs/quickstart.yaml --print-config"
COMMANDS = (
    PRINT,
    "train no.yaml",
    "evaluate no.yaml",
    "launch configs/quickstart.yaml --dry-run",
    "shards list no.tar",
)


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = f'run() {{ {sys.executable} -m scale_digrap "$@"; }}; {line}'
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, cwd=ROOT, env=variables, timeout=120, check=False
    )


@pytest.mark.parametrize(
    "how",
    [
        "run {} >&-",
        "run {} 2>&-",
        "run {} >&- 2>&- <&-",
        "run {} | head -1",
        "run {} 2>&1 | head -c 1",
        "run {} >/dev/full",
    ],
)
def test_closed_broken_and_full_streams(how):
    for command in (PRINT, "train no.yaml"):
        done = shell(how.format(command))
        assert b"Traceback" not in done.stdout + done.stderr
        assert b"Exception ignored" not in done.stderr
        assert done.stderr.count(b"\n") <= 1


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}]
)
def test_output_in_another_encoding(environment):
    done = shell(f"run {PRINT} 'model.prompt=é ☃ {{question}}'", **environment)
    assert done.returncode == 0
    assert b"{question}" in done.stdout
    refused = shell("run train 'é☃.yaml'", **environment)
    assert refused.returncode == 2
    assert refused.stderr.count(b"\n") == 1
    assert b"does not exist" in refused.stderr


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_variables_of_launchers_that_are_no_numbers(name, monkeypatch, capsys):
    monkeypatch.setenv(name, "")
    assert main(["train", "no.yaml"]) == 2
    assert "does not exist" in capsys.readouterr().err
    for value in ("x", "1.5", "-1", "²"):
        monkeypatch.setenv(name, value)
        assert main(["train", "no.yaml"]) == 2
        error = capsys.readouterr().err.strip()
        assert error.count("\n") == 0
        assert f"the variable {name}={value!r} is not a number" in error


def test_settings_may_stand_after_options(capsys):
    config = str(ROOT / "configs" / "quickstart.yaml")
    assert main(["train", config, "optimizer.lr=0.5", "--print-config", "optimizer.lr=0.25", "training.steps=7"]) == 0
    printed = capsys.readouterr().out
    assert "  lr: 0.25\n" in printed
    assert "  steps: 7\n" in printed
    for words in (["--no-such-option"], ["lr=3", "--nope=4"], ["a word"]):
        with pytest.raises(SystemExit) as ended:
            main(["train", config, "--print-config", *words])
        assert ended.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


def test_home_in_arguments(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("training: {steps: 3}\nrun_dir: ~/run\n")
    assert main(["train", "~/c.yaml", "--print-config"]) == 0
    assert f"run_dir: {tmp_path}/run" in capsys.readouterr().out
    assert main(["train", "~nobody-of-that-name/c.yaml"]) == 2
    assert "no home folder is known" in capsys.readouterr().err


def test_errors_are_printable_and_without_passwords(capsys):
    assert main(["train", "no\x1b[31m.yaml"]) == 2
    assert "\x1b" not in capsys.readouterr().err
    assert main(["train", "no.yaml", "training.steps=https://me:hunter2@host"]) == 2
    assert "hunter2" not in capsys.readouterr().err
