"""Small evaluations for the tests: models with answers of their own, suites, and the command on any ranks."""

from __future__ import annotations

from pathlib import Path

import torch

from scale_digrap.config import load_config
from scale_digrap.evaluation.evaluate import run
from scale_digrap.evaluation.evaluate_config import load_evaluate_config
from scale_digrap.evaluation.records import Record
from scale_digrap.evaluation.runner import evaluate
from scale_digrap.evaluation.suites import Suite
from scale_digrap.evaluation.wise import interpolate
from scale_digrap.quickstart.tiny_vlm import save
from scale_digrap.training import train
from tests.evaluation.tiny import tiny_collator, tiny_model, write_suite

ALPHA = 0.4
COUNTS = {"id": 23, "far": 6}
"""Neither is a multiple of ranks × batch size."""


def make_suites(folder: Path) -> Path:
    """``FOLDER/NAME/*.tar`` for the suites of `COUNTS`."""
    for seed, (name, count) in enumerate(COUNTS.items()):
        (folder / name).mkdir(parents=True)
        write_suite(folder / name, name, count, seed=seed)
    return folder


def make_base(folder: Path) -> Path:
    """A random model that answers different questions differently."""
    collator = tiny_collator()
    return save(tiny_model(collator), collator.processor, folder)


def overrides(folder: Path, out: str, *more: str, **models: str) -> list[str]:
    """Of the evaluation of `models` on the suites in ``FOLDER/suites``, into ``FOLDER/OUT``."""
    return [
        f"out={folder / out}",
        "suites.set=quickstart",
        f"suites.folder={folder / 'suites'}",
        "suites.only=[id,far]",
        "model.prompt='{question}'",
        "generation.max_new_tokens=3",
        "batch_size=4",
        "engine.device=cpu",
        "progress=false",
        *(f"models.{name.replace('_', '-')}={value}" for name, value in models.items()),
        *more,
    ]


def run_evaluation(arguments: list[str]) -> None:
    """On this rank; module-level, for the ranks of a pool."""
    run(load_evaluate_config(None, arguments))


def predictions(out: Path) -> dict[str, bytes]:
    """MODEL/SUITE → the file's bytes."""
    folder = out / "predictions"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.jsonl"))}


def train_and_answer(base: Path, folder: Path, *options: str) -> dict[float, dict[str, list[Record]]]:
    """Train on the suites themselves, with a checkpoint; the answers of the model in memory, and of its mixture."""
    config = load_config(
        None,
        [
            f"run_dir={folder}",
            f"model.path={base}",
            "model.prompt='{question}'",
            f"data.train=[{base.parent / 'suites' / 'id'}/*.tar]",
            "training.steps=2",
            "training.batch_size=4",
            "training.device=cpu",
            "optimizer.lr=3e-4",
            "checkpoint.every=2",
            "checkpoint.save_final=false",
            "log.progress=false",
            *options,
        ],
    )
    result = train(config)
    suites = [
        Suite(name=name, group="id", shift="none", shards=(f"{base.parent / 'suites' / name}/*.tar",))
        for name in COUNTS
    ]

    def answers() -> dict[str, list[Record]]:
        found = evaluate(
            result.model,
            result.collator,
            suites,
            dp_rank=result.engine.dp_rank,
            dp_world_size=result.engine.dp_world_size,
            batch_size=4,
            max_new_tokens=3,
        )
        return {name: suite.records for name, suite in found.items()}

    outcome = {1.0: answers()}
    with interpolate(result.model, ALPHA, result.anchored), torch.no_grad():
        outcome[ALPHA] = answers()
    result.engine.close()
    return outcome
