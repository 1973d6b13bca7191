"""The typed configuration of ``scale-digrap evaluate``; imports no torch."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, TypedDict

from scale_digrap.config import STOP_SIGNALS, DataConfig
from scale_digrap.duration import seconds
from scale_digrap.settings import ConfigError, PathText, read_structured, read_values, shown, suggest, to_yaml
from scale_digrap.zero_config import ZeroConfig

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class CustomSuite(TypedDict, total=False):
    """A suite of one's own, or what replaces fields of a built-in one; only the keys that are given."""

    group: str
    shift: str
    metric: str
    shards: PathText | list[PathText]
    expected: int | None
    title: str
    description: str
    benchmark: str


class LeakageOptions(TypedDict, total=False):
    """Options of ``evaluation.leakage.check``."""

    train: PathText | list[PathText]
    limit: float
    near_limit: float
    distance: int
    images: bool
    workers: int
    cache_dir: PathText | None
    examples: int


class ShiftOptions(TypedDict, total=False):
    """Options of ``evaluation.shift.shift_scores``, and the model."""

    train: PathText | list[PathText]
    model: str | None
    samples: int | None
    suite_samples: int | None
    regularization: float | str
    batch_size: int
    workers: int


@dataclass(kw_only=True)
class SuitesConfig:
    """What is asked; see :func:`scale_digrap.evaluation.registry.load_suites` and docs/suites.md."""

    set: str | list[str] | None = None
    """A built-in set of suites (``frames-vqa``, ``gqa``, ``domainnet``, ``quickstart``), or a list of several."""

    folder: Optional[PathText] = None  # noqa: UP045
    """The shards of a built-in suite are ``FOLDER/NAME/*.tar``."""

    only: list[str] = field(default_factory=list)
    """Names of suites, to take fewer than the set."""

    missing: str = "error"
    """``error``, or ``allow``: suites of the set without shards are shown as missing, and averages with them are not
    given."""

    custom: dict[str, CustomSuite] = field(default_factory=dict)
    """Suites of one's own by name (``group``, ``shift``, ``metric``, ``shards``, ``expected``, …)."""

    metric: Optional[str] = None  # noqa: UP045
    """Overrides the metric of all VQA suites: ``vqa/official`` or ``vqa/lavis``."""


@dataclass(kw_only=True)
class ModelEntry:
    """A model to evaluate: a ``path`` or a ``run``."""

    path: Optional[PathText] = None  # noqa: UP045
    """Folder or hub id of a Hugging Face model, of a peft adapter (its base is named in it), or ``builtin:…``."""

    revision: Optional[str] = None  # noqa: UP045
    """Hub revision of ``path``."""

    run: Optional[PathText] = None  # noqa: UP045
    """Folder of a training run: its configuration and a checkpoint of it, of any engine and any number of ranks."""

    checkpoint: str = "newest"
    """Which checkpoint of the run: ``newest`` or a step."""

    base: Optional[PathText] = None  # noqa: UP045
    """Where the pre-trained model of the run lies now, if that is not where its configuration says."""

    alphas: list[float] = field(default_factory=lambda: [1.0])
    """Weights of the fine-tuned model in WiSE-FT mixtures with its pre-trained one; 1.0 is the fine-tuned model. Each
    is a row of the table. For runs and adapters."""

    method: Optional[str] = None  # noqa: UP045
    """Key of the method that this is a seed of; the entry's own name by default."""

    seed: int = 0
    """Tells the runs of one method apart."""

    label: Optional[str] = None  # noqa: UP045
    """The row's heading; the method's key by default."""

    family: Optional[str] = None  # noqa: UP045
    """Rows of one family look alike in plots: ``base``, ``full`` or ``lora``; by default what the model is."""


@dataclass(kw_only=True)
class PromptConfig:
    """How questions are put and in which precision they are answered. What is null is what a model was trained with:
    known of runs, and of folders that this package wrote; for other models it is that of the runs beside them, where
    these agree."""

    prompt: Optional[str] = None  # noqa: UP045
    """The prompt around a question; must contain ``{question}``."""

    chat_template: Optional[bool] = None  # noqa: UP045
    """Put the prompt into the processor's chat template, where it has one."""

    max_length: Optional[int] = None  # noqa: UP045
    """Longest prompt in tokens, image tokens included; longer questions are cut at a word."""

    attention: Optional[str] = None  # noqa: UP045
    """Attention implementation of Transformers."""

    dtype: str = "auto"
    """``float32``, ``bfloat16``, or ``auto``: ``bfloat16`` on a GPU, ``float32`` on a CPU."""


