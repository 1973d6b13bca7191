"""What a run tells about itself: JSON lines, a progress bar, TensorBoard, Weights & Biases. Rank 0 writes, alone."""

from __future__ import annotations

import json
import math
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

from scale_digrap.config import Config
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.optim.telemetry import LayerStats
from scale_digrap.settings import shown


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
    """One JSON object a line, flushed line by line: a killed run keeps what it wrote."""

    def __init__(self, path: Path, *, keep_below: int | None) -> None:
        # A resumed run drops the lines of steps that it is about to repeat.
        kept = _lines_up_to(path, keep_below) if keep_below is not None else []
        self._file: TextIO = path.open("w", encoding="utf-8")
        self._file.writelines(kept)
        self._file.flush()

    def write(self, step: int, figures: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **_plain(figures)}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MetricsError(
                "log.tensorboard=true needs TensorBoard: pip install 'scale-digrap[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(folder))

    def write(self, step: int, figures: dict[str, Any]) -> None:
        for name, value in figures.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run with the whole configuration."""

    def __init__(self, config: Config) -> None:
        try:
            import wandb
        except ImportError:
            raise MetricsError("log.wandb=true needs Weights & Biases: pip install 'scale-digrap[wandb]'") from None
        self._run = wandb.init(project=config.log.wandb_project, dir=config.run_dir, config=shown(config))

    def write(self, step: int, figures: dict[str, Any]) -> None:
        self._run.log({name: value for name, value in figures.items() if value is not None}, step=step)

    def close(self) -> None:
        self._run.finish()


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
        text = f"loss {figures['loss']:.3f} · {figures['samples_per_s']:.0f} samples/s"
        if figures.get("omega_mean") is not None:
            text += f" · ω {figures['omega_mean']:.2f}"
        self._bar.update(self._task, completed=step, figures=text)

    def close(self) -> None:
        self._bar.stop()


class Metrics:
    """Sends a step's figures to every place that the configuration asks for; on other ranks than 0, nowhere.

    Args:
        config: ``run_dir`` and the ``log`` section.
        rank: only rank 0 writes.
        total_steps: for the progress bar.
        start_step: where the run begins or goes on; earlier lines of the log are kept.
    """

    def __init__(self, config: Config, *, rank: int, total_steps: int, start_step: int = 0) -> None:
        self._writers: list[Writer] = []
        self._layers: JsonLines | None = None
        if rank != 0:
            return
        folder = Path(config.run_dir)
        if config.log.tensorboard:
            self._writers.append(TensorBoard(folder / "tensorboard"))
        if config.log.wandb:
            self._writers.append(WeightsAndBiases(config))
        self._writers.append(JsonLines(folder / "log.jsonl", keep_below=start_step or None))
        self._layers = JsonLines(folder / "layers.jsonl", keep_below=start_step or None)
        if config.log.progress and sys.stdout.isatty():
            self._writers.append(Progress(total_steps, start_step))

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Record one step's figures."""
        for writer in self._writers:
            writer.write(step, figures)

    def write_layers(self, step: int, layers: dict[str, LayerStats]) -> None:
        """Record one step's telemetry per layer in ``layers.jsonl``."""
        if self._layers is not None:
            self._layers.write(step, {"layers": {name: asdict(stats) for name, stats in layers.items()}})

    def close(self) -> None:
        """End all writers."""
        for writer in [*self._writers, *([self._layers] if self._layers else [])]:
            writer.close()
        self._writers, self._layers = [], None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def memory_mb(device: torch.device) -> float:
    """Peak memory of this process in MiB: what torch allocated on a GPU, the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``log.jsonl`` or ``layers.jsonl``."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _lines_up_to(path: Path, step: int) -> list[str]:
    """Whole lines of steps up to ``step``; a last line that was cut off by a kill is left out."""
    kept = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["step"] <= step:
                kept.append(line + "\n")
    return kept


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
