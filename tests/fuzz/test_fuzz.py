"""Files from outside, mutated some thousand times: each reader works or says one line, and never a traceback, a hang
or a gigabyte. ``--fuzz-seed`` and ``--fuzz-n`` make longer runs; the input of a failure stays in a folder it names."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.fuzz import guard
from tests.fuzz.cases import Files, put
from tests.fuzz.run_readers import TRAIN
from tests.fuzz.targets import TARGETS

pytestmark = pytest.mark.timeout(0)  # its alarm is the one of each case; guard.py has its own bounds

_SHOWN = 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """``whole(name)``: the input of a target that nothing is wrong with, made once."""
    made: dict[object, Files] = {}

    def get(name: str) -> Files:
        maker = TARGETS[name].whole
        if maker not in made:
            made[maker] = maker(tmp_path_factory.mktemp("whole"))
        return made[maker]

    return get


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_not_mutated_is_read_without_an_error(name, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    put(whole(name), tmp_path)
    TARGETS[name].read(tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_mutations_give_a_line_or_work(name, whole, tmp_path, monkeypatch, request):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    seed, number = request.config.getoption("--fuzz-seed"), request.config.getoption("--fuzz-n")
    target, template = TARGETS[name], whole(name)
    found: dict[str, str] = {}
    counts: dict[str, int] = {}
    refused = 0
    for case in range(max(1, round(number / target.cost))):
        files = target.case(template, random.Random(f"{name} {seed} {case}"))
        folder = tmp_path / "case"
        put(files, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdict = guard.judge(lambda folder=folder: target.read(folder))  # type: ignore[misc]
        if isinstance(verdict, guard.Refused):
            refused += 1
        elif verdict is not None:
            counts[verdict.kind] = counts.get(verdict.kind, 0) + 1
            if verdict.kind not in found:
                kept = _keep(files, template, tmp_path, case)
                found[verdict.kind] = f"case {case}, input in {kept}\n{verdict.text}"
        shutil.rmtree(folder, ignore_errors=True)
    if found:
        kinds = sorted(found, key=lambda kind: -counts[kind])
        pytest.fail(
            f"{name}, --fuzz-seed {seed} --fuzz-n {number}: {len(kinds)} kinds of failure\n"
            + "\n".join(f"{counts[kind]} × {kind}" for kind in kinds)
            + "".join(f"\n\n=== {kind}\n{found[kind]}" for kind in kinds[:_SHOWN]),
            pytrace=False,
        )
    assert refused or not target.refuses, "no mutation was refused: does the target read its input?"


def _keep(files: Files, template: Files, folder: Path, case: int) -> Path:
    """Put the input of a failure aside; returns the folder, and names what differs from the whole input."""
    kept = folder / f"failed-{case}"
    put(files, kept)
    changed = [name for name in files if files[name] != template.get(name)]
    (kept / "CHANGED").write_text("".join(f"{name}\n" for name in changed), encoding="utf-8")
    return kept


COMMANDS = {
    "tar headers": ("shards validate {0}", "shards peek {0}", "shards index {0}"),
    "shard manifests": ("shards validate {0} --no-checksums",),
    "checkpoint manifests": ("checkpoint list {0}/run", "checkpoint verify {0}/run"),
    "train configurations": ("train {0}/train.yaml --print-config",),
    "evaluate configurations": ("evaluate {0}/evaluate.yaml --print-config",),
    "launch files": ("launch {1} --spec {0}/launch.yaml --on slurm --dry-run",),
}
"""Command lines that import no torch; {0} is the folder of a case, {1} a configuration."""


def _limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_says_one_line_and_status_2_or_works(name, whole, tmp_path, request):
    (tmp_path / "train.yaml").write_bytes(TRAIN)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    seed = request.config.getoption("--fuzz-seed")
    for number, command in enumerate(COMMANDS[name] * (4 // len(COMMANDS[name]))):
        folder = tmp_path / f"case-{number}"
        put(TARGETS[name].case(whole(name), random.Random(f"command {name} {seed} {number}")), folder)
        ended = subprocess.run(
            [sys.executable, "-m", "scale_digrap", *command.format(folder, tmp_path / "train.yaml").split()],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=120,
            env=environment,
            cwd=Path(__file__).parents[2],
            preexec_fn=_limited,
        )
        told = (ended.returncode, ended.stderr)
        assert ended.returncode in (0, 1, 2), (command, folder, *told)
        assert "Traceback" not in ended.stderr, (command, folder, *told)
        if ended.returncode == 2:
            assert ended.stderr.splitlines()[-1].startswith("scale-digrap: error: "), (command, folder, *told)
