"""Checkpoints that survive a kill at any moment, on any number of ranks and in either engine.

A checkpoint is written to ``step-N.tmp``, listed with checksums, made durable, and renamed: ``step-N`` is whole or not
there. Before a tensor is loaded all files are compared with the list; a damaged checkpoint is named and the newest
whole one before it is used. It holds what is trained; frozen weights come from the base again, whose fingerprint is
compared. There is no generator state in it: the randomness of a step depends on (seed, step, rank) alone.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from scale_digrap.config import Config
from scale_digrap.data.loader import TrainLoader
from scale_digrap.models.loading import LoadedModel
from scale_digrap.optim.dcp_reader import load
from scale_digrap.optim.portable import FlatRange, PortableStateError, UnreadLayersError, open_portable
from scale_digrap.runtime.dcp_folder import FolderError
from scale_digrap.runtime.secrets import mask_tree
from scale_digrap.runtime.text import one_line
from scale_digrap.settings import shown
from scale_digrap.sharding import zero3
from scale_digrap.training import manifest
from scale_digrap.training.engine import CheckpointError, Engine, short
from scale_digrap.training.fingerprint import weights_fingerprint
from scale_digrap.training.run_folder import CHECKPOINTS, META, STATE
from scale_digrap.training.run_state import VERSION, RunState, read_meta

log = logging.getLogger(__name__)

LATEST = "latest"
_ANCHOR, _BUFFER, _FROZEN = "anchor.", "buffer.", "frozen."
_SHORT_WRITES = ("unexpected pos", "PytorchStreamWriter failed writing")
_ENTRY_BYTES = 1500  # of the archive around each tensor
_NEEDED = "{needed}"  # known only once all ranks have told their part


class Checkpointer:
    """Writes and reads a run's checkpoints; every method is collective.

    Args:
        config: the run's.
        engine, loaded, optimizer, scheduler, loader: the run, prepared and at its start: the model holds the
            pre-trained weights, whose fingerprint is taken here.
    """

    def __init__(
        self,
        config: Config,
        *,
        engine: Engine,
        loaded: LoadedModel,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        loader: TrainLoader,
    ) -> None:
        self.config, self.options = config, config.checkpoint
        self.folder = Path(config.run_dir) / CHECKPOINTS
        self._engine, self._loaded, self._loader = engine, loaded, loader
        self._optimizer, self._scheduler = optimizer, scheduler
        self.failures = 0
        """Saves that failed and were passed over (``checkpoint.on_error=continue``)."""
        trained = set(loaded.trained())
        named = list(loaded.model.named_parameters())
        self._frozen = any(name not in trained for name, _ in named)
        made_here = {*loaded.adapters, *loaded.new_layers}
        self._base = weights_fingerprint((name, p) for name, p in named if name not in made_here)
        self._needed = 0
        """Bytes of this rank's part of the checkpoint that is being written."""
        self._staging: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._thread_error: str | None = None
        self._thread_failure: BaseException | None = None
        # Collectives of a background save must not mix with those of the training step.
        several = engine.world_size > 1
        self._group = dist.new_group(backend="gloo") if several and self.options.background else None

    # -- saving --------------------------------------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """Write ``step-N`` and delete what is no longer kept; in the background with ``checkpoint.background``.

        Raises:
            CheckpointError: writing failed on some rank (unless ``checkpoint.on_error=continue``); older checkpoints
                are untouched. In the background: by the next :meth:`poll`, :meth:`save` or :meth:`close`.
        """
        self.close()  # one at a time
        tensors = self._engine.portable(self._optimizer).state_dict()
        if not self.options.anchors:
            tensors = {name: value for name, value in tensors.items() if not name.startswith(_ANCHOR)}
        tensors |= {_BUFFER + name: value for name, value in self._buffers().items()}
        tensors |= {_FROZEN + name: value for name, value in self._frozen_adapter().items()}
        self._needed = sum(_bytes(value) for value in tensors.values())
        meta = json.dumps(asdict(self._meta(step)), indent=1)
        if not self.options.background:
            self._outcome(self._write(step, tensors, meta, None))
            return
        staged = {name: self._stage(name, value) for name, value in tensors.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()

        def work() -> None:
            try:
                self._thread_error = self._write(step, staged, meta, self._group)
            except BaseException as error:  # no error of writing: another rank is gone, or a mistake here
                self._thread_failure = error

        self._thread = threading.Thread(target=work, name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Look after a background save, once per step; costs one small reduction while one is under way.

        Raises:
            CheckpointError: on all ranks, what went wrong on any.
        """
        if self._thread is not None:
            (running,) = self._engine.sum([self._thread.is_alive()])
            if not running:
                self.close()

    def close(self) -> None:
        """Wait for a background save.

        Raises:
            CheckpointError: on all ranks, what went wrong on any.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            failure, self._thread_failure = self._thread_failure, None
            if failure is not None:
                raise failure
            self._outcome(self._thread_error)

    def _outcome(self, error: str | None) -> None:
        if error is None:
            return
        if self.options.on_error == "stop":
            raise CheckpointError(f"{error} (checkpoint.on_error=continue would train on without it)")
        self.failures += 1
        if self._engine.rank == 0:
            log.warning("checkpoint failed, training goes on (%d so far): %s", self.failures, error)

    def _write(self, step: int, tensors: dict[str, Any], meta: str, group: Any) -> str | None:
        """Write and commit; returns what went wrong anywhere, the same on all ranks."""
        final, partial = self.folder / f"step-{step}", self.folder / f"step-{step}.tmp"
        rank = self._engine.rank
        files: dict[str, list[Any]] = {}
        room = _room(self.folder)

        def prepare() -> None:
            if rank == 0:
                run_dir = self.folder.parent
                if not run_dir.is_dir():
                    log.warning(
                        "run_dir %s was deleted while the run goes on: its log and older checkpoints are lost, this "
                        "checkpoint is written there again",
                        run_dir,
                    )
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)

        def write_tensors() -> None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.save(tensors, checkpoint_id=partial / STATE, process_group=group)

        def list_files() -> None:
            mine = [path.name for path in (partial / STATE).iterdir() if path.name.startswith(f"__{rank}_")]
            if rank == 0:
                manifest.write_durably(partial / META, meta + "\n", private=True)  # it holds the configuration
                files.update(manifest.describe(partial, [META, f"{STATE}/.metadata"]))
            files.update(manifest.describe(partial, [f"{STATE}/{name}" for name in mine]))

        def commit() -> None:
            if rank != 0:
                return
            manifest.write(partial, step, {name: entry for part in gathered for name, entry in part.items()})
            replaced = final.with_name(final.name + ".old")
            if final.exists():  # a damaged one that the run has come back to
                final.rename(replaced)
            partial.rename(final)
            manifest.sync_folder(self.folder)
            pointer = self.folder / (LATEST + ".tmp")
            manifest.write_durably(pointer, final.name + "\n")
            pointer.rename(self.folder / LATEST)
            manifest.sync_folder(self.folder)
            shutil.rmtree(replaced, ignore_errors=True)
            self._prune()

        for part in (prepare, write_tensors, list_files):
            if (error := self._agreed(part, group, room)) is not None:
                if rank == 0:
                    shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
                return f"cannot write {final}: {error}"
        gathered = self._gather(files, group)
        error = self._agreed(commit, group)
        return None if error is None else f"cannot write {final}: {error}"

    def _agreed(self, part: Any, group: Any, room: str = "") -> str | None:
        """Run a part of the work on every rank; the first error of any of them, on all.

        Args:
            part: what to do.
            group: of the ranks; ``None`` for all.
            room: for a full disk, what was free before.
        """
        error = None
        try:
            part()
        except (CheckpointException, Exception) as caught:  # CheckpointException is a BaseException
            error = _reason(caught)
            error += f"; {room}" if room and _is_full(caught) else ""
        outcomes = self._gather((error, self._needed), group)
        needed = _size(sum(size for _, size in outcomes))
        for rank, (told, _) in enumerate(outcomes):
            if told is not None:
                return f"rank {rank}: {told.replace(_NEEDED, needed)}"
        return None

    def _gather(self, value: Any, group: Any) -> list[Any]:
        if self._engine.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self._engine.world_size
        dist.all_gather_object(gathered, value, group=group)
        return gathered

    def _stage(self, name: str, value: Any) -> Any:
        """A copy in main memory, in buffers that are used again: fresh ones cost more in page faults than the copy."""
        tensor = value.values if isinstance(value, FlatRange) else value
        if not isinstance(tensor, torch.Tensor):
            return value
        buffer = self._staging.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pin = torch.cuda.is_available()
            buffer = self._staging[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
        buffer.copy_(tensor, non_blocking=True)
        return FlatRange(value.numel(), value.offset, buffer) if isinstance(value, FlatRange) else buffer

    def _prune(self) -> None:
        """Delete all but the newest ``keep`` and every ``keep_every``-th; the one just written is never among them."""
        found = manifest.checkpoints(self.folder)
        for step, path in found[: -self.options.keep]:
            if not self.options.keep_every or step % self.options.keep_every:
                shutil.rmtree(path, ignore_errors=True)

    def _buffers(self) -> dict[str, torch.Tensor]:
        """Persistent buffers, which are whole on every rank."""
        model = self._loaded.model
        names = {name for name, _ in model.named_buffers()}
        return {name: value for name, value in model.state_dict(keep_vars=True).items() if name in names}

    def _frozen_adapter(self) -> dict[str, torch.Tensor]:
        """What belongs to an adapter that the run goes on with, and is frozen: no base model has it. Collective."""
        whole = {}
        for name, parameter in self._loaded.model.named_parameters():
            if name in self._loaded.adapter_parts and not parameter.requires_grad:
                if zero3.is_partitioned(parameter):
                    whole[name] = zero3.full(parameter).cpu()
                else:
                    value = parameter.detach()
                    whole[name] = (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
        return whole

    def _meta(self, step: int) -> RunState:
        packages = ("torch", "transformers", "deepspeed", "peft", "scale-digrap")
        return RunState(
            version=VERSION,
            step=step,
            samples=self._loader.consumed,
            optimizer=type(self._optimizer).__name__,
            loader=self._loader.state_dict(),
            base=self._base,
            frozen=self._frozen,
            anchors=self.options.anchors,
            engine=self.config.sharding.engine,
            ranks=self._engine.world_size,
            config=shown(self.config),
            versions={name: found for name in packages if (found := _version(name))},
        )

    # -- resuming ------------------------------------------------------------------------------------------------------

    def resume(self) -> int:
        """Load what ``checkpoint.resume`` means; returns the step to go on after, 0 to start afresh.

        Raises:
            CheckpointError: no checkpoint is whole, or the one asked for is not; another optimizer, other layers, other
                base weights. Nothing is loaded then.
        """
        if self.options.resume == "never":
            return 0
        explicit = self.options.resume != "auto"
        if explicit:
            candidates = [(-1, Path(self.options.resume))]
        else:
            if self._engine.rank == 0:
                self._tidy()
            listed = manifest.checkpoints(self.folder) if self._engine.rank == 0 else None
            candidates = self._gather(listed, None)[0][::-1]
        damaged = []
        for _, path in candidates:
            wrong = self.problems(path)
            if not wrong:
                return self._load(path)
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            damaged.append(f"{path}: {wrong[0]}{more}")
            if explicit or self.options.on_damage == "refuse":
                raise CheckpointError(f"checkpoint is not whole: {damaged[0]}")
            if self._engine.rank == 0:
                log.warning("checkpoint is not whole, an older one is used: %s", damaged[-1])
        if damaged:
            raise CheckpointError(
                f"none of {len(damaged)} checkpoints in {self.folder} is whole, the newest is {damaged[0]}; "
                "checkpoint.resume=never starts afresh"
            )
        return 0

    def newest(self) -> Path | None:
        """The newest committed checkpoint."""
        found = manifest.checkpoints(self.folder)
        return found[-1][1] if found else None

    def problems(self, path: Path) -> list[str]:
        """What is wrong with a checkpoint, the same on all ranks; each rank reads its share of the files."""
        files, wrong = manifest.read(path)
        share = sorted(files)[self._engine.rank :: self._engine.world_size]
        found = wrong + manifest.check(path, {name: files[name] for name in share})
        return sorted({line for lines in self._gather(found, None) for line in lines})

    def _tidy(self) -> None:
        """Put right what a kill has left: a checkpoint moved aside but not replaced, and unfinished ones."""
        for path in self.folder.glob("step-*.old") if self.folder.is_dir() else []:
            final = path.with_suffix("")
            if final.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(final)
        for path in self.folder.glob("step-*.tmp") if self.folder.is_dir() else []:
            log.info("removing %s, which was never finished", path)
            shutil.rmtree(path, ignore_errors=True)

    def _load(self, path: Path) -> int:
        state = read_meta(path)
        self._check_optimizer(path, state)
        portable = self._engine.portable(self._optimizer)
        try:
            reader, metadata = open_portable(path / STATE)
            stored = metadata.state_dict_metadata
            portable.check(stored, path)
        except UnreadLayersError as error:
            raise CheckpointError(
                f"{error}{self._changes(state)}. Train them too, or export the checkpoint (scale-digrap export RUN "
                "--to DIR) and begin a run in another run_dir with model.path=DIR"
            ) from None
        except PortableStateError as error:
            raise CheckpointError(
                f"{error}{self._changes(state)}; checkpoint.resume=never or another run_dir starts afresh"
            ) from None
        self._check_rest(path, stored)
        self._check_base(path, state)
        ranges, late = portable.targets(stored)
        ranges |= {_BUFFER + name: value for name, value in self._buffers().items() if _BUFFER + name in stored}
        try:
            load(ranges, reader)
            portable.finish(ranges, late)
        except (FolderError, PortableStateError) as error:
            raise CheckpointError(str(error)) from error
        except (CheckpointException, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"cannot read {path}: {_reason(error)}") from error
        self._engine.weights_changed(self._loaded.model)
        self._set_schedule(state.step)
        try:
            self._loader.load_state_dict(state.loader)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path / META} is damaged: its position in the data: {one_line(error)}") from error
        self._tell_changes(state)
        return state.step

    def _check_optimizer(self, path: Path, state: RunState) -> None:
        if state.optimizer != type(self._optimizer).__name__:
            raise CheckpointError(
                f"{path} was written with {one_line(state.optimizer)}, this run uses {type(self._optimizer).__name__}: "
                "set checkpoint.resume=never or another run_dir"
            )

    def _check_base(self, path: Path, state: RunState) -> None:
        if state.base != self._base and (state.frozen or not state.anchors):
            what = "its frozen weights" if state.frozen else "its anchors"
            raise CheckpointError(
                f"{path} leaves out {what}, which are those of the base model, and model.path={self.config.model.path} "
                f"has other weights now: point it to the weights that the run began with"
            )

    def _check_rest(self, path: Path, stored: Mapping[str, Any]) -> None:
        """Refuse what is stored beside the trained layers and would be read by nobody."""
        here = {_BUFFER + name for name in self._buffers()}
        here |= {_FROZEN + name for name in self._loaded.adapter_parts}
        unread = sorted(key for key in stored if key.startswith((_BUFFER, _FROZEN)) and key not in here)
        if unread:
            kind, _, name = unread[0].partition(".")
            raise CheckpointError(
                f"{path} holds {one_line(name)!r} ({kind}), which this model does not have: it is a checkpoint of "
                "another model; checkpoint.resume=never or another run_dir starts afresh"
            )

    def _set_schedule(self, step: int) -> None:
        """The schedule is a function of the step, of this run's configuration."""
        scheduler: Any = self._scheduler
        scheduler.last_epoch = step
        rates = [base * ratio(step) for base, ratio in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates

    def _tell_changes(self, state: RunState) -> None:
        """Say which settings differ from those that the checkpoint was written with: the new ones count."""
        if self._engine.rank != 0:
            return
        changed = self._differences(state)
        if changed:
            log.warning("going on with another configuration than before: %s", ", ".join(changed[:8]))

    def _changes(self, state: RunState) -> str:
        """For an error about layers: the settings that decide which there are, where they differ."""
        changed = self._differences(state, ("model.", "lora."))
        return f"; since then, {', '.join(changed[:4])}" if changed else ""

    def _differences(self, state: RunState, only: tuple[str, ...] = ("",)) -> list[str]:
        """``key: before → now`` of every setting that is another one now; masked on both sides."""
        before, now = _flatten(mask_tree(state.config)), _flatten(self._meta(state.step).config)
        quiet = ("checkpoint.", "log.", "run_dir")
        keys = [key for key in sorted(now) if key.startswith(only) and not key.startswith(quiet)]
        return [
            f"{key}: {one_line(str(before.get(key)), 100)} → {one_line(str(now[key]), 100)}"
            for key in keys
            if before.get(key) != now[key]
        ]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _cause(error: BaseException) -> BaseException:
    """A CheckpointException wraps one error per rank in a page of traceback: the first is the reason."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]  # type: ignore[no-any-return]
    return error


def _is_full(error: BaseException) -> bool:
    error = _cause(error)
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # Torch's writer of archives notices a short write by a position that it does not expect, and tells nothing else.
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SHORT_WRITES)


def _reason(error: BaseException) -> str:
    error = _cause(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    if _is_full(error):
        return os.strerror(errno.ENOSPC)
    return f"{type(error).__name__}: {short(error)}"


def _bytes(value: Any) -> int:
    tensor = value.values if isinstance(value, FlatRange) else value
    size = tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else len(tensor)
    return size + _ENTRY_BYTES


def _size(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _room(folder: Path) -> str:
    """What is free where a checkpoint is about to be written; empty where that cannot be told."""
    for place in (folder, *folder.parents):
        try:
            return f"{place} had {_size(shutil.disk_usage(place).free)} free, a checkpoint takes {_NEEDED}"
        except FileNotFoundError:
            continue
        except OSError:
            break
    return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
