"""A Hugging Face checkpoint → model, processor, collator, and which parameters have which anchor.

Whatever is trained is fp32: DiGraP's and Adam's steps are of the size of a bf16 rounding. Frozen weights keep the
compute precision.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from scale_digrap.config import LoraConfig, ModelConfig
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.models.collate import PromptTemplate, VqaCollator
from scale_digrap.models.select import freeze, match_names
from scale_digrap.runtime.text import TextError, one_line, read_json

BUILTIN = {"builtin:tiny-vlm": Path(__file__).resolve().parent.parent / "quickstart" / "tiny_vlm"}
"""Checkpoints that come with the package."""

PRECISION_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ModelLoadError(ScaleDigrapError):
    """A checkpoint that cannot be loaded or trained as configured."""


UNTRUSTED: dict[str, Any] = {"trust_remote_code": False, "weights_only": True}
"""Of every ``from_pretrained`` of a model: neither Python files of the checkpoint nor what a pickle calls are run."""

LOAD_ERRORS = (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, RuntimeError, pickle.PickleError)
"""What Transformers raises for a checkpoint that it cannot load."""

_MAX_CONFIG_BYTES = 1 << 26


@dataclass
class LoadedModel:
    """A model ready for training or evaluation.

    Attributes:
        model: frozen and trained parameters told apart by ``requires_grad``; trained ones are fp32.
        processor: the checkpoint's ``AutoProcessor``.
        collator: makes its batches.
        new_layers: names of trained parameters without a pre-trained value.
        adapters: names of LoRA parameters (their anchor is zero).
        path: the base checkpoint as it was named: a folder, a hub id or ``builtin:…``.
        adapter_parts: names of all parameters that a folder of the adapter holds, frozen ones too.
    """

    model: nn.Module
    processor: Any
    collator: VqaCollator
    new_layers: set[str] = field(default_factory=set)
    adapters: set[str] = field(default_factory=set)
    path: str = ""
    adapter_parts: set[str] = field(default_factory=set)

    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name, tied ones once."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


def resolve_path(path: str) -> str:
    """``builtin:…`` names → folders; everything else unchanged.

    Raises:
        ModelLoadError: an unknown built-in name, or one whose weights are not there.
    """
    if not path.startswith("builtin:"):
        return path
    if path not in BUILTIN:
        raise ModelLoadError(f"model.path={path!r}: built-in models are {', '.join(BUILTIN)}")
    if not (BUILTIN[path] / "config.json").is_file():
        raise ModelLoadError(
            f"model.path={path!r}: its weights are missing from {BUILTIN[path]}: reinstall the package"
        )
    return str(BUILTIN[path])


def load_error(what: str, path: str, error: BaseException) -> ModelLoadError:
    """The one line for a checkpoint that Transformers or peft cannot load.

    Args:
        what: such as ``"a model"``.
        path: the checkpoint.
        error: theirs.
    """
    text = str(error)
    if "trust_remote_code" in text or "custom code" in text:
        return ModelLoadError(
            f"cannot load {what} from {path!r}: it asks to run Python code of its own ('auto_map'), which is never "
            "done here: use a checkpoint of an architecture that Transformers has"
        )
    if isinstance(error, pickle.PickleError):
        return ModelLoadError(
            f"cannot load {what} from {path!r}: its weights are a pickle that calls more than tensors need, or a "
            "damaged one; nothing of it was run. Use safetensors from a source that you trust"
        )
    return ModelLoadError(f"cannot load {what} from {path!r}: {one_line(text or type(error).__name__, 300)}")


def _read_object(file: Path) -> dict[str, Any]:
    try:
        values = read_json(file, _MAX_CONFIG_BYTES)
    except TextError as error:
        raise ModelLoadError(str(error)) from None
    if not isinstance(values, dict):
        raise ModelLoadError(f"{file} is damaged: it holds a {type(values).__name__}, not an object")
    return values


def _has_key(value: Any, key: str) -> bool:
    if isinstance(value, dict):
        return bool(value.get(key)) or any(_has_key(inner, key) for inner in value.values())
    return isinstance(value, list) and any(_has_key(inner, key) for inner in value)


def load_processor(config: ModelConfig) -> Any:
    """The checkpoint's processor.

    Raises:
        ModelLoadError: no such checkpoint, or a processor without images or text
    """
    path = resolve_path(config.path)
    try:
        processor = AutoProcessor.from_pretrained(path, revision=config.revision, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise load_error("a processor", path, error) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ModelLoadError(f"{path!r} has a {type(processor).__name__}, not a processor of images and text")
    return processor


def template_of(config: ModelConfig) -> PromptTemplate:
    """The prompt template that a model configuration describes."""
    return PromptTemplate(config.prompt, config.answer, config.chat_template)


def load_model(
    config: ModelConfig,
    *,
    lora: LoraConfig | None = None,
    precision: str = "fp32",
    seed: int = 0,
    trained_dtype: torch.dtype = torch.float32,
    load_kwargs: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Load a checkpoint for training: adapters in, frozen parameters marked, trained ones fp32.

    Args:
        config: which checkpoint and what is trained. ``path`` may be a folder that ``save_final`` wrote,
            adapters included (their base is loaded and training of the adapters continues).
        lora: adapters; None or not enabled trains the weights themselves.
        precision: ``fp32`` or ``bf16``; the dtype of frozen weights under LoRA.
        seed: of whatever is initialised here (adapters, new layers): the same on every rank.
        trained_dtype: dtype of trained parameters; another than fp32 needs an engine that keeps fp32 masters.
        load_kwargs: more arguments of ``from_pretrained`` (an engine passes ``distributed_config``).

    Raises:
        ModelLoadError: no such checkpoint; weights missing from it that ``model.new_layers`` does not name.
        SelectionError: a pattern without a match.
    """
    path = resolve_path(config.path)
    adapter = adapter_base(path)
    name = adapter or config.path
    base = resolve_path(name)
    use_lora = (lora is not None and lora.enabled) or adapter is not None
    dtype = PRECISION_DTYPE[precision] if use_lora else trained_dtype
    with _seeded(seed):
        model, missing = _from_pretrained(base, config, dtype, dict(load_kwargs or {}))
        if adapter is not None:
            if lora is not None and lora.enabled:
                raise ModelLoadError(
                    f"{path!r} already is an adapter: set lora.enabled=false to go on training it, or name its base "
                    f"{name!r} in model.path"
                )
            model = _load_adapter(model, path)
        elif use_lora:
            model = add_adapters(model, lora)  # type: ignore[arg-type]
    # As peft leaves them: what is not of the base.
    parts = {name for name, p in model.named_parameters() if p.requires_grad} if use_lora else set()
    new_layers = _new_layers(model, config, missing)
    if config.freeze:
        freeze(model, config.freeze)
    _train_in(model, trained_dtype)
    adapters = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
    processor = load_processor(config)
    return LoadedModel(
        model=model,
        processor=processor,
        collator=VqaCollator(processor, template_of(config), config.max_length),
        new_layers={name for name in new_layers if model.get_parameter(name).requires_grad},
        adapters=adapters,
        path=name,
        adapter_parts=parts,
    )