@dataclass(kw_only=True)
class EvaluateEngineConfig:
    """How a model is spread over the ranks."""

    name: str = "auto"
    """``replicated`` (every rank has a whole model and waits for nobody), ``fsdp`` (FSDP2) or ``deepspeed`` (ZeRO-3),
    or ``auto``: ``replicated`` where the weights take less than half of what is free on the device, else ``fsdp``."""

    device: str = "auto"
    """``auto`` (the accelerator where there is one), ``cpu`` or ``cuda``."""

    wrap: list[str] = field(default_factory=list)
    """FSDP: as ``sharding.wrap`` in training."""

    load_sharded: bool = True
    """As ``sharding.load_sharded`` in training."""

    zero: ZeroConfig = field(default_factory=lambda: ZeroConfig(stage=3))
    """DeepSpeed's settings; the other stages do not shard what evaluation needs."""

    timeout_s: float = 1800.0
    """Longest wait of a rank for the others, in seconds."""


@dataclass(kw_only=True)
class EvaluateConfig:
    """Everything an evaluation needs."""

    out: PathText = "runs/evaluation"
    """Everything is written here. The same command again goes on where it was."""

    title: str = ""
    """Of the report."""

    suites: SuitesConfig = field(default_factory=SuitesConfig)
    models: dict[str, ModelEntry] = field(default_factory=dict)
    """By name, in the order of the table's rows."""

    model: PromptConfig = field(default_factory=PromptConfig)
    engine: EvaluateEngineConfig = field(default_factory=EvaluateEngineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    """Where shards come from and how they are read, as in training (``cache_dir``, ``retries``, ``classes``, …)."""

    batch_size: int = 32
    """Questions per rank and batch."""

    workers: int = 0
    """Loader processes per rank; 0 loads in the evaluating process."""

    generation: dict[str, Any] = field(default_factory=dict)
    """Any setting of Transformers' ``GenerationConfig``, over greedy decoding of at most 16 tokens."""

    baseline: Optional[str] = None  # noqa: UP045
    """Key of the method that the others are compared with, question by question; usually the zero-shot model."""

    leakage: Optional[LeakageOptions] = None  # noqa: UP045
    """Look for the suites in training data: ``train`` (shards) and the options of ``evaluation.leakage.check``."""

    shift: Optional[ShiftOptions] = None  # noqa: UP045
    """Measure how far the suites are from training data: ``train`` (shards), ``model`` (an entry of ``models``, the
    baseline by default) and the options of ``evaluation.shift.shift_scores``."""

    max_time: Optional[str] = None  # noqa: UP045
    """Stop after the batch in which this much time has passed, for example ``3h50m``."""

    stop_signals: list[str] = field(default_factory=lambda: ["SIGTERM", "SIGUSR1", "SIGUSR2"])
    """Signals that stop the evaluation after the present batch."""

    progress: bool = True
    """Progress bar on rank 0; lines where standard error is no terminal."""


_CHOICES: dict[str, tuple[str, ...]] = {
    "engine.name": ("auto", "replicated", "fsdp", "deepspeed"),
    "engine.device": ("auto", "cpu", "cuda"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "suites.missing": ("error", "allow"),
}


def load_evaluate_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> EvaluateConfig:
    """Read a YAML file, apply ``key=value`` overrides in order, validate.

    Raises:
        ConfigError: unreadable file, unknown or mistyped key, wrong type, value out of range.
    """
    config: EvaluateConfig = read_structured(read_values(path, overrides, EvaluateConfig), EvaluateConfig)
    validate_evaluate(config)
    return config


def evaluate_config_to_yaml(config: EvaluateConfig) -> str:
    """The whole configuration, defaults included, as YAML that :func:`load_evaluate_config` reads back; what is secret
    is masked (:func:`scale_digrap.settings.shown`)."""
    return to_yaml(shown(config))


def wise_key(method: str, alpha: float) -> str:
    """Key of the row of a mixture; the method's own for the fine-tuned model."""
    return method if alpha == 1.0 else f"{method}-wise-{alpha:g}"


def validate_evaluate(config: EvaluateConfig) -> None:
    """Check what types alone cannot.

    Raises:
        ConfigError: naming the first key that is wrong.
    """
    for key, choices in _CHOICES.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if value not in choices:
            raise ConfigError(f"{key} must be one of {', '.join(choices)}; got {value!r}{suggest(str(value), choices)}")
    if not config.out.strip():
        raise ConfigError("out is empty: name a folder for predictions and the report")
    for key, value, low in (("batch_size", config.batch_size, 1), ("workers", config.workers, 0)):
        if value < low:
            raise ConfigError(f"{key} must be at least {low}, got {value}")
    if config.model.max_length is not None and config.model.max_length < 1:
        raise ConfigError(f"model.max_length must be at least 1, got {config.model.max_length}")
    if config.model.prompt is not None and "{question}" not in config.model.prompt:
        raise ConfigError(f"model.prompt must contain {{question}}, got {config.model.prompt!r}")
    if not (math.isfinite(config.engine.timeout_s) and config.engine.timeout_s > 0):
        raise ConfigError(f"engine.timeout_s must be greater than 0, got {config.engine.timeout_s}")
    if config.engine.zero.stage != 3:
        raise ConfigError(
            f"engine.zero.stage must be 3, got {config.engine.zero.stage}: the other stages leave parameters whole, "
            "which is engine.name=replicated"
        )
    for key in ("train", "mixture"):
        if getattr(config.data, key):
            raise ConfigError(f"data.{key} is of training: name the training data in leakage.train and shift.train")
    if config.max_time is not None:
        try:
            seconds(config.max_time)
        except ValueError as error:
            raise ConfigError(f"max_time: {error}") from None
    for name in config.stop_signals:
        if name not in STOP_SIGNALS:
            raise ConfigError(f"stop_signals must be among {', '.join(STOP_SIGNALS)}; got {name!r}")
    _check_models(config)
    for section, options in (("leakage", config.leakage), ("shift", config.shift)):
        if options is not None and not options.get("train"):
            raise ConfigError(f"{section}.train is empty: name the training shards, for example [data/train/*.tar]")
    if config.shift is not None and config.shift.get("model") not in (None, *config.models):
        raise ConfigError(f"shift.model={config.shift.get('model')!r} is not among models ({', '.join(config.models)})")


def _check_models(config: EvaluateConfig) -> None:
    if not config.models:
        raise ConfigError("models is empty: name what to evaluate, for example models.mine.path=runs/mine/final")
    rows: dict[tuple[str, int], str] = {}
    for name, entry in config.models.items():
        where = f"models.{name}"
        method = entry.method or name
        for key in (name, method):
            if not _KEY.fullmatch(key):
                raise ConfigError(f"{where}: {key!r} becomes a file name: use letters, digits, '.', '_', '+' and '-'")
        if (entry.path is None) == (entry.run is None):
            raise ConfigError(f"{where} must have one of path (a Hugging Face model) and run (a training run's folder)")
        if entry.run is not None and entry.revision is not None:
            raise ConfigError(f"{where}.revision is for path; a run's checkpoint is named by {where}.checkpoint")
        if entry.path is not None and (entry.checkpoint != "newest" or entry.base is not None):
            raise ConfigError(f"{where}: checkpoint and base are for run, path names a model itself")
        if entry.checkpoint != "newest" and not entry.checkpoint.isdecimal():
            raise ConfigError(f"{where}.checkpoint must be newest or a step, got {entry.checkpoint!r}")
        if not entry.alphas:
            raise ConfigError(f"{where}.alphas is empty: [1.0] is the model as it is")
        for alpha in entry.alphas:
            if not 0.0 <= alpha <= 1.0:
                raise ConfigError(f"{where}.alphas must be between 0 (pre-trained) and 1 (fine-tuned), got {alpha}")
            row = (wise_key(method, alpha), entry.seed)
            if row in rows:
                raise ConfigError(
                    f"{where} and models.{rows[row]} would both be {row[0]!r} with seed {row[1]}: set another seed, or "
                    "another method"
                )
            rows[row] = name
    methods = list(dict.fromkeys(key for key, _ in rows))
    if config.baseline is not None and config.baseline not in methods:
        raise ConfigError(
            f"baseline={config.baseline!r} is no row of the table ({', '.join(methods)})"
            f"{suggest(config.baseline, methods)}"
        )
