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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoModelForImageTextToText

from scale_digrap.data.loader import TrainLoader
from scale_digrap.models.loading import LoadedModel, quiet
from scale_digrap.training.engine import CheckpointError, Engine

_STEP = re.compile(r"step-(\d+)")
_META = "trainer.json"
_ENGINE_FILES = (".metadata", "latest")  # torch's distributed checkpoint, DeepSpeed's


@dataclass(frozen=True)
class RunState:
    """The small part of a checkpoint, the same on all ranks: ``trainer.json``."""

    step: int
    loader: dict[str, Any]
    scheduler: dict[str, Any]
    optimizer: str
    samples: int
    layout: dict[str, Any] = field(default_factory=lambda: {"engine": "fsdp"})
    """The writing engine's ``state_layout``."""


def completed(folder: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints in a folder, oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else []:
        match = _STEP.fullmatch(path.name)  # fullmatch: step-12.tmp is not a checkpoint
        if match and _is_whole(path):
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
    if not _is_whole(path):
        raise CheckpointError(
            f"checkpoint.resume={resume!r} is no whole checkpoint ({_META} and one of {', '.join(_ENGINE_FILES)} must "
            f"be in it)"
        )
    return path


def _is_whole(path: Path) -> bool:
    return (path / _META).is_file() and any((path / name).is_file() for name in _ENGINE_FILES)


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
    engine.save_state(partial, model, optimizer)
    if engine.rank == 0:
        state = RunState(
            step=step,
            loader=loader.state_dict(),
            scheduler={name: value for name, value in scheduler.state_dict().items() if name != "lr_lambdas"},
            optimizer=type(optimizer).__name__,
            samples=loader.consumed,
            layout=engine.state_layout(),
        )
        (partial / _META).write_text(json.dumps(asdict(state)), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for _, old in completed(folder)[:-keep]:
            shutil.rmtree(old)
    engine.barrier()
    return final


def load(
    path: Path, *, engine: Engine, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, loader: TrainLoader
) -> RunState:
    """Read a checkpoint into live objects; FSDP's, whatever the number of ranks that wrote it.

    Raises:
        CheckpointError: another optimizer or engine, or a file that is missing or damaged. The model may then hold a
            mixture.
    """
    state = RunState(**json.loads((path / _META).read_text(encoding="utf-8")))
    if state.optimizer != type(optimizer).__name__:
        raise CheckpointError(
            f"{path} was written with {state.optimizer}, this run uses {type(optimizer).__name__}: set "
            f"checkpoint.resume=never or another run_dir"
        )
    here = engine.state_layout()
    if state.layout != here:
        raise CheckpointError(
            f"{path} was written with {_describe(state.layout)}, this run uses {_describe(here)}: use the same, or set "
            f"checkpoint.resume=never or another run_dir"
        )
    engine.load_state(path, model, optimizer)
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
    state = engine.full_state(model, trained_only=is_adapter)
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


def _describe(layout: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in layout.items())
