"""What is to be started: a command of ``scale-digrap``, checked before anything runs, and the folder it writes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scale_digrap.config import load_config, validate_for_training
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.runtime.text import home, unfit
from scale_digrap.settings import complete, to_yaml

COMMANDS = ("train", "evaluate", "quickstart")


class WorkloadError(ScaleDigrapError):
    """A command that cannot be started as it was given."""


@dataclass(frozen=True)
class Workload:
    """A command and its arguments."""

    command: str
    """One of ``COMMANDS``."""

    config: str
    """YAML file; of ``quickstart`` nothing."""

    overrides: tuple[str, ...]
    """``key=value``; of ``quickstart`` its options."""

    run_dir: Path
    """Where it leaves logs, checkpoints or results, and ``DONE``."""

    resolved: str
    """The whole configuration as YAML, secrets included: for files of mode 0600 only. Of ``quickstart`` nothing."""

    steps: int | None = None
    """Optimizer steps of ``train``, where the configuration names their number."""


def load_workload(command: str, config: str | Path, overrides: Sequence[str] = ()) -> Workload:
    """Read and check a configuration as ``scale-digrap COMMAND`` would.

    Raises:
        ScaleDigrapError: what the command itself would refuse.
    """
    workload = _load(command, home(str(config)), overrides)
    for what, value in (("the path of the configuration", workload.config), ("its folder", str(workload.run_dir))):
        if (found := unfit(value)) is not None:
            raise WorkloadError(f"{what} holds {found}, which no script can carry: {value!r}")
    return workload


def _load(command: str, config: str, overrides: Sequence[str]) -> Workload:
    if command == "quickstart":
        return Workload(command, "", tuple(overrides), _quickstart_folder(overrides), "")
    if command == "evaluate":
        from scale_digrap.evaluation.evaluate_config import load_evaluate_config

        evaluated = load_evaluate_config(config, list(overrides))
        return Workload(command, config, tuple(overrides), Path(evaluated.out), to_yaml(complete(evaluated)))
    trained = load_config(config, overrides)
    validate_for_training(trained)
    resolved = to_yaml(complete(trained))
    return Workload(command, config, tuple(overrides), Path(trained.run_dir), resolved, steps=trained.training.steps)


def _quickstart_folder(options: Sequence[str]) -> Path:
    for position, option in enumerate(options):
        name, equals, value = option.partition("=")
        if name == "--output":
            if not equals and position + 1 == len(options):
                raise WorkloadError("--output of the quick-start names no folder")
            return Path(home(value if equals else options[position + 1]))
    return Path("runs/quickstart-smoke" if "--smoke" in options else "runs/quickstart")
