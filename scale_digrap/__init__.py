"""Robust fine-tuning of vision-language models at scale."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported on first use: `scale-digrap --help` and the data tools must not pay for torch.
_EXPORTS = {
    "AdamFTP": "scale_digrap.optim",
    "AdamL2SP": "scale_digrap.optim",
    "AdamSPD": "scale_digrap.optim",
    "DiGraP": "scale_digrap.optim",
    "LayerStats": "scale_digrap.optim",
}
__all__ = ["AdamFTP", "AdamL2SP", "AdamSPD", "DiGraP", "LayerStats", "__version__"]

if TYPE_CHECKING:
    from scale_digrap.optim import AdamFTP, AdamL2SP, AdamSPD, DiGraP, LayerStats


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
