"""Which models an evaluation compares, checked before any is loaded; and loading them, one at a time.

A checkpoint of a training run becomes a Hugging Face folder first (`training.export`), mixed with its base where a
WiSE-FT weight asks for it: one reader for all engines, any number of ranks, adapters and whole models.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.utils import cached_file

from scale_digrap.config import Config, ModelConfig, ShardingConfig, TrainingConfig
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.evaluation.evaluate_config import EvaluateConfig, ModelEntry, wise_key
from scale_digrap.evaluation.wise import interpolate
from scale_digrap.models.collate import PromptTemplate
from scale_digrap.models.loading import (
    LOAD_ERRORS,
    PRECISION_DTYPE,
    UNTRUSTED,
    LoadedModel,
    adapter_base,
    adapter_settings,
    load_error,
    load_model,
    quiet,
    resolve_path,
    template_of,
)
from scale_digrap.runtime.text import read_json
from scale_digrap.training import export, manifest
from scale_digrap.training.engine import CheckpointError, Engine, create_engine, short
from scale_digrap.training.fingerprint import weights_fingerprint
from scale_digrap.training.ranks import Ranks
from scale_digrap.zero_config import ZeroConfig

_PRECISION = {"float32": "fp32", "bfloat16": "bf16"}
_SAMPLED = 1 << 16


class ModelsError(ScaleDigrapError):
    """A model that cannot be evaluated as asked."""


@dataclass(frozen=True)
class Variant:
    """One row of the table with one seed.

    Attributes:
        name: of its entry in ``models``.
        method, seed: as in the table; ``method`` of a mixture has ``-wise-α``.
        parent: the method whose fine-tuned weights a mixture has; None for others.
        label, family: see :class:`scale_digrap.evaluation.results.Method`.
        alpha: weight of the fine-tuned model.
        entry: as configured.
        template, max_length, attention: how questions are put.
        identity: tells checkpoints apart by their content, wherever they lie.
        origin: where it comes from, for the report.
        parameters: how many the model has.
    """

    name: str
    method: str
    seed: int
    parent: str | None
    label: str
    family: str
    alpha: float
    entry: ModelEntry
    template: PromptTemplate
    max_length: int | None
    attention: str | None
    identity: dict[str, Any]
    origin: dict[str, Any]
    parameters: int

    @property
    def key(self) -> str:
        """Name of its folder of predictions."""
        return f"{self.method}-seed{self.seed}"


@dataclass(frozen=True)
class _Source:
    """What is the same for all mixtures of an entry; None where nothing says how the model was trained."""

    template: PromptTemplate | None
    max_length: int | None
    attention: str | None
    family: str
    identity: dict[str, Any]
    origin: dict[str, Any]
    parameters: int


def plan(config: EvaluateConfig) -> list[Variant]:
    """All rows of the table, every one checked: checkpoints whole, of the architecture they claim, mixtures possible.

    Reads no weights beyond checksums and file headers.

    Raises:
        ScaleDigrapError: the first thing that is wrong.
    """
    sources = {}
    for name, entry in config.models.items():
        try:
            sources[name] = _of_run(entry) if entry.run is not None else _of_path(entry)
        except ScaleDigrapError as error:
            raise ModelsError(f"models.{name}: {error}") from error
    trained = {(s.template, s.max_length) for s in sources.values() if s.template is not None}
    common = next(iter(trained)) if len(trained) == 1 else (PromptTemplate(), None)
    variants = []
    for name, entry in config.models.items():
        source = sources[name]
        template, max_length = common if source.template is None else (source.template, source.max_length)
        asked = config.model
        template = PromptTemplate(
            template.prompt if asked.prompt is None else asked.prompt,
            template.answer,
            template.use_chat_template if asked.chat_template is None else asked.chat_template,
        )
        method = entry.method or name
        for alpha in entry.alphas:
            label = entry.label or method
            variants.append(
                Variant(
                    name=name,
                    method=wise_key(method, alpha),
                    seed=entry.seed,
                    parent=None if alpha == 1.0 else method,
                    label=label if alpha == 1.0 else f"{label} + WiSE-FT α={alpha:g}",
                    family=entry.family or source.family,
                    alpha=alpha,
                    entry=entry,
                    template=template,
                    max_length=max_length if asked.max_length is None else asked.max_length,
                    attention=asked.attention or source.attention,
                    identity=source.identity,
                    origin=source.origin,
                    parameters=source.parameters,
                )
            )
    return variants


def precision(config: EvaluateConfig, device: torch.device) -> str:
    """The dtype to answer in, ``float32`` or ``bfloat16``."""
    if config.model.dtype != "auto":
        return config.model.dtype
    return "bfloat16" if device.type == "cuda" else "float32"


def choose_engine(config: EvaluateConfig, variants: list[Variant], ranks: Ranks) -> str:
    """The engine's name; ``auto`` looks at what the largest model needs and what the device has."""
    if config.engine.name != "auto":
        return config.engine.name
    if ranks.world_size == 1:
        return "replicated"
    item = PRECISION_DTYPE[_PRECISION[precision(config, ranks.device)]].itemsize
    return "replicated" if max(v.parameters for v in variants) * item < _free_bytes(ranks.device) / 2 else "fsdp"


