"""What ``scale-digrap train`` does: train, evaluate the configured suites, say what came out."""

from __future__ import annotations

import json
import shutil
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scale_digrap.config import Config
from scale_digrap.errors import RunStopped
from scale_digrap.sharding.zero3 import full_numel
from scale_digrap.training.loop import TrainResult, train
from scale_digrap.training.optimizer import count_anchors
from scale_digrap.training.stop import DONE, write_marker


def run(config: Config) -> TrainResult:
    """Train and evaluate; rank 0 prints a summary, writes ``run_dir/summary.json`` and, last of all, ``run_dir/DONE``.

    Raises:
        ScaleDigrapError, RunStopped: as :func:`scale_digrap.training.train`; also suites that cannot be read.
    """
    suites = _suites(config)
    try:
        result = train(config)
    except RunStopped:
        _leave()
        raise
    scores = _evaluate(config, result, suites) if suites else {}
    if result.engine.rank == 0:
        summary = {**summarize(result), **({"evaluation": scores} if scores else {})}
        (result.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        _print(summary, Console())
        write_marker(result.run_dir, DONE, {"step": result.steps})
    _leave()
    return result


def summarize(result: TrainResult) -> dict[str, Any]:
    """A finished run in a few figures: means over the last tenth of the log, medians of the speeds."""
    history = result.history
    tail = history[-max(1, len(history) // 10) :]
    trained = result.loaded.trained()
    summary: dict[str, Any] = {
        "steps": result.steps,
        "seconds": round(result.seconds, 2),
        "ranks": result.engine.world_size,
        "optimizer": type(result.optimizer).__name__,
        "trained_parameters": sum(map(full_numel, trained.values())),
        "stored_anchors": count_anchors(result.optimizer) or len(result.anchored),
        "skipped_steps": result.skipped_steps,
        "bad_samples": result.bad_samples,
        "truncated_questions": result.collator.truncated,
        "run_dir": str(result.run_dir),
    }
    if history:
        summary |= {
            "loss": statistics.fmean(line["loss"] for line in tail),
            "samples_per_s": statistics.median(line["samples_per_s"] for line in history),
            "tokens_per_s": statistics.median(line["tokens_per_s"] for line in history),
            "memory_mb": max(line["memory_mb"] for line in history),
            "data_wait_s": sum(line["data_wait_s"] for line in history),
            "omega_mean": history[-1]["omega_mean"],
            "conflict_rate": history[-1]["conflict_rate"],
        }
    return summary


def _suites(config: Config) -> list[Any]:
    """The configured suites. Their shards are read once now: a missing file must not wait for the end of training."""
    if not config.evaluation.suites:
        return []
    from scale_digrap.evaluation.suites import Suite
    from scale_digrap.evaluation.tasks import check_questions
    from scale_digrap.training.data import open_shards

    suites, datasets = [], {}
    for name, suite in config.evaluation.suites.items():
        datasets[name] = open_shards(config.data, suite.shards)
        suites.append(
            Suite(name=name, group=suite.group, shift=suite.shift, metric=suite.metric, shards=tuple(suite.shards))  # type: ignore[arg-type]
        )
    check_questions(_Alone(), suites, datasets)
    return suites


class _Alone:
    """Before the ranks know each other every one of them checks for itself."""

    rank, world_size = 0, 1


def _evaluate(config: Config, result: TrainResult, suites: list[Any]) -> dict[str, float | None]:
    from scale_digrap.evaluation.runner import answer
    from scale_digrap.evaluation.signals import Signals
    from scale_digrap.evaluation.suites import averages
    from scale_digrap.evaluation.tasks import begin, merge, on_first, open_suites, read_results
    from scale_digrap.training.data import open_shards

    engine, folder = result.engine, Path(config.run_dir) / "evaluation"
    # Of weights that a run before this one had; what this one has may differ by rounding.
    on_first(engine, lambda: shutil.rmtree(folder, ignore_errors=True))
    datasets = open_suites(engine, suites, partial(open_shards, config.data))
    generation = {"max_new_tokens": config.evaluation.max_new_tokens}
    made_with = {
        "step": result.steps,
        "prompt_template": result.collator.template.to_dict(),
        "generation": generation,
    }
    settings = {suite.name: {**made_with, "metric": suite.metric} for suite in suites}
    tasks = begin(engine, folder, suites, datasets, settings)
    answer(
        result.model,
        result.collator,
        tasks,
        signals=lambda lockstep: Signals(
            engine.rank, engine.world_size, lockstep=lockstep, timeout_s=config.training.timeout_s
        ),
        dp_rank=engine.dp_rank,
        dp_world_size=engine.dp_world_size,
        device=engine.device,
        batch_size=config.evaluation.batch_size,
        generation=generation,
        workers=config.evaluation.workers,
    )
    merge(engine, tasks)

    def scores() -> dict[str, float]:
        results = read_results(folder, suites)
        for name, suite_result in results.items():
            entry = {
                "suite": name,
                "metric": suite_result.metric,
                "questions": suite_result.n,
                "accuracy": suite_result.accuracy,
                "by_question_type": suite_result.by_question_type(),
                "by_answer_type": suite_result.by_answer_type(),
                "predictions": f"{name}.jsonl",
                **made_with,
            }
            (folder / f"{name}.json").write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
        return {name: suite_result.accuracy for name, suite_result in results.items()}

    found: dict[str, float | None] = dict(on_first(engine, scores))
    return {**found, **{f"mean:{name}": mean for name, mean in averages(found, suites).items()}}


def _print(summary: dict[str, Any], console: Console) -> None:
    table = Table(title="Run finished", show_header=False)
    flat = {name: value for name, value in summary.items() if name != "evaluation"}
    for name, score in summary.get("evaluation", {}).items():
        flat[f"accuracy {name}"] = None if score is None else f"{100 * score:.2f} %"
    for name, value in flat.items():
        if value is not None:
            table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else f"{value}")
    console.print(table)


def _leave() -> None:
    """End the process group that torchrun's ranks share; leaving it open is a warning of torch's at exit."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
