from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scale_digrap.config import load_config
from scale_digrap.evaluation.results import MethodRun
from scale_digrap.quickstart import pipeline
from scale_digrap.quickstart.tiny_vlm import build_model, build_processor, save

REPOSITORY = Path(__file__).resolve().parents[2]
TABLE_ROWS = 9


@pytest.fixture(scope="module")
def random_model(tmp_path_factory) -> Path:
    """An untrained tiny VLM: these tests are about the pipeline, not about what it measures."""
    processor = build_processor()
    return save(build_model(processor), processor, tmp_path_factory.mktemp("model"))


def _quickstart(*options: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scale_digrap", "quickstart", *map(str, options)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd=REPOSITORY)


@pytest.mark.parametrize("method", list(pipeline.TRAINED))
def test_every_method_has_a_valid_configuration(method: str):
    config = pipeline.training_config(method, seed=3, steps=7, world_size=4, train=["x.tar"], run_dir="r")
    assert config.training.batch_size * 4 == pipeline.GLOBAL_BATCH
    assert config.lora.enabled == method.startswith("lora")
    assert method.endswith(config.optimizer.name)
    assert config.training.seed == 3


def test_methods_differ_only_in_what_is_compared():
    """AdamW and DiGraP get the same learning rate, schedule, data and batches."""
    for family in ("full", "lora"):
        adamw, digrap = (pipeline.training_config(f"{family}-{name}") for name in ("adamw", "digrap"))
        adamw.optimizer.name = "digrap"
        assert adamw == digrap


def test_the_configuration_file_is_the_pipelines():
    file = load_config(REPOSITORY / "configs" / "quickstart.yaml")
    ours = pipeline.training_config("full-digrap")
    assert file == ours


def test_ranks_must_divide_the_batch():
    with pytest.raises(pipeline.QuickstartError, match="3 ranks do not divide"):
        pipeline.training_config("full-adamw", world_size=3)


def test_rows_and_what_they_are_compared_with():
    everything = {method.key: method.baseline for method in pipeline.rows(list(pipeline.TRAINED))}
    assert len(everything) == TABLE_ROWS
    assert everything["full-digrap"] == "full-adamw"
    assert everything["lora-digrap-wise"] == "lora-digrap"
    alone = {method.key: method.baseline for method in pipeline.rows(["full-digrap"])}
    assert alone == {"zero-shot": None, "full-digrap": "zero-shot", "full-digrap-wise": "full-digrap"}


@pytest.mark.slow
@pytest.mark.distributed
def test_smoke_end_to_end_and_resumed(tmp_path: Path, random_model: Path):
    options = ["--smoke", "--output", tmp_path, "--model", random_model, "--nproc", "2"]
    first = _quickstart(*options)
    assert first.returncode == 0, first.stdout + first.stderr
    for name in ("report.html", "table.md", "results.json", "accuracy.png", "layers_full-digrap.png", "drift_lora.png"):
        assert (tmp_path / name).stat().st_size > 100, name
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["table"]) == TABLE_ROWS
    assert all(cell is not None for row in results["table"].values() for cell in row.values())
    assert [suite["questions"] for suite in results["suites"]] == [32] * 6
    assert "LoRA DiGraP + WiSE-FT" in first.stdout
    assert "Traceback" not in first.stdout + first.stderr

    (folder,) = (tmp_path / "runs").glob("*/results")
    files = sorted(folder.glob("*.json"))
    assert len(files) == TABLE_ROWS
    digrap = MethodRun.load(MethodRun.path(folder, "full-digrap", 0))
    assert digrap.drift
    assert digrap.telemetry
    assert all(0 <= layer["omega"] <= 1 for line in digrap.telemetry for layer in line["layers"].values())
    adamw = MethodRun.load(MethodRun.path(folder, "full-adamw", 0))
    assert max(layer["relative_drift"] or 0 for layer in adamw.drift.values()) > 1e-4, "AdamW did not move"

    # as if killed during LoRA AdamW: only what is missing is done again, and comes out the same
    lost = MethodRun.path(folder, "lora-adamw-wise", 0)
    before = MethodRun.load(lost)
    lost.unlink()
    stamps = {path: path.stat().st_mtime_ns for path in files if "lora-adamw" not in path.name}
    second = _quickstart(*options)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "8 of 9 results are there already" in second.stdout
    assert MethodRun.load(lost).suites["id"].records == before.suites["id"].records
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())

    third = _quickstart(*options)
    assert "All 9 results with these settings are there already" in third.stdout


@pytest.mark.slow
def test_one_process_and_one_method(tmp_path: Path, random_model: Path):
    run = _quickstart(
        "--smoke", "--output", tmp_path, "--model", random_model, "--nproc", "1", "--methods", "full-digrap"
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert list(json.loads((tmp_path / "results.json").read_text())["table"]) == [
        "zero-shot",
        "full-digrap",
        "full-digrap-wise",
    ]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_failing_rank_ends_everything_with_its_error(tmp_path: Path, random_model: Path):
    (random_model / "model.safetensors").rename(tmp_path / "weights")
    try:
        run = _quickstart("--smoke", "--output", tmp_path / "out", "--model", random_model, "--nproc", "2", timeout=120)
    finally:
        (tmp_path / "weights").rename(random_model / "model.safetensors")
    assert run.returncode != 0
    assert "failed:" in run.stdout
    assert "model.safetensors" in run.stdout
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path):
    run = _quickstart("--smoke", "--output", tmp_path / "out", "--model", tmp_path / "nowhere", timeout=60)
    assert run.returncode == 2
    assert "no config.json" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_end_with_the_process_that_started_them(tmp_path: Path, random_model: Path):
    command = [sys.executable, "-m", "scale_digrap", "quickstart", "--smoke", "--steps", "5000"]
    command += ["--output", str(tmp_path), "--model", str(random_model), "--nproc", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + 100
        while not (logs := list(tmp_path.glob("runs/*/full-adamw-seed0/log.jsonl"))):
            assert time.monotonic() < deadline, "training did not start"
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    size = logs[0].stat().st_size
    time.sleep(2)
    assert logs[0].stat().st_size == size, "a rank is still training"
