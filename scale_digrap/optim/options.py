"""What the optimizers' constructors and parameter groups accept, refuse, and carry along."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from scale_digrap.bounds import OPTION_BOUNDS

logger = logging.getLogger(__name__)

# Keywords of torch.optim.AdamW that choose among equal kernels: whatever they say, the update is the same.
_KERNELS = ("foreach", "fused")
# Keywords that change what is computed, with the one value that is meant here.
_VARIANTS = {
    "amsgrad": False,
    "maximize": False,
    "capturable": False,
    "differentiable": False,
    "decoupled_weight_decay": True,
}
# How close an unknown key of a group must be to an option to be taken for a slip of the pen.
_SLIP = 0.84
# As torch's optimizers name them in the same complaint.
_SPOKEN = {"lr": "learning rate", "eps": "epsilon value", "weight_decay": "weight_decay value"}


def check_keywords(method: str, known: Collection[str], given: Mapping[str, Any]) -> None:
    """Look at keywords that an optimizer's constructor does not name.

    Args:
        method: the optimizer's class.
        known: its options.
        given: the keywords.

    Raises:
        TypeError: an unknown keyword.
        ValueError: one of ``torch.optim.AdamW`` that asks for something this optimizer does not do.
    """
    for key, value in given.items():
        if key not in _KERNELS and key not in _VARIANTS:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{method}.__init__() got an unexpected keyword argument {key!r}{hint}")
        _check_torch_option(method, key, value)


def _check_torch_option(method: str, key: str, value: Any) -> None:
    allowed: tuple = (None, True, False) if key in _KERNELS else (_VARIANTS[key],)
    if not any(value is choice for choice in allowed):
        raise ValueError(
            f"{method} does not support {key}={value!r}: leave it out or use {' or '.join(map(repr, allowed))}"
        )


def check_foreign_keys(method: str, known: Collection[str], group: Mapping[str, Any], quiet: Collection[str]) -> None:
    """Look at keys of a parameter group that are no options: they are kept, saved, and not used.

    Args:
        method: the optimizer's class.
        known: its options.
        group: the group.
        quiet: keys of which nothing need be said.

    Raises:
        ValueError: a key that looks like a misspelt option, or asks for something this optimizer does not do.
    """
    kept = []
    for key in group:
        if key in known or key in quiet:
            continue
        if key in _KERNELS or key in _VARIANTS:
            _check_torch_option(method, key, group[key])
            continue
        near = difflib.get_close_matches(str(key), known, 1, _SLIP)
        if near:
            raise ValueError(f"unknown option {key!r} in a parameter group; did you mean {near[0]!r}?")
        kept.append(key)
    if kept:
        logger.info("%s keeps the keys %s of a parameter group and does not use them", method, ", ".join(kept))


def check_numbers(group: Mapping[str, Any]) -> None:
    """Check every number among a group's options against :data:`scale_digrap.bounds.OPTION_BOUNDS`.

    Raises:
        ValueError: no number, or out of bounds; a tensor of several elements.
    """
    for key, bound in OPTION_BOUNDS.items():
        if key not in group:
            continue
        value = group[key]
        if not key.endswith("betas"):
            if not bound.holds(_number(key, value)):
                raise ValueError(f"Invalid {_SPOKEN.get(key, key)}: {value} ({bound})")
            continue
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise ValueError(f"Invalid {key}: {value!r} (must be a pair of numbers)")
        for index, beta in enumerate(value):
            if not bound.holds(_number(f"{key}[{index}]", beta)):
                raise ValueError(f"Invalid {key}[{index}]: {beta} ({bound})")


def _number(key: str, value: Any) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {key} must be 1-element, got shape {tuple(value.shape)}")
    elif not isinstance(value, Real):
        raise ValueError(f"Invalid {_SPOKEN.get(key, key)}: {value!r} (must be a number, not {type(value).__name__})")
    return float(value)
