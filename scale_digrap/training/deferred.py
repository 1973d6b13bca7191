"""Tensors whose values are read when they are written, so that a model is exported without ever being in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map


class Deferred(Tensor):
    """A tensor on the meta device that knows how to get its values.

    ``save_pretrained`` renames, drops tied weights, converts and divides into files by shape and name alone, and calls
    ``contiguous`` on the tensors of one file right before it writes that file: only then are they read. What a
    conversion computes from such a tensor is one too. (A conversion that itself calls ``contiguous``, which some do
    that transpose, has its result at once.)

    Args:
        like: shape and dtype, on the meta device.
        read: returns the values, of that shape and dtype.
    """

    read: Callable[[], Tensor]

    @staticmethod
    def __new__(cls: Any, like: Tensor, read: Callable[[], Tensor]) -> Deferred:
        deferred: Deferred = Tensor._make_subclass(cls, like.detach())
        deferred.read = read
        return deferred

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        with torch._C.DisableTorchFunctionSubclass():
            if function is Tensor.contiguous or any(value.device.type != "meta" for value in inputs):
                return function(*tree_map(_value, args), **tree_map(_value, kwargs))
            result = function(*args, **kwargs)
        if isinstance(result, Tensor):
            return cls(result, lambda: _run(function, args, kwargs))
        if isinstance(result, (tuple, list)) and result and all(isinstance(part, Tensor) for part in result):
            parts = _Parts(function, args, kwargs)
            return type(result)(cls(part, parts.reader(index)) for index, part in enumerate(result))
        return result


class _Parts:
    """The results of one operation with several: computed once, and kept until each has been taken."""

    def __init__(self, function: Any, args: Any, kwargs: Any) -> None:
        self._call = (function, args, kwargs)
        self._parts: dict[int, Tensor] = {}

    def reader(self, index: int) -> Callable[[], Tensor]:
        def read() -> Tensor:
            if index not in self._parts:
                self._parts = dict(enumerate(_run(*self._call)))
            return self._parts.pop(index).clone()  # a view of what the others are views of cannot be written

        return read


def _run(function: Any, args: Any, kwargs: Any) -> Any:
    with torch.no_grad():
        return function(*tree_map(_value, args), **tree_map(_value, kwargs))


def _value(argument: Any) -> Any:
    return argument.read() if isinstance(argument, Deferred) else argument
