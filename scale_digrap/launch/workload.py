"""What is to be started: a command of ``scale-digrap``, checked before anything runs, and the folder it writes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scale_digrap.config import config_to_yaml, load_config, validate_for_training
from scale_digrap.errors import ScaleDigrapError

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
    """The whole configuration as YAML; of ``quickstart`` nothing."""


def load_workload(command: str, config: str | Path, overrides: Sequence[str] = ()) -> Workload:
    """Read and check a configuration as ``scale-digrap COMMAND`` would.

    Raises:
        ScaleDigrapError: what the command itself would refuse.
    """
    if command == "quickstart":
        return Workload(command, "", tuple(overrides), _quickstart_folder(overrides), "")
    if command == "evaluate":
        from scale_digrap.evaluation.evaluate_config import evaluate_config_to_yaml, load_evaluate_config

        evaluated = load_evaluate_config(config, list(overrides))
        resolved = evaluate_config_to_yaml(evaluated)
        return Workload(command, str(config), tuple(overrides), Path(evaluated.out), resolved)
    trained = load_config(config, overrides)
    validate_for_training(trained)
    return Workload(command, str(config), tuple(overrides), Path(trained.run_dir), config_to_yaml(trained))


def _quickstart_folder(options: Sequence[str]) -> Path:
    for position, option in enumerate(options):
        name, equals, value = option.partition("=")
        if name == "--output":
            if not equals and position + 1 == len(options):
                raise WorkloadError("--output of the quick-start names no folder")
            return Path(value if equals else options[position + 1])
    return Path("runs/quickstart-smoke" if "--smoke" in options else "runs/quickstart")
