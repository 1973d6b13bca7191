"""The training loop, and the engines behind one small interface."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "TrainResult": "scale_digrap.training.loop",
    "train": "scale_digrap.training.loop",
    "create_engine": "scale_digrap.training.engine",
    "TrainingError": "scale_digrap.training.engine",
}
__all__ = ["TrainResult", "TrainingError", "create_engine", "train"]

if TYPE_CHECKING:
    from scale_digrap.training.engine import TrainingError, create_engine
    from scale_digrap.training.loop import TrainResult, train


def __getattr__(name: str) -> Any:
    # Transformers takes seconds to import: only who trains pays for it.
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
