"""What launch tests train: the quick-start's tiny model for some steps, and the loss curve of an undisturbed run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from scale_digrap.quickstart import data
from scale_digrap.training.metrics import read_log
from tests.launch.cluster import Host, Running, wait_until

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"
STEPS = 16
TRAIN_S = 400.0
"""Longest start and run of a few steps; a twentieth of it on a quiet machine."""
QUICK_RENDEZVOUS = (
    "join_timeout=300,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=5,close_timeout=5,"
    "read_timeout=30"
)
"""torchrun's waits, short: so that a test is about what happens and not about when."""


class Workload:
    """Data, overrides, and what came out.

    Args:
        folder: for the shards.
    """

    def __init__(self, folder: Path) -> None:
        built = data.build(folder / "data", train_samples=128, suite_samples=8)
        self.train, self.suite = built.train, built.suites["id"]
        self._folder = folder
        self.suites = folder / "data" / "suites"
        self._undisturbed: list[float] | None = None

    def overrides(self, run_dir: Path, *more: str) -> list[str]:
        """``key=value`` for :data:`CONFIG`: global batches of 8 on any number of ranks, a checkpoint every 4 steps."""
        return [
            f"run_dir={run_dir}",
            f"data.train=[{','.join(map(str, self.train))}]",
            f"training.steps={STEPS}",
            "training.batch_size=4",
            "training.global_batch_size=8",
            "training.device=cpu",
            "training.keep_anchors=false",
            "schedule.warmup_steps=1",
            "checkpoint.every=4",
            "checkpoint.resume=auto",
            "log.layers_every=0",
            *more,
        ]

    def check(self, run_dir: Path) -> None:
        """The run is done, and its loss curve is that of a run of one process which nothing happened to.

        Restarts lose and repeat nothing; what is left is the rounding of sums over other numbers of ranks.
        """
        assert (run_dir / "DONE").is_file()
        assert not (run_dir / "STOPPED").exists()
        assert losses(run_dir) == pytest.approx(self._of_one_process(), rel=1e-3, abs=1e-4)

    def _of_one_process(self) -> list[float]:
        if self._undisturbed is None:
            from scale_digrap.config import load_config
            from scale_digrap.training import train

            folder = self._folder / "undisturbed"
            overrides = [*self.overrides(folder), "checkpoint.every=0", "log.progress=false"]
            train(load_config(CONFIG, overrides))
            self._undisturbed = losses(folder)
            assert len(self._undisturbed) == STEPS
        return self._undisturbed


def torchrun(hosts: Sequence[Host], overrides: Sequence[str], config: Path = CONFIG, **settings: str) -> list[Running]:
    """``launch/torchrun.sh`` with one rank on each of some hosts, which meet at the first."""
    environment = {
        "NODES": str(len(hosts)),
        "HOST0": hosts[0].name,
        "PORT": "22000",
        "PROCESSES": "1",
        "RUN_NAME": "test",
        "RESTARTS": "0",
        "RDZV_CONF": QUICK_RENDEZVOUS,
        **settings,
    }
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), str(config), *overrides]
    return [host.popen(command, environment) for host in hosts]


def ranks(host: Host) -> list[int]:
    """Process ids of the ranks that train on a host."""
    found = []
    for pid in host.processes("-m scale_digrap"):
        with contextlib.suppress(OSError):
            if any(line.startswith(b"RANK=") for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                found.append(pid)
    return found


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
