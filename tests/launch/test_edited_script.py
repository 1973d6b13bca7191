"""A script in launch/ that is edited while its run goes on, as people do who start the next one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.workload import CONFIG, ROOT

PYTHON = """\
#!/bin/bash
# Stands in for Python. The run's part overwrites the script that has started it, in place, with what is no script.
case "$*" in
  *"launch.node config"*) echo "$RUN" ;;
  *torch.distributed.run* | *deepspeed.launcher*)
    yes 'exit 66; "' | head -n 3000 >"$SCRIPT"
    echo '{}' >"$RUN/DONE" ;;
esac
"""


@pytest.mark.parametrize("name", ["torchrun.sh", "deepspeed.sh"])
def test_a_run_ends_well_when_its_script_was_edited_meanwhile(tmp_path: Path, name: str):
    script, python, hostfile = tmp_path / name, tmp_path / "python", tmp_path / "hostfile"
    shutil.copy(ROOT / "launch" / name, script)
    python.write_text(PYTHON)
    python.chmod(0o755)
    hostfile.write_text("localhost slots=1\n")
    (tmp_path / "run").mkdir()
    settings = {
        "PYTHON": str(python), "RUN": str(tmp_path / "run"), "SCRIPT": str(script), "NODES": "1", "PROCESSES": "1",
        "WORKDIR": str(tmp_path), "LAUNCHER": "no_ssh", "HOSTFILE": str(hostfile),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(script), str(CONFIG)], env=os.environ | settings, capture_output=True, text=True, timeout=60
    )
    assert "exit 66" in script.read_text()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("run: done\n")