def training_config(config: EvaluateConfig, engine: str, dtype: str) -> Config:
    """What the training engines need to know of an evaluation."""
    sharding = ShardingConfig(wrap=config.engine.wrap, load_sharded=config.engine.load_sharded)
    if engine == "deepspeed":
        sharding = ShardingConfig(engine="deepspeed", zero=config.engine.zero, load_sharded=config.engine.load_sharded)
    elif config.engine.zero != ZeroConfig(stage=3):
        raise ModelsError(
            f"engine.zero has no effect with engine.name={engine}: set engine.name=deepspeed, or remove it"
        )
    return Config(
        run_dir=config.out,
        data=config.data,
        sharding=sharding,
        training=TrainingConfig(
            batch_size=config.batch_size,
            precision=_PRECISION[dtype],
            device=config.engine.device,
            max_time=config.max_time,
            stop_signals=config.stop_signals,
            timeout_s=config.engine.timeout_s,
        ),
    )


class ReplicatedRanks(Ranks):
    """Every rank has a whole model: the part of an engine that evaluation needs."""

    def load(self, config: Config, *, train: bool = False) -> LoadedModel:
        adapter = adapter_base(resolve_path(config.model.path)) is not None
        dtype = torch.float32 if adapter else PRECISION_DTYPE[self.precision]
        loaded = load_model(config.model, precision=self.precision, trained_dtype=dtype)
        loaded.model.to(self.device)
        return loaded

    def finish(self, model: nn.Module) -> None:
        pass

    def close(self) -> None:
        pass


def start_engine(name: str, config: Config) -> Engine | ReplicatedRanks:
    """The engine of a whole evaluation."""
    return ReplicatedRanks(config) if name == "replicated" else create_engine(config)


def export_variant(variant: Variant, folder: Path, dtype: str) -> None:
    """On one rank: write a run's checkpoint, mixed as the variant says, where :func:`loaded` looks for it."""
    for leftover in (folder, folder.with_name(folder.name + ".tmp")):
        shutil.rmtree(leftover, ignore_errors=True)
    options = _export_options(variant.entry, variant.alpha)
    whole = None if variant.origin.get("adapter") else dtype
    export.export(str(variant.entry.run), folder, dtype=whole, **options)


