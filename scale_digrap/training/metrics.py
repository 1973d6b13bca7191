"""What a run tells about itself: JSON lines, a progress bar, TensorBoard, Weights & Biases. Rank 0 writes, alone."""

from __future__ import annotations

import importlib.util
import logging
import math
import resource
import secrets
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from scale_digrap.config import Config
from scale_digrap.errors import RunStopped, ScaleDigrapError
from scale_digrap.optim.telemetry import LayerStats
from scale_digrap.runtime.files import write_whole
from scale_digrap.runtime.logs import LogFile, read_log, reason
from scale_digrap.runtime.text import TextError, finite, read_json, write_json
from scale_digrap.settings import shown

__all__ = ["Metrics", "MetricsError", "check_back_ends", "memory_mb", "read_log"]

log = logging.getLogger(__name__)

LOG, LAYERS = "log.jsonl", "layers.jsonl"
WANDB_RUN = "wandb-run.json"
"""In ``run_dir``: which Weights & Biases run the next start goes on with."""


class MetricsError(ScaleDigrapError):
    """A logging back end that was asked for and is not installed."""


class Writer(Protocol):
    """One place that figures go to."""

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Record the figures of a step."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class JsonLines:
    """``log.jsonl`` or ``layers.jsonl``: one JSON object a line, see :class:`LogFile`."""

    def __init__(self, path: Path, *, keep_until: int) -> None:
        self.file = LogFile(path)
        # A resumed run drops the lines of steps that it is about to repeat.
        self.kept = self.file.begin(keep_until or None)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        self.file.write({"step": step, **figures})

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Scalars for TensorBoard."""

    def __init__(self, folder: Path, *, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an attempt before this one has written of steps that are now to come is hidden.
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        for name, value in figures.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run with the whole configuration, secrets masked; a run that goes on goes on there too."""

    def __init__(self, config: Config, *, start_step: int) -> None:
        import wandb

        path = Path(config.run_dir) / WANDB_RUN
        name = _stored_run(path) if start_step else None
        if name is None:
            name = secrets.token_hex(4)
            try:
                write_whole(path, write_json({"id": name, "project": config.log.wandb_project}) + "\n")
            except OSError as error:
                log.warning("cannot write %s (%s): a start after this one makes a new W&B run", path, reason(error))
        self._run = wandb.init(
            project=config.log.wandb_project,
            dir=config.run_dir,
            config=shown(config),
            id=name,
            resume="allow",  # and not "must": a run that was deleted there is made anew
        )
        self._failed = False

    def write(self, step: int, figures: dict[str, Any]) -> None:
        self._run.log({name: value for name, value in finite(figures).items() if value is not None}, step=step)

    def fail(self) -> None:
        """The run ended with an error: W&B is to show it so."""
        self._failed = True

    def close(self) -> None:
        self._run.finish(**({"exit_code": 1} if self._failed else {}))


def _stored_run(path: Path) -> str | None:
    try:
        stored = read_json(path)
    except TextError:
        return None
    name = stored.get("id") if isinstance(stored, dict) else None
    return name if isinstance(name, str) and name else None


