"""Readers of what a run leaves behind: checkpoints, logs, results and predictions; and of configurations."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.cases import Files, all_of, command, taken

# -- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoint(folder: Path) -> Files:
    """A run of two steps with both checkpoints, its logs and its configuration."""
    from tests.models import tiny
    from tests.training import runs

    model, data = tiny.build("llava", folder / "model"), tiny.write_shards(folder / "data")
    sections: dict[str, Any] = {
        "training": {"steps": 2, "batch_size": 2},
        "optimizer": {"name": "digrap", "lr": 1e-3},
        "checkpoint": {"every": 1, "resume": "auto"},
        "log": {"layers_every": 1},
    }
    runs.run(str(model), str(data), str(folder / "run"), **sections)
    shutil.rmtree(folder / "run" / "checkpoints" / "step-1")
    return {f"run/{name}": content for name, content in taken(folder / "run").items()}


def sealed(data: bytes, chance: random.Random) -> bytes:
    """A manifest of a checkpoint with other values, whose own checksum fits again in half of the cases."""
    from scale_digrap.training import manifest

    if chance.random() < 0.3:
        return mutate.mutated_json(data, chance)
    body = json.loads(data)
    body.pop("sha256", None)
    body = mutate.mutated_tree(body, chance)
    try:
        return manifest._text(body).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, AttributeError):
        return json.dumps(body).encode()


def read_checkpoint(folder: Path) -> None:
    """``checkpoint list``, ``verify`` and ``show``, and the search of what a run goes on from."""
    from scale_digrap.training import run_folder

    all_of(
        lambda: command("checkpoint", "list", folder / "run"),
        lambda: command("checkpoint", "verify", folder / "run"),
        lambda: command("checkpoint", "show", folder / "run", "--layers"),
        lambda: run_folder.whole(folder / "run"),
    )


# -- logs --------------------------------------------------------------------------------------------------------------


def logs(folder: Path) -> Files:
    """Ten steps of both logs."""
    layers = {
        f"layer.{n}": {"omega": 0.1 * n, "conflict_rate": 0.5, "drift": 1.0, "relative_drift": 0.1} for n in range(3)
    }
    figures = {
        "loss": 1.5,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "samples_per_s": 9.5,
        "tokens_per_s": 99.5,
        "memory_mb": 512.0,
    }
    figures |= {"data_wait_s": 0.1, "skipped_steps": 0, "bad_samples": 0, "omega_mean": None, "conflict_rate": 0.2}
    steps = range(1, 11)
    return {
        "log.jsonl": b"".join(json.dumps({"step": step, **figures}).encode() + b"\n" for step in steps),
        "layers.jsonl": b"".join(json.dumps({"step": step, "layers": layers}).encode() + b"\n" for step in steps),
    }


def read_logs(folder: Path) -> None:
    """A run that goes on after step 5, its history at the end, and the layers of a report. A log ends nothing."""
    from scale_digrap.config import config_from_dict
    from scale_digrap.evaluation.runs import read_layers
    from scale_digrap.training.metrics import Metrics, read_log

    read_layers(folder / "layers.jsonl", until=9)
    config = config_from_dict({"run_dir": str(folder), "log": {"progress": False}})
    with Metrics(config, rank=0, total_steps=10, start_step=5) as metrics:
        metrics.write(6, {"loss": 1.0, "samples_per_s": 1.0})
    records = read_log(folder / "log.jsonl")
    steps = [record["step"] for record in records]
    assert steps[-1] == 6, steps
    assert all(isinstance(step, int) and step <= 5 for step in steps[:-1]), steps
    read_log(folder / "layers.jsonl")
    read_layers(folder / "layers.jsonl")


# -- configurations ----------------------------------------------------------------------------------------------------

TRAIN = b"""\
run_dir: /tmp/fuzz/run
model: {path: a/b, prompt: "Q: {question} A:", max_length: 100, freeze: [vision], new_layers: []}
lora: {enabled: false, rank: 8, targets: [q_proj]}
data: {mixture: {a: {shards: [a.tar], weight: 1.0}, b: {shards: ["b-{0..3}.tar"], weight: 2}}, workers: 0}
optimizer: {name: digrap, lr: 1.0e-4, betas: [0.9, 0.999], omega_lr: 0.5, normalization: row}
schedule: {name: cosine, warmup_steps: 10}
training: {steps: 100, batch_size: 4, clip_norm: 1.0, max_time: 3h50m, stop_signals: [SIGTERM]}
sharding: {engine: deepspeed, zero: {stage: 2}}
checkpoint: {every: 10, keep: 2, resume: auto}
evaluation: {suites: {s: {shards: [s.tar], group: near, shift: vision}}}
log: {every: 1, wandb_project: p}
"""
EVALUATE = b"""\
out: /tmp/fuzz/out
title: a title
suites: {missing: allow, custom: {s: {shards: [s.tar], group: near, shift: vision}}}
models: {zero: {path: a/b}, mine: {run: runs/mine, checkpoint: "100", alphas: [0.5, 1.0], seed: 1}}
engine: {name: fsdp, timeout_s: 100.0}
data: {cache_dir: cache, classes: [a, b]}
batch_size: 4
generation: {max_new_tokens: 8}
baseline: zero
leakage: {train: [a.tar]}
shift: {train: [a.tar], model: zero}
max_time: 10m
"""
LAUNCH = b"""\
name: job
nodes: 2
hosts: [node0, node1]
python: python
workdir: /shared/code
environment: {NCCL_DEBUG: WARN}
rendezvous: {join_timeout_s: 600, keep_alive_interval_s: 5}
ssh: {options: ["-p", "22"], connect_timeout_s: 3}
deepspeed: {launcher: pdsh}
slurm: {partition: gpu, time: "24:00:00", gpus_per_node: 8, extra: ["--constraint=a100"], array_seeds: [0, 1]}
kubernetes: {kind: job, image: "i:latest", gpus: 8, shm: 16Gi, volumes: [{claim: c, path: /tmp}], node_selector: {a: b}}
"""


def overrides(data: bytes, chance: random.Random) -> bytes:
    """``key=value`` words, one a line, some of which nobody should write."""
    keys = [
        "run_dir",
        "optimizer.lr",
        "data.train",
        "model.freeze",
        "training.steps",
        "data.mixture",
        "checkpoint.resume",
    ]
    keys += [
        "training",
        "x",
        "",
        "a.b.c",
        "optimizer.betas",
        "model.prompt",
        "evaluation.suites",
        "training.max_time",
        "[0]",
    ]
    values = [
        "1",
        "a",
        "[a",
        "{a: b",
        "a: b: c",
        "{a: [}",
        "[a]",
        "~",
        "null",
        "${x}",
        "${oc.env:HOME}",
        "'",
        "@",
        "`x`",
    ]
    values += [
        "*a",
        "&a b",
        "!!python/name:os.system",
        "1e5",
        "007",
        "2026_11_30",
        "3:50:00",
        "# x",
        "x # y",
        "é",
        "\x1b[",
    ]
    words = [
        f"{chance.choice(keys)}{chance.choice(('=', '=', '=', ':', '==', ''))}{chance.choice(values)}" for _ in range(2)
    ]
    return "\n".join(words).encode()


def _words(folder: Path) -> list[str]:
    path = folder / "overrides"
    return path.read_text(encoding="utf-8").split("\n") if path.is_file() else []


def read_train(folder: Path) -> None:
    """``train CONFIG … --print-config``, and back; then the checks of a run."""
    from scale_digrap.config import config_to_yaml, load_config, validate_for_training

    config = load_config(folder / "train.yaml", _words(folder))
    text = config_to_yaml(config)
    text.encode()
    (folder / "again.yaml").write_text(text, encoding="utf-8")
    assert config_to_yaml(load_config(folder / "again.yaml")) == text, "what is printed does not read back"
    validate_for_training(config)


def read_evaluate(folder: Path) -> None:
    """``evaluate CONFIG --print-config``, and back."""
    from scale_digrap.evaluation.evaluate_config import evaluate_config_to_yaml, load_evaluate_config

    text = evaluate_config_to_yaml(load_evaluate_config(folder / "evaluate.yaml"))
    (folder / "again.yaml").write_text(text, encoding="utf-8")
    assert evaluate_config_to_yaml(load_evaluate_config(folder / "again.yaml")) == text, "it does not read back"


def read_launch(folder: Path) -> None:
    """``launch --dry-run`` on every place."""
    from scale_digrap.launch.cli import describe
    from scale_digrap.launch.plan import make_plan
    from scale_digrap.launch.spec import load_spec
    from scale_digrap.launch.workload import Workload

    spec = load_spec(folder / "launch.yaml")
    workload = Workload("train", "/tmp/fuzz/train.yaml", ("training.steps=3",), Path("/tmp/fuzz/run"), "a: 1\n")
    places = [("local", "torchrun"), ("hosts", "torchrun"), ("hosts", "deepspeed"), ("slurm", "torchrun")]
    places += [("kubernetes", "torchrun")]
    all_of(
        *(
            lambda place=place, launcher=launcher: describe(  # type: ignore[misc]
                make_plan(spec, workload, place, launcher, {"PATH": "/bin"})
            ).encode()
            for place, launcher in places
        )
    )


# -- results -----------------------------------------------------------------------------------------------------------


def results(folder: Path) -> Files:
    """An evaluation of two methods on two suites, one of them with its predictions in a file of their own."""
    from scale_digrap.evaluation.records import Record, SuiteResult
    from scale_digrap.evaluation.results import Comparison, Method, MethodRun
    from scale_digrap.evaluation.runs import write_atomically
    from scale_digrap.evaluation.suites import Suite

    methods = [Method(key="zero", label="Zero", family="base")]
    methods.append(Method(key="mine", label="Mine", family="full", baseline="zero"))
    suites = [
        Suite(name="id", group="id", shift="none", metric="vqa/official", shards=("a.tar",)),
        Suite(name="near", group="near", shift="vision", metric="vqa/official", shards=("b.tar",)),
    ]
    runs = []
    for method in methods:
        found = {}
        for suite in suites:
            records = [Record(f"{n}", "a", ["a", "b"], float(n % 2), "what", "other", f"i{n // 2}") for n in range(6)]
            found[suite.name] = SuiteResult(suite.name, suite.metric, records, 1.0)
        lines = [json.dumps({"index": n, **vars(record)}) for n, record in enumerate(found["near"].records)]
        predictions = folder / "predictions" / method.key / "near.jsonl"
        predictions.parent.mkdir(parents=True, exist_ok=True)
        predictions.write_text("".join(line + "\n" for line in lines))
        found["near"].predictions = str(predictions)
        run = MethodRun(method=method.key, seed=0, suites=found, seconds={"train": 1.0, "evaluate": 1.0})
        run.drift = {"layer": {"drift": 1.0, "relative_drift": 0.1}}
        run.telemetry = [{"step": 1, "layers": {"layer": {"omega": 0.1, "conflict_rate": 0.5}}}]
        run.provenance = {"checkpoint": "x", "template": {"prompt": "{question}"}, "generation": {"max_new_tokens": 4}}
        run.save(folder / "runs")
        runs.append(run)
    comparison = Comparison(methods=methods, suites=suites, runs=runs, title="t", folder=folder)
    write_atomically(folder / "results.json", json.dumps(comparison.to_json(folder)))
    return taken(folder)


def read_results(folder: Path) -> None:
    """``report``: the tables and what is said beside them; the figures are drawn from the same."""
    from rich.console import Console

    from scale_digrap.evaluation.caveats import caveats
    from scale_digrap.evaluation.compare import load
    from scale_digrap.evaluation.tables import csv_table, markdown_table, rich_differences, rich_table

    comparison = load([folder])
    caveats(comparison)
    console = Console(file=io.StringIO())
    console.print(rich_table(comparison, console))
    console.print(rich_differences(comparison))
    markdown_table(comparison).encode()
    csv_table(comparison).encode()
    json.dumps(comparison.to_json(folder))


def predictions(folder: Path) -> Files:
    """A suite that two ranks were answering when they were killed."""
    from scale_digrap.evaluation.predictions import PredictionFiles
    from scale_digrap.evaluation.records import Record

    files = PredictionFiles(folder, "s")
    attempt = files.begin({"metric": "m", "step": 3, "generation": {"max_new_tokens": 4}})
    for rank in range(2):
        writer = files.writer(attempt, rank)
        writer.write([(n, Record(f"{n}", "a", ["a"], 1.0)) for n in range(rank, 6, 2)])
        writer.close()
    return taken(folder)


def read_parts(folder: Path) -> None:
    """The evaluation that goes on."""
    from scale_digrap.evaluation.predictions import PredictionFiles
    from scale_digrap.evaluation.records import read_predictions

    files = PredictionFiles(folder, "s")
    files.check({"metric": "m", "step": 3, "generation": {"max_new_tokens": 4}})
    done, _ = files.done()
    assert len(done) <= 7
    files.begin({"metric": "m"})
    files.merge(6)
    with contextlib.suppress(ValueError):  # `MethodRun.load` makes a line of it
        assert len(read_predictions(files.merged)) == 6
