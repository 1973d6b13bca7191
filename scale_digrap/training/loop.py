"""Training from a configuration: one readable loop, the same for one process and for many."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from scale_digrap.config import Config, save_config, validate_for_training
from scale_digrap.data.loader import TrainLoader
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.models.collate import IGNORE, Batch, VqaCollator
from scale_digrap.models.loading import LoadedModel
from scale_digrap.runtime.lock import FolderLock
from scale_digrap.runtime.logs import scan_log
from scale_digrap.sharding.zero3 import full_numel
from scale_digrap.training import manifest
from scale_digrap.training.agreement import ReplicaCheck
from scale_digrap.training.checkpoint import Checkpointer
from scale_digrap.training.data import train_loader
from scale_digrap.training.engine import CheckpointError, Engine, TrainingError, create_engine
from scale_digrap.training.export import save_final
from scale_digrap.training.health import Health, StepData
from scale_digrap.training.loss import answer_loss, first_answer_position
from scale_digrap.training.metrics import LOG, Metrics, check_back_ends, memory_mb
from scale_digrap.training.optimizer import AdamW, capture_anchors, keeps_anchors, layer_summary
from scale_digrap.training.ranks import on_first
from scale_digrap.training.run_folder import CHECKPOINTS
from scale_digrap.training.schedule import build_schedule
from scale_digrap.training.stop import StopRequests, clear_markers
from scale_digrap.training.watchdog import Watchdog, lost_rank

log = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a run leaves behind.

    Attributes:
        model: the trained model, live and sharded.
        optimizer: its optimizer.
        collator: makes batches for it, with the prompt it was trained on.
        loaded: model, processor and the names of adapters and new layers.
        engine: ranks and device.
        run_dir: logs, configuration, checkpoints, ``final``.
        history: the records of ``log.jsonl``, on every rank; after a resume with those of earlier starts, as far as
            the file holds them and the rank sees it. A figure that is not finite is NaN here and null in the file.
        anchored: pre-trained values by parameter name, sharded like the parameters; without adapters and new layers.
            Empty for AdamW and under DeepSpeed unless ``training.keep_anchors``.
        steps: optimizer steps of the whole run, resumed ones included.
        skipped_steps: steps that were left out because a gradient was not finite; of the whole run on rank 0, as far as
            its log tells, of this process on the others.
        bad_samples: samples of the whole run that could not be decoded and were replaced.
        seconds: wall time of the loop.
        losses: what the logs lack, see :meth:`Metrics.losses`.
    """

    model: nn.Module
    optimizer: Optimizer
    collator: VqaCollator
    loaded: LoadedModel
    engine: Engine
    run_dir: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    anchored: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: int = 0
    skipped_steps: int = 0
    bad_samples: int = 0
    seconds: float = 0.0
    losses: dict[str, int] = field(default_factory=dict)


def train(config: Config, lock: FolderLock | None = None) -> TrainResult:
    """Run a configuration to its end, or go on from its newest checkpoint.

    Every rank calls it. ``torch.distributed`` is initialised from torchrun's environment if it is not yet.

    Args:
        config: the run's.
        lock: of ``run_dir``, not yet taken: rank 0 takes it and leaves it to the caller, who has more to write there.
            By default it is given back at the end.

    Raises:
        LockedError: another process writes in ``run_dir``, or it cannot be written to; before any work.
        ConfigError, ModelLoadError, SelectionError, DataError, CheckpointError, TrainingError: each with one line that
            names what to change; all but a divergence, a lost rank and a full disk before the first step.
        RunStopped: a signal, the file ``run_dir/STOP`` or ``training.max_time`` asked for it; on all ranks, after the
            checkpoint. ``run_dir/STOPPED`` tells it to whoever started the ranks.
    """
    validate_for_training(config)
    check_back_ends(config)
    mine = FolderLock(config.run_dir, "training run") if lock is None else lock
    try:
        with StopRequests(config) as stop:
            engine = create_engine(config)
            on_first(engine, lambda: _begin(config, mine))
            with Watchdog(Path(config.run_dir), engine.rank, config.training.stall_s) as watchdog:
                try:
                    return _train(config, engine, stop, watchdog)
                except Exception as error:
                    lost = lost_rank(error, engine.rank, watchdog.place())
                    if lost is None:
                        raise
                    raise lost from error
    finally:
        if lock is None:
            mine.release()


