"""A checkpoint → a standard Hugging Face folder or a peft adapter, in one process, tensor by tensor.

No more than one file of the result (``max_shard_size``) is in memory at a time, and an adapter, which is one file. What
was not trained, and pre-trained values that the checkpoint leaves out, come from the base checkpoint, which is mapped
into memory where its files have one dtype, and whose fingerprint must be that of the run's beginning.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig
from transformers.utils import cached_file

from scale_digrap.config import CHOICES, Config
from scale_digrap.evaluation.wise import check_alpha, lora_factor
from scale_digrap.models.loading import (
    LOAD_ERRORS,
    PRECISION_DTYPE,
    UNTRUSTED,
    LoadedModel,
    adapter_base,
    adapter_settings,
    add_adapters,
    load_error,
    load_processor,
    quiet,
    resolve_path,
    template_of,
)
from scale_digrap.models.select import match_names
from scale_digrap.training import run_folder
from scale_digrap.training.deferred import Deferred
from scale_digrap.training.engine import CheckpointError, Engine, short
from scale_digrap.training.fingerprint import weights_fingerprint
from scale_digrap.training.run_folder import STATE
from scale_digrap.training.run_state import RunState, read_meta, stored_config
from scale_digrap.training.stored import BUFFER, FROZEN, StoredState

PARAM, ANCHOR = "param", "anchor"
_PEFT_PREFIX = "base_model.model."
_PEFT_PARTS = (".base_layer", ".original_module", ".modules_to_save.default")


class ExportError(CheckpointError):
    """An export that cannot be done as asked; nothing is left at the target."""


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote.

    Attributes:
        folder: where.
        step: of the checkpoint.
        adapter: a peft adapter; else a whole model.
        dtype: of its floating-point tensors.
        files: its safetensors files, by name.
        bytes: of these files together.
        mixed: tensors that WiSE-FT has mixed.
    """

    folder: Path
    step: int
    adapter: bool
    dtype: str
    files: list[str]
    bytes: int
    mixed: int


