"""What launch tests train: the quick-start's tiny model for some steps, and the loss curve of an undisturbed run."""

from __future__ import annotations

import json
from pathlib import Path

from scale_digrap.quickstart import data
from scale_digrap.training.metrics import read_log
from tests.launch.cluster import Running, wait_until

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"
TRAIN_S = 150.0
"""Longest start and run of a few steps; a fifth of it on a quiet machine."""


class Workload:
    """Data, overrides, and what came out.

    Args:
        folder: for the shards.
    """

    def __init__(self, folder: Path) -> None:
        built = data.build(folder / "data", train_samples=128, suite_samples=8)
        self.train, self.suite = built.train, built.suites["id"]
        self._undisturbed: dict[int, list[float]] = {}

    def overrides(self, run_dir: Path, steps: int, *more: str) -> list[str]:
        """``key=value`` for :data:`CONFIG`: global batches of 8 on however many ranks, a checkpoint every two steps."""
        return [
            f"run_dir={run_dir}",
            f"data.train=[{','.join(map(str, self.train))}]",
            f"training.steps={steps}",
            "training.batch_size=4",
            "training.global_batch_size=8",
            "training.device=cpu",
            "training.keep_anchors=false",
            "schedule.warmup_steps=1",
            "checkpoint.every=2",
            "checkpoint.resume=auto",
            "log.layers_every=0",
            *more,
        ]

    def undisturbed(self, steps: int, folder: Path) -> list[float]:
        """The loss of every step of a run of one process, which nothing happens to."""
        if steps not in self._undisturbed:
            from scale_digrap.config import load_config
            from scale_digrap.training import train

            overrides = [*self.overrides(folder / "undisturbed", steps), "checkpoint.every=0", "log.progress=false"]
            train(load_config(CONFIG, overrides))
            self._undisturbed[steps] = losses(folder / "undisturbed")
        return self._undisturbed[steps]


def losses(run_dir: Path) -> list[float]:
    """The loss of every step; a step that is missing or told twice fails."""
    lines = read_log(run_dir / "log.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def steps_done(run_dir: Path) -> int:
    """The last step in the log, 0 without one."""
    log = run_dir / "log.jsonl"
    whole = log.read_text().rpartition("\n")[0].splitlines() if log.is_file() else []
    return json.loads(whole[-1])["step"] if whole else 0


def wait_for_step(run_dir: Path, step: int, runs: list[Running], timeout: float = TRAIN_S) -> None:
    """Until the log has a step; fails when all of the commands have ended before it."""

    def there() -> bool:
        done = steps_done(run_dir) >= step
        assert done or any(run.poll() is None for run in runs), outputs(runs)
        return done

    wait_until(there, timeout, lambda: f"step {step} of {run_dir}, now {steps_done(run_dir)}\n{outputs(runs)}")


def outputs(runs: list[Running]) -> str:
    """What the commands have printed, the ends."""
    return "\n".join(f"--- {run.host.name}, status {run.poll()}\n{run.output()[-6000:]}" for run in runs)
