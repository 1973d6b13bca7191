"""The loss of an answer, without logits for the prompt."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from scale_digrap.models.collate import IGNORE


def answer_loss(model: nn.Module, batch: dict[str, torch.Tensor], first: int) -> torch.Tensor:
    """Summed negative log-likelihood of all answer tokens of a batch.

    Args:
        model: returns ``.logits``.
        batch: ``VqaCollator.train``'s, on the model's device; not changed.
        first: :func:`first_answer_position` of the batch (asked for before the transfer: it would wait for the GPU).

    Returns:
        0-d float32. A sum, because the mean is over the answer tokens of all ranks and micro-batches.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"][:, first:]
    # Logits before the first answer position are not needed, and with a vocabulary of 257k they are most of the memory.
    keep = labels.shape[1] + 1
    if _keeps_logits(model):
        logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, -keep:]
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )


def first_answer_position(labels: torch.Tensor) -> int:
    """The smallest position [of a right-padded batch] at which any sample has an answer token; at least 1."""
    return int((labels != IGNORE).any(dim=0).nonzero()[0])


def _keeps_logits(model: nn.Module) -> bool:
    base: Any = model
    if hasattr(base, "get_base_model"):  # peft's wrapper takes anything and hands it on
        base = base.get_base_model()
    return "logits_to_keep" in inspect.signature(base.forward).parameters
