"""The log: what a line holds, what a killed and resumed run leaves, and back ends that are not installed."""

import json
import math

import pytest

from scale_digrap.config import config_from_dict
from scale_digrap.optim.telemetry import LayerStats
from scale_digrap.training.metrics import Metrics, MetricsError, memory_mb, read_log

FIGURES = {"loss": 1.5, "samples_per_s": 3.0, "omega_mean": None}


def config(tmp_path, **log):
    return config_from_dict({"run_dir": str(tmp_path), "log": log})


def test_one_json_object_a_line_and_no_nan(tmp_path):
    with Metrics(config(tmp_path), rank=0, total_steps=2) as metrics:
        metrics.write(1, FIGURES)
        assert read_log(tmp_path / "log.jsonl") == [{"step": 1, **FIGURES}]  # readable while the run goes on
        metrics.write(2, {**FIGURES, "loss": math.nan})
        metrics.write_layers(2, {"a": LayerStats(0.5, True, 0.25, 1.0, math.nan, -0.1, 2.0)})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[1], parse_constant=pytest.fail)["loss"] is None
    (layers,) = read_log(tmp_path / "layers.jsonl")
    assert layers["layers"]["a"]["relative_drift"] is None
    assert layers["layers"]["a"]["omega"] == 0.5


def test_other_ranks_write_nothing(tmp_path):
    with Metrics(config(tmp_path, tensorboard=True), rank=1, total_steps=2) as metrics:
        metrics.write(1, FIGURES)
        metrics.write_layers(1, {})
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_repeats_no_line_and_drops_a_cut_one(tmp_path):
    with Metrics(config(tmp_path), rank=0, total_steps=9) as metrics:
        for step in (1, 2, 3, 4):
            metrics.write(step, FIGURES)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    with Metrics(config(tmp_path), rank=0, total_steps=9, start_step=2) as metrics:
        metrics.write(3, FIGURES)
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]
    with Metrics(config(tmp_path), rank=0, total_steps=9) as metrics:
        metrics.write(1, FIGURES)
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1]


def test_tensorboard_holds_the_figures(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Metrics(config(tmp_path, tensorboard=True), rank=0, total_steps=2) as metrics:
        metrics.write(1, FIGURES)
        metrics.write(2, {**FIGURES, "loss": 0.5})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.5), (2, 0.5)]
    assert "omega_mean" not in events.Tags()["scalars"]


def test_wandb_missing_says_how_to_get_it(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MetricsError, match=r"pip install 'scale-digrap\[wandb\]'"):
        Metrics(config(tmp_path, wandb=True), rank=0, total_steps=1)


def test_wandb_gets_configuration_and_figures(tmp_path, monkeypatch):
    import sys
    import types

    calls = []
    run = types.SimpleNamespace(
        log=lambda figures, step: calls.append((step, figures)), finish=lambda: calls.append("end")
    )
    module = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with Metrics(config(tmp_path, wandb=True), rank=0, total_steps=1) as metrics:
        metrics.write(1, FIGURES)
    assert calls[0]["project"] == "scale-digrap"
    assert calls[0]["config"]["log"]["wandb"] is True
    assert calls[1:] == [(1, {"loss": 1.5, "samples_per_s": 3.0}), "end"]


def test_memory_is_that_of_a_process_with_torch_in_it():
    import torch

    assert 50 < memory_mb(torch.device("cpu")) < 50_000