def export(
    run: str | Path,
    target: str | Path,
    *,
    step: int | None = None,
    wise: float | None = None,
    dtype: str | None = None,
    base: str | None = None,
    max_shard_size: int = 4 * 2**30,
) -> Exported:
    """Write a run's checkpoint as what ``from_pretrained`` loads, with the processor and the prompt template.

    Args:
        run: the run's folder; the checkpoint may be of either engine and of any number of ranks.
        target: folder to create.
        step: which checkpoint; the newest by default. Its checksums are verified first.
        wise: α of WiSE-FT (Wortsman et al., CVPR 2022): θ = (1 − α) θ0 + α θ_ft, ΔW → αΔW for LoRA, whose B is scaled.
            θ0 are the checkpoint's anchors or, where it holds none, the base's weights. New layers stay as trained.
        dtype: ``float32`` or ``bfloat16``, of a whole model; by default the run's ``checkpoint.final_dtype``. Adapters
            are float32.
        base: path of the base checkpoint, in place of the run's ``model.path``.
        max_shard_size: bytes of one safetensors file of a whole model; a larger tensor has a file of its own.

    Raises:
        RunFolderError: no such checkpoint, or a damaged one.
        CheckpointError: a checkpoint of another version or another model; a base with other weights than the run began
            with; a target that exists.
        ModelLoadError: the base cannot be loaded.
        WiseError: an α outside [0, 1], a DoRA adapter.
    """
    target = Path(target)
    if target.exists():
        raise ExportError(f"{target} exists: remove it, or name another folder")
    writing = plan(run, step=step, wise=wise, dtype=dtype, base=base)
    meta, config = writing.meta, writing.config
    partial = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        writing.write(partial, max_shard_size)
        load_processor(replace(config.model, path=writing.base.path)).save_pretrained(partial)
        origin = {"step": meta.step, "wise": wise, "optimizer": meta.optimizer}
        write_template(partial, template_of(config.model).to_dict(), writing.base.name, origin)
        partial.rename(target)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {short(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files = sorted(target.glob("*.safetensors"))
    return Exported(
        folder=target,
        step=meta.step,
        adapter=isinstance(writing, _AdapterWriter),
        dtype=writing.dtype,
        files=[file.name for file in files],
        bytes=sum(file.stat().st_size for file in files),
        mixed=len(writing.mixed),
    )


def plan(
    run: str | Path,
    *,
    step: int | None = None,
    wise: float | None = None,
    dtype: str | None = None,
    base: str | None = None,
) -> Writer:
    """Everything that :func:`export` can find wrong before it writes: nothing is written, no weights are loaded.

    Raises:
        RunFolderError, CheckpointError, ModelLoadError, WiseError: as :func:`export`.
    """
    if wise is not None:
        wise = check_alpha(wise)
    path = run_folder.whole(run, step)
    meta = read_meta(path)
    config = stored_config(path, meta)
    if base is not None:
        config.model.path = base
    writer = _AdapterWriter if is_adapter(config) else _ModelWriter
    writing = writer(path, meta, config, wise, dtype)
    if wise is not None:
        for name in writing.state.layers():
            lora_factor(name)
    return writing


def write_template(folder: Path, template: dict[str, Any], base: str, origin: dict[str, Any] | None = None) -> None:
    """Write ``scale_digrap.json``: the prompt that the model was trained on, its base, and where it comes from."""
    record = {"prompt_template": template, "base": base, **({"checkpoint": origin} if origin else {})}
    (folder / "scale_digrap.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def is_adapter(config: Config) -> bool:
    return config.lora.enabled or adapter_base(resolve_path(config.model.path)) is not None


def save_final(folder: Path, loaded: LoadedModel, engine: Engine, *, dtype: str = "float32") -> Path:
    """Write the live model, or the adapter, with its processor in Hugging Face format; load it with ``model.path``.

    Gathers the weights in rank 0's main memory; for a model that does not fit there, :func:`export` a checkpoint.

    Args:
        folder: is replaced.
        loaded: the trained model; every rank calls.
        engine: rank 0 writes.
        dtype: of a full model; adapters are written as they are, in fp32.
    """
    model: Any = loaded.model
    is_adapter = hasattr(model, "peft_config")
    with _unfrozen(model, loaded.adapter_parts):
        state = engine.full_state(model, trained_only=is_adapter)
    if engine.rank == 0:
        partial = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        if not is_adapter:
            _save_gathered(model, state, partial, getattr(torch, dtype))
        else:
            model.peft_config["default"].base_model_name_or_path = loaded.path
            model.save_pretrained(partial, state_dict=state, save_embedding_layers=False)
        loaded.processor.save_pretrained(partial)
        write_template(partial, loaded.collator.template.to_dict(), loaded.path)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    engine.barrier()
    return folder


@contextlib.contextmanager
def _unfrozen(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Within the block, parameters count as trained: an adapter is saved whole, whatever of it is frozen."""
    frozen = [p for name, p in model.named_parameters() if name in names and not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _save_gathered(model: Any, state: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Through a model of the same architecture without memory: ``save_pretrained`` of a sharded model is a collective
    call that gathers the weights once more."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("distributed_config", None)
    with torch.device("meta"):
        twin = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    twin.generation_config = copy.deepcopy(model.generation_config)
    first: dict[int, Tensor] = {}
    for name, like in twin.state_dict(keep_vars=True).items():
        value = state[name].to(dtype) if state[name].is_floating_point() else state[name]
        # Gathered shards no longer show which weights are tied; written twice, they would be untied.
        state[name] = first.setdefault(id(like), value)
    with quiet():
        twin.save_pretrained(folder, state_dict=state)


class _Base:
    """The base checkpoint's weights, loaded when they are first asked for.

    Args:
        name: path of the base as the run named it.
        config: the run's.
        trained_from: the dtype in which the run loaded them: what is wider was rounded to it.
    """

    def __init__(self, name: str, config: Config, trained_from: torch.dtype) -> None:
        self.name, self.path, self.revision = name, resolve_path(name), config.model.revision
        self.trained_from = trained_from
        self.expected: Callable[[dict[str, Tensor]], None] = lambda tensors: None
        """Called with the weights before any of them is used; raises where they are not the right ones."""

    def skeleton(self, dtype: torch.dtype) -> Any:
        """The architecture without memory."""
        try:
            with quiet(), torch.device("meta"):
                config = AutoConfig.from_pretrained(self.path, revision=self.revision, trust_remote_code=False)
                model = AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=False)
        except LOAD_ERRORS as error:
            raise load_error("the architecture", self.path, error) from error
        with contextlib.suppress(OSError):  # without one of its own, that of the model's configuration stays
            model.generation_config = GenerationConfig.from_pretrained(self.path, revision=self.revision or "main")
        return model

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """State dict of the base, in the dtype of its files."""
        dtype = self._file_dtype() or self.trained_from
        try:
            with quiet():
                model = AutoModelForImageTextToText.from_pretrained(
                    self.path, revision=self.revision, dtype=dtype, **UNTRUSTED
                )
        except LOAD_ERRORS as error:
            raise load_error("a model", self.path, error) from error
        tensors = {name: value.detach() for name, value in model.state_dict().items()}
        self.expected(tensors)
        return tensors

    def value(self, name: str) -> Tensor:
        """A weight as the run saw it; float32 where it is floating-point."""
        value = self.tensors[name]
        return value.to(self.trained_from).float() if value.is_floating_point() else value

    def _file_dtype(self) -> torch.dtype | None:
        """The one floating-point dtype of the base's files; None where it has several or other files."""
        try:
            config = cached_file(self.path, "config.json", revision=self.revision)
        except OSError:
            return None
        found = set()
        for file in Path(str(config)).parent.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                found |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118 (no mapping)
        names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        floats = {names[name] for name in found if name in names}
        return floats.pop() if len(floats) == 1 else None


class Writer:
    """A checked export: what is common to whole models and adapters, where a value comes from, how it is mixed.

    Attributes:
        path: of the checkpoint.
        meta: its ``trainer.json``.
        config: of the run.
        state: the stored tensors.
        skeleton: the model without memory.
    """

    skeleton: Any

    def __init__(self, path: Path, meta: RunState, config: Config, wise: float | None, dtype: str | None) -> None:
        if dtype is not None and dtype not in CHOICES["checkpoint.final_dtype"]:
            raise ExportError(f"dtype must be one of {', '.join(CHOICES['checkpoint.final_dtype'])}, got {dtype!r}")
        self.path, self.meta, self.config, self.wise = path, meta, config, wise
        self.state = StoredState(path / STATE)
        self.dtype = dtype or config.checkpoint.final_dtype
        self.mixed: set[str] = set()
        adapter = adapter_base(resolve_path(config.model.path))
        masters = config.sharding.engine == "deepspeed" and not is_adapter(config)
        rounded = config.training.precision == "bf16" and (masters or is_adapter(config))
        self.base = _Base(
            adapter or config.model.path, config, PRECISION_DTYPE["bf16"] if rounded else PRECISION_DTYPE["fp32"]
        )
        self.base.expected = self._check_base

    def write(self, folder: Path, max_shard_size: int) -> None:
        raise NotImplementedError

    def check(self) -> None:
        """Compare the checkpoint's layers with the architecture's, before anything is written."""
        self.state.rename(name for name, _ in self.skeleton.named_parameters())
        shapes = {name: parameter.shape for name, parameter in self.skeleton.named_parameters()}
        for name in self.state.layers():
            size = self.state.tensors[f"{PARAM}.{name}"].size.numel()
            if name not in shapes:
                raise CheckpointError(
                    f"{self.path} holds a layer {name!r} that {self.base.name!r} does not have: it is a checkpoint of "
                    "another model, name its base"
                )
            if shapes[name].numel() != size:
                raise CheckpointError(
                    f"{self.path}: layer {name!r} has {size} elements, in {self.base.name!r} its shape is "
                    f"{tuple(shapes[name])}: it is a checkpoint of another model, name its base"
                )
        names = [name for name, _ in self.skeleton.named_parameters()]
        self.new_layers = set(match_names(self.config.model.new_layers, names, key="model.new_layers"))

    def trained(self, name: str, shape: torch.Size) -> Tensor:
        """The trained value of a layer, mixed where WiSE-FT is asked for; float32."""
        value = self.state.read(f"{PARAM}.{name}").float().view(shape)
        if self.wise is None or name in self.new_layers or (factor := lora_factor(name)) == "A":
            return value
        self.mixed.add(name)
        if factor == "B":
            return value * self.wise
        return torch.lerp(self.pretrained(name).view(shape), value, self.wise)  # exact at 0 and at 1

    def pretrained(self, name: str) -> Tensor:
        """The value with which the run began; float32."""
        if f"{ANCHOR}.{name}" in self.state.tensors:
            return self.state.read(f"{ANCHOR}.{name}").float()
        return self.base.value(base_name(name))

    def _check_base(self, tensors: dict[str, Tensor]) -> None:
        """What the run began with, against what is there now."""
        own = {name for name, _ in self.skeleton.named_parameters() if name in self.new_layers}
        own |= {name for name in self.state.layers() if "lora_" in name}
        named = (
            (name, tensors[base_name(name)])
            for name, _ in self.skeleton.named_parameters()
            if name not in own and base_name(name) in tensors
        )
        if weights_fingerprint(named) != self.meta.base:
            raise CheckpointError(
                f"{self.path} leaves out weights that are those of the base model, and {self.base.name!r} has other "
                "weights than the run began with: name the base that it began with (--base)"
            )


class _ModelWriter(Writer):
    """Full fine-tuning: every tensor of the architecture."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.skeleton = self.base.skeleton(getattr(torch, self.dtype))
        self.check()

    def write(self, folder: Path, max_shard_size: int) -> None:
        tensors = self.skeleton.state_dict(keep_vars=True)
        stored = set(self.state.layers())
        # Tied weights are one parameter with two names, and trained under one of them.
        source = {id(value): name for name, value in tensors.items() if name in stored}
        state = {name: self._deferred(name, value, source.get(id(value))) for name, value in tensors.items()}
        with quiet():
            self.skeleton.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)

    def _deferred(self, name: str, like: Tensor, layer: str | None) -> Deferred:
        target = getattr(torch, self.dtype)

        def read() -> Tensor:
            if layer is not None:
                value = self.trained(layer, like.shape)
            elif f"{BUFFER}.{name}" in self.state.tensors:
                value = self.state.read(f"{BUFFER}.{name}")
            else:
                value = self.base.value(name)
            value = value.view(like.shape)
            return value.to(target) if value.is_floating_point() else value

        shape = torch.empty(like.shape, dtype=target if like.is_floating_point() else like.dtype, device="meta")
        return Deferred(shape, read)


class _AdapterWriter(Writer):
    """LoRA factors, and modules trained in full beside them."""

    def __init__(self, path: Path, meta: RunState, config: Config, wise: float | None, dtype: str | None) -> None:
        if dtype not in (None, "float32"):
            raise ExportError(f"dtype={dtype}: adapters are float32; the option is for whole models")
        super().__init__(path, meta, config, wise, "float32")
        model = self.base.skeleton(torch.float32)
        folder = resolve_path(config.model.path)
        if adapter_base(folder) is None:
            self.skeleton = add_adapters(model, config.lora)
        else:
            from peft import get_peft_model

            settings = adapter_settings(folder)
            settings.inference_mode = False
            self.skeleton = get_peft_model(model, settings)
        self.continued = adapter_base(folder) is not None
        self.check()
        self._check_whole()

    def _check_whole(self) -> None:
        """Everything that the adapter's folder will need is in the checkpoint, trained or frozen."""
        from peft import get_peft_model_state_dict

        given: dict[str, Tensor] = dict(self.skeleton.state_dict().items())
        wanted = get_peft_model_state_dict(self.skeleton, state_dict=given, save_embedding_layers=False)
        chosen = {id(value) for value in wanted.values()}
        stored = {*self.state.layers(), *self.state.names(FROZEN)}
        missing = sorted(name for name, value in given.items() if id(value) in chosen and name not in stored)
        if missing:
            raise ExportError(
                f"{self.path} lacks {len(missing)} tensors of the adapter, first {missing[0]!r}, which were frozen "
                "when it was written: use the run's folder final, or resume the run and export its next checkpoint"
            )

    def write(self, folder: Path, max_shard_size: int) -> None:
        shapes = {name: parameter.shape for name, parameter in self.skeleton.named_parameters()}
        state = {name: self.trained(name, shapes[name]) for name in self.state.layers()}
        state |= {name: self._frozen(name, shapes[name]) for name in self.state.names(FROZEN)}
        self.skeleton.peft_config["default"].base_model_name_or_path = self.base.name
        self.skeleton.save_pretrained(folder, state_dict=state, save_embedding_layers=False)

    def _frozen(self, name: str, shape: torch.Size) -> Tensor:
        """A part of the adapter that was not trained; at α = 0 the adapter is to do nothing, all of it."""
        value = self.state.read(f"{FROZEN}.{name}").float().view(shape)
        if self.wise is None or lora_factor(name) != "B":
            return value
        self.mixed.add(name)
        return value * self.wise

    def pretrained(self, name: str) -> Tensor:
        if self.continued and f"{ANCHOR}.{name}" not in self.state.tensors:
            raise ExportError(
                f"{self.path} has no anchor of {name!r}, which began with the value of the adapter "
                f"{self.config.model.path!r} and not of the base: WiSE-FT needs the anchors in the checkpoint"
            )
        return super().pretrained(name)


def base_name(name: str) -> str:
    """The base model's name of a parameter that peft has wrapped; other names as they are."""
    if not name.startswith(_PEFT_PREFIX):
        return name
    name = name.removeprefix(_PEFT_PREFIX)
    for part in _PEFT_PARTS:
        name = name.replace(part + ".", ".")
    return name