@contextmanager
def loaded(
    variant: Variant, engine: Engine | ReplicatedRanks, config: Config, folder: Path
) -> Iterator[tuple[nn.Module, Any]]:
    """The variant's model and collator, for the time of the block; every rank calls.

    Args:
        variant: which.
        engine: of the evaluation.
        config: from :func:`training_config`; its section ``model`` is set here.
        folder: where :func:`export_variant` has put a run's checkpoint.
    """
    config.model = ModelConfig(
        path=str(folder) if variant.entry.run is not None else str(variant.entry.path),
        revision=variant.entry.revision,
        attention=variant.attention,
        prompt=variant.template.prompt,
        answer=variant.template.answer,
        chat_template=variant.template.use_chat_template,
        max_length=variant.max_length,
    )
    found = engine.load(config, train=False)
    _check_base(variant, found)
    mixed = variant.alpha != 1.0 and variant.entry.run is None
    try:
        with interpolate(found.model, variant.alpha) if mixed else nullcontext(found.model):
            yield found.model, found.collator
    finally:
        engine.close()
        del found


def _check_base(variant: Variant, found: LoadedModel) -> None:
    """An adapter's run does not hold the base's weights: those that are here must be those it began with. Collective.

    A whole model's are compared by the export.
    """
    expected = variant.origin.get("base_fingerprint")
    if expected is None:
        return
    base = ((name, p) for name, p in found.model.named_parameters() if name not in found.adapters)
    if weights_fingerprint(base) != expected:
        raise CheckpointError(
            f"models.{variant.name}: {found.path!r} has other weights than the base that {variant.entry.run} began "
            f"with: name the right one in models.{variant.name}.base"
        )


def _export_options(entry: ModelEntry, alpha: float) -> dict[str, Any]:
    step = None if entry.checkpoint == "newest" else int(entry.checkpoint)
    return {"step": step, "wise": None if alpha == 1.0 else alpha, "base": entry.base}


def _of_run(entry: ModelEntry) -> _Source:
    for alpha in entry.alphas:
        planned = export.plan(str(entry.run), **_export_options(entry, alpha))
    meta, model = planned.meta, planned.config.model
    adapter = export.is_adapter(planned.config)
    digest = manifest.own_digest(planned.path)
    origin = {
        "checkpoint": str(planned.path),
        "step": meta.step,
        "sha256": digest,
        "base": model.path,
        "optimizer": meta.optimizer,
        "trained_as": meta.config,
        "trained_on": {"engine": meta.engine, "ranks": meta.ranks},
        "adapter": adapter,
    }
    continued = adapter_base(resolve_path(model.path)) is not None
    if adapter and not continued and not planned.config.lora.train:  # else trained copies of base weights are among it
        origin["base_fingerprint"] = meta.base
    return _Source(
        template=template_of(model),
        max_length=model.max_length,
        attention=model.attention,
        family="lora" if adapter else "full",
        identity={"sha256": digest, "step": meta.step, "base": meta.base},
        origin=origin,
        parameters=sum(p.numel() for p in planned.skeleton.parameters()),
    )


def _of_path(entry: ModelEntry) -> _Source:
    path = resolve_path(str(entry.path))
    base = adapter_base(path)
    if base is None and entry.alphas != [1.0]:
        raise ModelsError(
            f"alphas={entry.alphas}: the pre-trained weights of {entry.path!r} are not known; name the training run "
            "(run) in place of its result, or an adapter"
        )
    skeleton = _skeleton(path if base is None else resolve_path(base), entry.revision)
    parameters = sum(p.numel() for p in skeleton.parameters())
    if base is not None:
        _check_adapter(skeleton, path, base, entry.alphas)
    identity = _identity(path, entry.revision)
    origin: dict[str, Any] = {"checkpoint": str(entry.path), "adapter": base is not None}
    if base is not None:
        origin["base"] = base
        identity = {**identity, "base": _identity(resolve_path(base), entry.revision)}
    template, step = _written_template(path)
    if step is not None:
        origin["step"] = step
    return _Source(
        template=template,
        max_length=None,
        attention=None,
        family="base" if base is None and template is None else ("full" if base is None else "lora"),
        identity=identity,
        origin={**origin, **identity},
        parameters=parameters,
    )


