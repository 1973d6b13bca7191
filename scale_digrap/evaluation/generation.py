"""`model.generate` on any model: which settings it gets, and what a sharded model needs around it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from scale_digrap.evaluation.signals import EvaluationError
from scale_digrap.evaluation.wise import reshard
from scale_digrap.sharding.zero3 import is_partitioned

_OWN = ("synced_gpus", "return_dict_in_generate", "num_return_sequences", "output_scores", "output_logits")


def generation_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for `generate`: greedy decoding, changed as asked.

    Args:
        values: fields of Transformers' `GenerationConfig`.

    Raises:
        EvaluationError: a setting that does not exist, belongs to the runner, or has a value that Transformers refuses.
    """
    known = [name for name in vars(GenerationConfig()) if not name.startswith("_") and name != "transformers_version"]
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": 16, **values}
    for name in values:
        if name in _OWN:
            raise EvaluationError(f"generation.{name} is the runner's own: remove it")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise EvaluationError(
                f"generation.{name} is no setting of Transformers' GenerationConfig"
                f"{f' (did you mean {near[0]!r}?)' if near else ''}"
            )
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it says the same twice, as a warning and as the error
    try:
        GenerationConfig(**settings).validate(strict=True)
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"generation: {' '.join(str(error).split())}") from None
    finally:
        transformers_logging.set_verbosity(level)
    return settings


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold parts of the parameters, by FSDP2 or ZeRO-3."""
    return any(isinstance(p, DTensor) or is_partitioned(p) for p in model.parameters())


@contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, ready for `generate`; each module is in its own mode again afterwards."""
    with _eval_mode(model), _fsdp_generation(model), torch.no_grad():
        yield


@contextmanager
def _fsdp_generation(model: nn.Module) -> Iterator[None]:
    """Let FSDP2 gather its root unit for the whole of `generate`, not only for the forward passes in it.

    `generate` runs the vision tower before its first forward pass of the model, and peft's `generate` calls the forward
    of the model inside the root unit: neither would trigger the root's hooks.
    """
    units = [
        module
        for module in model.modules()
        if isinstance(module, FSDPModule) and callable(getattr(module, "generate", None))
    ]
    fresh = [module for module in units if "generate" not in vars(module)]
    for module in fresh:
        register_fsdp_forward_method(module, "generate")
    try:
        yield
    finally:
        for module in fresh:
            del module.generate


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off; afterwards each module in its own mode again, frozen parts included, and the shards in place."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        reshard(model)
        for module, training in modes:
            module.training = training
