"""What ``scale-digrap train`` does: train, evaluate the configured suites, say what came out."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scale_digrap.config import Config
from scale_digrap.errors import RunStopped
from scale_digrap.runtime.files import write_whole
from scale_digrap.runtime.lock import FolderLock
from scale_digrap.runtime.logs import figures, reason
from scale_digrap.runtime.text import finite, write_json
from scale_digrap.sharding.zero3 import full_numel
from scale_digrap.training.engine import TrainingError
from scale_digrap.training.loop import TrainResult, train
from scale_digrap.training.optimizer import count_anchors
from scale_digrap.training.ranks import on_first
from scale_digrap.training.stop import DONE, write_marker


def run(config: Config) -> TrainResult:
    """Train and evaluate; rank 0 prints a summary, writes ``run_dir/summary.json`` and, last of all, ``run_dir/DONE``.

    Raises:
        ScaleDigrapError, RunStopped: as :func:`scale_digrap.training.train`; also suites that cannot be read.
    """
    suites = _suites(config)
    lock = FolderLock(config.run_dir, "training run")
    try:
        result = train(config, lock)
        scores = _evaluate(config, result, suites) if suites else {}
        summary = {**summarize(result), **({"evaluation": scores} if scores else {})}
        on_first(result.engine, lambda: _finish(result, summary))
    except RunStopped:
        _leave()
        raise
    finally:
        lock.release()
    _leave()
    return result


def _finish(result: TrainResult, summary: dict[str, Any]) -> None:
    """Last of all, for the markers say what is on disk."""
    path = result.run_dir / "summary.json"
    _print(summary, Console())
    try:
        write_whole(path, write_json(finite(summary), indent=2) + "\n")
        path = result.run_dir / DONE
        write_marker(result.run_dir, DONE, {"step": result.steps})
    except OSError as error:
        raise TrainingError(
            f"training is complete, but {path} cannot be written: {reason(error)}. Put that right and run the same "
            f"command again: it goes on from the newest checkpoint"
        ) from None


def summarize(result: TrainResult) -> dict[str, Any]:
    """A finished run in a few figures: means over the last tenth of the log, medians of the speeds.

    A figure that the log does not have for a step (a skipped step's loss) is left out; ``missing_figures`` counts the
    lines without it. One that no line has is ``None``.
    """
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
        means: list[tuple[str, list[dict[str, Any]], Callable[[list[float]], float]]] = [
            ("loss", tail, statistics.fmean),
            ("samples_per_s", history, statistics.median),
            ("tokens_per_s", history, statistics.median),
            ("memory_mb", history, max),
            ("data_wait_s", history, math.fsum),
        ]
        missing = {}
        for name, lines, mean in means:
            values = figures(lines, name)
            summary[name] = mean(values) if values else None
            if len(values) < len(lines):
                missing[name] = len(lines) - len(values)
        for name in ("omega_mean", "conflict_rate"):
            values = figures(history[-1:], name) or figures(tail, name)
            summary[name] = values[-1] if values else None
        if missing:
            summary["missing_figures"] = missing
    if result.losses:
        summary["log"] = result.losses
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
    from scale_digrap.evaluation.tasks import begin, merge, open_suites, read_results
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
            write_whole(folder / f"{name}.json", write_json(finite(entry), indent=2) + "\n")
        return {name: suite_result.accuracy for name, suite_result in results.items()}

    found: dict[str, float | None] = dict(on_first(engine, scores))
    return {**found, **{f"mean:{name}": mean for name, mean in averages(found, suites).items()}}


def _print(summary: dict[str, Any], console: Console) -> None:
    table = Table(title="Run finished", show_header=False)
    flat = {name: value for name, value in summary.items() if name != "evaluation"}
    for name, score in summary.get("evaluation", {}).items():
        flat[f"accuracy {name}"] = None if score is None else f"{100 * score:.2f} %"
    for group in ("missing_figures", "log"):
        flat |= {f"{group} ({name})": count for name, count in flat.pop(group, {}).items()}
    for name, value in flat.items():
        if value is not None:
            table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else f"{value}")
    console.print(table)


def _leave() -> None:
    """End the process group that torchrun's ranks share; leaving it open is a warning of torch's at exit."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
