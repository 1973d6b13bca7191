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


def test_a_killed_and_resumed_run_has_every_step_once_in_tensorboard(tmp_path):
    """What a killed attempt wrote of steps that are repeated is hidden from whoever reads the events."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    written = config(tmp_path, tensorboard=True)

    def attempt(start, steps, value):
        with Metrics(written, rank=0, total_steps=9, start_step=start) as metrics:
            for step in steps:
                metrics.write(step, {**FIGURES, "loss": value + step})

    def seen():
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars("loss")]

    attempt(0, (1, 2, 3), 10.0)
    attempt(2, (3, 4), 20.0)
    assert seen() == [(1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0)]
    attempt(0, (1, 2), 30.0)  # checkpoint.resume=never
    assert seen() == [(1, 31.0), (2, 32.0)]


class Wandb:
    """A stand-in for the module that records its calls."""

    def __init__(self):
        self.calls = []

    def init(self, **options):
        self.calls.append(("init", options))
        return self

    def log(self, figures, step):
        self.calls.append(("log", step, figures))

    def finish(self, **options):
        self.calls.append(("finish", options))

    def named(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def wandb(monkeypatch):
    import sys

    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_configuration_and_figures(tmp_path, wandb):
    with Metrics(config(tmp_path, wandb=True), rank=0, total_steps=1) as metrics:
        metrics.write(1, {**FIGURES, "grad_norm": math.nan})
    ((options,),) = wandb.named("init")
    assert options["project"] == "scale-digrap"
    assert options["config"]["log"]["wandb"] is True
    assert wandb.calls[1:] == [("log", 1, {"loss": 1.5, "samples_per_s": 3.0}), ("finish", {})]


def test_a_run_that_goes_on_is_one_run_of_wandb(tmp_path, wandb):
    written = config(tmp_path, wandb=True)
    for start in (0, 2, 4):
        with Metrics(written, rank=0, total_steps=9, start_step=start) as metrics:
            metrics.write(start + 1, FIGURES)
    with Metrics(written, rank=0, total_steps=9) as metrics:  # afresh
        metrics.write(1, FIGURES)
    first, second, third, afresh = (options for (options,) in wandb.named("init"))
    assert first["id"] == second["id"] == third["id"] != afresh["id"]
    assert {options["resume"] for options in (second, third)} == {"allow"}
    (tmp_path / "wandb-run.json").write_text("[]")
    with Metrics(written, rank=0, total_steps=9, start_step=3):
        pass
    assert wandb.named("init")[-1][0]["id"] not in (None, afresh["id"])


def test_wandb_is_told_of_a_run_that_failed_and_not_of_one_that_was_stopped(tmp_path, wandb):
    from scale_digrap.errors import RunStopped

    for error, expected in ((RuntimeError, {"exit_code": 1}), (RunStopped, {})):
        with pytest.raises(error), Metrics(config(tmp_path, wandb=True), rank=0, total_steps=1):
            raise error("x")
        assert wandb.named("finish")[-1] == (expected,)


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_wandb_out_of_reach_costs_its_lines_and_not_the_run(tmp_path, wandb, monkeypatch, caplog, broken):
    def fail(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(wandb, broken, fail)
    with Metrics(config(tmp_path, wandb=True), rank=0, total_steps=2) as metrics:
        for step in (1, 2):
            metrics.write(step, FIGURES)
    assert metrics.losses() == ({} if broken == "finish" else {"lost in Weights & Biases": 2})
    assert caplog.text.count("Weights & Biases cannot be written to") == 1
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2]


def test_a_progress_bar_without_a_loss(tmp_path, monkeypatch):
    import sys

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with Metrics(config(tmp_path, progress=True), rank=0, total_steps=2) as metrics:
        metrics.write(1, {"loss": None, "samples_per_s": 3.0})
        metrics.write(2, {"loss": math.nan, "samples_per_s": 3.0})
        assert metrics.losses() == {}


def test_memory_is_that_of_a_process_with_torch_in_it():
    import torch

    assert 50 < memory_mb(torch.device("cpu")) < 50_000