def _from_pretrained(
    path: str, config: ModelConfig, dtype: torch.dtype, kwargs: dict[str, Any]
) -> tuple[nn.Module, set[str]]:
    if config.attention is not None:
        kwargs["attn_implementation"] = config.attention
    try:
        with quiet():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                path, revision=config.revision, dtype=dtype, output_loading_info=True, **UNTRUSTED, **kwargs
            )
    except LOAD_ERRORS as error:
        raise load_error("a model", path, error) from error
    model, info = loaded
    if info.get("mismatched_keys"):
        name = sorted(info["mismatched_keys"], key=str)[0]
        raise ModelLoadError(f"{path!r}: {len(info['mismatched_keys'])} weights have another shape, first {name}")
    return model, set(info["missing_keys"])


def _new_layers(model: nn.Module, config: ModelConfig, missing: set[str]) -> set[str]:
    names = [name for name, _ in model.named_parameters()]
    chosen = set(match_names(config.new_layers, names, key="model.new_layers"))
    # peft puts a prefix before, and ".base_layer" into, the names of the checkpoint
    plain = {name.removeprefix("base_model.model.").replace(".base_layer.", "."): name for name in names}
    unexplained = sorted(name for name in missing if name in plain and plain[name] not in chosen)
    if unexplained:
        raise ModelLoadError(
            f"the checkpoint lacks {len(unexplained)} weights of its architecture, among them {unexplained[0]!r}; if "
            f"they are new, say so with model.new_layers, or they would be anchored at random values"
        )
    return chosen


def add_adapters(model: nn.Module, lora: LoraConfig) -> nn.Module:
    """Put a configuration's adapters into a model, which may be on the meta device."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = match_names(lora.targets, linear, key="lora.targets")
    modules = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters(False))]
    whole = match_names(lora.train, modules, key="lora.train")
    peft_config = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft says int, and only divides by r
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=whole or None,
        bias="none",
    )
    return get_peft_model(model, peft_config, autocast_adapter_dtype=True)  # type: ignore[arg-type]


def adapter_base(path: str) -> str | None:
    """The base checkpoint of a saved adapter folder; None where ``path`` is no such folder.

    Raises:
        ModelLoadError: it is one that is damaged, or not LoRA.
    """
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        return None
    settings = _read_object(file)
    # Other kinds load tokenizers, or import modules by name, as their settings ask.
    if settings.get("peft_type") != "LORA":
        raise ModelLoadError(f"{file}: peft_type is {settings.get('peft_type')!r}; adapters of LoRA alone are loaded")
    if settings.get("megatron_config"):
        raise ModelLoadError(f"{file}: 'megatron_config' imports a module that the file names, which is not done here")
    if _has_key(settings, "trust_remote_code"):
        raise ModelLoadError(f"{file} asks for trust_remote_code, which is never done here: remove it")
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelLoadError(f"{file} does not name its base model")
    return base


def adapter_settings(path: str) -> Any:
    """peft's settings of a saved adapter folder.

    Raises:
        ModelLoadError: as :func:`adapter_base`, or peft does not take them.
    """
    from peft import PeftConfig

    adapter_base(path)
    try:
        return PeftConfig.from_pretrained(path)
    except LOAD_ERRORS as error:
        raise load_error("an adapter", path, error) from error


def _load_adapter(model: nn.Module, path: str) -> nn.Module:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, path, is_trainable=True)  # type: ignore[arg-type]
    except LOAD_ERRORS as error:  # adapter_model.bin is read with weights_only
        raise load_error("an adapter", path, error) from error


def _train_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Trained parameters to ``dtype``, wherever they live; frozen ones keep theirs."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.requires_grad and tensor.is_floating_point() else tensor

    # Module._apply keeps tied parameters tied and is what FSDP2 supports for changing the dtype of its shards.
    if any(p.requires_grad and p.dtype != dtype for p in model.parameters()):
        model._apply(cast)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Initialise under a seed of our own, and give the caller its generator back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Transformers' reports and bars: what they would tell is checked here and raised as an error."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
