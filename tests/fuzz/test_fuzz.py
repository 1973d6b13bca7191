"""Files from outside, mutated some thousand times: each reader works or says one line, and never a traceback, a hang
or a gigabyte. ``--fuzz-seed`` and ``--fuzz-n`` make longer runs; the input of a failure stays in a folder it names."""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path

import pytest

from tests.fuzz import guard
from tests.fuzz.targets import TARGETS, Files, put

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