class Progress:
    """A progress bar with loss and speed."""

    def __init__(self, total: int, done: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar.start()
        self._task = self._bar.add_task("train", total=total, completed=done, figures="")

    def write(self, step: int, figures: dict[str, Any]) -> None:
        loss = figures.get("loss")
        text = f"loss {math.nan if loss is None else loss:.3f} · {figures['samples_per_s']:.0f} samples/s"
        if figures.get("omega_mean") is not None:
            text += f" · ω {figures['omega_mean']:.2f}"
        self._bar.update(self._task, completed=step, figures=text)

    def close(self) -> None:
        self._bar.stop()


class _Guarded:
    """A place for figures that belongs to another library. It may fail whenever it likes: that is told once, the lines
    are counted, and the run goes on."""

    def __init__(self, name: str, make: Callable[[], Writer]) -> None:
        self.name, self.lost = name, 0
        self._told = False
        self.writer: Writer | None = None
        self._call(lambda: setattr(self, "writer", make()))

    def write(self, step: int, figures: dict[str, Any]) -> None:
        if self.writer is None or not self._call(lambda: self.writer.write(step, figures)):  # type: ignore[union-attr]
            self.lost += 1

    def fail(self) -> None:
        if self.writer is not None and hasattr(self.writer, "fail"):
            self.writer.fail()

    def close(self) -> None:
        if self.writer is not None:
            self._call(self.writer.close)

    def _call(self, action: Callable[[], Any]) -> bool:
        try:
            action()
        except Exception as error:
            if not self._told:
                self._told = True
                log.warning("%s cannot be written to (%s): the run goes on without it", self.name, reason(error))
            return False
        return True


def check_back_ends(config: Config) -> None:
    """Whether what ``log`` asks for is installed; before any work, on every rank.

    Raises:
        MetricsError: it is not.
    """
    if config.log.tensorboard and not _installed("tensorboard"):
        raise MetricsError("log.tensorboard=true needs TensorBoard: pip install 'scale-digrap[tensorboard]'")
    if config.log.wandb and not _installed("wandb"):
        raise MetricsError("log.wandb=true needs Weights & Biases: pip install 'scale-digrap[wandb]'")


def _installed(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


class Metrics:
    """Sends a step's figures to every place that the configuration asks for; on other ranks than 0, nowhere.

    Nothing that goes wrong with any of them ends the run: it is told once and counted (:meth:`losses`).

    Args:
        config: ``run_dir`` and the ``log`` section.
        rank: only rank 0 writes.
        total_steps: for the progress bar.
        start_step: where the run begins or goes on; earlier lines of the log are kept.

    Raises:
        MetricsError: a back end that is not installed.
    """

    def __init__(self, config: Config, *, rank: int, total_steps: int, start_step: int = 0) -> None:
        self._writers: list[_Guarded] = []
        self._log: JsonLines | None = None
        self._layers: JsonLines | None = None
        self.kept: list[dict[str, Any]] = []
        """The records of earlier starts in ``log.jsonl``, up to ``start_step``."""
        if rank != 0:
            return
        check_back_ends(config)
        folder = Path(config.run_dir)
        self._log = JsonLines(folder / LOG, keep_until=start_step)
        self._layers = JsonLines(folder / LAYERS, keep_until=start_step)
        self.kept = self._log.kept
        if config.log.tensorboard:
            board = folder / "tensorboard"
            self._writers.append(_Guarded("TensorBoard", lambda: TensorBoard(board, start_step=start_step)))
        if config.log.wandb:
            self._writers.append(_Guarded("Weights & Biases", lambda: WeightsAndBiases(config, start_step=start_step)))
        if config.log.progress and sys.stdout.isatty():
            self._writers.append(_Guarded("the progress bar", lambda: Progress(total_steps, start_step)))

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Record one step's figures."""
        if self._log is not None:
            self._log.write(step, figures)
        for writer in self._writers:
            writer.write(step, figures)

    def write_layers(self, step: int, layers: dict[str, LayerStats]) -> None:
        """Record one step's telemetry per layer in ``layers.jsonl``."""
        if self._layers is not None:
            self._layers.write(step, {"layers": {name: asdict(stats) for name, stats in layers.items()}})

    def losses(self) -> dict[str, int]:
        """What the logs lack, for the summary: lines that could not be written, and lines of earlier starts that were
        no records. Empty where they lack nothing."""
        lost = {file.path.name: file.lost for file in self._files() if file.lost}
        lost |= {writer.name: writer.lost for writer in self._writers if writer.lost}
        odd = {file.path.name: file.odd for file in self._files() if file.odd}
        return {f"lost in {name}": count for name, count in lost.items()} | {
            f"odd in {name}": count for name, count in odd.items()
        }

    def _files(self) -> list[LogFile]:
        return [lines.file for lines in (self._log, self._layers) if lines is not None]

    def close(self) -> None:
        """End all writers; :meth:`losses` can still be asked."""
        for writer in [*self._writers, self._log, self._layers]:
            if writer is not None:
                writer.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, RunStopped):
            for writer in self._writers:
                writer.fail()
        self.close()


def memory_mb(device: torch.device) -> float:
    """Peak memory of this process in MiB: what torch allocated on a GPU, the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
