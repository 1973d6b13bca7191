"""What ``scale-digrap evaluate`` does: check everything, answer what is not answered yet, compare, report.

Models are loaded one at a time. Whatever is complete on disk is not done again, so the same command goes on after a
kill, with more models or suites, or on another number of ranks.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scale_digrap.config import Config, ConfigError, TrainingConfig, suggest
from scale_digrap.data.dataset import ShardDataset
from scale_digrap.errors import RunStopped
from scale_digrap.evaluation import leakage, models, shift
from scale_digrap.evaluation.evaluate_config import EvaluateConfig, evaluate_config_to_yaml
from scale_digrap.evaluation.generation import generation_settings
from scale_digrap.evaluation.models import Variant
from scale_digrap.evaluation.progress import EvaluationProgress
from scale_digrap.evaluation.registry import load_suites
from scale_digrap.evaluation.report import write_report
from scale_digrap.evaluation.results import Comparison
from scale_digrap.evaluation.runner import answer
from scale_digrap.evaluation.runs import Method, MethodRun, environment, read_layers
from scale_digrap.evaluation.signals import EvaluationError, RankFailedError, Signals, StopAsked
from scale_digrap.evaluation.suites import Suite
from scale_digrap.evaluation.tasks import (
    begin,
    check_questions,
    check_settings,
    merge,
    on_first,
    open_suites,
    read_results,
)
from scale_digrap.runtime.files import write_whole
from scale_digrap.runtime.lock import FolderLock
from scale_digrap.runtime.secrets import mask_tree
from scale_digrap.runtime.text import finite, write_json
from scale_digrap.settings import shown
from scale_digrap.training.data import open_shards
from scale_digrap.training.ranks import Ranks
from scale_digrap.training.stop import DONE, STOPPED, StopRequests, clear_markers, run_stopped, write_marker
from scale_digrap.training.watchdog import lost_rank

log = logging.getLogger(__name__)


def run(config: EvaluateConfig) -> Path:
    """Evaluate as configured, on this process and those that a launcher started with it; returns ``out``.

    Rank 0 writes the results and, last of all, ``DONE``.

    Raises:
        ScaleDigrapError: anything in the configuration, the suites or the checkpoints, before a model is loaded; later
            what went wrong on any rank, on all of them.
        RunStopped: a signal or ``max_time``; the same command goes on.
    """
    ranks: Ranks | None = None
    ours = not dist.is_initialized()
    try:
        ranks = Ranks(_rank_config(config))
        _Evaluation(config, ranks).run()
    except RunStopped:
        if ours:
            _leave()
        raise
    except RuntimeError as error:
        rank = 0 if ranks is None else ranks.rank
        if lost_rank(error, rank, "evaluating") is None:
            raise
        raise RankFailedError(
            f"rank {rank} lost contact with another rank, which has died or hangs; what is answered is kept, the same "
            "command goes on from there"
        ) from error
    if ours:
        _leave()
    return Path(config.out)


class _Evaluation:
    """One run of the command on one rank."""

    def __init__(self, config: EvaluateConfig, ranks: Ranks) -> None:
        self.config, self.ranks, self.out = config, ranks, Path(config.out)
        self.generation = generation_settings(config.generation)
        _check_options("leakage", config.leakage, leakage.check)
        _check_options("shift", config.shift, shift.shift_scores, "model")
        shift.check_options(**(config.shift or {}))
        self.dtype = models.precision(config, ranks.device)
        self.suites: list[Suite] = []
        self.datasets: dict[str, ShardDataset] = {}
        self.variants: list[Variant] = []
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        config, ranks = self.config, self.ranks
        on_first(ranks, self._make_folder)
        with _alone(self.out, ranks), StopRequests(_rank_config(config)) as requests:
            on_first(ranks, self._start)
            self.suites = on_first(ranks, lambda: load_suites(asdict(config.suites)))
            self.datasets = open_suites(ranks, self.suites, partial(open_shards, config.data))
            check_questions(ranks, self.suites, self.datasets)
            self.variants, engine = on_first(ranks, self._plan)
            training = models.training_config(config, engine, self.dtype)
            self._tell(engine)
            self._check_leakage()
            self.engine_name, self.engine = engine, models.start_engine(engine, training)
            for position, variant in enumerate(self.variants, 1):
                self._evaluate(variant, position, training, requests)
            on_first(ranks, self._report)
            if ranks.rank == 0:
                write_marker(self.out, DONE, {"models": len(self.variants)})

    # -- before --------------------------------------------------------------------------------------------------------

    def _make_folder(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(f"out={self.config.out!r} cannot be made: {error.strerror}") from None

    def _start(self) -> None:
        clear_markers(self.out)
        write_whole(self.out / "evaluate.yaml", evaluate_config_to_yaml(self.config), 0o600)

    def _plan(self) -> tuple[list[Variant], str]:
        variants = models.plan(self.config)
        for variant in variants:
            check_settings(self._folder(variant), self._settings(variant))
        return variants, models.choose_engine(self.config, variants, self.ranks)

    def _settings(self, variant: Variant) -> dict[str, dict[str, Any]]:
        """Whatever the predictions depend on, by suite. Neither ranks nor engine nor batch size are among it."""
        data = self.config.data
        common = {
            "checkpoint": variant.identity,
            "alpha": variant.alpha,
            "template": variant.template.to_dict(),
            "max_length": variant.max_length,
            "attention": variant.attention,
            "dtype": self.dtype,
            "generation": self.generation,
            "data": {key: getattr(data, key) for key in ("image_size", "classes", "class_question")},
        }
        return {
            suite.name: {
                **common,
                "suite": {"metric": suite.metric, "shards": self.datasets[suite.name].fingerprint()},
            }
            for suite in self.suites
            if suite.name in self.datasets
        }

    def _tell(self, engine: str) -> None:
        questions = sum(map(len, self.datasets.values()))
        log.info(
            "%d models on %d suites with %s questions; %d ranks, %s, %s",
            len(self.variants), len(self.datasets), f"{questions:,}", self.ranks.world_size, engine, self.dtype,
        )  # fmt: skip
        missing = [suite.name for suite in self.suites if suite.name not in self.datasets]
        if missing:
            log.warning("%d suites are missing and stay empty: %s", len(missing), ", ".join(missing))

    def _check_leakage(self) -> None:
        if self.config.leakage is None:
            return
        settings = on_first(self.ranks, lambda: self._against_training("leakage"))
        if settings is None:
            return
        log.info("looking for the suites' questions and pictures in the training data")
        report = leakage.check(
            self.suites,
            open_shards=partial(open_shards, self.config.data),
            dp_rank=self.ranks.rank,
            dp_world_size=self.ranks.world_size,
            **(self.config.leakage or {}),
        )
        on_first(self.ranks, lambda: self._keep("leakage", report.to_json(), settings))

    def _against_training(self, name: str, **more: Any) -> dict[str, Any] | None:
        """What the comparison of the suites with training data depends on; None if it is on disk already."""
        options = dict(getattr(self.config, name) or {})
        settings = {
            "options": mask_tree(options),  # the shards' content tells them apart, whatever signature they come with
            "train": open_shards(self.config.data, _listed(options["train"])).fingerprint(),
            "suites": {suite: dataset.fingerprint() for suite, dataset in self.datasets.items()},
            **more,
        }
        path = self.out / f"{name}.settings.json"
        same = path.is_file() and path.read_text(encoding="utf-8") == json.dumps(settings, sort_keys=True)
        return None if same and (self.out / f"{name}.json").is_file() else settings

    def _keep(self, name: str, content: dict[str, Any], settings: dict[str, Any]) -> None:
        write_whole(self.out / f"{name}.json", [write_json(finite(content), indent=1).encode() + b"\n"])
        write_whole(self.out / f"{name}.settings.json", [json.dumps(settings, sort_keys=True).encode()])

    # -- a model -------------------------------------------------------------------------------------------------------

    def _folder(self, variant: Variant) -> Path:
        return self.out / "predictions" / variant.key

    def _evaluate(self, variant: Variant, position: int, training: Config, requests: StopRequests) -> None:
        ranks, config = self.ranks, self.config
        tasks = begin(ranks, self._folder(variant), self.suites, self.datasets, self._settings(variant))
        shifting: dict[str, Any] | None = None
        if config.shift is not None and variant is self._shift_variant():
            common = {"checkpoint": variant.identity, "template": variant.template.to_dict(), "dtype": self.dtype}
            shifting = on_first(ranks, lambda: self._against_training("shift", **common))
        if not tasks and shifting is None:
            return
        exported = self.out / "models" / variant.key
        title = f"{variant.key} ({position} of {len(self.variants)})"
        progress = EvaluationProgress(config.progress and ranks.rank == 0, sum(len(task.todo) for task in tasks), title)
        try:
            if variant.entry.run is not None:
                on_first(ranks, lambda: models.export_variant(variant, exported, self.dtype))
            with models.loaded(variant, self.engine, training, exported) as (model, collator):
                if tasks:
                    with progress:
                        seconds = answer(
                            model,
                            collator,
                            tasks,
                            signals=lambda lockstep: Signals(
                                ranks.rank,
                                ranks.world_size,
                                lockstep=lockstep,
                                timeout_s=config.engine.timeout_s,
                                progress=progress.update,
                            ),
                            stop=lambda: requests.reason(requests.votes(ranks.rank)),
                            device=ranks.device,
                            generation=self.generation,
                            **self._how(),
                        )
                    merge(ranks, tasks)
                    self.seconds[variant.key] = sum(seconds.values())
                if shifting is not None:
                    self._measure_shift(model, collator, variant, shifting)
                del model, collator
        except StopAsked as asked:
            if ranks.rank == 0:
                write_marker(self.out, STOPPED, {"reason": str(asked), "model": variant.key})
            raise run_stopped(
                f"stopped ({asked}) while evaluating {variant.key}: what is answered is in {self.out}, the same "
                "command goes on from there"
            ) from None
        finally:
            if ranks.rank == 0:
                shutil.rmtree(exported, ignore_errors=True)
        gc.collect()  # models refer to themselves: the next one should not need room for both
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _how(self) -> dict[str, Any]:
        """How ranks share a suite."""
        return {
            "batch_size": self.config.batch_size,
            "workers": self.config.workers,
            "dp_rank": self.ranks.rank,
            "dp_world_size": self.ranks.world_size,
        }

    def _shift_variant(self) -> Variant:
        """The model in whose embeddings the shift is measured: the one named, or the baseline, or the first."""
        options = self.config.shift or {}
        named = [v for v in self.variants if v.name == options.get("model")]
        baseline = [v for v in self.variants if v.method == self.config.baseline]
        return (named or baseline or self.variants)[0]

    def _measure_shift(self, model: Any, collator: Any, variant: Variant, settings: dict[str, Any]) -> None:
        log.info("measuring how far the suites are from the training data, in the embeddings of %s", variant.key)
        options = {name: value for name, value in (self.config.shift or {}).items() if name != "model"}
        report = shift.shift_scores(
            model,
            collator,
            suites=self.suites,
            out=self.out,
            name=variant.method,
            device=self.ranks.device,
            open_shards=partial(open_shards, self.config.data),
            **{**self._how(), **options},
        )
        on_first(self.ranks, lambda: self._keep("shift", report.to_json(), settings))

    # -- after ---------------------------------------------------------------------------------------------------------

    def _report(self) -> None:
        shutil.rmtree(self.out / "models", ignore_errors=True)
        fingerprint = self._fingerprint()
        runs = [self._method_run(variant, fingerprint) for variant in self.variants]
        for method_run in runs:
            method_run.save(self.out / "runs")
        comparison = Comparison(
            methods=self._methods(),
            suites=self.suites,
            runs=runs,
            settings=self._summary(),
            environment=environment(),
            title=self.config.title or "Evaluation",
            leakage=self._json("leakage.json") if self.config.leakage is not None else None,
            shift=self._json("shift.json") if self.config.shift is not None else None,
        )
        write_report(comparison, self.out)

    def _methods(self) -> list[Method]:
        methods: dict[str, Method] = {}
        for variant in self.variants:
            baseline = self.config.baseline
            methods.setdefault(
                variant.method,
                Method(
                    key=variant.method,
                    label=variant.label,
                    family=variant.family,
                    baseline=None if baseline == variant.method else baseline,
                    variant_of=variant.parent if any(v.method == variant.parent for v in self.variants) else None,
                ),
            )
        return list(methods.values())

    def _method_run(self, variant: Variant, fingerprint: str) -> MethodRun:
        seconds = {"evaluate": self.seconds[variant.key]} if variant.key in self.seconds else {}
        provenance = {
            **variant.origin,
            "alpha": variant.alpha,
            "template": variant.template.to_dict(),
            "max_length": variant.max_length,
            "generation": self.generation,
            "dtype": self.dtype,
            "engine": self.engine_name,
            "world_size": self.ranks.world_size,
        }
        return MethodRun(
            method=variant.method,
            seed=variant.seed,
            suites=read_results(self._folder(variant), self.suites),
            seconds=seconds,
            **_layers(variant),
            fingerprint=fingerprint,
            provenance=provenance,
        )

    def _summary(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "dtype": self.dtype,
            "questions": sum(map(len, self.datasets.values())),
            "ranks": self.ranks.world_size,
            "engine": self.engine_name,
            "config": shown(self.config),
        }

    def _fingerprint(self) -> str:
        """Of what all rows have in common: rows made otherwise must not stand beside them."""
        suites = {
            suite.name: [suite.metric, self.datasets[suite.name].fingerprint()]
            for suite in self.suites
            if suite.name in self.datasets
        }
        text = json.dumps([suites, self.generation, self.dtype], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _json(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.out / name).read_text(encoding="utf-8"))
        return content


def _listed(shards: Any) -> list[str]:
    return [shards] if isinstance(shards, str) else list(shards)


_GIVEN = ("suites", "open_shards", "progress", "dp_rank", "dp_world_size", "device", "out", "name", "collator", "model")


def _check_options(section: str, values: Mapping[str, Any] | None, function: Any, *more: str) -> None:
    """Refuse a key that the function behind a section of the configuration does not take."""
    known = [name for name in inspect.signature(function).parameters if name not in _GIVEN]
    for key in values or {}:
        if key not in (*known, *more):
            raise ConfigError(f"unknown key {f'{section}.{key}'!r}{suggest(key, known)}: it has {', '.join(known)}")


def _layers(variant: Variant) -> dict[str, Any]:
    """What the run's log says of its layers up to the checkpoint; nothing of mixtures, which were not trained."""
    if variant.entry.run is None or variant.alpha != 1.0:
        return {}
    telemetry, drift = read_layers(Path(variant.entry.run) / "layers.jsonl", variant.origin["step"])
    return {"telemetry": telemetry, "drift": drift}


@contextmanager
def _alone(out: Path, ranks: Ranks) -> Iterator[None]:
    """Refuse a second evaluation in the same folder at the same time."""
    lock = FolderLock(out, "evaluation")
    on_first(ranks, lock.acquire)
    try:
        yield
    finally:
        lock.release()


def _rank_config(config: EvaluateConfig) -> Config:
    """What `Ranks` and `StopRequests` look at."""
    training = TrainingConfig(
        device=config.engine.device,
        timeout_s=config.engine.timeout_s,
        max_time=config.max_time,
        stop_signals=config.stop_signals,
    )
    return Config(run_dir=config.out, training=training)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
