"""The command line: fast help, one-line errors, a run alone and under torchrun."""

import json
import os
import subprocess
import sys

import pytest

from scale_digrap.cli import main
from scale_digrap.config import load_config
from tests.models import tiny
from tests.models.conftest import checkpoint  # noqa: F401


def run(*arguments, timeout=120, launcher=("-m", "scale_digrap")):
    command = [sys.executable, *launcher, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def file(tmp_path, checkpoint, shards):  # noqa: F811
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
run_dir: {tmp_path / "run"}
model: {{path: {checkpoint("paligemma")}}}
data: {{train: ['{shards}']}}
training: {{steps: 2, batch_size: 4}}
evaluation:
  batch_size: 16
  max_new_tokens: 2
  suites:
    same: {{shards: ['{shards}']}}
    other: {{shards: ['{shards}'], group: near, shift: answer}}
"""
    )
    return path


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["shards", "write", "--help"]])
def test_help_does_not_wait_for_torch(arguments):
    code = f"""
import sys
from scale_digrap.cli import main
try:
    main({arguments!r})
except SystemExit as end:
    sys.exit(3 if 'torch' in sys.modules or 'transformers' in sys.modules else end.code)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "usage: scale-digrap" in result.stdout


def test_quickstart_help_shows_its_options():
    result = run("quickstart", "--help")
    assert result.returncode == 0
    assert "--seeds" in result.stdout


def test_print_config_is_complete_and_reads_back(file, tmp_path, capsys):
    assert main(["train", str(file), "optimizer.lr=0.25", "--print-config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(file, ["optimizer.lr=0.25"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.lrr=1"], "did you mean 'optimizer.lr'"),
        (["training.steps=null"], "exactly one of training.steps and training.epochs"),
        (["data.train=[/no/such-*.tar]"], "no file matches"),
        (["model.freeze=[vison_tower]"], "'vison_tower' matches nothing"),
        (["model.path=/no/such/model"], "cannot load a"),
        (["evaluation.suites.same.shards=[/no/such.tar]"], "no such shard"),
        (["training.device=cuda"], "training.device=cuda"),
    ],
)
def test_our_errors_are_one_line_and_status_2(file, overrides, words, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["train", str(file), *overrides]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("scale-digrap: error: ")
    assert words in error


def test_a_run_trains_evaluates_and_sums_up(file, tmp_path):
    result = run("train", file)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "Run finished" in result.stdout
    folder = tmp_path / "run"
    assert {"config.yaml", "log.jsonl", "layers.jsonl", "summary.json", "final", "evaluation"} <= set(
        os.listdir(folder)
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["ranks"] == 1
    assert 0 <= summary["evaluation"]["same"] <= 1
    assert summary["evaluation"]["mean:near"] == summary["evaluation"]["other"]
    record = json.loads((folder / "evaluation" / "same.json").read_text())
    assert record["questions"] == 48
    predictions = (folder / "evaluation" / record["predictions"]).read_text().splitlines()
    assert [json.loads(line)["index"] for line in predictions] == list(range(48))
    assert record["prompt_template"]["prompt"] == "Question: {question} Answer:"


@pytest.mark.distributed
def test_under_torchrun_rank_0_speaks_and_the_figures_are_those_of_one_process(file, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "scale_digrap")
    two = run("train", file, f"run_dir={tmp_path / 'two'}", "training.batch_size=2", launcher=torchrun)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("Run finished") == 1
    one = run("train", file, f"run_dir={tmp_path / 'one'}")
    assert one.returncode == 0
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert summaries[1]["ranks"] == 2
    assert summaries[1]["loss"] == pytest.approx(summaries[0]["loss"], rel=1e-4)
    assert summaries[1]["evaluation"].keys() == summaries[0]["evaluation"].keys()

    wrong = run("train", file, "optimizer.lrr=1", launcher=torchrun)
    assert wrong.returncode != 0
    assert wrong.stderr.count("unknown key 'optimizer.lrr'") == 1