def _begin(config: Config, lock: FolderLock) -> None:
    """What rank 0 does in ``run_dir`` before any work. What a refused start finds there stays as it is."""
    lock.acquire()
    run_dir = Path(config.run_dir)
    if config.training.steps is not None and config.checkpoint.resume == "auto":
        found = manifest.checkpoints(run_dir / CHECKPOINTS)
        if found:
            _check_length(found[-1][0], config.training.steps, found[-1][1], "training.steps")
    clear_markers(run_dir)
    save_config(config, run_dir / "config.yaml")


def _check_length(start: int, total_steps: int, checkpoint: Path, what: str) -> None:
    """A run cannot end before the step that its checkpoint is of."""
    if start > total_steps:
        raise TrainingError(
            f"{checkpoint} is of step {start}, and {what} asks for {total_steps} steps: raise it to {start} or more, "
            f"name an earlier checkpoint with checkpoint.resume, or another run_dir"
        )


def _train(config: Config, engine: Engine, stop: StopRequests, watchdog: Watchdog) -> TrainResult:
    # What is asked for is stored with checkpoints: the next start may have other ranks.
    asked, config = config, share_global_batch(config, engine)
    run_dir = Path(config.run_dir)
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if config.data.workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of a worker

    loaded = engine.load(config)
    model = loaded.model
    if config.training.activation_checkpointing:
        _checkpoint_activations(model)
    loader = train_loader(config, engine, loaded.collator.train)
    total_steps = count_steps(config, loader)
    # Before a checkpoint is loaded: the anchors are the pre-trained weights.
    forward, optimizer = engine.prepare(loaded, config)
    anchored = {}
    if config.training.keep_anchors and not keeps_anchors(optimizer):
        anchored = capture_anchors(loaded, engine)
    scheduler = build_schedule(optimizer, config.schedule, total_steps)

    checkpoints = Checkpointer(
        asked, engine=engine, loaded=loaded, optimizer=optimizer, scheduler=scheduler, loader=loader
    )
    engine.limit_waiting(config.training.timeout_s)
    watchdog.beat(0, "resuming")
    start = checkpoints.resume()
    asked_by = "training.steps" if config.training.steps is not None else "training.epochs"
    _check_length(start, total_steps, checkpoints.folder / f"step-{start}", asked_by)
    _announce(config, engine, loaded, loader, start, total_steps)

    result = TrainResult(
        model=model,
        optimizer=optimizer,
        collator=loaded.collator,
        loaded=loaded,
        engine=engine,
        run_dir=run_dir,
        anchored=anchored,
        steps=total_steps,
    )
    began = time.perf_counter()
    metrics = Metrics(config, rank=engine.rank, total_steps=total_steps, start_step=start)
    earlier = metrics.kept if engine.rank == 0 or not start else scan_log(run_dir / LOG, start).by_step()
    result.history = list(earlier)
    with metrics, closing(loader):
        run = _Run(config, engine, loaded, forward, optimizer, metrics, result, loader, stop, watchdog, start)
        batches = iter(loader)
        model.train()
        try:
            for step in range(start + 1, total_steps + 1):
                run.step(step, batches)
                scheduler.step()
                checkpoints.poll()
                if run.health.too_many:
                    checkpoints.close()
                    raise run.health.error(step, checkpoints.newest())
                if step == total_steps:
                    run.close_step()
                if _save_is_due(config.checkpoint.every, step, total_steps, run.health.in_a_row) or run.stop_reason:
                    watchdog.beat(step, "saving a checkpoint")
                    checkpoints.save(step)
                if run.stop_reason:
                    checkpoints.close()
                    newest = checkpoints.newest()
                    stopped = stop.stopped(engine.rank, step=step, reason=run.stop_reason, checkpoint=newest)
                    engine.barrier()  # some launchers end all ranks when the first one is gone
                    raise stopped
            engine.finish(forward)
            watchdog.beat(total_steps, "finishing")
            checkpoints.close()
        except ScaleDigrapError:  # of all ranks together
            with suppress(CheckpointError):
                checkpoints.close()
            raise
    result.seconds = time.perf_counter() - began
    result.bad_samples = loader.bad
    engine.barrier()
    if keeps_anchors(optimizer):
        result.anchored = engine.anchors(loaded, optimizer)
    result.losses = {**metrics.losses(), **run.health.losses()}
    if loader.bad_log.lost:
        result.losses["lost in the list of bad samples"] = loader.bad_log.lost
    if config.checkpoint.save_final:
        save_final(run_dir / "final", loaded, engine, dtype=config.checkpoint.final_dtype)
    return result


