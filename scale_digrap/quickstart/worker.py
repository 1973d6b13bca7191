"""One rank of the quick-start: `python -m scale_digrap.quickstart.worker SETTINGS.json`, alone or under torchrun.

Evaluates the base model, then for each seed and method fine-tunes it, evaluates it, and evaluates its WiSE-FT
mixture. Rank 0 writes each result as soon as it is complete; what is there already is not done again.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.evaluation.drift import layer_drift
from scale_digrap.evaluation.registry import QUICKSTART
from scale_digrap.evaluation.results import MethodRun, write_atomically
from scale_digrap.evaluation.runner import Collator, PreparedSuites, SuiteResult, evaluate, prepare
from scale_digrap.evaluation.runs import read_layers
from scale_digrap.evaluation.suites import averages
from scale_digrap.evaluation.wise import interpolate
from scale_digrap.models.collate import VqaCollator
from scale_digrap.quickstart.pipeline import (
    EVALUATION_BATCH,
    MAX_NEW_TOKENS,
    TRAINED,
    ZERO_SHOT,
    Settings,
    finished,
    result_folder,
    training_config,
    wise,
)
from scale_digrap.runtime.logs import figures
from scale_digrap.training import train
from scale_digrap.training.engine import Engine, create_engine


class Worker:
    """The quick-start's work on one rank."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.suites = [QUICKSTART[name].at(shards) for name, shards in settings.suites.items()]
        self.engine: Engine = create_engine(self._config(settings.methods[0], settings.seeds[0]))
        self.console = Console(quiet=self.engine.rank != 0, highlight=False)
        self.prepared: PreparedSuites | None = None
        # Decided before the first result is written: all ranks must skip the same work.
        self.done = set(finished(settings))
        self.engine.barrier()

    def run(self) -> None:
        """Everything that is not done yet."""
        settings = self.settings
        if (ZERO_SHOT.key, settings.seeds[0]) not in self.done:
            self._zero_shot()
        for seed in settings.seeds:
            for method in settings.methods:
                keys = (method, wise(TRAINED[method]).key)
                if any((key, seed) not in self.done for key in keys):
                    self._method(method, seed)

    def _zero_shot(self) -> None:
        config = self._config("full-adamw", self.settings.seeds[0])
        loaded = self.engine.load(config, train=False)
        seconds: dict[str, float] = {}
        results = self._evaluate(loaded.model, loaded.collator, seconds)
        self._write(
            MethodRun(
                method=ZERO_SHOT.key,
                seed=self.settings.seeds[0],
                suites=results,
                seconds=seconds,
                provenance=self._provenance(loaded.collator, self.settings.model),
            )
        )
        self._tell(ZERO_SHOT.label, results, seconds)
        self.engine.close()

    def _method(self, method: str, seed: int) -> None:
        config = self._config(method, seed)
        started = time.perf_counter()
        result = train(config)
        seconds = {"train": time.perf_counter() - started}
        run_dir = Path(result.run_dir)
        model, anchors = result.model, result.anchored
        run = MethodRun(
            method=method,
            seed=seed,
            suites=self._evaluate(model, result.collator, seconds),
            seconds=seconds,
            training=_summary(result.history),
            drift={name: layer.to_json() for name, layer in layer_drift(model, anchors).items()},
            telemetry=read_layers(run_dir / "layers.jsonl")[0] if self.engine.rank == 0 else [],
            provenance=self._provenance(result.collator, f"{method}-seed{seed}", alpha=1.0),
        )
        self._write(run)
        self._tell(f"seed {seed} · {TRAINED[method].label}", run.suites, seconds)

        mixture = wise(TRAINED[method])
        seconds = {}
        with interpolate(model, self.settings.alpha, anchors, new_layers=result.loaded.new_layers):
            results = self._evaluate(model, result.collator, seconds)
        provenance = self._provenance(result.collator, f"{method}-seed{seed}", alpha=self.settings.alpha)
        self._write(MethodRun(method=mixture.key, seed=seed, suites=results, seconds=seconds, provenance=provenance))
        self._tell(f"seed {seed} · {mixture.label}", results, seconds)
        result.engine.close()
        del result, model, anchors
        gc.collect()  # the model and its optimizer refer to each other: the next run should not need room for both

    def _evaluate(self, model: nn.Module, collator: Collator, seconds: dict[str, float]) -> dict[str, SuiteResult]:
        engine = self.engine
        started = time.perf_counter()
        if self.prepared is None:  # every method has the same processor and prompt
            batch_size = min(EVALUATION_BATCH, -(-self.settings.suite_samples // engine.dp_world_size))
            self.prepared = prepare(
                collator,
                self.suites,
                dp_rank=engine.dp_rank,
                dp_world_size=engine.dp_world_size,
                batch_size=batch_size,
            )
        with self.console.status("Evaluating") as status:
            results = evaluate(
                model,
                collator,
                self.suites,
                dp_rank=engine.dp_rank,
                dp_world_size=engine.dp_world_size,
                device=engine.device,
                max_new_tokens=MAX_NEW_TOKENS,
                prepared=self.prepared,
                progress=lambda suite, done, total: status.update(f"Evaluating {suite}: batch {done} of {total}"),
            )
        seconds["evaluate"] = time.perf_counter() - started
        return results

    def _config(self, method: str, seed: int) -> Any:
        settings = self.settings
        config = training_config(
            method,
            seed=seed,
            steps=settings.steps,
            world_size=settings.world_size,
            model=settings.model,
            train=settings.train,
            run_dir=str(Path(settings.work) / f"{method}-seed{seed}"),
            engine=settings.engine,
            stage=settings.stage,
        )
        config.training.device = settings.device
        return config

    def _provenance(self, collator: VqaCollator, checkpoint: str, *, alpha: float | None = None) -> dict[str, Any]:
        return {
            "checkpoint": checkpoint,
            "base": self.settings.model,
            **({} if alpha is None else {"alpha": alpha}),
            "template": collator.template.to_dict(),
            "generation": {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS},
            "engine": self.settings.engine,
            "world_size": self.settings.world_size,
        }

    def _write(self, run: MethodRun) -> None:
        run.fingerprint = self.settings.fingerprint
        if self.engine.rank == 0:
            run.save(result_folder(self.settings))

    def _tell(self, what: str, results: dict[str, SuiteResult], seconds: dict[str, float]) -> None:
        scores = {name: result.accuracy for name, result in results.items()}
        shown = {"ID": scores["id"], **{name: averages(scores, self.suites)[name] for name in ("near", "far")}}
        figures = "  ".join(f"{name} {100 * score:.1f}" for name, score in shown.items() if score is not None)
        times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
        self.console.print(f"[bold]{what}[/]: {figures}  [dim]{times}[/]", soft_wrap=True)


def _summary(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A training run in a few figures."""
    tail = history[-10:]
    losses = figures(tail, "loss")
    summary: dict[str, Any] = {
        "steps": history[-1]["step"],
        "samples/s": _median(figures(history, "samples_per_s")),
        "memory MB": max(figures(history, "memory_mb")),
    }
    if losses:
        summary["loss (last 10 steps)"] = sum(losses) / len(losses)
    if len(losses) < len(tail):
        summary["of the last 10 steps, skipped"] = len(tail) - len(losses)
    for key, label in (("omega_mean", "mean ω"), ("conflict_rate", "conflict rate")):
        if found := figures(history[-1:], key):
            summary[label] = found[0]
    return summary


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank. An error is left in `WORK/errors/rankN.txt` for the process that started the ranks."""
    (path,) = sys.argv[1:] if argv is None else argv
    # peft asks Transformers for an attribute by its old name; nothing that a user could do about it
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    settings = Settings.load(path)
    if settings.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        Worker(settings).run()
    except Exception as error:
        rank = int(os.environ.get("RANK", "0"))
        text = str(error) if isinstance(error, ScaleDigrapError) else traceback.format_exc()
        write_atomically(Path(settings.work) / "errors" / f"rank{rank}.txt", text)
        return 1
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: after an error the other ranks are inside a collective, and leaving it politely would wait for them.
    os._exit(code)
