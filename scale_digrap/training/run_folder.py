"""Finding checkpoints in a run's folder. Imports no torch: ``scale-digrap checkpoint list`` answers at once."""

from __future__ import annotations

from pathlib import Path

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.training import manifest

CHECKPOINTS, STATE, META = "checkpoints", "state", "trainer.json"
"""In a run's folder; in a checkpoint's."""


class RunFolderError(ScaleDigrapError):
    """A folder that does not hold the checkpoint that is asked for."""


def checkpoints(run: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of a run's checkpoints, oldest first; not yet verified.

    Raises:
        RunFolderError: no such folder, or no checkpoint in it.
    """
    run = Path(run)
    if not run.is_dir():
        raise RunFolderError(f"no such run: {run} is no folder")
    found = manifest.checkpoints(run / CHECKPOINTS)
    if not found:
        raise RunFolderError(
            f"{run} holds no checkpoint in {CHECKPOINTS}/step-N: name the run_dir of a run with checkpoint.every > 0"
        )
    return found


def find(run: str | Path, step: int | None = None) -> Path:
    """The folder of one checkpoint, the newest by default; not yet verified.

    Raises:
        RunFolderError: as :func:`checkpoints`; no checkpoint of that step.
    """
    found = checkpoints(run)
    if step is None:
        return found[-1][1]
    if step not in dict(found):
        steps = ", ".join(str(number) for number, _ in found)
        raise RunFolderError(f"{run} holds no checkpoint of step {step}: there are those of {steps}")
    return dict(found)[step]


def unfinished(run: str | Path) -> list[Path]:
    """What a kill has left behind: folders that were never renamed to ``step-N``, or moved aside and not replaced."""
    folder = Path(run) / CHECKPOINTS
    return sorted(path for path in folder.glob("step-*") if path.suffix in (".tmp", ".old")) if folder.is_dir() else []


def whole(run: str | Path, step: int | None = None) -> Path:
    """As :func:`find`, with every file's checksum verified, which reads all of the checkpoint.

    Raises:
        RunFolderError: as :func:`find`; files that are missing, damaged or too many. The newest whole one is named.
    """
    path = find(run, step)
    wrong = manifest.problems(path)
    if not wrong:
        return path
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    others = [number for number, other in checkpoints(run) if other != path and not manifest.problems(other)]
    advice = (
        f"the newest whole one is that of step {others[-1]}" if others else "no other checkpoint of the run is whole"
    )
    raise RunFolderError(f"{path} is not whole: {wrong[0]}{more}; {advice}")
