"""Checkpoints to go on from, on any number of ranks, and the final model for everybody else.

A checkpoint is written to ``step-N.tmp`` and renamed when every rank has finished: ``step-N`` is whole or not there.
It holds what is trained; frozen weights come from the base checkpoint again. There is no generator state in it: the
randomness of a step depends on (seed, step, rank) alone.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoModelForImageTextToText

from scale_digrap.data.loader import TrainLoader
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.models.loading import LoadedModel, quiet
from scale_digrap.training.engine import Engine

_STEP = re.compile(r"step-(\d+)")
_META = "trainer.json"
_TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


class CheckpointError(ScaleDigrapError):
    """A checkpoint that cannot be written or read."""


@dataclass(frozen=True)
class RunState:
    """The small part of a checkpoint, the same on all ranks: ``trainer.json``."""

    step: int
    loader: dict[str, Any]
    scheduler: dict[str, Any]
    optimizer: str
    samples: int


def completed(folder: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints in a folder, oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else []:
        match = _STEP.fullmatch(path.name)  # fullmatch: step-12.tmp is not a checkpoint
        if match and (path / _META).is_file() and (path / ".metadata").is_file():
            found.append((int(match.group(1)), path))
    return sorted(found)


def find(folder: Path, resume: str) -> Path | None:
    """The checkpoint that ``checkpoint.resume`` means; None to start afresh.

    Raises:
        CheckpointError: an explicit path that is no checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        checkpoints = completed(folder)
        return checkpoints[-1][1] if checkpoints else None
    path = Path(resume)
    if not (path / _META).is_file() or not (path / ".metadata").is_file():
        raise CheckpointError(f"checkpoint.resume={resume!r} is no whole checkpoint (no {_META} or no .metadata in it)")
    return path


def save(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    loader: TrainLoader,
    engine: Engine,
    keep: int,
) -> Path:
    """Write ``folder/step-N`` from all ranks and delete all but the newest ``keep``.

    Raises:
        CheckpointError: writing failed on some rank; older checkpoints are untouched.
    """
    final, partial = folder / f"step-{step}", folder / f"step-{step}.tmp"
    if engine.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    engine.barrier()
    try:
        dcp.save(_tensors(model, optimizer), checkpoint_id=partial)
    except (CheckpointException, OSError) as error:  # CheckpointException is a BaseException
        raise CheckpointError(f"cannot write {partial}: {_short(error)}") from error
    if engine.rank == 0:
        state = RunState(
            step=step,
            loader=loader.state_dict(),
            scheduler={name: value for name, value in scheduler.state_dict().items() if name != "lr_lambdas"},
            optimizer=type(optimizer).__name__,
            samples=loader.consumed,
        )
        (partial / _META).write_text(json.dumps(asdict(state)), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for _, old in completed(folder)[:-keep]:
            shutil.rmtree(old)
    engine.barrier()
    return final


def load(
    path: Path, *, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, loader: TrainLoader
) -> RunState:
    """Read a checkpoint into live objects, whatever the number of ranks that wrote it.

    Raises:
        CheckpointError: another optimizer, or a file that is missing or damaged. The model may then hold a mixture.
    """
    state = RunState(**json.loads((path / _META).read_text(encoding="utf-8")))
    if state.optimizer != type(optimizer).__name__:
        raise CheckpointError(
            f"{path} was written with {state.optimizer}, this run uses {type(optimizer).__name__}: set "
            f"checkpoint.resume=never or another run_dir"
        )
    tensors = _tensors(model, optimizer)
    try:
        dcp.load(tensors, checkpoint_id=path)
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {_short(error)}") from error
    set_model_state_dict(model, tensors["model"], options=_TRAINED_ONLY)
    set_optimizer_state_dict(model, optimizer, tensors["optimizer"], options=_TRAINED_ONLY)
    scheduler.load_state_dict({**scheduler.state_dict(), **state.scheduler})
    loader.load_state_dict(state.loader)
    return state


def save_final(folder: Path, loaded: LoadedModel, engine: Engine, *, dtype: str = "float32") -> Path:
    """Write the trained model, or the adapter, with its processor in Hugging Face format; load it with ``model.path``.

    Args:
        folder: is replaced.
        loaded: the trained model; every rank calls.
        engine: rank 0 writes.
        dtype: of a full model; adapters are written as they are, in fp32.
    """
    model: Any = loaded.model
    is_adapter = hasattr(model, "peft_config")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=is_adapter)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    if engine.rank == 0:
        partial = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        if not is_adapter:
            target = getattr(torch, dtype)
            state = {name: value.to(target) if value.is_floating_point() else value for name, value in state.items()}
            with quiet():
                _twin(model).save_pretrained(partial, state_dict=state)
        else:
            model.peft_config["default"].base_model_name_or_path = loaded.path
            model.save_pretrained(partial, state_dict=state, save_embedding_layers=False)
        loaded.processor.save_pretrained(partial)
        template = {"prompt_template": loaded.collator.template.to_dict(), "base": loaded.path}
        (partial / "scale_digrap.json").write_text(json.dumps(template, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    engine.barrier()
    return folder


def _twin(model: nn.Module) -> Any:
    """A model of the same architecture without memory, to write files with: ``save_pretrained`` of a sharded model is
    a collective call that gathers the weights once more."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("distributed_config", None)
    with torch.device("meta"):
        twin = AutoModelForImageTextToText.from_config(config)
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model, options=_TRAINED_ONLY),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=_TRAINED_ONLY),
    }


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:397] + "..."
