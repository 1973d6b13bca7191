"""Pickles of a folder that is not trusted, read without torch: known classes become plain records, and nothing runs.

Unpickling calls whatever the file names. Here the file may only name what a list allows, and what it names is never
looked up: in its place stands an inert class that is made for this one reading and keeps arguments and state.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Collection
from typing import Any

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.runtime.text import one_line, printable


class PickleError(ScaleDigrapError):
    """A pickle that is damaged, or that names something other than what belongs into such a file."""


class Record:
    """Stands for an object of a class that a pickle names.

    Attributes:
        kind: the class, ``module.name``.
        args: what it is called with.
        state: what it is filled with; ``None`` where there is none.
    """

    __slots__ = ("args", "state")
    kind = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Record:
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __init__(self, *args: Any) -> None:
        """Arguments are kept by ``__new__``, the only one of the two that every opcode calls."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def load(data: bytes, name: str, allowed: Callable[[str, str], bool]) -> Any:
    """The value of a pickle: plain Python values, and a :class:`Record` for every object.

    Args:
        data: the pickle.
        name: what it is, for the error.
        allowed: whether a global (module, name) belongs into this kind of file. Dotted names are never allowed.

    Raises:
        PickleError: not a pickle, or one that names something else.
    """
    try:
        return _Unpickler(data, name, allowed).load()
    except PickleError:
        raise
    except Exception as error:  # whatever a damaged or hostile stream provokes in the unpickler
        raise PickleError(f"{name} is damaged: {one_line(error)}") from None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, name: str, allowed: Callable[[str, str], bool]) -> None:
        super().__init__(io.BytesIO(data))
        self._name, self._allowed = name, allowed
        self._stand_ins: dict[tuple[str, str], type[Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if not isinstance(module, str) or not isinstance(name, str) or "." in name or not self._allowed(module, name):
            raise PickleError(
                f"{self._name} is not safe to read: it is a pickle that calls {printable(f'{module}.{name}')!r}, which "
                "does not belong into such a file. Nothing of it was run; do not trust where it comes from"
            )
        key = (module, name)
        if key not in self._stand_ins:
            self._stand_ins[key] = type(name, (Record,), {"kind": f"{module}.{name}", "__slots__": ()})
        return self._stand_ins[key]

    def persistent_load(self, key: Any) -> Any:
        return None  # a tensor's storage: its values are not part of the pickle


DTYPES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex128": 16, "complex64": 8, "int64": 8, "int32": 4,
    "int16": 2, "int8": 1, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1, "float8_e4m3fn": 1,
    "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
}  # fmt: skip
"""Torch's dtypes that a checkpoint may hold, and bytes of an element."""

_TENSOR_PARTS = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch", "Tensor"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.serialization", "_get_layout"),
    ("torch.storage", "UntypedStorage"),
}


def check_saved_tensor(data: bytes, name: str, more: Collection[tuple[str, str]] = ()) -> None:
    """Refuse the pickle inside a ``torch.save`` archive that names anything but parts of tensors.

    Args:
        data: the archive's ``data.pkl``.
        name: what it is, for the error.
        more: further (module, name) pairs.

    Raises:
        PickleError: it is damaged or names something else.
    """
    load(data, name, lambda module, key: is_tensor_part(module, key) or (module, key) in more)


def is_tensor_part(module: str, name: str) -> bool:
    """Whether ``torch.save`` of tensors and plain values may name this global."""
    return (module, name) in _TENSOR_PARTS or (module == "torch" and (name in DTYPES or name.endswith("Storage")))
