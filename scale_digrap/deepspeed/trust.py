"""DeepSpeed's checkpoint files are pickles, which it reads freely: here they may hold what it writes, and nothing else.

Run as a program, it is DeepSpeed's converter under the same rule.
"""

from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from scale_digrap.deepspeed.support import DeepSpeedError
from scale_digrap.runtime.text import printable

_UNSUPPORTED = re.compile(r"\bGLOBAL ([\w.]+)")  # in torch's words


def load_plain(path: Any, *, map_location: Any = "cpu", **options: Any) -> Any:
    """``torch.load`` of one of DeepSpeed's files: tensors, plain values and its few own classes.

    Raises:
        DeepSpeedError: the file names anything else, which is not run, or is damaged.
    """
    options.pop("pickle_module", None)
    options["weights_only"] = True
    try:
        with torch.serialization.safe_globals(_classes()):
            return _torch_load()(path, map_location=map_location, **options)
    except pickle.UnpicklingError as error:
        found = _UNSUPPORTED.search(str(error))
        what = f"it calls {found[1]!r}, which does not belong into such a file" if found else "it is damaged"
        raise DeepSpeedError(
            f"{printable(str(path))} is not safe to read: {what}. Nothing of it was run. Classes of your own in "
            "client_state are allowed with torch.serialization.add_safe_globals([...])"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise DeepSpeedError(f"{printable(str(path))} is damaged: {' '.join(str(error).split())[:200]}") from error


@contextmanager
def only_plain_pickles() -> Iterator[None]:
    """Within the block, whatever DeepSpeed reads with ``torch.load`` goes through :func:`load_plain`."""
    original = torch.load

    @functools.wraps(original)
    def guarded(path: Any, map_location: Any = None, *_: Any, **options: Any) -> Any:
        return load_plain(path, map_location=map_location, **options)

    guarded.original = original  # type: ignore[attr-defined]
    torch.load = guarded  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = original


def _torch_load() -> Any:
    return getattr(torch.load, "original", torch.load)


def _classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def main() -> None:
    """``python -m scale_digrap.deepspeed.trust …``: DeepSpeed's ``ds_to_universal`` with the same arguments."""
    from deepspeed.checkpoint import ds_to_universal

    with only_plain_pickles():  # its worker processes are forks
        ds_to_universal.main(ds_to_universal.parse_arguments())


if __name__ == "__main__":
    main()
