"""Steps that went wrong: those that were skipped, and those whose loss leapt; with the samples that were in them."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from scale_digrap.config import Config
from scale_digrap.runtime.logs import LogFile
from scale_digrap.runtime.text import finite, write_json
from scale_digrap.training.engine import Engine, TrainingError, Update

log = logging.getLogger(__name__)

BAD_STEPS = "bad_steps.jsonl"
SPIKES = "loss_spikes.jsonl"
_MIN_HISTORY = 20  # losses before the first that can be a spike
_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_LEAST_SIGMA = 0.01  # of the median: a loss that hardly moves has no spread to measure by
_MAX_NAMED = 5


class BadStepsError(TrainingError):
    """Too many steps in a row had a gradient that was not finite."""

    exit_status = 3


@dataclass
class StepData:
    """What one rank put into one step.

    Attributes:
        step: its number.
        samples: (shard, key) of every sample.
        loss: sum over this rank's answer tokens.
        tokens: this rank's answer tokens.
        all_tokens: those of all ranks.
    """

    step: int
    samples: list[tuple[str, str]] = field(default_factory=list)
    loss: float = 0.0
    tokens: int = 0
    all_tokens: float = 0.0

    def report(self, rank: int) -> dict[str, Any]:
        """For the files: this rank's mean loss and samples."""
        loss = self.loss / self.tokens if self.tokens else 0.0
        return {"rank": rank, "loss": _number(loss), "samples": [list(sample) for sample in self.samples]}


class SpikeDetector:
    """Which losses stand out from those just before them.

    A loss is a spike if it is more than ``threshold`` standard deviations above the median of the last ``window``
    ones; the deviation is estimated from their median absolute deviation, so that earlier spikes do not hide later
    ones.

    Args:
        threshold: standard deviations; 0 finds nothing.
        window: losses to look back on.
    """

    def __init__(self, threshold: float, window: int) -> None:
        self._threshold = threshold
        self._losses: deque[float] = deque(maxlen=window)

    def add(self, loss: float) -> float | None:
        """The median of the losses before, if this one is a spike. A loss that is not finite is left out."""
        if not self._threshold or not math.isfinite(loss):
            return None
        median = None
        if len(self._losses) >= min(_MIN_HISTORY, self._losses.maxlen or 0):
            median = statistics.median(self._losses)
            deviation = statistics.median(abs(other - median) for other in self._losses)
            sigma = max(_MAD_TO_SIGMA * deviation, _LEAST_SIGMA * abs(median))
            if loss <= median + self._threshold * sigma:
                median = None
        self._losses.append(loss)
        return median


class Health:
    """Counts skipped steps, ends a run of nothing else, and writes ``bad_steps.jsonl`` and ``loss_spikes.jsonl``.

    Rank 0 writes; the samples come from all ranks, by a collective in the bad step alone.

    Args:
        config: ``training.max_skipped_steps``, ``spike_threshold``, ``spike_window``; ``run_dir``.
        engine: this rank among all.
        layers: names of the trained parameters, in the order of :attr:`Update.layer_norms`.
    """

    def __init__(self, config: Config, engine: Engine, layers: Sequence[str]) -> None:
        self._engine, self._layers = engine, list(layers)
        self._max_skipped = config.training.max_skipped_steps
        self._folder = Path(config.run_dir)
        self._files: dict[str, LogFile] = {}
        self._spikes = SpikeDetector(config.training.spike_threshold, config.training.spike_window)
        self.skipped = 0
        """Steps of this process that were skipped."""
        self.in_a_row = 0
        """The last so many steps were skipped."""

    @property
    def too_many(self) -> bool:
        """Whether to end the run."""
        return self.in_a_row >= self._max_skipped

    def update(self, data: StepData, update: Update) -> None:
        """Take note of what became of a step; the same ``update.skipped`` on all ranks."""
        if not update.skipped:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        norms = dict(zip(self._layers, map(_number, update.layer_norms), strict=False))
        bad = [name for name, norm in norms.items() if not isinstance(norm, float)]
        ranks = self._engine.gather(data.report(self._engine.rank))
        entry = {"step": data.step, "in_a_row": self.in_a_row, "ranks": ranks, "not_finite": bad, "grad_norms": norms}
        self._write(BAD_STEPS, entry)
        if self._engine.rank == 0:
            losses = [f"rank {told['rank']}" for told in ranks if not isinstance(told["loss"], float)]
            log.warning(
                "step %d was skipped on all ranks (%d in a row): its gradient was not finite in %s; loss not finite on "
                "%s; samples in %s",
                data.step, self.in_a_row, _few(bad) or "some layer", _few(losses) or "no rank", BAD_STEPS,
            )  # fmt: skip

    def error(self, step: int, checkpoint: Path | None) -> BadStepsError:
        """What to raise when there were :attr:`too_many`."""
        good = "there is no checkpoint from before" if checkpoint is None else f"the last good checkpoint: {checkpoint}"
        return BadStepsError(
            f"the gradient was not finite in {self.in_a_row} steps in a row, up to step {step}: their samples and the "
            f"norms of their layers are in {self._folder / BAD_STEPS}; {good}. Lower optimizer.lr, set "
            f"training.clip_norm, or use training.precision=fp32"
        )

    def loss(self, data: StepData, loss: float) -> None:
        """Look at a step's mean loss over all ranks; the same on all ranks."""
        median = self._spikes.add(loss)
        if median is None:
            return
        ranks = self._engine.gather(data.report(self._engine.rank))
        self._write(SPIKES, {"step": data.step, "loss": loss, "median": median, "ranks": ranks})
        if self._engine.rank == 0:
            log.warning(
                "loss %.4g in step %d, after a median of %.4g: its samples are in %s", loss, data.step, median, SPIKES
            )

    def _write(self, name: str, entry: dict[str, Any]) -> None:
        # Appended to over all attempts of a run: what a step held is wanted most after the run was started again.
        if self._engine.rank != 0:
            return
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        file = self._files.setdefault(name, LogFile(self._folder / name, "record of such steps"))
        lost = file.lost
        file.write({**entry, "time": time})
        file.close()
        if file.lost > lost:  # it is wanted most when something is wrong
            log.warning("the line of %s that could not be written: %s", name, write_json(finite(entry)))

    def losses(self) -> dict[str, int]:
        """Records that could not be written, by file."""
        return {f"lost in {name}": file.lost for name, file in self._files.items() if file.lost}


def _number(value: float) -> float | str:
    """JSON has no NaN and no infinity: their names."""
    return float(value) if math.isfinite(value) else str(float(value))


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