def _written_template(path: str) -> tuple[PromptTemplate | None, int | None]:
    """What this package noted beside a model that it wrote: the template, and the step."""
    file = Path(path) / "scale_digrap.json"
    if not file.is_file():
        return None, None
    try:
        noted = read_json(file, 1 << 20)
        template, step = noted["prompt_template"], noted.get("checkpoint", {}).get("step")
        if not all(isinstance(template[key], str) for key in ("prompt", "answer")) or not isinstance(step, int | None):
            raise TypeError("a value of another type")
        return PromptTemplate(**template), step
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelsError(f"{file} is damaged ({error}): delete it and give model.prompt") from None


def _skeleton(path: str, revision: str | None) -> Any:
    """The architecture without memory, compared with the names and shapes in the checkpoint's files."""
    try:
        with quiet():
            found: Any = AutoModelForImageTextToText.from_pretrained(
                path,
                revision=revision,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **UNTRUSTED,
            )
    except LOAD_ERRORS as error:
        raise load_error("a model", path, error) from error
    model, info = found
    for name, stored, wanted in sorted(info.get("mismatched_keys") or (), key=str):
        raise CheckpointError(
            f"{path!r} holds {name!r} with shape {tuple(stored)}, its config.json describes {tuple(wanted)}: the files "
            "are of another architecture"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{path!r} lacks {len(missing)} weights of the architecture in its config.json, first {missing[0]!r}"
        )
    return model


def _check_adapter(skeleton: Any, path: str, base: str, alphas: list[float]) -> None:
    from peft import get_peft_model, get_peft_model_state_dict

    settings = adapter_settings(path)
    try:
        settings.inference_mode = False
        adapted = get_peft_model(skeleton, settings)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise CheckpointError(f"the adapter {path!r} does not fit its base {base!r}: {short(error)}") from error
    if alphas != [1.0] and getattr(settings, "modules_to_save", None):
        raise ModelsError(
            f"alphas={alphas}: the adapter {path!r} holds whole modules ({settings.modules_to_save}) whose pre-trained "
            "weights it does not hold; name the training run (run)"
        )
    if alphas != [1.0] and getattr(settings, "use_dora", False):
        raise ModelsError(f"alphas={alphas}: {path!r} is a DoRA adapter, which is not linear in B")
    wanted = {name: list(value.shape) for name, value in get_peft_model_state_dict(adapted).items()}
    stored = _stored_shapes(Path(path))
    if stored and stored != wanted:
        name = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))[0]
        raise CheckpointError(
            f"the adapter {path!r} does not fit its base {base!r}: {name!r} has shape {stored.get(name)} in the "
            f"adapter and {wanted.get(name)} on the base"
        )


def _stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Tensor → shape in a local folder's safetensors files; empty for a hub id or other files."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    shapes[name] = list(tensors.get_slice(name).get_shape())
        except Exception as error:  # safetensors' own, not exported
            raise CheckpointError(f"cannot read {file}: {short(error)}") from None
    return shapes


def _identity(path: str, revision: str | None) -> dict[str, Any]:
    """Of a model by its content: the commit of a hub id, a hash of a folder.

    All of the folder's small files count, and of large ones the size, the ends and evenly spaced samples: training
    changes every one of them, and a hash of all would read hundreds of gigabytes at every start.
    """
    folder = Path(path)
    if not folder.is_dir():
        cached = cached_file(path, "config.json", revision=revision)
        return {"path": path, "revision": Path(str(cached)).parent.name}
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.name in ("scale_digrap.json", "README.md") or file.name.startswith("."):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with open(file, "rb") as data:
            for offset in sorted({*range(0, size, max(_SAMPLED, size // 64)), max(0, size - _SAMPLED)}):
                data.seek(offset)
                digest.update(data.read(_SAMPLED))
    return {"sha256": digest.hexdigest()}


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks_here