def _save_is_due(every: int, step: int, total_steps: int, skipped: int) -> bool:
    """Whether a step ends with a checkpoint: every ``every``-th, and the last one of a run that saves at all."""
    if not every:
        return False
    # Skipped steps change nothing: saving them would push the last good checkpoint out. What comes after the last
    # step begins from its checkpoint whatever it was.
    return step == total_steps or (step % every == 0 and not skipped)


def share_global_batch(config: Config, engine: Engine) -> Config:
    """``training.global_batch_size`` as the number of micro-batches that these ranks need for it.

    Raises:
        TrainingError: it cannot be dealt out evenly.
    """
    training = config.training
    if training.global_batch_size is None:
        return config
    at_once = training.batch_size * engine.dp_world_size
    if training.global_batch_size % at_once:
        raise TrainingError(
            f"training.global_batch_size={training.global_batch_size} is no multiple of training.batch_size="
            f"{training.batch_size} on {engine.dp_world_size} ranks ({at_once}): change one of them"
        )
    return replace(
        config,
        training=replace(training, gradient_accumulation=training.global_batch_size // at_once, global_batch_size=None),
    )


def count_steps(config: Config, loader: TrainLoader) -> int:
    """Optimizer steps of a run: ``training.steps``, or as many as ``training.epochs`` takes."""
    if config.training.steps is not None:
        return config.training.steps
    assert config.training.epochs is not None
    per_step = loader.global_batch_size * config.training.gradient_accumulation
    steps = math.ceil(config.training.epochs * loader.samples / per_step)
    if config.schedule.warmup_steps >= steps:
        raise TrainingError(
            f"schedule.warmup_steps={config.schedule.warmup_steps} leaves nothing of the {steps} steps that "
            f"training.epochs={config.training.epochs:g} takes: warm up for less"
        )
    return steps


def _announce(
    config: Config,
    engine: Engine,
    loaded: LoadedModel,
    loader: TrainLoader,
    start: int,
    total_steps: int,
) -> None:
    if engine.rank != 0:
        return
    trained = sum(map(full_numel, loaded.trained().values()))
    total = sum(map(full_numel, loaded.model.parameters()))
    accumulation = config.training.gradient_accumulation
    log.info(
        "%s: %s of %s parameters trained with %s on %d rank(s), %s; %d samples, global batch %d, %d steps",
        config.model.path,
        f"{trained:,}",
        f"{total:,}",
        config.optimizer.name,
        engine.world_size,
        engine.device.type,
        loader.samples,
        loader.global_batch_size * accumulation,
        total_steps,
    )
    if start:
        log.info("going on after step %d (checkpoint.resume=never starts afresh)", start)


class _Run:
    """The state of the loop between two steps: what is not yet logged, and what the ranks have agreed on.

    A step begins with one sum over the ranks. It holds what the step needs to know of all of them, the votes to stop,
    now and then the checksums of the replicas, and the loss of the step before.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        loaded: LoadedModel,
        forward: nn.Module,
        optimizer: Optimizer,
        metrics: Metrics,
        result: TrainResult,
        loader: TrainLoader,
        stop: StopRequests,
        watchdog: Watchdog,
        start: int,
    ) -> None:
        self.config, self.engine, self.model = config, engine, forward
        self.loader, self.stop, self.watchdog = loader, stop, watchdog
        self.optimizer, self.metrics, self.result = optimizer, metrics, result
        trained = loaded.trained()
        self.parameters = list(trained.values())
        self.health = Health(config, engine, list(trained))
        every = config.training.sync_check_every
        self.replicas = ReplicaCheck(engine, loaded.model, optimizer, loader, every=every, first=start + 1)
        self.stop_reason: str | None = None
        self.data = StepData(0)
        self.step_loss = torch.zeros((), dtype=torch.float64, device=engine.device)
        before = metrics.kept[-1].get("skipped_steps") if metrics.kept else 0
        self.skipped_before = result.skipped_steps = before if type(before) is int and before > 0 else 0
        self.stepped = False  # telemetry describes the last step, so there is none before the first
        self._reset()

    def _reset(self) -> None:
        self.since = time.perf_counter()
        self.waited = 0.0
        self.samples = self.tokens = 0.0
        self.window: list[tuple[float, float]] = []
        """Of every step since the last line: this rank's loss, and the answer tokens of all ranks."""

    def step(self, number: int, batches: Iterator[Batch]) -> None:
        """One optimizer step: fetch, forward and backward for every micro-batch, update, log."""
        training = self.config.training
        # Dropout of a step depends on nothing that came before: a resumed run needs no generator state.
        torch.manual_seed(_step_seed(training.seed, number, self.engine.dp_rank))
        self.watchdog.beat(number, "waiting for data")
        previous, self.data = self.data, StepData(number)
        micro_batches, failure = self._fetch(batches)
        self.data.tokens = sum(int((batch["labels"] != IGNORE).sum()) for batch in micro_batches)
        counts = [
            previous.loss,
            self.data.tokens,
            sum(int(batch["attention_mask"].sum()) for batch in micro_batches),
            # not the row that a collator may have added (VqaCollator.always_image): it has no answer
            sum(int((batch["labels"] != IGNORE).any(dim=1).sum()) for batch in micro_batches),
            self.loader.take_bad(),
            failure is not None,
        ]
        votes, checksums = self.stop.votes(self.engine.rank), self.replicas.values(number)
        self.watchdog.beat(number, "waiting for the other ranks")
        sums = self.engine.sum([*counts, *votes, *checksums])
        previous_loss, answer_tokens, tokens, samples, bad, failed = sums[: len(counts)]
        self._check_data(number, int(bad), failed > 0, failure)
        self.replicas.check(number, sums[len(counts) + len(votes) :])
        self.stop_reason = self.stop.reason(sums[len(counts) :][: len(votes)])
        if previous.step:
            self.health.loss(previous, previous_loss / previous.all_tokens)
        self.watchdog.beat(number, "computing")
        self.data.all_tokens = answer_tokens
        self.step_loss.zero_()
        # The mean over the answer tokens of all ranks and micro-batches. The engine averages gradients over the ranks,
        # hence the factor: a rank with longer answers counts for more, as it would in one process.
        scale = self.engine.dp_world_size / answer_tokens
        for index, batch in enumerate(micro_batches):
            first = first_answer_position(batch["labels"])
            with self.engine.compute():
                loss = answer_loss(self.model, self.engine.to_device(batch), first) * scale
            # A loss that is not finite may have a finite gradient: make it tell, on this rank and so on all.
            finite = torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
            last = index == len(micro_batches) - 1
            self.engine.backward(self.model, loss * finite, last=last, placeholder=_has_placeholder(batch))
            self.step_loss += loss.detach() * (answer_tokens / self.engine.dp_world_size)
        self.tokens += tokens
        self.samples += samples
        grad_norm = self._update()
        self.window.append((self.data.loss, answer_tokens))
        logs = self.config.log
        if number % logs.every == 0:
            self._log(number, grad_norm)
        if self.stepped and logs.layers_every and number % logs.layers_every == 0:
            layer_stats = getattr(self.optimizer, "layer_stats", None)
            if layer_stats is not None and not isinstance(self.optimizer, AdamW):
                self.metrics.write_layers(number, layer_stats())

    def _fetch(self, batches: Iterator[Batch]) -> tuple[list[Batch], Exception | None]:
        """The step's micro-batches, or why there are none: an error here alone would keep the other ranks waiting."""
        began = time.perf_counter()
        try:
            micro_batches = []
            for _ in range(self.config.training.gradient_accumulation):
                micro_batches.append(next(batches))
                self.data.samples += self.loader.batch_samples
        except Exception as error:
            return [], error
        self.waited += time.perf_counter() - began
        return micro_batches, None

    def _check_data(self, number: int, bad: int, failed: bool, failure: Exception | None) -> None:
        """Stop on every rank in the same step, or on none."""
        if failure is not None:
            raise failure
        if failed:
            raise TrainingError(f"step {number}: another rank could not load its batch; its own message says why")
        self.loader.count_bad(bad)

    def _update(self) -> float:
        """Clip, step, zero; returns the gradient norm before clipping."""
        update = self.engine.step(self.optimizer, self.parameters)
        self.data.loss = self.step_loss.item()
        self.stepped = self.stepped or not update.skipped
        self.health.update(self.data, update)
        self.result.skipped_steps = self.skipped_before + self.health.skipped
        return update.grad_norm

    def close_step(self) -> None:
        """After the last step: what would have been agreed on at the beginning of another."""
        votes = self.stop.votes(self.engine.rank)
        loss, *votes = self.engine.sum([self.data.loss, *votes])
        self.stop_reason = self.stop_reason or self.stop.reason(votes)
        self.health.loss(self.data, loss / self.data.all_tokens)

    def _log(self, number: int, grad_norm: float) -> None:
        # No barrier: these sums make the ranks wait for each other, so the time is that of the slowest.
        losses = self.engine.sum([loss for loss, _ in self.window])
        # A step whose loss is not finite was skipped: it says nothing about the steps around it.
        counted = [(loss, tokens) for loss, (_, tokens) in zip(losses, self.window, strict=True) if math.isfinite(loss)]
        seconds = time.perf_counter() - self.since
        figures = {
            "loss": sum(loss for loss, _ in counted) / sum(tokens for _, tokens in counted) if counted else math.nan,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            "samples_per_s": self.samples / seconds,
            "tokens_per_s": self.tokens / seconds,
            "memory_mb": memory_mb(self.engine.device),
            "data_wait_s": self.waited,
            "skipped_steps": self.result.skipped_steps,
            "bad_samples": self.loader.bad,
            **{f"epochs_{name}": count for name, count in self.loader.epochs().items() if len(self.loader.names) > 1},
            "omega_mean": None,
            "conflict_rate": None,
            **(layer_summary(self.optimizer) if self.stepped else {}),
        }
        figures = {name: float(f) if isinstance(f, torch.Tensor) else f for name, f in figures.items()}
        self.metrics.write(number, figures)
        self.result.history.append({"step": number, **figures})
        self._reset()


def _has_placeholder(batch: Batch) -> bool:
    """Whether the last row is the one that ``VqaCollator.always_image`` adds: no sample is without an answer."""
    return not bool((batch["labels"][-1] != IGNORE).any())


def _checkpoint_activations(model: nn.Module) -> None:
    # Transformers renames it in v6. Not re-entrant: that form needs inputs that require gradients, and LoRA has none.
    for name, argument in (
        ("activation_checkpointing_enable", "activation_checkpointing_kwargs"),
        ("gradient_checkpointing_enable", "gradient_checkpointing_kwargs"),
    ):
        if hasattr(model, name):
            getattr(model, name)(**{argument: {"use_reentrant": False}})
            return
    raise TrainingError(f"training.activation_checkpointing: {type(model).__name__} does not support it")


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step * 10_007 + rank) % (2**63)
