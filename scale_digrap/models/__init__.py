"""A Hugging Face checkpoint → model, processor, collator, and which layers have anchors."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "LoadedModel": "scale_digrap.models.loading",
    "load_model": "scale_digrap.models.loading",
    "load_processor": "scale_digrap.models.loading",
    "template_of": "scale_digrap.models.loading",
    "PromptTemplate": "scale_digrap.models.collate",
    "VqaCollator": "scale_digrap.models.collate",
}
__all__ = ["LoadedModel", "PromptTemplate", "VqaCollator", "load_model", "load_processor", "template_of"]

if TYPE_CHECKING:
    from scale_digrap.models.collate import PromptTemplate, VqaCollator
    from scale_digrap.models.loading import LoadedModel, load_model, load_processor, template_of


def __getattr__(name: str) -> Any:
    # Transformers takes seconds to import: only who uses a name pays for it.
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
